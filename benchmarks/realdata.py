"""Real data and real trained models for the benchmarks: what is in a data folder, decoded once and cached.

Nothing here is shipped with the package. ``data_dir`` is the folder given by ``--data`` of every benchmark; decoded
images go to the user's cache directory.
"""

from __future__ import annotations

import gzip
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.2860,), (0.3530,)
FASHION = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset-fashion-mnist"))
Images = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def find_data(given: str | Path | None = None) -> Path:
    """The data folder: the one given, else ``GRAPHPRUNE_DATA``, else ``../shared/data`` beside the checkout or above it."""
    places = [given, os.environ.get("GRAPHPRUNE_DATA"), *(p / "shared" / "data" for p in Path(__file__).resolve().parents)]
    for place in places:
        if place and Path(place).is_dir():
            return Path(place)
    raise SystemExit("no data folder: pass --data DIR (a folder with cifar10-jpeg-train.npz and the trained models)")


def cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", tempfile.gettempdir())) / "graphprune-bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def decode(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (uint8, NCHW) and labels of an npz of JPEG bytes; decoded once, then read from the cache."""
    kept = cache() / f"{path.stem}.npz"
    if not kept.exists():
        from PIL import Image

        packed = np.load(path)
        data, ends = packed["jpeg"].tobytes(), packed["offsets"]
        images = [np.asarray(Image.open(io.BytesIO(data[a:b])).convert("RGB")) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        part = kept.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(part, x=np.stack(images).transpose(0, 3, 1, 2), y=packed["labels"].astype(np.int64))
        os.replace(part, kept)
    held = np.load(kept)
    return torch.from_numpy(held["x"]), torch.from_numpy(held["y"])


def load_cifar(data_dir: str | Path | None = None) -> Images:
    """CIFAR-10 (JPEG): 50,000 training and 10,000 test images, uint8 (n, 3, 32, 32), with labels."""
    folder = find_data(data_dir)
    return (*decode(folder / "cifar10-jpeg-train.npz"), *decode(folder / "cifar10-jpeg-test.npz"))


def load_imagenet_sample(data_dir: str | Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """1,000 photos, uint8 (1000, 3, 256, 256), one per class; the label is the class."""
    return decode(find_data(data_dir) / "imagenet-sample-1000.npz")


def load_fashion() -> Images:
    """Fashion-MNIST from the Debian package ``dataset-fashion-mnist``: 60,000 and 10,000 images, uint8 (n, 1, 28, 28)."""
    folder = next((p for p in FASHION if p.is_dir()), None)
    if folder is None:
        raise SystemExit("Fashion-MNIST is not here: apt install dataset-fashion-mnist")

    def idx(name: str) -> torch.Tensor:
        path = next(p for p in (folder / name, folder / f"{name}.gz") if p.exists())
        raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())

    found = []
    for part in ("train", "t10k"):
        found += [idx(f"{part}-images-idx3-ubyte").unsqueeze(1), idx(f"{part}-labels-idx1-ubyte").long()]
    return tuple(found)


def normalise(x: torch.Tensor) -> torch.Tensor:
    """uint8 images to float32 with the mean and deviation that the trained models expect (by the number of channels)."""
    mean, std = IMAGENET if x.shape[1] == 3 else GREY
    mean, std = (torch.tensor(each, device=x.device).view(1, -1, 1, 1) for each in (mean, std))
    return (x.float() / 255 - mean) / std


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zero channels on both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels // 4, self.channels // 4))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else PadShortcut(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016: 6n + 2 layers, 16-32-64 channels, option-A shortcuts."""

    def __init__(self, depth: int, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths, count = (16, 16, 32, 64), (depth - 2) // 6
        for stage in range(3):
            first = Block(widths[stage], widths[stage + 1], 1 if stage == 0 else 2)
            rest = [Block(widths[stage + 1], widths[stage + 1], 1) for _ in range(count - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def fill(model: nn.Module, path: Path) -> nn.Module:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path), strict=False)
    return model.eval()


def cifar_resnet(depth: int, data_dir: str | Path | None = None) -> nn.Module:
    """ResNet-20 or ResNet-56 trained on CIFAR-10 (JPEG), in eval mode: 87.07 % and 89.21 % of the test images."""
    return fill(CifarResNet(depth), find_data(data_dir) / f"resnet{depth}-cifar10-jpeg.safetensors")


def fashion_resnet(data_dir: str | Path | None = None) -> nn.Module:
    """ResNet-20 trained on Fashion-MNIST, in eval mode: 92.15 % of the test images."""
    return fill(CifarResNet(20, channels=1), find_data(data_dir) / "resnet20-fashion-mnist.safetensors")


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int = 500) -> float:
    """Top-1 in per cent; ``x`` may be uint8 (it is normalised then) or what the model takes."""
    mode = model.training
    model.eval()
    right = 0
    for images, labels in zip(x.split(batch), y.split(batch), strict=True):
        right += int((model(normalise(images) if images.dtype == torch.uint8 else images).argmax(1) == labels).sum())
    model.train(mode)
    return 100 * right / len(y)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, _, x, y = load_cifar()
    print({depth: accuracy(cifar_resnet(depth), x, y) for depth in (20, 56)})
    _, _, x, y = load_fashion()
    print(accuracy(fashion_resnet(), x, y))
