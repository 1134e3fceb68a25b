"""What is trained and how it is held, and the figures that are no matter of shapes: what memory depends on besides.

>>> Load(Types("nf4", "bfloat16"), 16, ("q_proj",), 0.0, True, "adamw").attention
'flash'
"""

from dataclasses import dataclass
from typing import Literal

from loraport.train.memory.machine import GIB, Types

MIB = 1 << 20


@dataclass(frozen=True)
class Coefficients:
    """What is not a matter of shapes. Those marked * are estimates that no measurement has confirmed yet."""

    chunk_logits: int = 2**26  # loss.py, CHUNK_LOGITS: logits that are made at once
    # kernels/cross_entropy.py writes the gradient over the logits, on a GPU. Elsewhere there are four more in
    # float32: the logits, their softmax, its logarithm, the gradient.
    logits_more: int = 0
    logits_more_plain: int = 4
    # * A head with a cap or a scale is left to transformers: the logits of all trained tokens, and as many more.
    logits_more_whole: int = 5
    # swiglu_backward overwrites gate and up; the product's gradient dh is the one temporary of width I (mlp.py).
    mlp_temporaries: float = 1.0
    # Without the kernels: sigmoid, silu, and the three gradients.
    mlp_temporaries_plain: float = 6.0
    # A layer that transformers runs: norms keep a float32 copy and their output, the MLP its product and activation.
    # * Two and a half times, roughly.
    unfused_factor: float = 2.5
    # Gradients of q, k, v and out, once more for all heads that share a key, and flash attention's float32 sum for dq:
    # 4 B each, no b.
    attention_temporaries: float = 2.0
    # Gradients of the residual stream: before and behind the MLP, and of its norm; that norm made again.
    residual_temporaries: int = 4
    # Inputs of checkpointed layers that are still, or again, on the GPU while they are offloaded: one run on an H200.
    offloaded_on_their_way: int = 6
    # groups.py makes one wide matrix in 16 bits at a time.
    dequantised_copies: float = 1.0
    # * int8: scales are float32, and so may be the product with them before it is stored.
    dequantised_copies_int8: float = 3.0
    # bitsandbytes: tensors below 4,096 elements keep float32 states; one float32 scale per 256 for each state.
    small_tensor: int = 4096
    state_block: int = 256
    # cuBLAS: 32 MiB a handle on Hopper, for the forward and the backward thread; * flash attention and bookkeeping.
    workspace: int = 128 * MIB
    # Reserved by torch's allocator and not used, as share of what comes and goes, in runs on an H200: up to 4.3%, and
    # up to 8.9% where some layers are kept and others computed again.
    slack_share: float = 0.05
    slack_share_mixed: float = 0.10
    slack_least: int = 192 * MIB
    # CUDA context and loaded kernels: outside of torch's figures, 0.5 to 1.4 GB by GPU and driver; nvidia-smi shows it.
    context: int = GIB
    process: int = 900 * MIB  # Python with torch and transformers, on a CPU


COEFFICIENTS = Coefficients()


@dataclass(frozen=True)
class Load:
    """What is trained and how it is held: all that memory depends on beside the shape and the layout.

    `attention`, as train/loop/attention.py chooses it: flash on all documents at once; joined, where each is
    computed by itself (`by_document`).
    """

    types: Types
    rank: int
    targets: tuple[str, ...]
    dropout: float
    double_quant: bool
    optimizer: Literal["adamw", "paged_adamw_8bit"]
    device: Literal["cuda", "cpu"] = "cuda"
    attention: Literal["flash", "joined"] = "flash"
