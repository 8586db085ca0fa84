//! Times as Python's `strftime` writes them, for a time without a zone.

use chrono::{
    DateTime, Local,
    format::{Item, StrftimeItems},
};

/// Directives that mean to C what they mean to chrono.
const SAME: &str = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyY";

/// A time in this format. What is no directive stays as it is, as in the C library that Python asks.
pub(super) fn strftime(format: &str, now: DateTime<Local>) -> String {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let rest = chars.as_str();
        let padding = rest.chars().next().filter(|c| "-_0".contains(*c));
        let directive = rest.chars().nth(usize::from(padding.is_some()));
        let taken = 1 + usize::from(padding.is_some());
        match directive {
            Some('%') => out.push('%'),
            Some('f') => out.push_str(&now.format("%6f").to_string()),
            // There is no zone.
            Some('z' | 'Z') => {}
            Some(directive) if SAME.contains(directive) => {
                let one: String = ['%'].into_iter().chain(padding).chain([directive]).collect();
                let items: Vec<_> = StrftimeItems::new(&one).collect();
                match items.contains(&Item::Error) {
                    true => out.push_str(&one),
                    false => out.push_str(&now.format_with_items(items.iter()).to_string()),
                }
            }
            Some(_) | None => {
                out.push('%');
                continue;
            }
        }
        let rest = chars.as_str();
        chars = rest[taken..].chars();
    }
    out
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone;

    use super::*;

    #[test]
    fn times_are_written_as_python_writes_them() {
        let then = Local.with_ymd_and_hms(2026, 3, 7, 9, 5, 0).unwrap();
        for (format, expected) in [
            ("%d %b %Y, %H:%M", "07 Mar 2026, 09:05"),
            ("%-d %B %y %I %p", "7 March 26 09 AM"),
            ("%f|%z%Z|%j %U %w", "000000||066 09 6"),
            ("100%% %! %", "100% %! %"),
            ("%Y-%m-%dT%H:%M:%S.%f", "2026-03-07T09:05:00.000000"),
            ("%c", "Sat Mar  7 09:05:00 2026"),
            ("%D %F %T %R %e", "03/07/26 2026-03-07 09:05:00 09:05  7"),
        ] {
            assert_eq!(strftime(format, then), expected, "{format}");
        }
    }
}
