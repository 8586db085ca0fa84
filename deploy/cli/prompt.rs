//! Prompts as they are given: as text, as a file, on standard input.

use std::io::Read;

use anyhow::Context;

use crate::report::misused;

/// The text of a prompt: `-` is standard input, `@FILE` a file, and `@@` an `@`; each is taken as it is, to its last
/// newline.
pub fn read(given: String) -> anyhow::Result<String> {
    match given.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("reading the prompt from standard input")?;
            Ok(text)
        }
        text => match text.strip_prefix('@') {
            Some(rest) if rest.starts_with('@') => Ok(rest.to_owned()),
            Some(path) => std::fs::read_to_string(path).with_context(|| {
                format!("prompt @{path}: reading the file (a prompt that begins with @ is written @@…)")
            }),
            None => Ok(given),
        },
    }
}

/// The one prompt of two places where it can be given.
pub fn only(place: Option<String>, flag: Option<String>) -> anyhow::Result<Option<String>> {
    match (place, flag) {
        // Both come from one environment variable, too.
        (Some(place), Some(flag)) if place != flag => {
            Err(misused(format!("there are two prompts, {place:?} and --prompt {flag:?}: give one")))
        }
        (place, flag) => flag.or(place).map(read).transpose(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_a_text_or_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "ROMEO:\n").unwrap();
        let path = file.path().display();
        assert_eq!(read(format!("@{path}")).unwrap(), "ROMEO:\n");
        assert_eq!(read("@@home".into()).unwrap(), "@home");
        assert_eq!(read("a@b".into()).unwrap(), "a@b");
        let missing = format!("{:#}", read("@/nowhere".into()).unwrap_err());
        assert!(missing.contains("@/nowhere") && missing.contains("written @@"), "{missing}");
        let two = only(Some("a".into()), Some("b".into())).unwrap_err().to_string();
        assert!(two.contains("\"a\" and --prompt \"b\""), "{two}");
        assert_eq!(only(Some("a".into()), Some("a".into())).unwrap().as_deref(), Some("a"));
    }
}
