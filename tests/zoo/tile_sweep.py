"""Every model of the zoo, tiled by its own plan and compared with the untiled model.

``python -m tests.zoo.tile_sweep [--only PATTERN] [--jobs 2] [--missing]``

A model is traced in float32 at 227x253, batch 1 (or at 224, 256 or the smallest square that it runs at), and
`Tile()` plans for half its peak, or the least. Both graphs are then run in float64 and compared, relative to the
largest value of each output (in float32 where a graph has that type written down); the tiled one runs in float32 as
well, all live tensors counted. Planning is timed in seconds of one core, at that size and, where the model runs at any
size, for 1024x1024. One process per model.

Words: ``ok``; ``not tiled: why``; ``skipped: why``; ``differs: how much``; ``over its prediction``; ``failed: why``.
Writes tests/zoo/tile_status.md, the smallest share of the peak first; with ``--only`` just the rows that match.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracle
from tests.zoo.models import create, smallest_input
from tests.zoo.models import names as zoo

STATUS = Path(__file__).with_name("tile_status.md")
SIZE = (1, 3, 227, 253)
LARGE_SIZE = (1, 3, 1024, 1024)
LARGE = 300_000_000  # parameters
STRICT = 1e-12
SINGLE = 1e-5  # in float32
CLOSE = 0.02  # of the predicted peak


@dataclass
class Row:
    """One line of the table."""

    model: str
    size: str = "-"
    word: str = "-"
    before: str = "-"  # MiB in float32, inputs counted, parameters not
    after: str = "-"
    share: str = "-"  # after / before
    measured: str = "-"
    error: str = "-"
    nodes: str = "-"  # tiled of all
    phases: str = "-"
    planning: str = "-"  # seconds of one core
    at_1024: str = "-"  # the same for a square image of 1024


def names() -> list[str]:
    return zoo()


def examine(name: str) -> Row:
    """Tile one model and compare; never raises."""
    row = Row(name)
    try:
        row.word = _examined(row)
    except Exception as error:
        row.word = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160].replace(
            "|", "/"
        )
    return row


def _examined(row: Row) -> str:
    from splitfx.analysis import facts
    from splitfx.errors import UnsupportedError
    from splitfx.frontend.trace import trace
    from splitfx.ir.graph import copy_graph

    model = create(row.model).eval()
    if sum(p.numel() for p in model.parameters()) > LARGE:
        return "skipped: more than 300 M parameters"
    x, graph = _traced(model)
    row.size = "x".join(map(str, x.shape[2:]))
    row.before = _mib(facts(graph).memory.peak_bytes)
    split, notes = _tiled(row, graph)
    if x.shape == SIZE:
        row.at_1024 = _planning_time(trace(model, torch.zeros(LARGE_SIZE)))
    if split is None:
        return "not tiled: " + next((n for n in notes if "not tiled" not in n), notes[-1] if notes else "")
    predicted = facts(split).memory.peak_bytes
    row.after = _mib(predicted)
    row.share = f"{predicted / facts(graph).memory.peak_bytes:.2f}"
    exact = copy_graph(split).double().eval()  # before it runs: what is made once is of the type of the first run
    measured = _measured(split, x)
    row.measured = _mib(measured)
    try:
        with torch.no_grad(), _WideCasts(), _wide_numbers():
            wide = x.double()
            off, most = _error(exact(wide), copy.deepcopy(model).double()(wide)), STRICT
        row.error = f"{off:.0e}"
    except UnsupportedError:  # a type that the model asks its weights for is part of the graph
        with torch.no_grad():
            off, most = _error(split(x), model(x)), SINGLE
        row.error = f"{off:.0e} in float32"
    if not off <= most:
        return f"differs: by {off:.1e}"
    return "ok" if abs(measured - predicted) <= CLOSE * measured else "over its prediction"


def _traced(model: nn.Module) -> tuple[torch.Tensor, fx.GraphModule]:
    """The image and the graph, at the first size that the model takes."""
    from splitfx.errors import TraceError
    from splitfx.frontend.trace import trace

    sizes = [SIZE, (1, 3, 224, 224), (1, 3, 256, 256)]
    for size in (*sizes, None):  # a model of one size, or of multiples of one: which it is, it has to be asked
        x = torch.randn(size or (1, *smallest_input(model)[1:]), generator=torch.Generator().manual_seed(1))
        try:
            return x, trace(model, x)
        except TraceError:
            if size is None:
                raise
    raise AssertionError("the last size returns or raises")


def _tiled(row: Row, graph: fx.GraphModule) -> tuple[fx.GraphModule | None, list[str]]:
    """The graph as `Tile()` makes it; None where it tiles nothing."""
    from splitfx.analysis import facts
    from splitfx.ir.editing import tidy
    from splitfx.ir.graph import copy_graph
    from splitfx.ir.ops import op_name
    from splitfx.passes.tile import Tile

    work = copy_graph(graph)
    started = time.process_time()
    outcome = Tile().run(work, facts(work))
    row.planning = f"{time.process_time() - started:.1f}"
    notes = [note.what for note in outcome.notes]
    tiles = [n for n in work.graph.nodes if op_name(n) == "tiled"]
    if not tiles:
        return None, notes
    tidy(work)
    stages: list[Any] = [work.get_submodule(str(n.target)) for n in tiles]
    operations = lambda nodes: sum(n.op.startswith("call") for n in nodes)  # noqa: E731
    row.nodes = f"{sum(operations(s.stage.graph.nodes) for s in stages)} of {operations(graph.graph.nodes)}"
    shapes = facts(work).shapes
    programs = [s.program(tuple(shapes[o] for o in n.all_input_nodes)) for s, n in zip(stages, tiles, strict=True)]
    row.phases = "+".join(str(p.stage.phases) for p in programs)
    return work, notes


def _planning_time(graph: fx.GraphModule) -> str:
    from splitfx.analysis import facts
    from splitfx.passes.tile import Tile

    started = time.process_time()
    Tile().run(graph, facts(graph))
    return f"{time.process_time() - started:.1f}"


@contextmanager
def _wide_numbers() -> Iterator[None]:
    """What a model makes of numbers is made in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class _WideCasts(TorchDispatchMode):
    """What a model computes in float32 whatever it is given, as a norm may, is computed in float64 here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide: Any = lambda v: torch.float64 if v is torch.float32 else v  # noqa: E731
        return func(*pytree.tree_map(wide, args), **pytree.tree_map(wide, kwargs or {}))


@torch.no_grad()
def _measured(split: fx.GraphModule, x: torch.Tensor) -> int:
    from splitfx.analysis.live import LiveStorage

    split(x)  # what is made once, such as tables of a resize, is there
    state = [*split.parameters(), *split.buffers()]
    with LiveStorage(counted=[x], state=state) as watch:
        split(x)
        return watch.peak


def _error(got: Any, expected: Any) -> float:
    return max(oracle.error(a, b) for a, b in zip(oracle.leaves(got), oracle.leaves(expected), strict=True))


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


# ---------------------------------------------------------------- the table


def render(rows: list[Row]) -> str:
    good = [r for r in rows if r.word == "ok"]
    rows = sorted(rows, key=lambda r: (r.word != "ok", float(r.share) if r.word == "ok" else 0, r.model))
    shares = sorted(float(r.share) for r in good)
    middle = f" Peak after / before: median {shares[len(shares) // 2]:.2f}, best {shares[0]:.2f}." if shares else ""
    times = sorted(float(r.at_1024) for r in rows if r.at_1024 != "-")
    if times:
        middle += f" Planning at 1024x1024: median {times[len(times) // 2]:.1f} s, longest {times[-1]:.1f} s."
    lines = [
        "# Tiled models",
        "",
        "Written by `python -m tests.zoo.tile_sweep`; its docstring says what the words mean. MiB are live tensors in",
        "float32, the input counted and parameters not; the error is that of float64, relative to the largest output.",
        "",
        f"{len(good)} of {len(rows)} tiled and equal.{middle}",
        "",
        "| " + " | ".join(f.name for f in fields(Row)) + " |",
        "|" + " --- |" * len(fields(Row)),
    ]
    lines += ["| " + " | ".join(astuple(r)).replace("\n", " ") + " |" for r in rows]
    return "\n".join(lines) + "\n"


def parse(text: str) -> dict[str, Row]:
    table = [[cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in text.splitlines() if "|" in line]
    return {cells[0]: Row(*cells) for cells in table[2:]}


def in_own_process(name: str) -> Row:
    command = [sys.executable, "-m", "tests.zoo.tile_sweep", "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        return Row(name, word="failed: took more than 30 minutes")
    found = parse(done.stdout)
    return found.get(name, Row(name, word=f"failed: its process ended with {done.returncode}"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.tile_sweep", description="Tile all models.")
    parser.add_argument("--only", default="*", help="names to run, a glob (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default 1)")
    parser.add_argument("--missing", action="store_true", help="only models without a row")
    parser.add_argument("--one", default="", help="examine one model here and print its row")
    given = parser.parse_args(argv)
    if given.one:
        print(render([examine(given.one)]))
        return 0
    wanted = [n for n in names() if any(fnmatch.fnmatch(n, p) for p in given.only.split(","))]
    known = parse(STATUS.read_text()) if STATUS.exists() else {}
    wanted = [n for n in wanted if not given.missing or n not in known]
    with ThreadPoolExecutor(given.jobs) as pool:
        for count, row in enumerate(pool.map(in_own_process, wanted), 1):
            known[row.model] = row
            print(f"[{count}/{len(wanted)}] " + " ".join(astuple(row)), flush=True)
            draft = STATUS.with_suffix(".tmp")
            draft.write_text(render([known[n] for n in names() if n in known]))
            os.replace(draft, STATUS)
    bad = [n for n in wanted if known[n].word.startswith(("differs", "failed", "over"))]
    print(f"{len(bad)} bad" + (f": {', '.join(bad)}" if bad else ""))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
