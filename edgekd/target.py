"""The target: what a device is, which files it runs and how to reach it. One YAML per device in `profiles/`.

A fact about a device always names its source: a public specification, a published figure, or a measurement with its date.
"""
from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from edgekd import config, plugins
from edgekd.config import Settings
from edgekd.errors import unknown

Transport = Literal["local", "ssh", "adb", "browser", "none"]
WAYS = ("local", "ssh", "adb", "browser")
QdqStyle = Literal["u8s8", "s8s8_symmetric"]


class Device(Settings):
    """How code gets there. `none` means that there is no way yet: files are built and checked here, never timed."""

    transport: Transport
    how: str
    """What the user has to do, in a sentence."""
    url: str | None = None
    """Where it is: `ssh://user@host:port`, `adb://SERIAL`; of a profile of one's own, or told by `--device`."""
    ssh_key: Path | None = None
    known_hosts: Path | None = None
    """Host keys to trust instead of ~/.ssh/known_hosts."""
    python: str | None = None
    """The Python on the board that has its runtime; what is found there when left out."""
    folder: str | None = None
    """Where on the board files may lie while they are measured; its temporary folder when left out."""
    tools: dict[str, str] = {}
    """Programs for the device that the user supplies, by name: `benchmark_model: /path/on/this/machine`."""


class Support(Settings):
    """What the device's runtime does with one format."""

    schemes: list[str] = Field(min_length=1)
    qdq: QdqStyle | None = None
    """How int8 is written into the graph: unsigned activations for x86 kernels, symmetric signed ones for NPUs and TensorRT."""
    note: str | None = None
    auto: bool = True
    """Whether a recipe whose formats are `auto` tries it; one that is there only for who asks is not."""


class Limits(Settings):
    """What a model may take there; None is not known."""

    memory_mb: float | None = Field(default=None, gt=0)
    """Memory of the whole device, 10^6 bytes, for information; the budget of a run decides."""
    image_sizes: list[int] = []
    """Input sizes worth trying, for whoever writes a recipe; the recipe decides."""
    threads: int | None = Field(default=None, ge=1)


class Fact(Settings):
    """Something known about the device, and from where."""

    fact: str
    value: str
    source: str


class Roofline(Settings):
    """What the device could do at best, for predicting where nothing was measured (`edgekd.latency.roofline`)."""

    unit: str
    """Of what part of the device: `GPU`."""
    formats: list[str] = []
    """The formats that run there; all of the device's when empty."""
    gflops: dict[Literal["fp32", "fp16", "int8"], float] = Field(min_length=1)
    """10^9 operations a second of dense arithmetic, a multiply-add counting as two, by precision."""
    gb_per_s: float = Field(gt=0)
    """Of its memory, 10^9 bytes."""
    efficiency: float = Field(default=0.3, gt=0, le=1)
    """The share of `gflops` that networks of this size reach: a guess, unless `source` says what it comes from."""
    source: str


class Target(Settings):
    """A device profile."""

    name: str
    aliases: list[str] = []
    description: str
    device: Device
    formats: dict[str, Support]
    """Best format first."""
    limits: Limits = Limits()
    facts: list[Fact] = []
    roofline: Roofline | None = None

    @model_validator(mode="after")
    def _runs_something(self) -> Self:
        if not self.formats:
            raise ValueError("formats is empty: a target runs at least one")
        return self

    @property
    def runs(self) -> dict[str, list[str]]:
        """format -> schemes, best format first."""
        return {name: list(support.schemes) for name, support in self.formats.items()}

    @property
    def reachable(self) -> bool:
        """Whether latency can be measured from here: on this machine, in its browser, or on a board whose address is known."""
        return self.device.transport in ("local", "browser") or self.device.url is not None

    def at(self, url: str | None = None, **told: Any) -> Target:
        """The same target at an address: `ssh://user@host:port`, `adb://SERIAL`, `browser` or `local`; `told` are further fields of `Device`.

        Raises:
            UsageError: no way leads to such an address.
        """
        fields = {name: value for name, value in told.items() if value is not None}
        if url is not None:
            scheme = url.partition("://")[0]
            if scheme not in WAYS:
                raise unknown("way to a device", scheme, WAYS)
            fields |= {"transport": scheme, "url": url if "://" in url else None}
        return self.model_copy(update={"device": self.device.model_copy(update=fields)})

    def qdq(self, format: str) -> str:
        """How to write int8 for a format of this device."""
        support = self.formats.get(format)
        return (support.qdq if support else None) or "u8s8"


def shipped() -> dict[str, Any]:
    """name -> file (or mapping, from a plug-in) of every target known by name."""
    return {**{name: _as_mapping(t) for name, t in plugins.entry_points("edgekd.targets").items()}, **plugins.yaml_files("edgekd.profiles")}


def _as_mapping(target: Any) -> Any:
    return target.model_dump(mode="json") if isinstance(target, Target) else target


@cache
def aliases() -> dict[str, str]:
    """Other name -> name, from the profiles themselves."""
    found = {}
    for name, source in shipped().items():
        raw = source if isinstance(source, Mapping) else config.parse_yaml(source.read_text(encoding="utf-8"), name)
        found.update({alias: name for alias in (raw or {}).get("aliases", [])})
    return found


def names() -> list[str]:
    """Names that `resolve` knows, without aliases."""
    return sorted(shipped())


def resolve(name_or_path: str | Path) -> Target:
    """The target of a name, an alias or a YAML file.

    Raises:
        UsageError: no such target, or anything wrong in it; every problem is in the one message.
    """
    raw, where = config.load(name_or_path, "target", shipped(), aliases=aliases())
    raw.setdefault("name", Path(where).stem)
    return config.validate(Target, raw, what=f"target '{where}'")


def dump(target: Target) -> str:
    """The target as YAML, every default spelled out."""
    return config.dump(target)
