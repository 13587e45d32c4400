"""`save` and `load`: a split as a folder, and back.

Does: writes plan.toml, weights.safetensors (every state_dict key once, tied weights noted), program.json
(the graph, see `splitfx.storage.serialize`) and splitfx.json (what the folder is); reads them back with or without
the user's model.
Refuses: a folder already there, files that are missing, cut short, of a newer format or of another model.
Promises: nothing is pickled or unpickled and nothing in a folder is executed; a failed save leaves the
place as it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta, Struct
from torch import fx, nn

from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Note
from splitfx.errors import ExportError, PlanError
from splitfx.ground.exclusive import fresh
from splitfx.ground.files import read_json
from splitfx.ground.files.folders import FolderKind
from splitfx.ground.files.typed import Count
from splitfx.ir import graph as graphs
from splitfx.storage import deserialize, serialize
from splitfx.storage.record import read_record, write_record
from splitfx.text import cut

PLAN, PROGRAM = "plan.toml", "program.json"
WEIGHTS, CONSTANTS = "weights.safetensors", "constants.safetensors"
SHOWN = 5  # names listed in a message
_LONGEST = 1000  # characters of a key
_Key = Annotated[str, Meta(max_length=_LONGEST)]
_Role = Literal["parameter", "frozen", "buffer", "constant"]


class _About(Struct):
    """The manifest: the keys of the state_dict, which of them are one tensor with another, what each path is that the
    graph reads, the sizes of the files, and why there is no program where there is none."""

    keys: list[_Key]
    tied: dict[str, _Key]
    kinds: dict[str, _Role]
    bytes: dict[str, Count]
    program_missing: str
    model: str = ""
    versions: dict[str, str] = {}

    def __post_init__(self) -> None:
        long = [key for key in (*self.tied, *self.kinds) if len(key) > _LONGEST]
        if long:
            raise ValueError(f"a name of {len(long[0])} characters in tied or kinds")


KIND = FolderKind("splitfx.save", "splitfx.json", 1, ExportError, _About)


def save(split: fx.GraphModule, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write `split`, the result of `transform` or `trace`, to `folder` and return the path.

    overwrite: replace an existing folder that `save` wrote; any other folder with files in it is refused.

    The weights are those of now, training included. What has no plain form (a custom operator) is left out
    of the folder with a warning, and such a folder loads only with the model. Raises `ExportError`.
    """
    if not (isinstance(split, nn.Module) and graphs.is_canonical(split)):
        raise ExportError(f"save takes the result of transform or trace, not a {type(split).__name__}.")
    with KIND.written_whole(folder, overwrite=overwrite) as draft:
        _write(split, draft)
    return Path(os.path.abspath(folder))


@fresh()
def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> fx.GraphModule:
    """Read a folder that `save` wrote.

    model: a fresh instance of the user's model; the plan is replayed on it and the weights are put in.
        Without it the stored graph is built, which needs no class of the user's. Both can be trained,
        exported and saved again; the second is in eval mode and on the CPU.

    Raises `ExportError` for missing, truncated or newer files and for weights that do not fit; `PlanError`
    for the plan.
    """
    place = Path(folder)
    about = _about(place)
    stored = _tensors(place / WEIGHTS)
    names = {key: about.tied.get(key, key) for key in about.keys}
    lost = [f"{name} is missing" for name in dict.fromkeys(names.values()) if name not in stored]
    if lost:
        raise ExportError(f"{place / WEIGHTS} does not belong to this folder: {_listed(lost)}.")
    weights = {key: stored[name] for key, name in names.items()}
    if model is not None:
        return _replayed(place, model, about, weights)  # the replay makes its own record
    if about.program_missing:
        raise ExportError(f"{place} holds no program ({about.program_missing}); use load(folder, model).")
    split = _rebuilt(place, about, stored)
    _check_weights(place, split, weights)
    if (place / PLAN).exists():
        _attach_plan(split, place / PLAN)
    read_record(split, place)
    return split


# ---------------------------------------------------------------- writing


def _write(split: fx.GraphModule, draft: Path) -> None:
    info = graphs.info(split)
    state = graphs.by_path(split)
    wrong = [key for key, value in split.state_dict().items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ExportError(f"the state_dict holds values that are no tensors: {_listed(wrong)}.")
    tied = _tied(state)
    _save_tensors({key: value for key, value in state.items() if key not in tied}, draft / WEIGHTS)
    kinds, constants = _kinds(split, state)
    if constants:
        _save_tensors(constants, draft / CONSTANTS)
    missing = ""
    try:
        plain = serialize.serialize(split)
        (draft / PROGRAM).write_text(json.dumps(plain, allow_nan=False), encoding="utf-8")
    except serialize.NoPlainForm as reason:
        missing = str(reason)
        warnings.warn(f"saved without a program: {missing}; load it with load(folder, model).", stacklevel=3)
    if info.plan is not None:
        info.plan.save(draft / PLAN)
    write_record(split, draft)
    sizes = {file.name: file.stat().st_size for file in draft.iterdir()}
    versions = {"splitfx": _version("splitfx"), "torch": str(torch.__version__)}
    KIND.write_manifest(draft, _About(list(state), tied, kinds, sizes, missing, info.model_class, versions))


def _tied(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Key -> the first key with the very same memory."""
    first: dict[Any, str] = {}
    tied = {}
    for key, tensor in state.items():
        layout = (tensor.dtype, tuple(tensor.shape), tensor.stride())
        place = (tensor.device, tensor.data_ptr(), *layout) if tensor.numel() else id(tensor)
        if first.setdefault(place, key) != key:
            tied[key] = first[place]
    return tied


def _kinds(split: fx.GraphModule, state: Mapping[str, Any]) -> tuple[dict[str, _Role], dict[str, torch.Tensor]]:
    """Path -> parameter, frozen, buffer or constant for what the graph reads; and the constants, no
    state_dict keys.
    """
    aliases = tuple(graphs.info(split).aliases)
    paths = [
        *dict(split.named_parameters(remove_duplicate=False)),
        *dict(split.named_buffers(remove_duplicate=False)),
    ]
    paths += [str(node.target) for node in split.graph.nodes if node.op == "get_attr"]
    kinds: dict[str, _Role] = {}
    constants: dict[str, torch.Tensor] = {}
    for path in dict.fromkeys(paths):
        value = graphs.resolve(split, path)
        if path in aliases or path.startswith(tuple(alias + "." for alias in aliases)):
            continue
        if not isinstance(value, torch.Tensor):
            continue  # a subgraph; serialize.serialize refuses it with its reason
        if path not in state:
            kinds[path], constants[path] = "constant", value
        elif isinstance(value, nn.Parameter):
            kinds[path] = "parameter" if value.requires_grad else "frozen"
        else:
            kinds[path] = "buffer"
    return kinds, constants


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # A clone: tensors that share memory without being equal (a view of another) are refused otherwise.
    save_file(
        {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()},
        path,
    )


# ---------------------------------------------------------------- reading


def _about(place: Path) -> _About:
    about = KIND.read_manifest(place)
    for name, size in about.bytes.items():
        KIND.held_file(place, name, size)
    return about


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise ExportError(f"{path} is missing.") from None
    except SafetensorError as error:
        raise ExportError(f"{path} is empty, truncated or no safetensors file ({error}).") from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}.") from error


def _rebuilt(place: Path, about: _About, stored: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    plain = read_json(place / PROGRAM, ExportError, f"{place} is not complete")
    kinds: Mapping[str, str] = about.kinds
    constants = _tensors(place / CONSTANTS) if "constant" in kinds.values() else {}
    held: dict[str, torch.Tensor] = {}
    values = {}
    for path, kind in kinds.items():
        name = about.tied.get(path, path)
        source = constants if kind == "constant" else stored
        if name not in source:
            raise ExportError(f"{place} holds no weights for {cut(path)}.")
        tensor = _installed(place, path, kind, source[name])
        values[path] = (kind, held.setdefault(f"{kind == 'constant'} {name}", tensor))
    return deserialize.deserialize(plain, values)


def _installed(place: Path, path: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
    if kind not in ("parameter", "frozen"):
        return tensor
    return nn.Parameter(tensor, requires_grad=_trained(place, path, kind, tensor))


def _trained(place: Path, path: str, kind: str, tensor: torch.Tensor) -> bool:
    """Whether the folder says so of a parameter. `ExportError` where such numbers can have no gradient."""
    if kind == "parameter" and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ExportError(f"{place / KIND.manifest} is damaged: {cut(path)} is a parameter of {_dtype(tensor)}.")
    return kind == "parameter"


def _replayed(place: Path, model: nn.Module, about: _About, weights: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    inputs = _example(place, model)
    if (place / PLAN).exists():
        from splitfx.compiler.transform import transform

        split = transform(model, Plan.load(place / PLAN), inputs)
    else:
        from splitfx.frontend.trace import trace

        split = graphs.copy_graph(
            trace(model, inputs)
        )  # the graph holds the model's own weights, which stay as they are
    advice = ' A plan that decides by timing (lowering = "auto") may decide otherwise here: fix it in the plan.'
    _check_weights(place, split, weights, advice if (place / PLAN).exists() else "")
    split.load_state_dict(dict(weights))
    for path, parameter in split.named_parameters(remove_duplicate=False):
        kind = about.kinds.get(path)
        if kind in ("parameter", "frozen"):  # an alias has none: its layer's own path says it
            parameter.requires_grad_(_trained(place, path, kind, parameter))
    return split


def _example(place: Path, model: nn.Module) -> Any:
    """Random inputs in the stored shapes where the model is, or None: the plan then has its own shape."""
    if not (place / PROGRAM).exists():
        return None
    device = next((str(parameter.device) for parameter in model.parameters()), "cpu")
    return deserialize.example(read_json(place / PROGRAM, ExportError, f"{place} is not complete"), device)


def _check_weights(place: Path, split: nn.Module, weights: Mapping[str, torch.Tensor], advice: str = "") -> None:
    """`ExportError` naming the first differences between the folder's weights and the graph's state_dict."""
    problems = list(_differences(graphs.by_path(split), weights))
    if problems:
        raise ExportError(f"the weights in {place} do not fit: {_listed(problems)}.{advice}")


def _differences(state: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> Iterator[str]:
    yield from (f"{key} is missing" for key in state if key not in weights)
    yield from (f"{key} is not in the model" for key in weights if key not in state)
    for key, tensor in state.items():
        if key in weights and tuple(tensor.shape) != tuple(weights[key].shape):
            yield f"{key} is {list(weights[key].shape)} in the folder, {list(tensor.shape)} in the model"
        elif key in weights and tensor.dtype != weights[key].dtype:  # load_state_dict would convert without a word
            yield f"{key} is {_dtype(weights[key])} in the folder, {_dtype(tensor)} in the model"
        elif tensor.device.type == "meta":
            yield f"{key} has no values"


def _attach_plan(split: fx.GraphModule, path: Path) -> None:
    """The record of how the graph came about; the graph runs without it, so an unreadable one is a note."""
    info = graphs.info(split)
    try:
        info.plan = Plan.load(path)
    except PlanError as error:
        info.notes = (*info.notes, Note("plan", f"{PLAN} was not read: {error}", "info"))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return "; ".join(map(cut, names[:SHOWN])) + (f"; and {more} more" if more > 0 else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
