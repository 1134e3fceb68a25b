"""A merged model: what PEFT merges too, for every kind of base; whole or not there, found again, refused in words."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loraport.clients.errors import AdapterError, BaseModelError, ResourceError, VerificationError
from loraport.clients.home import Home, write_json
from loraport.serve.adapters import merge
from loraport.serve.adapters.merge import merged, notes
from loraport.serve.adapters.targets import Delta, find_weight, index_by_tail
from loraport.serve.adapters.tensors import Tensor, from_float32, read_tensors, to_float32
from loraport.serve.plan.settings import Plan
from loraport.serve.proof.tolerance import TOLERANCES
from loraport.train.adapters import Adapter, open_adapter
from loraport.train.base_model import Base
from loraport.train.manifest import Manifest, Reply
from tests.adapters import make_tiny_adapter, write_manifest

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
}
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llama in halves": ("llama", SIZES, "float16", {"target_modules": ALL}),
    "llama, head and embedding too": (
        "llama",
        SIZES | {"tie_word_embeddings": False},
        "float32",
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    ),
    "mistral, rsLoRA and patterns": (
        "mistral",
        SIZES,
        "bfloat16",
        {
            "target_modules": ALL,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 4, r"layers\.0\.self_attn\.q_proj": 2},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "qwen2": ("qwen2", SIZES, "bfloat16", {"target_modules": ["q_proj", "v_proj"]}),
    "gemma2": ("gemma2", SIZES, "bfloat16", {"target_modules": ALL}),
    "phi3, fused": ("phi3", SIZES, "bfloat16", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "gpt2, turned": ("gpt2", GPT2, "float32", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gemma3 behind eyes": (
        "gemma3",
        {"text_config": SIZES, "vision_config": VISION, "mm_tokens_per_image": 4},
        "bfloat16",
        {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    ),
}


def make_case(
    folder: Path, kind: str, sizes: dict[str, Any], dtype: str, lora: dict[str, Any]
) -> tuple[Base, Adapter, Any]:
    """(base, adapter, PEFT's merge in float32) of a random model."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if "vision_config" in sizes else AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(AutoConfig.for_model(kind, **sizes)).to(getattr(torch, dtype)).save_pretrained(
        folder / "base", max_shard_size="40KB"
    )
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "base" / "tokenizer_config.json").write_text("{}")
    model = get_peft_model(
        auto.from_pretrained(folder / "base", dtype=torch.float32), LoraConfig(r=8, lora_alpha=12, **lora)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    write_manifest(folder / "adapter", folder / "base", "tiny", 8, [], {})
    plain = auto.from_pretrained(folder / "base", dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, folder / "adapter").merge_and_unload()
    base = Base(str(folder / "base"), folder / "base")
    return base, open_adapter(Home(folder), str(folder / "adapter")), (auto, expected)


@pytest.mark.parametrize("case", CASES)
def test_merged_is_what_peft_merges(case: str, tmp_path: Path, home: Home) -> None:
    import torch

    kind, sizes, dtype, lora = CASES[case]
    base, adapter, (auto, expected) = make_case(tmp_path, kind, sizes, dtype, lora)
    made = merged(base, adapter, home)
    stored = getattr(torch, dtype)
    original = auto.from_pretrained(base.folder, dtype=stored).state_dict()
    ours = auto.from_pretrained(made.folder, dtype=stored).state_dict()
    changed = [name for name in ours if not torch.equal(ours[name], original[name])]
    assert len(changed) == sum(".lora_A" in key or "lora_embedding_A" in key for key in adapter_keys(adapter))
    unequal = total = 0
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(ours[name], weight.to(stored), rtol=torch.finfo(stored).eps, atol=1e-6)
        unequal += int((ours[name] != weight.to(stored)).sum())
        total += weight.numel()
    assert dtype == "float32" or unequal < total / 500  # a sum of float32 in another order, beside a half


def adapter_keys(adapter: Adapter) -> list[str]:
    return list(read_tensors(adapter.folder / "adapter_model.safetensors", AdapterError)[0])


@pytest.fixture
def tiny(tiny_base: Path, home: Home) -> tuple[Base, Adapter]:
    """A real tokenizer, template and generation_config.json; embedding and head are one weight."""
    make_tiny_adapter(home.root, tiny_base, "tiny")
    return Base(str(tiny_base), tiny_base), open_adapter(home, "tiny")


def test_a_merged_folder_is_a_whole_model_under_the_adapters_name(tiny: tuple[Base, Adapter], home: Home) -> None:
    base, adapter = tiny
    made = merged(base, adapter, home)
    assert made.short_name == "tiny" and made.revision is None
    files = {path.name for path in base.folder.iterdir()}
    assert {path.name for path in made.folder.iterdir()} == files | {merge.MARKER}
    for name in files - {"model.safetensors"}:
        assert (made.folder / name).read_bytes() == (base.folder / name).read_bytes()
    assert json.loads((made.folder / merge.MARKER).read_text())["adapter"] == "tiny"


def test_it_is_made_once_and_found_again(tiny: tuple[Base, Adapter], home: Home) -> None:
    base, adapter = tiny
    first = merged(base, adapter, home).folder / "model.safetensors"
    before = first.stat()
    assert merged(base, adapter, home).folder / "model.safetensors" == first
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_other_weights_are_another_folder(tiny: tuple[Base, Adapter], tiny_base: Path, home: Home) -> None:
    base, adapter = tiny
    first = merged(base, adapter, home)
    make_tiny_adapter(home.root, tiny_base, "other", seed=2)
    weights = home.adapters / "other/v1/adapter_model.safetensors"
    weights.replace(adapter.folder / weights.name)
    second = merged(base, open_adapter(home, "tiny"), home)
    assert first.folder != second.folder
    assert (first.folder / "model.safetensors").read_bytes() != (second.folder / "model.safetensors").read_bytes()


def test_what_decides_about_replies_follows_the_base(tiny: tuple[Base, Adapter], home: Home, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(tiny[0].folder, folder)
    base = Base(str(folder), folder)
    made = merged(base, tiny[1], home)
    write_json(folder / "generation_config.json", {"temperature": 0.25})
    assert merged(base, tiny[1], home).folder == made.folder
    assert json.loads((made.folder / "generation_config.json").read_text()) == {"temperature": 0.25}


def test_files_without_a_target_are_links(tmp_path: Path, home: Home) -> None:
    base, adapter, _ = make_case(tmp_path, "llama", SIZES, "bfloat16", {"target_modules": ["down_proj"]})
    made = merged(base, adapter, home)
    shared = [path.name for path in made.weight_files if path.samefile(base.folder / path.name)]
    assert 0 < len(shared) < len(base.weight_files)
    for path in made.weight_files:
        assert path.stat().st_size == (base.folder / path.name).stat().st_size


def test_a_merge_that_breaks_off_leaves_nothing(
    tiny: tuple[Base, Adapter], home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = tiny

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "add", full)
    with pytest.raises(ResourceError, match="no disk space left while merging"):
        merged(base, adapter, home)
    assert list((home.cache / "merged").iterdir()) == []


def test_what_a_killed_merge_left_is_removed_and_never_used(tiny: tuple[Base, Adapter], home: Home) -> None:
    base, adapter = tiny
    folder = home.ensure(home.cache / "merged")
    (folder / ".partial-999999999-x").mkdir()
    emptied = folder / merge.name_folder(base, adapter)
    emptied.mkdir()
    made = merged(base, adapter, home)
    assert made.folder == emptied and [path.name for path in folder.iterdir()] == [emptied.name]
    assert made.weight_bytes == base.weight_bytes


def test_no_room_names_merges_of_other_versions(
    tiny: tuple[Base, Adapter], home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = tiny
    older = merged(base, adapter, home).folder
    renamed = older.rename(older.with_name("tiny-v0-0123456789abcdef"))

    def no_room(*_: object) -> None:
        raise ResourceError("merging tiny needs 9 MiB.", "")

    monkeypatch.setattr(merge, "require_disk", no_room)
    with pytest.raises(ResourceError) as refusal:
        merged(base, adapter, home)
    assert str(renamed) in refusal.value.hint


def edit_config(adapter: Adapter, **changes: Any) -> None:
    path = adapter.folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "initialisation pissa"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_more_than_plain_lora_is_refused(
    change: dict[str, Any], words: str, tiny: tuple[Base, Adapter], home: Home
) -> None:
    edit_config(tiny[1], **change)
    with pytest.raises(AdapterError, match=words):
        merged(*tiny, home)


def save_adapter(adapter: Adapter, tensors: dict[str, "np.ndarray[Any, Any]"]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, adapter.folder / "adapter_model.safetensors")


def pair(module: str, out: int = 64, width: int = 64) -> dict[str, "np.ndarray[Any, Any]"]:
    name = f"base_model.model.{module}"
    a, b = np.ones((8, width), np.float32), np.ones((out, 8), np.float32)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (pair("model.layers.7.self_attn.q_proj"), "layers.7.self_attn.q_proj, which is no weight"),
        (pair("lm_head", 512), "lm_head, and embedding and head of .* are one weight"),
        (pair("model.layers.0.self_attn.q_proj", 32), "make 32x64, the base's weight is 64x64"),
        ({"base_model.model.lm_head.weight": np.ones((4, 4), np.float32)}, "is no LoRA matrix"),
        ({k: v for k, v in pair("model.layers.0.mlp.up_proj").items() if "A" in k}, "do not fit together"),
        (
            pair("model.layers.0.self_attn.q_proj") | pair("layers.0.self_attn.q_proj"),
            "are both model.layers.0.self_attn.q_proj.weight",
        ),
    ],
    ids=["layer", "tied", "shape", "whole weight", "half", "twice"],
)
def test_what_does_not_fit_the_base_is_refused(
    tensors: dict[str, "np.ndarray[Any, Any]"], words: str, tiny: tuple[Base, Adapter], home: Home
) -> None:
    save_adapter(tiny[1], tensors)
    with pytest.raises(AdapterError, match=words):
        merged(*tiny, home)


def test_a_sum_that_the_type_cannot_hold_is_refused(tiny: tuple[Base, Adapter], home: Home) -> None:
    tensors = pair("model.layers.0.self_attn.q_proj")
    save_adapter(tiny[1], {key: array * np.float32(np.nan) for key, array in tensors.items()})
    with pytest.raises(AdapterError, match="values that BF16 cannot hold"):
        merged(*tiny, home)
    assert list((home.cache / "merged").iterdir()) == []


def test_quantised_weights_are_refused(tiny: tuple[Base, Adapter], home: Home, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "awq"
    shutil.copytree(tiny[0].folder, folder)
    write_json(folder / "config.json", tiny[0].config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(BaseModelError, match="stored in awq"):
        merged(Base(str(folder), folder), tiny[1], home)


def test_what_was_trained_on_four_bits_says_so(tiny: tuple[Base, Adapter]) -> None:
    assert notes(tiny[1]) == ()
    coarse = Adapter(tiny[1].folder, tiny[1].manifest.model_copy(update={"base_dtype": "nf4"}))
    assert "trained on 4-bit weights" in notes(coarse)[0]


def answering(manifest: Manifest, replies: list[Reply]) -> httpx.Client:
    """An engine that says these replies to the golden prompts, and renders prompts as in training."""
    prompts = [golden.prompt_tokens for golden in manifest.golden]

    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        assert asked["model"] == manifest.name
        if request.url.path == "/tokenize":
            messages = [golden.messages for golden in manifest.golden]
            return httpx.Response(200, json={"tokens": prompts[messages.index(asked["messages"])]})
        number = next(n for n, prompt in enumerate(prompts) if asked["prompt"][: len(prompt)] == prompt)
        reply, start = replies[number], len(asked["prompt"]) - len(prompts[number])
        names = [f"token_id:{token}" for token in reply.tokens[start:]]
        logprobs = {"tokens": names, "token_logprobs": reply.logprobs[start:], "top_logprobs": [{} for _ in names]}
        choice = {"text": reply.text, "finish_reason": "stop" if reply.stopped else "length", "logprobs": logprobs}
        return httpx.Response(200, json={"choices": [choice]})

    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://engine")


def test_a_merged_model_is_proven_under_the_adapters_name(tiny: tuple[Base, Adapter]) -> None:
    base, adapter = tiny
    plan = Plan(context=1024, requests=1, slots=0, rank=0, dtype="float32", kv_bytes=1, share=None)
    manifest = adapter.manifest
    client = answering(manifest, [golden.adapter for golden in manifest.golden])
    loaded = merge.prove_merged(client, adapter, base, plan)
    assert loaded.engine_name == loaded.name == "tiny" and loaded.verified.prompts == 3
    assert loaded.verified.tolerance == TOLERANCES["bfloat16"]  # what the sum was rounded to
    client = answering(manifest, [golden.base for golden in manifest.golden])
    with pytest.raises(VerificationError, match="tiny, merged into its base, does not answer") as refusal:
        merge.prove_merged(client, adapter, base, plan)
    assert "loraport serve tiny" in refusal.value.hint


def test_rounding_is_that_of_torch() -> None:
    import torch

    values = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    expected = torch.from_numpy(values.copy()).bfloat16()
    got = np.frombuffer(from_float32(values.copy(), "BF16"), np.int16)
    assert (got == expected.view(torch.int16).numpy()).all()
    assert (to_float32(got.tobytes(), "BF16") == expected.float().numpy()).all()


QUERY = "self_attn.q_proj"
LANGUAGE, EYES = f"language_model.model.layers.0.{QUERY}", f"vision_tower.encoder.layers.0.{QUERY}"


@pytest.mark.parametrize(
    ("module", "files", "expected"),
    [
        (f"model.layers.0.{QUERY}", [f"model.layers.0.{QUERY}", f"model.layers.1.{QUERY}"], 0),
        (f"model.language_model.layers.0.{QUERY}", [EYES, LANGUAGE], 1),
        (f"model.layers.0.{QUERY}", [LANGUAGE, EYES], 0),
        (f"model.language_model.layers.0.{QUERY}", [f"model.{EYES}", f"model.language_model.layers.0.{QUERY}"], 1),
        ("transformer.h.1.attn.c_attn", ["h.0.attn.c_attn", "h.1.attn.c_attn"], 1),
        ("model.layers.0.mlp.experts.1.up_proj", [f"model.layers.0.mlp.experts.{n}.up_proj" for n in (0, 1)], 1),
        ("lm_head", ["model.embed_tokens", "language_model.lm_head"], 1),
    ],
)
def test_names_are_matched_by_their_ends(module: str, files: list[str], expected: int, tmp_path: Path) -> None:
    a, b = Tensor("a", tmp_path, "F32", (2, 4), 0, 0), Tensor("b", tmp_path, "F32", (6, 2), 0, 0)
    weights = [Tensor(f"{name}.weight", tmp_path, "BF16", (6, 4), 0, 0) for name in files]
    found = find_weight(Delta(module, a, b, 1.0, is_turned=False), index_by_tail(weights), Base("m", tmp_path))
    assert found is weights[expected]
