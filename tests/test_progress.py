"""What a call says while it works: on a terminal alone, on one line, erased at the end, off by ``progress=False``."""

from __future__ import annotations

import inspect
import io
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import splitfx
from splitfx.ground import progress as module
from splitfx.ground.progress import Clock, Line, Say, duration, say, told
from splitfx.passes import FoldBatchNorm


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stderr is a terminal, and a line appears at once."""
    shown = Terminal()
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=shown))  # pytest puts its own in place of sys.stderr
    monkeypatch.setattr(module, "WAIT", 0.0)
    return shown


@told
def outer(first: str, progress: Say = True, inner: Say = True) -> str:
    """A public function."""
    say(first)
    nested(progress=inner)
    time.sleep(0.5)
    return first


@told
def nested(progress: Say = True) -> None:
    say("inside")


@told
def dividing(progress: Say = True) -> None:
    say("dividing")
    time.sleep(0.5)
    _ = 1 / 0


def left_on(terminal: Terminal) -> str:
    """What a terminal shows of the line in the end."""
    return terminal.getvalue().rpartition("\r")[2]


def test_a_terminal_shows_the_step_and_is_left_clean(terminal: Terminal) -> None:
    assert outer("folding") == "folding"
    assert "inside … 00:00" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
    assert left_on(terminal).strip() == ""


@pytest.mark.parametrize("why", ["pipe", "off", "rank", "short"])
def test_nothing_is_shown(why: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "pipe":
        monkeypatch.setattr(terminal, "isatty", lambda: False)
    if why == "rank":
        monkeypatch.setenv("RANK", "1")
    if why == "short":
        monkeypatch.setattr(module, "WAIT", 60.0)
    outer("folding", progress=why != "off")
    assert terminal.getvalue() == ""


def test_a_function_hears_every_step_of_all_that_is_called() -> None:
    said: list[str] = []
    outer("folding", progress=said.append)
    outer("quietly", progress=said.append, inner=False)
    assert said == ["folding", "inside", "quietly"]
    say("nobody listens any more")
    assert len(said) == 3


def test_the_line_ends_with_a_call_that_fails(terminal: Terminal) -> None:
    with pytest.raises(ZeroDivisionError):
        dividing()
    assert left_on(terminal).strip() == ""
    assert "dividing" in terminal.getvalue()


def test_a_clock_says_how_far_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    said: list[str] = []
    with Line(said.append):
        clock = Clock("training", total=4, done=1)
        clock.tick()
        clock.tick("epoch 1 of 2")
    assert said == ["training: 50 % done, 0:40 left", "epoch 1 of 2: 75 % done, 0:20 left"]
    assert [duration(s) for s in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]


def test_transform_says_its_steps() -> None:
    said: list[str] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    splitfx.transform(model, FoldBatchNorm(), torch.zeros(1, 3, 8, 8), progress=said.append)
    assert said[:2] == ["tracing", "pass 1 of 1: fold_batchnorm"]


def test_every_long_call_of_the_public_face_has_it() -> None:
    calls = {name: getattr(splitfx, name) for name in splitfx.__all__ if name[0].islower()}
    have = {name for name, call in calls.items() if "progress" in inspect.signature(call).parameters}
    assert {name for name in have if not hasattr(calls[name], "__wrapped__")} == set()
    quick = {"diagnose", "explain", "inspect_html", "load", "load_data", "preview_search", "register_op", "save"}
    assert set(calls) - have == quick | {"session_options"}
