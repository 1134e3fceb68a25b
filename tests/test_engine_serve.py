"""`loraport serve` with the real vLLM on this machine's CPU, and a random adapter on a random base."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from loraport.clients.home import Home
from loraport.train.manifest import Manifest
from tests.adapters import make_tiny_adapter
from tests.models import CHATML, make_tiny_base
from tests.serving import Serving, serving

pytestmark = pytest.mark.engine


THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}",
)


def greedy(base_url: str, model: str, prompt: list[int]) -> str:
    """The greedy reply of a model."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{base_url}/completions", json=body, timeout=60).raise_for_status().json()
    return str(answer["choices"][0]["text"])


def test_a_verified_adapter_answers_next_to_its_base(home: Home, tmp_path: Path) -> None:
    """One at a time and in one batch, with the prompts of training; and stopping leaves nothing (`serving` looks)."""
    base = make_tiny_base(tmp_path / "tiny-base", THINKING)
    manifest = Manifest.read(make_tiny_adapter(home.root, base, "demo"))
    assert manifest.chat_template_kwargs == {"enable_thinking": False}
    with serving(home, "demo") as running:
        document = running.ready()
        [adapter] = document["adapters"]
        assert (adapter["state"], adapter["prompts"], adapter["telling"]) == ("verified", 3, 3)
        url = document["base_url"]
        cards = httpx.get(f"{url}/models").json()["data"]
        assert {card["id"] for card in cards} == {"base", "demo"}
        assert next(card for card in cards if card["id"] == "base")["aliases"] == ["tiny-base"]
        assert next(card for card in cards if card["id"] == "base")["max_model_len"] == document["context"] == 1024
        prompt = manifest.golden[0].prompt_tokens
        assert greedy(url, "base", prompt) == greedy(url, "tiny-base", prompt) != greedy(url, "demo", prompt)
        body = {"model": "demo", "messages": manifest.golden[0].messages}
        tokens = httpx.post(url.removesuffix("/v1") + "/tokenize", json=body).json()["tokens"]
        assert tokens == prompt and document["plan"]["chat template"]["value"] == "thinking off for demo"
        models = ["base", "demo"] * 4
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda model: greedy(url, model, prompt), models))
        assert together == [greedy(url, model, prompt) for model in models]
        assert len(running.processes()) >= 3
    assert running.process.returncode == 0 and not list(home.run.iterdir())


def test_swapped_weights_are_noticed(home: Home, tiny_base: Path) -> None:
    """In bfloat16, where the tolerance is wide, and with weights of the same shapes: only the replies can tell."""
    mine = make_tiny_adapter(home.root, tiny_base, "demo")
    other = make_tiny_adapter(home.root, tiny_base, "other", seed=2)
    shutil.copy(other / "adapter_model.safetensors", mine / "adapter_model.safetensors")
    running = Serving(home, "demo", "--dtype", "bfloat16")
    assert running.end() == 3
    assert "error: the adapter demo@v1 does not answer as it did in training" in running.text
    assert "expected: " in running.text and "log-probabilities" in running.text and not list(home.run.iterdir())


def test_without_the_empty_slot_the_mix_up_of_vllms_cpu_kernels_is_seen(home: Home, tiny_base: Path) -> None:
    """Once this starts, vLLM has mended it: then versions.spare_slots can go by the version."""
    make_tiny_adapter(home.root, tiny_base, "demo")
    running = Serving(home, "demo", "--", "--max-loras", "1")
    assert running.end() == 3
    assert "error: requests for base get the weights of another model when they are computed" in running.text


def test_prompts_unlike_those_of_training_are_noticed(home: Home, tmp_path: Path) -> None:
    make_tiny_adapter(home.root, make_tiny_base(tmp_path / "tiny-base", THINKING), "demo")
    other = tmp_path / "other.jinja"
    other.write_text(THINKING + "Well,")
    running = Serving(home, "demo", "--", "--chat-template", str(other))
    assert running.end() == 3
    assert "error: the engine renders messages for demo@v1 differently than training did (prompt 1" in running.text
    assert "served:" in running.text and "Well," in running.text
