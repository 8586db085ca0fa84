#!/usr/bin/env bash
# Four files beside a model name its special tokens. How transformers 5 reads them together is in none of them:
# - an id that tokenizer_config.json gives a token in `added_tokens_decoder` is not the token's: what tokenizer.json lacks gets the next
#   free ids, in the order of the ids given.
# - special_tokens_map.json overrules tokenizer_config.json, but is not read at all once that has an `added_tokens_decoder`, be it empty.
# - a class brings tokens that no file names, and adds them to the vocabulary behind its end.
#
# Guess before the code was read: ids are as given, or refused; tokenizer_config.json overrules the older file; a tokenizer has the
# tokens of its files.
# Seen: transformers 5.24.0 with tokenizers 0.23.3, as said. A model whose embedding ends with the vocabulary has no row for such ids.
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

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

transformers.utils.logging.set_verbosity_error()
folder = pathlib.Path(sys.argv[1])
VOCAB = {"<unk>": 0, "<s>": 1, "a": 2, "b": 3}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def flags(text):
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


def load(config, **others):
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for file in folder.glob("*.json"):
        file.unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": config, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return transformers.AutoTokenizer.from_pretrained(folder)


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
listed = load(FAST | {"added_tokens_decoder": {"900": flags("<x>"), "700": flags("<y>")}})
ids = {token: listed.convert_tokens_to_ids(token) for token in ("<x>", "<y>")}
print("ids of <x>, given as 900, and <y>, given as 700:", ids)

roles = FAST | {"bos_token": "<unk>"}
older = {"special_tokens_map": {"bos_token": "<s>"}}
beside, unread = load(roles, **older).bos_token, load(roles | {"added_tokens_decoder": {}}, **older).bos_token
print("bos_token, <unk> by tokenizer_config.json and <s> by special_tokens_map.json:", beside)
print("the same with an empty added_tokens_decoder:", unread)

cohere = {token: load({"tokenizer_class": "CohereTokenizer"}).convert_tokens_to_ids(token) for token in ("<PAD>", "<CLS>")}
print(f"ids that a class adds to a vocabulary of {len(VOCAB)}:", cohere)
sys.exit((ids, beside, unread, min(cohere.values()) >= len(VOCAB)) != ({"<x>": 5, "<y>": 4}, "<s>", "<unk>", True))
PY
