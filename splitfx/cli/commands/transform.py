"""``splitfx transform``."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from splitfx.cli.arguments import Parser, with_model, with_overwrite
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress

if TYPE_CHECKING:
    from splitfx.compiler.plan import Plan

TEXT = "rewrite a model by a plan and save the result"


def arguments(one: Parser) -> None:
    with_model(one)
    one.add_argument("--plan", metavar="FILE", help="a plan file (TOML)")
    one.add_argument(
        "--pass",
        dest="passes",
        action="append",
        metavar="'NAME OPTION=VALUE ...'",
        help="a pass, such as 'group factors=8,2,2,4,4 fusion=keep'; once per pass, in order",
    )
    one.add_argument("--out", required=True, metavar="FOLDER", help="where the split is saved")
    one.add_argument("--no-verify", action="store_true", help="do not hold the passes to their promises")
    with_overwrite(one)


def run(given: Namespace, progress: Progress) -> int:
    from splitfx import storage
    from splitfx.cli.loading import inputs_of, model_of
    from splitfx.compiler.plan import Plan
    from splitfx.compiler.transform import transform
    from splitfx.ground.table import size
    from splitfx.report.explain import explain

    folder = storage.KIND.check_target(given.out, overwrite=given.overwrite, advice="add --overwrite")
    plan = _plan(given)
    model = model_of(given, progress)
    inputs = inputs_of(given, model)
    if inputs:
        shapes = tuple(tuple(one.shape) for one in inputs)
        plan = Plan(plan.passes, shapes[0] if len(shapes) == 1 else shapes)
    split = transform(model, plan, inputs, verify=not given.no_verify)
    progress("saving")
    storage.save(split, folder, overwrite=given.overwrite)
    told = explain(split)
    total = sum(one.stat().st_size for one in folder.iterdir())
    made = {"out": str(folder), "bytes": total, "explanation": json.loads(told.to_json())}
    return printed(given, json.dumps(made, indent=2), f"{told}\n\nsaved to {folder} ({size(total)})")


def _plan(given: Namespace) -> Plan:
    from splitfx.cli.loading import is_split
    from splitfx.compiler import registry
    from splitfx.compiler.inline import parse_inputs, parse_pass
    from splitfx.compiler.plan import Plan
    from splitfx.errors import PlanError

    if given.plan and given.passes:
        raise PlanError("give --plan or --pass, not both")
    if not given.plan and not given.passes:
        raise PlanError("no plan: give --plan FILE, or --pass such as --pass 'group factors=8,2,2,4,4'")
    if given.plan in registry.all() and not Path(given.plan).exists():
        raise PlanError(f"--plan {given.plan}: there is no such file. A pass by its name is --pass {given.plan}")
    if given.plan and Path(given.plan).is_dir():
        raise PlanError(f"--plan {given.plan}: is a folder; the plan of a saved split is {given.plan}/plan.toml in it")
    plan = Plan.load(given.plan) if given.plan else Plan([parse_pass(text) for text in given.passes])
    if given.input:
        parse_inputs(given.input)
    elif plan.input_shape is None and not is_split(given.model):
        raise PlanError("no input sizes: give --input 1x3x224x224, or input_shape in the plan")
    return plan
