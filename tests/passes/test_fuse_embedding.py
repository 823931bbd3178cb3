import torch
import torch.nn.functional as F
from torch import nn

from fp4fx.passes.canonicalize import canonicalize
from fp4fx.passes.fuse_embedding import fuse_embedding
from tests.passes.graphs import Captured, packed


def test_an_embedding_gathers_packed_rows():
    table = packed(nn.Embedding(50, 24, padding_idx=0))
    g = Captured(table, torch.tensor([[1, 0], [49, 7]]))
    assert g.apply(canonicalize, fuse_embedding) == 1
    assert (g.count("fp4fx.embedding"), g.count("fp4fx.dequantize")) == (1, 0)
    g.check(0)


def test_rows_of_another_computation_are_left_alone():
    table = packed(nn.Embedding(50, 24))
    g = Captured(lambda i: F.embedding(i, table.weight * 2), torch.tensor([1, 2]))
    assert g.apply(canonicalize, fuse_embedding) == 0
    g.check(0)
