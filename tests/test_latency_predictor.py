"""The regression, the fit of whole networks, intervals, and what a prediction is based on: on made-up rows whose rule is known; no clock."""
from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import latency_samples as samples
import numpy as np
import pytest

from edgekd import target as targets
from edgekd.errors import EdgekdError
from edgekd.latency import fitting, keys, predictor, regression, roofline
from edgekd.latency.database import NO_FAMILY, Database, Writer, open_database
from edgekd.latency.fitting import Fitted, Operators, Whole, conformal, expanded
from edgekd.latency.operators import Operator


def rows_of(folder: Path, *writers: Writer) -> Database:
    for one in writers:
        one.append(folder)
    return open_database(folder, shipped=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return rows_of(tmp_path_factory.mktemp("rows"), samples.writer())


@pytest.fixture(scope="module")
def fitted(rows: Database) -> Fitted:
    return Fitted.of(rows)


@pytest.fixture(scope="module")
def calibrated(rows: Database) -> Fitted:
    return Fitted.of(rows).calibrate(rows)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# --- regression


def test_regression__finds_the_features_that_count_and_keeps_them_as_data() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(300, 5)), np.full((300, 1), 7.0)], axis=1)
    y = np.sin(2 * x[:, 0]) + x[:, 1] + 0.05 * rng.normal(size=300)
    shape = regression.learn(x[:200], y[:200], np.full(200, 0.05**2))
    assert shape.kept == [0, 1, 2, 3, 4] and shape.lengths[0] < 0.3 * min(shape.lengths[2:])
    smooth = regression.Smooth(shape, x[:200], y[:200], np.full(200, 0.05**2))
    mean, deviation = smooth(x[200:])
    assert np.sqrt(np.mean((mean - y[200:]) ** 2)) < 0.2 * y.std() and (deviation >= 0).all()
    again = regression.Smooth(regression.Shape.read(json.loads(json.dumps(shape.told()))), x[:200], y[:200], np.full(200, 0.05**2))
    assert np.allclose(again(x[200:])[0], mean, atol=1e-3)


def test_regression__is_less_sure_away_from_its_points() -> None:
    x = np.linspace(0, 1, 40)[:, None]
    shape = regression.learn(x, np.sin(9 * x[:, 0]), np.full(40, 1e-4))
    smooth = regression.Smooth(shape, x, np.sin(9 * x[:, 0]), np.full(40, 1e-4))
    assert smooth(np.array([[5.0]]))[1][0] > 3 * smooth(np.array([[0.5]]))[1][0]


# --- operators and networks


def test_operators__are_predicted_at_sizes_that_were_not_measured(fitted: Fitted) -> None:
    unseen = [samples.conv(40, 80, 20), samples.conv(56, 20, 28, 1), samples.add(72, 20), samples.product(400, 40, 56)]
    found, known = fitted.operators(unseen)
    assert known == [True] * 4
    assert found == pytest.approx([samples.truth(o) for o in unseen], rel=0.15)


def test_operators__take_longer_when_they_are_larger(fitted: Fitted) -> None:
    for grown in ([samples.conv(32, 32, side) for side in (8, 12, 16, 24, 32, 48)], [samples.conv(c, 64, 24) for c in (8, 16, 32, 64, 128)],
                  [samples.add(48, side) for side in (8, 12, 16, 24, 32, 48)], [samples.product(576, c, 64) for c in (8, 16, 32, 64, 128)]):
        found = list(fitted.operators(grown)[0])
        assert found == sorted(found) and found[-1] > 2 * found[0]


def test_operators__of_a_kind_never_measured_go_by_their_family_and_say_so(fitted: Fitted) -> None:
    strange = replace(samples.conv(32, 64, 24), op="Convolution", kernel="never_seen")
    found, known = fitted.operators([strange])
    assert known == [False] and found[0] == pytest.approx(samples.truth(strange), rel=0.5)
    assert fitted.ms([strange])[1] == 1.0 and fitted.ms([samples.conv(32, 64, 24)])[1] == 0.0


def test_operators__that_no_clock_can_tell_take_nothing(tmp_path: Path) -> None:
    made = samples.writer(drawn=20)
    view = Operator("Reshape", "", ((1, 64),), (), ((8, 8),))
    made.parts(NO_FAMILY, [view] * 3, [0.0, 0.001, 0.0])
    found = Fitted.of(rows_of(tmp_path, made))
    assert "Reshape" in found.operators.free and found.operators([view])[0][0] == 0.0
    assert found.ms([samples.conv(32, 32, 16), view])[0] == found.ms([samples.conv(32, 32, 16)])[0]


def test_whole__finds_the_overhead_also_a_negative_one_of_tracing() -> None:
    sums = [(float(t), n) for t, n in zip(range(1, 41), range(100, 20, -2), strict=True)]
    found = Whole.fit(sums, [1.1 * t + 0.004 * n + 0.2 for t, n in sums])
    assert found.factor == pytest.approx(1.1, rel=0.03) and found(10.0, 50) == pytest.approx(11.4, rel=0.03)
    less = Whole.fit(sums, [t - 0.002 * n for t, n in sums])
    assert less.each_ms == pytest.approx(-0.002, rel=0.3) and less.call_ms >= 0 and less(20.0, 60) == pytest.approx(19.88, rel=0.02)
    assert less(0.01, 1000) >= fitting.LEAST_SHARE * 0.01, "never nothing, however many operators"


def test_fit__predicts_networks_of_families_that_it_has_not_seen(calibrated: Fitted) -> None:
    errors = [abs(math.expm1(e)) for values in calibrated.errors.values() for _, e in values]
    assert sorted(calibrated.errors) == ["a", "b", "c", "d"] and len(errors) == 40
    assert np.median(errors) < 0.05 and np.quantile(errors, 0.9) < 0.15


def test_fit__without_a_family_has_nothing_of_it(rows: Database) -> None:
    """The same rows with one family's times spoilt give the same model once that family is left out."""
    spoilt = Database([replace(r, ms=r.ms * 100) if r.family == "a" else r for r in rows.operators],
                      [replace(m, ms=m.ms * 100) if m.family == "a" else m for m in rows.models])
    network = samples.network(random.Random(99))
    assert Fitted.of(spoilt.without("a")).ms(network) == Fitted.of(rows.without("a")).ms(network)
    assert Fitted.of(spoilt).ms(network) != Fitted.of(rows).ms(network)


def test_fit__from_what_was_learned_is_the_same(rows: Database, fitted: Fitted) -> None:
    again = Fitted.of(rows, json.loads(json.dumps(fitted.told())))
    network = samples.network(random.Random(5))
    assert again.ms(network)[0] == pytest.approx(fitted.ms(network)[0], rel=1e-3)


def test_correction__finds_what_small_networks_take_less_and_an_offset() -> None:
    rng = random.Random(0)
    sizes = [rng.uniform(20, 29) for _ in range(120)]
    errors = {"a": [(s, 0.03 + 0.06 * max(0.0, fitting.KNEE - s) + rng.gauss(0, 0.01)) for s in sizes]}
    offset, slope = fitting.correction(errors)
    assert offset == pytest.approx(0.03, abs=0.01) and slope == pytest.approx(0.06, abs=0.01)
    assert fitting.corrected(22.0, 0.21, (offset, slope)) == pytest.approx(0.0, abs=0.02)
    assert fitting.correction({"a": errors["a"][: fitting.LEAST_ROWS - 1]}) == (0.0, 0.0)


def test_conformal__holds_what_it_promises() -> None:
    rng = random.Random(0)
    held = []
    for _ in range(400):
        errors = [abs(rng.gauss(0, 1)) for _ in range(60)]
        held.append(abs(rng.gauss(0, 1)) <= conformal(errors, 0.9))
    assert 0.86 <= sum(held) / len(held) <= 0.95
    assert conformal([0.3]) == 0.3 and conformal(list(range(100)), 0.5) == 50


def test_interval__covers_new_families(calibrated: Fitted, tmp_path: Path) -> None:
    spread, model = calibrated.spread, calibrated
    assert spread is not None
    other = rows_of(tmp_path, samples.writer(("x", "y"), each=20, drawn=0, seed=77))
    inside = [abs(math.log(model.ms(expanded(m, other))[0] / m.ms)) <= spread for m in other.models]
    assert sum(inside) / len(inside) >= 0.8


def test_interval__is_unknown_with_too_few_families(fitted: Fitted) -> None:
    assert fitted.spread is None


# --- predictions


def device(rows: Database, name: str, **changed: object) -> Database:
    """The rows as if they were of another device."""
    def moved(row: object) -> object:
        return replace(row, key=replace(row.key, device=name, **changed))  # type: ignore[attr-defined, type-var]

    return Database([moved(r) for r in rows.operators], [moved(m) for m in rows.models])  # type: ignore[misc]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration takes five fits: where it is not what is tested, made-up errors stand for it."""
    monkeypatch.setattr(Fitted, "calibrate", lambda self, rows: self.__dict__.update(errors={f: [(24.0, 0.02), (25.0, -0.04), (26.0, 0.02)] for f in "abcd"}) or self)


def test_predict__from_measured_operators(rows: Database, quick: None) -> None:
    network = samples.network(random.Random(3))
    found = predictor.predict_operators(network, "host", "onnx", threads=1, database=device(rows, keys.here()))
    assert found.ms == pytest.approx(1.1 * sum(map(samples.truth, network)) + 0.02, rel=0.12)
    assert found.low < found.ms < found.high and found.high / found.low == pytest.approx(math.exp(2 * 0.04), rel=0.03)
    assert found.provenance == "predicted" and "measured operators of onnx" in found.why and "onnxruntime 0.0" in str(found.age_warning)


def test_predict__with_operators_never_measured_is_less_sure(rows: Database, quick: None) -> None:
    database = device(rows, keys.here())
    strange = [replace(samples.conv(32, 64, 24), kernel="never_seen")] * 3
    sure, unsure = (predictor.predict_operators(o, "host", "onnx", threads=1, database=database) for o in ([samples.conv(32, 64, 24)] * 3, strange))
    assert unsure.high / unsure.low > 3 * sure.high / sure.low and "100% of it by kinds that were not" in unsure.why


def test_predict__other_threads_are_scaled_and_said(rows: Database, quick: None) -> None:
    network, database = samples.network(random.Random(3)), device(rows, keys.here())
    one, four = (predictor.predict_operators(network, "host", "onnx", threads=n, database=database) for n in (1, 4))
    assert one.ms / 4 < four.ms < one.ms and "scaled from 1 to 4 threads" in four.why and four.high / four.low > one.high / one.low


def test_predict__is_corrected_by_what_the_user_measured(rows: Database, quick: None) -> None:
    network, database = samples.network(random.Random(3)), device(rows, keys.here())
    slow = Database(database.operators, [*database.models, *(replace(m, ms=2 * m.ms, own=True, id=f"own{m.id}") for m in database.models[:5])])
    plain = predictor.predict_operators(network, "host", "onnx", threads=1, database=Database(database.operators, [replace(m, own=False) for m in database.models]))
    mine = predictor.predict_operators(network, "host", "onnx", threads=1,
                                       database=Database(slow.operators, [replace(m, own=m.id.startswith("own")) for m in slow.models]))
    assert "corrected by 5 models" in mine.why and mine.ms > 1.5 * plain.ms


def test_predict__a_device_never_measured_falls_to_its_roofline_and_says_so(rows: Database) -> None:
    network = samples.network(random.Random(3))
    found = predictor.predict_operators(network, "jetson_orin_nano", "tensorrt", scheme="fp16", database=rows)
    assert "roofline of its GPU" in found.why and "nothing was measured there" in found.why and found.provenance == "predicted"
    assert found.high / found.low == pytest.approx(roofline.FACTOR**2) and found.age_warning is None
    assert "nothing was measured" in predictor.predict_operators(network, "host", "onnx", threads=1, database=Database()).why


def test_predict__whole_networks_of_a_device_correct_its_roofline(rows: Database) -> None:
    network, target = samples.network(random.Random(3)), targets.resolve("raspberry_pi_5")
    bare = predictor.predict_operators(network, target, "onnx", threads=4, database=Database())
    whole = [replace(m, key=replace(m.key, device="raspberry_pi_5", threads=4), ms=5 * predictor.predict_operators(expanded(m, rows), target, "onnx", threads=4, database=Database()).ms)
             for m in rows.models[:4]]
    untimed = [replace(r, times=0, key=whole[0].key) for r in rows.operators]
    found = predictor.predict_operators(network, target, "onnx", threads=4, database=Database(untimed, whole))
    assert found.ms == pytest.approx(5 * bare.ms) and "corrected by 4 models measured there" in found.why
    assert found.high / found.low < bare.high / bare.low


def test_predict__of_what_nothing_is_known_is_refused() -> None:
    network = samples.network(random.Random(3))
    for target, runtime in (("jetson_orin_nano", "onnx"), ("pixel_8", "litert"), ("a_board_of_mine", "onnx")):
        with pytest.raises(EdgekdError, match="nothing is known") as e:
            predictor.predict_operators(network, target, runtime, database=Database())
        assert "--save" in str(e.value.hint)


def test_predict__a_file(tmp_path: Path, rows: Database) -> None:
    path = samples.convolutions(tmp_path / "conv.onnx")
    found = predictor.predict(path, "host", threads=1, database=Database())
    assert found.ms > 0 and "roofline" in found.why
    with pytest.raises(EdgekdError):
        predictor.predict(tmp_path / "none.onnx", "host", database=Database())


def test_learned__is_kept_and_a_damaged_file_of_it_ignored(rows: Database, own_home: Path, quick: None) -> None:
    database = device(rows, keys.here())
    key = next(iter(database.counts()))
    network = samples.network(random.Random(3))
    predictor._fitted.clear()
    first = predictor.predict_operators(network, "host", "onnx", threads=1, database=database)
    path = own_home / f"{key.slug}.learned.json"
    told = json.loads(path.read_text())
    assert set(told) == {"shapes", "errors"} and "Conv/nchwc" in told["shapes"]
    predictor._fitted.clear()
    assert predictor.predict_operators(network, "host", "onnx", threads=1, database=database).ms == pytest.approx(first.ms, rel=1e-3)
    path.write_text("{damaged")
    predictor._fitted.clear()
    assert predictor.learned(key) is None
    assert predictor.predict_operators(network, "host", "onnx", threads=1, database=database).ms == pytest.approx(first.ms, rel=1e-3)


def test_shipped__predictions_are_calibrated() -> None:
    for path in predictor.SHIPPED.glob("*.jsonl.gz"):
        told = json.loads(path.with_name(path.name.replace(".jsonl.gz", ".learned.json")).read_text())
        assert set(told["errors"]) >= {"repvit", "tinyvit", "efficientvit", "efficient_sam", "nanosam"}
        assert len(told["errors"]) >= fitting.LEAST_FAMILIES and sum(map(len, told["errors"].values())) >= 40


def test_operators_model__needs_no_rows() -> None:
    found, known = Operators([])([samples.conv(8, 8, 8)])
    assert known == [False] and found[0] > 0
