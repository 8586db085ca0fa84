//! Dicts, and what can be a key.

use std::{collections::HashMap, rc::Rc, sync::Arc};

use super::{
    super::{
        bounds::Bounds,
        error::{Error, Result},
    },
    MAX_DEPTH, Value, too_deep,
};

/// Entries from which on a dict has an index.
const FEW: usize = 8;

/// A dict, in the order in which its keys came.
#[derive(Debug, Default, Clone)]
pub(in super::super) struct Dict {
    entries: Vec<(Value, Value)>,
    index: HashMap<Key, usize>,
    depth: u16,
}

/// What tells keys of dicts apart. True, 1 and 1.0 are one key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    None,
    Int(i128),
    Float(u64),
    Str(Arc<str>),
    Bytes(Rc<[u8]>),
    Tuple(Vec<Key>),
}

impl Dict {
    /// Sets an entry; a key that is there keeps its place.
    ///
    /// # Errors
    /// If the key can be none.
    pub fn insert(&mut self, bounds: &Bounds, key: Value, value: Value) -> Result<()> {
        bounds.reserve(3 * size_of::<(Value, Value)>())?;
        let name = Key::of(&key)?;
        self.depth = self.depth.max(1 + value.depth()).max(1 + key.depth());
        if self.depth > MAX_DEPTH {
            return Err(too_deep());
        }
        if let Some(at) = self.position(&name) {
            self.entries[at].1 = value;
            return Ok(());
        }
        self.entries.push((key, value));
        match self.entries.len() {
            n if n <= FEW => {}
            n if n == FEW + 1 => {
                for (at, (key, _)) in self.entries.iter().enumerate() {
                    self.index.insert(Key::of(key)?, at);
                }
            }
            n => drop(self.index.insert(name, n - 1)),
        }
        Ok(())
    }

    /// The value of a key.
    ///
    /// # Errors
    /// If it can be no key.
    pub fn get(&self, key: &Value) -> Result<Option<&Value>> {
        Ok(self.position(&Key::of(key)?).map(|at| &self.entries[at].1))
    }

    pub fn get_str(&self, key: &str) -> Option<&Value> {
        self.position(&Key::Str(key.into())).map(|at| &self.entries[at].1)
    }

    fn position(&self, key: &Key) -> Option<usize> {
        if self.entries.len() > FEW {
            return self.index.get(key).copied();
        }
        self.entries.iter().position(|(other, _)| match (other, key) {
            (Value::Str(a), Key::Str(b)) => *a.text == **b,
            (Value::Str(_), _) => false,
            (other, key) => Key::of(other).is_ok_and(|other| other == *key),
        })
    }

    /// Lists and dicts inside each other, itself included.
    pub fn depth(&self) -> u16 {
        self.depth
    }

    pub fn keys(&self) -> impl Iterator<Item = &Value> {
        self.entries.iter().map(|(key, _)| key)
    }

    pub fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }
}

impl Key {
    fn of(value: &Value) -> Result<Self> {
        Ok(match value {
            Value::None => Key::None,
            Value::Bool(_) | Value::Int(_) => Key::Int(value.as_int().unwrap_or_default()),
            Value::Float(x) if x.fract() == 0.0 && x.abs() < 1e30 => Key::Int(*x as i128),
            Value::Float(x) => Key::Float(x.to_bits()),
            Value::Str(text) => Key::Str(text.text.clone()),
            Value::Bytes(bytes) => Key::Bytes(bytes.clone()),
            Value::Tuple(seq) => Key::Tuple(seq.items.iter().map(Key::of).collect::<Result<_>>()?),
            other => return Err(Error::new(format!("unhashable type: '{}'", other.kind()))),
        })
    }
}
