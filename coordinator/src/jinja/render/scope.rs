//! What names mean where.

use std::{cell::RefCell, collections::HashMap, rc::Rc, sync::Arc};

use super::super::{functions::function, value::Value};

/// Variables of a block, and the blocks around it.
#[derive(Debug)]
pub(super) struct Frame {
    variables: RefCell<Vec<(Arc<str>, Value)>>,
    around: Option<Rc<Frame>>,
}

/// The variables that a template is rendered with, and what must be taken apart in the end.
#[derive(Debug)]
pub(super) struct Scopes {
    variables: HashMap<Arc<str>, Value>,
    /// Frames that macros were defined in. These hold each other, and are let go by hand.
    with_macros: RefCell<Vec<Rc<Frame>>>,
}

impl Frame {
    pub fn new(around: Option<&Rc<Frame>>) -> Rc<Self> {
        Rc::new(Frame { variables: RefCell::default(), around: around.cloned() })
    }

    pub fn set(&self, name: &Arc<str>, value: Value) {
        let mut variables = self.variables.borrow_mut();
        match variables.iter_mut().find(|(other, _)| other == name) {
            Some((_, old)) => *old = value,
            None => variables.push((name.clone(), value)),
        }
    }
}

impl Scopes {
    pub fn new(variables: HashMap<Arc<str>, Value>) -> Self {
        Scopes { variables, with_macros: RefCell::default() }
    }

    /// What a name means in a frame.
    pub fn find(&self, name: &str, frame: &Rc<Frame>) -> Value {
        let mut frame = Some(frame);
        while let Some(here) = frame {
            if let Some((_, value)) = here.variables.borrow().iter().find(|(other, _)| **other == *name) {
                return value.clone();
            }
            frame = here.around.as_ref();
        }
        let found = self.variables.get(name).cloned().or_else(|| function(name));
        found.unwrap_or_else(|| Value::Undefined(format!("'{name}' is undefined").into()))
    }

    /// Remembers a frame that a macro was defined in.
    pub fn keep(&self, frame: &Rc<Frame>) {
        self.with_macros.borrow_mut().push(frame.clone());
    }
}

impl Drop for Scopes {
    fn drop(&mut self) {
        for frame in self.with_macros.borrow_mut().drain(..) {
            frame.variables.borrow_mut().clear();
        }
    }
}
