"""Opening an ONNX file on exactly one onnxruntime provider, and saying why that cannot be done.

Does: short provider names, the session options splitfx recommends, sessions that never fall back to another
provider unseen, inputs checked against the file before they are fed.
Refuses: unknown providers, unreadable files, inputs that do not fit the file (`ExportError`).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from splitfx.errors import ExportError, MissingExtraError, nearest

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Memory that follows the need instead of powers of two, and full float32 instead of TF32.
CUDA_OPTIONS = {
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_use_max_workspace": "0",
    "use_tf32": "0",
}
PROBE_SECONDS = 300


def runtime() -> Any:
    """The onnxruntime module; `MissingExtraError` when it is not installed or broken."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(f"onnxruntime cannot be imported ({error}); see `splitfx doctor`.") from None
    if not hasattr(onnxruntime, "InferenceSession"):
        # What is left when onnxruntime and onnxruntime-gpu were both installed and one was removed.
        raise MissingExtraError("onnxruntime is installed incompletely; see `splitfx doctor` for the repair.")
    return onnxruntime


def session_options(threads: int | None = None) -> Any:
    """onnxruntime.SessionOptions that keep peak memory near what the graph needs.

    threads: intra-op threads; None leaves onnxruntime's choice (one per core).

    `enable_mem_reuse` and `enable_mem_pattern` are off: the reuse planner holds buffers until their last
    re-user and matches only equal shapes, which costs more than it saves once a graph runs in many parts, and
    the pattern takes one block for everything from the second run on. The arena stays on: without it runs are
    slower and hold more.
    Warnings of the graph optimiser are silenced; errors are not. Raises `MissingExtraError` without
    onnxruntime.
    """
    options = runtime().SessionOptions()
    options.enable_mem_reuse = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def full_name(provider: str) -> str:
    """`cuda` -> `CUDAExecutionProvider`; full names pass. Raises `ExportError` for a name onnxruntime does
    not know.
    """
    names = {one.removesuffix("ExecutionProvider").lower(): one for one in runtime().get_all_providers()}
    wanted = str(provider).removesuffix("ExecutionProvider").lower()
    if wanted not in names:
        raise ExportError(
            f"onnxruntime has no provider '{provider}'.{nearest(wanted, names)} Known: {', '.join(names)}."
        )
    return names[wanted]


def short_name(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider").lower()


def worth_checking() -> tuple[str, ...]:
    """CPU, and CUDA first when it starts, or when there is a GPU and it should."""
    if CUDA not in runtime().get_available_providers():
        return (CPU,)
    return (CUDA, CPU) if gpu_visible() or not why_not(CUDA) else (CPU,)


def gpu_visible() -> bool:
    import torch

    return torch.cuda.is_available()


@functools.cache
def why_not(provider: str) -> str:
    """Why the provider does not start here, or "". Tried once, in a fresh process, on a one-node model."""
    if provider == CPU:
        return ""
    if provider not in runtime().get_available_providers():
        return f"this onnxruntime is built without {provider}"
    if provider == CUDA and not gpu_visible():
        return "no NVIDIA GPU is visible (torch.cuda.is_available() is False)"
    return str(probe({"provider": provider, "provider_options": provider_options(provider)}).get("why", ""))


def provider_options(provider: str) -> dict[str, str]:
    return dict(CUDA_OPTIONS) if provider == CUDA else {}


def probe(request: Mapping[str, Any], seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """Run `splitfx.export.probe` in a fresh process; its answer, or {"why": what went wrong}, with "late": what it was
    at, when its time was up."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "splitfx.export.probe", json.dumps(request)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        stages = (error.stdout or b"").decode(errors="replace").splitlines()
        return {
            "why": f"no answer from a fresh process within {seconds:g} s",
            "late": stages[-1] if stages else "start",
        }
    except OSError as error:
        return {"why": f"no fresh process could be started: {error.strerror or error}"}
    log = done.stderr.decode(errors="replace")
    if done.returncode < 0:
        return {"why": f"onnxruntime's process was ended by signal {-done.returncode}, by a crash or for its memory"}
    if done.returncode != 0:
        lines = log.strip().splitlines()
        return {"why": lines[-1] if lines else f"a fresh process ended with code {done.returncode}"}
    answer = json.loads(done.stdout.decode().strip().splitlines()[-1])
    if answer.get("started") is False:
        answer["why"] = start_failure(log)
    return answer


def start_failure(log: str) -> str:
    """What onnxruntime's log says about a provider that did not start, shortened to its cause."""
    for line in log.splitlines():
        before, found, _ = line.partition(": cannot open shared object file")
        if found:
            return f"the library {before.split()[-1]} is missing"
    errors = [line for line in log.splitlines() if "[E:" in line or "Error" in line]
    return errors[-1].rpartition("] ")[2][:200] if errors else "onnxruntime fell back to the CPU without a reason"


def open_session(path: Path, provider: str, options: Any) -> Any:
    """An InferenceSession of the file whose first provider is `provider`. Raises `ExportError`."""
    ort = runtime()
    if not path.is_file():
        raise ExportError(f"there is no file {path}; write it with export_onnx.")
    if provider == CUDA:
        import torch  # noqa: F401 - brings the CUDA libraries that preload_dlls and the provider link against

        ort.preload_dlls()
    asked: list[Any] = [(provider, provider_options(provider))]
    asked += [] if provider == CPU else [CPU]  # operations without a kernel there; they are listed as fallback
    try:
        session = ort.InferenceSession(str(path), sess_options=options, providers=asked)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise ExportError(f"onnxruntime cannot load {path}: {_sentence(error)}") from error
    if session.get_providers()[0] != provider:
        raise ExportError(f"onnxruntime fell back from {short_name(provider)} to {session.get_providers()[0]}.")
    return session


def ran(session: Any, feed: Mapping[str, Any], path: Path) -> list[Any]:
    """The outputs of one run. Raises `ExportError`."""
    try:
        return session.run(None, feed)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise ExportError(f"onnxruntime cannot run {path.name}: {_sentence(error)}") from error


def tiles(session: Any) -> tuple[str, ...]:
    """What the tiled stages of an exported graph became in its file; nothing where it has none, or is not ours."""
    try:
        text = session.get_modelmeta().custom_metadata_map.get("splitfx", "{}")
        return tuple(msgspec.json.decode(text, type=_Metadata).tiles)
    except (ValueError, RecursionError):
        return ()  # another program's entry of this name


class _Metadata(msgspec.Struct):
    tiles: Annotated[list[Annotated[str, msgspec.Meta(max_length=4096)]], msgspec.Meta(max_length=10_000)] = []


def feeds(session: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Input name -> numpy array: keyword tensors by name, the others in order. Raises `ExportError` naming
    the input.
    """
    return fed(session, *flat(args, kwargs), path)


def flat(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    """The tensors of a call as arrays, in order, and the keyword of each that is a keyword argument itself, else ""."""
    import torch
    from torch.utils import _pytree as pytree

    given = [("", one) for one in pytree.tree_leaves(args)]
    for key, value in kwargs.items():
        given += [(key if value is one else "", one) for one in pytree.tree_leaves(value)]
    tensors = [(key, one) for key, one in given if isinstance(one, torch.Tensor)]
    return [key for key, _ in tensors], [_array(one) for _, one in tensors]


def _array(tensor: Any) -> Any:
    try:
        return tensor.detach().cpu().numpy()
    except TypeError:
        raise ExportError(f"an input of {tensor.dtype} has no numpy form to feed onnxruntime with.") from None


def matched(session: Any, keywords: Sequence[str], path: Path) -> list[str]:
    """The file's name for each tensor of a call (see `flat`). Raises `ExportError` where their number is another."""
    wanted = [one.name for one in session.get_inputs()]
    free = [name for name in wanted if name not in keywords]
    others = [key for key in keywords if key not in wanted]
    if len(free) != len(others):
        names, given = ", ".join(wanted) or "none", len(keywords)
        raise ExportError(f"{path.name} takes {len(wanted)} inputs ({names}); {given} were given.")
    rest = iter(free)
    return [key if key in wanted else next(rest) for key in keywords]


def fed(session: Any, keywords: Sequence[str], arrays: Sequence[Any], path: Path) -> dict[str, Any]:
    wanted = {one.name: one for one in session.get_inputs()}
    names = matched(session, keywords, path)
    return {name: _fitting(wanted[name], array, path) for name, array in zip(names, arrays, strict=True)}


def _fitting(wanted: Any, array: Any, path: Path) -> Any:
    kind = _TYPES.get(wanted.type, wanted.type)
    sizes = wanted.shape
    same = len(sizes) == array.ndim and all(
        not isinstance(a, int) or a == b for a, b in zip(sizes, array.shape, strict=True)
    )
    if not same or str(array.dtype) != kind:
        needs = f"{kind} [{', '.join(map(str, sizes))}]"
        raise ExportError(f"input '{wanted.name}' of {path.name} is {needs}; given {array.dtype} {list(array.shape)}.")
    return array


_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    **{f"tensor({one})": one for one in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
