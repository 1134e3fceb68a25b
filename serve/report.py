"""What `loraport serve` prints when it is ready: where, which models, how fast, and lines to copy."""

import json
from dataclasses import asdict, dataclass
from shlex import quote
from typing import Any

from loraport.clients.endpoint import PLACEHOLDER_KEY
from loraport.clients.terminal import program, say
from loraport.serve.engine.process import Launch
from loraport.serve.proof.verify import Verified

LONGEST_QUESTION = 400  # characters, of a line to copy
ANYWHERE = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class Ready:
    """An endpoint that answers. `phases`: seconds of the engine's start; `seconds`: from command to ready."""

    launch: Launch
    base_url: str
    verified: list[Verified]
    phases: dict[str, float]
    seconds: float

    @property
    def default_model(self) -> str:
        """The first adapter, or the base."""
        return self.verified[0].name if self.verified else self.launch.base_names[0]


def base_url(launch: Launch) -> str:
    """The URL for clients on this machine."""
    host = "127.0.0.1" if launch.host in ANYWHERE else launch.host
    return f"http://{f'[{host}]' if ':' in host else host}:{launch.port}/v1"


def as_json(ready: Ready) -> dict[str, Any]:
    """The document of --json."""
    versions = {adapter.manifest.name: adapter.manifest.version for adapter in ready.launch.adapters}
    plan = ready.launch.plan
    return {
        "base_url": ready.base_url,
        "base": {"names": list(ready.launch.base_names), "folder": str(ready.launch.base.folder)},
        "adapters": [
            asdict(verified) | {"version": versions[verified.name], "state": verified.state}
            for verified in ready.verified
        ],
        "context": plan.context,
        "plan": {choice.name: {"value": choice.value, "reason": choice.reason} for choice in plan.choices},
        "warnings": list(plan.warnings),
        "seconds": round(ready.seconds, 2),
        "phases": {name: round(spent, 2) for name, spent in ready.phases.items()},
    }


def say_ready(ready: Ready) -> None:
    """The same for people, with lines to copy."""
    slow = ", ".join(f"{name} {spent:.1f}" for name, spent in ready.phases.items() if spent >= 0.1)
    say(f"ready in {ready.seconds:.1f} s ({slow} s)", "bold green")
    say("")
    say(f"  base URL  {ready.base_url}", "bold")
    base = ready.launch.base_names
    aliases = f" (also: {', '.join(base[1:])})" if base[1:] else ""
    say(f"  model     {base[0]}{aliases}, the base")
    for adapter, verified in zip(ready.launch.adapters, ready.verified, strict=True):
        say(f"  model     {verified.name}, adapter {adapter.manifest.version}, {describe(verified)}")
    say(f"  context   {ready.launch.plan.context:,} tokens")
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
    return (
        f"verified: {replies} as in training, {verified.telling} unlike the base's, "
        f"within {verified.difference:.3f} nats"
    )


def question(ready: Ready) -> str:
    """Something of the kind that the adapter was trained for, where that is short; a small model knows little else."""
    golden = [reply for adapter in ready.launch.adapters[:1] for reply in adapter.manifest.golden]
    asked = [reply.messages[0]["content"] for reply in golden if len(reply.messages) == 1]
    return min((text for text in asked if len(text) <= LONGEST_QUESTION), key=len, default="Hello")


def lines_to_copy(ready: Ready) -> list[str]:
    """How to reach it with curl, the openai SDK and Aider."""
    url, model = ready.base_url, ready.default_model
    message = json.dumps({"role": "user", "content": question(ready)}, ensure_ascii=False)
    body = quote(f'{{"model": "{model}", "messages": [{message}]}}')
    return [
        "curl:",
        f"  curl {url}/chat/completions -H 'Content-Type: application/json' \\",
        f"    -d {body}",
        "Python:",
        "  from openai import OpenAI",
        f'  client = OpenAI(base_url="{url}", api_key="{PLACEHOLDER_KEY}")',
        f'  reply = client.chat.completions.create(model="{model}", messages=[{message}])',
        "  print(reply.choices[0].message.content)",
        "Aider, with the right settings, or plainly:",
        f"  {program()} aider",
        f"  OPENAI_API_BASE={url} OPENAI_API_KEY={PLACEHOLDER_KEY} aider --model openai/{model}",
    ]
