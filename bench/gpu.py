"""What is to be run on a GPU: tests, sanitizer, tables of kernels and whole steps, memory. `python -m bench.gpu`.

    python -m bench.gpu tests       ops, layers and models on cuda (bitwise determinism and graph capture among them)
    python -m bench.gpu ops         all cases of the tests of the ops, on cuda
    python -m bench.gpu layers      all cases of the tests of the layers, on cuda
    python -m bench.gpu sanitize    compute-sanitizer: memcheck, racecheck, initcheck, on few tests
    python -m bench.gpu linear      both moments ÷ cuBLAS's weight gradient, and the floors of bytes and operations
    python -m bench.gpu optimizer   the fused step ÷ torch's fused AdamW, and the floor of bytes
    python -m bench.gpu ncu         counters of two shapes
    python -m bench.gpu step        whole steps ÷ stock PyTorch, eager, compiled and captured, and peak memory
    python -m bench.gpu one ...     one launch of linear_moments, for a profiler

Each takes less than ten minutes on one H100. Rows go to bench/results/gpu_*.jsonl as they are measured. With
`--implementation triton` each runs on the Triton kernels; `linear` then has the C++ ones beside them, if built.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexample as px
from perexample import _triton
from perexample.ops import NAMESPACE, OPS
from perexample.testing import budget

from . import _report
from .models import GPT

ROOT = Path(__file__).parents[1]
TESTS = "tests/test_devices.py"
# Not: messages that name the CPU, opcheck and the report of what serves the CPU.
OP_TESTS = [f"tests/ops/test_{name}.py" for name in ("linear", "conv", "embedding", "norm", "reduce", "optimizer")]
LAYER_TESTS = ["tests/test_layer_cases.py", "-k", "oracle_moments or frozen or Memory"]
SMALL = "cuda and (linear or conv or norm or embedding or step) and not real_sizes and not captured and not elements"
BF16 = torch.bfloat16
# (O, I, B, T): the shapes of the cost model and of GPT-2
SHAPES = [
    *((4096, 4096, 32, t) for t in (1, 16, 64, 128, 256, 512, 1024)),
    *((3072, 768, 32, t) for t in (1, 2, 4, 16, 64, 128, 512, 1024)),
    *((768, 3072, 32, t) for t in (128, 1024)),
    *((2304, 768, 16, t) for t in (128, 1024)),
    (768, 768, 16, 1024),
    (1024, 1024, 32, 512),
    (50304, 768, 4, 1024),
    (768, 768, 2, 4096),
    *((4096, 4096, 4096, t) for t in (1, 2, 3, 4)),
]


def timed(programs: dict[str, Callable[[], Any]], seconds: float = 0.5) -> dict[str, float]:
    """Milliseconds of each program: the median over turns that take each in its order, caches flushed in between."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    marks = {name: [] for name in programs}
    for _ in range(3):
        for program in programs.values():
            program()
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    total, rounds = 0.0, 0
    while rounds < 9 or (total < 1e3 * seconds and rounds < 200):
        for name, program in programs.items():
            flush.zero_()
            start.record()
            program()
            stop.record()
            stop.synchronize()
            marks[name].append(start.elapsed_time(stop))
            total += marks[name][-1]
        rounds += 1
    return {name: statistics.median(times) for name, times in marks.items()}


def light() -> dict[str, float]:
    """What this machine does in this run: bytes and bfloat16 operations a second."""
    source, target = (torch.empty(1 << 30, dtype=torch.int8, device="cuda") for _ in range(2))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    ms = timed({"copy": lambda: target.copy_(source), "mm": lambda: torch.mm(a, b)})
    return {"bytes": 2 * (1 << 30) / ms["copy"] * 1e3, "operations": 2 * 8192**3 / ms["mm"] * 1e3}


def save(name: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows, and write them with what they were measured on."""
    device = torch.cuda.get_device_properties(0)
    facts = {"device": device.name, "torch": torch.__version__, "cuda": torch.version.cuda}
    facts["implementation"] = os.environ.get("PEREXAMPLE_CUDA") or "default"
    target = ROOT / f"bench/results/gpu_{name}.jsonl"
    target.parent.mkdir(exist_ok=True)
    with target.open("a") as file:
        for row in rows:
            file.write(json.dumps(facts | row) + "\n")
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def gate(dy: Tensor, x: Tensor, got: tuple[Tensor, ...]) -> None:
    """Some rows of the result against float64; a red gate ends the run before anything is timed."""
    rows = torch.arange(0, dy.shape[2], max(1, dy.shape[2] // 64), device=dy.device)
    reference = OPS["linear_moments"][0]
    some = dy[:, :, rows].contiguous()
    expected, stock = (reference(some.to(d), x.to(d), False) for d in (torch.float64, torch.float32))
    for g, e, s, dtype in zip(got[:2], expected, stock, (dy.dtype, torch.float32), strict=False):
        error, allowed = float((g[rows].double() - e).abs().max()), budget(e, s, dtype)
        if not error <= allowed:
            sys.exit(f"RED, nothing is timed: {tuple(dy.shape)} {x.shape[2]}: error {error:.3g} > {allowed:.3g}")


def linear_programs(dy: Tensor, x: Tensor, implementation: str) -> dict[str, Callable[[], Any]]:
    """cuBLAS' weight gradient, both moments, and for Triton those of the C++ kernel too, if it is built."""
    op = torch.ops.perexample.linear_moments
    programs = {
        "cublas": lambda: torch.mm(dy.flatten(0, 1).t(), x.flatten(0, 1)),
        "ours": lambda: op(dy, x, False),
    }
    if implementation == "triton":
        launcher = importlib.import_module("perexample.triton_kernels.linear").linear_moments
        programs["ours"] = lambda: launcher(dy, x, False)
        filled = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::linear_moments", "CUDA")
        if filled and _triton.source("linear_moments", "CUDA") is None:
            programs["cuda"] = lambda: op(dy, x, False)
    return programs


def linear(implementation: str) -> None:
    """The table of shapes."""
    machine = light()
    save("light", [machine])
    for outputs, inputs, batch, positions in SHAPES:
        dy, x = (torch.randn(batch, positions, n, device="cuda").to(BF16) for n in (outputs, inputs))
        programs = linear_programs(dy, x, implementation)
        gate(dy, x, programs["ours"]())
        ms = timed(programs)
        read = 2 * batch * positions * (outputs + inputs)
        floor_bytes = (read + 6 * outputs * inputs) / machine["bytes"] * 1e3
        floor_operations = 2 * batch * positions * outputs * inputs / machine["operations"] * 1e3
        ratio = {"ratio": ms["ours"] / ms["cublas"], "of_floor": max(floor_bytes, floor_operations) / ms["ours"]}
        if "cuda" in ms:
            ratio["of_cuda"] = ms["ours"] / ms["cuda"]
        shape = {"implementation": implementation, "O": outputs, "I": inputs, "B": batch, "T": positions}
        save("linear", [shape | ratio | ms | {"floor_bytes": floor_bytes, "floor_operations": floor_operations}])


def optimizer() -> None:
    """The step of GPT-2's parameters, and of two thousand tiny ones."""
    machine = light()
    for name, sizes in (("124 M", [p.shape for p in gpt2(768, 12).parameters()]), ("2000 tiny", [(64,)] * 2000)):
        params = [nn.Parameter(torch.randn(size, device="cuda")) for size in sizes]
        stock = [nn.Parameter(p.detach().clone()) for p in params]
        for p in (*params, *stock):
            p.grad = torch.randn_like(p)
        ours = px.optim.Adam(params, lr=1e-6, n_g=1000, n_s=100_000, second_moment="per_batch")
        theirs = torch.optim.AdamW(stock, fused=True)
        ms = timed({"stock": theirs.step, "ours": lambda o=ours: o.step(batch_size=32)})
        numel = sum(p.numel() for p in params)
        floor = 28 * numel / machine["bytes"] * 1e3  # per batch: no sum_grad_squared to read
        save("optimizer", [{"case": name, "ratio": ms["ours"] / ms["stock"], "floor_ms": floor, **ms}])


# ---- Whole steps ---------------------------------------------------------------------------------


def gpt2(width: int, layers: int) -> nn.Module:
    """GPT-2 of this size, with a head of its own."""
    return GPT(width, layers, width // 64, 1024, 50304)


class Bottleneck(nn.Module):
    """As in ResNet-50, with GroupNorm."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width

        def conv(a: int, b: int, size: int, step: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, size, step, size // 2, bias=False), nn.GroupNorm(32, b))

        self.body = nn.Sequential(
            conv(inputs, width, 1), nn.ReLU(), conv(width, width, 3, stride), nn.ReLU(), conv(width, outputs, 1)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50 with GroupNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    before = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(before, width, stride if block == 0 else 1))
            before = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


class ConvNeXtBlock(nn.Module):
    """A depthwise 7×7 convolution, a norm and two linear layers, channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def convnext_t() -> nn.Module:
    """The shapes of ConvNeXt-T (GroupNorm of one group before each reduction)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4)]
    before = 96
    for width, blocks in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if width != before:
            layers += [nn.GroupNorm(1, before), nn.Conv2d(before, width, 2, 2)]
        layers += [ConvNeXtBlock(width) for _ in range(blocks)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


def tokens(batch: int) -> tuple[Tensor, Tensor]:
    """A batch for GPT-2."""
    return tuple(torch.randint(50304, (batch, 1024), device="cuda") for _ in range(2))  # type: ignore[return-value]


def images(batch: int) -> tuple[Tensor, Tensor]:
    """A batch for the convolutional models."""
    x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    return x, torch.randint(1000, (batch,), device="cuda")


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "GPT-2 124M": (lambda: gpt2(768, 12), lambda: tokens(16)),
    "GPT-2 350M": (lambda: gpt2(1024, 24), lambda: tokens(8)),
    "ResNet-50-GN": (lambda: resnet50().to(memory_format=torch.channels_last), lambda: images(64)),
    "ConvNeXt-T": (lambda: convnext_t().to(memory_format=torch.channels_last), lambda: images(64)),
}


def programs(build: Callable[[], nn.Module], data: tuple[Tensor, Tensor], ours: bool, mode: str) -> Callable[[], None]:
    """One whole training step on `data`."""
    torch.manual_seed(0)
    model = build().cuda()
    rate = torch.tensor(1e-6, device="cuda")
    if ours:
        model = px.convert(model)
        optimizer: torch.optim.Optimizer = px.optim.Adam(model.parameters(), lr=rate, n_g=1000, n_s=100_000)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=mode == "captured")
    x, y = data

    def loss() -> Tensor:
        with torch.autocast("cuda", BF16):
            output = model(x)
        return F.cross_entropy(output.flatten(0, -2).float(), y.flatten())

    forward = torch.compile(loss) if mode == "compiled" else loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=mode != "captured")
        forward().backward()
        optimizer.step()

    if mode != "captured":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def step(names: list[str], modes: list[str]) -> None:
    """Whole steps, ours against stock, and the most memory each takes."""
    for name in names:
        build, batch = MODELS[name]
        for mode in modes:
            data = batch()
            peaks, both = {}, {}
            for ours in (False, True):
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                who = "ours" if ours else "stock"
                both[who] = programs(build, data, ours, mode)
                for _ in range(3):
                    both[who]()
                peaks[f"{who}_MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            ms = timed(both, seconds=8.0)
            save("step", [{"model": name, "mode": mode, "ratio": ms["ours"] / ms["stock"], **ms, **peaks}])
            del both, data


# ---- Other programs ------------------------------------------------------------------------------


def run(*command: str) -> None:
    """Run a program in the repository and end with its exit code where it fails."""
    print("$", *command, flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(code)


def sanitize() -> None:
    """The sanitizer's three tools, each on few tests: they are slow."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        sys.exit("compute-sanitizer is not on PATH: it comes with the CUDA toolkit")
    pytest = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", TESTS)
    for name, tests in (
        ("memcheck", SMALL + " and (float32 or bfloat16)"),
        ("racecheck", "cuda and linear and bfloat16 and (B5 or B70) or real_sizes and bfloat16 and (136 or 72)"),
        ("initcheck", "cuda and (linear or norm or step) and bfloat16"),
    ):
        run(tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all", *pytest, "-k", tests)


def ncu() -> None:
    """Counters of one long and one short shape."""
    tool = shutil.which("ncu")
    if tool is None:
        sys.exit("ncu is not on PATH: it comes with Nsight Compute")
    triton = os.environ.get("PEREXAMPLE_CUDA") == "triton"
    kernel, suffix = ("^_descriptor|^_pointer", "_triton") if triton else ("moments", "")
    for shape in ("4096 4096 32 1024", "3072 768 32 128"):
        target = ROOT / f"bench/results/gpu_ncu_{shape.replace(' ', '_')}{suffix}.txt"
        options = (
            "--set",
            "full",
            "--kernel-name",
            f"regex:{kernel}",
            "--launch-count",
            "1",
            "--clock-control",  # clocks as in what is timed, and nobody else's changed
            "none",
            "--log-file",
            str(target),
        )
        run(tool, *options, sys.executable, "-m", "bench.gpu", "one", *shape.split())


def one(outputs: int, inputs: int, batch: int, positions: int) -> None:
    """One launch."""
    dy, x = (torch.randn(batch, positions, n, device="cuda").to(BF16) for n in (outputs, inputs))
    torch.ops.perexample.linear_moments(dy, x, False)
    torch.cuda.synchronize()


def arguments() -> Iterator[tuple[str, dict[str, Any]]]:
    """The subcommands, and what more they take."""
    yield from ((name, {}) for name in ("tests", "ops", "layers", "sanitize", "linear", "optimizer", "ncu"))
    yield (
        "step",
        {"--models": {"nargs": "+", "choices": list(MODELS), "default": list(MODELS)}}
        | {"--modes": {"nargs": "+", "default": ["eager", "compiled", "captured"]}},
    )
    yield "one", {name: {"type": int} for name in ("outputs", "inputs", "batch", "positions")}


def use(implementation: str) -> None:
    """Start over in an environment in which `implementation` serves every op: it is chosen when perexample loads."""
    if implementation == "triton" and os.environ.get("PEREXAMPLE_CUDA") != "triton":
        command = [sys.executable, "-m", "bench.gpu", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"PEREXAMPLE_CUDA": "triton"})


def main() -> None:
    """The command `python -m bench.gpu SUBCOMMAND`."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, more in arguments():
        command = commands.add_parser(name)
        command.add_argument("--implementation", choices=["default", "triton"], default="default")
        for argument, keywords in more.items():
            command.add_argument(argument, **keywords)
    chosen = parser.parse_args()
    if chosen.command != "linear":  # which has both in one process
        use(chosen.implementation)
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: no GPU here")
    if chosen.command == "tests":
        run(sys.executable, "-m", "pytest", "-q", TESTS)
    elif chosen.command in ("ops", "layers"):
        os.environ |= {"PEREXAMPLE_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        tests = {"ops": [*OP_TESTS, "-k", "not errors_say"], "layers": LAYER_TESTS}[chosen.command]
        run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    elif chosen.command == "step":
        step(chosen.models, chosen.modes)
    elif chosen.command == "one":
        one(chosen.outputs, chosen.inputs, chosen.batch, chosen.positions)
    else:
        _report.announce() if chosen.command in ("linear", "optimizer") else None
        linear_ = lambda: linear(chosen.implementation)  # noqa: E731
        {"sanitize": sanitize, "linear": linear_, "optimizer": optimizer, "ncu": ncu}[chosen.command]()


if __name__ == "__main__":
    main()
