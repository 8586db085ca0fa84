//! Calls: of macros, methods, functions, and of loops by themselves.

use std::{any::Any, rc::Rc, sync::Arc};

use super::{
    super::{
        arguments::Arguments,
        ast::{Expr, For, Kind, Macro},
        error::{Error, Result},
        functions::{self, LoopObject},
        methods,
        value::{Dict, Object, Value},
    },
    Output, Renderer,
    scope::Frame,
};

/// A macro, with the variables it was defined among.
#[derive(Debug)]
struct Closure {
    node: Arc<Macro>,
    frame: Rc<Frame>,
}

impl Object for Closure {
    fn name(&self) -> String {
        format!("<Macro '{}'>", self.node.name)
    }

    fn attribute(&self, name: &str) -> Option<Value> {
        match name {
            "name" => Some(Value::from(&*self.node.name)),
            "caller" => Some(Value::Bool(self.node.takes_caller)),
            "catch_varargs" => Some(Value::Bool(self.node.takes_more)),
            "catch_kwargs" => Some(Value::Bool(self.node.takes_more_named)),
            _ => None,
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Renderer<'_> {
    /// The value of a macro that is defined here.
    pub(super) fn closure(&self, node: &Arc<Macro>, frame: &Rc<Frame>) -> Result<Value> {
        self.bounds.reserve(size_of::<Closure>() + size_of::<Frame>())?;
        self.scopes.keep(frame);
        Ok(Value::Object(Rc::new(Closure { node: node.clone(), frame: frame.clone() })))
    }

    /// The value of a call, with the body of a `{% call %}` if it is one's.
    pub(super) fn call_with(&self, call: &Expr, caller: Option<Value>, frame: &Rc<Frame>) -> Result<Value> {
        let Kind::Call(callee, arguments) = &*call.kind else {
            return Err(Error::new("expected the call of a macro"));
        };
        let callee = self.eval(callee, frame)?;
        let mut arguments = self.arguments(arguments, frame)?;
        if let Some(caller) = caller {
            arguments.named.push(("caller".into(), caller));
        }
        self.call(&callee, arguments)
    }

    /// Calls a value.
    pub(super) fn call(&self, callee: &Value, arguments: Arguments) -> Result<Value> {
        match callee {
            Value::Method(method) => methods::call(self.bounds, &method.0, &method.1, &arguments),
            Value::Undefined(why) => Err(Error::new(&**why)),
            Value::Object(object) => {
                if let Some(closure) = object.as_any().downcast_ref::<Closure>() {
                    return self.call_macro(closure, arguments);
                }
                if let Some(around) = object.as_any().downcast_ref::<LoopObject>() {
                    return self.call_loop(around, &arguments);
                }
                let called = functions::call(self.bounds, object.as_ref(), &arguments);
                called.unwrap_or_else(|| Err(Error::new(format!("{} is not callable", object.name()))))
            }
            other => Err(Error::new(format!("'{}' object is not callable", other.kind()))),
        }
    }

    fn call_macro(&self, closure: &Closure, arguments: Arguments) -> Result<Value> {
        let Macro { name, parameters, body, takes_more, takes_more_named, takes_caller } = &*closure.node;
        let frame = Frame::new(Some(&closure.frame));
        let Arguments { positional, mut named } = arguments;
        let refuse = |what: String| Err(Error::new(format!("macro '{name}' {what}")));
        let mut given = positional.into_iter();
        for (parameter, default) in parameters {
            let by_name = named.iter().position(|(other, _)| other == parameter).map(|at| named.remove(at).1);
            let value = match (given.next(), by_name) {
                (Some(_), Some(_)) => {
                    return refuse(format!("got multiple values for argument '{parameter}'"));
                }
                (Some(value), None) | (None, Some(value)) => value,
                // A default sees the parameters before it.
                (None, None) => match default {
                    Some(default) => self.eval(default, &frame)?,
                    None => Value::Undefined(format!("parameter '{parameter}' was not provided").into()),
                },
            };
            frame.set(parameter, value);
        }
        if *takes_caller && !parameters.iter().any(|(parameter, _)| &**parameter == "caller") {
            let caller =
                named.iter().position(|(other, _)| &**other == "caller").map(|at| named.remove(at).1);
            let none = || Value::Undefined("No caller defined".into());
            frame.set(&"caller".into(), caller.unwrap_or_else(none));
        }
        let more: Vec<Value> = given.collect();
        match *takes_more {
            true => frame.set(&"varargs".into(), Value::tuple(self.bounds, more)?),
            false if more.is_empty() => {}
            false => return refuse(format!("takes not more than {} argument(s)", parameters.len())),
        }
        match (*takes_more_named, named.first()) {
            (true, _) => {
                let mut dict = Dict::default();
                for (name, value) in named {
                    dict.insert(self.bounds, Value::from(&*name), value)?;
                }
                frame.set(&"kwargs".into(), Value::dict(dict));
            }
            (false, None) => {}
            (false, Some((other, _))) => return refuse(format!("takes no keyword argument '{other}'")),
        }
        Value::text(self.bounds, self.captured(body, &frame)?)
    }

    /// `loop(items)` inside a recursive loop: what it writes for these.
    fn call_loop(&self, around: &LoopObject, arguments: &Arguments) -> Result<Value> {
        let again = around.0.again.as_ref().and_then(|again| again.downcast_ref::<(Arc<For>, Rc<Frame>)>());
        let Some((node, frame)) = again else {
            return Err(Error::new("The loop must have the 'recursive' marker to be called recursively."));
        };
        let [items] = arguments.bind("loop()", ["iterable"], 1)?;
        let mut output = Output { text: String::new(), most: super::MAX_TEXT };
        self.for_loop(node, items.unwrap_or(Value::None), around.0.depth + 1, frame, &mut output)?;
        Value::text(self.bounds, output.text)
    }
}
