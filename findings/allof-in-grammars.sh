#!/usr/bin/env bash
# `allOf` over two objects, as Pydantic and OpenAPI write a type that extends another, is three different things to three
# engines of constrained decoding. llguidance merges the two. outlines-core writes them one after the other, so that what comes out
# has to be `{"a":1}{"b":2}`, which is no JSON. xgrammar lets anything pass, an array or a number too, and says so on standard error
# only.
#
# Guess before it was run: all three either merge the objects or refuse the schema.
# Seen: llguidance 1.9.1, outlines_core 0.2.14, xgrammar 0.2.8, as said.
#
# Needs Python 3 with venv, the package index, and 6 GB below the temporary folder, since xgrammar imports torch. Fails if any of
# this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xgrammar==0.2.8 llguidance==1.9.1 outlines-core==0.2.14
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import json
import re
import sys

import xgrammar
from llguidance import LLMatcher, LLTokenizer
from outlines_core.json_schema import build_regex_from_schema


def part(name):
    return {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}


SCHEMA = json.dumps({"allOf": [part("a"), part("b")]})
ANSWERS = ['{"a":1,"b":2}', '{"a":1}{"b":2}', '{"a":"x"}', "[]", "5"]
END = 256


def llguidance(text):
    plain = LLTokenizer("byte")
    matcher = LLMatcher(plain, LLMatcher.grammar_from_json_schema(SCHEMA))
    ids = plain.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def outlines_core(text):
    return re.fullmatch(build_regex_from_schema(SCHEMA), text) is not None


def by_xgrammar(text):
    tokens = xgrammar.TokenizerInfo([bytes([b]) for b in range(END)] + [b"</s>"], stop_token_ids=[END])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(tokens).compile_json_schema(SCHEMA))
    return all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(END)


as_seen = True
for package, engine, expected in (("llguidance", llguidance, ANSWERS[:1]), ("outlines_core", outlines_core, ANSWERS[1:2]),
                                  ("xgrammar", by_xgrammar, [ANSWERS[0], *ANSWERS[2:]])):
    found = [answer for answer in ANSWERS if engine(answer)]
    print(f"{package} {importlib.metadata.version(package)} accepts {'  '.join(found)}")
    as_seen &= found == expected
sys.exit(not as_seen)
PY
