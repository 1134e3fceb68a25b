"""What `loraport serve` prints when it is ready: where, which models, how fast, and lines to copy."""

import json
from dataclasses import asdict, dataclass
from shlex import quote
from typing import Any

from loraport.clients.endpoint import PLACEHOLDER_KEY
from loraport.clients.terminal import program, say
from loraport.serve.adapters.prove import Loaded
from loraport.serve.engine.process import Launch
from loraport.serve.proof.verify import Verified

KEY_VARIABLE = "LORAPORT_API_KEY"
LONGEST_QUESTION = 400  # characters, of a line to copy
ANYWHERE = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class Ready:
    """An endpoint that answers. `phases`: seconds of the engine's start; `seconds`: from command to ready."""

    launch: Launch
    base_url: str
    adapters: list[Loaded]
    phases: dict[str, float]
    seconds: float
    asks_key: bool = False

    @property
    def default_model(self) -> str:
        """The first adapter, or the base."""
        return self.adapters[0].name if self.adapters else self.launch.base_names[0]


def base_url(host: str, port: int) -> str:
    """The URL for clients on this machine."""
    here = "127.0.0.1" if host in ANYWHERE else host
    return f"http://{f'[{here}]' if ':' in here else here}:{port}/v1"


def as_json(ready: Ready) -> dict[str, Any]:
    """The document of --json."""
    plan = ready.launch.plan
    return {
        "base_url": ready.base_url,
        "base": {"names": list(ready.launch.base_names), "folder": str(ready.launch.base.folder)},
        "adapters": [
            asdict(loaded.verified)
            | {"name": loaded.name, "version": loaded.manifest.version, "state": loaded.verified.state}
            for loaded in ready.adapters
        ],
        "context": plan.context,
        "replicas": ready.launch.replicas,
        "plan": {choice.name: {"value": choice.value, "reason": choice.reason} for choice in plan.choices},
        "warnings": list(plan.warnings),
        "seconds": round(ready.seconds, 2),
        "phases": {name: round(spent, 2) for name, spent in ready.phases.items()},
    }


def say_ready(ready: Ready, tuning: str = "") -> None:
    """The same for people, with lines to copy. `tuning`: where jobs are taken, if they are."""
    slow = ", ".join(f"{name} {spent:.1f}" for name, spent in ready.phases.items() if spent >= 0.1)
    say(f"ready in {ready.seconds:.1f} s ({slow} s)", "bold green")
    say("")
    say(f"  base URL  {ready.base_url}", "bold")
    base = ready.launch.base_names
    aliases = f" (also: {', '.join(base[1:])})" if base[1:] else ""
    if not ready.launch.merged:
        say(f"  model     {base[0]}{aliases}, the base")
    merged = " merged into its base" if ready.launch.merged else ""
    for loaded in ready.adapters:
        say(f"  model     {loaded.name}, adapter {loaded.manifest.version}{merged}, {describe(loaded.verified)}")
    say(f"  context   {ready.launch.plan.context:,} tokens")
    if tuning:
        say(f"  tuning    {tuning}")
    if ready.launch.replicas > 1:
        say(f"  replicas  {ready.launch.replicas}, of which the first answers; the others join")
    say("")
    for line in lines_to_copy(ready):
        say(line)
    say("")
    say("Ctrl-C stops it.")


def describe(verified: Verified) -> str:
    """What the replay of an adapter's golden replies showed, in words."""
    if verified.prompts == 0:
        return "not verified: its manifest records no replies"
    if verified.telling == 0:
        return "unproven: it answers as in training, but so would the base on each recorded prompt"
    replies = "1 reply" if verified.prompts == 1 else f"{verified.prompts} replies"
    allowed = verified.tolerance
    bound = f" of the {allowed.most:g} that {allowed.reason} allow" if allowed.reason else ""
    return (
        f"verified: {replies} as in training, {verified.telling} unlike the base's, "
        f"within {verified.difference:.3f} nats{bound}"
    )


def question(ready: Ready) -> str:
    """Something of the kind that the adapter was trained for, where that is short; a small model knows little else."""
    golden = [reply for loaded in ready.adapters[:1] for reply in loaded.adapter.manifest.golden]
    asked = [reply.messages[0]["content"] for reply in golden if len(reply.messages) == 1]
    return min((text for text in asked if len(text) <= LONGEST_QUESTION), key=len, default="Hello")


def lines_to_copy(ready: Ready) -> list[str]:
    """How to reach it with curl, the openai SDK and Aider; a key is taken from LORAPORT_API_KEY, never shown."""
    url, model = ready.base_url, ready.default_model
    message = json.dumps({"role": "user", "content": question(ready)}, ensure_ascii=False)
    body = quote(f'{{"model": "{model}", "messages": [{message}]}}')
    sent = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if ready.asks_key else ""
    key = f'os.environ["{KEY_VARIABLE}"]' if ready.asks_key else f'"{PLACEHOLDER_KEY}"'
    shown = f'"${KEY_VARIABLE}"' if ready.asks_key else PLACEHOLDER_KEY
    return [
        "curl:",
        f"  curl {url}/chat/completions -H 'Content-Type: application/json'{sent} \\",
        f"    -d {body}",
        "Python:",
        *(["  import os"] if ready.asks_key else []),
        "  from openai import OpenAI",
        f'  client = OpenAI(base_url="{url}", api_key={key})',
        f'  reply = client.chat.completions.create(model="{model}", messages=[{message}])',
        "  print(reply.choices[0].message.content)",
        "Aider, with the right settings, or plainly:",
        f"  {program()} aider",
        f"  OPENAI_API_BASE={url} OPENAI_API_KEY={shown} aider --model openai/{model}",
        "Claude Code:",
        f'  eval "$({program()} env --anthropic)" && claude',
    ]
