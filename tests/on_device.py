"""Runs tests that are written for the CPU on another device: PEREXAMPLE_TEST_DEVICE=cuda.

Tensors go there, with their strides, offset and all that lies between their elements, and results come back; the
oracle stays on the CPU. Without the variable nothing is changed.
"""

import functools
import os

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

DEVICE = os.environ.get("PEREXAMPLE_TEST_DEVICE", "")


def moved(tensor, device=DEVICE or "cpu"):
    """A copy on the device in the same memory layout."""
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),))
    return flat.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(function, in_place=False, device=DEVICE):
    """`function`, of tensors on the CPU, on the device. in_place: what it wrote to its arguments comes back, too."""

    @functools.wraps(function)
    def call(*arguments, **keywords):
        sent = []

        def send(tensor):
            if tensor.device.type != "cpu":
                return tensor
            sent.append((tensor, moved(tensor.detach(), device)))
            return sent[-1][1]

        arguments, keywords = tree_map_only(Tensor, send, (arguments, keywords))
        result = function(*arguments, **keywords)
        if in_place:
            for tensor, there in sent:
                if 0 not in tensor.stride():  # an expanded one is only read
                    tensor.detach().copy_(there)
        return tree_map_only(Tensor, Tensor.cpu, result)

    return call
