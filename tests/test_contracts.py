"""The contracts, walked over every registry: what is found is tested the day it is added."""
from __future__ import annotations

import plugin_samples
import pytest
import torch

from edgekd import catalogue, plugins, recipe, schemes, students, target, tasks, teachers
from edgekd.distillation import points
from edgekd.distillation.outputs import NEEDS
from edgekd.models.sam import components
from edgekd.protocols import Availability, Promptable, facts
from edgekd.tasks.promptable import baselines
from edgekd.tasks.promptable.predictor import Predictor
from edgekd.teachers import huggingface

S, E, P = 64, 32, 3


# --- exporters (their export and parity are in test_exporting.py) -----------------------------------------------------


@pytest.mark.parametrize("name", plugins.exporters())
def test_exporter__keeps_the_contract(name: str) -> None:
    exporter = plugins.exporter(name)
    assert exporter.format == name and "." in exporter.suffix
    assert exporter.schemes and set(exporter.schemes) <= set(schemes.names())
    known, found = facts(exporter), exporter.availability()
    assert isinstance(found, Availability) and isinstance(known.fixed_shapes, bool) and (known.beside is None or known.beside in plugins.exporters())
    assert found.version if found.ok else found.reason and found.fix
    assert found.runs or found.reason


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


# --- plug-ins of distillation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("point", "name"), [(p, n) for p in points.FOLDERS for n in points.names(p)])
def test_plugin__describes_itself(point: str, name: str) -> None:
    found = points.describe(point, name)
    assert found["family"] in points.FAMILIES and found["paper"] and found["summary"] and set(found["needs"]) <= NEEDS
    assert found["needs"] or point != "objective"


@pytest.mark.parametrize("name", points.names("objective"))
def test_objective__is_per_sample_finite_and_has_a_gradient(name: str) -> None:
    objective = plugin_samples.bound(name)
    student, teacher = plugin_samples.outputs(1), plugin_samples.outputs(2)
    leaves = [t.requires_grad_() for t in plugin_samples.tensors(student)]
    loss = objective(student, teacher, plugin_samples.context())
    assert loss.ndim == 1 and len(loss) in (plugin_samples.B, plugin_samples.B * plugin_samples.P)
    assert torch.isfinite(loss).all() and (loss >= -1e-5).all()
    loss.mean().backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients) and any(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("name", [n for n in points.names("objective") if points.registry("objective")[n].least_at_teacher])
def test_objective__is_least_where_the_student_is_the_teacher(name: str) -> None:
    objective, teacher = plugin_samples.bound(name), plugin_samples.outputs(2)
    with torch.no_grad():
        assert objective(teacher, teacher, plugin_samples.context()).mean() < objective(plugin_samples.outputs(1), teacher, plugin_samples.context()).mean()


# --- recipes and targets name only what there is ----------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.names())
def test_recipe__names_only_what_there_is(name: str) -> None:
    found = recipe.resolve(name)
    task = tasks.get(found.task)
    assert tasks.knowing(found.teacher) is not None or huggingface.is_hub(found.teacher)
    for student in found.students:
        task.student_name(student.name)
    for stage in found.stages:
        for one in stage.objectives:
            points.build("objective", one.name, one.options)
    if found.formats != "auto":
        assert set(found.formats) <= set(plugins.exporters())
    if found.quantization.schemes != "auto":
        assert set(found.quantization.schemes) <= set(schemes.names())


@pytest.mark.parametrize("name", target.names())
def test_target__leaves_the_default_recipe_something_to_try(name: str) -> None:
    exports = {n: e.schemes for n, e in plugins.exporters().items()}
    filled = recipe.with_auto(recipe.resolve("default"), runs=target.resolve(name).runs, exports=exports)
    assert filled.formats and filled.quantization.schemes


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
