"""Inputs without data: drawn so that a trained model's batch norms read what they read in training.

Each norm's running mean and variance tell what its input looked like. Images of noise whose spectrum falls off as that
of photographs does are changed by gradient until every norm reads values of its own statistics (the divergence of two
normal distributions, channel by channel), batch by batch. What comes out looks like nothing, and is enough to solve a
split on (`Group(..., calibration=...)`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from splitfx.carving.narrow import BatchNorm
from splitfx.errors import PlanError
from splitfx.ground.progress import Say, say, told
from splitfx.ir.modes import in_eval
from splitfx.text import first_line

RATE = 0.1  # of Adam, on coefficients whose spread is 1


@told
def draw_inputs(
    model: nn.Module,
    shape: Sequence[int],
    *,
    steps: int = 150,
    batch: int = 128,
    seed: int = 0,
    progress: Say = True,
) -> torch.Tensor:
    """Inputs [N, C, H, W] for a model, made from its batch norms' statistics and nothing else; ``shape`` says how many.

    ``steps`` of gradient for each ``batch`` of them. The model is not changed. Raises `PlanError` for a model without
    batch norms that hold statistics, and for a shape that it does not take.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise PlanError(f"draw_inputs: shape is [N, C, H, W], four numbers of 1 or more; got {tuple(shape)}")
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    if not norms:
        raise PlanError(
            "draw_inputs: the model has no batch norm with statistics, so nothing says what it was trained on"
        )
    say("drawing inputs")
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(batch, shape[0] - at) for at in range(0, shape[0], batch)]
    if len(sizes) > 1 and sizes[-1] < batch // 2:  # too few for statistics of their own
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    with in_eval(model):
        return torch.cat([_drawn(model, norms, (size, *shape[1:]), steps, generator) for size in sizes])


def _drawn(
    model: nn.Module, norms: list[Any], shape: tuple[int, ...], steps: int, generator: torch.Generator
) -> torch.Tensor:
    place = next(model.parameters())
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator)).to(place.device)
    fall = _falling(shape).to(place.device)
    parts = torch.view_as_real(spectrum).div(math.sqrt(shape[2] * shape[3])).clone().requires_grad_()
    optimizer = torch.optim.Adam([parts], lr=RATE)
    read: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        n.register_forward_pre_hook(lambda module, given: read.__setitem__(module, _apart(module, given[0])))
        for n in norms
    ]
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            read.clear()
            _run(model, _images(parts, fall, shape, place.dtype))
            torch.stack(list(read.values())).mean().backward()
            optimizer.step()
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    return _images(parts.detach(), fall, shape, place.dtype)


def _run(model: nn.Module, images: torch.Tensor) -> None:
    try:
        model(images)
    except RuntimeError as error:
        raise PlanError(f"draw_inputs: the model does not take {list(images.shape)}: {first_line(error)}") from error


def _images(parts: torch.Tensor, fall: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    whole = torch.fft.irfft2(torch.view_as_complex(parts) * fall, s=shape[2:])
    return whole.mul(math.sqrt(shape[2] * shape[3])).to(dtype)


def _falling(shape: tuple[int, ...]) -> torch.Tensor:
    """One over the frequency, [H, W // 2 + 1], such that images have a spread of about 1."""
    rows, columns = torch.fft.fftfreq(shape[2])[:, None], torch.fft.rfftfreq(shape[3])[None]
    fall = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / max(shape[2:]))
    return fall / fall.square().mean().sqrt()


def _apart(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """How far a norm's input is from what it knows: the divergence of normal distributions, over its channels."""
    rows = x.movedim(1, 0).flatten(1)
    usual = norm.running_var + norm.eps
    share = (rows.var(1, correction=0) + norm.eps) / usual
    return (0.5 * (share + (rows.mean(1) - norm.running_mean).square() / usual - 1 - share.log())).mean()
