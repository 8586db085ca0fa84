//! Templates as trees, by Jinja's grammar: statements.

mod expression;

use std::sync::Arc;

use super::{
    ast::{Apply, Expr, For, Kind, Macro, Stmt, StmtKind, Target},
    error::{Error, Result},
    lexer::{Token, lex},
};

/// Expressions and statements inside each other, so that whatever walks a tree may recurse.
const MAX_DEPTH: u16 = 100;

/// Tags that Jinja has and a chat template cannot use: there are no other templates.
const LOADERS: [&str; 4] = ["include", "import", "from", "extends"];

/// Reads tokens.
struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    /// Statements, and expressions in parentheses, around.
    depth: u16,
    /// `if` around: what there is no filter or test for is an error only once it is reached.
    conditions: usize,
    /// Loops around, in each macro.
    loops: Vec<usize>,
    /// What each macro around names of `varargs`, `kwargs` and `caller`.
    named: Vec<[bool; 3]>,
}

/// The statements of a template.
///
/// # Errors
/// What is wrong with it, and on which line.
pub(super) fn parse(source: &str) -> Result<Vec<Stmt>> {
    let tokens = lex(source)?;
    let mut parser = Parser { tokens, at: 0, depth: 0, conditions: 0, loops: vec![0], named: Vec::new() };
    let statements = parser.statements(&[])?;
    match parser.peek() {
        None => Ok(statements),
        Some(_) => parser.fail("unexpected end of a block"),
    }
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn line(&self) -> u32 {
        let last = self.tokens.last().map_or(1, |(_, line)| *line);
        self.tokens.get(self.at).map_or(last, |(_, line)| *line)
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(message).at(self.line()))
    }

    fn unexpected<T>(&self, expected: &str) -> Result<T> {
        let found = match self.peek() {
            None => "the end of the template".to_owned(),
            Some(Token::Data(_)) => "text".to_owned(),
            Some(Token::PrintBegin) => "{{".to_owned(),
            Some(Token::PrintEnd) => "}}".to_owned(),
            Some(Token::BlockBegin) => "{%".to_owned(),
            Some(Token::BlockEnd) => "%}".to_owned(),
            Some(Token::Name(name)) => name.clone(),
            Some(Token::Str(text)) => format!("{text:?}"),
            Some(Token::Int(n)) => n.to_string(),
            Some(Token::Float(x)) => x.to_string(),
            Some(Token::Sign(sign)) => format!("{sign:?}"),
        };
        self.fail(format!("unexpected {found}: expected {expected}"))
    }

    fn is_sign(&self, sign: &str) -> bool {
        matches!(self.peek(), Some(Token::Sign(found)) if *found == sign)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(found)) if found == name)
    }

    fn skip_sign(&mut self, sign: &str) -> bool {
        let found = self.is_sign(sign);
        self.at += usize::from(found);
        found
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn sign(&mut self, sign: &str) -> Result<()> {
        if self.skip_sign(sign) { Ok(()) } else { self.unexpected(&format!("{sign:?}")) }
    }

    fn name(&mut self) -> Result<Arc<str>> {
        match self.peek() {
            Some(Token::Name(name)) => {
                let name = name.as_str().into();
                self.at += 1;
                Ok(name)
            }
            _ => self.unexpected("a name"),
        }
    }

    fn token(&mut self, token: &Token, expected: &str) -> Result<()> {
        match self.peek() == Some(token) {
            true => {
                self.at += 1;
                Ok(())
            }
            false => self.unexpected(expected),
        }
    }

    /// What `read` reads, one level deeper.
    fn deeper<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == MAX_DEPTH {
            return self.fail(format!("more than {MAX_DEPTH} blocks and expressions are inside each other"));
        }
        self.depth += 1;
        let done = read(self);
        self.depth -= 1;
        done
    }

    /// Statements up to one of these tags, whose name is what comes next; or to the template's end.
    fn statements(&mut self, ends: &[&str]) -> Result<Vec<Stmt>> {
        let mut statements = Vec::new();
        while let Some(token) = self.peek() {
            let line = self.line();
            let kind = match token {
                Token::Data(text) => {
                    let text = StmtKind::Text(text.clone());
                    self.at += 1;
                    text
                }
                Token::PrintBegin => {
                    self.at += 1;
                    let printed = StmtKind::Print(self.tuple(true)?);
                    self.token(&Token::PrintEnd, "}}")?;
                    printed
                }
                _ => {
                    self.token(&Token::BlockBegin, "a tag")?;
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(statements);
                    }
                    let read = self.deeper(|parser| parser.statement(&mut statements))?;
                    self.token(&Token::BlockEnd, "%}")?;
                    match read {
                        Some(kind) => kind,
                        None => continue,
                    }
                }
            };
            statements.push(Stmt { line, kind });
        }
        match ends {
            [] => Ok(statements),
            _ => self.unexpected(&format!("{{% {} %}}", ends.join(" %} or {% "))),
        }
    }

    /// The body of a block up to one of these tags, of which only the name is left; and which one it is.
    fn body(&mut self, ends: &[&str]) -> Result<(Vec<Stmt>, Arc<str>)> {
        self.skip_sign(":");
        self.token(&Token::BlockEnd, "%}")?;
        let statements = self.statements(ends)?;
        Ok((statements, self.name()?))
    }

    /// A statement, without its end; or none, and those of `print` are pushed.
    fn statement(&mut self, statements: &mut Vec<Stmt>) -> Result<Option<StmtKind>> {
        let line = self.line();
        let tag = self.name()?;
        Ok(Some(match &*tag {
            "for" => self.for_loop()?,
            "if" => self.condition()?,
            "set" => self.set()?,
            "with" => {
                let mut values = Vec::new();
                while self.peek() != Some(&Token::BlockEnd) {
                    if !values.is_empty() {
                        self.sign(",")?;
                    }
                    let target = self.target(false)?;
                    self.sign("=")?;
                    values.push((target, self.expression()?));
                }
                StmtKind::With(values, self.body(&["endwith"])?.0)
            }
            "macro" => {
                let name = self.name()?;
                StmtKind::Macro(Arc::new(self.macro_of(name, true, "endmacro")?))
            }
            "call" => {
                let has_parameters = self.is_sign("(");
                // The parameters come first, then the call, then the body.
                let parameters = if has_parameters { self.parameters()? } else { Vec::new() };
                let call = self.expression()?;
                if !matches!(*call.kind, Kind::Call(..)) {
                    return self.fail("{% call %}: expected the call of a macro");
                }
                let caller = self.macro_body("caller".into(), parameters, "endcall")?;
                StmtKind::CallBlock(call, Arc::new(caller))
            }
            "filter" => {
                let mut filters = vec![self.apply(true)?];
                while self.skip_sign("|") {
                    filters.push(self.apply(true)?);
                }
                StmtKind::FilterBlock(filters, self.body(&["endfilter"])?.0)
            }
            "generation" => StmtKind::Scope(self.body(&["endgeneration"])?.0),
            "block" => {
                let name = self.name()?;
                let _ = self.skip_name("scoped") || self.skip_name("required");
                let body = self.body(&["endblock"])?.0;
                self.skip_name(&name);
                StmtKind::Scope(body)
            }
            "autoescape" => {
                let escapes = self.expression()?;
                match *escapes.kind {
                    Kind::Bool(false) | Kind::None => {}
                    _ => return self.fail("{% autoescape %} is not supported here, but for false"),
                }
                StmtKind::Scope(self.body(&["endautoescape"])?.0)
            }
            "print" => {
                while self.peek() != Some(&Token::BlockEnd) {
                    let printed = self.expression()?;
                    statements.push(Stmt { line, kind: StmtKind::Print(printed) });
                    if self.peek() != Some(&Token::BlockEnd) {
                        self.sign(",")?;
                    }
                }
                return Ok(None);
            }
            "break" | "continue" => {
                if self.loops.last() == Some(&0) {
                    return self.fail(format!("{{% {tag} %}} outside of a loop"));
                }
                if &*tag == "break" { StmtKind::Break } else { StmtKind::Continue }
            }
            tag if LOADERS.contains(&tag) => {
                return self.fail(format!("{{% {tag} %}}: a chat template cannot use other templates"));
            }
            tag => return self.fail(format!("there is no tag {tag:?} here")),
        }))
    }

    fn for_loop(&mut self) -> Result<StmtKind> {
        let target = self.target(false)?;
        if !self.skip_name("in") {
            return self.unexpected("in");
        }
        let over = self.tuple(false)?;
        let test = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive");
        if let Some(loops) = self.loops.last_mut() {
            *loops += 1;
        }
        let (body, end) = self.body(&["endfor", "else"])?;
        if let Some(loops) = self.loops.last_mut() {
            *loops -= 1;
        }
        let otherwise = if &*end == "else" { self.body(&["endfor"])?.0 } else { Vec::new() };
        Ok(StmtKind::For(Arc::new(For { target, over, test, recursive, body, otherwise })))
    }

    fn condition(&mut self) -> Result<StmtKind> {
        let mut branches = Vec::new();
        let mut otherwise = Vec::new();
        self.conditions += 1;
        loop {
            let condition = self.tuple(false)?;
            let (body, end) = self.body(&["elif", "else", "endif"])?;
            branches.push((condition, body));
            match &*end {
                "elif" => continue,
                "else" => otherwise = self.body(&["endif"])?.0,
                _ => {}
            }
            self.conditions -= 1;
            return Ok(StmtKind::If(branches, otherwise));
        }
    }

    fn set(&mut self) -> Result<StmtKind> {
        let target = self.target(true)?;
        if self.skip_sign("=") {
            return Ok(StmtKind::Set(target, self.tuple(true)?));
        }
        let mut filters = Vec::new();
        while self.skip_sign("|") {
            filters.push(self.apply(true)?);
        }
        Ok(StmtKind::SetBlock(target, filters, self.body(&["endset"])?.0))
    }

    /// What is assigned to; of a namespace an attribute, where that can be.
    fn target(&mut self, of_namespaces: bool) -> Result<Target> {
        let mut targets = Vec::new();
        let mut is_tuple = false;
        loop {
            targets.push(self.deeper(|parser| parser.one_target(of_namespaces))?);
            if !self.skip_sign(",") {
                break;
            }
            is_tuple = true;
            if self.is_sign("=") || self.is_name("in") || self.peek() == Some(&Token::BlockEnd) {
                break;
            }
        }
        match targets.pop() {
            Some(only) if !is_tuple && targets.is_empty() => Ok(only),
            last => {
                targets.extend(last);
                Ok(Target::Tuple(targets))
            }
        }
    }

    fn one_target(&mut self, of_namespaces: bool) -> Result<Target> {
        if self.skip_sign("(") {
            let inside = self.target(of_namespaces)?;
            self.sign(")")?;
            return Ok(inside);
        }
        let name = self.name()?;
        if ["true", "false", "none", "True", "False", "None"].contains(&&*name) {
            return self.fail(format!("nothing can be assigned to {name}"));
        }
        match of_namespaces && self.skip_sign(".") {
            true => Ok(Target::Attribute(name, self.name()?)),
            false => Ok(Target::Name(name)),
        }
    }

    fn parameters(&mut self) -> Result<Vec<(Arc<str>, Option<Expr>)>> {
        self.sign("(")?;
        let mut parameters: Vec<(Arc<str>, Option<Expr>)> = Vec::new();
        while !self.is_sign(")") {
            if !parameters.is_empty() {
                self.sign(",")?;
            }
            let name = self.name()?;
            let default = if self.skip_sign("=") { Some(self.expression()?) } else { None };
            if default.is_none() && parameters.last().is_some_and(|(_, default)| default.is_some()) {
                return self.fail(format!("parameter {name} has no default and follows one that has"));
            }
            parameters.push((name, default));
        }
        self.sign(")")?;
        Ok(parameters)
    }

    fn macro_of(&mut self, name: Arc<str>, has_parameters: bool, end: &str) -> Result<Macro> {
        let parameters = if has_parameters { self.parameters()? } else { Vec::new() };
        self.macro_body(name, parameters, end)
    }

    fn macro_body(
        &mut self,
        name: Arc<str>,
        parameters: Vec<(Arc<str>, Option<Expr>)>,
        end: &str,
    ) -> Result<Macro> {
        self.loops.push(0);
        self.named.push([false; 3]);
        let body = self.body(&[end])?.0;
        self.loops.pop();
        let [takes_more, takes_more_named, takes_caller] = self.named.pop().unwrap_or_default();
        Ok(Macro { name, parameters, body, takes_more, takes_more_named, takes_caller })
    }

    /// The name of a filter or a test, and its arguments.
    fn apply(&mut self, is_filter: bool) -> Result<Apply> {
        let line = self.line();
        let name = self.name()?;
        let known = if is_filter { &super::names::FILTERS[..] } else { &super::names::TESTS };
        let unsupported = is_filter && super::names::UNSUPPORTED_FILTERS.contains(&&*name);
        if unsupported || (!known.contains(&&*name) && self.conditions == 0) {
            let what = if is_filter { "filter" } else { "test" };
            let why = if unsupported { "is not supported here" } else { "does not exist" };
            return Err(Error::new(format!("the {what} {name:?} {why}")).at(line));
        }
        let arguments = if self.is_sign("(") { self.arguments()? } else { Default::default() };
        Ok(Apply { name, arguments, line })
    }
}
