"""The ops `fp4fx::*`: schemas, reference bodies, fakes, autograd, vmap. Kernels live elsewhere.

The functions here are the bodies, which are the ops' meaning; `torch.ops.fp4fx.<name>` are the ops a graph holds.
"""

from fp4fx.ops.autograd import register_autograd
from fp4fx.ops.batching import register_batching
from fp4fx.ops.codec import dequantize, fake_quantize, quantize
from fp4fx.ops.compute import conv, conv_transpose, embedding, linear

__all__ = ["conv", "conv_transpose", "dequantize", "embedding", "fake_quantize", "linear", "quantize"]

register_autograd()
register_batching(__all__)
