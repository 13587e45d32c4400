"""One onnxruntime session in a process of its own: whether the provider starts, what the file computes, how long that
takes and what memory.

Run as `python -m splitfx.export.probe '{"provider": ..., "model": ..., ...}'` by `sessions.probe`. Writes the outputs
into a file, says on stdout what it is at, line by line, and last what it found, as JSON. A fresh process because a file
from elsewhere may crash onnxruntime or never end, because allocators keep what earlier runs took, so that a second
measurement shows less or nothing, and because onnxruntime reports a provider that does not start only on stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splitfx.errors import SplitfxError
from splitfx.export import sessions
from splitfx.export.sessions import CPU, CUDA
from splitfx.ground.timing import took

# y = Identity(x) on float[1], a serialised ModelProto (IR version 8, opset 17); spares the onnx package.
TINY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a"
    "0a08080112040a020801620f0a0179120a0a08080112040a02080142040a001011"
)
WARM_UP = 3


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"started": bool}; with a model also what `_checked` finds, or {"why": what onnxruntime says to it}."""
    if "model" not in request:
        return {"started": _starts(request)}
    try:
        return _checked(request)
    except SplitfxError as error:
        return {"why": str(error)}


def _starts(request: dict[str, Any]) -> bool:
    import onnxruntime as ort

    if request["provider"] == CUDA:
        import torch  # noqa: F401 - its CUDA libraries are the ones that preload_dlls finds

        ort.preload_dlls()
    chosen: list[Any] = [(request["provider"], request.get("provider_options", {})), CPU]
    session = ort.InferenceSession(TINY, sess_options=sessions.session_options(), providers=chosen)
    return bool(session.get_providers()[0] == request["provider"])


def _checked(request: dict[str, Any]) -> dict[str, Any]:
    """names and number of the outputs; load_bytes, peak_bytes or peak_why (see `_host` and `_gpu`); times of the
    ``runs`` in milliseconds; tiles; fallback: nodes that ran on another provider."""
    path, provider, runs = Path(request["model"]), request["provider"], request.get("runs", 0)
    arrays = _arrays(request["inputs"])
    measured = {CUDA: _gpu, CPU: _host}.get(provider, _unmeasured)
    session, feed, outputs, answer = measured(request, arrays)
    if "outputs" in request:
        import numpy

        numpy.savez(request["outputs"], allow_pickle=False, **{str(i): one for i, one in enumerate(outputs)})
    answer |= {"names": [one.name for one in session.get_outputs()], "tiles": sessions.tiles(session)}
    if runs:
        _say("timing")
        answer["times"] = timed(_runner(session, feed, provider), runs)
    if runs and provider != CPU:
        _say("looking for nodes that fell back")
        answer["fallback"] = _fallback(path, request, feed)
    return answer


def _say(stage: str) -> None:
    print(stage, flush=True)


def _opened(request: dict[str, Any]) -> Any:
    import onnxruntime as ort

    _say("loading")
    options = sessions.session_options(request.get("threads"))
    if request.get("default_options"):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = request.get("threads") or 0, 3
    return sessions.open_session(Path(request["model"]), request["provider"], options)


def _arrays(path: str) -> list[Any]:
    import numpy

    with numpy.load(path, allow_pickle=False) as stored:
        return [stored[name] for name in stored.files]


def _run(request: dict[str, Any], session: Any, arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """The inputs by name, and the outputs of a first run."""
    path = Path(request["model"])
    feed = sessions.fed(session, request["keywords"], arrays, path)
    _say("the first run")
    return feed, sessions.ran(session, feed, path)


Measured = tuple[Any, dict[str, Any], list[Any], dict[str, Any]]


def _unmeasured(request: dict[str, Any], arrays: list[Any]) -> Measured:
    session = _opened(request)
    feed, outputs = _run(request, session, arrays)
    return session, feed, outputs, {"peak_why": f"not measured for {sessions.short_name(request['provider'])}"}


def _host(request: dict[str, Any], arrays: list[Any]) -> Measured:
    """load_bytes: resident growth by loading the model; peak_bytes: the most that the first run added to
    that.
    """
    before = _status("VmRSS")
    session = _opened(request)
    _trim()
    loaded = _status("VmRSS")
    memory: dict[str, Any] = {"load_bytes": max(0, loaded - before)}
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counter starts again from here
    except OSError as error:
        memory["peak_why"] = f"this system keeps no resettable peak counter ({error.strerror})"
    feed, outputs = _run(request, session, arrays)
    if "peak_why" not in memory:
        memory["peak_bytes"] = max(0, _status("VmHWM") - loaded)
    return session, feed, outputs, memory


def _gpu(request: dict[str, Any], arrays: list[Any]) -> Measured:
    """peak_bytes: GPU memory taken by the run, beyond load_bytes taken by loading; the arena never gives
    back.
    """
    import torch

    free = torch.cuda.mem_get_info()[0]
    session = _opened(request)
    loaded = torch.cuda.mem_get_info()[0]
    feed, outputs = _run(request, session, arrays)
    after = torch.cuda.mem_get_info()[0]
    return session, feed, outputs, {"load_bytes": free - loaded, "peak_bytes": loaded - after}


def _status(field: str) -> int:
    """Bytes of one memory line of /proc/self/status; 0 where there is none (not Linux), whose peak is not shown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def _trim() -> None:
    """Return what loading freed, or the run would refill it unseen. glibc only; elsewhere the peak reads
    low.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _runner(session: Any, feed: dict[str, Any], provider: str) -> Callable[[], Any]:
    """One run; on a GPU the inputs already lie there and the outputs stay, as they do for torch."""
    if provider != CUDA:
        return lambda: session.run(None, feed)
    value = sessions.runtime().OrtValue
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, value.ortvalue_from_numpy(array, "cuda", 0))
    for one in session.get_outputs():
        binding.bind_output(one.name, "cuda", 0)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def timed(run: Callable[[], Any], runs: int) -> list[float]:
    """Milliseconds of each run, after some to warm up."""
    for _ in range(WARM_UP):
        run()
    return [took(run) * 1e3 for _ in range(runs)]


def _fallback(path: Path, request: dict[str, Any], feed: dict[str, Any]) -> list[str]:
    """Nodes that onnxruntime's own profile shows on another provider."""
    options = sessions.session_options(request.get("threads"))
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(request["inputs"]).with_name("profile"))
    session = sessions.open_session(path, request["provider"], options)
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = {}
    for event in events:
        where = event.get("args", {}).get("provider", request["provider"])
        if event.get("cat") == "Node" and where and where != request["provider"]:
            node = event["name"].removesuffix("_kernel_time")
            nodes[node] = f"{node} ({event['args'].get('op_name', '?')} on {sessions.short_name(where)})"
    return list(nodes.values())


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
