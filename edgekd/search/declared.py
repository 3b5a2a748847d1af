"""The students of a declared space: who, how wide, how deep, at which input sizes. Whoever is drawn from it is a (name, size) that can be built.

A student's widths are usually those of the whole space; `Option` keeps them in ascending order, so that a sampler may reason in places.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgekd.errors import UsageError, unknown
from edgekd.search_section import SpaceSection

Pair = tuple[str, int]
"""A student's canonical name and its input size in pixels."""
MOST = 20_000


@dataclass(frozen=True)
class Option:
    """A student and what may be changed in it."""

    name: str
    widths: tuple[float, ...] = (1.0,)
    depths: tuple[float, ...] = (1.0,)
    sizes: tuple[int, ...] = (256,)

    @property
    def count(self) -> int:
        """Students that come of it."""
        return len(self.widths) * len(self.depths) * len(self.sizes)

    def pair(self, width: int, depth: int, size: int) -> Pair:
        """The student at these places of the three lists."""
        settings = [f"{key}={value:g}" for key, value in (("width", self.widths[width]), ("depth", self.depths[depth])) if value != 1.0]
        return canonical(f"{self.name}:{','.join(settings)}" if settings else self.name), self.sizes[size]

    def __iter__(self) -> Iterator[Pair]:
        return (self.pair(w, d, s) for w in range(len(self.widths)) for d in range(len(self.depths)) for s in range(len(self.sizes)))


def canonical(name: str) -> str:
    """The spelling that ids use. Raises UsageError for a student that does not exist, with the nearest."""
    from edgekd import students

    return str(students.parse(name))


def options(section: SpaceSection | None, listed: Mapping[str, Sequence[int]]) -> list[Option]:
    """What there is to choose from: the recipe's students as they are listed, then the space's, in the order of the recipe.

    Args:
        section: the recipe's space.
        listed: canonical name -> input sizes of the recipe's students.

    Raises:
        UsageError: an unknown family or student, with the nearest; a space beyond MOST students.
    """
    found = [Option(name, sizes=tuple(sorted(set(sizes)))) for name, sizes in listed.items()]
    if section is not None:
        own = {canonical(s.name): s for s in section.students}
        for name in dict.fromkeys([*_of_families(section.families), *own]):
            one = own.get(name)
            widths, depths, sizes = ((one.width, one.depth, one.image_sizes) if one else (None, None, None))
            found.append(Option(name, tuple(widths or section.width), tuple(depths or section.depth), tuple(sorted(set(sizes or section.image_sizes)))))
    if (count := sum(o.count for o in found)) > MOST:
        raise UsageError(f"the space has {count} students, more than {MOST}", where="search.space", hint="take larger steps, or fewer students")
    return found


def _of_families(wanted: Sequence[str]) -> list[str]:
    from edgekd import students

    families = students.families()
    for name in wanted:
        if name not in families:
            raise unknown("architecture", name, families)
    return [student for name in wanted for student in families[name].configs]


def everyone(found: Sequence[Option]) -> dict[str, list[int]]:
    """Name -> sizes of every student that the options give, each once, in order."""
    sizes: dict[str, list[int]] = {}
    for option in found:
        for name, size in option:
            if size not in sizes.setdefault(name, []):
                sizes[name].append(size)
    return sizes
