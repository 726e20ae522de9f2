"""What is refused of distributed training, in one process that takes itself for a group."""

from __future__ import annotations

import types

import pytest
import torch.distributed as dist
from models import X, Y, adam, backward, mlp, raises, randn
from torch import nn

import perexample as px

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import DeviceMesh

    if dist.is_initialized():
        pytest.skip("a process group exists already")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["per_example", "per_batch"])
def test_data_parallel_in_several_processes_is_refused_by_the_step(mesh, kind):
    """Gradients are averaged over them then, second moments and counts are not."""
    model = px.convert(mlp())
    parallel = nn.parallel.DistributedDataParallel(model)
    opt = adam(model, second_moment=kind)
    backward(parallel, X.float(), target=Y.float())
    opt.step()
    opt.zero_grad()
    parallel.process_group = types.SimpleNamespace(size=lambda: 2)
    backward(parallel, X.float(), target=Y.float())
    message = (
        "Adam.step: DistributedDataParallel averaged the gradients over 2 processes, but second moments and examples "
        "are those of this process; train in one process"
    )
    with raises(RuntimeError, message + (", or pass step(batch_size=...) of all together" * (kind == "per_batch"))):
        opt.step()
    assert opt.state[model[0].weight]["examples"].item() == 6
    if kind == "per_batch":
        opt.step(batch_size=12)


def test_dtensors_are_refused_and_plain_layers_beside_them_are_not(mesh):
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = parallelize_module(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
    assert isinstance(model[0].weight, DTensor)
    table = px.convert(model, dry_run=True)
    assert [row.how for row in table] == ["refused", "kernel"]
    with raises(
        ValueError,
        "px.convert: 1 of 2 modules cannot be served exactly:\n  0 (Linear): its weight is a DTensor: "
        "tensor-parallel and sharded parameters are not supported; train with plain ones, or freeze it",
    ):
        px.convert(model)
    model = px.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    with raises(
        ValueError,
        "0: its weight has become a DTensor: tensor-parallel and sharded parameters are not supported; train with "
        "plain ones, freeze it, or use px.no_moments()",
    ):
        model(randn(3, 4).float())
