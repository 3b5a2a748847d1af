"""Optuna as a proposer: every student once, better ones with what it was told, a journal on disk, and the ledger as the truth."""
from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import EdgekdError
from edgekd.ledger import Ledger
from edgekd.search.declared import Option, Pair
from edgekd.search.study import FILE, Study
from edgekd.workspace import fingerprint

pytest.importorskip("optuna", reason="pip install 'edgekd[search]'")
SMALL = [Option("repvit_xs", (0.5, 1.0), (1.0,), (64, 128)), Option("nanosam", (0.25,), (0.5, 1.0), (64,))]
LARGE = [Option(name, tuple(0.25 + 0.125 * i for i in range(10)), (0.5, 1.0), (64, 128, 192, 256)) for name in ("repvit_xs", "repvit_m", "tinyvit_s", "nanosam")]


def tell(study: Study, pairs: list[Pair], budget: float = 3.0) -> dict[Pair, float]:
    """Wider and larger is better, and takes longer."""
    worth = {p: (float(p[0].partition("width")[2].partition("-")[0] or 1) * p[1] / 256) for p in pairs}
    study.tell({p: ([v, -v], v / budget - 1) for p, v in worth.items()})
    return worth


@pytest.mark.parametrize("kind", ["tpe", "nsga2"])
def test_propose__every_student_once_and_all_where_there_is_room(kind: Any) -> None:
    study = Study(SMALL, sampler=kind)
    assert study.count == 6
    first, second = study.propose(4), []
    tell(study, first)
    second = study.propose(10)
    assert len(first) == 4 and sorted(first + second) == sorted(p for o in SMALL for p in o)
    tell(study, second)
    assert study.propose(5) == []


def test_propose__the_same_student_in_two_ways_is_one() -> None:
    study = Study([Option("repvit_xs", sizes=(64, 128)), Option("repvit_xs", (0.5, 1.0), sizes=(64,))])
    assert study.count == 3 and len(study.propose(9)) == 3


@pytest.mark.parametrize("kind", ["tpe", "nsga2"])
def test_propose__is_the_same_for_the_same_seed(kind: Any) -> None:
    def drawn(seed: int) -> list[Pair]:
        study, found = Study(LARGE, sampler=kind, seed=seed), list[Pair]()
        for _ in range(2):
            found += (wave := study.propose(12))
            tell(study, wave)
        return found

    assert drawn(1) == drawn(1) != drawn(2) and len(set(drawn(1))) == 24


def test_propose__learns_who_is_good_and_what_keeps_to_the_budget() -> None:
    """One architecture is twice as good as the others for its time, and half of the space is beyond the budget."""
    def good(pair: Pair) -> bool:
        return pair[0].startswith("tinyvit_s") and took(pair) <= 0.6

    def took(pair: Pair) -> float:
        return float(pair[0].partition("width")[2].partition("-")[0] or 1) * pair[1] / 256

    ours = 0
    for seed in range(3):
        study, found = Study(LARGE, seed=seed), list[Pair]()
        for _ in range(3):
            found += (wave := study.propose(10))
            study.tell({p: ([took(p) ** 0.3 * (2 if p[0].startswith("tinyvit_s") else 1), -took(p)], took(p) / 0.6 - 1) for p in wave})
        ours += sum(map(good, found[10:]))
    everyone = [p for o in LARGE for p in o]
    assert ours > 1.5 * 60 * sum(map(good, everyone)) / len(everyone), "of 60 students drawn by chance"


def test_study__has_objectives_constraint_and_names(tmp_path: Path) -> None:
    import optuna

    study = Study(SMALL, costs=1, folder=tmp_path)
    tell(study, study.propose(6), budget=0.3)
    backend = optuna.storages.journal
    on_disk = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend.JournalFileBackend(str(tmp_path / FILE))))
    trials = on_disk.get_trials()
    assert len(trials) == 6 and all(t.state == optuna.trial.TrialState.COMPLETE and len(t.values) == 2 for t in trials)
    assert {t.user_attrs["student"] for t in trials} == {f"{n}-{s}" for n, s in (p for o in SMALL for p in o)}
    assert {c > 0 for t in trials for c in t.constraints.values()} == {True, False}


def test_study__goes_on_from_the_ledger_whatever_became_of_the_journal(tmp_path: Path) -> None:
    def run(folder: Path, waves: int) -> list[Pair]:
        ledger = Ledger(folder / "ledger.jsonl")
        study, found = Study(LARGE, seed=3, folder=folder, remember=lambda id, key, work: ledger.once("propose", id, fingerprint(key), work)), list[Pair]()
        for _ in range(waves):
            found += (wave := study.propose(8))
            tell(study, wave)
        return found

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "cut", 2)
    journal = tmp_path / "cut" / FILE
    journal.write_bytes(journal.read_bytes()[:-30])  # killed while it was written
    (tmp_path / "cut" / f"{FILE}.lock").touch()
    assert run(tmp_path / "cut", 3) == whole
    assert (tmp_path / "cut" / "ledger.jsonl").read_text().count('"what": "propose"') == 3, "what was proposed before was not drawn again"


def test_study__without_optuna_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EdgekdError, match="Optuna") as error:
        Study(SMALL)
    assert error.value.hint is not None and "pip install 'edgekd[search]'" in error.value.hint
