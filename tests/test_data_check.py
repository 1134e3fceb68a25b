"""`loraport data check`: each kind of finding, on real tokens, with row numbers; what relates rows; the verdict."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraport.clients.home import Home
from loraport.clients.rows import find_source
from loraport.train.data import check_report, quick, similar
from loraport.train.data.check import Limits, Report, check
from loraport.train.data.flat import FlatTokens
from loraport.train.data.quick import quick_check, say_warnings, warnings_of
from loraport.train.data.store import open_store
from loraport.train.data.tokens import IGNORED, Encoder
from tests.models import CHATML, make_tiny_base

LONG = "The quick brown fox jumps over the lazy dog while {} quiet birds watch from the old stone wall near the river."


@pytest.fixture(scope="module")
def encoder(tiny_base: Path) -> Encoder:
    return Encoder.load(tiny_base)


def row(*pairs: str, **more: Any) -> dict[str, Any]:
    """A row of role, content, role, content, ..."""
    messages = [{"role": r, "content": c} for r, c in zip(pairs[::2], pairs[1::2], strict=True)]
    return {"messages": messages, **more}


def ask(question: str, answer: str) -> dict[str, Any]:
    return row("user", question, "assistant", answer)


def write(path: Path, rows: list[Any]) -> Path:
    """A file of rows; a string is a line as it is."""
    lines = (each if isinstance(each, str) else json.dumps(each) for each in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(tmp_path: Path, encoder: Encoder, rows: list[Any], held_out: list[Any] | None = None, **more: Any) -> Report:
    limits = Limits(more.pop("sequence_length", 1000), more.pop("capacity", None))
    evaluation = find_source(write(tmp_path / "eval.jsonl", held_out)) if held_out else None
    return check(find_source(write(tmp_path / "rows.jsonl", rows)), evaluation, encoder, limits, **more)


def found(report: Report, kind: str) -> list[tuple[str, int]]:
    """Split and number of the rows of a kind of finding."""
    return [(place.data, place.row) for each in report.findings if each.kind == kind for place in each.places]


GOOD = ask("hi", "hello")


@pytest.mark.parametrize(
    ("bad", "kind", "detail"),
    [
        ("{", "unreadable", "not JSON"),
        ("[1]", "structure", "a list, not an object"),
        (row("user", "a"), "structure", "no assistant turn"),
        (row("user", "a", "robot", "b"), "structure", "message 2 has the role 'robot'"),
        (ask("a", " "), "structure", "an assistant turn is empty"),
        (ask("a", "b<|im_end|>"), "special_tokens", "message 2 contains '<|im_end|>'"),
        (ask("long " * 500, "b"), "too_long", "tokens, "),
        (row("system", " ", "user", "a", "assistant", "b"), "empty_turn", "message 1, system"),
        (row("user", "a", "assistant", "b", "user", "c"), "left_out", "1 of 3 messages"),
    ],
)
def test_what_is_wrong_with_one_row(tmp_path: Path, encoder: Encoder, bad: Any, kind: str, detail: str) -> None:
    report = run(tmp_path, encoder, [GOOD, "", bad, ask("who?", "me")], sequence_length=100)
    assert found(report, kind) == [("train", 3)]
    (finding,) = (each for each in report.findings if each.kind == kind)
    assert detail in finding.places[0].detail
    assert report.train.read == 3 and finding.message.startswith("1 row ")


def test_a_file_that_is_damaged_does_not_hide_the_others(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows/a.jsonl", [{"no": "format"}])
    write(tmp_path / "rows/b.jsonl", [GOOD])
    report = check(find_source(tmp_path / "rows"), None, encoder, Limits(100))
    assert report.train.read == 1 and report.train.usable == 1
    assert [each.kind for each in report.errors] == ["file"]
    assert [place.file for each in report.errors for place in each.places] == [str(tmp_path / "rows/a.jsonl")]


def test_what_truncation_would_lose_is_counted(tmp_path: Path, encoder: Encoder) -> None:
    report = run(tmp_path, encoder, [GOOD, ask("a " * 60, "b")], sequence_length=50)
    over = int(report.train.column("all_lengths").max()) - 50
    assert f"together by {over}" in report.errors[0].message


def test_templates_that_do_not_serve_are_found_in_every_row(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    encoder = Encoder.load(make_tiny_base(tmp_path / "strict", strict))
    report = run(tmp_path, encoder, [GOOD, row("system", "s", "user", "a", "assistant", "b")])
    assert found(report, "template") == [("train", 2)]
    endless = CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}")
    encoder = Encoder.load(make_tiny_base(tmp_path / "endless", endless))
    assert found(run(tmp_path, encoder, [GOOD, ask("b", "c")]), "no_stop") == [("train", 1), ("train", 2)]


def test_a_prompt_that_inference_renders_otherwise_is_found(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a tokenizer's own apply_chat_template does more than the template says."""

    def shouting(messages: Any, **options: Any) -> str:
        return original(messages, **options).replace("who", "WHO")

    original = encoder.tokenizer.apply_chat_template
    monkeypatch.setattr(encoder.tokenizer, "apply_chat_template", shouting)
    assert found(run(tmp_path, encoder, [GOOD, ask("who?", "me")]), "prompt_differs") == [("train", 2)]


def flat(*rows: tuple[list[int], list[bool]]) -> FlatTokens:
    labels = [np.where(trained, ids, IGNORED) for ids, trained in rows]
    return FlatTokens.of([np.array(ids) for ids, _ in rows], labels, [False] * len(rows))


def test_the_tokens_of_many_rows_at_once() -> None:
    tokens = flat(
        ([5, 6, 7, 9], [False, True, False, True]), ([5, 5, 9], [False, False, False]), ([9, 8], [True, True])
    )
    assert tokens.trained_counts.tolist() == [2, 0, 1]  # a first token is predicted from nothing
    assert tokens.answer_starts.tolist() == [3, 3, 1]
    assert tokens.ends_without(frozenset({9})).tolist() == [True, False, True]
    assert tokens.ends_without(frozenset({6, 8, 9})).tolist() == [False, False, False]
    assert tokens.has_twice(5).tolist() == [False, True, False]
    assert tokens.has_twice(9).tolist() == [False, False, False], "the end of a row and the begin of the next"
    assert [part.tolist() for part in tokens.prompts()] == [[5, 6, 7, 5, 5, 9, 9], [0, 3, 6, 7]]
    assert [part.tolist() for part in tokens.answers()] == [[9, 8], [0, 1, 1, 2]]


def test_copies_contradictions_and_their_first_row(tmp_path: Path, encoder: Encoder) -> None:
    rows = [ask("a?", "1"), ask("b?", "2"), ask("a?", "1"), ask("A?  ", "3"), ask("b?", " 2")]
    report = run(tmp_path, encoder, rows)
    assert found(report, "duplicate") == [("train", 3)]
    assert found(report, "contradiction") == [("train", 1), ("train", 4)]
    assert found(report, "near_duplicate") == [("train", 5)]
    assert report.verdict.figures["different_rows"] == 3
    assert not report.errors


def test_leakage_is_an_error(tmp_path: Path, encoder: Encoder) -> None:
    rows = [ask("a?", "1"), ask("b?", "2"), ask("c?", "3")]
    report = run(tmp_path, encoder, rows, [ask("z?", "1"), ask("B?", "other")])
    assert [finding.kind for finding in report.errors] == ["leak"]
    assert found(report, "leak") == [("train", 2)]
    assert report.errors[0].places[0].detail == "as row 2 of the evaluation"


def test_near_copies_share_prompt_and_answer(tmp_path: Path, encoder: Encoder) -> None:
    other = ["seven", "nine", "many", "eleven"]
    rows = [ask(f"{number} {number * 7} unlike {'abcdefghij'[number % 10] * 9}", str(number)) for number in range(40)]
    rows += [ask(LONG.format(word) * 2, "yes") for word in other] + [ask(LONG.format("three") * 2, "no, never")]
    held_out = [ask(LONG.format("no") * 2, "yes"), ask("something else", "yes")]
    report = run(tmp_path, encoder, rows, held_out)
    assert found(report, "near_duplicate") == [("train", 42), ("train", 43), ("train", 44)]
    assert found(report, "near_leak") == [("train", 41), ("train", 42), ("train", 43), ("train", 44)]
    assert not report.errors


def test_an_instruction_that_all_rows_share_makes_no_copies(tmp_path: Path, encoder: Encoder) -> None:
    rows = [ask(LONG.format("seven") * 3 + f" Question {number**5 * 7919}?", "yes") for number in range(1, 41)]
    assert found(run(tmp_path, encoder, rows), "near_duplicate") == []


def test_estimated_similarity_is_that_of_the_shingles() -> None:
    random = np.random.default_rng(1)
    base = random.integers(0, 10_000, 300).astype(np.int32)
    changed = base.copy()
    changed[:20] += 1
    tokens, offsets = np.concatenate([base, changed, base[::-1]]), np.array([0, 300, 600, 900])
    signatures = similar.Signer(2000).sign(tokens, offsets)
    hashes, owner = similar.shingles(tokens, offsets)
    first, second, third = (set(hashes[owner == index].tolist()) for index in range(3))
    true = len(first & second) / len(first | second)
    assert similar.similarity(signatures[:1], signatures[1:2])[0] == pytest.approx(true, abs=0.04)
    assert similar.similarity(signatures[:1], signatures[2:3])[0] < 0.01 and not first & third


def test_pairs_are_found_within_and_between() -> None:
    random = np.random.default_rng(2)
    rows = [random.integers(0, 50_000, 120).astype(np.int32) for _ in range(300)]
    for index in range(100):
        rows[200 + index] = rows[index].copy()
        rows[200 + index][index] = 60_000
    offsets = np.arange(301) * 120
    signatures = similar.Signer(similar.PROMPT_VALUES).sign(np.concatenate(rows), offsets)
    within = similar.similar_within(signatures)
    assert len(within) >= 98 and all(later == earlier + 200 for later, earlier in within)
    between = similar.similar_between(signatures[200:], signatures[:200])
    assert len(between) >= 98 and all(query == row for query, row in between)


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda n: ask(f"is {n} even?", "yes" if n % 2 == 0 else "no"), "classification"),
        (lambda n: ask(f"what is {n}?", json.dumps({"value": n})), "format"),
        (lambda n: ask(f"copy: alpha{n} beta", f"alpha{n}"), "format"),
        (lambda n: ask(f"write {n}", f"```python\nprint({n})\n```"), "code"),
        (lambda n: ask(f"solve {n}", f"Because of {n * n}, it is so in the end, {n + 1} times."), "qa"),
        (lambda n: {"text": f"Document {n} says so."}, "text"),
    ],
)
def test_the_task_is_told_by_the_answers(tmp_path: Path, encoder: Encoder, make: Any, task: str) -> None:
    report = run(tmp_path, encoder, [make(number) for number in range(120)])
    assert report.verdict.task == task and report.verdict.told_by
    assert report.verdict.enough is (task in ("classification", "format"))
    assert ("few_rows" in [finding.kind for finding in report.findings]) is not report.verdict.enough


def test_the_task_can_be_given_and_what_speaks_against_the_rows(tmp_path: Path, encoder: Encoder) -> None:
    rows = [ask(f"is {number} a number?", "yes") for number in range(20)]
    report = run(tmp_path, encoder, rows, task="reasoning", capacity=5)
    assert report.verdict.told_by == "--task"
    assert {"few_rows", "few_answers", "capacity"} <= {finding.kind for finding in report.findings}


def test_the_document_lists_all_rows_up_to_a_bound(tmp_path: Path, encoder: Encoder) -> None:
    document = run(tmp_path, encoder, [GOOD] * 1200).document()
    (copies,) = (each for each in document["findings"] if each["kind"] == "duplicate")
    assert copies["count"] == 1199 and len(copies["rows"]) == 1000
    assert copies["rows"][0] == {
        "data": "train",
        "file": str(tmp_path / "rows.jsonl"),
        "row": 2,
        "detail": "as row 1",
    }
    assert document["ok"] and document["train"]["lengths"]["p50"] == document["train"]["lengths"]["max"]
    json.dumps(document)


def test_a_histogram_bounds_its_lines_and_counts_every_row() -> None:
    lengths = np.concatenate([np.arange(100, 300), [9_000]])
    lines = check_report.histogram(lengths)
    assert len(lines) <= 11 and lines[-1].split()[1:3] == ["and", "more"]
    assert sum(int(line.replace("and more", "").split()[1]) for line in lines) == 201
    assert check_report.histogram(np.array([7]))[0].split()[1] == "1"


def test_a_run_is_warned_from_its_tokens(
    tmp_path: Path, encoder: Encoder, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quick check reads the tokens that training reads, and finds what the full one finds."""
    rows = [ask("a?", "1"), "", ask("a?", "1"), ask("b?", "2"), ask("b? ", "3"), ask("c?", "4"), ask("C?", "5")]
    source = find_source(write(tmp_path / "rows.jsonl", rows))
    store = open_store(source, "auto", encoder, home)
    report = quick_check(store.subset([0, 1, 2, 3, 4]), store.subset([5]), encoder)
    assert found(report, "leak") == [("train", 6)]
    assert found(report, "duplicate") == [("train", 3)]
    assert found(report, "contradiction") == [("train", 4), ("train", 5)]
    warned = warnings_of(store.subset([0, 1, 2, 3, 4]), store.subset([5]), encoder)
    say_warnings(warned)
    assert "warning: 1 training row asks what the evaluation asks (row 6).\n" in capsys.readouterr().err
    full = check(source, None, encoder, Limits(1000))
    tokens = quick_check(store, None, encoder)
    assert tokens.verdict == full.verdict
    assert tokens.findings == full.findings


def test_the_warnings_of_a_run_are_kept_for_the_same_rows(
    tmp_path: Path, encoder: Encoder, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [ask("a?", "1"), ask("a?", "1"), ask("b?", "2"), ask("b? ", "3"), ask("c?", "4")]
    store = open_store(find_source(write(tmp_path / "rows.jsonl", rows)), "auto", encoder, home)
    looked: list[int] = []
    monkeypatch.setattr(quick, "quick_check", lambda *of: looked.append(len(of[0])) or quick_check(*of))
    first = warnings_of(store.subset([0, 1, 2]), store.subset([3]), encoder)
    assert first and warnings_of(store.subset([0, 1, 2]), store.subset([3]), encoder) == first
    assert looked == [3]
    assert warnings_of(store.subset([0, 2]), store.subset([1]), encoder) != first and looked == [3, 2]
    for path in store.folder.glob("warnings-*.json"):
        path.write_text("[")  # cut off
    assert warnings_of(store.subset([0, 1, 2]), store.subset([3]), encoder) == first and looked == [3, 2, 3]


def test_documents_are_known_by_their_tokens(tmp_path: Path, encoder: Encoder, home: Home) -> None:
    rows = [{"text": f"Document {number} says so."} for number in range(5)]
    store = open_store(find_source(write(tmp_path / "rows.jsonl", [*rows, rows[0]])), "auto", encoder, home)
    report = quick_check(store, None, encoder)
    assert report.verdict.task == "text" and found(report, "duplicate") == [("train", 6)]
