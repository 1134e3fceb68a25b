"""The record of an endpoint, which `loraport chat`, `env`, `eval` and `aider` read: it follows what is served."""

from dataclasses import replace
from pathlib import Path

import pytest

from loraport.clients.endpoint import EndpointRecord, find_base_url, process_identity, read_records
from loraport.clients.errors import AdapterError
from loraport.clients.home import Home
from loraport.serve.adapters import cli
from loraport.serve.adapters.catalog import Catalog, open_reference
from loraport.serve.plan.settings import Wanted
from loraport.serve.serve import Request, find_merged
from tests.adapters import make_tiny_adapter
from tests.serving import FAKE, serving, wait_until
from tests.test_serve_process import ENGINE, adapter_home, stocked

__all__ = ["adapter_home", "stocked"]  # fixtures


def test_it_follows_adapters_that_come_and_go(stocked: Home, tiny_base: Path) -> None:
    make_tiny_adapter(stocked.root, tiny_base, "other", seed=2)
    with serving(stocked, "demo", *ENGINE) as running:
        running.ready()
        cli.load_adapter("other")
        [record] = read_records(stocked)
        assert record.adapters == ["demo", "other"] and record.models == ["base", "tiny-base", "demo", "other"]
        cli.unload_adapter("demo")
        [record] = read_records(stocked)
        assert (record.adapters, record.default_model) == (["other"], "other")
        with pytest.raises(AdapterError):
            cli.load_adapter("nobody")
        running.processes()[1].kill()
        wait_until(lambda: "the engine is ready again" in running.text, "another engine")
        [again] = read_records(stocked)
        assert again.adapters == ["other"] and again.engine != record.engine
        assert record.path(stocked).stat().st_mode & 0o777 == 0o600
    assert not list(stocked.run.iterdir())


def test_the_endpoint_that_was_started_last_is_asked_whatever_changed_since(home: Home) -> None:
    process, created = process_identity(1)
    first = EndpointRecord("http://127.0.0.1:8001/v1", 8001, ["base"], [], None, (process, created), None)
    replace(first, base_url="http://127.0.0.1:8002/v1", port=8002, process=(process, created + 0.05)).write(home)
    first.write(home)
    assert find_base_url(None, home) == "http://127.0.0.1:8002/v1"


def test_the_adapter_to_merge_may_be_called_by_an_alias(stocked: Home, tiny_base: Path) -> None:
    older, newer = (open_reference(stocked, "demo", (0, 32)) for _ in range(2))
    newer = replace(newer, manifest=newer.manifest.model_copy(update={"version": "v2"}), folder=stocked.root / "gone")
    for adapter in (older, newer):
        Catalog(stocked).set_latest(adapter)
    request = Request([], None, "127.0.0.1", 8000, Wanted(), FAKE, [], json=False, drain_s=0, merge="demo:prev")
    [found], base = find_merged(request, stocked)
    assert (found.folder, found.manifest.name) == (older.folder, "demo") and base.folder == tiny_base
    [named], _ = find_merged(replace(request, merge=f"mine={older.folder}"), stocked)
    assert (named.folder, named.manifest.name) == (older.folder, "mine")
    with pytest.raises(AdapterError, match="there is no other:latest"):
        find_merged(replace(request, merge="other:latest"), stocked)
