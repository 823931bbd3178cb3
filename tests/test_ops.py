"""The ops: bodies against plain PyTorch on the decoded weight, fakes and schemas by opcheck, gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fp4fx import nvfp4, ops

fp4 = torch.ops.fp4fx


def packed(shape, order="rows", groups=1, seed=0):
    """A random weight of that shape: (operands, what they decode to)."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    parts = ops.quantize(w, None, order, groups)
    return parts, ops.dequantize(*parts, shape, torch.float32, order, groups)


CONV = [
    # rank, x shape, weight shape, stride, padding, dilation, groups
    (1, (2, 6, 20), (8, 6, 3), [1], [1], [1], 1),
    (2, (2, 8, 9, 9), (12, 8, 3, 3), [2, 2], [1, 1], [1, 1], 1),
    (2, (2, 8, 9, 9), (12, 4, 3, 3), [1, 1], [2, 2], [2, 2], 2),
    (2, (1, 3, 8, 8), (5, 3, 1, 1), [1, 1], [0, 0], [1, 1], 1),
    (3, (1, 4, 5, 6, 7), (6, 4, 2, 3, 2), [1, 2, 1], [0, 1, 0], [1, 1, 1], 1),
]


def test_linear_is_the_library_linear_on_the_decoded_weight():
    for k in (1, 16, 40):
        parts, dense = packed((7, k))
        x, b = torch.randn(3, 5, k), torch.randn(7)
        assert torch.equal(fp4.linear(x, *parts, b, k), F.linear(x, dense, b))
        assert torch.equal(fp4.linear(x[0, 0], *parts, None, k), F.linear(x[0, 0], dense))


@pytest.mark.parametrize(("rank", "x", "w", "stride", "padding", "dilation", "groups"), CONV)
def test_conv_is_the_library_convolution_on_the_decoded_weight(rank, x, w, stride, padding, dilation, groups):
    parts, dense = packed(w, "conv", groups)
    x, b = torch.randn(x), torch.randn(w[0])
    y = fp4.conv(x, *parts, b, x.shape[1], w[2:], stride, padding, dilation, groups)
    library = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    torch.testing.assert_close(y, library(x, dense, b, stride, padding, dilation, groups), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_transpose_is_the_library_convolution_on_the_decoded_weight(rank, groups):
    shape = (8, 6 // groups, *(3,) * rank)
    parts, dense = packed(shape, "conv_transpose", groups)
    x, b = torch.randn(2, 8, *(5,) * rank), torch.randn(6)
    geometry = ([2] * rank, [1] * rank, [1] * rank)
    y = fp4.conv_transpose(x, *parts, b, 8, (3,) * rank, *geometry, [1] * rank, groups)
    library = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    torch.testing.assert_close(y, library(x, dense, b, *geometry, groups), rtol=1e-5, atol=1e-5)


def test_embedding_decodes_the_gathered_rows():
    parts, dense = packed((11, 24))
    i = torch.tensor([[0, 10], [3, 3]])
    assert torch.equal(fp4.embedding(i, *parts, 24, torch.float32), dense[i])
    assert torch.equal(fp4.embedding(i, *parts, 24, torch.bfloat16), dense[i].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_activation_gives_what_its_decoded_one_gives(dtype):
    parts, _ = packed((7, 40))
    x = torch.randn(4, 40).to(dtype)
    xp, xs, xg = fp4.quantize(x)
    quantized = fp4.linear(xp, *parts, None, 40, xs, xg, dtype)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, fp4.linear(fp4.fake_quantize(x), *parts, None, 40))
    parts, _ = packed((6, 40, 3, 3), "conv")
    x = torch.randn(2, 40, 5, 5).to(dtype)
    geometry = (40, (3, 3), [1, 1], [1, 1], [1, 1], 1)
    quantized = fp4.conv(
        *[fp4.quantize(x, None, "channels")[0]], *parts, None, *geometry, *fp4.quantize(x, None, "channels")[1:], dtype
    )
    whole = fp4.conv(fp4.fake_quantize(x, None, "channels"), *parts, None, *geometry)
    torch.testing.assert_close(
        quantized, whole, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2 if dtype != torch.float32 else 1e-5
    )


def test_convolutions_answer_in_the_memory_format_of_their_input():
    parts, _ = packed((12, 8, 3, 3), "conv")
    geometry = (8, (3, 3), [1, 1], [1, 1], [1, 1], 1)
    x = torch.randn(2, 8, 9, 9)
    assert fp4.conv(x, *parts, None, *geometry).is_contiguous()
    last = x.to(memory_format=torch.channels_last)
    assert fp4.conv(last, *parts, None, *geometry).is_contiguous(memory_format=torch.channels_last)


def _calls():
    parts, _ = packed((7, 40))
    conv, _ = packed((6, 8, 3, 3), "conv")
    transposed, _ = packed((8, 3, 3, 3), "conv_transpose", 2)
    x = torch.randn(2, 8, 5, 5)
    xq = fp4.quantize(torch.randn(3, 40))
    return {
        "quantize": (x, None, "channels"),
        "dequantize": (*conv, (6, 8, 3, 3), torch.bfloat16, "conv"),
        "fake_quantize": (x.clone().requires_grad_(), None, "channels"),
        "linear": (torch.randn(3, 40, requires_grad=True), *parts, torch.randn(7, requires_grad=True), 40),
        "linear packed": (xq[0], *parts, torch.randn(7), 40, xq[1], xq[2], torch.float32),
        "conv": (
            x.clone().requires_grad_(),
            *conv,
            torch.randn(6, requires_grad=True),
            8,
            (3, 3),
            [1, 1],
            [1, 1],
            [1, 1],
            1,
        ),
        "conv channels_last": (
            x.to(memory_format=torch.channels_last),
            *conv,
            None,
            8,
            (3, 3),
            [1, 1],
            [1, 1],
            [1, 1],
            1,
        ),
        "conv_transpose": (x, *transposed, None, 8, (3, 3), [2, 2], [1, 1], [1, 1], [1, 1], 2),
        "embedding": (torch.tensor([[0, 6]]), *parts, 40, torch.float32),
    }


@pytest.mark.parametrize("call", list(_calls()))
def test_opcheck(call):
    opcheck(getattr(fp4, call.split()[0]).default, _calls()[call])


def test_gradients_pass_straight_through_and_reach_input_and_bias():
    x = torch.randn(4, 40, requires_grad=True)
    upstream = torch.randn(4, 40)
    fp4.fake_quantize(x).backward(upstream)
    assert torch.equal(x.grad, upstream)

    for op, library, shape, order, tail, reference in (
        ("linear", F.linear, (7, 40), "rows", (40,), ()),
        ("conv", F.conv2d, (6, 4, 3, 3), "conv", (8, (3, 3), [2, 2], [1, 1], [1, 1], 2), ([2, 2], [1, 1], [1, 1], 2)),
        (
            "conv_transpose",
            F.conv_transpose2d,
            (8, 3, 3, 3),
            "conv_transpose",
            (8, (3, 3), [2, 2], [1, 1], [1, 1], [1, 1], 2),
            ([2, 2], [1, 1], [1, 1], 2, [1, 1]),
        ),
    ):
        parts, dense = packed(shape, order, 2 if op != "linear" else 1)
        a = (torch.randn(4, 40) if op == "linear" else torch.randn(2, 8, 7, 7)).requires_grad_()
        bias = torch.randn(7 if op == "linear" else 6, requires_grad=True)
        a2, bias2 = a.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
        y, y2 = getattr(fp4, op)(a, *parts, bias, *tail), library(a2, dense, bias2, *reference)
        g = torch.randn(y.shape)
        y.backward(g)
        y2.backward(g)
        torch.testing.assert_close(a.grad, a2.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bias.grad, bias2.grad, rtol=1e-4, atol=1e-4)


def test_a_bad_call_fails_when_it_is_traced():
    parts, _ = packed((7, 40))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        for x, k, message in (
            (torch.randn(3, 41), 40, "41 values"),
            (torch.randn(3, 64), 64, "K=64"),
            (torch.ones(3, 40).int(), 40, "floating"),
        ):
            with pytest.raises(RuntimeError, match=message):
                fp4.linear(x, *parts, None, k)


def test_a_static_global_scale_is_used_and_returned_as_a_copy():
    x, g = torch.randn(3, 40), torch.tensor(0.01)
    _, _, used = fp4.quantize(x, g)
    assert used == g and used.data_ptr() != g.data_ptr()
    assert torch.equal(fp4.fake_quantize(x, g), nvfp4.dequantize(nvfp4.quantize(x, global_scale=g)))
