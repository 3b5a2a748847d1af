"""The command line: exit codes, clean errors, one document on stdout. Verbs run in this process; the door itself once in its own."""
from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from edgekd import __version__, api, catalogue, cli
from edgekd.errors import EdgekdError, UsageError

VERBS = ["compress", "cache", "distill", "train", "quantize", "export", "profile", "evaluate", "predict", "report", "list", "init", "doctor"]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`call("list", "recipes")` runs a verb in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = cli._run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


Call = Callable[..., Result]


def refused(found: Result, *words: str, code: int = 2) -> None:
    """The way every error looks: exit code, one message on stderr, nothing on stdout, no traceback."""
    assert found.code == code, found
    assert found.out == "" and found.err.startswith("error: ") and "Traceback" not in found.err
    for word in words:
        assert word in found.err


# --- help ----------------------------------------------------------------------------------------------------------


def test_help__lists_every_verb_in_whole_sentences(call: Call) -> None:
    found = call("--help")
    assert found.code == 0
    lines = [line for line in found.out.splitlines() if line.startswith("  ") and line.split()[0] in VERBS]
    assert [line.split()[0] for line in lines] == VERBS
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


@pytest.mark.parametrize("verb", VERBS)
def test_help__of_a_verb(call: Call, verb: str) -> None:
    found = call(verb, "--help")
    assert found.code == 0 and f"Usage: edgekd {verb}" in found.out


@pytest.mark.parametrize(("verb", "flags"), [
    ("compress", "--teacher --target --data --recipe --output --budget-ms --budget-mb --set --dry-run --resume --json"),
    ("evaluate", "--data --split --json"), ("predict", "--point --box --output"), ("export", "--to --output"), ("profile", "--target --json"),
    ("quantize", "--scheme --format --target --data --output"), ("cache", "--teacher --data --output --verify"), ("distill", "--recipe --teacher --data --set"),
])
def test_flags_that_scripts_rely_on(call: Call, verb: str, flags: str) -> None:
    text = call(verb, "--help").out
    assert not [f for f in flags.split() if f not in text]


def test_version(call: Call) -> None:
    assert call("--version").out == f"edgekd {__version__}\n"


def test_no_arguments__show_the_help(call: Call) -> None:
    found = call()
    assert found.code == 2 and "compress" in found.out + found.err


def test_the_door__of_the_module(edgekd: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = edgekd("list", "recipes", "--json", cwd=tmp_path)
    assert done.returncode == 0 and {"default", "smoke"} <= {r["name"] for r in json.loads(done.stdout)}, done.stderr


# --- wrong usage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    (["compres"], ["compress"]),
    (["compress", "--tagret", "host"], ["--target", "edgekd compress --help"]),
    (["compress", "--target", "host"], ["--data"]),
    (["compress", "--target", "jetsonn", "--data", "x"], ["did you mean 'jetson'"]),
    (["compress", "--target", "host", "--data", "x", "--recipe", "smok"], ["did you mean 'smoke'"]),
    (["compress", "--target", "host", "--data", "x", "--set", "quantization.schmes=[fp32]"], ["did you mean 'schemes'"]),
    (["compress", "--target", "host", "--data", "x", "--budget-ms", "-3"], ["budget.latency_ms"]),
    (["compress", "--target", "host", "--data", "/no/such/folder"], ["/no/such/folder"]),
    (["list", "recipess"], ["did you mean 'recipes'"]),
    (["init", "recpie", "default", "x.yaml"], ["did you mean 'recipe'"]),
    (["init", "recipe", "defualt", "x.yaml"], ["did you mean 'default'"]),
    (["predict", "a", "b", "-o", "c", "--point", "1"], ["--point takes X,Y"]),
    (["predict", "a", "b", "-o", "c", "--box", "1,2,3"], ["--box takes"]),
    (["cache", "--teacher", "sam_nano"], ["--data"]),
    (["train", "--recipe", "smoke", "--output", "x"], ["no 'train' section", "train_sam_nano"]),
    (["profile", "/no/artifact"], ["/no/artifact"]),
    (["export", "x", "--to", ",", "--output", "y"], ["names no format"]),
    (["export", "sam_nano", "--to", "onxx", "--output", "y"], ["did you mean 'onnx'"]),
    (["export", "sam_nano", "--to", "onnx", "--scheme", "fp23", "--output", "y"], ["did you mean 'fp32'"]),
    (["export", "sam_nano", "--to", "onnx", "--scheme", "w8a8_static", "--output", "y"], ["calibration images", "--data"]),
    (["quantize", "sam_nano", "--scheme", "w8a8_statik", "--output", "y"], ["did you mean 'w8a8_static'"]),
    (["quantize", "sam_nano", "--scheme", "bf16", "--format", "onnx", "--output", "y"], ["cannot run", "fp32"]),
    (["quantize", "sam_nano", "--scheme", "fp32", "--format", "openvino", "--target", "jetson", "--output", "y"], ["no runtime", "it runs"]),
    (["evaluate", "sam_nanoo", "--data", "x"], ["did you mean 'sam_nano'"]),
    (["evaluate", "baseline/disk", "--data", "x"], ["did you mean 'baseline/disc'"]),
    (["evaluate", "baseline/disc", "--data", "/no/such/folder"], ["/no/such/folder"]),
    (["evaluate", "./no.safetensors", "--data", "x"], ["no model at ./no.safetensors"]),
])
def test_wrong_usage__is_told_and_exits_2(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    refused(call(*arguments), *words)
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_empty_folder__names_images(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(call("compress", "--teacher", "sam_nano", "--target", "host", "--data", tmp_path / "empty"), "image")


def test_teacher_without_weights__names_the_hub_id_and_the_dry_run(call: Call, photos: Path, tmp_path: Path) -> None:
    found = call("compress", "--teacher", "sam_vit_h", "--target", "jetson", "--data", photos, "--output", tmp_path / "h")
    refused(found, "facebook/sam-vit-huge", "--dry-run", "hint:")


# --- errors from below ---------------------------------------------------------------------------------------------


def test_failure__exits_1_with_the_hint(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "doctor", lambda **_: (_ for _ in ()).throw(EdgekdError("it broke", where="here", hint="do this")))
    found = call("doctor")
    refused(found, "it broke (here)", "\n  hint: do this", code=1)


def test_fault__keeps_the_traceback_in_a_file(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "doctor", lambda **_: 1 // 0)
    found = call("doctor")
    refused(found, "ZeroDivisionError", code=1)
    log = Path(found.err.split("the traceback is in ")[1].split(" ")[0])
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_fault__is_raised_when_debugging(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "doctor", lambda **_: 1 // 0)
    monkeypatch.setenv("EDGEKD_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        call("doctor")


def test_interrupt__exits_130_and_says_that_it_resumes(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "doctor", stop)
    found = call("doctor")
    assert found.code == 130 and "continues" in found.err


def test_main__leaves_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["list", "nothing"])
    assert left.value.code == 2


# --- verbs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in catalogue.KINDS if k != "runs"])
def test_list__every_kind_has_named_rows(call: Call, kind: str) -> None:
    found = call("list", kind, "--json")
    rows = found.json()
    assert found.code == 0 and rows and all(r["name"] for r in rows)
    names = [r["name"] for r in rows]
    assert len(names) == len(set(names))
    shown = call("list", kind).out
    assert all(name in shown for name in names)


def test_list_models__is_teachers_students_and_baselines(call: Call) -> None:
    kinds = {r["name"]: r["kind"] for r in call("list", "models", "--json").json()}
    assert kinds["sam_nano"] == "teacher" and kinds["repvit_xs"] == "student" and kinds["baseline/disc"] == "baseline"


def test_list_runs__reads_the_reports(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("list", "runs", "--json").json() == []
    for name, text in (("a", json.dumps({"chosen": "x", "verdict": "met", "target": {"name": "host"}})), ("b", "{cut")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "report.json").write_text(text)
    rows = {r["name"]: r for r in call("list", "runs", "--json").json()}
    assert rows["a"]["chosen"] == "x" and rows["b"]["verdict"] == "unreadable report"


def test_doctor__every_format_works_or_says_how_to_mend_it(call: Call) -> None:
    document = call("doctor", "--json").json()
    assert {"onnx", "openvino"} <= {f["name"] for f in document["formats"]}
    assert all(f["ok"] or f["fix"] for f in document["formats"])
    assert {t["name"] for t in document["transports"]} == {"local", "ssh", "adb", "browser"}
    assert "format onnx" in call("doctor").out


def test_init__copies_and_refuses_to_overwrite(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    assert call("init", "recipe", "default", path).code == 0
    assert path.read_text().startswith("# default:")
    refused(call("init", "recipe", "smoke", path), "exists already", "--force")
    assert call("init", "recipe", "smoke", path, "--force").code == 0
    assert yaml.safe_load(path.read_text())["name"] == "smoke"
    assert call("init", "target", "jetson", tmp_path / "board.yaml").code == 0


def test_dry_run__plans_without_weights_or_board(call: Call, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    where = ("compress", "--teacher", "sam_vit_h", "--target", "jetson", "--data", photos, "--budget-ms", "30", "--dry-run")
    shown = call(*where)
    assert shown.code == 0 and "jetson" in shown.out and "predicted" in shown.out
    document = call(*where, "--json").json()
    assert document["plan"]["budget"]["latency_ms"] == 30 and document["plan"]["candidates"]
    assert not list(tmp_path.iterdir())


def test_evaluate__a_baseline_on_scenes(call: Call) -> None:
    document = call("evaluate", "baseline/box_fill", "--data", "scenes:seed=5,count=2", "--json").json()
    assert {"box_miou", "center_miou", "center_plus2_miou"} <= set(document) and document["images"] == 2
    assert "box_miou" in call("evaluate", "baseline/box_fill", "--data", "scenes:seed=5,count=2").out


def test_predict__a_baseline_writes_a_mask_of_the_photos_size(call: Call, make_photos: Callable[..., Path], tmp_path: Path) -> None:
    from PIL import Image

    photo = make_photos(1, size=(90, 60)) / "photo0.png"
    found = call("predict", "baseline/box_fill", photo, "--box", "10,10,40,30", "--point", "5,5,0", "-o", tmp_path / "m.png", "--json")
    assert found.code == 0 and found.json()["area"] == 600
    assert Image.open(tmp_path / "m.png").size == (90, 60)


def test_compress__exit_code_follows_the_verdict(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from report_sample import report

    seen: dict[str, Any] = {}
    found = report()

    def fake(**options: Any) -> Any:
        seen.update(options)
        return found

    monkeypatch.setattr(api, "compress", fake)
    shown = call("compress", "--target", "host", "--data", "p", "--budget-ms", "9", "--set", "seed=1", "--fresh", "--output", "o", "--json")
    assert shown.code == (1 if found.verdict == "missed" else 0)
    assert shown.json()["schema"] == "edgekd.report/1"
    assert seen["budget"]["latency_ms"] == 9 and seen["sets"] == ["seed=1"] and seen["resume"] is False and str(seen["output"]) == "o"
    assert "report.html" in call("compress", "--target", "host", "--data", "p", "--output", "o").out


def test_load_recipe__flags_win_over_the_file() -> None:
    found = api.load_recipe("smoke", sets=["budget.latency_ms=5"], teacher="a/b", budget={"latency_ms": 3.0, "size_mb": None})
    assert (found.teacher, found.budget.latency_ms, found.budget.size_mb) == ("a/b", 3.0, None)


def test_api__is_keyword_only_and_documented() -> None:
    import inspect

    for verb in ("compress", "plan", "cache", "distill", "train", "quantize", "export", "profile", "evaluate", "predict", "report", "doctor", "init"):
        function = getattr(api, verb)
        assert function.__doc__
        assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(function).parameters.values()), verb


def test_init__in_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        api.init(kind="recipe", name="default", path=tmp_path / "no/such/x.yaml")
