"""DPO: parity with TRL and with the formula, accumulation, resuming, several processes, and what a whole run says."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from trl import DPOConfig, DPOTrainer

from loraport.clients.errors import ConfigError, DataError
from loraport.clients.home import Home
from loraport.clients.rows import find_source
from loraport.train.adapters import WEIGHTS
from loraport.train.config import ResolvedConfig, RunConfig, load_config
from loraport.train.data.store import open_store
from loraport.train.data.tokens import Encoder
from loraport.train.defaults import Facts, resolve
from loraport.train.loop import loss as loss_module
from loraport.train.loop.checkpoints import newest
from loraport.train.loop.dpo import DpoTrainer
from loraport.train.loop.fit import Outcome, fit
from loraport.train.loop.make import make_trainer
from loraport.train.loop.packing import StepSampler, largest, micro_step
from loraport.train.loop.reference import as_base
from loraport.train.loop.settings import Settings
from loraport.train.loop.ways import Ways, trained
from loraport.train.memory.machine import find_machine
from loraport.train.memory.plan import plan
from loraport.train.memory.shapes import read_shape
from loraport.train.proof.gate import parse_requirements
from loraport.train.proof.scores import Scored, summarise
from loraport.train.proof.verdict import judge_change, judge_preferences, judge_replies
from loraport.train.run import train
from tests.conftest import ROOT
from tests.loop import SHAPE, assert_same, base_of, config_for, lora_on, weights_of
from tests.pairs import ToyPairs
from tests.test_loop_resume import Signal
from tests.test_loop_trl import Gradients, tokenizer, trl_settings

__all__ = ["tokenizer"]  # a fixture
PAIRS = 24


class InOrder(DPOTrainer):
    """Tokenised pairs as they come, which is in the order that our loop draws."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def dpo_config(**settings: Any) -> ResolvedConfig:
    return config_for(**{"method": "dpo", "beta": 0.3, "epochs": 1, "batch_size": 8} | settings)


def by_trl(kind: str, model: Any, rows: ToyPairs, config: ResolvedConfig, tokenizer: Any, folder: Path) -> Any:
    """The same run by TRL: padded batches of 4 pairs, accumulated to those of `config`; the base is the reference."""
    order = StepSampler(rows.lengths, config.batch_size, 1, config.seed, lambda: 0).steps(0)
    items = []
    for row in (row for step in order for row in step):
        item = rows[row]
        ids, prompt, cut = item["input_ids"].tolist(), item["prompt"], item["chosen"]
        items.append({"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:cut], "rejected_ids": ids[cut + prompt :]})
    gradients = Gradients()
    arguments = DPOConfig(**trl_settings(config, folder), beta=config.beta)
    trainer = InOrder(
        model=model,
        ref_model=base_of(kind),
        args=arguments,
        train_dataset=Dataset.from_list(items),
        processing_class=tokenizer,
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_losses_gradients_and_weights_are_those_of_trl(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """gemma2 is trained without packing and with logits of its own."""
    rows, config = ToyPairs(PAIRS), dpo_config(learning_rate=2e-3, weight_decay=0.1, eval_steps=3, save_steps=3)
    theirs, model = lora_on(base_of(kind)), lora_on(base_of(kind))
    begun = weights_of(model)
    trainer, their_gradients = by_trl(kind, theirs, rows, config, tokenizer, tmp_path / "trl")
    gradients = Gradients()
    outcome = fit(model, rows, ToyPairs(3, 1), config, Settings(100), tmp_path / "ours", {}, callbacks=(gradients,))

    ours, trls = ([each for each in h if "loss" in each] for h in (outcome.history, trainer.state.log_history))
    assert len(ours) == PAIRS // 8
    names = {
        "loss": "loss",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "chosen_logps": "logps/chosen",
        "rejected_logps": "logps/rejected",
    }
    for found, wanted in zip(ours, trls, strict=True):
        assert {name: found[name] for name in names} == pytest.approx(
            {name: wanted[theirs] for name, theirs in names.items()}, rel=1e-4, abs=1e-4
        )
    assert_same(gradients.noted[0], their_gradients.noted[0], rtol=1e-3, share=1e-5)
    assert_same(weights_of(model), weights_of(theirs), rtol=1e-2, share=1e-3)
    assert all(float((after - begun[name]).abs().max()) > 1e-3 for name, after in weights_of(model).items())


def dpo_run(folder: Path, settings: Settings, count: int = 17, **given: Any) -> tuple[Any, Outcome, Gradients]:
    """A run of the loop on random pairs."""
    model, gradients = lora_on(base_of(given.pop("kind", "qwen3"))), Gradients()
    config = dpo_config(learning_rate=1e-3, **given)
    outcome = fit(model, ToyPairs(count), ToyPairs(5, 1), config, settings, folder, {}, callbacks=(gradients,))
    return model, outcome, gradients


@pytest.mark.parametrize(
    "settings", [Settings(1), Settings(90, 1), Settings(10_000, 2, True)], ids=["alone", "half", "offload"]
)
def test_accumulation_is_not_seen_in_the_gradients(tmp_path: Path, settings: Settings) -> None:
    """Batches of 8 pairs in 8, about 3 and 1 micro-steps."""
    _, whole, wanted = dpo_run(tmp_path / "whole", Settings(10_000))
    _, outcome, found = dpo_run(tmp_path / "parts", settings)
    assert_same(found.noted[0], wanted.noted[0], rtol=1e-3, share=1e-5)
    assert outcome.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], rel=1e-4)
    assert outcome.metrics["eval_reward_margin"] == pytest.approx(
        whole.metrics["eval_reward_margin"], rel=1e-3, abs=1e-4
    )


def resumable(folder: Path, resume: bool = False, callbacks: tuple[Any, ...] = ()) -> tuple[Any, Outcome]:
    """Six steps in two epochs with dropout, a checkpoint after every second."""
    model, identity = lora_on(base_of("qwen3"), dropout=0.2), {"rows": "those"}
    config = dpo_config(epochs=2, batch_size=4, dropout=0.2)
    checkpoint = newest(folder, identity) if resume else None
    outcome = fit(
        model,
        ToyPairs(12),
        ToyPairs(3, 1),
        config,
        Settings(80),
        folder,
        identity,
        resume=checkpoint,
        callbacks=callbacks,
    )
    return model, outcome


def figures(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What was logged, without times and memory."""
    aside = ("tokens_per_second", "memory_gib")
    return [{k: v for k, v in each.items() if k not in aside} for each in history if "train_runtime" not in each]


def test_a_run_that_is_continued_gives_the_same_bytes(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        resumable(tmp_path / "cut", callbacks=(Signal(signal.SIGTERM, 4),))
    model, continued = resumable(tmp_path / "cut", resume=True)
    whole, outcome = resumable(tmp_path / "whole")
    assert all(torch.equal(value, weights_of(whole)[name]) for name, value in weights_of(model).items())
    assert figures(continued.history) == figures(outcome.history)


def test_a_signal_in_the_pass_over_the_base_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = DpoTrainer.logps
    seen = []

    def logps(self: Any, *given: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)
        return own(self, *given)

    monkeypatch.setattr(DpoTrainer, "logps", logps)
    with pytest.raises(SystemExit) as ended:
        dpo_run(tmp_path, Settings(1))
    assert ended.value.code == 128 + signal.SIGTERM and len(seen) == 2


def test_the_margin_grows_where_there_is_something_to_learn(tmp_path: Path) -> None:
    """All preferred replies end on one token and all others on another one."""
    model = lora_on(base_of("qwen3"), rank=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # as a fresh adapter is: at first it prefers nothing
    config = dpo_config(epochs=6, learning_rate=1e-2, eval_steps=6, save_steps=6)
    outcome = fit(model, ToyPairs(48, sign=7), ToyPairs(12, 5, sign=7), config, Settings(400), tmp_path, {})
    steps = [each for each in outcome.history if "loss" in each]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[0]["reward_margin"] == 0
    assert outcome.metrics["eval_reward_accuracy"] >= 0.9 and outcome.metrics["eval_reward_margin"] > 1
    assert steps[-1]["loss"] < 0.3 and steps[-1]["reward_accuracy"] == 1


def test_the_reference_is_the_base_to_the_bit(tmp_path: Path) -> None:
    model, ids = lora_on(base_of("qwen3")), torch.arange(3, 40)[None]
    before, learned = model(input_ids=ids).logits, weights_of(model)
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    with as_base(model):
        assert torch.equal(model(input_ids=ids).logits, base) and not torch.equal(base, before)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(value, learned[name]) for name, value in weights_of(model).items())


@pytest.mark.parametrize("budget", [30, 75, 10_000])
def test_the_rehearsal_is_no_smaller_than_any_step(budget: int) -> None:
    rows = ToyPairs(20)
    sampler = StepSampler(rows.lengths, 4, budget, 0, lambda: 0)
    tried = largest(rows, 4, budget)
    for members in (members for step in sampler.steps(0) for members in sampler.packs(step)):
        micro = micro_step(rows, members)
        assert micro.tokens <= tried.tokens and len(micro.documents.lengths) == 2 * len(members)
        assert sum(micro.counts) == len(micro.targets_K) and len(micro.counts) == 2 * len(members)
    assert len(tried.targets_K) >= tried.tokens - 2 * 4


def test_a_gradient_is_finite_when_a_micro_step_has_no_pairs(tmp_path: Path) -> None:
    """What keeps other GPUs company has no targets, and still gives every weight a gradient of zero."""
    rows, model = ToyPairs(4), lora_on(base_of("qwen3"))
    with trained(model, Ways()):
        micro = micro_step(rows, (0,), counted=False)
        given = micro.to(torch.device("cpu")) | {"counts": micro.counts}
        logps_D, _ = model(**given)
        assert logps_D.tolist() == [0.0, 0.0]
        (logps_D.sum() * 0.0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_chunks_of_the_head_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, wanted = dpo_run(tmp_path / "whole", Settings(10_000), count=8)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * SHAPE["vocab_size"])
    _, _, found = dpo_run(tmp_path / "parts", Settings(10_000), count=8)
    assert_same(found.noted[0], wanted.noted[0], rtol=1e-4, share=1e-6)


def test_beta_belongs_to_dpo_and_defaults_are_its_own() -> None:
    with pytest.raises(ConfigError, match="--beta goes with --method dpo"):
        load_config(None, {"model": "m", "data": "d", "beta": 0.2})
    facts = Facts(rows=300, tokens=50_000, trained_tokens=9_000, longest=80, eval_rows=15, hidden_size=4096)
    given = {"model": "m", "data": "d"}
    (sft, _), (dpo, choices) = (
        resolve(load_config(None, given | {"method": method}), facts) for method in ("sft", "dpo")
    )
    assert (sft.beta, dpo.beta, dpo.epochs) == (None, 0.1, 3)
    assert dpo.learning_rate == pytest.approx(sft.learning_rate / 20, rel=0.4)
    assert {"beta", "learning rate", "epochs"} <= {choice.name for choice in choices}
    own, _ = resolve(load_config(None, given | {"method": "dpo", "beta": 0.5, "learning_rate": 3e-6}), facts)
    assert (own.beta, own.learning_rate) == (0.5, 3e-6)


def test_a_requirement_of_the_other_method_is_refused() -> None:
    assert parse_requirements(("eval_reward_accuracy>=0.9", "eval_loss<1"), "dpo")
    for text, method in (("eval_perplexity<3", "dpo"), ("eval_reward_margin>1", "sft")):
        with pytest.raises(ConfigError, match=f"--method {method} does not measure"):
            parse_requirements((text,), method)


def test_a_pair_needs_the_memory_of_a_row_as_long() -> None:
    config = json.loads((ROOT / "examples/reader-9m/config.json").read_text())
    shape, machine = read_shape(config, "reader"), find_machine(None, "T4", 1)
    given = {"model": "m", "data": "d", "sequence_length": 1024, "checkpointing": "off", "micro_batch_tokens": 16}
    made = {
        (method, length): plan(
            resolve(load_config(None, given | {"method": method, "sequence_length": length}), Facts.of_base(config))[0],
            shape,
            machine,
        )
        for method, length in (("sft", 1024), ("sft", 2048), ("dpo", 1024))
    }
    assert made["dpo", 1024].settings.micro_batch_tokens == 2048
    assert made["dpo", 1024].parts == made["sft", 2048].parts
    assert made["dpo", 1024].parts.peak > made["sft", 1024].parts.peak
    assert any("log-probabilities" in note for note in made["dpo", 1024].notes)


def write_pairs(path: Path, count: int = 24, line: int = 0, record: Any = None) -> Path:
    """Rows in OpenAI's form; `record` in place of that line."""
    rows: list[Any] = []
    for n in range(count):
        asked = {"messages": [{"role": "user", "content": f"colour {n}?"}]}
        replies = [[{"role": "assistant", "content": word}] for word in (f"red {n % 3}", "no idea")]
        rows.append({"input": asked, "preferred_output": replies[0], "non_preferred_output": replies[1]})
    if line:
        rows[line - 1] = record
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def whole_config(base: Path, data: Path, **settings: Any) -> RunConfig:
    given = {"model": str(base), "data": data, "name": "colours", "method": "dpo", "epochs": 1, "batch_size": 4}
    return RunConfig.model_validate(given | {"learning_rate": 1e-3, "eval_prompts": 2, "rank": 8} | settings)


def test_a_run_on_two_processes_stores_what_one_would(tiny_base: Path, tmp_path: Path, home: Home) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    one = train(whole_config(tiny_base, data, name="one", gpus=1), home)
    for path in home.cache.glob("tokens/*/reference-*.npy"):
        path.unlink()  # so that two processes share the work
    two = train(whole_config(tiny_base, data, name="two", gpus=2), home)
    weights = [load_file(adapter.folder / WEIGHTS) for adapter in (two, one)]
    assert_same(*weights, rtol=1e-3, share=1e-4)
    for name in ("eval_loss", "eval_reward_margin", "eval_chosen_logps", "train_loss"):
        assert two.manifest.metrics[name] == pytest.approx(one.manifest.metrics[name], rel=1e-3, abs=1e-5)


def test_what_a_run_stores_and_says(
    tiny_base: Path, tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    adapter = train(whole_config(tiny_base, data), home)
    said = capsys.readouterr().err
    assert "reward accuracy" in said and "of the held-out pairs are ranked as preferred" in said
    metrics, run = adapter.manifest.metrics, adapter.manifest.run
    assert {"eval_reward_margin", "eval_reward_accuracy", "eval_token_accuracy"} <= metrics.keys()
    assert "eval_perplexity" not in metrics
    assert (run["method"], run["beta"]) == ("dpo", 0.1)
    assert len(adapter.manifest.golden) == 1 and adapter.manifest.data.rows == 23
    page = (adapter.folder / "report.html").read_text()
    assert "Reward margin" in page and "nats a pair" in page and "<th>perplexity</th>" not in page
    assert train(whole_config(tiny_base, data), home).manifest.version == "v1"
    # Another run on the same rows takes the base's figures from the disk.
    monkeypatch.setattr(DpoTrainer, "compute_reference", lambda *_: pytest.fail("computed again"))
    assert train(whole_config(tiny_base, data, beta=0.5), home).manifest.version == "v2"


@pytest.mark.parametrize("is_cached", [False, True], ids=["fresh", "cached"])
def test_rows_of_the_other_method_are_refused(tiny_base: Path, tmp_path: Path, home: Home, is_cached: bool) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    pairs, rows = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(chat) + "\n" for _ in range(4)))
    if is_cached:
        encoder = Encoder.load(tiny_base)
        for path in (pairs, rows):
            open_store(find_source(path), "auto", encoder, home)
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 1: it is a preference row") as refused:
        train(whole_config(tiny_base, pairs, method="sft"), home)
    assert refused.value.hint.startswith("train it with --method dpo") and refused.value.row == 1
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: it is no preference row"):
        train(whole_config(tiny_base, rows), home)


def test_the_longer_sequence_counts_for_the_limit(tiny_base: Path, tmp_path: Path, home: Home) -> None:
    long = {"prompt": "why?", "chosen": "so", "rejected": "because " * 60}
    data = write_pairs(tmp_path / "pairs.jsonl", line=3, record=long)
    data.write_text(data.read_text().splitlines()[2] + "\n")
    with pytest.raises(DataError, match="1 of 1 rows are longer than 64 tokens"):
        train(whole_config(tiny_base, data, sequence_length=64, eval_data=data), home)


def test_the_verdicts_are_about_preferences() -> None:
    figures = {"eval_reward_accuracy": 0.95, "eval_reward_margin": 1.2, "eval_chosen_reward": 0.3}
    assert [each.level for each in judge_preferences(figures)] == ["good"]
    chance = figures | {"eval_reward_accuracy": 0.5, "eval_chosen_reward": -4.0}
    assert [each.title for each in judge_preferences(chance)] == ["learnt no preference", "both replies fell"]
    said = [Scored(text, 3, stopped, False, 0.1, False) for text, stopped in (("a", True), ("b", False))]
    scores = summarise(said, ["x", "y"])
    assert [each.title for each in judge_replies(scores, scores, said, "dpo")] == ["never stops"]
    assert "brought nothing" in [each.title for each in judge_replies(scores, scores, said)]
    assert [each.title for each in judge_change(said, said)] == ["shows in no reply"]
    assert judge_change(said, said[::-1]) == []


@pytest.mark.parametrize("budget", [40, 61, 75, 200])
def test_the_rehearsal_leaves_nothing_behind(budget: int, tmp_path: Path) -> None:
    """Whatever is cut: the last pair may lose its second sequence, and then the log-probabilities are odd in number."""
    model, config, ways = lora_on(base_of("qwen3")), dpo_config(), Ways()
    with trained(model, ways):
        given = (ToyPairs(12), ToyPairs(3, 1), config, Settings(budget), ways, tmp_path, {}, [])
        trainer = make_trainer(model, *given)
        assert isinstance(trainer, DpoTrainer) and trainer.prepare()
        trainer.try_largest(trainer.model)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_step_that_ran_out_of_memory_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _, _ = dpo_run(tmp_path / "whole", Settings(10_000), count=8)
    own, calls = DpoTrainer.logps, 0

    def logps(self: Any, model: Any, parts: Any) -> Any:
        nonlocal calls
        calls += 1
        if model.training and calls == 3:  # behind the base's two passes: the first step
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        return own(self, model, parts)

    monkeypatch.setattr(DpoTrainer, "logps", logps)
    found, outcome, _ = dpo_run(tmp_path / "again", Settings(10_000), count=8)
    assert outcome.settings.checkpointed_layers == 1
    assert_same(weights_of(found), weights_of(wanted), rtol=1e-3, share=1e-4)
