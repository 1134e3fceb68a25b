"""`loraport serve --merge NAME`: an adapter merged into its base's weights, as a model folder that vLLM serves plainly.

A merged model answers at the speed of its base: no LoRA slots, no LoRA kernels. Each weight becomes W + scale x B A,
computed in float32 and rounded once to the type it is stored in. Files are copied from beginning to end, a few MiB at
a time, with the targets changed on the way; so the memory needed does not grow with the model. Names, shapes, offsets
and headers stay those of the base; files without a target are hard links.

The folder lies in the home's cache under hashes of base and adapter, appears by one rename, and is found again. What
is merged is proven like an adapter: its golden replies are replayed under its own name.

    >>> merged(base, adapter, Home.default()).folder.name
    'support-v2-4f1c0a9be3d27c55'
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import httpx
import numpy as np

from loraport.clients.errors import AdapterError, BaseModelError, ResourceError, VerificationError, os_errors
from loraport.clients.home import Home, require_disk, write_json
from loraport.clients.terminal import console, say
from loraport.serve.adapters.accept import find_features, read_peft_config
from loraport.serve.adapters.prove import Loaded
from loraport.serve.adapters.targets import Delta, find_targets
from loraport.serve.adapters.tensors import BYTES_EACH, LARGEST, Floats, Tensor, from_float32, read_tensors, to_float32
from loraport.serve.plan.settings import Plan
from loraport.serve.proof import prompts
from loraport.serve.proof.tolerance import serving_type
from loraport.serve.proof.verify import verify
from loraport.train.adapters import CONFIG, WEIGHTS, Adapter
from loraport.train.base_model import UNWANTED, WANTED, Base, chat_template, identify

MARKER = "merged.json"
PIECE = 8 << 20  # bytes that are copied at once
ELEMENTS = 1 << 18  # of a weight that are computed at once: they stay in a core's cache
MOST_THREADS = 16
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
QUANTISED = {"nf4": "4-bit", "int8": "8-bit"}
GIB = 1 << 30
ANY_PATTERN = (0, 32)  # a version of vLLM that honours patterns, as merging does


@dataclass(frozen=True)
class Work:
    """What is to be done for one weight file of the base: the deltas of its tensors, by their names."""

    file: Path
    deltas: dict[str, Delta]


def merged(base: Base, adapter: Adapter, home: Home) -> Base:
    """The base with `adapter` merged into it, made now or found from before; called by the adapter's name.

    AdapterError, BaseModelError: it cannot be merged. ResourceError: no room on disk.
    """
    check_mergeable(adapter)
    folder = home.cache / "merged" / name_folder(base, adapter)
    if not (folder / MARKER).is_file():
        make(base, adapter, folder, home)
    copy_small(base.folder, folder)  # a generation_config.json that was edited since counts
    return Base(adapter.manifest.name, folder)


def notes(adapter: Adapter) -> tuple[str, ...]:
    """What to know of a merged adapter, for the plan's warnings."""
    bits = QUANTISED.get(adapter.manifest.base_dtype)
    if bits is None:
        return ()
    name = adapter.manifest.name
    return (
        f"note: {name} was trained on {bits} weights and is merged into the 16-bit ones; replies may differ a bit.",
    )


def check_mergeable(adapter: Adapter) -> None:
    """AdapterError for everything in a PEFT configuration that is more than A and B beside linear layers.

    Rank and alpha patterns are fine here, and so is any rank.
    """
    problems = find_features(read_peft_config(adapter.folder), ANY_PATTERN)
    if problems:
        raise AdapterError(
            f"the adapter in {adapter.folder} uses {' and '.join(problems)}, which is not merged here.",
            "train it as plain LoRA, or merge it into its base with PEFT and serve that with --model",
        )


def name_folder(base: Base, adapter: Adapter) -> str:
    """`support-v2-` and 16 digits of a hash of what decides the merged weights, every byte of the adapter included."""
    identity = identify(base)
    digest = hashlib.sha256(f"1 {identity.weights_sha256} {identity.config_sha256}\0".encode())
    for name in (CONFIG, WEIGHTS):
        with os_errors("reading", adapter.folder / name), (adapter.folder / name).open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return f"{adapter.manifest.name}-{adapter.manifest.version}-{digest.hexdigest()[:16]}"


def make(base: Base, adapter: Adapter, folder: Path, home: Home) -> None:
    """Merge into a hidden folder beside `folder`, then rename it."""
    began, name = time.monotonic(), adapter.manifest.name
    work = plan_work(base, find_targets(adapter.folder, base))
    home.ensure(folder.parent)
    older = [path for path in folder.parent.glob(f"{name}-v*") if (path / MARKER).is_file()]
    check_room(work, folder, name, older)
    total = sum(one.file.stat().st_size for one in work)
    with partial_folder(folder) as partial, os_errors("merging into", partial):
        with console.status(f"merging {name}") as status:
            done = 0

            def tell(size: int) -> None:
                nonlocal done
                done += size
                status.update(f"merging {name} into {base.short_name}: {done / GIB:.1f} of {total / GIB:.1f} GiB")

            for one in work:
                write_merged(one, partial / one.file.name, tell)
        copy_small(base.folder, partial)
        write_json(partial / MARKER, describe(base, adapter))
        with suppress(FileExistsError):  # another process was faster; what it made is the same
            publish(partial, folder)
    spent = time.monotonic() - began
    say(f"  merged      {name} into {base.short_name}, {total / GIB:.2f} GiB in {spent:.1f} s: {folder}")
    if older:
        say(f"note: older merged models of {name} take disk space: {', '.join(map(str, older))}")


def describe(base: Base, adapter: Adapter) -> dict[str, str]:
    """What a merged folder was made of, for people who find it."""
    return {
        "base": base.model,
        "base_folder": str(base.folder),
        "adapter": adapter.manifest.name,
        "version": adapter.manifest.version,
        "adapter_folder": str(adapter.folder),
    }


def plan_work(base: Base, targets: dict[str, Delta]) -> list[Work]:
    """The deltas by file. BaseModelError where two files hold a tensor of one name: which one counts is not known."""
    work = []
    for file in base.weight_files:
        tensors = read_tensors(file, BaseModelError)[0]
        work.append(Work(file, {name: targets[name] for name in tensors if name in targets}))
    if sum(len(one.deltas) for one in work) != len(targets):
        raise BaseModelError(f"two weight files in {base.folder} hold tensors of the same name.", "remove one of them")
    return work


def check_room(work: list[Work], folder: Path, name: str, older: list[Path]) -> None:
    """ResourceError unless the files that change fit on the disk; others are links where that can be."""
    sizes = [one.file.stat() for one in work]
    here = folder.parent.stat().st_dev
    needed = sum(s.st_size for one, s in zip(work, sizes, strict=True) if one.deltas or s.st_dev != here)
    try:
        require_disk(folder, needed + (64 << 20), f"merging {name}")
    except ResourceError as error:
        if not older:
            raise
        raise ResourceError(
            error.message, f"remove merged models of other versions: {' '.join(map(str, older))}"
        ) from error


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, removed at the end unless it was renamed; those of killed processes as well."""
    for stale in folder.parent.glob(".partial-*"):
        if not Path(f"/proc/{stale.name.split('-')[1]}").exists():
            shutil.rmtree(stale, ignore_errors=True)
    with os_errors("making a folder in", folder.parent):
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{os.getpid()}-", dir=folder.parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, folder: Path) -> None:
    """Rename, once all bytes are on the disk: a machine that loses power must not leave a folder of zeros."""
    for path in partial.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists() and not (folder / MARKER).is_file():  # somebody emptied it
        shutil.rmtree(folder)
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / MARKER).is_file():
            raise
        raise FileExistsError(folder) from None


def copy_small(source: Path, target: Path) -> None:
    """Configuration, tokenizer, template, index: all of a model's files but its weights, as far as they changed."""
    for path in source.iterdir():
        wanted = any(fnmatch(path.name, pattern) for pattern in WANTED if "safetensors" not in pattern)
        if not path.is_file() or not wanted or any(fnmatch(path.name, pattern) for pattern in UNWANTED):
            continue
        copy, partial = target / path.name, target / f".{path.name}.{os.getpid()}"
        with os_errors("copying to", copy):
            if copy.is_file() and copy.read_bytes() == path.read_bytes():
                continue
            shutil.copyfile(path, partial)
            partial.replace(copy)


def write_merged(work: Work, target: Path, tell: Callable[[int], None]) -> None:
    """One weight file of the merged model; `tell` hears of bytes that are done."""
    if not work.deltas and link(work.file, target):
        tell(target.stat().st_size)
        return
    tensors, data_start = read_tensors(work.file, BaseModelError)
    with work.file.open("rb") as source, target.open("xb") as sink:
        copy_bytes(source, sink, data_start, tell)
        for tensor in tensors.values():
            copy_bytes(source, sink, tensor.start - source.tell(), tell)  # between tensors; as a rule nothing
            if tensor.name in work.deltas:
                add(tensor, work.deltas[tensor.name], source, sink, tell)
            else:
                copy_bytes(source, sink, tensor.size, tell)
        copy_bytes(source, sink, work.file.stat().st_size - source.tell(), tell)


def link(source: Path, target: Path) -> bool:
    """A second name for the file, where the file system has room for one; the hub's own cache are links themselves."""
    with suppress(OSError):
        os.link(source.resolve(), target)
        return True
    return False


def copy_bytes(source: BinaryIO, sink: BinaryIO, size: int, tell: Callable[[int], None]) -> None:
    """The next `size` bytes as they are."""
    while size > 0:
        piece = source.read(min(PIECE, size))
        if not piece:
            raise BaseModelError("a weight file of the base became shorter while it was read.", "download it again")
        sink.write(piece)
        tell(len(piece))
        size -= len(piece)


def add(tensor: Tensor, delta: Delta, source: BinaryIO, sink: BinaryIO, tell: Callable[[int], None]) -> None:
    """The next tensor with its delta added, some rows at a time, in as many threads as there are cores.

    The product is numpy's affair, which has threads of its own for it: inside of ours they would wait for one another.
    """
    left, right = delta.factors()
    height, width = tensor.shape
    rows, threads = max(1, ELEMENTS // width), min(MOST_THREADS, os.cpu_count() or 1)

    def compute(raw: bytes, added: Floats) -> memoryview:
        values = to_float32(raw, tensor.dtype).reshape(added.shape)
        np.add(values, added, out=values)
        if not np.abs(values).max() <= LARGEST[tensor.dtype]:  # true of NaN as well
            raise AdapterError(
                f"merging {delta.module} makes values that {tensor.dtype} cannot hold.",
                "the adapter is damaged or diverged: train it again",
            )
        return from_float32(values, tensor.dtype)

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, height, 4 * threads * rows):  # so many rows are in memory at once
            product = left[start : start + 4 * threads * rows] @ right
            added = [product[first : first + rows] for first in range(0, len(product), rows)]
            pieces = [source.read(len(part) * width * BYTES_EACH[tensor.dtype]) for part in added]
            for piece in pool.map(compute, pieces, added):
                sink.write(piece)
                tell(len(piece))


def prove_merged(client: httpx.Client, adapter: Adapter, base: Base, plan: Plan) -> Loaded:
    """Prompts compared and golden replies replayed under the adapter's own name, which is all that the engine serves.

    `base`: the merged one. VerificationError where it does not answer as in training; EndpointError: no answer.
    """
    manifest = adapter.manifest
    try:
        warning = prompts.check(client, manifest, prompts.is_dated(chat_template(base)))
        verified = verify(client, manifest, serving_type(plan, stored_type(base)))
    except VerificationError as error:
        raise VerificationError(
            f"{manifest.name}, merged into its base, does not answer as it did in training.",
            f"serve it unmerged: `loraport serve {manifest.name}`; if that is refused as well, train it again",
            (error.message, *error.details),
        ) from error
    return Loaded(adapter, manifest, verified, (warning,) if warning else ())


def stored_type(base: Base) -> str:
    """The type that merged weights were rounded to: that of most of the base's tensors."""
    count: Counter[str] = Counter()
    for file in base.weight_files:
        count.update(tensor.dtype for tensor in read_tensors(file, BaseModelError)[0].values())
    return TYPES.get(count.most_common(1)[0][0], "bfloat16")
