"""The kernels of norms, embedding and convolution, compiled for every architecture."""

from unittest import mock

import pytest
import torch
from perexample.triton_kernels import ahead, configs, conv, embedding, norm

ARCHS = tuple(configs.CONV)
every_arch = pytest.mark.parametrize("arch", ARCHS)


@every_arch
@pytest.mark.parametrize("kind", configs.CONV[90])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolution(arch, kind, kernel_size):
    if (kind, kernel_size) == ("float32", 1):
        return  # the same products with fewer addresses
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    dy, x = (torch.empty(64, channels, 32, 32, dtype=dtype) for channels in (128, 64))
    with mock.patch.object(conv, "_kind", lambda dtype: kind), ahead.compiling(arch) as made:
        conv.conv_moments(dy, x, [kernel_size] * 2, [1, 1], [kernel_size // 2] * 2, [1, 1], 1, False)
    tile = configs.CONV[arch][kind]
    found = made[0].problems(resident=tile.resident, tensor_cores=kind != "float32")
    assert made[0].name == "_implicit_gemm" and made[0].loops == 1
    assert not found, (found, made[0])


@every_arch
def test_what_only_adds_up(arch):
    x = torch.empty(16, 64, 768, dtype=torch.bfloat16)
    image = torch.empty(16, 96, 32, 32, dtype=torch.bfloat16)
    with ahead.compiling(arch) as made:
        norm.layer_norm_moments(x, x, None, None, torch.empty(768), 1e-5, [True] * 3)
        norm.rms_norm_moments(x, x, torch.empty(16, 64), torch.empty(768), 1e-5, [True] * 2)
        norm.group_norm_moments(image.flatten(2), image.flatten(2), None, None, torch.empty(96), 8, 1e-5, [True] * 3)
        embedding.embedding_moments(x, torch.zeros(16, 64, dtype=torch.long), 1000)
        conv.conv_moments(image, image, [3, 3], [1, 1], [1, 1], [1, 1], 96, False)
    assert {c.name for c in made} >= {"_normalized", "_affine", "_table_row", "_depthwise", "_bias"}
    for compiled in made:
        assert not compiled.problems(), compiled
