#!/usr/bin/env bash
# In xgrammar a string of a schema may hold `\n`, `\"` and `\\` as long as nothing bounds it. With `maxLength`, `minLength` or a
# `pattern`, even one that matches everything, no backslash may be written at all: a bounded field cannot have a line break, a
# quote or a Windows path in it, and a model that wants to write one is led elsewhere without a word.
#
# Guess before it was run: an escape counts as one character of the length, and the bound changes nothing else.
# Seen: xgrammar 0.2.8 accepts all three texts without a bound and none of them with one; plain text passes in each case.
# llguidance 1.9.1 accepts them in each case.
#
# Needs Python 3 with venv, the package index, and 6 GB below the temporary folder, since xgrammar imports torch. Fails if any of
# this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xgrammar==0.2.8 llguidance==1.9.1
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import json
import sys

import xgrammar
from llguidance import LLMatcher, LLTokenizer

END = 256
BYTES = xgrammar.TokenizerInfo([bytes([b]) for b in range(END)] + [b"</s>"], stop_token_ids=[END])
COMPILER, PLAIN = xgrammar.GrammarCompiler(BYTES), LLTokenizer("byte")
ESCAPES = [r'"a\nb"', r'"say \"hi\""', r'"C:\\x"']
BOUNDS = [{}, {"maxLength": 100}, {"minLength": 1}, {"pattern": ".*"}]


def by_xgrammar(schema, text):
    matcher = xgrammar.GrammarMatcher(COMPILER.compile_json_schema(json.dumps(schema)))
    return all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(END)


def by_llguidance(schema, text):
    matcher = LLMatcher(PLAIN, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    ids = PLAIN.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


for package in ("xgrammar", "llguidance"):
    print(package, importlib.metadata.version(package))
as_seen = True
for bound in BOUNDS:
    schema = {"type": "string"} | bound
    one, other = ([engine(schema, text) for text in ESCAPES] for engine in (by_xgrammar, by_llguidance))
    print(f"{bound or 'no bound'}: xgrammar {one}, llguidance {other}")
    as_seen &= one == [not bound] * 3 and other == [True] * 3 and by_xgrammar(schema, '"ab"')
sys.exit(not as_seen)
PY
