"""What preparations share: a teacher with other outputs that is still of its class, averages over moved views, and trained weights on disk."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgekd.data.images import preprocess
from edgekd.distillation.taps import Seen, outputs
from edgekd.errors import UsageError
from edgekd.protocols import Dataset
from edgekd.workspace import atomic_path

Ask = Callable[[Tensor], Seen]


class Mark(nn.Module):
    """Numbers in a model's state that tell it from the model it was made of: every hash of its weights changes with them."""

    numbers: Tensor

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.tensor(list(numbers), dtype=torch.float32))


def with_outputs(teacher: Any, change: Callable[[Ask, Tensor], Seen], mark: str, numbers: Sequence[float]) -> Any:
    """The teacher with `outputs` and `embed` replaced by change(what it gave before, images), and a `Mark` of the options in its state.

    It shares the teacher's parts and is of its class, so whoever asks for a kind of model, a part, a tap or the decoder finds it. Taps read
    the last of the calls that `change` makes."""
    base = type(teacher)

    def changed(self: Any, images: Tensor) -> Seen:
        plain = copy.copy(self)  # the same parts and hooks under the class that it had before
        plain.__class__ = base
        return change(lambda x: outputs(plain, x), images)

    made = copy.copy(teacher)
    made.__class__ = type(f"Prepared{base.__name__}", (base,), {"outputs": changed, "embed": lambda self, images: changed(self, images)["embedding"]})
    made._modules = {**teacher._modules, f"prepared_{mark}": Mark(numbers)}
    return made.eval()


@dataclass(frozen=True)
class View:
    """A photo mirrored, then moved by whole cells of the embedding: `down` and `right` may be negative; what is new is empty."""

    flip: bool = False
    upside_down: bool = False
    down: int = 0
    right: int = 0

    @property
    def axes(self) -> list[int]:
        """The mirrored axes."""
        return [axis for axis, wanted in ((-1, self.flip), (-2, self.upside_down)) if wanted]

    def there(self, images: Tensor, stride: int) -> Tensor:
        """images (B, 3, S, S) as this view shows them."""
        x, y = self.right * stride, self.down * stride
        return F.pad(images.flip(self.axes), (x, -x, y, -y))

    def back(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """maps (B, E, s, s) of the view -> where they belong in the photo, and (1, 1, s, s), 1 where the view showed the photo."""
        x, y = self.right, self.down
        shown = torch.ones_like(maps[:1, :1])
        return (F.pad(m, (-x, x, -y, y)).flip(self.axes) for m in (maps, shown))  # type: ignore[return-value]


def stride_of(teacher: Any) -> int:
    """Pixels of a cell of the teacher's embedding.

    Raises:
        UsageError: its cells are not whole pixels wide.
    """
    size = teacher.preprocess.image_size
    with torch.no_grad():
        side = outputs(teacher, torch.zeros(1, 3, size, size))["embedding"].shape[-1]
    if size % side:
        raise UsageError(f"the teacher '{teacher.name}' gives {side} cells for {size} pixels, so its views cannot be moved by whole cells")
    return size // side


def averaged(ask: Ask, images: Tensor, views: Sequence[View], stride: int, width: int | None, everything: bool) -> Seen:
    """What `ask` gives for `images` with the embedding averaged over the photo and its views, and with `everything` the other outputs too.

    The photo itself is asked last, so that taps inside the model are those of the photo. Of an embedding wider than `width` the further
    channels, which only the teacher's own decoder reads, are the photo's."""
    seen = [(view, ask(view.there(images, stride))) for view in views]
    plain = ask(images)
    found = dict(plain)
    for name in plain if everything else ["embedding"]:
        if name == "embedding":
            total, count = plain[name][:, :width].float().clone(), torch.ones_like(plain[name][:1, :1], dtype=torch.float32)
            for view, given in seen:
                moved, shown = view.back(given[name][:, :width].float())
                total, count = total + moved, count + shown
            rest = plain[name][:, width:] if width is not None else plain[name][:, :0]
            found[name] = torch.cat([(total / count).to(plain[name].dtype), rest], 1)
        else:
            found[name] = torch.stack([plain[name], *(given[name] for _, given in seen)]).float().mean(0).to(plain[name].dtype)
    return found


def photos_of(data: Dataset, teacher: Any, most: int, batch: int) -> Iterator[Tensor]:
    """Batches of the first `most` photos as the teacher sees them."""
    for start in range(0, min(most, len(data)), batch):
        yield torch.stack([torch.from_numpy(preprocess(data[i].image, teacher.preprocess)[0]) for i in range(start, min(start + batch, most, len(data)))])


def kept(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file; made and written, whole or not at all, when there is none that can be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
    with atomic_path(path) as temp:
        save_file(found, temp)
    return found
