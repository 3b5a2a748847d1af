"""The teacher cache: resumes, notices damage, never mixes teachers or photos."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.data.scenes import Scenes
from edgekd.distillation import cache as cache_module
from edgekd.distillation.cache import build_cache, open_cache
from edgekd.errors import EdgekdError
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess


def teacher(seed: int = 0) -> Sam:
    torch.manual_seed(seed)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 16, 16))
    return Sam("tiny", encoder, DecoderShape(embed_dim=32, heads=2, mlp_dim=32), Preprocess(64)).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_IMAGES", 3)


SCENES = Scenes(seed=9, count=7, size=64)


def test_build__holds_what_the_teacher_gives(tmp_path: Path) -> None:
    model, found = teacher(), None
    found = build_cache(model, SCENES, tmp_path)
    from edgekd.data.images import preprocess

    for i in (0, 3, 6):
        frame, _ = preprocess(SCENES[i].image, model.preprocess)
        assert torch.allclose(found.embedding(i).float(), model.embed(torch.from_numpy(frame)[None])[0], atol=2e-3)
    assert len(found) == 7 and len(found.index["shards"]) == 3 and found.made == 3
    assert found.embedding(0).dtype == torch.float16


def test_build__again_makes_nothing(tmp_path: Path) -> None:
    build_cache(teacher(), SCENES, tmp_path)
    counted: list[int] = []
    assert build_cache(teacher(), SCENES, tmp_path, on_images=counted.append).made == 0
    assert sum(counted) == 7


def test_build__killed_between_shards_goes_on(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(teacher(), SCENES, tmp_path, on_images=stop)
    again = build_cache(teacher(), SCENES, tmp_path)
    assert again.made == 2 and len(again) == 7
    ids = [i for s in again.index["shards"] for i in s["ids"]]
    assert ids == [SCENES[i].id for i in range(7)], "no key twice, none lost"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_verify__names_the_damaged_shard_and_build_mends_it(tmp_path: Path, damage: str) -> None:
    good = build_cache(teacher(), SCENES, tmp_path)
    before = [good.embedding(i).clone() for i in range(7)]
    shard = tmp_path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2 + 7] ^= 0x10
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(data[:-9])
    else:
        shard.unlink()
    with pytest.raises(EdgekdError, match=shard.name):
        open_cache(tmp_path).verify()
    mended = build_cache(teacher(), SCENES, tmp_path)
    mended.verify()
    assert mended.made == 1 and all(torch.equal(mended.embedding(i), b) for i, b in enumerate(before))


def test_build__another_teacher_or_dataset_is_never_mixed_in(tmp_path: Path) -> None:
    build_cache(teacher(0), SCENES, tmp_path)
    assert build_cache(teacher(1), SCENES, tmp_path).made == 3
    assert build_cache(teacher(1), Scenes(seed=10, count=7, size=64), tmp_path).made == 3


def test_build__a_teacher_that_gives_nan_is_refused(tmp_path: Path) -> None:
    model = teacher()
    model.encoder[0].weight.data[0] = float("nan")
    with pytest.raises(EdgekdError, match="NaN"):
        build_cache(model, SCENES, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_open__nothing_there_or_rubbish(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="no cache"):
        open_cache(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(EdgekdError, match="cannot be read"):
        open_cache(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"schema": "edgekd.cache/9"}))
    with pytest.raises(EdgekdError, match=r"edgekd\.cache/9"):
        open_cache(tmp_path)


def test_embedding__keeps_half_precision_close(tmp_path: Path) -> None:
    found = build_cache(teacher(), SCENES, tmp_path)
    stacked = torch.stack([found.embedding(i) for i in range(7)]).float().numpy()
    assert np.isfinite(stacked).all() and stacked.std() > 0.05
