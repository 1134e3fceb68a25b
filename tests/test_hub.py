"""A base model from a hub: downloaded once, taken from the cache, and refused in words.

Each case is a process of its own, because huggingface_hub reads its variables when it is imported.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraport.clients.home import Home
from tests.fake_hub import FakeHub
from tests.test_train_run import write_rows

RESOLVE = """
import os, shutil, sys
from collections import namedtuple
from loraport.clients.errors import LoraportError
from loraport.clients.terminal import exit_with
from loraport.train.base_model import resolve

if "FREE_BYTES" in os.environ:
    shutil.disk_usage = lambda path: namedtuple("usage", "free")(int(os.environ["FREE_BYTES"]))
try:
    base = resolve(*sys.argv[1:])
    print(base.revision, base.folder)
except LoraportError as error:
    exit_with(error, False)
"""
SIZE = 3_000_000
PIECE = 10 * 2**20  # bytes that huggingface_hub writes at a time


def weights(size: int) -> bytes:
    """A whole safetensors file with one tensor of so many bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(range(250)) * (size // 250)


FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "model.safetensors": weights(SIZE),
    "pytorch_model.bin": bytes(SIZE),  # not wanted
    "README.md": b"# Tiny",
}
FIND_BASE = """
from loraport.clients.home import Home
from loraport.serve.checks import find_base
from loraport.train.adapters import open_adapter

base = find_base(None, [open_adapter(Home.default(), "colours")])
print(base.model, base.revision, base.folder)
"""
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub with one good model."""
    with FakeHub() as server:
        server.add("org/tiny", dict(FILES))
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """HF_HOME."""
    return tmp_path / "hf"


def run(hub: FakeHub, cache: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in a process that knows this hub alone."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache)} | more
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def resolve(hub: FakeHub, cache: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """resolve(*arguments) in such a process."""
    return run(hub, cache, "-c", RESOLVE, *arguments, **more)


def folder_of(done: subprocess.CompletedProcess[str]) -> Path:
    """The folder that a run printed."""
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.split()[1])


def refusal_of(done: subprocess.CompletedProcess[str]) -> str:
    """Sentence and hint of a refused run; there is nothing else but huggingface_hub's progress."""
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    said = [line for line in re.split(r"[\r\n]+", done.stderr) if line and not line.startswith("Fetching")]
    assert [line.split(":")[0] for line in said] == ["error", "hint"], done.stderr
    return "\n".join(said)


def test_download_then_cache(hub: FakeHub, cache: Path) -> None:
    first = resolve(hub, cache, "org/tiny")
    folder = folder_of(first)
    assert first.stdout.split()[0] == hub.repositories["org/tiny"].commit
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "Fetching" in first.stderr  # progress
    assert hub.count("GET", "/cdn/") == 1
    assert folder_of(resolve(hub, cache, "org/tiny")) == folder
    assert hub.count("GET", "/cdn/") == 1


def test_the_cache_is_enough_offline_without_the_hub_and_without_the_permission(hub: FakeHub, cache: Path) -> None:
    folder = folder_of(resolve(hub, cache, "org/tiny"))
    hub.requests.clear()
    assert folder_of(resolve(hub, cache, "org/tiny", **OFFLINE)) == folder
    assert hub.requests == []
    del hub.repositories["org/tiny"]
    assert folder_of(resolve(hub, cache, "org/tiny")) == folder
    hub.stop()
    assert folder_of(resolve(hub, cache, "org/tiny")) == folder


def test_a_named_revision(hub: FakeHub, cache: Path) -> None:
    commit = hub.repositories["org/tiny"].commit
    assert folder_of(resolve(hub, cache, "org/tiny", commit)).name == commit
    said = refusal_of(resolve(hub, cache, "org/tiny", "v9"))
    assert "has no revision v9" in said


def test_offline_without_cache(hub: FakeHub, cache: Path) -> None:
    said = refusal_of(resolve(hub, cache, "org/tiny", **OFFLINE))
    assert "does not hold all of the model org/tiny, and HF_HUB_OFFLINE is set" in said
    assert "hint: go online once, or give the path of a model folder" in said


def test_the_hub_is_away_and_so_is_the_cache(hub: FakeHub, cache: Path) -> None:
    hub.stop()
    assert f"and {hub.url} does not answer" in refusal_of(resolve(hub, cache, "org/tiny"))


@pytest.mark.parametrize("token", ["", "hf_secret"])
def test_a_gated_model(hub: FakeHub, cache: Path, token: str) -> None:
    hub.add("org/gated", dict(FILES), gated=True)
    said = refusal_of(resolve(hub, cache, "org/gated", HF_TOKEN=token))
    assert "org/gated" in said and "is gated" in said
    assert "accept it on the model's page" in said and "HF_TOKEN" in said
    assert "hf_secret" not in said


@pytest.mark.parametrize("token", ["", "hf_secret"])
@pytest.mark.parametrize("name", ["org/none", "none", "bad name!"])
def test_a_model_that_is_not_there(hub: FakeHub, cache: Path, name: str, token: str) -> None:
    said = refusal_of(resolve(hub, cache, name, HF_TOKEN=token))
    assert f"there is no folder {name} and no such model on {hub.url}" in said


def test_weights_that_are_not_safetensors_are_not_even_downloaded(hub: FakeHub, cache: Path) -> None:
    hub.add("org/bin", {name: content for name, content in FILES.items() if "safetensors" not in name})
    assert "org/bin" in (said := refusal_of(resolve(hub, cache, "org/bin"))) and "no *.safetensors" in said
    assert hub.count("GET", "/cdn/") + hub.count("GET", "/org/bin/resolve") == 0


def test_no_disk_space(hub: FakeHub, cache: Path) -> None:
    said = refusal_of(resolve(hub, cache, "org/tiny", FREE_BYTES=str(SIZE)))
    assert "the model org/tiny needs 3 MiB on disk" in said
    assert "HF_HOME" in said
    assert hub.count("GET", "/cdn/") == 0
    folder_of(resolve(hub, cache, "org/tiny"))
    folder_of(resolve(hub, cache, "org/tiny", FREE_BYTES="0"))  # in the cache it needs none


def test_a_disk_that_fills_up_midway(hub: FakeHub, cache: Path) -> None:
    """A limit on the size of files stands for the full disk: both are an OSError of a write."""
    limited = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{RESOLVE}".replace(
        "try:", "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, -1))\ntry:"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache)}
    command = [sys.executable, "-c", limited, "org/tiny"]
    said = refusal_of(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120))
    assert "File too large while downloading to" in said


def large_files() -> dict[str, bytes]:
    """Weights of several of huggingface_hub's pieces: a transfer that breaks off loses the piece it was at."""
    return FILES | {"model.safetensors": weights(5 * PIECE // 2 // 250 * 250)}


def ranges(hub: FakeHub) -> list[str]:
    """The ranges asked of the file servers."""
    return [asked for method, path, asked in hub.requests if method == "GET" and path.startswith("/cdn/")]


def test_a_transfer_that_breaks_off_goes_on_where_it_was(hub: FakeHub, cache: Path) -> None:
    hub.add("org/flaky", large_files(), cuts=[PIECE + 1000, PIECE + 1000])
    folder = folder_of(resolve(hub, cache, "org/flaky"))
    assert (folder / "model.safetensors").read_bytes() == large_files()["model.safetensors"]
    assert ranges(hub) == ["", f"bytes={PIECE}-", f"bytes={2 * PIECE}-"]


def test_a_transfer_that_never_comes_through_leaves_the_files_that_did(hub: FakeHub, cache: Path) -> None:
    hub.add("org/broken", dict(FILES), cuts=6 * [0])
    done = resolve(hub, cache, "org/broken")
    assert done.returncode == 3
    assert "error: downloading org/broken failed: " in done.stderr
    assert "Traceback" not in done.stderr
    said = refusal_of(resolve(hub, cache, "org/broken", **OFFLINE))
    assert "does not hold all of the model" in said  # half a model is none
    hub.requests.clear()
    folder_of(resolve(hub, cache, "org/broken"))
    assert hub.count("GET", "/cdn/") == 1
    assert hub.count("GET", "/org/broken/resolve") == 0


def test_a_damaged_model_is_named(hub: FakeHub, cache: Path) -> None:
    hub.add("org/bare", {"config.json": b"{}", "model.safetensors": b"x" * 10})
    assert "names no model_type" in refusal_of(resolve(hub, cache, "org/bare"))


def test_an_adapter_trained_on_a_hubs_model_finds_its_base_again(
    hub: FakeHub, cache: Path, tiny_base: Path, home: Home, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    commit = hub.add("org/tiny", files).commit
    rows = write_rows(tmp_path / "rows.jsonl")
    train = ["-m", "loraport_cli", "train", "--model", "org/tiny", "--data", str(rows), "--name", "colours"]
    trained = run(hub, cache, *train, "--epochs", "1", "--json")
    assert trained.returncode == 0, trained.stderr
    recorded = json.loads(trained.stdout)["base"]
    assert (recorded["model"], recorded["revision"]) == ("org/tiny", commit)

    hub.requests.clear()
    found = run(hub, cache, "-c", FIND_BASE, **OFFLINE)
    assert found.stdout.split() == ["org/tiny", commit, recorded["path"]], found.stderr
    moved = cache.rename(tmp_path / "moved")  # the folder is not where it was; id and commit still say which it is
    found = run(hub, moved, "-c", FIND_BASE, **OFFLINE)
    assert found.stdout.split()[:2] == ["org/tiny", commit], found.stderr
    assert Path(found.stdout.split()[2]).is_relative_to(moved)
    again = run(hub, moved, *train, "--epochs", "1", **OFFLINE)
    assert "is up to date" in again.stderr
    assert hub.requests == []
