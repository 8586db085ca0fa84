//! Patterns of names, as a shell has them: `*` stands for any text, `?` for one character.

/// Whether a pattern fits the whole of a name. Takes steps in the product of their lengths at most.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let [pattern, name]: [Vec<char>; 2] = [pattern, name].map(|text| text.chars().collect());
    let (mut p, mut n) = (0, 0);
    // The last star, and where what it stands for ends so far.
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            _ => {
                let Some((at, end)) = star else { return false };
                star = Some((at, end + 1));
                (p, n) = (at + 1, end + 1);
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn stars_stand_for_any_text_and_question_marks_for_a_character() {
        for (pattern, fits, others) in [
            ("mtp.*", &["mtp.", "mtp.a.b"][..], &["mtp", "a.mtp.b"][..]),
            ("*.q_scale", &[".q_scale", "a.b.q_scale"], &["q_scale", "a.q_scale.b"]),
            ("a*b*c", &["abc", "axbxbxc", "abcbc"], &["ab", "acb", "abcx"]),
            ("layers.??.x", &["layers.92.x", "layers.ää.x"], &["layers.9.x", "layers.192.x"]),
            ("**", &["", "a"], &[]),
            ("", &[""], &["a"]),
            ("a.b", &["a.b"], &["axb", "a.b.c", "A.b"]),
        ] {
            fits.iter().for_each(|name| assert!(matches(pattern, name), "{pattern} {name}"));
            others.iter().for_each(|name| assert!(!matches(pattern, name), "{pattern} {name}"));
        }
        let (pattern, name) = ("*a".repeat(50), "a".repeat(4000));
        assert!(!matches(&format!("{pattern}b"), &name));
    }
}
