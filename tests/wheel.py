"""What `make wheel` runs where only the wheel is installed, in an empty folder: the tour of the README, small.

Run it with the interpreter of that environment; it imports nothing of the tree.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import splitfx
from splitfx.passes import FoldBatchNorm, Group, Tile


def model() -> nn.Module:
    torch.manual_seed(0)
    conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())  # noqa: E731
    return nn.Sequential(conv(1, 16), conv(16, 16), nn.MaxPool2d(2), conv(16, 16), nn.AdaptiveAvgPool2d(1)).append(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    )


def main() -> None:
    tree = Path(__file__).parents[1]
    assert tree / "splitfx" not in Path(splitfx.__file__).parents, f"splitfx is that of {tree}, not of the wheel"
    net, shape = model().eval(), (1, 1, 16, 16)
    tiled = splitfx.transform(net, [FoldBatchNorm(), Tile(budget="0.7x")], (1, 1, 64, 64))
    found = splitfx.compare(net, tiled)
    assert found.max_rel < 1e-5
    assert found.after.peak_bytes <= 0.7 * found.before.peak_bytes
    split = splitfx.transform(net, Group(factors=2), shape)
    digits = splitfx.load_data("digits", shape[1:])
    splitfx.finetune(split, digits.train, digits.val, splitfx.Recipe(epochs=1, lr=0.05), teacher=net)
    splitfx.save(split, "split")
    file = splitfx.export_onnx(splitfx.load("split"), "split.onnx")
    assert splitfx.check_onnx(split, file, providers=("cpu",), runs=2).ok
    splitfx.inspect_html(split, "split.html")
    for words in ("--version", "explain split", "passes", "completion bash", "doctor"):
        subprocess.run([Path(sys.executable).parent / "splitfx", *words.split()], check=True, stdout=subprocess.DEVNULL)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import splitfx"], check=True)
    took = time.perf_counter() - started
    python = sys.version.split()[0]
    print(f"Python {python}, torch {torch.__version__}: right; `import splitfx` in {took * 1000:.0f} ms")


if __name__ == "__main__":
    main()
