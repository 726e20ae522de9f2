"""bench/gpu.py, run through without a GPU: what it puts on cuda stays here, and is small. Not what it measures."""

import contextlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import perexample as px

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import gpu

MOST = 64  # elements along a dimension


class Here(TorchFunctionMode):
    """What is made on cuda is made on the CPU, and small."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
            if func in (torch.empty, torch.randn):
                args = [torch.Size(min(n, MOST) for n in a) if isinstance(a, tuple) else min(a, MOST) for a in args]
        return func(*args, **kwargs)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 250.0


class Graph:
    def replay(self):
        pass


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A GPU that is none; rows go to the folder that this is."""

    def nothing(*arguments):
        return None

    stream = types.SimpleNamespace(wait_stream=nothing)
    cuda = {
        "is_available": lambda: True,
        "get_device_properties": lambda index: types.SimpleNamespace(name="none"),
        "synchronize": nothing,
        "empty_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 3 << 20,
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "bench/results").mkdir(parents=True)
    with Here():
        yield tmp_path


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.gpu", *arguments])
    gpu.main()


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"bench/results/gpu_{name}.jsonl").read_text().splitlines()]


def test_linear(here, monkeypatch):
    command(monkeypatch, "linear")
    found = rows(here, "linear")
    assert [tuple(row[k] for k in "OIBT") for row in found] == gpu.SHAPES
    for row in found:
        assert row["ratio"] == 1 and row["cublas"] == row["ours"] == 250
        assert {"device", "torch", "cuda", "of_floor", "floor_bytes", "floor_operations"} <= set(row)
    assert {"bytes", "operations"} <= set(rows(here, "light")[0])


def test_a_wrong_result_ends_linear_before_anything_is_timed(here, monkeypatch):
    right = gpu.linear_programs

    def wrong(dy, x, implementation):
        programs = right(dy, x, implementation)
        return programs | {"ours": lambda: [1.01 * t for t in programs["ours"]()]}

    monkeypatch.setattr(gpu, "linear_programs", wrong)
    with pytest.raises(SystemExit, match="RED"):
        command(monkeypatch, "linear")
    assert not (here / "bench/results/gpu_linear.jsonl").exists()


def small():
    return gpu.GPT(16, 1, 2, 8, 11)


def test_optimizer(here, monkeypatch):
    monkeypatch.setattr(gpu, "gpt2", lambda width, layers: small())
    command(monkeypatch, "optimizer")
    assert [row["case"] for row in rows(here, "optimizer")] == ["124 M", "2000 tiny"]
    assert all(row["stock"] == row["ours"] == 250 and row["floor_ms"] > 0 for row in rows(here, "optimizer"))


def test_step(here, monkeypatch):
    models = {
        "GPT-2 124M": (small, lambda: tuple(torch.randint(11, (3, 8), device="cuda") for _ in range(2))),
        "ResNet-50-GN": (
            lambda: nn.Sequential(gpu.Bottleneck(64, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 3)),
            lambda: (torch.randn(2, 64, 6, 6, device="cuda"), torch.randint(3, (2,), device="cuda")),
        ),
    }
    monkeypatch.setattr(gpu, "MODELS", models)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, *rest, **more: autocast("cpu", *rest, **more))
    command(monkeypatch, "step", "--models", *models)
    found = rows(here, "step")
    assert [(row["model"], row["mode"]) for row in found] == [
        (model, mode) for model in models for mode in ("eager", "compiled", "captured")
    ]
    assert all(row["ours_MiB"] == row["stock_MiB"] == 3 and row["ratio"] == 1 for row in found)


@pytest.mark.parametrize("name", gpu.MODELS)
def test_models_take_their_batches_and_run_on_kernels(name, monkeypatch):
    build, batch = gpu.MODELS[name]
    monkeypatch.setattr(gpu, "images", lambda count: (torch.empty(2, 3, 224, 224), torch.empty(2)))
    monkeypatch.setattr(gpu, "tokens", lambda count: [torch.empty(2, 1024, dtype=torch.long) for _ in range(2)])
    with torch.device("meta"):
        model, (x, y) = build(), batch()
        assert model(x).flatten(0, -2).shape[0] == y.numel()
    assert {row.how for row in px.convert(model, dry_run=True)} <= {"kernel", "none"}


@pytest.fixture
def recorded(here, monkeypatch):
    """The commands that would have been run."""
    commands = []
    monkeypatch.setattr(gpu, "run", lambda *command: commands.append(command))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    for variable in ("PEREXAMPLE_TEST_DEVICE", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(variable, "")  # so that it is restored
    return commands


@pytest.mark.parametrize(("name", "count"), [("tests", 1), ("ops", 1), ("layers", 1), ("sanitize", 3)])
def test_the_tests_that_it_runs_are_there(name, count, recorded, monkeypatch):
    command(monkeypatch, name)
    assert len(recorded) == count
    monkeypatch.setenv("PEREXAMPLE_TEST_DEVICE", "")
    for run in recorded:
        program = run[run.index(sys.executable) :]
        root = Path(gpu.__file__).parents[1]
        result = subprocess.run([*program, "--collect-only"], cwd=root, capture_output=True, text=True)
        assert result.returncode == 0 and " tests collected" in result.stdout, result.stdout[-3000:] + result.stderr


def test_ncu(recorded, monkeypatch):
    command(monkeypatch, "ncu")
    for run in recorded:
        assert run[0] == "ncu" and run[run.index("--clock-control") + 1] == "none"
        assert Path(run[run.index("--log-file") + 1]).parent.is_dir()
        command(monkeypatch, *run[run.index("bench.gpu") + 1 :])  # what would be profiled
    assert len(recorded) == 2
