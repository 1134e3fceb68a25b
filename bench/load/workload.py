"""From lengths that were wished to prompts that have them on this server, by its own tokenizer and its own counts.

>>> workload = make_workload(server, "base", Wish(input=(512, 512), output=(128, 128)))
>>> workload.source.kind, workload.notes
('ids', [])
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraport.bench.load.conversation import read_conversations
from loraport.bench.load.prompts import Kind, Source
from loraport.bench.load.server import Server, explain
from loraport.bench.load.wire import Exchange
from loraport.clients.errors import EndpointError, UsageError

# Common words, most of them a token in most vocabularies.
TEXT = """
the of and to in is for on that by this with it not or be are from at as all have new more an was will can about
if page my has search free but our one other do no time they site he up may what which their news out use any
there see only so his when here web who also now help get view first been would how were me some these its like
than find date back top people had list name just over state year day into two world next used go work last most
buy data make them should product system post her city add policy number such please available copyright support
message after best good video well where info right public high school through each links she review years order
very book items company read group need many user said set under general full map reviews program life know
games way part could great real item center store must made line off did send type car take area want long code
show even check special price open today case same own found both power while water small home large end put
value class return test file key
"""
WORDS = tuple(TEXT.split())
ENOUGH_WORDS, MANY_WORDS = 8, 64
PROBE = 1 << 40  # numbers of prompts that are no part of a load


@dataclass(frozen=True)
class Wish:
    """What the load shall be. `input`, `output`: tokens from and to. `rows`: messages of the user's own, as JSON.

    `seed`: prompts of the same seed are the same. `prefix`: tokens that all share. `natural`: replies end where the
    model ends them, at `output` at the latest. `replays`: rows are whole conversations, whose turns follow each other;
    `as_is`: rows are not marked, so that a prefix cache knows them the second time.
    """

    input: tuple[int, int] = (512, 512)
    output: tuple[int, int] = (128, 128)
    seed: int = 0
    chat: bool = False
    prefix: int = 0
    rows: list[str] = field(default_factory=list)
    natural: bool = False
    replays: bool = False
    as_is: bool = False

    @property
    def route(self) -> str:
        """Beside the base URL."""
        return "/chat/completions" if self.chat or self.rows else "/completions"


@dataclass(frozen=True)
class Workload:
    """What processes are told, and what is not as it was wished."""

    source: Source
    notes: list[str]


def make_workload(server: Server, model: str, wish: Wish) -> Workload:
    """The source of prompts, tried with single requests. Raises EndpointError when one fails."""
    notes: list[str] = []
    source = choose_source(server, model, wish)
    source, exchange = fix_length(server, model, source)
    if not wish.rows:
        source, exchange = calibrate(server, model, source, exchange)
        wanted = source.input[0]
        if source.input[0] == source.input[1] and exchange.prompt != wanted:
            notes.append(f"prompts are of about {exchange.prompt} tokens, not of {wanted}: no /tokenize to choose by")
    if not wish.natural and "ignore_eos" not in source.extra:
        notes.append(
            f"replies end where the model ends them, the first after {exchange.completion} tokens: "
            "the server has no ignore_eos"
        )
    if not source.all_unique and not wish.as_is:
        notes.append(
            f"prompts are too short to be all different: that takes {source.digits} tokens"
            if source.digits
            else "prompts of the same length are the same: the server tells apart only one part of them"
        )
    return Workload(source, notes)


def choose_source(server: Server, model: str, wish: Wish) -> Source:
    """Prompts of rows; of words, as clients send text; of token ids where words are of any number of tokens."""
    common: dict[str, Any] = {"input": wish.input, "output": wish.output, "seed": wish.seed, "prefix": wish.prefix}
    common["extra"] = {"temperature": 0} | ({} if wish.natural else {"ignore_eos": True})
    if wish.rows:
        kind: Kind = "talks" if wish.replays else "rows"
        return Source(kind, wish.route, wish.rows, as_is=wish.as_is, **(common | {"prefix": 0}))
    ids = server.tokens(model, " ".join(WORDS))
    words = single_tokens(server, model) if ids else []
    if ids and not wish.chat and len(words) < ENOUGH_WORDS:
        return Source("ids", wish.route, [str(token) for token in sorted(set(ids))], **common)
    return Source("words", wish.route, words if len(words) >= ENOUGH_WORDS else list(WORDS), **common)


def single_tokens(server: Server, model: str) -> list[str]:
    """Words that are one token each, with a blank before them and without."""
    found: list[str] = []
    for word in WORDS:
        if len(server.tokens(model, f"{word} {word} {word}") or ()) == 3:
            found.append(word)
        if len(found) == MANY_WORDS:
            break
    return found


def fix_length(server: Server, model: str, source: Source) -> tuple[Source, Exchange]:
    """Make replies as long as they are wished: `ignore_eos`, without it where the server refuses it."""
    exchange = server.ask(source, PROBE, model)
    if exchange.error == "4xx" and exchange.status in (400, 422):
        plain = replace(source, extra={key: value for key, value in source.extra.items() if key != "ignore_eos"})
        again = server.ask(plain, PROBE, model)
        if not again.error:
            return plain, again
    if exchange.error:
        raise explain(server.base_url, model, exchange)
    return source, exchange


def calibrate(server: Server, model: str, source: Source, exchange: Exchange) -> tuple[Source, Exchange]:
    """Take the tokens that the server puts around a prompt off it: by difference, or by share for words of any size."""
    if exchange.prompt is None:
        raise EndpointError(f"{server.base_url} does not say how many tokens a prompt has.", "its `usage` lacks them")
    one = replace(source, input=(source.input[1],) * 2)
    got = server.ask(replace(one, output=(1, 1)), PROBE, model)
    if got.error:
        raise explain(server.base_url, model, got)
    over = (got.prompt or 0) - one.input[0]
    if over == 0:
        return source, exchange
    if 0 < over < 128 and over < source.input[0] - source.prefix:
        fixed = replace(source, overhead=over)
    else:
        fixed = replace(source, ratio=(got.prompt or 1) / one.input[0])
    again = server.ask(fixed, PROBE + 1, model)
    if again.error:
        raise explain(server.base_url, model, again)
    if fixed.overhead and again.prompt is not None and not fixed.input[0] <= again.prompt <= fixed.input[1]:
        fixed = replace(source, ratio=(got.prompt or 1) / one.input[0])
        again = server.ask(fixed, PROBE + 2, model)
    return fixed, again


def read_messages(path: Path) -> list[str]:
    """Conversations of a file of rows without their last reply, as JSON."""
    from loraport.clients.rows import as_request, read_rows

    found = [json.dumps(as_request(row.prompt), ensure_ascii=False) for row in read_rows(path)]
    if not found:
        raise UsageError(f"{path} has no rows.", "a row of chat has messages")
    return found


def read_talks(path: Path) -> list[str]:
    """Conversations of a file of rows, whole, as JSON."""
    return [json.dumps(messages, ensure_ascii=False) for messages in read_conversations(path)]


def parse_lengths(text: str, name: str) -> tuple[int, int]:
    """(from, to) of `512` or `256:1024`."""
    least, _, most = text.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise UsageError(f"{name} {text!r} is no length.", f"for example {name} 512, or {name} 256:1024")
    return found
