import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fp4fx.canonical import canonical
from fp4fx.graph_sites import find_sites

aten = torch.ops.aten


class Draft:
    """A graph written by hand: parameters by name with their shapes, and one activation `x`."""

    def __init__(self, **shapes):
        self.graph = fx.Graph()
        self.parameters = {}
        for name, shape in shapes.items():
            node = self.graph.placeholder(name)
            node.meta["val"] = torch.empty(shape, device="meta")
            self.parameters[node] = name
            setattr(self, name, node)
        self.x = self.graph.placeholder("x")

    def call(self, op, *args, shape=None):
        node = self.graph.call_function(op, args)
        if shape is not None:
            node.meta["val"] = torch.empty(shape, device="meta")
        return node

    def find(self, **options):
        return find_sites(self.graph, self.parameters, **options)

    def site(self):
        (site,) = self.find().sites
        return site


def linear_of(draft, weight):
    draft.call(aten.linear.default, draft.x, weight, None)
    return draft.site()


def test_direct():
    d = Draft(w=(6, 5))
    node = d.call(aten.linear.default, d.x, d.w, None)
    found = d.find()
    assert found.nodes == (node,)
    site = found.sites[0]
    assert (site.parameter, site.op, site.shape, site.order, site.groups) == ("w", "linear", (6, 5), "rows", 1)
    assert (site.index, site.numel, site.rows, site.transform, site.refusal) == (0, 30, (6, 5), None, None)


@pytest.mark.parametrize(
    ("op", "args", "name", "order", "rows"),
    [
        (aten.conv1d.default, ([1], [0], [1], 2), "conv1d", "conv", (8, 12)),
        (aten.conv2d.padding, ([1, 1], "same", [1, 1], 2), "conv2d", "conv", (8, 12)),
        (aten.conv3d.default, ([1] * 3, [0] * 3, [1] * 3, 2), "conv3d", "conv", (8, 12)),
        (
            aten.conv_transpose2d.input,
            ([1, 1], [0, 0], [0, 0], 2, [1, 1]),
            "conv_transpose2d",
            "conv_transpose",
            (8, 12),
        ),
    ],
)
def test_convolutions(op, args, name, order, rows):
    shape = {"conv1d": (8, 3, 4), "conv2d": (8, 3, 2, 2), "conv3d": (8, 3, 1, 2, 2)}.get(name, (6, 4, 2, 2))
    d = Draft(w=shape)
    d.call(op, d.x, d.w, None, *args)
    site = d.site()
    assert (site.op, site.order, site.groups, site.rows, site.channels) == (name, order, 2, rows, 3)


def test_embedding_and_norms():
    d = Draft(table=(10, 4), a=(4,), b=(4,))
    y = d.call(aten.embedding.default, d.table, d.x)
    y = d.call(aten.layer_norm.default, y, [4], d.a, None, 1e-5, True)
    d.call(aten.batch_norm.default, y, d.b, None, None, None, False, 0.1, 1e-5, True)
    assert [(s.parameter, s.op, s.rows) for s in d.find().sites] == [
        ("table", "embedding", (10, 4)),
        ("a", "norm", (1, 4)),
        ("b", "norm", (1, 4)),
    ]


def test_views_casts_and_rows_are_no_transform():
    d = Draft(w=(6, 5))
    w = d.call(aten.to.dtype, d.w, torch.float16)
    w = d.call(aten.t.default, d.call(aten.transpose.int, w, 0, 1))
    w = d.call(operator.getitem, d.call(aten.chunk.default, w, 3), 1)
    w = d.call(aten.slice.Tensor, w, 0, 1)
    assert linear_of(d, d.call(aten.contiguous.default, w)).transform is None


def test_a_transpose_turns_the_blocks():
    d = Draft(w=(5, 6))
    site = linear_of(d, d.call(aten.t.default, d.w))
    assert (site.order, site.rows, site.channels, site.transform) == ("columns", (6, 5), 5, None)


def test_a_cut_through_rows_is_a_transform():
    d = Draft(w=(6, 5))
    assert linear_of(d, d.call(aten.slice.Tensor, d.w, 1, 0, 3)).transform == "slice"


def test_the_last_op_names_the_transform():
    d = Draft(w=(6, 5))
    w = d.call(aten.mul.Tensor, d.call(aten.tanh.default, d.w), 2.0)
    site = linear_of(d, d.call(aten.view.default, w, [6, 5]))
    assert (site.parameter, site.transform, site.refusal) == ("w", "mul", None)


def test_a_convolution_run_as_a_linear_keeps_the_order_of_its_parameter():
    d = Draft(w=(6, 5, 1, 1))
    site = linear_of(d, d.call(aten.view.default, d.w, [6, 5]))
    assert (site.order, site.rows, site.transform) == ("conv", (6, 5), None)


def test_one_of_a_stack_of_experts():
    d = Draft(w=(3, 6, 5))
    site = linear_of(d, d.call(aten.select.int, d.w, 0, 1))
    assert (site.order, site.rows, site.transform) == ("rows", (18, 5), None)


def test_weight_standardisation_is_a_transform_and_no_norm():
    d = Draft(w=(6, 5, 3, 3), gain=(6, 1, 1, 1))
    flat = d.call(aten.reshape.default, d.w, [1, 6, -1])
    gain = d.call(aten.view.default, d.gain, [-1])
    w = d.call(aten.batch_norm.default, flat, gain, None, None, None, True, 0.0, 1e-5, True, shape=(1, 6, 45))
    w = d.call(aten.view.default, w, [6, 5, 3, 3])
    d.call(aten.conv2d.default, d.x, w, None)
    found = d.find()
    assert [(s.parameter, s.op, s.transform) for s in found.sites] == [("w", "conv2d", "batch_norm")]
    assert [(n.name, n.reason) for n in found.notes] == [("gain", "part of the weight that is made from w")]


def test_a_norm_of_an_activation_is_a_norm():
    d = Draft(w=(6,))
    d.call(aten.rms_norm.default, d.x, [6], d.w)
    assert d.site().op == "norm"


def test_the_parameter_of_full_size_is_the_site():
    d = Draft(g=(6, 1), v=(6, 5))
    site = linear_of(d, d.call(aten._weight_norm.default, d.v, d.g, shape=(6, 5)))
    assert (site.parameter, site.transform, site.refusal) == ("v", "_weight_norm", None)
    assert [n.name for n in d.find().notes] == ["g"]


def test_several_parameters_in_one_weight_are_refused():
    d = Draft(q=(6, 5), k=(6, 5))
    d.call(aten.linear.default, d.x, d.call(aten.cat.default, [d.q, d.k], shape=(12, 5)), None)
    assert [(s.parameter, s.refusal) for s in d.find().sites] == [
        ("q", "q and k make one weight together"),
        ("k", "q and k make one weight together"),
    ]


def test_a_weight_that_depends_on_an_activation_is_refused():
    d = Draft(w=(4, 30))
    mixed = d.call(aten.view.default, d.call(aten.mul.Tensor, d.x, d.w), [6, 5])
    assert linear_of(d, mixed).refusal == "the weight depends on an activation"


def test_casting_to_the_dtype_of_an_activation_is_no_dependence():
    d = Draft(w=(6, 5))
    dtype = d.call(getattr, d.x, "dtype")
    assert linear_of(d, d.graph.call_method("to", (d.w, dtype))).refusal is None
    d = Draft(w=(6, 5))
    assert linear_of(d, d.graph.call_method("type_as", (d.w, d.x))).refusal is None


def test_a_weight_predicted_by_a_layer_leaves_the_layer_alone():
    for op in (lambda d: d.call(aten.linear.default, d.x, d.w, None), lambda d: d.call(aten.matmul.default, d.w, d.x)):
        d = Draft(w=(30, 4))
        d.call(aten.linear.default, d.x, d.call(aten.view.default, op(d), [6, 5]), None)
        site = d.site()
        assert (site.shape, site.order, site.refusal) == ((30, 4), "rows", None)


def test_a_buffer_in_the_weight_is_no_activation():
    d = Draft(w=(6, 5))
    mask = d.graph.placeholder("mask")
    d.call(aten.linear.default, d.x, d.call(aten.mul.Tensor, d.w, mask), None)
    (site,) = d.find(inputs=[d.x]).sites
    assert (site.transform, site.refusal) == ("mul", None)


@pytest.mark.parametrize(
    ("between", "normed_by", "rectified"),
    [
        ([], "g", False),
        ([aten.relu.default], "g", True),
        ([aten.dropout.default, aten.relu_.default, aten.flatten.using_ints], "g", True),
        ([aten.gelu.default], "", False),
        ([aten.relu.default, aten.gelu.default], "", False),
        ([aten.gelu.default, aten.relu.default], "", True),
    ],
)
def test_the_normalisation_ahead_of_an_activation(between, normed_by, rectified):
    d = Draft(w=(6, 5), g=(5,))
    x = d.call(aten.layer_norm.default, d.x, [5], d.g)
    for op in between:
        x = d.call(op, x)
    d.call(aten.linear.default, x, d.w, None)
    site = d.find().sites[-1]
    assert (site.parameter, site.normed_by, site.rectified) == ("w", normed_by, rectified)


@pytest.mark.parametrize(("low", "rectified"), [(0.0, True), (-1.0, False)])
def test_a_clamp_from_zero_is_a_rectifier(low, rectified):
    d = Draft(w=(6, 5))
    d.call(aten.linear.default, d.call(aten.hardtanh.default, d.x, low, 6.0), d.w, None)
    assert d.site().rectified is rectified


def test_siblings_read_one_activation():
    d = Draft(q=(6, 5), k=(6, 5), o=(5, 6), n=(5,))
    d.call(aten.layer_norm.default, d.x, [5], d.n, None, 1e-5, True)
    q = d.call(aten.linear.default, d.x, d.q, None)
    d.call(aten.linear.default, d.call(aten.dropout.default, d.x, 0.1, False), d.k, None)
    d.call(aten.linear.default, q, d.o, None)
    norm, q, k, o = d.find().sites
    assert q.activation == k.activation == norm.activation != o.activation
    assert (norm.siblings, q.siblings, k.siblings, o.siblings) == ((), ("k",), ("q",), ())


def test_one_site_per_use():
    d = Draft(w=(5, 5))
    d.call(aten.linear.default, d.call(aten.linear.default, d.x, d.w, None), d.w, None)
    found = d.find(tied={"w": ("head.w",)})
    assert [(s.parameter, s.index, s.tied, s.siblings) for s in found.sites] == [
        ("w", 0, ("head.w",), ()),
        ("w", 1, ("head.w",), ()),
    ]


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (aten.mul.Tensor, "used in mul, which is not a linear, a convolution or an embedding"),
        (aten.add.Tensor, "used in add, which is not a linear, a convolution or an embedding"),
    ],
)
def test_other_uses_are_noted(op, reason):
    d = Draft(w=(5, 5), bias=(5,), unused=(5, 5))
    d.call(op, d.x, d.call(aten.t.default, d.w))
    d.call(op, d.x, d.bias)
    found = d.find()
    assert found.sites == ()
    assert [(n.name, n.reason) for n in found.notes] == [("w", reason)]


def test_a_parameter_that_a_layer_reads_as_its_input_is_noted():
    d = Draft(latent=(5, 5), w=(5, 5))
    d.call(aten.linear.default, d.latent, d.w)
    found = d.find()
    assert [site.parameter for site in found.sites] == ["w"]
    assert [(n.name, n.reason) for n in found.notes] == [("latent", "used in linear, but not as its weight")]


def test_recurrent_layers_are_noted():
    d = Draft(ih=(16, 4), hh=(16, 4))
    d.call(aten.lstm.input, d.x, [d.x, d.x], [d.ih, d.hh], False, 1, 0.0, False, False, False)
    assert {n.name: n.reason for n in d.find().notes} == {
        "ih": "recurrent layers are not supported yet",
        "hh": "recurrent layers are not supported yet",
    }


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 8, 3, padding="same", groups=2)
        self.norm = nn.LayerNorm(4)
        self.raw = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        h = self.norm(x)
        h = self.q(h) * self.k(h)
        return self.conv(F.linear(h, self.raw).transpose(1, 2))


def test_reads_the_graph_of_dynamo():
    captured = []

    def capture(gm, _):
        captured.append(gm.graph)
        return gm

    torch.compile(Block(), backend=capture, fullgraph=True)(torch.randn(2, 3, 4))
    (graph,) = captured
    for node in graph.nodes:
        call = canonical(node.target, node.args, node.kwargs) if node.op.startswith("call") else None
        if call is not None:
            node.op = "call_function"
            node.target, node.args, node.kwargs = call
    parameters = {
        node: node.target.replace("_parameters_", ".")
        .removeprefix("L_self.")
        .removeprefix("L_self_modules_")
        .rstrip("_")
        for node in graph.nodes
        if node.op == "placeholder" and "_parameters_" in node.target
    }
    found = find_sites(graph, parameters, stock={"q", "k", "conv"})
    assert [(s.parameter, s.op, s.called_in, s.own_input, s.groups) for s in found.sites] == [
        ("norm.weight", "norm", "norm", False, 1),
        ("q.weight", "linear", "q", True, 1),
        ("k.weight", "linear", "k", True, 1),
        ("raw", "linear", "", False, 1),
        ("conv.weight", "conv1d", "conv", True, 2),
    ]
    assert found.sites[1].siblings == ("k.weight",)
    assert find_sites(graph, parameters).sites[1].own_input is False
