"""What a model's weights, LoRA slots and KV cache take, from its config.json alone. No torch: a plan takes no time.

Parameters are counted exactly for the families of EXACT; of others, as if they were Llamas, which is said (`doubts`).
Where weight files are there, their size counts instead. How much memory a GPU has left for it all: memory.py.

    >>> shape = read_shape({"model_type": "qwen3", "hidden_size": 5120, ...})
    >>> shape.parameters, shape.weights("fp8", 2) // 2**30
    (32762123264, 31)
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

GIB, MIB = 1 << 30, 1 << 20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Decoders of two norms, four attention linears and a gated MLP a layer; tests compare the count with transformers'.
EXACT = ("llama", "mistral", "qwen2", "qwen3")
BIASED = ("qwen2", "qwen2_moe")  # q, k and v have a bias whatever config.json says
NORMED = ("qwen3", "qwen3_moe")  # a norm over each head of q and of k
TIED = ("gemma", "gemma2", "gemma3", "gemma3_text")  # embedding and head are one where config.json does not say
LAYERS, HIDDEN = ("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd")
HEADS, LATENT = ("num_attention_heads", "n_head"), ("kv_lora_rank", "qk_rope_head_dim")
# Linears that vLLM computes as one, by the names that adapters give them.
LINEARS = {
    "qkv": frozenset(("q_proj", "k_proj", "v_proj")),
    "o": frozenset(("o_proj",)),
    "gate_up": frozenset(("gate_proj", "up_proj")),
    "down": frozenset(("down_proj",)),
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Bytes of a linear's element. FP8 with one scale a tensor (vllm/model_executor/layers/quantization/fp8.py); NF4 with a
# float32 scale for each 64 (bitsandbytes' blocksize; vLLM unpacks double quantisation when it loads).
FP8_BYTES, NF4_BYTES = 1.0, 0.5 + 4 / 64


@dataclass(frozen=True)
class Stored:
    """A ready quantised model: the method in its config.json, and bytes of a linear's element, scales included."""

    method: str
    bytes_each: float


@dataclass(frozen=True)
class Shape:
    """What decides a model's memory. Sizes are counts of elements.

    `linear`: weights of the linear layers, which quantisation takes; `other`: embedding, head, norms, biases, which
    stay 16-bit. `file_bytes`: size of the weight files, 0 where there are none. `doubts`: what the count does not know.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int
    active_experts: int
    vocabulary: int
    latent: int  # width of a compressed KV entry (multi-head latent attention); 0: keys and values are stored
    longest: int | None  # the model's own limit in tokens
    dtype: str  # of the weights in config.json
    linear: int
    other: int
    file_bytes: int = 0
    stored: Stored | None = None
    doubts: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All elements, tied ones once."""
        return self.linear + self.other

    def weights(self, quantization: str, each: int) -> int:
        """Bytes of the weights as the engine holds them; `each`: bytes of an element that is not quantised.

        A ready quantised model stays as it is.
        """
        if quantization in ("fp8", "bnb"):
            linear, other = self.elements()
            return int(linear * (FP8_BYTES if quantization == "fp8" else NF4_BYTES)) + other * each
        if self.stored:
            return self.file_bytes or int(self.linear * self.stored.bytes_each) + self.other * each
        return sum(self.elements()) * each

    def elements(self) -> tuple[int, int]:
        """(of linears, of the rest): as counted, corrected by the weight files where there are any."""
        if not self.file_bytes or self.stored:
            return self.linear, self.other
        every = self.file_bytes // BYTES.get(self.dtype, 2)
        linear = min(self.linear, every)
        return linear, every - linear

    def kv_bytes_per_token(self, bytes_each: int, tensor_parallel: int = 1) -> int:
        """2 (key and value) x layers x KV heads x head size x bytes; of latent attention, one latent vector a layer.

        On each of `tensor_parallel` GPUs: KV heads are shared out, but none is cut, and a latent is on every GPU. An
        upper bound for models in which some layers keep less (sliding windows, linear attention).
        Source: vllm/v1/kv_cache_interface.py, `FullAttentionSpec.page_size_bytes`.
        """
        width = self.latent or 2 * max(1, self.kv_heads // tensor_parallel) * self.head_dim
        return self.layers * width * bytes_each

    def lora_bytes_per_slot(
        self, rank: int, bytes_each: int, tensor_parallel: int = 1, targets: Collection[str] = ()
    ) -> int:
        """rank x bytes x sum of (in + out) over the linears that vLLM wraps, whatever the adapter's own rank.

        With `targets` only linears of LINEARS, and whole groups of them: vLLM computes q, k and v as one, gate and up
        too. Without, all of them, embedding and head.

        Of tensor-parallel linears A or B is cut, the other is whole; embedding and head are whole
        (vllm/lora/layers/column_parallel_linear.py, vocab_parallel_embedding.py, logits_processor.py).
        Llama-3.1-8B in bfloat16 at rank 16: 88 MiB, embedding and head included.
        """
        cut = tensor_parallel
        q, kv = self.heads * self.head_dim, max(1, self.kv_heads // cut) * cut * self.head_dim
        inner, experts = self.intermediate, max(1, self.experts)
        group_sizes = {
            "qkv": (self.hidden + q // cut) + 2 * (self.hidden + kv // cut),
            "o": q // cut + self.hidden,
            "gate_up": 2 * (self.hidden + inner // cut) * experts,
            "down": (inner // cut + self.hidden) * experts,
        }
        of_layer = sum(size for name, size in group_sizes.items() if not targets or LINEARS[name] & set(targets))
        ends = 0 if targets else 2 * (self.hidden + self.vocabulary)
        return rank * bytes_each * (self.layers * of_layer + ends)


def read_shape(config: dict[str, Any], file_bytes: int = 0) -> Shape | None:
    """The shape in a config.json; None for an architecture that does not say it in the usual words."""
    nested = config.get("text_config")  # of a model that also sees or hears
    text = config | nested if isinstance(nested, dict) else config
    layers, hidden, heads = (find(text, *names) for names in (LAYERS, HIDDEN, HEADS))
    if not (layers and hidden and heads):
        return None
    experts = find(text, *EXPERTS) or 1
    shape = Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=find(text, "num_key_value_heads") or heads,
        head_dim=find(text, "head_dim") or hidden // heads,
        intermediate=(find(text, "moe_intermediate_size") if experts > 1 else None)
        or find(text, "intermediate_size", "n_inner")
        or 4 * hidden,
        experts=experts,
        active_experts=find(text, "num_experts_per_tok") or 1,
        vocabulary=find(text, "vocab_size") or 0,
        latent=sum(find(text, name) or 0 for name in LATENT) if find(text, *LATENT[:1]) else 0,
        longest=find(text, "max_position_embeddings", "n_positions", "max_seq_len"),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"),
        linear=0,
        other=0,
    )
    stored = read_stored(config)
    linear, other = count(shape, text)
    doubts = tuple(find_doubts(text, file_bytes, is_nested=isinstance(nested, dict)))
    return replace(shape, linear=linear, other=other, file_bytes=file_bytes, stored=stored, doubts=doubts)


def find(config: dict[str, Any], *names: str) -> int | None:
    """The first of these keys that holds a positive whole number."""
    return next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)


def count(shape: Shape, text: dict[str, Any]) -> tuple[int, int]:
    """(elements of linears, of the rest), for decoders with q, k, v, o and gate, up, down."""
    kind, hidden = text.get("model_type"), shape.hidden
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = hidden * (2 * q + 2 * kv)
    shared = (find(text, "shared_expert_intermediate_size") or 0) + (
        (find(text, "n_shared_experts") or 0) * shape.intermediate
    )
    mlp = 3 * hidden * (shape.intermediate * shape.experts + shared)
    biases = (q + 2 * kv) if kind in BIASED else (q + 2 * kv + hidden) if text.get("attention_bias") else 0
    biases += 2 * shape.intermediate + hidden if text.get("mlp_bias") else 0
    norms = 2 * hidden + (2 * shape.head_dim if kind in NORMED else 0)
    router = hidden * shape.experts if shape.experts > 1 else 0
    ends = 1 if text.get("tie_word_embeddings", kind in TIED) else 2
    return shape.layers * (attention + mlp), (
        shape.layers * (biases + norms + router) + ends * shape.vocabulary * hidden + hidden
    )


def read_stored(config: dict[str, Any]) -> Stored | None:
    """The quantisation that a config.json declares. 16 bits where it does not say how many, which is too much."""
    declared = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(declared, dict):
        return None
    method = str(declared.get("quant_method") or "unknown").lower().replace("_", "-")
    if method in ("bitsandbytes", "bnb"):
        return Stored("bitsandbytes", NF4_BYTES if declared.get("load_in_4bit") else 1.0)
    if method in ("fp8", "fbgemm-fp8"):
        return Stored(method, FP8_BYTES)
    if method == "mxfp4":
        return Stored(method, 0.5 + 1 / 32)
    weights = declared
    for group in (declared.get("config_groups") or {}).values():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            weights = group["weights"]
    bits = find(weights, "bits", "num_bits", "w_bit") or (4 if method in ("gptq", "awq") else 16)
    group_size = find(weights, "group_size", "q_group_size")
    scales = (2 + bits / 8) / group_size if group_size else 0.0  # a 16-bit scale and a zero point for each group
    return Stored(method, bits / 8 + scales)


def find_doubts(text: dict[str, Any], file_bytes: int, is_nested: bool) -> list[str]:
    """What the figures do not know, in words."""
    kind = str(text.get("model_type"))
    found = []
    if not file_bytes and (kind not in EXACT or find(text, *EXPERTS)):
        found.append(f"the parameters of {kind} are counted as those of a Llama: its weight files would tell.")
    if not file_bytes and is_nested:
        found.append("the encoder of pictures or sound is not counted: its weight files would tell.")
    layers = set(text.get("layer_types") or ())
    windowed = bool(text.get("sliding_window")) and text.get("use_sliding_window", True)
    if windowed or any(layer != "full_attention" for layer in layers):
        found.append("some layers keep less than the whole context: more tokens will fit than are counted here.")
    return found
