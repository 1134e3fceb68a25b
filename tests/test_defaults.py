"""What is derived where nothing is given: the rules, and that what is given stays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraport.clients.errors import ConfigError
from loraport.train.config import RunConfig, load_config
from loraport.train.defaults import Facts, resolve, say_choices
from loraport.train.reference import MISTRAL_7B

ROOT = Path(__file__).parent.parent
MISTRAL = Facts.of_base(MISTRAL_7B)
ROWS = replace(MISTRAL, rows=3477, tokens=2_400_000, trained_tokens=310_000, longest=1012, eval_rows=200)


def settle(facts: Facts, **settings: Any) -> Any:
    return resolve(RunConfig.model_validate({"model": "m", "data": "d.jsonl"} | settings), facts)[0]


def test_the_width_of_a_model_is_what_rank_one_costs() -> None:
    assert MISTRAL.width == 41_943_040 // 16
    assert (MISTRAL.hidden_size, MISTRAL.max_positions) == (4096, 32768)


@pytest.mark.parametrize(
    "config",
    [
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
        {"text_config": {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}},
    ],
)
def test_other_words_for_a_shape(config: dict[str, Any]) -> None:
    facts = Facts.of_base(config)
    assert facts.hidden_size == 64 and facts.max_positions == 128 and facts.width


def test_a_shape_that_is_not_told() -> None:
    facts = Facts.of_base({"model_type": "mystery"})
    assert facts == Facts()
    config = settle(facts)
    assert (config.rank, config.learning_rate, config.batch_size) == (16, 2e-4, 16)


@pytest.mark.parametrize(
    ("longest", "limit", "length"), [(1012, None, 1024), (1024, None, 1024), (5, None, 64), (1012, 1020, 1020)]
)
def test_sequence_length(longest: int, limit: int | None, length: int) -> None:
    assert settle(Facts(longest=longest, max_positions=limit)).sequence_length == length


@pytest.mark.parametrize(("tokens", "rank"), [(0, 8), (20_971_520, 8), (20_971_521, 16), (10**9, 64)])
def test_the_rank_holds_the_tokens_to_learn(tokens: int, rank: int) -> None:
    config = settle(replace(MISTRAL, rows=10, trained_tokens=tokens))
    assert (config.rank, config.alpha, config.rslora) == (rank, 8, True)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs"), [(12, 4, 5), (100, 8, 3), (999, 8, 2), (1999, 16, 2), (50_000, 16, 1)]
)
def test_batch_and_epochs_follow_the_rows(rows: int, batch: int, epochs: float) -> None:
    config = settle(Facts(rows=rows))
    assert (config.batch_size, config.epochs) == (batch, epochs)


@pytest.mark.parametrize(("hidden", "rate"), [(256, 1e-3), (2000, 5e-4), (4096, 3e-4), (8192, 2e-4), (50_000, 1e-4)])
def test_the_learning_rate_follows_the_width(hidden: int, rate: float) -> None:
    assert settle(Facts(hidden_size=hidden)).learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [
        ({}, 11),  # 5% of 218
        ({"epochs": 3}, 20),
        ({"max_steps": 40}, 2),
        ({"warmup_ratio": 0.5}, 109),
        ({"warmup_steps": 0}, 0),
        ({"max_steps": 40, "warmup_ratio": 0.1}, 4),
    ],
)
def test_warmup(settings: dict[str, Any], warmup: int) -> None:
    config = settle(ROWS, **settings)
    assert config.warmup_steps == warmup and config.warmup_ratio is None


@pytest.mark.parametrize(
    ("settings", "apart", "saved"),
    [
        ({}, 109, 109),  # twice in 218 steps: 200 rows are 12.5 batches, a third of them is 5% of 84 steps
        ({"eval_rows": 16}, 55, 55),
        ({"epochs": 3, "batch_size": 200}, 18, 18),  # each epoch
        ({"eval_steps": 50}, 50, 50),
        ({"save_steps": 30}, 30, 30),
        ({"epochs": 100}, 218, 218),
        ({"max_steps": 7}, 7, 7),
    ],
)
def test_evaluations(settings: dict[str, Any], apart: int, saved: int) -> None:
    config = settle(ROWS, **settings)
    assert (config.eval_steps, config.save_steps) == (apart, saved)


def test_nothing_is_left_open_before_there_is_data() -> None:
    """As `loraport plan train` needs it."""
    config = settle(MISTRAL)
    assert None not in [getattr(config, name) for name in ("rank", "alpha", "epochs", "batch_size", "warmup_steps")]
    assert (config.sequence_length, config.learning_rate) == (2048, pytest.approx(3e-4))
    assert settle(replace(MISTRAL, max_positions=512)).sequence_length == 512


def test_what_is_given_stays_and_is_not_told() -> None:
    given = {"rank": 4, "epochs": 7, "batch_size": 3, "learning_rate": 1e-5, "warmup_steps": 1, "eval_steps": 2}
    config, choices = resolve(RunConfig.model_validate({"model": "m", "data": "d"} | given), ROWS)
    assert config.model_dump() | given == config.model_dump()
    assert [choice.name for choice in choices] == ["sequence length"]


def test_the_demo_gives_all_that_decides_its_result() -> None:
    """1,000 rows, hidden size 256: as it was before anything was derived."""
    config = load_config(ROOT / "examples/demo/train.yaml", {})
    done, choices = resolve(
        config, Facts(rows=1000, longest=180, trained_tokens=16_000, hidden_size=256, eval_rows=100)
    )
    assert (done.rank, done.alpha, done.dropout, done.rslora) == (16, 32, 0.0, False)
    assert (done.epochs, done.batch_size, done.learning_rate, done.warmup_steps) == (1, 16, 1e-3, 3)
    assert (done.weight_decay, done.max_grad_norm, done.scheduler, done.eval_steps) == (0, 1, "cosine", 63)
    assert {choice.name for choice in choices} == {"sequence length", "warmup steps", "eval steps"}


def test_what_cannot_be_resolved_is_an_error_of_the_configuration() -> None:
    broken = RunConfig.model_validate({"model": "m", "data": "d"}).model_copy(update={"load": "wood"})
    with pytest.raises(ConfigError, match="load in the configuration for this data is wrong"):
        resolve(broken, ROWS)


def test_choices_are_printed_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    say_choices(resolve(RunConfig.model_validate({"model": "m", "data": "d"}), ROWS)[1])
    told = capsys.readouterr().err
    assert "  sequence length  1024  (the longest row, 1,012 tokens, rounded up)\n" in told
    assert "  learning rate    3e-4  (ten times full fine-tuning's at a hidden size of 4,096)\n" in told
    assert "  rank             8  (21.0M parameters for 310,000 tokens to learn)\n" in told
