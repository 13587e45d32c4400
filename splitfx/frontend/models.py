"""A model from a word on the command line.

Does: ``torchvision:NAME``, ``timm:NAME``, a NAME alone that only one of them has, ``package.module:callable`` and
``file.py:callable`` (a class, a function that makes the model, or the model itself), with random weights or those of a
file; a local folder of transformers, with the weights in it.
Refuses (`UnsupportedError`, one line): unknown names, with the nearest one; files that are empty, truncated
or hold another model's weights. Never unpickles: weight files are safetensors, or read by torch with
``weights_only``.
Promises: the same word and seed give the same weights; the model comes in eval mode.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitfx.errors import MissingExtraError, UnsupportedError, nearest

FORMS = (
    "a NAME of torchvision or timm (torchvision:NAME, timm:NAME), package.module:callable, file.py:callable "
    "or the folder of a transformers model"
)
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPED = ("state_dict", "model_state_dict", "model")
_SHOWN = 4


def load_model(word: str, weights: str | os.PathLike[str] | None = None, seed: int = 0) -> nn.Module:
    """The model that ``word`` names, in eval mode; random weights of ``seed``, or those of the file
    ``weights``.

    Raises `UnsupportedError` for a word that names no model and for weights that do not fit,
    `MissingExtraError` when timm is not installed.
    """
    home, colon, name = word.rpartition(":")
    if is_transformers(word):
        if weights is not None:
            raise UnsupportedError(f"{word} has weights of its own: leave out --weights")
        return _transformers(Path(word)).eval()
    if not (colon and home and name):
        home, name = _home_of(word), word
    torch.manual_seed(seed)
    if home == "torchvision":
        model = _torchvision(name)
    elif home == "timm":
        model = _timm(name)
    else:
        model = _own(home, name)
    if weights is not None:
        _fill(model, Path(weights), word)
    return model.eval()


def _home_of(name: str) -> str:
    """The package that has a model of that name, where only one has."""
    if name.endswith(_WEIGHTS):
        raise UnsupportedError(f"{name} is a file of weights: name the model that they are of, with --weights {name}")
    if name.endswith(".py"):
        raise UnsupportedError(f"{name}: which model in it? Write {name}:NAME, a class or a function without arguments")
    from torchvision import models

    known = {"torchvision": set(models.list_models())}
    if importlib.util.find_spec("timm") is not None:
        import timm

        known["timm"] = set(timm.list_models())
    homes = [home for home, names in known.items() if name in names]
    if len(homes) > 1:
        raise UnsupportedError(
            f"{name!r} is a model of {' and of '.join(homes)}: write {homes[0]}:{name}, or {homes[1]}:{name}"
        )
    if not homes:
        every = sorted(set().union(*known.values()))
        raise UnsupportedError(f"{name!r} names no model and no saved split.{nearest(name, every)} A model is {FORMS}")
    return homes[0]


def is_transformers(word: str) -> bool:
    """Whether a word names a folder that transformers wrote: its config.json names the class of the model."""
    return (Path(word) / "config.json").is_file()


def _transformers(folder: Path) -> nn.Module:
    """The model in a folder, as its config names it; weights from safetensors alone, no code from the folder."""
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(f"{folder} is a model of transformers: pip install transformers") from error
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        cls = getattr(transformers, named)
        if not issubclass(cls, transformers.PreTrainedModel):  # a word from elsewhere may name anything in there
            raise TypeError(f"{named} is no model")
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True)
    except Exception as error:  # of many kinds, for a file that is not there, another version, a broken config
        raise UnsupportedError(f"{folder} cannot be loaded as a model of transformers: {_told(error)}") from error


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise UnsupportedError(f"torchvision has no model '{name}'.{nearest(name, known)}")
    # Segmentation and detection models would fetch a backbone; the others do not take the word.
    extra = {"weights_backbone": None} if name in _with_backbone(models) else {}
    extra |= {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **extra)


def _with_backbone(models: Any) -> set[str]:
    return {*models.list_models(models.segmentation), *models.list_models(models.detection)}


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm is not installed: pip install 'splitfx[timm]'") from error
    if not timm.is_model(name):
        raise UnsupportedError(f"timm has no model '{name}'.{nearest(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False)


def _own(home: str, name: str) -> nn.Module:
    module = _file(Path(home)) if home.endswith(".py") else _module(home)
    found = getattr(module, name, None)
    if found is None:
        public = [one for one in vars(module) if not one.startswith("_")]
        raise UnsupportedError(f"{home} has no '{name}'.{nearest(name, public)}")
    if callable(found) and not isinstance(found, nn.Module):
        if needed := _needed(found):
            raise UnsupportedError(
                f"{home}:{name} needs {', '.join(needed)}: name a function that makes the model without arguments, "
                f"such as one that returns {name}(...)"
            )
        try:
            found = found()
        except Exception as error:  # the user's code may raise anything
            raise UnsupportedError(f"{home}:{name}() raised {_told(error)}") from error
    if not isinstance(found, nn.Module):
        raise UnsupportedError(f"{home}:{name} gives a {type(found).__name__}, not a torch.nn.Module")
    return found


def _needed(made: Any) -> list[str]:
    """The arguments that a call cannot do without."""
    try:
        parameters = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):  # written in C, or with a signature of its own making
        return []
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in parameters if one.default is one.empty and one.kind not in many]


def _file(path: Path) -> Any:
    if not path.is_file():
        raise UnsupportedError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and tracers look their module up there
    sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` has it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UnsupportedError(f"{path} cannot be imported: {_told(error)}") from error
    finally:
        sys.path.pop(0)
    return module


def _module(name: str) -> Any:
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.split(".")[0] == error.name.split(".")[0]:
            hint = nearest(name, ("torchvision", "timm"))
            raise UnsupportedError(f"there is no module '{name}'.{hint} A model is {FORMS}") from error
        raise UnsupportedError(f"{name} cannot be imported: {_told(error)}") from error
    except Exception as error:
        raise UnsupportedError(f"{name} cannot be imported: {_told(error)}") from error
    finally:
        sys.path.pop(0)


def _told(error: Exception) -> str:
    """The error in one line, with the last line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}{where}"


# ---------------------------------------------------------------- weights


def _fill(model: nn.Module, path: Path, word: str) -> None:
    state = _state(path)
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is not in the model" for key in state if key not in own]
    problems += [
        f"{key} is {list(tensor.shape)}, the model has {list(own[key].shape)}"
        for key, tensor in state.items()
        if key in own and tensor.shape != own[key].shape
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UnsupportedError(f"{path} does not fit {word}: {'; '.join(problems[:_SHOWN])}{more}")
    model.load_state_dict(state)


def _state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UnsupportedError(f"there is no weight file {path}")
    if path.stat().st_size == 0:
        raise UnsupportedError(f"{path} is empty; a weight file is .safetensors, .pt or .pth")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix not in _WEIGHTS:
        raise UnsupportedError(f"{path}: a weight file is .safetensors, .pt or .pth by its suffix")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for one cause: these are not plain tensors
        raise UnsupportedError(
            f"{path} is truncated, or holds more than tensors, which splitfx does not unpickle: "
            "save a state_dict, or safetensors"
        ) from error
    for key in _WRAPPED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(one, torch.Tensor) for one in state.values()):
        raise UnsupportedError(f"{path} holds no state_dict (a table of names to tensors)")
    return state


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UnsupportedError(f"{path} is truncated or no safetensors file ({error})") from error
