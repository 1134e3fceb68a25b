"""Build the demo's rows: a question about a documented function, answered from the given context in a given form.

The user turn holds a few documented parameters of a real function, the wanted form of the reply and a
question; the assistant turn is the answer, a line `Source: function`, and nothing else. The held-out rows come
from other libraries than the training rows, and nothing of them (context, question, reply, bare answer) occurs
in training.

    python -m examples.demo.make_rows --wheels build/corpus/wheels --out examples/demo
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.pretrain.corpus import Function, Parameter, download, harvest, read_sources

FORM = 'Reply with the answer, then name the function as "Source:" on a new line.'
ASK = {
    "type": ["What is the type of {n} in {f}?", "Which type does {f} expect for {n}?"],
    "default": ["What is the default of {n} in {f}?", "Which value does {f} use when {n} is not given?"],
    "meaning": ["What does {n} mean in {f}?", "What does {f} say about {n}?"],
    "name": ['Which parameter of {f} is described as "{d}"?', 'In {f}, which parameter is the one for "{d}"?'],
}
TRAIN_ROWS = {"type": 250, "default": 250, "meaning": 250, "name": 250}
HELDOUT_ROWS = {"type": 50, "default": 50, "meaning": 50, "name": 50}
COMMON = 40  # an answer that occurs in more training candidates than this is no good for the held-out rows
MAX_CONTEXT = 250  # characters; the whole row is then about 105 tokens
PLAIN_WORDS = re.compile(r"[A-Z][a-z]")


@dataclass(frozen=True)
class Row:
    """One demo row with what the checks need to know of it."""

    kind: str
    library: str
    function: str
    context: str
    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The row as chat messages."""
        user = f"{self.context}\n\n{FORM}\n{self.question}"
        return [
            {"role": "user", "content": user},
            {"role": "assistant", "content": f"{self.answer}\nSource: {self.function}"},
        ]

    @property
    def text(self) -> str:
        """All that the row says."""
        return "\n".join(message["content"] for message in self.messages)


def is_sensible(parameter: Parameter) -> bool:
    """Whether the parameter reads well in a short list: a plain sentence, a short type, a short default."""
    description, kind = parameter.description, parameter.type
    words = description.split()
    plain = bool(PLAIN_WORDS.match(description)) and 3 <= len(words) <= 12 and len(description) <= 70
    whole = words[-1].lower() not in {
        "the",
        "a",
        "of",
        "to",
        "see",
        "is",
        "are",
        "following",
        "one",
    } and not description.endswith(("-", "e.g", "i.e"))
    text = f"{kind} {parameter.default} {description}"
    return (
        plain
        and whole
        and len(kind) <= 40
        and len(parameter.default) <= 20
        and not re.search(r"[\"*#~^@]|see |default|deprecated", text.lower())
    )


def context_of(function: str, parameters: list[Parameter]) -> str:
    """`name (type, default x): description.` lines under the function's name."""
    lines = [f"Parameters of {function}:"]
    for p in parameters:
        default = f", default {p.default}" if p.default else ""
        lines.append(f"{p.name} ({p.type}{default}): {p.description}.")
    return "\n".join(lines)


def candidates(functions: list[Function], rng: random.Random) -> Iterator[Row]:
    """Every kind of question about every function: one row of each kind for each window of parameters."""
    for function in functions:
        good = list({p.description: p for p in function.parameters if is_sensible(p)}.values())
        if len(good) < 2 or not 3 <= len(function.name) <= 24:
            continue
        start = rng.randrange(max(1, len(good) - 3))
        window = good[start : start + rng.randint(2, 4)]
        context = context_of(function.name, window)
        for parameter in window:
            answers = {"type": parameter.type, "meaning": parameter.description, "name": parameter.name}
            if parameter.default:
                answers["default"] = parameter.default
            for kind, answer in answers.items():
                question = rng.choice(ASK[kind]).format(n=parameter.name, f=function.name, d=parameter.description)
                yield Row(kind, function.library, function.name, context, question, answer)


def load_candidates(sources: Path, wheels: Path, seed: int) -> list[Row]:
    """Candidate rows of all libraries of a sources file, shuffled, short contexts only."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for requirement in read_sources(sources):
        _, functions = harvest(download(requirement, wheels), requirement.split("==")[0])
        rows += candidates(list({f.name: f for f in functions}.values()), rng)
    rng.shuffle(rows)
    return [row for row in rows if len(row.context) <= MAX_CONTEXT]


def choose(rows: list[Row], wanted: dict[str, int], answers: int) -> list[Row]:
    """Rows of each kind up to its wanted number; a context serves once, an answer at most `answers` times."""
    chosen: list[Row] = []
    count: Counter[str] = Counter()
    contexts: set[str] = set()
    used: Counter[str] = Counter()
    functions: set[str] = set()
    for row in rows:
        taken = row.context in contexts or row.function in functions or used[row.answer] >= answers
        if taken or count[row.kind] >= wanted[row.kind]:
            continue
        chosen.append(row)
        count[row.kind] += 1
        used[row.answer] += 1
        contexts.add(row.context)
        functions.add(row.function)
    return chosen


def whole(answers: set[str]) -> re.Pattern[str]:
    """A pattern that finds any of the answers where it does not merely begin or end a longer word."""
    alternatives = "|".join(re.escape(answer) for answer in sorted(answers, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")


def frequent_answers(answers: set[str], rows: list[Row]) -> set[str]:
    """Answers that occur in more than `COMMON` of the rows' texts."""
    pattern, count = whole(answers), Counter[str]()
    for row in rows:
        count.update(set(pattern.findall(row.text)))
    return {answer for answer, times in count.items() if times > COMMON}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder that keeps the downloaded wheels")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pool = load_candidates(args.out / "sources-train.txt", args.wheels, seed=1)
    held_pool = load_candidates(args.out / "sources-heldout.txt", args.wheels, seed=2)
    frequent = frequent_answers({r.answer for r in held_pool}, pool)
    held_pool = [r for r in held_pool if r.answer not in frequent]
    # rare kinds first, so that a function with an uncommon default is not spent on another question
    held_pool.sort(key=lambda row: ["default", "type", "name", "meaning"].index(row.kind))
    heldout = choose(held_pool, HELDOUT_ROWS, answers=1)
    functions, spoiled = {r.function for r in heldout}, whole({r.answer for r in heldout})
    pool = [r for r in pool if r.function not in functions and not spoiled.search(r.text)]
    train = choose(pool, TRAIN_ROWS, answers=12)
    for name, rows in (("train", train), ("heldout", heldout)):
        random.Random(3).shuffle(rows)
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps({"messages": r.messages}) + "\n" for r in rows))
        kinds, libraries = Counter(r.kind for r in rows), Counter(r.library for r in rows)
        print(f"{name}: {len(rows)} rows, {dict(kinds)}, {dict(libraries)}")


if __name__ == "__main__":
    main()
