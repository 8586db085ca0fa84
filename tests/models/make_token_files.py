"""Write token_files.json: files that say something of a tokenizer's tokens, in the ways people's files do, and what transformers
makes of them.

usage: python make_token_files.py        (needs requirements.txt, and tokenizers.json)
"""
import json
import pathlib
import random
import tempfile

import transformers
from transformers import AutoTokenizer

transformers.utils.logging.set_verbosity_error()
HERE = pathlib.Path(__file__).parent
BASES = {name: entry["tokenizer"] for name, entry in json.loads((HERE / "tokenizers.json").read_text()).items()}
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{{ sep_token }} <extra>{{ eos_token }}")
MESSAGES = [{"role": "user", "content": "The coordinator counts  every byte."}, {"role": "assistant", "content": " Hello\nWorld "}]
TEXTS = ["Hello world", " The stage", "Naïve CAFÉ 日本"]
ROLES = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]


def token(text, special=True, **flags):
    return {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": not special,
            "special": special, **flags}


def variant(base, *, config=None, special_map=None, added=None, model="llama", keep=None, more=()):
    """Files for a base; of its added tokens only `keep` stay in tokenizer.json, and `more` join them."""
    tokenizer = json.loads(json.dumps(BASES[base]))
    if keep is not None:
        tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] in keep]
    files = {"config.json": {"model_type": model}, "tokenizer.json": tokenizer}
    size = len(tokenizer["model"]["vocab"])
    for i, t in enumerate(more):
        tokenizer["added_tokens"].append({"id": size + i, **t})
    for name, content in [("tokenizer_config.json", config), ("special_tokens_map.json", special_map),
                          ("added_tokens.json", added)]:
        if content is not None:
            files[name] = content
    return files


OBJECT = {"__type": "AddedToken"}
IM = ["<|im_start|>", "<|im_end|>"]
BPE, SP, UNI, WP = "byte-level BPE", "BPE with byte fallback", "Unigram", "WordPiece"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
VARIANTS = {
    "roles by tokenizer_config": variant(BPE, config=FAST | {"bos_token": "<s>", "eos_token": "</s>"}),
    "roles as objects": variant(SP, config=FAST | {"bos_token": token("<s>") | OBJECT, "eos_token": token("</s>") | OBJECT}),
    "roles by special_tokens_map": variant(BPE, config=FAST, special_map={"bos_token": "<s>", "eos_token": token("</s>")}),
    "special_tokens_map beside tokenizer_config": variant(
        BPE, config=FAST | {"bos_token": "<unk>", "sep_token": "<mask>"}, special_map={"bos_token": "<s>"}),
    "special_tokens_map beside a list": variant(
        BPE, config=FAST | {"bos_token": "<unk>", "added_tokens_decoder": {"2": token("<unk>")}},
        special_map={"bos_token": "<s>", "eos_token": "</s>"}),
    "a list that tokenizer.json lacks": variant(
        BPE, config=FAST | {"eos_token": "<|im_end|>", "added_tokens_decoder": {
            "321": token(IM[1]), "320": token(IM[0]), "322": token("<extra>", special=False)}}),
    "a list with other flags": variant(
        BPE, more=[token("<|im_start|>"), token("<|im_end|>")],
        config=FAST | {"added_tokens_decoder": {"320": token(IM[0], rstrip=True), "321": token(IM[1], lstrip=True)}}),
    "a list with ids that are not the next": variant(
        SP, config=FAST | {"added_tokens_decoder": {"900": token(IM[0]), "700": token(IM[1])}}),
    "extra special tokens": variant(WP, config=FAST | {"extra_special_tokens": IM, "sep_token": "[SEP]"}),
    "additional special tokens": variant(UNI, config=FAST | {"additional_special_tokens": [*IM, "<extra>"]}),
    "extra special tokens with names": variant(
        BPE, config=FAST | {"extra_special_tokens": {"image_token": "<extra>", "start": "<|im_start|>"}}),
    "a role of the model's own": variant(BPE, config=FAST | {"image_token": "<extra>", "bos_token": "<s>"}),
    "added_tokens.json": variant(
        UNI, config=FAST | {"eos_token": "<|im_end|>"}, added={"<|im_start|>": 161, "<|im_end|>": 160, "<extra>": 162}),
    "added_tokens.json at taken ids": variant(BPE, config=FAST, added={"<|im_start|>": 1, "<|im_end|>": 320}),
    "no added tokens in tokenizer.json": variant(UNI, keep=[], config=FAST | {"bos_token": "<s>", "eos_token": "</s>"}),
    "no added tokens, class by name": variant(WP, keep=[], config={"tokenizer_class": "BertTokenizer"}, model="bert"),
    "a BERT with nothing": variant(WP, config={"do_lower_case": True}, model="bert"),
    "a BERT without a configuration": variant(WP, model="bert"),
    "a BERT with capitals": variant(WP, config={"do_lower_case": False, "tokenizer_class": "BertTokenizer"}, model="bert"),
    "a BERT with accents": variant(WP, config={"strip_accents": False, "tokenizer_class": "BertTokenizerFast"}, model="bert"),
    "a BERT whose file is another class's": variant(WP, config=FAST | {"do_lower_case": False}, model="llama"),
    "a null role": variant(WP, config={"mask_token": None, "tokenizer_class": "BertTokenizer"}, model="bert"),
    "a space in front that no class asks for": variant(BPE, config=FAST | {"add_prefix_space": True}),
    "Llama's class over bytes": variant(BPE, config={"tokenizer_class": "LlamaTokenizer"}),
    "bos and eos switched on": variant(BPE, config=FAST | {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>"}),
    "flags of tokenizer.json": variant(
        SP, more=[token("<|im_start|>", rstrip=True), token("<|im_end|>", normalized=True), token("<extra>", special=False)],
        config=FAST | {"bos_token": "<s>", "eos_token": "</s>"}),
    "no tokenizer_config": variant(SP, special_map={"bos_token": "<s>", "eos_token": "</s>"}),
    "nothing": variant(UNI),
}


def wild(rng):
    """Some of everything."""
    base = rng.choice([BPE, SP, UNI, WP])
    own = [t["content"] for t in BASES[base]["added_tokens"]]
    any_token = lambda: rng.choice([*own, *IM, "<extra>"])
    role = lambda: rng.choice([any_token(), token(any_token()) | OBJECT])
    config = dict(rng.choice([FAST, {}]))
    config |= {r: role() for r in ROLES if rng.random() < 0.3 and r != "pad_token"}
    if rng.random() < 0.4:
        listed = rng.sample([*own, *IM, "<extra>"], 3)
        config["added_tokens_decoder"] = {
            str(400 + i if t not in own else own.index(t)): token(t, special=rng.random() < 0.7, rstrip=rng.random() < 0.3)
            for i, t in enumerate(listed)}
    if rng.random() < 0.4:
        config[rng.choice(["extra_special_tokens", "additional_special_tokens"])] = rng.sample([*IM, "<extra>"], 2)
    mapped = lambda: rng.choice([any_token(), token(any_token())])
    special_map = {r: mapped() for r in ROLES if rng.random() < 0.3 and r != "pad_token"} if rng.random() < 0.5 else None
    keep = rng.sample(own, 2) if rng.random() < 0.2 else None
    return variant(base, config=config, special_map=special_map, keep=keep)


def observe(files):
    with tempfile.TemporaryDirectory() as path:
        for name, content in files.items():
            (pathlib.Path(path) / name).write_text(json.dumps(content, ensure_ascii=False))
        tok = AutoTokenizer.from_pretrained(path)
        plain = AutoTokenizer.from_pretrained(path, split_special_tokens=True)
    chat = tok.apply_chat_template(MESSAGES, chat_template=TEMPLATE, tokenize=True, return_dict=False)
    return {
        "class": type(tok).__name__,
        "roles": {name: text for name, text in tok.special_tokens_map.items() if isinstance(text, str)},
        "chat": chat,
        "texts": [plain(text)["input_ids"] for text in TEXTS],
        "decoded": tok.decode(chat, skip_special_tokens=True),
    }


rng = random.Random(1)
VARIANTS |= {f"wild {i}": wild(rng) for i in range(60)}
out = {}
for name, files in VARIANTS.items():
    tokenizer = files.pop("tokenizer.json")
    try:
        seen = observe(files | {"tokenizer.json": tokenizer})
    except TypeError as error:
        # transformers refuses it.
        print(name, error)
        continue
    base = next(b for b in BASES if BASES[b]["model"] == tokenizer["model"])
    out[name] = {"base": base, "added_tokens": tokenizer["added_tokens"], "files": files} | seen
(HERE / "token_files.json").write_text(json.dumps(
    {"template": TEMPLATE, "messages": MESSAGES, "texts": TEXTS, "bases": BASES, "cases": out}, ensure_ascii=False) + "\n")
print(len(out), "cases,", (HERE / "token_files.json").stat().st_size, "bytes")
