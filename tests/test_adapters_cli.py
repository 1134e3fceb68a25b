"""`loraport adapters` on a home and against a gateway; the admin routes that it asks, and vLLM's own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraport.clients.endpoint import EndpointRecord, process_identity, read_records
from loraport.clients.errors import AdapterError, EndpointError, Refused, ResourceError, UsageError, VerificationError
from loraport.clients.home import Home
from loraport.serve.adapters import cli, remote
from loraport.serve.adapters.catalog import Catalog, open_reference
from loraport.serve.gateway import keys
from loraport.serve.gateway.state import Phase
from loraport.serve.proof import prompts
from loraport.train.base_model import Base
from tests.gateway import error_of
from tests.serving import wait_until
from tests.test_adapters_accept import base, write_adapter
from tests.test_adapters_live import V32, Bench, bench, write_version

__all__ = ["base"]  # a fixture


@pytest.fixture
def at(home: Home, base: Base) -> Iterator[Bench]:
    """An endpoint that has left its record and the key for its owner, and two versions of `demo`."""
    write_version(home, base, "v1")
    write_version(home, base, "v2", token=6)
    with bench(home, base) as made:
        EndpointRecord(
            base_url=f"{made.running.url}/v1",
            port=8000,
            models=["base"],
            adapters=[],
            max_model_len=1000,
            process=process_identity(os.getpid()),
            engine=None,
            admin_key=made.running.gateway.ring.issue(),
        ).write(home)
        yield made


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    """The one JSON document on standard output."""
    return json.loads(capsys.readouterr().out)


def test_load_list_roll_back_verify_unload(at: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    cli.load_adapter("demo@v1", json=True)
    assert printed(capsys)["state"] == "verified"
    cli.load_adapter("demo")
    assert "demo serves now v2, verified: 3 replies as in training, 3 unlike the base's" in capsys.readouterr().err
    cli.list_adapters(json=True)
    first, second = printed(capsys)
    assert (first["version"], first["aliases"], first["serving"]) == ("v1", ["prev"], None)
    assert (second["version"], second["aliases"], second["serving"]["state"]) == ("v2", ["latest"], "verified")
    cli.roll_back("demo", json=True)
    assert printed(capsys)["version"] == "v1" and at.asked("demo") == "demo@v1"
    cli.verify_adapter("demo", json=True)
    assert printed(capsys)["prompts"] == 3
    cli.list_adapters()
    assert "latest" in (text := capsys.readouterr().err) and "verified" in text
    cli.unload_adapter("demo", json=True)
    assert printed(capsys) == {"unloaded": "demo"} and at.asked("demo") is None


def test_a_folder_is_found_from_where_the_command_runs(
    at: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "elsewhere" / "lora")
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli.load_adapter("mine=lora")
    assert "mine serves now" in (said := capsys.readouterr().err) and "cannot be compared, but it is applied" in said
    cli.list_adapters(json=True)
    foreign = printed(capsys)[-1]
    assert (foreign["name"], foreign["is_foreign"], foreign["serving"]["state"]) == ("mine", True, "unproven")
    cli.list_adapters()
    assert "unproven" in capsys.readouterr().err


def test_refusals_of_the_endpoint_are_our_errors_again(at: Bench, home: Home) -> None:
    with pytest.raises(AdapterError, match="there is no adapter nobody in") as caught:
        cli.load_adapter("nobody")
    assert caught.value.hint == "there is: demo"
    with pytest.raises(UsageError, match="'a b' cannot be the name of an adapter"):
        cli.load_adapter("demo", name="a b")
    at.knob(wrong="demo@v2")
    with pytest.raises(VerificationError, match="loaded but not applied") as failed:
        cli.load_adapter("demo")
    assert any(line.startswith("expected: ") for line in failed.value.details)


def test_without_the_key_nobody_changes_anything(at: Bench, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for method, path in (("GET", "/admin/adapters"), ("POST", "/admin/adapters"), ("POST", "/v1/load_lora_adapter")):
        assert at.client.request(method, path, json={}).status_code == 403
    monkeypatch.setenv("LORAPORT_ADMIN_KEY", "lp-wrong")
    keys.create(home.root / "keys.json", "someone")
    [record] = read_records(home)
    replace(record, admin_key=None).write(home)  # as of an endpoint on another machine
    with pytest.raises(EndpointError, match="does not allow it: The API key is not known") as caught:
        cli.unload_adapter("demo")
    assert "set LORAPORT_ADMIN_KEY to an admin key" in caught.value.hint
    monkeypatch.setenv("LORAPORT_ADMIN_KEY", keys.create(home.root / "keys.json", "root", is_admin=True)[0])
    cli.load_adapter("demo@v1")


def test_vllms_own_paths_do_the_same(at: Bench, home: Home) -> None:
    key = {"authorization": f"Bearer {at.running.gateway.ring.issue()}"}
    body = {"lora_name": "demo", "lora_path": str(home.adapters / "demo" / "v1")}
    answer = at.client.post("/v1/load_lora_adapter", json=body, headers=key)
    assert answer.text == "Success: LoRA adapter 'demo' added successfully." and at.asked("demo") == "demo@v1"
    refused = at.client.post("/v1/load_lora_adapter", json={"lora_name": "demo"}, headers=key)
    assert refused.status_code == 400 and '"lora_name", "lora_path"' in error_of(refused)["message"]
    assert at.client.post("/v1/unload_lora_adapter", json={"lora_name": "demo"}, headers=key).status_code == 200
    again = at.client.post("/v1/unload_lora_adapter", json={"lora_name": "demo"}, headers=key)
    assert again.status_code == 422 and "there is no adapter demo" in error_of(again)["message"]


def test_an_endpoint_that_cannot_change_adapters_says_so(at: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    at.running.gateway.adapters = None
    with pytest.raises(Refused, match="This endpoint cannot change its adapters while it runs"):
        cli.load_adapter("demo")
    cli.list_adapters(json=True)
    assert [row["serving"] for row in printed(capsys)] == [None, None]


def test_before_there_is_an_engine_it_says_when_to_come_back(at: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    at.running.gateway.adapters = None
    at.state.begin(Phase.STARTING, "checking adapters and base", expected_s=40)
    key = {"authorization": f"Bearer {at.running.gateway.ring.issue()}"}
    routes = (("GET", "/admin/adapters"), ("POST", "/admin/adapters"), ("DELETE", "/admin/adapters/demo"))
    for method, path in (*routes, ("POST", "/admin/adapters/demo/verify"), ("POST", "/v1/load_lora_adapter")):
        answer = at.client.request(method, path, headers=key)
        assert answer.status_code == 503 and error_of(answer)["code"] == "engine_starting"
        assert 30 < int(answer.headers["retry-after"]) <= 40


def test_changes_wait_for_the_engine_and_lists_do_not(at: Bench) -> None:
    at.state.begin(Phase.RESTARTING, "it crashed")
    with pytest.raises(Refused, match="The engine is restarting: it crashed"):
        cli.load_adapter("demo")
    key = {"authorization": f"Bearer {at.running.gateway.ring.issue()}"}
    assert at.client.post("/admin/adapters", headers=key).headers["retry-after"] == "5"
    assert at.client.get("/admin/adapters", headers=key).status_code == 200


def test_a_busy_engine_is_told_of_in_words(at: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at.knob(freeze=str(tmp_path / "frozen"))
    cli.load_adapter("demo@v1")
    (tmp_path / "frozen").touch()
    with monkeypatch.context() as impatient:
        impatient.setattr(prompts, "TIMEOUT_S", 0.2)
        with pytest.raises(EndpointError, match=r"the engine did not answer /tokenize within 0 s\.$") as caught:
            cli.verify_adapter("demo")
        assert "busy" in caught.value.hint
        impatient.setattr(remote, "CHANGE_S", 0.2)
        with pytest.raises(EndpointError, match=r"is busy: it has not finished within 0 s\.$") as late:
            cli.load_adapter("demo@v2")
    assert "`loraport adapters list` shows" in late.value.hint
    (tmp_path / "frozen").unlink()
    wait_until(lambda: at.asked("demo") == "demo@v2", "the load that nobody waits for")


def test_ctrl_c_does_not_wait_for_a_load(at: Bench, tmp_path: Path) -> None:
    at.knob(freeze=str(tmp_path / "frozen"))
    (tmp_path / "frozen").touch()
    command = [sys.executable, "-m", "loraport_cli", "adapters", "load", "demo@v1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: at.live.is_changing, "the load")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)  # the engine is still frozen
    assert process.returncode == 130 and said.startswith("stopped waiting; the endpoint goes on with it")
    (tmp_path / "frozen").unlink()
    wait_until(lambda: at.asked("demo") == "demo@v1", "the load that went on")


def test_the_endpoint_of_this_machine_comes_before_the_variables(at: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may name another's server, which must not be sent an admin key."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    cli.load_adapter("demo@v1")
    assert at.asked("demo") == "demo@v1"


def test_no_endpoint(home: Home) -> None:
    with pytest.raises(EndpointError, match="no endpoint of Loraport runs on this machine"):  # and none is in variables
        cli.load_adapter("demo")
    with pytest.raises(EndpointError, match="nothing answers at http://127"):
        cli.load_adapter("demo", base_url="http://127.0.0.1:9/v1")


def test_versions_are_removed_but_not_those_that_are_served(
    at: Bench, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.load_adapter("demo@v1")
    cli.load_adapter("demo@v2")
    with pytest.raises(ResourceError, match="demo@v2 is served on port 8000"):
        cli.remove_adapter("demo@v2")
    with pytest.raises(ResourceError, match=r"unload it first|is served"):
        cli.remove_adapter("demo", every=True)
    with pytest.raises(ResourceError, match="demo@v1 is the version before the one that is served, and still loaded"):
        cli.remove_adapter("demo@v1")
    assert len(list((home.adapters / "demo").glob("v*"))) == 2
    cli.unload_adapter("demo:prev")
    cli.remove_adapter("demo@v1", json=True)
    assert printed(capsys) == {"removed": [str(home.adapters / "demo" / "v1")]}
    assert Catalog(home).aliases("demo").prev is None
    cli.unload_adapter("demo")
    cli.remove_adapter("demo", every=True)
    assert not (home.adapters / "demo").exists()


@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("demo", UsageError, "demo does not say which version to delete."),
        ("demo:latest", UsageError, "demo:latest does not say which version"),
        ("demo@v9", AdapterError, "there is no adapter demo@v9 in"),
        ("../demo@v1", UsageError, "does not say which version"),
    ],
)
def test_what_is_not_removed(home: Home, base: Base, reference: str, kind: type[Exception], message: str) -> None:
    write_version(home, base, "v1")
    with pytest.raises(kind, match=message):
        cli.remove_adapter(reference)
    assert (home.adapters / "demo" / "v1").is_dir()


def test_aliases_are_references(home: Home, base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    for version in ("v1", "v2", "v3"):
        write_version(home, base, version)
    catalog = Catalog(home)
    for version in ("v1", "v2"):
        catalog.set_latest(open_reference(home, f"demo@{version}", V32))
    found = [open_reference(home, name, V32).manifest.version for name in ("demo", "demo:latest", "demo@prev")]
    assert found == ["v3", "v2", "v1"]
    with pytest.raises(UsageError, match="demo:oldest is no reference"):
        open_reference(home, "demo:oldest", V32)
    with pytest.raises(AdapterError, match="there is no other:prev"):
        open_reference(home, "other:prev", V32)
    cli.show_adapter("demo:prev")
    assert printed(capsys)["version"] == "v1"


def test_a_damaged_file_of_aliases_counts_as_none(home: Home, base: Base) -> None:
    folder = write_version(home, base, "v1")
    for text in ("{", "[]", '{"latest": {"x": 1}}', ""):
        (folder.parent / "aliases.json").write_text(text)
        assert Catalog(home).aliases("demo").latest is None
    Catalog(home).set_latest(open_reference(home, "demo", V32))
    assert Catalog(home).aliases("demo").latest is not None


def test_bodies_of_the_admin_routes_are_checked(at: Bench) -> None:
    key = {"authorization": f"Bearer {at.running.gateway.ring.issue()}"}
    for content in (b"", b"{", b"[]", b'{"reference": 3}', b'{"reference": ""}'):
        answer = at.client.post("/admin/adapters", content=content, headers=key)
        assert answer.status_code == 400 and error_of(answer)["code"] == "invalid_body"
    assert isinstance(at.client, httpx.Client) and at.client.get("/admin/adapters", headers=key).json() == {
        "adapters": []
    }
