"""What the torch functions are, by name: which kinds there are, and what their names are without decoration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Names of torch functions and methods; underscores around them, and the r and i of operators, are taken off before.

# Answered by shape and values: they have no gradient.
CONSTANT = frozenset(
    "size dim ndimension numel nelement is_floating_point is_complex is_signed element_size itemsize stride "
    "is_contiguous get_device storage_offset data_ptr item tolist numpy __len__ __hash__ __repr__ __str__ __format__ "
    "__bool__ __int__ __float__ __index__ __contains__ "
    "eq ne lt le gt ge isnan isinf isfinite isclose allclose equal argmax argmin argsort sign detach is_same_size "
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor "
    "result_type can_cast is_tensor is_nonzero any all count_nonzero nonzero untyped_storage storage "
    "is_pinned is_shared is_inference broadcast_shapes is_storage".split()
)
ATTRIBUTES_MAPPED = frozenset(("T", "mT", "H", "mH", "real", "imag"))

ELEMENTWISE = frozenset(
    "add sub subtract mul multiply div divide truediv true_divide pow maximum minimum fmax fmin where lerp addcmul "
    "addcdiv atan2 hypot logaddexp logaddexp2 xlogy clamp clip clamp_min clamp_max copysign ldexp "
    "floor_divide floordiv remainder fmod mod masked_fill".split()
)

# Functions that treat the rows of their batch apart; which arguments carry it, by position or name.
LAYERS: dict[str, tuple[int | str, ...]] = {
    "linear": (0, "input"),
    "bilinear": (0, 1, "input1", "input2"),
    "conv1d": (0, "input"),
    "conv2d": (0, "input"),
    "conv3d": (0, "input"),
    "conv_transpose1d": (0, "input"),
    "conv_transpose2d": (0, "input"),
    "conv_transpose3d": (0, "input"),
    "layer_norm": (0, "input"),
    "rms_norm": (0, "input"),
    "group_norm": (0, "input"),
    "batch_norm": (0, "input"),
    "instance_norm": (0, "input"),
    "prelu": (0, "input"),
    "embedding": (0, "input"),
    "matmul": (0, 1, "input", "other"),
    "scaled_dot_product_attention": (0, 1, 2, 3, "query", "key", "value", "attn_mask"),
    "lstm_cell": (0, 1),
    "gru_cell": (0, 1),
    "rnn_tanh_cell": (0, 1),
    "rnn_relu_cell": (0, 1),
    "cosine_similarity": (0, 1, "x1", "x2"),
    "cat": (0, "tensors"),
    "concat": (0, "tensors"),
    "concatenate": (0, "tensors"),
    "stack": (0, "tensors"),
}
SEQUENCE_FIRST = frozenset(("linear", "layer_norm", "rms_norm", "embedding", "cat", "concat", "concatenate"))
RANDOM = ("dropout", "rand", "bernoulli", "normal", "multinomial", "gumbel", "rrelu")

# The names of the arguments, in their order, where a rule goes by the order.
ORDERS: dict[str, tuple[str, ...]] = {
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask"),
    "masked_fill": ("input", "mask", "value"),
    "broadcast_to": ("input", "size"),
    "tile": ("input", "dims"),
}

KEEPS_ROWS = frozenset(  # of functions of one tensor: those that work on elements, or on what a row contains
    "to float double half bfloat16 type type_as contiguous clone neg negative exp log sqrt rsqrt square abs sin cos "
    "tanh sigmoid relu gelu silu elu selu mish softplus leaky_relu reciprocal erf".split()
)
SWAPS = frozenset("transpose swapaxes swapdims movedim moveaxis".split())
ALONG = frozenset("softmax log_softmax sum mean amax amin logsumexp cumsum".split())  # a dimension, or some
RESHAPES = frozenset("view reshape flatten unflatten".split())
NATIVE = frozenset("__len__ __hash__ size stride dim ndimension numel nelement".split())


def name_of(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # an attribute
        return f".{func.__self__.__name__}"  # type: ignore[attr-defined]
    if name in CONSTANT:
        return name
    bare = name.strip("_")
    if name.startswith("__") and bare[:1] in ("r", "i") and bare[1:] in ELEMENTWISE | {"matmul"}:
        return bare[1:]
    return bare


def in_order(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, those that `ORDERS` knows by their places, wherever those before them are given."""
    kwargs = dict(kwargs)
    for argument in ORDERS.get(name, ())[len(args) :]:
        if argument not in kwargs:
            break
        args = (*args, kwargs.pop(argument))
    return args, kwargs


def keeps_rows(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function of one tensor, ``args[0]``, leaves its first dimension alone; by what it is told."""
    dims, rest = args[0].dim(), list(args[1:])
    if name == "getitem":
        first = rest[0][0] if isinstance(rest[0], tuple) and rest[0] else None
        plain = isinstance(rest[0], tuple) and all(isinstance(part, (int, slice)) for part in rest[0])
        return plain and isinstance(first, slice) and first == slice(None)
    given = rest or [kwargs.get("dim", kwargs.get("dims"))]
    if name == "permute":
        order = given[0] if isinstance(given[0], (tuple, list)) else given
        return isinstance(order[0], int) and order[0] % dims == 0
    if name in SWAPS:
        return len(given) == 2 and all(isinstance(dim, int) and dim % dims for dim in given)
    if name in ALONG:
        along = given[0] if isinstance(given[0], (tuple, list)) else given[:1]
        return bool(along) and all(isinstance(dim, int) and dim % dims for dim in along)
    return False


def in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.strip("_")[:1] == "i" and name.strip("_")[1:] in ELEMENTWISE
    return name.endswith("_")
