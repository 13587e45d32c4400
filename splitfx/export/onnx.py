"""Write a graph as an ONNX file, through torch's dynamo exporter.

Does: exports in eval mode from a private copy, with a dynamic batch dimension where the graph has one,
readable input and output names, the user's layer paths on the nodes, weights in a second file when they
pass 2 GB; tiled stages as loops over strips of rows (`loops`), or piece by piece for the traced sizes (`tiles`); runs
onnx.checker.
Refuses: opsets that the exporter does not write, a dynamic batch that the graph does not have, a file
already there, a file that does not compute what the graph does (`agreement`).
Promises: the split is not changed; the file holds no stack traces and no paths of this machine; a failed
export leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx import __version__
from splitfx.compiler.pipeline import figures
from splitfx.errors import ExportError, MissingExtraError
from splitfx.export import agreement, rewrites, sessions, tiles
from splitfx.export.data_files import data_name, written_with_data
from splitfx.export.following import FAR, Call, batch_symbols, follow, freed, mark, name_batch, other_sizes, unsteady
from splitfx.ground.exclusive import exclusive
from splitfx.ground.files import check_target
from splitfx.ground.progress import Say, say, told
from splitfx.ir import graph as graphs
from splitfx.report.explanation import summary
from splitfx.text import first_line

# What the exporter writes by itself and onnxruntime loads; below 18 it converts, and often fails.
OPSETS = range(18, 26)
DEFAULT_OPSET = 20
INLINE_LIMIT = 2_000_000_000  # bytes of weights; a protobuf file holds less than 2 GiB
LAYER = "splitfx.layer"  # metadata key, in the graph during export and on the nodes of the file
ASKED = "its tiled stage is written as steps for the traced sizes, on request (loops=False)"
FOLDED = "splitfx.folded"  # metadata key: the batch norm that became part of this layer
_KEPT = (LAYER, "pkg.torch.onnx.name_scopes")  # of the exporter's notes on a node; others may hold local paths


@told
def export_onnx(
    split: nn.Module,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_batch: bool | None = None,
    example_inputs: Any = None,
    loops: bool = True,
    external_data: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: Say = True,
) -> Path:
    """Write `split` to `path` as an ONNX model in eval mode, and return the path.

    - split: the result of `transform` or `trace`; another module is traced first and needs `example_inputs`.
    - opset: 18 to 25, default 20.
    - dynamic_batch: None makes dimension 0 of the inputs free where the graph allows it, and warns where it
      does not; True insists (`ExportError` when the graph's batch is fixed); False writes the sizes of
      the traced inputs.
    - example_inputs: a tensor, a tuple, a dict of keyword inputs or ((...), {...}); only for a module not
      traced yet.
    - loops: write tiled stages as loops over strips of rows, for any height and batch; False writes the steps of the
      schedule for the traced sizes, for a runtime that does not run such loops (OpenVINO: docs, *Tiling in ONNX*).
    - external_data: put the weights into a file `<path>.<digest>.data` beside it; done anyway when they pass 2 GB.
    - overwrite: replace an existing file.
    - verify: run the file under onnxruntime on the CPU beside the graph, on random inputs of the traced sizes and,
      where its batch is free, of another one, before it takes its name; outputs may differ by 1e-9 (float64), 1e-4
      (float32), 2e-2 (float16) of their largest value, integers and booleans not at all.

    Raises `ExportError` for a wrong opset, an existing or unwritable path, a batch that cannot be dynamic,
    an operation without an ONNX form, a file that onnx.checker or onnxruntime refuses and one that computes something
    else, with the output and, where it can be told, the layer; `MissingExtraError` without onnx, onnxscript or, to
    verify, onnxruntime.
    """
    target = Path(path)
    opset = _checked_opset(opset)
    check_target(target, overwrite=overwrite, error=ExportError)
    _need_packages(verify)
    gm = traced(split, example_inputs)
    say(f"exporting {target.name}")
    program, exported, fixed = _program(gm, opset, dynamic_batch, loops=loops)

    def check(draft: Path) -> None:
        if verify:
            say(f"comparing {target.name} with the graph")
            agreement.require_agreement(draft, gm, (exported, program.exported_program), LAYER)

    _write(program.model, target, external_data, overwrite, check)
    if fixed and dynamic_batch is None and fixed != ASKED:
        warnings.warn(f"{target.name} has a fixed batch size: {fixed}.", stacklevel=3)  # past `told`
    return target


@exclusive()
def made(gm: fx.GraphModule, opset: int, dynamic_batch: bool | None, fuse: bool = True) -> tuple[Any, str]:
    """The ONNX model of a graph in memory, and why its batch is fixed ("" when it is free). Without ``fuse`` no weight
    is computed anew: batch norms stay nodes of their own."""
    program, _, fixed = _program(gm, opset, dynamic_batch, fuse)
    return program.model, fixed


def _program(
    gm: fx.GraphModule, opset: int, dynamic_batch: bool | None, fuse: bool = True, loops: bool = True
) -> tuple[Any, torch.export.ExportedProgram, str]:
    """torch's ONNX program, the exported program behind it, and why the batch is fixed."""
    why = "" if loops else ASKED
    if fuse and loops and tiles.is_tiled(gm):
        found = _in_loops(gm, opset, dynamic_batch)
        if not isinstance(found, str):
            return found
        why = found
    with quiet():
        exported, fixed, tiled = _export(gm, dynamic_batch, why)
        program = _convert(rewrites.rewritten(exported), opset, _output_names(exported), fuse)
    _finish(program, exported, fixed)
    _record(program.model, gm, fixed, tiled)
    return program, exported, fixed


def _in_loops(
    gm: fx.GraphModule, opset: int, asked: bool | None
) -> tuple[Any, torch.export.ExportedProgram, str] | str:
    """As `_program`, every tiled stage as loops over strips of rows; why not, where one would not be."""
    from splitfx.export import loops

    def written(call: Call) -> tuple[Any, torch.export.ExportedProgram, dict[str, list[str]]]:
        copy = graphs.copy_graph(gm, share=True).eval()
        stages = tiles.untiled(copy, LAYER)
        mark(copy, LAYER)
        with quiet():
            exported = follow(copy, call, None)
            program = _convert(rewrites.rewritten(exported), opset, _output_names(exported))
        _finish(program, exported, "fixed")
        return program, exported, stages

    between: list[str] = []

    def others() -> Iterator[Any]:
        for call in other_sizes(gm, FAR):
            if why := unsteady(gm, call):
                between.append(why)
                continue
            with contextlib.suppress(ExportError):  # a size that the graph does not take
                yield written(call)[0].model

    program, exported, stages = written(graphs.random_inputs(gm))
    rows = max((s[2] for s in graphs.info(gm).shapes if s is not None and len(s) > 2), default=1)
    fixed = "fixed on request"
    if asked is not False:
        fixed = loops.free_sizes(program.model, others())
        fixed = between[0] if fixed and between else fixed
        if fixed and asked:
            raise ExportError(
                f"the batch cannot be dynamic: {fixed}. Leave dynamic_batch out to export the traced size."
            )
    tiled = []
    for path, layers in stages.items():
        words, why = loops.write_loops(program.model, layers, LAYER, rows)
        if not words:
            return why
        tiled.append(f"{path}: {words}")
    _record(program.model, gm, fixed, tiled)
    return program, exported, fixed


def _checked_opset(opset: int | None) -> int:
    if opset is None:
        return DEFAULT_OPSET
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise ExportError(f"opset {opset!r} is not supported; choose one from {OPSETS[0]} to {OPSETS[-1]}.")
    return opset


def _need_packages(verify: bool) -> None:
    if verify:
        sessions.runtime()
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        need = f"writing ONNX needs onnx and onnxscript ({error}); pip install onnx onnxscript."
        raise MissingExtraError(need) from None


def traced(split: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """The graph to export. Raises `ExportError` for a module that was not traced, without inputs to trace it by."""
    if isinstance(split, fx.GraphModule) and graphs.is_canonical(split):
        return split
    if example_inputs is None:
        name = type(split).__name__
        raise ExportError(f"{name} was not traced by splitfx; pass example_inputs, or export the result of transform.")
    from splitfx.frontend.trace import trace

    return trace(split, example_inputs)


def _export(
    gm: fx.GraphModule, asked: bool | None, why: str = ""
) -> tuple[torch.export.ExportedProgram, str, list[str]]:
    """The exported program of a private eval copy, why its batch is fixed ("" when it is free), and what its
    tiled stages became; ``why``: why they are no loops.
    """
    copy = graphs.copy_graph(gm, share=True).eval()
    tiled = tiles.write_out(copy, LAYER, why)
    unasked = f"its tiled stage is written out for the traced sizes, as no loop holds it: {why}"
    fixed = why if why == ASKED else unasked
    return *freed(copy, gm, asked, LAYER, fixed if tiled else ""), tiled


def _convert(exported: torch.export.ExportedProgram, opset: int, outputs: list[str], fuse: bool = True) -> Any:
    options: dict[str, Any] = {"dynamo": True, "opset_version": opset, "output_names": outputs, "verbose": False}
    try:
        program = torch.onnx.export(exported, **options, optimize=fuse)
        if program is not None and not fuse:
            from onnxscript import optimizer

            optimizer.fold_constants(program.model)
            optimizer.remove_unused_nodes(program.model)
    except Exception as error:
        raise ExportError(f"the graph has no ONNX form{_place(exported, error)}: {_cause(error)}") from error
    if program is None:
        raise ExportError("torch's exporter returned no ONNX program.")
    written = program.model.opset_imports.get("")
    if written != opset:
        raise ExportError(f"the graph cannot be written with opset {opset}, only with {written}.")
    return program


def _cause(error: BaseException) -> str:
    """The innermost cause: the outer ones are the exporter's advice on how to report a bug to torch."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _place(exported: torch.export.ExportedProgram, error: BaseException | None) -> str:
    """` at <layer>` of the node that the exporter names, or "" where it names none."""
    while error is not None:
        found = re.search(r"translating node %(\w+)", str(error))
        if found:
            nodes = exported.run_decompositions().graph.nodes  # the exporter names nodes after decomposition
            layers = (node.meta.get("custom", {}).get(LAYER, "") for node in nodes if node.name == found[1])
            layer = next(layers, "")
            return f" at {layer}" if layer else ""
        error = error.__cause__
    return ""


def _output_names(exported: torch.export.ExportedProgram) -> list[str]:
    """`output` for one tensor, the keys for a dict, `output_0`, ... for a sequence; never the name of an input."""
    taken = {node.name for node in exported.graph.nodes if node.op == "placeholder"}
    spec = exported.call_spec.out_spec
    if spec is None:
        return []
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = []
    for key_path, index in pytree.tree_flatten_with_path(tree)[0]:
        name = "_".join(_key(part) for part in key_path) or "output"
        name = f"output_{name}" if name[0].isdigit() else name
        while name in taken:
            name += "_out"
        taken.add(name)
        if _is_tensor_output(exported, index):
            names.append(name)
    return names


def _key(part: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)


def _is_tensor_output(exported: torch.export.ExportedProgram, index: int) -> bool:
    specs = exported.graph_signature.output_specs
    user = [one for one in specs if one.kind == torch.export.graph_signature.OutputKind.USER_OUTPUT]
    return isinstance(user[index].arg, torch.export.graph_signature.TensorArgument)


def _finish(program: Any, exported: torch.export.ExportedProgram, fixed: str) -> None:
    """Names that a reader of the file knows, and nothing of this machine."""
    model = program.model
    _clean_nodes(model, _layers(program.exported_program))
    name_batch(model, {} if fixed else batch_symbols(exported))


def _record(model: Any, gm: fx.GraphModule, fixed: str, tiled: list[str]) -> None:
    """What the file is of, for `check_onnx` and for viewers."""
    info = graphs.info(gm)
    plan = info.plan.to_toml() if info.plan is not None else None
    batch = f"fixed: {fixed}" if fixed else "dynamic"
    record = {"splitfx": __version__, "model": info.model_class, "batch": batch, "plan": plan}
    record |= {"tiles": tiled} if tiled else {}
    record["figures"] = asdict(counted := figures(gm))
    model.metadata_props.clear()
    model.metadata_props["splitfx"] = json.dumps(record)
    model.doc_string = summary(info, counted)  # what viewers show of the file as a whole
    model.graph.doc_string = None


def _layers(exported: torch.export.ExportedProgram) -> dict[str, tuple[str, str]]:
    """The layer of every node by its name, and for a batch norm the layer of what it reads, else ""."""
    of: Callable[[Any], str] = lambda node: node.meta.get("custom", {}).get(LAYER, "")  # noqa: E731
    return {n.name: (of(n), of(n.args[0]) if "batch_norm" in str(n.target) else "") for n in exported.graph.nodes}


def _clean_nodes(model: Any, layers: dict[str, tuple[str, str]]) -> None:
    used: set[str] = set()
    for node in model.graph.all_nodes():
        notes = dict(node.metadata_props)
        scopes = notes.get("pkg.torch.onnx.name_scopes", "")
        layer, before = layers.get(scopes.rpartition("'")[0].rpartition("'")[2], ("", ""))
        node.metadata_props.clear()
        node.metadata_props.update({key: value for key, value in notes.items() if key in _KEPT})
        if before and node.op_type != "BatchNormalization":  # the exporter folded it, and names the layer after it
            node.metadata_props[FOLDED], layer = layer, before
        if layer:
            node.metadata_props[LAYER] = layer
        node.doc_string = None
        node.name = _unique(f"{layer or 'graph'}/{node.op_type}", used)
        for value in node.outputs:
            value.metadata_props.clear()
    for function in model.functions.values():
        function.metadata_props.clear()
        for node in function.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _unique(name: str, used: set[str]) -> str:
    number, candidate = 1, name
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    used.add(candidate)
    return candidate


def _write(model: Any, target: Path, external_data: bool, overwrite: bool, check: Callable[[Path], None]) -> None:
    """Save, check, then move into place."""
    import onnx
    import onnx_ir as ir

    held = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    weights = sum(tensor.nbytes for tensor in held if tensor is not None)
    outside = external_data or weights > INLINE_LIMIT
    data = data_name(model, target) if outside else None
    with written_with_data(target, data, overwrite=overwrite) as draft:
        ir.save(model, draft, external_data=data, size_threshold_bytes=1024)
        try:
            onnx.checker.check_model(str(draft))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"onnx.checker refuses the exported model: {first_line(error)}") from error
        check(draft)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep an exporter's progress lines, deprecations and version-converter logs off the user's screen."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._dynamo", "torch._subclasses.fake_tensor",
             "torch.utils._pytree")  # fmt: skip
    loggers = [logging.getLogger(name) for name in names]
    before = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
