//! Functions that every template has, and what they make.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
};

use chrono::Local;

use super::{
    arguments::{Arguments, int, text},
    bounds::Bounds,
    error::{Error, Result},
    methods::from_keys,
    strftime::strftime,
    value::{Dict, Namespace, Object, Value},
};

/// Most numbers of a range: the sandbox's bound.
const MAX_RANGE: usize = 100_000;

/// The functions, by name.
const FUNCTIONS: [(&str, Function); 8] = [
    ("range", Function::Range),
    ("dict", Function::Dict),
    ("namespace", Function::Namespace),
    ("cycler", Function::Cycler),
    ("joiner", Function::Joiner),
    ("lipsum", Function::Lipsum),
    ("raise_exception", Function::Raise),
    ("strftime_now", Function::Now),
];

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Range,
    Dict,
    FromKeys,
    Namespace,
    Cycler,
    Joiner,
    Lipsum,
    Raise,
    Now,
}

/// The function of this name.
pub(super) fn function(name: &str) -> Option<Value> {
    let (_, function) = FUNCTIONS.iter().find(|(other, _)| *other == name)?;
    Some(Value::Object(Rc::new(*function)))
}

impl Object for Function {
    fn name(&self) -> String {
        let named = FUNCTIONS.iter().find(|(_, function)| function == self);
        format!("<function {}>", named.map_or("fromkeys", |(name, _)| name))
    }

    fn attribute(&self, name: &str) -> Option<Value> {
        (*self == Function::Dict && name == "fromkeys").then(|| Value::Object(Rc::new(Function::FromKeys)))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Function {
    /// Calls it.
    pub fn call(self, bounds: &Bounds, arguments: &Arguments) -> Result<Value> {
        match self {
            Function::Range => range(arguments),
            Function::Dict => Ok(Value::dict(dict(bounds, "dict()", arguments)?)),
            Function::FromKeys => from_keys(bounds, arguments),
            Function::Namespace => {
                let dict = dict(bounds, "namespace()", arguments)?;
                dict.keys().try_for_each(check_attribute)?;
                Ok(Value::Namespace(Namespace::new(bounds, dict)))
            }
            Function::Cycler => {
                if arguments.positional.is_empty() || !arguments.named.is_empty() {
                    return Err(Error::new("cycler(): expected at least one item"));
                }
                let items = arguments.positional.clone();
                Ok(Value::Object(Rc::new(Cycler { items, at: Rc::default() })))
            }
            Function::Joiner => {
                let [between] = arguments.bind("joiner()", ["sep"], 0)?;
                let between = between.unwrap_or_else(|| Value::from(", "));
                Ok(Value::Object(Rc::new(Joiner { between, used: Cell::new(false) })))
            }
            Function::Lipsum => Err(Error::new("lipsum() is not supported here: its text is a random one")),
            Function::Raise => {
                let [message] = arguments.bind("raise_exception()", ["message"], 1)?;
                Err(Error::raised(message.unwrap_or(Value::None).display(bounds)?))
            }
            Function::Now => {
                let [format] = arguments.bind("strftime_now()", ["format"], 1)?;
                let format = text("strftime_now()", &format.unwrap_or(Value::None))?;
                Value::text(bounds, strftime(&format, Local::now()))
            }
        }
    }
}

/// Refuses a name that attributes of namespaces may not have.
pub(super) fn check_attribute(name: &Value) -> Result<()> {
    match name.as_str() {
        Some(name) if name.starts_with('_') => {
            let why = "chat templates cannot store attributes that begin with an underscore on a namespace";
            Err(Error::new(format!("{why}, such as '{name}'")))
        }
        _ => Ok(()),
    }
}

fn dict(bounds: &Bounds, function: &str, arguments: &Arguments) -> Result<Dict> {
    let mut dict = match &arguments.positional[..] {
        [] => Dict::default(),
        [Value::Dict(dict)] => (**dict).clone(),
        [pairs] => {
            let mut dict = Dict::default();
            for pair in pairs.items(bounds)? {
                match &pair.items(bounds)?[..] {
                    [key, value] => dict.insert(bounds, key.clone(), value.clone())?,
                    _ => return Err(Error::new(format!("{function}: expected pairs"))),
                }
            }
            dict
        }
        several => {
            return Err(Error::new(format!("{function} takes at most 1 argument, not {}", several.len())));
        }
    };
    bounds.reserve(size_of_val(dict.entries()))?;
    for (name, value) in &arguments.named {
        dict.insert(bounds, Value::from(&**name), value.clone())?;
    }
    Ok(dict)
}

fn range(arguments: &Arguments) -> Result<Value> {
    let numbers =
        arguments.positional.iter().map(|value| int("range()", value)).collect::<Result<Vec<_>>>()?;
    if !arguments.named.is_empty() {
        return Err(Error::new("range() takes no keyword arguments"));
    }
    let (first, end, step) = match numbers[..] {
        [end] => (0, end, 1),
        [first, end] => (first, end, 1),
        [first, end, step] => (first, end, step),
        _ => return Err(Error::new(format!("range() takes 1 to 3 arguments, not {}", numbers.len()))),
    };
    if step == 0 {
        return Err(Error::new("range() arg 3 must not be zero"));
    }
    let distance = if step > 0 { end.checked_sub(first) } else { first.checked_sub(end) };
    let count =
        distance.map(|distance| if distance <= 0 { 0 } else { (distance - 1) / step.saturating_abs() + 1 });
    match count.and_then(|count| usize::try_from(count).ok()).filter(|count| *count <= MAX_RANGE) {
        Some(count) => Ok(Value::Range(first, count, step)),
        None => Err(Error::new(format!(
            "Range too big. The sandbox blocks ranges larger than MAX_RANGE ({MAX_RANGE})."
        ))),
    }
}

/// Gives one item after the other, again and again.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: Rc<Cell<usize>>,
}

impl Object for Cycler {
    fn name(&self) -> String {
        "<Cycler>".into()
    }

    fn attribute(&self, name: &str) -> Option<Value> {
        let method = |resets| {
            let (items, at) = (self.items.clone(), self.at.clone());
            Value::Object(Rc::new(CyclerMethod { items, at, resets }))
        };
        match name {
            "next" => Some(method(false)),
            "reset" => Some(method(true)),
            "current" => Some(self.items[self.at.get()].clone()),
            _ => None,
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
struct CyclerMethod {
    items: Vec<Value>,
    at: Rc<Cell<usize>>,
    resets: bool,
}

impl Object for CyclerMethod {
    fn name(&self) -> String {
        "<bound method of Cycler>".into()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Gives nothing when it is called first, then what is between items.
#[derive(Debug)]
struct Joiner {
    between: Value,
    used: Cell<bool>,
}

impl Object for Joiner {
    fn name(&self) -> String {
        "<Joiner>".into()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A loop, as its body sees it.
#[derive(Debug)]
pub(super) struct Loop {
    pub items: Rc<Vec<Value>>,
    pub at: Cell<usize>,
    /// Loops of the same `for` around it.
    pub depth: usize,
    pub changed: RefCell<Option<Vec<Value>>>,
    /// What calls it by `loop(…)` needs, where that can be.
    pub again: Option<Rc<dyn Any>>,
}

/// `loop` is printed and named as one thing, and its methods as others.
#[derive(Debug)]
pub(super) struct LoopMethod {
    pub of: Rc<Loop>,
    pub name: Arc<str>,
}

/// A loop that values can hold.
#[derive(Debug)]
pub(super) struct LoopObject(pub Rc<Loop>);

impl Object for LoopObject {
    fn name(&self) -> String {
        format!("<LoopContext {}/{}>", self.0.at.get() + 1, self.0.items.len())
    }

    fn attribute(&self, name: &str) -> Option<Value> {
        let (at, length) = (self.0.at.get(), self.0.items.len());
        let neighbour = |at: Option<usize>, which: &str| {
            let item = at.and_then(|at| self.0.items.get(at)).cloned();
            item.unwrap_or_else(|| Value::Undefined(format!("there is no {which} item").into()))
        };
        Some(match name {
            "index" => Value::from(at + 1),
            "index0" => Value::from(at),
            "revindex" => Value::from(length - at),
            "revindex0" => Value::from(length - at - 1),
            "first" => Value::Bool(at == 0),
            "last" => Value::Bool(at + 1 == length),
            "length" => Value::from(length),
            "depth" => Value::from(self.0.depth + 1),
            "depth0" => Value::from(self.0.depth),
            "previtem" => neighbour(at.checked_sub(1), "previous"),
            "nextitem" => neighbour(Some(at + 1), "next"),
            "cycle" | "changed" => {
                Value::Object(Rc::new(LoopMethod { of: self.0.clone(), name: name.into() }))
            }
            _ => return None,
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Object for LoopMethod {
    fn name(&self) -> String {
        format!("<bound method {} of LoopContext>", self.name)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Calls an object that is no macro and no loop; `None` if it cannot be called.
pub(super) fn call(bounds: &Bounds, object: &dyn Object, arguments: &Arguments) -> Option<Result<Value>> {
    let any = object.as_any();
    if let Some(function) = any.downcast_ref::<Function>() {
        return Some(function.call(bounds, arguments));
    }
    if let Some(method) = any.downcast_ref::<CyclerMethod>() {
        let at = method.at.get();
        method.at.set(if method.resets { 0 } else { (at + 1) % method.items.len() });
        return Some(Ok(if method.resets { Value::None } else { method.items[at].clone() }));
    }
    if let Some(joiner) = any.downcast_ref::<Joiner>() {
        let used = joiner.used.replace(true);
        return Some(Ok(if used { joiner.between.clone() } else { Value::from("") }));
    }
    let method = any.downcast_ref::<LoopMethod>()?;
    let values = &arguments.positional;
    if &*method.name == "cycle" {
        let count = values.len();
        return Some(match count {
            0 => Err(Error::new("no items for cycling given")),
            _ => Ok(values[method.of.at.get() % count].clone()),
        });
    }
    let same = match &*method.of.changed.borrow() {
        Some(before) if before.len() == values.len() => before
            .iter()
            .zip(values)
            .try_fold(true, |same, (a, b)| Ok(same && super::compare::equal(bounds, a, b)?)),
        _ => Ok(false),
    };
    Some(same.map(|same| {
        *method.of.changed.borrow_mut() = Some(values.clone());
        Value::Bool(!same)
    }))
}
