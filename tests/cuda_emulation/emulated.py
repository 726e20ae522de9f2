"""The CUDA kernels on the CPU: builds csrc/cuda against emulation.h, and calls its launchers on tensors.

``python emulated.py FEW LIBRARY...`` runs the cases of this file on mutants, and prints how each ended.
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from perexample import ops
from perexample.testing import assert_within_budget, moments_of_examples

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc/cuda"
CXX = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
FLAGS = ["-std=c++20", "-fPIC", "-w", "-DPEREXAMPLE_EMULATION"]
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
GUARD = 64  # elements behind every output that must stay as they are


def compile(source: Path, out: Path, sources: Path = SOURCES, optimize: str = "-O1") -> Path:
    """An object file below the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{source.stem}.o"
    command = [*CXX, *FLAGS, optimize, f"-I{HERE}", f"-I{sources}", "-x", "c++", "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return target


def link(objects: Iterable[Path], out: Path) -> Path:
    subprocess.run([*CXX, "-shared", *map(str, objects), "-o", str(out)], check=True)
    return out


def build(out: Path) -> Path:
    """The library of all launchers, below the folder `out`."""
    files = [p for p in [*SOURCES.glob("*.cu"), SOURCES / "plan.cpp", HERE / "shim.cpp"] if p.stem != "device"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return link(pool.map(lambda source: compile(source, out), files), out / "emulated.so")


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Emulated:
    """The launchers of one library. `workspace`: bytes that the last call asked for."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._call = self._library.px_call
        self._call.restype = ctypes.c_char_p
        self.workspace = 0

    def call(self, op, integers, tensors, reals=(), capability=80, multiprocessors=3, seed=1) -> None:
        workspace = ctypes.c_int64()
        error = self._call(
            op.encode(),
            (ctypes.c_int64 * len(integers))(*integers),
            (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors)),
            (ctypes.c_double * len(reals))(*reals),
            capability,
            multiprocessors,
            ctypes.c_uint32(seed),
            ctypes.byref(workspace),
        )
        if error is not None:
            raise RuntimeError(error.decode())
        self.workspace = workspace.value

    def mutate(self, number: int) -> None:
        """Chooses one of the mutants of the library."""
        self._library.px_mutate(number)

    def linear_moments(self, dy: Tensor, x: Tensor, bias=False, dtype=None, tf32=False, **where):
        (batch, positions, outputs), inputs, dtype = dy.shape, x.shape[2], dtype or dy.dtype
        weight, column = Outputs((outputs, inputs), dy, dtype), Outputs((outputs,), dy, dtype)
        self.call(
            "linear_moments",
            [batch, positions, outputs, inputs, CODES[dy.dtype], *dy.stride(), *x.stride(), CODES[dtype], tf32],
            [dy, x, *weight.tensors, *(column.tensors if bias else (None, None))],
            **where,
        )
        return (*weight.checked(), *(column.checked() if bias else ()))

    def bias_moments(self, dy: Tensor, dtype=None, **where):
        out = Outputs(dy.shape[2:], dy, dtype or dy.dtype)
        self.call(
            "bias_moments",
            [*dy.shape, CODES[dy.dtype], *dy.stride(), CODES[dtype or dy.dtype]],
            [dy, *out.tensors],
            **where,
        )
        return out.checked()

    def reduce_moments(self, grad: Tensor, dtype=None, **where):
        out = Outputs(grad.shape[1:], grad, dtype or grad.dtype)
        self.call(
            "reduce_moments",
            [*grad.shape, CODES[grad.dtype], *grad.stride(), CODES[dtype or grad.dtype]],
            [grad, *out.tensors],
            **where,
        )
        return out.checked()

    def conv_moments(
        self, dy: Tensor, x: Tensor, kernel, stride, padding, dilation, groups, bias=True, dtype=None, **where
    ):
        missing = 5 - dy.dim()

        def three(values, fill=1):
            return [*[fill] * missing, *values]

        def strides(t):
            return [*t.stride()[:2], *[0] * missing, *t.stride()[2:]]

        dtype = dtype or dy.dtype
        weight = Outputs((dy.shape[1], x.shape[1] // groups, *kernel), dy, dtype)
        column = Outputs(dy.shape[1:2], dy, dtype)
        sizes = [*three(x.shape[2:]), *three(dy.shape[2:]), *three(kernel), *three(stride)]
        sizes += [*three(padding, 0), *three(dilation)]
        sizes += [CODES[dy.dtype], *strides(dy), *strides(x), CODES[dtype]]
        self.call(
            "conv_moments",
            [dy.shape[0], x.shape[1], dy.shape[1], groups, *sizes],
            [dy, x, *weight.tensors, *(column.tensors if bias else (None, None))],
            **where,
        )
        return (*weight.checked(), *(column.checked() if bias else ()))

    def layer_norm_moments(self, dy, x, mean, rstd, weight, eps, centered=True, mask=(True, True, True), **where):
        (batch, positions, width), dtype = dy.shape, dy.dtype if weight is None else weight.dtype
        dx = torch.full(dy.shape, float("nan"), dtype=dy.dtype)
        scale, shift = (Outputs((width,), dy, dtype) for _ in range(2))
        self.call(
            "layer_norm_moments",
            [batch, positions, width, centered, CODES[dy.dtype], CODES[dtype], *dy.stride()[:2], *x.stride()[:2]],
            [dy, x, mean, rstd, weight, dx if mask[0] else None]
            + [t if wanted else None for out, wanted in ((scale, mask[1]), (shift, mask[2])) for t in out.tensors],
            [eps],
            **where,
        )
        return (dx, *scale.checked(), *shift.checked())

    def group_norm_moments(self, dy, x, mean, rstd, weight, groups, eps, constant=False, **where):
        (batch, channels, size), dtype = dy.shape, dy.dtype if weight is None else weight.dtype
        dx = torch.full(dy.shape, float("nan"), dtype=dy.dtype)
        scale, shift = (Outputs((channels,), dy, dtype) for _ in range(2))
        self.call(
            "group_norm_moments",
            [batch, channels, size, groups, constant, CODES[dy.dtype], CODES[dtype]],
            [dy, x, mean, rstd, weight, dx, *scale.tensors, *shift.tensors],
            [eps],
            **where,
        )
        return (dx, *scale.checked(), *shift.checked())

    def embedding_moments(self, dy: Tensor, indices: Tensor, rows: int, padding_idx=-1, dtype=None, **where):
        (batch, positions, width), dtype = dy.shape, dtype or dy.dtype
        weight = Outputs((rows, width), dy, dtype)
        found, order = torch.sort(indices.flatten().long(), stable=True)
        self.call(
            "embedding_moments",
            [batch, positions, rows, width, CODES[dy.dtype], *dy.stride(), padding_idx, CODES[dtype]],
            [dy, *weight.tensors, found, order],
            **where,
        )
        return weight.checked()

    def optimizer_step_(self, params, grads, sums, exp_avg, exp_avg_sq, seen, violations, **options):
        """The arguments of the op, all on what is contiguous."""
        o = {
            "n_g": 1.0, "n_s": 1.0, "eps": 0.0, "weight_decay": 0.0, "centered": False, "squared_denominator": False,
            "lr_times_eps": False, "correct_g": True, "correct_s": True, "power": False, "mean_reduction": True,
            "maximize": False, "guard_rounds": 0, "grad_scale": None, "found_inf": None, **options,
        }  # fmt: skip
        starts = ops.optimizer.state_starts(params)
        numbers, arrays = [], []
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            numbers += [p.numel(), starts[i], i, CODES[p.dtype], CODES[grad.dtype]]
            arrays += [p, grad, sums[i] if sums else None]
        state = exp_avg if exp_avg is not None else exp_avg_sq
        scalars = [None if o[k] is None else o[k].double() for k in ("batch_size", "lr", "grad_scale", "found_inf")]
        flags = ("centered", "squared_denominator", "lr_times_eps", "correct_g", "correct_s", "power")
        self.call(
            "optimizer_step_",
            [len(arrays) // 3, *numbers, CODES[torch.float32 if state is None else state.dtype]]
            + [int(o[name]) for name in (*flags, "mean_reduction", "maximize", "guard_rounds")],
            [*arrays, exp_avg, exp_avg_sq, seen, violations, *scalars],
            [o["n_g"], o["n_s"]]
            + [-math.inf if o[n] == 1 else math.log1p(-1 / o[n]) for n in ("n_g", "n_s")]
            + [o["eps"], o["weight_decay"]],
            seed=o.get("seed", 1),
        )


class Outputs:
    """A gradient and its second moment, NaN until written, with guards behind them."""

    def __init__(self, shape, like: Tensor, dtype: torch.dtype) -> None:
        count = torch.Size(shape).numel()
        self.blocks = [torch.full((count + GUARD,), float("nan"), dtype=d) for d in (dtype, wide(like.dtype))]
        for block in self.blocks:
            block[count:] = 7
        self.tensors = [block[:count].view(shape) for block in self.blocks]

    def checked(self) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            assert (block[-GUARD:] == 7).all(), "wrote behind an output"
        return self.tensors[0], self.tensors[1]


def guarded(tensor: Tensor) -> Tensor:
    """The same values, 16 bytes aligned, with NaN before and behind them."""
    edge = 64 // tensor.element_size() * 4
    block = torch.full((tensor.numel() + 2 * edge,), float("nan"), dtype=tensor.dtype)
    return block[edge : edge + tensor.numel()].view(tensor.shape).copy_(tensor)


def check(actual, contribution, batch, shape, dtype, grad_dtype=None, what="weight", precision=None) -> None:
    """Hold (gradient, second moment) to the loop over examples; `precision`: of the products, if below the dtype's."""
    expected, stock = (
        moments_of_examples(lambda b, d=d: contribution(b, d), batch, torch.empty(shape, dtype=d))
        for d in (torch.float64, wide(dtype))
    )
    for got, want, own, rounding in (
        (actual[0], expected.grad, stock.grad, grad_dtype or dtype),
        (actual[1], expected.sum_grad_squared, stock.sum_grad_squared, wide(dtype)),
    ):
        rounding = max((rounding, wide(dtype), precision or rounding), key=lambda d: torch.finfo(d).eps)
        assert_within_budget(got, want, own, rounding, what)


def within(got, arguments, reference, dtype, what):
    """Hold all outputs to the reference in float64; its own error in the accumulation's dtype is the budget."""

    def cast(d):
        return [a.to(d) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]

    expected, stock = reference(*cast(torch.float64)), reference(*cast(wide(dtype)))
    for i, (g, e, s) in enumerate(zip(got, expected, stock, strict=True)):
        rounding = max((g.dtype, wide(dtype)), key=lambda d: torch.finfo(d).eps)
        assert_within_budget(g, e, s, rounding, f"{what} {i}")


def check_linear(lib: Emulated, dy: Tensor, x: Tensor, bias=True, dtype=None, precision=None, **where) -> None:
    got = lib.linear_moments(dy, x, bias, dtype, **where)
    shape = (dy.shape[2], x.shape[2])
    check(got[:2], lambda b, d: dy[b].to(d).T @ x[b].to(d), dy.shape[0], shape, dy.dtype, dtype, "weight", precision)
    if bias:
        check(got[2:], lambda b, d: dy[b].to(d).sum(0), dy.shape[0], shape[:1], dy.dtype, dtype, "bias")


def pair(batch, positions, outputs, inputs, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch + 10 * positions)
    return tuple(guarded(torch.randn(batch, positions, n).to(dtype)) for n in (outputs, inputs))


def padded(tensor: Tensor) -> Tensor:
    """The same values, with NaN behind each row up to a multiple of 16 bytes and 16 more."""
    per_vector = 16 // tensor.element_size()
    columns = tensor.shape[-1]
    block = torch.full((*tensor.shape[:-1], (-(-columns // per_vector) + 1) * per_vector), float("nan")).to(tensor)
    return guarded(block)[..., :columns].copy_(tensor)


# What the mutants run, by the source that they are compiled from.
MUTANT_CASES = {
    "few_wgmma": [
        ((5, 150, 264, 136), 4),
        ((3, 64, 264, 72), 4),
        ((2, 460, 72, 72), 2),
        ((3, 700, 72, 72), 16),
        ((11, 9, 136, 128), 4),
    ],
    "few_mma": [((5, 170, 136, 76), 3), ((2, 700, 40, 23), 8), ((90, 1, 72, 44), 1)],
}


def mutant_cases(lib: Emulated, few: str, seed: int) -> None:
    for shape, multiprocessors in MUTANT_CASES[few]:
        for dtype in (torch.bfloat16,) if few == "few_wgmma" else (torch.bfloat16, torch.float32):
            if shape[1] > 1 or dtype == torch.bfloat16:
                dy, x = (padded(t) for t in pair(*shape, dtype))
                check_linear(lib, dy, x, True, multiprocessors=multiprocessors, seed=seed)
    if few == "few_mma":
        check_linear(lib, *map(padded, of_largest_rest(40, 72, 44, torch.bfloat16)), bias=False, seed=seed)


def of_largest_rest(batch: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One position of numbers whose squares leave most when cut into bfloat16 pieces, in every example alike.

    Nothing averages out here: without the product of the second pieces the second moment is too small by 2**-16.
    """
    number = 1.4921875 if dtype == torch.bfloat16 else 1.43359375
    return tuple(torch.full((batch, 1, n), number, dtype=dtype) for n in (outputs, inputs))


def in_child(cases: Callable[[], None]) -> int:
    """Exit status of the cases in a process of their own: they may crash. 3: a check failed."""
    child = os.fork()
    if child == 0:
        try:
            cases()
            status = 0
        except (AssertionError, RuntimeError) as error:
            print(error, flush=True)
            status = 3
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_library(library: str, few: str) -> int:
    """How the mutants' cases end on a library."""

    def cases() -> None:
        for seed in (1, 2, 3):
            mutant_cases(Emulated(Path(library)), few, seed)

    return in_child(cases)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*(on_library(library, sys.argv[1]) for library in sys.argv[2:]))
