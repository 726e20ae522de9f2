"""Tensor parallelism is refused by name, in one process that takes itself for a group."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from models import raises
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


def test_dtensors_are_refused_and_plain_layers_beside_them_are_not(mesh):
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = parallelize_module(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
    assert isinstance(model[0].weight, DTensor)
    table = px.convert(model, dry_run=True)
    assert [row.how for row in table] == ["refused", "kernel"]
    with raises(
        ValueError,
        "px.convert: 1 of 2 modules cannot be served exactly:\n  0 (Linear): its weight is a DTensor: convert first "
        "and shard afterwards (fully_shard); tensor parallelism is not supported",
    ):
        px.convert(model)
