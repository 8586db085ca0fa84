//! Templates as trees, by Jinja's grammar: expressions, what binds least first.

use std::sync::Arc;

use super::{
    super::{
        arithmetic::Operator,
        ast::{Arguments, Comparison, Expr, Kind},
        error::{Error, Result},
        lexer::Token,
    },
    Parser,
};

/// Expressions that follow one another at one level, such as `a.b.c`, make a tree that is as deep.
const MAX_DEPTH: u16 = 100;

/// The names by which a macro sees more than its parameters.
const EXTRA: [&str; 3] = ["varargs", "kwargs", "caller"];

impl Parser {
    fn node(&self, line: u32, kind: Kind) -> Result<Expr> {
        let depth = 1 + kind.depth();
        match depth > MAX_DEPTH {
            true => {
                let why = format!("more than {MAX_DEPTH} expressions are inside each other");
                Err(Error::new(why).at(line))
            }
            false => Ok(Expr { line, kind: Box::new(kind), depth }),
        }
    }

    /// An expression, or several with commas between them; without conditions where `if` means something else.
    pub(super) fn tuple(&mut self, with_condition: bool) -> Result<Expr> {
        let line = self.line();
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            let at_end = matches!(self.peek(), None | Some(Token::PrintEnd | Token::BlockEnd))
                || self.is_sign(")")
                || self.is_name("recursive");
            if at_end {
                break;
            }
            items.push(if with_condition { self.expression()? } else { self.deeper(Self::or)? });
            if !self.skip_sign(",") {
                break;
            }
            is_tuple = true;
        }
        match items.pop() {
            Some(only) if !is_tuple => Ok(only),
            Some(last) => {
                items.push(last);
                self.node(line, Kind::Tuple(items))
            }
            None => self.unexpected("an expression"),
        }
    }

    pub(super) fn expression(&mut self) -> Result<Expr> {
        self.deeper(|parser| {
            let line = parser.line();
            let mut then = parser.or()?;
            while parser.skip_name("if") {
                // What there is no filter for is an error only where it is reached, as in a block.
                parser.conditions += 1;
                let test = parser.or()?;
                let otherwise = if parser.skip_name("else") { Some(parser.expression()?) } else { None };
                parser.conditions -= 1;
                then = parser.node(line, Kind::If(then, test, otherwise))?;
            }
            Ok(then)
        })
    }

    fn or(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.and()?;
        while self.skip_name("or") {
            let right = self.and()?;
            left = self.node(line, Kind::Or(left, right))?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.not()?;
        while self.skip_name("and") {
            let right = self.not()?;
            left = self.node(line, Kind::And(left, right))?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expr> {
        let line = self.line();
        if !self.skip_name("not") {
            return self.comparison();
        }
        let inside = self.deeper(Self::not)?;
        self.node(line, Kind::Not(inside))
    }

    fn comparison(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut others = Vec::new();
        loop {
            let comparison = match self.peek() {
                Some(Token::Sign("==")) => Comparison::Equal,
                Some(Token::Sign("!=")) => Comparison::Unequal,
                Some(Token::Sign("<")) => Comparison::Less,
                Some(Token::Sign("<=")) => Comparison::LessOrEqual,
                Some(Token::Sign(">")) => Comparison::Greater,
                Some(Token::Sign(">=")) => Comparison::GreaterOrEqual,
                Some(Token::Name(name)) if name == "in" => Comparison::In,
                Some(Token::Name(name)) if name == "not" && self.is_ahead("in") => {
                    self.at += 1;
                    Comparison::NotIn
                }
                _ => break,
            };
            self.at += 1;
            others.push((comparison, self.sum()?));
        }
        if others.is_empty() { Ok(first) } else { self.node(line, Kind::Compare(first, others)) }
    }

    /// Whether the token after the next one is this name.
    fn is_ahead(&self, name: &str) -> bool {
        matches!(self.tokens.get(self.at + 1), Some((Token::Name(found), _)) if found == name)
    }

    /// The next sign, if it is one of these operators.
    fn operator(&mut self, signs: &[&str]) -> Option<Operator> {
        let Some(Token::Sign(sign)) = self.peek() else { return None };
        let operator = Operator::of(sign).filter(|_| signs.contains(sign))?;
        self.at += 1;
        Some(operator)
    }

    fn sum(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.concat()?;
        while let Some(operator) = self.operator(&["+", "-"]) {
            let right = self.concat()?;
            left = self.node(line, Kind::Arithmetic(left, operator, right))?;
        }
        Ok(left)
    }

    fn concat(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.product()?;
        if !self.is_sign("~") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_sign("~") {
            items.push(self.product()?);
        }
        self.node(line, Kind::Concat(items))
    }

    fn product(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.power()?;
        while let Some(operator) = self.operator(&["*", "/", "//", "%"]) {
            let right = self.power()?;
            left = self.node(line, Kind::Arithmetic(left, operator, right))?;
        }
        Ok(left)
    }

    fn power(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.unary(true)?;
        while let Some(operator) = self.operator(&["**"]) {
            let right = self.unary(true)?;
            left = self.node(line, Kind::Arithmetic(left, operator, right))?;
        }
        Ok(left)
    }

    /// A value with what is around it; its filters belong to the sign before it.
    fn unary(&mut self, with_filters: bool) -> Result<Expr> {
        let line = self.line();
        let inside = match (self.is_sign("-"), self.is_sign("+")) {
            (false, false) => self.primary()?,
            (negative, _) => {
                self.at += 1;
                let inside = self.deeper(|parser| parser.unary(false))?;
                self.node(line, Kind::Sign(inside, negative))?
            }
        };
        let value = self.postfix(inside)?;
        if with_filters { self.filters(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Result<Expr> {
        let line = self.line();
        let kind = match self.peek().cloned() {
            Some(Token::Name(name)) => {
                self.at += 1;
                match name.as_str() {
                    "true" | "True" => Kind::Bool(true),
                    "false" | "False" => Kind::Bool(false),
                    "none" | "None" => Kind::None,
                    name => {
                        if let Some(which) = EXTRA.iter().position(|extra| *extra == name) {
                            self.named.iter_mut().for_each(|named| named[which] = true);
                        }
                        Kind::Name(name.into())
                    }
                }
            }
            Some(Token::Str(first)) => {
                self.at += 1;
                let mut text = first;
                while let Some(Token::Str(more)) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                Kind::Str(text.into())
            }
            Some(Token::Int(n)) => {
                self.at += 1;
                Kind::Int(n)
            }
            Some(Token::Float(x)) => {
                self.at += 1;
                Kind::Float(x)
            }
            Some(Token::Sign("(")) => {
                self.at += 1;
                let inside = match self.is_sign(")") {
                    true => self.node(line, Kind::Tuple(Vec::new()))?,
                    false => self.tuple(true)?,
                };
                self.sign(")")?;
                return Ok(inside);
            }
            Some(Token::Sign("[")) => {
                self.at += 1;
                Kind::List(self.list("]", Self::expression)?)
            }
            Some(Token::Sign("{")) => {
                self.at += 1;
                let entry = |parser: &mut Self| {
                    let key = parser.expression()?;
                    parser.sign(":")?;
                    Ok((key, parser.expression()?))
                };
                Kind::Dict(self.list("}", entry)?)
            }
            _ => return self.unexpected("an expression"),
        };
        self.node(line, kind)
    }

    /// What is between commas up to a sign, which is read, too.
    fn list<T>(&mut self, end: &str, read: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut items = Vec::new();
        while !self.skip_sign(end) {
            if !items.is_empty() {
                self.sign(",")?;
                if self.skip_sign(end) {
                    break;
                }
            }
            items.push(read(self)?);
        }
        Ok(items)
    }

    fn postfix(&mut self, mut value: Expr) -> Result<Expr> {
        loop {
            let line = self.line();
            let kind = if self.skip_sign(".") {
                match self.peek() {
                    Some(Token::Int(n)) => {
                        let index = Kind::Int(*n);
                        self.at += 1;
                        Kind::Item(value, self.node(line, index)?)
                    }
                    _ => Kind::Attribute(value, self.name()?),
                }
            } else if self.skip_sign("[") {
                self.subscript(line, value)?
            } else if self.is_sign("(") {
                Kind::Call(value, self.arguments()?)
            } else {
                return Ok(value);
            };
            value = self.node(line, kind)?;
        }
    }

    /// What is in brackets behind a value.
    fn subscript(&mut self, line: u32, value: Expr) -> Result<Kind> {
        let mut parts: [Option<Expr>; 3] = [None, None, None];
        let mut colons = 0;
        loop {
            if self.skip_sign("]") {
                break;
            }
            if self.skip_sign(":") {
                colons += 1;
                if colons > 2 {
                    return self.unexpected("\"]\"");
                }
                continue;
            }
            if parts[colons].is_some() {
                return match colons {
                    0 => self.index_of_several(line, value, parts),
                    _ => self.unexpected("\"]\""),
                };
            }
            parts[colons] = Some(self.expression()?);
        }
        match (colons, parts) {
            (0, [Some(index), ..]) => Ok(Kind::Item(value, index)),
            (0, _) => self.unexpected("an index"),
            (_, parts) => Ok(Kind::Slice(value, parts)),
        }
    }

    /// `value[a, b]`: the index is a tuple, of which the first was read.
    fn index_of_several(&mut self, line: u32, value: Expr, parts: [Option<Expr>; 3]) -> Result<Kind> {
        let mut items: Vec<_> = parts.into_iter().flatten().collect();
        while !self.skip_sign("]") {
            self.sign(",")?;
            items.push(self.expression()?);
        }
        Ok(Kind::Item(value, self.node(line, Kind::Tuple(items))?))
    }

    pub(super) fn arguments(&mut self) -> Result<Arguments> {
        self.sign("(")?;
        let mut arguments = Arguments::default();
        let mut is_first = true;
        while !self.skip_sign(")") {
            if !is_first {
                self.sign(",")?;
                if self.skip_sign(")") {
                    break;
                }
            }
            is_first = false;
            let is_named = matches!(self.tokens.get(self.at + 1), Some((Token::Sign("="), _)));
            let only_named = arguments.more.is_some() || arguments.more_named.is_some();
            if arguments.more_named.is_some() {
                return self.unexpected("\")\" after **");
            } else if self.skip_sign("*") {
                if only_named {
                    return self.unexpected("no second * in a call");
                }
                arguments.more = Some(self.expression()?);
            } else if self.skip_sign("**") {
                arguments.more_named = Some(self.expression()?);
            } else if is_named {
                let name: Arc<str> = self.name()?;
                self.sign("=")?;
                arguments.named.push((name, self.expression()?));
            } else if only_named || !arguments.named.is_empty() {
                return self.unexpected("arguments without a name before those that have one");
            } else {
                arguments.positional.push(self.expression()?);
            }
        }
        Ok(arguments)
    }

    fn filters(&mut self, mut value: Expr) -> Result<Expr> {
        loop {
            let line = self.line();
            let kind = if self.skip_sign("|") {
                Kind::Filter(value, self.apply(true)?)
            } else if self.skip_name("is") {
                self.test(value)?
            } else if self.is_sign("(") {
                Kind::Call(value, self.arguments()?)
            } else {
                return Ok(value);
            };
            value = self.node(line, kind)?;
        }
    }

    fn test(&mut self, value: Expr) -> Result<Kind> {
        let negated = self.skip_name("not");
        let mut apply = self.apply(false)?;
        let begins_value = match self.peek() {
            Some(Token::Name(name)) => !["else", "or", "and"].contains(&name.as_str()),
            Some(Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Sign("[" | "{")) => true,
            _ => false,
        };
        if begins_value && self.is_name("is") {
            return self.fail("tests cannot be chained with is");
        }
        // One argument may stand without parentheses.
        let is_bare = apply.arguments.positional.is_empty() && apply.arguments.named.is_empty();
        if begins_value
            && is_bare
            && !matches!(self.tokens.get(self.at.wrapping_sub(1)), Some((Token::Sign(")"), _)))
        {
            let argument = self.primary()?;
            apply.arguments.positional.push(self.postfix(argument)?);
        }
        Ok(Kind::Test(value, apply, negated))
    }
}
