"""A model from a text: :func:`model_of` reads what the command line is given. Libraries are asked through their own factory functions; nothing is fetched.

- ``file.py:factory``, ``package.module:factory``: a function without arguments that returns a model, or the model itself
- ``timm:resnet18``, ``torchvision:resnet18``; the name alone where one library has it
- ``transformers:folder``: a folder with ``config.json`` (with weights if there are any)
- ``diffusers:folder/unet``, ``ultralytics:yolov8n.yaml`` (or a file of weights)
- ``model.pt2``: an archive of ``torch.export``
- a folder that ``graphprune shrink`` wrote, whose recipe says what the original is

>>> model_of("torch.nn:Identity")
Identity()
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BadModel, GraphpruneError, UnknownName
from ..formats.folder import load
from ..formats.recipe import RECIPE, read_recipe
from ..wording import nearest, several


def model_of(text: str, weights: str | None = None, seed: int = 0) -> nn.Module:
    """The model that a text speaks of, in eval mode, with random weights from ``seed`` or those of a file (safetensors, or a state dict of torch).

    Raises :class:`~graphprune.errors.UnknownName` where nothing fits, and :class:`~graphprune.errors.BadModel` where what is found is no model.
    """
    torch.manual_seed(seed)
    model = _found(text)
    if not isinstance(model, nn.Module):
        inner = [name for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, nn.Module)]
        hint = f"; it holds one in .{inner[0]}" if inner else ""
        raise BadModel(f"{text!r} gives a {type(model).__name__}, not a torch.nn.Module{hint}")
    if weights:
        _fill(model, Path(weights))
    try:
        return model.eval()
    except NotImplementedError:  # a program of torch.export has one mode
        return model


def _found(text: str) -> Any:
    path = Path(text)
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".pt2":
        return _archive(path)
    source, colon, name = text.partition(":")
    if colon and source in LIBRARIES:
        return _library(source, name)
    if colon and source.endswith(".py"):
        return _attribute(_from_file(Path(source)), name, text)
    if colon:
        return _attribute(_imported(source, text), name, text)
    return _by_name(text)


def _folder(path: Path) -> Any:
    recipe = path / RECIPE
    if recipe.is_file():
        arguments = read_recipe(recipe)["arguments"]
        return load(path, model_of(arguments["model"], arguments.get("weights"), arguments.get("seed", 0)))
    if (path / "config.json").is_file():
        return _library("transformers", str(path))
    raise UnknownName(f"{path} is neither a folder that graphprune shrink wrote ({RECIPE}) nor one with a config.json")


def _archive(path: Path) -> nn.Module:
    if not path.is_file():
        raise UnknownName(f"there is no file {path}")
    try:
        return torch.export.load(path).module()
    except Exception as error:
        raise BadModel(f"{path} is no archive that torch.export can load: {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UnknownName(f"there is no file {path}")
    name = f"graphprune_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can say where they are from
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadModel(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _imported(name: str, text: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnknownName(f"{text!r}: {name} cannot be imported ({error}); give package.module:factory, file.py:factory, or {EXAMPLES}") from error


def _attribute(module: Any, name: str, text: str) -> Any:
    value = module
    for part in name.split("."):
        if not hasattr(value, part):
            there = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
            raise UnknownName(f"{text!r}: {text.partition(':')[0]} has no {part!r}; there are {several(there, 6)}")
        value = getattr(value, part)
    return _made(value, text)


def _made(value: Any, text: str) -> Any:
    if isinstance(value, nn.Module) or not callable(value):
        return value
    try:
        return value()
    except GraphpruneError:
        raise
    except Exception as error:
        raise BadModel(f"{text} failed: {type(error).__name__}: {error}; a factory is called without arguments") from error


def _timm(name: str) -> Any:
    import timm

    return timm.create_model(name, pretrained=False)


def _torchvision(name: str) -> Any:
    from torchvision import models

    options = {"weights": None, **({"weights_backbone": None} if "detection" in models.get_model_builder(name).__module__ else {})}
    return models.get_model(name, **options)


def _transformers(name: str) -> Any:
    import transformers

    folder = Path(name)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if any(folder.glob("*.safetensors")):
        return (kind or transformers.AutoModel).from_pretrained(folder, local_files_only=True)
    return kind(config) if kind else transformers.AutoModel.from_config(config)


def _diffusers(name: str) -> Any:
    import diffusers

    folder = Path(name)
    kind = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    return kind.from_pretrained(folder, local_files_only=True) if any(folder.glob("*.safetensors")) else kind.from_config(kind.load_config(folder))


def _ultralytics(name: str) -> Any:
    import ultralytics

    return ultralytics.YOLO(name).model


LIBRARIES: dict[str, Callable[[str], Any]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "diffusers": _diffusers,
    "ultralytics": _ultralytics,
}
SOURCES = (
    "What the model is: file.py:factory, package.module:factory, timm:NAME, torchvision:NAME, transformers:FOLDER, diffusers:FOLDER, ultralytics:FILE, "
    "model.pt2, or a folder that shrink wrote."
)
EXAMPLES = "timm:resnet18, torchvision:resnet18, transformers:folder, model.pt2, a folder that graphprune shrink wrote"


def _library(source: str, name: str) -> Any:
    if reason := unusable(source):
        raise UnknownName(f"{source}:{name}: {reason}")
    try:
        return LIBRARIES[source](name)
    except GraphpruneError:
        raise
    except Exception as error:
        names = NAMED[source](importlib.import_module(source)) if source in NAMED else ()
        close = nearest(name, names) if name not in names else ()
        hint = f"; the nearest are {', '.join(close)}" if close else ""
        raise UnknownName(f"{source}:{name}: {type(error).__name__}: {str(error)[:300]}{hint}") from error


def unusable(library: str) -> str:
    """Why a library cannot be used here, or nothing: it is absent, or was built for other versions of what it needs (which it says in many ways)."""
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        return f"{library} cannot be imported ({error}); pip install {error.name or library}"
    except Exception as error:
        return f"{library} is installed but cannot be imported ({type(error).__name__}: {str(error)[:200]}); do its version and torch's belong together?"
    return ""


def _by_name(name: str) -> Any:
    """The library that has a model of this name."""
    here = [library for library in NAMED if importlib.util.find_spec(library) is not None]
    reasons = {library: unusable(library) for library in here}
    owners = [library for library in here if not reasons[library] and name in NAMED[library](importlib.import_module(library))]
    if len(owners) == 1:
        return _library(owners[0], name)
    if owners:
        raise UnknownName(f"several libraries have a {name!r}: write {' or '.join(f'{owner}:{name}' for owner in owners)}")
    why = "".join(f"; {reason}" for reason in reasons.values() if reason)
    raise UnknownName(f"{name!r} is no model; give file.py:factory, package.module:factory, {EXAMPLES}{why}")


NAMED: dict[str, Callable[[Any], Any]] = {"timm": lambda timm: timm.list_models(), "torchvision": lambda torchvision: torchvision.models.list_models()}


def _fill(model: nn.Module, path: Path) -> None:
    """Weights from a file; every name has to fit."""
    if not path.is_file():
        raise UnknownName(f"there is no file {path} of weights")
    try:
        state: Any
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state))
    except Exception as error:
        raise BadModel(f"{path} does not fit the model: {type(error).__name__}: {str(error)[:500]}") from error
