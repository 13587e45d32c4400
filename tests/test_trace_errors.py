"""What cannot be traced is refused in the user's words: their module, their file and line, every reason, what
to do.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from splitfx.errors import SplitfxError, TraceError
from splitfx.frontend.trace import trace
from tests.models import ZOO, image, plain


class Inside(nn.Module):
    """Two blocks of one class, so that naming the right one takes more than the class."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks = nn.Conv2d(3, 3, 1), nn.Sequential(nn.Identity(), block())

    def forward(self, x: torch.Tensor) -> Any:
        return self.blocks(self.first(x))


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # here
            return x.relu()
        return x


class Item(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = x.max().item()  # here
        return x.relu() if top > 1 else x


class Loop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(x.abs().max())):  # here
            x = x.relu()
        return x


class Numpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy()))  # here


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value


class OddOutput(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return Thing(x)


class OddInput(nn.Module):
    def forward(self, thing: Thing) -> torch.Tensor:
        return thing.value.relu()


class TooNarrow(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)  # here


def refused(model: nn.Module, inputs: Any) -> str:
    with pytest.raises(TraceError) as caught:
        trace(model, inputs)
    message = str(caught.value)
    assert isinstance(caught.value, SplitfxError)
    assert "\n" not in message
    assert "\x1b" not in message
    return message


def line_of(block: type) -> str:
    lines, start = inspect.getsourcelines(block)
    return f"{inspect.getfile(block)}:{start + next(i for i, line in enumerate(lines) if '# here' in line)}"


@pytest.mark.parametrize("block", [Branch, Item, Loop, Numpy])
def test_names_module_line_reasons_and_advice(block: type[nn.Module]) -> None:
    message = refused(Inside(block), image())
    assert message.startswith(f"Inside cannot be traced in blocks.1 ({block.__name__}) at {line_of(block)}.")
    assert "torch.export: " in message
    assert "torch.fx.symbolic_trace: " in message
    assert "What to do: " in message
    assert ("numpy" in message.partition("What to do")[2]) == (block is Numpy)


def test_second_of_two_equal_blocks_is_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Identity()), nn.Sequential(nn.ReLU(), Branch()))
    assert "in 1.1 (Branch) at " in refused(model, image())


def test_wrong_channels_name_the_layer() -> None:
    message = refused(Inside(lambda: TooNarrow(5, 2, 3)), image())
    assert "Inside does not run on the example inputs of shape (2, 3, 16, 16)" in message
    assert f"in blocks.1 (TooNarrow) at {line_of(TooNarrow)}" in message
    assert "give inputs that model(...) accepts" in message


def test_wrong_input_size() -> None:
    message = refused(plain()[0], image(2, 3, 16))
    assert "does not run on the example inputs of shape (2, 3, 16)" in message
    assert "body.0.1 (BatchNorm2d)" in message or "body.0.0 (Conv2d)" in message


@pytest.mark.parametrize("inputs", [(image(), image()), (), {"y": image()}, ((image(),), {"y": image()})])
def test_wrong_inputs_by_count_or_name(inputs: Any) -> None:
    message = refused(plain()[0], inputs)
    assert "Head.forward(x: 'torch.Tensor')" in message
    assert "does not take the example inputs" in message


def test_device_mismatch() -> None:
    message = refused(plain()[0], image().to("meta"))
    assert "the model is on cpu, its example inputs on meta" in message


def test_dtype_mismatch() -> None:
    assert "parameters are float32, its example inputs float64" in refused(plain()[0], image().double())
    assert "parameters are float16, its example inputs float32" in refused(plain()[0].half(), image())


def test_unsupported_output() -> None:
    message = refused(Inside(OddOutput), image())
    assert "Thing" in message
    assert "pass and return tensors" in message


def test_unsupported_input() -> None:
    message = refused(OddInput(), (Thing(image()),))
    assert "Thing" in message
    assert "pass and return tensors" in message


def test_no_model_and_unknown_option() -> None:
    with pytest.raises(TraceError, match=r"a model is a torch.nn.Module, not function"):
        trace(plain, image())  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="dynamic is one of all, batch, none, not 'height'"):
        trace(*plain(), dynamic="height")


def test_a_refused_model_is_unchanged() -> None:
    model = Inside(Branch).train()
    before = {path: (set(vars(m)), m.training) for path, m in model.named_modules()}
    refused(model, image())
    assert {path: (set(vars(m)), m.training) for path, m in model.named_modules()} == before
    assert not any(re.search("forward$", k) for k in vars(model))


@pytest.mark.parametrize("name", ["plain", "keyword_inputs"])
def test_the_next_model_traces_after_a_refusal(name: str) -> None:
    refused(Inside(Branch), image())
    trace(*ZOO[name]())


def test_what_runs_is_not_said_to_fail() -> None:
    """An error of Python's own in tracing: only a call of the model shows whether the inputs are to blame."""

    class Traced(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(x) is not torch.Tensor:
                raise IndexError("tuple index out of range")
            return x

    for verify in (True, False):
        with pytest.raises(TraceError, match="Traced cannot be traced .* tuple index out of range"):
            trace(Traced(), image(), verify=verify)
