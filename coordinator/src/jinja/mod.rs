//! Jinja2, as transformers sets it up for chat templates: its immutable sandbox, with Python's types, printing and methods.
//!
//! No engine for Rust has Python's semantics, in which templates are written: how numbers and dicts print, what slices and
//! macros do, which methods texts have. Here a template has them, has no way out, and no more work than [`bounds`] allows.

mod access;
mod arguments;
mod arithmetic;
mod ast;
mod bounds;
mod checks;
mod compare;
mod error;
mod filters;
mod format;
mod functions;
mod json;
mod lexer;
mod methods;
mod names;
mod parse;
mod render;
mod strftime;
mod text;
mod value;

#[cfg(test)]
mod tests;

use serde_json::{Map, Value as Json};

pub(crate) use error::Error;

/// A template, compiled.
#[derive(Debug)]
pub(crate) struct Template {
    statements: Vec<ast::Stmt>,
}

impl Template {
    /// Compiles a template.
    ///
    /// # Errors
    /// What is wrong with it, and on which line.
    pub fn new(source: &str) -> Result<Self, Error> {
        Ok(Template { statements: parse::parse(source)? })
    }

    /// The text that it makes of variables.
    ///
    /// # Errors
    /// If the template raises an exception, fails, works too long, or writes too much.
    pub fn render(&self, variables: &Map<String, Json>) -> Result<String, Error> {
        render::render(&self.statements, variables)
    }
}
