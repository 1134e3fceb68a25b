"""`loraport serve` with the real vLLM on this machine's CPU, and a random adapter on a random base."""

import shutil
from pathlib import Path

import httpx
import pytest

from loraport.clients.home import Home
from loraport.train.manifest import Manifest
from tests.adapters import make_tiny_adapter
from tests.serving import Serving, serving

pytestmark = pytest.mark.engine


def greedy(base_url: str, model: str, prompt: list[int]) -> str:
    """The greedy reply of a model."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{base_url}/completions", json=body, timeout=60).raise_for_status().json()
    return str(answer["choices"][0]["text"])


def test_a_verified_adapter_answers_next_to_its_base(home: Home, tiny_base: Path) -> None:
    """Also that stopping leaves nothing: `serving` fails when a process is left."""
    manifest = Manifest.read(make_tiny_adapter(home.root, tiny_base, "demo"))
    with serving(home, "demo") as running:
        document = running.ready()
        [adapter] = document["adapters"]
        assert (adapter["state"], adapter["prompts"], adapter["telling"]) == ("verified", 3, 3)
        url = document["base_url"]
        cards = httpx.get(f"{url}/models").json()["data"]
        assert {card["id"] for card in cards} == {"base", "tiny-base", "demo"}
        assert next(card for card in cards if card["id"] == "base")["max_model_len"] == document["context"] == 1024
        prompt = manifest.golden[0].prompt_tokens
        assert greedy(url, "base", prompt) == greedy(url, "tiny-base", prompt) != greedy(url, "demo", prompt)
        assert len(running.processes()) >= 3
    assert running.process.returncode == 0 and not list(home.run.iterdir())


def test_swapped_weights_are_noticed(home: Home, tiny_base: Path) -> None:
    """In bfloat16, where the tolerance is wide, and with weights of the same shapes: only the replies can tell."""
    mine = make_tiny_adapter(home.root, tiny_base, "demo")
    other = make_tiny_adapter(home.root, tiny_base, "other", seed=2)
    shutil.copy(other / "adapter_model.safetensors", mine / "adapter_model.safetensors")
    running = Serving(home, "demo", "--dtype", "bfloat16")
    assert running.end() == 3
    assert "error: the adapter demo does not answer as it did in training" in running.text
    assert "expected: " in running.text and "log-probabilities" in running.text and not list(home.run.iterdir())
