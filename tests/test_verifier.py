"""The verifier refuses what no pass may leave, with and without Python's assertions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from splitfx.ir.verifier import IllegalGraph, verify


def graph() -> tuple[fx.GraphModule, fx.Node, fx.Node]:
    """(a graph of a conv and its activation in place, the conv, the activation)."""
    made = fx.Graph()
    x = made.placeholder("x")
    conv = made.call_module("conv", (x,))
    relu = made.call_function(torch.ops.aten.relu_.default, (conv,))
    made.output(relu)
    return fx.GraphModule({"conv": nn.Conv2d(1, 1, 1)}, made), conv, relu


def test_a_legal_graph_passes() -> None:
    verify(graph()[0])


@pytest.mark.parametrize("through", ["itself", "a view"])
def test_memory_that_is_overwritten_is_not_read_later(through: str) -> None:
    whole, conv, relu = graph()
    operand = conv
    if through == "a view":
        with whole.graph.inserting_before(relu):
            operand = whole.graph.call_function(torch.ops.aten.view.default, (conv, [-1]))
    with whole.graph.inserting_after(relu):
        late = whole.graph.call_function(torch.ops.aten.neg.default, (operand,))
    list(whole.graph.nodes)[-1].args = (late,)
    with pytest.raises(IllegalGraph, match="overwrites conv, which neg.* reads later"):
        verify(whole)


def test_what_is_read_is_there_and_comes_first() -> None:
    whole, conv, relu = graph()
    relu.append(conv)
    with pytest.raises(IllegalGraph, match="conv"):
        verify(whole)
    whole, conv, _ = graph()
    conv.target = "gone"
    with pytest.raises(IllegalGraph, match="gone"):
        verify(whole)


def test_there_is_one_output_at_the_end() -> None:
    whole, *_ = graph()
    whole.graph.erase_node(list(whole.graph.nodes)[-1])
    with pytest.raises(IllegalGraph, match="0 outputs"):
        verify(whole)


def test_it_is_kept_without_assertions() -> None:
    code = "from tests.test_verifier import *\nassert False\nwhole, conv, relu = graph()\n"
    code += "relu.append(whole.graph.call_function(torch.ops.aten.neg.default, (conv,)))\n"
    code += "try: verify(whole)\nexcept IllegalGraph as error: print(error)"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reads later" in done.stdout
