"""Secrets in command lines and log lines become dots, and nothing else does."""

import pytest

from loraport.clients.redact import hide_in_text, hide_secrets
from loraport.serve.engine.startup import last_words
from loraport.serve.engine.versions import explain


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--api-key", "abc", "--port", "80"], ["--api-key", "…", "--port", "80"]),
        (["--hf_token=abc", "--max-num-seqs=4"], ["--hf_token=…", "--max-num-seqs=4"]),
        (["--x.Secret", "abc"], ["--x.Secret", "…"]),
        (["--api-key", "abc", "def", "--port", "80"], ["--api-key", "…", "…", "--port", "80"]),
        (["--kv-config", '{"api_key": ["abc"], "n": 1}'], ["--kv-config", '{"api_key": […], "n": 1}']),
        (["--hf-token", "--port", "80"], ["--hf-token", "--port", "80"]),
        (["--max-tokens", "5", "monkey", "7"], ["--max-tokens", "5", "monkey", "7"]),
        (["--kv-config", '{"password": "abc", "n": 1}'], ["--kv-config", '{"password": "…", "n": 1}']),
    ],
)
def test_command_lines(given: list[str], shown: list[str]) -> None:
    assert hide_secrets(given) == shown


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("args: {'hf_token': 'a\"b', 'seed': 0}", "args: {'hf_token': '…', 'seed': 0}"),
        ("error: unrecognized arguments: --my-key abc --n 4", "error: unrecognized arguments: --my-key … --n 4"),
        ("error: --hf-token 'abc' is wrong", "error: --hf-token '…' is wrong"),
        ("Namespace(hf_token='abc', api_key=['d', 'e'], n=1)", "Namespace(hf_token='…', api_key=[…], n=1)"),
        ("args: {'api_key': ['abc'], 'seed': 0}", "args: {'api_key': […], 'seed': 0}"),
        ("max_token=3, tokens=[1, 2]", "max_token=3, tokens=[1, 2]"),
        ("ValueError: a key is missing; keys: 'a', 'b'", "ValueError: a key is missing; keys: 'a', 'b'"),
    ],
)
def test_lines_of_a_log(line: str, shown: str) -> None:
    assert hide_in_text(line) == shown


def test_what_is_shown_of_an_engine_that_failed_has_no_secrets() -> None:
    lines = ["INFO 11-21 23:21:14 [api_utils.py:286] non-default args: {'hf_token': 'geheim'}"]
    assert last_words(lines) == ["non-default args: {'hf_token': '…'}"]
    found = explain(["api_server.py: error: unrecognized arguments: --hf-tokens 1 --some-secret=geheim"])
    assert found is not None and "geheim" not in found.message and "--some-secret=…" in found.message
