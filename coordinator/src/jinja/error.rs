//! Why a template does not compile, or fails.

/// What went wrong in a template, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Error {
    message: String,
    line: Option<u32>,
    /// The template itself says so, in words of its own.
    is_raised: bool,
}

/// What a step of a template comes to.
pub(super) type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What went wrong, in words.
    pub fn new(message: impl Into<String>) -> Self {
        Error { message: message.into(), line: None, is_raised: false }
    }

    /// What the template says by `raise_exception`.
    pub fn raised(message: impl Into<String>) -> Self {
        Error { message: message.into(), line: None, is_raised: true }
    }

    /// The same, with the line it happened on if that is not known yet.
    pub fn at(mut self, line: u32) -> Self {
        self.line.get_or_insert(line);
        self
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) if !self.is_raised => write!(f, "line {line}: {}", self.message),
            _ => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {}
