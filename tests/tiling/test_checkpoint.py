"""Training through a tiled stage: the gradients of the untiled one, at less memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from splitfx.analysis.live import LiveStorage
from splitfx.tiling.plan import segments
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.run import checkpoint
from splitfx.tiling.run.checkpoint import checkpointed, describe
from splitfx.tiling.run.executor import Tiled
from tests import oracle
from tests.sampled import sampled
from tests.tiling import cases, trial

EXACT = oracle.TOLERANCE[torch.float64]
LINEAR = ("mean", "mean, kept", "sum", "global avg pool", "mean channels last")
UNTRAINABLE = ("relu in place", "in place")  # autograd refuses these models untiled too: they overwrite what it saved
BANDED = {n: m for n, m in cases.RULES.items() if n not in UNTRAINABLE} | {n: cases.PHASES[n] for n in LINEAR}


def wrapped(make: cases.Make) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, cases.C, 3, padding=1), nn.ReLU(inplace=True), make())


def image(batch: int = 2, height: int = 19, width: int = 17) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(
    call: Callable[..., Any], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(outputs, gradients of inputs and weights) of a loss in which every output element has a weight of its own."""
    given = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = call(*given)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    loss = sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)
    assert isinstance(loss, torch.Tensor)
    found = torch.autograd.grad(loss, [*given, *weights], allow_unused=True)
    asked = [*given, *weights]
    return outputs, [torch.zeros_like(t) if g is None else g for t, g in zip(asked, found, strict=True)]


def stage_of(model: nn.Module, x: torch.Tensor, schedule: Schedule | None = None) -> Tiled:
    graph, _ = trial.traced(model, x)
    return trial.tile(graph, schedule or Schedule(2)).tiled


def assert_same_gradients(tiled: Tiled, inputs: list[torch.Tensor]) -> None:
    weights = [p for p in tiled.stage.parameters() if p.requires_grad]
    # The stage's own layers that overwrite an input must not see the caller's leaves.
    wanted = gradients(lambda *xs: tiled.stage(*(x.clone() for x in xs)), inputs, weights)
    got = gradients(lambda *xs: checkpointed(tiled, xs), inputs, weights)
    assert len(got[0]) == len(wanted[0])
    pairs = list(zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True))
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    for ours, theirs in pairs:  # a bias before a norm has a gradient of 0, but for rounding
        off = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3 * largest)
        assert off <= EXACT, f"off by {off:.1e}"


@pytest.fixture
def many_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bands as there can be, however much is computed twice, and no cuts."""
    monkeypatch.setattr(segments, "WORK", float("inf"))
    monkeypatch.setattr(segments, "_places", lambda graph, stage: [])


@pytest.mark.parametrize("name", sampled(BANDED, 3))
@pytest.mark.usefixtures("many_bands")
def test_every_rule_has_the_gradients_of_the_untiled_stage(name: str) -> None:
    tiled, x = stage_of(wrapped(BANDED[name]), image()), image()
    assert_same_gradients(tiled, [x])
    assert "bands of rows" in " ".join(describe(tiled, [x])) or "one row" in name


@pytest.mark.parametrize("name", [n for n in cases.PHASES if n not in LINEAR])
def test_what_is_reduced_and_applied_again_is_computed_as_a_whole_and_says_so(name: str) -> None:
    tiled, x = stage_of(wrapped(cases.PHASES[name]), image()), image()
    assert_same_gradients(tiled, [x])
    lines = " ".join(describe(tiled, [x]))
    assert "as a whole: " in lines
    assert "what was reduced over it" in lines or "is no sum over the map" in lines


class Ladder(nn.Module):
    """Three outputs, of which two are read again inside: one per depth, as detectors want them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.c, self.fc = nn.Conv2d(6, 5, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        one = F.relu(self.a(x))
        two = F.relu(self.b(one))
        up = F.interpolate(self.c(two), scale_factor=2)
        return [one, two, up, self.fc(two.mean((2, 3)))]


@pytest.mark.parametrize("cut", [False, True])
def test_outputs_at_several_depths(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "WORK", float("inf"))
    if not cut:
        monkeypatch.setattr(segments, "_places", lambda graph, stage: [])
    x = image(2, 37, 29)
    assert_same_gradients(stage_of(Ladder(), x), [x])


def test_two_inputs_one_of_them_without_rows(many_bands: None) -> None:
    scaled = cases.call(lambda x, scale, conv: (conv(x) * scale).relu(), lambda: nn.Conv2d(3, 5, 3, padding=1))()
    x, scale = image(), torch.rand(2, 5, 1, 1, dtype=torch.float64) + 0.5
    graph, _ = trial.traced(scaled, (x, scale))
    assert_same_gradients(trial.tile(graph, Schedule(2)).tiled, [x, scale])


def resnet(size: int, dtype: torch.dtype = torch.float64) -> tuple[Tiled, torch.Tensor]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    tiled = stage_of(model, x).to(dtype)
    return tiled, x.to(dtype)


def test_a_residual_network_is_divided_and_has_the_same_gradients() -> None:
    tiled, x = resnet(160)
    assert len(describe(tiled, [x])) > 1
    assert_same_gradients(tiled, [x])


def held(call: Callable[..., Any], x: torch.Tensor, weights: Sequence[torch.Tensor]) -> int:
    """Most bytes alive in one forward and backward pass."""
    call(x)  # what is made once is there
    with LiveStorage([x], weights) as live:
        (call(x)[0].square().sum()).backward()
        return live.peak


def test_training_needs_much_less_memory() -> None:
    tiled, x = resnet(512, torch.float32)
    for weight in tiled.parameters():
        weight.requires_grad_(weight.dim() == 1)  # gradients of large weights would hide the activations
    weights = [*tiled.parameters(), *tiled.buffers()]
    plain = held(tiled.stage, x.requires_grad_(), weights)
    ours = held(lambda x: checkpointed(tiled, [x]), x, weights)
    assert ours < 0.5 * plain, f"{ours / 2**20:.0f} of {plain / 2**20:.0f} MiB"


@pytest.mark.usefixtures("many_bands")
@pytest.mark.parametrize("spoiled", ["store", "reduce", "halo"])
def test_a_backward_pass_that_is_wrong_is_seen(spoiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    band: Any = checkpoint._Band
    if spoiled == "store":  # rows of the halo counted twice
        monkeypatch.setattr(band, "store", band.__mro__[1].store)
    elif spoiled == "reduce":
        monkeypatch.setattr(checkpoint, "is_mean", lambda kernel: False)
    else:
        monkeypatch.setattr(band, "add_crops", lambda self: [p.copy_(leaf.grad) for leaf, p in self.crops])
    make = BANDED["global avg pool" if spoiled == "reduce" else "conv 3x3"]
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same_gradients(stage_of(wrapped(make), image()), [image()])


def test_weights_that_change_before_the_backward_pass_are_refused() -> None:
    tiled, x = stage_of(wrapped(cases.RULES["conv 3x3"]), image()), image()
    y = checkpointed(tiled, [x.requires_grad_()])[0]
    with torch.no_grad():
        next(tiled.stage.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weights_put_in_place_for_one_call_get_the_gradient() -> None:
    """As `torch.func.functional_call` does for ensembles and meta-learning."""
    tiled, x = stage_of(wrapped(cases.RULES["conv 3x3"]), image()), image()

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tiled = tiled

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpointed(self.tiled, [x])[0]

    holder = Holder()
    other = {n: (p.detach() * 2).requires_grad_() for n, p in holder.named_parameters()}
    torch.func.functional_call(holder, other, (x,)).square().sum().backward()
    got = {n: p.grad for n, p in other.items()}
    plain = {n.removeprefix("tiled.stage."): p.detach().clone().requires_grad_() for n, p in other.items()}
    torch.func.functional_call(tiled.stage, plain, (x,))[0].square().sum().backward()
    for name, p in other.items():
        wanted = plain[name.removeprefix("tiled.stage.")].grad
        assert p.grad is not None
        assert wanted is not None
        torch.testing.assert_close(got[name], wanted, rtol=EXACT, atol=EXACT)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    tiled, x = resnet(64)
    for name, weight in tiled.stage.named_parameters():
        weight.requires_grad_(name.startswith("fc"))
    checkpointed(tiled, [x])[0].sum().backward()
    assert {n for n, p in tiled.stage.named_parameters() if p.grad is not None} == {"fc.weight", "fc.bias"}
    for weight in tiled.stage.parameters():
        weight.requires_grad_(False)
    assert not checkpointed(tiled, [x])[0].requires_grad


def test_other_sizes_and_number_types_than_the_traced() -> None:
    tiled, _ = resnet(64)
    assert_same_gradients(tiled, [torch.randn(2, 3, 97, 75, dtype=torch.float64)])
    tiled.float()
    x = torch.randn(1, 3, 80, 64, requires_grad=True)
    checkpointed(tiled, [x])[0].sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_half_precision_by_autocast_is_the_same_backward(many_bands: None) -> None:
    tiled = stage_of(wrapped(cases.RULES["conv 3x3"]), image()).float()
    weights = list(tiled.stage.parameters())
    grads = []
    for call in (lambda x: tiled.stage(x), lambda x: checkpointed(tiled, [x])):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(image().float())[0].float()
        grads.append(torch.autograd.grad(y.square().sum(), weights))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2 * float(theirs.abs().max()))
