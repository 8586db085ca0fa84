"""Make the small models of sentence-transformers: seeded random encoders with modules behind them, with its own outputs.

usage: python make_sentences.py [OUT_DIR [NAME…]]        (needs requirements.txt; OUT_DIR defaults to this directory)

`expected.json` is as make_encoders.py writes it; `ids` are those of the model's default prompt and the text, and
`pooled_from` of them are left out of the vector. `prompts` are vectors of the first text by name of prompt.
"""
import json
import pathlib
import shutil
import sys

import sentence_transformers
import torch
import transformers
from make_encoders import CLASSIFY, EMBED, make_model, make_tokenizer, texts
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer import modules as parts
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
TANH, IDENTITY = torch.nn.Tanh(), torch.nn.Identity()

# name: (configuration, storage format, modules behind the transformer, how the model is saved, the oldest files or not)
FIXTURES = {
    # Several ways of pooling side by side, without the prompt's tokens; every module that has weights; a vector that is cut.
    "bert-sentences-f32": (dict(
        model_type="bert", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128), torch.float32,
        lambda: [parts.Pooling(32, ("cls", "mean", "weightedmean"), include_prompt=False),
                 Dense(96, 20, activation_function=TANH), parts.LayerNorm(20),
                 Dense(20, 24, bias=False, activation_function=IDENTITY), Normalize()],
        dict(prompts={"query": "a question: ", "document": "", "other": "The worker's layers: "},
             default_prompt_name="query", truncate_dim=10, similarity_fn_name="dot", longest=100), False),
    # As files of versions 2 to 5 are: flags for the ways of pooling, and the length in a file of its own.
    "distilbert-sentences-old-bf16": (dict(
        model_type="distilbert", dim=32, n_layers=3, n_heads=2, hidden_dim=48, max_position_embeddings=128),
        torch.bfloat16,
        lambda: [parts.Pooling(32, ("max", "mean_sqrt_len_tokens", "lasttoken")),
                 Dense(96, 16, activation_function=torch.nn.ReLU())],
        dict(prompts={}, longest=100), True),
    # A decoder that embeds, as Qwen3-Embedding: the last token's vector behind an instruction, if one is asked for.
    "qwen3-sentences-f32": (dict(
        model_type="qwen3", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=40, max_position_embeddings=128), torch.float32,
        lambda: [parts.Pooling(32, "lasttoken"), Normalize()],
        dict(prompts={"query": "Instruct: find it\nQuery:", "document": ""}, similarity_fn_name="cosine", longest=128), False),
    # The same of a Mistral with a window, as E5-Mistral: what it pools is the token that ends the text.
    "mistral-sentences-bf16": (dict(
        model_type="mistral", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=40, max_position_embeddings=256, sliding_window=21), torch.bfloat16,
        lambda: [parts.Pooling(32, "lasttoken"), Normalize()],
        dict(prompts={"web_search_query": "Instruct: find what answers it\nQuery: ", "sts_query": "Instruct: Retrieve.\nQuery: "},
             longest=128), False),
    # The mean, behind words that say what a text is, as of Nomic's.
    "modernbert-sentences-f32": (dict(
        model_type="modernbert", hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=128, local_attention=10), torch.float32,
        lambda: [parts.Pooling(32, "mean"), Normalize()],
        dict(prompts={"query": "search_query: ", "document": "search_document: "}, similarity_fn_name="cosine", longest=120), False),
}
# A cross-encoder whose scores are logits, and which has a prompt before the query.
RANKS = "bert-cross-encoder-bf16"
# A decoder that judges pairs by what it would say next, as Qwen3-Reranker; its head is its embedding.
JUDGES = "qwen3-judge-f32"
TEMPLATE = """{%- set told = messages | selectattr("role", "eq", "system") | map(attribute="content") | first | default("Judge.") -%}
<s>{{ told }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}</s>
{%- if add_generation_prompt %}

{% if think %}hm {% endif %}<s>answer:
{%- endif %}"""
QUERY = "who holds the layers?"
DOCUMENTS = ["A worker dies.", "", "The worker holds layers, and counts them once.", "stages", "before a single one"]


def randomize(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name and name.endswith("weight")
                    else torch.randn_like(p) * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2 * torch.randn_like(p))
    return module


def to_old(path, longest):
    """The same in the words of older versions."""
    names = {"Transformer", "Pooling", "Dense", "LayerNorm", "Normalize"}
    modules = json.loads((path / "modules.json").read_text())
    for module in modules:
        name = module["type"].rsplit(".", 1)[1]
        assert name in names
        module["type"] = f"sentence_transformers.models.{name}"
        file = path / module["path"] / "config.json"
        config = json.loads(file.read_text())
        if name == "Pooling":
            modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
            on = config["pooling_mode"]
            on = {f"{m}_tokens" if m in ("cls", "mean", "max", "weightedmean") else m for m in on} - {"cls_tokens"}
            config = dict(word_embedding_dimension=32, **{f"pooling_mode_{m}": m in on for m in modes})
        elif name == "Dense":
            config = {k: config[k] for k in ("in_features", "out_features", "bias", "activation_function")}
        if name != "Transformer":
            file.write_text(json.dumps(config, indent=2) + "\n")
    (path / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    limits = dict(max_seq_length=longest, do_lower_case=True)
    (path / "sentence_bert_config.json").write_text(json.dumps(limits, indent=2) + "\n")
    versions = dict(__version__=dict(sentence_transformers="2.2.2", transformers="4.28.1", pytorch="2.0.0"))
    (path / "config_sentence_transformers.json").write_text(json.dumps(versions, indent=2) + "\n")


def save(path, settings, dtype, behind, facts, old, seed):
    base = path / "base"
    base.mkdir(parents=True)
    make_tokenizer(base, settings["model_type"])
    make_model(EMBED, settings, seed).to(dtype).save_pretrained(base)
    facts = dict(facts)
    longest = facts.pop("longest")
    transformer = Transformer(str(base), model_kwargs=dict(dtype=dtype))
    modules = [transformer] + [randomize(module).to(dtype) for module in behind()]
    model = SentenceTransformer(modules=modules, device="cpu", **facts)
    if not old:
        model.max_seq_length = longest
    model.save_pretrained(str(path), create_model_card=False)
    shutil.rmtree(base)
    if old:
        to_old(path, longest)


@torch.no_grad()
def expect(path):
    model = SentenceTransformer(str(path), device="cpu", model_kwargs=dict(dtype=torch.float32)).float().eval()
    prompt = model.prompts.get(model.default_prompt_name) or ""
    pooled_from = 0
    if prompt and not all(getattr(module, "include_prompt", True) for module in model):
        pooled_from = model[0]._get_prompt_length(prompt)
    rows = []
    for text, pair in texts(None):
        if pair is not None:
            continue
        ids = model.preprocess([text], prompt=prompt)["input_ids"][0].tolist()
        rows.append(dict(text=text, pair=None, ids=ids, pooled_from=pooled_from, values=[shown(model.encode(text))]))
    named = {name: shown(model.encode(texts(None)[0][0], prompt_name=name)) for name in model.prompts}
    named[""] = shown(model.encode(texts(None)[0][0], prompt=""))
    return rows, named, dict(longest=model.max_seq_length, similarity=model.similarity_fn_name)


@torch.no_grad()
def make_cross_encoder(path):
    settings = dict(model_type="bert", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                    max_position_embeddings=128, num_labels=1)
    base = path / "base"
    base.mkdir(parents=True)
    tok = make_tokenizer(base, "bert")
    make_model(CLASSIFY, settings, 300).to(torch.bfloat16).save_pretrained(base)
    CrossEncoder(str(base), device="cpu", activation_fn=IDENTITY, prompts={"query": "a question: "},
                 default_prompt_name="query", model_kwargs=dict(dtype=torch.bfloat16)).save_pretrained(str(path))
    shutil.rmtree(base)
    (path / "README.md").unlink()
    # Of this class, a tokenizer tells segments apart, as for BERTs that people train.
    file = path / "tokenizer_config.json"
    told = json.loads(file.read_text()) | dict(tokenizer_class="BertTokenizer")
    file.write_text(json.dumps(told, indent=2) + "\n")
    model = CrossEncoder(str(path), device="cpu", model_kwargs=dict(dtype=torch.float32))
    rows = []
    for document in DOCUMENTS:
        batch = tok([QUERY], [document], return_tensors="pt", return_token_type_ids=True)
        logits = model.model(**batch).logits[0].tolist()
        rows.append(dict(text=QUERY, pair=document, ids=batch["input_ids"][0].tolist(),
                         segments=batch["token_type_ids"][0].tolist(), values=[shown(logits)]))
    ranks = [dict(index=r["corpus_id"], score=shown([r["score"]])[0]) for r in model.rank(QUERY, DOCUMENTS)]
    return rows, dict(query=QUERY, documents=DOCUMENTS, ranks=ranks)


@torch.no_grad()
def make_judge(path):
    settings = dict(model_type="qwen3", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=8, intermediate_size=40, max_position_embeddings=256, tie_word_embeddings=True)
    base = path / "base"
    base.mkdir(parents=True)
    tok = make_tokenizer(base, "qwen3")
    tok.chat_template = TEMPLATE
    tok.save_pretrained(base)
    make_model(AutoModelForCausalLM, settings, 301).save_pretrained(base)
    transformer = Transformer(str(base), transformer_task="text-generation", model_kwargs=dict(dtype=torch.float32),
                              processing_kwargs={"chat_template": {"add_generation_prompt": True, "think": True}})
    judge = LogitScore(*tok.convert_tokens_to_ids(["y", "n"]))
    CrossEncoder(modules=[transformer, judge], device="cpu", prompts={"web": "Which page has it?"},
                 default_prompt_name="web").save_pretrained(str(path))
    shutil.rmtree(base)
    (path / "README.md").unlink(missing_ok=True)
    model = CrossEncoder(str(path), device="cpu", model_kwargs=dict(dtype=torch.float32))
    rows = []
    for document in DOCUMENTS:
        batch = model.preprocess([(QUERY, document)])
        logits = model[0].model(input_ids=batch["input_ids"]).logits[0, -1]
        rows.append(dict(text=QUERY, pair=document, ids=batch["input_ids"][0].tolist(),
                         values=[shown([logits[judge.true_token_id], logits[judge.false_token_id]])]))
    ranks = [dict(index=r["corpus_id"], score=shown([r["score"]])[0]) for r in model.rank(QUERY, DOCUMENTS)]
    return rows, dict(query=QUERY, documents=DOCUMENTS, ranks=ranks)


def shown(values):
    return [float(f"{x:.6g}") for x in values]


def main(out, only):
    versions = {m.__name__: m.__version__ for m in (sentence_transformers, transformers, torch)}
    for name, make in ((RANKS, make_cross_encoder), (JUDGES, make_judge)):
        if only and name not in only:
            continue
        shutil.rmtree(out / name, ignore_errors=True)
        rows, ranks = make(out / name)
        (out / name / "expected.json").write_text(json.dumps({"versions": versions, "inputs": rows, **ranks}) + "\n")
        print(name, [len(row["ids"]) for row in rows])
    for number, (name, (settings, dtype, behind, facts, old)) in enumerate(FIXTURES.items()):
        if only and name not in only:
            continue
        path = out / name
        shutil.rmtree(path, ignore_errors=True)
        torch.manual_seed(number)
        save(path, settings, dtype, behind, facts, old, 200 + number)
        rows, prompts, told = expect(path)
        expected = {"versions": versions, "inputs": rows, "prompts": prompts, "told": told}
        (path / "expected.json").write_text(json.dumps(expected) + "\n")
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        assert size < 250_000, f"{name}: {size} bytes"
        print(name, f"{size} bytes,", "lengths", [len(row["ids"]) for row in rows], told)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent), sys.argv[2:])
