//! Filters of lists.

use super::{
    super::{
        arguments::{Arguments, count, flag},
        bounds::Bounds,
        compare::{equal, order, sort},
        error::{Error, Result},
        value::{Seq, Text, Value},
    },
    Getter, no_filter, without_case,
};

/// Applies the filter of this name.
pub(super) fn apply(bounds: &Bounds, name: &str, value: &Value, arguments: &Arguments) -> Result<Value> {
    match name {
        "count" | "length" => {
            arguments.none(name)?;
            value.len().map(Value::from)
        }
        "list" => {
            arguments.none(name)?;
            Value::list(bounds, value.items(bounds)?)
        }
        "first" | "last" | "random" => {
            arguments.none(name)?;
            let items = value.items(bounds)?;
            let found = match name {
                "first" => items.first(),
                "last" => items.last(),
                _ if items.is_empty() => None,
                _ => items.get((uuid::Uuid::new_v4().as_u128() % items.len() as u128) as usize),
            };
            let nothing = || Value::Undefined(format!("No {name} item, sequence was empty.").into());
            Ok(found.cloned().unwrap_or_else(nothing))
        }
        "items" => {
            arguments.none(name)?;
            match value {
                Value::Undefined(_) => Value::iter(bounds, Vec::new()),
                Value::Dict(dict) => {
                    let pairs = Value::View(dict.clone(), super::super::value::View::Items);
                    Value::iter(bounds, pairs.items(bounds)?)
                }
                _ => Err(Error::new("Can only get item pairs from a mapping.")),
            }
        }
        "reverse" => {
            arguments.none(name)?;
            if let Value::Str(text) = value {
                bounds.reserve_text(text.text.len())?;
                let reversed: String = text.text.chars().rev().collect();
                return Ok(Value::Str(Text { text: reversed.into(), safe: text.safe }));
            }
            let mut items = value.items(bounds)?;
            items.reverse();
            Value::iter(bounds, items)
        }
        "join" => join(bounds, value, arguments),
        "sort" => {
            let [reverse, case, attribute] =
                arguments.bind(name, ["reverse", "case_sensitive", "attribute"], 0)?;
            // Several attributes may be given, with commas between them.
            let getters: Vec<Getter> = match &attribute {
                Some(Value::Str(text)) => {
                    text.text.split(',').map(|a| Getter::new(Some(&Value::from(a)), None)).collect()
                }
                other => vec![Getter::new(other.as_ref(), None)],
            };
            let key = |item: &Value| {
                let parts =
                    getters.iter().map(|getter| without_case(bounds, getter.get(bounds, item)?, flag(&case)));
                Value::list(bounds, parts.collect::<Result<_>>()?)
            };
            Value::list(bounds, sort(bounds, value.items(bounds)?, flag(&reverse), &key)?)
        }
        "dictsort" => {
            let [case, by, reverse] = arguments.bind(name, ["case_sensitive", "by", "reverse"], 0)?;
            let at = match by.as_ref().map_or(Some("key"), Value::as_str) {
                Some("key") => 0,
                Some("value") => 1,
                _ => return Err(Error::new("You can only sort by either \"key\" or \"value\"")),
            };
            let Value::Dict(dict) = value else {
                return Err(Error::new(format!("dictsort: expected a dict, not {}", value.kind())));
            };
            let pairs = Value::View(dict.clone(), super::super::value::View::Items).items(bounds)?;
            let getter = Getter::new(Some(&Value::Int(at)), None);
            let key = |pair: &Value| without_case(bounds, getter.get(bounds, pair)?, flag(&case));
            Value::list(bounds, sort(bounds, pairs, flag(&reverse), &key)?)
        }
        "min" | "max" => {
            let [case, attribute] = arguments.bind(name, ["case_sensitive", "attribute"], 0)?;
            let getter = Getter::new(attribute.as_ref(), None);
            let key = |item: &Value| without_case(bounds, getter.get(bounds, item)?, flag(&case));
            let mut best: Option<(Value, Value)> = None;
            for item in value.items(bounds)? {
                let of_item = key(&item)?;
                let is_better = match &best {
                    None => true,
                    Some((of_best, _)) => {
                        let (sign, wanted) = if name == "min" {
                            ("<", std::cmp::Ordering::Less)
                        } else {
                            (">", std::cmp::Ordering::Greater)
                        };
                        order(bounds, sign, &of_item, of_best)? == Some(wanted)
                    }
                };
                if is_better {
                    best = Some((of_item, item));
                }
            }
            let nothing = || Value::Undefined("No aggregated item, sequence was empty.".into());
            Ok(best.map_or_else(nothing, |(_, item)| item))
        }
        "sum" => {
            let [attribute, start] = arguments.bind(name, ["attribute", "start"], 0)?;
            let getter = Getter::new(attribute.as_ref(), None);
            let mut sum = start.unwrap_or(Value::Int(0));
            for item in value.items(bounds)? {
                let add = super::super::arithmetic::Operator::Add;
                sum = super::super::arithmetic::apply(bounds, add, &sum, &getter.get(bounds, &item)?)?;
            }
            Ok(sum)
        }
        "unique" => {
            let [case, attribute] = arguments.bind(name, ["case_sensitive", "attribute"], 0)?;
            let getter = Getter::new(attribute.as_ref(), None);
            let mut seen = super::super::value::Dict::default();
            let mut kept = Vec::new();
            for item in value.items(bounds)? {
                let key = without_case(bounds, getter.get(bounds, &item)?, flag(&case))?;
                if seen.get(&key)?.is_none() {
                    seen.insert(bounds, key, Value::None)?;
                    kept.push(item);
                }
            }
            Value::iter(bounds, kept)
        }
        "groupby" => group_by(bounds, value, arguments),
        "batch" | "slice" => in_parts(bounds, name, value, arguments),
        other => Err(no_filter(other)),
    }
}

fn join(bounds: &Bounds, value: &Value, arguments: &Arguments) -> Result<Value> {
    let [between, attribute] = arguments.bind("join", ["d", "attribute"], 0)?;
    let between = between.unwrap_or_else(|| Value::from("")).display(bounds)?;
    let getter = Getter::new(attribute.as_ref(), None);
    let mut joined = String::new();
    for (i, item) in value.items(bounds)?.iter().enumerate() {
        joined.push_str(if i == 0 { "" } else { &between });
        joined.push_str(&getter.get(bounds, item)?.display(bounds)?);
        if joined.len() > super::super::bounds::MAX_TEXT {
            break;
        }
    }
    Value::text(bounds, joined)
}

fn group_by(bounds: &Bounds, value: &Value, arguments: &Arguments) -> Result<Value> {
    let [attribute, default, case] =
        arguments.bind("groupby", ["attribute", "default", "case_sensitive"], 1)?;
    let getter = Getter::new(attribute.as_ref(), default);
    let key = |item: &Value| without_case(bounds, getter.get(bounds, item)?, flag(&case));
    let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
    for item in sort(bounds, value.items(bounds)?, false, &key)? {
        let of_item = key(&item)?;
        match groups.last_mut() {
            Some((of_group, _, items)) if equal(bounds, of_group, &of_item)? => items.push(item),
            // A group's name is that of its first item, as it is.
            _ => groups.push((of_item, getter.get(bounds, &item)?, vec![item])),
        }
    }
    let groups =
        groups.into_iter().map(|(_, name, items)| Seq::group(bounds, name, Value::list(bounds, items)?));
    Value::list(bounds, groups.collect::<Result<_>>()?)
}

/// `batch`: lists of so many items; `slice`: so many lists.
fn in_parts(bounds: &Bounds, name: &str, value: &Value, arguments: &Arguments) -> Result<Value> {
    let parameter = if name == "batch" { "linecount" } else { "slices" };
    let [number, fill] = arguments.bind(name, [parameter, "fill_with"], 1)?;
    let number = count(name, &number.unwrap_or(Value::None))?;
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
    let items = value.items(bounds)?;
    bounds.reserve(number.min(1 << 40).saturating_mul(size_of::<Value>()))?;
    let mut parts = Vec::new();
    if number == 0 {
        return Err(Error::new(format!("{name}: expected at least 1")));
    }
    if name == "batch" {
        for chunk in items.chunks(number) {
            let mut part = chunk.to_vec();
            if let Some(fill) = &fill {
                part.resize(number, fill.clone());
            }
            parts.push(Value::list(bounds, part)?);
        }
    } else {
        let (each, more) = (items.len() / number, items.len() % number);
        let mut rest = items.as_slice();
        for i in 0..number {
            let (part, behind) = rest.split_at(each + usize::from(i < more));
            rest = behind;
            let mut part = part.to_vec();
            if let Some(fill) = &fill
                && i >= more
                && more > 0
            {
                part.push(fill.clone());
            }
            parts.push(Value::list(bounds, part)?);
        }
    }
    Value::iter(bounds, parts)
}
