"""From a distilled checkpoint to the integer file: which ranges are one, arithmetic on integers, what a checkpoint keeps, and parity on the runtime."""
from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd import api, checkpoint, exporting, qat, resolve, students
from edgekd import recipe as recipes
from edgekd.data.scenes import Scenes
from edgekd.distillation import starting
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.controllers import fake_quant, quantization_points
from edgekd.distillation.trainer import StageTrainer
from edgekd.errors import EdgekdError, UsageError
from edgekd.models import rounding, tying
from edgekd.models.fold import fold
from edgekd.models.sam import DecoderShape, Sam
from edgekd.recipe import ObjectiveRef, Stage
from edgekd.runtime import open_artifact
from edgekd.tuning import Grid

NAME = "repvit_xs:width=0.25,depth=0.25"
SHAPE = DecoderShape(embed_dim=32, heads=4, mlp_dim=64, mask_channels=8)


# --- which ranges are one ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Every way in which a tensor gets from one layer to another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Conv2d(3, 3, 1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)))  # only the ReLU reads a
        y = F.relu(self.c(x))  # c reads what b gives
        y = y + x  # x is read by the sum too
        z = self.d(F.relu(y)) + self.e(y)
        z += 1.0  # in place: another value
        return self.f(z)


def groups(module: nn.Module, x: Tensor) -> dict[frozenset[str], bool]:
    return {frozenset(f"{n}.{end}" for n, end in g.places): g.rectified for g in tying.ranges(module, lambda: module(x))}


def test_ranges__by_hand() -> None:
    assert groups(Net(), torch.rand(1, 3, 4, 4)) == {
        frozenset({"a.input"}): False, frozenset({"a.output", "b.input"}): True, frozenset({"b.output", "c.input"}): False,
        frozenset({"c.output"}): True, frozenset({"d.input"}): False, frozenset({"e.input"}): False, frozenset({"d.output"}): False,
        frozenset({"e.output"}): False, frozenset({"f.input"}): False, frozenset({"f.output"}): False}


def test_ranges__a_tensor_changed_in_place_is_another_and_one_that_two_read_is_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y += x
            return self.b(y) + self.c(y)

    assert set(groups(Two(), torch.rand(2, 3))) == {frozenset({"a.input"}), frozenset({"a.output"}), frozenset({"b.input", "c.input"}),
                                                    frozenset({"b.output"}), frozenset({"c.output"})}


def test_ranges__a_layer_called_twice_has_one_range_at_each_end() -> None:
    layer = nn.Linear(3, 3)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x))

    assert set(groups(Twice(), torch.rand(2, 3))) == {frozenset({"a.input", "a.output"})}


# --- integers ---------------------------------------------------------------------------------------------------------------------


def test_simulated__by_hand() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, 0.10]]))  # steps of 0.01: 127 and 10
        layer.bias.copy_(torch.tensor([0.0123]))  # steps of 0.1 x 0.01: 12.3
    layer.grid = Grid((0.0, 25.5), (-10.0, 15.5))  # type: ignore[assignment]  # steps of 0.1
    x = torch.tensor([[1.04, 3.0]])  # 10 and 30
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad(), rounding.simulated(layer):
        found = float(layer(x))
        far = float(layer(torch.tensor([[25.5, 0.0]])))
    assert found == pytest.approx(1.6)  # (1270 + 300 + 12) x 0.001 = 1.582
    assert far == pytest.approx(15.5), "above the last level"
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items()) and not layer._forward_hooks


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 2, 2), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.Linear(4, 6)],
                         ids=["conv", "transposed", "transposed in groups", "linear"])
def test_simulated__equals_rounding_every_value_in_float(layer: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        out = layer(x)
        grid = Grid((float(x.min()), float(x.max())), (float(out.min()), float(out.max())))
        weight = rounding.rounded(layer.weight, 8, rounding.output_axis(layer))
        plain = copy.deepcopy(layer)
        plain.weight.data = weight
        into, behind = (torch.tensor(e) for e in (grid.input, grid.output))
        expected = rounding.leveled(plain(rounding.leveled(x, into, 255)), behind, 255)
        wrap = nn.Sequential(layer)
        with rounding.simulated(wrap, {"0": grid}):
            found = wrap(x)
    step = float(rounding.spread(behind, 255)[0])
    assert (found - expected).abs().max() <= 1.01 * step and ((found - expected).abs() > 0.5 * step).float().mean() < 0.02, "a bias may round to the next level"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_contained__few_levels_that_eight_bits_hold_exactly(bits: int) -> None:
    weight = torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        found = rounding.contained(weight, bits, axis)
        assert torch.equal(rounding.rounded(found, 8, axis), found)
        assert all(len(row.unique()) <= 2**bits - 1 for row in found.movedim(axis, 0))


def test_step__its_gradient_by_hand_and_where_it_starts() -> None:
    weight = torch.tensor([[0.1, -0.24, 0.9]], requires_grad=True)
    step = fake_quant.Step(weight, 2, 0)
    step.first.fill_(0.5)
    found = step(weight)
    assert found.tolist() == [[0.0, 0.0, 0.5]]
    found.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[1.0, 1.0, 0.0]]
    # LSQ: round(w/s) - w/s within, the last level beyond: (-0.2 + 0.48 + 1) x 0.5 / sqrt(3 weights x 1 level)
    assert step.stretch.grad is not None and float(step.stretch.grad) == pytest.approx(1.28 * 0.5 / 3**0.5, rel=1e-5)
    many = torch.cat([torch.randn(2, 500, generator=torch.Generator().manual_seed(0)), torch.full((2, 1), 30.0)], 1)

    def error(found: Tensor) -> float:
        return float((found.detach() - many).square().sum())

    widest = 30 / 7
    assert error(fake_quant.Step(many, 4, 0)(many)) < error((many / widest).round() * widest)


CELLS = {"squeeze", "excite"}
"""Of the tiny encoder, convolutions of a pooled map."""


# --- training ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> Sam:
    return tiny.tiny_sam(3).requires_grad_(False)


@pytest.fixture(scope="module")
def source(teacher: Sam, tmp_path_factory: pytest.TempPathFactory) -> Source:
    scenes = Scenes(seed=4, count=8, size=64)
    return Source(scenes, build_cache(teacher, scenes, tmp_path_factory.mktemp("cache")))


def stage(controller: str = "fake_quant", /, **options: Any) -> Stage:
    return Stage.model_validate({
        "name": "quantize", "objectives": [{"name": "quant_gap", "options": {"against": "self"}}], "controllers": [{"name": controller, "options": options}],
        "trainable": ["encoder"], "steps": 40, "batch_size": 4, "lr": 1e-3, "warmup": 2, "precision": "fp32", "weight_decay": 0.0})


def train(student: Sam, teacher: Sam, source: Source, folder: Path, how: Stage) -> Sam:
    made = checkpoint.deployed(student)
    StageTrainer(made, teacher, how, Batches([source], made.preprocess, 4, 0), folder / "state.pt").run()
    return made


def frames(source: Source, student: Sam) -> Tensor:
    return Batches([source], student.preprocess, 8, 0)[0].images


@torch.no_grad()
def error(student: Sam, wanted: Tensor, images: Tensor, grids: Any = None, **options: Any) -> float:
    with rounding.simulated(student.encoder, grids, **options):
        return float((student.embed(images) - wanted).square().mean())


def test_stage__four_bits_cost_much_less_after_training(teacher: Sam, source: Source, tmp_path: Path) -> None:
    student = tiny.tiny_sam(1)
    images, folded = frames(source, student), fold(student)
    with torch.no_grad():
        wanted = student.embed(images)
        seen = {name: grid for name, grid in rounding.observed(folded.encoder, [images], folded.encoder).items() if name not in CELLS}
    before = error(folded, wanted, images, seen, bits=4)
    trained = train(student, teacher, source, tmp_path, stage(bits=4))
    after = error(trained, wanted, images)
    assert set(rounding.grids_of(trained.encoder)) == set(seen) and after < 0.6 * before
    assert all(len(row.unique()) <= 15 for name, layer in rounding.layers(trained.encoder).items() for row in layer.weight if name not in CELLS)  # type: ignore[attr-defined, union-attr]


def test_stage__ranges_are_tied_hold_zero_and_lie_on_levels(teacher: Sam, source: Source, tmp_path: Path) -> None:
    trained = train(tiny.tiny_sam(1), teacher, source, tmp_path, stage().model_copy(update={"steps": 6}))
    grids = rounding.grids_of(trained.encoder)
    assert not CELLS & set(grids), "maps of one cell stay in float"
    assert grids["stem.0"].output != grids["stem.2"].input, "a GELU between them"
    for grid in grids.values():
        for low, high in (grid.input, grid.output):  # type: ignore[misc]
            step = (high - low) / 255
            assert low <= 0 <= high and abs(low / step - round(low / step)) < 1e-2
    assert not rounding.grids_of(trained.mask_decoder), "decoders stay in float"


@pytest.mark.parametrize("bits", [8, 4])
def test_export__the_integer_file_is_what_was_trained(teacher: Sam, source: Source, tmp_path: Path, bits: int) -> None:
    trained = train(tiny.tiny_sam(1), teacher, source, tmp_path, stage(bits=bits).model_copy(update={"steps": 10}))
    manifest = exporting.export_model(trained, tmp_path / "artifact", format="onnx", scheme=f"w{bits}a8_qat", gate=False)
    artifact, images = open_artifact(tmp_path / "artifact"), frames(source, trained)
    assert manifest.components["encoder"].executed_ops["QLinearConv"] == len(rounding.grids_of(trained.encoder)) == len(rounding.layers(trained.encoder)) - len(CELLS)
    with torch.no_grad(), rounding.simulated(trained):
        own = trained.embed(images).numpy()
    found, plain = artifact.embed(images.numpy()), trained.embed(images).detach().numpy()
    assert np.abs(found - own).max() < 1e-4 < 0.01 < np.abs(plain - own).max(), "not merely near its float parent"
    same = qat.parity(trained, artifact, source.dataset)
    assert same["mask_iou"] >= qat.SAME and same["passed"] and same["min_mask_iou"] > 0.99 and same["images"] == 8


def test_export__a_transformer_trained_on_its_attentions(teacher: Sam, source: Source, tmp_path: Path) -> None:
    student = students.build("tinyvit_xs:width=0.25,depth=0.25", image_size=64, shape=teacher.shape)
    how = stage(bits=4).model_copy(update={"steps": 12, "objectives": [ObjectiveRef(name="quant_gap", options={"against": "self_attention"})]})
    made = checkpoint.deployed(student)
    trainer = StageTrainer(made, teacher, how, Batches([source], made.preprocess, 4, 0), tmp_path / "state.pt")
    pairs = [name for name, _ in trainer.step_module.pairs["quant_gap"]]
    assert [p for p in pairs if p.startswith("attention")] and len([p for p in pairs if p.endswith(".attn")]) == len(pairs) / 2
    losses = [row["loss"] for row in trainer.run().curve]
    assert losses[-1] < min(losses[:2])  # type: ignore[type-var, operator]
    exporting.export_model(made, tmp_path / "artifact", format="onnx", scheme="w4a8_qat", gate=False)
    images = frames(source, made)
    with torch.no_grad(), rounding.simulated(made):
        own = made.embed(images).numpy()
    assert np.abs(open_artifact(tmp_path / "artifact").embed(images.numpy()) - own).max() < 1e-4


def test_parity__a_file_with_other_ranges_does_not_pass(teacher: Sam, source: Source, tmp_path: Path) -> None:
    trained = train(tiny.tiny_sam(1), teacher, source, tmp_path, stage().model_copy(update={"steps": 2}))
    other = copy.deepcopy(trained)
    for layer in (rounding.layers(other.encoder)[name] for name in rounding.grids_of(other.encoder)):
        low, high = layer.grid.output  # type: ignore[union-attr, misc]
        layer.grid = Grid(layer.grid.input, (low / 4, high / 4))  # type: ignore[union-attr, assignment, arg-type]
    exporting.export_model(other, tmp_path / "artifact", format="onnx", scheme="w8a8_qat", gate=False)
    assert not qat.parity(trained, open_artifact(tmp_path / "artifact"), source.dataset)["passed"]


# --- quantization points -----------------------------------------------------------------------------------------------------------


def test_k_means__by_hand() -> None:
    assert quantization_points.k_means(torch.tensor([0.0, 1.0, 10.0, 11.0, -8.0, -9.0]), 3).tolist() == [-8.5, 0.5, 10.5]


def test_palette__each_point_gets_the_gradient_of_its_weights() -> None:
    weight = torch.tensor([[-1.0, -0.9], [1.0, 1.3]], requires_grad=True)
    palette = quantization_points.Palette(weight, 1)
    found = palette(weight)
    assert torch.allclose(found, torch.tensor([[-0.95, -0.95], [1.15, 1.15]]))
    (found * torch.tensor([[1.0, 2.0], [4.0, 8.0]])).sum().backward()
    assert weight.grad is None
    assert palette.points.grad is not None and torch.allclose(palette.points.grad, torch.tensor([3.0, 12.0]) * palette.unit)


def test_points__are_trained_and_leave_a_palette(teacher: Sam, source: Source, tmp_path: Path) -> None:
    student = tiny.tiny_sam(1)
    images = frames(source, student)
    with torch.no_grad():
        wanted, start = student.embed(images), fold(student)
        for layer in rounding.layers(start.encoder).values():
            layer.weight.copy_(quantization_points.Palette(layer.weight, 2)(layer.weight))  # type: ignore[union-attr, arg-type, operator]
        before = float((start.embed(images) - wanted).square().mean())
    trained = train(student, teacher, source, tmp_path, stage("quantization_points", bits=2))
    with torch.no_grad():
        after = float((trained.embed(images) - wanted).square().mean())
    assert after < 0.7 * before and not rounding.grids_of(trained)
    assert all(len(m.weight.unique()) <= 4 and type(m) in rounding.LAYERS for m in rounding.layers(trained.encoder).values())  # type: ignore[union-attr, operator]


# --- checkpoints -------------------------------------------------------------------------------------------------------------------


def small(seed: int = 0, image_size: int = 64) -> Sam:
    return students.build(NAME, image_size=image_size, shape=SHAPE, seed=seed).eval()


def quantized() -> Sam:
    made = checkpoint.deployed(small())
    for i, layer in enumerate(rounding.layers(made.encoder).values()):
        layer.grid, layer.weight_bits = Grid((-1.0, 2.0 + i), (-3.0, 4.0)), 4  # type: ignore[assignment]
    return made


def test_checkpoint__keeps_form_and_ranges(tmp_path: Path) -> None:
    made = quantized()
    path = checkpoint.save(made, tmp_path / "q.safetensors", teacher="sam_nano")
    meta, again = checkpoint.read_meta(path), checkpoint.load(path)
    assert meta.form == "deploy" and meta.quantized is not None and meta.quantized.weight_bits == 4
    assert rounding.grids_of(again) == rounding.grids_of(made) and all(n.startswith("encoder.") for n in meta.quantized.grids)
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in again.state_dict().items())
    assert checkpoint.read_meta(checkpoint.save(again, tmp_path / "again.safetensors")).quantized == meta.quantized, "and once more"
    assert len(rounding.grids_of(fold(again).encoder)) == len(meta.quantized.grids), "folding a folded one changes nothing"
    assert resolve.load_torch(path).form == "deploy" and api.inspect(model=path)["quantized"] == {"weight_bits": 4, "layers": len(meta.quantized.grids)}


def test_checkpoint__of_before_is_still_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = checkpoint.save(small(), tmp_path / "old.safetensors")
    header = json.loads(checkpoint._header(path)["edgekd"])
    for name in ("form", "quantized"):
        del header[name]
    save_file(load_file(path), path, metadata={"edgekd": json.dumps(header)})
    assert checkpoint.read_meta(path).form == "training" and not rounding.grids_of(checkpoint.load(path))


def test_checkpoint__of_the_other_form_and_with_unknown_layers_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(quantized(), tmp_path / "q.safetensors")
    with pytest.raises(EdgekdError, match="deploy form"):
        checkpoint.load_into(small(), path)
    made = quantized()
    with pytest.raises(EdgekdError, match="training form"):
        checkpoint.load_into(made, checkpoint.save(small(), tmp_path / "plain.safetensors"))
    meta = checkpoint.read_meta(path)
    assert meta.quantized is not None
    meta.quantized.grids["encoder.nowhere"] = (0.0, 1.0, 0.0, 1.0)
    with pytest.raises(EdgekdError, match="nowhere"):
        checkpoint.assemble(meta, checkpoint.load_tensors(path), path)


# --- the verb ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, a student's checkpoint, and a recipe."""
    folder = tmp_path_factory.mktemp("files")
    recipe = folder / "quick.yaml"
    recipe.write_text("""
extends: smoke_qat
stages:
  - {name: quantize, objectives: [{name: feature_mse}, {name: prompt_masks}], controllers: [{name: fake_quant}], trainable: [encoder], steps: 3,
     batch_size: 2, instances: 2, precision: fp32, lr: 1.0e-4}
""")
    return {"teacher": checkpoint.save(tiny_teacher(), folder / "teacher.safetensors"), "student": checkpoint.save(small(1), folder / "student.safetensors", teacher="t"),
            "recipe": recipe}


def tiny_teacher() -> Sam:
    return students.build(NAME, image_size=64, shape=SHAPE, seed=5).eval()


DATA = "scenes:seed=4,count=8,size=64"


def distill(files: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"data": DATA, "output": output, "recipe": files["recipe"], "teacher": str(files["teacher"]), "checkpoint": files["student"]}
    return api.distill(**(given | changes))


@pytest.fixture(scope="module")
def distilled(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return distill(files, tmp_path_factory.mktemp("distilled") / "q")


def test_distill__from_a_checkpoint_to_the_integer_artifact(files: dict[str, Path], distilled: dict[str, Any], tmp_path: Path) -> None:
    found, path = distilled, Path(distilled["checkpoint"])
    assert path.name.endswith("-64-w8a8_qat.safetensors") and found["scheme"] == "w8a8_qat" and found["start"] == "checkpoint student.safetensors"
    assert found["artifact_parity"]["mask_iou"] >= 0.995 and found["artifact_parity"]["format"] == "onnx"
    assert open_artifact(Path(found["artifact"])).manifest.scheme == "w8a8_qat"
    written = path.read_bytes()
    again = distill(files, path.parent)
    assert path.read_bytes() == written and again["stages"] == found["stages"], "the same command again trains nothing anew"


def test_distill__a_quantized_student_trains_on(files: dict[str, Path], distilled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(distilled["checkpoint"])
    monkeypatch.setattr(qat, "export", lambda *_, **__: {})
    on = distill(files, tmp_path / "on", checkpoint=path)
    assert on["start"] == f"checkpoint {path.name}" and checkpoint.read_meta(Path(on["checkpoint"])).quantized is not None
    plain = distill(files, tmp_path / "plain", checkpoint=path, sets=["stages.0.controllers=[]", "stages.0.steps=1"])
    meta = checkpoint.read_meta(Path(plain["checkpoint"]))
    assert "scheme" not in plain and meta.form == "deploy" and meta.quantized is None, "without rounding its ranges are not its any more"


def test_distill__its_checkpoint_is_a_model_like_any_other(files: dict[str, Path], distilled: dict[str, Any], tmp_path: Path) -> None:
    path = distilled["checkpoint"]
    (row,) = api.export(model=path, to=["onnx"], scheme="w8a8_qat", output=tmp_path / "again")["exports"]
    assert row["components"]["encoder"]["scheme"] == "w8a8_qat" and "int8" in row["components"]["encoder"]["executed_precision"]
    assert api.evaluate(model=path, teacher=str(files["teacher"]), data="scenes:seed=5,count=1,size=64", max_instances=1).images == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"checkpoint": "nowhere.safetensors"}, "no such checkpoint"), ({"recipe": "dense_features_nano"}, "of the task promptable"),
    ({"student": "repvit_s"}, "not of 'repvit_s'"), ({"teacher": "sam_nano"}, "embed_dim 32 instead of 128")])
def test_distill__refuses_a_checkpoint_that_does_not_fit(files: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        distill(files, tmp_path / "q", **changes)


def test_distill__refuses_a_teachers_a_damaged_one_and_its_own_output(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="teacher"):
        distill(files, tmp_path, checkpoint=checkpoint.save(small(), tmp_path / "t.safetensors", kind="teacher"))
    damaged = tmp_path / "damaged.safetensors"
    whole = files["student"].read_bytes()
    damaged.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(EdgekdError, match="damaged"):
        distill(files, tmp_path / "q", checkpoint=damaged)
    own = checkpoint.save(small(), tmp_path / f"{small().name}-64-w8a8_qat.safetensors")
    with pytest.raises(UsageError, match="written over"):
        distill(files, tmp_path, checkpoint=own)


def test_rounding__what_stages_train_for() -> None:
    assert starting.check_rounding([stage()]) == starting.Rounding("w8a8_qat", "w8a8_qat")
    assert starting.check_rounding([stage(bits=4)]) == starting.Rounding("w4a8_qat", "w4a8_qat")
    assert starting.check_rounding([stage(bits=6)]) == starting.Rounding("w8a8_qat", "w6a8_qat")
    assert starting.check_rounding([stage(bits=4, activations=0)]) == starting.Rounding(None, "w4")
    assert starting.check_rounding([stage("quantization_points", bits=3)]) == starting.Rounding(None, "w3")
    plain = stage().model_copy(update={"controllers": [], "name": "after"})
    assert starting.check_rounding([plain]) is None
    with pytest.raises(UsageError, match="off its grid") as caught:
        starting.check_rounding([stage(), plain])
    assert "after" in str(caught.value.where)


@pytest.mark.parametrize(("name", "scheme"), [("smoke_qat", "w8a8_qat"), ("qat", "w8a8_qat"), ("qat_w4a8", "w4a8_qat"), ("qat_attention", "w4a8_qat")])
def test_recipe__trains_for_its_scheme(name: str, scheme: str) -> None:
    found = recipes.resolve(name)
    rounding_ = starting.check_rounding(found.stages)
    assert rounding_ is not None and rounding_.scheme == scheme and scheme in found.quantization.schemes
