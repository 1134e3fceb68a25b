"""`loraport keys`: what is printed where, what is kept, and what a running gateway makes of it."""

import json
import stat
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from loraport.clients.errors import UsageError
from loraport.clients.home import Home
from loraport.serve.gateway import keys
from loraport.serve.gateway.cli import keys_create, keys_list, keys_revoke, seconds, words
from tests.gateway import CHAT, asking, gated


def loraport(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`loraport keys` as a process."""
    command = [sys.executable, "-m", "loraport_cli", "keys", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def listed(capsys: pytest.CaptureFixture[str], **flags: Any) -> dict[str, dict[str, Any]]:
    """`loraport keys list --json`, by name."""
    capsys.readouterr()
    keys_list(json=True, **flags)
    return {key["name"]: key for key in json.loads(capsys.readouterr().out)}


def test_the_key_stands_alone_on_standard_output_and_is_kept_nowhere(home: Home) -> None:
    done = loraport("create", "laptop", "--models", "demo,base", "--rate", "60", "--concurrency", "4")
    text = done.stdout.strip()
    assert done.returncode == 0 and text.startswith("lp-") and len(text.split()) == 1
    assert text not in done.stderr and "first key" in done.stderr
    assert "demo is no adapter on this machine" in done.stderr
    assert stat.S_IMODE((home.root / "keys.json").stat().st_mode) == 0o600
    assert not [path for path in home.root.rglob("*") if path.is_file() and text in path.read_text()]
    (key,) = keys.read(home.root / "keys.json")
    assert (key.adapters, key.requests_per_minute, key.concurrency) == (("demo", "base"), 60, 4)
    assert not key.is_admin and key.expires is None


def test_one_json_document(capsys: pytest.CaptureFixture[str], home: Home) -> None:
    keys_create("root", admin=True, expires_in="2h", json=True)
    made = json.loads(capsys.readouterr().out)
    assert keys.Ring(home.root / "keys.json").find(made["key"])
    assert made["is_admin"] and made["models"] is None and made["state"] == "valid"
    assert 7100 < made["expires"] - time.time() < 7201
    assert "key" not in listed(capsys)["root"] and "sha256" not in listed(capsys)["root"]


def test_a_running_gateway_follows_and_the_list_shows_what_was_used(
    capsys: pytest.CaptureFixture[str], home: Home
) -> None:
    files = {"keys_path": home.root / "keys.json", "usage_path": home.root / "usage" / "8000.json", "flush_s": 0.05}
    with gated(files) as gate:
        assert gate.chat().status_code == 200  # nobody has made a key yet
        keys_create("laptop")
        text = capsys.readouterr().out.strip()
        assert gate.chat().status_code == 401
        headers = {"authorization": f"Bearer {text}"}
        assert gate.client.post(CHAT, json=asking(), headers=headers).status_code == 200
        keys_revoke("laptop")
        assert gate.client.post(CHAT, json=asking(), headers=headers).status_code == 401
        keys_create("laptop")
    used = listed(capsys)["laptop"]["usage"]
    assert (used["requests"], used["completion_tokens"]) == (1, 4) and used["last"] > time.time() - 60
    everything = json.loads(loraport("list", "--all", "--json").stdout)
    assert [(key["state"], key["usage"]["requests"]) for key in everything] == [("revoked", 0), ("valid", 1)]


def test_the_table_and_the_last_key(capsys: pytest.CaptureFixture[str], home: Home) -> None:
    keys_list()
    keys_create("laptop", models=["demo"], rate=60, expires_in="30d")
    keys_list()
    keys_revoke("laptop")
    keys_list()
    said = capsys.readouterr().err
    for words_ in ("there are no keys", "60 a minute", "valid", "no key is left", "every key was revoked"):
        assert words_ in said


def test_a_key_expires(home: Home) -> None:
    path = home.root / "keys.json"
    text, key = keys.create(path, "guest", lifetime_s=60)
    ring = keys.Ring(path)
    assert ring.find(text) == key and key.expires
    assert key.is_living(key.expires - 1) and not key.is_living(key.expires)
    over, _ = keys.create(path, "over", lifetime_s=-1)
    assert ring.find(over) is None and ring.asks


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "a b"], "is not a name for a key"),
        (["create", "laptop"], "there is a key named laptop already"),
        (["create", "x", "--rate", "0"], "is not a limit for requests per minute"),
        (["create", "x", "--models", ","], "--models names nothing"),
        (["create", "x", "--expires-in", "soon"], "--expires-in soon is not a time"),
        (["revoke", "lapto"], "did you mean laptop?"),
    ],
)
def test_wrong_usage_is_a_sentence_and_changes_nothing(home: Home, arguments: list[str], says: str) -> None:
    path = home.root / "keys.json"
    keys.create(path, "laptop")
    before = path.read_bytes()
    done = loraport(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and "\nhint: " in done.stderr
    assert path.read_bytes() == before


def test_flags_are_read() -> None:
    assert words(["a,b", "b", " c "]) == ["a", "b", "c"] and words(None) is None
    assert [seconds(text) for text in ("90m", "12h", "30d")] == [5400, 43200, 2592000]
    for text in ("", "0d", "-1h", "1", "1w", "9999999h"):
        with pytest.raises(UsageError):
            seconds(text)


def test_usage_of_several_gateways_is_one_sum(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    keys_create("laptop")
    folder = home.ensure(home.root / "usage")
    for port, last in ((8000, 5), (8001, 9)):
        one = {"requests": 2, "prompt_tokens": 10, "last": last}
        (folder / f"{port}.json").write_text(json.dumps({"laptop": one}))
    (folder / "8002.json").write_text("{")
    used = listed(capsys)["laptop"]["usage"]
    assert (used["requests"], used["prompt_tokens"], used["last"]) == (4, 20, 9)


def test_an_endpoint_that_is_open_to_the_network_is_opened_by_its_first_key(
    capsys: pytest.CaptureFixture[str], home: Home
) -> None:
    with gated({"host": "0.0.0.0", "keys_path": home.root / "keys.json"}) as gate:
        refused: httpx.Response = gate.chat()
        assert refused.status_code == 401 and "loraport keys create" in refused.json()["error"]["message"]
        keys_create("laptop")
        headers = {"authorization": f"Bearer {capsys.readouterr().out.strip()}"}
        assert gate.client.post(CHAT, json=asking(), headers=headers).status_code == 200
