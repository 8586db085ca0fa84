//! A template's statements, one after the other.

mod call;
mod expression;
mod scope;

use std::{cell::Cell, rc::Rc, sync::Arc};

use serde_json::{Map, Value as Json};

use super::{
    arguments::Arguments,
    ast::{Apply, For, Stmt, StmtKind, Target},
    bounds::{Bounds, MAX_TEXT},
    error::{Error, Result},
    filters,
    functions::{Loop, LoopObject, check_attribute},
    value::Value,
};
use scope::{Frame, Scopes};

/// Most bytes that a template may write: some times the longest messages.
const MAX_OUTPUT: usize = 4 << 20;

/// What comes after a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

/// Where statements write to.
struct Output {
    text: String,
    most: usize,
}

impl Output {
    fn write(&mut self, text: &str) -> Result<()> {
        if self.text.len() + text.len() > self.most {
            return Err(Error::new(format!("it writes more than {} bytes for them", self.most)));
        }
        self.text.push_str(text);
        Ok(())
    }
}

/// One rendering.
struct Renderer<'a> {
    bounds: &'a Bounds,
    scopes: Scopes,
}

/// The text that statements make of variables.
///
/// # Errors
/// If the template raises an exception, fails, works too long, or writes too much.
pub(super) fn render(statements: &[Stmt], variables: &Map<String, Json>) -> Result<String> {
    let bounds = Bounds::default();
    let variables =
        variables.iter().map(|(name, value)| Ok((name.as_str().into(), Value::from_json(&bounds, value)?)));
    let scopes = Scopes::new(variables.collect::<Result<_>>()?);
    let renderer = Renderer { bounds: &bounds, scopes };
    let frame = Frame::new(None);
    let mut output = Output { text: String::new(), most: MAX_OUTPUT };
    renderer.statements(statements, &frame, &mut output)?;
    Ok(output.text)
}

impl Renderer<'_> {
    fn statements(&self, statements: &[Stmt], frame: &Rc<Frame>, output: &mut Output) -> Result<Flow> {
        let _level = self.bounds.deeper()?;
        for statement in statements {
            self.bounds.step()?;
            let flow = self.statement(statement, frame, output).map_err(|error| error.at(statement.line))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&self, statement: &Stmt, frame: &Rc<Frame>, output: &mut Output) -> Result<Flow> {
        match &statement.kind {
            StmtKind::Text(text) => output.write(text)?,
            StmtKind::Print(printed) => match self.eval(printed, frame)? {
                Value::Str(text) => output.write(&text.text)?,
                value => output.write(&value.display(self.bounds)?)?,
            },
            StmtKind::Set(target, value) => {
                let value = self.eval(value, frame)?;
                self.assign(target, value, frame)?;
            }
            StmtKind::SetBlock(target, apply, body) => {
                let text = self.captured(body, &Frame::new(Some(frame)))?;
                let value = self.filtered(Value::text(self.bounds, text)?, apply, frame)?;
                self.assign(target, value, frame)?;
            }
            StmtKind::For(node) => {
                let over = self.eval(&node.over, frame)?;
                self.for_loop(node, over, 0, frame, output)?;
            }
            StmtKind::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.eval(condition, frame)?.is_true() {
                        return self.statements(body, frame, output);
                    }
                }
                return self.statements(otherwise, frame, output);
            }
            StmtKind::With(values, body) => {
                let inner = Frame::new(Some(frame));
                for (target, value) in values {
                    let value = self.eval(value, frame)?;
                    self.assign(target, value, &inner)?;
                }
                return self.statements(body, &inner, output);
            }
            StmtKind::Macro(node) => {
                let value = self.closure(node, frame)?;
                frame.set(&node.name, value);
            }
            StmtKind::CallBlock(call, caller) => {
                let value = self.call_with(call, Some(self.closure(caller, frame)?), frame)?;
                output.write(&value.display(self.bounds)?)?;
            }
            StmtKind::FilterBlock(apply, body) => {
                let text = self.captured(body, &Frame::new(Some(frame)))?;
                let value = self.filtered(Value::text(self.bounds, text)?, apply, frame)?;
                output.write(&value.display(self.bounds)?)?;
            }
            StmtKind::Scope(body) => return self.statements(body, &Frame::new(Some(frame)), output),
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    /// What statements write.
    fn captured(&self, body: &[Stmt], frame: &Rc<Frame>) -> Result<String> {
        let mut output = Output { text: String::new(), most: MAX_TEXT };
        self.statements(body, frame, &mut output)?;
        Ok(output.text)
    }

    fn filtered(&self, value: Value, apply: &[Apply], frame: &Rc<Frame>) -> Result<Value> {
        apply.iter().try_fold(value, |value, apply| {
            let arguments = self.arguments(&apply.arguments, frame)?;
            filters::apply(self.bounds, &apply.name, &value, &arguments)
        })
    }

    fn assign(&self, target: &Target, value: Value, frame: &Rc<Frame>) -> Result<()> {
        match target {
            Target::Name(name) => {
                frame.set(name, value);
                Ok(())
            }
            Target::Tuple(targets) => {
                let values = value.items(self.bounds)?;
                if values.len() != targets.len() {
                    let (found, wanted) = (values.len(), targets.len());
                    return Err(Error::new(format!("expected {wanted} values to unpack, found {found}")));
                }
                targets.iter().zip(values).try_for_each(|(target, value)| self.assign(target, value, frame))
            }
            Target::Attribute(name, attribute) => match self.scopes.find(name, frame) {
                Value::Namespace(namespace) => {
                    let attribute = Value::from(&**attribute);
                    check_attribute(&attribute)?;
                    namespace.set(self.bounds, attribute, value)
                }
                _ => Err(Error::new("cannot assign attribute on non-namespace object")),
            },
        }
    }

    /// Runs a loop over the items of a value.
    fn for_loop(
        &self,
        node: &Arc<For>,
        over: Value,
        depth: usize,
        frame: &Rc<Frame>,
        output: &mut Output,
    ) -> Result<()> {
        let mut items = over.items(self.bounds)?;
        if let Some(test) = &node.test {
            let mut kept = Vec::new();
            for item in items {
                let inner = Frame::new(Some(frame));
                self.assign(&node.target, item.clone(), &inner)?;
                if self.eval(test, &inner)?.is_true() {
                    kept.push(item);
                }
            }
            items = kept;
        }
        if items.is_empty() {
            // What follows a loop that did nothing cannot break it.
            self.statements(&node.otherwise, &Frame::new(Some(frame)), output)?;
            return Ok(());
        }
        let again = node.recursive.then(|| Rc::new((node.clone(), frame.clone())) as Rc<dyn std::any::Any>);
        let state = Rc::new(Loop {
            items: Rc::new(items),
            at: Cell::new(0),
            depth,
            changed: Default::default(),
            again,
        });
        let name: Arc<str> = "loop".into();
        for (at, item) in state.items.iter().enumerate() {
            self.bounds.step()?;
            state.at.set(at);
            let inner = Frame::new(Some(frame));
            inner.set(&name, Value::Object(Rc::new(LoopObject(state.clone()))));
            self.assign(&node.target, item.clone(), &inner)?;
            if self.statements(&node.body, &inner, output)? == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    fn arguments(&self, arguments: &super::ast::Arguments, frame: &Rc<Frame>) -> Result<Arguments> {
        let positional = arguments.positional.iter().map(|value| self.eval(value, frame));
        let mut found = Arguments { positional: positional.collect::<Result<_>>()?, named: Vec::new() };
        if let Some(more) = &arguments.more {
            found.positional.extend(self.eval(more, frame)?.items(self.bounds)?);
        }
        for (name, value) in &arguments.named {
            found.named.push((name.clone(), self.eval(value, frame)?));
        }
        if let Some(more) = &arguments.more_named {
            let Value::Dict(dict) = self.eval(more, frame)? else {
                return Err(Error::new("argument after ** must be a mapping"));
            };
            for (name, value) in dict.entries() {
                let name = name.as_str().ok_or_else(|| Error::new("keywords must be strings"))?;
                found.named.push((name.into(), value.clone()));
            }
        }
        Ok(found)
    }
}
