//! The values of expressions.

use std::rc::Rc;

use super::{
    super::{
        access::{attribute, item, slice},
        arithmetic::{self, Operator},
        ast::{Comparison, Expr, Kind},
        checks::check,
        compare::{contains, equal, order},
        error::Result,
        filters,
        format::percent,
        value::{Dict, Text, Value},
    },
    Renderer,
    scope::Frame,
};

impl Renderer<'_> {
    /// The value of an expression in a frame.
    pub(super) fn eval(&self, expr: &Expr, frame: &Rc<Frame>) -> Result<Value> {
        let _level = self.bounds.deeper()?;
        self.value(&expr.kind, frame).map_err(|error| error.at(expr.line))
    }

    fn value(&self, kind: &Kind, frame: &Rc<Frame>) -> Result<Value> {
        let all = |list: &[Expr]| list.iter().map(|expr| self.eval(expr, frame)).collect::<Result<Vec<_>>>();
        Ok(match kind {
            Kind::None => Value::None,
            Kind::Bool(b) => Value::Bool(*b),
            Kind::Int(n) => Value::Int(*n),
            Kind::Float(x) => Value::Float(*x),
            Kind::Str(text) => Value::Str(Text { text: text.clone(), safe: false }),
            Kind::Name(name) => self.scopes.find(name, frame),
            Kind::List(list) => Value::list(self.bounds, all(list)?)?,
            Kind::Tuple(list) => Value::tuple(self.bounds, all(list)?)?,
            Kind::Dict(entries) => {
                let mut dict = Dict::default();
                for (key, value) in entries {
                    dict.insert(self.bounds, self.eval(key, frame)?, self.eval(value, frame)?)?;
                }
                Value::dict(dict)
            }
            Kind::Not(inside) => Value::Bool(!self.eval(inside, frame)?.is_true()),
            Kind::Sign(inside, negative) => arithmetic::sign(&self.eval(inside, frame)?, *negative)?,
            Kind::Arithmetic(a, operator, b) => {
                self.arithmetic(&self.eval(a, frame)?, *operator, &self.eval(b, frame)?)?
            }
            Kind::And(a, b) => match self.eval(a, frame)? {
                a if a.is_true() => self.eval(b, frame)?,
                a => a,
            },
            Kind::Or(a, b) => match self.eval(a, frame)? {
                a if a.is_true() => a,
                _ => self.eval(b, frame)?,
            },
            Kind::Compare(first, others) => {
                let mut left = self.eval(first, frame)?;
                for (comparison, right) in others {
                    let right = self.eval(right, frame)?;
                    if !self.compare(&left, *comparison, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            Kind::Concat(list) => {
                let mut text = String::new();
                for value in all(list)? {
                    text.push_str(&value.display(self.bounds)?);
                }
                Value::text(self.bounds, text)?
            }
            Kind::If(then, test, otherwise) => match (self.eval(test, frame)?.is_true(), otherwise) {
                (true, _) => self.eval(then, frame)?,
                (false, Some(otherwise)) => self.eval(otherwise, frame)?,
                (false, None) => {
                    let why = "the inline if-expression evaluated to false and no else section was defined.";
                    Value::Undefined(why.into())
                }
            },
            Kind::Attribute(of, name) => attribute(self.bounds, &self.eval(of, frame)?, name)?,
            Kind::Item(of, index) => item(self.bounds, &self.eval(of, frame)?, &self.eval(index, frame)?)?,
            Kind::Slice(of, parts) => {
                let of = self.eval(of, frame)?;
                let mut found = [None, None, None];
                for (found, part) in found.iter_mut().zip(parts) {
                    *found = part.as_ref().map(|part| self.eval(part, frame)).transpose()?;
                }
                slice(self.bounds, &of, found)?
            }
            Kind::Call(callee, arguments) => {
                self.call(&self.eval(callee, frame)?, self.arguments(arguments, frame)?)?
            }
            Kind::Filter(of, apply) => {
                let of = self.eval(of, frame)?;
                let arguments = self.arguments(&apply.arguments, frame)?;
                filters::apply(self.bounds, &apply.name, &of, &arguments)
                    .map_err(|error| error.at(apply.line))?
            }
            Kind::Test(of, apply, negated) => {
                let of = self.eval(of, frame)?;
                let arguments = self.arguments(&apply.arguments, frame)?;
                let holds =
                    check(self.bounds, &apply.name, &of, &arguments).map_err(|error| error.at(apply.line))?;
                Value::Bool(holds != *negated)
            }
        })
    }

    fn arithmetic(&self, a: &Value, operator: Operator, b: &Value) -> Result<Value> {
        match (a, operator) {
            (Value::Str(format), Operator::Mod) => {
                let text = percent(self.bounds, &format.text, b)?;
                self.bounds.reserve_text(text.len())?;
                Ok(Value::Str(Text { text: text.into(), safe: format.safe }))
            }
            _ => arithmetic::apply(self.bounds, operator, a, b),
        }
    }

    fn compare(&self, a: &Value, comparison: Comparison, b: &Value) -> Result<bool> {
        let ordered = |sign: &str, fits: fn(std::cmp::Ordering) -> bool| {
            Ok(order(self.bounds, sign, a, b)?.is_some_and(fits))
        };
        match comparison {
            Comparison::Equal => equal(self.bounds, a, b),
            Comparison::Unequal => Ok(!equal(self.bounds, a, b)?),
            Comparison::Less => ordered("<", std::cmp::Ordering::is_lt),
            Comparison::LessOrEqual => ordered("<=", std::cmp::Ordering::is_le),
            Comparison::Greater => ordered(">", std::cmp::Ordering::is_gt),
            Comparison::GreaterOrEqual => ordered(">=", std::cmp::Ordering::is_ge),
            Comparison::In => contains(self.bounds, b, a),
            Comparison::NotIn => Ok(!contains(self.bounds, b, a)?),
        }
    }
}
