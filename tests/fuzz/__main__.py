"""``python -m tests.fuzz``: see the package's docstring. Ends with status 1 when there was a fault."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tests.fuzz import home, names
from tests.fuzz.driver import LIMIT, Tally, run

TABLE = Path(__file__).parents[2] / "docs" / "fuzz.md"
SHOWN = 20  # faults of a kind that are printed in full


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzers and laws of splitfx.")
    parser.add_argument("--draws", type=int, default=2000, help="draws of each kind")
    parser.add_argument("--kind", nargs="+", default=names(), metavar="NAME", help=f"of {', '.join(names())}")
    parser.add_argument("--seed", type=int, default=0, help="the first draw's seed; draw i has seed + i")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--table", action="store_true", help=f"write {TABLE.name} in docs/")
    asked = parser.parse_args(given)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    tallies = [fuzz(kind, asked.draws, asked.seed, asked.jobs) for kind in asked.kind]
    print(table(tallies))
    if asked.table:
        TABLE.write_text(page(tallies, asked.seed), encoding="utf-8")
    return int(any(t.faults for t in tallies))


def fuzz(kind: str, draws: int, seed: int, jobs: int) -> Tally:
    told: set[int] = set()
    with tqdm(total=draws, desc=kind, unit="draw", mininterval=2.0) as bar:

        def said(tally: Tally) -> None:
            for at in tally.faults.keys() - told:
                told.add(at)
                told_line = f"--- {kind}, seed {at} (python -m tests.fuzz --kind {kind} --seed {at} --draws 1)"
                tqdm.write(f"\n{told_line}\n{tally.faults[at]}" if len(told) <= SHOWN else told_line)
            bar.set_postfix(faults=len(tally.faults), refresh=False)
            bar.update()

        return run(kind, iter(range(seed, seed + draws)), min(jobs, draws), said=said)


def table(tallies: Sequence[Tally]) -> str:
    lines = ["| kind | what is drawn | draws | what came out | faults | ms a draw |", "|---|---|--:|---|--:|--:|"]
    for t in tallies:
        what = (importlib.import_module(home(t.kind)).__doc__ or "").strip().partition("\n")[0].rstrip(".")
        words = ", ".join(f"{count} {word}" for word, count in t.words.most_common())
        each = 1000 * t.seconds / max(t.draws, 1)
        lines.append(f"| {t.kind} | {what} | {t.draws:,} | {words} | {len(t.faults)} | {each:.0f} |")
    return "\n".join(lines) + "\n"


def page(tallies: Sequence[Tally], seed: int) -> str:
    faults = sum(len(t.faults) for t in tallies)
    return f"""# What the fuzzers tried

Written by `make fuzz` (`python -m tests.fuzz --table`, seed {seed}). Each draw runs in a process that is watched: a
death by signal, no end after {LIMIT:.0f} s of processor time, a traceback that is no `SplitfxError`, a refusal that is
not one plain line, a file written outside the draw's folder and code that ran each count as a fault. {faults} faults in
{sum(t.draws for t in tallies):,} draws. `make test` runs some draws of each kind.

{table(tallies)}"""


if __name__ == "__main__":
    sys.exit(main())
