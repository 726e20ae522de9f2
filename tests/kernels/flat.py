"""The ops on a library of tests/kernels/shim.cpp, in place of the public functions: `python flat.py LIBRARY ...`.

The other arguments are pytest's. Every call runs three times, with tasks in order, in reverse, and on two threads, and
must give the same bits; outputs lie between guards. At the end every op must have been cut into several tasks once.
"""

import ctypes
import math
import sys

import pytest
import torch

from perexample import ops
from perexample.ops.optimizer import _guard_absolute, _guard_slack, _weight_of_new, state_starts

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
GUARD = 16
most_tasks = {}
SERVED_BY = {"rms_norm_moments": "layer_norm_moments", "batch_norm_moments": "group_norm_moments"}
library = None


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Outputs:
    """Outputs full of NaN, between guards of NaN."""

    def __init__(self):
        self.bases, self.tensors = [], []

    def new(self, wanted, shape, dtype):
        shape = shape if wanted else (0,)
        numel = math.prod(shape)
        self.bases.append(torch.full((numel + 2 * GUARD,), math.nan, dtype=dtype))
        self.tensors.append(self.bases[-1][GUARD : GUARD + numel].view(shape))
        return self.tensors[-1].data_ptr() if wanted else None

    def moments(self, wanted, shape, dtype, inputs):
        return [self.new(wanted, shape, dtype), self.new(wanted, shape, wide(inputs))]

    def check(self):
        for base in self.bases:
            assert base[:GUARD].isnan().all(), "written before an output"
            assert base[-GUARD:].isnan().all(), "written behind an output"


def call(name, integers, pointers, reals, threads, order):
    n, p = (ctypes.c_int64 * len(integers))(*integers), (ctypes.c_void_p * len(pointers))(*pointers)
    tasks = library.px_call(name.encode(), n, p, (ctypes.c_double * len(reals))(*reals), threads, order)
    assert tasks >= 0, f"{name}: {-tasks} bytes written behind scratch memory"
    most_tasks[name] = max(most_tasks.get(name, 0), tasks)


RUNS = ((1, 0), (2, 1), (2, 2))  # threads, order of the tasks


def same_bits(some, others):
    return all(
        torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )


def thrice(name, prepare):
    """`prepare(outputs)` gives integers, pointers and reals, and reserves the outputs."""
    results = []
    for threads, order in RUNS:
        outputs = Outputs()
        call(name, *prepare(outputs), threads, order)
        outputs.check()
        results.append(outputs.tensors)
    for other in results[1:]:
        assert same_bits(other, results[0]), f"{name}: bits differ"
    return tuple(results[0])


def linear_moments(dy, x, bias=False, dtype=None):
    def prepare(out):
        dims = (dy.shape[2], x.shape[2])
        pointers = [dy.data_ptr(), x.data_ptr()]
        pointers += out.moments(True, dims, dtype or dy.dtype, dy.dtype)
        pointers += out.moments(bias, dims[:1], dtype or dy.dtype, dy.dtype)
        code = [CODES[dy.dtype]]
        return [*dy.shape[:2], *dims, *code, *dy.stride(), *x.stride(), CODES[dtype or dy.dtype]], pointers, []

    return thrice("linear_moments", prepare)


def conv_moments(dy, x, kernel_size, stride, padding, dilation, groups=1, bias=False, dtype=None):
    def three(values, fill):
        return [fill] * (5 - dy.dim()) + list(values)

    def prepare(out):
        shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)
        pointers = [dy.data_ptr(), x.data_ptr()]
        pointers += out.moments(True, shape, dtype or dy.dtype, dy.dtype)
        pointers += out.moments(bias, shape[:1], dtype or dy.dtype, dy.dtype)
        integers = [dy.shape[0], x.shape[1], dy.shape[1], groups]
        for values, fill in (
            (x.shape[2:], 1), (dy.shape[2:], 1), (kernel_size, 1), (stride, 1), (padding, 0), (dilation, 1)
        ):  # fmt: skip
            integers += three(values, fill)
        integers.append(CODES[dy.dtype])
        for t in (dy, x):
            integers += [*t.stride()[:2], *three(t.stride()[2:], 0)]
        return [*integers, CODES[dtype or dy.dtype]], pointers, []

    return thrice("conv_moments", prepare)


def bias_moments(dy, dtype=None):
    def prepare(out):
        pointers = [dy.data_ptr(), *out.moments(True, dy.shape[2:], dtype or dy.dtype, dy.dtype)]
        return [*dy.shape, CODES[dy.dtype], *dy.stride(), CODES[dtype or dy.dtype]], pointers, []

    return thrice("bias_moments", prepare)


def reduce_moments(grad, dtype=None):
    g = grad.reshape(grad.shape[0], math.prod(grad.shape[1:]))

    def prepare(out):
        pointers = [g.data_ptr(), *out.moments(True, grad.shape[1:], dtype or g.dtype, g.dtype)]
        return [*g.shape, CODES[g.dtype], *g.stride(), CODES[dtype or g.dtype]], pointers, []

    return thrice("reduce_moments", prepare)


def embedding_moments(dy, indices, num_embeddings, padding_idx=-1, dtype=None):
    indices = indices.long()

    def prepare(out):
        pointers = [dy.data_ptr(), indices.data_ptr()]
        pointers += out.moments(True, (num_embeddings, dy.shape[2]), dtype or dy.dtype, dy.dtype)
        sizes = [*dy.shape[:2], num_embeddings, dy.shape[2], CODES[dy.dtype]]
        return [*sizes, *dy.stride(), *indices.stride(), padding_idx, CODES[dtype or dy.dtype]], pointers, []

    return thrice("embedding_moments", prepare)


def norm_moments(name, dy, x, mean, rstd, weight, sizes, size, eps, mask):
    dy, x, mean, rstd, weight = (None if t is None else t.contiguous() for t in (dy, x, mean, rstd, weight))
    grad_dtype = dy.dtype if weight is None else weight.dtype

    def prepare(out):
        pointers = [None if t is None else t.data_ptr() for t in (dy, x, mean, rstd, weight)]
        pointers.append(out.new(mask[0], dy.shape, dy.dtype))
        for wanted in mask[1:]:
            pointers += out.moments(wanted, (size,), grad_dtype, dy.dtype)
        rows = [*dy.stride()[:2], *x.stride()[:2]] if name == "layer_norm_moments" else []
        return [*dy.shape, *sizes, CODES[dy.dtype], CODES[grad_dtype], *rows], pointers, [eps]

    return thrice(name, prepare)


def layer_norm_moments(dy, x, mean, rstd, weight, eps=1e-5, output_mask=(True, True, True)):
    return norm_moments("layer_norm_moments", dy, x, mean, rstd, weight, [1], dy.shape[2], eps, output_mask)


def rms_norm_moments(dy, x, rstd, weight, eps, output_mask=(True, True)):
    mask = (*output_mask, False)
    return norm_moments("layer_norm_moments", dy, x, None, rstd, weight, [0], dy.shape[2], eps, mask)[:3]


def group_norm_moments(dy, x, mean, rstd, weight, groups, eps=1e-5, output_mask=(True, True, True)):
    return norm_moments("group_norm_moments", dy, x, mean, rstd, weight, [groups, 0], dy.shape[1], eps, output_mask)


def batch_norm_moments(dy, x, mean, rstd, weight, output_mask=(True, True, True)):
    channels = dy.shape[1]
    return norm_moments("group_norm_moments", dy, x, mean, rstd, weight, [channels, 1], channels, 0.0, output_mask)


def in_place(name, written, prepare):
    """`prepare()` gives integers, pointers and reals; `written` are the tensors that change, without gaps."""
    before, results = [t.clone() for t in written], []
    for threads, order in RUNS:
        for t, old in zip(written, before, strict=True):
            t.copy_(old)
        call(name, *prepare(), threads, order)
        results.append([t.clone() for t in written])
    for other in results[1:]:
        assert same_bits(other, results[0]), f"{name}: bits differ"


def cell(name, batch, width, written, *tensors):
    """In place; `written` are the places of the tensors that change."""
    rows = [t.contiguous() for t in tensors]
    integers = [batch, width, CODES[rows[0].dtype], *(t.stride(0) for t in rows)]
    in_place(name, [rows[i] for i in written], lambda: (integers, [t.data_ptr() for t in rows], []))
    for i in written:
        tensors[i].copy_(rows[i])


def lstm(name, gates, states, cells, weight_hh, weight_hr, active, reverse, dy=None, written=()):
    """The launcher's part: no gaps, no half precision."""
    tensors = (weight_hh, weight_hr, gates, states, cells, dy, *written)
    whole = [None if t is None else t.to(wide(t.dtype)).contiguous() for t in tensors]
    counts = (ctypes.c_int64 * max(1, len(active)))(*active)
    pointers = [ctypes.addressof(counts) if active else None, *(None if t is None else t.data_ptr() for t in whole)]
    steps, batch, size = cells.shape[0] - 1, *cells.shape[1:]
    width = weight_hh.shape[1]
    integers = [steps, batch, size, width, CODES[whole[0].dtype], int(reverse), batch * width, width]
    changed = [2, 3, 4] if dy is None else [i for i in (6, 7, 8, 9) if whole[i] is not None]
    pointers += [None] * (11 - len(pointers))
    in_place(name, [whole[i] for i in changed], lambda: (integers, pointers, []))
    for i in changed:
        tensors[i].copy_(whole[i])


def lstm_forward_(gates, states, cells, weight_hh, weight_hr=None, active=(), reverse=False):
    lstm("lstm_forward_", gates, states, cells, weight_hh, weight_hr, active, reverse)


def lstm_backward_(dgates, dstates, dh, dc, dy, gates, cells, weight_hh, weight_hr=None, active=(), reverse=False):
    written = (dgates, dstates, dh, dc)
    lstm("lstm_backward_", gates, None, cells, weight_hh, weight_hr, active, reverse, dy, written)


def gru_cell_backward_(dgates, dhidden, dh, gates, hidden, state):
    cell("gru_cell_backward_", *dh.shape, (0, 1, 2), dgates, dhidden, dh, gates, hidden, state)


def optimizer_step_(params, grads, sums, exp_avg, exp_avg_sq, examples_seen, violations, *, batch_size, lr, n_g, n_s,
                    eps, weight_decay, centered, squared_denominator, lr_times_eps, correct_g, correct_s, power,
                    mean_reduction, maximize, guard_rounds, grad_scale=None, found_inf=None):  # fmt: skip
    """Only what is contiguous: the launcher in csrc/bindings arranges the rest."""
    batch = float(batch_size)
    if batch == 0 or (found_inf is not None and float(found_inf) != 0):
        return
    inverse = 1.0 if grad_scale is None else 1 / float(grad_scale)
    rate = batch * float(lr)
    scalars = [batch, inverse / (1 if mean_reduction else batch) * (-1 if maximize else 1)]
    scalars += [inverse**2 * (batch if mean_reduction else 1 / batch), rate * (eps if lr_times_eps else 1)]
    scalars += [rate * weight_decay, eps]
    written = [t for t in (*params, exp_avg, exp_avg_sq, violations) if t is not None]
    before, results, starts = [t.clone() for t in written], [], state_starts(params)
    state = next((t.dtype for t in (exp_avg, exp_avg_sq) if t is not None), torch.float32)
    has = [i for i, grad in enumerate(grads) if grad is not None]
    for threads, order in RUNS:
        for t, old in zip(written, before, strict=True):
            t.copy_(old)
        integers, pointers, reals = [len(has)], [], []
        for i in has:
            p, g = params[i], grads[i]
            assert p.is_contiguous() and g.is_contiguous()
            seen = examples_seen[i] + batch
            integers += [p.numel(), CODES[p.dtype], CODES[g.dtype], CODES[wide(p.dtype)], int(seen)]
            flats = (None if t is None else t.data_ptr() + starts[i] * t.element_size() for t in (exp_avg, exp_avg_sq))
            pointers += [p.data_ptr(), g.data_ptr(), sums[i].data_ptr() if sums else None, *flats]
            pointers.append(violations.data_ptr() + 4 * i if sums and guard_rounds else None)
            for horizon, corrected in ((n_g, correct_g), (n_s, correct_s)):
                reals.append(float(_weight_of_new(torch.tensor(batch).double(), seen, horizon, corrected, power)))
            reals.append(float(_guard_slack(g.dtype, torch.tensor(batch), guard_rounds)))
            reals.append(_guard_absolute(g.dtype, guard_rounds))
        integers += [CODES[state], int(centered), int(squared_denominator)]
        call("optimizer_step_", integers, pointers, [*reals, *scalars], threads, order)
        results.append([t.clone() for t in written])
    for other in results[1:]:
        assert same_bits(other, results[0]), "optimizer_step_: bits differ"
    examples_seen[has] += batch


def main():
    global library
    library = ctypes.CDLL(sys.argv[1])
    library.px_call.restype = ctypes.c_int64
    library.px_call.argtypes = (ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int)
    for name in ops.OPS:
        setattr(ops, name, globals()[name])
    status = pytest.main(sys.argv[2:])
    few = [name for name in ops.OPS if most_tasks.get(SERVED_BY.get(name, name), 0) < 2]
    assert status or not few, f"never cut into several tasks: {few}"
    sys.exit(status)


if __name__ == "__main__":
    main()
