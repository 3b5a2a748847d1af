"""Students proposed by Optuna: several objectives, the budget as a constraint, a journal file that its own tools can read.

A trial is a student: a name, a width, a depth, an input size. Its formats and schemes are no parameters of the study, since they share the training
and are all looked at: the student's latency is that of its fastest candidate. What a trial is worth is told when the cheap rungs have spoken.

Every proposal goes through `remember` (the run's ledger). The study is made anew from there when a run goes on, so that a journal that was cut
short by `kill -9`, or written by another version of Optuna, does no harm.
"""
from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekd.errors import EdgekdError
from edgekd.search.declared import Option, Pair

if TYPE_CHECKING:
    import optuna

Remember = Callable[[str, Any, Callable[[], dict[str, Any]]], dict[str, Any]]
"""(id, what it depends on, the work) -> its result, done now or earlier."""
FILE = "study.journal"
OVER = "over the budget by"


def library() -> Any:
    """Optuna. Raises EdgekdError with the command that installs it."""
    try:
        import optuna
    except ImportError as e:
        raise EdgekdError("exploring a space needs Optuna, which is not installed", hint="pip install 'edgekd[search]', or search.strategy: listed") from e
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _at_once(id: str, key: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return work()


class Study:
    """Proposes students of a declared space (`explore.Sampler`).

    Args:
        options: the space.
        costs: objectives beside the accuracy, one or two.
        folder: where the journal is written; None keeps it in memory.
        remember: what a proposal goes through.
    """

    def __init__(self, options: Sequence[Option], *, sampler: Literal["tpe", "nsga2"] = "tpe", seed: int = 0, costs: int = 1, folder: Path | None = None,
                 remember: Remember = _at_once) -> None:
        self.optuna = library()
        names = [o.name for o in options]
        self.options = {name if names.index(name) == i else f"{name} (listed)": o for i, (name, o) in reversed(list(enumerate(zip(names, options, strict=True))))}
        self.kind, self.seed, self.remember, self.waves = sampler, seed, remember, 0
        self.params = {pair: params for name, option in self.options.items() for params, pair in self._placed(name, option)}
        self.count = len(self.params)
        self.pending: dict[Pair, Any] = {}
        self.proposed: set[Pair] = set()
        with _quiet():
            self.study: optuna.Study = self.optuna.create_study(storage=self._storage(folder), study_name="search", directions=["maximize"] * (1 + costs),
                                                                sampler=self._sampler())

    def _storage(self, folder: Path | None) -> Any:
        if folder is None:
            return None
        backend, path = self.optuna.storages.journal, Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in (path, Path(f"{path}.lock")):  # of a run that was killed: one process at a time is in this folder (`workspace.run_lock`)
            stale.unlink(missing_ok=True)
        return self.optuna.storages.JournalStorage(backend.JournalFileBackend(str(path), lock_obj=backend.JournalFileOpenLock(str(path))))

    def _sampler(self) -> Any:
        samplers, seed = self.optuna.samplers, self.seed * 1000 + self.waves
        if self.kind == "nsga2":
            return samplers.NSGAIISampler(population_size=8, seed=seed, constraints_func=constraints)
        return samplers.TPESampler(n_startup_trials=8, multivariate=True, group=True, seed=seed, constraints_func=constraints, warn_independent_sampling=False)

    # --- parameters

    @staticmethod
    def _varied(option: Option) -> dict[str, int]:
        """Parameter -> number of places. Students that have the same list share its parameter, so that the sampler learns for all of them at once."""
        lists = {"width": option.widths, "depth": option.depths, "size": option.sizes}
        return {f"{what}: {', '.join(f'{v:g}' for v in values)}": len(values) for what, values in lists.items() if len(values) > 1}

    def _placed(self, name: str, option: Option) -> Iterator[tuple[dict[str, Any], Pair]]:
        """Every student of an option, with the parameters that give it."""
        head = {"student": name} if len(self.options) > 1 else {}
        varied = self._varied(option)
        for places, pair in zip(itertools.product(*map(range, varied.values())), option, strict=True):
            yield {**head, **dict(zip(varied, places, strict=True))}, pair

    def drawn(self, trial: Any) -> Pair:
        """The student of a trial that is being asked for."""
        name = trial.suggest_categorical("student", sorted(self.options)) if len(self.options) > 1 else next(iter(self.options))
        option = self.options[name]
        places = {parameter.partition(":")[0]: trial.suggest_int(parameter, 0, count - 1) for parameter, count in self._varied(option).items()}
        return option.pair(places.get("width", 0), places.get("depth", 0), places.get("size", 0))

    # --- proposing

    def propose(self, n: int) -> list[Pair]:
        """At most n students that were not proposed before; all that are left, where they are no more than that."""
        left = [p for p in self.params if p not in self.proposed]
        done = [[t.params, t.values] for t in self.study.get_trials(deepcopy=False)]
        found = self.remember(f"wave {self.waves}", [self.kind, self.seed, self.waves, n, [list(p) for p in self.params], done],
                              lambda: {"students": [list(p) for p in (left if len(left) <= n else self._sampled(n, left))]})
        for name, size in found["students"]:
            pair = (str(name), int(size))
            self.study.enqueue_trial(self.params[pair], user_attrs={"student": f"{name}-{size}"})
            self.pending[pair] = trial = self.study.ask()
            self.drawn(trial)
            self.proposed.add(pair)
        self.waves += 1
        return list(self.pending)

    def _sampled(self, n: int, left: Sequence[Pair]) -> list[Pair]:
        """Asked of the sampler, in a copy of the study, so that the study holds what was remembered and nothing else; filled up at random."""
        taken, found = set(self.proposed), list[Pair]()
        with _quiet():
            draft = self.optuna.create_study(directions=self.study.directions, sampler=self._sampler())
            draft.add_trials(self.study.get_trials(states=(self.optuna.trial.TrialState.COMPLETE,)))
            for _ in range(4 * n):
                if len(found) < n and (pair := self.drawn(draft.ask())) not in taken:
                    taken.add(pair)
                    found.append(pair)
        others = [p for p in left if p not in taken]
        order = np.random.default_rng([self.seed, self.waves]).permutation(len(others))
        return [*found, *(others[i] for i in order[: n - len(found)])]

    def tell(self, values: Mapping[Pair, tuple[list[float], float]]) -> None:
        """What the students proposed last are worth; those told before keep what was said then."""
        for pair, trial in self.pending.items():
            found, over = values[pair]
            trial.set_user_attr(OVER, over)
            self.study.tell(trial, found)
        self.pending = {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's notes that parts of it are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def constraints(trial: Any) -> Sequence[float]:
    """Above 0 where the budget is missed."""
    return (float(trial.user_attrs.get(OVER, 0.0)),)
