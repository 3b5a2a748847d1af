"""Recipes: strict, every problem at once, extended and overridden; the shipped ones load."""
from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from edgekd import config, recipe
from edgekd.errors import UsageError
from edgekd.recipe import Recipe

MINIMAL = """
students: [{name: repvit_xs}]
stages:
  - {name: encoder, objectives: [{name: feature_mse}], steps: 3}
"""


def write(folder: Path, text: str, name: str = "my.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def error(name: str | Path, *sets: str) -> str:
    with pytest.raises(UsageError) as caught:
        recipe.resolve(name, sets)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- shipped recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.names())
def test_shipped__loads_and_its_header_says_how_to_run_it(name: str) -> None:
    found = recipe.resolve(name)
    assert found.name == name and found.description
    header = [line for line in recipe.shipped()[name].read_text().splitlines() if line.startswith("#")]
    assert header[0].startswith(f"# {name}:")
    text = "\n".join(header)
    assert "Command:" in text and "edgekd " in text and "Expect:" in text


@pytest.mark.parametrize("name", recipe.names())
def test_shipped__dump_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    found = recipe.resolve(name)
    assert recipe.resolve(write(tmp_path, recipe.dump(found))) == found


def test_smoke__is_much_smaller_than_default() -> None:
    smoke, default = recipe.resolve("smoke"), recipe.resolve("default")
    assert sum(s.steps for s in smoke.stages) < sum(s.steps for s in default.stages) / 3
    assert len(smoke.students) == 1 and smoke.search.max_trained == 1


# --- loading -------------------------------------------------------------------------------------------------------


def test_file__takes_its_name_from_the_file(tmp_path: Path) -> None:
    assert recipe.resolve(write(tmp_path, MINIMAL, "lab.yaml")).name == "lab"


def test_unknown_name__nearest_is_offered() -> None:
    assert "did you mean 'smoke'" in error("smok")


def test_missing_file__is_named() -> None:
    assert "/no/such.yaml" in error("/no/such.yaml")


def test_folder_or_binary__is_an_error_not_a_crash(tmp_path: Path) -> None:
    assert "cannot be read" in error(tmp_path / "x/../")
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "not a text file" in error(binary)


@pytest.mark.parametrize(("text", "said"), [
    ("a: [1", "line"), ("- 1\n- 2\n", "mapping of keys"), ("", "mapping of keys"), ("teacher: a\nteacher: b\n", "'teacher' is given twice"),
    ("!!python/object/apply:os.system [ls]", "not valid YAML"),
])
def test_bad_yaml__is_told_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    message = error(write(tmp_path, text))
    assert said in message and "my.yaml" in message


# --- extends -------------------------------------------------------------------------------------------------------


def test_extends__merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: default\nbudget: {latency_ms: 20}\nstudents: [{name: tinyvit_xs}]\n")
    found, base = recipe.resolve(path), recipe.resolve("default")
    assert found.budget.latency_ms == 20 and found.budget.metric == base.budget.metric
    assert [s.name for s in found.students] == ["tinyvit_xs"]
    assert found.stages == base.stages


def test_extends__a_path_is_relative_to_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path, MINIMAL, "base.yaml")
    child = write(tmp_path / "a", "extends: ../base.yaml\nteacher: t7\n")
    monkeypatch.chdir("/")
    assert recipe.resolve(child).teacher == "t7"


def test_extends__a_chain_works_and_a_cycle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "one.yaml")
    write(tmp_path, "extends: ./one.yaml\ndescription: d1\n", "two.yaml")
    assert recipe.resolve(write(tmp_path, "extends: ./two.yaml\nteacher: t\n", "three.yaml")).description == "d1"
    write(tmp_path, "extends: ./three.yaml\n", "one.yaml")
    message = error(tmp_path / "three.yaml")
    assert "extends itself" in message and message.count("three.yaml") == 2


def test_merge__changes_neither() -> None:
    above, below = {"a": {"x": 1, "y": [1]}}, {"a": {"y": [2]}}
    assert config.merge(above, below) == {"a": {"x": 1, "y": [2]}}
    assert above == {"a": {"x": 1, "y": [1]}} and below == {"a": {"y": [2]}}


# --- set: --------------------------------------------------------------------------------------------------------------


def test_set_in_a_file__changes_single_values_of_what_it_extends(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: default\nteacher: t2\nset:\n  stages.0.steps: 7\n  stages.1.prompts.clicks: [2, 3]\n  budget.latency_ms: 9\n")
    found, base = recipe.resolve(path, ["stages.1.steps=3"]), recipe.resolve("default")
    assert (found.stages[0].steps, found.stages[1].steps, found.stages[1].prompts.clicks, found.budget.latency_ms) == (7, 3, (2, 3), 9)
    assert found.stages[0].model_copy(update={"steps": base.stages[0].steps}) == base.stages[0]


def test_set_in_a_file__applies_before_a_child_s_own(tmp_path: Path) -> None:
    write(tmp_path, "extends: default\nset: {stages.0.steps: 7, stages.0.lr: 0.5}\n", "one.yaml")
    found = recipe.resolve(write(tmp_path, "extends: ./one.yaml\nset: {stages.0.steps: 8}\n"))
    assert (found.stages[0].steps, found.stages[0].lr) == (8, 0.5)


@pytest.mark.parametrize(("text", "said"), [
    ("extends: default\nset: {stages.7.steps: 1}\n", "'7' is not a place in a list of 2"), ("extends: default\nset: [1]\n", "mapping of paths"),
    ("extends: default\nset: {stages.0.stepz: 1}\n", "did you mean 'steps'"),
])
def test_set_in_a_file__what_is_wrong_is_told_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    message = error(write(tmp_path, text))
    assert said in message and "my.yaml" in message


# --- --set ---------------------------------------------------------------------------------------------------------


def test_set__values_are_yaml_and_lists_have_places(tmp_path: Path) -> None:
    found = recipe.resolve(write(tmp_path, MINIMAL), ["stages.0.lr=1e-4", "stages.0.objectives.0.weight=2", "formats=[onnx]", "data.limit=null",
                                                     "stages.0.objectives.0.options.beta=0.5", "teacher=a:b=c"])
    stage = found.stages[0]
    assert (stage.lr, stage.objectives[0].weight, stage.objectives[0].options) == (1e-4, 2.0, {"beta": 0.5})
    assert found.formats == ["onnx"] and found.data.limit is None and found.teacher == "a:b=c"


def test_set__reaches_defaults_that_the_file_leaves_out(tmp_path: Path) -> None:
    found = recipe.resolve(write(tmp_path, MINIMAL), ["students.0.image_sizes.0=192", "stages.0.trainable.0=decoder"])
    assert found.students[0].image_sizes == [192] and found.stages[0].trainable == ["decoder"]


@pytest.mark.parametrize(("assignment", "said"), [
    ("quantization.schmes=[fp32]", "'quantization.schmes', did you mean 'schemes'?"),
    ("stages.0.objectives.0.wieght=1", "'stages.0.objectives.0.wieght', did you mean 'weight'?"),
    ("bugdet.latency_ms=3", "'bugdet', did you mean 'budget'?"),
    ("zzz=3", "known here: name,"),
    ("stages.5.lr=1", "'5' is not a place in a list of 1"),
    ("stages.first.lr=1", "'first' is not a place"),
    ("teacher.x=1", "nothing below a plain value"),
    ("teacher", "KEY=VALUE"),
    ("=1", "KEY=VALUE"),
    ("teacher=[", "not valid YAML"),
])
def test_set__what_is_wrong_is_told(tmp_path: Path, assignment: str, said: str) -> None:
    assert said in error(write(tmp_path, MINIMAL), assignment)


# --- validation ----------------------------------------------------------------------------------------------------


def test_problems__all_at_once_in_user_words(tmp_path: Path) -> None:
    message = error(write(tmp_path, MINIMAL + "teachr: x\nprofile: {repeats: 3}\nformats: onnx\n"), "stages.0.precision=bf61", "stages.0.steps=many")
    assert "5 problems" in message
    for said in ("Unknown key: 'teachr', did you mean 'teacher'?", "'profile.repeats': it should be greater than or equal to 10, not 3",
                 "'formats': it should be auto or a list of names, not 'onnx'", "'bf61' is not 'bf16', 'fp32' or 'auto', did you mean 'bf16'?",
                 "'stages.0.steps'"):
        assert said in message
    assert "pydantic" not in message and "Input" not in message


def test_problems__a_missing_key_is_named(tmp_path: Path) -> None:
    assert "Missing key: 'stages.0.steps'" in error(write(tmp_path, "students: [{name: a}]\nstages: [{name: e, objectives: [{name: o}]}]\n"))


@pytest.mark.parametrize(("text", "said"), [
    ("teacher: x\n", "needs 'students' and 'stages'"),
    (MINIMAL.replace("repvit_xs", "repvit_xs, image_sizes: [250]"), "multiples of 32, not 250"),
    (MINIMAL.replace("[{name: repvit_xs}]", "[{name: a}, {name: a}]"), "student 'a' is given twice"),
    (MINIMAL.replace("steps: 3", "steps: 3, prompts: {clicks: [3, 2]}"), "fewest <= most"),
    (MINIMAL.replace("steps: 3", "steps: 3, optimizer: sgd"), "'sgd' is not"),
    ("train: {data: ['scenes:seed=1,count=2'], steps: 3, weights: [1, 2]}\n", "2 numbers for 1 sets"),
])
def test_problems__of_meaning(tmp_path: Path, text: str, said: str) -> None:
    assert said in error(write(tmp_path, text))


def test_train_alone__is_a_recipe(tmp_path: Path) -> None:
    found = recipe.resolve(write(tmp_path, "train: {data: ['scenes:seed=1,count=2'], steps: 3}\n"), ["train.lr=2e-3"])
    assert found.train is not None and found.train.lr == 2e-3


def test_recipe__cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        recipe.resolve("smoke").teacher = "x"  # type: ignore[misc]


# --- auto ----------------------------------------------------------------------------------------------------------

RUNS = {"tensorrt": ["fp16"], "openvino": ["fp32", "bf16"], "onnx": ["fp32", "w8a8_static"]}
EXPORTS = {"onnx": ("fp32", "w8a8_static", "w8_dynamic"), "openvino": ("fp32", "bf16")}


def auto(**changes: object) -> Recipe:
    return recipe.with_auto(recipe.resolve("default").model_copy(update={"formats": "auto", **changes}), runs=RUNS, exports=EXPORTS)


def test_auto__is_what_the_target_runs_and_we_write() -> None:
    found = auto()
    assert found.formats == ["openvino", "onnx"]
    assert found.quantization.schemes == ["fp32", "bf16", "w8a8_static"]


def test_auto__keeps_what_is_spelled_out() -> None:
    assert auto(formats=["onnx"]).formats == ["onnx"]
    assert auto(formats=["onnx"]).quantization.schemes == ["fp32", "w8a8_static"]


def test_auto__nothing_in_common_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no exporter here writes"):
        recipe.with_auto(recipe.resolve("default"), runs={"tensorrt": ["fp16"]}, exports=EXPORTS)


def test_dump__is_plain_yaml_in_order() -> None:
    raw = yaml.safe_load(recipe.dump(recipe.resolve("smoke")))
    assert list(raw)[:4] == ["name", "description", "task", "teacher"]
    assert list(raw["stages"][0])[:2] == ["name", "objectives"]
