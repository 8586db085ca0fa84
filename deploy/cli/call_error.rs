//! A call that has no answer, as clients and whoever reports it see it.

use std::{error::Error, fmt};

use tonic::Code;

/// A call that has no answer.
#[derive(Debug)]
pub struct CallError {
    /// What it means, to a program.
    pub code: Code,
    /// The same, to people.
    pub text: String,
}

impl CallError {
    /// The code as gRPC writes it: `NOT_FOUND`.
    pub fn name(&self) -> String {
        let name = format!("{:?}", self.code);
        let mut out = String::new();
        for (at, letter) in name.char_indices() {
            if at > 0 && letter.is_uppercase() {
                out.push('_');
            }
            out.push(letter.to_ascii_uppercase());
        }
        out
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for CallError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_grpcs_names() {
        let name = |code| CallError { code, text: String::new() }.name();
        assert_eq!(name(Code::NotFound), "NOT_FOUND");
        assert_eq!(name(Code::Unavailable), "UNAVAILABLE");
    }
}
