"""What all formats share: axes of one length, files that do not run here, components that another format takes, converters in a process of their own."""
from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgekd.export import _child, _program
from edgekd.export.onnx import OnnxExporter, OnnxSession
from tiny import SIZE, conv_component, tiny_sam

from edgekd import api, exporting, plugins
from edgekd.artifact import Tensor, verify
from edgekd.errors import CannotTake, EdgekdError
from edgekd.models.sam import POINTS, components
from edgekd.probes import COUNTS, KINDS, pictures, probe
from edgekd.protocols import ABSENT, Availability, Check, Component, Port
from edgekd.runtime import Fitting, fitted, open_artifact

IMAGES = pictures(2, SIZE, np.random.default_rng(3))
INPUTS = [Tensor(name="points", dtype="float32", shape=["prompts", "points", 2]), Tensor(name="labels", dtype="float32", shape=["prompts", "points"], pad=-2),
          Tensor(name="image", dtype="float32", shape=[1, 3])]
OUTPUTS = [Tensor(name="masks", dtype="float32", shape=["prompts", 1]), Tensor(name="whole", dtype="float32", shape=[1, 3])]


class Sums:
    """A file that takes two prompts of three points: sums the points that are there."""

    executed_precision, executed_ops, inputs = "fp32", {"Sum": 1}, list[Port]()

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert inputs["points"].shape == (2, 3, 2) and inputs["labels"].shape == (2, 3)
        self.seen.append(inputs["points"].shape)
        return {"masks": (inputs["points"].sum(-1) * (inputs["labels"] != ABSENT)).sum(1, keepdims=True), "whole": inputs["image"]}


@pytest.mark.parametrize(("prompts", "points", "calls"), [(1, 1, 1), (2, 3, 1), (3, 2, 2), (5, 1, 3)])
def test_fitted__any_number_of_prompts_and_points_goes_through(prompts: int, points: int, calls: int) -> None:
    file, rng = Sums(), np.random.default_rng(0)
    given = {"points": rng.standard_normal((prompts, points, 2)), "labels": np.ones((prompts, points)), "image": np.ones((1, 3))}
    out = fitted(file, INPUTS, OUTPUTS, {"prompts": 2, "points": 3}).run(given)
    np.testing.assert_allclose(out["masks"], given["points"].sum((1, 2))[:, None])
    assert len(file.seen) == calls and out["whole"].shape == (1, 3)


def test_fitted__longer_than_the_file_is_refused_with_what_to_do() -> None:
    with pytest.raises(EdgekdError, match="3 points at most, and is given 4") as caught:
        Fitting(INPUTS, {"prompts": 2, "points": 3}).calls({"points": np.zeros((1, 4, 2))})
    assert "--length points=4" in (caught.value.hint or "")


def test_fixed__the_example_has_the_lengths_and_no_axis_varies() -> None:
    part = components(tiny_sam())["decoder"].fixed()
    assert part.example["point_coords"].shape == (1, POINTS, 2) and part.example["mask_input"].shape[0] == 1 and not part.dynamic
    assert all(t.is_contiguous() for t in part.example.values())


def test_fixed__a_size_that_follows_a_value_cannot_be() -> None:
    from edgekd.models.official_decoder import official_component

    with pytest.raises(CannotTake, match="num_points"):
        official_component(tiny_sam()).fixed()


# --- files that take one length, that do not run here, that another format takes -------------------------------------------


class FixedOnnx(OnnxExporter):
    """ONNX with fixed shapes; counts what it was given."""

    format, fixed_shapes = "fixed", True

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8", **tuned: Any) -> list[Path]:
        assert not component.dynamic
        for sample in calibration or []:
            assert {n: v.shape for n, v in sample.items()} == {n: tuple(v.shape) for n, v in component.example.items()}
        return super().export(component, path, scheme=scheme, calibration=calibration, qdq=qdq, **tuned)


class Interpreted(OnnxSession):
    stand_in_for = "an interpreter"


class Elsewhere(OnnxExporter):
    """A format that is written here and runs elsewhere."""

    format, wrong = "elsewhere", False

    def availability(self) -> Availability:
        return Availability(True, version="elsewhere 1", reason="no such device here", runs=False)

    def check(self, component: Component, path: Path, *, scheme: str) -> Check:
        if self.wrong:
            raise EdgekdError("the compiler does not take node 7", where=component.name)
        return Check("built", "compiled by a compiler", "fp32", {"Conv": 3}, {"engine_bytes": path.stat().st_size})

    def stand_in(self, path: Path, *, scheme: str, threads: int | None = None) -> Interpreted:
        return Interpreted(path, threads)


class EncodersOnly(OnnxExporter):
    """A format for encoders, with ONNX beside it."""

    format, beside, refuses = "encoders", "onnx", "decoder"

    def export(self, component: Component, path: Path, *, scheme: str, calibration: Any = None, qdq: str = "u8s8", **tuned: Any) -> list[Path]:
        if component.name == self.refuses:
            raise CannotTake("it attends", where=component.name)
        return super().export(component, path.with_suffix(".enc"), scheme=scheme, calibration=calibration, qdq=qdq, **tuned)

    suffix = ".enc"


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    known = {**plugins.exporters(), **{e.format: e for e in (FixedOnnx(), Elsewhere(), EncodersOnly())}}
    monkeypatch.setattr(plugins, "exporters", lambda: known)
    return known


def test_export__a_file_of_fixed_shapes_answers_any_prompt(formats: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_sam()
    manifest = exporting.export_model(model, tmp_path / "a", format="fixed", scheme="fp32", examples=IMAGES, threads=1, lengths={"prompts": 4})
    part = manifest.components["decoder"]
    assert part.fixed == {"prompts": 4, "points": POINTS} and part.parity["passed"] and set(part.parity["counts"]) == set(COUNTS)
    assert {t.name: t.pad for t in part.inputs}["point_labels"] == ABSENT and manifest.components["encoder"].fixed == {}
    shipped = open_artifact(tmp_path / "a", threads=1)
    for kind in KINDS:
        p = probe(kind, 6, SIZE, np.random.default_rng(1))
        with torch.no_grad():
            embedding = model.embed(torch.from_numpy(IMAGES[:1]))
            masks, _ = model.decode(embedding, *(torch.from_numpy(a) for a in (p.points, p.labels, p.mask_input, p.has_mask)))
        np.testing.assert_allclose(shipped.decode(embedding, p.points, p.labels, p.mask_input, p.has_mask)[0], masks.numpy(), atol=1e-4)


def test_export__calibration_is_cut_to_fixed_shapes(formats: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    from edgekd.data import open_data
    from edgekd.quantization.calibration import calibrate

    model = tiny_sam()
    calibration = calibrate(model, open_data(photos, masks=False), limit=3)
    manifest = exporting.export_model(model, tmp_path / "a", format="fixed", scheme="w8a8_static", examples=IMAGES, threads=1, calibration=calibration)
    assert manifest.components["encoder"].scheme == "w8a8_static"


def test_export__what_does_not_run_here_says_what_was_checked(formats: dict[str, Any], tmp_path: Path) -> None:
    manifest = exporting.export_model(tiny_sam(), tmp_path / "a", format="elsewhere", scheme="fp32", examples=IMAGES, threads=1)
    part = manifest.components["encoder"]
    assert not manifest.ran_here and (part.state, part.stand_in) == ("built", "an interpreter") and part.parity["passed"]
    assert part.findings["how"] == "compiled by a compiler" and part.findings["engine_bytes"] > 0 and part.executed_ops == {"Conv": 3}
    assert "built, not run" in manifest.checked and "ran here" not in manifest.checked
    with pytest.raises(EdgekdError, match="no such device here"):
        open_artifact(tmp_path / "a").embed(IMAGES)
    assert open_artifact(tmp_path / "a", stand_in=True).embed(IMAGES).shape == (2, 32, 4, 4)


def test_export__what_the_compiler_refuses_is_no_artifact(formats: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elsewhere, "wrong", True)
    with pytest.raises(EdgekdError, match="node 7"):
        exporting.export_model(tiny_sam(), tmp_path / "a", format="elsewhere", scheme="fp32", examples=IMAGES, threads=1)
    assert not list(tmp_path.iterdir())


def test_export__a_component_that_a_format_never_takes_comes_in_another(formats: dict[str, Any], tmp_path: Path) -> None:
    manifest = exporting.export_model(tiny_sam(), tmp_path / "a", format="encoders", scheme="fp32", examples=IMAGES, threads=1)
    part = manifest.components["decoder"]
    assert (part.format, part.file) == ("onnx", "decoder.onnx") and "encoders cannot take it, it attends" in (part.note or "")
    assert {f.path for f in verify(tmp_path / "a").files} == {"encoder.enc", "decoder.onnx"}
    assert open_artifact(tmp_path / "a").embed(IMAGES).shape == (2, 32, 4, 4)


def test_export__a_format_that_takes_no_encoder_is_refused(formats: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncodersOnly, "refuses", "encoder")
    with pytest.raises(CannotTake, match="it attends"):
        exporting.export_model(tiny_sam(), tmp_path / "a", format="encoders", scheme="fp32", examples=IMAGES, threads=1)


def test_api_export__one_failing_format_is_a_row(formats: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EncodersOnly, "export", full)
    rows = api.export(model="repvit_s", to=["encoders", "onnx"], output=tmp_path)["exports"]
    assert [r["status"] for r in rows] == ["failed", "ok"] and "No space left" in rows[0]["reason"]
    assert [p.name for p in tmp_path.iterdir()] == [rows[1]["id"]]


# --- the child process ---------------------------------------------------------------------------------------------------


def behave(how: str) -> dict[str, Any]:
    """What a converter may do to its process."""
    print("noise on stdout")
    if how == "abort":
        os.abort()
    if how == "hang":
        time.sleep(60)
    if how == "raise":
        raise EdgekdError("it has rank 6", hint="use another")
    if how == "exit":
        print("license not found")
        os._exit(3)
    return {"how": how, "pid": os.getpid()}


def test_child__answers_and_keeps_our_stdout_clean(capfd: pytest.CaptureFixture[str]) -> None:
    found = _child.call("test_formats:behave", {"how": "well"}, minutes=1, what="converter")
    assert found["how"] == "well" and found["pid"] != os.getpid() and capfd.readouterr().out == ""


@pytest.mark.parametrize(("how", "says", "minutes"), [("abort", "died of signal SIGABRT", 1.0), ("hang", "stopped after 0.1 minutes", 0.1),
                                                     ("raise", "it has rank 6", 1.0), ("exit", "exit code 3: .*license not found", 1.0)])
def test_child__however_it_ends_there_is_a_reason(how: str, says: str, minutes: float) -> None:
    with pytest.raises(EdgekdError, match=says) as caught:
        _child.call("test_formats:behave", {"how": how}, minutes=minutes, what="converter")
    assert how != "raise" or caught.value.hint == "use another"


def test_child__a_script_needs_nothing_of_edgekd(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text("import sys\ndef work(number):\n    return {'twice': 2 * number, 'edgekd': 'edgekd' in sys.modules}\n")
    assert _child.call(f"{script}:work", {"number": 4}, minutes=1, what="script") == {"twice": 8, "edgekd": False}


# --- the torch program -------------------------------------------------------------------------------------------------------


class Positions(torch.nn.Module):
    """Index tables computed in forward, an alias and a buffer that lies in another order than its axes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(7, 4))
        self.register_buffer("turned", torch.randn(4, 6).T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(4)[:, None] - torch.arange(4)[None] + 3
        return x @ self.table[offsets].mean(0).detach() + self.turned[:1, :4]


def test_program__constants_are_folded_and_everything_is_contiguous() -> None:
    part = Component("part", Positions().eval(), {"x": torch.randn(2, 4)}, ("y",))
    found = _program.program(part)
    kinds = [str(n.target) for n in found.graph.nodes if n.op == "call_function"]
    assert not any("arange" in k or "index" in k or "alias" in k or "detach" in k for k in kinds)
    assert all(t.is_contiguous() for t in [*found.state_dict.values(), *found.constants.values()])
    torch.testing.assert_close(found.module()(*part.example.values()), part.module(*part.example.values()))
    assert not part.module.turned.is_contiguous()  # the caller's own is left alone


def test_program__the_decoder_takes_up_to_so_many_prompts() -> None:
    part = components(tiny_sam())["decoder"]
    found = _program.program(part, longest={"prompts": 64, "points": 16}).module()
    for prompts, points in ((2, 2), (5, 3), (64, 16)):
        asked = probe("point", prompts, SIZE, np.random.default_rng(0))
        inputs = [part.example["image_embeddings"], torch.rand(prompts, points, 2) * SIZE, torch.ones(prompts, points),
                  torch.from_numpy(asked.mask_input), torch.from_numpy(asked.has_mask)]
        with torch.no_grad():
            torch.testing.assert_close(found(*inputs)[0], part.module(*inputs)[0], atol=1e-4, rtol=1e-4)


def test_program__training_mode_is_refused() -> None:
    part = conv_component()
    part.module.train()
    with pytest.raises(EdgekdError, match="training mode"):
        _program.program(part)


def test_row__is_strict_json(formats: dict[str, Any], tmp_path: Path) -> None:
    row = api.export(model="repvit_s", to=["elsewhere"], output=tmp_path)["exports"][0]
    assert row["ran_here"] is False and row["checked"] and json.loads(json.dumps(row, allow_nan=False))["components"]["encoder"]["state"] == "built"
