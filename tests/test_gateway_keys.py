"""API keys: the file, what a key may do, its limits and its usage, and who needs none."""

import json
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraport.clients.errors import ConfigError, UsageError
from loraport.serve.gateway import keys
from loraport.serve.gateway.access import anyone
from loraport.serve.gateway.keys import Key, Ring
from loraport.serve.gateway.limits import Limits
from loraport.serve.gateway.models import is_allowed
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.gateway.settings import GatewaySettings, is_loopback
from loraport.serve.gateway.state import Model
from loraport.serve.gateway.usage import Tokens, Usage, read_usage
from tests.gateway import CHAT, Gated, asking, error_of, gated
from tests.serving import wait_until


@dataclass
class Locked:
    """A gateway that asks for keys."""

    gate: Gated
    path: Path
    usage: Path

    def ask(self, text: str | None, path: str = CHAT, **more: Any) -> httpx.Response:
        """A request with a key: a chat, or a GET of another path."""
        headers = {"authorization": f"Bearer {text}"} if text else {}
        if path == CHAT:
            return self.gate.client.post(CHAT, json=asking(**more), headers=headers)
        return self.gate.client.get(path, headers=headers)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Locked]:
    path, usage = tmp_path / "home" / "keys.json", tmp_path / "home" / "usage.json"
    keys.create(path, "first")
    with gated({"keys_path": path, "usage_path": usage, "flush_s": 0.1}, token_s="0.05") as gate:
        yield Locked(gate, path, usage)


def test_the_file_is_private_and_holds_no_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.json"
    text, key = keys.create(path, "laptop", adapters=["demo"], requests_per_minute=60)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert text.startswith("lp-") and len(text) == 46 and text not in path.read_text()
    assert keys.read(path) == [key] and key.adapters == ("demo",)
    assert keys.create(path, "other")[0] != text


def test_keys_are_made_and_revoked_by_name(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text, _ = keys.create(path, "laptop")
    with pytest.raises(UsageError, match="already"):
        keys.create(path, "laptop")
    ring = Ring(path)
    assert ring.find(text)
    assert keys.revoke(path, "laptop").revoked is not None
    assert ring.find(text) is None
    with pytest.raises(UsageError, match="no key named laptop"):
        keys.revoke(path, "laptop")
    keys.create(path, "laptop")
    assert [key.revoked is None for key in keys.read(path)] == [False, True]


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "a\nb"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        keys.create(tmp_path / "keys.json", name)
    assert not (tmp_path / "keys.json").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"keys": [{"name": "x"}]}', '{"keys": 3}'])
def test_a_damaged_file_opens_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        Ring(path)
    path.unlink()
    ring = Ring(path)
    assert not ring.asks
    path.write_text(text)
    assert ring.find("x") is None and ring.asks


def test_once_there_was_a_key_keys_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text, _ = keys.create(path, "only")
    ring = Ring(path)
    path.unlink()
    assert ring.find(text) is None and ring.asks


def test_requests_need_a_living_key(locked: Locked) -> None:
    text, _ = keys.create(locked.path, "laptop")
    refused, wrong, other = locked.ask(None), locked.ask("lp-" + "x" * 43), locked.ask("sk-" + "x" * 43)
    assert (refused.status_code, error_of(refused)["code"]) == (401, "missing_api_key")
    assert (wrong.status_code, error_of(wrong)["code"]) == (401, "invalid_api_key")
    assert other.status_code == 401 and "begin with lp-" in error_of(other)["message"]
    assert locked.ask(text).status_code == 200  # made while the gateway runs
    assert locked.gate.client.post(CHAT, json=asking(), headers={"x-api-key": text}).status_code == 200
    assert locked.ask(None, "/v1/models").status_code == 401
    assert locked.ask(None, "/health").status_code == 200
    keys.revoke(locked.path, "laptop")
    assert locked.ask(text).status_code == 401


def test_a_key_sees_and_uses_its_own_models_only(locked: Locked) -> None:
    text, _ = keys.create(locked.path, "narrow", adapters=["demo"])
    assert [card["id"] for card in locked.ask(text, "/v1/models").json()["data"]] == ["demo"]
    assert locked.ask(text, model="demo:latest").status_code == 200
    refused = locked.ask(text, model="base")
    assert refused.status_code == 404 and "base" not in error_of(refused)["models"]
    assert locked.ask(text, "/v1/models/base").status_code == 404


def test_a_key_for_a_name_is_one_for_its_versions() -> None:
    key = Key("k", "", 0, adapters=("demo",))
    allowed = [Model("demo", "adapter"), Model("demo@3", "adapter"), Model("x", "adapter", aliases=("demo:prev",))]
    refused = [Model("demo2", "adapter"), Model("base"), Model("other@demo", "adapter")]
    assert [is_allowed(key, model) for model in [*allowed, *refused]] == [True] * 3 + [False] * 3


def test_admin_routes_need_an_admin_key(locked: Locked) -> None:
    (plain, _), (admin, _) = keys.create(locked.path, "plain"), keys.create(locked.path, "root", is_admin=True)
    for path in ("/admin/engine", "/admin/keys", "/admin/usage"):
        assert locked.ask(None, path).status_code == 401
        assert locked.ask(plain, path).status_code == 403
        assert locked.ask(admin, path).status_code == 200
    listed = locked.ask(admin, "/admin/keys")
    assert "sha256" not in listed.text and {key["name"] for key in listed.json()["keys"]} == {"first", "plain", "root"}
    assert locked.ask(admin, "/admin/engine").json()["phase"] == "ready"
    assert locked.ask(admin, "/admin/other").status_code == 404


def test_limits_answer_429_with_retry_after(locked: Locked) -> None:
    text, _ = keys.create(locked.path, "slow", requests_per_minute=2)
    assert [locked.ask(text).status_code for _ in range(3)] == [200, 200, 429]
    refused = locked.ask(text)
    assert error_of(refused)["code"] == "rate_limit_exceeded" and 1 <= int(refused.headers["retry-after"]) <= 30
    single, _ = keys.create(locked.path, "single", concurrency=1)
    headers = {"authorization": f"Bearer {single}"}
    with locked.gate.client.stream("POST", CHAT, json=asking(stream=True, max_tokens=900), headers=headers):
        assert error_of(locked.ask(single))["code"] == "concurrency_limit_exceeded"
    wait_until(lambda: locked.ask(single).status_code == 200, "the place of the request that was hung up", 5)


def test_the_bucket_fills_evenly() -> None:
    now = [0.0]
    limits, key = Limits(lambda: now[0]), Key("k", "hash", 0, requests_per_minute=60)
    for _ in range(60):
        limits.enter(key)
    with pytest.raises(Refusal) as refused:
        limits.enter(key)
    assert refused.value.headers == {"Retry-After": "1"}
    now[0] += 1.01
    limits.enter(key)
    with pytest.raises(Refusal):
        limits.enter(key)


def test_usage_is_counted_and_kept(locked: Locked) -> None:
    text, _ = keys.create(locked.path, "laptop")
    locked.ask(text, max_tokens=3)
    locked.ask(text, max_tokens=2, stream=True, stream_options={"include_usage": True})
    shown = locked.ask(text, max_tokens=2, stream=True)
    assert shown.text.endswith("data: [DONE]\n\n") and "usage" not in shown.text  # counted, and not shown
    locked.ask(text, max_tokens=2, stream=True, stream_options={"include_usage": False})
    locked.ask(text, model="nothing")
    expected = {"requests": 5, "prompt_tokens": 15, "completion_tokens": 7, "uncounted": 1, "refused": 1}

    def kept() -> dict[str, int]:
        return dict(json.loads(locked.usage.read_text()).get("laptop", {})) if locked.usage.exists() else {}

    wait_until(lambda: expected.items() <= kept().items(), "usage", 5)
    assert stat.S_IMODE(locked.usage.stat().st_mode) == 0o600
    assert Usage(locked.usage).document()["laptop"] == kept()


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"requests": "x"}}'])
def test_a_usage_file_that_cannot_be_read_starts_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "usage.json").write_text(text)
    assert Usage(tmp_path / "usage.json").document() == {}


USAGES = [
    (b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}', Tokens(3, 4)),
    (b'..."usage":{"prompt_tokens":3,"total_tokens":3}}', Tokens(3, 0)),
    (b'data: {"type":"message_delta","usage":{"input_tokens":5,"output_tokens":6}}\n\n', Tokens(5, 6)),
    (b'{"content": "\\"usage\\": {\\"prompt_tokens\\": 9}"}', None),
    (b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}, "x": 1}\n\n{"usage": null}', Tokens(1, 1)),
    (b'{"usage": {"prompt_tok', None),
]


@pytest.mark.parametrize(("tail", "expected"), USAGES)
def test_usage_is_read_from_the_end_of_a_reply(tail: bytes, expected: Tokens | None) -> None:
    assert read_usage(tail) == expected


def test_nobody_may_ask_without_keys_but_on_loopback() -> None:
    with gated({"host": "0.0.0.0"}) as gate:
        refused = gate.chat()
        assert (refused.status_code, error_of(refused)["code"]) == (401, "no_keys")
        assert not gate.engine.bodies()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""])
def test_a_web_page_cannot_reach_a_gateway_without_keys(host: str) -> None:
    with pytest.raises(Refusal):
        anyone(httpx_headers(host), GatewaySettings("127.0.0.1", 8000))


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_this_machine_can(host: str) -> None:
    assert not anyone(httpx_headers(host), GatewaySettings("127.0.0.1", 8000)).is_admin


def test_who_comes_through_a_proxy_needs_a_key() -> None:
    with pytest.raises(Refusal) as caught:
        anyone(
            httpx_headers("127.0.0.1:8000", **{"x-forwarded-for": "203.0.113.9"}), GatewaySettings("127.0.0.1", 8000)
        )
    assert caught.value.status == 403 and "through a proxy" in caught.value.message


def httpx_headers(host: str, **more: str) -> Any:
    """Headers of a request to a host."""
    from starlette.datastructures import Headers

    return Headers({"host": host, **more})


LOOPBACK = {"127.0.0.1": True, "127.9.9.9": True, "::1": True, "::ffff:127.0.0.1": True, "localhost": True}
OTHERS = {"0.0.0.0": False, "::": False, "10.0.0.1": False, "example.org": False, "127.0.0.1.example.org": False}


@pytest.mark.parametrize(("host", "expected"), (LOOPBACK | OTHERS).items())
def test_loopback_is_this_machine_alone(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_revoked_keys_name_starts_with_fresh_limits(tmp_path: Path) -> None:
    path, limits = tmp_path / "keys.json", Limits()
    _, old = keys.create(path, "k", concurrency=1)
    limits.enter(old)
    keys.revoke(path, "k")
    _, new = keys.create(path, "k", concurrency=1)
    limits.enter(new)
    limits.leave(old)
    with pytest.raises(Refusal):
        limits.enter(new)
    assert new.created >= old.created and time.time() >= new.created
