"""Entry: the place in a graph where a sub-model enters, with its step-down convolution.

A node of the base model that hands its tensor on; in the sub-model, what ``step_down`` makes of the image stands in its
place (`splitfx.subnetworks.model`). So whatever later passes do behind an entry, they do to the base model and to the
sub-model alike; to them an entry is an operation that cannot be followed, at which channels keep their order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx, nn

from splitfx.ir.graph import Whole

FORMS = ("closed", "static", "embedding")
Form = Literal["closed", "static", "embedding"]


class Entry(Whole):
    """Returns its input; holds what a sub-model has of its own.

    ``step_down``: a graph from the image to the cut's tensor. ``reads``: which of the model's placeholders it takes.
    ``form``: "closed" fits every size of the image, "static" the traced one, "embedding" is that of a token model.
    ``norms``: norms with statistics of the sub-model's own, which share weight and bias with those of the base model;
    ``private`` says by the path in the base model which one it is.
    """

    op_name = "entry"

    def __init__(self, step_down: fx.GraphModule, number: int, reads: int, form: Form) -> None:
        super().__init__()
        self.step_down, self.number, self.reads, self.form = step_down, number, reads, form
        self.norms = nn.ModuleDict()
        self.private: dict[str, str] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def extra_repr(self) -> str:
        return f"number={self.number}, form={self.form}"

    def keep_private(self, path: str, norm: nn.Module) -> None:
        name = f"norm{len(self.private)}"
        self.private[path] = name
        self.norms[name] = norm


def entries(graph: fx.GraphModule) -> list[tuple[fx.Node, Entry]]:
    """The entries of a graph with their nodes, in the order of the sub-models' numbers."""
    found = []
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Entry):
            found.append((node, module))
    return sorted(found, key=lambda one: one[1].number)
