"""Dense documents by the prefill kernels equal those of plain PyTorch."""

import pytest
import torch

from rtpurbo.ops.packed import packed_attention
from tests.ops.test_packed import SCALING, block_diagonal, states
from tests.ops.triton.support import DEVICE, DTYPES, EPSILON

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(70,), (40, 1, 29)], ids=str)
def test_documents_do_not_see_each_other(dtype, lengths):
    given = [part.to(DEVICE) for part in states(70, dtype=dtype)]
    output = packed_attention(*given, lengths, scaling=SCALING, backend="triton")
    expected = block_diagonal(*(part.double() for part in given), lengths)
    tolerance = 8 * EPSILON[dtype]
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


def test_kernels_reject_calls_that_need_gradients():
    given = [part.to(DEVICE).requires_grad_() for part in states(20)]
    with pytest.raises(ValueError, match="the kernels compute no gradients"):
        packed_attention(*given, (20,), scaling=SCALING, backend="triton")
    assert packed_attention(*given, (20,), scaling=SCALING).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_documents_on_a_gpu(dtype, head_dim):
    lengths = (1000, 129, 2000)
    given = [part.to(DEVICE) for part in states(3129, 8, 2, dtype, head_dim)]
    output = packed_attention(*given, lengths, scaling=SCALING)
    expected = block_diagonal(*(part.double() for part in given), lengths)
    tolerance = 16 * EPSILON[dtype]
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
