"""Look before you split: what a model costs, which blocks it has, and a page about the result.

A wrong number of factors is the quickest way to see the blocks: the message lists them.
"""

from pathlib import Path

import torch
import torchvision

import splitfx
from splitfx.passes import Group


def main(out: Path = Path("demo-out"), size: int = 224) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    graph = splitfx.trace(torchvision.models.resnet18(weights=None), torch.zeros(1, 3, size, size))
    print(splitfx.profile(graph))
    try:
        splitfx.transform(graph, Group(factors=(2,)))
    except splitfx.PlanError as error:
        print(f"\n{error}\n")
    split = splitfx.transform(graph, Group(factors=(1, 2, 2, 4, 4), lowering="grouped"))
    print(splitfx.explain(split))
    page = splitfx.inspect_html(split, out / "resnet18.html", overwrite=True)
    print(f"\nlook at {page}")
    return page


if __name__ == "__main__":
    main()
