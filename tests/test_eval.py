"""`loraport eval` against a real HTTP endpoint that replies, fails and dies as ordered."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai import APITimeoutError
from openai.resources.chat.completions import AsyncCompletions

from loraport.bench.cli import eval as evaluate
from loraport.bench.metrics import Answer, summarize
from loraport.clients.errors import EndpointError, Shortfall, UsageError
from loraport.clients.rates import wilson
from tests.fake_openai import FakeOpenAI, Knobs


def know(messages: list[dict[str, str]]) -> str:
    """Reply as the reference does."""
    return messages[-1]["content"].removeprefix("say ")


def babble(messages: list[dict[str, str]]) -> str:
    """Never stop."""
    return "bla\n" * 500


MODELS = {"base": babble, "demo": know}


def make_rows(folder: Path, count: int = 6) -> Path:
    """Rows whose reference stands in the prompt."""
    path = folder / "rows.jsonl"
    pairs = ((f"say {at}\n[red]", f" {at}\n[red]\n") for at in range(count))
    rows = ({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON document on standard output."""
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (93, 100, 0.863, 0.966)]
)
def test_wilson_interval(count: int, total: int, low: float, high: float) -> None:
    assert wilson(count, total) == pytest.approx((low, high), abs=5e-4)
    assert wilson(0, 0) == (0, 1)


def test_failed_requests_count_as_rows_without_success_but_not_in_the_speed() -> None:
    good = Answer("m", 1, "q", "yes", reply="yes ", finish_reason="stop", completion_tokens=10, seconds=2)
    figures = summarize("m", [good, Answer("m", 2, "q", "yes", error="timeout", seconds=60)])
    assert (figures.success.rate, figures.stopped.rate) == (0.5, 0.5)
    assert (figures.tokens_per_second, figures.mean_completion_tokens) == (5, 10)
    assert figures.errors == {"timeout": 1}


def test_a_reply_that_was_cut_is_no_success() -> None:
    """The reference came out, but the model would have gone on: it has not learnt to stop."""
    cut = Answer("m", 1, "q", "yes", reply="yes", finish_reason="length", completion_tokens=1)
    assert not cut.is_success and not cut.stopped
    assert summarize("m", [cut]).success.count == 0


def write_reference(folder: Path, reference: str) -> Path:
    """One row with this reference."""
    path = folder / "long.jsonl"
    messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": reference}]
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False))
    return path


@pytest.mark.parametrize(
    ("reference", "tokenizes", "context", "flag", "limit", "says"),
    [
        ("y" * 200, False, 1000, None, 232, "the longest reference, 200 bytes, and 32"),
        ("é" * 100, False, 1000, None, 232, "the longest reference, 200 bytes, and 32"),
        ("y" * 200, True, 1000, None, 432, "twice the longest reference, 200 tokens, and 32"),
        ("y" * 200, True, 800, None, 400, "half of the context"),
        ("y", False, 1000, None, 64, "the least there is by default"),
        ("y" * 200, True, 1000, 150, 150, "--max-tokens"),
    ],
)
def test_how_long_a_reply_may_be(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reference: str,
    tokenizes: bool,
    context: int,
    flag: int | None,
    limit: int,
    says: str,
) -> None:
    knobs = Knobs(tokenizes=tokenizes, context=context)
    with FakeOpenAI({"base": know, "demo": lambda messages: reference}, knobs) as endpoint:
        evaluate(write_reference(tmp_path, reference), ["demo"], endpoint.base_url, max_tokens=flag, json=True)
    assert endpoint.requests[0]["max_tokens"] == limit
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["max_tokens"], report["max_tokens_from"]) == (limit, says)
    assert report["models"][0]["success"]["rate"] == (1 if limit >= len(reference) else 0)
    assert f"asking demo at {endpoint.base_url}\nreplies of up to {limit} tokens: {says}\n" in captured.err


def test_models_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI(MODELS) as endpoint:
        evaluate(make_rows(tmp_path), ["base", "demo"], endpoint.base_url, max_tokens=20, show=1, json=True)
    report = report_of(capsys)
    base, demo = report["models"]
    assert (base["success"]["count"], base["stopped"]["count"], base["mean_completion_tokens"]) == (0, 0, 20)
    assert (demo["success"]["rate"], demo["stopped"]["rate"], demo["rows"]) == (1, 1, 6)
    assert [failure["model"] for failure in report["failures"]] == ["base"]
    assert report["complete"]


def test_without_a_model_all_are_asked_but_none_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI({"base": know, "Qwen3": know, "demo": know}, Knobs(aliases=("Qwen3",))) as endpoint:
        evaluate(make_rows(tmp_path), None, endpoint.base_url, json=True)
        assert [model["model"] for model in report_of(capsys)["models"]] == ["base", "demo"]
        endpoint.models = {f"m{at}": know for at in range(9)}
        with pytest.raises(UsageError, match="has 9 models"):
            evaluate(make_rows(tmp_path), None, endpoint.base_url)


def test_requests_are_greedy_and_models_take_turns(tmp_path: Path) -> None:
    with FakeOpenAI(MODELS) as endpoint:
        evaluate(make_rows(tmp_path), ["base", "demo"], endpoint.base_url, concurrency=1, thinking=False)
    assert [request["model"] for request in endpoint.requests] == ["base", "demo"] * 6
    first = endpoint.requests[0]
    assert (first["temperature"], first["max_tokens"]) == (0, 64)
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert first["messages"] == [{"role": "user", "content": "say 0\n[red]"}]


def test_thinking_that_is_not_given_is_left_to_the_server(tmp_path: Path) -> None:
    with FakeOpenAI({"demo": know}) as endpoint:
        evaluate(make_rows(tmp_path, 1), None, endpoint.base_url)
    assert "chat_template_kwargs" not in endpoint.requests[0]


def test_the_table_and_failing_replies_are_safe_to_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI({"base": lambda messages: "one\n\x1b[2Jtwo [bold]"}) as endpoint:
        evaluate(make_rows(tmp_path), None, endpoint.base_url, show=2)
    out = capsys.readouterr().out
    assert "success" in out and "95% interval" in out
    assert "got:    one\n          \\x1b[2Jtwo [bold]\n" in out
    assert out.count("wanted:") == 2


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with FakeOpenAI(MODELS) as endpoint, pytest.raises(UsageError) as caught:
        evaluate(make_rows(tmp_path), ["base", "demmo"], endpoint.base_url)
    assert "'demmo'" in caught.value.message
    assert caught.value.hint == "it has: base, demo"


@pytest.mark.parametrize(("success", "stop", "falls_short"), [(0.5, 1.0, True), (None, 0.1, True), (None, 0.0, False)])
def test_the_verdict_is_on_the_last_model(
    tmp_path: Path, success: float | None, stop: float, falls_short: bool
) -> None:
    with FakeOpenAI(MODELS) as endpoint:
        rows = make_rows(tmp_path)
        evaluate(rows, ["base", "demo"], endpoint.base_url, min_success=0.9, min_stop_rate=1.0)
        if not falls_short:
            evaluate(rows, ["demo", "base"], endpoint.base_url, min_success=success, min_stop_rate=stop)
            return
        with pytest.raises(Shortfall, match=r"^base falls short: .* 0\.0% \(0 of 6\)") as caught:
            evaluate(rows, ["demo", "base"], endpoint.base_url, min_success=success, min_stop_rate=stop)
        assert caught.value.exit_code == 4


def test_errors_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    knobs = Knobs(statuses=(200, 400, 422), context=30)
    with FakeOpenAI({"demo": know}, knobs) as endpoint:
        path = make_rows(tmp_path)
        long = {"messages": [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y"}]}
        path.write_text(path.read_text() + json.dumps(long) + "\n")
        evaluate(path, ["demo"], endpoint.base_url, concurrency=1, json=True)
    (demo,) = report_of(capsys)["models"]
    assert demo["errors"] == {"HTTP 400": 1, "HTTP 422": 1, "longer than the context": 1}
    assert demo["success"]["count"] == 4


def test_a_model_that_never_answers_has_no_figures(tmp_path: Path) -> None:
    with (
        FakeOpenAI({"demo": know}, Knobs(statuses=(422,) * 6)) as endpoint,
        pytest.raises(EndpointError, match="none of 6 requests to demo was answered: 6 × HTTP 422"),
    ):
        evaluate(make_rows(tmp_path), ["demo"], endpoint.base_url)


def test_a_server_that_dies_midway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        FakeOpenAI(MODELS, Knobs(die_after=4)) as endpoint,
        pytest.raises(EndpointError, match="broke the connection off"),
    ):
        evaluate(make_rows(tmp_path), ["base", "demo"], endpoint.base_url, concurrency=1, json=True)
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert not report["complete"]
    assert sum(model["rows"] for model in report["models"]) == 4
    assert "ended after 4 of 12 requests" in captured.err


def test_a_server_that_never_answers_is_left_at_the_first_timeout(tmp_path: Path) -> None:
    with (
        FakeOpenAI(MODELS, Knobs(hang_on="say")) as endpoint,
        pytest.raises(EndpointError, match="did not answer in time"),
    ):
        evaluate(make_rows(tmp_path), ["demo"], endpoint.base_url, timeout=0.2)


def test_a_timeout_after_answers_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a clock: on a busy machine, a real timeout that is short enough for a test also hits other requests."""
    create = AsyncCompletions.create

    async def time_out(self: AsyncCompletions, **request: Any) -> Any:
        if "say 3" in request["messages"][-1]["content"]:
            raise APITimeoutError(request=None)  # type: ignore[arg-type]
        return await create(self, **request)

    monkeypatch.setattr(AsyncCompletions, "create", time_out)
    with FakeOpenAI(MODELS) as endpoint:
        evaluate(make_rows(tmp_path), ["demo"], endpoint.base_url, concurrency=1, json=True)
    (demo,) = report_of(capsys)["models"]
    assert demo["errors"] == {"timeout": 1}
    assert demo["success"]["count"] == 5


def test_a_refused_key_is_an_error_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    with FakeOpenAI(MODELS, Knobs(key="sk-other")) as endpoint, pytest.raises(EndpointError) as caught:
        evaluate(make_rows(tmp_path), ["demo"], endpoint.base_url)
    assert "refuses the API key" in caught.value.message
    assert "sk-" not in caught.value.message + caught.value.hint


def test_ctrl_c_prints_what_has_run(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    with FakeOpenAI(MODELS, Knobs(hang_on="say 5")) as endpoint:
        command = [sys.executable, "-m", "loraport_cli", "eval", "--data", str(rows), "--model", "demo", "--json"]
        command += ["--base-url", endpoint.base_url, "--concurrency", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(endpoint.requests) < 6 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    report = json.loads(out)
    assert (report["complete"], report["models"][0]["success"]["count"]) == (False, 5)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "127.0.0.1:1", "http://", "http://127.0.0.1:99999/v1"])
def test_urls_at_which_nothing_answers(tmp_path: Path, url: str) -> None:
    with pytest.raises(EndpointError) as caught:
        evaluate(make_rows(tmp_path), ["demo"], url)
    assert caught.value.hint


def test_without_an_endpoint(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="no endpoint of Loraport runs"):
        evaluate(make_rows(tmp_path), ["demo"])
