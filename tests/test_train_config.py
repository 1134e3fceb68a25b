"""The run configuration: presets, files, flags on top, what a mistake looks like, and the docs made from it."""

import json
from pathlib import Path

import pytest

from loraport.clients.errors import ConfigError
from loraport.train import reference
from loraport.train.config import SECTIONS, VLLM_RANKS, ResolvedConfig, RunConfig, load_config, section_of
from loraport.train.defaults import Facts, resolve
from loraport.train.presets import PRESETS

ROOT = Path(__file__).parent.parent
REQUIRED = {"model": "m", "data": "d.jsonl"}


def resolved(**settings: object) -> ResolvedConfig:
    return resolve(load_config(None, REQUIRED | settings), Facts())[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fill_what_is_not_given(preset: str) -> None:
    wanted = PRESETS[preset]
    config = load_config(None, REQUIRED | {"preset": preset})
    assert (config.rank, config.alpha) == (wanted.rank, wanted.alpha)
    assert (config.dropout, config.rslora) == (wanted.dropout, wanted.rslora)
    assert config.target_modules == wanted.target_modules


def test_what_is_given_wins_over_the_preset() -> None:
    own = {"preset": "all_linear_auto", "dropout": 0.1, "rslora": False, "target_modules": ["q_proj"]}
    config = load_config(None, REQUIRED | own)
    assert (config.dropout, config.rslora, config.target_modules) == (0.1, False, ("q_proj",))
    assert load_config(None, REQUIRED | {"preset": "standard_r8_qkvo", "dropout": 0.0}).dropout == 0.0


# Parameters on Mistral-7B's shape, counted by PEFT; the middle two are published figures.
@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("minimal_r4_qv", 32 * 4 * ((4096 + 4096) + (4096 + 1024))),
        ("standard_r8_qkvo", 6_815_744),
        ("aggressive_r16_all", 41_943_040),
        ("high_capacity_r32_all", 83_886_080),
    ],
)
def test_presets_have_their_parameters_on_mistral_7b(preset: str, parameters: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig, MistralForCausalLM

    config = load_config(None, REQUIRED | {"preset": preset})
    with torch.device("meta"):
        base = MistralForCausalLM(MistralConfig(**reference.MISTRAL_7B))
        model = get_peft_model(base, LoraConfig(r=config.rank, target_modules=list(config.target_modules)))
    assert model.get_nb_trainable_parameters()[0] == parameters
    assert reference.count_on_mistral(preset) == f"{parameters:,}"


def test_alpha_follows_a_rank_of_your_own() -> None:
    config = resolved(preset="standard_r8_qkvo", rank=32)
    assert (config.rank, config.alpha) == (32, 64)
    assert resolved(rank=32, alpha=7).alpha == 7


def test_alpha_without_a_ratio() -> None:
    """rsLoRA divides by the root of the rank: one alpha for all ranks."""
    assert resolved(rank=64).alpha == resolved(rank=8).alpha == 8
    assert resolved(rank=64, rslora=False).alpha == 128


@pytest.mark.parametrize(("rank", "needed"), [(1, 1), (4, 8), (8, 8), (9, 16), (64, 64), (300, 320)])
def test_the_rank_that_vllm_must_be_started_with(rank: int, needed: int) -> None:
    assert resolved(rank=rank).max_lora_rank == needed
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
        ("rank: 0", "rank in", "Rank of the adapter"),
        ("load: fp16\ncompute_dtype: bf16", "--load fp16 and --compute-dtype bf16: one of them", ""),
        ("load: bf16\ncompute_dtype: fp32", "a base computes in the type it is held in", ""),
        ("load: fp32\ncompute_dtype: bf16", "unless that is int8 or nf4", ""),
        ("warmup_ratio: 0.1\nwarmup_steps: 3", "--warmup-ratio and --warmup-steps: one of them", ""),
        ("eval_data: e.jsonl\neval_fraction: 0.1", "--eval-data and --eval-fraction: one of them", ""),
        ("eval_steps: 50\nsave_steps: 70", "--save-steps 70 must be a multiple of --eval-steps 50", ""),
        ("target_modules: [all-linear, q_proj]", "--target-modules all-linear stands alone", ""),
        ("- a list", "must hold keys and values", "train.yaml"),
        ("a: b: c", "line 1, is not YAML: mapping values are not allowed here.", "indentation"),
        ("track: [tensorboard, foo]", "track in", "Also record the run"),
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
    load_config(path, {"data": Path("rows.jsonl")})


def test_a_stored_configuration_is_a_configuration() -> None:
    """The manifest's resolved form can be trained from again, with nothing left to derive."""
    stored = resolved().model_dump(mode="json")
    again, choices = resolve(RunConfig.model_validate(stored), Facts(rows=10, hidden_size=64))
    assert again.model_dump(mode="json") == stored and not choices


def test_every_field_is_explained_in_a_section() -> None:
    assert all(field.description and field.description[-1] == "." for field in RunConfig.model_fields.values())
    sections = [section_of(name) for name in RunConfig.model_fields]
    assert list(dict.fromkeys(sections)) == list(SECTIONS.values())


def test_the_docs_are_those_of_the_fields() -> None:
    assert (ROOT / "docs" / reference.PAGE).read_text() == reference.make_page(), "run `make docs`"
    assert json.loads((ROOT / "docs" / reference.SCHEMA).read_text()) == reference.make_schema(), "run `make docs`"


def test_the_schema_accepts_what_is_shipped() -> None:
    """The keys and values of every example are allowed by the schema that editors read."""
    schema = reference.make_schema()
    for path in (ROOT / "examples").rglob("*.yaml"):
        for key, value in load_config(path, {"data": Path("d")}).model_dump(mode="json", exclude_unset=True).items():
            allowed = schema["properties"][key].get("enum")
            assert allowed is None or value in allowed, key
