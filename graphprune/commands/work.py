"""What every command does, as functions of plain values: :mod:`graphprune.commands.app` reads them from the command line, recipes from a file.

Each returns what is printed: ``text`` for people, ``data`` for machines.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, available, checkpoint, couple, load, profile, save, trace
from .. import measure as measured
from .. import plan as planned
from .. import repair as repaired
from .. import report as reported
from .. import sensitivity as found_sensitivity
from .. import shrink as shrunk
from .. import tradeoff as found_tradeoff
from ..adapters.exports import ENDINGS, EXPORTS, FIXED, Call
from ..adapters.inputs import calibration_of, example_of
from ..adapters.models import LIBRARIES, model_of, unusable
from ..automatic import AUTO
from ..catalogue import KINDS, PLURALS, table
from ..checkpoint.scoring import STREAMED
from ..cutting.describe import Hints, brief_text
from ..cutting.plan import Plan, plan_of
from ..errors import BadFile, BadOption, BadPlan, GraphpruneError
from ..formats.recipe import RECIPE, read_recipe, recipe_text
from ..insight.axes import filed
from ..options import Repair, Runtime, Widths
from ..quantities import amount
from ..tracing.summary import summary
from ..tracing.trees import normal_inputs, tensors

MORE = {
    "plan": "--explain (a line for every group), --json, -o plan.json, graphprune report",
    "shrink": "graphprune compare, graphprune measure --against, graphprune report --plan",
}
TARGETS = ("ratio", "params", "macs", "size", "memory", "latency", "speedup")


@dataclass(frozen=True)
class Outcome:
    """What a command has to say."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)


class Setting:
    """The model, its input and its calibration, from the arguments that all commands share."""

    def __init__(self, model: str, input: Sequence[str] = (), weights: str | None = None, seed: int = 0, calibration: str | None = None, **others: Any) -> None:
        self.model, self.example = model_of(model, weights, seed), example_of(input, seed)
        options = {name: others[name] for name in ("batch", "limit", "mean", "std", "tokenizer") if others.get(name)}
        self.batches = calibration_of(calibration, self.example, **options) if calibration else None


def request(arguments: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """The options of :func:`graphprune.shrink` among a command's arguments."""
    options = _targets(arguments)
    timed = options.get("latency") or options.get("speedup") or arguments.get("objective") or arguments.get("multiple_of") == "auto"
    if arguments.get("runtime") or arguments.get("threads"):
        if not timed:
            raise BadOption("--runtime and --threads say where a time counts; ask for one: --speedup 2x or --latency '8 ms'")
    if timed:
        options["on"] = _clock(arguments)
    if arguments.get("output"):
        options["outputs"] = arguments["output"]
    if arguments.get("score") == AUTO:
        options["score"] = AUTO
    elif arguments.get("score"):  # else it is that of the function in Python
        options["score"] = _score(arguments["score"], setting)
    return options | _widths(arguments)


def _targets(arguments: dict[str, Any]) -> dict[str, Any]:
    """How much goes, and of what."""
    options: dict[str, Any] = {name: arguments[name] for name in (*TARGETS, "scope", "what", "keep") if arguments.get(name)}
    if "what" in options:
        options["what"] = _kinds(options["what"])
    return options


def _kinds(text: str) -> Any:
    """One kind, several, or how much of each.

    >>> _kinds("mlp"), _kinds("mlp,heads"), _kinds("mlp=50%, layers=24")
    ('mlp', ('mlp', 'heads'), {'mlp': '50%', 'layers': 24})
    """
    kinds = [each.strip() for each in text.split(",") if each.strip()]
    if any("=" in each for each in kinds):
        pairs = [each.partition("=")[::2] for each in kinds]
        twice = [name for at, (name, _) in enumerate(pairs) if not name.strip() or name in [other for other, _ in pairs[:at]]]
        if twice:
            raise BadOption(f"--what {text!r} names {twice[0]!r} twice" if twice[0].strip() else f"--what {text!r} has an amount of nothing; write mlp=50%")
        return {name.strip(): int(share) if share.strip().isdecimal() else share.strip() or None for name, share in pairs}
    return kinds[0] if len(kinds) == 1 else tuple(kinds)


def _clock(arguments: dict[str, Any]) -> Runtime:
    """Where a time counts, and what it counts for."""
    objective = arguments.get("objective") or "score"
    objective = objective if objective.isalpha() else _number(objective)
    return Runtime(arguments.get("runtime") or "eager", threads=arguments.get("threads"), objective=objective)


def _widths(arguments: dict[str, Any]) -> dict[str, Widths]:
    """What the widths of single groups have to be, where something is said about them."""
    options: dict[str, Any] = {name: arguments[name] for name in ("at_least", "also") if arguments.get(name)}
    if arguments.get("uniform") is not None:
        options["uniform"] = arguments["uniform"]
    if arguments.get("multiple_of"):
        step = str(arguments["multiple_of"])
        options["multiple_of"] = int(step) if step.isdecimal() else step
    if arguments.get("ratio_of"):
        options["ratios"] = {name: _number(share) for name, share in map(_pair, arguments["ratio_of"])}
    if arguments.get("width"):
        options["to"] = {name: int(count) if count.isdecimal() else count for name, count in map(_pair, arguments["width"])}
    if arguments.get("rewrite") is False:
        options["rewrite"] = False
    return {"widths": Widths(**options)} if options else {}


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.rpartition("=")
    if not (name and sign and value):
        raise BadOption(f"{text!r} says nothing about a module; write name=value, as in 'layer1.*=25%' or 'layer1.0.conv1=48'")
    return name, value


def _repair(arguments: dict[str, Any], batches: Any) -> Repair | None:
    """How a cut model is repaired; not at all where there is no calibration and no step that needs none."""
    options = {name: arguments[name] for name in ("target", "spare", "rows", "rounds", "effort") if arguments.get(name) is not None}
    if batches is None and not arguments.get("steps"):
        if options:
            raise BadOption(f"--{next(iter(options))} says how to repair, which needs inputs: --calibration")
        return None
    return Repair(batches, arguments.get("steps") or "auto", **options)


def _score(name: str, setting: Setting) -> Any:
    """A score by name; one that reads inputs takes those of the calibration."""
    from ..scores import named

    score = named(name)
    if score.needs_now() == "nothing":
        return score
    if setting.batches is None:
        raise BadOption(f"the score {name!r} reads data: give --calibration")
    return score.on(setting.batches)


def inspect(**arguments: Any) -> Outcome:
    setting = Setting(**arguments)
    graph = trace(setting.model, setting.example)
    groups = couple(graph)
    cost = profile(setting.model, setting.example)
    data = {"cost": asdict(cost), "groups": list(groups.table()), "whole": _wholes(groups.locked)}
    return _kept(Outcome(f"{cost}\n\n{summary(graph, more='')}\n\n{groups}", data), "inspect", arguments)


def _wholes(locked: dict) -> list[dict[str, Any]]:
    return [{"tensor": name, "axis": axis, "reason": str(reason)} for (name, axis), reason in locked.items()]


def plan(**arguments: Any) -> Outcome:
    setting = Setting(**arguments)
    chosen = planned(setting.model, setting.example, **request(arguments, setting))
    if arguments.get("out"):
        _write(arguments["out"], chosen.to_json(), "plan", arguments)
    return Outcome(chosen.explain() if arguments.get("explain") else _told(chosen, "plan"), _facts(chosen))


def _told(chosen: Plan, command: str) -> str:
    """A plan in words, with the advice as the command line spells it."""
    return brief_text(chosen, Hints("--calibration", "--steps data-free", MORE[command]))


def _facts(chosen: Plan) -> dict[str, Any]:
    totals = {"before": chosen.outline.before._asdict(), "after": chosen.outline.after._asdict()} if chosen.outline else {}
    return {**totals, "rows": list(chosen.table()), "notes": list(chosen.notes)}


def shrink(**arguments: Any) -> Outcome:
    if _by_file(arguments):
        return _checkpoint(arguments)
    if not arguments.get("input"):
        raise BadOption("-i says what the model is called with: -i 1x3x224x224")
    setting = Setting(**arguments)
    options = request(arguments, setting)
    if (repairs := _repair(arguments, setting.batches)) is not None:
        options["repair"] = repairs
    if arguments.get("verify") is False:
        options["verify"] = False
    small, chosen = shrunk(setting.model, setting.example, return_plan=True, **options)
    folder = _saved(small, "shrink", arguments)
    lines, data = [_told(chosen, "shrink"), "", f"saved in {folder}"], _facts(chosen) | {"folder": str(folder)}
    if arguments.get("time"):
        timing = measured(small, setting.example, setting.model, threads=arguments.get("threads") or 1, runtime=arguments.get("runtime") or "eager")
        lines, data = [*lines, f"measured: {timing}"], data | {"measured": asdict(timing)}
    return Outcome("\n".join(lines), data)


def _by_file(arguments: dict[str, Any]) -> bool:
    """Whether what is asked for needs no more than one tensor of a folder at a time."""
    folder = Path(arguments["model"])
    pretrained = (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) and not (folder / RECIPE).is_file()
    whole = [name for name in ("calibration", "steps", "latency", "speedup", "objective", "output", "weights", "time") if arguments.get(name)]
    return pretrained and not whole and (arguments.get("score") or "l2") in STREAMED


def _checkpoint(arguments: dict[str, Any]) -> Outcome:
    """A folder of safetensors with a configuration: shrunk file by file, to one of the same kind."""
    options = _targets(arguments)
    inputs = example_of(arguments["input"], arguments.get("seed", 0)) if arguments.get("input") else None
    out = Path(_place(arguments))
    chosen = checkpoint.shrink(arguments["model"], out, inputs, score=arguments.get("score") or "l2", **_widths(arguments), **options)
    _with_recipe(out, "shrink", arguments)
    return Outcome("\n".join([_told(chosen, "shrink"), "", f"saved in {out}"]), _facts(chosen) | {"folder": str(out)})


def _saved(small: nn.Module, command: str, arguments: dict[str, Any]) -> Path:
    """The folder, with the recipe that makes it again."""
    folder = save(small, _place(arguments))
    _recipe(folder / RECIPE, command, arguments)
    return folder


def _place(arguments: dict[str, Any]) -> str:
    if not arguments.get("out"):
        raise BadOption("--out names the folder or file to write")
    return arguments["out"]


def _write(file: str, text: str, command: str, arguments: dict[str, Any]) -> Path:
    """A file and the recipe beside it."""
    path = Path(file)
    with filed(path) as part:
        part.write_text(text, encoding="utf-8")
    return _with_recipe(path, command, arguments)


def _with_recipe(path: Path, command: str, arguments: dict[str, Any]) -> Path:
    """What was written, with the recipe that makes it again beside it."""
    _recipe(path.with_name(f"{path.name}.{RECIPE}"), command, arguments)
    return path


def _recipe(file: Path, command: str, arguments: dict[str, Any]) -> None:
    with filed(file) as part:
        part.write_text(recipe_text(command, {name: value for name, value in arguments.items() if name != "json"}), encoding="utf-8")


def _kept(outcome: Outcome, command: str, arguments: dict[str, Any]) -> Outcome:
    """What a command has to say, also as JSON in a file where one is named."""
    if arguments.get("out"):
        _write(arguments["out"], as_json(outcome), command, arguments)
    return outcome


def repair(**arguments: Any) -> Outcome:
    """A saved model, repaired from calibration data against the original."""
    folder = Path(arguments["model"])
    if not (folder / RECIPE).is_file():
        raise BadPlan(f"{folder} is no folder that graphprune shrink wrote: it has no {RECIPE}, which says what the original is")
    first = read_recipe(folder / RECIPE)["arguments"]
    whole = {**first, **{name: arguments[name] for name in ("calibration", "batch", "limit", "mean", "std", "tokenizer") if arguments.get(name)}}
    setting = Setting(**whole)
    if setting.batches is None:
        raise BadOption("repair learns from inputs: --calibration")
    small = load(folder, setting.model)
    repairs = _repair(arguments, setting.batches)
    assert repairs is not None  # there is calibration
    options = {name: getattr(repairs, name) for name in ("steps", "target", "spare", "rows")}
    better = repaired(small, setting.model, plan_of(small), setting.batches, **options)
    kept = {**whole, **{name: arguments.get(name) for name in ("steps", "target", "spare", "rows", "out")}, "model": first["model"], "of": str(folder)}
    target = save(better, _place(arguments))
    _recipe(target / RECIPE, "repair", kept)
    chosen = plan_of(better)
    assert chosen is not None  # what was loaded has one
    return Outcome(f"{_told(chosen, 'shrink')}\n\nsaved in {target}", {"folder": str(target)})


def measure(**arguments: Any) -> Outcome:
    setting = Setting(**arguments)
    reference = model_of(arguments["against"], arguments.get("weights"), arguments.get("seed", 0)) if arguments.get("against") else None
    options = {"runtime": arguments.get("runtime") or "eager", "threads": arguments.get("threads"), "seconds": arguments.get("seconds") or 10.0}
    options |= {"tolerance": arguments.get("tolerance") or 0.01, "memory_format": _memory_format(arguments.get("memory_format"))}
    timing = measured(setting.model, setting.example, reference, **options)
    return _kept(Outcome(str(timing), asdict(timing)), "measure", arguments)


def _memory_format(name: str | None) -> torch.memory_format | None:
    formats = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.memory_format)}
    if name is not None and name not in formats:
        raise BadOption(f"--memory-format is {name!r}; it is one of {', '.join(sorted(formats))}")
    return formats[name] if name else None


def _evaluate(setting: Setting, text: str | None) -> Callable[[nn.Module], Any]:
    """The user's own metric, or how near the outputs are to those of the original (0: equal), on the calibration batches or the example."""
    if text:
        source, _, name = text.rpartition(":")
        from ..adapters.models import _from_file, _imported

        function = getattr(_from_file(Path(source)) if source.endswith(".py") else _imported(source, text), name, None)
        if not callable(function):
            raise BadOption(f"--evaluate {text!r} is no function; write file.py:function, which takes a model and returns a number")
        return function
    from ..tracing.probe import batch_inputs

    calls = [batch_inputs(batch) for batch in setting.batches] if setting.batches else [normal_inputs(setting.example, None)]
    wanted = [_outputs(setting.model, *call) for call in calls]

    def closeness(model: nn.Module) -> float:
        pairs = [(a, b) for call, want in zip(calls, wanted, strict=True) for a, b in zip(_outputs(model, *call), want, strict=True)]
        return 0.0 - float(sum((a - b).norm() ** 2 for a, b in pairs) ** 0.5 / max(1e-12, float(sum(b.norm() ** 2 for _, b in pairs)) ** 0.5))

    return closeness


def _outputs(model: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        return [tensor.double() for tensor in tensors(model(*args, **kwargs), torch.Tensor) if tensor.is_floating_point()]


def sensitivity(**arguments: Any) -> Outcome:
    setting = Setting(**arguments)
    options: dict[str, Any] = {"ratios": [_number(ratio) for ratio in arguments["ratios"].split(",")]} if arguments.get("ratios") else {}
    options |= {name: arguments[name] for name in ("groups", "keep") if arguments.get(name)}
    mode, score = arguments.get("mode") or "exact", _score(arguments.get("score") or "l2", setting)
    study = found_sensitivity(setting.model, setting.example, _evaluate(setting, arguments.get("evaluate")), mode=mode, score=score, **options)
    return _tabled("sensitivity", study, {"original": study.original, "rows": list(study.table())}, arguments)


def _number(text: str) -> float:
    return amount("ratio", text.strip())


def _tabled(command: str, result: Any, data: dict[str, Any], arguments: dict[str, Any]) -> Outcome:
    """A result, also as CSV or as a picture where a file is given."""
    out = arguments.get("out")
    if out and out.endswith(".csv"):
        _write(out, result.to_csv(), command, arguments)
    elif out:
        result.plot(out)
        _with_recipe(Path(out), command, arguments)
    return Outcome(str(result), data)


def tradeoff(**arguments: Any) -> Outcome:
    setting = Setting(**arguments)
    options: dict[str, Any] = {"shares": arguments["shares"].split(",")} if arguments.get("shares") else {}
    options |= {"by": arguments.get("by") or "macs", "measure": bool(arguments.get("time")), "scope": arguments.get("scope")}
    options |= {"repair": _repair(arguments, setting.batches), "keep": arguments.get("keep") or (), "on": _clock(arguments)} | _widths(arguments)
    options["seconds"] = arguments.get("seconds") or 5.0
    options["score"] = _score(arguments.get("score") or "l2", setting)
    study = found_tradeoff(setting.model, setting.example, _evaluate(setting, arguments.get("evaluate")), **options)
    return _tabled("tradeoff", study, {"budget": study.budget, "rows": list(study.table()), "missed": list(study.missed)}, arguments)


def export(**arguments: Any) -> Outcome:
    setting = Setting(**arguments)
    out = Path(_place(arguments))
    kind = arguments.get("to") or ENDINGS.get(out.suffix)
    if kind not in EXPORTS:
        raise BadOption(f"--to is {kind!r}; it is one of {', '.join(EXPORTS)} (or --out ends in {', '.join(ENDINGS)})")
    args, kwargs = normal_inputs(setting.example, None)
    if arguments.get("dynamic") and kind in FIXED:
        raise BadOption(f"--dynamic goes with {', '.join(name for name in EXPORTS if name not in FIXED)}; {kind} is written for the lengths of the example")
    try:
        with filed(out) as part:
            EXPORTS[kind](Call(setting.model.eval(), args, kwargs, bool(arguments.get("dynamic"))), part)
    except GraphpruneError:
        raise
    except ImportError as error:
        raise BadOption(f"exporting as {kind} needs a library: {error}; pip install 'graphprune[export]'") from error
    except Exception as error:
        raise BadOption(f"the model cannot be exported as {kind}: {type(error).__name__}: {str(error)[:500]}") from error
    size = _with_recipe(out, "export", arguments).stat().st_size
    return Outcome(f"{out}: {size:,} bytes", {"file": str(out), "bytes": size, "as": kind})


def plan_at(text: str) -> Plan:
    """The plan in a file, or in a folder that holds one."""
    path = Path(text)
    file = path / "plan.json" if path.is_dir() else path
    try:
        return Plan.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile.of(error, f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadPlan(f"{file} is no plan written by graphprune: {error}") from error


def report(**arguments: Any) -> Outcome:
    setting = Setting(**arguments)
    chosen = plan_at(arguments["plan"]) if arguments.get("plan") else None
    asked = {name: arguments[name] for name in TARGETS if arguments.get(name)}
    if chosen is None and asked:
        chosen = planned(setting.model, setting.example, **request(arguments, setting))
    extra: dict[str, Any] = {}
    if arguments.get("sensitivity"):
        extra["sensitivity"] = found_sensitivity(setting.model, setting.example, _evaluate(setting, arguments.get("evaluate")))
    if arguments.get("tradeoff"):
        extra["tradeoff"] = found_tradeoff(setting.model, setting.example, _evaluate(setting, arguments.get("evaluate")), measure=False)
    score = _score(arguments.get("score") or "l2", setting)
    path = reported(
        setting.model, setting.example, chosen, arguments.get("out") or "report.html", title=arguments.get("title") or "", asked=asked, score=score, **extra
    )
    _with_recipe(path, "report", arguments)
    return Outcome(f"{path}: {path.stat().st_size:,} bytes", {"file": str(path), "bytes": path.stat().st_size})


def compare(**arguments: Any) -> Outcome:
    differences = plan_at(arguments["plan"]).compare(plan_at(arguments["other"]))
    text = str(differences) if len(differences) else "the plans do the same"
    return _kept(Outcome(text, {"rows": list(differences)}), "compare", arguments)


def doctor(**_: Any) -> Outcome:
    """Versions, threads, runtimes, and what is missing."""
    from importlib import metadata, util

    facts: dict[str, Any] = {"graphprune": __version__, "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    facts |= {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
    rows = [f"{name:12} {value}" for name, value in facts.items()]
    installed: dict[str, str | None] = {}
    for package, (module, purpose, extra) in PACKAGES.items():
        try:
            installed[package] = metadata.version(package) if util.find_spec(module) else None
        except metadata.PackageNotFoundError:
            installed[package] = None
        missing = f"missing: {purpose} (pip install 'graphprune[{extra}]')" if extra else f"missing: {purpose} (pip install {package})"
        rows.append(f"{package:12} {installed[package] or missing}")
    libraries = {name: unusable(name) for name in LIBRARIES if util.find_spec(name)}
    rows += [f"{name:12} {reason or f'{metadata.version(name)} (models by name)'}" for name, reason in libraries.items()]
    return Outcome("\n".join(rows), {**facts, "packages": installed, "libraries": libraries})


PACKAGES = {
    "typer": ("typer", "this command line", "cli"),
    "rich": ("rich", "its help", "cli"),
    "pyyaml": ("yaml", "recipes", "cli"),
    "matplotlib": ("matplotlib", "pictures as PNG, plots", "report"),
    "pillow": ("PIL", "images as calibration", ""),
    "pandas": ("pandas", "Table.to_pandas", ""),
    "onnx": ("onnx", "export to ONNX", "export"),
    "onnxscript": ("onnxscript", "export to ONNX", "export"),
    "onnxruntime": ("onnxruntime", "times on ONNX Runtime", "export"),
    "openvino": ("openvino", "times on OpenVINO", "export"),
    "executorch": ("executorch", "export to ExecuTorch", ""),
}


def names(**arguments: Any) -> Outcome:
    singular = {plural: kind for kind, plural in PLURALS.items()}  # as the lists are headed
    kinds = [singular.get(kind, kind) for kind in arguments.get("kinds") or ()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BadOption(f"no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    shown = {kind: lines for kind, lines in available().items() if not kinds or kind in kinds}
    return Outcome(table(shown), shown)


def run(**arguments: Any) -> Outcome:
    """A recipe again, into the same place or another."""
    fields = read_recipe(arguments["recipe"])
    if fields["command"] not in COMMANDS or fields["command"] == "run":
        raise BadFile(f"{arguments['recipe']} asks for the command {fields['command']!r}; there are {', '.join(COMMANDS)}")
    again = dict(fields["arguments"])
    if fields["command"] == "repair":
        again["model"] = again.pop("of", again["model"])
    if arguments.get("out"):
        again["out"] = arguments["out"]
    return COMMANDS[fields["command"]](**again)


COMMANDS: dict[str, Callable[..., Outcome]] = {
    "inspect": inspect, "plan": plan, "shrink": shrink, "repair": repair, "measure": measure, "sensitivity": sensitivity, "tradeoff": tradeoff,
    "export": export, "report": report, "compare": compare, "doctor": doctor, "list": names, "run": run,
}  # fmt: skip


def as_json(outcome: Outcome) -> str:
    return json.dumps(outcome.data, indent=2, default=str) + "\n"


def printed(outcome: Outcome, machine: bool) -> None:
    """For people, or as JSON for machines."""
    sys.stdout.write(as_json(outcome) if machine else outcome.text + "\n")
