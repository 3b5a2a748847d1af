"""Targets: the shipped devices are complete and every fact names its source."""
from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import plugins, schemes, target
from edgekd.errors import UsageError

WANTED = {"host", "jetson_orin_nano", "jetson_agx_orin", "iphone_15", "pixel_8", "galaxy_s24", "raspberry_pi_5", "intel_cpu", "browser"}
SCHEMES = set(schemes.names())
ASKED = {"onnx", "openvino", "tensorrt"}
"""formats that int8 is written into in the style of the target; the others have one of their own"""
FORMATS = set(plugins.exporters())


def test_shipped__all_of_them() -> None:
    assert set(target.names()) >= WANTED


@pytest.mark.parametrize("name", target.names())
def test_shipped__loads_and_names_known_formats_and_schemes(name: str) -> None:
    found = target.resolve(name)
    assert found.name == name and found.description and found.device.how
    assert set(found.runs) <= FORMATS
    for able in found.runs.values():
        assert set(able) <= SCHEMES and len(able) == len(set(able))
    for format, support in found.formats.items():
        if format in ASKED and any(s.startswith("w8a8") for s in support.schemes):
            assert support.qdq, f"{format} runs static int8 on {name}: its profile must say how it is written"


@pytest.mark.parametrize("name", target.names())
def test_shipped__every_fact_says_where_it_comes_from(name: str) -> None:
    for fact in target.resolve(name).facts:
        assert fact.value and len(fact.source) > 10
        assert not fact.source.startswith("measured") or any(c.isdigit() for c in fact.source), "a measurement has a date"


@pytest.mark.parametrize("name", target.names())
def test_shipped__can_be_built_for_with_what_is_here(name: str) -> None:
    """Every device runs at least one format and precision that this version writes."""
    exporters = plugins.exporters()
    runs = target.resolve(name).runs
    assert any(set(runs[f]) & set(exporters[f].schemes) for f in runs if f in exporters)


@pytest.mark.parametrize(("alias", "name"), [("jetson", "jetson_orin_nano"), ("intel", "intel_cpu"), ("rpi5", "raspberry_pi_5")])
def test_alias(alias: str, name: str) -> None:
    assert target.resolve(alias).name == name
    assert alias not in target.names()


def test_aliases__are_unique() -> None:
    every = [a for n in target.names() for a in target.resolve(n).aliases]
    assert len(every) == len(set(every)) and not set(every) & set(target.names())


def test_host__is_here_and_prefers_unsigned_activations() -> None:
    host = target.resolve("host")
    assert host.reachable and host.device.transport == "local"
    assert host.qdq("onnx") == "u8s8"
    assert not target.resolve("jetson").reachable and target.resolve("jetson").qdq("onnx") == "s8s8_symmetric"


def test_unknown__nearest_and_all_are_named() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'jetsonn'[\s\S]*did you mean 'jetson'[\s\S]*raspberry_pi_5"):
        target.resolve("jetsonn")


def test_file__can_extend_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "my_board.yaml"
    path.write_text("extends: raspberry_pi\nname: my_board\nlimits: {memory_mb: 4000}\n")
    found = target.resolve(path)
    assert (found.name, found.limits.memory_mb) == ("my_board", 4000)
    assert found.runs == target.resolve("raspberry_pi_5").runs


def test_file__problems_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text("description: x\ndevice: {transport: telnet, how: y}\nformats: {onnx: {schems: [fp32]}}\n")
    with pytest.raises(UsageError) as caught:
        target.resolve(path)
    message = str(caught.value)
    assert "3 problems" in message
    assert "'telnet' is not 'local'" in message
    assert "Unknown key: 'formats.onnx.schems', did you mean 'schemes'?" in message
    assert "Missing key: 'formats.onnx.schemes'" in message


def test_file__a_target_without_formats_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text("description: x\ndevice: {transport: local, how: y}\nformats: {}\n")
    with pytest.raises(UsageError, match="formats is empty"):
        target.resolve(path)


def test_plugin__another_package_adds_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    board = {**target.resolve("host").model_dump(), "name": "lab_board", "aliases": ["lb"]}
    monkeypatch.setattr(plugins, "entry_points", lambda group: {"lab_board": board})
    target.aliases.cache_clear()
    try:
        assert target.resolve("lab_board").name == target.resolve("lb").name == "lab_board"
        assert "lab_board" in target.names()
    finally:
        target.aliases.cache_clear()


def test_dump__is_the_same_target(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(target.dump(target.resolve("jetson")))
    assert target.resolve(path) == target.resolve("jetson")
