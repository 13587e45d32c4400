"""Ratios of times: a drift of the machine leaves them as they are, and what it does change is in the spread."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from splitfx.ground import turns
from splitfx.ground.turns import LEAST, LEAST_SECONDS, MOST, MOST_SECONDS, PARTS, Ratio, ratio, ratios


class Machine:
    """Calls that take as long as they say, times what the machine makes of it at that time; no time passes here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: Callable[[float, str], float]) -> None:
        self.now, self.slow, self.called = 0.0, slow, []
        monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(turns, "took", self.took)

    def call(self, name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            self.called.append(name)
            took = seconds * self.slow(self.now, name)
            self.now += took
            return took

        return run

    def took(self, call: Callable[[], float], synchronize: Callable[[], None]) -> float:
        return call()


def test_a_machine_that_gets_slower_changes_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda now, name: 1 + now // 4)
    found = ratios(machine.call("base", 0.1), {"half": machine.call("half", 0.05)})["half"]
    assert found.middle == pytest.approx(0.5)
    assert found.spread < 0.02
    assert found.pairs >= LEAST


def test_calls_are_neighbours_and_their_order_turns_round(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda now, name: 1.0)
    ratios(machine.call("base", 0.1), {name: machine.call(name, 0.1) for name in "ab"})
    assert machine.called[6:14] == ["base", "a", "base", "b", "a", "base", "b", "base"]


@pytest.mark.parametrize("seconds", [0.1, 0.3])
def test_it_goes_on_while_a_ratio_is_not_known_and_ends(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(0)
    machine = Machine(monkeypatch, lambda now, name: 1.0 if name != "noisy" else noise.uniform(0.5, 2.0))
    found = ratios(machine.call("base", seconds), {name: machine.call(name, seconds) for name in ("noisy", "calm")})
    assert found["calm"].pairs == LEAST  # it is known by then, and waits for nothing
    assert found["calm"].spread == pytest.approx(0, abs=1e-9)
    assert found["noisy"].spread > turns.SURE * found["noisy"].middle
    if seconds == 0.1:
        assert found["noisy"].pairs == MOST
    else:
        assert found["noisy"].pairs < MOST
        assert 2 * MOST_SECONDS < machine.now < 2 * MOST_SECONDS + 3  # and the calls to warm up


def test_short_calls_are_made_for_as_long_as_something_may_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda now, name: 1.0)
    found = ratios(machine.call("base", 0.001), {name: machine.call(name, 0.001) for name in "abc"})
    assert LEAST_SECONDS < machine.now < LEAST_SECONDS + 0.02  # all take turns in it
    assert {one.pairs for one in found.values()} == {167}


def test_slow_calls_are_made_often_enough_for_a_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda now, name: 1.0)
    assert ratios(machine.call("base", 100.0), {"a": machine.call("a", 100.0)})["a"].pairs == PARTS


def test_many_calls_do_not_average_a_drift_away() -> None:
    drifts = [1.0] * 50 + [1.4] * 50
    assert ratio(drifts).spread > 0.2
    assert ratio([1.0, 1.1, 1.2, 1.3, 1.4]).spread == pytest.approx(2.776 * 0.1 * (2.5 / 5) ** 0.5)
    calm = [1.0 + 0.1 * (i % 3 - 1) for i in range(100)]
    assert ratio(calm) == Ratio(1.0, 0.0, 100)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Ratio(0.83, 0.04, 20), "x0.83 ± 0.04"),
        (Ratio(0.83, 0.0, 20), "x0.83 ± 0.01"),
        (Ratio(0.97, 0.04, 20), "no difference"),
        (Ratio(1.05, 0.04, 20), "x1.05 ± 0.04"),
        (Ratio(1.004, 0.0, 20), "no difference"),
    ],
)
def test_what_lies_within_its_spread_is_no_difference(found: Ratio, words: str) -> None:
    assert str(found) == words
