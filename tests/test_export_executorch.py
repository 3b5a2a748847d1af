"""ExecuTorch's formats: what runs here is held against torch; what does not is read back from the written file."""
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgekd.export import _child, _executorch, executorch
from edgekd.export._executorch_file import read
from edgekd.export.executorch import exporter
from edgekd.export.executorch_coreml import exporter as coreml
from edgekd.export.executorch_vulkan import exporter as vulkan
from tiny import conv_component, expected, linear_component, samples
from torch import Tensor, nn

from edgekd.comparing import is_integer
from edgekd.errors import EdgekdError, UsageError
from edgekd.protocols import Component

if not exporter.availability().ok:
    pytest.skip(f"{exporter.availability().reason}: {exporter.availability().fix}", allow_module_level=True)

Call = Callable[..., dict[str, Any]]


def here(function: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
    """`_child.call` without the child, which takes seconds to start: failures become what a child's become."""
    module, _, name = function.rpartition(":")
    try:
        return dict(getattr(importlib.import_module(module), name)(**request))
    except Exception as e:
        raise EdgekdError(f"ExecuTorch: {str(e).strip().splitlines()[0]}") from e


@pytest.fixture(autouse=True)
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_child, "call", here)


class Mixed(nn.Module):
    """What a decoder is made of: a buffer that does not lie in the order of its axes, layer norms of two channels far from zero, attention with a bias."""

    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.randn(8, 6).t())
        self.narrow, self.norm, self.project, self.out = nn.LayerNorm(2, eps=1e-6), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 4)
        nn.init.uniform_(self.narrow.weight)

    def forward(self, tokens: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.project(self.norm(tokens + self.place)).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, bias[:, None, None]).transpose(1, 2).flatten(2)
        return self.out(mixed), self.narrow(tokens[..., :2] * 1e-2 + 12)


def mixed_component() -> Component:
    torch.manual_seed(0)
    return Component("mixed", Mixed().eval(), {"tokens": torch.randn(1, 6, 8), "bias": torch.zeros(1, 6)}, ("answer", "narrow"))


def of(module: nn.Module, **example: Tensor) -> Component:
    return Component("part", module.eval(), example, ("y",))


def written(component: Component, folder: Path, with_: Any = exporter, **options: Any) -> Path:
    path = folder / f"{component.name}.pte"
    assert with_.export(component, path, **options) == [path]
    assert [p.name for p in folder.iterdir()] == [path.name], "nothing else is left"
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Opened files of `mixed_component`, one a scheme."""
    sessions: dict[str, Any] = {}

    def session(scheme: str) -> Any:
        if scheme not in sessions:
            part = mixed_component()
            path = written(part, tmp_path_factory.mktemp(scheme), scheme=scheme, calibration=samples(part, 8) if scheme == "w8a8_static" else None)
            sessions[scheme] = exporter.open(path, scheme=scheme, threads=1)
        return sessions[scheme]

    yield session


def test_availability_names_the_version_and_the_command_that_mends_it(monkeypatch, tmp_path):
    assert exporter.availability().runs and not coreml.availability().runs and not vulkan.availability().runs
    assert str(exporter.availability().version).startswith("executorch ")
    monkeypatch.setattr(_executorch, "package_version", lambda name: None)
    for each in (exporter, vulkan):
        found = each.availability()
        assert not found.ok and "executorch" in str(found.reason) and str(found.fix).startswith('pip install "edgekd[executorch]"')
    with pytest.raises(EdgekdError, match="not installed") as e:
        exporter.export(conv_component(), tmp_path / "x.pte", scheme="fp32")
    assert e.value.hint == exporter.availability().fix


def test_fp32_answers_as_torch_does_and_tells_what_xnnpack_was_given(mixed):
    """The three silent faults: a buffer out of order, layer norms (NaN), attention; none of them is left to ExecuTorch's own kernels."""
    part, session = mixed_component(), mixed("fp32")
    for inputs in samples(part, 3, seed=1):
        found = session.run(inputs)
        assert list(found) == ["answer", "narrow"]
        for ours, theirs in zip(found.values(), expected(part, inputs), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-3 if theirs.shape[-1] == 2 else 1e-5)
    assert session.executed_precision == "fp32" and not any(is_integer(op) for op in session.executed_ops)
    assert {"FullyConnected:f32", "BatchMatrixMultiply:f32", "Softmax:f32", "ReciprocalSquareRoot:f32"} <= set(session.executed_ops)
    assert not any(op.startswith("portable") and ("norm" in op or "softmax" in op or "where" in op) for op in session.executed_ops)


def test_layer_norm_of_executorch_alone_is_not_to_be_trusted(tmp_path):
    """Why layer norms are written out: when this fails, ExecuTorch has mended its kernel and the rewriting may go."""
    from executorch.exir import to_edge_transform_and_lower

    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 0.01 + 12
    made = to_edge_transform_and_lower(torch.export.export(nn.LayerNorm(2, eps=1e-6).eval(), (x,))).to_executorch()
    (tmp_path / "x.pte").write_bytes(made.buffer)
    (found,) = exporter.open(tmp_path / "x.pte", scheme="fp32").run({"input0": x.numpy()}).values()
    wanted = nn.functional.layer_norm(x.double(), (2,), eps=1e-6).numpy()
    assert not np.isfinite(found).all() or np.abs(found - wanted).max() > 0.01


def test_names_come_from_the_file(mixed):
    part, session = mixed_component(), mixed("fp32")
    assert [(p.name, p.shape, p.dtype) for p in session.inputs] == [("tokens", (1, 6, 8), "float32"), ("bias", (1, 6), "float32")]
    inputs = samples(part)[0]
    other_order = {"unused": np.zeros(3), "bias": inputs["bias"], "tokens": np.asfortranarray(inputs["tokens"])}
    a, b = session.run(inputs), session.run(other_order)
    np.testing.assert_array_equal(a["answer"], b["answer"])
    kept = a["answer"].copy()
    session.run(samples(part)[1])
    np.testing.assert_array_equal(a["answer"], kept)


@pytest.mark.parametrize("given", [np.zeros((1, 6, 8), np.int64), np.zeros((1, 7, 8), np.float32)])
def test_arrays_that_do_not_fit_are_refused_in_words(mixed, given):
    with pytest.raises(EdgekdError, match=r"takes float32 \(1, 6, 8\) and is given") as e:
        mixed("fp32").run({"tokens": given, "bias": np.zeros((1, 6), np.float32)})
    assert e.value.where == "tokens" and e.value.hint


def test_static_int8_is_executed_in_integers(mixed, tmp_path):
    part, session = mixed_component(), mixed("w8a8_static")
    assert session.executed_precision.startswith("int8") and session.executed_ops["FullyConnected:i8"] == 2
    inputs = samples(part, 1, seed=5)[0]
    ours, theirs = session.run(inputs)["answer"], expected(part, inputs)[0]
    assert 1e-6 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.1
    conv = conv_component()
    session = exporter.open(written(conv, tmp_path, scheme="w8a8_static", calibration=iter(samples(conv))), scheme="w8a8_static")
    assert session.executed_precision == "int8" and session.executed_ops["Conv2d:i8"] == 2
    with pytest.raises(UsageError, match="calibration"):
        exporter.export(part, tmp_path / "x.pte", scheme="w8a8_static")


def test_dynamic_int8_takes_linear_layers_only(mixed, tmp_path):
    part, session = mixed_component(), mixed("w8_dynamic")
    assert session.executed_precision.startswith("int8") and session.executed_ops["FullyConnected:i8"] == 2
    inputs = samples(part, 1, seed=5)[0]
    ours, theirs = session.run(inputs)["answer"], expected(part, inputs)[0]
    assert 1e-6 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.1
    with pytest.raises(EdgekdError, match="no linear layers to quantize"):
        exporter.export(conv_component(), tmp_path / "x.pte", scheme="w8_dynamic")


def test_inputs_of_integers_run_and_are_not_observed(tmp_path):
    class Pick(nn.Module):
        def forward(self, which: Tensor) -> Tensor:
            return which.float() * 0.5 + 1

    part = of(Pick(), which=torch.tensor([[1, 2, 3]]))
    session = exporter.open(written(part, tmp_path, scheme="fp32"), scheme="fp32")
    np.testing.assert_allclose(session.run({"which": np.array([[4, 5, 6]])})["y"], [[3, 3.5, 4]])
    with pytest.raises(EdgekdError, match="takes int64"):
        session.run({"which": np.zeros((1, 3), np.float32)})
    with pytest.raises(EdgekdError, match="an input of integers cannot be observed: which"):
        exporter.export(part, tmp_path / "x.pte", scheme="w8a8_static", calibration=[{"which": np.array([[1, 2, 3]])}])


class Spectrum(nn.Module):
    """ExecuTorch has no kernel for it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


def test_an_operator_that_executorch_lacks_is_one_error_with_the_reason(tmp_path):
    with pytest.raises(EdgekdError, match=r"ExecuTorch cannot take the component: .*svd") as e:
        exporter.export(of(Spectrum(), x=torch.randn(4, 4)), tmp_path / "x.pte", scheme="fp32")
    assert e.value.where == "part" and e.value.hint and not list(tmp_path.iterdir())


def test_what_goes_wrong_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_executorch, "_save", full)
    with pytest.raises(EdgekdError, match="No space left"):
        exporter.export(conv_component(), tmp_path / "x.pte", scheme="fp32")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"did you mean|executorch scheme"):
        exporter.export(conv_component(), tmp_path / "x.pte", scheme="fp8_static")


def test_a_damaged_file_is_told_with_the_runtimes_own_words(mixed, tmp_path, capfd):
    whole = mixed("fp32")._path.read_bytes()
    (tmp_path / "short.pte").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "other.pte").write_bytes(b"no such file" * 50)
    with pytest.raises(EdgekdError, match="File size is too small"):
        exporter.open(tmp_path / "short.pte", scheme="fp32")
    with pytest.raises(EdgekdError, match="identifier"):
        exporter.open(tmp_path / "other.pte", scheme="fp32")
    with pytest.raises(EdgekdError, match="cannot read the file"):
        read(tmp_path / "other.pte")
    assert capfd.readouterr() == ("", "")


def test_a_missing_runtime_is_told(monkeypatch, tmp_path):
    real = importlib.import_module("builtins").__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "executorch.runtime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", absent)
    with pytest.raises(EdgekdError, match="not installed") as e:
        executorch.exporter.open(tmp_path / "x.pte", scheme="fp32")
    assert e.value.hint == 'pip install "edgekd[executorch]"'


def test_lowering_happens_in_a_process_of_its_own(monkeypatch, tmp_path, capfd):
    monkeypatch.undo()
    part = replace(linear_component(), dynamic={})
    path = written(part, tmp_path, scheme="fp32")
    inputs = samples(part)[0]
    np.testing.assert_allclose(exporter.open(path, scheme="fp32").run(inputs)["y"], expected(part, inputs)[0], atol=1e-5)
    assert capfd.readouterr().out == ""
    with pytest.raises(EdgekdError, match=r"ExecuTorch cannot take the component: .*svd"):
        exporter.export(of(Spectrum(), x=torch.randn(4, 4)), tmp_path / "x.pte", scheme="fp32")


@pytest.mark.parametrize(("each", "scheme", "precision", "op"), [
    (coreml, "fp16", "fp16", "conv:f16"), (coreml, "fp32", "fp32", "conv:f32"), (vulkan, "fp32", "fp32", "conv_with_clamp:f32"),
    (vulkan, "fp16", "fp16", "conv_with_clamp:f16")])
def test_delegates_of_other_devices_are_built_and_read_back(tmp_path, each, scheme, precision, op):
    if not each.availability().ok:
        pytest.skip(f"{each.availability().reason}: {each.availability().fix}")
    part = conv_component()
    path = written(part, tmp_path, each, scheme=scheme)
    found = each.check(part, path, scheme=scheme)
    assert (found.state, found.precision) == ("built", precision) and found.ops[op] >= 1
    assert found.details["delegates"] == {each.delegate: 1} and found.details["outside"] == {}
    assert "0 left outside" in found.how and "executorch " in found.how
    assert each.stand_in(path, scheme=scheme) is None
    with pytest.raises(EdgekdError, match=r"cannot run here: the .* delegate"):
        each.open(path, scheme=scheme)


def test_a_file_that_its_delegate_has_nothing_of_is_refused(tmp_path):
    """Vulkan's and XNNPACK's files look alike: what is inside decides."""
    part = replace(linear_component(), dynamic={})
    path = written(part, tmp_path, scheme="fp32")
    with pytest.raises(EdgekdError, match="VulkanBackend takes nothing"):
        vulkan.check(part, path, scheme="fp32")
