"""Two processes over gloo train as one with the double batch: the same curve, weights and photos; any number goes on from any other's state."""
from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import BATCH, COMPARED, PHOTOS, STAGES, model, prepare, train, train_some, trainer

from edgekd import console
from edgekd.distillation import distributed
from edgekd.distillation.clicks import first_prompts
from edgekd.distillation.draws import Draws, pick
from edgekd.distillation.labelled import draw_masks

CLOSE = {"rtol": 2e-3, "atol": 2e-4}
"""Sums of float32 in another order, through Adam: a step moves weights by 3e-3."""


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launched(count: int, *command: object, timeout: float = 240, **env: str) -> list[subprocess.CompletedProcess[str]]:
    """The processes of a launch, as torchrun starts them."""
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1", **env}
    running = [subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
                                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=Path(__file__).parent) for rank in range(count)]
    said = [p.communicate(timeout=timeout) for p in running]
    return [subprocess.CompletedProcess(p.args, p.returncode, *out) for p, out in zip(running, said, strict=True)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process made, and what each of two did."""
    folder = tmp_path_factory.mktemp("both")
    torch.set_num_threads(1)
    teacher, source = prepare(folder)
    one: dict[str, Any] = {name: train(name, teacher, source, folder / "one", BATCH) for name in COMPARED}
    train_some("prompts", teacher, source, folder / "one-then-two", BATCH, 2)
    shutil.copytree(folder / "one-then-two", folder / "one-then-sharded")
    for rank, done in enumerate(launched(2, "two_processes.py", folder)):
        assert done.returncode == 0, f"process {rank}: {done.stderr[-3000:]}"
    two = [torch.load(folder / f"process{rank}.pt", weights_only=False) for rank in range(2)]
    for before in ("two-then-one", "sharded-then-one"):
        one[before] = train("prompts", teacher, source, folder / before, BATCH)
    return {"one": one, "two": two, "folder": folder}


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Curves and weights of two trainings."""
    assert [r["step"] for r in a["curve"]] == [r["step"] for r in b["curve"]]
    for one, other in zip(a["curve"], b["curve"], strict=True):
        assert one == pytest.approx(other, rel=2e-3), "every loss, the norm of the gradient, the learning rate"
    assert a["weights"].keys() == b["weights"].keys()
    for name, tensor in a["weights"].items():
        assert torch.allclose(tensor.float(), b["weights"][name].float(), **CLOSE), name


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes__learn_as_one_with_the_double_batch(both: dict[str, Any], name: str) -> None:
    first, second = (process[name] for process in both["two"])
    same(both["one"][name], first)
    assert first["curve"] == second["curve"], "every process knows the whole batch's loss"
    assert all(torch.equal(v, second["weights"][k]) for k, v in first["weights"].items())


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes__draw_every_photo_once_an_epoch(both: dict[str, Any], name: str) -> None:
    stage = STAGES[name]
    drawn = [process[name]["drawn"] for process in both["two"]]
    pieces = [d[i : i + BATCH // 2] for i in range(0, len(drawn[0]), BATCH // 2) for d in drawn]
    stream = list(itertools.chain(*pieces))
    assert len(stream) == BATCH * stage["steps"] * stage.get("accumulate", 1) and stream == both["one"][name]["drawn"]
    epochs = [stream[at : at + PHOTOS] for at in range(0, len(stream) - PHOTOS + 1, PHOTOS)]
    assert epochs and all(sorted(epoch) == list(range(PHOTOS)) for epoch in epochs)


def test_resume__one_process_goes_on_from_two_and_two_from_one(both: dict[str, Any]) -> None:
    whole = both["one"]["prompts"]
    same(whole, both["one"]["two-then-one"])
    same(whole, both["two"][0]["after one"])
    before = [process["before one"] for process in both["two"]]
    pieces = [d[i : i + BATCH // 2] for i in (0, BATCH // 2) for d in before]
    assert list(itertools.chain(*pieces)) + both["one"]["two-then-one"]["drawn"] == whole["drawn"], "no photo twice, none left out"


@pytest.mark.parametrize("name", COMPARED)
def test_sharded__learns_as_one_process(both: dict[str, Any], name: str) -> None:
    """FSDP2: every process keeps half of the parameters, of the gradients, of Adam's moments and of the average."""
    same(both["one"][name], both["two"][0]["sharded"][name])


def test_sharded__states_are_those_of_any_other(both: dict[str, Any]) -> None:
    same(both["one"]["prompts"], both["two"][1]["one, sharded"])
    same(both["one"]["prompts"], both["one"]["sharded-then-one"])


def test_one_process__meets_no_engine(tmp_path: Path) -> None:
    code = "import sys, edgekd.distillation.trainer as t; assert t.current().engine is None; sys.exit('accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    teacher, source = prepare(tmp_path)
    one = trainer("encoder", teacher, source, tmp_path, BATCH)
    one.start()
    assert one.model is one.step_module and one.step_module is one.plain


# --- the command line -----------------------------------------------------------------------------------------------------

SMALL = ["--recipe", "smoke", "--teacher", "sam_nano", "--set", "data.limit=4", "--set", "stages.0.steps=1", "--set", "stages.1.instances=1"]


def test_distill__under_torchrun_one_voice_one_document(tmp_path: Path, root: Path) -> None:
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "edgekd", "distill"]
    done = subprocess.run([sys.executable, *runner, *SMALL, "--data", str(root / "examples/photos"), "--output", str(tmp_path / "out"), "--json"],
                          capture_output=True, text=True, cwd=root, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert Path(document["checkpoint"]).is_file() and document["bad_steps"] == 0
    assert done.stderr.count("processes train together") == 1 and done.stderr.count("cache of sam_nano") == 1
    assert "Warning" not in done.stderr


def test_cache__is_made_by_both(tmp_path: Path, make_photos: Callable[..., Path]) -> None:
    photos = make_photos(5)
    done = launched(2, "-m", "edgekd", "cache", "--teacher", "sam_nano", "--data", photos, "--output", tmp_path / "cache", "--json")
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert json.loads(done[0].stdout)["images"] == 5 and not done[1].stdout and not done[1].stderr


FAILING = """
import sys
from edgekd import console
from edgekd.distillation import distributed
from edgekd.errors import EdgekdError
import edgekd.cli as cli

def fail(given):
    try:
        with distributed.joined() as group:
            if sys.argv[1] == "all" or group.rank == int(sys.argv[1]):
                raise EdgekdError("this photo is broken", where="photo.jpg", hint="look at it")
            group.wait()
    except EdgekdError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0

cli._run = fail
cli.main([])
"""


@pytest.mark.parametrize(("who", "speakers"), [("all", [0]), ("1", [1])])
def test_a_failure__of_any_process_is_told_once_and_ends_all(tmp_path: Path, who: str, speakers: list[int]) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    done = launched(2, tmp_path / "failing.py", who)
    assert [i for i, d in enumerate(done) if "this photo is broken" in d.stderr] == speakers
    assert all(d.returncode == 1 for d in done)
    assert all("fault of edgekd" not in d.stderr and "Traceback" not in d.stderr for d in done)


def test_a_wrong_command__is_told_once(tmp_path: Path) -> None:
    done = launched(2, "-m", "edgekd", "distill", "--recipe", "smok", "--data", tmp_path, "--output", tmp_path / "out")
    assert [d.returncode for d in done] == [2, 2]
    assert "smoke" in done[0].stderr and not done[1].stderr


def test_compress__is_for_one_process() -> None:
    done = launched(2, "-m", "edgekd", "compress", "--target", "host", "--data", "x")
    assert [d.returncode for d in done] == [2, 2]
    assert "one process" in done[0].stderr and "distill" in done[0].stderr and not done[1].stderr


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("changes", [{"RANK": None}, {"WORLD_SIZE": None}, {"MASTER_ADDR": None}, {"LOCAL_RANK": None}, {"RANK": "four"}, {"RANK": "4"},
                                     {"RANK": "-1"}, {"WORLD_SIZE": "0", "RANK": "0"}, {"MASTER_PORT": ""}])
def test_place__leftovers_of_a_launch_are_one_process_alone(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None]) -> None:
    for name, value in (LAUNCHED | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert console.place() == console.Place()
    monkeypatch.setenv("PMI_SIZE", "3")
    with distributed.joined() as group:
        assert (group.rank, group.world, group.engine) == (0, 1, None)


def test_place__is_read_from_what_launchers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert console.place() == console.Place(1, 4, 1)


@pytest.mark.parametrize(("env", "said"), [({"ACCELERATE_USE_FSDP": "true"}, "first version"), ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed")])
def test_joined__an_engine_that_is_not_supported_is_refused(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], said: str) -> None:
    for name, value in {**LAUNCHED, **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(distributed.UsageError, match=said), distributed.joined():
        pass


# --- draws and devices ----------------------------------------------------------------------------------------------------


def test_draws__two_halves_are_the_whole() -> None:
    whole, halves = Draws(3), [Draws(3, rank, 2) for rank in range(2)]
    for _ in range(2):
        assert torch.equal(whole.rand(6, 2), torch.cat([h.rand(3, 2) for h in halves]))
        assert torch.equal(whole.randn(4), torch.cat([h.randn(2) for h in halves]))
        assert whole.integer(1000) == halves[0].integer(1000) == halves[1].integer(1000)
        torch.rand(3, generator=halves[0].own)  # what one process draws for itself disturbs nobody
    assert not torch.equal(torch.rand(4, generator=halves[0].own), torch.rand(4, generator=halves[1].own))


def test_draws__prompts_of_two_halves_are_those_of_the_whole() -> None:
    labels = torch.zeros(4, 64, 64, dtype=torch.int16)
    for i in range(4):
        labels[i, 8 * i : 8 * i + 24, 4:40], labels[i, 50:, 30:] = i + 1, 7
    masks = draw_masks(labels, 5, Draws(1))
    assert torch.equal(masks, torch.cat([draw_masks(half, 5, Draws(1, rank, 2)) for rank, half in enumerate(labels.split(2))]))
    made = [first_prompts(m, m[:, ::4, ::4], 0.5, d, clicks=(1, 3)) for m, d in ((masks, Draws(2)), (masks[:10], Draws(2, 0, 2)), (masks[10:], Draws(2, 1, 2)))]
    for whole, first, second in zip(*made, strict=True):
        assert torch.equal(whole, torch.cat([first, second]))


def test_pick__in_proportion_and_never_what_has_no_weight() -> None:
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]])
    found = pick(weights, torch.linspace(0, 1 - 1e-7, 4001)[None])
    assert set(found.unique().tolist()) == {1, 3} and 2990 < int((found == 1).sum()) < 3010
    assert pick(weights, torch.tensor([[1.0]])).item() == 3, "even of a number that rounding brought to 1"


def test_a_step__makes_its_tensors_where_the_batch_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On torch's device without memory, which refuses to mix its tensors with those of the CPU as a GPU does."""
    meta = torch.device("meta")
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=meta) + torch.zeros(3)
    monkeypatch.setattr("edgekd.distillation.batches.draw_masks", lambda labels, n, _: labels[:, None].expand(-1, n, -1, -1).flatten(0, 1) > 0)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # torch has no autocast there to ask about
    teacher, source = prepare(tmp_path)
    one = trainer("everything", teacher, source, tmp_path, BATCH)
    one.step_module.to(meta)
    teacher.to(meta)
    losses = one.step_module(distributed.moved(one.batches.batch(range(BATCH)), meta), Draws(0), 0)
    assert len(losses) == 5 and all(loss.device == meta and loss.shape == (BATCH,) for loss in losses.values())
    torch.stack(list(losses.values())).mean().backward()
    assert {p.grad.device for p in one.student.parameters() if p.grad is not None} == {meta}


def test_sync_norms__and_back_to_what_there_was() -> None:
    one = torch.nn.Sequential(model(1, 8).encoder, torch.nn.BatchNorm1d(4))
    before = {k: v.clone() for k, v in one.state_dict().items()}
    kinds = [type(m) for m in one.modules()]
    weight = one[0][1].weight
    distributed.sync_norms(one)
    assert isinstance(one[0][1], torch.nn.SyncBatchNorm)
    distributed.plain_norms(one)
    assert [type(m) for m in one.modules()] == kinds and one[0][1].weight is weight
    assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())
