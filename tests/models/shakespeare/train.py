"""Train the demo model: a ~2.8 M parameter LlamaForCausalLM on a plain-text file of play dialogue.

TEXT is the plays of William Shakespeare (died 1616; in the public domain) as speeches "NAME:\nwords", separated by
empty lines.

usage: python train.py TEXT OUT_DIR [--cpu-minutes 14] [--wall-minutes 28] [--threads 1] [--seed 0]
Writes Hugging Face format: config.json, generation_config.json, model.safetensors (bf16),
tokenizer.json, tokenizer_config.json, chat_template.jinja, train_log.json.
"""
import argparse, json, math, random, time
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ap = argparse.ArgumentParser()
ap.add_argument("text")
ap.add_argument("out")
ap.add_argument("--cpu-minutes", type=float, default=14)
ap.add_argument("--wall-minutes", type=float, default=28)
ap.add_argument("--threads", type=int, default=1)
ap.add_argument("--batch", type=int, default=4)
ap.add_argument("--lr", type=float, default=2e-3)
ap.add_argument("--seed", type=int, default=0)
args = ap.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(args.seed)
random.seed(args.seed)
VOCAB, CTX = 2048, 256

# 1. Documents: eight consecutive speeches each, so the model learns where <|eos|> may fall.
speeches = open(args.text, encoding="utf-8").read().strip().split("\n\n")
docs = ["\n\n".join(speeches[i:i + 8]) for i in range(0, len(speeches), 8)]
cut = int(len(docs) * 0.95)

# 2. Byte-level BPE tokenizer; <|bos|> is put in front by the post-processor.
tok = Tokenizer(models.BPE())
tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tok.decoder = decoders.ByteLevel()
tok.train_from_iterator(docs[:cut], trainers.BpeTrainer(
    vocab_size=VOCAB, special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
bos, eos, pad = (tok.token_to_id(t) for t in ("<|bos|>", "<|eos|>", "<|pad|>"))
tok.post_processor = processors.TemplateProcessing(
    single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", bos)])
CHAT = ("{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}:\n{{ m['content'] | trim }}\n\n"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:\n{% endif %}")
PreTrainedTokenizerFast(
    tokenizer_object=tok, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
    model_max_length=CTX, clean_up_tokenization_spaces=False, chat_template=CHAT).save_pretrained(args.out)


def encode(part):
    return torch.tensor([t for d in part for t in tok.encode(d).ids + [eos]])


train, val = encode(docs[:cut]), encode(docs[cut:])

# 3. Model.
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=CTX, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, attention_dropout=0.0))
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(train)} train tokens", flush=True)
decay = [p for p in model.parameters() if p.dim() > 1]
rest = [p for p in model.parameters() if p.dim() == 1]
opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                        lr=args.lr, betas=(0.9, 0.99))


def loss_of(data, starts):
    x = torch.stack([data[s:s + CTX] for s in starts])
    return model(input_ids=x, labels=x).loss


@torch.no_grad()
def evaluate():
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [loss_of(val, range(s, s + 4 * CTX, CTX)).item() for s in range(0, len(val) - 5 * CTX, 4 * CTX)]
    model.train()
    return sum(losses) / len(losses)


def share_used():
    return max((time.process_time() - cpu0) / (60 * args.cpu_minutes), (time.time() - start) / (60 * args.wall_minutes))


# 4. Train against the clock: the cosine schedule follows the share of the time used.
model.train()
start, cpu0, step, log, best, best_state = time.time(), time.process_time(), 0, [], 1e9, None
while (done := share_used()) < 1:
    warm = min(1.0, (step + 1) / 50)
    for g in opt.param_groups:
        g["lr"] = args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(train, [random.randrange(len(train) - CTX) for _ in range(args.batch)])
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    step += 1
    if step % 100 == 0:
        v = evaluate()
        if v < best:
            best, best_state = v, {k: t.clone() for k, t in model.state_dict().items()}
        log.append({"step": step, "seconds": round(time.time() - start), "train": round(loss.item(), 4), "val": round(v, 4)})
        print(log[-1], flush=True)
model.load_state_dict(best_state or model.state_dict())
json.dump(log, open(f"{args.out}/train_log.json", "w"), indent=1)
model.to(torch.bfloat16).save_pretrained(args.out)
