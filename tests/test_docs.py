"""The examples of docs/distillation.md are what they say: a recipe that passes the checks, an objective that keeps the contract."""
from __future__ import annotations

import re
from pathlib import Path

import plugin_samples
import pytest
import torch
import yaml

from edgekd import recipe
from edgekd.distillation.checks import check_recipe

PAGE = Path(__file__).resolve().parents[1] / "docs/distillation.md"
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


def test_recipe_of_the_page__passes_the_checks(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(BLOCKS["recipe"])
    stages = check_recipe(recipe.resolve(path))
    assert [s.name for s in stages] == [s["name"] for s in yaml.safe_load(BLOCKS["recipe"])["stages"]]
    assert stages[0].objectives[1].weight_at(1.0) == 0.0


def test_objective_of_the_page__keeps_the_contract() -> None:
    names: dict[str, type] = {"__name__": "page"}
    exec(BLOCKS["objective"], names)
    objective = names["objective"]()
    losses = objective(plugin_samples.outputs(1), plugin_samples.outputs(2), plugin_samples.context())
    assert losses.shape == (plugin_samples.B,) and bool((losses > 0).all())
    assert objective(plugin_samples.outputs(2), plugin_samples.outputs(2), plugin_samples.context()).tolist() == pytest.approx([0.0] * plugin_samples.B, abs=1e-6)
    ours, theirs = plugin_samples.outputs(1)["embedding"], plugin_samples.outputs(2)["embedding"]
    assert losses[0].item() == pytest.approx(torch.log(torch.cosh(ours - theirs))[0].mean().item(), rel=1e-5)
