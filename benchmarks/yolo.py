"""YOLO networks through ultralytics' own calls: cut, trained on for two epochs on eight images, saved, reloaded, exported, beside the original.

    python benchmarks/yolo.py --json yolo.jsonl --out docs/guide-yolo.md            # writes the table between the page's marks; run again to go on
    python benchmarks/yolo.py --only yolo11n --formats onnx,torchscript

Weights are random, images 64 x 64, the ratio is 0.5. What ``model.export`` has written is run by ultralytics' own backend and compared with the
PyTorch network; the saved file is read by ``YOLO(file)`` in a new process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"YOLO_AUTOINSTALL": "False", "YOLO_VERBOSE": "False", "YOLO_OFFLINE": "1"}

import numpy as np
import torch
from common import Rows, made_by, parameters
from torch import nn
from zoo import measure
from zoo_support import declare_operators

import graphprune

NAMES = ("yolov8n", "yolo11n", "yolov5n")
FORMATS = ("torchscript", "onnx", "openvino", "executorch")
SIDE, IMAGES, EPOCHS = 64, 8, 2
CLOSE = 1e-3  # the largest difference of outputs, as a share of the largest output
BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"


def squares(folder: Path) -> Path:
    """Images with a white square each, and the file that names them."""
    import cv2

    for part in ("images", "labels"):
        (folder / part).mkdir()
    for number in range(IMAGES):
        image = np.random.default_rng(number).integers(0, 99, (SIDE, SIDE, 3), np.uint8)
        image[16:48, 16:48] = 255
        cv2.imwrite(str(folder / f"images/{number}.jpg"), image)
        (folder / f"labels/{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    file = folder / "squares.yaml"
    file.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: square}}\n")
    return file


def trainer_of(yolo: Any) -> type:
    """The trainer of the task at hand, for the network as it is."""

    class Trainer(yolo._smart_load("trainer")):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            return yolo.model

    return Trainer


def detections(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model.float().eval()(x)
    return output[0] if isinstance(output, tuple | list) else output


def exported(file: Path, kind: str, x: torch.Tensor) -> dict[str, Any]:
    """What ``export`` makes of a saved network: the largest difference, the size in bytes, or the error."""
    from ultralytics import YOLO
    from ultralytics.nn.autobackend import AutoBackend

    try:
        yolo = YOLO(str(file))
        wanted = detections(yolo.model, x)
        options = {"simplify": False} if kind == "onnx" else {}  # what simplifies is a package of its own
        written = Path(yolo.export(format=kind, imgsz=SIDE, device="cpu", **options))
        output = AutoBackend(str(written), device=torch.device("cpu"))(x)
        output = torch.as_tensor(output[0] if isinstance(output, tuple | list) else output)
        if output.shape != wanted.shape:
            raise ValueError(f"shape {tuple(output.shape)} instead of {tuple(wanted.shape)}")
        files = [part for part in written.rglob("*") if part.is_file()] if written.is_dir() else [written]
        gap = float((output - wanted).abs().max() / wanted.abs().max())
        return {"passes": gap <= CLOSE, "gap": gap, "size": sum(part.stat().st_size for part in files)}
    except Exception as error:
        return {"passes": False, "why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def one(name: str, send: Any, limit: float) -> None:
    """Everything about one network, in a process of its own."""
    from ultralytics import YOLO

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    name, _, kinds = name.partition(" ")
    row: dict[str, Any] = {"name": name}
    try:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            folder = Path(place).resolve()
            os.chdir(folder)  # ultralytics writes beside what it reads, and here
            data = {"data": str(squares(folder)), "imgsz": SIDE, "workers": 0, "plots": False, "device": "cpu", "verbose": False}
            torch.manual_seed(0)
            x = torch.rand(1, 3, SIDE, SIDE)
            whole = YOLO(f"{name}.yaml")
            whole.save(folder / "whole.pt")
            yolo = YOLO(f"{name}.yaml")
            yolo.model = graphprune.shrink(yolo.model.float().eval(), x, 0.5)
            cut = parameters(yolo.model)
            yolo.train(trainer=trainer_of(yolo), epochs=EPOCHS, batch=4, project=str(folder / "runs"), amp=False, **data)
            row |= {"parameters": [parameters(whole.model), cut], "trained": parameters(yolo.model) == cut}
            yolo.save(folder / "small.pt")
            torch.save({"x": x, "wanted": detections(yolo.model, x)}, folder / "call.pt")
            row["reloaded"] = subprocess.run([sys.executable, __file__, "--read", place], check=False, capture_output=True).returncode == 0
            for kind in kinds.split(","):
                row[kind] = [exported(folder / f"{which}.pt", kind, x) for which in ("whole", "small")]
    except BaseException as error:
        row["why"] = f"{type(error).__name__}: {error}"[:300]
    finally:
        send.send(row)
        send.close()


def read(folder: Path) -> None:
    """In a new process: whether a saved network is read and computes the same to the last bit."""
    from ultralytics import YOLO

    call = torch.load(folder / "call.pt", weights_only=True)
    torch.set_num_threads(1)
    sys.exit(not torch.equal(detections(YOLO(str(folder / "small.pt")).model, call["x"]), call["wanted"]))


def cell(pair: list[dict[str, Any]] | None) -> str:
    if pair is None:
        return ""
    original, cut = pair
    if not cut["passes"]:
        return f"**regression**: {cut.get('why', '')}" if original["passes"] else f"neither: {original.get('why', '')}"
    before = f"{original['size'] / 1e6:.3g}" if original["passes"] else "fails"
    return f"{before} → {cut['size'] / 1e6:.3g}, {max(original.get('gap', 0), cut['gap']):.0e}"


def table(rows: list[dict[str, Any]], known: Rows) -> str:
    kinds = [kind for kind in FORMATS if any(kind in row for row in rows)]
    lines = ["| network | parameters, millions | trained on, still cut | saved, reloaded, equal | " + " | ".join(f"`{kind}`" for kind in kinds) + " |"]
    lines.append("|---" * (4 + len(kinds)) + "|")
    for row in rows:
        if "why" in row:
            lines.append(f"| {row['name']} | {row['why']} |" + " |" * (2 + len(kinds)))
            continue
        sizes = " → ".join(f"{number / 1e6:.3g}" for number in row["parameters"])
        checks = " | ".join("yes" if row.get(key) else "**no**" for key in ("trained", "reloaded"))
        lines.append(f"| {row['name']} | {sizes} | {checks} | " + " | ".join(cell(row.get(kind)) for kind in kinds) + " |")
    made = made_by("python benchmarks/yolo.py --json yolo.jsonl --out docs/guide-yolo.md", "ultralytics", "onnxruntime", "openvino", "executorch", rows=known)
    return "\n".join(lines) + f"\n\n{made}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES), help="networks (comma-separated)")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of ultralytics' formats (comma-separated)")
    parser.add_argument("--limit", type=float, default=900, help="CPU seconds for a network")
    parser.add_argument("--json", type=Path, help="append every row here as it comes; networks that are there are not measured again")
    parser.add_argument("--out", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    declare_operators()
    if options.read:
        return read(options.read)
    known = Rows(options.json)
    rows = {row["name"]: row for row in known.rows}

    def report(row: dict[str, Any]) -> None:
        row["name"] = row["name"].partition(" ")[0]  # of a process that was ended
        rows[row["name"]] = known.add(row, shown=not known.path)

    measure([f"{name} {options.formats}" for name in options.only.split(",") if name not in rows], 1, options.limit, report, one)
    text = table([rows[name] for name in sorted(rows)], known)
    print(text)
    if options.out:
        page = options.out.read_text()
        before, _, rest = page.partition(BEGIN)
        options.out.write_text(before + BEGIN + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
