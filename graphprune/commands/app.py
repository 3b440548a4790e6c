"""The options of every command, with their help: what is read here goes to :mod:`graphprune.commands.work` as plain values."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..adapters.models import SOURCES
from ..version import VERSION

app = typer.Typer(
    name="graphprune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Model = Annotated[str, typer.Argument(help=SOURCES, show_default=False)]
Input = Annotated[list[str], typer.Option("--input", "-i", help="1x3x224x224; input_ids=1x16:int64:1000; a .npy, .npz or .pt file. May be repeated.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", help="As for the other commands; a folder with config.json and safetensors files needs none if it reads text or images."),
]
Weights = Annotated[str | None, typer.Option(help="A state dict to load: .safetensors, or a .pt file of tensors.")]
Seed = Annotated[int, typer.Option(help="For random weights and inputs.")]
Calibration = Annotated[str | None, typer.Option("--calibration", "-c", help="A folder of images, an .npz file, or a text file with --tokenizer.")]
Batch = Annotated[int, typer.Option(help="Samples in a batch of the calibration.")]
Limit = Annotated[int, typer.Option(help="Samples of the calibration that are read.")]
Mean = Annotated[str | None, typer.Option(help="Subtracted from images (0 to 1): 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="Images are divided by it: 0.229,0.224,0.225.")]
Tokenizer = Annotated[str | None, typer.Option(help="A folder with a tokenizer, for text.")]
Ratio = Annotated[str | None, typer.Option("--ratio", "-r", help="Share of units to remove from every group: 50%.")]
Params = Annotated[str | None, typer.Option(help="Parameters that may stay: 2M, 50%.")]
Macs = Annotated[str | None, typer.Option(help="Multiply-accumulates that may stay: 500M, 50%.")]
Size = Annotated[str | None, typer.Option(help="Bytes of the weights that may stay: '5 MB', 50%.")]
Memory = Annotated[str | None, typer.Option(help="Peak bytes of the activations: '10 MiB', 50%.")]
Latency = Annotated[str | None, typer.Option(help="Measured time of a call: '8 ms', 50%.")]
Speedup = Annotated[str | None, typer.Option(help="How many times faster, measured: 2x.")]
Score = Annotated[str, typer.Option(help="What matters: a name of `graphprune list score`.")]
Chosen = Annotated[str | None, typer.Option(help="The same; left out, calibration and a budget choose it, else it is l2.")]
Scope = Annotated[str | None, typer.Option(help="layer, global, isomorphic or allocated.")]
What = Annotated[str | None, typer.Option(help="What goes, of `graphprune list granularity`: mlp, or several with how much of each: mlp=50%,layers=24.")]
Keep = Annotated[list[str] | None, typer.Option(help="A module or pattern that stays whole. May be repeated.")]
Multiple = Annotated[str | None, typer.Option("--multiple-of", help="Widths are multiples of this; auto: of what the device likes.")]
Least = Annotated[int | None, typer.Option("--at-least", help="Units that stay of every group.")]
ByName = Annotated[list[str] | None, typer.Option("--ratio-of", help="A share of single modules: 'layer1.*=25%'. May be repeated.")]
To = Annotated[list[str] | None, typer.Option("--width", help="How many outputs a module keeps: 'layer1.0.conv1=48'. May be repeated.")]
Uniform = Annotated[
    bool | None,
    typer.Option("--uniform/--free", help="Groups of one kind keep equally many units, as a configuration says; by default where a model has one."),
]
Rewrite = Annotated[bool, typer.Option(help="Whether code that holds a size as a number may read it from an attribute.")]
Also = Annotated[list[str] | None, typer.Option(help="Axes that go at your word alone: positions, statistics. May be repeated.")]
Objective = Annotated[str | None, typer.Option(help="What a budget is spent on: score, time, or a number between 0 and 1.")]
Outputs = Annotated[list[str] | None, typer.Option("--output", help="An output that keeps its size; the others may shrink. May be repeated.")]
Verify = Annotated[bool, typer.Option(help="Whether the cut model is compared with the zeroed original.")]
Goal = Annotated[str | None, typer.Option(help="What a repair fits: the output of each block, or of each layer.")]
Spare = Annotated[float | None, typer.Option(help="Share of the calibration that is kept out of a repair's fits.")]
Rows = Annotated[int | None, typer.Option(help="Positions that each fit of a repair sees.")]
Effort = Annotated[str | None, typer.Option(help="How much is tried where no score is named: fast, standard, best.")]
Rounds = Annotated[int | None, typer.Option(help="Rounds in which a budget is reached, each planned on the repaired model of the one before.")]
Seconds = Annotated[float, typer.Option(help="A timing takes at most so long.")]
RuntimeName = Annotated[str | None, typer.Option("--runtime", help="Where a time counts: a name of `graphprune list runtime`.")]
Threads = Annotated[int | None, typer.Option(help="Threads of what is timed.")]
Steps = Annotated[str | None, typer.Option(help="How to repair: a name of `graphprune list repair`.")]
Time = Annotated[bool, typer.Option("--time", help="Also measure against the original.")]
Evaluate = Annotated[str | None, typer.Option(help="file.py:function, model in, number out, larger is better; default: closeness to the original's outputs.")]
Out = Annotated[str | None, typer.Option("--out", "-o", help="The file to write.")]
Results = Annotated[str | None, typer.Option("--out", "-o", help="Write the results as JSON to this file, and a recipe beside it.")]
Folder = Annotated[str, typer.Option("--out", "-o", help="The folder to write; it holds the weights, the plan and a recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def shared(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")] = False) -> None:
    """Structured pruning for PyTorch: any model in, an exactly equivalent smaller dense one out."""


def _run(command: str, options: dict[str, Any]) -> None:
    """Call the command; recipes hold what was given, without what only says how to print."""
    as_json = options.pop("json", False)
    for name in ("mean", "std"):
        if options.get(name):
            options[name] = [float(number) for number in str(options[name]).split(",")]
    try:
        from .work import COMMANDS, printed

        printed(COMMANDS[command](**options), as_json)
    except KeyboardInterrupt as error:
        raise Interrupted from error


class Interrupted(BaseException):
    """A key was pressed to end it; the parser of the command line would make an ordinary error of a KeyboardInterrupt."""


@app.command(epilog="Example: graphprune inspect net.py:net -i 1x3x224x224")
def inspect(model: Model, input: Input, weights: Weights = None, seed: Seed = 0, out: Results = None, json: Json = False) -> None:
    """Show what a model computes, which groups are coupled, and what stays whole and why."""
    _run("inspect", dict(locals()))


@app.command(epilog="Example: graphprune plan net.py:net -i 1x3x224x224 --macs 50% -o plan.json")
def plan(
    model: Model, input: Input, ratio: Ratio = None, params: Params = None, macs: Macs = None, size: Size = None, memory: Memory = None,
    latency: Latency = None, speedup: Speedup = None, score: Chosen = None, scope: Scope = None, what: What = None, keep: Keep = None,
    multiple_of: Multiple = None, at_least: Least = None, runtime: RuntimeName = None, threads: Threads = None, weights: Weights = None, seed: Seed = 0,
    calibration: Calibration = None, batch: Batch = 16, limit: Limit = 256, mean: Mean = None, std: Std = None, tokenizer: Tokenizer = None,
    ratio_of: ByName = None, width: To = None, uniform: Uniform = None, rewrite: Rewrite = True, also: Also = None,
    objective: Objective = None, output: Outputs = None,
    explain: Annotated[bool, typer.Option("--explain", help="One line for every group.")] = False, out: Out = None, json: Json = False,
) -> None:  # fmt: skip
    """Say what would be cut, without cutting."""
    _run("plan", dict(locals()))


@app.command(epilog="Example: graphprune shrink net.py:net -i 1x3x224x224 --macs 50% -c photos/ -o small/")
def shrink(
    model: Model, out: Folder, input: Inputs = None, ratio: Ratio = None, params: Params = None, macs: Macs = None, size: Size = None, memory: Memory = None,
    latency: Latency = None, speedup: Speedup = None, score: Chosen = None, scope: Scope = None, what: What = None, keep: Keep = None,
    multiple_of: Multiple = None, at_least: Least = None, runtime: RuntimeName = None, threads: Threads = None, weights: Weights = None, seed: Seed = 0,
    calibration: Calibration = None, batch: Batch = 16, limit: Limit = 256, mean: Mean = None, std: Std = None, tokenizer: Tokenizer = None,
    ratio_of: ByName = None, width: To = None, uniform: Uniform = None, rewrite: Rewrite = True, also: Also = None,
    objective: Objective = None, output: Outputs = None,
    steps: Steps = None, target: Goal = None, spare: Spare = None, rows: Rows = None, rounds: Rounds = None, effort: Effort = None, verify: Verify = True,
    time: Time = False, json: Json = False,
) -> None:  # fmt: skip
    """Cut a model, repair it if there is calibration, check it, and save it with the recipe that makes it again.

    A folder with config.json and safetensors files is cut file by file, whatever its size, to one of the same kind (without --calibration and times).
    """
    _run("shrink", dict(locals()))


@app.command(epilog="Example: graphprune repair small/ -c photos/ -o repaired/")
def repair(
    model: Annotated[str, typer.Argument(help="A folder that shrink wrote.")], calibration: Calibration, out: Folder, steps: Steps = None,
    target: Goal = None, spare: Spare = None, rows: Rows = None, batch: Batch = 16, limit: Limit = 256,
    mean: Mean = None, std: Std = None, tokenizer: Tokenizer = None, json: Json = False,
) -> None:  # fmt: skip
    """Repair a saved model from inputs without labels."""
    _run("repair", dict(locals()))


@app.command(epilog="Example: graphprune measure small/ --against net.py:net -i 1x3x224x224 --threads 1")
def measure(
    model: Model, input: Input, against: Annotated[str | None, typer.Option(help="The model to compare with, timed in turn.")] = None,
    runtime: RuntimeName = None, threads: Threads = None, seconds: Seconds = 10.0,
    tolerance: Annotated[float, typer.Option(help="It ends once the band is so narrow, as a share of the value.")] = 0.01,
    memory_format: Annotated[str | None, typer.Option("--memory-format", help="channels_last, for example.")] = None,
    weights: Weights = None, seed: Seed = 0, out: Results = None, json: Json = False,
) -> None:  # fmt: skip
    """Time a model, with the band and the control that say how sure it is."""
    _run("measure", dict(locals()))


@app.command(epilog="Example: graphprune sensitivity net.py:net -i 1x3x32x32 --evaluate net.py:accuracy -o sensitivity.csv")
def sensitivity(
    model: Model, input: Input, evaluate: Evaluate = None, ratios: Annotated[str | None, typer.Option(help="0.25,0.5,0.75")] = None,
    groups: Annotated[list[str] | None, typer.Option(help="A group or pattern. May be repeated.")] = None,
    mode: Annotated[str, typer.Option(help="exact or cheap.")] = "exact", score: Score = "l2", keep: Keep = None, weights: Weights = None, seed: Seed = 0,
    calibration: Calibration = None, batch: Batch = 16, limit: Limit = 256, mean: Mean = None, std: Std = None, tokenizer: Tokenizer = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="A .csv file, or a picture (.png, .svg).")] = None, json: Json = False,
) -> None:  # fmt: skip
    """Cut one group at a time and say what it costs."""
    _run("sensitivity", dict(locals()))


@app.command(epilog="Example: graphprune tradeoff net.py:net -i 1x3x32x32 --evaluate net.py:accuracy --shares 75%,50%,25% -o front.png")
def tradeoff(
    model: Model, input: Input, evaluate: Evaluate = None, shares: Annotated[str | None, typer.Option(help="75%,50%,25%")] = None,
    by: Annotated[str, typer.Option(help="macs, params, size, memory or ratio.")] = "macs", score: Score = "l2", scope: Scope = None, keep: Keep = None,
    multiple_of: Multiple = None, at_least: Least = None, ratio_of: ByName = None, width: To = None, uniform: Uniform = None, rewrite: Rewrite = True,
    also: Also = None, steps: Steps = None, target: Goal = None, spare: Spare = None, rows: Rows = None, time: Time = False, seconds: Seconds = 5.0,
    runtime: RuntimeName = None, threads: Threads = None, weights: Weights = None, seed: Seed = 0, calibration: Calibration = None,
    batch: Batch = 16, limit: Limit = 256, mean: Mean = None, std: Std = None, tokenizer: Tokenizer = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="A .csv file, or a picture (.png, .svg).")] = None, json: Json = False,
) -> None:  # fmt: skip
    """Cut to several budgets and say what each costs and saves."""
    _run("tradeoff", dict(locals()))


@app.command(epilog="Example: graphprune export small/ -i 1x3x224x224 -o small.onnx")
def export(
    model: Model, input: Input, out: Annotated[str, typer.Option("--out", "-o", help="The file: .onnx, .pt2, .ts or .pte")],
    to: Annotated[str | None, typer.Option(help="onnx, program (torch.export), torchscript or executorch.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Leave the number of samples (the first axis of every input) open.")] = False,
    weights: Weights = None, seed: Seed = 0,
    json: Json = False,
) -> None:  # fmt: skip
    """Write a model for another runtime."""
    _run("export", dict(locals()))


@app.command(epilog="Example: graphprune report net.py:net -i 1x3x224x224 --plan small/ -o report.html")
def report(
    model: Model, input: Input, plan: Annotated[str | None, typer.Option(help="A plan.json, or a folder that shrink wrote.")] = None,
    ratio: Ratio = None, params: Params = None, macs: Macs = None, size: Size = None, memory: Memory = None, latency: Latency = None, speedup: Speedup = None,
    score: Score = "l2", title: Annotated[str | None, typer.Option(help="Its heading.")] = None, evaluate: Evaluate = None,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Also cut one group at a time.")] = False,
    tradeoff: Annotated[bool, typer.Option("--tradeoff", help="Also cut to several budgets.")] = False, weights: Weights = None, seed: Seed = 0,
    calibration: Calibration = None, batch: Batch = 16, limit: Limit = 256, mean: Mean = None, std: Std = None, tokenizer: Tokenizer = None,
    out: Annotated[str, typer.Option("--out", "-o", help="The HTML file.")] = "report.html", json: Json = False,
) -> None:  # fmt: skip
    """Write one HTML file that shows widths, coupling, what stays whole and why, and scores."""
    _run("report", dict(locals()))


@app.command(epilog="Example: graphprune compare small/ other/plan.json")
def compare(
    plan: Annotated[str, typer.Argument(help="A plan.json, or a folder that shrink wrote.")],
    other: Annotated[str, typer.Argument(help="The plan to compare it with.")],
    out: Results = None,
    json: Json = False,
) -> None:
    """Say where two plans of one model differ."""
    _run("compare", dict(locals()))


@app.command(epilog="Example: graphprune doctor")
def doctor(json: Json = False) -> None:
    """Versions, threads and runtimes of this machine, and what is missing."""
    _run("doctor", dict(locals()))


@app.command("list", epilog="Example: graphprune list score")
def names(
    kinds: Annotated[list[str] | None, typer.Argument(help="score, granularity, target, repair, runtime; all by default.")] = None,
    json: Json = False,
) -> None:
    """What can be asked for by name."""
    _run("list", dict(locals()))


@app.command(epilog="Example: graphprune run small/recipe.yaml -o again/")
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe.yaml that another command wrote.")],
    out: Annotated[str | None, typer.Option("--out", "-o", help="Write here instead.")] = None,
    json: Json = False,
) -> None:
    """Run a recipe again, to the same bytes."""
    _run("run", dict(locals()))
