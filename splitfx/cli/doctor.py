"""What is installed here, what really starts, and what to do about what does not.

Does: versions, the two onnxruntime distributions that overwrite each other, providers compiled in and
providers that start (a one-node model in a fresh process), GPU, threads, memory.
Refuses: nothing; a package that cannot be imported is a finding, not an error.
Promises: changes nothing, and names the next step for every problem.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    "splitfx",
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "safetensors",
)
NEEDED = ("torch", "safetensors")
FOR_ONNX = ("onnx", "onnxscript")
GPU_PACKAGE = "onnxruntime-gpu[cuda,cudnn]"


@dataclass(frozen=True)
class Provider:
    """An execution provider of onnxruntime: `starts`, and `why` not."""

    name: str
    starts: bool
    why: str = ""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the next step. `serious`: something that splitfx offers does not work because of
    it.
    """

    what: str
    do: str
    serious: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """The findings of `diagnose`. `ok` when no problem is serious. Memory in bytes; None where unknown."""

    python: str
    system: str
    packages: dict[str, str | None]
    providers: tuple[Provider, ...]
    gpu: str | None
    threads: int | None
    cores: int | None
    memory: int | None
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not any(one.serious for one in self.problems)

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "ok": self.ok}, indent=2)

    def __str__(self) -> str:
        memory = "unknown" if self.memory is None else f"{self.memory / 2**30:.1f} GiB"
        facts = [("python", self.python), ("system", self.system)]
        facts += [(name, version or "not installed") for name, version in self.packages.items()]
        facts += [("GPU", self.gpu or "none visible to torch")]
        facts += [
            ("CPU", f"{self.cores} cores, torch uses {self.threads or '?'} threads"),
            ("free memory", memory),
        ]
        facts += [(f"provider {one.name}", "starts" if one.starts else one.why) for one in self.providers]
        width = max(len(name) for name, _ in facts)
        lines = [f"{name.ljust(width)}  {text}" for name, text in facts]
        for one in self.problems:
            lines += ["", f"{'PROBLEM' if one.serious else 'note'}: {one.what}", f"  do: {one.do}"]
        lines += [
            "",
            "everything works" if not self.problems else "works, with notes" if self.ok else "NOT ok",
        ]
        return "\n".join(lines)


def diagnose() -> Diagnosis:
    """Look at this installation. Takes a few seconds: each provider is started once in a fresh process."""
    packages = {name: _version(name) for name in PACKAGES}
    torch = _module("torch")
    gpu = torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None
    providers = _providers(gpu) if torch is not None else ()
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        providers=providers,
        gpu=gpu,
        threads=None if torch is None else torch.get_num_threads(),
        cores=_cores(),
        memory=_memory(),
        problems=tuple(_problems(packages, providers, gpu)),
    )


def _providers(gpu: str | None) -> tuple[Provider, ...]:
    """CPU and CUDA, the two that splitfx is tested on, and whatever else is compiled in, without starting
    it.
    """
    from splitfx.errors import MissingExtraError
    from splitfx.export import sessions

    try:
        built_in = sessions.runtime().get_available_providers()
    except MissingExtraError:
        return ()
    found = []
    for name in sorted({*built_in, sessions.CPU, sessions.CUDA}):
        if name in (sessions.CPU, sessions.CUDA):
            why = sessions.why_not(name)
            found.append(Provider(sessions.short_name(name), not why, why))
        else:
            found.append(Provider(sessions.short_name(name), False, "built in, not tried"))
    return tuple(found)


def _problems(packages: dict[str, str | None], providers: tuple[Provider, ...], gpu: str | None) -> list[Problem]:
    problems = [
        Problem(f"{name} is not installed", f"pip install {name}")
        for name in (*NEEDED, *FOR_ONNX)
        if not packages[name]
    ]
    both = packages["onnxruntime"] and packages["onnxruntime-gpu"]
    neither = not packages["onnxruntime"] and not packages["onnxruntime-gpu"]
    if neither:
        problems.append(
            Problem("onnxruntime is not installed", f"pip install '{GPU_PACKAGE}', or onnxruntime without a GPU")
        )
    elif both:
        problems.append(_both())
    elif not providers:
        keep = "onnxruntime-gpu" if packages["onnxruntime-gpu"] else "onnxruntime"
        problems.append(
            Problem(
                "onnxruntime is installed but cannot be used: its twin was removed, or a library is missing",
                f"pip install --force-reinstall --no-deps {keep}",
            )
        )
    started = {one.name: one for one in providers}
    if "cpu" in started and not started["cpu"].starts:
        problems.append(
            Problem(f"onnxruntime's CPU provider does not start: {started['cpu'].why}", "reinstall onnxruntime")
        )
    if gpu and "cuda" in started and not started["cuda"].starts:
        problems.append(_no_cuda(packages, started["cuda"].why))
    if not gpu:
        problems.append(
            Problem(
                "no GPU is visible to torch, so everything runs on the CPU",
                "nothing, if this machine has none; else check nvidia-smi and that torch is a CUDA build",
                serious=False,
            )
        )
    return problems


def _both() -> Problem:
    return Problem(
        "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other's files",
        f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install '{GPU_PACKAGE}'",
    )


def _no_cuda(packages: dict[str, str | None], why: str) -> Problem:
    if not packages["onnxruntime-gpu"]:
        return Problem(
            "there is a GPU, but the onnxruntime installed runs on the CPU only",
            f"pip uninstall -y onnxruntime && pip install '{GPU_PACKAGE}'",
        )
    return Problem(
        f"onnxruntime's CUDA provider does not start: {why}",
        f"pip install '{GPU_PACKAGE}' (torch does not bring every library that it links against)",
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a shared library of the package is missing
        return None


def _cores() -> int | None:
    """Cores that this process may use, which a container or taskset can make fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _memory() -> int | None:
    """Memory that is free for use now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
