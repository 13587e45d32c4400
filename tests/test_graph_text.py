"""The text form of graphs: what is written is read as the same graph, what is no graph is refused by its line."""

from __future__ import annotations

import operator

import pytest
import torch

from splitfx.errors import SplitfxError
from splitfx.ir.graph import info
from splitfx.ir.ops import parse, text
from tests.traced import every_model, odd

EVERYTHING = """\
%x = input(2, 3, 9, 9)
%index = input(4, dtype=torch.int64)
%w = parameter(8) "own.w"
%b = buffer(2, dtype=torch.int64) "own.b"
%conv = Conv2d(3, 8, 3, stride=2, padding=[1, 0], padding_mode='reflect', bias=False) "body.conv" (%x)
%norm = BatchNorm2d(8, eps=0.001) "body.norm" (%conv)
%relu_ = relu_(%norm)
%split = split(%relu_, 4, 1)
%half = %split[0]
%clamp = clamp(%half, None, float('inf'))
%cat = cat([%clamp, %half], 1)
%view = view(%w, [8, 1, 1])
%mul = mul(%cat, %view)
%size = sym_size(%x, 0)
%more = operator.mul(%size, 8)
%clone = clone(%mul, memory_format=torch.channels_last)
%mean = mean(%clone, [2, 3])
%reshape = reshape(%mean, [%more])
%add = add(%reshape, 1, alpha=0.5)
%ln = LayerNorm(8) "ln" (%mean)
return [%add, %ln, %index, %b]
"""


def test_what_is_written_is_read() -> None:
    graph = parse(EVERYTHING)
    wanted = EVERYTHING.replace("padding_mode='reflect', bias=False", "bias=False, padding_mode='reflect'")
    assert text(graph) == wanted
    x, index = torch.randn(5, 3, 9, 9), torch.arange(4)
    outputs = graph(x, index)  # for another batch too
    assert outputs[0].shape == (40,)
    assert torch.equal(outputs[2], index)
    conv = graph.get_submodule("body.conv")
    assert (conv.stride, conv.padding, conv.bias, conv.training) == ((2, 2), (1, 0), None, False)
    targets = {node.name: node.target for node in graph.graph.nodes}
    assert (targets["split"], targets["half"]) == (torch.ops.aten.split.Tensor, operator.getitem)
    assert (targets["relu_"], targets["more"]) == (torch.ops.aten.relu_.default, operator.mul)


@every_model
def test_a_traced_graph_is_read_from_its_text(name: str) -> None:
    graph = odd(name)[2]
    written = text(graph)
    if name in UNREADABLE:
        with pytest.raises(SplitfxError, match=UNREADABLE[name]):
            parse(written)
        return
    again = parse(written)
    assert text(again) == written
    called = [[n.target for n in one.graph.nodes if n.op != "placeholder"] for one in (graph, again)]
    assert called[0] == called[1]
    assert [spec.shape for spec in info(again).inputs] == [spec.shape for spec in info(graph).inputs]


UNREADABLE = {
    "norms": "RReLU .* nothing is called",  # leaves that only their own code makes
    "stochastic_depth": "DropPath .* nothing is called",
    "no_grad_backbone": "_set_grad_enabled",
}


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("import os", "line 1 of the graph, 'import os': a value has a name"),
        ("%x = input(2)\n%y = relu(%z)\nreturn %y", "line 2 .* it reads %z, which is made nowhere before"),
        ("%x = input(2)\n%x = relu(%x)\nreturn %x", "line 2 .* a name of its own"),
        ("%x = input(2)\n%y = no_such(%x)\nreturn %y", "has no attribute 'no_such'"),
        ("%x = input(2)\n%y = __import__('os').system('true')\nreturn %y", "has no attribute 'system'"),
        ('%x = input(2)\n%y = NoSuch() "y" (%x)\nreturn %y', "there is no layer NoSuch; known: AlphaDropout"),
        ('%x = input(2, 3)\n%y = Linear(4, 2) "y" (%x)\nreturn %y', "line 3|line 2"),
        ("%x = input(2)\n%slice = slice(%x, 0, 0, 1)\nreturn %slice", "slice is a name of Python's own"),
        ("%x = input(2)", "the graph returns nothing"),
    ],
)
def test_what_is_no_graph_is_refused_by_its_line(written: str, why: str) -> None:
    with pytest.raises(SplitfxError, match=why):
        parse(written)
