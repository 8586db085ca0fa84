#!/usr/bin/env bash
# A tokenizer.json says how a text is normalized, split and put between special tokens. In transformers 5, classes with a constructor
# of their own (BertTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer, CohereTokenizer, …) take the vocabulary and the merges
# out of it and make the rest anew, as the class was once published: normalizer, pre-tokenizer and decoder of the file count for
# nothing, with or without `Fast` in `tokenizer_class`. So one file has other ids in transformers than in the library tokenizers and
# whatever is built on that; nothing is reported.
#
# Guess before it was run: the file is used as it is; the class matters only where there is none.
# Seen: transformers 5.24.0 with tokenizers 0.23.3: a file that lower-cases and splits by numbers does neither as Qwen2's, GPT-2's,
# GPT-NeoX's or Cohere's; a WordPiece file that keeps capitals and frames nothing loses them, and is framed, as BERT's.
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
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

transformers.utils.logging.set_verbosity_error()
folder = pathlib.Path(sys.argv[1])


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    by_numbers = pre_tokenizers.Split(Regex(r"\p{N}|[^\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [by_numbers, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["abc 12"] * 3, trainer)
    return tokenizer


def word_piece():
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "Hello", "hello"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def by_class(tokenizer, name, text):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
as_seen = True
for make, text, same, other in (
        (byte_level, "ABC 12", ["PreTrainedTokenizerFast", "LlamaTokenizer"],
         ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer"]),
        (word_piece, "Hello", ["PreTrainedTokenizerFast"], ["BertTokenizer", "BertTokenizerFast"])):
    file = make()
    own = file.encode(text).tokens
    print(f"{text!r} by the file: {own}")
    for name in same + other:
        ids = by_class(file, name, text)
        print(f"  as {name}: {[file.id_to_token(i) for i in ids]}")
        as_seen &= (ids == file.encode(text).ids) == (name in same)
sys.exit(not as_seen)
PY
