"""What the tests of DPO share: random pairs of sequences, and pairs that a tiny model can learn to prefer."""

from typing import Any

import numpy as np

from tests.loop import VOCABULARY


class ToyPairs:
    """Pairs of random tokens with a prompt in common: prompts of 3 to 8 tokens, replies of 2 to 12.

    `sign`: a token that ends all preferred replies and no other, which is something to learn.
    """

    def __init__(self, count: int, seed: int = 0, vocabulary: int = VOCABULARY, sign: int | None = None) -> None:
        generator = np.random.default_rng(seed)
        self.items: list[dict[str, Any]] = []
        for _ in range(count):
            prompt = generator.integers(4, vocabulary, generator.integers(3, 9)).astype(np.int32)
            sizes = generator.integers(2, 13, 2)
            replies = [generator.integers(4, vocabulary, size).astype(np.int32) for size in sizes]
            if sign is not None:
                replies[0][-1], replies[1][-1] = sign, sign + 1
            self.items.append(pair_item(prompt, replies[0], replies[1]))
        self.lengths = np.array([len(item["input_ids"]) for item in self.items], np.int32)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.items[row]


def pair_item(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    """A pair as it lies in the store; loss on the replies."""
    ids = np.concatenate([prompt, chosen, prompt, rejected])
    hidden = np.full(len(prompt), -100, np.int32)
    labels = np.concatenate([hidden, chosen, hidden, rejected])
    return {"input_ids": ids, "labels": labels, "chosen": len(prompt) + len(chosen), "prompt": len(prompt)}
