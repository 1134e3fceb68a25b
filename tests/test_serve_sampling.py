"""What a client gets that sets nothing: of the engine for all models, of the gateway for one."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraport.clients.errors import BaseModelError
from loraport.clients.home import write_json
from loraport.serve.engine.sampling import choices, engine_config, engine_ends, model_defaults
from loraport.serve.gateway import body as bodies
from loraport.serve.gateway.body import Body, fill_defaults
from loraport.serve.gateway.state import Model
from loraport.train.base_model import Base
from loraport.train.manifest import Manifest
from tests.gateway import CONTEXT, asking, gated

CHAT = "/v1/chat/completions"


def manifest(*stop_tokens: int, **switches: bool) -> Manifest:
    return Manifest.model_construct(name="mine", stop_tokens=list(stop_tokens), chat_template_kwargs=switches)


def base(folder: Path, config: dict[str, Any] | None) -> Base:
    if config is not None:
        write_json(folder / "generation_config.json", config)
    return Base(str(folder), folder)


PUBLISHED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}
USUAL = {"temperature": 0.7, "top_p": 0.95, "do_sample": True}
CASES = {
    "all is there": (PUBLISHED | {"eos_token_id": [0, 2]}, [2], None),
    "one end of turn, as a number": (PUBLISHED | {"eos_token_id": 2}, [2], None),
    "the adapters' stop tokens lack": (PUBLISHED | {"eos_token_id": 0}, [2], PUBLISHED | {"eos_token_id": [0, 2]}),
    "nothing is said of sampling": ({"eos_token_id": 2}, [2], USUAL | {"eos_token_id": [2]}),
    "greedy is what transformers writes for nothing": (
        {"eos_token_id": 2, "do_sample": False, "transformers_version": "5"},
        [],
        USUAL | {"eos_token_id": [2]},
    ),
    "a limit that vLLM would hold against every client": (
        PUBLISHED | {"eos_token_id": 2, "max_new_tokens": 2048},
        [],
        PUBLISHED | {"eos_token_id": [2]},
    ),
    "no file": (None, [2], USUAL | {"eos_token_id": [2]}),
    "no file, no adapter": (None, [], USUAL),
    "only penalties": (
        {"repetition_penalty": 1.1, "eos_token_id": 2},
        [],
        {"repetition_penalty": 1.1, "eos_token_id": [2]} | USUAL,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_engine_gets_what_the_base_says_and_what_it_lacks(name: str, tmp_path: Path) -> None:
    config, stop_tokens, expected = CASES[name]
    assert engine_config(base(tmp_path, config), [manifest(*stop_tokens)]) == expected


def test_vllm_reads_it_so(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    made = engine_config(base(tmp_path, {"eos_token_id": 0, "max_new_tokens": 9}), [manifest(2)])
    write_json(tmp_path / "generation_config.json", made)
    read = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()  # as vllm/transformers_utils/config.py does
    assert {name: read.get(name) for name in ("temperature", "top_p", "eos_token_id", "max_new_tokens")} == {
        "temperature": 0.7,
        "top_p": 0.95,
        "eos_token_id": [0, 2],
        "max_new_tokens": None,
    }


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"generation_config\.json cannot be read"):
        engine_config(Base(str(tmp_path), tmp_path), [])


def test_words_for_the_plan(tmp_path: Path) -> None:
    said = choices(base(tmp_path, PUBLISHED | {"eos_token_id": 0}), [manifest(0, 2)])
    assert [(choice.name, choice.value) for choice in said] == [
        ("sampling", "temperature 0.6, top_p 0.95, top_k 20"),
        ("stop tokens", "2"),
    ]
    assert said[0].reason == "as published with the base"
    assert choices(base(tmp_path, {}), [])[0].value == "temperature 0.7, top_p 0.95"


def test_an_adapter_brings_its_switches_and_what_was_unknown_at_the_start(tmp_path: Path) -> None:
    where = base(tmp_path, {"eos_token_id": 0})
    first, later = manifest(0, 2, enable_thinking=False), manifest(0, 2, 5)
    ends = engine_ends(where, [first])
    assert ends == {0, 2}
    assert model_defaults(first, ends) == {"chat_template_kwargs": {"enable_thinking": False}}
    assert model_defaults(later, ends) == {"stop_token_ids": [5]}
    assert model_defaults(manifest(0), ends) == {}


OFF = {"chat_template_kwargs": {"enable_thinking": False}}
FILLED = {
    "what is not said": (CHAT, {}, OFF, OFF),
    "a switch that is said": (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}, OFF, None),
    "another switch": (
        CHAT,
        {"chat_template_kwargs": {"documents": []}},
        OFF,
        {"chat_template_kwargs": {"enable_thinking": False, "documents": []}},
    ),
    "Anthropic's route": ("/v1/messages", {}, OFF, OFF),
    "text without a template": ("/v1/completions", {}, OFF, None),
    "messages to count": ("/tokenize", {"messages": []}, OFF, OFF),
    "text to count": ("/tokenize", {"prompt": "x"}, OFF | {"temperature": 0.2}, None),
    "what no template takes": (CHAT, {"chat_template_kwargs": "no"}, OFF, None),
    "a temperature": (CHAT, {}, {"temperature": 0.2}, {"temperature": 0.2}),
    "a temperature of null": (CHAT, {"temperature": None}, {"temperature": 0.2}, {"temperature": 0.2}),
    "a temperature that is said": (CHAT, {"temperature": 0}, {"temperature": 0.2}, None),
    "stop tokens": ("/v1/completions", {}, {"stop_token_ids": [5]}, {"stop_token_ids": [5]}),
    "stop tokens beside others": (
        CHAT,
        {"stop_token_ids": [7]},
        {"stop_token_ids": [5, 7]},
        {"stop_token_ids": [7, 5]},
    ),
    "stop tokens where vLLM takes none": ("/v1/messages", {}, {"stop_token_ids": [5]}, None),
    "embeddings": ("/v1/embeddings", {}, OFF | {"temperature": 0.2, "stop_token_ids": [5]}, None),
    "nothing to fill": (CHAT, {}, {}, None),
}


@pytest.mark.parametrize("name", FILLED)
def test_the_gateway_fills_what_a_request_does_not_say(name: str) -> None:
    path, said, defaults, expected = FILLED[name]
    body = bodies.parse(json.dumps({"model": "mine"} | said).encode(), 8)
    before = body.raw
    fill_defaults(path, body, Model("mine", defaults=defaults).defaults)
    if expected is None:
        assert body.raw is before
    else:
        assert json.loads(body.raw) == body.fields == {"model": "mine"} | said | expected


def test_thinking_beside_the_messages_counts_more_than_a_default() -> None:
    body = Body(b"", {"model": "mine", "enable_thinking": True})
    bodies.move_thinking(CHAT, body)
    fill_defaults(CHAT, body, OFF)
    assert body.fields["chat_template_kwargs"] == {"enable_thinking": True}


def test_defaults_go_through_the_gateway_to_the_engine_and_to_one_model_alone() -> None:
    with gated() as gate:
        gate.state.put(Model("demo", "adapter", max_model_len=CONTEXT, defaults=OFF | {"stop_token_ids": [5]}))
        assert gate.chat(model="demo").status_code == gate.chat().status_code == 200
        adapter, base_one = (json.loads(body) for body in gate.engine.bodies()[-2:])
        assert adapter == asking(model="demo") | OFF | {"stop_token_ids": [5]}
        assert base_one == asking()
