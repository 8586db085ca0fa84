"""Make the small encoders: seeded random ones of every family and task, with transformers' own outputs.

usage: python make_encoders.py [OUT_DIR [NAME…]]        (needs requirements.txt; OUT_DIR defaults to this directory)

`expected.json` holds, for each input, its text (and pair), the ids and segments that transformers makes of it, and what
the model yields in float32, reloaded from disk: logits of classes, the pooled vector, or the logits of each mask.
"""
import json
import pathlib
import shutil
import sys

import torch
import transformers
from make_fixtures import TEXT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification,
                          PreTrainedTokenizerFast)

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
VOCAB = 300
CLASSIFY, MASKS, EMBED = AutoModelForSequenceClassification, AutoModelForMaskedLM, AutoModel
LABELS = dict(id2label={0: "calm", 1: "glad", 2: "grim"}, label2id={"calm": 0, "glad": 1, "grim": 2})
POOLING = "1_Pooling"
DEBERTA = dict(relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)

# name: (class, configuration, storage format, what is done to the directory)
FIXTURES = {
    # One of three classes; pairs are told apart by segments.
    "bert-classify-f32": (CLASSIFY, dict(
        model_type="bert", hidden_size=40, num_hidden_layers=4, num_attention_heads=4, intermediate_size=56,
        max_position_embeddings=128, **LABELS), torch.float32, None),
    # As old files are: gamma and beta, position ids, the head of next-sentence prediction.
    "bert-mlm-old-bf16": (MASKS, dict(
        model_type="bert", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, hidden_act="gelu_new"), torch.bfloat16, "old"),
    # Mean, of length 1, and inputs shorter than the model could take.
    "bert-embed-f32": (EMBED, dict(
        model_type="bert", hidden_size=36, num_hidden_layers=4, num_attention_heads=3, intermediate_size=48,
        max_position_embeddings=128), torch.float32, dict(mode="pooling_mode_mean_tokens", normalize=True, longest=100)),
    # Each class for itself.
    "roberta-multilabel-f32": (CLASSIFY, dict(
        model_type="roberta", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=130, type_vocab_size=1, problem_type="multi_label_classification", **LABELS),
        torch.float32, None),
    "roberta-mlm-f16": (MASKS, dict(
        model_type="roberta", hidden_size=40, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=130, type_vocab_size=1), torch.float16, None),
    # One class: a score from 0 to 1; two layers of ReLU.
    "distilbert-classify-bf16": (CLASSIFY, dict(
        model_type="distilbert", dim=40, n_layers=3, n_heads=4, hidden_dim=56, max_position_embeddings=128,
        activation="relu", num_labels=1), torch.bfloat16, None),
    "distilbert-mlm-f32": (MASKS, dict(
        model_type="distilbert", dim=32, n_layers=4, n_heads=4, hidden_dim=48, max_position_embeddings=128),
        torch.float32, None),
    # The first token's vector, its length left alone.
    "distilbert-embed-cls-f32": (EMBED, dict(
        model_type="distilbert", dim=32, n_layers=3, n_heads=2, hidden_dim=48, max_position_embeddings=128),
        torch.float32, dict(mode="pooling_mode_cls_token", normalize=False, longest=128)),
    # As bge-m3's dense vectors: Unigram, the first token's vector, of length 1.
    "xlm-roberta-embed-f32": (EMBED, dict(
        model_type="xlm-roberta", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=258, type_vocab_size=1), torch.float32,
        dict(mode="pooling_mode_cls_token", normalize=True, longest=256)),
    # As bge-reranker: one class.
    "xlm-roberta-rerank-bf16": (CLASSIFY, dict(
        model_type="xlm-roberta", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=258, type_vocab_size=1, num_labels=1), torch.bfloat16, None),
    "camembert-mlm-bf16": (MASKS, dict(
        model_type="camembert", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=258, type_vocab_size=1), torch.bfloat16, None),
    "electra-classify-bf16": (CLASSIFY, dict(
        model_type="electra", hidden_size=32, embedding_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=128, **LABELS), torch.bfloat16, None),
    # Rotary positions behind norms that follow each block; gated.
    "nomic-bert-mlm-bf16": (MASKS, dict(
        model_type="nomic_bert", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128), torch.bfloat16, None),
    "nomic-bert-embed-f32": (EMBED, dict(
        model_type="nomic_bert", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=128), torch.float32, dict(mode="pooling_mode_mean_tokens", normalize=False, longest=128)),
    "gte-classify-f32": (CLASSIFY, dict(
        model_type="gte", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=128, type_vocab_size=0, **LABELS), torch.float32, None),
    "gte-mlm-bf16": (MASKS, dict(
        model_type="gte", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128), torch.bfloat16, None),
    "jina-embeddings-v3-embed-bf16": (EMBED, dict(
        model_type="jina_embeddings_v3", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=256), torch.bfloat16, dict(mode="pooling_mode_mean_tokens", normalize=True, longest=256)),
    # What is near on two layers of three; the first layer has no norm before attention.
    "modernbert-mlm-bf16": (MASKS, dict(
        model_type="modernbert", hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=128, local_attention=14), torch.bfloat16, None),
    # The mean over tokens through the head; biases everywhere.
    "modernbert-classify-mean-f32": (CLASSIFY, dict(
        model_type="modernbert", hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=128, local_attention=9, classifier_pooling="mean", classifier_bias=True, norm_bias=True,
        attention_bias=True, mlp_bias=True, classifier_activation="silu", **LABELS), torch.float32, None),
    # Decoders with a head for classes: the last token's.
    "qwen3-rerank-f32": (CLASSIFY, dict(
        model_type="qwen3", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=40, max_position_embeddings=128, num_labels=1), torch.float32, None),
    "llama-classify-bf16": (CLASSIFY, dict(
        model_type="llama", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=40, max_position_embeddings=128, **LABELS), torch.bfloat16, None),
    # As EmbeddingGemma: a decoder that looks both ways.
    "gemma3-embed-f32": (EMBED, dict(
        model_type="gemma3_text", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=40, max_position_embeddings=128, sliding_window=12, use_bidirectional_attention=True,
        query_pre_attn_scalar=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
        torch.float32, dict(mode="pooling_mode_mean_tokens", normalize=True, longest=128)),
    # Scores by the distance of query and key, in buckets that all layers share. As all-mpnet-base: the mean, of length 1.
    "mpnet-embed-f32": (EMBED, dict(
        model_type="mpnet", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=258), torch.float32, dict(mode="pooling_mode_mean_tokens", normalize=True, longest=256)),
    "mpnet-mlm-bf16": (MASKS, dict(
        model_type="mpnet", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=258), torch.bfloat16, None),
    "mpnet-classify-f32": (CLASSIFY, dict(
        model_type="mpnet", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=258, **LABELS), torch.float32, None),
    # Vectors for distances, with queries and keys of their own; far ones share them. Classes as of models for NLI.
    "deberta-v2-classify-f32": (CLASSIFY, dict(
        model_type="deberta-v2", hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=128, **DEBERTA, position_buckets=16, norm_rel_ebd="layer_norm", **LABELS), torch.float32, None),
    # Beside learned positions and segments, without a norm of the vectors, which distances from 20 on share.
    "deberta-v2-mlm-bf16": (MASKS, dict(
        model_type="deberta-v2", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=128, max_relative_positions=20, type_vocab_size=2, **DEBERTA | dict(
            position_biased_input=True, pos_att_type="c2p|p2c")), torch.bfloat16, None),
    # Tables narrower than the residual stream, as of the small discriminators; or wider, as of their generators.
    "electra-narrow-classify-f32": (CLASSIFY, dict(
        model_type="electra", hidden_size=36, embedding_size=20, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=128, **LABELS), torch.float32, None),
    "electra-wide-mlm-bf16": (MASKS, dict(
        model_type="electra", hidden_size=32, embedding_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128), torch.bfloat16, None),
    # A decoder whose scores fall with the distance, and which keeps nothing.
    "bloom-classify-f32": (CLASSIFY, dict(model_type="bloom", hidden_size=36, n_layer=2, n_head=3, **LABELS), torch.float32, None),
}
# Families whose texts stand between <s> and </s>, and those that have a Unigram tokenizer.
ROBERTAS = ("roberta", "xlm-roberta", "camembert", "jina_embeddings_v3", "qwen3", "llama", "gemma3_text", "mistral", "bloom")
MPNET = ("mpnet",)
# Families that are told which of two texts a token is of. Their own class of tokenizer does that, a generic one only if asked to.
TOLD = ("bert", "deberta-v2", "electra", "nomic_bert")
UNIGRAM = ("xlm-roberta", "camembert", "jina_embeddings_v3")


def make_tokenizer(out, kind):
    """WordPiece as BERT's or MPNet's, byte-level BPE as RoBERTa's, or Unigram as XLM-RoBERTa's."""
    if kind in UNIGRAM:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tok = Tokenizer(models.Unigram())
        tok.normalizer = normalizers.NFKC()
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=VOCAB, special_tokens=special, unk_token="<unk>", show_progress=False,
                                          initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"))
        tok.train_from_iterator(TEXT, trainer)
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
        names = dict(bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>", unk_token="<unk>",
                     pad_token="<pad>", mask_token="<mask>")
    elif kind in ROBERTAS:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tok.train_from_iterator(TEXT, trainer)
        tok.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        names = dict(bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>", unk_token="<unk>",
                     pad_token="<pad>", mask_token="<mask>")
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        if kind in MPNET:
            special = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
        tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tok.normalizer = normalizers.BertNormalizer(lowercase=True)
        tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tok.decoder = decoders.WordPiece()
        # Every letter and digit, within a word too.
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        trainer = trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False,
                                            initial_alphabet=list(letters + ".,?!'-"))
        tok.train_from_iterator(TEXT + [a + b for a, b in zip(letters, letters[1:] + "a")], trainer)
        tok.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        names = dict(unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]")
        if kind in MPNET:
            tok.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
            names = dict(bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>", unk_token="[UNK]",
                         pad_token="<pad>", mask_token="<mask>")
    if kind in TOLD:
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False,
                                   model_max_length=256 if kind in UNIGRAM + MPNET else 128, **names)
    fast.save_pretrained(out)
    return fast


def make_model(kind, settings, seed):
    torch.manual_seed(seed)
    roberta = settings["model_type"] in ROBERTAS + MPNET
    # The ids of its own special tokens, not those of the published models.
    ids = dict(bos_token_id=0, eos_token_id=2) if roberta else dict(bos_token_id=None, eos_token_id=None)
    modern = dict(cls_token_id=2, sep_token_id=3) if settings["model_type"] == "modernbert" else {}
    ids = {} if settings["model_type"] in ("bert", "roberta", "distilbert") else ids | modern
    config = AutoConfig.for_model(**settings, vocab_size=VOCAB, pad_token_id=1 if roberta else 0, **ids)
    model = kind.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = ("norm" in name.lower() or name.endswith("emb_ln.weight")) and name.endswith("weight")
            p.copy_(1 + 0.2 * torch.randn_like(p) if norm else torch.randn_like(p) * 1.5 * p.shape[-1] ** -0.5
                    if p.dim() > 1 else 0.2 * torch.randn_like(p))
    return model


def to_old(path):
    """Rename and add what files of 2018 have."""
    tensors = load_file(path / "model.safetensors")
    tensors = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
               for n, t in tensors.items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(128)[None]
    for part in ("cls.seq_relationship", "bert.pooler.dense"):
        tensors[f"{part}.weight"], tensors[f"{part}.bias"] = torch.ones(2, 32), torch.ones(2)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["architectures"], config["transformers_version"] = ["BertForPreTraining"], "4.6.0"
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def add_pooling(path, width, mode, normalize, longest):
    """The files that sentence-transformers writes."""
    parts = [("", "Transformer"), (POOLING, "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    modules = [dict(idx=i, name=str(i), path=p, type=f"sentence_transformers.models.{t}") for i, (p, t) in enumerate(parts)]
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"]
    pooling = dict(word_embedding_dimension=width, **{f"pooling_mode_{m}": f"pooling_mode_{m}" == mode for m in modes})
    (path / POOLING).mkdir()
    for name, value in [("modules.json", modules), (f"{POOLING}/config.json", pooling),
                        ("sentence_bert_config.json", dict(max_seq_length=longest, do_lower_case=False))]:
        (path / name).write_text(json.dumps(value, indent=2) + "\n")


def texts(mask):
    """Inputs of every length, with a pair; with masks, if there are any to fill."""
    m = f" {mask} " if mask else " "
    return [("A worker" + m + "dies.", None), ("layers", "and" + m + "stages, counted once.") if not mask else (m, None),
            (("The answer" + m + "goes on, and the next stage holds a few layers; ") * 4, None),
            ("Ünïcode 🙂 is" + m + "not a word", None), ("every byte", "before" + m + "a single one" + m)]


@torch.no_grad()
def expect(kind, path, tok, pooling):
    model = kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    mask = tok.mask_token if kind is MASKS else None
    rows = []
    for text, pair in texts(mask):
        batch = tok(text, pair, return_tensors="pt", return_token_type_ids=True)
        if getattr(model.config, "type_vocab_size", 0) < 2:
            batch.pop("token_type_ids")
        out = model(**batch)
        ids = batch["input_ids"][0]
        row = dict(text=text, pair=pair, ids=ids.tolist(),
                   segments=batch["token_type_ids"][0].tolist() if "token_type_ids" in batch else [])
        if kind is MASKS:
            row["masked"] = (ids == tok.mask_token_id).nonzero()[:, 0].tolist()
            assert row["masked"]
            row["values"] = out.logits[0][row["masked"]].tolist()
        elif kind is CLASSIFY:
            row["values"] = [out.logits[0].tolist()]
        else:
            hidden = out.last_hidden_state[0]
            vector = hidden[0] if pooling["mode"] == "pooling_mode_cls_token" else hidden.mean(0)
            vector = torch.nn.functional.normalize(vector, dim=0) if pooling["normalize"] else vector
            row["values"] = [vector.tolist()]
        row["values"] = [[float(f"{x:.6g}") for x in values] for values in row["values"]]
        rows.append(row)
    return rows


def main(out, only):
    for number, (name, (kind, settings, dtype, change)) in enumerate(FIXTURES.items()):
        if only and name not in only:
            continue
        path = out / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        tok = make_tokenizer(path, settings["model_type"])
        make_model(kind, settings, 100 + number).to(dtype).save_pretrained(path)
        pooling = dict(mode="pooling_mode_mean_tokens", normalize=False)
        if isinstance(change, dict):
            pooling = change
            add_pooling(path, settings.get("hidden_size") or settings["dim"], **change)
        rows = expect(kind, path, tok, pooling)
        if change == "old":
            to_old(path)
        versions = {m.__name__: m.__version__ for m in (transformers, torch)}
        (path / "expected.json").write_text(json.dumps({"versions": versions, "inputs": rows}) + "\n")
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        assert size < 400_000, f"{name}: {size} bytes"
        print(name, f"{size} bytes,", "lengths", [len(row["ids"]) for row in rows])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent), sys.argv[2:])
