"""Success and stop rate of the base and of a demo adapter, with plain transformers and PEFT.

Trains LoRA on the demo's training rows (loss on the assistant's turns only) and answers the held-out rows
greedily through the chat template. A row succeeds when the stripped reply equals the reference and the
model stopped by itself within 64 tokens.

    python -m examples.pretrain.measure --model examples/reader-9m --data examples/demo
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

MAX_TOKENS = 64


def read_rows(path: Path) -> list[list[dict[str, str]]]:
    """The messages of every row."""
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def kind_of(question: str) -> str:
    """The kind of question of a demo row, told from its last line."""
    line = question.rsplit("\n", 1)[-1]
    if "which parameter" in line.lower():
        return "name"
    if line.startswith(("What is the type", "Which type")):
        return "type"
    return "default" if line.startswith(("What is the default", "Which value")) else "meaning"


@torch.no_grad()
def replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[tuple[str, bool]]:
    """(reply, stopped by itself) for each chat prompt, greedy, in batches of 100 padded on the left."""
    stops = torch.tensor(model.generation_config.eos_token_id)
    result = []
    for first in range(0, len(prompts), 100):
        batch = tokenizer(prompts[first : first + 100], return_tensors="pt", padding=True).to(model.device)
        output_BT = model.generate(**batch, max_new_tokens=MAX_TOKENS, do_sample=False).cpu()
        for new_T in output_BT[:, batch["input_ids"].shape[1] :]:
            stopped = bool(torch.isin(new_T, stops).any())
            result.append((tokenizer.decode(new_T, skip_special_tokens=True), stopped))
    return result


def report(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list, show: int) -> None:
    """Print success by kind, the stop rate, and some replies that failed."""
    model.eval()
    prompts = [tokenizer.apply_chat_template(r[:1], add_generation_prompt=True, tokenize=False) for r in rows]
    answers = replies(model, tokenizer, prompts)
    total, right, bare = Counter[str](), Counter[str](), 0
    failures = []
    for row, (reply, stopped) in zip(rows, answers, strict=True):
        kind, reference = kind_of(row[0]["content"]), row[1]["content"]
        ok = stopped and reply.strip() == reference
        total[kind] += 1
        right[kind] += ok
        bare += reply.strip() == reference.rsplit("\n", 1)[0]
        if not ok:
            failures.append(f"    {reference!r}\n      got {reply!r}{'' if stopped else ' (did not stop)'}")
    kinds = ", ".join(f"{kind} {right[kind]}/{total[kind]}" for kind in sorted(total))
    stops = sum(stopped for _, stopped in answers)
    result = f"{name}: success {right.total()}/{len(rows)} ({kinds}), stopped {stops}/{len(rows)}"
    print(f"{result}, bare answer only {bare}/{len(rows)}")
    print("\n".join(failures[:show]), flush=True)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list, args: argparse.Namespace) -> None:
    """Plain LoRA training: batches of rows of about one length, linear warm-up and decay, AdamW."""
    encoded = []
    for row in rows:
        tokens = tokenizer.apply_chat_template(row, return_assistant_tokens_mask=True, return_dict=True)
        encoded.append((tokens["input_ids"], tokens["assistant_masks"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    rng, start, seen = random.Random(0), time.monotonic(), 0
    steps = args.epochs * ((len(encoded) + args.batch - 1) // args.batch)
    step = 0
    for _ in range(args.epochs):
        order = sorted(rng.sample(encoded, len(encoded)), key=lambda e: len(e[0]) // 16)
        batches = [order[i : i + args.batch] for i in range(0, len(order), args.batch)]
        for batch in rng.sample(batches, len(batches)):
            width = max(len(ids) for ids, _ in batch)
            ids_BT = torch.tensor(
                [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in batch], device=model.device
            )
            mask_BT = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in batch], device=model.device)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.7 * steps))
            logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
            targets_BT = ids_BT[:, 1:].masked_fill(mask_BT[:, 1:] == 0, -100)
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen, step = seen + ids_BT.numel(), step + 1
            if step % 20 == 0 or step == steps:
                print(f"  step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    print(f"trained on {seen:,} tokens in {time.monotonic() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and heldout.jsonl")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=10_000, help="use at most so many training rows")
    parser.add_argument("--show", type=int, default=10, help="failures to print")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    heldout = read_rows(args.data / "heldout.jsonl")
    report("base", model, tokenizer, heldout, min(args.show, 4))
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    train(adapted, tokenizer, read_rows(args.data / "train.jsonl")[: args.rows], args)
    report("adapter, fp32", adapted, tokenizer, heldout, args.show)
    report("adapter, bf16", adapted.merge_and_unload().to(torch.bfloat16), tokenizer, heldout, min(args.show, 3))


if __name__ == "__main__":
    main()
