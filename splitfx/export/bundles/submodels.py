"""`export_bundle`: the base model and its sub-models as ONNX files over one file of weights.

Does: writes ``base.onnx``, ``sub0.onnx`` …, ``weights.data`` with every weight once, whichever models read it, and
``manifest.json`` with what each model costs and reaches; checks every file under onnxruntime against its model.
Refuses (`ExportError`): a folder that is there, a graph without sub-models, a file that does not agree with its model.
Promises: a folder is there whole or not at all. Where sub-models have statistics of their own, batch norms stay nodes
of their own, since folding them would make other convolution weights for every model.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import fx

from splitfx.errors import ExportError
from splitfx.export import onnx as writing
from splitfx.export.bundles.submodels_runner import KIND, BundleModel, Manifest, Weights
from splitfx.export.runtime import check_onnx
from splitfx.ground.progress import Say, say, told
from splitfx.ir import graph as graphs
from splitfx.subnetworks.choose import ModelFigures
from splitfx.subnetworks.entry import entries
from splitfx.subnetworks.model import SubNetworksGraph
from splitfx.text import first_line

WEIGHTS = "weights.data"
SMALL = 64  # bytes: shapes, scalars and the like stay in the files
ALIGNED = 64  # bytes that a weight starts at a multiple of


@told
def export_bundle(
    split: fx.GraphModule,
    folder: str | os.PathLike[str],
    *,
    val: Any = None,
    opset: int | None = None,
    dynamic_batch: bool | None = None,
    provider: str = "cpu",
    runs: int = 20,
    overwrite: bool = False,
    progress: Say = True,
) -> Path:
    """Write the base model and all sub-models of ``split`` to ``folder``, and return it.

    split: the result of a plan with `SubNetworks`. val: a data set of (input, class); each model's accuracy on it goes
    into the manifest. opset, dynamic_batch: as for `export_onnx`. provider: what each file is checked and timed on,
    with ``runs`` timed runs at the traced size. overwrite: replace a folder that this function wrote.

    Raises `ExportError`; what `export_onnx` and `check_onnx` raise.
    """
    if not isinstance(split, SubNetworksGraph) or not entries(split):
        raise ExportError("a bundle is of a model with sub-models: the result of a plan with the pass 'subnetworks'")
    target = KIND.check_target(folder, overwrite=overwrite)
    opset = writing._checked_opset(opset)
    writing._need_packages(verify=True)
    with KIND.written_whole(target, overwrite=overwrite) as draft:
        models = [split.base(), *(split.detach(i) for i in range(len(entries(split))))]
        weights = _write_models(split, models, draft, opset, dynamic_batch)
        rows = []
        for found, model in zip(split.figures(), models, strict=True):
            rows.append(_row(split, found, model, draft, val, provider, runs))
        record = graphs.info(split)
        inputs = [shape for shape in record.shapes if shape is not None]
        held = Weights(WEIGHTS, weights)
        KIND.write_manifest(draft, Manifest(rows, held, record.model_class, inputs, provider, torch.get_num_threads()))
    return target


# ---------------------------------------------------------------- files


def _write_models(
    split: SubNetworksGraph,
    models: list[fx.GraphModule],
    draft: Path,
    opset: int,
    dynamic_batch: bool | None,
) -> int:
    """Every model's file, and the one of weights; its size in bytes."""
    import onnx
    import onnx_ir as ir

    fuse = not any(entry.private for _, entry in entries(split))
    with open(draft / WEIGHTS, "wb") as data:
        store = _Store(data, draft)
        for name, model in zip(split.names, models, strict=True):
            say(f"exporting {name}")
            made, _ = writing.made(model, opset, dynamic_batch, fuse)
            for value in (v for graph in made.graphs() for v in graph.initializers.values()):
                if value.const_value is not None:
                    value.const_value = store.placed(value.const_value)
            data.flush()
            ir.save(made, draft / f"{name}.onnx")
            try:
                onnx.checker.check_model(str(draft / f"{name}.onnx"))
            except onnx.checker.ValidationError as error:
                raise ExportError(f"onnx.checker refuses the exported {name}: {first_line(error)}") from error
        return data.tell()


class _Store:
    """The file of weights: each of them once, by what it holds."""

    def __init__(self, data: Any, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.known: dict[Any, int] = {}

    def placed(self, tensor: Any) -> Any:
        """The tensor as one in the file; small and whole-number ones (shapes) as they are."""
        import onnx_ir as ir

        if tensor.nbytes < SMALL or not tensor.dtype.is_floating_point():
            return tensor
        held = tensor.tobytes()
        key = (tensor.dtype, len(held), hashlib.sha256(held).digest())
        if key not in self.known:
            self.data.write(b"\0" * (-self.data.tell() % ALIGNED))
            self.known[key] = self.data.tell()
            self.data.write(held)
        return ir.ExternalTensor(
            WEIGHTS,
            self.known[key],
            len(held),
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=self.folder,
        )


# ---------------------------------------------------------------- the manifest


def _row(
    split: fx.GraphModule,
    found: ModelFigures,
    model: fx.GraphModule,
    draft: Path,
    val: Any,
    provider: str,
    runs: int,
) -> BundleModel:
    name = found.name
    say(f"checking {name}")
    report = check_onnx(model, draft / f"{name}.onnx", providers=(provider,), runs=runs)
    row = report.rows[0]
    if not row.ok:
        raise ExportError(f"{name}.onnx does not agree with its model on {provider}: {row.verdict}")
    return BundleModel(
        name,
        f"{name}.onnx",
        found.macs,
        found.params,
        found.peak_bytes,
        seconds=None if row.median_ms is None else row.median_ms / 1e3,
        accuracy=_accuracy(model, val, name),
        behind=graphs.layer(entries(split)[found.number][0].all_input_nodes[0]) if found.number >= 0 else "",
        ops=found.ops,
        runtime_peak_bytes=row.peak_bytes,
        p90_seconds=None if row.p90_ms is None else row.p90_ms / 1e3,
        max_rel=row.max_rel or 0.0,
    )


def _accuracy(model: fx.GraphModule, val: Any, name: str) -> float | None:
    if val is None:
        return None
    from splitfx.train.finetune import evaluate

    say(f"accuracy of {name}")
    return evaluate(model, val).accuracy
