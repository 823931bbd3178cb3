import random

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import StdConv2d
from torch import nn

from fp4fx.errors import TraceError
from fp4fx.trace import trace
from tests.traced import (
    QKV,
    Branches,
    Calling,
    Cross,
    Deciding,
    DifferentWidths,
    Forgetful,
    Normed,
    Pyramid,
    Regions,
    Residual,
    Routed,
    SelfAndCross,
    Tied,
    Upsampler,
    on_meta,
    small_llama,
)

IMAGE = (1, 3, 224, 224)
IDS = torch.zeros(1, 5, dtype=torch.long)
MODELS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8)),
    "residual": lambda: (Residual(), torch.randn(1, 8, 6, 6)),
    "upsampler": lambda: (Upsampler(), torch.randn(1, 3, 8, 8)),
    "tied": lambda: (Tied(), IDS),
    "normed": lambda: (Normed(), torch.randn(2, 4, 5, 5)),
    "attention": lambda: (SelfAndCross(), torch.randn(2, 3, 8)),
    "widths": lambda: (DifferentWidths(), torch.randn(2, 3, 8)),
    "pyramid": lambda: (Pyramid(), torch.randn(2, 4)),
    "qkv": lambda: (QKV(), torch.randn(2, 3, 8)),
    "regions": lambda: (Regions(), torch.randn(2, 4)),
    "encoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False),
        torch.randn(2, 3, 8),
    ),
    "resnet50": lambda: (on_meta(timm.create_model, "resnet50"), torch.zeros(IMAGE)),
    "vit": lambda: (on_meta(timm.create_model, "vit_tiny_patch16_224", depth=2), torch.zeros(IMAGE)),
    "beit": lambda: (on_meta(timm.create_model, "beit_base_patch16_224", depth=2), torch.zeros(IMAGE)),
    "swinv2": lambda: (
        on_meta(timm.create_model, "swinv2_tiny_window8_256", depths=(1, 2, 1, 1)),
        torch.zeros(1, 3, 256, 256),
    ),
    "convnext": lambda: (on_meta(timm.create_model, "convnext_atto"), torch.zeros(IMAGE)),
    "resnetv2": lambda: (on_meta(timm.create_model, "resnetv2_50", conv_layer=StdConv2d), torch.zeros(IMAGE)),
    "same_padding": lambda: (on_meta(timm.create_model, "tf_mobilenetv3_small_100"), torch.zeros(IMAGE)),
    "vit_b_16": lambda: (on_meta(torchvision.models.vit_b_16), torch.zeros(IMAGE)),
    "swin_t": lambda: (on_meta(torchvision.models.swin_t), torch.zeros(IMAGE)),
    "llama": lambda: (small_llama(), IDS),
    "tied_llama": lambda: (small_llama(tie_word_embeddings=True), IDS),
}


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_and_export_agree(name):
    model, inputs = MODELS[name]()
    symbolic, exported = trace(model), trace(model, inputs)
    assert exported.opaque == ()
    assert {(s.parameter, s.op) for s in symbolic.sites} == {(s.parameter, s.op) for s in exported.sites}
    for mine, theirs in zip(symbolic.sites, exported.sites, strict=True):
        for field in ("parameter", "shape", "order", "groups", "index", "called_in", "own_input", "tied", "siblings"):
            assert getattr(mine, field) == getattr(theirs, field), (mine.parameter, field)
    assert {n.name for n in symbolic.unreached} == {n.name for n in exported.unreached}
    weights = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert weights <= {s.parameter for s in exported.sites} | {n.name for n in exported.unreached}


def both(model, inputs):
    return trace(model), trace(model, inputs)


def test_mlp():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for result in both(model, torch.randn(2, 8)):
        first, last = result.sites
        assert (first.parameter, first.op, first.rows, first.called_in, first.own_input) == (
            "0.weight",
            "linear",
            (16, 8),
            "0",
            True,
        )
        assert (last.parameter, last.index, last.numel) == ("2.weight", 1, 64)
        assert first.kurtosis == pytest.approx(-1.2, abs=0.5)  # uniform
        assert result.unreached == result.opaque == ()


def test_residual():
    for result in both(Residual(), torch.randn(1, 8, 6, 6)):
        sites = {s.parameter: s for s in result.sites}
        assert list(sites) == ["conv1.weight", "bn1.weight", "conv2.weight", "bn2.weight", "skip.weight"]
        assert sites["conv1.weight"].siblings == ("skip.weight",)
        assert sites["skip.weight"].siblings == ("conv1.weight",)
        assert sites["conv2.weight"].own_input  # through the padding
        assert sites["bn1.weight"].op == sites["bn2.weight"].op == "norm"
        assert not sites["bn1.weight"].own_input


def test_transposed_convolution():
    for result in both(Upsampler(), torch.randn(1, 3, 8, 8)):
        up = result.sites[1]
        assert (up.op, up.order, up.shape, up.groups) == ("conv_transpose2d", "conv_transpose", (8, 2, 2, 2), 2)
        assert (up.rows, up.channels, up.own_input) == ((4, 16), 4, True)
        assert result.sites[2].op == "norm"


def test_tied_twice_and_never():
    for result in both(Tied(), IDS):
        assert [(s.parameter, s.op, s.called_in, s.own_input, s.tied) for s in result.sites] == [
            ("embed.weight", "embedding", "embed", False, ("head.weight",)),
            ("twice.weight", "linear", "twice", True, ()),
            ("twice.weight", "linear", "twice", True, ()),
            ("embed.weight", "linear", "head", True, ("head.weight",)),
        ]
        assert [(n.name, n.reason) for n in result.unreached] == [("never.weight", "never called in the trace")]


def test_transformed_weights():
    model = Normed()
    for training in (False, True):
        for result in both(model.train(training), torch.randn(2, 4, 5, 5)):
            assert [(s.parameter, s.op, s.transform is not None, s.refusal) for s in result.sites] == [
                ("std.weight", "conv2d", True, None),
                ("new.parametrizations.weight.original1", "conv2d", True, None),
                ("old.weight_v", "linear", True, None),
                ("spectral.parametrizations.weight.original", "linear", True, None),
                ("old_spectral.weight_orig", "linear", True, None),
            ]
            assert result.sites[0].transform == "batch_norm"
            assert result.sites[0].own_input
            reasons = {n.name: n.reason for n in result.unreached}
            assert reasons["old.weight_g"] == "part of the weight that is made from old.weight_v"


def test_weights_that_the_parent_uses():
    model, image = MODELS["beit"]()
    for result in both(model, image):
        qkv = [s for s in result.sites if s.parameter.endswith("qkv.weight")]
        assert [(s.parameter, s.op, s.called_in, s.own_input) for s in qkv] == [
            (f"blocks.{i}.attn.qkv.weight", "linear", f"blocks.{i}.attn", False) for i in range(2)
        ]


def test_a_parent_that_reads_a_weight_and_fails_keeps_it():
    attention = trace(on_meta(torchvision.models.swin_t)).sites
    qkv = next(s for s in attention if s.parameter == "features.1.0.attn.qkv.weight")
    assert (qkv.called_in, qkv.own_input) == ("features.1.0.attn", False)


def test_attention():
    for result in both(SelfAndCross(), torch.randn(2, 3, 8)):
        uses = [(s.parameter, s.called_in, s.own_input) for s in result.sites if s.op == "linear"]
        assert uses == [
            ("own.in_proj_weight", "own", False),
            ("own.out_proj.weight", "own", False),
            ("cross.in_proj_weight", "cross", False),  # q
            ("cross.in_proj_weight", "cross", False),  # k and v
            ("cross.out_proj.weight", "cross", False),
            ("encoder.self_attn.in_proj_weight", "encoder.self_attn", False),
            ("encoder.self_attn.out_proj.weight", "encoder.self_attn", False),
            ("encoder.linear1.weight", "encoder.linear1", True),
            ("encoder.linear2.weight", "encoder.linear2", True),
        ]
        assert all(s.transform is None and s.order == "rows" for s in result.sites)


def test_attention_of_different_widths():
    for result in both(DifferentWidths(), torch.randn(2, 3, 8)):
        assert [s.attribute for s in result.sites] == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "weight"]


@pytest.mark.parametrize(
    ("options", "projections"),
    [
        ({}, ["in_proj_weight"] * 3),
        ({"kind": Calling}, ["in_proj_weight"] * 3),
        ({"bias": False, "add_zero_attn": True}, ["in_proj_weight"] * 3),
        ({"add_bias_kv": True}, ["in_proj_weight"] * 3),
        ({"kdim": 6}, ["q_proj_weight", "k_proj_weight", "v_proj_weight"]),
        ({"kdim": 6, "vdim": 5, "add_bias_kv": True}, ["q_proj_weight", "k_proj_weight", "v_proj_weight"]),
    ],
)
def test_attention_between_three_values(options, projections):
    sources = torch.randn(2, 4, options.get("kdim", 8)), torch.randn(2, 4, options.get("vdim", 8))
    symbolic, exported = both(Cross(**options), (torch.randn(2, 3, 8), *sources))
    for result in (symbolic, exported):
        assert [s.attribute for s in result.sites] == [*projections, "weight"]
        assert {(s.op, s.order, s.called_in, s.own_input) for s in result.sites} == {
            ("linear", "rows", "attend", False)
        }
        assert result.opaque == ()
    assert [s.parameter for s in symbolic.sites] == [s.parameter for s in exported.sites]
    assert symbolic.unreached == exported.unreached
    biases = ["attend.bias_k", "attend.bias_v"] if "add_bias_kv" in options else []
    assert [n.name for n in symbolic.unreached] == biases


def test_attention_that_fails_before_it_projects():
    result = trace(Cross(Deciding))
    assert [(s.attribute, s.called_in) for s in result.sites] == [
        *[("in_proj_weight", "attend")] * 3,
        ("weight", "attend"),
    ]
    assert [n.name for n in result.opaque] == ["attend"]
    assert result.unreached == ()


def test_the_classes_are_left_as_they_were():
    before = nn.Module.__call__, nn.MultiheadAttention.forward
    trace(Cross())
    assert (nn.Module.__call__, nn.MultiheadAttention.forward) == before


def test_siblings():
    for result in both(QKV(), torch.randn(2, 3, 8)):
        sites = {s.attribute if s.op == "norm" else s.module: s for s in result.sites}
        assert sites["q"].siblings == ("k.weight", "v.weight")
        assert sites["v"].siblings == ("q.weight", "k.weight")
        assert sites["o"].siblings == ()
        assert sites["q"].activation == sites["k"].activation != sites["o"].activation


def test_data_dependent_python_is_opaque_and_its_layers_are_found():
    result = trace(Routed())
    assert [s.parameter for s in result.sites] == [
        "first.weight",
        "router.gate.weight",
        "router.left.weight",
        "router.right.0.weight",
        "router.right.2.weight",
        "last.weight",
    ]
    assert all(s.own_input for s in result.sites)
    assert [n.name for n in result.opaque] == ["router"]
    assert result.opaque[0].reason.startswith("cannot be followed without inputs: TraceError: ")
    assert [(n.name, n.reason) for n in result.unreached] == [
        ("router.weight", "not used before router could not be traced any further")
    ]


def test_what_only_an_optional_argument_leads_to_is_found_behind_an_opaque_module():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.cross = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, memory=None):
            return self.own(x) if memory is None else self.own(x) + self.cross(memory)

    class Translate(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Attend(), Attend()])

        def forward(self, x, memory):
            if x.sum() > 0:
                x = -x
            for block in self.blocks:
                x = block(x, memory)
            return x

    result = trace(Translate())
    assert [s.parameter for s in result.sites] == [f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("own", "cross")]
    assert result.unreached == ()


def test_export_that_fails_says_so_and_the_layers_are_found():
    result, without = trace(Routed(), torch.randn(2, 4)), trace(Routed())
    assert [s.parameter for s in result.sites] == [s.parameter for s in without.sites]
    assert [n.name for n in result.opaque] == ["", "router"]
    assert result.opaque[0].reason.startswith("torch.export failed, so the example inputs were not used: ")


def test_example_inputs_that_do_not_fit_are_named():
    result = trace(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 7))
    assert [s.parameter for s in result.sites] == ["0.weight"]
    assert result.opaque[0].name == ""


def test_lists_and_dictionaries():
    for result in both(Pyramid(), torch.randn(2, 4)):
        assert [s.module for s in result.sites] == [
            *("levels.0.a", "levels.0.b", "levels.1.a", "levels.1.b", "levels.0.a", "levels.0.b"),
            *("heads.a", "heads.b"),
        ]
        assert result.opaque == ()


def test_branches():
    assert [s.parameter for s in trace(Branches(), torch.randn(2, 4)).sites] == ["yes.weight", "no.weight"]
    assert [s.parameter for s in trace(Branches()).sites] == ["yes.weight", "no.weight"]


def test_what_calls_a_module_for_any_arguments():
    (site,) = trace(nn.DataParallel(nn.Linear(4, 4))).sites
    assert (site.parameter, site.own_input) == ("module.weight", True)


def test_graph_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(2, 4)
    for graph_module in (torch.fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        for result in both(graph_module, x):
            assert [s.parameter for s in result.sites] == ["0.weight", "2.weight"]


def test_a_shared_module_has_its_first_name():
    first = nn.Linear(4, 4)
    model = nn.Sequential(first, nn.ReLU(), first)
    for result in both(model, torch.randn(2, 4)):
        assert [(s.parameter, s.called_in, s.own_input, s.tied) for s in result.sites] == [
            ("0.weight", "0", True, ("2.weight",)),
            ("0.weight", "0", True, ("2.weight",)),
        ]


def test_a_layer_that_changes_its_input_does_not_own_it():
    class Rectified(nn.Linear):
        def forward(self, x):
            return F.linear(x.relu(), self.weight, self.bias)

    for result in both(nn.Sequential(Rectified(4, 4)), torch.randn(2, 4)):
        assert [s.own_input for s in result.sites] == [False]


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 4), lambda: nn.GRU(4, 4), lambda: nn.RNN(4, 4)])
def test_recurrent_layers_are_noted(make):
    for result in both(make(), torch.randn(3, 2, 4)):
        assert result.sites == ()
        assert [(n.name, n.reason) for n in result.unreached] == [
            ("weight_ih_l0", "recurrent layers are not supported yet"),
            ("weight_hh_l0", "recurrent layers are not supported yet"),
        ]


def test_resnet50():
    model, image = MODELS["resnet50"]()
    for result in both(model, image):
        compute = [s for s in result.sites if s.op != "norm"]
        assert len(compute) == 54
        assert [compute[0].parameter, compute[-1].parameter] == ["conv1.weight", "fc.weight"]
        assert [s.parameter for s in compute[1:6]] == [
            "layer1.0.conv1.weight",
            "layer1.0.conv2.weight",
            "layer1.0.conv3.weight",
            "layer1.0.downsample.0.weight",
            "layer1.1.conv1.weight",
        ]
        assert all(s.own_input for s in compute)
        assert all(s.kurtosis is None for s in compute)  # on meta
        assert [s.index for s in result.sites] == list(range(len(result.sites)))


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    model = small_llama(tie_word_embeddings=tied)
    for result in (trace(model), trace(model, IDS), trace(model, example_kwargs={"input_ids": IDS})):
        modules = [s.called_in for s in result.sites if s.op == "linear"]
        expected = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        assert sorted(modules) == sorted(expected)
        assert modules[-1] == "lm_head"
        assert all(s.own_input for s in result.sites if s.op == "linear")
        k = next(s for s in result.sites if s.called_in == "model.layers.1.self_attn.k_proj")
        assert {name.rpartition("self_attn.")[2] for name in k.siblings} == {"q_proj.weight", "v_proj.weight"}


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 4)])
def test_the_model_is_left_as_it_was(inputs):
    model = Forgetful().train()
    model.fc.register_forward_hook(lambda module, args, output: output + 1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    trace(model, inputs)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert model.training
    assert model.norm.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, module in model.named_modules():
        assert list(module.__dict__) == list(attributes[name])
        assert all(value is attributes[name][key] for key, value in module.__dict__.items())
    assert type(model.fc._parameters) is dict
    assert (model.cache, model.features, model.calls) == (None, [], {"n": 0})
    assert model.plain == 0
    assert len(model.fc._forward_hooks) == 1
    assert nn.Module.__call__(model, torch.randn(2, 4)).shape == (2, 4)


def test_kurtosis():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].weight[0, 0] = 100.0
        model[1].weight[0, 0] = float("nan")
    outlier, broken = trace(model).sites
    assert outlier.kurtosis > 1000
    assert broken.kurtosis is None


def test_a_compiled_submodule_and_a_scripted_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    model[0].compile()
    result = trace(model)
    assert [s.parameter for s in result.sites][:2] == ["0.weight", "1.weight"]
    assert model[0]._compiled_call_impl is not None
    missing = {"2.0.weight"} - {s.parameter for s in result.sites}
    assert missing <= {n.name for n in result.unreached}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "resnet50", "expected a torch.nn.Module, found str"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "0.weight: a lazy parameter has no shape yet; run the model once"),
        (lambda: torch.jit.script(nn.Linear(4, 4)), "ScriptModule"),
        (lambda: torch.compile(nn.Linear(4, 4)), "compile afterwards"),
    ],
)
def test_what_cannot_be_traced(make, message):
    with pytest.raises(TraceError, match=message):
        trace(make())


def test_example_inputs_of_the_wrong_kind():
    with pytest.raises(TraceError, match="example_kwargs"):
        trace(nn.Linear(4, 4), {"input": torch.randn(2, 4)})
