"""The passes of the compiler, in the one order they run, with the reason for each place."""

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.channels_last import channels_last
from fp4fx.passes.expose_qdq import expose_qdq
from fp4fx.passes.fold_norms import fold_norms
from fp4fx.passes.fold_parameters import fold_parameters
from fp4fx.passes.fold_views import fold_views
from fp4fx.passes.fold_weights import fold_weights
from fp4fx.passes.fuse_conv import fuse_conv
from fp4fx.passes.fuse_dense import fuse_dense
from fp4fx.passes.fuse_embedding import fuse_embedding
from fp4fx.passes.fuse_epilogue import fuse_epilogue
from fp4fx.passes.fuse_linear import fuse_linear
from fp4fx.passes.fuse_product import fuse_product
from fp4fx.passes.insert_qdq import insert_qdq
from fp4fx.passes.merge_qdq import merge_qdq
from fp4fx.passes.narrow import narrow
from fp4fx.passes.open_attention import open_attention
from fp4fx.passes.restride import restride
from fp4fx.passes.select_kernels import select_kernels
from fp4fx.pipeline import Dialect, Pass

PASSES: tuple[Pass, ...] = (
    Pass(open_attention, "first: it uncovers linears that all later passes want to see"),
    Pass(canonicalize, "one spelling per op, so that every later pass matches one target"),
    Pass(insert_qdq, "needs canonical ops to find sites; does nothing for a model that is quantized already"),
    Pass(
        expose_qdq, "splits fake_quantize where no gradient flows, so that halves can be shared and folded", Dialect.QDQ
    ),
    Pass(merge_qdq, "before fusion, while equal quantizes are still separate nodes"),
    Pass(fold_weights, "after merging, so that a shared weight is stored once", Dialect.QDQ),
    Pass(fold_views, "once weights are stored, so that a part of one is a view of its codes", Dialect.QDQ),
    Pass(fuse_linear, "from here on a dequantize disappears into the op that reads it"),
    Pass(fuse_product, "independent of the other fusions"),
    Pass(fuse_conv, "independent of the other fusions"),
    Pass(fuse_embedding, "independent of the other fusions", Dialect.FUSED),
    Pass(fuse_epilogue, "after the fusions, whose ops take the epilogues"),
    Pass(fold_norms, "for the convolutions that are left dense, before their formats are asked for"),
    Pass(channels_last, "once all convolutions have their inputs, and after epilogues, which read images too"),
    Pass(narrow, "after the epilogues, whose parts are of one dtype; before restride: a cast closes gaps in memory"),
    Pass(
        fuse_dense,
        "behind `narrow`, which knows ATen's convolutions, before `restride`: its op has a format of its own",
    ),
    Pass(restride, "after the last pass that changes what an op answers in"),
    Pass(select_kernels, "chooses an implementation for every fp4fx op that is left"),
    Pass(fold_parameters, "last: takes out what all others have left to compute from parameters alone"),
)

AS_CAPTURED = tuple(step for step in PASSES if step.name == "select_kernels")
"""Those for a graph whose values are not what they seem (distributed tensors, batches of torch.vmap)."""
