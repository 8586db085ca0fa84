//! Filters that apply filters and tests to the items of a list.

use super::{
    super::{
        arguments::{Arguments, text},
        bounds::Bounds,
        checks::check,
        error::{Error, Result},
        value::Value,
    },
    Getter, apply as apply_filter,
};

/// `map`, `select`, `reject`, `selectattr` and `rejectattr`: each gives a generator.
pub(super) fn apply(bounds: &Bounds, name: &str, value: &Value, arguments: &Arguments) -> Result<Value> {
    let items = value.items(bounds)?;
    let kept = match name {
        "map" => map(bounds, items, arguments)?,
        _ => select(bounds, name, items, arguments)?,
    };
    Value::iter(bounds, kept)
}

fn map(bounds: &Bounds, items: Vec<Value>, arguments: &Arguments) -> Result<Vec<Value>> {
    if arguments.positional.is_empty() {
        let [attribute, default] =
            arguments.bind("map", ["attribute", "default"], 0).and_then(|[a, d]| match a {
                Some(a) => Ok([Some(a), d]),
                None => Err(Error::new("map requires a filter argument")),
            })?;
        let getter = Getter::new(attribute.as_ref(), default);
        return items.iter().map(|item| getter.get(bounds, item)).collect();
    }
    let filter = text("map", &arguments.positional[0])?;
    let rest = Arguments { positional: arguments.positional[1..].to_vec(), named: arguments.named.clone() };
    items.iter().map(|item| apply_filter(bounds, &filter, item, &rest)).collect()
}

fn select(bounds: &Bounds, name: &str, items: Vec<Value>, arguments: &Arguments) -> Result<Vec<Value>> {
    let mut rest = arguments.positional.iter();
    let getter = match name.ends_with("attr") {
        true => {
            let attribute = rest
                .next()
                .ok_or_else(|| Error::new(format!("{name}: missing parameter for attribute name")))?;
            Getter::new(Some(attribute), None)
        }
        false => Getter::new(None, None),
    };
    let test = rest.next().map(|test| text(name, test)).transpose()?;
    let rest = Arguments { positional: rest.cloned().collect(), named: arguments.named.clone() };
    let wanted = name.starts_with("select");
    let mut kept = Vec::new();
    for item in items {
        let value = getter.get(bounds, &item)?;
        let holds = match &test {
            Some(test) => check(bounds, test, &value, &rest)?,
            None => value.is_true(),
        };
        if holds == wanted {
            kept.push(item);
        }
    }
    Ok(kept)
}
