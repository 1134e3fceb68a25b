"""What makes a start cold or warm: files in the page cache, and an engine's compile caches.

Files are dropped one by one, which needs no privilege and touches nothing else. Compile caches are redirected into a
folder of the bench, emptied before a cold start; those of the user stay as they are.

    >>> drop_files([Path("models/qwen3-8b")])
    16381516776
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from loraport.clients.home import Home

# Where vLLM and what it compiles with keep things.
VARIABLES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}
OWN = ("cache", "run", "logs")  # of a home, what a start writes
NOT_DROPPED = "the files of Python and of the engine itself, and the GPU driver's caches, stay warm"


def is_ours(command: Sequence[str]) -> bool:
    """Whether a command is `loraport serve`, which has its engine's caches in its home."""
    return "serve" in command and any(Path(word).name in ("loraport", "loraport_cli") for word in command[:3])


def folders_of(command: Sequence[str]) -> list[Path]:
    """Folders of models that a command names: its base, its adapters (`name=folder` too)."""
    words = dict.fromkeys(part for word in command[1:] for part in (word, word.partition("=")[2]) if part)
    return [Path(word) for word in words if not word.startswith("-") and is_model(Path(word))]


def is_model(folder: Path) -> bool:
    """Whether a base or an adapter lies there."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def drop_files(folders: Sequence[Path]) -> int:
    """Ask the kernel to forget the contents of all files in these folders; return their bytes."""
    dropped = 0
    for folder in folders:
        for path in folder.rglob("*"):
            with suppress(OSError):
                if path.is_file():
                    dropped += drop_file(path)
    return dropped


def drop_file(path: Path) -> int:
    """One file, in bytes."""
    number = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(number).st_size
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        return size
    finally:
        os.close(number)


class Caches:
    """The compile caches of a bench, in a folder of its own."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.ours = folder, is_ours(command)

    def environment(self) -> dict[str, str]:
        """The variables that lead there. For `loraport serve` a home whose parts are the user's, but for its caches."""
        found = {name: str(self.folder / part) for name, part in VARIABLES.items()}
        if self.ours:
            found["LORAPORT_HOME"] = str(self.folder / "home")
        return found

    def clear(self) -> None:
        """Empty them; cold."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.ours:
            self.link_home(Home.default().root)

    def link_home(self, real: Path) -> None:
        """A home beside, with links to what lies in the real one."""
        home = self.folder / "home"
        home.mkdir(mode=0o700)
        for part in real.iterdir() if real.is_dir() else ():
            if part.name not in OWN:
                (home / part.name).symlink_to(part)
