"""Data movement on labels equals data movement on full tensors of labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitfx.analysis import facts
from splitfx.analysis.moves import channel_dim, compress, reshape
from splitfx.frontend.trace import trace


@st.composite
def regroupings(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """Sizes before and after with the same product, and the dims that the labels depend on."""
    factors = draw(st.lists(st.sampled_from((1, 2, 2, 3, 5)), min_size=1, max_size=6))

    def cut() -> tuple[int, ...]:
        sizes = [1]
        for factor in factors:
            if draw(st.booleans()):
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        return tuple(sizes)

    before = cut()
    return before, cut(), tuple(draw(st.booleans()) for _ in before)


@given(regroupings())
def test_reshape_is_the_reshape_of_all_labels(
    case: tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]],
) -> None:
    before, after, depends = case
    sizes = [s if d else 1 for s, d in zip(before, depends, strict=True)]
    labels = compress(torch.arange(torch.Size(sizes).numel()).view(sizes))
    found = reshape(labels, before, after)
    assert torch.equal(found.expand(after), labels.expand(before).reshape(after))
    assert found.shape == compress(found).shape


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 15))
def test_compress_loses_nothing(sizes: list[int], depends: int) -> None:
    kept = [s if depends >> i & 1 else 1 for i, s in enumerate(sizes)]
    labels = torch.arange(torch.Size(kept).numel()).view(kept)
    full = labels.expand(sizes).contiguous()
    assert torch.equal(compress(full), labels)


def test_channel_dim() -> None:
    assert channel_dim(torch.zeros(1, 4, 1, 1)) == 1
    assert channel_dim(torch.zeros(1, 4, 2, 1)) is None
    assert channel_dim(torch.zeros(1, 1)) is None
    assert channel_dim(None) is None


def halves(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([b, a, b], 1)


def shuffled(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)


MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "halves": halves,
    "shuffled": shuffled,
    "channel_shuffle": lambda x: nn.functional.channel_shuffle(x, 2),
    "slice": lambda x: x[:, 1:9:2, :, ::2],
    "split": lambda x: torch.cat(x.split([5, 4, 3], 1)[::-1], 1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "flatten": lambda x: x.flatten(1),
    "back": lambda x: x.flatten(1).unflatten(1, (12, 4, 6)),
    "select": lambda x: x[:, 3],
    "stack": lambda x: torch.stack([x[:, 0], x[:, 5]], 1),
    "roll": lambda x: x.roll(2, 1),
    "flip": lambda x: x.flip(1),
    "narrow": lambda x: x.narrow(1, 2, 7),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "expand": lambda x: x[:, :, :1, :1].expand(-1, -1, 4, 6),
    "squeeze": lambda x: x[:, :, :1].squeeze(2).unsqueeze(-1),
    "unbind": lambda x: torch.cat([t.unsqueeze(1) for t in x.unbind(1)[2:6]], 1),
}


class Moved(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", sorted(MOVES))
def test_labels_go_where_the_values_go(name: str) -> None:
    """The model is run on its own input's labels."""
    model = Moved(MOVES[name])
    graph = trace(model, torch.randn(2, 12, 4, 6))
    axes = facts(graph).axes
    start, end = next(iter(graph.graph.nodes)), list(graph.graph.nodes)[-1].all_input_nodes[0]
    given = axes.labels[start].expand(2, 12, 4, 6)
    wanted = model(given.double()).long()
    assert isinstance(axes.labels[end], torch.Tensor), f"{name} is not followed"
    found = axes.labels[end].expand(wanted.shape)
    if name in BARRIERS:
        assert any(BARRIERS[name] in why for why in axes.frozen.values())
        return
    assert torch.equal(found, wanted)


BARRIERS = {"stack": "stack"}  # several operands: not followed, and frozen with a reason


def test_padding_channels_is_a_barrier() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Moved(lambda x: nn.functional.pad(x, (0, 0, 0, 0, 0, 2))))
    graph = trace(model, torch.randn(2, 3, 5, 5))
    assert any("pad" in why for why in facts(graph).axes.frozen.values())
