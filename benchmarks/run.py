"""The one runner: ``python -m benchmarks.run [name ...] [--only MODEL ...] [--quick] [--set NAME=N ...] [--list]``.

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
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import benchmarks
from benchmarks.results_format import kept_beside, record, stored, write
from splitfx.errors import nearest
from splitfx.ground.table import table


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    known = discover()
    if options.list:
        print("\n".join(f"{name}: {(module.__doc__ or '').partition(chr(10))[0]}" for name, module in known.items()))
        return 0
    try:
        changes = checked(options, known)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    restart_with_fixed_threads(options.threads)
    for name in options.names or known:
        run_one(name, known[name], options, changes)
    return 0


def checked(options: argparse.Namespace, known: dict[str, ModuleType]) -> dict[str, Any]:
    """The settings that are changed. Raises `ValueError` for names and settings that there are not."""
    for name in options.names:
        if name not in known:
            raise ValueError(f"there is no benchmark '{name}'.{nearest(name, known)} Known: {', '.join(known)}")
    if options.only and len(options.names) != 1:
        raise ValueError("--only names models of one benchmark: give that one's name")
    if options.only and (unknown := set(options.only) - set(models_of(known[options.names[0]]))):
        has = ", ".join(models_of(known[options.names[0]])) or "no models that can be chosen"
        raise ValueError(f"{options.names[0]} does not know {', '.join(sorted(unknown))}; it has: {has}")
    return {key: changed(known, options.names, key, value) for key, value in options.set}


def run_one(name: str, module: ModuleType, options: argparse.Namespace, changes: dict[str, Any]) -> None:
    if options.only:
        choose(module, options.only)
    started, in_jobs = time.perf_counter(), hasattr(module, "jobs")
    rows = resumed(module, options.quick, changes) if in_jobs else module.run(options.quick)
    print(f"\n{name} ({time.perf_counter() - started:.0f} s)\n\n{render(module, rows)}", flush=True)
    if in_jobs or options.quick:
        return
    if options.only:
        rows = kept_beside(name, rows)
    if hasattr(module, "summary"):
        print(f"\n{module.summary(rows)}\n", flush=True)
    print(f"written: {write(record(name, rows))}", flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description="Run benchmarks and keep their results.")
    parser.add_argument("names", nargs="*", help="which ones; all when left out")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models of one benchmark; other rows stay")
    parser.add_argument("--quick", action="store_true", help="fewer runs and models; results are not written")
    parser.add_argument(
        "--set", nargs="+", default=[], type=pair, metavar="NAME=N", help="settings of one benchmark, as images=60000"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every engine (default 1)")
    parser.add_argument("--list", action="store_true", help="show what there is")
    return parser.parse_args(arguments)


def pair(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"write {word}=N")
    return name, value


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


def resumed(module: ModuleType, quick: bool, changes: Mapping[str, int] = {}) -> list[dict[str, Any]]:
    """The rows of a benchmark whose ``jobs`` are many and long: each row is stored when it is finished, and those that
    are stored, with the settings of now, are not made again. A quick run stores nothing and begins anew."""
    name, size = module.NAME, module.settings(quick) | changes
    jobs = module.jobs(size)
    rows = {} if quick else {row["job"]: row for row in stored(name) if row.get("settings") == size}
    for job in [one for one in jobs if one not in rows]:
        began = time.process_time()
        made = {"job": job, "settings": size, **jobs[job](rows), "cpu_seconds": round(time.process_time() - began, 1)}
        rows[job] = json.loads(json.dumps(made))  # as it will be read
        print(f"  {job} is done ({rows[job]['cpu_seconds']:.0f} s)", flush=True)
        if not quick:
            write(record(name, list(rows.values())) | {"command": f"python -m benchmarks.run {name}"})
    return list(rows.values())


def changed(known: Mapping[str, ModuleType], names: list[str], key: str, value: str) -> int:
    """A setting as ``--set`` gives it. Raises `ValueError`, in words, where no benchmark that is run has it."""
    found = known[names[0]].settings(False) if len(names) == 1 and hasattr(known[names[0]], "settings") else {}
    numbers = [one for one, held in found.items() if isinstance(held, int)]
    if key not in numbers:
        raise ValueError(f"--set: there is no setting '{key}' here; settings: {', '.join(numbers) or 'none'}")
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"--set {key}={value}: give a number, 1 or more")
    return int(value)


def render(module: ModuleType, rows: list[dict[str, Any]]) -> str:
    if hasattr(module, "report"):
        return module.report(rows)
    cells = [[form(row.get(key)) for key, _, form in module.COLUMNS] for row in rows]
    return table([heading for _, heading, _ in module.COLUMNS], cells, left=getattr(module, "LEFT", (0,)))


def load(name: str) -> dict[str, Any]:
    """The kept results of a benchmark."""
    from benchmarks.results_format import path_of

    return json.loads(path_of(name).read_text())


if __name__ == "__main__":
    sys.exit(main())
