"""Example inputs and calibration batches from texts and files.

>>> {name: tuple(x.shape) for name, x in example_of(["ids=1x8:int64:100", "mask=1x8:int64:2"]).items()}
{'ids': (1, 8), 'mask': (1, 8)}
>>> example_of(["1x3x4x4"]).shape == example_of(["1,3,4,4"]).shape
True
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import BadCalibration, BadInput
from ..tracing.trees import tensors

FORM = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:[x,]\d+)*)(?::(?P<dtype>[a-z]+\d+))?(?::(?P<high>\d+))?")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
HOW = 'write a shape ("1x3x224x224"), a name, type and number of values ("input_ids=1x16:int64:1000"), or a file (.npy, .npz, .pt)'


def example_of(texts: Sequence[str], seed: int = 0) -> Any:
    """The example input: one tensor, a tuple of those without a name, or a dict of those with one; random numbers come from ``seed``.

    Raises :class:`~graphprune.errors.BadInput` for text that says no input and files that hold none.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[str | None, torch.Tensor]] = []
    for text in texts:
        parts += _file(Path(text)) if Path(text).suffix in (".npy", ".npz", ".pt") else [_random(text, generator)]
    names = [name for name, _ in parts]
    if not parts:
        raise BadInput(f"an input is needed: --input; {HOW}")
    if all(names):
        return {str(name): tensor for name, tensor in parts}
    if any(names):
        raise BadInput("some inputs have a name and some have none; name all of them or none")
    return parts[0][1] if len(parts) == 1 else tuple(tensor for _, tensor in parts)


def _random(text: str, generator: torch.Generator) -> tuple[str | None, torch.Tensor]:
    match = FORM.fullmatch(text)
    dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise BadInput(f"--input {text!r} is no input; {HOW}")
    shape = tuple(map(int, match["shape"].replace(",", "x").split("x")))
    if dtype.is_floating_point:
        return match["name"], torch.randn(shape, generator=generator).to(dtype)
    return match["name"], torch.randint(0, int(match["high"] or 2), shape, generator=generator).to(dtype)


def _file(path: Path) -> list[tuple[str | None, torch.Tensor]]:
    try:
        if path.suffix == ".pt":
            stored = torch.load(path, map_location="cpu", weights_only=True)
            return (
                [(str(name), tensor) for name, tensor in stored.items()]
                if isinstance(stored, dict)
                else [(None, tensor) for tensor in tensors(stored, torch.Tensor)]
            )
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return [(None, torch.from_numpy(loaded))]
        arrays = {name: torch.from_numpy(loaded[name]) for name in loaded.files}
        return [(None, next(iter(arrays.values())))] if len(arrays) == 1 else list(arrays.items())
    except (OSError, ValueError, RuntimeError, TypeError, EOFError) as error:
        raise BadInput(f"{path} holds no input: {type(error).__name__}: {error}") from error


def calibration_of(
    text: str, example: Any, batch: int = 16, limit: int = 256, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,), tokenizer: str | None = None
) -> list[Any]:
    """Batches for calibration: a folder of images (scaled to 0 to 1, cut to the size of the example, then ``(x - mean) / std``), an ``.npz``, ``.npy`` or
    ``.pt`` file whose first axis counts samples, or a text file with a sample a line and a ``tokenizer`` (a folder).

    Raises :class:`~graphprune.errors.BadCalibration`.
    """
    path = Path(text)
    if path.is_dir():
        samples: Any = _images(path, example, limit, mean, std)
    elif path.suffix in (".npy", ".npz", ".pt"):
        try:
            parts = _file(path)
        except BadInput as error:
            raise BadCalibration(str(error)) from error
        samples = {str(name): tensor[:limit] for name, tensor in parts} if all(name for name, _ in parts) else parts[0][1][:limit]
    elif path.is_file():
        samples = _lines(path, example, limit, tokenizer)
    else:
        raise BadCalibration(f"there is no {path}; give a folder of images, a file (.npz, .npy, .pt), or a text file with --tokenizer")
    first = next(iter(samples.values())) if isinstance(samples, dict) else samples
    cut = lambda start: {name: x[start : start + batch] for name, x in samples.items()} if isinstance(samples, dict) else samples[start : start + batch]  # noqa: E731
    return [cut(start) for start in range(0, len(first), batch)]


def _images(folder: Path, example: Any, limit: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)[:limit]
    if not files:
        raise BadCalibration(f"{folder} holds no images ({', '.join(IMAGES)})")
    if importlib.util.find_spec("PIL") is None:
        raise BadCalibration("images need Pillow: pip install pillow")
    from PIL import Image

    shape = next((tuple(t.shape) for t in tensors(example, torch.Tensor) if t.ndim == 4), None)
    if shape is None or shape[1] not in (1, 3):
        raise BadCalibration("images fit an input of four axes with 1 or 3 channels, such as 1x3x224x224")
    rows = []
    for file in files:
        try:
            image = Image.open(file).convert("RGB" if shape[1] == 3 else "L")
        except OSError as error:
            raise BadCalibration(f"{file} is no image: {error}") from error
        scale = max(shape[2] / image.height, shape[3] / image.width)
        image = image.resize((max(shape[3], round(image.width * scale)), max(shape[2], round(image.height * scale))), Image.Resampling.BILINEAR)
        left, top = (image.width - shape[3]) // 2, (image.height - shape[2]) // 2
        pixels = np.asarray(image.crop((left, top, left + shape[3], top + shape[2])), dtype=np.float32) / 255
        rows.append(torch.from_numpy(pixels.copy()).reshape(shape[2], shape[3], shape[1]).permute(2, 0, 1))
    centre, spread = (torch.tensor(list(values)).reshape(-1, 1, 1) for values in (mean, std))
    return (torch.stack(rows) - centre) / spread


def _lines(path: Path, example: Any, limit: int, tokenizer: str | None) -> dict[str, torch.Tensor]:
    if tokenizer is None:
        raise BadCalibration(f"{path} is read as text: give --tokenizer, a folder with a tokenizer")
    try:
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:
        raise BadCalibration(f"{tokenizer} holds no tokenizer: {type(error).__name__}: {str(error)[:300]}") from error
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    if not lines:
        raise BadCalibration(f"{path} holds no text")
    wanted = example if isinstance(example, dict) else {}
    length = max((t.shape[1] for t in tensors(example, torch.Tensor) if t.ndim == 2), default=64)
    words.pad_token = words.pad_token or words.eos_token
    tokens = words(lines, return_tensors="pt", padding="max_length", truncation=True, max_length=length)
    return {name: tensor for name, tensor in tokens.items() if not wanted or name in wanted}
