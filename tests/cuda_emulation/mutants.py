"""Planted bugs in the kernels of convolution, embedding, norms, sums and the step, and cases that must catch them.

All mutants of a source are compiled in one unit, each in a namespace of its own, and chosen when they run.
``python mutants.py LIBRARY`` runs the cases on every mutant, and prints how each ended as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from emulated import SOURCES, Emulated, check, compile, guarded, in_child, link, padded, within
from torch import Tensor

from perexample.ops import OPS
from perexample.ops.optimizer import state_starts

SEEDS = (1, 2, 3, 4)

# source -> name -> what stands there, what a mistake would make of it
MUTANTS = {
    "embedding": {
        "examples of a row run together": (
            "} else if (i > 0 && example[i] != example[i - 1]) {",
            "} else if (false) {",
        ),
        "the sum of an example squared in pieces": ("if (first != example) g += G,", "if (true) g += G,"),
        "the last piece of a run lost": ("i < pieces; ++i)", "i < pieces - (pieces > 1); ++i)"),
        "pieces looked up while those before are added": ("__syncthreads();  // the pieces before have been added", ""),
        "a chunk read before it is there": ("  __syncthreads();\n  const int64_t d =", "  const int64_t d ="),
        "the first example of a row not squared": ("piece.s += piece.first * piece.first;", "piece.s += piece.first;"),
        "the sum of an example between pieces lost": ("g += G + piece.g, s +=", "g += piece.g, s +="),
        "a position counted in examples": ("from % a.T * a.dy_stride[1]", "from % a.B * a.dy_stride[1]"),
    },
    "norm": {
        "sums overwritten before they are read": ("__syncthreads();  // the sums before have been read", ""),
        "sums read before they are written": ("part[1][warp] = y;\n  __syncthreads();", "part[1][warp] = y;"),
        "the sums of channels not waited for": ("__syncthreads();  // the sums of all channels are there", ""),
        "the statistics of another example": ("a.constant ? group : b * a.groups + group", "group"),
        "a row in two parts": ("a.T * (part + 1) / parts;", "a.T * (part + 1) / parts + (part + 1 < parts);"),
        "a sum in the place of a mean": ("mean_hx /= static_cast<A>(a.D);", ""),
        "epsilon added to the standard deviation": (
            "sqrt(squares / static_cast<A>(n) + eps)",
            "(sqrt(squares / static_cast<A>(n)) + eps)",
        ),
        "the weight of another channel": ("group * channels + i / a.S)", "i / a.S)"),
    },
    "reduce": {
        "the last positions dropped": ("for (; t < j.t1; t += t_step)", "for (; t + t_step < j.t1; t += t_step)"),
        "sums overwritten before they are added": (
            "        __syncthreads();\n        part[0][sharer][mine] = G;",
            "        part[0][sharer][mine] = G;",
        ),
        "threads' sums of positions squared apart": (
            "for (int q = 1; q < kSharers; ++q) G += part[0][q][mine];\n          add(G);",
            "for (int q = 1; q < kSharers; ++q) add(part[0][q][mine]);\n          add(G);",
        ),
        "the threads of a warp in the place of its columns": (
            "? thread / 32 : thread % kColumns",
            "? thread % kColumns : thread % kColumns",
        ),
        "an example of another stride": (
            "const T* from = first + b * b_stride;",
            "const T* from = first + b * t_stride;",
        ),
    },
    "conv": {
        "another group's input": ("const int64_t group = o / outputs;", "const int64_t group = o % groups;"),
        "a column of the input too many": ("x < 0 || x >= in[2]", "x < 0 || x > in[2]"),
        "a vector over two taps": ("return aligned;", "return x.c_stride == element;"),
        "taps and channels mixed up": (
            "return int64_t{channel} * taps + tap;",
            "return int64_t{tap} * channels.divisor + channel;",
        ),
        "a position lost between two chunks": (
            "positions * (chunk + 1) / chunks;",
            "positions * (chunk + 1) / chunks - (chunk + 1 < chunks);",
        ),
        "the stride of the other dimension": ("int64_t{ys} * stride[1]", "int64_t{ys} * stride[2]"),
        "the padding of the other dimension": ("stride[2] - padding[2]", "stride[2] - padding[1]"),
    },
    "optimizer": {
        "the second moment scaled once": ("inverse * inverse * (", "inverse * ("),
        "the last elements of a chunk dropped": ("threadIdx.x; i < end;", "threadIdx.x; i + 3 < end;"),
        "the first average's weight for the second": ("c.take_s * square", "c.take_g * square"),
        "a chunk given to the tensor before": ("batch.first[middle] <= blockIdx.x", "batch.first[middle] < blockIdx.x"),
        "examples counted before the count is read": (
            "    launch(step_batch<A>, {batch.first[batch.count], kThreads}, device.stream, batch, o);\n"
            "    launch(count_examples, {1, kTensors}, device.stream, batch, o);\n",
            "    launch(count_examples, {1, kTensors}, device.stream, batch, o);\n"
            "    launch(step_batch<A>, {batch.first[batch.count], kThreads}, device.stream, batch, o);\n",
        ),
        "corrected by the examples before this step": ("* o.seen_stride] + batch;", "* o.seen_stride] + 1e-300;"),
        "the guard without the number of examples": ("slack * slack * batch", "slack * slack"),
        "the state of the first tensor": ("start = batch.start[low];", "start = batch.start[0];"),
    },
}
NUMBERS = {name: i for i, name in enumerate((n for of in MUTANTS.values() for n in of), 1)}  # 0: as they are

LAUNCHERS = {
    "embedding": ["void embedding_moments(const Embedding& a, const int64_t* b, const int64_t* c, const Device& d)"],
    "norm": [
        "void layer_norm_moments(const LayerNorm& a, const Device& b)",
        "void group_norm_moments(const GroupNorm& a, const Device& b)",
    ],
    "reduce": [
        "void bias_moments(const Bias& a, const Device& b)",
        "void reduce_moments(const Reduce& a, const Device& b)",
    ],
    "conv": ["int64_t positions_stride(const Conv& a)", "void conv_moments(const Conv& a, const Device& b)"],
    "optimizer": ["void optimizer_step(const Optimizer& a, const Device& b)"],
}


def unit(source: str) -> str:
    """The text of one unit with a source as it is and all of its mutants."""
    text = (SOURCES / f"{source}.cu").read_text()
    includes = re.findall(r"^#include .*\n", text, re.MULTILINE)
    text = re.sub(r"^#include .*\n", "", text, flags=re.MULTILINE)
    start, end = "namespace perexample::cuda {\n", "}  // namespace perexample::cuda"
    body = text[text.index(start) + len(start) : text.rindex(end)]
    bodies = {0: body}
    for name, (old, new) in MUTANTS[source].items():
        assert body.count(old) == 1, f"{name}: {source}.cu has {body.count(old)} of {old!r}"
        bodies[NUMBERS[name]] = body.replace(old, new)
    switch = ""
    for signature in LAUNCHERS[source]:
        name, arguments = re.search(r"(\w+)\(", signature)[1], ", ".join(re.findall(r"(\w)[,)]", signature))
        call = f"{name}_mutant({arguments})"
        # Within a mutant it calls its own.
        bodies = {i: re.sub(rf"\b{name}\(", f"{name}_mutant(", text) for i, text in bodies.items()}
        cases = "".join(f"case {i}: return mutant_{i}::{call};\n" for i in bodies)
        switch += f"{signature} {{\nswitch (mutant) {{\n{cases}default: return mutant_0::{call};\n}}\n}}\n"
    head = "".join(includes).replace('"linear.cuh"', '"few_products.cuh"')
    mutants = "".join(f"namespace mutant_{i} {{\n{text}}}\n" for i, text in bodies.items())
    return f"{head}namespace perexample::cuda {{\nextern int mutant;\n{mutants}{switch}}}\n"


CHOICE = """#include "kernels.h"
namespace perexample::cuda { int mutant = 0; }
extern "C" PX_EXPORT void px_mutate(int to) { perexample::cuda::mutant = to; }
"""


def build(out: Path, whole: Path, map: Callable = map) -> Path:
    """A library of all mutants below `out`; `whole`: where the objects of the sources as they are lie."""
    units = {"choice": CHOICE, **{source: unit(source) for source in MUTANTS}}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in units.items():
        (out / f"{name}.cpp").write_text(text)
    objects = list(map(lambda name: compile(out / f"{name}.cpp", out, optimize="-O0"), units))
    others = [whole / f"{name}.o" for name in ("linear", "linear_wgmma", "plan", "shim")]
    return link([*objects, *others], out / "mutants.so")


def randn(*shape: int) -> Tensor:
    return guarded(torch.randn(shape))


def embedding_cases(lib: Emulated, seed: int) -> None:
    # Runs of several chunks, of one, and of a few positions.
    for rows in (3, 1, 60):
        indices = torch.randint(rows, (3, 300 if rows == 1 else 40)) + (rows == 1)
        dy = randn(*indices.shape, 4)
        got = lib.embedding_moments(dy, indices, rows + 1, 2, multiprocessors=132, seed=seed)
        within(got, (dy, indices, rows + 1, 2), OPS["embedding_moments"][0], torch.float32, "embedding")


def norm_cases(lib: Emulated, seed: int) -> None:
    every, where = [True, True, True], {"seed": seed, "multiprocessors": 1}
    dy, x, weight = randn(3, 9, 300), randn(3, 9, 300), randn(300)
    got = lib.layer_norm_moments(dy, x, None, None, weight, 1e-5, **where)
    arguments = (dy, x, None, None, weight, 1e-5, every)
    within(got, arguments, OPS["layer_norm_moments"][0], torch.float32, "layer_norm")
    for shape, groups in (((3, 6, 5), 2), ((2, 3, 1100), 1)):
        dy, x, weight = randn(*shape), randn(*shape), randn(shape[1])
        variance, mean = torch.var_mean(x.reshape(shape[0], groups, -1), 2, correction=0)
        arguments = (dy, x, mean, (variance + 1e-5).rsqrt(), weight, groups, 1e-5)
        got = lib.group_norm_moments(*arguments, **where)
        within(got, (*arguments, every), OPS["group_norm_moments"][0], torch.float32, "group_norm")


def reduce_cases(lib: Emulated, seed: int) -> None:
    sizes = (((3, 70, 40), 1), ((2, 900, 5), 2), ((30, 3, 33), 1))
    of_rows = [(randn(*shape), multiprocessors) for shape, multiprocessors in sizes]
    for dy, multiprocessors in (*of_rows, (randn(3, 13, 70).mT, 1)):
        got = lib.bias_moments(dy, multiprocessors=multiprocessors, seed=seed)
        check(got, lambda b, d, dy=dy: dy[b].to(d).sum(0), dy.shape[0], dy.shape[2:], torch.float32)


def conv_cases(lib: Emulated, seed: int) -> None:
    for channels, outputs, groups in ((6, 12, 1), (6, 6, 6), (6, 12, 3)):
        x = padded(randn(2, 18, 9, channels)).movedim(-1, 1)
        dy = guarded(torch.randn(2, 8, 9, outputs)).movedim(-1, 1)
        got = lib.conv_moments(dy, x, (3, 3), (2, 1), (0, 1), (1, 1), groups, seed=seed)

        def contribution(b: int, d: torch.dtype, x=x, dy=dy, groups=groups) -> Tensor:
            like = torch.empty(dy.shape[1], x.shape[1] // groups, 3, 3, dtype=d)
            sides = ([2, 1], [0, 1], [1, 1], False, [0, 0], groups, [False, True, False])
            one = dy[b : b + 1].to(d), x[b : b + 1].to(d)
            return torch.ops.aten.convolution_backward(*one, like, None, *sides)[1]

        check(got[:2], contribution, 2, (outputs, channels // groups, 3, 3), torch.float32)


def optimizer_cases(lib: Emulated, seed: int) -> None:
    sizes = ((7, 9), (3,), (8200,))
    rows = [torch.randn(6, *size) for size in sizes]
    params, grads, sums = ([f(c) for c in rows] for f in (lambda c: c[0], lambda c: c.sum(0), lambda c: (c * c).sum(0)))
    average = torch.randn(state_starts(params)[-1])
    seen, flags = torch.tensor([5.0, 500.0, 500.0], dtype=torch.float64), torch.zeros(3, dtype=torch.int32)
    state = [params, grads, sums, average, average.square() + 0.1, seen, flags]
    scalars = {"batch_size": torch.tensor(6.0), "lr": torch.tensor(1e-3), "grad_scale": torch.tensor(4.0)}
    options = {"n_g": 20.0, "n_s": 100.0, "eps": 1e-8, "weight_decay": 0.1, "guard_rounds": 1, **scalars}
    flags_of_kind = dict(centered=False, squared_denominator=False, lr_times_eps=False, correct_g=True, correct_s=True)
    options |= flags_of_kind | {"power": False, "mean_reduction": True, "maximize": False}
    got, expected = ([[t.clone() for t in s] if isinstance(s, list) else s.clone() for s in state] for _ in range(2))
    lib.optimizer_step_(*got, seed=seed, **options)
    OPS["optimizer_step_"][0](*expected, **options)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


CASES = {
    "embedding": embedding_cases,
    "norm": norm_cases,
    "reduce": reduce_cases,
    "conv": conv_cases,
    "optimizer": optimizer_cases,
}


def outcomes(library: Path) -> Iterator[tuple[str, int]]:
    """Exit status of the cases on each source as it is, and on each mutant."""
    lib = Emulated(library)
    for source, run in CASES.items():
        for name in (source, *MUTANTS[source]):
            number = NUMBERS.get(name, 0)

            def cases(run=run, number=number) -> None:
                lib.mutate(number)
                for seed in SEEDS:
                    torch.manual_seed(seed)
                    run(lib, seed)

            yield name, in_child(cases)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(dict(outcomes(Path(sys.argv[1])))))
