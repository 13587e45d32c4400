"""The layers of a reconstruction as regressions: what they read, how they are solved, how a fusion is projected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from splitfx.carving.division import Division
from splitfx.carving.reconstruction import layers
from splitfx.carving.reconstruction.projection import Reader, projected
from splitfx.carving.reconstruction.regression import PULLS, Normal, solved

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 5, stride=2, padding=2), (3, 4, 17)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 9, 7)),
    "strided": (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1)), (3, 4, 13, 11)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same", bias=False), (2, 4, 9, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 9, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 9, 7)),
    "conv3d": (nn.Conv3d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 7, 6)),
    "linear": (nn.Linear(4, 6), (5, 4)),
    "tokens": (nn.Linear(4, 6), (3, 11, 4)),
}


def whole(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[tuple[layers.Blocks, Normal]]:
    last = isinstance(module, nn.Linear)
    sizes = tuple(y.shape[:-1]) if last else (len(y), *y.shape[2:])
    at = layers.positions(sizes, 1.0, torch.Generator().manual_seed(0))
    read, right = layers.windows(module, x, at), layers.rows(y, at, last)
    return [(some, layers.normal(read, right, some)) for some in layers.blocks_of(module, None)]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_solved_to_itself(name: str) -> None:
    """From its own outputs a layer's weight and bias come back, whatever they are drawn to."""
    torch.manual_seed(0)
    module: Any = LAYERS[name][0]
    sizes = LAYERS[name][1]
    module = module.double()
    x: Any = torch.randn(64, *sizes[1:], dtype=torch.float64)
    with torch.no_grad():
        y = module(x)
    weight, bias = torch.zeros_like(module.weight), torch.zeros(len(module.weight), dtype=torch.float64)  # type: ignore[arg-type]
    free = module.bias is not None
    for some, normal in whole(module, x, y):
        start = torch.randn_like(layers.weights_in(module, some))
        found, offset, error = solved([normal, normal], start, free)
        assert float(error.max()) < 1e-6 * float(normal.varies(free).max())
        layers.put_in(weight, found, some, getattr(module, "groups", 1) > 1)
        bias[torch.as_tensor(some.outs)] = offset
    torch.testing.assert_close(weight, module.weight.detach(), rtol=0, atol=1e-4)
    if free:
        torch.testing.assert_close(bias, module.bias.detach(), rtol=0, atol=1e-4)  # type: ignore[union-attr]


def test_sums_over_batches_are_the_sums_over_all_rows() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 90, 5, dtype=torch.float64), torch.randn(2, 90, 3, dtype=torch.float64)
    once, parts = Normal.of(x, y), None
    for a, b in zip(x.split(37, 1), y.split(37, 1), strict=True):
        parts = Normal.of(a, b).plus(parts)
    assert parts is not None
    assert parts.rows == once.rows
    for name in ("x", "y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(parts, name), getattr(once, name), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("intercept", [True, False])
def test_the_solution_is_that_of_least_squares_and_the_error_what_is_left(intercept: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 500, 6, dtype=torch.float64) + 2
    y = x @ torch.randn(1, 6, 3, dtype=torch.float64) + torch.randn(1, 500, 3, dtype=torch.float64) + 5
    normal = Normal.of(x, y)
    weight, bias = normal.solve(1e-12, torch.zeros(1, 6, 3, dtype=torch.float64), intercept)
    columns = torch.cat([x[0], torch.ones(500, 1, dtype=torch.float64)], 1) if intercept else x[0]
    wanted = torch.linalg.lstsq(columns, y[0]).solution
    torch.testing.assert_close(weight[0], wanted[:6], rtol=1e-6, atol=1e-8)
    left = (x @ weight + bias[:, None] - y).square().sum()
    torch.testing.assert_close(normal.error(weight, bias)[0], left, rtol=1e-8, atol=0)
    worse = normal.error(weight * 1.01, bias)[0]  # one percent off is seen
    assert worse > left * 1.001


def test_no_block_is_solved_to_something_worse_on_held_out_rows_than_it_starts_from() -> None:
    """Fewer rows than features, of noise: the solution that fits them best is worthless elsewhere."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 4, 12, 30, dtype=torch.float64), torch.randn(4, 4, 12, 2, dtype=torch.float64)
    start = torch.zeros(4, 30, 2, dtype=torch.float64)
    parts = [Normal.of(*some) for some in zip(x, y, strict=True)]

    def left(pull: float | None) -> torch.Tensor:
        """What is left of the rows of each part, solved on all other rows."""
        total = torch.zeros(4, dtype=torch.float64)
        for i in range(4):
            others = [j for j in range(4) if j != i]
            rest = Normal.of(torch.cat([*x[others]], 1), torch.cat([*y[others]], 1))
            weight, bias = rest.solve(pull, start, True) if pull else (start, rest.intercept(start, True))
            total += (x[i] @ weight + bias[:, None] - y[i]).square().sum((1, 2))
        return total

    weight, bias, error = solved(parts, start, True)
    wanted = torch.stack([left(None), *(left(pull) for pull in PULLS)])
    torch.testing.assert_close(error, wanted.amin(0), rtol=1e-8, atol=0)
    assert bool((left(1e-6) > 1.15 * error).all())
    every = Normal.of(torch.cat([*x], 1), torch.cat([*y], 1))
    for block, best in enumerate(wanted.argmin(0).tolist()):  # then all rows count
        solution = every.solve(PULLS[best - 1], start, True) if best else (start, every.intercept(start, True))
        torch.testing.assert_close(weight[block], solution[0][block], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(bias[block], solution[1][block], rtol=1e-8, atol=1e-10)


def reader(weight: torch.Tensor, slots: list[np.ndarray]) -> Reader:
    outs = tuple(np.array_split(np.arange(len(weight)), len(slots)))
    return Reader(weight, Division(tuple(slots), outs))


def test_a_projection_keeps_all_of_what_fits_into_it() -> None:
    """Branches whose layers weigh 3 directions of 8 channels lose nothing in 3 places, and the weights go along."""
    torch.manual_seed(0)
    slots = [np.arange(3), np.arange(3, 6)]
    weights = [torch.cat([_low_rank(4, 3, taps), _low_rank(4, 3, taps)]) for taps in (9, 1)]
    weights[1] = torch.einsum("oct,c->oct", weights[0][:, :, :1], torch.ones(8, dtype=torch.float64))
    mix = torch.randn(8, 8, dtype=torch.float64)
    found = projected([reader(w, slots) for w in weights], mix @ mix.T)
    assert found is not None
    takes, new, _ = found
    for weight, other in zip(weights, new, strict=True):
        for g, slot in enumerate(slots):
            rows = slice(4 * g, 4 * g + 4)
            again = torch.einsum("ort,rc->oct", other[rows][:, slot], takes[slot])
            torch.testing.assert_close(again, weight[rows], rtol=1e-6, atol=1e-8)
            others = np.setdiff1d(np.arange(6), slot)
            assert not other[rows][:, others].any()


def _low_rank(outs: int, rank: int, taps: int) -> torch.Tensor:
    left = torch.randn(outs, rank, taps, dtype=torch.float64)
    return torch.einsum("ort,rc->oct", left, torch.randn(rank, 8, dtype=torch.float64))


def test_a_projection_takes_what_the_layers_give_most_of() -> None:
    """No other directions explain more of a layer's outputs: neither of its weights alone nor random ones."""
    torch.manual_seed(0)
    spread = torch.diag(torch.logspace(-2, 2, 8, dtype=torch.float64))
    weight = torch.randn(6, 8, 1, dtype=torch.float64)
    slots = [np.arange(2), np.arange(2, 4)]
    found = projected([reader(weight, slots)], spread)
    assert found is not None

    def lost(takes: torch.Tensor) -> float:
        """What is left of W x when it is predicted from ``takes`` · x."""
        w = weight[:3, :, 0]
        cross = w @ spread @ takes.T
        return float((w @ spread @ w.T - cross @ torch.linalg.solve(takes @ spread @ takes.T, cross.T)).trace())

    best = lost(found[0][:2])
    assert best <= lost(torch.linalg.svd(weight[:3, :, 0])[2][:2]) + 1e-9
    assert all(best <= lost(torch.randn(2, 8, dtype=torch.float64)) for _ in range(20))


def test_branches_hold_together_what_is_read_jointly() -> None:
    """Both branches' layers weigh the same two directions of 8 channels; a layer behind reads all channels."""
    torch.manual_seed(0)
    slots = [np.arange(0, 8, 2), np.arange(1, 8, 2)]
    half = _low_rank(4, 2, 1)
    weight, mix = torch.cat([half, half]), torch.randn(8, 8, dtype=torch.float64)
    one = torch.eye(8, dtype=torch.float64)
    alone = projected([reader(weight, slots)], mix @ mix.T)
    found = projected([reader(weight, slots)], mix @ mix.T, [0.1 * one[:, :, None]])
    assert alone is not None
    assert found is not None
    takes, new, back = found
    assert int(torch.linalg.matrix_rank(takes, rtol=1e-6)) == 6  # the two twice, and two more from each branch
    again = torch.einsum("ort,rc->oct", new[0], takes)
    torch.testing.assert_close(again, weight, rtol=1e-6, atol=1e-8)
    lost = [float((b @ t @ mix - mix).norm() / mix.norm()) for t, b in ((takes, back), (alone[0], alone[2]))]
    assert lost[0] < 0.2 < lost[1], lost
    torch.testing.assert_close(back @ takes @ back, back, rtol=1e-6, atol=1e-8)


def test_no_projection_where_all_channels_fit_or_branches_differ() -> None:
    weight = torch.randn(4, 8, 1, dtype=torch.float64)
    square = torch.eye(8, dtype=torch.float64)
    assert projected([reader(weight, [np.arange(8), np.arange(8, 16)])], square) is None
    other = reader(weight, [np.arange(3), np.arange(3, 6)])
    assert projected([reader(weight, [np.arange(2), np.arange(2, 6)]), other], square) is None
    assert projected([reader(weight, [np.arange(3), np.arange(2, 5)])], square) is None
