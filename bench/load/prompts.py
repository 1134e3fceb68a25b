"""Bodies of requests: unique prompts of an exact length, or rows of your own; the same for the same seed and number.

A prompt is made from its number alone, so it does not matter which process sends it. Random prompts are words that are
one token each to the server's own tokenizer, or token ids that it named. Unique, because a prompt that was seen before
is not computed again.

    >>> source = Source("ids", "/completions", pool=["17", "42"], input=(4, 4), output=(16, 16), seed=1)
    >>> Prompts(source).body(0, "base")
    b'{"model":"base","prompt":[42,17,17,42],"max_tokens":16,...}'
"""

import json
import random
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["ids", "words", "rows"]


@dataclass(frozen=True)
class Source:
    """What prompts are made of, as it is told to the processes.

    `pool`: token ids or words; of `rows`, their messages as JSON. `input`, `output`: tokens, from and to, each number
    in between as likely. `overhead`: tokens that the server puts around them; `ratio`: tokens of a part of the pool.
    `prefix`: parts at the front that all prompts share. `extra`: further fields of each request.
    """

    kind: Kind
    route: str
    pool: list[str]
    input: tuple[int, int]
    output: tuple[int, int]
    seed: int
    overhead: int = 0
    ratio: float = 1.0
    prefix: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether requests are conversations."""
        return self.route == "/chat/completions"


class Prompts:
    """Bodies of requests by number."""

    def __init__(self, source: Source) -> None:
        self.source = source
        shared = random.Random(f"prefix/{source.seed}")
        self.prefix = shared.choices(source.pool, k=source.prefix) if source.prefix else []
        options = {"stream": True, "stream_options": {"include_usage": True}, **source.extra}
        self.options = json.dumps(options, separators=(",", ":"))[1:]

    def body(self, number: int, model: str) -> bytes:
        """The request with this number to a model."""
        source = self.source
        draw = random.Random(f"{source.seed}/{number}")
        most = draw.randint(*source.output)
        prompt = source.pool[number % len(source.pool)] if source.kind == "rows" else self.make(draw)
        name = "messages" if source.is_chat else "prompt"
        return f'{{"model":{json.dumps(model)},"{name}":{prompt},"max_tokens":{most},{self.options}'.encode()

    def make(self, draw: random.Random) -> str:
        """A random prompt as JSON."""
        source = self.source
        count = round((draw.randint(*source.input) - source.overhead) / source.ratio)
        parts = self.prefix + draw.choices(source.pool, k=max(1, count - source.prefix))
        if source.kind == "ids":
            return f"[{','.join(parts)}]"
        text = json.dumps(" ".join(parts))
        return f'[{{"role":"user","content":{text}}}]' if source.is_chat else text
