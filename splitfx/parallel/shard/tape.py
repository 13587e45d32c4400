"""What crosses between ranks, forward and backward.

A crossing is one autograd function: its backward pass sends the gradients of what came back to where it came from,
where they are added. Each rank's gradients are a part of the whole ones: their sum over the ranks is what a single
process gets. So of a loss that all ranks have, rank 0 alone counts (`Left`), and of an input that all ranks have the
gradients are added up (`Entered`). All crossings hang on one *token*, from the inputs to the results, so every rank
takes them in the same order backward too, whether or not a gradient reaches them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from splitfx.parallel.link import Link, Spec


class Job:
    """What the parts of a model on one rank share during a call. ``token``: where gradients are wanted."""

    def __init__(self, link: Link) -> None:
        self.link, self.rank, self.size = link, link.rank, link.size
        self.token: torch.Tensor | None = None
        self.rows: dict[int, list[int]] = {}  # of each input that is given in pieces: rows on each rank

    @property
    def peers(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def cross(self, mail: Mail, sent: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.token is None:
            return self.link.swap(list(zip(mail.to, sent, strict=True)), mail.wanted)
        self.token, *found = _Crossing.apply(self.link, mail, self.token, *sent)  # type: ignore[misc]
        return found


@dataclass(frozen=True)
class Mail:
    """To whom each tensor goes that is sent, and what comes from whom; of both, whether a gradient comes back."""

    to: tuple[int, ...]
    sent: tuple[Spec, ...]
    sent_grads: tuple[bool, ...]
    wanted: tuple[tuple[int, Spec], ...]
    wanted_grads: tuple[bool, ...]

    @property
    def bytes(self) -> int:
        return sum(map(_bytes, self.sent))

    @property
    def backward_bytes(self) -> int:
        return sum(_bytes(spec) for (_, spec), back in zip(self.wanted, self.wanted_grads, strict=True) if back)


def _bytes(spec: Spec) -> int:
    return prod(spec[0]) * spec[1].itemsize


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, mail: Mail, token: torch.Tensor, *sent: torch.Tensor) -> Any:
        ctx.link, ctx.mail = link, mail
        ctx.set_materialize_grads(False)
        return token.clone(), *link.swap(list(zip(mail.to, sent, strict=True)), mail.wanted)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, token: torch.Tensor | None, *grads: torch.Tensor | None) -> Any:
        mail, link = ctx.mail, ctx.link
        back = [
            (peer, torch.zeros(spec[0], dtype=spec[1], device=link.device) if grad is None else grad)
            for (peer, spec), grad, wanted in zip(mail.wanted, grads, mail.wanted_grads, strict=True)
            if wanted
        ]
        asked = [(to, spec) for to, spec, own in zip(mail.to, mail.sent, mail.sent_grads, strict=True) if own]
        came = iter(link.swap(back, asked))
        return None, None, token, *(next(came) if own else None for own in mail.sent_grads)


class Entered(torch.autograd.Function):
    """An input that all ranks have alike."""

    @staticmethod
    def forward(ctx: Any, link: Link, token: torch.Tensor, x: torch.Tensor) -> Any:
        ctx.link, ctx.form = link, x
        ctx.set_materialize_grads(False)
        return token.clone(), x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, token: torch.Tensor | None, grad: torch.Tensor | None) -> Any:
        grad = torch.zeros_like(ctx.form) if grad is None else grad
        return None, token, ctx.link.summed(grad.reshape(-1)).view(grad.shape)


class Left(torch.autograd.Function):
    """The results. ``counts``: whether the gradient of each is this rank's part of the whole."""

    @staticmethod
    def forward(ctx: Any, counts: tuple[bool, ...], token: torch.Tensor, *results: torch.Tensor) -> Any:
        ctx.counts, ctx.token = counts, token
        ctx.set_materialize_grads(False)
        return tuple(y.view_as(y) for y in results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        own = (grad if counts else None for grad, counts in zip(grads, ctx.counts, strict=True))
        return None, torch.zeros_like(ctx.token), *own
