"""What the tests of Group share: the pass alone, its notes, its dense reference, a chain of two blocks and a head."""

from __future__ import annotations

import torch
from torch import fx, nn

from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.carving.division import Masked
from splitfx.compiler.protocol import Outcome
from splitfx.ir.editing import tidy
from splitfx.ir.graph import copy_graph
from splitfx.passes import Group
from tests import oracle
from tests.models import Head, conv_bn, image
from tests.traced import odd


def grouped(graph: fx.GraphModule, step: Group) -> tuple[fx.GraphModule, Outcome]:
    """The pass alone, without the pipeline's oracle."""
    work = copy_graph(graph)
    outcome = step.run(work, facts(work))
    tidy(work)
    return work, outcome


def in_double(name: str) -> tuple[fx.GraphModule, torch.Tensor]:
    _, inputs, graph = odd(name, double=True)
    return graph, inputs


def per_block(graph: fx.GraphModule, factor: int) -> tuple[int, ...]:
    return (factor,) * len(blocks(facts(graph)))


def notes(outcome: Outcome, kind: str) -> list[str]:
    return [f"{n.where}: {n.what}" for n in outcome.notes if n.kind == kind]


def assert_masked_dense(graph: fx.GraphModule, step: Group, x: torch.Tensor) -> tuple[fx.GraphModule, Outcome]:
    """The split equals the pass's reference, and that is the dense graph with weights set to zero."""
    split, outcome = grouped(graph, step)
    assert outcome.reference is not None, [n.what for n in outcome.notes]
    outcome.reference.recompile()
    oracle.assert_equal_outputs(split, outcome.reference, x)
    dense, kept = graph.state_dict(), outcome.reference.state_dict()
    layers = {path: m for path, m in outcome.reference.named_modules() if isinstance(m, Masked)}
    assert layers
    kept |= {f"{path}.weight": m.weight().detach() for path, m in layers.items()}
    for key, value in kept.items():
        if key in dense and value.shape == dense[key].shape:  # else a fusion, or a conv that it widens
            assert torch.equal(value[value != 0], dense[key][value != 0]), f"{key} is not the dense weight"
    return split, outcome


def chain(width: int = 12) -> tuple[nn.Module, torch.Tensor]:
    """Two blocks of two convs and a head, in float64."""
    layers = [
        conv_bn(3, 8),
        conv_bn(8, 8),
        nn.MaxPool2d(2),
        conv_bn(8, width),
        conv_bn(width, width),
        nn.MaxPool2d(2),
    ]
    model = Head(nn.Sequential(*layers, conv_bn(width, width)), width).double().eval()
    return model, image(2, 3, 12, 12).double()
