"""DropIdentity: removes what does nothing in both modes, keeps what only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import UnsupportedError, VerificationError
from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from splitfx.ir.ops import text
from splitfx.passes import DropIdentity, drop_identity
from tests import oracle
from tests.models import ZOO, image
from tests.rewrites import rewritten


class Model(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(3, 4, 3)
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def stochastic_depth(p: float) -> nn.Module:
    from torchvision.ops import StochasticDepth

    return StochasticDepth(p, "row")


def dropped(
    model: nn.Module, step: DropIdentity | None = None, dynamic: str = "batch"
) -> tuple[fx.GraphModule, list[str]]:
    """The result and what its notes say; equal to the model in eval mode, for another batch too."""
    model, x = model.double().eval(), image(2, 3, 9, 9).double()
    graph = trace(model, x, dynamic=dynamic)
    split, _ = run_pass(graph, step or DropIdentity())
    oracle.assert_equal_outputs(split, model, x)
    if dynamic != "none":
        oracle.assert_equal_outputs(split, model, image(5, 3, 9, 9).double())
    return split, [f"{n.where}: {n.what}" for n in info(split).steps[-1].notes]


REMOVED: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Model(lambda m, x: m.layer(m.conv(x)).sin(), nn.Dropout(0.0)),
    "dropout2d": lambda: Model(lambda m, x: m.layer(m.conv(x)).sin(), nn.Dropout2d(0.0)),
    "functional_dropout": lambda: Model(lambda m, x: F.dropout(m.conv(x), 0.0, m.training).sin()),
    "stochastic_depth": lambda: Model(lambda m, x: m.layer(m.conv(x)).add_(1.0), stochastic_depth(0.0)),
    "flatten": lambda: Model(lambda m, x: m.conv(x).mean((2, 3)).flatten(1).sin()),
    "pad": lambda: Model(lambda m, x: F.pad(m.conv(x), (0, 0, 0, 0)).sin()),
    "slice": lambda: Model(lambda m, x: m.conv(x)[:, :, :].sin()),
    "slice_to_the_size": lambda: Model(lambda m, x: m.conv(x)[:, :4].sin()),
    "clone": lambda: Model(lambda m, x: m.conv(x).clone().sin()),
}


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_removed(name: str) -> None:
    split, notes = dropped(REMOVED[name]())
    assert any("removed" in n for n in notes), notes
    assert {n.op for n in split.graph.nodes} <= {"placeholder", "call_module", "call_function", "output"}
    assert len(split.graph.nodes) <= 5


BEFORE = """\
%x = input(2, 3, 9, 9)
%conv = Conv2d(3, 4, 3) "conv" (%x)
%identity = Identity() "identity" (%conv)
%dropout = Dropout(p=0.0) "dropout" (%identity)
%pad = pad(%dropout, [0, 0, 0, 0])
%whole = slice(%pad, 2, 0, 9223372036854775807)
%clone = clone(%whole)
%sin = sin(%clone)
%copied = clone(%sin)
%written = add_(%copied, %sin)
%half = slice(%written, 1, 0, 2)
%late = Dropout() "late" (%half)
return %late
"""
AFTER = """\
%x = input(2, 3, 9, 9)
%conv = Conv2d(3, 4, 3) "conv" (%x)
%sin = sin(%conv)
%copied = clone(%sin)
%written = add_(%copied, %sin)
%half = slice(%written, 1, 0, 2)
%late = Dropout() "late" (%half)
return %late
# identity: Identity removed
# dropout: Dropout removed
# pad: pad removed
# whole: slice removed
# clone: clone removed
# copied: clone stays: written works in place and would overwrite sin
# late: Dropout stays: it drops values in train mode (p=0.5); eval_only=True removes it
"""


def test_the_text_before_and_after() -> None:
    assert rewritten(BEFORE, DropIdentity()) == AFTER


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_train_mode_is_equal_too(name: str) -> None:
    model = REMOVED[name]().double()
    split, _ = run_pass(trace(model, image(2, 3, 9, 9).double()), DropIdentity())
    oracle.assert_equal_training(split.train(), model.train(), image(2, 3, 9, 9).double())


def written(m: Model, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return y.clone().add_(1.0) + y


def written_late(m: Model, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    z = y.clone()
    return z + y.mul_(2.0)


def written_through_a_view(m: Model, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    z = y[:, :2].clone()
    y.mul_(2.0)
    return torch.cat([y, z], 1)


def saved_for_backward(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x).sigmoid().clone().relu_()


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (
        lambda: Model(lambda m, x: m.layer(m.conv(x)), nn.Dropout(0.3)),
        "(p=0.3); eval_only=True removes it",
    ),
    "stochastic_depth": (lambda: Model(lambda m, x: m.layer(m.conv(x)), stochastic_depth(0.2)), "p=0.2"),
    "written": (lambda: Model(written), "works in place and would overwrite conv"),
    "written_late": (lambda: Model(written_late), "works in place and would overwrite conv"),
    "written_through_a_view": (lambda: Model(written_through_a_view), "works in place"),
    "saved_for_backward": (lambda: Model(saved_for_backward), "works in place"),
}


@pytest.mark.parametrize("name", sorted(KEPT))
def test_kept_with_a_reason(name: str) -> None:
    make, why = KEPT[name]
    _, notes = dropped(make())
    assert any("stays: " in n and why in n for n in notes), notes
    model = make().double()
    graph = trace(model, image(2, 3, 9, 9).double())
    split, _ = run_pass(graph, DropIdentity())
    oracle.assert_equal_training(split.train(), model.train(), image(2, 3, 9, 9).double())


UNTOUCHED: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "pool_that_keeps_this_size": (lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 7), "adaptive_avg_pool2d"),
    "half_a_dim": (lambda m, x: m.conv(x)[:, :3], "slice(%conv, 1, 0, 3)"),
    "every_other": (lambda m, x: m.conv(x)[:, ::2], "slice(%conv, 1, 0, 9223372036854775807, 2)"),
    "padding": (lambda m, x: F.pad(m.conv(x), (0, 1)), "pad"),
    "flatten": (lambda m, x: m.conv(x).flatten(1), "flatten"),
    "first_two_images": (lambda m, x: m.conv(x)[:2], "slice(%conv, 0, 0, 2)"),
    "other_layout": (lambda m, x: m.conv(x).clone(memory_format=torch.channels_last), "clone"),
    "cast": (lambda m, x: m.conv(x).to(torch.float32), "to"),
}


@pytest.mark.parametrize("name", sorted(UNTOUCHED))
def test_untouched(name: str) -> None:
    function, word = UNTOUCHED[name]
    split, _ = run_pass(trace(Model(function).double().eval(), image(2, 3, 9, 9).double()), DropIdentity())
    assert word in text(split)


def test_a_slice_to_the_batch_goes_only_where_the_batch_is_fixed() -> None:
    split, notes = dropped(Model(lambda m, x: m.conv(x)[:2].sin()), dynamic="none")
    assert "slice removed" in notes[0]
    assert "slice" not in text(split)


def test_the_model_does_not_return_its_own_input() -> None:
    graph = trace(Model(lambda m, x: x.clone()), image())
    split, _ = run_pass(graph, DropIdentity())
    x = image()
    assert split(x).data_ptr() != x.data_ptr()
    assert "its own input" in info(split).steps[-1].notes[0].what


@pytest.mark.parametrize("function", [lambda m, x: x[:, :2].clone().view(-1), lambda m, x: (y := m.conv(x), y.clone())])
def test_the_model_returns_no_shared_storage(function: Callable[..., torch.Tensor]) -> None:
    split, _ = run_pass(trace(Model(function), image()), DropIdentity())
    assert "clone" in text(split)


def test_eval_only() -> None:
    split, _ = dropped(KEPT["dropout"][0](), DropIdentity(eval_only=True))
    assert "Dropout" not in str(split)
    split, _ = dropped(KEPT["stochastic_depth"][0](), DropIdentity(eval_only=True))
    assert "StochasticDepth" not in str(split)
    with pytest.raises(UnsupportedError, match="call model.eval\\(\\) first"):
        splitfx.transform(KEPT["dropout"][0]().train(), DropIdentity(eval_only=True), image())


def test_an_activation_that_draws_is_no_identity() -> None:
    split, notes = dropped(Model(lambda m, x: m.layer(m.conv(x)), nn.RReLU()), DropIdentity(eval_only=True))
    assert "nothing to remove" in notes[0]
    assert "RReLU" in str(split)


def test_sabotage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that takes any slice for a whole one is caught."""
    monkeypatch.setattr(drop_identity, "_slices_all", lambda *given: True)
    model, x = ZOO["channel_shuffle"]()
    model = nn.Sequential(model, Model(lambda m, x: m.conv(x[:, 1:4]))).eval()
    with pytest.raises(VerificationError):
        splitfx.transform(model, DropIdentity(), x)
