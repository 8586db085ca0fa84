//! Templates as trees.

use std::sync::Arc;

use super::arithmetic::Operator;

/// An expression, and the line it begins on.
#[derive(Debug, Clone)]
pub(super) struct Expr {
    pub line: u32,
    pub kind: Box<Kind>,
    /// Expressions inside each other, itself included.
    pub depth: u16,
}

/// What it is.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    Name(Arc<str>),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Not(Expr),
    /// The expression, negated if so.
    Sign(Expr, bool),
    Arithmetic(Expr, Operator, Expr),
    And(Expr, Expr),
    Or(Expr, Expr),
    Compare(Expr, Vec<(Comparison, Expr)>),
    /// `~`
    Concat(Vec<Expr>),
    /// What it is if the second is true, and if not.
    If(Expr, Expr, Option<Expr>),
    Attribute(Expr, Arc<str>),
    Item(Expr, Expr),
    /// First, end and step.
    Slice(Expr, [Option<Expr>; 3]),
    Call(Expr, Arguments),
    Filter(Expr, Apply),
    /// A test, and whether it is negated.
    Test(Expr, Apply, bool),
}

/// How two values are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    NotIn,
}

/// What something is called with.
#[derive(Debug, Clone, Default)]
pub(super) struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(Arc<str>, Expr)>,
    /// `*more`
    pub more: Option<Expr>,
    /// `**more`
    pub more_named: Option<Expr>,
}

/// A filter or a test.
#[derive(Debug, Clone)]
pub(super) struct Apply {
    pub name: Arc<str>,
    pub arguments: Arguments,
    pub line: u32,
}

/// What something is assigned to.
#[derive(Debug, Clone)]
pub(super) enum Target {
    Name(Arc<str>),
    Tuple(Vec<Target>),
    /// An attribute of a namespace.
    Attribute(Arc<str>, Arc<str>),
}

/// A statement, and its line.
#[derive(Debug)]
pub(super) struct Stmt {
    pub line: u32,
    pub kind: StmtKind,
}

/// What it is.
#[derive(Debug)]
pub(super) enum StmtKind {
    Text(String),
    Print(Expr),
    Set(Target, Expr),
    SetBlock(Target, Vec<Apply>, Vec<Stmt>),
    For(Arc<For>),
    /// Conditions with what is done where one holds, and what where none does.
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    Macro(Arc<Macro>),
    /// The call, and its `caller`.
    CallBlock(Expr, Arc<Macro>),
    FilterBlock(Vec<Apply>, Vec<Stmt>),
    /// Statements whose variables are their own.
    Scope(Vec<Stmt>),
    Break,
    Continue,
}

/// A loop.
#[derive(Debug)]
pub(super) struct For {
    pub target: Target,
    pub over: Expr,
    pub test: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Stmt>,
    pub otherwise: Vec<Stmt>,
}

/// A macro.
#[derive(Debug)]
pub(super) struct Macro {
    pub name: Arc<str>,
    /// Names, with defaults.
    pub parameters: Vec<(Arc<str>, Option<Expr>)>,
    pub body: Vec<Stmt>,
    /// It names `varargs`, `kwargs` and `caller`, and so may be called with them.
    pub takes_more: bool,
    pub takes_more_named: bool,
    pub takes_caller: bool,
}

impl Kind {
    /// The deepest of the expressions inside, 0 if there are none.
    pub fn depth(&self) -> u16 {
        let all = |list: &[Expr]| list.iter().map(|expr| expr.depth).max().unwrap_or(0);
        match self {
            Kind::None | Kind::Bool(_) | Kind::Int(_) | Kind::Float(_) | Kind::Str(_) | Kind::Name(_) => 0,
            Kind::List(list) | Kind::Tuple(list) | Kind::Concat(list) => all(list),
            Kind::Dict(entries) => entries.iter().map(|(k, v)| k.depth.max(v.depth)).max().unwrap_or(0),
            Kind::Not(a) | Kind::Sign(a, _) | Kind::Attribute(a, _) => a.depth,
            Kind::Arithmetic(a, _, b) | Kind::And(a, b) | Kind::Or(a, b) | Kind::Item(a, b) => {
                a.depth.max(b.depth)
            }
            Kind::Compare(a, others) => others.iter().map(|(_, b)| b.depth).fold(a.depth, u16::max),
            Kind::If(a, b, c) => a.depth.max(b.depth).max(c.as_ref().map_or(0, |c| c.depth)),
            Kind::Slice(a, parts) => parts.iter().flatten().map(|part| part.depth).fold(a.depth, u16::max),
            Kind::Call(a, arguments) => a.depth.max(arguments.depth()),
            Kind::Filter(a, apply) | Kind::Test(a, apply, _) => a.depth.max(apply.arguments.depth()),
        }
    }
}

impl Arguments {
    fn depth(&self) -> u16 {
        let named = self.named.iter().map(|(_, expr)| expr);
        let all = self.positional.iter().chain(named).chain(&self.more).chain(&self.more_named);
        all.map(|expr| expr.depth).max().unwrap_or(0)
    }
}
