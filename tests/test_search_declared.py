"""The declared space: what a recipe may say, which students come of it, and what is refused."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from edgekd import recipe, students
from edgekd.errors import UsageError
from edgekd.search.declared import MOST, Option, everyone, options
from edgekd.search.space import Candidate, parse
from edgekd.search_section import LIMITS, SearchSection, SpaceSection


def section(**space: Any) -> SearchSection:
    return SearchSection.model_validate({"strategy": "explore", "space": space})


def resolved(tmp_path: Path, search: dict[str, Any], **more: Any) -> recipe.Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "smoke", "search": search, **more}))
    return recipe.resolve(path)


def test_recipe__lists_students_unless_told_to_explore() -> None:
    assert {recipe.resolve(name).search.strategy for name in recipe.names() if name != "search"} == {"listed"}


def test_recipe__search_explores() -> None:
    found = recipe.resolve("search")
    assert found.search.strategy == "explore" and found.search.space is not None
    assert sum(o.count for o in options(found.search.space, {})) > found.search.trials, "it shows what a sampler is for"


def test_recipe__a_space_stands_for_students(tmp_path: Path) -> None:
    space = {"students": ["repvit_xs"], "image_sizes": [64]}
    assert resolved(tmp_path, {"strategy": "explore", "space": space}, students=[]).students == []
    with pytest.raises(UsageError, match="needs 'students'"):
        resolved(tmp_path, {"max_trained": 1}, students=[])


def test_recipe__is_read_back_as_it_was_written(tmp_path: Path) -> None:
    found = resolved(tmp_path, {"strategy": "explore", "space": {"students": ["repvit_xs", {"name": "nanosam", "width": 0.25}], "width": {"low": 0.5, "high": 1, "step": 0.25}}})
    (tmp_path / "again.yaml").write_text(recipe.dump(found))
    assert recipe.resolve(tmp_path / "again.yaml").search == found.search
    assert found.search.space is not None and found.search.space.width == [0.5, 0.75, 1.0]


@pytest.mark.parametrize(("space", "said"), [
    ({"students": ["a"], "widht": [1]}, "did you mean 'width'"),
    ({"students": ["a"], "width": {"low": 0.5, "hgh": 1, "step": 0.1}}, "did you mean 'high'"),
    ({"students": ["a"], "width": {"low": 0.5, "high": 1}}, "step is missing"),
    ({"students": ["a"], "width": {"low": 1, "high": 0.5, "step": 0.1}}, "from low up to high"),
    ({"students": ["a"], "depth": {"low": 0.5, "high": 1, "step": 0}}, "in steps above 0"),
    ({"students": ["a"], "width": "wide"}, "a number, a list of numbers"),
    ({"students": ["a"], "width": []}, "a number, a list of numbers"),
    ({"students": ["a"], "width": [0.1]}, "from 0.25 to 4"),
    ({"students": ["a"], "image_sizes": [100]}, "multiples of 32"),
    ({"students": [{"name": "a", "image_sizes": [33]}]}, "multiples of 32"),
    ({"students": ["a", {"name": "a"}]}, "given twice"),
    ({}, "needs 'students' or 'families'"),
])
def test_recipe__refuses_a_space_in_the_users_words(tmp_path: Path, space: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        resolved(tmp_path, {"strategy": "explore", "space": space})
    assert said in str(error.value)


def test_recipe__refuses_a_space_that_nobody_looks_through(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="strategy: explore"):
        resolved(tmp_path, {"space": {"students": ["repvit_xs"]}})
    with pytest.raises(UsageError, match="did you mean 'explore'"):
        resolved(tmp_path, {"strategy": "explor"})


def test_limits__are_those_of_students() -> None:
    assert LIMITS == students.LIMITS


# --- the students


def test_options__are_what_is_listed_and_what_is_declared() -> None:
    found = options(section(students=["repvit_xs", {"name": "nanosam", "width": [0.5, 0.25], "image_sizes": [128]}], width=[0.5, 1], image_sizes=[192, 64]).space, {"repvit_s": [256]})
    assert found == [Option("repvit_s"), Option("repvit_xs", (0.5, 1.0), (1.0,), (64, 192)), Option("nanosam", (0.25, 0.5), (1.0,), (128,))]


def test_options__a_family_is_all_its_students() -> None:
    found = options(SpaceSection(families=["tinyvit"], students=[{"name": "tinyvit_s", "width": [2]}]), {})
    assert [o.name for o in found] == list(students.families()["tinyvit"].configs)
    assert {o.name: o.widths for o in found}["tinyvit_s"] == (2.0,), "a student of its own keeps its own widths"


@pytest.mark.parametrize(("space", "said"), [({"families": ["repvitt"]}, "did you mean 'repvit'"), ({"students": ["repvit_xz"]}, "did you mean 'repvit_xs'")])
def test_options__refuse_names_with_the_nearest(space: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        options(SpaceSection.model_validate(space), {})
    assert said in str(error.value)


def test_options__refuse_a_space_beyond_counting() -> None:
    with pytest.raises(UsageError, match="more than 20000"):
        options(SpaceSection(families=["repvit"], width={"low": 0.25, "high": 4, "step": 0.01}, depth={"low": 0.25, "high": 4, "step": 0.05}), {})  # type: ignore[arg-type]
    assert MOST >= 10_000


def test_everyone__has_names_that_ids_can_hold() -> None:
    found = everyone([Option("repvit_xs", (0.5, 1.0), (0.5, 1.0), (64, 128)), Option("repvit_xs", sizes=(128, 256))])
    assert found == {"repvit_xs-width0.5-depth0.5": [64, 128], "repvit_xs-width0.5": [64, 128], "repvit_xs-depth0.5": [64, 128], "repvit_xs": [64, 128, 256]}
    for name, sizes in found.items():
        assert str(students.parse(name)) == name
        assert parse(Candidate(name, sizes[0], "onnx", "fp32").id).student == name
