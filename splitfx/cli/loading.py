"""What the words of a command line name: models, inputs, saved splits, files to be written."""

from __future__ import annotations

import inspect
import math
import os
from argparse import Namespace
from pathlib import Path

import torch
from torch import fx, nn

from splitfx import storage
from splitfx.cli.progress import Progress
from splitfx.compiler.inline import parse_inputs
from splitfx.errors import ExportError, SplitfxError, UnsupportedError, nearest
from splitfx.frontend.models import is_transformers, load_model
from splitfx.frontend.trace import trace
from splitfx.ground import limits
from splitfx.ground.files import check_target
from splitfx.text import shown


def inputs_of(given: Namespace, model: nn.Module) -> tuple[torch.Tensor, ...] | None:
    """Random inputs of the sizes that are given, in the order of forward's parameters; None where none are given."""
    if not given.input:
        return None
    generator = torch.Generator().manual_seed(given.seed)
    names, sizes = parse_inputs(given.input)
    if names:
        sizes = [sizes[names.index(name)] for name in _first_parameters(names, model)]
    needed = sum(math.prod(s) * getattr(torch, d).itemsize for s, d in sizes)
    limits.check_memory(needed, UnsupportedError, f"--input {', '.join(given.input)}")
    return tuple(
        torch.randn(s, generator=generator).to(getattr(torch, d))
        if d.startswith(("float", "bfloat"))
        else torch.zeros(s, dtype=getattr(torch, d))
        for s, d in sizes
    )


def _first_parameters(names: list[str], model: nn.Module) -> list[str]:
    """The first parameters of forward, which ``names`` have to be in any order."""
    known = list(inspect.signature(model.forward).parameters)
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f" It takes {', '.join(known)}."
            raise UnsupportedError(f"--input {shown(name)}: forward of {type(model).__name__} has no such input.{hint}")
    first = known[: len(names)]
    if missing := [name for name in first if name not in names]:
        raise UnsupportedError(f"--input: name {', '.join(missing)} too, which come before the others in forward")
    return first


def check_inputs(given: Namespace) -> None:
    """Refuse sizes that cannot be read, or none for a model that needs them, before the model is loaded."""
    if given.input:
        parse_inputs(given.input)
    elif not is_split(given.model):
        raise UnsupportedError(f"no input sizes for {given.model}: give --input 1x3x224x224")


def is_split(word: str) -> bool:
    """Whether a word names the folder of a saved split; other folders may be models of transformers."""
    return Path(word).is_dir() and not is_transformers(word)


def model_of(given: Namespace, progress: Progress) -> nn.Module:
    """The model that is named, which may be a saved split."""
    if is_split(given.model):
        return saved(given.model, progress)
    progress(f"loading {given.model}")
    model = load_model(given.model, given.weights, given.seed)
    if given.weights is None and given.model.startswith(("torchvision:", "timm:")):
        progress.remark(f"the weights are random (seed {given.seed}); --weights FILE takes trained ones")
    return model


def saved(folder: str, progress: Progress) -> fx.GraphModule:
    if not Path(folder).is_dir():
        wrong = f"{folder} is a file, not the folder of a saved split" if Path(folder).is_file() else ""
        raise ExportError(f"{wrong or f'there is no folder {folder}'}; `splitfx transform` writes one")
    progress(f"loading {folder}")
    split = storage.load(folder)
    return split


def graph_of(given: Namespace, progress: Progress) -> fx.GraphModule:
    check_inputs(given)
    model = model_of(given, progress)
    inputs = inputs_of(given, model)
    return model if inputs is None and isinstance(model, fx.GraphModule) else trace(model, inputs)


def free_file(path: str, overwrite: bool) -> Path:
    target = Path(path)
    if os.path.lexists(target) and not target.is_dir() and not overwrite:
        raise SplitfxError(f"{target}: already exists; choose another name or add --overwrite")
    check_target(target, overwrite=overwrite, error=SplitfxError)
    if not os.access(target.parent, os.W_OK):
        raise SplitfxError(f"{target}: its folder {target.parent} is not writable")
    return target
