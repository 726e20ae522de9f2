"""What the launchers share: the device, tiles, splits of the batch, outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Triton decides this when a kernel is decorated, that is when its module is imported.
INTERPRET: bool = triton.knobs.runtime.interpret

# Grids are at most this long in their second and third dimension.
MOST_SPLITS = 65535


class Device(NamedTuple):
    """What the choice of a kernel depends on."""

    arch: int  # row of the tables in configs.py: 80, 90 or 100
    processors: int  # how many programs run at once, if each fills a multiprocessor


# Stands in for a GPU in the interpreter, and when compiling ahead (ahead.py).
pretended = Device(90, 132)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    # 12.x has no wgmma and no tcgen05, and the shared memory of 8.6: it takes the kernels of 8.0.
    return Device({9: 90, 10: 100}.get(properties.major, 80), properties.multi_processor_count)


def device_of(tensor: Tensor) -> Device:
    """The device that a launch on `tensor` will run on."""
    return _cuda_device(tensor.device.index) if tensor.is_cuda else pretended


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **meta: Any
) -> None:
    """Launch a kernel. Everything is chosen from shapes, strides and dtypes: nothing waits for the device."""
    # Fused multiply-adds by name: the default is about to change between Triton versions.
    kernel[grid](*args, **meta, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


class Split(NamedTuple):
    """The batch in parts, one program each for a tile: part k holds the examples from k * examples on."""

    count: int
    examples: int


# A split batch needs memory for both moments of every part: no more than this many bytes.
WORKSPACE = 16 << 20


@functools.lru_cache(maxsize=4096)  # looks at thousands of splits where a batch is long and tiles are few
def split(units: int, tiles: int, programs: int, size: int, unit: int = 1) -> Split:
    """Split a batch so that the programs come out even: the fewest rounds, each as short as can be.

    Args:
        units: examples, or blocks of `unit` examples that stay together.
        tiles: programs for each part.
        programs: how many run at once.
        size: elements of the parameter.
        unit: see `units`.
    """
    most = min(units, MOST_SPLITS, max(1, WORKSPACE // (8 * size)), cdiv(4 * programs, tiles))

    def time(parts: int) -> int:  # in units, writing a tile out counted as one
        return cdiv(tiles * parts, programs) * (cdiv(units, parts) + 1)

    each = cdiv(units, min(range(1, most + 1), key=time))
    return Split(cdiv(units, each), each * unit)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of second moments and of every accumulation: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_moments(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(gradient, second moment) of a parameter, to be written."""
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=accumulate_dtype(like.dtype))


def zero_moments(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same for a sum over nothing."""
    return like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=accumulate_dtype(like.dtype))


def check(op: str, right: bool, message: str) -> None:
    """Raise RuntimeError as the C++ kernels do: the last guard of calls that bypass perexample.ops."""
    if not right:
        raise RuntimeError(f"{op}: {message}")


def check_inputs(op: str, **tensors: Tensor) -> None:
    """Raise unless all have one floating dtype and one device."""
    first = next(iter(tensors.values()))
    check(op, first.is_floating_point(), f"inputs must be floating, got {first.dtype}")
    for name, value in tensors.items():
        check(op, value.dtype == first.dtype, f"{name} must be {first.dtype}, got {value.dtype}")
        check(op, value.device == first.device, f"{name} must be on {first.device}, got {value.device}")


def with_moments(
    run: Callable[[Tensor, Tensor], None], shape: tuple[int, ...], like: Tensor, dtype: torch.dtype, parts: int
) -> tuple[Tensor, Tensor]:
    """Call `run(sum, sum_sq)` on the outputs, or for several parts on a workspace that is then added up in order.

    Args:
        run: writes to (parts, *shape) tensors, or to the outputs themselves if there is one part.
        shape: of the parameter.
        like: device, and dtype of the inputs.
        dtype: of the gradient.
        parts: how many.
    """
    from .reduce import add_parts

    sums = empty_moments(shape, like, dtype)
    if parts == 1:
        run(*sums)
    else:
        workspace = like.new_empty((2, parts, *shape), dtype=accumulate_dtype(like.dtype))
        run(workspace[0], workspace[1])
        add_parts(workspace, *sums)
    return sums
