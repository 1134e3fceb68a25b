"""How long a reply may be, where nobody said: long enough for every reference, short enough to end what never stops.

>>> choose_limit(client, "demo", rows, context=8192)
ReplyLimit(tokens=312, reason='twice the longest reference, 140 tokens, and 32')
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraport.clients.models import count_tokens
from loraport.clients.rows import Row

if TYPE_CHECKING:
    from openai import OpenAI

LEAST = 64  # tokens
MORE = 32  # tokens beyond twice the longest reference: `loraport train` gives its sampled replies the same room
COUNTED = 8  # references of most bytes, of which one is taken to be that of most tokens


@dataclass(frozen=True)
class ReplyLimit:
    """Most tokens of a reply, and where the number comes from."""

    tokens: int
    reason: str


def choose_limit(client: "OpenAI", model: str, rows: Sequence[Row], context: int | None) -> ReplyLimit:
    """The limit for `rows`, from their longest reference in the server's own tokens where it counts them.

    Where it does not: in bytes, of which a token has at least one. Half of the context stays for the prompt, because a
    server refuses a prompt and a limit that together exceed its context.
    """
    longest = sorted({row.reference.strip() for row in rows}, key=lambda text: -len(text.encode()))[:COUNTED]
    counts = [count_tokens(client, model, longest[0])]
    if counts[0] is not None:
        counts += [count_tokens(client, model, text) for text in longest[1:]]
    tokens = max((count for count in counts if count is not None), default=None)
    if tokens is None:
        size = len(longest[0].encode())
        limit = ReplyLimit(size + MORE, f"the longest reference, {size} bytes, and {MORE}")
    else:
        limit = ReplyLimit(2 * tokens + MORE, f"twice the longest reference, {tokens} tokens, and {MORE}")
    if limit.tokens < LEAST:
        limit = ReplyLimit(LEAST, "the least there is by default")
    return ReplyLimit(context // 2, "half of the context") if context and limit.tokens > context // 2 else limit
