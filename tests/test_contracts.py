"""The contracts, walked over every registry: what is found is tested the day it is added."""
from __future__ import annotations

import pytest
import torch

from edgekd import catalogue, plugins, recipe, students, target, teachers
from edgekd.distillation import objectives
from edgekd.distillation.objectives import Context, Outputs
from edgekd.models.proposer import SLOTS
from edgekd.models.sam import components
from edgekd.protocols import Availability, Promptable
from edgekd.quantization import schemes
from edgekd.tasks import baselines
from edgekd.tasks.predictor import Predictor

S, E, P = 64, 32, 3


# --- exporters (their export and parity are in test_exporting.py) -----------------------------------------------------


@pytest.mark.parametrize("name", plugins.exporters())
def test_exporter__keeps_the_contract(name: str) -> None:
    exporter = plugins.exporter(name)
    assert exporter.format == name and exporter.suffix.startswith(".")
    assert "fp32" in exporter.schemes and set(exporter.schemes) <= set(schemes.names())
    found = exporter.availability()
    assert isinstance(found, Availability)
    assert found.version if found.ok else found.reason and found.fix


def test_schemes__each_is_written_by_some_exporter() -> None:
    assert set(schemes.names()) == set(plugins.schemes())


# --- students ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", students.names())
def test_student__keeps_the_embedding_contract(name: str) -> None:
    model = students.build(f"{name}:width=0.25,depth=0.25", image_size=S, embed_dim=E).eval()
    side = model.preprocess.side
    assert isinstance(model, Promptable) and side in (S, 2 * S)
    with torch.no_grad():
        embedding = model.embed(torch.zeros(2, 3, S, S))
        masks, iou = model.decode(embedding[:1], torch.full((P, 2, 2), side / 2), torch.ones(P, 2))
    assert embedding.shape == (2, E, side // 16, side // 16)
    assert masks.shape == (P, 4, side // 4, side // 4) and iou.shape == (P, 4)
    assert set(components(model)) == {"encoder", "decoder"}


@pytest.mark.parametrize("name", students.names())
def test_student__describes_itself(name: str) -> None:
    found = students.describe(name)
    assert found["name"] == name and found["paper"].startswith("arXiv") and found["params_encoder"] > 0 and found["gmacs"] > 0


# --- teachers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", teachers.names())
def test_teacher__describes_itself_without_loading(name: str) -> None:
    found = teachers.describe(name)
    assert found["family"] and found["params_m"] > 0 and found["weights"]


def test_teachers__that_ship_weights_are_frozen_and_promptable() -> None:
    shipped = [n for n in teachers.names() if teachers.shipped(n)]
    if not shipped:
        pytest.skip("no teacher's weights are in this checkout")
    for name in shipped:
        teacher = teachers.load(name)
        assert isinstance(teacher, Promptable) and not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())


# --- objectives -------------------------------------------------------------------------------------------------------


def outputs(seed: int) -> Outputs:
    """All four masks of a prompt are alike, so that any of them may be the one that learns; all proposals of an image are one box."""
    generator = torch.Generator().manual_seed(seed)
    box = torch.tensor([[16.0, 16.0, 48.0, 48.0]]) if seed == 2 else torch.tensor([[2.0, 4.0, 20.0, 30.0]])
    cells = len(SLOTS) * (S // 16) ** 2
    return Outputs(embedding=torch.randn(2, E, S // 16, S // 16, generator=generator), iou=torch.rand(2 * P, 4, generator=generator),
                   masks=torch.randn(2 * P, 1, S // 4, S // 4, generator=generator).repeat(1, 4, 1, 1), tokens=torch.randn(2 * P, 5, E, generator=generator),
                   proposals=(box.repeat(2, cells, 1), torch.full((2, cells), 0.5)))


def context() -> Context:
    """Its truth is what `outputs(2)` says."""
    told = outputs(2)
    assert told.masks is not None and told.proposals is not None
    truth = (told.masks[:, 0] > 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return Context(valid=torch.ones(2, 1, S // 4, S // 4), valid_prompts=torch.ones(2 * P, S // 4, S // 4), single=torch.tensor([1.0, 0.0] * P), truth=truth,
                   boxes=[told.proposals[0][0, :1]] * 2, side=S, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", objectives.names())
def test_objective__describes_itself(name: str) -> None:
    found = objectives.describe(name)
    assert found["family"] and found["paper"] and set(found["needs"]) <= objectives.NEEDS and found["needs"]


@pytest.mark.parametrize("name", objectives.names())
def test_objective__is_per_sample_finite_and_has_a_gradient(name: str) -> None:
    objective = objectives.build(name, {})
    student, teacher = outputs(1), outputs(2)
    given = (student.embedding, student.masks, student.iou, student.tokens, *(student.proposals or ()))
    leaves = [t.requires_grad_() for t in given if t is not None]
    loss = objective(student, teacher, context())
    assert loss.ndim == 1 and len(loss) in (2, 2 * P) and torch.isfinite(loss).all() and (loss >= 0).all()
    loss.mean().backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients) and any(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("name", objectives.names())
def test_objective__is_least_where_the_student_is_the_teacher(name: str) -> None:
    objective, teacher = objectives.build(name, {}), outputs(2)
    assert objective(teacher, teacher, context()).mean() < objective(outputs(1), teacher, context()).mean()


# --- recipes and targets name only what there is ----------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.names())
def test_recipe__names_only_what_there_is(name: str) -> None:
    found = recipe.resolve(name)
    assert found.teacher in teachers.names()
    for student in found.students:
        students.parse(student.name)
    for stage in found.stages:
        for one in stage.objectives:
            objectives.build(one.name, one.options)
    if found.formats != "auto":
        assert set(found.formats) <= set(plugins.exporters())
    if found.quantization.schemes != "auto":
        assert set(found.quantization.schemes) <= set(schemes.names())


@pytest.mark.parametrize("name", target.names())
def test_target__leaves_the_default_recipe_something_to_try(name: str) -> None:
    exports = {n: e.schemes for n, e in plugins.exporters().items()}
    filled = recipe.with_auto(recipe.resolve("default"), runs=target.resolve(name).runs, exports=exports)
    assert filled.formats and "fp32" in filled.quantization.schemes


# --- baselines and kinds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", baselines.names())
def test_baseline__is_a_predictor(name: str) -> None:
    if name == "baseline/grabcut":
        pytest.importorskip("cv2")
    found = baselines.load(name)
    assert isinstance(found, Predictor) and found.name == name


@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_kind__lists_dictionaries(kind: str) -> None:
    assert all(isinstance(row, dict) and row["name"] for row in catalogue.rows(kind))
