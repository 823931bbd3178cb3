"""The decoder and the gathering decoder against the definition of their bits."""

import pytest
import torch
from triton.runtime import interpreter

from fp4fx import nvfp4, ops
from fp4fx.errors import LayoutError
from fp4fx.kernels.triton import dequantize as module
from fp4fx.kernels.triton.dequantize import dequantize, embedding
from tests.kernels.test_cpu_codec import KINDS, same_bits
from tests.kernels.triton.compiling import compile_variants
from tests.kernels.triton.launches import Launches

SHAPES = ((1, 1), (3, 15), (17, 16), (5, 33), (20, 48), (33, 100), (2, 3, 32))

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in cast")  # NumPy's, of an infinity or a NaN


@pytest.fixture(autouse=True)
def poisoned_results():
    """Values that a kernel forgets to write are not those that a test expects."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def random_rows(*shape, device):
    """Any bytes at all: NaN scales and negative ones too."""
    blocks = -(-shape[-1] // 16)
    packed = torch.randint(0, 256, (*shape[:-1], 8 * blocks), dtype=torch.uint8)
    scale = torch.randint(0, 256, (*shape[:-1], blocks), dtype=torch.uint8)
    return packed.to(device), scale.to(device), torch.tensor(0.0123, device=device)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_the_definition(device, dtypes, shape):
    q = random_rows(*shape, device=device)
    for dtype in dtypes:
        found, expected = dequantize(*q, shape, dtype), ops.dequantize(*q, shape, dtype)
        assert found.shape == expected.shape and found.is_contiguous()
        assert same_bits(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_any_magnitude(device, dtypes, kind):
    q = nvfp4.quantize_rows(kind(9, 40).to(device))
    for dtype in dtypes:
        assert same_bits(dequantize(*q, (9, 40), dtype), nvfp4.dequantize_rows(*q, 40, dtype))


def test_every_code_and_scale(device, dtypes):
    scale = torch.arange(256, dtype=torch.uint8, device=device).view(16, 16)
    packed = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8, device=device)
    packed = packed.repeat(16, 16)
    for g in torch.tensor([1.0, 0.3, 1e-38, 1e35], device=device):
        for dtype in dtypes:
            expected = nvfp4.dequantize_rows(packed, scale, g, 256, dtype)
            assert same_bits(dequantize(packed, scale, g, (16, 256), dtype), expected)


@pytest.mark.parametrize(("shape", "order", "groups"), [
    ((2, 20, 3, 5), "channels", 1), ((2, 32, 4), "channels", 2), ((6, 4, 3, 3), "conv", 1), ((8, 16, 1, 1), "conv", 1),
    ((6, 4, 3), "conv_transpose", 2),
])  # fmt: skip
def test_orders(device, dtypes, shape, order, groups):
    q = ops.quantize(torch.randn(shape, device=device), None, order, groups)
    for dtype in dtypes:
        found, expected = (f(*q, shape, dtype, order, groups) for f in (dequantize, ops.dequantize))
        assert found.is_contiguous() and same_bits(found, expected)


def test_rows_of_any_strides_and_none(device):
    packed, scale, g = random_rows(12, 40, device=device)
    expected = nvfp4.dequantize_rows(packed[::2], scale[::2], g, 40, torch.float32)
    assert same_bits(dequantize(packed[::2], scale[::2], g, (6, 40), torch.float32), expected)
    assert dequantize(packed[:0], scale[:0], g, (0, 40), torch.float32).shape == (0, 40)


def test_kernels_are_launched_on_the_device_of_the_rows(device, monkeypatch):
    launches = Launches(monkeypatch, module, "_dequantize_kernel")
    q = random_rows(4, 16, device=device)
    dequantize(*q, (4, 16), torch.float32)
    embedding(torch.zeros(2, dtype=torch.int64, device=device), *q, 16, torch.float32)
    assert [guard for guard, _ in launches.seen] == [q[0].device] * 2


def test_refusals(device):
    packed, scale, g = random_rows(4, 16, device=device)
    with pytest.raises(LayoutError, match="float64"):
        dequantize(packed, scale, g, (4, 16), torch.float64)
    with pytest.raises(RuntimeError, match="K=17"):
        dequantize(packed, scale, g, (4, 17), torch.float32)
    with pytest.raises(RuntimeError, match="must be integers"):
        embedding(torch.zeros(2), packed, scale, g, 16, torch.float32)


@pytest.mark.parametrize("dim", [1, 16, 40, 64])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (7,), (3, 11), (2, 0)])
def test_embedding(device, dtypes, dim, kind, shape):
    table = random_rows(50, dim, device=device)
    indices = torch.randint(0, 50, shape, dtype=kind, device=device)
    indices.view(-1)[:2] = torch.tensor([0, 49])[: indices.numel()]
    for dtype in dtypes:
        found, expected = embedding(indices, *table, dim, dtype), ops.embedding(indices, *table, dim, dtype)
        assert found.shape == expected.shape and found.is_contiguous()
        assert same_bits(found, expected)


def test_embedding_of_strided_indices(device):
    table = random_rows(50, 24, device=device)
    indices = torch.randint(0, 50, (6, 8), device=device).t()[1:]
    expected = ops.embedding(indices, *table, 24, torch.float32)
    assert same_bits(embedding(indices, *table, 24, torch.float32), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a failed assertion ends the use of the device")
@pytest.mark.parametrize("index", [-1, 50, 2**40])
def test_embedding_of_an_index_out_of_range(index, monkeypatch):
    indices, table = torch.tensor([3, index]), random_rows(50, 16, device="cpu")
    assert not embedding(indices, *table, 16, torch.float32)[1].any()  # nothing is read
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    with pytest.raises(interpreter.InterpreterError, match="out of range"):
        embedding(indices, *table, 16, torch.float32)


def test_compiles_ahead_of_time():
    compile_variants("dequantize", ("dequantize-bf16-8x512", "embedding-bf16-1x512"))
