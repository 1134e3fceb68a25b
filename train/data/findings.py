"""What the check can find, how bad each is, and what to do about it: one table, and the shape of a finding.

An error means rows that cannot be trained, or an evaluation that would lie; a warning, rows that teach less or worse
than they seem to; a note, what is good to know. No looking at rows here: see `survey` and `compare`.

    >>> Finding("duplicate", places, "2 rows are exact copies of an earlier row.").level
    'warning'
"""

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
LISTED = 1_000  # most rows that a finding lists in the JSON document; the count is always of all


@dataclass(frozen=True)
class Kind:
    """How bad a kind of finding is, and what helps."""

    level: Level
    hint: str


KINDS: dict[str, Kind] = {
    "file": Kind("error", "name its format with --format, or write its rows as JSONL with 'messages'"),
    "unreadable": Kind("error", "correct the lines, or leave them out with --fix"),
    "structure": Kind("error", "correct the rows, or leave them out with --fix"),
    "method": Kind("error", "--method dpo trains preference rows, --method sft all others: keep them in files apart"),
    "template": Kind("error", "some templates take no system message, or want user and assistant to alternate"),
    "no_stop": Kind("error", "the token that closes assistant turns must be in eos_token_id of generation_config.json"),
    "special_tokens": Kind("error", "a turn would begin or end there: remove them, or break them up with --fix"),
    "too_long": Kind("error", "shorten or split the rows, or raise --sequence-length as far as the memory goes"),
    "nothing_trained": Kind("error", "a row needs an assistant turn that carries loss"),
    "double_bos": Kind("error", "remove the token from the chat template, or from the text"),
    "prompt_differs": Kind("error", "put a chat_template.jinja into the model's folder that renders both alike"),
    "leak": Kind("error", "the evaluation would measure memory: drop them from the training rows with --fix"),
    "near_leak": Kind("warning", "look at them: if they ask the same, drop them from one of the two files"),
    "empty_turn": Kind("warning", "give the text, or remove the turn"),
    "duplicate": Kind("warning", "a copy only counts twice: --fix keeps the first of each"),
    "contradiction": Kind("warning", "fine where several answers are right; otherwise decide for one: --fix keeps all"),
    "near_duplicate": Kind("warning", "varied rows teach more than many of one kind"),
    "longer": Kind("note", "length is the easiest thing to learn: fine where longer is what you want"),
    "left_out": Kind("note", "a row is trained up to its last reply: remove what follows, or add the reply"),
    "untrained_turns": Kind("note", "the template renders them differently once others follow: split the rows"),
    "few_rows": Kind("warning", "start with 500 to 1,000 rows, evaluate, then grow"),
    "few_answers": Kind("warning", "rows that all teach the same answer teach nothing else"),
    "few_prompts": Kind("warning", "ask in more ways: one wording is learnt as the only one"),
    "capacity": Kind("note", "more rank takes in more; see --preset and --rank of loraport train"),
}


@dataclass(frozen=True)
class Place:
    """A row: `data` is "train" or "eval", `row` its number in `file`, 0 for all of the file; `detail`: what of it."""

    data: str
    file: str
    row: int
    detail: str = ""

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {"data": self.data, "file": self.file, "row": self.row} | (
            {"detail": self.detail} if self.detail else {}
        )


@dataclass(frozen=True)
class Finding:
    """Something found: its kind, the rows (all of them), and one sentence."""

    kind: str
    places: list[Place] = field(default_factory=list)
    message: str = ""
    hint: str = ""

    @property
    def level(self) -> Level:
        """error, warning or note."""
        return KINDS[self.kind].level

    def document(self) -> dict[str, Any]:
        """For JSON; at most LISTED rows."""
        return {
            "kind": self.kind,
            "level": self.level,
            "count": len(self.places),
            "message": self.message,
            "hint": self.hint or KINDS[self.kind].hint,
            "rows": [place.document() for place in self.places[:LISTED]],
        }


def count_of(things: Sized | int, name: str) -> str:
    """`1 row`, `2 rows`."""
    number = things if isinstance(things, int) else len(things)
    return f"{number:,} {name}{'' if number == 1 else 's'}"
