//! Templates as tokens: text, and what is inside tags, with Jinja's rules about the white space around them.
//!
//! As transformers sets it up: a newline behind a block's tag is left out (`trim_blocks`), and so is white space between
//! the beginning of a line and a block's tag (`lstrip_blocks`).

use super::{
    error::{Error, Result},
    text::is_space,
};

/// A piece of a template.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    /// Text outside of tags.
    Data(String),
    /// `{{`, `}}`, `{%` and `%}`.
    PrintBegin,
    PrintEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    /// An operator, as it is written.
    Sign(&'static str),
}

/// Operators, longer ones first.
const SIGNS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",", ";",
];

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    tokens: Vec<(Token, u32)>,
    /// The text that comes next begins a line.
    starts_line: bool,
    line: u32,
    /// Where `line` was counted.
    counted: usize,
}

/// The tokens of a template, each with its line.
///
/// # Errors
/// If a tag, a comment or a text does not end, or has a character that means nothing.
pub(super) fn lex(source: &str) -> Result<Vec<(Token, u32)>> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer =
        Lexer { source: &source, at: 0, tokens: Vec::new(), starts_line: true, line: 1, counted: 0 };
    lexer.template()?;
    Ok(lexer.tokens)
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    /// Goes on to a place further on.
    fn go(&mut self, to: usize) {
        self.at = to;
        self.line += self.source[self.counted..to].matches('\n').count() as u32;
        self.counted = to;
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(message).at(self.line))
    }

    fn template(&mut self) -> Result<()> {
        while let Some(begin) = next_tag(self.rest()) {
            let (text, tag) = self.rest().split_at(begin);
            let kind = &tag[..2];
            let sign = tag[2..].chars().next().filter(|c| "+-".contains(*c));
            let text = self.trimmed(text, sign, kind != "{{");
            if !text.is_empty() {
                self.push(Token::Data(text.to_owned()));
            }
            self.go(self.at + begin + 2 + usize::from(sign.is_some()));
            match kind {
                "{{" => {
                    self.push(Token::PrintBegin);
                    self.tag(false)?;
                }
                "{#" => self.comment()?,
                _ => match raw_begin(self.rest()) {
                    Some(length) => {
                        self.go(self.at + length);
                        self.raw()?;
                    }
                    None => {
                        self.push(Token::BlockBegin);
                        self.tag(true)?;
                    }
                },
            }
        }
        if !self.rest().is_empty() {
            let text = self.rest().to_owned();
            self.push(Token::Data(text));
        }
        Ok(())
    }

    /// A text before a tag with this sign, without the white space that the tag takes.
    fn trimmed(&self, text: &'a str, sign: Option<char>, is_block: bool) -> &'a str {
        match sign {
            Some('-') => text.trim_end_matches(is_space),
            Some(_) => text,
            None if is_block => {
                let line = text.rfind('\n').map_or(0, |at| at + 1);
                match (line > 0 || self.starts_line) && text[line..].chars().all(is_space) {
                    true => &text[..line],
                    false => text,
                }
            }
            None => text,
        }
    }

    /// Goes on behind the end of a tag, which has this many bytes, and what white space it takes.
    fn end(&mut self, length: usize, sign: Option<char>, trims_newline: bool) {
        let mut to = self.at + length;
        let rest = &self.source[to..];
        match sign {
            Some('-') => to += rest.len() - rest.trim_start_matches(is_space).len(),
            None if trims_newline && rest.starts_with('\n') => to += 1,
            _ => {}
        }
        self.go(to);
        self.starts_line = self.source[..to].ends_with('\n');
    }

    fn comment(&mut self) -> Result<()> {
        let Some(length) = self.rest().find("#}") else {
            return self.fail("a comment does not end: expected #}");
        };
        let sign = self.rest()[..length].chars().next_back().filter(|c| "+-".contains(*c));
        self.end(length + 2, sign, true);
        Ok(())
    }

    fn raw(&mut self) -> Result<()> {
        let rest = self.rest();
        let mut from = 0;
        while let Some(begin) = rest[from..].find("{%").map(|at| from + at) {
            let sign = rest[begin + 2..].chars().next().filter(|c| "+-".contains(*c));
            let inside = &rest[begin + 2 + usize::from(sign.is_some())..];
            let name = inside.trim_start_matches(is_space);
            if let Some(behind) = name.strip_prefix("endraw") {
                let end = behind.trim_start_matches(is_space);
                let end_sign = end.chars().next().filter(|c| "+-".contains(*c));
                if end[usize::from(end_sign.is_some())..].starts_with("%}") {
                    let text = self.trimmed(&rest[..begin], sign, true);
                    if !text.is_empty() {
                        self.push(Token::Data(text.to_owned()));
                    }
                    let length = rest.len() - end.len() + usize::from(end_sign.is_some()) + 2;
                    self.end(length, end_sign, true);
                    return Ok(());
                }
            }
            from = begin + 2;
        }
        self.fail("a raw block does not end: expected {% endraw %}")
    }

    /// What is inside a tag, and its end.
    fn tag(&mut self, is_block: bool) -> Result<()> {
        let mut open: Vec<char> = Vec::new();
        let (begun, end) = (self.line, if is_block { "%}" } else { "}}" });
        loop {
            let rest = self.rest();
            let Some(first) = rest.chars().next() else {
                return Err(Error::new(format!("a tag does not end: expected {end}")).at(begun));
            };
            if open.is_empty() {
                let sign = Some(first).filter(|c| *c == '-' || (*c == '+' && is_block));
                if rest[usize::from(sign.is_some())..].starts_with(end) {
                    self.push(if is_block { Token::BlockEnd } else { Token::PrintEnd });
                    self.end(2 + usize::from(sign.is_some()), sign, is_block);
                    return Ok(());
                }
            }
            if is_space(first) {
                let blank = rest.len() - rest.trim_start_matches(is_space).len();
                self.go(self.at + blank);
            } else if first.is_ascii_digit() {
                self.number()?;
            } else if first == '_' || first.is_alphabetic() {
                let name = rest.split(|c: char| c != '_' && !c.is_alphanumeric()).next().unwrap_or_default();
                self.push(Token::Name(name.to_owned()));
                self.go(self.at + name.len());
            } else if first == '\'' || first == '"' {
                self.string(first)?;
            } else if let Some(sign) = SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
                match first {
                    '(' | '[' | '{' => open.push(first),
                    ')' | ']' | '}' => {
                        let begin =
                            [('(', ')'), ('[', ']'), ('{', '}')].into_iter().find(|(_, end)| *end == first);
                        if open.pop() != begin.map(|(begin, _)| begin) {
                            return self.fail(format!("unexpected {first:?}"));
                        }
                    }
                    _ => {}
                }
                self.push(Token::Sign(sign));
                self.go(self.at + sign.len());
            } else {
                return self.fail(format!("unexpected {first:?}"));
            }
        }
    }

    fn number(&mut self) -> Result<()> {
        let rest = self.rest();
        let lower = rest.get(..2).map(str::to_ascii_lowercase);
        let radix = match lower.as_deref() {
            Some("0b") => 2,
            Some("0o") => 8,
            Some("0x") => 16,
            _ => 10,
        };
        let too_large = || Error::new("an integer is too large: expected at most 38 digits").at(self.line);
        if radix != 10 && rest[2..].starts_with(|c: char| c == '_' || c.is_digit(radix)) {
            let digits = rest[2..].split(|c: char| c != '_' && !c.is_digit(radix)).next().unwrap_or_default();
            let value = i128::from_str_radix(&digits.replace('_', ""), radix).map_err(|_| too_large())?;
            self.push(Token::Int(value));
            self.go(self.at + 2 + digits.len());
            return Ok(());
        }
        let run = |text: &str| {
            // Digits, with single underscores between them.
            let mut length = 0;
            let bytes = text.as_bytes();
            while bytes.get(length).is_some_and(u8::is_ascii_digit)
                || (length > 0
                    && bytes.get(length) == Some(&b'_')
                    && bytes.get(length + 1).is_some_and(u8::is_ascii_digit))
            {
                length += 1;
            }
            length
        };
        let whole = run(rest);
        let mut length = whole;
        // After a dot, as in `x.0.1`, a number is an index.
        if !self.source[..self.at].ends_with('.') {
            if rest[length..].starts_with('.') && run(&rest[length + 1..]) > 0 {
                length += 1 + run(&rest[length + 1..]);
            }
            if rest[length..].starts_with(['e', 'E']) {
                let signed = usize::from(rest[length + 1..].starts_with(['+', '-']));
                let exponent = run(&rest[length + 1 + signed..]);
                if exponent > 0 {
                    length += 1 + signed + exponent;
                }
            }
        }
        let digits = rest[..length].replace('_', "");
        let token = match length == whole {
            true => Token::Int(digits.parse().map_err(|_| too_large())?),
            false => Token::Float(digits.parse().unwrap_or(f64::INFINITY)),
        };
        self.push(token);
        self.go(self.at + length);
        Ok(())
    }

    fn string(&mut self, quote: char) -> Result<()> {
        let inside = &self.rest()[1..];
        let mut out = String::new();
        let mut chars = inside.char_indices();
        while let Some((at, c)) = chars.next() {
            if c == quote {
                self.push(Token::Str(out));
                self.go(self.at + 1 + at + 1);
                return Ok(());
            }
            if c != '\\' {
                out.push(c);
                continue;
            }
            let Some((_, escaped)) = chars.next() else { break };
            let digits = match escaped {
                'x' => 2,
                'u' => 4,
                'U' => 8,
                _ => 0,
            };
            match escaped {
                '\n' => {}
                'n' => out.push('\n'),
                't' => out.push('\t'),
                'r' => out.push('\r'),
                'a' => out.push('\u{7}'),
                'b' => out.push('\u{8}'),
                'f' => out.push('\u{c}'),
                'v' => out.push('\u{b}'),
                '\\' | '\'' | '"' => out.push(escaped),
                '0'..='7' => {
                    let mut code = escaped.to_digit(8).unwrap_or(0);
                    for _ in 0..2 {
                        let Some(digit) = chars.clone().next().and_then(|(_, c)| c.to_digit(8)) else {
                            break;
                        };
                        code = code * 8 + digit;
                        chars.next();
                    }
                    out.extend(char::from_u32(code));
                }
                'x' | 'u' | 'U' => {
                    let code: String = chars.by_ref().take(digits).map(|(_, c)| c).collect();
                    let code = u32::from_str_radix(&code, 16).ok().filter(|_| code.len() == digits);
                    match code.and_then(char::from_u32) {
                        Some(c) => out.push(c),
                        None => {
                            return self.fail(format!("\\{escaped} is followed by no character's number"));
                        }
                    }
                }
                'N' => return self.fail("\\N{…} in a text: write the character itself"),
                other => out.extend(['\\', other]),
            }
        }
        self.fail("a text does not end: expected a quote")
    }
}

/// Where the next tag begins.
fn next_tag(text: &str) -> Option<usize> {
    let tag = |at: &usize| ["{%", "{{", "{#"].iter().any(|tag| text[*at..].starts_with(tag));
    text.match_indices('{').map(|(at, _)| at).find(tag)
}

/// The length of the rest of a `raw` tag, if it is one.
fn raw_begin(inside: &str) -> Option<usize> {
    let name = inside.trim_start_matches(is_space);
    let end = name.strip_prefix("raw")?.trim_start_matches(is_space);
    if end.starts_with("%}") {
        return Some(inside.len() - end.len() + 2);
    }
    let behind = end.strip_prefix("-%}")?;
    Some(inside.len() - behind.trim_start_matches(is_space).len())
}
