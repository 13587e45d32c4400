"""One onnxruntime session in a process of its own: does the provider start, and what memory does a run take.

Run as `python -m splitfx.export.probe '{"provider": ..., "model": ..., "inputs": ..., "threads": ...}'`, with
`"default_options": true` for onnxruntime's own session options; answers with one JSON line. A fresh process
because allocators keep what earlier runs took, so a second measurement shows less or nothing, and because
onnxruntime reports a provider that does not start only on stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# y = Identity(x) on float[1], a serialised ModelProto (IR version 8, opset 17); spares the onnx package.
TINY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a"
    "0a08080112040a020801620f0a0179120a0a08080112040a02080142040a001011"
)
CUDA = "CUDAExecutionProvider"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"started": bool}; with a model also load_bytes, peak_bytes or peak_why (see `_host` and `_gpu`)."""
    import onnxruntime as ort

    if request["provider"] == CUDA:
        import torch  # noqa: F401 - its CUDA libraries are the ones that preload_dlls finds

        ort.preload_dlls()
    if "model" not in request:
        session = _session(TINY, request)
        return {"started": session.get_providers()[0] == request["provider"]}
    feed = _arrays(request["inputs"])
    return _gpu(request, feed) if request["provider"] == CUDA else _host(request, feed)


def _session(model: Any, request: dict[str, Any]) -> Any:
    import onnxruntime as ort

    from splitfx.export.sessions import CPU, session_options

    options = session_options(request.get("threads"))
    if request.get("default_options"):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = request.get("threads") or 0, 3
    chosen: list[Any] = [(request["provider"], request.get("provider_options", {}))]
    chosen += [] if request["provider"] == CPU else [CPU]
    return ort.InferenceSession(model, sess_options=options, providers=chosen)


def _arrays(path: str) -> dict[str, Any]:
    import numpy

    with numpy.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _host(request: dict[str, Any], feed: dict[str, Any]) -> dict[str, Any]:
    """load_bytes: resident growth by loading the model; peak_bytes: the most that the first run added to
    that.
    """
    before = _status("VmRSS")
    session = _session(request["model"], request)
    _trim()
    loaded = _status("VmRSS")
    found = {"started": True, "load_bytes": max(0, loaded - before)}
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counter starts again from here
    except OSError as error:
        return {**found, "peak_why": f"this system keeps no resettable peak counter ({error.strerror})"}
    session.run(None, feed)
    return {**found, "peak_bytes": max(0, _status("VmHWM") - loaded)}


def _gpu(request: dict[str, Any], feed: dict[str, Any]) -> dict[str, Any]:
    """peak_bytes: GPU memory taken by the run, beyond load_bytes taken by loading; the arena never gives
    back.
    """
    import torch

    free = torch.cuda.mem_get_info()[0]
    session = _session(request["model"], request)
    loaded = torch.cuda.mem_get_info()[0]
    session.run(None, feed)
    after = torch.cuda.mem_get_info()[0]
    return {
        "started": session.get_providers()[0] == CUDA,
        "load_bytes": free - loaded,
        "peak_bytes": loaded - after,
    }


def _status(field: str) -> int:
    """Bytes of one memory line of /proc/self/status; OSError where there is none (not Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _trim() -> None:
    """Return what loading freed, or the run would refill it unseen. glibc only; elsewhere the peak reads
    low.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
