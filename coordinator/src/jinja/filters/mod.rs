//! Jinja's filters.

mod choose;
mod lists;
mod numbers;
mod texts;

use std::sync::Arc;

use super::{
    access::item,
    arguments::Arguments,
    bounds::Bounds,
    error::{Error, Result},
    json::to_json,
    value::Value,
};

/// A value through a filter.
///
/// # Errors
/// If there is no such filter, or it fails.
pub(super) fn apply(bounds: &Bounds, name: &str, value: &Value, arguments: &Arguments) -> Result<Value> {
    bounds.step()?;
    match name {
        "tojson" => to_json(bounds, value, arguments),
        "default" | "d" => {
            let [default, boolean] = arguments.bind("default", ["default_value", "boolean"], 0)?;
            let is_absent = value.is_undefined() || (super::arguments::flag(&boolean) && !value.is_true());
            Ok(if is_absent { default.unwrap_or_else(|| Value::from("")) } else { value.clone() })
        }
        "attr" => {
            let [name] = arguments.bind("attr", ["name"], 1)?;
            let name: Arc<str> = name.unwrap_or(Value::None).display(bounds)?.into();
            match super::access::attribute(bounds, value, &name)? {
                // Items of dicts are no attributes.
                found
                    if matches!(value, Value::Dict(_))
                        && !matches!(found, Value::Method(_) | Value::Undefined(_)) =>
                {
                    Ok(Value::Undefined(format!("'dict object' has no attribute '{name}'").into()))
                }
                found => Ok(found),
            }
        }
        "map" | "select" | "reject" | "selectattr" | "rejectattr" => {
            choose::apply(bounds, name, value, arguments)
        }
        "abs" | "float" | "int" | "round" | "filesizeformat" => {
            numbers::apply(bounds, name, value, arguments)
        }
        "batch" | "slice" | "count" | "length" | "dictsort" | "first" | "last" | "groupby" | "items"
        | "join" | "list" | "max" | "min" | "random" | "reverse" | "sort" | "sum" | "unique" => {
            lists::apply(bounds, name, value, arguments)
        }
        other => texts::apply(bounds, other, value, arguments),
    }
}

/// What of a value `attribute="a.b.0"` names.
struct Getter {
    path: Vec<Value>,
    default: Option<Value>,
}

impl Getter {
    /// An attribute as a filter is given it; nothing is the value itself.
    fn new(attribute: Option<&Value>, default: Option<Value>) -> Self {
        let part = |part: &str| part.parse::<i128>().map_or_else(|_| Value::from(part), Value::Int);
        let path = match attribute {
            None | Some(Value::None) => Vec::new(),
            Some(Value::Str(path)) => path.text.split('.').map(part).collect(),
            Some(index) => vec![index.clone()],
        };
        Getter { path, default }
    }

    fn get(&self, bounds: &Bounds, value: &Value) -> Result<Value> {
        let mut found = value.clone();
        for part in &self.path {
            found = item(bounds, &found, part)?;
            if let (Value::Undefined(_), Some(default)) = (&found, &self.default) {
                found = default.clone();
            }
        }
        Ok(found)
    }
}

/// What a value is compared by: a text by its small letters, unless case matters.
fn without_case(bounds: &Bounds, value: Value, case_sensitive: bool) -> Result<Value> {
    match &value {
        Value::Str(text) if !case_sensitive => Value::text(bounds, text.text.to_lowercase()),
        _ => Ok(value),
    }
}

fn no_filter(name: &str) -> Error {
    Error::new(format!("there is no filter {name:?}"))
}
