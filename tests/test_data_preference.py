"""Preference rows: every form they come in, what is refused and in which words, and what check, show and --fix say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from loraport.clients.errors import DataError
from loraport.clients.home import Home
from loraport.clients.rows import BadRow, Row, convert, detect, find_source, iter_rows
from loraport.train.data.check import Limits, Report, check
from loraport.train.data.cli import data as data_command
from loraport.train.data.fix import fix
from loraport.train.data.quick import quick_check
from loraport.train.data.store import open_store
from loraport.train.data.tokens import IGNORED, Encoder
from tests.models import make_tiny_base

ASKED, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "f"}}


def openai(preferred: Any = "y", other: Any = "n", asked: str = "q", **more: Any) -> dict[str, Any]:
    """A row in OpenAI's form."""
    outputs = [[{"role": "assistant", "content": text}] for text in (preferred, other)]
    given = {"messages": [{"role": "user", "content": asked}]} | more
    return {"input": given, "preferred_output": outputs[0], "non_preferred_output": outputs[1]}


@pytest.mark.parametrize(
    "record",
    [
        openai(),
        {"prompt": "q", "chosen": "y", "rejected": "n"},
        {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
        {"prompt": "q", "chosen": [YES], "rejected": "n"},
        {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
        {"prompt": "q", "chosen": [ASKED, YES], "rejected": [ASKED, NO], "messages": [ASKED, YES], "score_chosen": 8.0},
        {"prompt": json.dumps([ASKED]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])},
        {"chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: n"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " y".strip(), "rejected": "n"},
    ],
    ids=["openai", "texts", "messages", "mixed", "implicit", "ultrafeedback", "columns", "dialogues", "dialogue"],
)
def test_every_form_is_the_same_pair(record: dict[str, Any]) -> None:
    assert detect([record]) == "preference"
    row = convert(record, "preference", "f.jsonl", 4)
    assert (row.messages, row.rejected) == ([ASKED, YES], NO)
    assert (row.prompt, row.reference, row.where) == ([ASKED], "y", "f.jsonl, line 4")
    assert (row.swapped.messages, row.swapped.rejected) == ([ASKED, NO], YES)


def test_tools_and_earlier_turns_come_along() -> None:
    earlier = [ASKED, {"role": "assistant", "content": "earlier"}, {"role": "user", "content": "q2"}]
    calls = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    record = {"input": {"messages": earlier, "tools": [TOOL]}, "preferred_output": calls, "non_preferred_output": [NO]}
    row = convert(record, "preference", "", 1)
    assert row.tools == [TOOL] and row.messages[1]["weight"] == 0
    assert row.messages[-1]["tool_calls"][0]["function"]["name"] == "f" and row.rejected == NO


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (openai("y", " y "), "the preferred and the non-preferred output are the same"),
        (openai("y", ""), "the non-preferred output is empty"),
        (openai(" ", "n"), "the preferred output is empty"),
        (openai("y", None), "the non-preferred output is empty"),
        (openai("y", 5), "message 2 has content of type int"),
        (openai(messages=[]), "the input is not a list with messages in it"),
        (openai(messages=[ASKED, YES]), "the input ends with the assistant"),
        (openai() | {"input": "q"}, "'input' is not an object with 'messages'"),
        (openai() | {"preferred_output": [YES, ASKED, YES]}, "the preferred output has 3 messages"),
        (openai() | {"preferred_output": []}, "the preferred output is empty"),
        ({"prompt": "q", "chosen": [{"role": "tool", "content": "y"}], "rejected": [NO]}, "'prompt' is not what"),
        ({"chosen": [ASKED, YES], "rejected": [{"role": "user", "content": "other"}, NO]}, "differ before their last"),
        (
            {"prompt": "z", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
            "'prompt' is not what the two conversations",
        ),
        ({"chosen": "y", "rejected": "n"}, "is text, and there is no 'prompt' beside it"),
        ({"chosen": [YES], "rejected": [NO]}, "there is no input before the outputs"),
        ({"prompt": " ", "chosen": "y", "rejected": "n"}, "the prompt is empty"),
        ({"prompt": "q", "chosen": "y"}, "no key 'rejected'"),
    ],
    ids=lambda given: given[:40] if isinstance(given, str) else "",
)
def test_what_is_no_pair_is_refused_in_words(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as refused:
        convert(record, "preference", "f.jsonl", 3)
    assert refused.value.message.startswith("f.jsonl, line 3: ") and words in refused.value.message
    assert refused.value.hint


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.load(make_tiny_base(tmp_path_factory.mktemp("preference") / "base"))


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def many(count: int = 12) -> list[dict[str, Any]]:
    return [openai(f"reply {n}", f"other answer number {n}", asked=f"What about {n}?") for n in range(count)]


def test_a_pair_is_two_sequences_with_one_prompt(encoder: Encoder, tmp_path: Path, home: Home) -> None:
    path = write(tmp_path / "f.jsonl", openai("yes", "not at all"), openai())
    example, _ = encoder.encode_many(iter_rows(path))
    assert not isinstance(example, BadRow) and example.rejected is not None and example.row is not None
    prompt = encoder.prompt_of(example.row)
    texts = []
    for each in (example, example.rejected):
        assert each.input_ids[: len(prompt)].tolist() == prompt and (each.labels[: len(prompt)] == IGNORED).all()
        texts.append(encoder.tokenizer.decode([token for token in each.labels.tolist() if token != IGNORED]))
    assert texts == ["yes<|im_end|>", "not at all<|im_end|>"]
    store = open_store(find_source(path), "auto", encoder, home, method="dpo")
    item, cut = store[0], len(example.input_ids)
    assert item["chosen"] == cut == store.chosen[0]
    assert item["input_ids"][:cut].tolist() == example.input_ids.tolist()
    assert item["labels"][cut:].tolist() == example.rejected.labels.tolist()
    assert store.lengths[0] == cut + len(example.rejected.input_ids) and store.longest_sequences[0] == max(
        cut, len(example.rejected.input_ids)
    )
    assert store.trained[0] == example.trained_tokens + example.rejected.trained_tokens
    assert store.rows([1])[0].rejected == NO


def test_a_bad_reply_makes_the_pair_bad_and_no_other(encoder: Encoder, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", openai(), openai("y<|im_end|>"), openai("y", "n<|im_end|>"), openai("a", "b"))
    found = list(encoder.encode_many(iter_rows(path)))
    assert [isinstance(each, BadRow) for each in found] == [False, True, True, False]
    refused = [each.error.message for each in found if isinstance(each, BadRow)]
    assert "with its non-preferred output" not in refused[0]
    assert "line 3: with its non-preferred output, message 2 contains '<|im_end|>'" in refused[1]
    assert [each.line for each in found] == [1, 2, 3, 4]


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}<think>\n{{ message.reasoning_content | default('') }}\n</think>\n\n"
    "{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("thinking", [(False, False), (True, False), (False, True)])
def test_both_replies_are_rendered_in_one_mode(thinking: tuple[bool, bool], tmp_path: Path) -> None:
    encoder = Encoder.load(make_tiny_base(tmp_path / "base", THINKING))
    record = openai()
    for key, thinks in zip(("preferred_output", "non_preferred_output"), thinking, strict=True):
        if thinks:
            record[key][0]["reasoning_content"] = "hm"
    example = encoder.encode(convert(record, "preference", "", 1))
    assert example.rejected and example.thinking == example.rejected.thinking == any(thinking)
    starts = [int(np.flatnonzero(each.labels != IGNORED)[0]) for each in (example, example.rejected)]
    assert starts[0] == starts[1]
    assert example.input_ids[: starts[0]].tolist() == example.rejected.input_ids[: starts[0]].tolist()


def look(
    path: Path, encoder: Encoder, method: str = "auto", evaluation: Path | None = None, limit: int = 512
) -> Report:
    other = find_source(evaluation) if evaluation else None
    return check(find_source(path), other, encoder, Limits(limit), method=method)


def kinds(report: Report) -> dict[str, list[int]]:
    return {each.kind: [place.row for place in each.places] for each in report.findings}


def test_the_check_knows_pairs(encoder: Encoder, tmp_path: Path) -> None:
    rows = many()
    rows[3] = rows[1]  # a copy
    rows[4] = openai("other answer number 2", "reply 2", asked="What about 2?")  # the other way round
    rows[5] = openai("reply 2", "a third thing altogether, and long", asked="What about 2?")  # another pair of a prompt
    rows[6] = openai("so", "because " * 60)
    rows[7] = {"prompt": "q", "chosen": "y", "rejected": "y"}
    found = look(write(tmp_path / "f.jsonl", *rows), encoder, limit=64)
    listed = kinds(found)
    assert listed["duplicate"] == [4] and listed["contradiction"] == [3, 5]
    assert listed["too_long"] == [7] and listed["structure"] == [8]
    assert "near_duplicate" not in listed
    assert "1 choice between two replies has been made both ways, in 2 rows." in [
        each.message for each in found.findings
    ]
    assert (found.verdict.task, found.train.pairs) == ("preference", True)
    assert "preferences between replies" in found.verdict.message


def test_length_is_noticed_where_it_tells_the_preferred_reply(encoder: Encoder, tmp_path: Path) -> None:
    (found,) = [each for each in look(write(tmp_path / "f.jsonl", *many()), encoder).findings if each.kind == "longer"]
    assert found.message == "the preferred output is the shorter one in 100% of the rows." and found.level == "note"
    mixed = [openai("a b c", "d", f"{n}?") if n % 2 else openai("d", "a b c", f"{n}?") for n in range(12)]
    assert "longer" not in kinds(look(write(tmp_path / "g.jsonl", *mixed), encoder))


@pytest.mark.parametrize(("method", "wrong"), [("auto", [2]), ("dpo", [2]), ("sft", [1, 3])])
def test_rows_of_another_method_are_errors(method: str, wrong: list[int], encoder: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    chat = {"messages": [ASKED, YES]}
    for name, record in (("a", openai()), ("b", chat), ("c", openai("v", "w", "third"))):
        write(folder / f"{name}.jsonl", record)
    (finding,) = [each for each in look(folder, encoder, method).findings if each.kind == "method"]
    files = [Path(place.file).name for place in finding.places]
    assert files == ["abc"[number - 1] + ".jsonl" for number in wrong]


def test_evaluation_rows_are_of_the_same_kind(encoder: Encoder, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", {"messages": [ASKED, YES]})
    report = look(write(tmp_path / "f.jsonl", *many()), encoder, evaluation=held)
    (finding,) = [each for each in report.findings if each.kind == "method"]
    assert [place.data for place in finding.places] == ["eval"]


def test_a_run_warns_of_what_the_check_finds(encoder: Encoder, tmp_path: Path, home: Home) -> None:
    rows = [*many(), many()[1], openai("other answer number 2", "reply 2", asked="What about 2?")]
    path = write(tmp_path / "f.jsonl", *rows)
    slow = look(path, encoder)
    quick = quick_check(open_store(find_source(path), "auto", encoder, home), None, encoder)
    for kind in ("duplicate", "contradiction", "longer", "few_rows"):
        assert [each.message for each in slow.findings if each.kind == kind] == [
            each.message for each in quick.findings if each.kind == kind
        ], kind
    assert kinds(quick)["contradiction"] == [3, 14]


def test_fix_writes_pairs(encoder: Encoder, tmp_path: Path) -> None:
    rows = many()
    rows[2] = openai("y", "<|im_end|> n", tools=[TOOL])
    rows[5] = openai("same", "same")
    fixed = fix(find_source(write(tmp_path / "f.jsonl", *rows)), None, encoder, Limits(512), tmp_path / "out.jsonl")
    assert fixed.kept == 11
    found = [row for row in iter_rows(tmp_path / "out.jsonl") if isinstance(row, Row)]
    assert found[2].rejected == NO and found[2].tools and found[0].reference == "reply 0"


def test_show_shows_both(encoder: Encoder, tmp_path: Path) -> None:
    base, path = encoder.tokenizer.name_or_path, write(tmp_path / "f.jsonl", openai("yes", "no"))
    given = ["show", str(path), "--model", base]
    document = json.loads(CliRunner().invoke(data_command, [*given, "--json"]).stdout)
    assert document["spans"][0]["text"] == "yes<|im_end|>"
    assert document["non_preferred"]["spans"][0]["text"] == "no<|im_end|>"
    words = CliRunner().invoke(data_command, given).stderr
    assert "preferred output: " in words and "non-preferred output: " in words
