"""timm's ways to call a model, and torchvision's detectors on lists of images."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import fp4fx

POLICY = fp4fx.Policy(compute="fp32")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def test_forward_features_and_forward_head():
    q, x = fp4fx.quantize(timm.create_model("test_vit").eval(), POLICY), torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        features = q.forward_features(x)
        close(q.forward_head(features), q(x))
        compiled = torch.compile(q.forward_features, backend="fp4fx", fullgraph=True)
        close(compiled(x), features)


def test_features_only():
    q = fp4fx.quantize(timm.create_model("test_resnet", features_only=True).eval(), POLICY)
    x = torch.randn(2, 3, 160, 160)
    compiled = torch.compile(q, backend="fp4fx", fullgraph=True)
    with torch.no_grad():
        expected, found = q(x), compiled(x)
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def test_torchvisions_feature_extractor_of_a_quantized_model():
    from torchvision.models.feature_extraction import create_feature_extractor

    q, x = fp4fx.quantize(torchvision.models.resnet18().eval(), POLICY), torch.randn(1, 3, 64, 64)
    extractor = create_feature_extractor(q, {"layer2": "a", "layer4": "b"})
    with torch.no_grad():
        found = extractor(x)
        seen = q.layer2(q.layer1(q.maxpool(q.relu(q.bn1(q.conv1(x))))))
    close(found["a"], seen)
    assert not [
        t
        for n, t in extractor.state_dict().items()
        if n.startswith("layer3.0.conv") and t.is_floating_point() and t.dim()
    ]


class Backbone(nn.Module):
    """Two levels of features for a detector."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, stride=4)
        self.deep = nn.Conv2d(32, 32, 3, stride=2, padding=1)

    def forward(self, x):
        fine = torch.relu(self.stem(x))
        return {"fine": fine, "coarse": torch.relu(self.deep(fine))}


def test_detection_on_lists_of_images():
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    model = RetinaNet(
        Backbone(), 4, anchor_generator=anchors, min_size=48, max_size=96, score_thresh=0.0, detections_per_img=5
    )
    q = fp4fx.quantize(model.eval(), POLICY)
    lists = [[torch.rand(3, 40, 60)], [torch.rand(3, 64, 48), torch.rand(3, 90, 60), torch.rand(3, 50, 50)]]
    with torch.no_grad():
        expected = [q(images) for images in lists]
        q.backbone.compile(backend="fp4fx", dynamic=True)
        for images, detections in zip(lists, expected, strict=True):
            found = q(images)
            assert len(found) == len(images)
            for a, b in zip(found, detections, strict=True):
                close(a["scores"], b["scores"])
                assert a["boxes"].shape == b["boxes"].shape == (5, 4)
    assert {row.parameter for row in fp4fx.report(q).rows if row.kernels} == {"backbone.deep.weight"}
