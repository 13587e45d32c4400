"""The one runner: ``python -m benchmarks.run [name ...] [--only MODEL ...] [--quick] [--threads N] [--list]``.

Prints each benchmark's table and writes ``benchmarks/results/<name>.json``; ``--quick`` takes fewer runs
and models and writes nothing, ``--only`` runs some models and leaves the rows of the others as they are.
The process is started anew with a fixed number of threads that wait
passively, so that two thread pools (torch's and onnxruntime's) do not spin against each other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
import time
from types import ModuleType
from typing import Any

import benchmarks
from benchmarks.results_format import kept_beside, record, write
from splitfx.errors import nearest
from splitfx.ground.table import table


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    known = discover()
    if options.list:
        print("\n".join(f"{name}: {(module.__doc__ or '').partition(chr(10))[0]}" for name, module in known.items()))
        return 0
    for name in options.names:
        if name not in known:
            print(
                f"there is no benchmark '{name}'.{nearest(name, known)} Known: {', '.join(known)}",
                file=sys.stderr,
            )
            return 2
    if options.only and len(options.names) != 1:
        print("--only names models of one benchmark: give that one's name", file=sys.stderr)
        return 2
    if options.only and (unknown := set(options.only) - set(models_of(known[options.names[0]]))):
        has = ", ".join(models_of(known[options.names[0]])) or "no models that can be chosen"
        print(f"{options.names[0]} does not know {', '.join(sorted(unknown))}; it has: {has}", file=sys.stderr)
        return 2
    restart_with_fixed_threads(options.threads)
    for name in options.names or known:
        if options.only:
            choose(known[name], options.only)
        started = time.perf_counter()
        rows = known[name].run(options.quick)
        print(f"\n{name} ({time.perf_counter() - started:.0f} s)\n\n{render(known[name], rows)}", flush=True)
        if options.quick:
            continue
        if options.only:
            rows = kept_beside(name, rows)
        if hasattr(known[name], "summary"):
            print(f"\n{known[name].summary(rows)}\n", flush=True)
        print(f"written: {write(record(name, rows))}", flush=True)
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description="Run benchmarks and keep their results.")
    parser.add_argument("names", nargs="*", help="which ones; all when left out")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models of one benchmark; other rows stay")
    parser.add_argument("--quick", action="store_true", help="fewer runs and models; results are not written")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every engine (default 1)")
    parser.add_argument("--list", action="store_true", help="show what there is")
    return parser.parse_args(arguments)


def models_of(module: ModuleType) -> list[str]:
    """Names of the models that a benchmark's ``CASES`` list: its keys, or the first of each of its tuples."""
    cases = getattr(module, "CASES", ())
    return list(cases) if isinstance(cases, dict) else [one[0] for one in cases]


def choose(module: ModuleType, models: list[str]) -> None:
    cases: Any = module.CASES
    if isinstance(cases, dict):
        kept: Any = {name: case for name, case in cases.items() if name in models}
    else:
        kept = tuple(case for case in cases if case[0] in models)
    vars(module)["CASES"] = kept


def discover() -> dict[str, ModuleType]:
    """Name -> module of every benchmark in this folder."""
    names = sorted(one.name for one in pkgutil.iter_modules(benchmarks.__path__))
    found = (importlib.import_module(f"benchmarks.{name}") for name in names if name != "run")
    return {module.NAME: module for module in found if hasattr(module, "NAME")}


def restart_with_fixed_threads(threads: int) -> None:
    """OpenMP reads its settings once, when it is loaded, so they have to be there before Python starts."""
    wanted = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if all(os.environ.get(key) == value for key, value in wanted.items()):
        return
    sys.stdout.flush()
    again = [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]]
    os.execve(sys.executable, again, {**os.environ, **wanted})


def render(module: ModuleType, rows: list[dict[str, Any]]) -> str:
    cells = [[form(row.get(key)) for key, _, form in module.COLUMNS] for row in rows]
    return table([heading for _, heading, _ in module.COLUMNS], cells, left=getattr(module, "LEFT", (0,)))


def load(name: str) -> dict[str, Any]:
    """The kept results of a benchmark."""
    from benchmarks.results_format import path_of

    return json.loads(path_of(name).read_text())


if __name__ == "__main__":
    sys.exit(main())
