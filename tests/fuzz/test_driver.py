"""The driver sees each fault that a draw can have, gives the seed, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import box
from tests.fuzz.__main__ import page, table
from tests.fuzz.driver import run
from tests.fuzz.sabotaged import TURNS

KIND = "tests.fuzz.sabotaged"
FAULTS = {
    "traceback": "KeyError: 'key'",
    "outside": "outside its folder: open ",
    "moved": "outside its folder: os.rename ",
    "native": "outside its folder: ",
    "code": "code ran",
    "lines": "a refusal that is not one line",
    "escape": "a refusal with control characters",
    "no word": "draw() returned ''",
}


@pytest.mark.parametrize(("turn", "fault"), FAULTS.items())
def test_sabotage_is_seen(turn: str, fault: str, tmp_path: Path) -> None:
    result = box.run_draw(KIND, TURNS.index(turn), tmp_path)
    assert result.word == "fault"
    assert fault in result.fault


@pytest.mark.parametrize("turn", ["equal", "refused"])
def test_a_good_draw_is_no_fault(turn: str, tmp_path: Path) -> None:
    assert box.run_draw(KIND, TURNS.index(turn), tmp_path) == box.Result(turn)
    assert not list(tmp_path.iterdir())


def test_crashes_and_hangs_are_counted_and_the_run_goes_on() -> None:
    seeds = [TURNS.index(turn) for turn in ("hang", "signal", "equal", "refused")]
    tally = run(KIND, iter(seeds), jobs=1, limit=3.0)
    assert dict(tally.words) == {"fault": 2, "equal": 1, "refused": 1}
    assert "it hangs" in tally.faults[TURNS.index("hang")]
    assert "signal SIGSEGV" in tally.faults[TURNS.index("signal")]
    assert "| 4 | 2 fault, 1 equal, 1 refused | 2 |" in table([tally])
    assert "2 faults in\n4 draws" in page([tally], 0)
