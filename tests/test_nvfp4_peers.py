"""The same bytes as the libraries that others quantize and serve with; one that is not installed is skipped by name."""

import importlib

import pytest
import torch

from fp4fx import nvfp4

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # theirs, about versions and deprecations


def peer(module, package):
    """The module, or a skip that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        pytest.skip(f"needs the package {package}: pip install {package} ({missing})")


def with_zeros(x):
    """Zero blocks, exact -0.0, and negative values that round to zero."""
    x = x.clone()
    x[::3, 32:64], x[:, 100], x[:, 101] = 0, -0.0, -1e-4
    return x


ORDINARY = {  # what becomes of N(0, 1), fp32 [256, 512]
    "normal": lambda x: x,
    "rows of many sizes": lambda x: x * torch.randn(256, 1).exp(),
    "heavy tails": lambda x: x / torch.randn(3, 256, 512).square().mean(0).sqrt(),
    "zeros": with_zeros,
    "multiples of one eighth": lambda x: (x * 16).round() / 8,
    "small": lambda x: x * 1e-6,
    "large": lambda x: x * 1e6,
    "tiny": lambda x: x * 1e-30,
    "blocks of many sizes": lambda x: x * torch.randn(256, 32).mul(3).exp().repeat_interleave(16, dim=1),
}
CASES = [(name, dtype) for name in ORDINARY for dtype in (torch.float32, torch.bfloat16)]
CASES += [(name, torch.float16) for name in list(ORDINARY)[:5]]  # those within its range


def ordinary(name, dtype=torch.float32):
    torch.manual_seed(0)
    return ORDINARY[name](torch.randn(256, 512)).to(dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_modelopt_gives_the_same_bytes(name, dtype):
    modelopt = peer("modelopt.torch.quantization.qtensor.nvfp4_tensor", "nvidia-modelopt")
    x = ordinary(name, dtype)
    for k in (512, 72):
        q = nvfp4.quantize(x[:, :k])
        theirs, scale, g = modelopt.NVFP4QTensor.quantize(x[:, :k].clone(), 16)
        assert torch.equal(q.global_scale, g)
        assert torch.equal(q.scale, scale.view(torch.uint8))
        assert torch.equal(q.packed, theirs._quantized_data)
        if k % 16 == 0:  # ModelOpt packs a tail but cannot decode it
            decoded = theirs.dequantize(dtype=dtype, scale=scale, double_scale=g, block_sizes={-1: 16})
            assert torch.equal(nvfp4.dequantize(q), decoded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["normal", "small", "large", "rows of many sizes", "heavy tails"])
def test_torchao_differs_at_ties_only(name, dtype):
    """It multiplies by a reciprocal where NVFP4 divides, which breaks ties; and its block scales stop at 2**-6."""
    torchao = peer("torchao.prototype.mx_formats.nvfp4_tensor", "torchao")
    x = ordinary(name, dtype)
    q = nvfp4.quantize(x)
    scale, packed = (t.view(torch.uint8) for t in torchao.nvfp4_quantize(x, 16, q.global_scale))
    scale = scale.view(q.scale.shape)
    off = (scale != q.scale) & (q.scale > 8)
    exact = x.double().abs().view(256, 32, 16).amax(-1) / (6 * q.global_scale.double())
    middle = (nvfp4.decode_e4m3(scale) + nvfp4.decode_e4m3(q.scale)).double() / 2
    assert torch.allclose(exact[off], middle[off], rtol=1e-6)
    step = nvfp4.decode_e4m3(q.scale).double() * q.global_scale
    y = (x.double().view(256, 32, 16) / step.unsqueeze(-1)).abs().flatten(1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    at_tie = ((y.unsqueeze(-1) - ties).abs() < 1e-6 * ties).any(-1)
    alike = (scale == q.scale).repeat_interleave(16, dim=1) & ~at_tie
    assert alike.float().mean() > 0.9
    assert torch.equal(nvfp4.unpack(q.packed)[alike], nvfp4.unpack(packed.view(q.packed.shape))[alike])


@pytest.mark.parametrize("name", ORDINARY)
def test_compressed_tensors_decodes_the_same_values(name):
    compressor = peer("compressed_tensors.compressors.nvfp4", "compressed-tensors").NVFP4PackedCompressor
    preset = peer("compressed_tensors.quantization.quant_scheme", "compressed-tensors").preset_name_to_scheme
    x = ordinary(name)
    g = torch.exp2(nvfp4.global_scale(x).log2().ceil())  # it stores 1/g, which is exact for a power of two
    q = nvfp4.quantize(x, global_scale=g)
    tensors = {
        "weight_packed": q.packed,
        "weight_scale": q.scale.view(torch.float8_e4m3fn),
        "weight_global_scale": g.reciprocal().view(1),
    }
    decoded = compressor.decompress(tensors, preset("NVFP4A16", ["Linear"]))["weight"]
    assert torch.equal(decoded.view(torch.int16), nvfp4.dequantize(q, decoded.dtype).view(torch.int16))
