"""Greedy replies with their log-probabilities, as PEFT computes them: what serving replays to prove an adapter.

The decoding is written out instead of calling `generate`, so that no generation setting of the model (a repetition
penalty, a temperature) can touch it, and so that each step's log-probabilities are those of the plain softmax.
"""

from collections.abc import Sequence
from typing import Any

import torch

from loraport.clients.rows import Message
from loraport.train.data.tokens import Encoder
from loraport.train.manifest import Golden, Reply

GOLDEN_PROMPTS = 4
LONGEST_PROMPT = 1024  # a replay should cost milliseconds
GOLDEN_TOKENS = 32


def greedy_reply(model: Any, encoder: Encoder, prompt: list[int], most: int) -> Reply:
    """Greedy reply to one prompt, up to `most` tokens or a stop token, which is part of the reply."""
    with torch.no_grad():
        return decode_greedily(model, encoder, prompt, most)


def decode_greedily(model: Any, encoder: Encoder, prompt: list[int], most: int) -> Reply:
    """`greedy_reply`, without the switch that keeps it from recording gradients."""
    device = next(model.parameters()).device
    tokens: list[int] = []
    logprobs: list[float] = []
    margins: list[float] = []
    output = model(input_ids=torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
    while True:
        logprobs_V = output.logits[0, -1].float().log_softmax(-1)
        (first, second), (token, _) = (half.tolist() for half in logprobs_V.topk(2))
        tokens.append(token)
        logprobs.append(first)
        margins.append(first - second)
        if token in encoder.stop_tokens or len(tokens) == most:
            break
        step = torch.tensor([[token]], device=device)
        output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
    stopped = tokens[-1] in encoder.stop_tokens
    text = encoder.tokenizer.decode(tokens[:-1] if stopped else tokens)
    return Reply(tokens=tokens, logprobs=logprobs, margins=margins, text=text, stopped=stopped)


def golden_replies(
    model: Any, encoder: Encoder, conversations: list[list[Message]], known: Sequence[Golden] = ()
) -> list[Golden]:
    """Replies of adapter and base to GOLDEN_PROMPTS of `conversations`, those first on which the two differ.

    A prompt that both answer alike proves nothing about the adapter. `model`: a PeftModel, whose adapter is switched
    off for the base. `known`: of another adapter on the same base, whose replies are not asked for again.
    """
    model.eval()
    bases = {tuple(each.prompt_tokens): each.base for each in known}
    telling: list[Golden] = []
    alike: list[Golden] = []
    for messages in conversations:
        prompt = encoder.prompt(messages)
        adapter = greedy_reply(model, encoder, prompt, GOLDEN_TOKENS)
        base = bases.get(tuple(prompt))
        if base is None:
            with model.disable_adapter():
                base = greedy_reply(model, encoder, prompt, GOLDEN_TOKENS)
        found = telling if adapter.tokens != base.tokens else alike
        found.append(Golden(messages=messages, prompt_tokens=prompt, adapter=adapter, base=base))
        if len(telling) == GOLDEN_PROMPTS:
            break
    return [*telling, *alike][:GOLDEN_PROMPTS]
