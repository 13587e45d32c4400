"""Whether data fits a model, by its first samples, before any work.

Refuses (`TrainingError`): an empty set, inputs that the model does not take, a class count or a class number that the
model's head does not have, a second item that is no class number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils.data import Dataset

from splitfx.errors import TrainingError
from splitfx.ir.graph import info, is_canonical
from splitfx.ir.modes import in_eval
from splitfx.text import first_line
from splitfx.train.data import batches
from splitfx.train.objective import logits

Data = Dataset[Any]


def check(split: nn.Module, train: Data, val: Data, *, own_loss: bool = False) -> None:
    """Refuse sets that do not fit. With a loss of the user's, what is trained on may have targets of any kind; accuracy
    on the validation set is counted by classes always."""
    for name, data in (("training", train), ("validation", val)):
        not_empty(name, data)
    targets, out = _first(split, "training", train)
    if not own_loss:
        _classes("training", train, targets, out)
    targets, out = _first(split, "validation", val)
    _classes("validation", val, targets, out)


def not_empty(name: str, data: Data) -> None:
    if batches.sized(data) == 0:
        raise TrainingError(f"the {name} set is empty")


def _first(split: nn.Module, name: str, data: Data) -> tuple[Any, Any]:
    """Targets of the first two samples, and what the model gives for their inputs."""
    inputs, targets, _, _ = next(batches.once(data, 2, batches.Process(), 0))
    device = next((p.device for p in split.parameters()), torch.device("cpu"))
    try:
        with in_eval(split), torch.no_grad():
            out = split(batches.to(inputs, device))
    except Exception as error:  # whatever a model says to an input of the wrong shape
        shape = list(inputs.shape[1:]) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise TrainingError(
            f"the {name} set gives inputs {shape}, which the model does not take{_wanted(split)}: {first_line(error)}"
        ) from error
    return targets, out


def _classes(name: str, data: Data, targets: Any, out: Any) -> None:
    scores = logits(out)
    if scores.dim() != 2:
        raise TrainingError(f"the model's output is {list(scores.shape)}, not class scores [N, C]")
    classes = scores.shape[1]
    known = getattr(data, "classes", None)
    if known is not None and len(known) != classes:
        raise TrainingError(f"the {name} set has {len(known)} classes, the model's head gives {classes}")
    if not isinstance(targets, torch.Tensor) or targets.dim() != 1 or targets.dtype != torch.int64:
        raise TrainingError(f"the {name} set's second item is no class number")
    listed = getattr(
        data, "targets", None
    )  # all of them, where the data set lists them, else those of its first samples
    seen = torch.as_tensor(listed) if listed is not None and len(listed) else targets
    for number in (int(seen.max()), int(seen.min())):
        if not 0 <= number < classes:
            raise TrainingError(
                f"the {name} set has class number {number}, the model's head gives {classes} classes, from 0 on"
            )


def _wanted(split: nn.Module) -> str:
    if not is_canonical(split):
        return ""
    assert isinstance(split, fx.GraphModule)
    shapes = [list(one.shape[1:]) for one in info(split).inputs if hasattr(one, "shape")]
    return f" (it was traced with {', '.join(map(str, shapes))})"
