"""What is refused before anything is trained, each with what, where and a hint."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgekd import recipe
from edgekd.data.scenes import Scenes
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.checks import check_data, check_recipe, expand
from edgekd.distillation.material import TrainingData
from edgekd.distillation.step import Step
from edgekd.errors import EdgekdError, UsageError
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess
from edgekd.recipe import Recipe, Stage


def changed(*sets: str) -> Recipe:
    return recipe.resolve("smoke", sets)


@pytest.mark.parametrize(("sets", "said", "hint"), [
    (["stages.0.objectives.0.name=feture_mse"], "unknown objective 'feture_mse'", "did you mean 'feature_mse'"),
    (["stages.0.objectives.0.name=dkd"], "needs logits, which the task promptable_segmentation does not give", "classification"),
    (["stages.0.objectives.0.options={temprature: 2}"], "does not take these options", ""),
    (["stages.0.trainable=[encodr]"], "unknown trainable part 'encodr'", "did you mean 'encoder'"),
    (["stages.0.objectives.0.name=mixup"], "'mixup' is no objective, it is a policy", "stages.N.policies"),
    (["stages.0.policies=[{name: mixop}]"], "unknown policy 'mixop'", "mixup"),
    (["stages.0.objectives=[{name: unic}]"], "compares with several teachers", "more_teachers"),
    (["task=promptable_segmentatoin"], "unknown task", "promptable_segmentation"),
])
def test_check_recipe__names_and_needs(sets: list[str], said: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe(changed(*sets))
    assert said in str(caught.value) and hint in str(caught.value)


def test_check_recipe__every_shipped_recipe_passes() -> None:
    for name in recipe.names():
        found = recipe.resolve(name)
        if found.train is None:
            assert check_recipe(found)


def model(width: int) -> Sam:
    torch.manual_seed(width)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, width, 8, 8), torch.nn.ReLU(), torch.nn.Conv2d(width, 32, 2, 2))
    return Sam(f"tiny{width}", encoder, DecoderShape(embed_dim=32, heads=2, mlp_dim=32), Preprocess(64))


def stage(**more: Any) -> Stage:
    return Stage.model_validate({"name": "one", "objectives": [{"name": "feature_mse"}], "steps": 2} | more)


def material(folder: Path, count: int) -> TrainingData:
    teacher, scenes = model(24).eval(), Scenes(seed=4, count=count, size=64)
    return TrainingData([Source(scenes, build_cache(teacher, scenes, folder))], scenes, [], "x")


def test_check_data__too_few_photos(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 photo is too few"):
        check_data([stage()], material(tmp_path, 1))
    check_data([stage()], material(tmp_path / "more", 2))


def test_check_data__too_few_to_compare_with_each_other(tmp_path: Path) -> None:
    found = material(tmp_path, 2)
    from edgekd.distillation import points

    demanding = next(n for n in points.names("objective") if points.registry("objective")[n].min_batch == 2)
    check_data([stage(objectives=[{"name": demanding}])], found)
    with pytest.raises(UsageError, match="photos with each other, and there are 2"):
        many = points.registry("objective")[demanding]
        old, many.min_batch = many.min_batch, 3
        try:
            check_data([stage(objectives=[{"name": demanding}])], found)
        finally:
            many.min_batch = old


def test_check_data__labels_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs labelled photos") as caught:
        check_data([stage(objectives=[{"name": "cross_entropy"}])], material(tmp_path, 2))
    assert "folder of folders" in str(caught.value.hint)


def test_nan_teacher__is_refused_by_the_photo_while_it_is_cached(tmp_path: Path) -> None:
    broken = model(24).eval()
    with torch.no_grad():
        broken.encoder[0].weight[0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(EdgekdError, match="NaN") as caught:
        build_cache(broken, Scenes(seed=4, count=2, size=64), tmp_path)
    assert "4-00000" in str(caught.value)


def test_unknown_tap__lists_the_near_ones(tmp_path: Path) -> None:
    data = material(tmp_path, 2)
    step = Step(model(8), {"tiny24": model(24).eval()}, stage(objectives=[{"name": "hint", "taps": [["encoder.3", "embedding"]]}]))
    with pytest.raises(UsageError, match=r"has no tap 'encoder\.3'; did you mean 'encoder\.") as caught:
        step.bind(Batches(data.sources, Preprocess(64), 2, 0).batch([0, 1]))
    assert "embedding" in str(caught.value.hint)


def test_expand__leaves_stages_without_controllers_as_they_are() -> None:
    stages = [stage(), stage(name="two")]
    assert expand(stages) == stages
