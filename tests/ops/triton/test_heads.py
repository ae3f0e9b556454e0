import torch

from rtpurbo.ops.triton.heads import supports_head_dim


def test_heads_that_kernels_take():
    assert supports_head_dim(128, torch.bfloat16)
    assert supports_head_dim(256, torch.float32)
    assert not supports_head_dim(512, torch.bfloat16)
    assert not supports_head_dim(36, torch.float16)
    assert supports_head_dim(36, torch.float32)
