"""The latency database: rows go in and come out, whatever else is in the file; nobody's rows are lost; old ones say so."""
from __future__ import annotations

import gzip
import json
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import latency_samples
import pytest

from edgekd.errors import EdgekdError
from edgekd.latency import database, keys
from edgekd.latency.database import NO_FAMILY, Database, Key, Writer, open_database
from edgekd.latency.operators import Operator
from edgekd.measurement import Circumstances, Latency
from edgekd.profiling.profile import ComponentProfile, Profile

KEY = Key("x86_64+avx512", "onnx", "onnxruntime 1.0", "fp32", 1)
CONV = Operator("Conv", "nchwc", ((1, 16, 32, 32),), ((32, 16, 3, 3),), ((1, 32, 32, 32),), {"group": 1, "strides": [1, 1]}, ("Relu",))
ADD = Operator("Add", "", ((1, 32, 32, 32), (1, 32, 32, 32)), (), ((1, 32, 32, 32),))


def about(date: str = "2026-11-01T00:00:00+00:00") -> Circumstances:
    return Circumstances(device="a CPU (4 cores)", cpu_flags=["avx", "avx2", "avx512f", "avx512_vnni"], os="Linux", python="3.12", date=date,
                         versions={"onnxruntime": "1.0"}, threads=1)


@pytest.fixture(scope="module")
def conv_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latency_samples.convolutions(tmp_path_factory.mktemp("files") / "conv.onnx")


def written(family: str = "repvit", id: str = "one", date: str = "2026-11-01T00:00:00+00:00") -> Writer:
    writer = Writer(KEY, about(date))
    writer.model(id, family, [CONV, ADD, CONV], [1.0, 0.5, 3.0], 4.25, rounds=[4.2, 4.3], image_size=32)
    return writer


def test_rows__come_back_as_they_were(tmp_path: Path) -> None:
    written().append(tmp_path)
    found = open_database(tmp_path, shipped=False)
    assert [r.operator for r in found.operators] == [CONV, ADD] and found.notes == []
    assert [(r.ms, r.times, r.family) for r in found.operators] == [(2.0, 2, "repvit"), (0.5, 1, "repvit")]
    model = found.models[0]
    assert (model.id, model.ms, model.rounds, model.facts, model.own, model.key) == ("one", 4.25, (4.2, 4.3), {"image_size": 32}, True, KEY)
    assert [(found.operators[n].operator, count) for n, count in model.operators] == [(CONV, 2), (ADD, 1)]


def test_rows__packed_are_the_same_bytes_each_time_and_read_alike(tmp_path: Path) -> None:
    first, second = (written().save(tmp_path / name).read_bytes() for name in ("a.jsonl.gz", "b.jsonl.gz"))
    assert first == second
    found = Database()
    database.read(tmp_path / "a.jsonl.gz", found)
    assert len(found.operators) == 2 and len(found.models) == 1


def test_append__adds_to_what_is_there_and_numbers_do_not_mix(tmp_path: Path) -> None:
    written(id="one").append(tmp_path)
    other = Writer(replace(KEY, scheme="bf16"), about())
    other.model("two", "own", [ADD], [0.25], 0.3)
    other.append(tmp_path)
    found = open_database(tmp_path, shipped=False)
    assert [m.id for m in found.models] == ["one", "two"]
    assert found.operators[found.models[1].operators[0][0]].ms == 0.25


def test_append__from_many_at_once_loses_nothing(tmp_path: Path) -> None:
    threads = [threading.Thread(target=lambda n=n: written(id=f"m{n}").append(tmp_path)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(m.id for m in open_database(tmp_path, shipped=False).models) == sorted(f"m{n}" for n in range(12))


def test_append__leaves_no_half_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written().append(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        written(id="two").append(tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir() if p.suffix == ".jsonl"] == [path.name]


@pytest.mark.parametrize("damage", ["{", "null", "[]", '{"row": "op"}', '{"row": "model", "at": "none"}', '{"row":"op","at":"AT","n":9,"family":"x","ms":-1,"times":1,"op":"Add"}',
                                    '{"row":"op","at":"AT","n":9,"family":"x","ms":1,"times":1,"op":"Add","in":["1xbad"]}', "\ufffd\ufffd"])
def test_damaged_lines__are_left_out_and_told_of(tmp_path: Path, damage: str) -> None:
    writer = written()
    path = writer.append(tmp_path)
    lines = path.read_text().splitlines()
    lines.insert(1, damage.replace("AT", writer.at))
    path.write_text("\n".join(lines) + "\n")
    found = open_database(tmp_path, shipped=False)
    assert len(found.operators) == 2 and len(found.models) == 1
    assert found.notes == [f"{path.name}: 1 damaged line was left out"]


def test_damaged__operator_takes_its_model_with_it_but_no_other(tmp_path: Path) -> None:
    path = written(id="one").append(tmp_path)
    written(id="two", date="2026-11-02T00:00:00+00:00").append(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    found = open_database(tmp_path, shipped=False)
    assert [m.id for m in found.models] == ["two"] and "2 damaged lines were" in found.notes[0]


def test_a_cut_off_archive__is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = written().save(tmp_path / "rows.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-12])
    found = open_database(tmp_path, shipped=False)
    assert any("cannot be read" in note for note in found.notes)


def test_without__leaves_nothing_of_a_family(tmp_path: Path) -> None:
    for family in ("repvit", "tinyvit", NO_FAMILY):
        written(family, id=family).append(tmp_path)
    found = open_database(tmp_path, shipped=False).without("repvit")
    assert {r.family for r in found.operators} == {m.family for m in found.models} == {"tinyvit", NO_FAMILY}
    for model in found.models:
        assert [found.operators[n].family for n, _ in model.operators] == [model.family] * 2


def test_warning__of_age_and_of_another_version(tmp_path: Path) -> None:
    written(date="2026-01-01T00:00:00+00:00").append(tmp_path)
    found = open_database(tmp_path, shipped=False)
    then = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert found.warning(KEY.version, now=then + timedelta(days=database.OLD_DAYS)) is None
    assert "181 days old" in str(found.warning(KEY.version, now=then + timedelta(days=database.OLD_DAYS + 1)))
    other = str(found.warning("onnxruntime 2.0", now=then))
    assert "onnxruntime 1.0" in other and "onnxruntime 2.0 is installed" in other and "--save" in other
    assert Database().warning("anything") is None


def test_a_date_that_is_none__counts_as_old(tmp_path: Path) -> None:
    written(date="yesterday").append(tmp_path)
    assert "days old" in str(open_database(tmp_path, shipped=False).warning(KEY.version))


def test_home__follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path))
    written().append()
    assert (tmp_path / database.OWN).is_file() and "one" in {m.id for m in open_database().models}
    monkeypatch.delenv("EDGEKD_HOME")
    assert database.home() == Path.home() / ".local/share/edgekd"


def test_key__tells_a_cpu_by_its_instruction_sets() -> None:
    key = keys.key_of(about(), "host", "onnx", "fp32", 1)
    assert key == Key("x86_64+avx512+vnni", "onnx", "onnxruntime 1.0", "fp32", 1)
    named = about().model_copy(update={"device": "another name (64 cores)"})
    assert keys.key_of(named, "intel_cpu", "onnx", "fp32", 1) == key
    assert keys.key_of(about(), "jetson_orin_nano", "tensorrt", "fp16", None).device == "jetson_orin_nano"
    assert keys.cpu_class(["asimd", "asimddp", "i8mm"]) == "aarch64+asimd+dot+i8mm"
    assert keys.cpu_class(["avx", "avx2"]) == "x86_64+avx2" and keys.cpu_class([], "riscv64") == "riscv64"


def test_key__threads_left_to_the_runtime_are_one_a_core_of_that_device() -> None:
    assert keys.key_of(about(), "host", "onnx", "fp32", None).threads == 4


def profile(**components: float) -> Profile:
    parts = {name: ComponentProfile(latency_ms=Latency.from_samples([ms]), load_ms=1.0, size_bytes=1, executed_precision="fp32", executed_ops={})
             for name, ms in components.items()}
    return Profile(id="mine", target="host", prompts=1, components=parts, latency_ms=Latency.from_samples([sum(components.values())]), load_ms=1.0,
                   peak_memory_bytes=None, size_bytes=1, executed_precision="fp32", circumstances=about())


def test_save__keeps_a_profile_with_the_graph_of_its_file(tmp_path: Path, conv_file: Path) -> None:
    path = database.save(profile(model=2.5), "host", conv_file, folder=tmp_path)
    assert path == tmp_path / database.OWN
    model = open_database(tmp_path, shipped=False).models[0]
    assert (model.id, model.ms, model.key.device, model.key.version, model.own) == ("mine/model", 2.5, "x86_64+avx512+vnni", "onnxruntime 1.0", True)
    assert model.operators, "the operators of the file go with it"
    assert json.loads(path.read_text().splitlines()[0])["circumstances"]["date"] == about().date


def test_save__of_a_profile_of_something_else_is_refused(tmp_path: Path, conv_file: Path) -> None:
    with pytest.raises(EdgekdError, match="no component"):
        database.save(profile(encoder=2.5), "host", conv_file, folder=tmp_path)
    assert not (tmp_path / database.OWN).exists()


def test_shipped__rows_are_whole_dated_and_of_a_class_of_cpu() -> None:
    paths = list(database.SHIPPED.glob("*.jsonl.gz"))
    assert paths
    for path in paths:
        found = Database()
        database.read(path, found)
        assert not found.notes and len(found.operators) > 500 and len(found.models) >= 40
        (key,) = found.counts()
        assert path.name == f"{key.slug}.jsonl.gz" and "+" in key.device
        about = json.loads(gzip.decompress(path.read_bytes()).decode().splitlines()[0])["circumstances"]
        assert about["date"] and about["cpu_flags"] and about["threads"] == key.threads
        assert {m.family for m in found.models} >= {"repvit", "tinyvit", "efficientvit", "efficient_sam", "nanosam"}
        assert NO_FAMILY in {o.family for o in found.operators}
