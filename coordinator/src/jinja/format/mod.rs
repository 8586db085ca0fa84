//! Values in formats: `%` and `str.format`, and what both do to numbers.

mod braces;
mod percent;
mod spec;

pub(super) use braces::braces;
pub(super) use percent::percent;
pub(super) use spec::fixed;

/// Most digits, and the widest field, that a format may ask for.
const MAX_WIDTH: usize = 1 << 16;

/// A width or precision, bounded.
fn bounded(digits: &str) -> super::error::Result<usize> {
    let width = digits.parse::<usize>().ok().filter(|width| *width <= MAX_WIDTH);
    width.ok_or_else(|| {
        super::error::Error::new(format!("a format is too wide: expected at most {MAX_WIDTH}"))
    })
}
