"""Several datasets as one: order, ids that stay unique, labels of each part."""
from __future__ import annotations

from pathlib import Path

from edgekd.data import Folder
from edgekd.data.joined import Joined
from edgekd.data.scenes import Scenes


def test_joined__keeps_order_and_makes_ids_unique() -> None:
    one = Scenes(seed=1, count=2, size=64)
    both = Joined([one, Scenes(seed=1, count=3, size=64)])
    ids = [s.id for s in both]
    assert len(both) == 5 and len(set(ids)) == 5 and ids[:2] == [s.id for s in one]
    assert (both[3].image == one[1].image).all()


def test_joined__has_masks_only_when_every_part_has(make_photos) -> None:
    scenes = Scenes(seed=1, count=1, size=64)
    assert Joined([scenes]).has_masks
    assert not Joined([scenes, Folder(Path(make_photos()))]).has_masks


def test_joined__says_where_the_labels_of_each_part_come_from() -> None:
    class Guessed(Scenes):
        labels = "guessed"

    found = Joined([Scenes(seed=1, count=1, size=64), Guessed(seed=2, count=1, size=64)]).labels
    assert "seed=1,count=1,size=64: ground truth" in found and "seed=2,count=1,size=64: guessed" in found


def test_joined__fingerprint_follows_the_parts() -> None:
    a, b = Scenes(seed=1, count=1), Scenes(seed=2, count=1)
    assert len({Joined(p).fingerprint() for p in ([a], [b], [a, b], [b, a])}) == 4
