"""The graph of a saved folder (program.json), edited: loaded, and run where that is not refused.

What is accepted must run on inputs of the recorded sizes: the rehearsal at load said so.
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import nn

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import SplitfxError
from splitfx.ir.graph import random_inputs
from splitfx.passes import Tile
from splitfx.storage import PROGRAM
from tests.fuzz.mutate import edited

SAMPLE = 150
Folder = dict[str, bytes]


class Pair(nn.Module):
    """Keyword inputs, a shared layer, a constant, operators with options, outputs in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.again, self.fc = self.norm, nn.Linear(4, 2)
        self.register_buffer("scale", torch.rand(4, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor, *, y: list[torch.Tensor]) -> dict[str, object]:
        z = self.again(self.norm(self.conv(x))).relu() * self.scale + y[0]
        z = nn.functional.max_pool2d(z, 2)
        a, b = torch.cat([z, z.sigmoid()], 1).chunk(2, 1)
        return {"sum": self.fc(z.mean((2, 3))), "parts": [a.reshape(a.shape[0], -1), (b[..., 1:],)]}


def prepare() -> None:
    templates()


@cache
def templates() -> tuple[Folder, ...]:
    torch.manual_seed(0)
    pair = splitfx.trace(Pair().eval(), ((torch.ones(2, 3, 6, 6),), {"y": [torch.ones(2, 4, 1, 1)]}))
    chain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2)).eval()
    tiled = run_pass(splitfx.trace(chain, torch.ones(1, 3, 12, 10)), Tile(rows=3))[0]
    return tuple(held(one) for one in (pair, tiled))


def held(split: torch.fx.GraphModule) -> Folder:
    with tempfile.TemporaryDirectory() as place:
        folder = splitfx.save(split, Path(place) / "split")
        return {one.name: one.read_bytes() for one in folder.iterdir()}


def written(template: Folder, place: Path) -> Path:
    place.mkdir()
    for name, content in template.items():
        (place / name).write_bytes(content)
    return place


def draw(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    template = rng.choice(templates())
    place = written(template, folder / "split")
    plain = edited(json.loads(template[PROGRAM]), rng, folder)
    (place / PROGRAM).write_text(json.dumps(plain) + " " * 10_000)  # not shorter than it was
    return used(place)


def used(place: Path) -> str:
    """Load a folder and run what it holds."""
    loaded = splitfx.load(place)
    args, kwargs = random_inputs(loaded)
    with torch.inference_mode():
        try:
            loaded(*args, **kwargs)
        except SplitfxError as error:
            raise AssertionError(f"it was loaded and does not run: {error}") from error
    str(splitfx.explain(loaded))
    return "accepted"
