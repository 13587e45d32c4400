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
    from splitfx.cli.loading import check_inputs, inputs_of, model_of
    from splitfx.ir.graph import random_inputs
    from splitfx.report.measuring import measure as measured

    check_inputs(given)
    model: Any = model_of(given, progress)
    inputs = inputs_of(given, model) or random_inputs(model, given.seed)
    progress(f"measuring {given.runs} runs")
    found = measured(model, inputs, given.device, given.runs)
    return printed(given, json.dumps(found.to_dict(), indent=2), str(found))
