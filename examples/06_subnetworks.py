"""One set of weights, three networks: a small VGG on handwritten digits with two sub-models that leave out its first
convolutions, trained together, picked at run time, exported as ONNX files over one file of weights. About a minute.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import splitfx
from splitfx import MultiModelLoss, Recipe
from splitfx.passes import SubNetworks
from splitfx.train.finetune import evaluate

SHAPE = (1, 16, 16)


def network(widths: tuple[int, ...] = (24, 48, 48)) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 1
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4, 10))


def main(out: Path = Path("demo-out/subnetworks"), epochs: int = 5) -> dict[str, float]:
    """The accuracy of every model, in percent."""
    out.mkdir(parents=True, exist_ok=True)
    digits = splitfx.load_data("digits", SHAPE)
    plan = splitfx.Plan([SubNetworks(cuts=(2, 4))], input_shape=(1, *SHAPE))
    split: Any = splitfx.transform(network().eval(), plan)  # a SubNetworksGraph
    print(splitfx.explain(split))

    recipe = Recipe(epochs=epochs, lr=0.01, keep="last")
    splitfx.finetune(split, digits.train, digits.val, recipe, loss=MultiModelLoss())
    models = {"base": split.base(), "sub0": split.detach(0), "sub1": split.detach(1)}
    accuracy = {name: evaluate(model, digits.val).accuracy for name, model in models.items()}
    print(f"\n{split.figures(runs=50)}\n")
    print("accuracy: " + ", ".join(f"{name} {value:.2f} %" for name, value in accuracy.items()))

    budget = split.figures()[1].macs
    chosen = split.select(max_macs=budget)
    image = digits.val[0][0][None]
    print(f"within {budget:,} MACs the digit is {int(chosen(image).argmax())}; it is {digits.val[0][1]}")

    splitfx.save(split, out / "split", overwrite=True)
    splitfx.inspect_html(split, out / "split.html", overwrite=True)
    bundle = splitfx.Bundle(splitfx.export_bundle(split, out / "bundle", val=digits.val, overwrite=True))
    times = bundle.warm_up(image)
    answer = bundle.run(image, deadline=2 * max(times.values()), late="fastest")
    print(f"\n{bundle}\n\nwith time enough {answer.model} answers: {int(answer.outputs[0].argmax())}")
    return accuracy


if __name__ == "__main__":
    main()
