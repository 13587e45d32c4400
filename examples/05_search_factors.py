"""The search of paper A on real data: a small VGG on handwritten digits, per block the largest factor that keeps the
accuracy. Stop it at any moment: the next run goes on.
"""

from pathlib import Path

import torch
from torch import nn

import splitfx
from splitfx import Recipe, RecipeTuner, SearchSpace, SearchStudy

SHAPE = (1, 16, 16)


def network(widths: tuple[int, ...] = (16, 32, 48)) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 1
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4, 10))


def main(out: Path = Path("demo-out/search"), epochs: int = 8, tuned: int = 3) -> splitfx.SearchResult:
    out.parent.mkdir(parents=True, exist_ok=True)
    digits = splitfx.load_data("digits", SHAPE)
    model = network().eval()
    print(f"training the unsplit network, {epochs} epochs")
    print(splitfx.finetune(model, digits.train, digits.val, Recipe(epochs=epochs, lr=0.05)))
    result = splitfx.search_factors(
        SearchSpace(model, torch.zeros(1, *SHAPE)),
        RecipeTuner(digits.train, digits.val, Recipe(epochs=tuned, lr=0.05)),
        tolerance=0.5,
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
