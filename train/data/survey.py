"""One pass over rows, as the trainer will see them: what is wrong with each by itself, and a few hundred bytes of each.

Rows stream through in chunks: read, rendered and tokenised by the same code as in training, looked at, forgotten. What
stays of a row are its number, lengths, hashes and signatures: what `compare` needs to tell how rows relate. A row that
cannot be read or tokenised is a problem with a place, never the end of the pass.

    >>> found = Surveyor(encoder, sequence_length=2048).survey(find_source("rows.jsonl"), "auto", "train")
    >>> found.column("length").sum()
    124198
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np

from loraport.clients.errors import DataError
from loraport.clients.rows import BadRow, Message, Row, Source, iter_rows
from loraport.train.data.findings import Place, count_of
from loraport.train.data.flat import Array, FlatTokens
from loraport.train.data.preference import of_method
from loraport.train.data.similar import ANSWER_VALUES, FEWEST_RUNS, PROMPT_VALUES, Signer
from loraport.train.data.split import group_of, normalise
from loraport.train.data.tokens import Encoder, Example

CHUNK = 1_000  # rows in memory at once
# Columns that are no numbers of 64 bits, where there are no rows.
EMPTY_COLUMNS = {
    "prompt_signature": np.zeros((0, PROMPT_VALUES), np.uint16),
    "answer_signature": np.zeros((0, ANSWER_VALUES), np.uint16),
}
PROMPTS_TOKENISED = 8  # of so many rows one has its prompt tokenised once more
SAMPLED = 2_000  # rows that tell what is boilerplate, and what kind of task it is


@dataclass
class Sample:
    """What the answers of the first `rows` rows look like, to tell the kind of task."""

    rows: int = 0
    code: int = 0
    thought: int = 0
    json: int = 0
    copied: int = 0  # answers of which four fifths of the words stand in the prompt

    def add(self, asked: str, answer: str, thinks: bool, calls: bool) -> None:
        """Count an answer; `thinks` and `calls`: it has thoughts or tool calls beside its text."""
        words, known = re.findall(r"\w+", answer.casefold()), set(re.findall(r"\w+", asked.casefold()))
        self.rows += 1
        self.code += "```" in answer
        self.thought += thinks or "<think>" in answer
        self.json += calls or is_json(answer.strip())
        self.copied += bool(words) and sum(word in known for word in words) >= 0.8 * len(words)


@dataclass
class Survey:
    """What is kept of the rows of a source: a column an aspect, in the order of the usable rows.

    Columns: row, file (numbers), length, trained, answer_length (tokens), whole, prompt, answer (hashes of the texts;
    prompt is 0 where there is none), question (what may have one answer alone: the prompt, of a pair with its two
    replies), prompt_signature, answer_signature; and all_lengths, of unusable rows too. Of a pair, length and trained
    are of both sequences, all_lengths of the longer one, the answer is both replies in their order, and there is
    other_length, the tokens of the reply that is not preferred. `problems`: kind -> places. `read`: rows read, those
    that could not be tokenised included. `pairs`: whether the rows are pairs.
    """

    name: str
    data: str
    files: list[str] = field(default_factory=list)
    problems: dict[str, list[Place]] = field(default_factory=dict)
    sample: Sample = field(default_factory=Sample)
    read: int = 0
    pairs: bool = False
    parts: dict[str, list[Array]] = field(default_factory=dict)

    def column(self, name: str) -> Array:
        """A column of all usable rows."""
        parts = self.parts.get(name, [])
        if len(parts) > 1:
            self.parts[name] = parts = [np.concatenate(parts)]
        return parts[0] if parts else EMPTY_COLUMNS.get(name, np.zeros(0, np.int64))

    def place(self, index: int, detail: str = "") -> Place:
        """Where a usable row stands."""
        return Place(self.data, self.files[self.column("file")[index]], int(self.column("row")[index]), detail)

    def report(self, kind: str, row: Row | BadRow, detail: str = "") -> None:
        """Note a problem of a row."""
        self.problems.setdefault(kind, []).append(Place(self.data, row.source or self.name, row.line, detail))

    def file_number(self, file: str) -> int:
        """The number by which a file stands in the columns; files come one after the other."""
        if not self.files or self.files[-1] != file:
            self.files.append(file)
        return len(self.files) - 1

    @property
    def usable(self) -> int:
        """Number of usable rows."""
        return len(self.column("row"))


class Surveyor:
    """Looks at rows with one base's tokenizer; what counts as boilerplate is learnt from the first source."""

    def __init__(
        self,
        encoder: Encoder,
        sequence_length: int,
        tell: Callable[[int], None] = lambda rows: None,
        method: str = "auto",
    ) -> None:
        """`tell` is called with the number of rows of a source so far, now and then. `method`: of the training that the
        rows are for; auto is as the first row of the first source says.
        """
        self.encoder, self.method = encoder, method
        self.tell = tell
        self.sequence_length = sequence_length
        self.prompts = Signer(PROMPT_VALUES, FEWEST_RUNS)
        self.answers = Signer(ANSWER_VALUES)
        self.has_learnt = False

    def survey(self, source: Source, format: str, data: str) -> Survey:
        """All rows of `source`; `data` is "train" or "eval"."""
        found = Survey(source.name, data)
        outcomes = self.encoder.encode_many(of_method(read_all(source, format), self.method))
        while chunk := list(islice(outcomes, self.chunk)):
            for outcome in chunk:
                found.read += outcome.line > 0
                if isinstance(outcome, BadRow):
                    found.report(kind_of(outcome), outcome, reason(outcome))
            examples = [outcome for outcome in chunk if isinstance(outcome, Example)]
            if examples:
                self.keep(examples, found)
            self.tell(found.read)
        if self.method == "auto" and found.usable:
            self.method = "dpo" if found.pairs else "sft"
        return found

    @property
    def chunk(self) -> int:
        """Rows to look at together: more at first, to tell what is boilerplate."""
        return CHUNK if self.has_learnt else SAMPLED

    def keep(self, examples: list[Example], found: Survey) -> None:
        """Add the columns of tokenised rows, and note what is wrong with them."""
        rows = [row for example in examples if (row := example.row)]
        tokens = flatten(examples)
        rejected = [example.rejected for example in examples if example.rejected]  # all have one, or none has
        other = flatten(rejected) if rejected else None
        found.pairs = found.pairs or other is not None
        wrong = self.wrong_tokens(rows, tokens)
        if other:
            also = self.wrong_tokens(rows, other, with_prompts=False)
            wrong = {kind: mask | also[kind] for kind, mask in wrong.items()}
        usable = ~np.logical_or.reduce(list(wrong.values()))
        longest = np.maximum(tokens.lengths, other.lengths) if other else tokens.lengths
        columns = {
            "row": np.array([row.line for row in rows], np.int32),
            "file": np.array([found.file_number(row.source or found.name) for row in rows], np.int32),
            **hash_texts(rows),
            **self.measure(tokens, other),
        }
        found.parts.setdefault("all_lengths", []).append(longest)
        for name, values in columns.items():
            found.parts.setdefault(name, []).append(values[usable])
        for kind, mask in wrong.items():
            for index in np.flatnonzero(mask):
                found.report(kind, rows[index], self.detail(kind, int(longest[index])))
        for row, example in zip(rows, examples, strict=True):
            note_turns(row, example, found)
        for row in rows:
            if row.text is None and found.sample.rows < SAMPLED:
                answer = row.messages[row.last_reply]
                thinks = "reasoning_content" in answer
                asked = " ".join(message["content"] for message in row.prompt)
                found.sample.add(asked, answer["content"], thinks, calls=bool(answer.get("tool_calls")))

    def measure(self, tokens: FlatTokens, other: FlatTokens | None) -> dict[str, Array]:
        """Lengths and signatures of rows; `other`: of pairs, the sequences with the reply that is not preferred."""
        found = {
            "length": tokens.lengths,
            "trained": tokens.trained_counts,
            "answer_length": tokens.lengths - tokens.answer_starts,
            **self.sign(tokens, other),
        }
        if other:
            found["other_length"] = other.lengths - other.answer_starts
            found["length"] = tokens.lengths + other.lengths
            found["trained"] = tokens.trained_counts + other.trained_counts
        return found

    def sign(self, tokens: FlatTokens, other: FlatTokens | None) -> dict[str, Array]:
        """Signatures of prompts and answers, of pairs of both answers together."""
        prompt, answer = tokens.prompts(), tokens.answers()
        if other:
            answer = side_by_side(answer, other.answers())
        if not self.has_learnt:
            self.prompts.learn_common(*prompt)
            self.answers.learn_common(*answer)
            self.has_learnt = True
        return {"prompt_signature": self.prompts.sign(*prompt), "answer_signature": self.answers.sign(*answer)}

    def wrong_tokens(self, rows: list[Row], tokens: FlatTokens, with_prompts: bool = True) -> dict[str, Array]:
        """For each kind of problem that tokens can have, which rows have it."""
        bos = self.encoder.tokenizer.bos_token_id
        return {
            "too_long": tokens.lengths > self.sequence_length,
            "nothing_trained": tokens.trained_counts == 0,
            "no_stop": tokens.ends_without(self.encoder.stop_tokens),
            "double_bos": tokens.has_twice(bos) if bos is not None else np.zeros(len(rows), bool),
            "prompt_differs": self.prompt_differs(rows, tokens) if with_prompts else np.zeros(len(rows), bool),
        }

    def prompt_differs(self, rows: list[Row], tokens: FlatTokens) -> Array:
        """Rows whose tokens before the last trained part are not what transformers, and so vLLM, makes of the prompt.

        The text is compared in every row. Where it is the same, so are the tokens, because training tokenises the
        prompt apart, with the same tokenizer; in one of PROMPTS_TOKENISED rows that is verified too.
        """
        differs = np.zeros(len(rows), bool)
        asked: list[tuple[int, str]] = []
        for index, row in enumerate(rows):
            if row.text is None and tokens.trained_counts[index]:
                ours, sent = self.prompt_texts(row)
                differs[index] = ours != sent
                if index % PROMPTS_TOKENISED == 0:
                    asked.append((index, sent))
        texts = [sent for _, sent in asked]
        encodings = self.encoder.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for (index, _), encoding in zip(asked, encodings, strict=True):
            differs[index] |= encoding.ids != tokens.row(index)[: tokens.answer_starts[index]].tolist()
        return differs

    def prompt_texts(self, row: Row) -> tuple[str, str]:
        """The prompt of the row's last reply as our template renders it, and as transformers does."""
        template = self.encoder.template
        thinking = template.thinks(row)
        messages = template.adapt(row)[: row.last_reply]
        sent = self.encoder.tokenizer.apply_chat_template(
            messages, tools=row.tools, tokenize=False, add_generation_prompt=True, **template.kwargs(thinking)
        )
        return template.render(messages, row.tools, thinking, prompt=True), str(sent)

    def detail(self, kind: str, length: int) -> str:
        """What to say of a row of `length` tokens that has a problem."""
        over = length - self.sequence_length
        return f"{length:,} tokens, {over:,} too many" if kind == "too_long" else ""


def read_all(source: Source, format: str) -> Iterator[Row | BadRow]:
    """The rows of all files; a file that cannot be read as a whole is one bad row."""
    for path in source.files:
        try:
            yield from iter_rows(Source(str(path), (path,)), format)
        except DataError as error:
            yield whole_file(path, error)


def whole_file(path: Path, error: DataError) -> BadRow:
    """A file of which nothing can be used, as row 0 of it."""
    return BadRow(0, str(path), error, str(path))


def note_turns(row: Row, example: Example, found: Survey) -> None:
    """Note turns that are empty, are left out, or carry no loss."""
    left_out = len(row.messages) - row.last_reply - 1 if row.text is None else 0
    if left_out:
        found.report("left_out", row, f"{left_out} of {len(row.messages)} messages")
    if example.untrained_turns:
        found.report("untrained_turns", row, count_of(example.untrained_turns, "turn"))
    for number, message in enumerate(row.messages, 1):
        if is_empty(message):
            found.report("empty_turn", row, f"message {number}, {message['role']}")
            return


def is_empty(message: Message) -> bool:
    """Whether a message says and calls nothing."""
    return not message["content"].strip() and not message.get("tool_calls")


def hash_texts(rows: list[Row]) -> dict[str, Array]:
    """64-bit hashes of each row's texts: `whole` as they are; `prompt` (as `split` groups rows), `answer` and
    `question` without differences of case and spacing.

    A document has no prompt and no answer: both are 0.
    """
    found: dict[str, list[int]] = {"whole": [], "prompt": [], "answer": [], "question": []}
    for row in rows:
        found["whole"].append(digest(json.dumps([row.messages, row.rejected, row.tools, row.text], sort_keys=True)))
        asked = group_of(row) if row.text is None else 0
        replies = [said(row.messages[row.last_reply])] if row.text is None else []
        replies += [said(row.rejected)] if row.rejected else []
        found["prompt"].append(asked)
        found["answer"].append(answer_of(replies) if replies else 0)
        found["question"].append(question_of(asked, replies))
    return {name: np.array(values, np.uint64) for name, values in found.items()}


def answer_of(replies: list[str]) -> int:
    """A hash of what a row answers: its reply, or its two in their order."""
    return digest("\0".join(replies))


def question_of(prompt: int, replies: list[str]) -> int:
    """A hash of what has one answer alone: a prompt; of a pair, which of its two replies is preferred."""
    return prompt if len(replies) < 2 else digest("\0".join([str(prompt), *sorted(replies)]))


def flatten(examples: list[Example]) -> FlatTokens:
    """Their tokens in one array."""
    return FlatTokens.of(
        [example.input_ids for example in examples],
        [example.labels for example in examples],
        [example.row is not None and example.row.text is not None for example in examples],
    )


def side_by_side(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Parts of the same rows, as tokens and their offsets, joined row by row."""
    parts = [np.split(tokens, offsets[1:-1]) for tokens, offsets in (first, second)]
    joined = [np.concatenate(both) for both in zip(*parts, strict=True)]
    return np.concatenate(joined), np.concatenate([[0], np.cumsum([len(part) for part in joined])])


def said(message: Message) -> str:
    """Who says and calls what, without differences of case and spacing; thoughts aside."""
    calls = json.dumps(message["tool_calls"], sort_keys=True) if "tool_calls" in message else ""
    return f"{message['role']} {normalise(message['content'])} {calls}"


def digest(content: str | bytes) -> int:
    """64 bits of a hash; never 0."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little") | 1


def is_json(text: str) -> bool:
    """Whether `text` is a JSON object or list."""
    try:
        return text[:1] in ("{", "[") and bool(json.loads(text))
    except (ValueError, RecursionError):
        return False


def reason(row: BadRow) -> str:
    """What is wrong with a bad row, without its place, which stands beside it."""
    return row.error.message.removeprefix(row.where).lstrip(":, ").rstrip(".")


def kind_of(row: BadRow) -> str:
    """The kind of a bad row's problem, by the words of the error that refuses it."""
    if row.line == 0:
        return "file"
    for pattern, kind in KINDS_BY_WORDS:
        if re.search(pattern, row.error.message.removeprefix(row.where)):
            return kind
    return "structure"


KINDS_BY_WORDS = (
    ("preference row", "method"),
    ("special token", "special_tokens"),
    ("does not end an? ", "no_stop"),
    ("template", "template"),
    ("not UTF-8|not JSON|not CSV|damaged|not readable|cannot be read", "unreadable"),
)
