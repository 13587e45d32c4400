"""Absurd plans, sizes and texts: refused in one line, at once, before anything is allocated."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import pytest
from torch import nn

import splitfx
from splitfx.compiler.inline import parse_pass, parse_sizes
from splitfx.compiler.transform import inputs_for
from splitfx.errors import PlanError, SplitfxError
from splitfx.ground import limits
from splitfx.ground.files import read_text
from splitfx.passes import Group, Tile

HEAD = "format = 1\n"
ABSURD = {
    "shape": HEAD + "input_shape = [1, 3, 1000000, 1000000]\n[[pass]]\nname = 'drop_identity'\n",
    "shapes": HEAD + f"input_shape = [{'1, ' * 100_000}1]\n[[pass]]\nname = 'drop_identity'\n",
    "digits": HEAD + f"input_shape = [1, 3, 8, {'9' * 5000}]\n",
    "digits that Python reads": HEAD + f"input_shape = [1, 3, 8, {'9' * 4000}]\n[[pass]]\nname = 'drop_identity'\n",
    "budget": HEAD + f"[[pass]]\nname = 'tile'\nbudget = '{'9' * 400} MiB'\n",
    "a long budget": HEAD + f"[[pass]]\nname = 'tile'\nbudget = '{'9' * 100_000} MiB'\n",
    "format": f"format = {'9' * 4000}\n",
    "grid": HEAD + "[[pass]]\nname = 'tile'\ngrid = [1000000000, 1000000000]\n",
    "nested lists": HEAD + "x = " + "[" * 3000 + "]" * 3000 + "\n",
    "nested tables": HEAD + "x = " + "{a = " * 3000 + "1" + "}" * 3000 + "\n",
    "dotted key": HEAD + ".".join("a" * 100_000) + " = 1\n",
    "dotted quoted key": HEAD + ".".join(['"a"'] * 100_000) + " = 1\n",
    "dotted header": HEAD + "[" + ".".join("a" * 100_000) + "]\n",
    "open texts": HEAD + 'x = """' + '\\"""' * 100_000 + "\\",
    "name": HEAD + f"[[pass]]\nname = '{'g' * 10_000_000}'\n",
    "name below the limit": HEAD + f"[[pass]]\nname = '{'g' * 1_000_000}'\n",
    "key": HEAD + f"{'k' * 1_000_000} = 1\n",
    "option": HEAD + f"[[pass]]\nname = 'tile'\n{'k' * 1_000_000} = 1\n",
    "value": HEAD + f"[[pass]]\nname = 'tile'\nuntil = '{'k' * 1_000_000}'\n",
    "list": HEAD + f"[[pass]]\nname = 'tile'\nmode = [{'1, ' * 300_000}1]\n",
    "passes": HEAD + "[[pass]]\nname = 'drop_identity'\n" * 5000,
}


@pytest.fixture
def little_memory():
    """No more than 2 GiB above what is taken now can be allocated, even untouched."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as on Linux")
@pytest.mark.parametrize("text", ABSURD.values(), ids=ABSURD)
def test_absurd_plans_are_refused_at_once(text: str, little_memory: None):
    splitfx.Plan.from_toml(HEAD + "[[pass]]\nname = 'drop_identity'\n")  # finds the passes
    started = time.process_time()
    with pytest.raises(PlanError) as caught:
        splitfx.Plan.from_toml(text)
    assert time.process_time() - started < 2  # of this process; half of that on a quiet machine
    assert len(str(caught.value)) < 1600
    assert "\n" not in str(caught.value)


def test_what_is_far_below_the_limits_is_read():
    text = HEAD + "input_shape = [1, 3, 20000, 20000]\n" + "[[pass]]\nname = 'drop_identity'\n" * 500
    assert len(splitfx.Plan.from_toml(text).passes) == 500
    names = ", ".join(f"'layer{i}.conv.0.1'" for i in range(3000))
    limits.check_nesting(
        f"a.b.c = [{names}, 'a.{'b.' * 100}c', 1.5, [[1, 2], {{x = 'y'}}]] # {'[' * 100}", PlanError, ""
    )
    limits.check_nesting(f"a = '''{'[' * 100}'''\nb = \"{'[' * 100}\\\"{'[' * 100}\"", PlanError, "")


def test_nesting_is_counted_to_the_level():
    limits.check_nesting("x = " + "[" * limits.NESTING, PlanError, "the plan")
    with pytest.raises(PlanError, match="the plan nests more than 32 levels deep in line 2"):
        limits.check_nesting("y = 1\nx = " + "[" * (limits.NESTING + 1), PlanError, "the plan")


def test_a_shape_that_no_machine_holds_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "_memory", lambda: 2**30)
    plan = splitfx.Plan([Tile()], input_shape=(1, 3, 20_000, 20_000))
    with pytest.raises(PlanError, match=r"takes 4\.5 GiB; this machine has 1\.0 GiB of memory"):
        inputs_for(nn.Conv2d(3, 4, 3), plan)


@pytest.mark.parametrize(
    "given",
    [(1, 3, 10**6, 10**6), (1, 10**5000), (1,) * 100_000, ((1, 3, 10**6, 10**6),), (1, -(10**5000)), [1, 3] * 10**6],
)
def test_absurd_shapes_in_python(given: object):
    with pytest.raises(PlanError) as caught:
        splitfx.Plan([Tile()], input_shape=given)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 1600


@pytest.mark.parametrize(
    "text", ["1x3x1000000x1000000", f"1x{'9' * 5000}", "x".join("1" * 100_000), "1x" + "3" * 10_000]
)
def test_absurd_sizes_on_the_command_line(text: str):
    with pytest.raises(SplitfxError) as caught:
        parse_sizes(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["group factors=" + "9" * 5000, "group factors=" + "[" * 5000, "tile " + "a" * 10**6])
def test_absurd_passes_on_the_command_line(text: str):
    with pytest.raises(PlanError) as caught:
        parse_pass(text)
    assert len(str(caught.value)) < 1600


def test_numbers_beyond_every_float():
    with pytest.raises(PlanError, match="must be"):
        Group(factors=10**400)  # type: ignore[arg-type]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path):
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xef\xbb\xbfformat = 1\n[[pass]]\nname = 'drop_identity'\n")
    assert splitfx.Plan.load(path) == splitfx.Plan.from_toml("\ufeff" + path.read_text(encoding="utf-8-sig"))


def test_of_a_file_that_is_too_long_no_more_is_read(tmp_path: Path):
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_text(Path("/dev/zero") if sys.platform == "linux" else _long(tmp_path), most=10)
    with pytest.raises(PlanError, match="is not a plan: it has more than"):
        splitfx.Plan.load(_long(tmp_path))


def _long(folder: Path) -> Path:
    path = folder / "long.toml"
    path.write_bytes(b"#" * (limits.PLAN_BYTES + 1))
    return path
