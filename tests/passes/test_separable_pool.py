"""SeparablePool: the values of torch's pool for any window, and torch's own pool wherever that is the better one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

import splitfx
from splitfx.errors import VerificationError
from splitfx.ir import layers
from splitfx.ir.layers import SeparableMaxPool2d
from splitfx.ir.ops import text
from splitfx.passes import Group, SeparablePool, Tile

SIDE = st.integers(1, 17)


class Net(nn.Module):
    def __init__(self, **pool: Any) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.pool = nn.MaxPool2d(**(pool or {"kernel_size": 3, "stride": 2, "padding": 1}))

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(self.pool(self.one(x)))


@pytest.fixture
def split() -> Any:
    torch.manual_seed(0)
    return splitfx.transform(Net().eval(), SeparablePool(), torch.randn(2, 3, 15, 12))


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pool that is computed as maxima."""
    seen: list[int] = []
    real = layers.separable_max
    monkeypatch.setattr(layers, "separable_max", lambda *a: seen.append(1) or real(*a))
    return seen


# ---------------------------------------------------------------- the values


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_window(data: st.DataObject) -> None:
    kernel, stride, dilation = ([data.draw(st.integers(1, most)) for _ in range(2)] for most in (5, 4, 3))
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    ceil, x = data.draw(st.booleans()), torch.randn(2, 3, data.draw(SIDE), data.draw(SIDE))
    if data.draw(st.integers(0, 9)) == 0:
        x[0, 1, 0, 0] = float("nan")
    pool = SeparableMaxPool2d(kernel, stride, padding, dilation, ceil)
    try:
        wanted = F.max_pool2d(x, kernel, stride, padding, dilation, ceil)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="no window"):
            pool(x)
        return
    found = pool(x)
    assert found.is_contiguous()
    assert torch.equal(found.nan_to_num(99.0), wanted.nan_to_num(99.0))


@given(st.sampled_from([torch.float64, torch.bfloat16, torch.float16]), SIDE)
@settings(max_examples=20, deadline=None)
def test_any_type(dtype: torch.dtype, size: int) -> None:
    assume(size > 1)
    x = torch.randn(1, 2, size, 9).to(dtype)
    assert torch.equal(SeparableMaxPool2d(2)(x), F.max_pool2d(x, 2))


def test_before_and_after(split: Any) -> None:
    assert text(split) == (
        "%x = input(2, 3, 15, 12)\n"
        '%one = Conv2d(3, 4, 3) "one" (%x)\n'
        '%pool = SeparableMaxPool2d(3, stride=2, padding=1) "pool" (%one)\n'
        '%two = Conv2d(4, 4, 1) "two" (%pool)\n'
        "return %two\n"
    )
    assert [note.what for note in splitfx.explain(split).steps[0].notes] == ["maxima along rows, then along columns"]
    assert splitfx.explain(split).steps[0].difference == 0.0


def test_at_other_sizes_and_batches(split: Any) -> None:
    model = Net().eval()
    model.load_state_dict(split.state_dict())
    for size in ((2, 3, 15, 12), (1, 3, 8, 33), (5, 3, 21, 7)):
        x = torch.randn(size)
        with torch.no_grad():
            assert torch.equal(split(x), model(x))


def test_a_place_that_is_left_out_turns_the_oracle_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Any, kernel: Any, stride: Any, dilation: Any, before: Any, count: Any) -> Any:
        return real(x, (kernel[0] - 1, kernel[1]), stride, dilation, before, count)

    real = layers.separable_max
    monkeypatch.setattr(layers, "separable_max", wrong)
    with pytest.raises(VerificationError, match="'separable_pool' broke its promise"):
        splitfx.transform(Net().eval(), SeparablePool(), torch.randn(2, 3, 15, 12))


# ---------------------------------------------------------------- where torch's own pool is the better one


def test_on_a_processor_in_contiguous_memory(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = calls(monkeypatch), torch.randn(2, 3, 15, 12)
    with torch.no_grad():
        split(x)
        assert len(seen) == 1
        found = split.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert len(seen) == 1


def test_it_trains_as_before(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal values torch gives the gradient to the first; so does the result."""
    model, seen = Net(), calls(monkeypatch)
    model.load_state_dict(split.state_dict())
    x = torch.randint(0, 2, (2, 3, 15, 12)).float()
    for one in (model, split):
        one.train()(x).square().sum().backward()
    for key, value in model.named_parameters():
        torch.testing.assert_close(split.get_parameter(key).grad, value.grad, rtol=0, atol=0)
    assert not seen


@pytest.mark.parametrize("grad", [False, True])
def test_it_goes_through_transforms_of_functions(split: Any, grad: bool) -> None:
    pool, torchs, x = split.pool, nn.MaxPool2d(3, 2, 1), torch.randn(3, 2, 4, 9, 8)
    found: Any
    wanted: Any
    with torch.set_grad_enabled(grad):
        assert torch.equal(torch.vmap(pool)(x), torch.vmap(torchs)(x))
        found, wanted = (torch.func.jvp(one, (x[0],), (x[1],)) for one in (pool, torchs))
        assert all(map(torch.equal, found, wanted))
        with forward_ad.dual_level():
            found, wanted = (forward_ad.unpack_dual(one(forward_ad.make_dual(x[0], x[1]))) for one in (pool, torchs))
            assert all(map(torch.equal, found, wanted))
    found, wanted = (torch.func.grad(lambda v, one=one: one(v).square().sum())(x[0]) for one in (pool, torchs))
    assert torch.equal(found, wanted)


def test_in_a_file_it_is_one_pool(split: Any, tmp_path: Path) -> None:
    splitfx.export_onnx(split, tmp_path / "net.onnx")
    kinds = [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds == ["Conv", "MaxPool", "Conv"]


def test_compiled_it_is_torchs_own(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = calls(monkeypatch), torch.randn(2, 3, 15, 12)
    with torch.no_grad():
        found = torch.compile(split, backend="eager", fullgraph=True)(x)
        assert not seen
        assert torch.equal(found, split(x))


# ---------------------------------------------------------------- beside other passes


def test_it_is_divided_and_tiled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.MaxPool2d(3, 2, 1))
    ).eval()
    x = torch.randn(2, 3, 31, 26)
    split = splitfx.transform(model, [SeparablePool(), Group(factors=2), Tile(rows=4)], x)
    splitfx.save(split, tmp_path / "split")
    loaded = splitfx.load(tmp_path / "split", model)
    with torch.no_grad():
        assert torch.equal(loaded(x), split(x))
        plain = splitfx.transform(model, Group(factors=2), x)
        assert torch.allclose(split(x), plain(x), atol=1e-6)


# ---------------------------------------------------------------- what stays


class Asks(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(x)


@pytest.mark.parametrize(
    ("call", "shape", "why"),
    [
        (lambda x: F.max_pool2d(x, 2, return_indices=True), (2, 3, 8, 8), "its indices are read"),
        (lambda x: F.max_pool1d(x, 2), (2, 3, 8), "it is no pool of maps"),
        (lambda x: F.max_pool3d(x, 2), (2, 3, 8, 8, 8), "it is no pool of maps"),
        (lambda x: F.max_pool2d(x, 2), (3, 8, 8), "its input is no batch of maps"),
    ],
)
def test_what_stays_and_why(call: Any, shape: tuple[int, ...], why: str) -> None:
    split = splitfx.transform(Asks(call).eval(), SeparablePool(), torch.randn(shape))
    assert f"stays: {why}" in str(splitfx.explain(split))


def test_nothing_is_left_the_second_time(split: Any) -> None:
    again = splitfx.transform(split, SeparablePool())
    assert "it is separable already" in str(splitfx.explain(again))
    none = splitfx.transform(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), SeparablePool(), (1, 3, 8, 8))
    assert "has no max pool: nothing to do" in str(splitfx.explain(none))
