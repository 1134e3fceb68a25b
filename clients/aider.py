"""Aider, pointed at an endpoint: which model, how its context is divided, and nothing that needs the internet.

Aider knows a model by two files that we write into home's cache: its metadata (context length; without an entry Aider
asks the internet and then assumes nothing) and its settings (how to edit; which model writes commit messages). The
context is divided beforehand: a part for the reply, which is held to it (a model that does not stop costs no more than
that), and of the rest a part each for the repo map and for what was said before, so that files and question have half
of it at least. Left alone, Aider takes up to 32k tokens for the map where no file is in the chat.

    >>> command(Path("/usr/bin/aider"), endpoint, budget(40_960), folder, ["--message", "add a test"])
    ['/usr/bin/aider', '--model', 'openai/demo', ..., '--message', 'add a test']
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.endpoint import api_key
from loraport.clients.environment import Endpoint, reply_tokens
from loraport.clients.errors import Refused, UsageError, os_errors
from loraport.clients.home import Home, write_json
from loraport.clients.models import connect, count_tokens, thinking_option

USEFUL_CONTEXT = 16_384  # tokens; below about 15k Aider's own prompts leave too little for code
SPARE_SHARE = 64  # one in so many tokens, for the marks that a chat template sets around messages
PART_SHARE = 8  # one in so many tokens of the prompt for the repo map, and as many for the conversation so far
MOST_MAP, MOST_HISTORY = 4_096, 8_192
LEAST_MAP = 512  # a smaller map shows too little; then none
NO_FILES_FACTOR = 2  # how much larger the map is where no file is in the chat; Aider's own 8 would fill the context
# Aider counts tokens as GPT-4 does: this many in SAMPLE. A model with a smaller vocabulary needs more for it.
SAMPLE_TOKENS = 183
SAMPLE = '''\
def read_rows(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, one at a time; ValueError that names the line which is none."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and number > limit:
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: {error.msg}") from error


class Counter:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount
'''
INSTALL_HINT = (
    "install it into an environment of its own: `uv tool install aider-chat`, `pipx install aider-chat`, or "
    "`python3 -m venv ~/.aider-venv && ~/.aider-venv/bin/pip install aider-chat` and AIDER=~/.aider-venv/bin/aider"
)
# Looking for updates, reporting use and opening release notes all need the internet.
OFFLINE_FLAGS = ("--no-analytics", "--no-check-update", "--no-show-release-notes")


@dataclass(frozen=True)
class Budget:
    """A context divided. `reply` in the model's tokens, the others in Aider's."""

    reply: int
    prompt: int
    repo_map: int
    history: int


def budget(context: int, tokens_each: float = 1.0) -> Budget:
    """The division of a context of so many tokens; the model needs `tokens_each` for one that Aider counts."""
    reply = reply_tokens(context)
    prompt = int((context - reply - context // SPARE_SHARE) / max(1.0, tokens_each))
    part = prompt // PART_SHARE
    return Budget(reply, prompt, min(part, MOST_MAP) if part >= LEAST_MAP else 0, min(part, MOST_HISTORY))


def divide(endpoint: Endpoint) -> Budget | None:
    """The division for an endpoint, by its own tokenizer where it has a route for that; None without a context."""
    if not endpoint.context:
        return None
    with connect(endpoint.base_url, timeout_s=30) as client:
        counted = count_tokens(client, str(endpoint.default_model), SAMPLE)
    return budget(endpoint.context, counted / SAMPLE_TOKENS if counted else 1.0)


def find_aider() -> Path:
    """The program that AIDER names, or `aider` in PATH. Raises Refused with how to install it."""
    named = os.environ.get("AIDER")
    found = shutil.which(Path(named).expanduser() if named else "aider")
    if named and not found:
        raise UsageError(f"AIDER={named} is not a program.", "set it to aider's path, or leave it out")
    if not found:
        raise Refused("Aider is not installed.", INSTALL_HINT)
    return Path(found)


def metadata(endpoint: Endpoint, parts: Budget | None) -> dict[str, Any]:
    """Aider's metadata of every model of the endpoint; prices are 0 so that it prints no costs of its own making."""
    card: dict[str, Any] = {"litellm_provider": "openai", "mode": "chat"}
    card |= {"input_cost_per_token": 0, "output_cost_per_token": 0}
    if parts:
        card |= {"max_input_tokens": parts.prompt, "max_output_tokens": parts.reply, "max_tokens": parts.reply}
    return {f"openai/{name}": card for name in endpoint.models}


def settings(endpoint: Endpoint, parts: Budget | None, thinking: bool | None = None) -> list[dict[str, Any]]:
    """Aider's settings of every model: whole files as edits (what small models manage), itself as the weak model.

    The temperature is the server's: it knows what the model was published with, and greedy replies, which Aider asks
    for by itself, let thinking models go round in circles. Thoughts that come in the text are not taken for edits.
    """
    limits = {"max_tokens": parts.reply} if parts else {}
    extra = limits | thinking_option(thinking)
    return [
        {
            "name": f"openai/{name}",
            "edit_format": "whole",
            "weak_model_name": f"openai/{name}",
            "editor_model_name": f"openai/{name}",
            "use_repo_map": bool(parts and parts.repo_map),
            "use_temperature": False,
            "reasoning_tag": "think",
            **({"extra_params": extra} if extra else {}),
        }
        for name in endpoint.models
    ]


def write_files(endpoint: Endpoint, parts: Budget | None, thinking: bool | None, home: Home) -> Path:
    """Write metadata and settings for this endpoint into home's cache; return their folder."""
    name = hashlib.sha256(endpoint.base_url.encode()).hexdigest()[:12]
    folder = home.ensure(home.cache / "aider" / name)
    write_json(folder / "metadata.json", metadata(endpoint, parts))
    write_json(folder / "settings.yml", settings(endpoint, parts, thinking))  # JSON is YAML
    return folder


def command(aider: Path, endpoint: Endpoint, parts: Budget | None, folder: Path, arguments: list[str]) -> list[str]:
    """The command line; `arguments` come last, so that they win. The key is not on it: see `environment`."""
    ours = ["--model", f"openai/{endpoint.default_model}", "--openai-api-base", endpoint.base_url]
    ours += ["--model-metadata-file", str(folder / "metadata.json")]
    ours += ["--model-settings-file", str(folder / "settings.yml")]
    ours += ["--map-tokens", str(parts.repo_map if parts else 0), "--map-multiplier-no-files", str(NO_FILES_FACTOR)]
    ours += ["--max-chat-history-tokens", str(parts.history)] if parts else []
    return [str(aider), *ours, *OFFLINE_FLAGS, *arguments]


def environment(endpoint: Endpoint) -> dict[str, str]:
    """This process's environment with the endpoint in it. litellm's price list comes from its package, not the net."""
    ours = {"OPENAI_API_BASE": endpoint.base_url, "OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": api_key()}
    return {"LITELLM_LOCAL_MODEL_COST_MAP": "True", **os.environ, **ours}


def start(
    aider: Path, endpoint: Endpoint, parts: Budget | None, thinking: bool | None, home: Home, arguments: list[str]
) -> None:
    """Become Aider: this process is replaced, so that signals and the terminal are Aider's alone."""
    line = command(aider, endpoint, parts, write_files(endpoint, parts, thinking, home), arguments)
    with os_errors("starting", aider):
        os.execve(aider, line, environment(endpoint))
