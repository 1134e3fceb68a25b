"""Greedy replies to many prompts at once, for scores and samples. Golden replies are golden.py's: one at a time, exact.

Written out instead of calling `generate`, as there: no generation setting of the model may touch the replies. Prompts
of a batch are padded on the left and masked; a row that has ended goes on unread until its batch is done. Prompts of
like length share a batch, and a batch that does not fit the memory is halved.

    >>> with loraport.train.loop.attention.generating(model):
    ...     generate(model, [[1, 5, 7], [1, 9]], limits=[64, 64], stop_tokens={2})[0].stopped
    True
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraport.clients.errors import ResourceError

BATCH_TOKENS = 16_384  # prompts and replies of a batch, padding counted: 2 GiB of KV cache in an 8B model
MORE, MOST_MORE = 32, 256  # tokens that a reply may have beyond its reference: as many again and 32, at most 256


@dataclass(frozen=True)
class Generated:
    """The tokens of a reply, the stop token among them where it `stopped`."""

    tokens: list[int]
    stopped: bool


def reply_limit(reference_tokens: int) -> int:
    """Most tokens of a reply: room enough to see that it does not stop, and no minutes spent on one that never does."""
    return reference_tokens + min(reference_tokens + MORE, MOST_MORE)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_tokens: frozenset[int] | set[int],
    on_reply: Callable[[int], None] = lambda count: None,
) -> list[Generated]:
    """Greedy replies to `prompts` of at most `limits` tokens each, in their order.

    `model` is in evaluation mode without checkpointing. `on_reply` is told how many are done. ResourceError when not
    even one prompt fits the memory.
    """
    replies: dict[int, Generated] = {}
    work = list(batches([len(prompt) for prompt in prompts], limits))
    while work:
        batch = work.pop(0)
        try:
            with torch.no_grad():
                done = reply_to([prompts[i] for i in batch], [limits[i] for i in batch], model, stop_tokens)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            if len(batch) == 1:
                raise ResourceError(
                    f"a held-out prompt of {len(prompts[batch[0]]):,} tokens cannot be answered: no memory.",
                    "end other programs that use the GPU",
                ) from error
            work[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            continue
        replies |= zip(batch, done, strict=True)
        on_reply(len(batch))
    return [replies[index] for index in range(len(prompts))]


def batches(lengths: Sequence[int], limits: Sequence[int]) -> Iterator[list[int]]:
    """Indices of prompts that go together: of like length, and within BATCH_TOKENS where they are more than one."""
    batch: list[int] = []
    widest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (limits[i], lengths[i])):
        widest = max(widest, lengths[index]) if batch else lengths[index]
        if batch and (widest + limits[index]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, widest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch


def reply_to(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], model: Any, stop_tokens: frozenset[int] | set[int]
) -> list[Generated]:
    """One batch of B prompts, until each has ended: by a stop token, or at its limit."""
    device = next(model.parameters()).device
    ids_BT, mask_BT = pad_left(prompts, device)
    stops_S = torch.tensor(sorted(stop_tokens), device=device)
    limits_B = torch.tensor(limits, device=device)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    steps: list[torch.Tensor] = []
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache = None
    while not bool(ended_B.all()):
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        token_B = output.logits[:, -1].float().argmax(-1)
        steps.append(token_B)
        ended_B = ended_B | torch.isin(token_B, stops_S) | (limits_B <= len(steps))
        ids_BT = token_B[:, None]
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
        positions_BT = positions_BT[:, -1:] + 1
    rows: list[list[int]] = torch.stack(steps, dim=1).tolist()
    return [cut(tokens[:limit], stop_tokens) for tokens, limit in zip(rows, limits, strict=True)]


def pad_left(prompts: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of shape (B, T); the pads are masked, so that any token can be one."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def cut(tokens: list[int], stop_tokens: frozenset[int] | set[int]) -> Generated:
    """The tokens up to the first that stops, inclusive."""
    end = next((at for at, token in enumerate(tokens) if token in stop_tokens), None)
    return Generated(tokens, False) if end is None else Generated(tokens[: end + 1], True)
