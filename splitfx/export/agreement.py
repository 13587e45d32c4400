"""Does a file compute what a graph computes: the one tolerance table, and the check that `export_onnx` makes.

Does: runs a written file on onnxruntime's CPU provider beside the graph, on random inputs of the traced sizes, and with
another batch where the file leaves it free.
Refuses (`ExportError`): a difference beyond the table, named by its output and, where one is found, by the first layer
that differs; a file that onnxruntime cannot run; outputs that random inputs say nothing about, because rounding alone
moves them.
Promises: two runs of each; more are made only to find the words for a refusal. The graph is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.errors import ExportError, UnsupportedError
from splitfx.export import sessions
from splitfx.export.following import NEAR, Call, other_sizes
from splitfx.export.report import OutputError
from splitfx.ground.difference import apart
from splitfx.ground.exclusive import reseed
from splitfx.ir import graph as graphs

# Largest error allowed, relative to the output's largest absolute value; other dtypes must be equal.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NUDGE = 8  # units in the last place by which inputs are moved to see what rounding does to an output
STEADY = 1e-2  # an output that rounding moves by more than this part of its largest value says nothing
SHOWN = 2**30  # bytes of inner values that are looked at to name a layer
Programs = tuple[torch.export.ExportedProgram, torch.export.ExportedProgram]
UNCHECKED = "pass verify=False to write it unchecked"


def difference(name: str, got: torch.Tensor, want: torch.Tensor) -> OutputError:
    """Infinite where one side has an inf or nan that the other has not, and relative to nothing but zeros."""
    far, largest = apart(got, want)
    relative = 0.0 if far == 0 else far / largest if largest else math.inf
    return OutputError(name, tuple(want.shape), far, relative)


def fault(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float | None = None) -> tuple[OutputError, str]:
    """How far an output is off, and what is wrong with it ("" where nothing is)."""
    if got.shape != want.shape or got.dtype != want.dtype:
        never = OutputError(name, tuple(want.shape), math.inf, math.inf)
        return never, f"{name} is {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}"
    one = difference(name, got, want)
    allowed = TOLERANCE.get(want.dtype, 0.0) if tolerance is None else tolerance
    if one.max_rel <= allowed and (allowed or torch.equal(got, want)):
        return one, ""
    return one, f"{name} is off by {one.max_rel:.1e} of its largest value (allowed {allowed:.0e})"


# ---------------------------------------------------------------- the check of an export


def require_agreement(path: Path, graph: fx.GraphModule, programs: Programs, key: str) -> None:
    """`ExportError` unless the file computes what the graph does.

    programs: the exported one and what the exporter made of it; nodes carry their layer under ``key`` of their
    meta["custom"].
    """
    graph = graphs.copy_graph(graph, share=True, apart=graph.buffers()).eval()  # one may count its calls
    session = _opened(path)
    call = graphs.random_inputs(graph)
    _require(path, session, graph, call, programs, key)
    larger = _larger(path, session, graph, call)
    if larger is not None:
        _require(path, session, graph, larger, programs, key)


def _opened(path: Path) -> Any:
    try:
        return sessions.open_session(path, sessions.CPU, sessions.session_options(torch.get_num_threads()))
    except ExportError as error:
        said = str(error).replace(str(path), "it")
        raise ExportError(f"{path.name} was not written, because it cannot be checked: {said}; {UNCHECKED}.") from error


def _require(path: Path, session: Any, graph: fx.GraphModule, call: Call, programs: Programs, key: str) -> None:
    want = outputs(graph, *call)
    got = _run(path, session, call)
    names = [one.name for one in session.get_outputs()]
    if len(got) != len(want):
        raise ExportError(f"{path.name} was not written: it has {len(got)} outputs, the graph {len(want)}.")
    for index, name in enumerate(names):
        wrong = fault(name, got[index], want[index])[1]
        if not wrong:
            continue
        noise = _noise(graph, call, want, index)
        if noise > STEADY:
            raise ExportError(
                f"{path.name} was not written: its output {name} cannot be checked on random inputs, because rounding "
                f"alone, or numbers that the model draws, change {noise:.0%} of it; {UNCHECKED}, and call check_onnx "
                "with inputs of your own."
            )
        if _off(got[index], want[index]) > 4 * noise:
            where = _place(path, programs, call, key)
            raise ExportError(
                f"{path.name} was not written: onnxruntime does not compute what the graph does. {wrong}{where}; "
                f"{UNCHECKED}."
            )


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The output tensors of a module in eval mode, on the CPU."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        result = model(*args, **kwargs)
    return [leaf.detach().cpu() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _run(path: Path, session: Any, call: Call, wanted: Sequence[str] | None = None) -> list[torch.Tensor]:
    try:
        found = session.run(wanted, sessions.feeds(session, *call, path))
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        said = str(error) if isinstance(error, ExportError) else sessions._sentence(error)
        raise ExportError(f"{path.name} was not written, onnxruntime cannot run it: {said}; {UNCHECKED}.") from error
    return [torch.as_tensor(one) for one in found]


def _larger(path: Path, session: Any, graph: fx.GraphModule, call: Call) -> Call | None:
    """Inputs with another batch, one that the graph takes; None where the file's batch is fixed."""
    if all(isinstance(size, int) for one in session.get_inputs() for size in one.shape):
        return None
    for larger in other_sizes(graph, NEAR):
        try:
            sessions.feeds(session, *larger, path)
            outputs(graph, *larger)
        except (ExportError, RuntimeError, ValueError, TypeError, UnsupportedError):
            continue  # sizes that the file fixes, or a graph that takes multiples of its batch only
        return larger
    raise ExportError(
        f"{path.name} was not written: its batch is free, and the graph takes no other than the traced one; "
        "pass dynamic_batch=False."
    )


# ---------------------------------------------------------------- the words of a refusal


def _off(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference relative to the largest value; of whole numbers and flags, the share that differs."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if want.dtype.is_floating_point or want.dtype.is_complex:
        return difference("", got, want).max_rel
    return float((got != want).double().mean()) if want.numel() else 0.0


def _noise(graph: fx.GraphModule, call: Call, want: list[torch.Tensor], index: int) -> float:
    """How far rounding alone moves an output: inputs and weights a few units in the last place away give another."""
    generator, worst = torch.Generator().manual_seed(2), 0.0

    def nudged(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            return value
        step = NUDGE * torch.finfo(value.dtype).eps
        sign = torch.randint(-1, 2, value.shape, generator=generator).to(value.device, value.dtype)
        return (value.detach() * (1 + step * sign)).to(value.dtype)

    for _ in range(3):
        args, kwargs = pytree.tree_map(nudged, call)
        weights = {name: nudged(p) for name, p in graph.named_parameters()}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            reseed(int(torch.randint(2**31, (), generator=generator)))  # a model that draws, draws others
            found = pytree.tree_leaves(torch.func.functional_call(graph, weights, args, kwargs))
        moved = [leaf.detach().cpu() for leaf in found if isinstance(leaf, torch.Tensor)][index]
        worst = max(worst, _off(moved, want[index]))
    return worst


def _place(path: Path, programs: Programs, call: Call, key: str) -> str:
    """`, first in <layer>`: the first that the exporter's decomposition makes another, else the first that the file
    has otherwise; "" where there is none, or to look would take too much memory."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    held = {name for node in model.graph.node for name in node.output}
    if sum(_bytes(node) for program in programs for node in program.graph.nodes) > SHOWN:
        return ""
    exported, decomposed = (_values(program, call) for program in programs)
    before, after = ({_layer(node, key): value for node, value in found.items()} for found in (exported, decomposed))
    for layer, value in before.items():  # the last value of each
        if layer and layer in after and fault("", after[layer], value)[1]:
            return f", first in {layer}"
    shown = [node for node in decomposed if node.name in held and _layer(node, key)]
    present = {one.name for one in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=node.name) for node in shown if node.name not in present)
    probed = path.with_name(f"shown-{path.name}")  # beside the file, whose weights may lie in another one there
    onnx.save(model, str(probed))
    got = _run(path, _opened(probed), call, [node.name for node in shown]) if shown else []
    for node, value in zip(shown, got, strict=True):
        if fault("", value, decomposed[node])[1]:
            return f", first in {_layer(node, key)}"
    return ""


def _layer(node: fx.Node, key: str) -> str:
    return str(node.meta.get("custom", {}).get(key, ""))


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return value.element_size() * math.prod(size if isinstance(size, int) else 4 for size in value.shape)


def _values(program: torch.export.ExportedProgram, call: Call) -> dict[fx.Node, torch.Tensor]:
    """Every tensor that an exported program computes, in order."""
    seen: dict[fx.Node, torch.Tensor] = {}

    class Seeing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and n.op == "call_function" and n.users:
                seen[n] = value.detach().cpu()
            return value

    user = iter(pytree.tree_leaves(call))
    held = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    with torch.no_grad():
        Seeing(program.graph_module).run(*(held[s.target] if s.target is not None else next(user) for s in specs))
    return seen
