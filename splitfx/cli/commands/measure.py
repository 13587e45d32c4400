"""``splitfx measure``."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from splitfx.cli.arguments import Parser, count, with_model
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress

TEXT = "run a model and measure time and memory"


def arguments(one: Parser) -> None:
    with_model(one)
    one.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    one.add_argument("--runs", type=count, default=20, help="timed runs (default 20)")


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import inputs_of, is_folder, model_of, needed_inputs, saved
    from splitfx.ir.graph import random_inputs
    from splitfx.report.measuring import measure as measured

    if is_folder(given.model):
        model: Any = saved(given.model, progress)
        inputs = inputs_of(given) or random_inputs(model, given.seed)  # type: ignore[arg-type]
    else:
        model, inputs = model_of(given, progress), needed_inputs(given)
    progress(f"measuring {given.runs} runs")
    found = measured(model, inputs, given.device, given.runs)
    return printed(given, json.dumps(found.to_dict(), indent=2), str(found))
