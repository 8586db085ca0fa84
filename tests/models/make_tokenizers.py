"""Write tokenizers.json: a small tokenizer of every kind, and the ids that transformers gives for hard strings.

usage: python make_tokenizers.py        (needs requirements.txt)

Special tokens in a text stay text: `split_special_tokens=True`.
"""
import json
import pathlib

from make_fixtures import TEXT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HARD = [
    "", " ", "a", "  two  spaces  ", "\t\n\r\n x", " " * 40, "The coordinator counts every byte.",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈", "日本語の文章、漢字。한국어 ภาษาไทย", "naïve café Ångström ﬁ ½", "e\u0301 combining \u200d joiner \u200b zero",
    "<s>", "</s>", "[CLS] [SEP][MASK]", "<|bos|><|eos|>", "<mask>", "a<s>b</s>c", "don't I'll we've 1234567890 3.14",
    "\u0000\u0001\ufffd\ufeff", "https://example.org/?q=1&r=2#x", "\U0001F9D1\u200d\U0001F680" * 3, "x" * 300,
]
SPECIAL = ["<s>", "</s>", "<unk>", "<mask>"]


def byte_bpe():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tok


def byte_fallback_bpe():
    """As converted from SentencePiece: spaces become ▁, and what is unknown becomes its bytes."""
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    pieces = [f"<0x{b:02X}>" for b in range(256)]
    # Without the trainer's own byte pieces, they are added to what it finds.
    trained = Tokenizer(models.BPE())
    trained.normalizer = tok.normalizer
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    vocab = {t: i for i, t in enumerate(SPECIAL + pieces)}
    for token in sorted(state["vocab"], key=state["vocab"].get):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(m) for m in state["merges"]]
    tok.model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tok.add_special_tokens(SPECIAL)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tok


def unigram():
    """As XLM-R's and T5's."""
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    tok.train_from_iterator(TEXT * 4, trainers.UnigramTrainer(
        vocab_size=160, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return tok


def word_piece():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tok.train_from_iterator(TEXT + [a + b for a, b in zip(letters, letters[1:] + "a")], trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=special, show_progress=False, initial_alphabet=list("日本語[]<>|/?.,'-&#")))
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tok


def main():
    out = {}
    bert = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    other = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for name, make, names in [("byte-level BPE", byte_bpe, other), ("BPE with byte fallback", byte_fallback_bpe, other),
                              ("Unigram", unigram, other), ("WordPiece", word_piece, bert)]:
        tok = make()
        fast = PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False, **names)
        cases = [dict(text=text, ids=fast(text, split_special_tokens=True)["input_ids"]) for text in HARD]
        pairs = []
        if name in ("Unigram", "WordPiece"):
            for a, b in zip(HARD, reversed(HARD)):
                # As a batch of one, as which models are asked: alone, an empty second text would count as none.
                both = fast([a], [b], split_special_tokens=True, return_token_type_ids=True)
                pairs.append(dict(text=a, pair=b, ids=both["input_ids"][0], segments=both["token_type_ids"][0]))
        out[name] = dict(tokenizer=json.loads(tok.to_str()), config=names, cases=cases, pairs=pairs)
    path = pathlib.Path(__file__).parent / "tokenizers.json"
    path.write_text(json.dumps(out, separators=(",", ":")) + "\n")


main()
