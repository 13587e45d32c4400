"""`export_branches`: a carved model as ONNX files, one per part of its tree, with a manifest.

Does: writes ``stem.onnx``, ``branch-0.onnx`` …, ``merge.onnx`` and ``branches.json``: what each part reads and gives,
its groups, multiply-accumulates and parameters, the classes of each group in the order of its logits, size and SHA-256
of every file. The folder is run under onnxruntime (`splitfx.export.bundles.branches_runner`) and held to the model
before it is there.
Refuses (`ExportError`): a folder that is there already; files that disagree with the model.
Promises: a folder is there whole or not at all. A branch's weights are in its own file only, so that a machine needs
no more than the stem and its own branches.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import torch
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.errors import ExportError
from splitfx.export.bundles.branches_runner import KIND, Branches, Manifest, OnnxPart, fingerprint
from splitfx.export.onnx import export_onnx
from splitfx.ground.difference import relative_error
from splitfx.ground.progress import Say, say, told
from splitfx.ir import graph as graphs
from splitfx.splitnet.tree import Tree

PARITY = 1e-4  # of the largest output: onnxruntime in float32 against torch


@told
def export_branches(
    split: fx.GraphModule,
    folder: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_batch: bool | None = None,
    provider: str = "cpu",
    overwrite: bool = False,
    progress: Say = True,
) -> Path:
    """Write the parts of ``split``'s tree to ``folder``, and return it.

    split: the result of a plan with ``SplitNet(lowering="branches")``, in eval mode or not. opset, dynamic_batch: as
    for `export_onnx`. provider: what the written files are checked on. overwrite: replace a folder that this function
    wrote. Raises `ExportError`, `UnsupportedError`.
    """
    tree = Tree(split)
    with KIND.written_whole(folder, overwrite=overwrite) as draft:
        rows = []
        for part in tree.parts:
            say(f"exporting {part.name}")
            file = f"{part.name.replace(', ', '-').replace(' ', '-')}.onnx"
            export_onnx(part.graph, draft / file, opset=opset, dynamic_batch=dynamic_batch)
            given = {f.name: getattr(part, f.name) for f in fields(OnnxPart) if hasattr(part, f.name)}
            rows.append(OnnxPart(**{**given, "file": file, **fingerprint(draft / file)}))
        model = graphs.info(split).model_class
        KIND.write_manifest(draft, Manifest(tree.inputs, tree.arguments, tree.classes, rows, model))
        say("checking")
        _check_parity(tree, draft, provider)
    return Path(os.path.abspath(folder))


def _check_parity(tree: Tree, draft: Path, provider: str) -> None:
    args, kwargs = graphs.random_inputs(tree.graph)
    whole = graphs.copy_graph(tree.graph, share=True).eval()
    with torch.inference_mode():
        wanted = pytree.tree_leaves(whole(*args, **kwargs))[0]
    found = Branches(draft, provider).run(*args, **kwargs)
    off = relative_error(found, wanted)
    if not off <= PARITY:
        raise ExportError(
            f"the written files are off by {off:.1e} of the largest output on {provider}; {PARITY:.0e} allowed."
        )
