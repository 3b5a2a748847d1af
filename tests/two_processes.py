"""What each of two processes does in `test_distributed`: the same stages as one process, with half of the batch. Not a test itself.

    python two_processes.py FOLDER       with the environment that torchrun sets
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from edgekd.data.scenes import Scenes
from edgekd.distillation import distributed
from edgekd.distillation.batches import Batches, Source
from edgekd.distillation.cache import build_cache
from edgekd.distillation.trainer import StageTrainer
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess
from edgekd.recipe import Stage

PHOTOS, BATCH = 10, 4
"""Ten photos in batches of four: epochs end in the middle of a batch."""
ENCODER: dict[str, Any] = {"objectives": [{"name": "feature_mse"}], "trainable": ["encoder"], "steps": 6}
PROMPTS: dict[str, Any] = {"objectives": [{"name": "prompt_masks"}, {"name": "iou_head"}], "trainable": ["encoder", "decoder"], "decode_iters": 2,
                           "random_iters": True, "prompts": {"clicks": [1, 3]}, "instances": 3, "steps": 4, "ema": 0.5}
STAGES: dict[str, dict[str, Any]] = {"encoder": ENCODER, "prompts": PROMPTS, "accumulated": ENCODER | {"accumulate": 2, "steps": 3, "ema": 0.9},
                                     "everything": PROMPTS | {"objectives": [{"name": n} for n in ("prompt_masks", "iou_head", "feature_mse", "hard_masks",
                                                                                                  "truth_masks")]}}
COMPARED = ("encoder", "prompts", "accumulated")


def model(seed: int, width: int) -> Sam:
    torch.manual_seed(seed)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, width, 8, 8), torch.nn.BatchNorm2d(width), torch.nn.ReLU(), torch.nn.Conv2d(width, 32, 2, 2))
    return Sam(f"tiny{width}", encoder, DecoderShape(embed_dim=32, heads=2, mlp_dim=32), Preprocess(64))


class Watched(Batches):
    """Notes which photos are drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn: list[int] = []

    def batch(self, numbers: Any) -> Any:
        made = super().batch(numbers)
        self.drawn += made.places.tolist()
        return made


def prepare(folder: Path, rank: int = 0, world: int = 1) -> tuple[Sam, Source]:
    teacher, scenes = model(0, 24).eval().requires_grad_(False), Scenes(seed=4, count=PHOTOS, size=64)
    return teacher, Source(scenes, build_cache(teacher, scenes, folder / "cache", rank=rank, world=world))


def trainer(name: str, teacher: Sam, source: Source, folder: Path, batch: int) -> StageTrainer:
    # the recipe stays as it is written while processes come and go; the share of each is in `Batches`
    stage = Stage.model_validate({"name": name, "batch_size": BATCH, "lr": 3e-3, "warmup": 1, "precision": "fp32", "frozen_norm": True} | STAGES[name])
    student = model(1, 8)
    return StageTrainer(student, teacher, stage, Watched([source], student.preprocess, batch, 0), folder / f"{name}.state.pt")


def train(name: str, teacher: Sam, source: Source, folder: Path, batch: int) -> dict[str, Any]:
    """A stage from its start: its curve, the weights after it and the photos that this process drew."""
    one = trainer(name, teacher, source, folder, batch)
    curve = [{k: v for k, v in row.items() if k != "seconds"} for row in one.run().curve]
    weights = {k: v.clone() for k, v in one.student.state_dict().items()}
    assert not any(hasattr(v, "full_tensor") for v in weights.values()) and type(one.student) is Sam
    return {"curve": curve, "weights": weights, "drawn": one.batches.drawn[2:]}  # type: ignore[attr-defined]  # two were tried in bind


def train_some(name: str, teacher: Sam, source: Source, folder: Path, batch: int, steps: int) -> list[int]:
    """The first steps of a stage, saved as a killed run leaves them; the photos that this process drew."""
    one = trainer(name, teacher, source, folder, batch)
    one.start()
    one.resume()
    one.set_modes()
    for _ in range(steps):
        one.result.curve.append(one.train_step())
    one.save()
    one.end()
    return one.batches.drawn[2:]  # type: ignore[attr-defined]


def shard(group: distributed.Group) -> None:
    """Have accelerate shard over these CPUs: its own check lets it do so on GPUs only, and torch does it on both."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False, auto_wrap_policy="transformer_based_wrap",
                                            transformer_cls_names_to_wrap=["TwoWayBlock"])
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert group.sharded


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed.joined() as group:
        teacher, source = prepare(folder, group.rank, group.world)
        group.wait()
        told: dict[str, Any] = {name: train(name, teacher, source, folder / "two", BATCH // 2) for name in COMPARED}
        told["after one"] = train("prompts", teacher, source, folder / "one-then-two", BATCH // 2)
        told["before one"] = train_some("prompts", teacher, source, folder / "two-then-one", BATCH // 2, 2)
        shard(group)
        told["sharded"] = {name: train(name, teacher, source, folder / "sharded", BATCH // 2) for name in COMPARED}
        train_some("prompts", teacher, source, folder / "sharded-then-one", BATCH // 2, 2)
        told["one, sharded"] = train("prompts", teacher, source, folder / "one-then-sharded", BATCH // 2)
        torch.save(told, folder / f"process{group.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
