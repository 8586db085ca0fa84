//! What a template computes with: Python's values, as far as templates can have them.

mod dict;

use std::{
    cell::RefCell,
    rc::{Rc, Weak},
    sync::Arc,
};

use serde_json::Value as Json;

use super::{
    bounds::Bounds,
    error::{Error, Result},
};
pub(super) use dict::Dict;

/// Lists and dicts inside each other: whatever walks values recurses so deep.
const MAX_DEPTH: u16 = 100;
/// A value.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// Nothing, with what whoever computes with it is told.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Text),
    Bytes(Rc<[u8]>),
    List(Rc<Seq>),
    Tuple(Rc<Seq>),
    Dict(Rc<Dict>),
    /// What `keys()`, `values()` and `items()` of a dict give.
    View(Rc<Dict>, View),
    /// First, number of items, and step.
    Range(i128, usize, i128),
    /// A generator: its items can be had once.
    Iter(Rc<RefCell<Vec<Value>>>),
    Namespace(Namespace),
    /// A method of a value that is not called yet.
    Method(Rc<(Value, Arc<str>)>),
    /// Something that is called, or has attributes, and is no data: a function, a macro, a loop.
    Object(Rc<dyn Object>),
}

/// A text. `safe` says that it was marked so: what is added to it is escaped.
#[derive(Debug, Clone)]
pub(super) struct Text {
    pub text: Arc<str>,
    pub safe: bool,
}

/// What alone may change. It lives as long as the rendering, and values only know where it is: so they have no circles.
#[derive(Debug, Clone)]
pub(super) struct Namespace(Weak<RefCell<Dict>>);

/// Which part of a dict a view shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    Keys,
    Values,
    Items,
}

/// What is no data.
pub(super) trait Object: std::fmt::Debug {
    /// As it is printed.
    fn name(&self) -> String;
    /// An attribute.
    fn attribute(&self, _name: &str) -> Option<Value> {
        None
    }
    /// For whoever knows which it is.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// The items of a list or a tuple.
#[derive(Debug)]
pub(super) struct Seq {
    pub items: Vec<Value>,
    depth: u16,
    /// A tuple of `groupby`, whose items have names.
    pub is_group: bool,
}

impl Value {
    /// A text that was made, counted.
    pub fn text(bounds: &Bounds, text: impl Into<String>) -> Result<Self> {
        let text: String = text.into();
        bounds.reserve_text(text.len())?;
        Ok(Value::from(text.as_str()))
    }

    pub fn list(bounds: &Bounds, items: Vec<Value>) -> Result<Self> {
        Ok(Value::List(Seq::new(bounds, items)?))
    }

    pub fn tuple(bounds: &Bounds, items: Vec<Value>) -> Result<Self> {
        Ok(Value::Tuple(Seq::new(bounds, items)?))
    }

    /// A generator of these.
    pub fn iter(bounds: &Bounds, items: Vec<Value>) -> Result<Self> {
        bounds.reserve(size_of_val(items.as_slice()))?;
        if depth_of(&items) >= MAX_DEPTH {
            return Err(too_deep());
        }
        Ok(Value::Iter(Rc::new(RefCell::new(items))))
    }

    pub fn dict(dict: Dict) -> Self {
        Value::Dict(Rc::new(dict))
    }

    /// The value of JSON, whose parser bounds how deep it is.
    pub fn from_json(bounds: &Bounds, json: &Json) -> Result<Self> {
        Ok(match json {
            Json::Null => Value::None,
            Json::Bool(b) => Value::Bool(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => Value::Int(n.into()),
                (_, Some(n)) => Value::Int(n.into()),
                _ => Value::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Value::text(bounds, text.as_str())?,
            Json::Array(list) => {
                let items = list.iter().map(|item| Value::from_json(bounds, item));
                Value::list(bounds, items.collect::<Result<_>>()?)?
            }
            Json::Object(object) => {
                let mut dict = Dict::default();
                for (key, value) in object {
                    dict.insert(
                        bounds,
                        Value::text(bounds, key.as_str())?,
                        Value::from_json(bounds, value)?,
                    )?;
                }
                Value::dict(dict)
            }
        })
    }

    /// The name of its type in Python.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Undefined(_) => "Undefined",
            Value::None => "NoneType",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(Text { safe: false, .. }) => "str",
            Value::Str(_) => "Markup",
            Value::Bytes(_) => "bytes",
            Value::List(_) => "list",
            Value::Tuple(_) => "tuple",
            Value::Dict(_) => "dict",
            Value::View(_, View::Keys) => "dict_keys",
            Value::View(_, View::Values) => "dict_values",
            Value::View(_, View::Items) => "dict_items",
            Value::Range(..) => "range",
            Value::Iter(_) => "generator",
            Value::Namespace(_) => "Namespace",
            Value::Method(_) => "builtin_function_or_method",
            Value::Object(_) => "function",
        }
    }

    pub fn is_undefined(&self) -> bool {
        matches!(self, Value::Undefined(_))
    }

    pub fn is_true(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(b) => *b,
            Value::Int(n) => *n != 0,
            Value::Float(x) => *x != 0.0,
            Value::Str(text) => !text.text.is_empty(),
            Value::Bytes(bytes) => !bytes.is_empty(),
            Value::List(seq) | Value::Tuple(seq) => !seq.items.is_empty(),
            Value::Dict(dict) | Value::View(dict, _) => !dict.entries().is_empty(),
            Value::Range(_, count, _) => *count != 0,
            Value::Iter(_) | Value::Namespace(_) | Value::Method(_) | Value::Object(_) => true,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Str(text) => Some(&text.text),
            _ => None,
        }
    }

    /// An integer, of which True and False are two.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Value::Int(n) => Some(*n),
            Value::Bool(b) => Some(i128::from(*b)),
            _ => None,
        }
    }

    /// A number as a float.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Value::Float(x) => Some(*x),
            other => other.as_int().map(|n| n as f64),
        }
    }

    /// Its items, in order; those of a generator are gone with that.
    pub fn items(&self, bounds: &Bounds) -> Result<Vec<Value>> {
        let items = match self {
            Value::Undefined(_) => Vec::new(),
            Value::Str(text) => {
                bounds.work(text.text.len())?;
                text.text.chars().map(|c| Value::from(c.encode_utf8(&mut [0; 4]) as &str)).collect()
            }
            Value::Bytes(bytes) => bytes.iter().map(|byte| Value::Int(i128::from(*byte))).collect(),
            Value::List(seq) | Value::Tuple(seq) => seq.items.clone(),
            Value::Dict(dict) => dict.keys().cloned().collect(),
            Value::View(dict, View::Keys) => dict.keys().cloned().collect(),
            Value::View(dict, View::Values) => {
                dict.entries().iter().map(|(_, value)| value.clone()).collect()
            }
            Value::View(dict, View::Items) => {
                let pair =
                    |(key, value): &(Value, Value)| Value::tuple(bounds, vec![key.clone(), value.clone()]);
                dict.entries().iter().map(pair).collect::<Result<_>>()?
            }
            Value::Range(first, count, step) => {
                bounds.work(*count)?;
                (0..*count).map(|i| Value::Int(first + i as i128 * step)).collect()
            }
            Value::Iter(items) => std::mem::take(&mut *items.borrow_mut()),
            other => return Err(Error::new(format!("'{}' object is not iterable", other.kind()))),
        };
        bounds.reserve(size_of_val(items.as_slice()))?;
        Ok(items)
    }

    /// How many items it has, as `len` says.
    pub fn len(&self) -> Result<usize> {
        Ok(match self {
            Value::Undefined(_) => 0,
            Value::Str(text) => text.text.chars().count(),
            Value::Bytes(bytes) => bytes.len(),
            Value::List(seq) | Value::Tuple(seq) => seq.items.len(),
            Value::Dict(dict) | Value::View(dict, _) => dict.entries().len(),
            Value::Range(_, count, _) => *count,
            other => return Err(Error::new(format!("object of type '{}' has no len()", other.kind()))),
        })
    }

    fn depth(&self) -> u16 {
        match self {
            Value::List(seq) | Value::Tuple(seq) => seq.depth,
            Value::Dict(dict) | Value::View(dict, _) => dict.depth(),
            Value::Method(method) => 1 + method.0.depth(),
            // Generators and objects are not looked into, so they count as what they may hold at most.
            Value::Iter(items) => 1 + depth_of(&items.borrow()),
            _ => 0,
        }
    }
}

fn depth_of(items: &[Value]) -> u16 {
    items.iter().map(Value::depth).max().unwrap_or(0)
}

fn too_deep() -> Error {
    Error::new(format!("more than {MAX_DEPTH} lists and dicts are inside each other"))
}

impl Seq {
    fn new(bounds: &Bounds, items: Vec<Value>) -> Result<Rc<Self>> {
        bounds.reserve(size_of::<Seq>() + size_of_val(items.as_slice()))?;
        let depth = 1 + depth_of(&items);
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        Ok(Rc::new(Seq { items, depth, is_group: false }))
    }

    /// A tuple of `groupby`.
    pub fn group(bounds: &Bounds, key: Value, list: Value) -> Result<Value> {
        let seq = Seq::new(bounds, vec![key, list])?;
        Ok(Value::Tuple(Rc::new(Seq { items: seq.items.clone(), depth: seq.depth, is_group: true })))
    }
}

impl Namespace {
    pub fn new(bounds: &Bounds, dict: Dict) -> Self {
        let dict = Rc::new(RefCell::new(dict));
        bounds.keep(dict.clone());
        Namespace(Rc::downgrade(&dict))
    }

    /// What it holds.
    pub fn dict(&self) -> Dict {
        self.0.upgrade().map(|dict| dict.borrow().clone()).unwrap_or_default()
    }

    pub fn get(&self, name: &str) -> Option<Value> {
        self.0.upgrade()?.borrow().get_str(name).cloned()
    }

    pub fn set(&self, bounds: &Bounds, name: Value, value: Value) -> Result<()> {
        match self.0.upgrade() {
            Some(dict) => dict.borrow_mut().insert(bounds, name, value),
            None => Ok(()),
        }
    }

    pub fn is(&self, other: &Self) -> bool {
        Weak::ptr_eq(&self.0, &other.0)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Str(Text { text: text.into(), safe: false })
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Value::Bool(b)
    }
}

impl From<usize> for Value {
    fn from(n: usize) -> Self {
        Value::Int(n as i128)
    }
}
