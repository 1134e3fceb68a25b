"""Tokens on disk: the same as in memory, made once, nothing left of what failed; and what is held out of training."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loraport.clients.errors import DataError, ResourceError
from loraport.clients.home import Home
from loraport.clients.rows import Row, find_source, read_rows
from loraport.train.data import store as module
from loraport.train.data.split import group_of, split
from loraport.train.data.store import TokenStore, open_store, refuse_long
from loraport.train.data.tokens import Encoder
from tests.models import CHATML, make_tiny_base


@pytest.fixture(scope="module")
def encoder(tiny_base: Path) -> Encoder:
    """The tiny base's."""
    return Encoder.load(tiny_base)


def write_rows(path: Path, count: int, reply: str = "no.") -> Path:
    """Rows with different prompts."""
    rows = (
        {
            "messages": [
                {"role": "user", "content": f"Is {n} odd?"},
                {"role": "assistant", "content": reply * (n % 5 + 1)},
            ]
        }
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(path: Path, encoder: Encoder, home: Home) -> TokenStore:
    """The store of a file's rows."""
    return open_store(find_source(path), "auto", encoder, home)


def test_a_store_holds_what_the_encoder_makes(tmp_path: Path, encoder: Encoder, home: Home) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 600)
    store, rows = make(path, encoder, home), read_rows(path)
    examples = [encoder.encode(row) for row in rows]
    assert len(store) == 600
    assert store.lengths.tolist() == [len(example.input_ids) for example in examples]
    assert store.trained.tolist() == [example.trained_tokens for example in examples]
    for index in (0, 7, 599):
        assert store[index]["input_ids"].tolist() == examples[index].input_ids.tolist()
        assert store[index]["labels"].tolist() == examples[index].labels.tolist()
        assert store[index]["labels"].dtype == np.int32
    assert store.about["tokens"] == sum(store.lengths) and store.about["thinking_rows"] == 0
    assert store.rows([599, 7]) == [rows[599], rows[7]]
    part = store.subset([5, 9])
    assert (len(part), part.lengths.tolist(), part.rows([1])) == (2, store.lengths[[5, 9]].tolist(), [rows[9]])
    assert part[1]["input_ids"].tolist() == examples[9].input_ids.tolist()
    copied = pickle.loads(pickle.dumps(store))
    assert copied[3]["input_ids"].tolist() == examples[3].input_ids.tolist()


def test_a_store_is_made_once_for_the_same_rows_and_template(
    tmp_path: Path, encoder: Encoder, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    build = module.build
    monkeypatch.setattr(module, "build", lambda store, *rest: (built.append(store.folder), build(store, *rest)))
    path = write_rows(tmp_path / "rows.jsonl", 3)
    make(path, encoder, home)
    assert make(path.rename(tmp_path / "moved.jsonl"), encoder, home).rows([0])[0].line == 1
    assert len(built) == 1
    make(write_rows(tmp_path / "rows.jsonl", 3, reply="yes."), encoder, home)
    assert len(built) == 2
    other = Encoder.load(make_tiny_base(tmp_path / "base", CHATML.replace("assistant\n", "assistant: ")))
    make(tmp_path / "moved.jsonl", other, home)
    assert len(set(built)) == 3


def kept(home: Home) -> list[str]:
    """What lies in the cache."""
    return sorted(path.name for path in (home.cache / "tokens").iterdir())


def test_a_bad_row_leaves_nothing(tmp_path: Path, encoder: Encoder, home: Home) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 300)
    with path.open("a") as handle:
        handle.write('{"messages": []}\n')
    with pytest.raises(DataError, match="line 301: 'messages' is not a list"):
        make(path, encoder, home)
    assert kept(home) == []


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, encoder: Encoder, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 3)
    with monkeypatch.context() as patch:
        patch.setattr(module, "DISK_PER_BYTE", 1e15)
        with pytest.raises(ResourceError, match=r"the token cache of .* needs .* MiB on disk"):
            make(path, encoder, home)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "note", fail)
    with pytest.raises(ResourceError, match="no disk space left while writing"):
        make(path, encoder, home)
    assert kept(home) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path, encoder: Encoder, home: Home) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f".partial-{ended.pid}-x", f".partial-{os.getpid()}-x", "0" * 32):
        (home.cache / "tokens" / name).mkdir(parents=True)
    os.utime(home.cache / "tokens" / ("0" * 32), (0, 0))
    store = make(write_rows(tmp_path / "rows.jsonl", 3), encoder, home)
    assert kept(home) == [f".partial-{os.getpid()}-x", store.folder.name]


def test_long_rows_are_counted_and_named(tmp_path: Path, encoder: Encoder, home: Home) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 50)
    store = make(path, encoder, home)
    longest = int(store.lengths.max())
    refuse_long(store, longest)
    with pytest.raises(
        DataError, match=r"10 of 50 rows are longer than \d+ tokens \(.*rows.jsonl, line 5; .*; ...\)"
    ) as e:
        refuse_long(store, int(np.sort(store.lengths)[-11]))
    assert f"--sequence-length {longest}" in e.value.hint


def test_rows_that_changed_since_are_not_mixed_up(tmp_path: Path, encoder: Encoder, home: Home) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 30)
    store = make(path, encoder, home)
    write_rows(path, 10)
    with pytest.raises(DataError, match="has changed since"):
        store.rows([20])


def test_the_held_out_part_is_spread_over_the_rows() -> None:
    training, held_out = split(np.arange(1000, dtype=np.uint64), 0.05, 200)
    assert held_out.tolist() == list(range(0, 1000, 20))
    assert sorted([*training, *held_out]) == list(range(1000))
    assert len(split(np.arange(1000, dtype=np.uint64), 0.4, 7)[1]) == 7
    assert len(split(np.arange(3, dtype=np.uint64), 0.05, 200)[1]) == 1


def test_rows_that_ask_the_same_go_one_way() -> None:
    groups = np.random.default_rng(0).integers(0, 120, 1000).astype(np.uint64)
    training, held_out = split(groups, 0.1, 200)
    assert not set(groups[training]) & set(groups[held_out])
    assert 50 <= len(held_out) <= 100
    nothing, everything = split(np.zeros(5, dtype=np.uint64), 0.1, 200)
    assert (len(nothing), len(everything)) == (0, 5)


def test_what_asks_the_same() -> None:
    def ask(text: str, reply: str = "yes", **more: object) -> Row:
        return Row([{"role": "user", "content": text}, {"role": "assistant", "content": reply}], 1, **more)  # type: ignore[arg-type]

    assert group_of(ask("Is it red?")) == group_of(ask(" is it\nRED? ", "no"))
    assert group_of(ask("Is it red?")) != group_of(ask("Is it blue?"))
    assert group_of(ask("Is it red?")) != group_of(ask("Is it red?", tools=[{"name": "f"}]))
    assert group_of(Row([], 1, text="A b")) == group_of(Row([], 2, text="a  B"))
