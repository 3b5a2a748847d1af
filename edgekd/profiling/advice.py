"""What a profile by layers advises: rules as data, each with the share it starts to speak at, and what was measured as its evidence."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgekd.profiling.profile import Layer


@dataclass(frozen=True)
class Rule:
    """Layers whose kind matches `kinds`, or whose module ends in something that matches `modules`, that take `share` of their component or more.

    Args:
        kinds: regular expression, searched for in a layer's operator.
        modules: the same for the last part of its module's path; "" for none.
        not_kinds: operators that do not count whatever else matches.
        with_module: all layers of a module count of which one matches: the rest of a GELU in pieces.
        see: the part of docs/layers.md that explains it.
    """

    name: str
    what: str
    do: str
    share: float
    see: str
    kinds: str = ""
    modules: str = ""
    not_kinds: str = ""
    with_module: bool = False


NORM = r"LayerNorm|InstanceNorm|GroupNorm|\bMVN\b|\bRMS|LayerNormalization"
MOVES = r"Transpose|Reorder|Reshape|Permute|Squeeze|Slice|Split|Concat|Gather|Pad|Copy|Reformat|StridedSlice|CONCATENATION|Identity"
GRIDS = r"QuantizeLinear|FakeQuantize|^QUANTIZE|^DEQUANTIZE|^Convert|^Quantize"

RULES: tuple[Rule, ...] = (
    Rule("normalisation", "Normalisations that are computed at run time", "fold or replace them: a student with batch norm in their place folds it into the "
         "convolution before it and pays nothing; those of attention can only become fewer", 0.10, "normalisation", kinds=NORM, modules=r"^(layer_?)?norm\d*$|^ln\d*$"),
    Rule("gelu_in_pieces", "GELU as separate operators (division, erf, sums, products), each of which reads and writes the whole map",
         "train the student with another activation (`NAME:act=hardswish`, or relu), or keep the layers around it in float so that the runtime joins it", 0.03,
         "gelu", kinds=r"^Erf$", with_module=True),
    Rule("activation", "Activations in kernels of their own", "use relu or hardswish (`NAME:act=relu`), which runtimes compute inside the convolution before them",
         0.10, "gelu", kinds=r"Gelu|GELU|^Swish|HardSwish|HARD_SWISH|^Sigmoid|LOGISTIC|^Tanh"),
    Rule("layout", "Operators that only move values (transposes, changes of layout, reshapes, slices)", "they stand where convolutions (channels first, in blocks) "
         "and linear layers (channels last) meet: fewer such meetings, a stage that is all one kind, or the format whose layout fits", 0.10, "layout", kinds=MOVES,
         not_kinds=GRIDS),
    Rule("resize", "Resizing of maps", "resize fewer channels (project first), or learn it as a transposed convolution", 0.05, "resize",
         kinds=r"Resize|Interpolate|Upsample|RESIZE"),
    Rule("softmax", "Softmax of attention", "shorten the sequence (windows, pooled keys), or use linear attention (the efficientvit students)", 0.10, "softmax", kinds=r"Softmax|SOFTMAX"),
    Rule("to_and_fro", "Going to integers and back (QuantizeLinear, DequantizeLinear)", "fewer borders between integer and float layers: `--scheme auto` looks for the "
         "layers to leave in float; where most of it stays, fp32 may be faster", 0.10, "to-integers-and-back", kinds=GRIDS),
    Rule("casts", "Casts between float types", "this runtime computes some operators in fp32 only: use fp32, or a runtime with fp16 arithmetic", 0.05, "casts", kinds=r"^Cast$"),
    Rule("depthwise", "Depthwise convolutions, which read and write much for little arithmetic", "larger expansion at lower resolution, 3x3 in place of larger filters; "
         "integers save them memory traffic where the format has kernels for them", 0.20, "depthwise", kinds=r"depthwise|DEPTHWISE|DepthwiseConv"),
    Rule("one_cell", "Convolutions of a single cell (squeeze and excitation)", "leave squeeze-and-excitation out of early stages, or prune it: each costs a start of a "
         "kernel and a pass over the map around it", 0.03, "squeeze-and-excitation", kinds=r"one cell|GlobalAveragePool"),
)

ONE_LAYER = 0.25
DECODER = 0.40


class Advice(BaseModel):
    """One piece of advice with its evidence: `ms` and `share` of the component's layers, and the layers that cost most of it."""

    model_config = ConfigDict(extra="forbid")

    rule: str
    component: str
    what: str
    share: float
    ms: float
    do: str
    see: str
    """Where it is explained."""
    layers: list[str] = []


def advise(layers: Sequence[Layer], latency_ms: Mapping[str, float] | None = None, *, prompts: int = 1, rules: Iterable[Rule] = RULES) -> list[Advice]:
    """What stands out, the most costly first.

    Args:
        latency_ms: component -> milliseconds of a call without counting, for the share of what runs once a prompt.
    """
    found = []
    for component in dict.fromkeys(layer.component for layer in layers):
        own = [layer for layer in layers if layer.component == component]
        for rule in rules:
            hits = matching(rule, own)
            if hits and sum(h.share for h in hits) >= rule.share:
                found.append(_said(rule.name, rule.what, rule.do, rule.see, hits))
        if (most := max(own, key=lambda layer: layer.share)).share >= ONE_LAYER and len(own) > 1:
            found.append(_said("one_layer", f"One operator ({most.op})", "look at its resolution and channels first: halving either there gains most", "one-layer", [most]))
    return sorted([*found, *_decoder(latency_ms or {}, prompts)], key=lambda a: -a.ms)


def matching(rule: Rule, layers: Sequence[Layer]) -> list[Layer]:
    """The layers of one component that a rule is about."""
    hits = [one for one in layers if _is_meant(rule, one)]
    if rule.with_module and hits:
        modules = {h.name for h in hits}
        hits = [one for one in layers if one.name in modules or one in hits]
    return hits


def _is_meant(rule: Rule, layer: Layer) -> bool:
    if rule.not_kinds and re.search(rule.not_kinds, layer.op):
        return False
    leaf = layer.name.rpartition(".")[2]
    return bool((rule.kinds and re.search(rule.kinds, layer.op, re.IGNORECASE)) or (rule.modules and re.search(rule.modules, leaf)))


def _said(rule: str, what: str, do: str, see: str, hits: Sequence[Layer]) -> Advice:
    worst = sorted(hits, key=lambda h: -h.ms)[:3]
    return Advice(rule=rule, component=hits[0].component, what=what, do=do, see=f"docs/layers.md#{see}", share=sum(h.share for h in hits), ms=sum(h.ms for h in hits),
                  layers=list(dict.fromkeys(h.name for h in worst)))


def _decoder(latency_ms: Mapping[str, float], prompts: int) -> list[Advice]:
    """Where what runs once a prompt, or once for a group of them, weighs as much as the photo's part."""
    decoder, total = latency_ms.get("decoder"), sum(latency_ms.values())
    if decoder is None or len(latency_ms) < 2 or decoder < DECODER * total:
        return []
    return [Advice(rule="decoder", component="decoder", what=f"The decoder, which runs again for every prompt ({prompts} in this call)", share=decoder / total, ms=decoder,
                   do="ask several prompts in one call, whose cost is shared; keep the embedding of a photo; the encoder is not what to make smaller now",
                   see="docs/layers.md#decoder")]


def table(advice: Sequence[Advice]) -> list[dict[str, Any]]:
    """As a document."""
    return [a.model_dump(mode="json") for a in advice]
