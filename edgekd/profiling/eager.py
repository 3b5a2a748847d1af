"""The same measurement for a model still in torch: what it costs before any export."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.measurement import Circumstances, Latency
from edgekd.probes import pictures, probe
from edgekd.profiling.latency import interleave
from edgekd.profiling.profile import ComponentProfile, Profile

if TYPE_CHECKING:
    from edgekd.protocols import Promptable


def profile_torch(model: Promptable, *, target: str = "host", warmup: int = 3, repeats: int = 30, threads: int | None = None, prompts: int = 1,
                  max_seconds: float = 8.0) -> Profile:
    """Profile a torch model in this process, eager and in fp32. Memory is not separable here, so it is None.

    Compare artifacts with an exported teacher rather than with this: eager torch is slower than any runtime.
    """
    import torch

    module: Any = model
    module.eval()
    rng, spec, before = np.random.default_rng(0), model.preprocess, torch.get_num_threads()
    image, p = torch.from_numpy(pictures(1, spec.image_size, rng)), probe("point", prompts, spec.side, rng)
    points, labels = torch.from_numpy(p.points), torch.from_numpy(p.labels)
    torch.set_num_threads(threads or before)
    try:
        with torch.no_grad():
            embedding = model.embed(image)
            found = interleave({"encoder": lambda: model.embed(image), "decoder": lambda: model.decode(embedding, points, labels),
                                "together": lambda: model.decode(model.embed(image), points, labels)},
                               warmup=warmup, repeats=repeats, max_seconds=max_seconds)
    finally:
        torch.set_num_threads(before)
    total = sum(t.numel() * t.element_size() for t in module.parameters())
    encoder = sum(t.numel() * t.element_size() for t in module.encoder.parameters())
    parts = {name: ComponentProfile(latency_ms=Latency.from_samples(found[name].values), load_ms=0.0, size_bytes=size_, executed_precision="fp32",
                                    executed_ops={}) for name, size_ in (("encoder", encoder), ("decoder", total - encoder))}
    return Profile(id=model.name, target=target, prompts=prompts, components=parts, latency_ms=Latency.from_samples(found["together"].values),
                   load_ms=0.0, peak_memory_bytes=None, size_bytes=total, executed_precision="fp32",
                   circumstances=Circumstances.capture(threads=threads or before, precision_executed="fp32", warmup=warmup, repeats=repeats))
