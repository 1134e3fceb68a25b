"""`loraport plan train` as a command, `fetch_config` on a hub, and measured runs beside their predictions."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import loraport_cli
from loraport.clients.errors import UsageError
from loraport.train.memory.calibrate import compare
from loraport.train.memory.servable import WITHOUT_LORA
from tests.fake_hub import FakeHub
from tests.shapes import LLAMA_65B, MISTRAL_7B

RECIPE = ["--preset", "standard_r8_qkvo", "--load", "nf4", "--batch-size", "4", "--sequence-length", "1024"]


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    """A folder that holds config.json and nothing else."""
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral/config.json").write_text(json.dumps(MISTRAL_7B))
    return tmp_path / "mistral"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub whose model has weights that nobody should ask for."""
    with FakeHub() as server:
        server.add("org/big", {"config.json": json.dumps(LLAMA_65B).encode(), "model.safetensors": bytes(200_000)})
        server.add("org/bare", {"README.md": b"# Nothing"})
        yield server


def plan(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "loraport_cli", "plan", "train", *map(str, arguments)]
    return subprocess.run(command, env=clean | more, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_document(mistral: Path) -> None:
    done = plan("--model", mistral, *RECIPE, "--gpu-name", "T4", "--rows", "3477", "--price-per-hour", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["trainable_parameters"] == 6_815_744
    assert document["adapter_bytes"] > 4 * 6_815_744
    assert document["fits"] and sum(document["memory"].values()) == document["peak_memory_bytes"]
    assert document["peak_memory_bytes"] <= document["memory_limit_bytes"]
    assert document["settings"]["micro_batch_tokens"] >= 1024 and document["settings"]["computed"] == "float16"
    low, high = document["tokens_per_second_range"]
    assert low < document["tokens_per_second"] < high
    expected = 3477 * 1024 * document["settings"]["epochs"] / document["tokens_per_second"] / 3600
    assert document["hours"] == pytest.approx(expected, rel=0.01)
    assert document["cost"] == pytest.approx(document["hours"] * 0.5, rel=0.01)
    assert [rung["checkpointing"] for rung in document["ladder"]] == ["off", "half", "full", "offload"]


def test_the_number_of_gpus_changes_no_setting_that_changes_the_result(mistral: Path, tmp_path: Path) -> None:
    """One rule for the plan and for the run, which has it in train/run.py."""
    words = ["--model", mistral, "--load", "nf4", "--gpu-name", "T4", "--rows", "50", "--json"]
    (tmp_path / "run.yaml").write_text("gpus: 8\n")
    one, eight = plan(*words), plan(*words, "--config", tmp_path / "run.yaml")
    found = [json.loads(done.stdout) for done in (one, eight)]
    assert found[0]["settings"]["batch_size"] == found[1]["settings"]["batch_size"] == 4
    assert [document["gpu"]["count"] for document in found] == [1, 4]
    assert "4 of 8 GPUs are used, one for each row of a step" in " ".join(eight.stderr.split())


def test_the_text_ends_with_the_verdict(mistral: Path) -> None:
    done = plan("--model", mistral, *RECIPE, "--gpu-memory", "16")
    assert done.returncode == 0 and done.stdout == ""
    assert "6,815,744 parameters" in done.stderr
    assert "speed    not known for a GPU of 16 GiB; name one with --gpu-name" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("It fits: at most ")


def test_what_does_not_fit_exits_3_with_the_document(mistral: Path) -> None:
    done = plan("--model", mistral, "--load", "bf16", "--gpu-memory", "10", "--json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert not document["fits"] and document["alternatives"][0]["change"] == "--load nf4"
    assert "error: It does not fit" in done.stderr and "hint: --load nf4" in done.stderr


def test_rows_give_tokens_by_their_size(mistral: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": "x" * 985}) for _ in range(600)) + "\n")
    done = plan("--model", mistral, "--data", tmp_path / "rows.jsonl", "--gpu-name", "H200", "--json")
    document = json.loads(done.stdout)
    assert document["tokens"] == pytest.approx(600 * 1000 / 4, rel=0.01)
    assert document["settings"]["sequence_length"] == 448  # 1,000 bytes, 2.5 a token at the least, rounded up
    assert document["settings"]["epochs"] == 2


def test_a_file_of_a_run_is_planned_for(mistral: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: ./mistral\ndata: none.jsonl\nload: nf4\nrank: 64\n")
    done = plan("--config", tmp_path / "run.yaml", "--rows", "10", "--gpu-memory", "24", "--rank", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rank"] == 8


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "/none"], 3, "there is no model folder /none"),
        ([], 2, "model must be given"),
        (["--gpu-name", "Radeon"], 2, "no figures are known for a GPU called 'Radeon'"),
        (["--data", "/none.jsonl"], 3, "there is no data file /none.jsonl"),
        (["--data", "/none.parquet"], 2, "give --rows and --tokens instead"),
        (["--load", "nf4"], 2, "needs an NVIDIA GPU"),
        (["--target-modules", "lm_head"], 2, "vLLM serves no adapter on lm_head"),
        (["--rank", "1024"], 2, "rank"),
    ],
)
def test_refusals(mistral: Path, arguments: list[str], code: int, message: str) -> None:
    model = [] if "--model" in arguments or not arguments else ["--model", str(mistral)]
    done = plan(*model, *arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_of_a_hubs_model_the_configuration_alone_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    flags = ["--model", "org/big", "--load", "nf4", "--gpu-memory", "48", "--json"]
    done = plan(*flags, **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 65_285_660_672
    files = {path.rsplit("/", 1)[-1] for _, path, _ in hub.requests if "/resolve/" in path or "/cdn/" in path}
    assert files == {"config.json"}
    again = plan(*flags, **environment, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == done.stdout


@pytest.mark.parametrize(
    ("model", "message"),
    [("org/none", "no such model on"), ("org/bare", "has no config.json")],
)
def test_models_that_the_hub_lacks(hub: FakeHub, tmp_path: Path, model: str, message: str) -> None:
    done = plan("--model", model, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 3 and message in done.stderr and "\nhint: " in done.stderr


def test_a_group_shows_its_commands_with_their_own_lines() -> None:
    for group, (line, members) in loraport_cli.GROUPS.items():
        for name, (_, _, words) in members.items():
            called = loraport_cli.command_of([group, name, "--help"])
            assert called == f"{group} {name}"
            own = typer.main.get_command(loraport_cli.build_app(called)).commands[group]  # type: ignore[attr-defined]
            assert own.help == line
            assert own.commands[name].help.splitlines()[0] == words


def test_the_help_of_plan_imports_no_torch() -> None:
    code = (
        "import sys, loraport_cli\n"
        "try: loraport_cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "plan", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--gpu-name" in done.stdout


def measured(**changes: Any) -> dict[str, Any]:
    """A run that needed as much as is said."""
    run = {
        "name": "full",
        "base": MISTRAL_7B,
        "config": {"load": "nf4", "rank": 16},
        "tokens": 4096,
        "checkpointed": 32,
    }
    return run | {"peak_allocated": 6 * 10**9, "peak_reserved": 6 * 10**9} | changes


def test_predictions_beside_measured_runs(tmp_path: Path) -> None:
    (predicted,) = compare([measured()])
    exact = measured(peak_allocated=predicted.parts.allocated, peak_reserved=predicted.parts.reserved)
    under = measured(name="under", peak_reserved=predicted.parts.reserved + 1)
    over = measured(name="over", peak_reserved=int(predicted.parts.reserved / 1.11))
    assert [each.is_good for each in compare([exact, under, over])] == [True, False, False]
    (tmp_path / "runs.json").write_text(json.dumps([exact, over]))
    command = [sys.executable, "-m", "loraport.train.memory.calibrate", str(tmp_path / "runs.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4 and "first that of over" in done.stderr
    assert "1.000" in done.stderr and "1.110" in done.stderr


def test_a_measured_run_that_lacks_something_is_named() -> None:
    run = measured()
    del run["tokens"]
    with pytest.raises(UsageError, match="run 2 lacks something"):
        compare([measured(), run])


def test_the_list_of_architectures_without_lora_is_vllms() -> None:
    """By reading vLLM's sources, because importing them takes half a minute."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    models = Path(found.origin).parent / "model_executor/models"
    places = registered(models)
    assert not [name for name in WITHOUT_LORA if name in places and takes_lora(models, *places[name])]
    common = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")
    assert all(takes_lora(models, *places[name]) for name in (*common, "Phi3ForCausalLM", "GraniteForCausalLM"))


def registered(models: Path) -> dict[str, tuple[str, str]]:
    """Architecture to module and class, as in vLLM's registry."""
    tables = {}
    for node in ast.walk(ast.parse((models / "registry.py").read_text())):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                    tables[key.value] = tuple(getattr(each, "value", None) for each in value.elts)
    return tables  # type: ignore[return-value]


def takes_lora(models: Path, module: str, name: str) -> bool:
    """Whether the class, or one that it inherits from in the same or an imported module, is a SupportsLoRA."""
    path = models / f"{module.replace('.', '/')}.py"
    tree = ast.parse((path if path.exists() else path.with_suffix("") / "__init__.py").read_text())
    made = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    inside = "vllm.model_executor.models."
    brought = {
        alias.asname or alias.name: (node.module.removeprefix(inside), alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and (node.level == 1 or node.module.startswith(inside))
        for alias in node.names
    }
    if name in made:
        bases = [ast.unparse(base).split("[")[0] for base in made[name].bases]
        return (
            "SupportsLoRA" in bases
            or any(takes_lora(models, module, base) for base in bases if base in made)
            or any(takes_lora(models, *brought[base]) for base in bases if base in brought and base not in made)
        )
    return name in brought and takes_lora(models, *brought[name])
