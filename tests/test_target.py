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


@pytest.mark.parametrize(("url", "transport", "kept"), [
    ("ssh://pi@board:2222", "ssh", "ssh://pi@board:2222"), ("adb://", "adb", "adb://"), ("adb://R5CT", "adb", "adb://R5CT"), ("local", "local", None), ("browser", "browser", None),
])
def test_at__is_the_same_target_elsewhere(url: str, transport: str, kept: str | None) -> None:
    before = target.resolve("jetson")
    found = before.at(url, ssh_key=Path("key"))
    assert (found.device.transport, found.device.url, found.device.ssh_key) == (transport, kept, Path("key"))
    assert found.reachable and not before.reachable and found.formats == before.formats
    assert before.at() == before


def test_at__refuses_what_leads_nowhere() -> None:
    with pytest.raises(UsageError, match="did you mean 'ssh'"):
        target.resolve("jetson").at("shh://pi@board")


def test_an_address_may_stand_in_a_target_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("description: x\ndevice: {transport: ssh, how: y, url: 'ssh://pi@board', python: /opt/venv/bin/python}\nformats: {onnx: {schemes: [fp32]}}\n")
    found = target.resolve(str(mine))
    assert found.reachable and found.device.python == "/opt/venv/bin/python"
