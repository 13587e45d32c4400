"""Split torchvision's VGG-16 by MalekHosseini et al.'s plan (8, 2, 2, 4, 4), save it, export it, check it, compare.

Run by `make demo`. The weights are random: what is shown is what the compiler does, not an accuracy. A real
use starts from trained weights and fine-tunes the split (see 02_train.py).
"""

import sys
import time
from pathlib import Path

import torch
import torchvision

import splitfx
from splitfx.passes import Group

SHAPE = (1, 3, 224, 224)


def main(out: Path = Path("demo-out")) -> None:
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)

    say("making torchvision's VGG-16 with random weights")
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None).eval()
    inputs = torch.randn(SHAPE)

    plan = splitfx.Plan([Group(factors=(8, 2, 2, 4, 4))], input_shape=SHAPE)
    plan.save(out / "plan.toml", overwrite=True)
    split = splitfx.transform(model, plan, progress=say)
    print(f"\n{splitfx.explain(split)}\n")

    say(f"saving to {out / 'split'}")
    splitfx.save(split, out / "split", overwrite=True)
    say(f"exporting to {out / 'split.onnx'}")
    splitfx.export_onnx(split, out / "split.onnx", overwrite=True)
    say("checking the file under onnxruntime")
    report = splitfx.check_onnx(split, out / "split.onnx", inputs, runs=5, progress=say)
    print(f"\n{report}\n")

    say("measuring dense and split")
    dense, narrow = (splitfx.measure(one, inputs, runs=3) for one in (model, split))
    page = splitfx.inspect_html(split, out / "split.html", overwrite=True)

    print(f"\nDense and split, before any training\n\n{splitfx.compare(model, split, inputs)}")
    print(f"\ndense  {dense}\nsplit  {narrow}")
    print(f"eager latency: ÷{dense.seconds / narrow.seconds:.2f}\n\nlook at {page}")
    say("done")
    if not report.ok:
        sys.exit("the ONNX file does not agree with the module")


if __name__ == "__main__":
    main()
