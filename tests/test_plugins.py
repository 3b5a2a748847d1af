"""Names to objects: the folder is the registry, and a broken plug-in is told, not fatal."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from edgekd import plugins
from edgekd.errors import EdgekdError, UsageError


class Point:
    """An entry point as `importlib.metadata` gives it."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value, self.dist = name, "somewhere:thing", None
        self._value = value

    def load(self) -> Any:
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Point]]:
    """Entry points that are found while the test runs."""
    points: list[Point] = []
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: points if group == "edgekd.exporters" else [])
    monkeypatch.setattr(plugins, "_broken", {})
    plugins.entry_points.cache_clear()
    plugins.exporters.cache_clear()
    yield points
    plugins.entry_points.cache_clear()
    plugins.exporters.cache_clear()


class Foreign:
    """An exporter of somebody else's package."""

    format, suffix, extra, schemes = "rknn", ".rknn", None, ("w8a8_static",)

    def availability(self) -> None: ...
    def export(self) -> None: ...
    def open(self) -> None: ...


def test_exporters__are_the_files_of_the_folder() -> None:
    found = plugins.exporters()
    assert {"onnx", "openvino"} <= set(found)
    assert all(found[name].format == name for name in found)


def test_exporters__another_package_joins(installed: list[Point]) -> None:
    installed.append(Point("rknn", Foreign()))
    assert plugins.exporter("rknn").suffix == ".rknn"
    assert "rknn" in plugins.schemes()["w8a8_static"]


def test_exporters__another_package_cannot_replace_ours(installed: list[Point]) -> None:
    impostor = Foreign()
    impostor.format = "onnx"
    installed.append(Point("onnx", impostor))
    assert plugins.exporter("onnx") is not impostor


def test_exporters__one_that_fails_to_load_is_reported_and_left_out(installed: list[Point], capsys: pytest.CaptureFixture[str]) -> None:
    installed += [Point("bad", ImportError("no libfoo.so")), Point("rknn", Foreign())]
    assert "rknn" in plugins.exporters() and "bad" not in plugins.exporters()
    assert "no libfoo.so" in capsys.readouterr().err
    assert [b.name for b in plugins.broken()] == ["bad"]


def test_exporters__one_without_the_contract_is_reported_by_what_it_lacks(installed: list[Point]) -> None:
    class Half:
        format, suffix = "half", ".half"

    installed.append(Point("half", Half()))
    assert "half" not in plugins.exporters()
    assert "schemes" in plugins.broken()[0].reason


def test_exporter__unknown_format_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'onnx'"):
        plugins.exporter("onxx")


def test_yaml_files__names_are_file_names() -> None:
    assert "host" in plugins.yaml_files("edgekd.profiles")


def test_factory__loads_what_is_importable() -> None:
    assert plugins.factory("edgekd.errors:UsageError") is UsageError


@pytest.mark.parametrize("reference", ["no.such.module:x", "edgekd.errors:nothing", "edgekd.errors"])
def test_factory__says_what_cannot_be_loaded(reference: str) -> None:
    with pytest.raises(EdgekdError, match=r"cannot be loaded[\s\S]*module:name"):
        plugins.factory(reference)
