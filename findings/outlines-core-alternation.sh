#!/usr/bin/env bash
# outlines-core puts a schema's `pattern` between two quotes as it is. A pattern with an alternative outside of parentheses then
# splits the quotes too: what a model may write is `"cat` or `dog"`, and neither `"cat"` nor `"dog"`, so that no answer is JSON.
# `^` and `$` are taken off before, so `^cat|dog$` comes out the same.
#
# Guess before it was run: the pattern is grouped, and both words are accepted with their quotes.
# Seen: outlines_core 0.2.14 makes `("cat|dog")` of it. In parentheses, `(cat|dog)`, it is right.
#
# Needs Python 3 with venv and the package index. Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check outlines-core==0.2.14
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import json
import re
import sys

from outlines_core.json_schema import build_regex_from_schema

ANSWERS = ['{"pet":"cat"}', '{"pet":"dog"}', '{"pet":"cat}', '{"pet":dog"}']


def accepted(pattern):
    schema = {"type": "object", "properties": {"pet": {"type": "string", "pattern": pattern}}, "required": ["pet"]}
    regex = build_regex_from_schema(json.dumps(schema))
    found = [answer for answer in ANSWERS if re.fullmatch(regex, answer)]
    print(f"{pattern}: {regex} accepts {' '.join(found)}")
    return found


print("outlines_core", importlib.metadata.version("outlines_core"))
sys.exit([accepted(p) for p in ("cat|dog", "^cat|dog$", "(cat|dog)")] != [ANSWERS[2:], ANSWERS[2:], ANSWERS[:2]])
PY
