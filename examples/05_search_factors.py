"""The search of MalekHosseini et al. on real data: per block of a small VGG the largest factor that keeps the accuracy.

On Fashion-MNIST where Debian's package dataset-fashion-mnist is installed, else on handwritten digits. Each split is
solved on images without labels first and scored as it is; only one that is a little below the tolerance is trained.
Stop it at any moment: the next run goes on.
"""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset

import splitfx
from splitfx import Recipe, RecipeTuner, SearchSpace, SearchStudy

FASHION = Path("/usr/share/datasets/fashion-mnist")
TRAINED, CALIBRATION = 12_000, 512  # images to train on, and others to calibrate on


def network(side: int, widths: tuple[int, ...] = (16, 32, 48)) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 1
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
        side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 10))


def main(
    out: Path = Path("demo-out/search"), epochs: int = 3, tuned: int = 1, data: str = "", trained: int = TRAINED
) -> splitfx.SearchResult:
    out.parent.mkdir(parents=True, exist_ok=True)
    word = data or ("fashion-mnist" if FASHION.is_dir() else "digits")
    side = 16 if word == "digits" else 28
    sets = splitfx.load_data(word, (1, side, side), augment=False)
    count = len(sets.train)  # type: ignore[arg-type]
    first = min(trained, count - CALIBRATION)
    train = Subset(sets.train, range(first))
    images = torch.stack([sets.train[i][0] for i in range(first, first + CALIBRATION)])
    model = network(side).eval()
    print(f"{word}: training the unsplit network on {first} images, {epochs} epochs")
    print(splitfx.finetune(model, train, sets.val, Recipe(epochs=epochs, lr=0.05)))
    result = splitfx.search_factors(
        SearchSpace(model, images[:1]),
        RecipeTuner(train, sets.val, Recipe(epochs=tuned, lr=0.02)),
        tolerance=0.5,
        calibration=images,
        near=2.0,
        study=SearchStudy(out, resume=True),
    )
    print(f"\n{result}")
    result.plan.save(out / "plan.toml", overwrite=True)
    splitfx.save(result.split, out / "split", overwrite=True)
    result.plot(out / "trend.png", overwrite=True)
    print(f"\nplan, trained split and picture are in {out}")
    return result


if __name__ == "__main__":
    main()
