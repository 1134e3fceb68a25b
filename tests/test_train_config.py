"""The run configuration: presets, files, flags on top, and what a mistake looks like."""

from pathlib import Path

import pytest

from loraport.clients.errors import ConfigError
from loraport.train.config import PRESETS, VLLM_RANKS, RunConfig, load_config

ROOT = Path(__file__).parent.parent
REQUIRED = {"model": "m", "data": "d.jsonl"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fill_what_is_not_given(preset: str) -> None:
    rank, alpha, targets = PRESETS[preset]
    config = load_config(None, REQUIRED | {"preset": preset})
    assert (config.rank, config.alpha, config.target_modules) == (rank, alpha, targets)


def test_alpha_follows_a_rank_of_your_own() -> None:
    config = load_config(None, REQUIRED | {"preset": "standard_r8_qkvo", "rank": 32})
    assert (config.rank, config.alpha) == (32, 64)
    assert load_config(None, REQUIRED | {"rank": 32, "alpha": 7}).alpha == 7


@pytest.mark.parametrize(("rank", "needed"), [(1, 1), (4, 8), (8, 8), (9, 16), (64, 64), (300, 320)])
def test_the_rank_that_vllm_must_be_started_with(rank: int, needed: int) -> None:
    assert load_config(None, REQUIRED | {"rank": rank}).max_lora_rank == needed
    assert needed in VLLM_RANKS


def test_paths_in_a_file_are_relative_to_it_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: ./base\ndata: rows.jsonl\nepochs: 2\n")
    config = load_config(tmp_path / "run.yaml", {"epochs": 5.0, "rank": None})
    assert config.model == str(tmp_path / "base")
    assert config.data == tmp_path / "rows.jsonl"
    assert config.epochs == 5


def test_a_hub_id_in_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: org/name\ndata: rows.jsonl\n")
    assert load_config(tmp_path / "run.yaml", {}).model == "org/name"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("learnin_rate: 1", "unknown key 'learnin_rate' in", "did you mean learning_rate?"),
        ("zzz: 1", "unknown key 'zzz'", "known keys: model"),
        ("preset: huge", "preset 'huge' is not known; there are minimal_r4_qv", ""),
        ("epochs: -1", "epochs in", "Passes over the rows"),
        ("rank: many", "(it is 'many')", "Rank of the adapter"),
        ("- a list", "must hold keys and values", "train.yaml"),
        ("a: b: c", "is not YAML", "indentation"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str, hint: str) -> None:
    (tmp_path / "run.yaml").write_text(text if text[0] in "-a" else f"model: m\ndata: d\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", {})
    assert message in caught.value.message and hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_misspelled_key_explains_more_than_the_missing_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndta: rows.jsonl\n")
    with pytest.raises(ConfigError, match="unknown key 'dta'"):
        load_config(tmp_path / "run.yaml", {})


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model and data must be given"):
        load_config(None, {})
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_config(tmp_path / "none.yaml", {})


def test_the_fingerprint_ignores_places_and_sees_settings() -> None:
    def fingerprint(**settings: object) -> str:
        return RunConfig.model_validate(REQUIRED | settings).fingerprint("d", {"config": "c"})

    assert fingerprint() == fingerprint(model="/elsewhere", data="copy.jsonl")
    assert fingerprint() != fingerprint(seed=1)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_parses(path: Path) -> None:
    load_config(path, {})
