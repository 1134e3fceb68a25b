"""What is said of a run: verdicts, requirements, the report, and progress while it lasts."""

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from loraport.clients.charts import Scale, Series, line_chart, number, smooth, thin
from loraport.clients.errors import ConfigError, Shortfall
from loraport.train.config import load_config
from loraport.train.defaults import Choice
from loraport.train.loop import progress
from loraport.train.loop.progress import MANY_STEPS, Phases, ProgressCallback, clock, took
from loraport.train.manifest import BaseIdentity, DataCounts, Manifest
from loraport.train.proof.evaluate import Comparison, HeldOut, Sample
from loraport.train.proof.gate import METRICS, check_requirements, find_unmet, parse_requirement, parse_requirements
from loraport.train.proof.report import describe_run, mark_differences, write_report
from loraport.train.proof.scores import Scored, Scores, summarise
from loraport.train.proof.summary import describe, say_comparison, say_verdicts, share
from loraport.train.proof.verdict import Verdict, judge_curves, judge_replies

EVIL = '</pre><script>alert("x")</script>'


def history(losses: Sequence[float], eval_losses: Sequence[float]) -> list[dict[str, Any]]:
    """A log with two steps of training before each evaluation."""
    entries: list[dict[str, Any]] = []
    for at, (loss, eval_loss) in enumerate(zip(losses, eval_losses, strict=True), 1):
        for step in (10 * at - 5, 10 * at):
            entries.append({"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-4, "memory_gib": 9.0})
        entries.append({"step": 10 * at, "eval_loss": eval_loss})
    return [*entries, {"step": 10 * len(losses), "train_runtime": 9.0, "train_loss": 1.0}]


def test_overfitting_is_told_with_the_step_that_is_kept() -> None:
    # The tutorial series of the field notes: three epochs of 218 steps.
    (verdict,) = judge_curves(history([0.39, 0.28, 0.24], [0.35, 0.38, 0.42]))
    assert verdict.level == "warning" and verdict.title == "overfitting"
    assert verdict.text == (
        "evaluation loss rose from 0.350 at step 10 to 0.420 at step 30 while training loss fell from 0.390 to 0.240; "
        "the checkpoint of step 10 is the one that is kept"
    )


@pytest.mark.parametrize(
    ("losses", "eval_losses", "titles"),
    [
        ([0.4, 0.3, 0.2], [0.5, 0.45, 0.449], []),
        ([0.4, 0.3, 0.2], [0.5, 0.45, 0.455], []),  # a rise of 1% is noise
        ([0.4, 0.3, 0.2], [0.5, 0.45, 0.36], ["not finished"]),
        ([0.4, 0.3, 0.5], [0.5, 0.45, 0.6], ["evaluation loss rose"]),
        ([0.4], [0.5], []),
        ([], [], []),
    ],
)
def test_other_curves(losses: list[float], eval_losses: list[float], titles: list[str]) -> None:
    assert [verdict.title for verdict in judge_curves(history(losses, eval_losses))] == titles


def scores(success: float, rouge: float = 0.5, stop_rate: float = 1.0, repetition: float = 0.0) -> Scores:
    return Scores(20, success, success, rouge, 10.0, stop_rate, repetition, 12.0, 30)


@pytest.mark.parametrize(
    ("adapter", "base", "title", "level"),
    [
        (scores(0.95), scores(0.0), "better than the base", "good"),
        (scores(0.4), scores(0.4), "brought nothing", "warning"),
        (scores(0.0, 0.7), scores(0.0, 0.3), "closer to the references", "note"),
        (scores(0.3), scores(0.6), "worse than the base", "warning"),
        (scores(0.0, 0.3), scores(0.0, 0.4), "worse than the base", "warning"),
    ],
)
def test_what_the_adapter_brought(adapter: Scores, base: Scores, title: str, level: str) -> None:
    (verdict,) = judge_replies(adapter, base, [])
    assert (verdict.title, verdict.level) == (title, level)


def test_replies_that_go_on_or_in_circles_are_warned_of() -> None:
    complaint = Scored("x", 1, True, False, 0.0, False, 0.0, "checks.py, line 3: KeyError: 'a'")
    verdicts = judge_replies(scores(0.5, stop_rate=0.9, repetition=0.05), scores(0.0), [complaint])
    assert [verdict.title for verdict in verdicts[1:]] == ["never stops", "repeats itself", "your check went wrong"]
    assert "2 of 20 replies do not stop" in verdicts[1].text and "1 of 20" in verdicts[2].text
    assert "KeyError" in verdicts[3].text


@pytest.mark.parametrize(
    ("text", "found", "met"),
    [
        ("success>=0.9", 0.9, True),
        ("success>=0.9", 1 - 0.1, True),  # 0.9 but for rounding
        ("success>=0.9", 0.85, False),
        ("success >= 90%", 0.9, True),
        ("stop_rate=1", 1.0, True),
        ("stop_rate==1", 0.95, False),
        ("eval_loss<0.5", 0.5, False),
        ("eval_loss<=.5", 0.5, True),
        ("bleu>20", 20.1, True),
        ("gain>0", 0.0, False),
        ("eval_perplexity<=3", math.inf, False),
    ],
)
def test_requirements(text: str, found: float, met: bool) -> None:
    requirement = parse_requirement(text)
    assert requirement.is_met(found) is met
    assert bool(find_unmet([requirement], {requirement.metric: found})) is not met


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("success", "says nothing about how much", "'success>=0.9'"),
        ("sucess>=0.9", "sucess is not measured", "did you mean success? there are success, exact_match"),
        ("colour=1", "colour is not measured", "there are success"),
        ("success>=often", "is no requirement", "write it as success>=0.9"),
        ("success>=nan", "is no requirement", ""),
        ("", "is no requirement", ""),
        ("success=>0.9", "is no requirement", ""),
    ],
)
def test_a_malformed_requirement_is_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_requirements(["stop_rate=1", text])
    assert message in caught.value.message and hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_shortfall_says_what_is_missing_and_where_it_lies() -> None:
    requirements = parse_requirements(["success>=0.9", "stop_rate=1", "bleu>50"])
    check_requirements(requirements, {"success": 0.9, "stop_rate": 1, "bleu": 51}, "demo v1", "/x")
    with pytest.raises(Shortfall) as caught:
        check_requirements(requirements, {"success": 0.85, "stop_rate": 1.0}, "demo v1", "/x")
    assert caught.value.exit_code == 4
    assert caught.value.message == (
        "demo v1 falls short: success is 0.85, success>=0.9 is required (0.05 off); bleu was not measured (bleu>50)."
    )
    assert "/x" in caught.value.hint


def test_every_figure_of_replies_can_be_required() -> None:
    assert set(scores(1).to_metrics()) - {"longest_reply"} <= set(METRICS)


def test_what_is_said_and_where_does_not_change_the_adapter(tmp_path: Path) -> None:
    def fingerprint(**settings: Any) -> str:
        return load_config(None, {"model": "m", "data": "d", **settings}).fingerprint("d", {})

    assert fingerprint() == fingerprint(require=["success>=0.9"], track=["mlflow"])
    assert fingerprint() == fingerprint(check="regex:x")  # a check counts by its content: see check_sha256 in run.py
    with pytest.raises(ConfigError, match="'mlflow', 'wandb' or 'tensorboard'"):
        fingerprint(track=["mlflo"])
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\ncheck: python:c.py:good\nrequire: ['success>=0.9']\n")
    config = load_config(tmp_path / "run.yaml", {})
    assert (config.check, config.require) == (f"python:{tmp_path}/c.py:good", ("success>=0.9",))


@pytest.fixture
def compared() -> Comparison:
    """Two prompts; the base echoes markup, the adapter answers the first."""
    samples = []
    for line, (wanted, said) in enumerate([("tea & milk", "tea & milk"), ("coffee", EVIL)], 1):
        messages = [{"role": "system", "content": EVIL}, {"role": "user", "content": f"drink {line}?"}]
        asked = HeldOut(line, messages, [1], wanted, [2], {})
        adapter = Scored(said, 3, True, said == wanted, 0.5, False)
        samples.append(Sample(asked, adapter, Scored(EVIL, 9, False, False, 0.1, True, complaint=EVIL)))
    replies = [[sample.adapter for sample in samples], [sample.base for sample in samples]]
    return Comparison(samples, *(summarise(each, ["tea & milk", "coffee"]) for each in replies))


@pytest.fixture
def manifest(compared: Comparison) -> Manifest:
    base = BaseIdentity(
        model="/models/reader-9m",
        revision=None,
        path="/models/reader-9m",
        config_sha256="a",
        tokenizer_sha256="b",
        chat_template_sha256="c",
        weights_sha256="d",
    )
    counts = DataCounts(files=["r.jsonl"], sha256="e", rows=1000, tokens=124_198, trained_tokens=9000, eval_rows=20)
    return Manifest(
        name="demo",
        version="",
        created="2026-11-22T01:38:25+00:00",
        fingerprint="f",
        base=base,
        base_dtype="float32",
        rank=16,
        alpha=32,
        target_modules=["q_proj"],
        trainable_parameters=798_720,
        adapter_bytes=3_200_000,
        max_lora_rank=16,
        stop_tokens=[2],
        chat_template_kwargs={},
        data=counts,
        run={"learning_rate": 2e-4, "eval_data": None, "rslora": False, "data": EVIL},
        metrics=compared.metrics() | {"eval_loss": 0.42, "seconds": 61.0},
        versions={"torch": "2.13.0"},
        golden=[],
    )


@pytest.fixture
def page(manifest: Manifest, compared: Comparison, tmp_path: Path) -> str:
    log = history([0.39, 0.28, 0.24], [0.35, 0.38, 0.42])
    verdicts = [*judge_curves(log), *judge_replies(compared.adapter, compared.base, [])]
    requirements = parse_requirements(["success>=0.9", "stop_rate=1"])
    choices = [Choice("learning rate", "2e-4", "by the width")]
    document = describe_run(manifest, log, compared, verdicts, requirements, choices, {"training": 61.0})
    return write_report(tmp_path, document).read_text()


def test_the_report_is_one_page_that_loads_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe)|\ssrc=|url\(|@import|https?://", page.replace(EVIL, ""))


def test_the_report_escapes_what_models_and_rows_say(page: str) -> None:
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("</pre>") == page.count("<pre>")
    assert "tea &amp; milk" in page


def test_the_report_shows_curves_scores_settings_and_verdicts(page: str) -> None:
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Memory"]
    for words in ("Overfitting", "Required and not met", "success&gt;=0.9, found 0.5", "Required and met"):
        assert words in page
    for words in ("learning rate</td>", "0.0002", "by the width", "124,198", "reader-9m", "61.0 s", "2.13.0"):
        assert words in page
    assert page.index("drink 2?") < page.index("drink 1?")  # what fails comes first
    assert "never stops" in page and "loops" in page


def test_the_same_as_json(page: str, tmp_path: Path, compared: Comparison) -> None:
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["samples"][1]["adapter"]["text"] == EVIL
    assert document["requirements"][0] == {"text": "success>=0.9", "found": 0.5, "met": False}
    assert document["scores"]["adapter"]["success"] == compared.adapter.success
    assert len(document["history"]) == 10


def test_a_report_without_replies_or_curves(manifest: Manifest, tmp_path: Path) -> None:
    bare = manifest.model_copy(update={"metrics": {}})
    page = write_report(tmp_path, describe_run(bare, [], None, [])).read_text()
    assert "Settings" in page and "Side by side" not in page and "<svg" not in page


def test_differences_are_marked_and_escaped() -> None:
    assert mark_differences("red <b> tea", "red tea") == "red <mark>&lt;b&gt; </mark>tea"
    assert mark_differences("red tea", "red tea") == "red tea"


def test_a_chart_is_whole_and_within_its_frame() -> None:
    points = [(step, 2.0 / step) for step in range(1, 2001)]
    svg = ElementTree.fromstring(line_chart([Series("a & b", points, smooth=True)], "nats"))
    lines = [each for each in svg if each.tag == "polyline"]
    assert [each.get("class") for each in lines] == ["line-1 faint", "line-1"]
    for line in lines:
        places = [tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()]
        assert len(places) <= 240
        assert all(0 <= x <= 420 and 0 <= y <= 220 for x, y in places)


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_nothing_to_draw_is_no_chart(points: list[tuple[float, float]]) -> None:
    assert line_chart([Series("loss", points)], "") == ""


@pytest.mark.parametrize(
    "points",
    [[(1, 0.0), (2, 0.0)], [(5, 3.0)], [(1, -1.0), (2, -1.0)], [(1, 1e-9), (2, 1e9)], [(1, 0.5), (2, math.inf)]],
)
def test_odd_curves_can_be_drawn(points: list[tuple[float, float]]) -> None:
    assert "nan" not in line_chart([Series("loss", points)], "")


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 1, 0, 1), [0, 0.25, 0.5, 0.75, 1]),
        (Scale(0, 63, 0, 1), [0, 20, 40, 60]),
        (Scale(0.004, 2.2, 0, 1, logarithmic=True), [0.01, 0.1, 1]),
        (Scale(0.3, 20, 0, 1, logarithmic=True), [0.5, 1, 2, 5, 10, 20]),
    ],
)
def test_ticks_are_round(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks() == pytest.approx(ticks)


def test_numbers_on_axes() -> None:
    assert [number(value) for value in (0, 0.25, 1500, 2e-4, 2.5e7)] == ["0", "0.25", "1,500", "2e-4", "2.5e7"]


def test_many_points_become_their_means() -> None:
    assert thin([(step, float(step % 2)) for step in range(480)])[:2] == [(0.5, 0.5), (2.5, 0.5)]
    assert [value for _, value in smooth([(step, 3.0) for step in range(50)])] == pytest.approx([3.0] * 50)


def test_the_result_in_the_terminal(compared: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    say_comparison("demo", compared)
    say_verdicts([Verdict("warning", "overfitting", "it rose", "stop"), Verdict("good", "better", "by far")])
    said = capsys.readouterr().err
    assert re.search(r"success +0% \(0\) +50% \(1\)", said) and "2 held-out prompts" in said
    assert said.index("line 2: reply") < said.index("line 1: reply 'tea & milk'  wanted 'tea & milk'")
    assert "warning: overfitting: it rose; stop\nbetter: by far\n" in said


def test_a_share_of_a_success_is_no_count() -> None:
    assert (share(scores(0.95), "success"), share(scores(0.975), "success")) == ("95% (19)", "98%")


def test_a_reply_cannot_steer_the_terminal(compared: Comparison) -> None:
    reply = Scored("\x1b[31mred\nline" + "x" * 500, 3, False, False, 0.0, False)
    told = describe(Sample(compared.samples[0].asked, reply, reply))
    assert "\x1b" not in told and "\n" not in told and "(never stops)" in told and len(told) < 300


def run_callback(steps: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a run with an evaluation in its middle and at its end."""
    callback = ProgressCallback()
    callback.trainer = SimpleNamespace(tokens_seen=1000)
    state = SimpleNamespace(global_step=0, max_steps=steps, epoch=0.0, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    for step in range(1, steps + 1):
        callback.on_step_begin(None, state, None)
        state.global_step, state.epoch = step, step / steps
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, {"loss": 4 / step, "tokens_per_second": 1234.0, "memory_gib": 2.5})
        if step % (steps // 2) == 0:
            callback.on_log(None, state, None, {"eval_loss": 1 / step, "eval_token_accuracy": 0.5})
    callback.close()
    return capsys.readouterr().err.splitlines()


def test_one_line_for_each_step_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_callback(4, capsys)
    assert lines[0].startswith("step 1/4  loss 4.000  1,234 tokens/s  2.5 GiB  0:0")
    assert lines[2] == "epoch 0.5  loss 3.000  eval loss 0.500  token accuracy 50.0%"
    assert lines[5] == "epoch 1.0  loss 1.167  eval loss 0.250  token accuracy 50.0%  best so far"
    assert len(lines) == 6


def test_lines_of_long_runs_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_callback(2 * MANY_STEPS, capsys)
    assert len(lines) == 2 * MANY_STEPS + 2
    assert "GiB" not in lines[0]


def test_an_evaluation_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=True, width=100))
    callback = ProgressCallback()
    callback.trainer = SimpleNamespace(tokens_seen=1000, evaluated=(0, 1))
    state = SimpleNamespace(global_step=1, max_steps=4, epoch=0.0, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)

    def evaluation() -> list[tuple[float, float | None]]:
        return [(task.completed, task.total) for task in callback.bar.tasks if task.description == "evaluating"]

    for done in (1, 2, 3):
        callback.trainer.evaluated = done, 3
        callback.on_prediction_step(None, state, None)
        assert evaluation() == [(done, 3)]
    callback.on_log(None, state, None, {"eval_loss": 1.0})
    assert evaluation() == []
    callback.close()


def test_phases_say_how_long_they_took(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases()
    with phases("tokenising", total=2) as phase:
        phase.advance()
        phase.note = "124,198 tokens"
    with phases("blinking"):
        pass
    with pytest.raises(KeyError), phases("failing"):
        raise KeyError
    assert capsys.readouterr().err == "  tokenising: 124,198 tokens, 0.0 s\n"
    assert list(phases.seconds) == ["tokenising", "blinking", "failing"]


def test_clocks() -> None:
    assert [clock(seconds) for seconds in (65, 7384)] == ["1:05", "2:03:04"]
    assert [took(seconds) for seconds in (3.44, 125)] == ["3.4 s", "2:05"]
