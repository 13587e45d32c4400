"""FoldBatchNorm: exact for every layer that can take a norm, and a reason for each that cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import UnsupportedError, VerificationError
from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from splitfx.passes import FoldBatchNorm, fold_batchnorm
from tests import oracle
from tests.models import ZOO, image
from tests.rewrites import rewritten


def folded(model: nn.Module, x: torch.Tensor, step: FoldBatchNorm | None = None) -> tuple[fx.GraphModule, list[str]]:
    """The result in float64 and what its notes say; equal to the model, which the pipeline proves too."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor)
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 2)
    model, x = model.double().eval(), x.double()
    split, _ = run_pass(trace(model, x), step or FoldBatchNorm())
    oracle.assert_equal_outputs(split, model, x)
    return split, [f"{n.where}: {n.what}" for n in info(split).steps[-1].notes]


def norms(split: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in split.modules())


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)], (2, 3, 9, 9)),
        ([nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)], (2, 3, 9, 9)),
        ([nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
        ([nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)], (2, 4, 9, 9)),
        ([nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
        ([nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
        ([nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)], (2, 3, 9)),
        ([nn.Conv3d(3, 5, 2), nn.BatchNorm3d(5)], (2, 3, 4, 4, 4)),
        ([nn.ConvTranspose1d(3, 5, 3), nn.BatchNorm1d(5)], (2, 3, 9)),
        ([nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)], (3, 5)),
    ],
    ids=lambda v: type(v[0]).__name__ if isinstance(v, list) else "x".join(map(str, v)),
)
def test_it_folds(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    split, notes = folded(nn.Sequential(*layers), torch.randn(shape))
    assert norms(split) == 0
    assert notes == ["1: folded into 0"]
    assert "running_mean" not in str(list(split.state_dict()))


BEFORE = """\
%x = input(2, 3, 9, 9)
%conv = Conv2d(3, 4, 3, bias=False) "conv" (%x)
%norm = BatchNorm2d(4) "norm" (%conv)
%relu_ = relu_(%norm)
%short = Conv2d(4, 8, 1, stride=2) "short" (%relu_)
%main = Conv2d(4, 8, 3, stride=2, padding=1) "main" (%relu_)
%main_norm = BatchNorm2d(8) "main_norm" (%main)
%add = add(%main_norm, %short)
%late = BatchNorm2d(8) "late" (%add)
return %late
"""
AFTER = """\
%x = input(2, 3, 9, 9)
%conv = Conv2d(3, 4, 3) "conv" (%x)
%relu_ = relu_(%conv)
%short = Conv2d(4, 8, 1, stride=2) "short" (%relu_)
%main = Conv2d(4, 8, 3, stride=2, padding=1) "main" (%relu_)
%add = add(%main, %short)
%late = BatchNorm2d(8) "late" (%add)
return %late
# norm: folded into conv
# main_norm: folded into main
# late: not folded: it reads add, which has no weight to fold into
"""


def test_the_text_before_and_after() -> None:
    assert rewritten(BEFORE, FoldBatchNorm()) == AFTER


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def tied() -> nn.Module:
    model = Model(lambda m, x: m.bn(m.a(x)) + m.b(x), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    model.a.weight = model.b.weight  # type: ignore[assignment]
    return model


def conv() -> nn.Module:
    return nn.Conv2d(3, 3, 1)


def norm(**options: Any) -> nn.Module:
    return nn.BatchNorm2d(3, **options)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: Model(lambda m, x: m.n(x), n=norm()), "it reads an input of the model, which has no weight"),
        (
            lambda: Model(lambda m, x: m.n(m.c(x).relu()), c=conv(), n=norm()),
            "it reads relu, which has no weight",
        ),
        (lambda: Model(lambda m, x: m.n(m.c(x) + x), c=conv(), n=norm()), "it reads add"),
        (lambda: Model(lambda m, x: (y := m.c(x)) + m.n(y), c=conv(), n=norm()), "c is also read by add"),
        (lambda: Model(lambda m, x: m.n(m.c(m.c(x))), c=conv(), n=norm()), "the model calls c 2 times"),
        (
            lambda: Model(lambda m, x: m.n(m.d(m.n(m.c(x)))), c=conv(), d=conv(), n=norm()),
            "the model calls it 2 times",
        ),
        (
            lambda: Model(lambda m, x: m.n(m.c(x)), c=conv(), n=norm(track_running_stats=False)),
            "those of the batch",
        ),
        (
            lambda: Model(lambda m, x: m.n(m.l(x.flatten(2))), l=nn.Linear(81, 7), n=nn.BatchNorm1d(3)),
            "the features of l",
        ),
        (
            lambda: Model(lambda m, x: m.n(nn.functional.conv2d(x, m.c.weight * 2)), c=conv(), n=norm()),
            "computed by the",
        ),
        (tied, "a shares its weight with another layer"),
    ],
)
def test_it_declines(model: Callable[[], nn.Module], why: str) -> None:
    split, notes = folded(model(), image(2, 3, 9, 9))
    assert norms(split) == 1
    assert any(f"not folded: {why}" in n or why in n for n in notes), notes


def test_nothing_to_fold_is_said() -> None:
    _, notes = folded(nn.Conv2d(3, 4, 1), image())
    assert notes == ["model: has no batch norm: nothing to fold"]


def test_train_mode_is_refused() -> None:
    model, x = ZOO["residual"]()
    with pytest.raises(UnsupportedError, match="call model.eval\\(\\) first"):
        splitfx.transform(model.train(), FoldBatchNorm(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model, x = ZOO["residual"]()
    split = splitfx.transform(model.eval().to(dtype), FoldBatchNorm(), x.to(dtype))
    assert norms(split) == 0
    oracle.assert_equal_outputs(split.float(), model.float(), x) if dtype is torch.float32 else None
    assert split(x.to(next(split.parameters()).dtype)).isfinite().all()


def test_a_frozen_conv_stays_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).requires_grad_(False)
    split, _ = folded(model, image())
    assert not any(p.requires_grad for p in split.parameters())


def test_a_second_name_follows() -> None:
    inner = nn.Conv2d(3, 4, 1, bias=False)
    model = Model(lambda m, x: m.n(m.c(x)), c=inner, again=inner, n=nn.BatchNorm2d(4))
    split, _ = folded(model, image(2, 3, 9, 9))
    state = split.state_dict()
    assert torch.equal(state["c.weight"], state["again.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121"])
def test_real_models(name: str) -> None:
    import torchvision

    model = torchvision.models.get_model(name)
    before = norms(model)
    split, notes = folded(model, image(2, 3, 64, 64))
    assert sum("folded into" in n for n in notes) + norms(split) == before
    assert norms(split) == (62 if name == "densenet121" else 0)  # pre-activation norms read concats


@pytest.mark.parametrize("fault", ["percent", "no_eps", "doubled"])
def test_sabotage(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = fold_batchnorm._fold

    def wrong(module: Any, norm: Any) -> None:
        if fault == "no_eps":
            norm.eps = 0.0
        right(module, norm)
        with torch.no_grad():
            module.bias.mul_({"percent": 1.01, "doubled": 2.0}.get(fault, 1.0))

    monkeypatch.setattr(fold_batchnorm, "_fold", wrong)
    model, x = ZOO["residual"]()
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(VerificationError, match="broke its promise"):
            splitfx.transform(model.eval().to(dtype), FoldBatchNorm(), x.to(dtype))
