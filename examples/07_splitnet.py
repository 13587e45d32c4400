"""Learn which classes and features belong together, carve the network into groups, and run it as one.

Generated images: two groups of eight classes, each with patterns that matter to that group alone. About a minute.
"""

import torch
from planted import planted_features
from torch import nn

import splitfx
from splitfx import Recipe, splitnet
from splitfx.passes import SplitNet
from splitfx.train.finetune import evaluate


def main(samples: int = 3000) -> None:
    data = planted_features(groups=2, classes=8, samples=samples, noise=1.0)
    torch.manual_seed(0)
    model = network(len(data.classes))
    graph = splitfx.trace(model, torch.zeros(1, 1, 12, 12))
    finetune(graph, data, Recipe(epochs=15, lr=0.05, weight_decay=5e-3, decay="all", schedule="constant", keep="last"))
    print(f"unsplit: {evaluate(graph, data.val).accuracy:.1f} %")

    groups = splitnet.attach(graph, {"conv3": 2, "fc": 2}, start="weights", classes=data.classes)
    finetune(graph, data, Recipe(epochs=6, lr=0.05, weight_decay=1e-4, keep="last"), regulariser=groups)
    groups.release()
    print(groups.convergence())

    plan = splitfx.Plan([SplitNet(groups.assignment(balance=True))], input_shape=(1, 1, 12, 12))
    split = splitfx.transform(graph, plan)  # exactly the network whose weights between groups are zero
    print(splitfx.explain(split))
    finetune(split, data, Recipe(epochs=2, lr=0.02, keep="last"))
    print(f"split in two: {evaluate(split, data.val).accuracy:.1f} %")


def finetune(model: nn.Module, data: object, recipe: Recipe, **options: object) -> None:
    splitfx.finetune(model, data.train, data.val, recipe, progress=False, **options)  # type: ignore[attr-defined, arg-type]


class Network(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(48, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.bn1(self.conv1(x)).relu())
        x = self.pool(self.bn2(self.conv2(x)).relu())
        return self.fc(self.bn3(self.conv3(x)).relu().mean((2, 3)))


def network(classes: int) -> nn.Module:
    return Network(classes)


if __name__ == "__main__":
    main()
