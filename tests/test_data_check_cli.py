"""The commands as a user calls them: exit codes, one JSON document, --fix, and `loraport data show`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loraport_cli
from tests.fake_hub import FakeHub
from tests.test_data_check import ask, row, write


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run `loraport data ...` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["loraport", "data", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        loraport_cli.main()
    return int(ended.value.code or 0)


BAD = [
    ask("What is the first of the month called?", "kalends<|im_end|>"),
    ask("What does <|im_start|> do?", "It begins a turn."),
    row("user", "and?", "assistant", "so", "user", "", "assistant", ""),
    row("system", "", "user", "empty system", "assistant", "fine"),
    ask("twice?", "yes"),
    ask("twice?", "yes"),
    ask("asked again?", "yes"),
    ask("word " * 900, "too long"),
    row("user", "nobody answers"),
    ask("one?", "a"),
    ask("one?", "b"),
    "{",
]


def test_fix_writes_a_copy_that_passes(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, held_out = write(tmp_path / "rows.jsonl", BAD), write(tmp_path / "eval.jsonl", [ask("Asked  again?", "no")])
    clean = tmp_path / "clean.jsonl"
    common = ("--model", tiny_base, "--eval-data", held_out, "--json")
    assert call(monkeypatch, "check", rows, *common) == 3
    out = capsys.readouterr()
    kinds = {finding["kind"] for finding in json.loads(out.out)["findings"] if finding["level"] == "error"}
    assert kinds == {"unreadable", "structure", "special_tokens", "too_long", "leak"}
    assert "error: " in out.err and "--fix" in out.err

    assert call(monkeypatch, "check", rows, *common, "--fix", clean) == 0
    fixed = json.loads(capsys.readouterr().out)["fixed"]
    numbers = {
        reason: [place["row"] for place in found["rows"]]
        for part in ("changed", "dropped")
        for reason, found in fixed[part].items()
    }
    assert numbers == {
        "token_removed": [1],
        "token_broken": [2],
        "turn_removed": [3, 4],
        "duplicate": [6],
        "leak": [7],
        "too_long": [8],
        "structure": [9],
        "unreadable": [12],
    }
    kept = [json.loads(line)["messages"] for line in clean.read_text().splitlines()]
    assert len(kept) == fixed["rows"] == 7
    assert kept[0][1]["content"] == "kalends" and kept[1][0]["content"] == "What does < |im_start|> do?"
    assert [len(messages) for messages in kept[2:4]] == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir() if "clean" in path.name) == ["clean.jsonl"]

    assert call(monkeypatch, "check", clean, *common) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_fix_overwrites_nothing_and_leaves_nothing(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", ["{", row("user", "nobody answers")])
    there = write(tmp_path / "there.jsonl", [ask("a", "b")])
    before = there.read_text()
    assert call(monkeypatch, "check", rows, "--model", tiny_base, "--fix", there) == 2
    assert "exists already" in capsys.readouterr().err
    assert call(monkeypatch, "check", rows, "--model", tiny_base, "--fix", there, "--force") == 3
    assert "no row of" in capsys.readouterr().err
    assert there.read_text() == before and len(list(tmp_path.iterdir())) == 2


def test_fix_never_replaces_the_rows_it_reads(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", ["{", ask("a", "b")])
    held = write(tmp_path / "held.jsonl", [ask("c", "d")])
    before = rows.read_text() + held.read_text()
    (tmp_path / "link.jsonl").symlink_to(rows)
    for out in (rows, held, tmp_path / "link.jsonl"):
        given = (rows, "--eval-data", held, "--model", tiny_base, "--fix", out, "--force")
        assert call(monkeypatch, "check", *given) == 2
        assert "--fix would overwrite the rows in" in capsys.readouterr().err
    assert rows.read_text() + held.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "none.jsonl"), "error: model must be given."),
        (("check", "none.jsonl", "--model", "."), "error: there is no data file none.jsonl."),
        (("check", "none.jsonl", "--task", "magic"), "error: there is no task 'magic'."),
        (("check", "none.jsonl", "--fix", "out.csv"), "error: --fix writes JSONL"),
        (("show", "--row", "x"), "error: model and data must be given."),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_configuration_of_training_is_taken(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "rows.jsonl", [ask("a" * 60, "b"), ask("c", "d")])
    (tmp_path / "run.yaml").write_text(f"model: {tiny_base}\ndata: rows.jsonl\nsequence_length: 20\n")
    assert call(monkeypatch, "check", "--config", tmp_path / "run.yaml", "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert document["sequence_length"] == 20
    assert [each["row"] for each in document["findings"][0]["rows"]] == [1]


def test_the_report_for_people_is_one_page(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "check", write(tmp_path / "rows.jsonl", BAD), "--model", tiny_base) == 3
    said = capsys.readouterr()
    assert said.out == ""
    for words in (
        "12 rows, ",
        "tokens a row: half up to",
        "\nerrors\n",
        "\nwarnings\n",
        "row 12: not JSON",
        "verdict: ",
    ):
        assert words in said.err, words


def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = call(monkeypatch, "show", *arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_show_marks_what_is_trained(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", [ask("a", "b"), "", ask("naïve 日本", "één\n[bold] 👍")])
    code, _, said = show(monkeypatch, capsys, rows, "--model", tiny_base, "--row", "3")
    assert code == 0
    assert "<|im_start|>" in said and "generation stops" in said
    marked = said.split("⟦")[-1].split("⟧")[0].replace("│", "").replace("↵\n", "\n")
    assert marked == "één\n[bold] 👍<|im_end|>"


def test_show_as_json_adds_up(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", [ask("naïve 日本", "één 👍")])
    code, out, _ = show(monkeypatch, capsys, rows, "--model", tiny_base, "--json")
    document = json.loads(out)
    assert code == 0
    assert sum(len(piece["ids"]) for piece in document["pieces"]) == document["tokens"]
    assert sum(len(piece["ids"]) for piece in document["pieces"] if piece["trained"]) == document["trained_tokens"]
    (span,) = document["spans"]
    assert span["text"] == "één 👍<|im_end|>" and span["stops"] and span["last"] == "<|im_end|>"


@pytest.mark.parametrize(
    ("wanted", "code", "says"), [("9", 2, "has no row 9"), ("x", 2, "no row number"), ("2", 3, "JSON")]
)
def test_show_of_a_row_that_is_not_there_or_bad(
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wanted: str,
    code: int,
    says: str,
) -> None:
    rows = write(tmp_path / "rows.jsonl", [ask("a", "b"), "{"])
    ended, _, said = show(monkeypatch, capsys, rows, "--model", tiny_base, "--row", wanted)
    assert ended == code and says in said


def test_the_group_imports_nothing_heavy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "loraport.train.build.cli", raising=False)
    assert call(monkeypatch, "--help") == 0
    assert "build" in capsys.readouterr().out and "loraport.train.build.cli" not in sys.modules


def test_a_model_on_the_hub_is_checked_against_without_its_weights(tmp_path: Path, tiny_base: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    with FakeHub() as hub:
        hub.add("org/tiny", files)
        line = [sys.executable, "-m", "loraport_cli", "data", "check", "--json", "--model", "org/tiny"]
        line.append(str(write(tmp_path / "rows.jsonl", [ask("a", "b")])))
        variables = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url}
        done = subprocess.run(line, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["usable_rows"] == 1
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
