"""Ways to run the ops, by provider. The order below is the order of preference; the reference body is always last."""

from fp4fx.kernels import cpu, inductor, reference, triton
from fp4fx.registry import Kernel

KERNELS: tuple[Kernel, ...] = (
    cpu.KERNEL,  # decoding inside the product, at every instruction set of x86-64
    triton.KERNEL,  # the same on NVIDIA GPUs
    inductor.KERNEL,  # decoding fused by Inductor into one loop, then the library's matmul or convolution
    reference.KERNEL,  # the op's own body, which takes everything
)
