"""The zoo: every model traced, its canonical graph compared with the model, and each pass tried on it.

``python -m tests.zoo.sweep [--only PATTERN] [--passes NAME,NAME] [--jobs 2] [--check]``

A model is traced in float32 as a user would; graph and model are then compared in float64: the eval-mode
output at another batch than the traced one, and for models up to 300 M parameters one training step (output
for the same seed, gradients, batch norm statistics). Words per model:

``ok``; ``ok (heads: ...)`` where train-only heads were left out; ``ok (tied to its type)`` where the graph is
right in the type it was traced in (float64 here), but not when a float32 one is moved to float64;
``differs: what``; ``failed: why``. One word per model and pass: ``ok``, ``nothing-to-do``, ``refused: why``.

The graph is also run at a second height and width, the first of a few that the model itself accepts (an odd one is
tried first). The column ``also at`` says that size where graph and model are equal; ``one size only`` where the model
accepts no other; ``refused: why`` where the graph says that it is not right there; ``differs: what``.

Writes tests/zoo/status.md, with ``--only`` just the rows that match. ``--check`` writes nothing: it exits
with 1 when a model or pass that the committed table calls ok no longer is.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from tests import oracle
from tests.zoo.models import create, names, smallest_input

STATUS = Path(__file__).with_name("status.md")
COLUMNS = ["model", "input", "batch", "also at", "trace"]
TRAINED_UP_TO = 300_000_000  # parameters; larger models are compared in eval mode only


@dataclass
class Row:
    """One line of the table."""

    name: str
    size: str = "-"
    batch: str = "-"
    also: str = "-"
    trace: str = "-"
    passes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def examine(name: str, passes: tuple[str, ...] = ()) -> Row:
    """Trace one model and try each pass on it; never raises."""
    row, start = Row(name), time.monotonic()
    try:
        model = create(name)
        row.trace = word(row, model)
        if not row.trace.startswith("ok"):
            # A cast to float32 leaves no trace in a float32 model; the type of a new tensor is written down.
            exact = in_float64(row, name)
            row.trace = "ok (tied to its type)" if exact == "ok" else row.trace
        row.passes = {p: tried(p, name, row) for p in passes}
    except Exception as error:
        row.trace = f"failed: {one_line(error)}"
    row.seconds = time.monotonic() - start
    gc.collect()
    return row


def in_float64(row: Row, name: str) -> str:
    """The model made, traced and compared in float64, tensors that its forward makes included."""
    torch.set_default_dtype(torch.float64)
    try:
        return word(row, create(name).double())
    finally:
        torch.set_default_dtype(torch.float32)


def word(row: Row, model: nn.Module) -> str:
    try:
        return traced(row, model)
    except Exception as error:
        if os.environ.get("SPLITFX_ZOO_TRACEBACK"):
            traceback.print_exc()
        return f"failed: {one_line(error)}"


def traced(row: Row, model: nn.Module) -> str:
    from splitfx.frontend.trace import trace
    from splitfx.ir.graph import info

    dtype = next(model.parameters()).dtype
    shape = smallest_input(model)
    row.size = "x".join(map(str, shape[2:]))
    graph = trace(model, torch.zeros(shape, dtype=dtype))
    found = info(graph)
    row.batch = "free" if found.dynamic in ("all", "batch") else "fixed"
    if set(graph.state_dict()) | set(found.untouched) != set(model.state_dict()):
        return "differs: state_dict keys"
    model.double().eval()  # in place, so the graph's parameters are double now too; its buffers are not yet
    graph.double().eval()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn((3 if row.batch == "free" else 2, *shape[1:]), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        wrong = oracle.difference(graph(inputs), model(inputs))
    if wrong:
        return f"differs: eval {wrong}"
    row.also = at_another_size(graph, model, shape)
    if row.also.startswith("differs"):
        return row.also
    if found.train_only and hasattr(model, "aux_logits"):
        # torchvision's train-only heads are off, because they draw from the same random stream.
        for switch, off in {"aux_logits": False, **dict.fromkeys(found.train_only)}.items():
            setattr(model, switch, off)
    if sum(p.numel() for p in model.parameters()) <= TRAINED_UP_TO:
        wrong = oracle.training_difference(graph.train(), model.train(), inputs[:2])
        if wrong:
            return f"differs: train {wrong}"
    return f"ok (heads: {', '.join(found.train_only)})" if found.train_only else "ok"


def at_another_size(graph: nn.Module, model: nn.Module, shape: tuple[int, ...]) -> str:
    """What the graph does at the first size, other than the traced one, that the model itself accepts."""
    from splitfx.errors import SplitfxError

    height, width = shape[2:]
    generator = torch.Generator().manual_seed(2)
    for size in ((height + 13, width + 26), (height + 32, width + 64), (2 * height, width), (2 * height, 2 * width)):
        inputs = torch.randn((2, shape[1], *size), generator=generator, dtype=torch.float64)
        with torch.no_grad():
            try:
                wanted = model(inputs)
            except Exception:  # the question is whether the user's model takes this size; it may say no in any way
                continue
            try:
                wrong = oracle.difference(graph(inputs), wanted)
            except SplitfxError as error:
                return f"refused: {why_refused(error)}"
        where = "x".join(map(str, size))
        return f"differs: at {where} {wrong}" if wrong else where
    return "one size only"


def why_refused(error: Exception) -> str:
    """The reason in the one line for sizes that do not fit."""
    why = str(error).partition(": ")[2].partition(". It takes")[0]
    return why.partition("\n")[0][:80].replace("|", "/")


def tried(name: str, model_name: str, row: Row) -> str:
    """One pass with its default options on a fresh model, through the public door, oracle included."""
    import splitfx
    from splitfx.errors import SplitfxError
    from splitfx.ir.graph import info

    sizes = (2, 3, *map(int, row.size.split("x")))
    try:
        plan = splitfx.Plan((splitfx.compiler.registry.get(name)(),), input_shape=sizes)
        split = splitfx.transform(create(model_name).eval(), plan)
    except SplitfxError as error:
        return f"refused: {one_line(error)}"
    except Exception as error:
        return f"failed: {one_line(error)}"
    did = any(note.kind == "did" for step in info(split).steps for note in step.notes)
    return "ok" if did else "nothing-to-do"


def rows_of(wanted: list[str], passes: tuple[str, ...], jobs: int) -> Iterator[Row]:
    """One row per model. Worker processes are replaced after some models, so that no memory piles up."""
    step = 15 * jobs
    for start in range(0, len(wanted), step):
        chunk = wanted[start : start + step]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(examine, name, passes) for name in chunk]
            for name, one in zip(chunk, waiting, strict=True):
                try:
                    yield one.result()
                except BrokenProcessPool:
                    yield Row(name, trace="failed: its process died (out of memory?)")


def one_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160].replace("|", "/")


# ---------------------------------------------------------------- the table


def render(rows: list[Row]) -> str:
    passes = sorted({p for row in rows for p in row.passes})
    kinds = {library: [r for r in rows if r.name.startswith(library)] for library in ("torchvision", "timm")}
    counts = (f"{k}: {sum(r.trace.startswith('ok') for r in v)} of {len(v)} ok" for k, v in kinds.items())
    lines = [
        "# The zoo",
        "",
        "Written by `make zoo`; tests/zoo/sweep.py says what the words mean.",
        "",
        "; ".join(counts),
        "",
        second_sizes(rows),
    ]
    lines += ["", "| " + " | ".join([*COLUMNS, *passes]) + " |"]
    lines += ["|" + " --- |" * (len(COLUMNS) + len(passes))]
    for r in rows:
        cells = [r.name, r.size, r.batch, r.also, r.trace, *(r.passes.get(p, "-") for p in passes)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def second_sizes(rows: list[Row]) -> str:
    """How many graphs are equal to their model at a second size, of those whose model accepts one."""
    fixed = sum(r.also == "one size only" for r in rows)
    equal = sum(r.also[0].isdigit() for r in rows)
    tried = len(rows) - fixed - sum(r.also == "-" for r in rows)
    return f"{equal} of the {tried} models that accept a second size are equal there; {fixed} accept one size only."


def parse(text: str) -> dict[str, Row]:
    table = [[cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in text.splitlines() if "|" in line]
    if not table:
        return {}
    passes = table[0][len(COLUMNS) :]
    rows = [(cells[: len(COLUMNS)], cells[len(COLUMNS) :]) for cells in table[2:]]
    return {
        fixed[0]: Row(*fixed, passes={p: w for p, w in zip(passes, words, strict=True) if w != "-"})
        for fixed, words in rows
    }


def lost(before: dict[str, Row], now: dict[str, Row]) -> list[str]:
    """What the committed table calls ok and the new rows do not."""
    found = []
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        pairs = [("trace", old.trace, new.trace)] + [(p, w, new.passes.get(p, w)) for p, w in old.passes.items()]
        if old.also[0].isdigit() and not new.also[0].isdigit():
            found.append(f"{name}: was equal at {old.also}, is '{new.also}'")
        found += [f"{name}: {what} was '{a}', is '{b}'" for what, a, b in pairs if a.startswith("ok") and a != b]
    return sorted(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.sweep", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="*", help="names to run, a glob such as 'timm:*net*' (default: all)")
    parser.add_argument("--passes", default="", help="plan names of passes to try as well, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default 1; big ones need 6 GB each)")
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    given = parser.parse_args(argv)
    wanted = [n for n in names() if any(fnmatch.fnmatch(n, p) for p in given.only.split(","))]
    passes = tuple(p for p in given.passes.split(",") if p)
    before = parse(STATUS.read_text()) if STATUS.exists() else {}
    now: dict[str, Row] = {}
    for row in rows_of(wanted, passes, given.jobs):
        now[row.name] = row
        words = f"{row.name} {row.size} {row.trace} {row.passes or ''} {row.seconds:.1f} s"
        print(f"[{len(now)}/{len(wanted)}] {words}", flush=True)
    gone = lost(before, now)
    print(*gone, sep="\n")
    if not given.check:
        if not passes:
            for name, row in now.items():
                row.passes = before[name].passes if name in before else {}
        known = before | now
        rows = [known[n] for n in names() if n in known]
        draft = STATUS.with_suffix(".tmp")
        draft.write_text(render(rows))
        os.replace(draft, STATUS)
    bad = [r.name for r in now.values() if not r.trace.startswith("ok")]
    print(f"{len(now) - len(bad)} of {len(now)} ok" + (f"; not ok: {', '.join(bad)}" if bad else ""))
    return 1 if gone and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
