"""Sensitivity and automatic mixed precision: rounding by hand, the ranking, the choice as a pure function, the grammar's exceptions on real files."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_sam
from torch import nn

from edgekd import artifact, exporting, mixing, plugins, schemes, target
from edgekd.data import open_data
from edgekd.errors import EdgekdError, UsageError
from edgekd.mixing import Budget, choose, pareto
from edgekd.models.fold import fold
from edgekd.models.rounding import layers, observed, simulated
from edgekd.quantization.calibration import EncoderCalibration
from edgekd.quantization.sensitivity import sensitivity
from edgekd.runtime import open_artifact
from edgekd.tasks.evaluation import Judge
from edgekd.tasks.promptable.judging import judge

# --- simulated rounding ---------------------------------------------------------------------------------------------------------


def test_simulated__by_hand_and_nothing_stays() -> None:
    layer = nn.Sequential(nn.Linear(2, 1))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.27, 0.014]]))
        layer[0].bias.copy_(torch.tensor([0.5]))
    x = torch.tensor([[1.0, 2.0]])
    found = observed(layer, [torch.tensor([[0.0, 0.0]]), torch.tensor([[2.55, 2.55]])], layer)
    before = layer(x)
    with simulated(layer, found):
        rounded = layer(x)
    # input 1 and 2 lie on steps of 0.01; weights become 1.27 and 0.01; the output's levels are (0.5 .. 3.7742) / 255 from 0
    step = layer(torch.tensor([[2.55, 2.55]])).item() / 255
    assert float(rounded) == pytest.approx(round((1.27 + 0.02 + 0.5) / step) * step, abs=1e-5)
    assert torch.equal(layer(x), before) and not layer[0]._forward_hooks and not layer[0]._forward_pre_hooks


def test_simulated__fewer_bits_hurt_more() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    grids, gaps = observed(net, [x], net), []
    for bits in (8, 4, 2):
        with torch.no_grad(), simulated(net, grids, bits=bits):
            rounded = net(x)
        with torch.no_grad():
            gaps.append(float((rounded - net(x)).square().mean()))
    assert 0 < gaps[0] < gaps[1] < gaps[2]


# --- sensitivity ----------------------------------------------------------------------------------------------------------------


class Part:
    """A component of one input."""

    name, example = "encoder", {"images": None}

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def test_sensitivity__finds_the_layer_with_one_far_value() -> None:
    """Its range is stretched by a value that is nearly never there, so nearly all of its levels are wasted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        net[2].weight[0].mul_(4000.0)  # an output channel of the middle layer that the last one ignores
        net[4].weight[:, 0] = 0.0
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        wanted = net(torch.from_numpy(x))

    def agreement(_: Any) -> float:
        with torch.no_grad():
            return 1.0 - float((net(torch.from_numpy(x)) - wanted).abs().mean() / wanted.abs().mean())

    steps = []
    found = sensitivity(net, Part(net), [{"images": x}], Judge(agreement, agreement, 1, 1, "relative error"), advance=lambda: steps.append(1))
    assert {one.name for one in found.layers} == set(layers(net)) and found.layers[0].name in ("2", "4")
    assert found.layers[0].miou_drop > 5 * found.layers[-1].miou_drop and found.layers[0].sqnr_db < found.layers[-1].sqnr_db
    assert found.cumulative[0].kept == 0 and found.cumulative[-1].miou_drop < found.cumulative[0].miou_drop
    assert len(steps) == len(found.layers) + len(found.cumulative) and found.document()["layers"][0]["name"] == found.layers[0].name


def test_sensitivity__names_a_layer_whose_activations_are_not_finite() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        net[1].bias[0] = float("inf")
    with pytest.raises(EdgekdError, match=r"not finite.*: 1"):
        sensitivity(net, Part(net), [{"images": np.ones((1, 2), np.float32)}], Judge(lambda _: 1.0, lambda _: 1.0, 1, 1, ""))


# --- the judge ------------------------------------------------------------------------------------------------------------------


def test_judge__a_model_agrees_with_itself_and_less_with_another(photos: Path) -> None:
    data = open_data(photos, limit=3)
    found = judge(tiny_sam(2), data)
    assert found.photos == 3 and found.instances >= 3
    assert found.agreement(tiny_sam(2)) == 1.0 and found.agreement(tiny_sam(5)) < 0.9
    assert 0 <= found.score(tiny_sam(5)) <= 1


# --- the choice -----------------------------------------------------------------------------------------------------------------


def row(name: str, p50: float | None, drop: float, *, integer: int = 1, size: int = 100) -> dict[str, Any]:
    return {"id": name, "path": name, "scheme": name, "miou_drop": drop, "disagreement": drop, "size_bytes": size, "size_ratio": size / 400, "kept_float": {},
            "latency_ms": None if p50 is None else {"p50": p50}, "latency_ratio": None if p50 is None else p50 / 10, "executed_integer_ops": integer, "verdict": ""}


FP32, BF16, INT8, MIX = row("fp32", 10, 0, integer=0, size=400), row("bf16", 6, 0.1, integer=0, size=200), row("int8", 5, 2.0), row("mix", 5.5, 0.4)


@pytest.mark.parametrize(("rows", "budget", "chosen", "verdict", "said"), [
    ([FP32, INT8, MIX], Budget(0.5), "mix", "accepted", "0.55 of fp32's time"),
    ([FP32, INT8, MIX | {"latency_ms": {"p50": 5.6}}], Budget(3.0), "int8", "accepted", "2.00 points lost of 3"),
    ([FP32, INT8, MIX], Budget(3.0), "mix", "accepted", "0.40 points lost of 3"),
    ([FP32, BF16, INT8, MIX], Budget(0.5), "mix", "accepted", "0.92 of the fastest float scheme's (bf16)"),
    ([FP32, BF16, row("close", 5.9, 0.0)], Budget(0.5), "bf16", "accepted", "0.60"),
    ([FP32, MIX, row("as fast", 5.6, 0.1)], Budget(0.5), "as fast", "accepted", "0.10 points lost"),
    ([FP32, INT8], Budget(0.5), "fp32", "rejected", "nothing within 0.5 points is faster"),
    ([FP32, row("slow", 12, 0.0)], Budget(0.5), "fp32", "rejected", "nothing within"),
    ([FP32, MIX], Budget(0.5, target_ms=3), "mix", "rejected", "more than 3"),
    ([FP32 | {"latency_ms": None}, row("far", None, 0.1)], Budget(0.5), "far", "unverified", "cannot be measured"),
])
def test_choose(rows: list[dict[str, Any]], budget: Budget, chosen: str, verdict: str, said: str) -> None:
    found, word, reason = choose(rows, "miou_drop", budget)
    assert found["id"] == chosen and word == verdict and said in reason
    shuffled = choose([rows[0], *rows[:0:-1]], "miou_drop", budget)
    assert shuffled[0]["id"] == chosen, "the order of the rows decides nothing"


def test_pareto__holds_what_nothing_beats() -> None:
    found = pareto([FP32, BF16, INT8, MIX, row("worse", 6.5, 0.3)], "miou_drop")
    assert [r["id"] for r in found] == ["int8", "mix", "bf16", "fp32"]


# --- on real files --------------------------------------------------------------------------------------------------------------


def test_auto__keeps_to_its_floor_and_says_what_it_tried(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing.comparing.resolve, "load_torch", lambda _: tiny_sam(2))
    monkeypatch.setattr(mixing.comparing.resolve, "teacher_of", lambda _: None)
    found = mixing.auto(model="tiny", format="onnx", target=target.resolve("host"), data=photos, output=tmp_path, limit=4, budget=Budget(1.0))
    assert found["miou_drop"] <= 1.0 and found["verdict"] in ("accepted", "rejected") and found["reason"]
    schemes_tried = [r["scheme"] for r in found["candidates"]]
    assert schemes_tried[0] == "fp32" and "w8a8_static" in schemes_tried and any("decoder: fp32" in s for s in schemes_tried)
    assert Path(found["sensitivity"]).is_file() and (tmp_path / "sensitivity.html").read_text().count("<rect") >= 5 and (tmp_path / "auto.json").is_file()
    assert all(artifact.verify(Path(r["path"])) for r in found["candidates"]) and found["pareto"][0]["id"] in {r["id"] for r in found["candidates"]}


def test_a_kept_layer_is_float_in_the_file_and_the_manifest_says_so(photos: Path, tmp_path: Path) -> None:
    model = tiny_sam(2)
    name = next(iter(layers(fold(model).encoder)))
    calibration = {"encoder": EncoderCalibration(open_data(photos, masks=False), model.preprocess, limit=2)}
    ops = {}
    for text in ("w8a8_static", f'w8a8_static + {{"{name}": fp32}}'):
        made = exporting.export_model(model, tmp_path / "a", format="onnx", scheme=text, calibration=calibration)
        ops[text] = made.components["encoder"].executed_ops
        assert made.scheme == schemes.parse(text).text and open_artifact(tmp_path / "a").manifest.scheme == made.scheme
    assert ops[text]["QLinearConv"] == ops["w8a8_static"]["QLinearConv"] - 1
    assert made.components["encoder"].tuning == {"keep": {name: "fp32"}} and "mixed" in made.id


@pytest.mark.parametrize(("scheme", "said", "hint"), [
    ("w8a8_static[percentil]", "unknown scheme option", "percentile"),
    ("w8a8_static[minmax, mse]", "contradict", "one of"),
    ("w8a8_static[naive, mse]", "contradict", "naive"),
    ("w8a8_static + {rest: w8_dynamic}", "float type", ""),
    ("w8a8_static + {nowhere.0: fp32}", "matches no layer", "components: encoder"),
    ("w8a8_static + [decoder]", "not a scheme", "for instance"),
    ("w8a8_static + {decoder: {}}", "mapping", "for instance"),
    ("w8a8_static + {decoder: fp31}", "unknown scheme 'fp31'", "did you mean 'fp32'"),
    ("fp32[percentile]", "takes no options", "w8a8_static[percentile]"),
    ("bf16", "unknown onnx scheme", "w8a8_static"),
    ("w8a8_static + {rest: bf16}", "does not take rest: bf16", "layers in fp32"),
])
def test_what_cannot_be_had_is_refused_before_any_work(scheme: str, said: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        exporting.export_model(tiny_sam(2), tmp_path / "a", format="onnx", scheme=scheme, calibration={"encoder": [{}]})
    assert said in str(caught.value) and hint in (caught.value.hint or "") and not list(tmp_path.iterdir())


def test_a_text_of_the_grammar_survives_the_round_trip() -> None:
    for text in ("fp32", "w8a8_static", "w8a8_static[percentile, equalized]", 'w8a8_static + {decoder: fp32, "features.0.*": bf16, rest: bf16}', "w4a8_qat"):
        once = schemes.parse(text)
        assert schemes.parse(once.text) == once and "/" not in once.slug and " " not in once.slug and "{" not in once.slug
    assert schemes.parse("w8a8_static[mse,symmetric]").text == schemes.parse("w8a8_static [symmetric , mse]").text


def test_exceptions__components_layers_and_patterns() -> None:
    known = {"encoder": ["stem", "blocks.0.a", "blocks.0.b", "blocks.10.a"], "decoder": ["lin"]}
    parts = schemes.parse('w8a8_static[mse] + {decoder: w8_dynamic, "blocks.0.*": fp32, encoder.stem: bf16, rest: bf16}').parts(known)
    assert parts["decoder"].scheme == "w8_dynamic" and parts["decoder"].tuning.method == "minmax"
    assert parts["encoder"].scheme == "w8a8_static" and parts["encoder"].tuning.method == "mse" and parts["encoder"].tuning.rest == "bf16"
    assert dict(parts["encoder"].tuning.keep) == {"blocks.0.a": "fp32", "blocks.0.b": "fp32", "stem": "bf16"}


def test_every_exporter_declares_tunes_that_exist() -> None:
    from dataclasses import fields

    from edgekd.protocols import facts
    from edgekd.tuning import Tuning

    known = {f.name for f in fields(Tuning)}
    for exporter in plugins.exporters().values():
        assert set(facts(exporter).tunes) <= known, exporter.format
