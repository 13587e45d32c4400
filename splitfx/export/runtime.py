"""Check an ONNX file against the module it came from, on every provider asked for.

Does: parity per output, latency beside torch's, peak memory of a run, nodes that fell back. The file, which may come
from anywhere, is only ever run in a process of its own (`probe`), for a limited time.
Refuses: missing or unreadable files, files that do not end in time, inputs that do not fit, a required provider that
does not start (`ExportError`).
Promises: a provider never stands in for another: one that does not start is "unavailable: why", and `ok` is
False. The module's weights and train/eval flags are as before.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from splitfx.errors import ExportError
from splitfx.export import agreement, sessions
from splitfx.export.probe import timed
from splitfx.export.report import OutputError, ProviderRow, RuntimeReport
from splitfx.ground.progress import Say, say, told
from splitfx.ground.timing import p90
from splitfx.ir import graph as graphs
from splitfx.ir.modes import in_eval
from splitfx.text import first_line

SECONDS = 600.0


@told
def check_onnx(
    split: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    providers: Sequence[str] | None = None,
    *,
    require: str | Sequence[str] = (),
    runs: int = 20,
    tolerance: float | None = None,
    seconds: float = SECONDS,
    progress: Say = True,
) -> RuntimeReport:
    """Run the file on each provider and compare it with `split` in eval mode.

    - example_inputs: a tensor, a tuple, a dict of keyword inputs or ((...), {...}); None takes random tensors in the
      shapes the graph was traced with, which needs the result of `trace` or `transform` (or of `load`).
    - providers: short names such as ("cuda", "cpu"); None takes the CPU, and CUDA where it starts or there is
      a GPU.
    - require: providers that must start, or `ExportError` before anything is measured; they are checked too.
    - runs: timed runs per provider, after 3 to warm up.
    - tolerance: largest error relative to an output's largest absolute value; None means 1e-9 for float64,
      1e-4 for float32, 2e-2 for float16; integers and booleans must be equal.
    - seconds: the most that loading the file and all its runs may take on one provider.

    Raises `ExportError` for a missing, truncated or foreign file, one that takes longer or ends the process that runs
    it, inputs that do not fit and unknown providers.
    """
    if isinstance(path, nn.Module):
        raise ExportError("check_onnx takes the model first, then the file.")
    target = Path(path)
    if not target.is_file():
        raise ExportError(f"there is no file {target}; write it with export_onnx.")
    if runs < 1:
        raise ExportError(f"runs must be at least 1; got {runs}.")
    if not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
        raise ExportError(f"seconds must be a number above 0; got {seconds!r}.")
    required = [sessions.full_name(one) for one in ([require] if isinstance(require, str) else require)]
    named = [sessions.full_name(one) for one in ([providers] if isinstance(providers, str) else providers or ())]
    for provider in required:
        if why := sessions.why_not(provider):
            raise ExportError(f"{sessions.short_name(provider)} is required and does not start: {why}.")
    chosen = list(dict.fromkeys([*required, *(named or sessions.worth_checking())]))

    say("running the module")
    args, kwargs = _call(split, example_inputs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    expected = _outputs(split, args, kwargs)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="splitfx-check-") as folder:
        bench = _Bench(target, expected, threads, runs, tolerance, seconds, Path(folder))
        rows = [_row(bench, provider, split, (args, kwargs)) for provider in chosen]
    fed = tuple(f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in tensors)
    return RuntimeReport(str(target), fed, threads, runs, tuple(rows), tolerance)


def _call(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None:
        if not graphs.is_canonical(model):
            raise ExportError(f"{type(model).__name__} was not traced by splitfx; pass the inputs to check with.")
        return graphs.random_inputs(model)
    from splitfx.frontend.example_inputs import split_inputs

    return split_inputs(inputs, model)


def _outputs(model: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    try:
        with _evaluating(model):
            result = model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"the module does not accept these inputs: {first_line(error)}") from error
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return [leaf.detach().cpu() for leaf in leaves]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, full float32 on a GPU; every module's own flag is put back."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        with in_eval(model), torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


@dataclass(frozen=True)
class _Bench:
    """What stays the same from provider to provider."""

    path: Path
    expected: list[torch.Tensor]
    threads: int
    runs: int
    tolerance: float | None
    seconds: float
    folder: Path


def _row(bench: _Bench, provider: str, model: nn.Module, call: tuple[tuple, dict]) -> ProviderRow:
    name = sessions.short_name(provider)
    say(f"{name}: starting")
    if why := sessions.why_not(provider):
        return ProviderRow(name, f"unavailable: {why}")
    keywords, arrays = sessions.flat(*call)
    request = {
        "provider": provider,
        "provider_options": sessions.provider_options(provider),
        "threads": bench.threads,
        "model": str(bench.path.absolute()),
        "inputs": str(_stored(bench.folder / "inputs.npz", arrays)),
        "keywords": keywords,
    }
    say(f"{name}: loading, comparing and timing, in a fresh process")
    outputs = bench.folder / "outputs.npz"
    answer = _asked(bench, {**request, "outputs": str(outputs), "runs": bench.runs})
    say(f"{name}: timing torch")
    torch_times = _torch_times(model, call, provider, bench.runs)
    errors, verdict = _compared(bench, answer["names"], outputs)
    row = ProviderRow(
        name,
        verdict,
        errors,
        statistics.median(answer["times"]),
        p90(answer["times"]),
        statistics.median(torch_times) if torch_times else None,
        p90(torch_times) if torch_times else None,
        answer.get("peak_bytes"),
        answer.get("load_bytes"),
        answer.get("peak_why", ""),
        fallback=tuple(answer.get("fallback", ())),
        tiles=tuple(answer["tiles"]),
    )
    if not row.tiles or "peak_bytes" not in answer:
        return row
    say(f"{name}: peak memory with onnxruntime's default options")
    return replace(row, default_peak_bytes=_asked(bench, {**request, "default_options": True}).get("peak_bytes"))


def _stored(path: Path, arrays: Sequence[Any]) -> Path:
    import numpy

    numpy.savez(path, allow_pickle=False, **{str(i): one for i, one in enumerate(arrays)})
    return path


def _asked(bench: _Bench, request: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process found. Raises `ExportError` where it found nothing."""
    answer = sessions.probe(request, bench.seconds)
    if answer.get("late"):
        raise ExportError(
            f"{bench.path.name} is not done within {bench.seconds:g} s on {sessions.short_name(request['provider'])}, "
            f"at: {answer['late']}; pass more seconds, or check fewer runs."
        )
    if "why" in answer:
        raise ExportError(answer["why"] if bench.path.name in answer["why"] else f"{bench.path.name}: {answer['why']}")
    return answer


def _compared(bench: _Bench, names: list[str], outputs: Path) -> tuple[tuple[OutputError, ...], str]:
    import numpy

    with numpy.load(outputs, allow_pickle=False) as stored:
        actual = [torch.as_tensor(stored[name]) for name in stored.files]
    if len(actual) != len(bench.expected):
        return (), f"mismatch: the file has {len(actual)} outputs, the module {len(bench.expected)}"
    each = zip(names, actual, bench.expected, strict=True)
    faults = [agreement.fault(name, got, want, bench.tolerance) for name, got, want in each]
    wrong = [words for _, words in faults if words]
    return tuple(one for one, _ in faults), f"mismatch: {'; '.join(wrong)}" if wrong else "ok"


def _torch_times(model: nn.Module, call: tuple[tuple, dict], provider: str, runs: int) -> list[float]:
    """Eager latency on the provider's device; nothing where torch has no such device."""
    wanted = {sessions.CPU: "cpu", sessions.CUDA: "cuda"}.get(provider)
    if wanted is None or (wanted == "cuda" and not torch.cuda.is_available()):
        return []
    tensors = (*model.parameters(), *model.buffers(), *pytree.tree_leaves(call))
    here = {one.device.type for one in tensors if isinstance(one, torch.Tensor)}
    if here - {wanted}:
        model = copy.deepcopy(model).to(wanted)
        call = pytree.tree_map(lambda one: one.to(wanted) if isinstance(one, torch.Tensor) else one, call)

    def run() -> None:
        model(*call[0], **call[1])
        if wanted == "cuda":
            torch.cuda.synchronize()

    try:
        with _evaluating(model):
            return timed(run, runs)
    except RuntimeError:
        if not here - {wanted}:
            raise
        return []  # the graph makes tensors on the device it was traced on, so its copy cannot run here
