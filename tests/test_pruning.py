"""Pruning: cuts are exact, checkpoints give them again, and a latency is met by measuring, whatever the clock."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import api, checkpoint, students, target
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.fold import fold
from edgekd.models.pruned import Pruned, describe, shrink, widths
from edgekd.models.sam import Sam, components
from edgekd.protocols import package_version
from edgekd.pruning import Request, count, prune, surgery
from edgekd.pruning.searching import MOST, Search

needs_library = pytest.mark.skipif(package_version("torch-pruning") is None, reason=f"install it: {surgery.INSTALL}")
DATA = "scenes:seed=3,count=6,size=96"
NAMES = ("repvit_xs", "nanosam:width=0.25", "tinyvit_xs:width=0.5", "efficientvit_sam_l0:width=0.25,depth=0.25", "edge_sam:width=0.5,depth=0.25")


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and biases that are not at their start, where branches of zeros would hide a wrong cut."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=draw))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=draw))
                for value in (module.bias, module.running_mean):
                    value.copy_(torch.randn(value.shape, generator=draw) / 4)
            elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=draw) / 4)
    return model


def student(name: str = "repvit_xs", seed: int = 0) -> Sam:
    return lively(students.build(name, image_size=64, embed_dim=32, seed=seed), seed).eval()  # type: ignore[return-value]


def image(side: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def embedded(encoder: nn.Module, photo: Tensor) -> np.ndarray:
    with torch.no_grad():
        return encoder(photo).numpy()


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's checkpoint."""
    return checkpoint.save(student(), tmp_path_factory.mktemp("parent") / "parent.safetensors", teacher="sam_nano")


def asked(parent: Path, output: Path, **more: Any) -> Request:
    """A request that no clock has a say in."""
    values: dict[str, Any] = {"importance": "magnitude", "limit": 4, "measure": lambda encoder: count(encoder, 64)[1] / 1e6}
    return Request(str(parent), target.resolve("host"), DATA, output, **(values | more))


# --- surgery


@needs_library
def test_cut__equals_a_network_masked_by_hand() -> None:
    """The hidden channels of a mixer, and the stage's own: of what every branch of its blocks adds, and of the depthwise convolution that leaves it."""
    encoder, photo = student().encoder, image()
    hidden, own = [1, 5, 6, 7, 9, 11, 20, 40], [0, 2, 3, 9, 10, 17, 22, 23]
    masked = student().encoder
    with torch.no_grad():
        for path, gone in (("features.1.channel_mixer.m.0.bn", hidden), ("features.0.2.bn", own), ("features.1.token_mixer.0.bn", own),
                           ("features.1.channel_mixer.m.2.bn", own), ("features.2.token_mixer.0.bn", own)):
            norm = masked.get_submodule(path)
            norm.weight[gone] = 0  # type: ignore[index, operator]
            norm.bias[gone] = 0  # type: ignore[index, operator]
    sets = {c.layer: c for c in surgery.coupled(encoder, photo)}
    stage = next(c for c in sets.values() if "features.0.2.c" in c.layers and c.layer != "features.0.0.c")
    left = surgery.cut(encoder, photo, {"features.1.channel_mixer.m.0.c": hidden, stage.layer: own})
    other = image(96, seed=1)  # neither the picture nor the size that was followed
    np.testing.assert_allclose(embedded(left, other), embedded(masked, other), rtol=1e-4, atol=1e-5)
    assert np.abs(embedded(encoder, other) - embedded(masked, other)).max() > 0.05
    assert widths(left)["features.1.channel_mixer.m.0.c"] == (40, 16)
    assert widths(left)["features.1.token_mixer.0.conv.c"] == (16, 16)
    assert left.get_submodule("features.1.token_mixer.0.conv.c").groups == 16


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_cut__of_every_family(name: str) -> None:
    """Each cut is compared with its zeroed original inside; what is left is whole multiples, folds, and can be rebuilt from its description."""
    model, photo = student(name), image()
    sets = surgery.coupled(model.encoder, photo)
    assert sets
    left = surgery.cut(model.encoder, photo, {c.layer: c.going(0.5, 8) for c in sets})
    assert count(left, 64)[0] < 0.9 * count(model.encoder, 64)[0]
    for c in sets:
        stay = widths(left)[c.layer][0]
        assert stay == len(c.scores) or (stay % 8 == 0 and 8 <= stay <= len(c.scores)), c.layer
    assert embedded(left, photo).shape == embedded(model.encoder, photo).shape
    np.testing.assert_allclose(embedded(fold(left).eval(), photo), embedded(left, photo), rtol=1e-3, atol=1e-3)
    again = shrink(student(name, seed=1).encoder, describe(left, model.encoder, name, "student", []))
    assert widths(again) == widths(left)
    again.load_state_dict(left.state_dict())
    np.testing.assert_array_equal(embedded(again, photo), embedded(left, photo))


@needs_library
def test_cut__refuses_what_it_cannot_prove(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that was followed wrongly: as if nothing had been masked."""
    encoder, photo = student().encoder, image()
    monkeypatch.setattr(surgery, "_silence", lambda graph, group: None)
    with pytest.raises(EdgekdError, match="not followed rightly"):
        surgery.cut(encoder, photo, {"features.1.channel_mixer.m.0.c": list(range(24))})


@needs_library
def test_cut__leaves_the_original_alone() -> None:
    encoder, photo = student().encoder, image()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    surgery.cut(encoder, photo, {c.layer: c.going(0.5, 8) for c in surgery.coupled(encoder, photo)})
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


@needs_library
def test_coupled__leaves_attention_and_the_embedding_alone() -> None:
    sets = surgery.coupled(student("tinyvit_xs:width=0.5").encoder, image())
    touched = {layer for c in sets for layer in c.layers}
    assert not [layer for layer in touched if "qkv" in layer]
    assert not [c.layer for c in sets if c.layer.startswith("neck.2")]


def test_going__is_the_least_important_in_whole_multiples() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0] * 4)
    channels = surgery.Channels("layer", ("layer",), scores)
    gone = channels.going(0.25, 8)
    assert len(gone) == 8
    assert max(scores[gone]) <= min(scores[[i for i in range(32) if i not in gone]])
    assert len(channels.going(0.9, 8)) == 24, "one multiple stays"
    assert channels.going(0.9, 64) == [], "there are no more than a multiple"
    assert len(channels.going(0.9, 16)) == 16


@needs_library
def test_taylor__asks_the_loss() -> None:
    """A channel that the loss does not see is the first to go, however large its weights are."""
    model, photo = student(), image()
    layer = "features.1.channel_mixer.m"
    with torch.no_grad():
        model.encoder.get_submodule(f"{layer}.2.c").weight[:, 7] = 0
        model.encoder.get_submodule(f"{layer}.0.c").weight[7] *= 50

    def scores(losses: list[surgery.Loss]) -> Tensor:
        return next(c for c in surgery.coupled(model.encoder, photo, losses) if c.layer == f"{layer}.0.c").scores

    assert int(scores([lambda encoder: encoder(photo).square().mean()]).argmin()) == 7
    assert int(scores([]).argmax()) == 7


# --- blocks


def test_blocks__are_the_outermost_that_keep_their_shape() -> None:
    found = surgery.blocks(student().encoder, image())
    assert found == ["features.1", "features.3", "features.5", "features.6", "features.7", "features.8", "features.9", "features.11"]


def test_least_missed__is_the_block_that_does_nothing() -> None:
    model, photos = student(), [image(seed=i) for i in range(3)]
    block = model.encoder.get_submodule("features.6")  # it has no gate
    with torch.no_grad():  # depthwise and its branch cancel the identity they are added to: what is left of the block is x
        mixer = block.token_mixer[0]
        mixer.conv.bn.weight.zero_(), mixer.conv.bn.bias.zero_(), mixer.conv1.weight.zero_(), mixer.conv1.bias.zero_()
        mixer.bn.weight.fill_(1), mixer.bn.bias.zero_(), mixer.bn.running_mean.zero_(), mixer.bn.running_var.fill_(1 - mixer.bn.eps)
        block.channel_mixer.m[2].bn.weight.zero_(), block.channel_mixer.m[2].bn.bias.zero_()
    wanted = [model.encoder(p).detach() for p in photos]
    first, second = surgery.least_missed(model.encoder, photos, wanted, 2)
    assert first == "features.6" and second != first
    assert surgery.cosine(surgery.without(model.encoder, [first]), photos, wanted) > 0.99999
    assert surgery.cosine(surgery.without(model.encoder, [first, second]), photos, wanted) < 0.99999


# --- the search


class Cut:
    def __init__(self, ratio: float, removed: int) -> None:
        self.ratio, self.removed, self.widths = ratio, removed, round(64 * (1 - ratio))


def searching(ms: Any, near: Any = lambda cut: 1 - cut.ratio) -> Search[Cut]:
    return Search(Cut, ms, near)


def test_search__finds_the_widest_that_meets_the_target() -> None:
    found = searching(lambda cut: 10 * (1 - cut.ratio) ** 2).within(4.0)
    assert found.met and 3.8 < found.step.ms <= 4.0
    assert abs(found.step.ratio - (1 - 0.4**0.5)) < 0.02
    assert found.history[-1] == found.step and len(found.history) <= 9


def test_search__measures_a_shape_once_and_the_choice_twice() -> None:
    asked_for: list[int] = []

    def ms(cut: Cut) -> float:
        asked_for.append(cut.widths)
        return 10.0 if cut.widths > 40 else 5.0

    found = searching(ms).within(7.0)
    assert found.met and found.step.ms == 5.0
    assert asked_for.count(asked_for[-1]) == 2 and len(asked_for) == len(set(asked_for)) + 1


def test_search__out_of_reach_is_the_fastest() -> None:
    found = searching(lambda cut: 10 - cut.ratio).within(4.0)
    assert not found.met and found.step.ratio == MOST and found.step.ms == 10 - MOST


def test_search__one_lucky_run_is_not_enough() -> None:
    """A choice that fails its second measurement is narrowed."""
    seen: dict[float, int] = {}

    def ms(cut: Cut) -> float:
        seen[cut.ratio] = seen.get(cut.ratio, 0) + 1
        true = 10 * (1 - cut.ratio)
        return true * (0.9 if seen[cut.ratio] == 1 else 1.0)

    found = searching(ms).within(4.0)
    assert found.met and found.step.ms <= 4.0
    assert [s for s in found.history if s.ms > 4.0 and abs(s.ratio - found.step.ratio) < 0.1]


def test_search__leaves_blocks_out_while_the_embedding_gains() -> None:
    found = searching(lambda cut: 10 * (1 - cut.ratio) - cut.removed, lambda cut: 1 - cut.ratio - 0.025 * cut.removed**2).within(6.0, depth=5)
    best = max(range(6), key=lambda k: 1 - (1 - (6 + k) / 10) - 0.025 * k**2)
    assert found.met and found.step.removed == best == 2


def test_search__needs_no_width_where_blocks_do() -> None:
    found = searching(lambda cut: 10 - 3 * cut.removed - 0.01 * cut.ratio, lambda cut: 1 - cut.ratio).within(5.0, depth=3)
    assert found.met and (found.step.removed, found.step.ratio) == (2, 0.0)


# --- the verb


@needs_library
def test_prune__meets_the_target_and_says_how(parent: Path, tmp_path: Path) -> None:
    whole = count(student().encoder, 64)[1] / 1e6
    found = prune(asked(parent, tmp_path, target_ms=whole / 2))
    assert found["met"] and found["latency_ms"] <= whole / 2 < found["parent_latency_ms"] == pytest.approx(whole)
    assert found["macs"] / 1e6 == pytest.approx(found["latency_ms"])
    assert found["params"] < found["parent_params"]
    assert all(left % 8 == 0 and left <= of for left, of in found["kept"]["channels"].values())
    assert any(left < of for left, of in found["kept"]["channels"].values())
    assert len(found["history"]) >= 2 and -1 <= found["embedding_cosine"] < 1
    assert json.loads((tmp_path / "prune.json").read_text())["checkpoint"] == found["checkpoint"]


@needs_library
def test_prune__checkpoint_is_a_model_as_any_other(parent: Path, tmp_path: Path) -> None:
    """Opened, inspected, saved again, exported and equal on its runtime; the decoder is the parent's."""
    from edgekd.export.onnx import exporter

    path = Path(prune(asked(parent, tmp_path, ratio=0.5))["checkpoint"])
    model, before = checkpoint.load(path), checkpoint.load(parent)
    assert model.name == "repvit_xs-pruned0.5" and model.pruned.base == "repvit_xs"
    about = api.inspect(model=path)
    assert about["name"] == model.name and about["encoder"]["params"] < sum(p.numel() for p in before.encoder.parameters())
    assert all(torch.equal(v, before.mask_decoder.state_dict()[k]) for k, v in model.mask_decoder.state_dict().items())
    again = checkpoint.load(checkpoint.save(model, tmp_path / "again.safetensors"))
    photo = image()
    np.testing.assert_array_equal(embedded(again.encoder, photo), embedded(model.encoder, photo))
    part = components(fold(again).eval())["encoder"]
    exporter.export(part, tmp_path / "encoder.onnx", scheme="fp32")
    got = exporter.open(tmp_path / "encoder.onnx", scheme="fp32").run({"images": photo.numpy()})["image_embeddings"]
    np.testing.assert_allclose(got, embedded(again.encoder, photo), rtol=1e-3, atol=1e-4)


@needs_library
def test_prune__again_and_without_blocks(parent: Path, tmp_path: Path) -> None:
    """What is pruned can be pruned further; blocks that are gone stay gone."""
    first = Path(prune(asked(parent, tmp_path / "a", ratio=0.25, depth=2))["checkpoint"])
    model = checkpoint.load(first)
    gone = model.pruned.removed
    assert len(gone) == 2 and all(isinstance(model.encoder.get_submodule(path), nn.Identity) for path in gone)
    second = prune(asked(first, tmp_path / "b", ratio=0.5, depth=True))
    found = checkpoint.load(Path(second["checkpoint"]))
    assert found.pruned.removed[:2] == gone and len(found.pruned.removed) == 3
    assert found.pruned.base == "repvit_xs" and found.name == "repvit_xs-pruned0.25-less2-pruned0.5-less1"
    assert not [path for path in found.pruned.widths if path.startswith(tuple(f"{g}." for g in found.pruned.removed))]


@needs_library
def test_prune__inherits_from_the_teacher_itself(tmp_path: Path) -> None:
    """sam_nano, a transformer on convolutions: hidden widths, trunk and a block go, attention stays; what is left is its student."""
    from edgekd.distillation.starting import starting_point
    from edgekd.recipe import resolve
    from edgekd.teachers import load

    found = prune(asked(Path("sam_nano"), tmp_path, ratio=0.5, limit=1, depth=1, measure=lambda encoder: count(encoder, 256)[1] / 1e6))
    path, teacher = Path(found["checkpoint"]), load("sam_nano")
    assert found["params"] < 0.6 * found["parent_params"] and len(found["kept"]["blocks_removed"]) == 1
    assert not [layer for layer in found["kept"]["channels"] if "attn" in layer]
    meta = checkpoint.read_meta(path)
    assert (meta.kind, meta.teacher, meta.pruned.kind, meta.pruned.base) == ("student", "sam_nano", "teacher", "sam_nano")  # type: ignore[union-attr]
    model, start = starting_point(path, resolve("pruned_recover"), None).student(teacher)
    assert model.name == found["student"] and path.name in start
    photo = image(256)
    assert embedded(model.encoder, photo).shape == embedded(teacher.encoder, photo).shape


@needs_library
def test_prune__refuses_a_student_trained_for_integers(tmp_path: Path) -> None:
    path = checkpoint.save(checkpoint.deployed(student()), tmp_path / "folded.safetensors")
    with pytest.raises(UsageError, match="trained for integers"):
        prune(asked(path, tmp_path / "out", ratio=0.5))


@needs_library
def test_prune__learns_from_the_teacher(parent: Path, tmp_path: Path) -> None:
    """Taylor's scores follow the distance to the teacher and choose other channels than magnitudes do."""
    teacher = checkpoint.save(student(seed=7), tmp_path / "teacher.safetensors")
    by = {name: prune(asked(parent, tmp_path / name, ratio=0.5, importance=name, teacher=str(teacher))) for name in ("taylor", "magnitude")}
    assert {name: found["importance"] for name, found in by.items()} == {"taylor": "taylor", "magnitude": "magnitude"}
    taylor, magnitude = (checkpoint.load(Path(found["checkpoint"])).encoder for found in by.values())
    assert widths(taylor) == widths(magnitude)
    assert any(not torch.equal(a, b) for a, b in zip(taylor.parameters(), magnitude.parameters(), strict=True))


@needs_library
def test_prune__out_of_reach_is_exit_code_1(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest is written and named."""
    from edgekd.cli import main
    from edgekd.pruning import meter

    monkeypatch.setattr(meter.Meter, "__call__", lambda self, encoder: count(encoder, 64)[1] / 1e6)
    with pytest.raises(SystemExit) as left:
        main(["prune", str(parent), "--data", DATA, "--output", str(tmp_path), "--target-ms", "0.001", "--importance", "magnitude", "--limit", "2", "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert left.value.code == 1 and not found["met"] and "cannot be reached; the nearest takes" in err
    assert found["latency_ms"] == min(s["ms"] for s in found["history"]) and Path(found["checkpoint"]).is_file()


@needs_library
def test_prune__measures_the_exported_encoder(parent: Path, tmp_path: Path) -> None:
    """By the target's own clock, of the file: a number, whatever it is."""
    found = prune(asked(parent, tmp_path, ratio=0.5, measure=None))
    assert found["latency_ms"] > 0 and found["parent_latency_ms"] > 0


@needs_library
@pytest.mark.parametrize(("more", "said"), [
    ({}, "a latency or a ratio"), ({"ratio": 0.5, "target_ms": 3.0}, "a latency or a ratio"), ({"ratio": 1.0}, "at most 0.9"), ({"ratio": 0.0}, "above 0"),
    ({"ratio": float("nan")}, "above 0"), ({"target_ms": -1.0}, "above 0"), ({"ratio": 0.5, "importance": "taylr"}, "unknown importance"),
    ({"ratio": 0.5, "format": "onxx"}, "onxx"), ({"ratio": 0.5, "multiple": 0}, "at least 1"),
])
def test_prune__wrong_usage(parent: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        prune(asked(parent, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists(), "nothing was started"


@needs_library
def test_prune__fast_enough_already(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="meets the target as it is"):
        prune(asked(parent, tmp_path, target_ms=1e6))


@needs_library
def test_prune__needs_channels_that_can_go(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match=r"no channels of .* can be left out"):
        prune(asked(parent, tmp_path, ratio=0.5, multiple=512))


@needs_library
def test_prune__taylor_needs_a_teacher(tmp_path: Path) -> None:
    path = checkpoint.save(student(), tmp_path / "own.safetensors")
    with pytest.raises(UsageError, match="names none"):
        prune(asked(path, tmp_path / "out", ratio=0.5, importance="taylor"))


def test_prune__not_installed(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "package_version", lambda package: None)
    with pytest.raises(UsageError) as e:
        prune(asked(parent, tmp_path, ratio=0.5))
    assert 'pip install "edgekd[pruning]"' in str(e.value)


# --- rebuilding needs no torch-pruning


def test_shrink__keeps_the_first_channels_and_depthwise_stays_depthwise() -> None:
    encoder = student().encoder
    wide = encoder.get_submodule("features.1.channel_mixer.m.0.c").weight.detach().clone()
    shrink(encoder, Pruned(base="repvit_xs", removed=("features.7",), widths={
        "features.1.channel_mixer.m.0.c": (8, 24), "features.1.channel_mixer.m.0.bn": (8,), "features.1.channel_mixer.m.2.c": (24, 8)}))
    torch.testing.assert_close(encoder.get_submodule("features.1.channel_mixer.m.0.c").weight, wide[:8])
    assert embedded(encoder, image()).shape == (1, 32, 4, 4)
    assert isinstance(encoder.get_submodule("features.7"), nn.Identity)


@pytest.mark.parametrize("wrong", [{"widths": {"features.99.c": (8,)}}, {"widths": {"features.0.0.c": (800, 3)}}, {"widths": {"features.0.0.c": (8,)}},
                                   {"widths": {"features.0.1": (8,)}}, {"widths": {"features.1.token_mixer.0.conv.c": (8, 16)}}, {"removed": ("features.77",)}])
def test_shrink__refuses_what_does_not_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(EdgekdError, match=r"has no layer|cannot be cut"):
        shrink(student().encoder, Pruned(base="repvit_xs", **wrong))
