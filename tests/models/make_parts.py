"""Make the small encoders that classify tokens or answer questions, with what transformers makes of texts by them.

usage: python make_parts.py [OUT_DIR [NAME…]]        (needs requirements.txt; OUT_DIR defaults to this directory)

`expected.json` holds logits as make_encoders.py does, here of every token, and beside them `pipelines`: what transformers'
pipeline for token classification makes of texts, for each strategy of aggregation, or the answers to questions by the rules of the
pipeline for question answering that version 4 had (`answers` below says them), for several arguments.
"""
import json
import pathlib
import shutil
import sys

import make_encoders
import numpy as np
import torch
import transformers
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, pipeline

TAGS, SPANS = AutoModelForTokenClassification, AutoModelForQuestionAnswering
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
LABELS = dict(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=128)
# Whose positions are counted from the row after the padding token's.
LATE = SMALL | dict(type_vocab_size=1, max_position_embeddings=130)
DEBERTA = SMALL | make_encoders.DEBERTA | dict(norm_rel_ebd="layer_norm")

FIXTURES = {
    "bert-tags-f32": (TAGS, dict(model_type="bert", **SMALL, **LABELS), torch.float32),
    "roberta-tags-bf16": (TAGS, dict(model_type="roberta", **LATE, **LABELS), torch.bfloat16),
    "xlm-roberta-tags-f32": (TAGS, dict(model_type="xlm-roberta", **LATE, **LABELS), torch.float32),
    "modernbert-tags-f32": (TAGS, dict(model_type="modernbert", local_attention=14, **SMALL, **LABELS), torch.float32),
    "deberta-v2-tags-bf16": (TAGS, dict(model_type="deberta-v2", position_buckets=16, **DEBERTA, **LABELS), torch.bfloat16),
    "bert-spans-f32": (SPANS, dict(model_type="bert", **SMALL), torch.float32),
    "roberta-spans-f32": (SPANS, dict(model_type="roberta", **LATE), torch.float32),
    "deberta-v2-spans-f32": (SPANS, dict(model_type="deberta-v2", position_buckets=24, **DEBERTA), torch.float32),
    "electra-spans-bf16": (SPANS, dict(model_type="electra", embedding_size=32, **SMALL), torch.bfloat16),
    "modernbert-spans-bf16": (SPANS, dict(model_type="modernbert", local_attention=14, **SMALL), torch.bfloat16),
}
TEXTS = ["A worker dies.", "Ünïcode 🙂 is not a word, said Ada-Maria; the layers and stages were counted once.", "x",
         "The answer goes on, and the next stage holds a few layers."]
LONG = "The answer goes on, and the next stage holds a few layers; every byte is counted once, before a single one. " * 6
QUESTIONS = [
    dict(question="Who dies?", context="A worker dies, and the next stage holds a few layers. A worker dies."),
    dict(question="Is it a word?", context="Ünïcode 🙂 is not a word, said Ada; a word is a Word.", top_k=3, max_answer_tokens=4),
    dict(question="every byte", context=LONG, top_k=5, stride=20, max_window_tokens=64, handle_impossible_answer=True),
    dict(question="What is held?", context=LONG, top_k=2, max_answer_tokens=40),
    dict(question="x", context="y", handle_impossible_answer=True),
]


def round_all(rows):
    return [[float(f"{x:.6g}") for x in row] for row in rows]


def answers(model, tok, question, context, top_k=1, max_answer_tokens=15, stride=None, max_window_tokens=None,
            handle_impossible_answer=False):
    """Windows as the tokenizer cuts them; a probability each for beginnings and ends, of the context's tokens and the first one;
    the best spans, as whole words; equal texts together."""
    longest = max_window_tokens or min(tok.model_max_length, 384)
    stride = min(longest // 2, 128) if stride is None else stride
    batch = tok(question, context, truncation="only_second", max_length=longest, stride=stride, return_overflowing_tokens=True,
                return_offsets_mapping=True, return_token_type_ids=True)
    found, least = [], 1e6
    for i, encoding in enumerate(batch.encodings):
        inputs = dict(input_ids=torch.tensor([encoding.ids]), attention_mask=torch.tensor([encoding.attention_mask]))
        if getattr(model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = torch.tensor([encoding.type_ids])
        out = model(**inputs)
        logits = [out.start_logits[0].numpy(), out.end_logits[0].numpy()]
        own = np.array([s == 1 for s in batch.sequence_ids(i)])
        may = own | (np.array(encoding.ids) == tok.cls_token_id)
        start, end = (torch.softmax(torch.from_numpy(np.where(may, x, -10000.0)).float(), 0).numpy() for x in logits)
        least = min(least, float(start[0] * end[0]))
        start[0] = end[0] = 0
        spans = [(s, e) for s in range(len(own)) for e in range(s, min(s + max_answer_tokens, len(own))) if own[s] and own[e]]
        spans.sort(key=lambda span: -start[span[0]] * end[span[1]])
        for s, e in spans[:2 * top_k + 10]:
            words = encoding.token_to_word(s), encoding.token_to_word(e)
            if None in words:
                begin, finish = encoding.offsets[s][0], encoding.offsets[e][1]
            else:
                begin, finish = encoding.word_to_chars(words[0], 1)[0], encoding.word_to_chars(words[1], 1)[1]
            text = context[begin:finish]
            same = [a for a in found if a["text"].lower() == text.lower()]
            if same:
                same[0]["score"] += float(start[s] * end[e])
            else:
                found.append(dict(text=text, score=float(start[s] * end[e]), start=begin, end=finish,
                                  start_logit=float(logits[0][s]), end_logit=float(logits[1][e])))
    if handle_impossible_answer:
        found.append(dict(text="", score=least, start=0, end=0))
    return sorted(found, key=lambda a: -a["score"])[:top_k], len(batch.encodings)


@torch.no_grad()
def expect(kind, path, tok):
    model = kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    pairs = [(text, None) for text in TEXTS] if kind is TAGS else [(q["question"], q["context"]) for q in QUESTIONS]
    rows = []
    for text, pair in pairs:
        batch = tok(text, pair, return_tensors="pt", return_token_type_ids=True, truncation=True, max_length=128)
        if getattr(model.config, "type_vocab_size", 0) < 2:
            batch.pop("token_type_ids")
        out = model(**batch)
        logits = out.logits[0] if kind is TAGS else torch.stack([out.start_logits[0], out.end_logits[0]], 1)
        rows.append(dict(text=text, pair=pair, ids=batch["input_ids"][0].tolist(), masked=list(range(len(logits))),
                         segments=batch["token_type_ids"][0].tolist() if "token_type_ids" in batch else [],
                         values=round_all(logits.tolist())))
    if kind is SPANS:
        made = [answers(model, tok, **question) for question in QUESTIONS]
        return rows, [dict(asked=q, windows=windows, answers=found) for q, (found, windows) in zip(QUESTIONS, made)]
    pipelines = []
    for strategy in ("none", "simple", "first", "average", "max"):
        run = pipeline("token-classification", model=model, tokenizer=tok, aggregation_strategy=strategy, device="cpu",
                       ignore_labels=["O"] if strategy == "max" else [])
        for text in TEXTS:
            entities = [{k: float(v) if k == "score" else v for k, v in e.items() if k != "word"} for e in run(text)]
            pipelines.append(dict(strategy=strategy, text=text, entities=entities))
    return rows, pipelines


def main(out, only):
    for number, (name, (kind, settings, dtype)) in enumerate(FIXTURES.items()):
        if only and name not in only:
            continue
        path = out / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        tok = make_encoders.make_tokenizer(path, settings["model_type"])
        make_encoders.make_model(kind, settings, 300 + number).to(dtype).save_pretrained(path)
        rows, pipelines = expect(kind, path, tok)
        versions = {m.__name__: m.__version__ for m in (transformers, torch)}
        (path / "expected.json").write_text(json.dumps(dict(versions=versions, inputs=rows, pipelines=pipelines)) + "\n")
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        assert size < 400_000, f"{name}: {size} bytes"
        print(name, f"{size} bytes,", "lengths", [len(row["ids"]) for row in rows])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent), sys.argv[2:])
