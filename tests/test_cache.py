"""The teacher cache: resumes, notices damage, never mixes teachers or photos, and survives full disks and killed writers."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_writer
import numpy as np
import pytest
import torch
from cache_writer import SCENES, teacher

from edgekd import cli
from edgekd.data.images import preprocess
from edgekd.data.scenes import Scenes
from edgekd.distillation.cache import SCHEMA, build_cache, cache_fingerprint, estimate_cache, open_cache, writing
from edgekd.distillation.cache import format as files
from edgekd.errors import EdgekdError, UsageError

ROOT = Path(__file__).resolve().parents[1]
COUNT = len(SCENES)
SHARDS = COUNT // cache_writer.SHARD_IMAGES
Disk = namedtuple("Disk", "total used free")
PREPARED = [0.102, 0.823, -1.279, 1.326, 0.653, 0.0]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_IMAGES", cache_writer.SHARD_IMAGES)


def stop_after(count: int) -> Any:
    """An `on_images` that is interrupted when so many images are done."""
    done = [0]

    def on_images(n: int) -> None:
        done[0] += n
        if done[0] >= count:
            raise KeyboardInterrupt

    return on_images


def truth(position: int) -> torch.Tensor:
    model = teacher()
    return model.embed(torch.from_numpy(preprocess(SCENES[position].image, model.preprocess)[0])[None])[0]


def ids_on_disk(folder: Path) -> list[str]:
    return [i for s in open_cache(folder).index["shards"] for i in s["ids"]]


# --- what is in it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "shard", "error"), [("fp16", 2, 1e-3), ("int8", 2, 0.02), ("packed", 2, 0.15), ("packed", 16, 0.08)])
def test_build__holds_what_the_teacher_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, shard: int, error: float) -> None:
    monkeypatch.setattr(writing, "SHARD_IMAGES", shard)
    found = build_cache(teacher(), SCENES, tmp_path, codec=codec)  # type: ignore[arg-type]
    for i in (0, 3, 15, 6):
        wanted = truth(i)
        assert found.embedding(i).shape == wanted.shape
        assert (found.embedding(i).float() - wanted).square().mean().sqrt() <= error * wanted.std()
    assert len(found) == COUNT and len(found.index["shards"]) == COUNT // shard == found.made and found.complete
    assert (b"embedding/basis" in files.shard_path(tmp_path, 0).read_bytes()[:4000]) == (shard == 16), "a rotation pays in a large shard only"
    with pytest.raises(IndexError):
        found.outputs(COUNT)


def test_build__what_cannot_be_read_back_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writing.save
    monkeypatch.setattr(writing, "save", lambda tensors, metadata: real({k: 3 * t if k.endswith("scale") else t for k, t in tensors.items()}, metadata))
    with pytest.raises(EdgekdError, match="cannot be read back"):
        build_cache(teacher(), SCENES, tmp_path)
    assert not list(tmp_path.glob("*shard-*"))


def test_build__several_outputs_each_as_suits_it(tmp_path: Path) -> None:
    class Several(torch.nn.Module):
        name, preprocess = "several", teacher().preprocess

        def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = images.flatten(1)[:, :10]
            return {"embedding": images.repeat(1, 2, 1, 1), "logits": logits, "attention0": images.softmax(-1)}

    model = Several()
    found = build_cache(model, SCENES, tmp_path, outputs={"embedding": None, "logits": None, "attention0": None})
    given = model.outputs(torch.from_numpy(preprocess(SCENES[5].image, model.preprocess)[0])[None])
    got = found.outputs(5)
    assert {k: t.dtype for k, t in got.items()} == {"embedding": torch.float32, "logits": torch.float16, "attention0": torch.float16}
    assert torch.equal(got["logits"], given["logits"][0].half()) and torch.equal(got["attention0"], given["attention0"][0].half())
    assert found.raw_bytes_per_image == 2 * sum(t[0].numel() for t in given.values())


def test_build__again_makes_nothing(tmp_path: Path) -> None:
    build_cache(teacher(), SCENES, tmp_path)
    counted: list[int] = []
    assert build_cache(teacher(), SCENES, tmp_path, on_images=counted.append).made == 0
    assert sum(counted) == COUNT


def test_build__interrupted_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_cache(teacher(), SCENES, tmp_path, on_images=stop_after(6))
    again = build_cache(teacher(), SCENES, tmp_path)
    assert again.made == SHARDS - 3 and len(again) == COUNT
    assert ids_on_disk(tmp_path) == [SCENES[i].id for i in range(COUNT)], "none twice, none lost"


def test_build__another_teacher_dataset_or_codec_is_never_mixed_in(tmp_path: Path) -> None:
    build_cache(teacher(0), SCENES, tmp_path)
    assert build_cache(teacher(1), SCENES, tmp_path).made == SHARDS
    assert build_cache(teacher(1), Scenes(seed=10, count=6, size=64), tmp_path).made == 3
    assert build_cache(teacher(1), Scenes(seed=10, count=6, size=64), tmp_path, codec="int8").made == 3
    assert len(list(tmp_path.glob("shard-*"))) == 6, "shards of the larger cache are gone"


def test_fingerprint__covers_all_that_an_output_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = teacher(), teacher()
    other.preprocess = type(model.preprocess)(64, mean=(1.0, 2.0, 3.0))
    found = [cache_fingerprint(model, SCENES, {"embedding": None}, "packed"), cache_fingerprint(teacher(1), SCENES, {"embedding": None}, "packed"),
             cache_fingerprint(other, SCENES, {"embedding": None}, "packed"), cache_fingerprint(model, SCENES, {"embedding": "encoder.0"}, "packed"),
             cache_fingerprint(model, SCENES, {"embedding": None}, "fp16"), cache_fingerprint(model, Scenes(seed=9, count=15, size=64), {"embedding": None}, "packed")]
    monkeypatch.setattr(files, "CODE", files.CODE + 1)
    found.append(cache_fingerprint(model, SCENES, {"embedding": None}, "packed"))
    assert len(set(found)) == len(found)


def test_code__is_raised_when_preprocessing_computes_other_numbers() -> None:
    """Recorded at CODE 1. When this fails because a photo is prepared differently on purpose: raise `format.CODE` and record anew."""
    y, x = np.mgrid[:45, :70]
    photo = np.stack([(7 * x + 3 * y) % 256, (5 * x * y) % 251, (x * x + y) % 253], -1).astype(np.uint8)
    frame, _ = preprocess(photo, teacher().preprocess)
    assert files.CODE == 1 and frame.shape == (3, 64, 64)
    assert [round(float(v), 3) for v in (frame.mean(), frame.std(), frame[0, 3, 5], frame[1, 20, 31], frame[2, 39, 60], frame[0, 60, 3])] == pytest.approx(PREPARED, abs=2e-3)


def test_build__a_teacher_that_gives_nan_is_refused_by_the_photos_name(tmp_path: Path) -> None:
    class Sick(torch.nn.Module):
        name, preprocess = "sick", teacher().preprocess

        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def embed(self, images: torch.Tensor) -> torch.Tensor:
            out = images.clone()
            for n in range(len(images)):
                if self.seen + n == 5:
                    out[n, 0, 0, 0] = 1e6  # more than fp16 holds
            self.seen += len(images)
            return out

    with pytest.raises(EdgekdError, match="infinite or NaN embedding") as e:
        build_cache(Sick(), SCENES, tmp_path)
    assert SCENES[5].id == e.value.where
    assert all(p.name < "shard-00002" for p in tmp_path.glob("shard-*"))


def test_build__no_photos(tmp_path: Path) -> None:
    class Nothing(Scenes):
        def __len__(self) -> int:
            return 0

    with pytest.raises(EdgekdError, match="no photos"):
        build_cache(teacher(), Nothing(seed=1, count=1, size=64), tmp_path)


# --- damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "flip header", "truncate", "delete", "flip description"])
def test_verify__names_the_damaged_shard_and_build_mends_it(tmp_path: Path, damage: str) -> None:
    good = build_cache(teacher(), SCENES, tmp_path)
    before = [good.embedding(i).clone() for i in range(COUNT)]
    shard = tmp_path / ("shard-00001.json" if damage == "flip description" else "shard-00001.safetensors")
    data = bytearray(shard.read_bytes())
    if damage == "truncate":
        shard.write_bytes(data[:-9])
    elif damage == "delete":
        shard.unlink()
    else:
        data[30 if damage == "flip header" else data.index(b'"bytes": ') + 9 if damage == "flip description" else len(data) // 2 + 7] ^= 0x01
        shard.write_bytes(data)
    with pytest.raises(EdgekdError, match=r"shard-00001\.safetensors"):
        open_cache(tmp_path).verify()
    mended = build_cache(teacher(), SCENES, tmp_path)
    mended.verify()
    assert mended.made == 1 and all(torch.allclose(mended.embedding(i), b, atol=1e-5) for i, b in enumerate(before))


def test_outputs__of_a_damaged_shard_are_refused(tmp_path: Path) -> None:
    build_cache(teacher(), SCENES, tmp_path)
    shard = tmp_path / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-700])
    with pytest.raises(EdgekdError, match="damaged") as e:
        open_cache(tmp_path).outputs(5)
    assert e.value.where == shard
    assert open_cache(tmp_path).outputs(3), "the others can be read"


def test_open__nothing_there_or_rubbish(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="no cache"):
        open_cache(tmp_path)
    for text, said in (("{", "cannot be read"), (json.dumps({"schema": "edgekd.cache/9"}), r"edgekd\.cache/9"), ("[]", "cannot be read")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(EdgekdError, match=said):
            open_cache(tmp_path)


def test_open__a_changed_number_in_the_index_is_noticed(tmp_path: Path) -> None:
    build_cache(teacher(), SCENES, tmp_path)
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace('"shard_images": 2', '"shard_images": 3'))
    with pytest.raises(EdgekdError, match="digest"):
        open_cache(tmp_path)


def test_build__a_cache_of_the_first_format_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"schema": "edgekd.cache/1", "fingerprint": "x", "shards": []}))
    for n in (0, 40):
        (tmp_path / f"shard-{n:05d}.safetensors").write_bytes(b"old")
    with pytest.raises(EdgekdError, match=r"its schema is edgekd\.cache/1"):
        open_cache(tmp_path)
    made = build_cache(teacher(), SCENES, tmp_path)
    made.verify()
    assert made.plan["schema"] == SCHEMA and not (tmp_path / "shard-00040.safetensors").exists()
    assert "edgekd.cache/1" in capsys.readouterr().err


# --- reading --------------------------------------------------------------------------------------------------------------


def test_reader__sees_finished_shards_while_others_are_written(tmp_path: Path) -> None:
    readers: list[Any] = []

    def look(n: int) -> None:
        if n:
            readers.append(open_cache(tmp_path))
            assert readers[0].embedding(0).shape == (64, 8, 8)

    def first(n: int) -> None:
        look(n)
        if n and len(readers) == 1:
            with pytest.raises(EdgekdError, match="images 2 to 3 are not in the cache yet"):
                readers[0].outputs(3)
            assert len(readers[0]) == 2 and not readers[0].complete
            readers[0].verify()

    build_cache(teacher(), SCENES, tmp_path, on_images=first)
    assert len(readers[0]) == COUNT and readers[0].complete, "what was finished after opening is seen"
    assert torch.equal(readers[0].embedding(15), open_cache(tmp_path).embedding(15))


def test_reader__finds_images_of_shards_that_were_finished_out_of_order(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_cache(teacher(), SCENES, tmp_path, rank=2, world=3, on_images=stop_after(2))
    found = open_cache(tmp_path)
    assert [s["number"] for s in found.index["shards"]] == [2] and len(found) == 2
    assert (found.embedding(5) - truth(5)).abs().mean() < 0.15 * truth(5).std()
    with pytest.raises(EdgekdError, match="not in the cache yet"):
        found.embedding(0)


def test_reader__goes_to_worker_processes(tmp_path: Path) -> None:
    found = build_cache(teacher(), SCENES, tmp_path)
    wanted = found.embedding(7)
    assert torch.equal(pickle.loads(pickle.dumps(found)).embedding(7), wanted)


def test_docs__the_reader_of_thirty_lines_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(c for c in re.findall(r"```python\n(.*?)```", (ROOT / "docs/cache.md").read_text(), re.S) if "def read" in c)
    assert "edgekd" not in code and code.strip().count("\n") < 30
    space: dict[str, Any] = {}
    exec(code, space)
    for codec, shard in (("packed", 2), ("packed", 16), ("int8", 2), ("fp16", 2)):
        monkeypatch.setattr(writing, "SHARD_IMAGES", shard)
        found = build_cache(teacher(), SCENES, tmp_path / f"{codec}{shard}", codec=codec)  # type: ignore[arg-type]
        for position in (0, 9, 15):
            got = space["read"](found.folder, position)
            assert set(got) == {"embedding"}
            np.testing.assert_allclose(got["embedding"], found.embedding(position).numpy(), atol=1e-5)


# --- several writers ------------------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(ROOT / "tests/cache_writer.py"), str(folder), *map(str, arguments)], text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_writers__one_killed_in_the_middle_of_a_shard_and_nothing_is_lost(tmp_path: Path) -> None:
    victim = start(tmp_path, 0, 2, 4)
    until(lambda: (tmp_path / "hangs").exists() or victim.poll() is not None)
    other = start(tmp_path, 1, 2)
    until(lambda: len(files.finished(tmp_path)) == SHARDS - 1 or other.poll() is not None)
    assert victim.poll() is None and other.poll() is None, "one is in the middle of a shard, the other has made all else and waits for it"
    assert list(tmp_path.glob(".shard-00004.*")), "the shard is on disk, but under its temporary name"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    out, err = other.communicate(timeout=90)
    assert other.returncode == 0, err
    assert not list(tmp_path.glob(".shard-*")), "the survivor has cleared away what the victim left"
    made = open_cache(tmp_path)
    made.verify()
    assert made.complete and sorted(ids_on_disk(tmp_path)) == sorted(SCENES[i].id for i in range(COUNT)) and len(set(ids_on_disk(tmp_path))) == COUNT
    restarted = start(tmp_path, 0, 2)
    out, err = restarted.communicate(timeout=90)
    assert restarted.returncode == 0 and out.strip() == "0", err
    for i in (0, 8, 9, 15):
        assert (made.embedding(i) - truth(i)).abs().mean() < 0.15 * truth(i).std()


def test_writers__all_killed_and_begun_again_with_another_number(tmp_path: Path) -> None:
    victims = [start(tmp_path, 0, 2, 2), start(tmp_path, 1, 2, 2)]
    until(lambda: (tmp_path / "hangs").exists() and len(files.finished(tmp_path)) >= 3)
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    kept = len(files.finished(tmp_path))
    made = build_cache(teacher(), SCENES, tmp_path)
    assert 3 <= kept < SHARDS and made.made == SHARDS - kept
    made.verify()
    assert ids_on_disk(tmp_path) == [SCENES[i].id for i in range(COUNT)]


def test_writers__wait_for_one_that_is_at_work_but_not_for_ever(tmp_path: Path) -> None:
    holds = "import fcntl, sys, time; f = open(sys.argv[1], 'a+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 3); print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", holds, str(tmp_path / ".writers")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(EdgekdError, match="1 shards of the cache are still with other writers"):
            build_cache(teacher(), SCENES, tmp_path, patience=0.5)
        assert files.finished(tmp_path) == [0, 1, 2, 4, 5, 6, 7]
    finally:
        holder.kill()
        holder.wait()
    assert build_cache(teacher(), SCENES, tmp_path).made == 1


def test_writers__without_locks_keep_to_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.raises(EdgekdError, match="4 shards"):
        build_cache(teacher(), SCENES, tmp_path, rank=1, world=2, patience=0.3)
    assert files.finished(tmp_path) == [1, 3, 5, 7]
    assert build_cache(teacher(), SCENES, tmp_path, rank=0, world=2).made == 4


def test_writers__of_two_caches_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_cache(teacher(1), SCENES, other)
    with pytest.raises(EdgekdError, match="the cache of something else in this folder"):
        build_cache(teacher(), SCENES, tmp_path, on_images=lambda n: n and shutil.copy(other / "index.json", tmp_path))


# --- size, time, full disks -----------------------------------------------------------------------------------------------


def test_estimate__comes_close_and_writes_nothing(tmp_path: Path) -> None:
    told = estimate_cache(teacher(delay=0.01), SCENES, tmp_path / "new")
    assert told is not None and not (tmp_path / "new").exists()
    begun = time.monotonic()
    made = build_cache(teacher(delay=0.01), SCENES, tmp_path / "new")
    took = time.monotonic() - begun
    assert told.left == COUNT and told.bytes == pytest.approx(sum(s["bytes"] for s in made.index["shards"]), rel=0.25)
    assert told.raw_fp16_bytes_per_image == 8192 and 0 < told.seconds < 20 * took
    assert estimate_cache(teacher(), SCENES, tmp_path / "new") is None
    files.about_path(tmp_path / "new", 3).unlink()
    part = estimate_cache(teacher(), SCENES, tmp_path / "new")
    assert part is not None and part.left == 2


def test_build__what_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9, 5000))
    with pytest.raises(EdgekdError, match=r"needs about \d+ kB more, and the disk has 5 kB"):
        build_cache(teacher(), SCENES, tmp_path)
    assert not list(tmp_path.glob("*shard-*"))


def test_build__a_full_disk_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writing.write_atomic

    def full(path: Path, data: bytes) -> Path:
        if path.name == "shard-00002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(writing, "write_atomic", full)
    with pytest.raises(EdgekdError, match="the disk is full") as e:
        build_cache(teacher(), SCENES, tmp_path)
    assert "make room" in str(e.value) and files.finished(tmp_path) == [0, 1]
    open_cache(tmp_path).verify()
    monkeypatch.setattr(writing, "write_atomic", real)
    assert build_cache(teacher(), SCENES, tmp_path).made == SHARDS - 2


def test_build__a_disk_that_really_takes_no_more(tmp_path: Path) -> None:
    """The kernel refuses the bytes: a limit on the size of files stands for the full disk."""
    code = ("import resource, sys; from pathlib import Path; from cache_writer import *\n"
            "from edgekd.errors import EdgekdError\n"
            "writing.SHARD_IMAGES = 8; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
            "try: build_cache(teacher(), SCENES, Path(sys.argv[1]))\n"
            "except EdgekdError as e: print(e); sys.exit(1)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "larger than this process may write" in done.stdout and "same command again" in done.stdout, done.stderr
    assert not list(tmp_path.glob("*shard-*")), "no half shard, and no temporary file"
    assert (tmp_path / "index.json").exists()


# --- the command ----------------------------------------------------------------------------------------------------------


def test_cli__the_default_takes_less_than_a_third_and_a_flipped_bit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["cache", "--teacher", "sam_nano", "--data", str(ROOT / "examples/photos"), "--output", str(tmp_path / "c"), "--limit", "12", "--json"]
    assert cli._run([*asked, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)["estimate"]
    assert told["provenance"] == "predicted" and not (tmp_path / "c").exists()
    assert cli._run(asked) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["images"] == 12 and made["bytes_per_image"] <= 0.3 * made["raw_fp16_bytes_per_image"] and made["raw_fp16_bytes_per_image"] == 65536
    assert made["bytes"] == sum(p.stat().st_size for p in (tmp_path / "c").glob("*") if not p.name.startswith(".")) == pytest.approx(told["bytes"], rel=0.25)
    assert cli._run(["cache", "--verify", str(tmp_path / "c")]) == 0
    for shard in (tmp_path / "c").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[len(data) - 3] ^= 0x10
        shard.write_bytes(data)
    assert cli._run(["cache", "--verify", str(tmp_path / "c")]) == 1
    assert shard.name in capsys.readouterr().err


def test_api__an_unknown_codec_is_refused() -> None:
    from edgekd import api

    with pytest.raises(UsageError, match="unknown codec 'pakced'"):
        api.cache(teacher="sam_nano", data="scenes:seed=1,count=1", output=Path("nowhere"), codec="pakced")  # type: ignore[arg-type]
