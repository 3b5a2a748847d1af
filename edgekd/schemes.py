"""Precisions, and the grammar they are written in. What `--scheme` and a recipe's `quantization.schemes` take is

    NAME [ "[" OPTION, ... "]" ] [ "+ {" KEY: VALUE, ... "}" ]

    w8a8_static
    w8a8_static[percentile, equalized]
    w8a8_static + {decoder: fp32, "features.0.*": fp32, rest: bf16}

NAME says the bits of weights and activations, and when the ranges of activations are found:

    fp32 | fp16 | bf16          weights and activations in that float type
    w<bits>_weight_only         integer weights, arithmetic in float
    w<bits>a<bits>_static       integer weights and activations; activation ranges fixed beforehand from calibration images
    w<bits>a<bits>_qat          the same with ranges and weights that were trained for it (`edgekd distill CHECKPOINT --recipe smoke_qat`)
    fp<bits>_static             floats of few bits with scales fixed beforehand
    w<bits>_dynamic             integer weights; activations quantized at run time from what they are

OPTIONs say how; without one, edgekd and the target's kernels decide:

    per_channel | per_tensor    a step for every output channel of a weight (the default), or one for all of it
    symmetric | asymmetric      whether 0 is the middle of the activations' levels
    minmax | percentile | entropy | mse      how ranges follow from what calibration saw: the extremes (the default), the middle 99.99 %, the cut that
                                changes the distribution least, the cut with the least squared error
    equalized                   cross-layer equalisation, or the library's own of that kind
    corrected | uncorrected     bias correction
    naive                       the quantizing library's own defaults, and nothing of what edgekd keeps in float; for comparison
    modelopt                    quantized by NVIDIA's Model Optimizer in place of onnxruntime (TensorRT; `edgekd doctor --install modelopt`)

KEYs make exceptions. The name of a component (`encoder`, `decoder`) gives it a scheme of its own. `rest` is the float type of everything that is not
integer. Anything else is a pattern of layers (`fnmatch`: `features.3.*`, `encoder.features.3.*`), which stay in the float type that is its VALUE; one
that matches nothing is refused. `auto` is no scheme but a search for one (`edgekd quantize --scheme auto`).

A scheme says what is asked for. What a runtime really executed is read back from it and recorded beside the scheme.
"""
from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import yaml

from edgekd import plugins
from edgekd.errors import UsageError, closest, unknown
from edgekd.protocols import Exporter, facts
from edgekd.tuning import FloatType, Method, Tuning

FLOATS: tuple[FloatType, ...] = get_args(FloatType)
REST = "rest"


@dataclass(frozen=True)
class Scheme:
    """One named precision: bits of weights and activations, when activation ranges are found, and what that needs."""

    name: str
    weight_bits: int
    activation_bits: int
    ranges: Literal["float", "static", "dynamic", "trained"]
    summary: str
    needs: tuple[str, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether no integer arithmetic is asked for."""
        return self.ranges == "float" and self.weight_bits >= 16

    @property
    def needs_calibration(self) -> bool:
        """Whether sample inputs must be shown before export."""
        return "calibration" in self.needs

    @property
    def looks_at_inputs(self) -> bool:
        """Whether export looks at sample inputs where there are any: static ranges, and what overflows fp16."""
        return self.needs_calibration or self.name == "fp16"

    @property
    def runs_as(self) -> str:
        """The scheme that a target must run for this one: trained ranges are static ones to a runtime."""
        return "w8a8_static" if self.ranges == "trained" else self.name

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats whose exporter offers this scheme."""
        return tuple(plugins.schemes().get(self.name, ()))


SCHEMES = {s.name: s for s in (
    Scheme("fp32", 32, 32, "float", "the reference: weights as trained"),
    Scheme("fp16", 16, 16, "float", "half the size; layers that leave fp16's range on real inputs are found, kept in fp32 and named"),
    Scheme("bf16", 16, 16, "float", "half the traffic, fp32's range; fast where the CPU has bf16 units (AMX, AVX512-BF16)"),
    Scheme("w8a8_static", 8, 8, "static", "integer arithmetic throughout; a quarter of the size", needs=("calibration",)),
    Scheme("w8a16_static", 8, 16, "static", "16-bit activations: near fp32, for NPUs that have them", needs=("calibration",)),
    Scheme("w8a8_qat", 8, 8, "trained", "as w8a8_static, with weights and ranges that were trained for it", needs=("training",)),
    Scheme("w4a8_qat", 4, 8, "trained", "15 levels a weight, trained for it; stored in 8 bits where the runtime has no 4-bit kernels", needs=("training",)),
    Scheme("fp8_static", 8, 8, "static", "8-bit floats (E4M3) with scales fixed beforehand: GPUs from Ada and Hopper on", needs=("calibration",)),
    Scheme("w8_weight_only", 8, 32, "float", "8-bit weights, arithmetic in float: a quarter of the size, no faster arithmetic"),
    Scheme("w6_weight_only", 6, 32, "float", "6-bit weights from a palette, arithmetic in float"),
    Scheme("w4_weight_only", 4, 32, "float", "4-bit weights from a palette, arithmetic in float: an eighth of the size"),
    Scheme("w8_dynamic", 8, 32, "dynamic", "8-bit weights of linear layers, activations quantized on the fly; no effect on convolutions"),
)}

OPTIONS: dict[str, dict[str, Any]] = {
    "per_channel": {"granularity": "channel"}, "per_tensor": {"granularity": "tensor"}, "symmetric": {"symmetric": True}, "asymmetric": {"symmetric": False},
    **{method: {"method": method} for method in get_args(Method)}, "equalized": {"equalized": True}, "corrected": {"corrected": True},
    "uncorrected": {"corrected": False}, "naive": {"naive": True}, "modelopt": {"quantizer": "modelopt"},
}
"""option -> what it sets in a `Tuning`"""


def names() -> list[str]:
    """Every scheme, the reference first."""
    return list(SCHEMES)


def get(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
        UsageError: there is none; the nearest name is offered.
    """
    if name not in SCHEMES:
        raise unknown("scheme", name, SCHEMES)
    return SCHEMES[name]


@dataclass(frozen=True)
class Part:
    """The precision of one component."""

    scheme: str
    tuning: Tuning


@dataclass(frozen=True)
class Precision:
    """A parsed text of the grammar: a scheme, how it is done, and exceptions by key."""

    scheme: Scheme
    options: tuple[str, ...] = ()
    exceptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The canonical spelling."""
        options = f"[{', '.join(self.options)}]" if self.options else ""
        return f"{self.scheme.name}{options}" + (f" + {{{', '.join(f'{_quoted(k)}: {v}' for k, v in self.exceptions.items())}}}" if self.exceptions else "")

    @property
    def slug(self) -> str:
        """The same in file names: of exceptions a digest only."""
        options = "".join(f"_{o}" for o in self.options)
        return f"{self.scheme.name}{options}" + (f"_mixed{hashlib.sha256(self.text.encode()).hexdigest()[:8]}" if self.exceptions else "")

    @property
    def tuning(self) -> Tuning:
        """What holds for every component, before layers are looked at."""
        settings = {k: v for option in self.options for k, v in OPTIONS[option].items()}
        rest: Any = self.exceptions.get(REST, "fp32")
        return Tuning(weight_bits=min(8, self.scheme.weight_bits), rest=rest, **settings)

    @property
    def looks_at_inputs(self) -> bool:
        """Whether any component is shown inputs before it is exported."""
        return any(s.looks_at_inputs for s in self.schemes)

    @property
    def needs_calibration(self) -> bool:
        """Whether any component must be."""
        return any(s.needs_calibration for s in self.schemes)

    @property
    def schemes(self) -> list[Scheme]:
        """Every scheme that is named, floats of layers and of the rest included."""
        return [self.scheme, *(SCHEMES[v] for v in self.exceptions.values())]

    def keeping(self, layers: Iterable[str], precision: FloatType = "fp32") -> Precision:
        """The same with these layers in float too."""
        return replace(self, exceptions={**self.exceptions, **dict.fromkeys(layers, precision)})

    def parts(self, layers: Mapping[str, Sequence[str]]) -> dict[str, Part]:
        """The precision of each component.

        Args:
            layers: component -> names of its layers.

        Raises:
            UsageError: a key is neither a component nor matches a layer.
        """
        own = {key: value for key, value in self.exceptions.items() if key in layers}
        patterns = {key: value for key, value in self.exceptions.items() if key not in layers and key != REST}
        keep: dict[str, dict[str, Any]] = {name: {} for name in layers}
        for pattern, value in patterns.items():
            found = [(name, layer) for name, known in layers.items() for layer in known
                     if fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(f"{name}.{layer}", pattern)]
            if not found:
                every = [*layers, *(layer for known in layers.values() for layer in known)]
                near = closest(pattern, every)
                raise UsageError(f"'{pattern}' of scheme '{self.text}' is no component and matches no layer",
                                 hint=(f"did you mean '{near}'? " if near else "") + f"components: {', '.join(layers)}; edgekd quantize --sensitivity lists the layers")
            if value not in FLOATS:
                raise UsageError(f"layers of scheme '{self.text}' can be kept in {', '.join(FLOATS)}, not in {value}", where=pattern,
                                 hint="a whole component can have a scheme of its own: {decoder: w8_dynamic}")
            for name, layer in found:
                keep[name][layer] = value
        return {name: Part(own.get(name, self.scheme.name), self._tuned(own.get(name), keep[name])) for name in layers}

    def _tuned(self, own: str | None, keep: Mapping[str, Any]) -> Tuning:
        if own is not None:
            return Tuning(weight_bits=min(8, SCHEMES[own].weight_bits))
        return replace(self.tuning, keep=keep)


def refuse(exporter: Exporter, precision: Precision) -> None:
    """Refuse what a format's exporter does not write, naming what it does; before any work.

    Raises:
        UsageError: a scheme, or a way to do it, that the exporter does not offer.
    """
    for name in (precision.scheme.name, *(v for v in precision.exceptions.values() if v not in FLOATS)):
        if name not in exporter.schemes:
            raise unknown(f"{exporter.format} scheme", name, exporter.schemes)
    _refuse_tuning(exporter, precision.tuning)


def refuse_parts(exporter: Exporter, parts: Mapping[str, Part]) -> None:
    """The same for the exceptions of one model. Raises UsageError."""
    for name, part in parts.items():
        if part.scheme not in exporter.schemes:
            raise UsageError(f"the format '{exporter.format}' does not write {part.scheme}", where=name, hint=f"it writes {', '.join(exporter.schemes)}")
        _refuse_tuning(exporter, part.tuning)


def _refuse_tuning(exporter: Exporter, tuning: Tuning) -> None:
    known = facts(exporter).tunes
    for name, value in tuning.changed().items():
        wanted = set(value.values()) if isinstance(value, Mapping) and name == "keep" else {value}
        if name != "weight_bits" and not wanted <= known.get(name, frozenset()):
            offered = [option for option, sets in OPTIONS.items() for k, v in sets.items() if v in known.get(k, ())]
            offered += [f"{REST}: {v}" for v in sorted(known.get(REST, ()))] + [f"layers in {v}" for v in sorted(known.get("keep", ()))]
            asked = ", ".join(sorted(map(str, wanted))) if name in ("keep", REST) else next(o for o, sets in OPTIONS.items() if sets == {name: value})
            what = {"keep": f"layers in {asked}", REST: f"{REST}: {asked}"}.get(name, f"'{asked}'")
            raise UsageError(f"the format '{exporter.format}' does not take {what}", hint=f"it takes {', '.join(offered)}" if offered else "it takes plain schemes only")


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z_][\w.]*", key) else f'"{key}"'


_TEXT = re.compile(r"\s*(?P<name>[\w.\-]+)\s*(\[(?P<options>[^\]]*)\])?\s*(\+\s*(?P<exceptions>\{.*\}))?\s*", re.DOTALL)


def parse(text: str) -> Precision:
    """The precision that a text of the grammar says.

    Raises:
        UsageError: it is not one: an unknown name, option or float type (with the nearest), or a form that is not the grammar's.
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        raise UsageError(f"'{text}' is not a scheme", hint='for instance w8a8_static, or w8a8_static[percentile] + {decoder: fp32, "features.0.*": fp32}')
    options = [o.strip() for o in (found["options"] or "").split(",") if o.strip()]
    for option in options:
        if option not in OPTIONS:
            raise unknown("scheme option", option, OPTIONS)
    settings = [key for option in dict.fromkeys(options) for key in OPTIONS[option]]
    if len(set(settings)) < len(settings) or ("naive" in options and len(set(options)) > 1):
        raise UsageError(f"the options of '{text}' contradict each other", hint="take one of minmax, percentile, entropy and mse; naive stands alone")
    precision = Precision(get(found["name"]), tuple(o for o in OPTIONS if o in options), _exceptions(text, found["exceptions"]))
    if precision.scheme.is_float and (options or set(precision.exceptions) & {REST}):
        raise UsageError(f"'{precision.scheme.name}' is a float type, which takes no options and has no rest", where=text,
                         hint=f"edgekd list schemes; for instance w8a8_static[{options[0] if options else 'percentile'}]")
    return precision


def _exceptions(text: str, given: str | None) -> dict[str, str]:
    """The keys and values in braces."""
    try:
        found = yaml.safe_load(given) if given else {}
    except yaml.YAMLError as e:
        raise UsageError(f"the exceptions of '{text}' are not a mapping", hint='for instance {decoder: fp32, "features.0.*": bf16}') from e
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise UsageError(f"the exceptions of '{text}' are not a mapping of names to schemes", hint='for instance {decoder: fp32, "features.0.*": bf16}')
    exceptions = {str(k): get(v).name for k, v in found.items()}
    if exceptions.get(REST, "fp32") not in FLOATS:
        raise UsageError(f"'{REST}' is a float type: {', '.join(FLOATS)}, not {exceptions[REST]}", where=text)
    return exceptions
