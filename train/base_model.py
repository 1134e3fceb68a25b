"""A base model: a folder, or a name on a model hub, made into a local folder that is known to be complete.

Training and serving both come through here, so that both refuse the same things with the same words, and both know
a base by the same hashes. No torch here.

    >>> base = resolve("examples/reader-9m")
    >>> identify(base).config_sha256[:8]
    '1f0c…'
"""

import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from loraport.clients.errors import BaseModelError
from loraport.clients.hub import Kind, fetch, require_room
from loraport.train.manifest import BaseIdentity
from loraport.train.weights import read_safetensors_shapes

# safetensors only: other weight formats can execute code when they are read.
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
UNWANTED = ("original/*", "onnx/*", "openvino/*", "consolidated*.safetensors", "*.gguf", "metal/*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
SAFETENSORS_HINT = "Loraport reads safetensors only (other formats can run code): convert the weights first"
MODEL = Kind(BaseModelError, "models", "model", "folder", ("licence", "it on the model's"), "model", "model folder")
SAMPLES = 16
SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Base:
    """A complete base model on this disk. `model` is what the user called it, `revision` the hub's commit if any."""

    model: str
    folder: Path
    revision: str | None = None

    @property
    def short_name(self) -> str:
        """The last part of the name: `Qwen3-8B` of `Qwen/Qwen3-8B` or of a folder."""
        return Path(self.model).expanduser().absolute().name if Path(self.model).exists() else Path(self.model).name

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.folder / "config.json")

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, by name: those of the index, where there is one."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return sorted({self.folder / name for name in read_json(index).get("weight_map", {}).values()})
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def weight_bytes(self) -> int:
        """Size of all weights on disk."""
        return sum(path.stat().st_size for path in self.weight_files)


def resolve(model: str, revision: str | None = None) -> Base:
    """The base that `model`, a folder or a hub id, names; downloaded with progress where it has to be.

    Raises BaseModelError when it is missing, gated, incomplete or not in safetensors; ResourceError without disk.
    """
    folder = local_folder(model)
    return check_complete(Base(model, folder) if folder else download(model, revision))


def local_folder(model: str) -> Path | None:
    """The folder that `model` names, None for a hub id; BaseModelError for a path where no folder is."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise BaseModelError(f"there is no model folder {model}.", "check the path, or give a hub id such as org/name")
    return None


def resolve_tokenizer(model: str, revision: str | None = None) -> Base:
    """The base that `model` names, as far as rows need it: tokenizer, template and configuration, without weights."""
    folder = local_folder(model)
    wanted = tuple(pattern for pattern in WANTED if pattern != "*.safetensors")
    return Base(model, folder) if folder else download(model, revision, wanted)


def fetch_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or a hub id, and nothing else: no weights need to be there, none are fetched.

    Raises BaseModelError as `resolve` does.
    """
    folder = local_folder(model) or download(model, revision, ("config.json",)).folder
    path = folder / "config.json"
    if not path.is_file():
        raise BaseModelError(f"{model} has no config.json.", "give a model in transformers' format")
    config = read_json(path)
    if not config.get("model_type"):
        raise BaseModelError(f"{path} names no model_type.", "is this a model's folder?")
    return config


def check_complete(base: Base) -> Base:
    """Return `base` if configuration, tokenizer and all safetensors files are there; BaseModelError otherwise."""
    if not (base.folder / "config.json").is_file():
        raise BaseModelError(
            f"{base.folder} has no config.json.", "a model folder holds config.json, a tokenizer and *.safetensors"
        )
    if not base.config.get("model_type"):
        raise BaseModelError(f"{base.folder / 'config.json'} names no model_type.", "is this a model's folder?")
    if not any((base.folder / name).is_file() for name in TOKENIZER_FILES):
        raise BaseModelError(f"{base.folder} has no tokenizer.", "copy tokenizer.json and tokenizer_config.json there")
    if not base.weight_files:
        raise BaseModelError(
            f"{base.folder} has no *.safetensors.",
            "Loraport reads safetensors only (other formats can run code): convert the weights first",
        )
    missing = [path.name for path in base.weight_files if not path.is_file()]
    if missing:
        raise BaseModelError(
            f"{base.folder} lacks {len(missing)} of its {len(base.weight_files)} weight files, first {missing[0]}.",
            "copy or download them again",
        )
    for path in base.weight_files:
        read_safetensors_shapes(path, BaseModelError)
    return base


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder; BaseModelError when it is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BaseModelError(f"{path} cannot be read: {error}.", "copy or download the model again") from error
    if not isinstance(document, dict):
        raise BaseModelError(f"{path} is not a JSON object.", "copy or download the model again")
    return document


def download(model: str, revision: str | None, wanted: tuple[str, ...] = WANTED) -> Base:
    """Fetch a hub's model into its shared cache, or take it from there; progress on standard error.

    A hub that is away, or refuses now what it gave before, does not matter while the cache has the model.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub

    def look() -> None:
        check_download(HfApi().model_info(model, revision=revision, files_metadata=True))

    def get() -> str:
        try:
            return snapshot_download(
                model, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(UNWANTED)
            )
        except hub.RevisionNotFoundError as error:
            raise BaseModelError(
                f"the model {model} on {constants.ENDPOINT} has no revision {revision}.", "check its branches and tags"
            ) from error

    folder = fetch(model, MODEL, look if wanted == WANTED else None, get)
    return Base(model, folder, folder.name)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file of a repository matches one of the hub's patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def check_download(info: Any) -> None:
    """Refuse a download without safetensors, or that the disk cannot hold. `info`: the hub's ModelInfo with sizes."""
    from huggingface_hub import constants

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = [name for name in sizes if matches(name, WANTED) and not matches(name, UNWANTED)]
    if not any(name.endswith(".safetensors") for name in wanted):
        raise BaseModelError(f"the model {info.id} on {constants.ENDPOINT} has no *.safetensors.", SAFETENSORS_HINT)
    require_room(info, {name: sizes[name] for name in wanted}, MODEL)


def identify(base: Base) -> BaseIdentity:
    """Hashes by which an adapter knows its base again, whatever folder it lies in then."""
    return BaseIdentity(
        model=base.model,
        revision=base.revision,
        path=str(base.folder),
        config_sha256=hash_json(base.config),
        tokenizer_sha256=hash_files(base.folder, TOKENIZER_FILES[:1] if has_fast(base) else TOKENIZER_FILES),
        chat_template_sha256=hashlib.sha256(chat_template(base).encode()).hexdigest(),
        weights_sha256=hash_weights(base.weight_files),
    )


def reply_settings_sha256(base: Base) -> str:
    """Hash of the files that decide where replies end: they change what is trained, not which base it is."""
    return hash_files(base.folder, ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"))


def has_fast(base: Base) -> bool:
    """Whether tokenizer.json is there, which then alone decides about the tokens."""
    return (base.folder / "tokenizer.json").is_file()


def chat_template(base: Base) -> str:
    """The chat template as text: its own file, or inside tokenizer_config.json; empty where there is none."""
    for name in TEMPLATE_FILES:
        path = base.folder / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            return text if path.suffix == ".jinja" else str(json.loads(text).get("chat_template", ""))
    path = base.folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else json.dumps(template) if template else ""


def hash_json(document: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever its layout; without the version of the library that last saved it."""
    plain = {key: value for key, value in document.items() if key not in ("transformers_version", "_name_or_path")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def hash_files(folder: Path, names: tuple[str, ...]) -> str:
    """SHA-256 over names and bytes of those of `names` that exist in `folder`."""
    digest = hashlib.sha256()
    for path in (folder / name for name in names):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def hash_weights(files: list[Path]) -> str:
    """SHA-256 of sizes and of 16 evenly spaced samples of 64 KiB a file, header and end among them.

    Not of every byte: 65 GB of weights would take minutes, and any retraining changes every sample.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\0".encode())
        with path.open("rb") as handle:
            for step in range(SAMPLES):
                handle.seek(max(0, size - SAMPLE_BYTES) * step // (SAMPLES - 1))
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()
