"""What the words of a command line name: models, inputs, saved splits, files to be written."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from pathlib import Path

import torch
from torch import fx, nn

from splitfx import storage
from splitfx.cli.progress import Progress
from splitfx.compiler.inline import parse_sizes
from splitfx.errors import ExportError, SplitfxError, UnsupportedError
from splitfx.frontend.models import load_model
from splitfx.frontend.trace import trace
from splitfx.ground import limits
from splitfx.ground.files import check_target


def inputs_of(given: Namespace) -> tuple[torch.Tensor, ...] | None:
    if not given.input:
        return None
    generator = torch.Generator().manual_seed(given.seed)
    sizes = [parse_sizes(text) for text in given.input]
    needed = sum(math.prod(s) * getattr(torch, d).itemsize for s, d in sizes)
    limits.check_memory(needed, UnsupportedError, f"--input {', '.join(given.input)}")
    return tuple(
        torch.randn(s, generator=generator).to(getattr(torch, d))
        if d.startswith(("float", "bfloat"))
        else torch.zeros(s, dtype=getattr(torch, d))
        for s, d in sizes
    )


def needed_inputs(given: Namespace) -> tuple[torch.Tensor, ...]:
    found = inputs_of(given)
    if found is None:
        raise UnsupportedError(f"no input sizes for {given.model}: give --input 1x3x224x224")
    return found


def is_folder(word: str) -> bool:
    return Path(word).is_dir()


def model_of(given: Namespace, progress: Progress) -> nn.Module:
    progress(f"loading {given.model}")
    model = load_model(given.model, given.weights, given.seed)
    if given.weights is None and given.model.startswith(("torchvision:", "timm:")):
        progress.remark(f"the weights are random (seed {given.seed}); --weights FILE takes trained ones")
    return model


def saved(folder: str, progress: Progress) -> fx.GraphModule:
    if not is_folder(folder):
        wrong = f"{folder} is a file, not the folder of a saved split" if Path(folder).is_file() else ""
        raise ExportError(f"{wrong or f'there is no folder {folder}'}; `splitfx transform` writes one")
    progress(f"loading {folder}")
    split = storage.load(folder)
    return split


def graph_of(given: Namespace, progress: Progress) -> fx.GraphModule:
    if is_folder(given.model):
        split = saved(given.model, progress)
        return split if not given.input else trace(split, inputs_of(given))
    inputs = needed_inputs(given)
    model = model_of(given, progress)
    return trace(model, inputs)


def free_file(path: str, overwrite: bool) -> Path:
    target = Path(path)
    if os.path.lexists(target) and not target.is_dir() and not overwrite:
        raise SplitfxError(f"{target}: already exists; choose another name or add --overwrite")
    check_target(target, overwrite=overwrite, error=SplitfxError)
    if not os.access(target.parent, os.W_OK):
        raise SplitfxError(f"{target}: its folder {target.parent} is not writable")
    return target
