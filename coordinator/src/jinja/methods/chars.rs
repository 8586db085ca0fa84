//! Letters: their cases, and what kind they are.

/// The first letter large, the others small.
pub(in super::super) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(title_case);
    first.into_iter().flatten().chain(chars.as_str().to_lowercase().chars()).collect()
}

/// The first letter of each word large, as `str.title` has it: a word is a run of letters.
pub(super) fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(title_case(c)),
        }
        inside = has_case(c);
    }
    out
}

fn title_case(c: char) -> Vec<char> {
    match c {
        // Of letters that are two, only the first becomes large.
        'ß' => vec!['S', 's'],
        'ǆ' | 'Ǆ' | 'ǅ' => vec!['ǅ'],
        'ǉ' | 'Ǉ' | 'ǈ' => vec!['ǈ'],
        'ǌ' | 'Ǌ' | 'ǋ' => vec!['ǋ'],
        'ǳ' | 'Ǳ' | 'ǲ' => vec!['ǲ'],
        c => {
            let mut upper = c.to_uppercase();
            let first = upper.next();
            first.into_iter().chain(upper.flat_map(char::to_lowercase)).collect()
        }
    }
}

fn has_case(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ')
}

/// It has letters with a case, and all are small.
pub(in super::super) fn is_lower(text: &str) -> bool {
    text.chars().any(char::is_lowercase) && !text.chars().any(|c| has_case(c) && !c.is_lowercase())
}

/// It has letters with a case, and all are large.
pub(in super::super) fn is_upper(text: &str) -> bool {
    text.chars().any(char::is_uppercase) && !text.chars().any(|c| has_case(c) && !c.is_uppercase())
}

/// Every word, and there is one, begins with a large letter and goes on with small ones.
pub(super) fn is_title(text: &str) -> bool {
    let mut found = false;
    let mut inside = false;
    for c in text.chars() {
        if c.is_uppercase() && inside || c.is_lowercase() && !inside {
            return false;
        }
        inside = has_case(c);
        found |= inside;
    }
    found
}

/// Large letters small, and small ones large.
pub(super) fn swap_case(text: &str) -> String {
    let swap = |c: char| -> Vec<char> {
        if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
    };
    text.chars().flat_map(swap).collect()
}

/// As comparisons without regard to case want it.
pub(super) fn fold(text: &str) -> String {
    text.to_lowercase().replace('ß', "ss").replace('ς', "σ")
}

/// Digits of any script with which numbers are written.
pub(super) fn is_decimal(c: char) -> bool {
    // `Nd` is what `\d` means; of other numeric characters none is part of a run of ten.
    c.is_ascii_digit() || (c.is_numeric() && !c.is_ascii() && zero_of(c).is_some())
}

/// The digit zero of the script of a decimal digit; their runs of ten begin at these places.
fn zero_of(c: char) -> Option<u32> {
    const ZEROS: [u32; 37] = [
        0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xde6, 0xe50,
        0xed0, 0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90, 0x1b50, 0x1bb0, 0x1c40,
        0x1c50, 0xa620, 0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0, 0xff10, 0x104a0,
    ];
    let code = u32::from(c);
    ZEROS.into_iter().find(|zero| (*zero..zero + 10).contains(&code))
}

/// Decimal digits, and those that are raised or lowered.
pub(super) fn is_digit(c: char) -> bool {
    is_decimal(c) || matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨')
}
