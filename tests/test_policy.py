import ast
import dataclasses
import inspect
import json

import pytest

from fp4fx.errors import PolicyError
from fp4fx.patterns import matches
from fp4fx.policy import Policy
from fp4fx.site import Site


def site(parameter="layer1.0.conv1.weight", op="conv2d", **changes):
    fields = {"shape": (8, 4, 3, 3), "order": "conv", "numel": 288}
    return Site(parameter=parameter, op=op, **{**fields, **changes})


def test_every_field_has_a_docstring():
    body = ast.parse(inspect.getsource(Policy)).body[0].body
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert {body[i].target.id for i in fields} == {f.name for f in dataclasses.fields(Policy)}
    for i in fields:
        assert isinstance(body[i + 1], ast.Expr), body[i].target.id
        assert isinstance(body[i + 1].value.value, str), body[i].target.id


def test_is_frozen_keyword_only_hashable_and_replaceable():
    policy = Policy(overrides={"a.*": {"block": [16, 16]}}, include=["a.*"], block=[1, 16])
    assert hash(policy) == hash(dataclasses.replace(policy))
    assert dataclasses.replace(policy, skip_first=0).include == ("a.*",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.skip_first = 2
    with pytest.raises(TypeError):
        Policy("nvfp4")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weights": "int4"}, ["Policy.weights", "'int4'", "'nvfp4' or None"]),
        ({"activations": True}, ["Policy.activations", "True"]),
        ({"scale_rule": "mse"}, ["Policy.scale_rule", "'search'"]),
        ({"scale_rule": "search", "block": (16, 16)}, ["scale_rule='search' needs block=(1, 16)"]),
        ({"scale_rule": "four_over_six", "block": (16, 16)}, ["'four_over_six' needs block=(1, 16)", "hardly gains"]),
        ({"activation_scale_rule": None}, ["Policy.activation_scale_rule", "None", "'four_over_six_mae'"]),
        ({"block": (1, 32)}, ["Policy.block", "(1, 32)", "(16, 16)"]),
        ({"on_fallback": "ignore"}, ["Policy.on_fallback", "'raise'"]),
        ({"skip_first": -1}, ["Policy.skip_first", "-1", "0 or more"]),
        ({"skip_last": True}, ["Policy.skip_last", "True"]),
        ({"min_channels": 1.5}, ["Policy.min_channels", "1.5"]),
        ({"skip_norms": 1}, ["Policy.skip_norms", "True or False"]),
        ({"max_kurtosis": float("nan")}, ["Policy.max_kurtosis", "None for no limit"]),
        ({"min_sqnr": "20"}, ["Policy.min_sqnr", "'20'"]),
        ({"include": 3}, ["Policy.include", "3", "list of patterns"]),
        ({"exclude": [""]}, ["Policy.exclude", "''"]),
        ({"exclude": "re:(a"}, ["Policy.exclude", "'re:(a'", "regular expression"]),
        ({"keep": ["head"]}, ["Policy.keep", "{pattern: reason}"]),
        ({"keep": {"head": 3}}, ["Policy.keep", "{pattern: reason}"]),
        ({"keep": {"re:(a": "why"}}, ["Policy.keep", "regular expression"]),
        ({"overrides": {"a.*": {"keep": {"a.b": "why"}}}}, ["'keep'", "whole model"]),
        ({"include": "op:attention"}, ["Policy.include", "'op:attention'", "linear"]),
        ({"weights": None, "activations": "nvfp4"}, ["weights=None contradicts activations='nvfp4'"]),
        ({"overrides": ["a.*"]}, ["Policy.overrides", "{pattern: {field: value}}"]),
        ({"overrides": {"a.*": 3}}, ["Policy.overrides['a.*']", "{field: value}"]),
        ({"overrides": {"a.*": {"min_nume": 3}}}, ["Policy.overrides['a.*']", "did you mean 'min_numel'?"]),
        ({"overrides": {"a.*": {"min_numel": -3}}}, ["Policy.overrides['a.*']", "Policy.min_numel", "-3"]),
        ({"overrides": {"a.*": {"skip_first": 0}}}, ["Policy.overrides['a.*']", "'skip_first'", "whole model"]),
        ({"overrides": {"a.*": {"scale_rule": "min"}}}, ["Policy.overrides['a.*']", "Policy.scale_rule", "'min'"]),
        ({"overrides": [("a", {}), ("a", {})]}, ["'a' stands there twice"]),
    ],
)
def test_errors_name_the_field_and_what_was_expected(fields, words):
    with pytest.raises(PolicyError) as error:
        Policy(**fields)
    for word in words:
        assert word in str(error.value)


def test_near_misses_of_the_contradictions_are_fine():
    assert Policy(weights=None).activations is None
    assert Policy(skip_norms=False, min_sqnr=20, max_kurtosis=3.5, block=(16, 16), activations="nvfp4-static")
    assert Policy.w4a4(overrides={"head": {"weights": None}}).overridden("head").activations is None


def test_presets():
    assert Policy.weight_only() == Policy()
    assert Policy.w4a4(skip_last=0) == Policy(activations="nvfp4", skip_last=0)
    segmentation = Policy.segmentation()
    assert (segmentation.skip_first, segmentation.skip_last, segmentation.skip_norms) == (0, 1, True)
    assert [matches(segmentation.include[0], site(op=op)) for op in ("conv2d", "conv_transpose3d", "linear")] == [
        True,
        True,
        False,
    ]
    with pytest.raises(PolicyError, match="unknown field 'skip_frist'; did you mean 'skip_first'"):
        Policy.segmentation(skip_frist=1)


def test_dict_round_trip_keeps_the_order_of_overrides():
    policy = Policy(
        include="b.*", overrides={"b.1": {"block": (16, 16)}, "a": {"weights": None}, "re:c.*": {}}, block=(16, 16)
    )
    data = policy.to_dict()
    assert Policy.from_dict(json.loads(json.dumps(data, sort_keys=True))) == policy
    assert [p for p, _ in policy.overrides] == ["b.1", "a", "re:c.*"]
    with pytest.raises(PolicyError, match="found list"):
        Policy.from_dict([])


def test_a_callable_is_not_serialised_but_resolves_to_names():
    small = Policy(
        exclude=lambda s: s.numel < 100,
        keep={lambda s: s.op == "linear": "a", r"re:fc\.weight|fc2\.weight": "b"},
        overrides={lambda s: s.op == "linear": {"block": (16, 16)}},
    )
    with pytest.raises(PolicyError, match="callable"):
        small.to_dict()
    sites = [site(), site("fc.weight", "linear", numel=64), site("fc2.weight", "linear")]
    resolved = small.resolved(sites)
    assert resolved.exclude == (r"re:fc\.weight",)
    assert resolved.keep == ((r"re:fc\.weight|fc2\.weight", "a"),)  # the first of two stands
    assert resolved.overrides[0][0] == r"re:fc\.weight|fc2\.weight"
    assert Policy.from_dict(resolved.to_dict()) == resolved


def test_toml_from_text_and_file(tmp_path):
    text = """
    activations = "nvfp4"
    skip_first = 2
    exclude = ["re:.*head.*"]
    keep."stem.*" = "costs 9 dB"
    [overrides."layer1.*"]
    block = [16, 16]
    [overrides."op:embedding"]
    embeddings = true
    """
    expected = Policy(
        activations="nvfp4",
        skip_first=2,
        exclude=("re:.*head.*",),
        keep=(("stem.*", "costs 9 dB"),),
        overrides={"layer1.*": {"block": (16, 16)}, "op:embedding": {"embeddings": True}},
    )
    path = tmp_path / "policy.toml"
    path.write_text(text)
    assert Policy.from_toml(text) == Policy.from_toml(path) == Policy.from_toml(str(path)) == expected
    with pytest.raises(PolicyError, match="unknown field 'skip_norm'; did you mean 'skip_norms'"):
        Policy.from_toml("skip_norm = true")
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.from_toml("skip_first = ")
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.from_toml(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer1.0.conv1.weight", True),
        ("layer1.0.conv1", True),
        ("layer1.*", True),
        ("Layer1.*", False),
        ("layer1", False),
        ("head", True),  # a tied tensor answers to all of its names
        ("re:layer\\d\\.0\\.conv1", True),
        ("re:layer", False),
        ("op:conv*", True),
        ("op:conv1d", False),
        (lambda s: s.numel == 288, True),
        (lambda s: s.op == "linear", False),
    ],
)
def test_patterns(pattern, expected):
    assert matches(pattern, site(tied=("head.weight",))) is expected


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names():
    sites = [site(), site("layer2.0.conv1.weight"), site("fc.weight", "linear")]
    with pytest.raises(PolicyError, match=r"Policy.exclude: pattern 'layer2.0.conv2' .*layer2.0.conv1"):
        Policy(exclude="layer2.0.conv2").require_matches(sites)
    with pytest.raises(PolicyError, match=r"'layer1' .*names a container; .*'layer1\.\*'"):
        Policy(include="layer1").require_matches(sites)
    with pytest.raises(PolicyError, match=r"'op:embedding' .*ops of this model: conv2d, linear"):
        Policy(overrides={"op:embedding": {"embeddings": True}}).require_matches(sites)
    with pytest.raises(PolicyError, match=r"Policy.keep: pattern 'fcc' .*fc"):
        Policy(keep={"fcc": "why"}).require_matches(sites)
    with pytest.raises(PolicyError, match="returned False for all 3 sites"):
        Policy(include=lambda s: False).require_matches(sites)
    Policy(exclude=("fc", "aux.fc"), include="op:conv*").require_matches(sites, ["aux.fc"])
    with pytest.raises(PolicyError, match=r"aux\.fc"):
        Policy(include="aux.fc").require_matches(sites, ["aux.fc"])
