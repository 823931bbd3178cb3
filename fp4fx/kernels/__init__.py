"""Ways to run the ops, by provider. The order below is the order of preference; the reference body is always last."""

from fp4fx.kernels import cpu, inductor, reference, scaled_mm, triton
from fp4fx.kernels.triton import eager
from fp4fx.registry import Kernel

KERNELS: tuple[Kernel, ...] = (
    cpu.KERNEL,  # decoding inside the product, at every instruction set of x86-64
    scaled_mm.KERNEL,  # the library's product of two sides in 4 bits, on GPUs that have one
    triton.KERNEL,  # decoding inside the product on NVIDIA GPUs
    inductor.KERNEL,  # decoding fused by Inductor into one loop, then the library's matmul or convolution
    reference.KERNEL,  # the op's own body, which takes everything
)

eager.register()
