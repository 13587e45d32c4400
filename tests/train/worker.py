"""``python -m tests.train.worker finetune|search FOLDER OUT``: goes on where it was killed; also under torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from splitfx.ground.files import written_whole
from splitfx.train.finetune import finetune
from splitfx.train.recipe import Recipe
from splitfx.train.search.greedy import search_factors
from splitfx.train.search.space import SearchSpace
from splitfx.train.search.study import SearchStudy
from splitfx.train.search.tuner import RecipeTuner
from tests.train.networks import network, planted, split_network

EPOCHS = 4


class Counted(torch.utils.data.Dataset[Any]):
    """Writes down which samples this process drew."""

    def __init__(self, data: Any, path: Path) -> None:
        self.data, self.path, self.classes = data, path, data.classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("a") as log:
            log.write(f"{index}\n")
        return self.data[index]


def finetuned(folder: str, out: str) -> None:
    model = network()
    split = split_network(model)
    made = planted(samples=300)
    recipe = Recipe(epochs=EPOCHS, batch_size=32, lr=0.05, seed=3)
    rank = int(os.environ.get("RANK", "0"))
    train = Counted(made.train, Path(out).with_suffix(f".drawn{rank}"))
    print("start", flush=True)
    history = finetune(
        split, train, made.val, recipe, teacher=model, folder=folder, resume=True, device="cpu",
        on_epoch=lambda epoch: print("epoch", epoch.epoch, flush=True),
    )  # fmt: skip
    if rank == 0:
        with written_whole(out, overwrite=True) as draft:
            save_file({k: v.contiguous() for k, v in split.state_dict().items()}, str(draft))
        Path(out).with_suffix(".json").write_text(json.dumps(json.loads(history.to_json())))


def searched(folder: str, out: str) -> None:
    """A search of two blocks with training; one line for each trial that starts or is done."""
    made = planted(samples=200)
    print("start", flush=True)
    found = search_factors(
        SearchSpace(network(), torch.zeros(1, 1, 12, 12), factors=(2, 4)),
        RecipeTuner(made.train, made.val, Recipe(epochs=2, batch_size=32, lr=0.05), device="cpu"),
        tolerance=100.0, study=SearchStudy(folder, resume=True), progress=lambda text: print(text, flush=True),
    )  # fmt: skip
    with written_whole(out, overwrite=True) as draft:
        save_file({k: v.contiguous() for k, v in found.split.state_dict().items()}, str(draft))
    Path(out).with_suffix(".json").write_text(found.to_json())


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"finetune": finetuned, "search": searched}[sys.argv[1]](*sys.argv[2:])
