//! What a function is called with.

use std::sync::Arc;

use super::{
    error::{Error, Result},
    value::Value,
};

/// Values by place, and by name.
#[derive(Debug, Clone, Default)]
pub(super) struct Arguments {
    pub positional: Vec<Value>,
    pub named: Vec<(Arc<str>, Value)>,
}

impl Arguments {
    /// The value of each parameter, of which the first so many must be given.
    ///
    /// # Errors
    /// If there are too few, too many, or some by an unknown name, or two for one.
    pub fn bind<const N: usize>(
        &self,
        function: &str,
        parameters: [&str; N],
        required: usize,
    ) -> Result<[Option<Value>; N]> {
        if self.positional.len() > N {
            let given = self.positional.len();
            return Err(Error::new(format!("{function} takes at most {N} arguments, not {given}")));
        }
        let mut values: [Option<Value>; N] = std::array::from_fn(|i| self.positional.get(i).cloned());
        for (name, value) in &self.named {
            let Some(at) = parameters.iter().position(|parameter| **parameter == **name) else {
                return Err(Error::new(format!("{function} got an unexpected keyword argument '{name}'")));
            };
            if values[at].replace(value.clone()).is_some() {
                return Err(Error::new(format!("{function} got multiple values for argument '{name}'")));
            }
        }
        match values[..required].iter().position(Option::is_none) {
            Some(at) => {
                let missing = parameters[at];
                Err(Error::new(format!("{function} is missing its argument '{missing}'")))
            }
            None => Ok(values),
        }
    }

    /// Nothing may be given.
    pub fn none(&self, function: &str) -> Result<()> {
        self.bind(function, [], 0).map(|[]| ())
    }
}

/// A text that was given for a parameter.
pub(super) fn text(function: &str, value: &Value) -> Result<Arc<str>> {
    match value {
        Value::Str(text) => Ok(text.text.clone()),
        other => Err(Error::new(format!("{function}: expected a text, not {}", other.kind()))),
    }
}

/// An integer that was given for a parameter.
pub(super) fn int(function: &str, value: &Value) -> Result<i128> {
    value.as_int().ok_or_else(|| Error::new(format!("{function}: expected an integer, not {}", value.kind())))
}

/// A width or a number of something: what is negative is none of it.
pub(super) fn count(function: &str, value: &Value) -> Result<usize> {
    Ok(usize::try_from(int(function, value)?.max(0)).unwrap_or(usize::MAX))
}

/// Whether what was given, if anything, counts as true.
pub(super) fn flag(value: &Option<Value>) -> bool {
    value.as_ref().is_some_and(Value::is_true)
}
