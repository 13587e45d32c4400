"""The commands of the command line, one function each: they load, call the public face and print.

Everything that can be refused is refused before work starts: files that are there already, plans, passes.
Each function gets the parsed arguments and a `Progress`, prints to stdout and returns the exit code.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from splitfx import storage
from splitfx.compiler import transform as api
from splitfx.compiler.inline import parse_pass, parse_sizes
from splitfx.compiler.plan import Plan
from splitfx.errors import ExportError, PlanError, SplitfxError, UnsupportedError
from splitfx.files import check_target
from splitfx.frontend.models import load_model
from splitfx.frontend.trace import trace
from splitfx.ground import limits
from splitfx.ground.progress import Progress
from splitfx.ground.table import size
from splitfx.ir.graph import random_inputs
from splitfx.report import explain as explaining
from splitfx.text import printable


def run(given: Namespace) -> int:
    """Run the command that ``given`` names."""
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    with Progress(given.quiet) as progress, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _only_ours(progress)
        return COMMANDS[given.command](given, progress)


def profile(given: Namespace, progress: Progress) -> int:
    from splitfx.report.html import inspect_html
    from splitfx.report.profile import profile as profiled

    for path in filter(None, (given.html, given.plot)):
        _free_file(path, given.overwrite)
    graph = _graph(given, progress)
    progress("counting")
    found = profiled(graph)
    if given.html:
        progress("drawing")
        inspect_html(graph, given.html, overwrite=given.overwrite)
    if given.plot:
        progress("drawing")
        found.plot(given.plot, overwrite=given.overwrite)
    return _print(given, found.to_json(), found.table(rows=None) if given.all else str(found))


def transform(given: Namespace, progress: Progress) -> int:
    folder = storage.KIND.check_target(given.out, overwrite=given.overwrite, advice="add --overwrite")
    plan = _plan(given)
    model = _model(given, progress)
    split = api.transform(model, plan, _inputs(given), verify=not given.no_verify, progress=progress)
    progress("saving")
    storage.save(split, folder, overwrite=given.overwrite)
    told = explaining.explain(split)
    total = sum(one.stat().st_size for one in folder.iterdir())
    made = {"out": str(folder), "bytes": total, "explanation": json.loads(told.to_json())}
    return _print(given, json.dumps(made, indent=2), f"{told}\n\nsaved to {folder} ({size(total)})")


def finetune(given: Namespace, progress: Progress) -> int:
    from splitfx.train import commands as training

    machine, people = training.finetune(given, progress, _saved(given.split, progress))
    return _print(given, machine, people) if machine else 0


def search(given: Namespace, progress: Progress) -> int:
    from splitfx.train import commands as training

    return _print(given, *training.search(given, progress, _needed_inputs(given), _model(given, progress)))


def export(given: Namespace, progress: Progress) -> int:
    from splitfx.export.data_files import data_files
    from splitfx.export.onnx import export_onnx

    if given.bundle or given.branches:
        return _export_folder(given, progress)
    target = _free_file(given.onnx, given.overwrite)
    split = _saved(given.split, progress)
    progress("exporting")
    export_onnx(
        split,
        target,
        opset=given.opset,
        dynamic_batch=False if given.fixed_batch else None,
        overwrite=given.overwrite,
        verify=not given.no_verify,
    )
    parts = [target, *data_files(target)]
    total = sum(one.stat().st_size for one in parts)
    made = {"onnx": str(target), "files": [str(one) for one in parts], "bytes": total}
    return _print(given, json.dumps(made, indent=2), f"wrote {' and '.join(map(str, parts))} ({size(total)})")


def _export_folder(given: Namespace, progress: Progress) -> int:
    """Sub-models as a bundle, or the branches of a carved network."""
    write: Any
    read: Any
    if given.bundle:
        from splitfx.export.bundles.submodels import export_bundle as write
        from splitfx.export.bundles.submodels_runner import Bundle as read
    else:
        from splitfx.export.bundles.branches import export_branches as write
        from splitfx.export.bundles.branches_runner import Branches as read
    kind, target = ("bundle", given.bundle) if given.bundle else ("branches", given.branches)
    split = _saved(given.split, progress)
    free = False if given.fixed_batch else None
    folder = write(split, target, opset=given.opset, dynamic_batch=free, overwrite=given.overwrite, progress=progress)
    files = sorted(folder.iterdir())
    total = sum(one.stat().st_size for one in files)
    made = {kind: str(folder), "files": [str(one) for one in files], "bytes": total}
    return _print(given, json.dumps(made, indent=2), f"{read(folder)}\n\nwrote {folder} ({size(total)})")


def check(given: Namespace, progress: Progress) -> int:
    from splitfx.export.runtime import check_onnx

    split = _saved(given.split, progress)
    found = check_onnx(
        given.onnx,
        split,
        providers=given.provider,
        require=given.require,
        runs=given.runs,
        seconds=given.seconds,
        progress=progress,
    )
    _print(given, found.to_json(), str(found))
    return 0 if found.ok else 1


def compare(given: Namespace, progress: Progress) -> int:
    split = _saved(given.split, progress)
    model = _model(given, progress)
    inputs = _inputs(given) or random_inputs(split, given.seed)
    progress("comparing")
    found = explaining.compare(model, split, inputs)
    return _print(given, found.to_json(), str(found))


def measure(given: Namespace, progress: Progress) -> int:
    from splitfx.runtime.measuring import measure as measured

    if _is_folder(given.model):
        model: nn.Module = _saved(given.model, progress)
        inputs = _inputs(given) or random_inputs(model, given.seed)  # type: ignore[arg-type]
    else:
        model, inputs = _model(given, progress), _needed_inputs(given)
    progress(f"measuring {given.runs} runs")
    found = measured(model, inputs, given.device, given.runs)
    return _print(given, json.dumps(found.to_dict(), indent=2), str(found))


def explain(given: Namespace, progress: Progress) -> int:
    found = explaining.explain(_saved(given.split, progress))
    return _print(given, found.to_json(), str(found))


def inspect(given: Namespace, progress: Progress) -> int:
    from splitfx.report.html import inspect_html, inspect_svg
    from splitfx.report.plots.splitnet_classes import carved_classes, classes_text

    asked = {kind: path for kind, path in (("html", given.html), ("svg", given.svg)) if path}
    for path in asked.values():
        _free_file(path, given.overwrite)
    split = _saved(given.split, progress)
    classes = carved_classes(split)
    if not asked and classes is None:
        raise SplitfxError("nothing to write: give --html FILE, --svg FILE or both; its classes are not in groups")
    if asked:
        progress("drawing")
    for kind, path in asked.items():
        (inspect_html if kind == "html" else inspect_svg)(split, path, overwrite=given.overwrite)
    made: dict[str, object] = dict(asked)
    people = [classes_text(classes)] if classes else []
    if classes:
        made["groups"] = [classes.members(g) for g in range(classes.level)]
    if asked:
        people.append(f"wrote {' and '.join(asked.values())}")
    return _print(given, json.dumps(made), "\n\n".join(people))


def passes(given: Namespace, progress: Progress) -> int:
    from splitfx.compiler import registry
    from splitfx.report.passes import passes_text

    known = registry.all()
    plain = [{"name": name, "promise": cls.promise.value, **cls.schema()} for name, cls in known.items()]
    return _print(given, json.dumps(plain, indent=2), passes_text(known))


def doctor(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.doctor import diagnose

    progress("starting each provider once")
    found = diagnose()
    _print(given, found.to_json(), str(found))
    return 0 if found.ok else 1


COMMANDS = {
    one.__name__: one
    for one in (profile, transform, finetune, search, export, check, compare, measure, explain, inspect, passes, doctor)
}


# ---------------------------------------------------------------- what the commands share


def _print(given: Namespace, machine: str, people: str) -> int:
    print(machine if given.json else printable(people))
    sys.stdout.flush()
    return 0


def _plan(given: Namespace) -> Plan:
    if given.plan and given.passes:
        raise PlanError("give --plan or --pass, not both")
    if not given.plan and not given.passes:
        raise PlanError("no plan: give --plan FILE, or --pass such as --pass 'group factors=8,2,2,4,4'")
    plan = Plan.load(given.plan) if given.plan else Plan([parse_pass(text) for text in given.passes])
    if given.input:
        shapes = tuple(shape for shape, _ in map(parse_sizes, given.input))
        plan = Plan(plan.passes, shapes[0] if len(shapes) == 1 else shapes)
    if plan.input_shape is None:
        raise PlanError("no input sizes: give --input 1x3x224x224, or input_shape in the plan")
    return plan


def _inputs(given: Namespace) -> tuple[torch.Tensor, ...] | None:
    if not given.input:
        return None
    generator = torch.Generator().manual_seed(given.seed)
    sizes = [parse_sizes(text) for text in given.input]
    needed = sum(math.prod(s) * getattr(torch, d).itemsize for s, d in sizes)
    limits.check_memory(needed, UnsupportedError, f"--input {', '.join(given.input)}")
    return tuple(
        torch.randn(s, generator=generator).to(getattr(torch, d))
        if d.startswith(("float", "bfloat"))
        else torch.zeros(s, dtype=getattr(torch, d))
        for s, d in sizes
    )


def _needed_inputs(given: Namespace) -> tuple[torch.Tensor, ...]:
    found = _inputs(given)
    if found is None:
        raise UnsupportedError(f"no input sizes for {given.model}: give --input 1x3x224x224")
    return found


def _is_folder(word: str) -> bool:
    return Path(word).is_dir()


def _model(given: Namespace, progress: Progress) -> nn.Module:
    progress(f"loading {given.model}")
    model = load_model(given.model, given.weights, given.seed)
    if given.weights is None and given.model.startswith(("torchvision:", "timm:")):
        progress.remark(f"the weights are random (seed {given.seed}); --weights FILE takes trained ones")
    return model


def _saved(folder: str, progress: Progress) -> fx.GraphModule:
    if not _is_folder(folder):
        raise ExportError(f"there is no folder {folder}; `splitfx transform` writes one")
    progress(f"loading {folder}")
    split = storage.load(folder)
    return split


def _graph(given: Namespace, progress: Progress) -> fx.GraphModule:
    if _is_folder(given.model):
        split = _saved(given.model, progress)
        return split if not given.input else trace(split, _inputs(given))
    inputs = _needed_inputs(given)
    model = _model(given, progress)
    progress("tracing")
    return trace(model, inputs)


def _free_file(path: str, overwrite: bool) -> Path:
    target = Path(path)
    if os.path.lexists(target) and not target.is_dir() and not overwrite:
        raise SplitfxError(f"{target}: already exists; choose another name or add --overwrite")
    check_target(target, overwrite=overwrite, error=SplitfxError)
    if not os.access(target.parent, os.W_OK):
        raise SplitfxError(f"{target}: its folder {target.parent} is not writable")
    return target


def _only_ours(progress: Progress) -> Any:
    """Warnings of splitfx become remarks; those of the packages below say nothing that a user could act
    on."""
    home = str(Path(__file__).parent)

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if filename.startswith(home) and category is UserWarning:
            progress.remark(str(message))

    return show
