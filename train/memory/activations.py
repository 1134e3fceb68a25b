"""What a layer keeps of each token for its backward pass, what that pass needs besides, and the loss. No torch here.

T is the number of tokens of a micro-step, b the bytes of a number in the arithmetic. H hidden size, Q and KV the widths
of all query and of all key heads, I the width of gate and of up. Counted as train/loop lays it out: layer.py and mlp.py
for what is kept, groups.py for the wide matrices, attention.py for its ways, loss.py. The way of counting is that of
"Reducing Activation Recomputation" (Korthikanti et al., 2022, arXiv:2205.05198).

    >>> layer_bytes(shape.blocks[0], shape, load) * tokens
"""

from loraport.train.memory.load import COEFFICIENTS, Coefficients, Load
from loraport.train.memory.shapes import Block, Linear, Shape, is_target

LEAVING = {"o_proj", "down_proj"}  # linears that write to the residual stream; the others of a block read one input
Moment = tuple[int, int]  # bytes a token, and the elements of the wide matrix that is made meanwhile


def layer_bytes(block: Block, shape: Shape, load: Load, known: Coefficients = COEFFICIENTS) -> int:
    """Bytes a token that a layer keeps when it is not computed again: attention's and the MLP's."""
    kept = attention_bytes(block, shape, load) + mlp_bytes(block, shape, load)
    return kept if shape.is_fused else int(known.unfused_factor * kept)


def attention_bytes(block: Block, shape: Shape, load: Load) -> int:
    """Bytes a token: b (H + 2Q + 2KV) + 4 heads, and x·A.

    The layer's input, q, k and v in one product, attention's output and its log-sum-exp in float32. With norms of q and
    k these are there before and behind them.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    numbers = shape.hidden + 2 * query + 2 * key
    if shape.has_qk_norm:
        numbers += query + key
    if load.attention == "joined":
        numbers += query  # the outputs of the documents once more
    return numbers * load.types.width + 4 * shape.heads + lora_bytes(block.attention, load)


def mlp_bytes(block: Block, shape: Shape, load: Load) -> int:
    """Bytes a token: b (H + gate + up), and x·A; the product is made again.

    The residual stream before the MLP; its norm is made again as well.
    """
    entering = sum(linear.outputs for linear in block.mlp if linear.inputs == shape.hidden)
    return (shape.hidden + entering) * load.types.width + lora_bytes(block.mlp, load)


def lora_bytes(linears: tuple[Linear, ...], load: Load) -> int:
    """x·A of each group; behind q, k and v, and behind gate and up, as much room for their gradients' products."""
    numbers = 0
    for group in groups(linears):
        rank, outputs = group_rank(group, load), sum(linear.outputs for linear in group)
        numbers += rank + (stride_of(outputs, rank) - outputs if len(group) > 1 else 0)
    return load.types.width * numbers


def groups(linears: tuple[Linear, ...]) -> list[tuple[Linear, ...]]:
    """Linears that are computed as one (train/loop/groups.py): those that read a layer's norm, and each other one."""
    entering, leaving = split(linears)
    return [group for group in (entering, *((each,) for each in leaving)) if group]


def group_rank(group: tuple[Linear, ...], load: Load) -> int:
    """The ranks of a group's adapters, rounded up to ALIGNED of train/loop/groups.py."""
    return -(-load.rank * sum(is_target(linear, load.targets) for linear in group) // 8) * 8


def wide_numbers(group: tuple[Linear, ...], load: Load) -> tuple[int, int]:
    """Elements of a group's thin matrices (A and s·B), and of the wide matrix that holds them beside the weights."""
    rank, outputs, inputs = group_rank(group, load), sum(each.outputs for each in group), group[0].inputs
    return rank * (outputs + inputs), (outputs + rank) * stride_of(inputs, rank)


def stride_of(numbers: int, tail: int) -> int:
    """Numbers from one row to the next, as train/loop/kernels/gpu.py has it."""
    return -(-(numbers + tail) // 64) * 64 if tail else numbers


def loss_bytes(shape: Shape, load: Load, tokens: int, trained: int, known: Coefficients = COEFFICIENTS) -> int:
    """The head: last hidden states, their norm and its gradient, the trained ones and theirs, and a chunk of logits."""
    more = known.logits_more if load.device == "cuda" else known.logits_more_plain
    rows = min(trained, max(1, known.chunk_logits // shape.vocabulary))
    if not shape.has_plain_head:
        rows, more = trained, known.logits_more_whole
    hidden = (3 * tokens + 2 * trained) * shape.hidden * load.types.width
    return hidden + rows * shape.vocabulary * (load.types.width + 4 * more)


def moments(block: Block, shape: Shape, load: Load, again: bool, known: Coefficients = COEFFICIENTS) -> list[Moment]:
    """The moments of one layer's backward pass: its temporaries, and what it makes again if it is checkpointed.

    The MLP's come first, when all of the layer is there: behind down, behind gate and up, behind its norm. Attention's
    follows, when what the MLP kept is gone.
    """
    b, query, key = load.types.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention, mlp = (part(block, shape, load) for part in (attention_bytes, mlp_bytes))
    inner = max((linear.inputs for linear in block.mlp if linear.outputs == shape.hidden), default=4 * shape.hidden)
    times = known.mlp_temporaries if load.device == "cuda" else known.mlp_temporaries_plain
    if load.dropout and any(is_target(linear, load.targets) for linear in block.mlp if linear.inputs == inner):
        times += 1  # what is left of the product after its dropout
    stream = shape.hidden * b  # one tensor of the width of the residual stream
    again_all, again_attention = (
        (kept - stream) * again for kept in (attention + mlp, attention)
    )  # its input is there
    entering, leaving, attending = (largest_wide(part, load) for part in (*split(block.mlp), block.attention))
    found = [
        # The gradient that comes in, which the last layer copies.
        (again_all + times * inner * b + 2 * stream, leaving),
        (again_all + 3 * stream, entering),
        (again_all + known.residual_temporaries * stream, 0),
        (
            again_attention
            - mlp * (not again)
            + known.attention_temporaries * (query + key) * b
            + 4 * query
            + known.residual_temporaries * stream,
            attending,
        ),
    ]
    factor = 1.0 if shape.is_fused else known.unfused_factor
    return [(int(factor * size), weights) for size, weights in found]


def split(linears: tuple[Linear, ...]) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
    """Those that read a layer's norm, and those that write to the residual stream."""
    entering = tuple(linear for linear in linears if linear.name not in LEAVING)
    return entering, tuple(linear for linear in linears if linear.name in LEAVING)


def largest_wide(linears: tuple[Linear, ...], load: Load) -> int:
    """Elements of the largest wide matrix among the groups of these."""
    return max((wide_numbers(group, load)[1] for group in groups(linears)), default=0)
