"""Any backbone as a student: names in two spellings, strides found by dry runs, errors before anything is trained."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from edgekd import checkpoint, students
from edgekd.errors import UsageError
from edgekd.models.sam import Sam
from edgekd.students import backbones

NEEDS_TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason=f"timm is not installed: {backbones.INSTALL}")
MODULE = "edgekd_test_backbones"
CODE = '''
import torch
from torch import nn

class Net(nn.Module):
    """Maps of the given strides, as a list, tuple, dict or alone."""
    def __init__(self, strides=(4, 8, 16, 32), kind=list, last=False, side=None):
        super().__init__()
        self.kind, self.last, self.side = kind, last, side
        self.convs = nn.ModuleList(nn.Conv2d(3, 8 + i, s, s) for i, s in enumerate(strides))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        if self.side and x.shape[-1] != self.side:
            raise ValueError(f"only {self.side} px")
        maps = [c(x) for c in self.convs]
        maps[0] = self.bn(maps[0])
        maps = [m.permute(0, 2, 3, 1) for m in maps] if self.last else maps
        return maps[0] if self.kind is None else {str(i): m for i, m in enumerate(maps)} if self.kind is dict else self.kind(maps)

def whole(): return Net()
def as_tuple(): return Net(kind=tuple)
def as_dict(): return Net(kind=dict)
def alone(): return Net((16,), kind=None)
def channels_last(): return Net(last=True)
def fine(): return Net((4, 8))
def coarse(): return Net((32,))
def early(): return Net((2, 4))
def odd(): return Net((14,))
def fixed(): return Net(side=224)
def classifier(): return nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
def failing(): raise KeyError("weights.pth")
def wants(size): return Net()
def number(): return 7
thing = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with factories."""
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    students._measure.cache_clear()
    return MODULE


@pytest.mark.parametrize("factory,stride,deep", [
    ("whole", 16, 11), ("as_tuple", 16, 11), ("as_dict", 16, 11), ("channels_last", 16, 11), ("alone", 16, None), ("fine", 8, None), ("coarse", 32, None),
])
def test_any_shape_of_output_becomes_an_embedding(module: str, factory: str, stride: int, deep: int | None) -> None:
    encoder = students.encoder(f"{module}:{factory}", 32).eval()
    assert isinstance(encoder, backbones.Backbone)
    assert encoder.stride == stride and (encoder.deep.channels if encoder.deep else None) == deep
    with torch.no_grad():
        for side in (64, 192):
            assert encoder(torch.randn(2, 3, side, side)).shape == (2, 32, side // 16, side // 16)


def test_the_maps_chosen_are_used_and_learn(module: str) -> None:
    encoder = students.encoder(f"{module}:whole", 32).train()
    encoder(torch.randn(2, 3, 64, 64)).square().mean().backward()
    used = [c.weight.grad is not None for c in encoder.body.convs]  # type: ignore[union-attr, operator]
    assert used == [False, False, True, True]
    assert encoder.project.weight.grad.abs().sum() > 0 and encoder.project_deep.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_the_dry_run_leaves_the_backbone_as_it_was(module: str) -> None:
    body = students.encoder(f"{module}:whole", 32).body
    assert body.training and int(body.bn.num_batches_tracked) == 0  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("text,canonical", [
    ("timm/resnet18", "timm-resnet18"), ("timm-resnet18", "timm-resnet18"), ("timm/repvit_m1.dist_in1k", "timm-repvit_m1.dist_in1k"),
    ("my.models:tiny", "factory-my.models-tiny"), ("factory-my.models-tiny", "factory-my.models-tiny"),
])
def test_names_have_one_safe_spelling_and_import_nothing(text: str, canonical: str) -> None:
    assert str(students.parse(text)) == canonical
    assert all(c.isalnum() or c in "._-" for c in canonical)


@pytest.mark.parametrize("text", ["resnet:width=2", "timm/", "timm/a/b", "my.models:", ":tiny", "factory-tiny", "timm-resnet18-width2", "timm/resnet18:width=2"])
def test_names_of_nothing(text: str) -> None:
    with pytest.raises(UsageError, match="unknown student"):
        students.parse(text)


def test_a_backbone_cannot_be_scaled() -> None:
    with pytest.raises(UsageError, match="takes no width"):
        backbones.BackboneConfig(factory="a:b").scaled(width=0.5)


def test_build_save_load_and_describe(module: str, tmp_path: Path) -> None:
    model = students.build(f"{module}:whole", image_size=64, embed_dim=32, seed=3)
    assert isinstance(model, Sam) and model.name == f"factory-{module}-whole"
    again = checkpoint.load(checkpoint.save(model, tmp_path / "a.safetensors"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert again.name == model.name and torch.equal(model.eval().embed(images), again.embed(images))
    facts = students.describe(f"{module}:whole", embed_dim=32, image_size=64)
    assert facts["name"] == model.name and facts["family"] == "factory" and facts["weights"] is False
    assert facts["params_encoder"] == sum(p.numel() for p in model.encoder.parameters()) and facts["gmacs"] > 0
    same = students.build(f"{module}:whole", image_size=64, embed_dim=32, seed=3).state_dict()
    assert all(torch.equal(v, same[k]) for k, v in model.state_dict().items()), "the seed decides"


@pytest.mark.parametrize("factory,message,hint", [
    ("early", r"no feature map of the backbone has stride 16 \(nor 8 or 32\), only \[2, 4\]", "S/16"),
    ("odd", "returns no square feature map", ""),
    ("fixed", "but does on 224 px: it takes one size only: ValueError: only 224 px", ""),
    ("classifier", "returns no square feature map", "without pooling"),
    ("failing", "the factory failed: KeyError: 'weights.pth'", "without arguments"),
    ("wants", "the factory failed: TypeError", "without arguments"),
    ("number", "returned a int instead of a torch.nn.Module", ""),
    ("thing", "the factory failed: TypeError", ""),
    ("absent", "has no attribute 'absent'", "importable from here"),
])
def test_bad_factories(module: str, factory: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        students.build(f"{module}:{factory}", image_size=64)
    assert module in str(caught.value) and hint in str(caught.value) and caught.value.exit_code == 2


def test_a_module_that_cannot_be_imported() -> None:
    with pytest.raises(UsageError, match="No module named 'nowhere_to_be_found'"):
        students.build("nowhere_to_be_found:tiny")


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_missing_names_the_command() -> None:
    with pytest.raises(UsageError) as caught:
        students.build("timm/resnet18")
    assert backbones.INSTALL in str(caught.value)


@NEEDS_TIMM
@pytest.mark.parametrize("name,stride", [("resnet18", 16), ("repvit_m0_9", 16), ("vit_tiny_patch16_224", 16), ("swin_tiny_patch4_window7_224", 16)])
def test_timm_models_become_students(name: str, stride: int) -> None:
    encoder = students.encoder(f"timm/{name}", 32).eval()
    assert isinstance(encoder, backbones.Backbone) and encoder.stride == stride
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 128, 128)).shape == (1, 32, 8, 8)


@NEEDS_TIMM
def test_timm_has_no_such_model() -> None:
    with pytest.raises(UsageError) as caught:
        students.build("timm/resnett18")
    assert "no model 'resnett18'" in str(caught.value) and "did you mean timm/resnet18?" in str(caught.value)


@pytest.mark.parametrize("cuda,installed,importable,mended", [
    (None, True, False, True), ("13.0", True, False, False), (None, False, False, False), (None, True, True, False),
])
def test_torchvision_is_mended_only_where_it_is_broken_and_torch_has_no_cuda(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, installed: bool, importable: bool, mended: bool
) -> None:
    declared: list[str] = []
    monkeypatch.setattr(backbones, "package_version", lambda name: "0.28" if installed else None)
    monkeypatch.setattr(backbones, "_declare_operators", lambda: declared.append("yes"))
    monkeypatch.setitem(sys.modules, "torchvision", nn if importable else None)  # None: the import raises ImportError
    monkeypatch.setattr(torch.version, "cuda", cuda)
    backbones.mend_torchvision()
    assert bool(declared) == mended
