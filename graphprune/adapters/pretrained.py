"""A folder that a library saved a model in, read without its weights: :func:`hollow` builds the class, :class:`Names` says what its files call the tensors.

The files of a transformers model may hold its tensors under other names and in other pieces than its modules do (experts one by one that a module holds
in one stack). The library itself brings either form into the other; it is asked to, so nothing here knows a model.

>>> Names(nn.Linear(2, 3, device="meta"), {"weight": (3, 2), "bias": (3,)}).units[0]
Unit(files=('bias',), names=('bias',))
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BadFile, BadInput, BadModel
from ..formats.rebuilt import quiet
from ..tracing.trees import leaf_tensors
from ..wording import several

LENGTH, FIRST = 16, 3  # tokens of an example, and the first of them (lower ones are padding and the like)


@dataclass(frozen=True)
class Unit:
    """Tensors of the files that become tensors of the model together: usually one and one.

    ``conversion``: how, where they are not the same (of the library, with the pattern that every file's tensor was recognised by).
    """

    files: tuple[str, ...]
    names: tuple[str, ...]
    conversion: tuple[Any, tuple[str, ...]] | None = field(default=None, repr=False, compare=False)


def hollow(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder with a ``config.json``, on the meta device, in evaluation mode; no file of weights is opened.

    Raises :class:`~graphprune.errors.BadModel` where no class can be built; code that lies in the folder runs only with ``trust_remote_code``.
    """
    file = folder / "config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        diffuser = "_class_name" in tree
    except (OSError, ValueError, TypeError) as error:
        hint = "a folder with config.json and safetensors files is expected; or give model=, on the meta device"
        raise BadModel(f"{file} cannot be read ({error}): {hint}") from error
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model = _diffusers(folder, tree) if diffuser else _transformers(folder, tree, trust_remote_code)
    except ImportError as error:
        raise BadModel(f"the library that {folder} was saved by cannot be imported: {error}") from error
    except BadModel:
        raise
    except Exception as error:
        raise BadModel(f"no model can be built from {file}: {type(error).__name__}: {str(error)[:400]}") from error
    return model.eval()


def _transformers(folder: Path, tree: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    import transformers

    if tree.get("quantization_config"):
        raise BadModel(f"the weights in {folder} are quantised ({tree['quantization_config'].get('quant_method')}): cut the model they were made from")
    if tree.get("auto_map") and not trust_remote_code and not hasattr(transformers, (tree.get("architectures") or [""])[0]):
        code = several(list(tree["auto_map"].values()))
        raise BadModel(f"{folder} needs code of its own ({code}), which is not run; read it, then give trust_remote_code=True")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    architecture = (config.architectures or [""])[0]
    kind = getattr(transformers, architecture, None)
    dtype = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        if kind is not None:
            return kind._from_config(config, dtype=dtype)
        auto = next((name for name in tree.get("auto_map", ()) if name.startswith("AutoModel") and tree["auto_map"][name].endswith(architecture)), None)
        if not trust_remote_code or auto is None:
            raise BadModel(f"{folder} names the class {architecture!r}, which transformers {transformers.__version__} does not have")
        return getattr(transformers, auto).from_config(config, dtype=dtype, trust_remote_code=True)


def _diffusers(folder: Path, tree: Mapping[str, Any]) -> nn.Module:
    import diffusers

    kind = getattr(diffusers, tree["_class_name"])
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder))


def example(model: nn.Module) -> dict[str, torch.Tensor]:
    """An input for a model that says what it takes; raises :class:`~graphprune.errors.BadInput` for one that does not."""
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        size = int(getattr(config.get_text_config(), "vocab_size", LENGTH))
        ids = (torch.arange(FIRST, FIRST + LENGTH) % size)[None]
        return {"input_ids": ids} | ({"decoder_input_ids": ids.clone()} if getattr(config, "is_encoder_decoder", False) else {})
    side = getattr(config, "image_size", None)
    if name == "pixel_values" and isinstance(side, int):
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), side, side)}
    raise BadInput(f"what {type(model).__name__} takes is not known: give an example_input that it can be called with")


def leaf_names(model: nn.Module) -> dict[str, str]:
    """The name that a run knows every tensor of a model's state by: of tensors that are tied, the first."""
    first: dict[int, str] = {}
    for name, _, _, tensor in leaf_tensors(model):
        first.setdefault(id(tensor), name)
    return {name: first[id(tensor)] for name, tensor in named_tensors(model).items() if id(tensor) in first}


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under every name they have."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


class Names:
    """What the files of a model call its tensors: ``units``, and both ways between the two forms; ``leaves``: how a run calls those of the model.

    ``shapes`` are those of the files. Raises :class:`~graphprune.errors.BadFile` where files and model do not hold the same.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], folder: str | Path = "the checkpoint") -> None:
        self.model, self.folder = model, folder
        self.state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.leaves = leaf_names(model)
        self._transforms = _transforms(model)
        self.units = tuple(self._units(sorted(shapes)))
        self._agree(shapes)

    def forward(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the files as the model holds them."""
        if unit.conversion is None:
            return {unit.names[0]: tensors[unit.files[0]]}
        found, patterns = unit.conversion
        converter = copy.deepcopy(found)
        for name, pattern in zip(unit.files, patterns, strict=True):
            if name in tensors:
                converter.add_tensor(unit.names[0], name, pattern, tensors[name])
        made = converter.convert(unit.names[0], model=self.model, config=getattr(self.model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def backward(self, small: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of a cut model (all that belong together) as its files hold them."""
        if not self._transforms:
            return dict(tensors)
        from transformers.core_model_loading import revert_weight_conversion

        small.__dict__["_weight_conversions"] = [transform for transform in self._transforms if transform.was_used()]
        return revert_weight_conversion(small, dict(tensors))  # type: ignore[arg-type]  # it asks for no more than the conversions

    def saved(self, small: nn.Module) -> list[str]:
        """The names of a model's state that are written: of tensors that are tied, one."""
        state = dict.fromkeys(small.state_dict())
        for key in getattr(small, "_keys_to_ignore_on_save", None) or ():
            state.pop(key, None)
        groups: dict[int, list[str]] = {}
        tensors = named_tensors(small)
        for name in state:
            groups.setdefault(id(tensors.get(name, name)), []).append(name)
        later = set(getattr(small, "all_tied_weights_keys", None) or ())  # those that are filled from others
        firsts = [next((name for name in names if name not in later), names[0]) for names in groups.values()]
        return [name for name in state if name in set(firsts)]

    def _units(self, files: Iterable[str]) -> Iterator[Unit]:
        grouped: dict[str, list[tuple[str, str | None]]] = {}
        unknown: list[str] = []
        for name in sorted(files, key=_natural):
            target, pattern = self._target(name)
            if target not in self.state:
                unknown.append(name)
            else:
                grouped.setdefault(target, []).append((name, pattern))
        expected = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        unknown = [name for name in unknown if not any(_matches(pattern, name) for pattern in expected)]
        if unknown:
            raise BadFile(f"{self.folder} holds {several(unknown, 3)}, which the model that its configuration builds does not have: the two disagree")
        for target, found in grouped.items():
            patterns = tuple(pattern for _, pattern in found if pattern is not None)
            if not patterns:
                yield Unit((found[0][0],), (target,))
                if len(found) > 1:
                    raise BadFile(f"{self.folder} holds {target} twice, as {several([name for name, _ in found], 3)}")
            else:
                converter = next(each for each in self._transforms if patterns[0] in each.source_patterns and hasattr(each, "operations"))
                yield Unit(tuple(name for name, _ in found), (target,), (converter, patterns))

    def _target(self, name: str) -> tuple[str, str | None]:
        """The name in the model (of a unit: its first), and the pattern that says how it is converted."""
        if not self._transforms:
            return name, None
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [each for each in self._transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in self._transforms if isinstance(each, WeightConverter)]
        prefix = getattr(self.model, "base_model_prefix", None)
        found = rename_source_key(name, renamings, converters, prefix, self.state)
        if found[0] not in self.state and name in self.state:
            found = rename_source_key(name, [], [], prefix, self.state)
        return found

    def _agree(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Is every tensor of the model there, with its shape?"""
        units, seen = [], set()
        for unit in self.units:
            try:
                made = self.forward(unit, {name: torch.empty(shapes[name], device="meta") for name in unit.files})
            except Exception as error:
                raise BadFile(f"{self.folder}: {several(list(unit.files), 3)} do not make {unit.names[0]}: {error}") from error
            for name, tensor in made.items():
                if name not in self.state:
                    raise BadFile(f"{self.folder}: {several(list(unit.files), 3)} make {name}, which the model that its configuration builds does not have")
                if tuple(tensor.shape) != self.state[name]:
                    text = f"{name} has the shape {tuple(tensor.shape)} in the files of {self.folder}, and {self.state[name]} by its configuration"
                    raise BadFile(f"{text}: the two disagree")
            units.append(Unit(unit.files, tuple(made), unit.conversion))
            seen |= made.keys()
        self.units = tuple(units)
        tensors = named_tensors(self.model)
        known = {id(tensors[name]) for name in seen}
        missing = [name for name in self.state if name not in seen and id(tensors.get(name)) not in known]
        allowed = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        missing = [name for name in missing if not any(_matches(pattern, name) for pattern in allowed)]
        if missing:
            raise BadFile(f"the files of {self.folder} hold no {several(missing, 3)}, which the model that its configuration builds has: the two disagree")


def _transforms(model: nn.Module) -> list[Any]:
    """How the library that a model is of brings files into its form, if it does."""
    if not hasattr(model, "base_model_prefix"):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # files of earlier versions hold what the modules hold
        return []
    return list(get_model_conversion_mapping(model))  # pyright: ignore[reportArgumentType]


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _matches(pattern: str, name: str) -> bool:
    import re

    return re.search(pattern, name) is not None
