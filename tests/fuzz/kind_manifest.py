"""The manifest and the record of a saved folder (splitfx.json, explanation.json), edited: loaded, explained and run."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import torch
from torch import nn

import splitfx
from splitfx.passes import Group
from splitfx.storage import KIND
from splitfx.storage.record import NAME as RECORD
from tests.fuzz.kind_program import Folder, held, used, written
from tests.fuzz.mutate import edited

SAMPLE = 100


def prepare() -> None:
    template()


@cache
def template() -> Folder:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2)).eval()
    return held(splitfx.transform(model, Group(factors=(2,)), torch.randn(1, 3, 12, 12)))


def draw(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    place, name = written(template(), folder / "split"), rng.choice((KIND.manifest, RECORD))
    plain = edited(json.loads(template()[name]), rng, folder)
    (place / name).write_text(json.dumps(plain) + " " * 10_000)
    return used(place)
