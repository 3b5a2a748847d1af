"""Users' own models: any module and its inputs exported and checked, any ONNX file quantized, any model file timed; and everything that is no good told."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import own_modules
import pytest
import torch
from edgekd.export import _foreign
from onnx import TensorProto, helper, numpy_helper

from edgekd import api, artifact, cli, plugins, resolve
from edgekd.errors import EdgekdError, UsageError
from edgekd.own import data as own_data
from edgekd.own import files, models
from edgekd.profiling import bare
from edgekd.protocols import Port
from edgekd.runtime import open_artifact
from edgekd.target import resolve as target_of
from edgekd.tasks.tensors.inputs import Input, draw, lengths_of, of_ports, parse, rows_of
from edgekd.tasks.tensors.parity import compare_output

SHAPE = "photo=1x3x32x32"


def exported(folder: Path, model: str, inputs: list[str], **more: Any) -> dict[str, Any]:
    """The one row of an export to ONNX."""
    return api.export(model=f"own_modules:{model}", to=[more.pop("format", "onnx")], output=folder, inputs=inputs, **more)["exports"][0]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`two` and `words` in ONNX, each once."""
    folder = tmp_path_factory.mktemp("own")
    exported(folder, "two", ["photo=Nx3xHxW"], lengths={"H": 32, "W": 32})
    exported(folder, "words", ["mask=Nx7", "tokens=Nx7:int64"])
    return folder


# --- inputs as they are written --------------------------------------------------------------------------------------


def test_parse__names_shapes_types() -> None:
    assert parse(["1x3x8x8", "tokens=Nx77:int64", "2x2"]) == [Input("input", (1, 3, 8, 8)), Input("tokens", ("N", 77), "int64"), Input("input_1", (2, 2))]


@pytest.mark.parametrize(("texts", "said"), [
    (["1x3x"], "is no shape"), (["1,3,8"], "is no shape"), (["1x-3"], "is no shape"), (["x=1x3x8:float31"], "did you mean 'float32'"), ([""], "is no shape"),
    (["1x0x8"], "length 0"), (["a=1x3", "a=1x3"], "two inputs"), (["a b=1x3"], "no name"), (["=1x3"], "no name"), ([f"i{n}=1x2" for n in range(9)], "9 inputs"),
])
def test_parse__refuses(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError) as e:
        parse(texts)
    assert said in str(e.value)


def test_lengths__by_symbol_or_place() -> None:
    inputs = [Input("a", ("N", 3, "H")), Input("b", ("N", 4))]
    assert lengths_of(inputs, {"H": 9}) == {"N": 2, "H": 9}
    assert lengths_of(inputs, {"b.0": 5}, least=True) == {"N": 5, "H": 1}
    assert rows_of(inputs) == "N" and rows_of([Input("a", ("N", "N"))]) is None and rows_of([Input("a", (1, 2))]) is None
    with pytest.raises(UsageError, match="no axis 'M'") as e:
        lengths_of(inputs, {"M": 1})
    assert "N, H, a.0, a.2, b.0" in str(e.value)


def test_ports__axes_without_a_name_are_called_by_their_place() -> None:
    assert of_ports([Port("x", (None, 3), "float32", ("batch", None)), Port("y", (None,), "int64")]) == [Input("x", ("batch", 3)), Input("y", ("y.0",), "int64")]


def test_draw__is_seeded_and_of_the_type() -> None:
    one = [Input("a", (4, 5)), Input("b", (100,), "int32"), Input("c", (50,), "bool")]
    first, again, other = draw(one, {}, 1), draw(one, {}, 1), draw(one, {}, 2)
    assert all(np.array_equal(first[k], again[k]) for k in first) and not np.array_equal(first["a"], other["a"])
    assert [v.dtype.name for v in first.values()] == ["float32", "int32", "bool"] and set(first["b"]) == set(range(10))


# --- export ----------------------------------------------------------------------------------------------------------


def test_export__any_module_in_any_length(artifacts: Path) -> None:
    folder = artifacts / "two-onnx-fp32"
    manifest = artifact.verify(folder)
    assert manifest.task == "tensors" and manifest.preprocess is None and manifest.image_size is None and set(manifest.components) == {"model"}
    part = manifest.components["model"]
    assert [(i.name, i.shape) for i in part.inputs] == [("photo", ["N", 3, "H", "W"])]
    assert [(o.name, o.shape[1:]) for o in part.outputs] == [("features", [8, "H", "W"]), ("scores", [5])]
    assert part.parity["passed"] and set(part.parity["outputs"]) == {"features", "scores"} and part.parity["max_abs"] < 1e-4
    found = open_artifact(folder)
    photo = np.random.default_rng(5).standard_normal((3, 3, 50, 42)).astype(np.float32)
    torch.manual_seed(0)
    expected = own_modules.two().eval()(torch.from_numpy(photo))
    for name, value in found.run({"photo": photo}).items():
        assert np.abs(value - expected[name].detach().numpy()).max() < 1e-4
    ops = part.executed_ops
    assert "BatchNormalization" not in ops and sum(ops.get(k, 0) for k in ("Conv", "FusedConv")) == 2
    assert resolve.load_model(folder).task == "tensors"


def test_export__several_inputs_by_name_and_nested_outputs(artifacts: Path) -> None:
    found = open_artifact(artifacts / "words-onnx-fp32")
    part = found.manifest.components["model"]
    assert [(i.name, i.dtype) for i in part.inputs] == [("mask", "float32"), ("tokens", "int64")], "in the order given, though forward() has another"
    assert [o.name for o in part.outputs] == ["output", "output_1"] and part.parity["outputs"]["output_1"]["same"] == 1.0
    out = found.run({"tokens": np.arange(7)[None], "mask": np.ones((1, 7), np.float32)})
    assert out["output"].shape == (1, 4) and out["output_1"] == out["output"].argmax(-1)
    for wrong, said in (({"tokens": np.zeros((1, 7), np.int64)}, "'mask' is missing"),
                        ({"tokens": np.zeros((1, 8), np.int64), "mask": np.ones((1, 7))}, r"\(1, 8\)")):
        with pytest.raises(EdgekdError, match=said):
            found.run(wrong)


def test_export__where_axes_are_fixed__rows_go_through_one_by_one_and_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.export.onnx import exporter

    monkeypatch.setattr(type(exporter), "fixed_shapes", True)
    row = exported(tmp_path, "two", ["photo=Nx3xHx32"], lengths={"H": 16})
    found = open_artifact(tmp_path / "two-onnx-fp32")
    assert row["status"] == "ok" and found.manifest.components["model"].fixed == {"N": 1, "H": 16}
    assert found.run({"photo": np.ones((3, 3, 16, 32), np.float32)})["scores"].shape == (3, 5)
    with pytest.raises(EdgekdError, match="shape") as e:
        found.run({"photo": np.ones((1, 3, 12, 32), np.float32)})
    assert "--length H=N" in str(e.value)
    row = exported(tmp_path, "across", ["x=Nx8"])
    assert row["status"] == "failed" and "not the student any more" in row["reason"], "rows that are mixed cannot be served one by one"


def test_export__one_number_a_call(tmp_path: Path) -> None:
    row = exported(tmp_path, "single", ["1x8"])
    assert row["status"] == "ok" and row["parity"]["outputs"]["output"]["cosine"] > 0.999


def test_export__own_data_decides_ranges_and_parity(tmp_path: Path, photos: Path) -> None:
    row = exported(tmp_path, "wide", ["1x3x64x64"], scheme="w8a8_static", data=photos)
    part = row["components"]["model"]
    assert part["executed_precision"].startswith("int8") and 0.9 < part["parity"]["cosine"] < 1 and "inputs given" in row["checked"]
    with pytest.raises(UsageError, match="calibration"):
        exported(tmp_path, "wide", ["1x3x64x64"], scheme="w8a8_static")


def test_export__a_module_itself_and_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason='pip install "edgekd[openvino]"')
    before = own_modules.READY.stem.bn.running_mean.clone()
    row = exported(tmp_path, "READY", [SHAPE], format="openvino", scheme="fp32")
    assert row["status"] == "ok" and row["id"] == "READY-openvino-fp32"
    assert torch.equal(before, own_modules.READY.stem.bn.running_mean)


@pytest.mark.parametrize(("model", "inputs", "said"), [
    ("two", ["1x4x32x32"], "the model refuses these inputs: Given groups=1"),
    ("two", ["photo=1x3x32x32:int64"], "the model refuses these inputs: "),
    ("two", [SHAPE, "1x3"], "the model refuses these inputs: "),
    ("nan", ["1x3"], "holds NaN"), ("constant", ["1x3"], "constant"), ("random", ["4x16"], "another one each time"), ("text", ["1x3"], "returns a str"),
    ("even", ["x=2xL"], "any length of L"), ("bad_fold", [SHAPE], "cannot be copied and folded"), ("weights", [SHAPE], "returns a dict"),
    ("failing", [SHAPE], "on the other machine"), ("NOTHING", [SHAPE], "is a int"), ("no_such", [SHAPE], "cannot be loaded"),
])
def test_export__what_is_no_good_is_told(tmp_path: Path, model: str, inputs: list[str], said: str) -> None:
    with pytest.raises(EdgekdError) as e:
        exported(tmp_path, model, inputs)
    assert said in str(e.value) and "\n" not in e.value.what and e.value.hint
    assert not list(tmp_path.rglob("*.onnx"))


def test_export__a_stranger_without_inputs_and_inputs_of_a_friend(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whose inputs are not known") as e:
        api.export(model="own_modules:two", to=["onnx"], output=tmp_path)
    assert "--input 1x3x224x224" in str(e.value)
    with pytest.raises(UsageError, match="'sam_nano' is none"):
        api.export(model="sam_nano", to=["onnx"], output=tmp_path, inputs=["1x3x8x8"])
    with pytest.raises(UsageError, match="whose inputs are not known") as e:
        api.quantize(model="own_modules:two", scheme="w8_dynamic", output=tmp_path)
    assert "--to onnx" in str(e.value)


def test_evaluate_and_predict__know_numbers_only(artifacts: Path, photos: Path) -> None:
    for call in (lambda: api.evaluate(model=artifacts / "two-onnx-fp32", data=photos),
                 lambda: api.predict(model=artifacts / "two-onnx-fp32", image=next(photos.iterdir()))):
        with pytest.raises(UsageError, match="only its numbers are known"):
            call()
    with pytest.raises(UsageError, match="cannot be a student"):
        plugins.task("tensors").student_name("x")
    assert api.inspect(model=artifacts / "two-onnx-fp32")["preprocess"] is None


def test_compare_output__sees_what_differs() -> None:
    a = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    assert compare_output([a], [a + 1e-6], "fp32")[1] is None
    assert "differs by up to" in str(compare_output([a], [a + 0.01], "fp32")[1])
    assert "relative L2" in str(compare_output([a * 1e-6], [a * 1.1e-6], "fp32")[1]), "small numbers hide below an absolute limit"
    assert compare_output([a], [a + 0.1], "w8a8_static")[1] is None
    assert "relative L2" in str(compare_output([a], [-a], "w8a8_static")[1]) and "shape" in str(compare_output([a], [a[:2]], "fp32")[1])
    assert "NaN" in str(compare_output([a], [a * np.nan], "w8a8_static")[1])
    whole = np.arange(10)
    assert compare_output([whole], [whole], "fp32")[1] is None and "0.9000" in str(compare_output([whole], [np.where(whole == 3, 0, whole)], "fp32")[1])


# --- data ------------------------------------------------------------------------------------------------------------


def test_data__arrays(tmp_path: Path) -> None:
    inputs = [Input("tokens", ("N", 7), "int64"), Input("mask", ("N", 7))]
    for i in range(5):
        np.savez(tmp_path / f"{i}.npz", **own_modules.arrays(i))
    found = own_data.read(tmp_path, inputs, {})
    seen, held, apart = found.split()
    assert (len(found), len(seen), len(held), apart) == (5, 4, 1, True)
    assert np.array_equal(next(iter(held))["tokens"], own_modules.arrays(1)["tokens"]) and next(iter(found))["mask"].dtype == np.float32


def test_data__a_stack_and_a_missing_batch_axis(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 3, 5)))
    np.save(tmp_path / "b.npy", np.zeros((3, 5)))
    found = list(own_data.read(tmp_path, [Input("x", (1, 3, 5))], {}))
    assert len(found) == 5 and {one["x"].shape for one in found} == {(1, 3, 5)} and found[4]["x"].sum() == 0


@pytest.mark.parametrize(("arrays", "said"), [
    ({"tokens": np.zeros((1, 8), np.int64), "mask": np.ones((1, 7))}, "has the shape (1, 8)"), ({"tokens": np.zeros((1, 7), np.int64)}, "no array 'mask'"),
    ({"tokens": np.full((1, 7), 0.5), "mask": np.ones((1, 7))}, "cannot be made int64"), ({"tokens": np.zeros((1, 7)), "mask": np.full((1, 7), np.nan)}, "NaN"),
    ({"tokens": np.array([["a"] * 7]), "mask": np.ones((1, 7))}, "of the type <U1"), ({"tokens": np.zeros((0, 7)), "mask": np.ones((0, 7))}, "is empty"),
])
def test_data__that_does_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError) as e:
        own_data.read(tmp_path, [Input("tokens", ("N", 7), "int64"), Input("mask", ("N", 7))], {})
    assert said in str(e.value) and "a.npz" in str(e.value)


def test_data__damaged_pickled_missing(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UsageError, match=r"a\.npz"):
        own_data.read(tmp_path, [Input("x", (1, 3))], {})
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"cannot be read"):
        own_data.read(tmp_path / "a.npy", [Input("x", (1, 3))], {})
    with pytest.raises(UsageError, match="one input of 3 channels"):
        own_data.read(photos, [Input("x", (1, 4))], {})
    with pytest.raises(UsageError, match="no/such"):
        own_data.read(tmp_path / "no/such", [Input("x", (1, 3, 8, 8))], {})


def test_data__photos(photos: Path) -> None:
    chw = next(iter(own_data.read(photos, [Input("x", (1, 3, 20, 30))], {})))["x"]
    hwc = next(iter(own_data.read(photos, [Input("x", ("N", "H", "W", 3))], {}, own_data.Photos.of([100], [50.0], (20, 30)))))["x"]
    raw = next(iter(own_data.read(photos, [Input("x", (2, 3, "H", "W"), "uint8")], {"H": 20, "W": 30})))["x"]
    assert chw.shape == (1, 3, 20, 30) and 0 <= chw.min() < chw.max() <= 1 and raw.shape == (2, 3, 20, 30) and raw.dtype == np.uint8
    assert np.allclose(raw[:1] / 255, chw, atol=1e-6) and np.allclose((raw[:1].astype(float) - 100) / 50, hwc.transpose(0, 3, 1, 2), atol=1e-5)
    with pytest.raises(UsageError, match="any size"):
        own_data.read(photos, [Input("x", (1, 3, "H", "W"))], {})
    with pytest.raises(UsageError, match="does not fit"):
        own_data.read(photos, [Input("x", (1, 3, 8, 8))], {}, own_data.Photos.of(None, None, (9, 9)))
    with pytest.raises(UsageError, match=r"0\.\.255") as e:
        own_data.Photos.of([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], None)
    assert "58.395" in str(e.value)


# --- quantize --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`wide.onnx`, `any.onnx` (the same with axes of any length) and `linear.onnx`, as torch writes them: not slimmed by us."""
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    for name, model, example, dynamic in (("wide", own_modules.wide(), torch.randn(1, 3, 64, 64), None),
                                          ("linear", own_modules.linear(), torch.randn(2, 256), {0: "rows"}),
                                          ("any", own_modules.two(), torch.randn(2, 3, 32, 32), {0: "n", 2: "h", 3: "w"})):
        torch.onnx.export(model.eval(), (example,), folder / f"{name}.onnx", dynamo=True, verbose=False, external_data=False, input_names=["x"],
                          output_names=["features", "scores"] if name == "any" else ["y"],
                          dynamic_shapes=({k: torch.export.Dim.DYNAMIC if k == 0 else v for k, v in dynamic.items()},) if dynamic else None)
    return folder


def ask(source: Path, scheme: str, output: Path, **more: Any) -> dict[str, Any]:
    return api.quantize(model=source, scheme=scheme, output=output, **more)


def test_quantize__static_on_photos(float_files: Path, tmp_path: Path, photos: Path) -> None:
    before = (float_files / "wide.onnx").read_bytes()
    found = ask(float_files / "wide.onnx", "w8a8_static", tmp_path, data=photos)
    assert found["size_ratio"] < 0.5 and found["executed_integer_ops"] >= 4 and "int8" in found["executed_precision"] and 0.95 < found["cosine"] < 1
    assert found["shown"] | {"ranges": 10, "compared": 4, "held_out": True, "kind": "photos", "std": [255.0] * 3} == found["shown"]
    assert found["latency_ratio"] == pytest.approx(found["latency_ms"]["p50"] / found["float_latency_ms"]["p50"]) and found["latency_ms"]["n"] >= 10
    assert (found["verdict"] == "accepted") == (found["latency_ratio"] <= 0.95) or found["cosine"] < 0.98
    assert found == json.loads((tmp_path / "wide-w8a8_static.json").read_text()) and (float_files / "wide.onnx").read_bytes() == before
    again = plugins.exporter("onnx").open(Path(found["path"]), scheme="w8a8_static")
    assert [p.name for p in again.inputs] == ["x"]


def test_quantize__not_faster_is_rejected(float_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgekd_rc: Callable[..., int]) -> None:
    real = files.profile_many

    def slower(both: Any, target: Any, **more: Any) -> Any:
        found = real(both, target, repeats=10, **more)
        return [found[0], found[1].model_copy(update={"latency_ms": found[0].latency_ms})]

    monkeypatch.setattr(files, "profile_many", slower)
    found = ask(float_files / "linear.onnx", "w8_dynamic", tmp_path)
    assert found["verdict"] == "rejected" and "not faster" in found["reason"] and found["executed_integer_ops"] == 2 and found["shown"]["data"] is None
    assert edgekd_rc("quantize", float_files / "linear.onnx", "--scheme", "w8_dynamic", "-o", tmp_path / "b") == 1


def test_quantize__axes_of_any_length_and_arrays(float_files: Path, tmp_path: Path) -> None:
    for i in range(6):
        np.savez(tmp_path / f"{i}.npz", x=np.random.default_rng(i).standard_normal((1, 3, 40, 56)))
    found = ask(float_files / "any.onnx", "w8a8_static", tmp_path / "out", data=tmp_path)
    assert found["executed_integer_ops"] >= 3 and found["shown"]["kind"] == "arrays" and set(found["outputs"]) == {"features", "scores"}
    session = plugins.exporter("onnx").open(Path(found["path"]), scheme="w8a8_static")
    assert session.run({"x": np.zeros((2, 3, 24, 32), np.float32)})["scores"].shape == (2, 5), "lengths stay free"


def test_quantize__openvino(float_files: Path, tmp_path: Path, photos: Path) -> None:
    pytest.importorskip("openvino", reason='pip install "edgekd[openvino]"')
    found = ask(float_files / "any.onnx", "w8a8_static", tmp_path, data=photos, format="openvino", size=(48, 64), mean=[123.675, 116.28, 103.53], std=[58.0])
    assert found["files"] == ["any-w8a8_static.xml", "any-w8a8_static.bin"] and found["executed_integer_ops"] >= 2 and found["cosine"] > 0.9
    assert found["shown"]["size"] == [48, 64] and found["shown"]["std"] == [58.0] * 3


def test_quantize__weights_beside_the_graph(float_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(float_files / "linear.onnx")
    (tmp_path / "in").mkdir()
    onnx.save(model, tmp_path / "in/big.onnx", save_as_external_data=True, location="heavy.weights", size_threshold=0)
    monkeypatch.setattr(_foreign, "LARGE", 1000)
    found = ask(tmp_path / "in/big.onnx", "w8_dynamic", tmp_path / "out")
    assert found["files"] == ["big-w8_dynamic.onnx", "big-w8_dynamic.onnx.data"] and 0.2 < found["size_ratio"] < 0.4 and found["cosine"] > 0.99
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["big.onnx", "heavy.weights"]
    (tmp_path / "in/heavy.weights").unlink()
    with pytest.raises(EdgekdError, match=r"onnxruntime cannot open|weights of the graph are missing"):
        ask(tmp_path / "in/big.onnx", "w8_dynamic", tmp_path / "out2")


def old_graph(path: Path) -> None:
    """Opset 11, nodes without names, weights from Constant nodes: Conv -> Relu -> Conv."""
    rng = np.random.default_rng(0)
    nodes = []
    for i, (a, b) in enumerate(((3, 16), (16, 16))):
        weight = numpy_helper.from_array(rng.standard_normal((b, a, 3, 3)).astype(np.float32) * 0.2)
        nodes += [helper.make_node("Constant", [], [f"w{i}"], value=weight), helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"c{i}"], pads=[1] * 4),
                  helper.make_node("Relu", [f"c{i}"], [f"t{i + 1}"])]
    graph = helper.make_graph(nodes, "old", [helper.make_tensor_value_info("t0", TensorProto.FLOAT, ["batch", 3, 32, 32])],
                              [helper.make_tensor_value_info("t2", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), path)


def test_quantize__an_old_graph_without_names(tmp_path: Path, photos: Path) -> None:
    old_graph(tmp_path / "old.onnx")
    found = ask(tmp_path / "old.onnx", "w8a8_static", tmp_path / "out", data=photos)
    assert found["executed_integer_ops"] == 2 and found["cosine"] > 0.95
    with pytest.raises(EdgekdError, match="quantized already"):
        ask(Path(found["path"]), "w8_dynamic", tmp_path / "out")
    with pytest.raises(EdgekdError, match="nothing to quantize"):
        ask(tmp_path / "old.onnx", "w8_dynamic", tmp_path / "out")


def test_quantize__refuses(float_files: Path, tmp_path: Path, photos: Path) -> None:
    source = float_files / "wide.onnx"
    for given, said in (({"scheme": "w8a8_static"}, "needs samples"), ({"scheme": "fp32"}, "is what the file is"), ({"scheme": "w8a8_static", "data": tmp_path / "no"}, "no"),
                        ({"scheme": "w8_dynamic", "lengths": {"q": 3}}, "no axis 'q'"), ({"scheme": "w8_dynamic", "format": "onxx"}, "did you mean 'onnx'")):
        with pytest.raises(UsageError) as e:
            ask(source, output=tmp_path / "out", **{"scheme": "", **given})  # type: ignore[arg-type]
        assert said in str(e.value)
    with pytest.raises(UsageError, match="there is no file"):
        ask(tmp_path / "none.onnx", "w8_dynamic", tmp_path / "out")
    (tmp_path / "bad.onnx").write_bytes(source.read_bytes()[:2000])
    with pytest.raises(EdgekdError) as e2:
        ask(tmp_path / "bad.onnx", "w8_dynamic", tmp_path / "out")
    assert e2.value.exit_code == 1 and e2.value.hint
    with pytest.raises(UsageError, match=r"are for an \.onnx file"):
        api.quantize(model="sam_nano", scheme="w8_dynamic", output=tmp_path, lengths={"N": 2})
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.onnx"))


def test_quantize__formats_that_cannot_and_targets_out_of_reach(float_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = files.Request(float_files / "linear.onnx", "w8_dynamic", "onnx", target_of("host"), tmp_path)
    monkeypatch.delattr(type(plugins.exporter("onnx")), "rewrite")
    with pytest.raises(UsageError, match="cannot be quantized to onnx"):
        files.quantize(request)


# --- profile ---------------------------------------------------------------------------------------------------------


def test_profile__a_bare_file(artifacts: Path) -> None:
    found = api.profile(artifact=artifacts / "words-onnx-fp32/model.onnx", repeats=10, lengths={"N": 4})
    assert found["inputs"] == {"mask": "4x7:float32", "tokens": "4x7:int64"} and found["latency_ms"]["n"] == 10
    assert found["latency_ms"]["p99"] >= found["latency_ms"]["p50"]
    assert found["executed_precision"] == "fp32" and found["components"]["model"]["executed_ops"] and found["peak_memory_bytes"] > 1e7
    assert found["size_bytes"] == (artifacts / "words-onnx-fp32/model.onnx").stat().st_size and found["circumstances"]["device"]
    whole = api.profile(artifact=artifacts / "words-onnx-fp32", repeats=10)
    assert whole["id"] == "words-onnx-fp32" and "inputs" not in whole


def test_profile__the_same_file_in_another_runtime(artifacts: Path) -> None:
    pytest.importorskip("openvino", reason='pip install "edgekd[openvino]"')
    found = bare.OpenedFile(bare.model_file(artifacts / "two-onnx-fp32/model.onnx", format="openvino", lengths={"photo.2": 8, "photo.3": 12}))
    assert found.described() == {"photo": "1x3x8x12:float32"} and any(":" in op for op in found.session("model").executed_ops)


def test_profile__the_format_is_told_by_the_suffix(tmp_path: Path) -> None:
    for name, format in (("a.onnx", "onnx"), ("b.XML", "openvino"), ("c.ncnn.param", "ncnn"), ("d.tflite", "litert"), ("e.pte", "executorch")):
        if format in plugins.exporters():
            (tmp_path / name).write_bytes(b"x")
            assert bare.model_file(tmp_path / name).format == format
    (tmp_path / "w.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match="no format has files like") as e:
        api.profile(artifact=tmp_path / "w.safetensors")
    assert ".onnx" in str(e.value) and ".xml" in str(e.value)
    with pytest.raises(UsageError, match="no artifact at"):
        api.profile(artifact=tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="did you mean 'fp32'"):
        bare.model_file(tmp_path / "a.onnx", scheme="fp23")


def test_profile__weights_beside_count(tmp_path: Path) -> None:
    (tmp_path / "m.xml").write_bytes(b"x" * 10)
    (tmp_path / "m.bin").write_bytes(b"x" * 90)
    assert bare.model_file(tmp_path / "m.xml").size_bytes == 100


def test_profile__damaged_missing_runtime_wrong_length(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = artifacts / "words-onnx-fp32/model.onnx"
    (tmp_path / "cut.onnx").write_bytes(source.read_bytes()[:1500])
    with pytest.raises(EdgekdError, match="does not run on 'local': onnxruntime cannot open the file") as e:
        api.profile(artifact=tmp_path / "cut.onnx")
    assert str(e.value).count("hint:") == 1 and "Traceback" not in str(e.value) and e.value.exit_code == 1
    with pytest.raises(EdgekdError, match="no axis 'M'"):
        api.profile(artifact=source, lengths={"M": 3})
    with pytest.raises(UsageError, match="for a model file alone"):
        api.profile(artifact=artifacts / "words-onnx-fp32", lengths={"N": 3})
    from edgekd.protocols import Availability

    monkeypatch.setattr(type(plugins.exporter("onnx")), "availability", lambda self: Availability(False, reason="not installed: onnx", fix="pip install edgekd"))
    with pytest.raises(EdgekdError, match="runtime of 'onnx' is missing") as e:
        api.profile(artifact=source)
    assert e.value.hint == "pip install edgekd"


def test_profile__indices_that_are_refused_are_taken_as_zero(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.eye(3, dtype=np.float32), "table")
    graph = helper.make_graph([helper.make_node("Gather", ["table", "i"], ["y"])], "g", [helper.make_tensor_value_info("i", TensorProto.INT64, [6])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6, 3])], [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    assert not bare.OpenedFile(bare.model_file(tmp_path / "g.onnx")).sample()["i"].any()


# --- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def edgekd_rc(capsys: pytest.CaptureFixture[str]) -> Callable[..., int]:
    return lambda *arguments: cli._run([str(a) for a in arguments])


def test_cli__export_names_a_model_once(edgekd_rc: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--to", "onnx", "--output", tmp_path / "o")
    assert edgekd_rc("export", *common) == 2 and "no model is named" in capsys.readouterr().err
    assert edgekd_rc("export", "a", "--model", "b:c", *common) == 2 and "two models" in capsys.readouterr().err
    assert edgekd_rc("export", "--model", "own_modules:two", "--input", "1x3xx", *common) == 2 and "is no shape" in capsys.readouterr().err
    assert edgekd_rc("export", "--model", "own_modules:nan", "--input", "1x3", *common) == 1 and "holds NaN" in capsys.readouterr().err
    assert edgekd_rc("export", "--model", "own_modules:linear", "--input", "x=1x256", *common, "--json") == 0
    row = json.loads(capsys.readouterr().out)["exports"][0]
    assert row["status"] == "ok" and row["ran_here"] is True and Path(row["path"]).name == "linear-onnx-fp32"
    assert edgekd_rc("quantize", "x.onnx", "--scheme", "w8_dynamic", "-o", tmp_path, "--size", "3x") == 2 and "--size takes" in capsys.readouterr().err
    assert edgekd_rc("quantize", "x.onnx", "--scheme", "w8_dynamic", "-o", tmp_path, "--mean", "1,2") == 2 and "--mean takes" in capsys.readouterr().err


def test_is_factory() -> None:
    assert models.is_factory("a.b:c") and not any(map(models.is_factory, ("sam_nano", "a:b:c", "repvit_s:width=0.5", "C:\\x", "a/b:c")))


def test_docs__name_options_that_there_are(edgekd_rc: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/own-models.md").read_text(encoding="utf-8")
    lines = [line.split() for line in page.splitlines() if line.startswith("    edgekd ")]
    assert {line[1] for line in lines} == {"export", "quantize", "profile"}
    for line in lines:
        edgekd_rc(line[1], "--help")
        text = capsys.readouterr().out
        assert not [word for word in line if word.startswith("--") and word not in text]
