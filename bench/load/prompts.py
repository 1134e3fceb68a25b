"""Bodies of requests: unique prompts of an exact length, or rows of your own; the same for the same seed and number.

A prompt is made from its number alone, so it does not matter which process sends it. Random prompts are words that are
one token each to the server's own tokenizer, or token ids that it named. Unique, because a prompt that was seen before
is not computed again: the number itself stands at the front of a random prompt, in digits that are parts of the pool,
and of a row, as text before the first words of the user.

    >>> source = Source("ids", "/completions", pool=["17", "42"], input=(4, 4), output=(16, 16), seed=1)
    >>> Prompts(source).body(0, "base")
    b'{"model":"base","prompt":[42,17,17,42],"max_tokens":16,...}'
"""

import json
import math
import random
from dataclasses import dataclass, field
from typing import Any, Literal

from loraport.bench.load.conversation import Message, Talk

Kind = Literal["ids", "words", "rows", "talks"]
NUMBER_BITS = 41  # of the number of a prompt: 24 within a stage, 16 for stages, and one for those of no load
MARK = "\ue000mark\ue000"  # stands for a row's number until it is sent
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Source:
    """What prompts are made of, as it is told to the processes.

    `pool`: token ids or words; of `rows` and `talks`, their messages as JSON. `input`, `output`: tokens, from and to,
    each number in between as likely. `overhead`: tokens that the server puts around them; `ratio`: tokens of a part of
    the pool. `prefix`: parts at the front that all prompts share. `extra`: further fields of each request. `as_is`:
    rows are sent as they stand, again and again.
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
    as_is: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether requests are conversations."""
        return self.route == "/chat/completions"

    @property
    def digits(self) -> int:
        """Parts of the pool that tell any two numbers of prompts apart; 0 where there are not two parts."""
        base = len(set(self.pool))
        return math.ceil(NUMBER_BITS / math.log2(base)) if base > 1 and self.kind in ("ids", "words") else 0

    @property
    def all_unique(self) -> bool:
        """Whether no two prompts can be the same: the shortest have room for their numbers."""
        if self.kind in ("rows", "talks"):
            return not self.as_is
        return 0 < self.digits <= round((self.input[0] - self.overhead) / self.ratio) - self.prefix


class Prompts:
    """Bodies of requests by number."""

    def __init__(self, source: Source) -> None:
        self.source = source
        shared = random.Random(f"prefix/{source.seed}")
        self.prefix = shared.choices(source.pool, k=source.prefix) if source.prefix else []
        self.digits = list(dict.fromkeys(source.pool))
        random.Random(f"digits/{source.seed}").shuffle(self.digits)
        self.width = source.digits
        options = {"stream": True, "stream_options": {"include_usage": True}, **source.extra}
        self.options = json.dumps(options, separators=(",", ":"))[1:]
        self.rows = [marked(row).split(MARK) for row in source.pool] if source.kind in ("rows", "talks") else []

    def body(self, number: int, model: str, lengths: tuple[int, int] | None = None) -> bytes:
        """The request with this number to a model. `lengths`: tokens of prompt and reply, in place of drawn ones."""
        draw = random.Random(f"{self.source.seed}/{number}")
        most = draw.randint(*self.source.output)
        wanted = lengths[0] if lengths else draw.randint(*self.source.input)
        prompt = self.messages(number) if self.rows else self.make(number, wanted, draw)
        return self.request(model, prompt, lengths[1] if lengths else most)

    def request(self, model: str, prompt: str, most: int) -> bytes:
        """A request. `prompt`: as JSON."""
        name = "messages" if self.source.is_chat else "prompt"
        return f'{{"model":{json.dumps(model)},"{name}":{prompt},"max_tokens":{most},{self.options}'.encode()

    def make(self, number: int, tokens: int, draw: random.Random) -> str:
        """A random prompt as JSON: what all share, the digits of its number, and random parts."""
        source = self.source
        count = round((tokens - source.overhead) / source.ratio)
        own = self.spell(number) + draw.choices(source.pool, k=max(1, count - source.prefix))
        parts = self.prefix + own[: max(1, count - source.prefix)]
        if source.kind == "ids":
            return f"[{','.join(parts)}]"
        text = json.dumps(" ".join(parts))
        return f'[{{"role":"user","content":{text}}}]' if source.is_chat else text

    def spell(self, number: int) -> list[str]:
        """A number in parts of the pool, the last digit first."""
        found, base = [], len(self.digits)
        for _ in range(self.width):
            number, digit = divmod(number, base)
            found.append(self.digits[digit])
        return found

    def messages(self, number: int) -> str:
        """Messages of a request of rows as JSON; of a conversation the first turn."""
        if self.source.kind == "rows":
            return self.row(number)
        return json.dumps(self.talk(number).ask(), ensure_ascii=False)

    def row(self, number: int) -> str:
        """Messages of a row as JSON, marked with the number."""
        mark = "" if self.source.as_is else f"[{spell(number)}] "
        return mark.join(self.rows[number % len(self.rows)])

    def talk(self, number: int) -> Talk:
        """The conversation with this number."""
        return Talk(json.loads(self.row(number)))

    def turn(self, number: int, talk: Talk, messages: list[Message], model: str) -> bytes:
        """The next request of a conversation."""
        most = random.Random(f"{self.source.seed}/{number}/{talk.turn}").randint(*self.source.output)
        return self.request(model, json.dumps(messages, ensure_ascii=False), most)


def marked(row: str) -> str:
    """Messages as JSON with MARK where the first user's words begin; at the front of all where there is no user."""
    messages = json.loads(row)
    at = next((at for at, message in enumerate(messages) if message["role"] == "user"), 0)
    messages[at]["content"] = MARK + messages[at]["content"]
    return json.dumps(messages, ensure_ascii=False)


def spell(number: int) -> str:
    """A number in few characters."""
    found = ""
    while number or not found:
        number, digit = divmod(number, 36)
        found = DIGITS[digit] + found
    return found
