"""The reference of the run configuration, made from its fields: a page for people, a JSON schema for editors.

`make docs` writes both into docs/; tests/test_train_config.py compares them with the code.

    python -m loraport.train.reference docs
"""

import json
import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from loraport.train.config import RunConfig, section_of
from loraport.train.defaults import Facts, resolve
from loraport.train.presets import DEFAULT_PRESET, PRESETS

PRESET_FIELDS = ("rank", "alpha", "rslora", "dropout", "target_modules")
PAGE, SCHEMA = "configuration.md", "train.schema.json"
INTRODUCTION = """# The run configuration

<!-- Made by `make docs` from train/config.py and train/defaults.py: change it there. -->

Each key below is one of a YAML file (`loraport train --config run.yaml`) and, with `-` for `_`, a flag of
`loraport train`; flags win. Unknown keys are refused. Paths in a file are relative to it. Only `model` and `data` must
be given. A first line `# yaml-language-server: $schema=train.schema.json` (the file lies beside this page) makes
editors complete and check the rest.
"""
MISTRAL_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
TOKENS_A_ROW, TRAINED_A_ROW = 600, 150  # of the example below


def make_page() -> str:
    """docs/configuration.md."""
    return "\n".join([INTRODUCTION, *make_sections(), make_presets(), make_derived()])


def make_sections() -> list[str]:
    """A table for each section of the configuration."""
    rows: dict[str, list[str]] = {}
    for name in RunConfig.model_fields:
        heading = f"## {section_of(name)}\n\n| key | values | default | meaning |\n| --- | --- | --- | --- |"
        cells = (f"`{name}`", values_of(name), default_of(name), RunConfig.model_fields[name].description or "")
        rows.setdefault(heading, []).append(f"| {' | '.join(cells)} |")
    return ["\n".join([heading, *lines, ""]) for heading, lines in rows.items()]


def values_of(name: str) -> str:
    """The type of a field in words, with its bounds: `a number, at least 1`."""
    if name == "preset":
        return ", ".join(PRESETS)
    field = RunConfig.model_fields[name]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return ", ".join(map(str, kinds))
    if get_origin(field.annotation) is tuple:
        return "a list of names"
    words = {str: "text", Path: "a path", bool: "true, false", int: "a whole number", float: "a number"}[kinds[0]]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(limit, key)}"
        for limit in field.metadata
        for key, sign in signs.items()
        if hasattr(limit, key)
    ]
    return " ".join([words, ", ".join(bounds)]).strip()


def default_of(name: str) -> str:
    """The default as it stands in YAML; a word where it is derived or must be given."""
    field = RunConfig.model_fields[name]
    if field.is_required():
        return "must be given"
    if name in PRESET_FIELDS:
        return "the preset's"
    if field.default is None:
        return "derived" if "efault:" in (field.description or "") else "none"
    return f"`{json.dumps(field.default)}`".replace('"', "")


def make_presets() -> str:
    """The presets, with the parameters that they have on Mistral-7B's shape."""
    lines = [
        "## Presets\n",
        f"The default is `{DEFAULT_PRESET}`. Parameters are those on Mistral-7B's shape.\n",
        "| name | rank | alpha | dropout | rsLoRA | target modules | parameters |\n" + "| --- " * 7 + "|",
    ]
    for name, preset in PRESETS.items():
        rank, alpha = preset.rank or "8 to 64", preset.alpha or preset.alpha_for(8, preset.rslora)
        targets, switch = ", ".join(preset.target_modules), "on" if preset.rslora else "off"
        cells = (f"`{name}`", rank, alpha, preset.dropout, switch, targets, count_on_mistral(name))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def count_on_mistral(name: str) -> str:
    """Parameters of a preset's adapter on Mistral-7B's shape: r * (in + out) for each target."""
    hidden, inner, keys = 4096, 14336, 1024
    widths = dict.fromkeys(("q_proj", "o_proj"), 2 * hidden) | dict.fromkeys(("k_proj", "v_proj"), hidden + keys)
    widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + inner)
    preset = PRESETS[name]
    if preset.rank is None:
        return f"{32 * 8 * sum(widths.values()):,} to {32 * 64 * sum(widths.values()):,}"
    return f"{32 * preset.rank * sum(widths[target] for target in preset.target_modules):,}"


def make_derived() -> str:
    """What is derived for data of several sizes on an example model, with the reasons."""
    lines = [
        "## What is derived\n",
        "What is not given follows from data and model, and is printed with its reason when training starts; the "
        "result is stored with the adapter. The rules are in `train/defaults.py`, after "
        '["LoRA Without Regret"](https://thinkingmachines.ai/blog/lora/) and, for the learning rate, the formula of '
        "tinker-cookbook. An example, on Mistral-7B's shape with rows of 600 tokens of which 150 are learned:\n",
    ]
    sizes = (80, 400, 1500, 20_000, 200_000)
    runs = [dict_of_choices(rows) for rows in sizes]
    lines.append("| | " + " | ".join(f"{rows:,} rows" for rows in sizes) + " |\n" + "| --- " * (len(sizes) + 1) + "|")
    lines += [f"| {name} | " + " | ".join(run[name] for run in runs) + " |" for name in runs[0]]
    return "\n".join(lines) + "\n"


def dict_of_choices(rows: int) -> dict[str, str]:
    """The derived settings of the example with `rows` rows."""
    shape = Facts.of_base(MISTRAL_7B)
    facts = Facts(
        rows=rows,
        tokens=rows * TOKENS_A_ROW,
        trained_tokens=rows * TRAINED_A_ROW,
        longest=3 * TOKENS_A_ROW,
        hidden_size=shape.hidden_size,
        max_positions=shape.max_positions,
        width=shape.width,
    )
    config = RunConfig.model_validate({"model": "mistral", "data": "rows.jsonl"})
    return {choice.name: choice.value for choice in resolve(config, facts)[1]}


def make_schema() -> dict[str, Any]:
    """A JSON schema of the YAML file, without `required`: the flags may give what the file does not."""
    schema = RunConfig.model_json_schema()
    for name, field in schema["properties"].items():
        field.pop("title", None)
        if field.get("default") in (None, []) or name in PRESET_FIELDS:
            field.pop("default", None)
        if name == "preset":
            field["enum"] = list(PRESETS)
    schema.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "loraport train"}


def write(folder: Path) -> None:
    """Write page and schema into `folder`."""
    (folder / PAGE).write_text(make_page(), encoding="utf-8")
    (folder / SCHEMA).write_text(json.dumps(make_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
