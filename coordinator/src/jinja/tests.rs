//! What templates make, beside what transformers makes of them (tests/models/chat_templates.json), and what they cannot do.

use serde_json::{Map, Value as Json, json};

use super::Template;

fn fixture() -> Json {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/chat_templates.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn render(source: &str, variables: &Json) -> Result<String, String> {
    let template = Template::new(source).map_err(|error| error.to_string())?;
    template.render(variables.as_object().unwrap()).map_err(|error| error.to_string())
}

#[test]
fn every_piece_of_the_language_is_as_in_transformers() {
    let fixture = fixture();
    let mut wrong = Vec::new();
    for piece in fixture["pieces"].as_array().unwrap() {
        let (source, expected) = (piece[0].as_str().unwrap(), piece[1].as_str());
        let found = render(source, &fixture["variables"]);
        if found.as_deref().ok() != expected {
            wrong.push(format!("{source}\n  found {found:?}\n  expected {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn errors_say_where_and_what() {
    for (source, expected) in [
        ("a\n{% for %}", "line 2: unexpected %}: expected a name"),
        ("{{ 1 }}\n\n{{ 'a' | nothing }}", "line 3: the filter \"nothing\" does not exist"),
        ("{{ 'a' | urlize }}", "line 1: the filter \"urlize\" is not supported here"),
        ("{% include '/etc/passwd' %}", "line 1: {% include %}: a chat template cannot use other templates"),
        (
            "{% if 1 %}a",
            "line 1: unexpected the end of the template: expected {% elif %} or {% else %} or {% endif %}",
        ),
        ("{{ missing.a }}", "line 1: 'missing' is undefined"),
        ("{{ {}.a.b }}", "line 1: 'dict object' has no attribute 'a'"),
        ("{{ [].append(1) }}", "line 1: access to attribute 'append' of 'list' object is unsafe."),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            "{% macro f(a) %}{% endmacro %}{{ f(1, 2) }}",
            "line 1: macro 'f' takes not more than 1 argument(s)",
        ),
    ] {
        assert_eq!(render(source, &json!({})).unwrap_err(), expected, "{source}");
    }
}

#[test]
fn work_and_memory_are_bounded() {
    let deep = |open: &str, middle: &str, close: &str, n: usize| open.repeat(n) + middle + &close.repeat(n);
    let nested = |n| json!({"x": serde_json::from_str::<Json>(&deep("[", "1", "]", n)).unwrap()});
    let ends = [
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "10000000 steps"),
        ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than 4194304 bytes"),
        ("{{ 'x' * 10 ** 12 }}", "a text of more than 16777216 bytes"),
        ("{{ 'x'.ljust(10 ** 12) }}", "a text of more than 16777216 bytes"),
        ("{{ '{:>99999999}'.format(1) }}", "at most 65536"),
        ("{{ '%99999999d' % 1 }}", "at most 65536"),
        ("{{ [0] * 10 ** 9 }}", "more than"),
        ("{{ 'a\\n' | indent(10 ** 9) }}", "a text of more than"),
        ("{{ ('ab' * 999999).replace('a', 'b' * 999) | length }}", "a text of more than"),
        (
            "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "more than",
        ),
        (
            "{% set ns = namespace(s=[]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}",
            "lists and dicts",
        ),
        (
            "{% set ns = namespace(s={}) %}{% for i in range(9999) %}{% set ns.s = {'a': ns.s} %}{% endfor %}",
            "lists and dicts",
        ),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "inside each other"),
        ("{% set ns = namespace() %}{% set ns.x = [[ns]] %}{{ ns }}", "inside each other"),
        ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "inside each other"),
        (
            "{% macro f(c) %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f(1) %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
            "inside",
        ),
        ("{{ range(10 ** 30) }}", "Range too big"),
        ("{{ 10 ** 40 }}", "too large"),
    ];
    for (source, expected) in ends {
        let error = render(source, &json!({})).unwrap_err();
        assert!(error.contains(expected), "{source}: {error}");
    }
    for source in [
        format!("{{{{ {} }}}}", deep("(", "1", ")", 100_000)),
        format!("{{{{ {} }}}}", deep("not ", "1", "", 100_000)),
        format!("{{{{ {} }}}}", deep("- ", "1", "", 100_000)),
        format!("{{{{ {} }}}}", deep("[", "1", "]", 100_000)),
        format!("{{{{ 1{} }}}}", " + 1".repeat(100_000)),
        format!("{{{{ x{} }}}}", ".a".repeat(100_000)),
        format!("{{{{ x{} }}}}", " | list".repeat(100_000)),
        format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(100_000)),
        deep("{% if 1 %}", "a", "{% endif %}", 100_000),
        format!("{{% set {} = 1 %}}", deep("(", "a", ")", 100_000)),
    ] {
        let error = Template::new(&source).unwrap_err().to_string();
        assert!(error.contains("inside each other"), "{error}");
    }
    // What is just allowed fits the stack of a thread, where frames are largest.
    let deepest = format!("{{{{ {} }}}}", deep("[", "1", "]", 90));
    assert_eq!(render(&deepest, &json!({})).unwrap(), deep("[", "1", "]", 90));
    assert_eq!(render("{{ x }}{{ x | tojson }}", &nested(64)).unwrap(), deep("[", "1", "]", 64).repeat(2));
    let calls = "{% macro f(n) %}{% if n %}{{ [[f(n - 1)]] | length }}{% endif %}{% endmacro %}{{ f(8) }}";
    assert_eq!(render(calls, &json!({})).unwrap(), "1");
    // Macros hold the block they are in, which holds them: both are let go.
    let kept = "{% macro f() %}{% endmacro %}{% for i in range(3000) %}{% macro g() %}{{ f() }}{% endmacro %}{% endfor %}";
    assert_eq!(render(kept, &json!({})).unwrap(), "");
}

#[test]
fn numbers_stay_what_they_are() {
    let variables: Map<String, Json> =
        serde_json::from_str(r#"{"x": [1, 1.0, 18446744073709551615, -9223372036854775808, 1e22, -0.0]}"#)
            .unwrap();
    let text = Template::new("{{ x }}|{{ x | tojson }}").unwrap().render(&variables).unwrap();
    let printed = "[1, 1.0, 18446744073709551615, -9223372036854775808, 1e+22, -0.0]";
    assert_eq!(text, format!("{printed}|{printed}"));
}
