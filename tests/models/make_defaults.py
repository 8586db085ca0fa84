"""Make defaults.json of the worker's families: what transformers' configuration classes assume where config.json is silent, and
the other names that they take for a field.

usage: python make_defaults.py [--check]        (needs requirements.txt; --check says what differs, and changes nothing)

Only fields that the worker's sources name are listed, and only numbers, flags and words: what classes derive from other fields is
derived by the families' own code.
"""
import argparse
import dataclasses
import inspect
import json
import pathlib
import re

from transformers import CONFIG_MAPPING

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "worker" / "src" / "model"
OUT = MODEL / "families" / "defaults.json"
# Of every class; what they say by default is of no family.
COMMON = {"model_type", "dtype", "torch_dtype", "problem_type", "num_labels", "is_decoder", "chunk_size_feed_forward"}
# Of these the tokenizer says what counts.
TOKENS = {"bos_token_id", "pad_token_id"}


def families():
    """Names of the families that are served, and of decoders inside of others that are one of them by another name."""
    text = (MODEL / "families" / "mod.rs").read_text()
    inner = re.findall(r'\("(\w+_text)", "', (MODEL / "families" / "wrapped.rs").read_text())
    return sorted(re.findall(r'(?:bpe|word_piece|any)\("([\w-]+)"', text) + inner)


def fields():
    """Every word in the sources that may name a field."""
    sources = [*(MODEL / "families").glob("*.rs"), MODEL / "rope.rs"]
    return {word for path in sources for word in re.findall(r'"([a-z][a-z0-9_]*)"', path.read_text())}


def defaults(cls):
    """Of a configuration class, as it is written: what an object makes of them may depend on each other."""
    found = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            for field in dataclasses.fields(base):
                if field.default is not dataclasses.MISSING:
                    found[cls.attribute_map.get(field.name, field.name)] = field.default
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                found[cls.attribute_map.get(name, name)] = parameter.default
    return found


def table():
    named = fields()
    lines = {}
    for family in families():
        if family not in CONFIG_MAPPING:
            print(family, "is none of transformers' own")
            continue
        cls = CONFIG_MAPPING[family]
        known = {name: value for name, value in sorted(defaults(cls).items())
                 if name in named - COMMON - TOKENS and isinstance(value, (bool, int, float, str))}
        aliases = {other: name for other, name in sorted(cls.attribute_map.items()) if name in named and other != name}
        lines[family] = {"defaults": known, "aliases": aliases}
    return lines


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    made = ",\n".join(f'"{name}": {json.dumps(of)}' for name, of in table().items())
    text = "{\n" + made + "\n}\n"
    if not parser.parse_args().check:
        OUT.write_text(text)
    elif OUT.read_text() != text:
        ours, theirs = (set(which.splitlines()) for which in (OUT.read_text(), text))
        raise SystemExit("\n".join(["defaults.json is not as transformers:", *sorted(ours - theirs), "but:", *sorted(theirs - ours)]))


if __name__ == "__main__":
    main()
