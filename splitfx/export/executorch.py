"""Write a graph as an ExecuTorch program (``.pte``), whose memory is planned when it is written.

Does: exports in eval mode from a private copy, tiled stages as the steps of their schedule, for the traced sizes; lets
ExecuTorch plan one block of memory for all values; runs the file beside the graph.
Refuses: an operation without a portable kernel, a file that is there, a file that computes something else.
Promises: the split is not changed; a failed export leaves nothing behind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.errors import ExportError, MissingExtraError
from splitfx.export import agreement
from splitfx.export.onnx import quiet, traced
from splitfx.ground.exclusive import exclusive
from splitfx.ground.files import check_target, written_whole
from splitfx.ground.progress import Say, say, told
from splitfx.ground.table import size
from splitfx.ir import graph as graphs
from splitfx.text import first_line


@dataclass(frozen=True)
class ExecutorchFile:
    """What was written: ``planned_bytes`` is the memory that the program needs for its values, inputs and outputs
    among them and weights not."""

    path: Path
    planned_bytes: int

    def __str__(self) -> str:
        return f"{self.path}: values take {size(self.planned_bytes)}, planned"


@told
@exclusive()
def export_executorch(
    split: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Say = True,
) -> ExecutorchFile:
    """Write `split` to `path` as an ExecuTorch program in eval mode, for the traced sizes, with its portable kernels.

    ExecuTorch plans where every value lies, so a tiled stage needs what its schedule does. Portable kernels run
    anywhere and are slow; a backend of ExecuTorch that takes the whole graph, such as XNNPACK, plans memory of its own.

    - split: the result of `transform` or `trace`; another module is traced first and needs `example_inputs`.
    - verify: run the file beside the graph on random inputs before it takes its name; outputs may differ as for
      `export_onnx`. Portable kernels take minutes for a large network.

    Raises `ExportError` for an existing or unwritable path, an operation without a portable kernel, and a file that
    computes something else; `MissingExtraError` without executorch.
    """
    target = Path(path)
    check_target(target, overwrite=overwrite, error=ExportError)
    exir = _package()
    graph = traced(split, example_inputs)
    work = graphs.copy_graph(graph, share=True, apart=graph.buffers()).eval()  # one may count its calls
    args, kwargs = graphs.random_inputs(work)
    say(f"exporting {target.name}")
    with quiet():
        try:
            program = exir.to_edge(torch.export.export(work, args, kwargs)).to_executorch()
        except Exception as error:
            raise ExportError(f"{target.name} was not written: ExecuTorch refuses it: {first_line(error)}") from error
    planned = sum(sum(plan.non_const_buffer_sizes) for plan in program.executorch_program.execution_plan)
    with written_whole(target, overwrite=overwrite, error=ExportError) as draft:
        draft.write_bytes(program.buffer)
        if verify:
            say(f"comparing {target.name} with the graph")
            _require_agreement(draft, work, args, kwargs)
    return ExecutorchFile(target, int(planned))


def _require_agreement(path: Path, graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    method: Any = Runtime.get().load_program(str(path)).load_method("forward")
    want = agreement.outputs(graph, args, kwargs)
    got = method.execute(pytree.tree_leaves((args, kwargs)))
    if len(got) != len(want):
        raise ExportError(f"{path.name} was not written: it has {len(got)} outputs, the graph {len(want)}.")
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        _, wrong = agreement.fault(f"output {number}", one.detach(), other)
        if wrong:
            raise ExportError(f"{path.name} was not written: {wrong}.")


def _package() -> Any:
    try:
        with quiet():
            from executorch import exir  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        need = f"writing ExecuTorch programs needs executorch ({error}): pip install 'splitfx[executorch]'"
        raise MissingExtraError(need) from None
    return exir
