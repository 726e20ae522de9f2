"""Run a Triton launcher where it can run, and pretend to have another GPU where it is interpreted."""

import contextlib
import importlib
from unittest import mock

import pytest
import torch
from perexample.triton_kernels import _launch
from torch.utils._pytree import tree_leaves, tree_map_only

from perexample import _triton

DEVICE = "cpu" if _launch.INTERPRET else "cuda"
# The tables of the interpreter's tests: that of 10.x has the tiles of 9.0.
ARCHS = (80, 90) if _launch.INTERPRET else (None,)

interpreted = pytest.mark.skipif(not _launch.INTERPRET, reason="chooses the GPU that is pretended")
every_arch = pytest.mark.parametrize("arch", ARCHS)


def launcher(name):
    """The launcher of an op, called with and returning CPU tensors of the same strides; it may change them in place."""
    function = getattr(importlib.import_module(f"perexample.triton_kernels.{_triton.MODULES[name]}"), name)

    def call(*args, **keywords):
        given = (args, keywords)
        moved = tree_map_only(torch.Tensor, _to_device, given)
        results = function(*moved[0], **moved[1])
        for own, its in zip(tree_leaves(given), tree_leaves(moved), strict=True):
            if own is not its and not torch.equal(its.cpu(), own):
                own.copy_(its)
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), results)

    return call


def _to_device(tensor):
    return tensor if DEVICE == "cpu" else tensor.to(DEVICE)


def pretend(arch, processors=6):
    """In the interpreter, choose kernels and splits as for a GPU like this."""
    arch = 90 if arch is None else arch
    return mock.patch.object(_launch, "pretended", _launch.Device(arch, processors))


@contextlib.contextmanager
def multiplying(matmul, conv):
    """PyTorch multiplies float32 like this."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [flag.fp32_precision for flag in flags]
    for flag, value in zip(flags, (matmul, conv), strict=True):
        flag.fp32_precision = value
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.fp32_precision = value


class Launches(list):
    """The (kernel's name, grid, constants) of every launch."""

    def __init__(self):
        super().__init__()
        launch = _launch.launch

        def record(kernel, grid, *args, **meta):
            self.append((kernel.fn.__name__, grid, meta))
            launch(kernel, grid, *args, **meta)

        self.patch = mock.patch.object(_launch, "launch", record)

    def __enter__(self):
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()

    @property
    def names(self):
        return [name for name, _, _ in self]
