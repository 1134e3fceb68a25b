"""What `loraport data build` tells: a table and samples for people, one document for machines.

>>> tell(built, settings)
"""

from collections import Counter
from typing import Any

from loraport.clients.terminal import printable, program, say
from loraport.train.build.build import Built, Settings, row_of
from loraport.train.build.questions import Pair

SAMPLES = 3
LONGEST_SAMPLE = 300
MOST_REASONS = 8


def document_of(built: Built, settings: Settings) -> dict[str, Any]:
    """The result as one document; the same input gives the same document."""
    return {
        "subject": built.subject,
        "documents": [document.name for document in built.documents],
        "skipped": [{"file": skipped.name, "reason": skipped.reason} for skipped in built.skipped],
        "pieces": built.pieces,
        "rows": built.rows,
        "kinds": dict(sorted(built.kinds.items())),
        "dropped": dict(built.dropped.most_common()),
        "dropped_examples": built.examples,
        "endpoint": endpoint_of(built, settings),
        "tokens": tokens_of(built),
        "split": {
            "by": built.divided.by,
            "groups": built.divided.groups,
            "train": len(built.divided.train),
            "eval": len(built.divided.evaluation),
        },
        "settings": {
            "model": settings.model,
            "max_tokens": settings.max_tokens,
            "with_context": settings.with_context,
            "with_code": settings.with_code,
            "phrasings": settings.phrasings,
            "eval_fraction": settings.eval_fraction,
            "seed": settings.seed,
        },
        "samples": [row_of(pair) for pair in samples(built)],
        "files": [str(path) for path in built.out],
    }


def endpoint_of(built: Built, settings: Settings) -> dict[str, Any] | None:
    """Who wrote pairs, and what came of it."""
    if not settings.ask:
        return None
    ask = settings.ask
    return {"base_url": ask.base_url, "model": ask.model, "judge": ask.judge, "unwritten": dict(built.unwritten)}


def tokens_of(built: Built) -> dict[str, Any]:
    """Tokens of the rows, all together and of one."""
    ordered = sorted(built.tokens) or [0]
    return {"counted": built.counted, "all": sum(ordered), "median": ordered[len(ordered) // 2], "longest": ordered[-1]}


def samples(built: Built) -> list[Pair]:
    """A few rows, of different kinds where there are, spread over the documents."""
    chosen: list[Pair] = []
    for kind, _ in built.kinds.most_common(SAMPLES):
        of_kind = [pair for pair in built.divided.train if pair.kind == kind] or list(built.divided.evaluation)
        chosen += of_kind[len(of_kind) // 2 :][:1]
    pairs = [pair for pair in built.divided.train if pair not in chosen]
    step = max(1, len(pairs) // SAMPLES)
    return [*chosen, *pairs[step // 2 :: step]][:SAMPLES]


def tell(built: Built, settings: Settings) -> None:
    """Everything that a person wants to know, and what to do next."""
    about = f" about {built.subject}" if built.subject else ""
    say(f"{len(built.documents)} documents{about}, {built.pieces} pieces, {built.rows} rows", "bold")
    if built.subject and not settings.subject:
        say('  questions name that; --subject "NAME 1.2" names it otherwise')
    for reason, count in Counter(skipped.reason for skipped in built.skipped).most_common(MOST_REASONS):
        first = next(skipped.name for skipped in built.skipped if skipped.reason == reason)
        say(f"  not read   {count:>6}  {reason}  ({printable(first)}{', …' if count > 1 else ''})")
    for kind, count in built.kinds.most_common():
        say(f"  {kind:<10} {count:>6}  {KINDS[kind]}")
    for reason, count in built.dropped.most_common(MOST_REASONS):
        say(f"  left out   {count:>6}  {reason}", "dim")
    for reason, count in built.unwritten.items():
        say(f"  unwritten  {count:>6}  {reason}", "yellow")
    if built.reused:
        say(f"  {built.reused} answers of the endpoint were taken from an earlier run")
    tokens = tokens_of(built)
    say(
        f"  tokens     {tokens['all']:,} in all, {tokens['median']} in the median row,"
        f" {tokens['longest']} in the longest"
        f"; {tokens['counted']}"
    )
    tell_split(built)
    for pair in samples(built):
        say(
            f"\n  {pair.kind}, {pair.source.file}" + (f", line {pair.source.lines[0]}" if pair.source.lines[0] else ""),
            "dim",
        )
        say(f"  user       {shortened(pair.question)}")
        say(f"  assistant  {shortened(pair.answer)}")
    tell_next(built, settings)


KINDS = {
    "heading": "a heading as the question, its section as the answer",
    "definition": "terms, and what is said of them",
    "table": "rows of tables",
    "symbol": "docstrings and comments of code",
    "signature": "how functions are declared",
    "code": "source code",
    "context": "the text in the prompt, the answer copied from it",
    "written": "written by the endpoint, checked against the source",
}


def shortened(text: str) -> str:
    """A text for the terminal."""
    text = printable(text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} …")
    return text.replace("\n", "\n             ")


def tell_split(built: Built) -> None:
    """How the rows were divided, and a word where that is weak."""
    divided = built.divided
    if not divided.evaluation:
        say("  no rows are held out: the documents cannot be divided, or --eval-fraction is 0", "yellow")
        return
    say(
        f"  split      {len(divided.train)} rows to train on, {len(divided.evaluation)} to evaluate, "
        f"by {divided.by} ({divided.groups} groups)"
    )
    if divided.by != "document":
        say(
            f"  note: too few documents to hold some out whole, so {divided.by}s were: evaluation is less strict",
            "yellow",
        )


def tell_next(built: Built, settings: Settings) -> None:
    """Where the rows lie, and the commands that use them."""
    say("")
    for path in built.out:
        say(f"  {path}")
    held_out = f" --eval-data {built.out[1]}" if len(built.out) > 1 else ""
    model = settings.model or "MODEL"
    say(f"next: {program()} data check {built.out[0]}{held_out} --model {model} --task qa")
    say(f"then: {program()} train --name NAME --data {built.out[0]}{held_out} --model {model}")
