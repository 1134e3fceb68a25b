"""Files of the home: written whole or not at all, by any number of writers, and private where they must be."""

import json
import os
import threading
from pathlib import Path

import pytest

from loraport.clients.errors import ResourceError
from loraport.clients.home import write_json


def test_writers_at_once_never_meet(tmp_path: Path) -> None:
    path, errors = tmp_path / "run.json", []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                write_json(path, [number] * 500)
                assert len(set(json.loads(path.read_text()))) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and list(tmp_path.iterdir()) == [path]


def test_private_files_are_their_owners_whatever_they_replace(tmp_path: Path) -> None:
    path, usual = tmp_path / "keys.json", tmp_path / "usual"
    usual.touch()
    write_json(path, {})
    assert path.stat().st_mode == usual.stat().st_mode
    write_json(path, {"ä": 1}, is_private=True)
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == '{\n  "ä": 1\n}\n'


def test_a_disk_that_refuses_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    write_json(path, "old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no disk space left while writing"):
        write_json(path, "new")
    assert json.loads(path.read_text()) == "old" and list(tmp_path.iterdir()) == [path]
