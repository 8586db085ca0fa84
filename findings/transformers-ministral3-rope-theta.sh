#!/usr/bin/env bash
# A config.json in transformers 4's style names the base of its rotary embedding by `rope_theta`. transformers 5 turns that into
# `rope_parameters` for every family but one whose class has rope_parameters of its own: Ministral 3 without them turns by yarn with
# its own base, and the one that the file gives is lost, without a word.
#
# Guess before the code was run: rope_theta is the base, whatever else the class assumes, as it is for Mistral.
# Seen: transformers 5.24.0: base 1000000.0 by yarn with factor 16, beside 10000.0 by no scaling for Mistral's class.
#
# Needs Python 3 with venv and the package index. Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import pathlib
import sys

import transformers

transformers.utils.logging.set_verbosity_error()
print("transformers", transformers.__version__)
folder = pathlib.Path(sys.argv[1]) / "model"
folder.mkdir()
read = {}
for family in ("mistral", "ministral3"):
    (folder / "config.json").write_text(json.dumps({"model_type": family, "rope_theta": 10000.0}))
    read[family] = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    print(family, "with rope_theta 10000.0:", {key: read[family].get(key) for key in ("rope_type", "rope_theta", "factor")})
assert read["mistral"]["rope_type"] == "default" and read["mistral"]["rope_theta"] == 10000.0, read
assert read["ministral3"]["rope_type"] == "yarn" and read["ministral3"]["rope_theta"] == 1000000.0, read
PY
