"""Aider, pointed at an endpoint: which model, how long its context is, and nothing that needs the internet.

Aider knows a model by two files that we write into home's cache: its metadata (context length; without an entry Aider
asks the internet and then assumes nothing) and its settings (how to edit; which model writes commit messages). A part
of the context is kept for the reply, and the reply is held to it: a model that does not stop costs no more than that.

    >>> command(Path("/usr/bin/aider"), endpoint, Path("~/.loraport/cache/aider/1f0c"), ["--message", "add a test"])
    ['/usr/bin/aider', '--model', 'openai/demo', ..., '--message', 'add a test']
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from loraport.clients.endpoint import api_key
from loraport.clients.environment import Endpoint
from loraport.clients.errors import Refused, UsageError, os_errors
from loraport.clients.home import Home, write_json

USEFUL_CONTEXT = 16_384  # tokens; below about 15k Aider's own prompts leave too little for code
RESERVED_SHARE = 4  # one in so many tokens of the context is kept for the reply ...
MOST_RESERVED = 8_192  # ... up to this many
INSTALL_HINT = (
    "install it into an environment of its own: `uv tool install aider-chat`, `pipx install aider-chat`, or "
    "`python3 -m venv ~/.aider-venv && ~/.aider-venv/bin/pip install aider-chat` and AIDER=~/.aider-venv/bin/aider"
)
# Looking for updates, reporting use and opening release notes all need the internet.
OFFLINE_FLAGS = ("--no-analytics", "--no-check-update", "--no-show-release-notes")


def find_aider() -> Path:
    """The program that AIDER names, or `aider` in PATH. Raises Refused with how to install it."""
    named = os.environ.get("AIDER")
    found = shutil.which(Path(named).expanduser() if named else "aider")
    if named and not found:
        raise UsageError(f"AIDER={named} is not a program.", "set it to aider's path, or leave it out")
    if not found:
        raise Refused("Aider is not installed.", INSTALL_HINT)
    return Path(found)


def reply_tokens(context: int) -> int:
    """The part of a context of so many tokens that is kept for the reply."""
    return min(context // RESERVED_SHARE, MOST_RESERVED)


def metadata(endpoint: Endpoint) -> dict[str, Any]:
    """Aider's metadata of every model of the endpoint; prices are 0 so that it prints no costs of its own making."""
    card: dict[str, Any] = {"litellm_provider": "openai", "mode": "chat"}
    card |= {"input_cost_per_token": 0, "output_cost_per_token": 0}
    if endpoint.context:
        reply = reply_tokens(endpoint.context)
        card |= {"max_input_tokens": endpoint.context - reply, "max_output_tokens": reply, "max_tokens": reply}
    return {f"openai/{name}": card for name in endpoint.models}


def settings(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Aider's settings of every model: whole files as edits (what small models manage), itself as the weak model."""
    limits = {"extra_params": {"max_tokens": reply_tokens(endpoint.context)}} if endpoint.context else {}
    return [
        {
            "name": f"openai/{name}",
            "edit_format": "whole",
            "weak_model_name": f"openai/{name}",
            "editor_model_name": f"openai/{name}",
            "use_repo_map": (endpoint.context or 0) >= USEFUL_CONTEXT,
            **limits,
        }
        for name in endpoint.models
    ]


def write_files(endpoint: Endpoint, home: Home) -> Path:
    """Write metadata and settings for this endpoint into home's cache; return their folder."""
    name = hashlib.sha256(endpoint.base_url.encode()).hexdigest()[:12]
    folder = home.ensure(home.cache / "aider" / name)
    write_json(folder / "metadata.json", metadata(endpoint))
    write_json(folder / "settings.yml", settings(endpoint))  # JSON is YAML
    return folder


def command(aider: Path, endpoint: Endpoint, folder: Path, arguments: list[str]) -> list[str]:
    """The command line; `arguments` come last, so that they win. The key is not on it: see `environment`."""
    ours = ["--model", f"openai/{endpoint.default_model}", "--openai-api-base", endpoint.base_url]
    ours += ["--model-metadata-file", str(folder / "metadata.json")]
    ours += ["--model-settings-file", str(folder / "settings.yml")]
    return [str(aider), *ours, *OFFLINE_FLAGS, *arguments]


def environment(endpoint: Endpoint) -> dict[str, str]:
    """This process's environment with the endpoint in it. litellm's price list comes from its package, not the net."""
    ours = {"OPENAI_API_BASE": endpoint.base_url, "OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": api_key()}
    return {"LITELLM_LOCAL_MODEL_COST_MAP": "True", **os.environ, **ours}


def start(aider: Path, endpoint: Endpoint, home: Home, arguments: list[str]) -> None:
    """Become Aider: this process is replaced, so that signals and the terminal are Aider's alone."""
    line = command(aider, endpoint, write_files(endpoint, home), arguments)
    with os_errors("starting", aider):
        os.execve(aider, line, environment(endpoint))
