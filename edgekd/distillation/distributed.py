"""Several processes that train one student together, on the engine of `accelerate`: who they are, on which device, what they tell each other.

    torchrun --nproc-per-node 8 -m edgekd distill ...        one process a GPU (or a few on CPUs, over gloo)
    accelerate launch --config_file fsdp2.yaml -m edgekd distill ...

`joined()` is entered once, by a verb; everything below asks `current()`. Alone, a process meets none of this: no wrapper, no message, and
accelerate is not even imported. How processes share the work is in docs/scale.md.
"""
from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgekd import console
from edgekd.errors import EdgekdError, UsageError

PATIENCE = timedelta(days=30)
"""How long the others wait for the first process to make a cache; a process that dies ends the wait at once."""
SAME_FAULT_S = 3.0
"""Within this time after the first process's error, the same error of another is not told again."""
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a launch, seen from one of them; alone unless `joined()` found more."""

    device: torch.device
    rank: int = 0
    world: int = 1
    engine: Any = None
    """The `accelerate.Accelerator`; None in a process alone."""
    waiting: Any = None
    """A process group without a timeout to speak of."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over the processes (FSDP2)."""
        return self.engine is not None and self.engine.is_fsdp2

    # --- training -------------------------------------------------------------------------------------------------------

    def wrap(self, step: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module whose backward pass adds up the gradients of all processes, and its optimizer."""
        if self.engine is None:
            return step, optimizer
        if not self.sharded:
            # a convolution's gradient may come in another layout of memory than its weight; torch says so once, and copies
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            return self.engine.prepare_model(step), optimizer
        model, prepared = self.engine.prepare(step, optimizer)
        return model, prepared.optimizer

    def unwrap(self) -> None:
        """Let go of what `wrap` made: the hooks of one stage must not see the gradients of the next."""
        if self.engine is not None:
            self.engine.free_memory()

    def collecting(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients stay in this process until the last batch of a step."""
        return nullcontext() if self.engine is None or last else self.engine.no_sync(model)

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        """Clip gradients to a norm over all processes' parts; the norm before."""
        norm = nn.utils.clip_grad_norm_(parameters, most)
        return float(gathered(norm))

    # --- talking --------------------------------------------------------------------------------------------------------

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of a tensor that each has; no gradient flows through it."""
        return values.detach() if self.engine is None else self.engine.reduce(values.detach().clone(), "mean")

    def cat(self, rows: Tensor) -> Tensor:
        """(B, ...) of every process -> (world * B, ...), in the order of the whole batch; no gradient flows through it."""
        return rows.detach() if self.engine is None else self.engine.gather(rows.detach().contiguous())

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, for every process."""
        if self.world == 1:
            return make()
        told = [make() if self.first else None]
        dist.broadcast_object_list(told, src=0, group=self.waiting)
        return told[0]  # type: ignore[return-value]

    def agree_on(self, model: nn.Module) -> None:
        """Give a model the weights that it has in the first process, where they may be random."""
        if self.world > 1:
            model.load_state_dict(self.share(model.state_dict))

    def agreed(self, mine: bool) -> bool:
        """Whether to do now what all must do together when parameters are sharded; else each process follows its own answer."""
        return self.share(lambda: mine) if self.sharded else mine

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world > 1:
            dist.barrier(group=self.waiting)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through alone, the others after it, to find what it made."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


_joined: Group | None = None


def current() -> Group:
    """The group that this process has joined, or itself alone."""
    return _joined or Group(alone())


def alone() -> torch.device:
    """The device of a process alone: the GPU where there is one. ACCELERATE_USE_CPU=1 and ACCELERATE_TORCH_DEVICE=mps say otherwise."""
    named = os.environ.get("ACCELERATE_TORCH_DEVICE")
    return torch.device(named or ("cpu" if _cpu_only() or not torch.cuda.is_available() else "cuda"))


def _cpu_only() -> bool:
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu"
    return asked or not torch.accelerator.is_available() or torch.backends.mps.is_available()


@contextmanager
def joined() -> Iterator[Group]:
    """Meet the other processes of the launch, once in the life of a process; alone this does nothing.

    Raises:
        UsageError: the launch asks for an engine that distillation does not run on.
        EdgekdError: another process ended before this one.
    """
    global _joined
    here = console.place()
    if here.world == 1:
        yield current()
        return
    _joined = _joined or _meet(here)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60))
    try:
        yield _joined
        _joined.wait()
    except EdgekdError as e:
        _tell(store, here, str(e))
        raise
    except (dist.DistError, RuntimeError) as e:
        if not isinstance(e, dist.DistError) and not any(word in str(e) for word in ("gloo", "NCCL", "Connection closed", "Connection reset")):
            _tell(store, here, str(e))
            raise
        raise EdgekdError("another process of this run ended", where=f"process {here.rank} of {here.world}",
                          hint="its own message says why; the same command continues where the run was") from e
    except BaseException as e:
        _tell(store, here, str(e))
        raise


def _meet(here: console.Place) -> Group:
    """Start the engine; the other processes do the same."""
    for flag, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(flag, "").lower() == "true":
            raise UsageError(f"distillation does not run on {name}", hint="use DDP (torchrun) or FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("FSDP in its first version is not supported", hint="set fsdp_version: 2 in the accelerate config")
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    console.log(f"{here.world} processes train together")
    # precision is the recipe's; a stage trains what it names, and not every objective reaches all of it
    engine = Accelerator(cpu=_cpu_only(), mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not engine.is_fsdp2:
        console.warn("accelerate shards over GPUs only; on CPUs every process keeps the whole student (DDP)")
    console.met()
    return Group(engine.device, engine.process_index, engine.num_processes, engine, dist.new_group(backend="gloo", timeout=PATIENCE))


def _tell(store: dist.TCPStore, here: console.Place, message: str) -> None:
    """Show this process's error unless the first process fails with the same one, which it then says."""
    key = "edgekd/failed/0"
    try:
        if here.rank == 0:
            store.set(key, message)
            return
        until = time.monotonic() + SAME_FAULT_S
        while time.monotonic() < until:
            if store.check([key]):
                if store.get(key).decode() == message:
                    return
                break
            time.sleep(0.1)
    except (dist.DistError, RuntimeError):  # the store went with the first process: what it said is all there is to say
        return
    console.speak()


# --- tensors -------------------------------------------------------------------------------------------------------------


def moved(value: T, device: torch.device) -> T:
    """A batch, mapping, tuple or tensor on a device; itself where it is there already."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {k: moved(v, device) for k, v in value.items()}  # type: ignore[return-value]
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)  # type: ignore[return-value, call-arg]
    return value


def gathered(value: T) -> T:
    """State with every sharded tensor whole, on the CPU. All processes must ask for it together."""
    if isinstance(value, Tensor):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        return whole.detach().cpu()  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {k: gathered(v) for k, v in value.items()}  # type: ignore[return-value]
    return [gathered(v) for v in value] if isinstance(value, list) else value  # type: ignore[return-value]


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is placed: on its device, and cut into its shards."""
    if not hasattr(like, "device_mesh"):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a module, sharded or not, from whole tensors."""
    own = module.state_dict()
    module.load_state_dict({k: placed(v, own[k]) if k in own else v for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The same for an optimizer; its state is numbered in the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {i: {k: placed(v, parameters[i]) if isinstance(v, Tensor) and v.shape == parameters[i].shape and v.ndim else v for k, v in slot.items()}
             for i, slot in state["state"].items()}
    optimizer.load_state_dict({**state, "state": slots})


def shared_copy(step: T, keep: Iterable[Any]) -> T:
    """A copy of a module in which the objects of `keep` are the same ones."""
    return copy.deepcopy(step, {id(one): one for one in keep})


def sync_norms(module: nn.Module) -> None:
    """Batch norms below `module` take their statistics over all processes from now on (GPUs only: torch has no such norm on a CPU)."""
    kinds = {name: type(child) for name, child in module.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)}
    nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, kind in kinds.items():
        module.get_submodule(name).plain_kind = kind  # type: ignore[assignment]


def plain_norms(module: nn.Module) -> None:
    """The opposite of `sync_norms`: what is exported are the norms that there were."""
    for name, child in module.named_children():
        if isinstance(child, nn.SyncBatchNorm):
            made = child.plain_kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)  # type: ignore[operator]
            made.weight, made.bias = child.weight, child.bias
            made.running_mean, made.running_var, made.num_batches_tracked = child.running_mean, child.running_var, child.num_batches_tracked
            setattr(module, name, made.train(child.training))
        else:
            plain_norms(child)


@contextmanager
def lent(models: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Models on a device for a while, then on the CPU again, where everything else expects them."""
    chosen = [m for m in models if isinstance(m, nn.Module)] if device.type != "cpu" else []
    for model in chosen:
        model.to(device)
    try:
        yield
    finally:
        for model in chosen:
            model.cpu()
