from __future__ import annotations

import random

import pytest

from edgekd.profiling.board import loop


class FakeClock:
    """Time that passes only when a call says so."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float):
        """A call that takes the given times in turn, the last one from then on."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
        return run


def noisy(level: float, count: int, seed: int = 0, spread: float = 0.03) -> list[float]:
    rng = random.Random(seed)
    return [level * (1 + rng.gauss(0, spread)) for _ in range(count)]


def test_warm_up__ends_when_the_spread_is_small():
    clock = FakeClock()
    found = loop.warm_up(clock.call("a", 1.0, 0.5, 0.2, 0.1, 0.1, 0.01), clock=clock)
    assert found.steady and found.warmup == 5 + loop.WINDOW and found.values == []


def test_warm_up__never_steady_ends_after_its_most_runs():
    clock = FakeClock()
    found = loop.warm_up(clock.call("a", *[0.01, 0.05] * 50), most=20, clock=clock)
    assert found.warmup == 20 and not found.steady


def test_warm_up__ends_after_its_seconds_but_not_below_its_least():
    clock = FakeClock()
    found = loop.warm_up(clock.call("a", 100.0), least=3, max_seconds=1.0, clock=clock)
    assert found.warmup == 3 and not found.steady


def test_count__takes_exactly_as_many_samples():
    clock = FakeClock()
    found = loop.interleave({"a": clock.call("a", 0.002), "b": clock.call("b", 0.001)}, repeats=31, clock=clock)
    assert [len(s.values) for s in found.values()] == [31, 31] and found["a"].values == pytest.approx([2.0] * 31)


def test_count__a_slow_call_stops_early_with_enough_samples():
    clock = FakeClock()
    found = loop.interleave({"slow": clock.call("s", 5.0), "fast": clock.call("f", 0.001)}, repeats=30, max_seconds=8.0, clock=clock)
    assert (len(found["slow"].values), len(found["fast"].values)) == (loop.MIN_SAMPLES, 30)


def test_time__goes_on_until_the_seconds_are_used():
    clock = FakeClock()
    found = loop.interleave({"a": clock.call("a", 0.1), "b": clock.call("b", 0.5)}, repeats=3, max_seconds=20.0, mode="time", clock=clock)
    assert 200 <= len(found["a"].values) <= 200 + loop.BURST and 40 <= len(found["b"].values) <= 40 + loop.BURST
    assert loop.measure(clock.call("c", 9.0), max_seconds=1.0, mode="time", clock=clock).values == pytest.approx([9000.0] * loop.MIN_SAMPLES)


def test_time__is_bounded_for_what_takes_no_time():
    clock = FakeClock()
    assert len(loop.measure(clock.call("a", 0.0), mode="time", max_seconds=1.0, clock=clock).values) == loop.MOST_SAMPLES


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="count, time"):
        loop.interleave({}, mode="forever")


def test_turns__alternate_so_that_drift_hits_all_alike():
    clock = FakeClock()
    found = loop.interleave({name: clock.call(name, 0.001) for name in "AB"}, repeats=2 * loop.BURST, clock=clock)
    turn = loop.BURST + 1
    assert "".join(clock.log[-4 * turn:]) == "A" * turn + "B" * turn + "B" * turn + "A" * turn
    assert {len(s.values) for s in found.values()} == {2 * loop.BURST}


def test_turns__their_first_run_is_not_timed():
    clock = FakeClock()
    cold = iter([0.001] * loop.WINDOW + ([9.0] + [0.001] * loop.BURST) * 5)

    def run() -> None:
        clock.now += next(cold)

    assert loop.measure(run, repeats=5 * loop.BURST, clock=clock).values == pytest.approx([1.0] * 5 * loop.BURST)


def test_outliers__are_counted_and_kept():
    clock = FakeClock()
    times = noisy(0.01, 40)
    times[20], times[30] = 0.05, 0.08
    found = loop.measure(clock.call("a", *[0.01] * loop.WINDOW, *times, 0.01), repeats=30, clock=clock)
    kept = [v for v in found.values if v > 20]
    assert found.outliers == len(kept) > 0 and len(found.values) == 30


def test_outliers__a_coarse_clock_makes_none():
    assert loop.outliers([10.0] * 20 + [10.3]) == [] and loop.outliers([]) == []
    assert loop.outliers([10.0] * 20 + [10.6]) == [10.6]


def test_change_point__finds_a_jump_and_where():
    jump = loop.change_point(noisy(10, 20) + noisy(13, 20, seed=1))
    assert jump is not None and jump[0] == pytest.approx(20, abs=1) and jump[1] == pytest.approx(1.3, abs=0.05)


def test_change_point__finds_slow_drift():
    assert loop.change_point([10 * (1 + 0.01 * i) for i in range(30)]) is not None


@pytest.mark.parametrize("seed", range(20))
def test_change_point__steady_noise_has_none(seed):
    assert loop.change_point(noisy(10, 30, seed=seed, spread=0.05)) is None


def test_change_point__neither_outliers_nor_small_steps_nor_few_samples_count():
    assert loop.change_point([10.0] * 12 + [40.0] * 2 + [10.0] * 12) is None
    assert loop.change_point(noisy(10, 20, spread=0.001) + noisy(10.3, 20, spread=0.001)) is None
    assert loop.change_point([1.0, 2.0] * 4) is None
    assert loop.change_point([5.0] * 40) is None


def test_synchronise__is_inside_the_clock_and_leaves_earlier_work_out():
    clock = FakeClock()
    pending = 0.0

    def launch() -> None:
        nonlocal pending
        pending += 0.020
        clock.now += 0.001

    def wait() -> None:
        nonlocal pending
        clock.now, pending = clock.now + pending, 0.0

    launch()
    assert loop.timed(launch, clock, wait) == pytest.approx(0.021)
    assert loop.interleave({"a": launch}, repeats=6, clock=clock, synchronise=wait)["a"].values == pytest.approx([21.0] * 6)
    assert loop.timed(launch, clock) == pytest.approx(0.001)


def test_an_error_in_a_call_is_the_caller_s_and_names_the_call():
    clock = FakeClock()
    left = iter(range(loop.WINDOW + 3))

    def fails() -> None:
        clock.now += 0.01
        if next(left, None) is None:
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone") as e:
        loop.interleave({"fine": clock.call("f", 0.01), "broken": fails}, clock=clock)
    assert e.value.measuring == "broken"


def test_alive__is_called_between_runs_and_not_timed():
    clock = FakeClock()

    def beat() -> None:
        clock.log.append("beat")
        clock.now += 7.0

    found = loop.interleave({"a": clock.call("a", 0.001)}, repeats=6, clock=clock, alive=beat)
    assert found["a"].values == pytest.approx([1.0] * 6) and clock.log.count("beat") == loop.WINDOW + 2
