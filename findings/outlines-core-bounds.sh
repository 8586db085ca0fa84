#!/usr/bin/env bash
# outlines-core takes bounds of numbers and does nothing with them: neither an error nor a word says that `maximum`, `minimum`,
# `exclusiveMinimum`, `multipleOf` or `uniqueItems` will not hold. A `format` that it does not know is an error.
#
# Guess before it was run: integers are held to their bounds, and what cannot be held is refused, as an unknown format is.
# Seen: outlines_core 0.2.14 makes the same expression with and without each of them, and refuses the format `ipv4`. Lengths of
# strings and arrays do count.
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
import sys

from outlines_core.json_schema import build_regex_from_schema


def regex(schema):
    return build_regex_from_schema(json.dumps(schema))


def counts(schema, **bound):
    changed = regex(schema | bound) != regex(schema)
    print(f"{schema['type']} with {bound}: {'another' if changed else 'the same'} expression")
    return changed


integer, number, string = {"type": "integer"}, {"type": "number"}, {"type": "string"}
array = {"type": "array", "items": integer}
print("outlines_core", importlib.metadata.version("outlines_core"))
ignored = [counts(integer, minimum=0, maximum=50), counts(integer, exclusiveMinimum=0), counts(integer, multipleOf=5),
           counts(number, minimum=0, maximum=1), counts(array, uniqueItems=True)]
held = [counts(string, maxLength=5), counts(array, maxItems=2)]
try:
    refused = not regex(string | {"format": "ipv4"})
except Exception as error:
    refused = "ipv4" in str(error)
    print("format ipv4:", str(error).splitlines()[0])
sys.exit(any(ignored) or not all(held) or not refused)
PY
