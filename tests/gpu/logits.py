"""Logits of a large model with random weights: in bf16 beside torch on the same GPU, in int8 and int4 beside our bf16.

All follow one path, our own greedy tokens in bf16, as parity.py does. What bf16 does to the model is what torch's bf16
is from its float32: ours may be 1.5 times as far away.
"""
import json
import math
import statistics

from parity import CANDIDATES, FLOOR, Decoder

LENGTHS, TOKENS, TOP = (7, 130, 700, 1500), 16, 400
TIMES_TORCH = 1.5
# Of the spread of the logits. Random weights have nothing that survives rounding: over 32 layers bf16 alone is 4.6 % off,
# int8 was 11.6 % off on an H200, and of int4 nothing is left that could be asked for.
ALLOWED = {"int8": 0.20}


class Logits:
    def __init__(self, shape):
        context = shape["max_position_embeddings"]
        self.lengths = [n for n in LENGTHS if n + TOKENS < context]
        # Norms bring each value to 1 on average, and the head's weights are spread by 0.02.
        self.spread, self.decoder, self.ours = 0.02 * math.sqrt(shape["hidden_size"]), None, None

    def ask_bf16(self, server):
        """Chooses the path."""
        prompts = [{"ids": [10 + (7919 * i * (n + i)) % 240 for i in range(n)]} for n in self.lengths]
        for prompt in prompts:
            prompt["greedy_ids"] = server.generate(prompt["ids"], TOKENS)[0]
        self.decoder = Decoder(prompts, self.spread)
        self.ours = self.decoder.ask(server)

    def sequences(self):
        return [{"ids": p["ids"] + p["greedy_ids"], "from": len(p["ids"])} for p in self.decoder.prompts]

    def beside_torch(self, run, peer):
        answer = peer.ask("score", 60, sequences=self.sequences(), top=TOP)
        (run.out / "torch-logits.json").write_text(json.dumps(answer)[:15_000_000])
        found = {form: [{int(t): s for t, s in place.items()} for rows in answer[form] for place in rows["places"]]
                 for form in ("bf16", "f32") if form in answer}
        spread = statistics.mean(rows["spread"] for rows in answer["bf16"])

        def apart(got, want):
            """Root mean square over the tokens that are likeliest in ours, of the spread; how many are not in both."""
            squares, lost = [], 0
            for (_, ours), a, b in zip(self.ours, got, want, strict=True):
                squares += [(a[t] - b[t]) ** 2 for t in ours if t in a and t in b]
                lost += sum(t not in a or t not in b for t in ours)
            return math.sqrt(statistics.mean(squares)) / spread if squares else math.inf, lost

        ours = [top for _, top in self.ours]
        places, likeliest = len(ours), lambda row: max(row, key=row.get)
        torch = found["bf16"]
        same = sum(token == likeliest(row) for (token, _), row in zip(self.ours, torch))
        error, lost = apart(ours, torch)
        run.row("logits bf16, beside torch in bf16", "-",
                f"error {error:.3%}, the same token at {same} of {places} places, {lost} tokens lost, spread "
                f"{spread:.3f} (here {self.spread:.3f})", None)
        if "f32" not in found:
            return run.row("logits bf16, beside torch in float32", "an answer", answer.get("note", "none"), False)
        exact = found["f32"]
        error, lost = apart(ours, exact)
        own, _ = apart(torch, exact)
        allowed = TIMES_TORCH * own + FLOOR
        same = sum(token == likeliest(row) for (token, _), row in zip(self.ours, exact))
        by_torch = sum(likeliest(a) == likeliest(b) for a, b in zip(torch, exact))
        run.row("logits bf16, beside torch in float32",
                f"error <= {allowed:.3%} ({TIMES_TORCH} times torch's {own:.3%}), no token lost",
                f"{error:.3%}, {lost} lost; the same token at {same} places, torch's bf16 at {by_torch} of {places}",
                error <= allowed and lost == 0)

    def beside_bf16(self, run, server, form):
        if self.ours is None:
            return
        got = self.decoder.ask(server)
        error, agree = self.decoder.error(got, self.ours), self.decoder.agreement(got, self.ours)
        allowed = ALLOWED.get(form)
        run.row(f"logits {form}, beside ours in bf16", "-" if allowed is None else f"error <= {allowed:.0%}",
                f"{error:.3%}, the same token at {agree:.0%} of the places ({CANDIDATES} likeliest of each)",
                None if allowed is None else error <= allowed)
