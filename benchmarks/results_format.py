"""The one results format: what was run, when, on what, and its rows; no names or paths of the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from splitfx.ground.files import written_whole

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("splitfx", "torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy")


def record(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows with date, host, versions and the command that makes them again."""
    command = ["python -m benchmarks.run", *(a for a in sys.argv[1:] if not a.startswith("/"))]
    return {
        "format": FORMAT,
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "command": " ".join(command),
        "host": host(),
        "versions": versions(),
        "rows": rows,
    }


def kept_beside(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of some models, dated, and the stored rows of the others, in the order in which they were."""
    before = stored(name)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    fresh = {row["model"]: [one | {"date": today} for one in rows if one["model"] == row["model"]] for row in rows}
    names = dict.fromkeys([row["model"] for row in before] + list(fresh))
    return [row for model in names for row in fresh.get(model) or [o for o in before if o["model"] == model]]


def stored(name: str) -> list[dict[str, Any]]:
    """The kept rows of a benchmark; none where it has not been run."""
    return json.loads(path_of(name).read_text())["rows"] if path_of(name).exists() else []


def write(result: dict[str, Any], path: Path | None = None) -> str:
    target = path or path_of(result["name"])
    target.parent.mkdir(exist_ok=True)
    with written_whole(target, overwrite=True) as draft:
        draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return str(target.relative_to(Path.cwd())) if target.is_relative_to(Path.cwd()) else target.name


def path_of(name: str) -> Path:
    return RESULTS / f"{name}.json"


def host() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return named[0] if named else platform.processor() or "unknown"
