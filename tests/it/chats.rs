//! Chats with tools, named templates and unfinished messages, from a command's flags to what a model reads.

use std::process::Command;

use crate::cluster::model;

/// What `strata run` says of a model whose templates write what they are given.
fn refused(args: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(model("shakespeare")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let shows = "{% if messages[-1].content == 'show' %}{{ raise_exception(NAME ~ ': ' ~ {'m': messages[:-1], 't': tools, \
                 'd': documents, 'think': think | default(none)} | tojson) }}{% endif %}{{ messages[-1].content }}";
    std::fs::write(directory.path().join("chat_template.jinja"), shows.replace("NAME", "'default'")).unwrap();
    let folder = directory.path().join("additional_chat_templates");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("tool_use.jinja"), shows.replace("NAME", "'tool_use'")).unwrap();
    std::fs::write(
        directory.path().join("chat.json"),
        r#"[{"role": "assistant", "tool_calls": [{"id": 7}]}]"#,
    )
    .unwrap();
    std::fs::write(directory.path().join("tools.json"), r#"[{"type": "function", "f": 1.0}]"#).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    command.current_dir(directory.path()).args(["run", ".", "show", "--devices", "cpu"]).args(args);
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn what_flags_say_of_a_chat_reaches_the_template() {
    let plain = refused(&["--template-argument", "think=[1,\"a\"]"]);
    assert!(plain.contains(r#"default: {"m": [], "t": null, "d": null, "think": [1, "a"]}"#), "{plain}");
    let whole = refused(&["--messages", "@chat.json", "--tools", "@tools.json", "--documents", "[]"]);
    let message = r#"tool_use: {"m": [{"role": "assistant", "tool_calls": [{"id": 7}]}], "#;
    assert!(whole.contains(message), "{whole}");
    assert!(whole.contains(r#""t": [{"type": "function", "f": 1.0}], "d": []"#), "{whole}");
    let named = refused(&["--chat-template", "default", "--tools", "@tools.json"]);
    assert!(named.contains("default: "), "{named}");
    let unknown = refused(&["--chat-template", "rag"]);
    assert!(
        unknown.contains(r#"chat_template: "rag" is none"#) && unknown.contains("\"tool_use\""),
        "{unknown}"
    );
    let broken = refused(&["--tools", "[{]"]);
    assert!(broken.contains("tools: no JSON: key must be a string at line 1 column 3"), "{broken}");
}
