"""Options by name (:func:`taking`), and their old spellings, which work for one version more and say what to write now.

>>> with warnings.catch_warnings(record=True) as caught:
...     warnings.simplefilter("always")
...     modern({"criterion": "l1", "multiple_of": 8})
{'score': 'l1', 'widths': Widths(multiple_of=8)}
>>> print(caught[0].message)
criterion= is an old spelling; write score='l1'
"""

from __future__ import annotations

import functools
import inspect
import warnings  # noqa: F401  (the example above)
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .errors import BadOption, UnknownOption, warn
from .options import DEFAULTS, Repair, Runtime, Widths
from .scores.registry import OnData, check_data
from .wording import nearest

WIDTHS = {"multiple_of": "multiple_of", "min_units": "at_least", "ratios": "ratios", "rewrite": "rewrite"}
RUNTIME = {"runtime": "name", "threads": "threads", "measure": "measure", "objective": "objective"}
# What other tools, and people, call the options: each word with what is written here.
_KEEP, _SHARES = "keep=[...] (names, patterns, module types, modules)", 'ratio=0 and widths=graphprune.Widths(ratios={"layer4.*": 0.5})'
_DATA = "repair=batches (what stays is refitted), or score=graphprune.scores.taylor.on(batches, loss)"
_LOOP = "graphprune.iterate(model, example_input, {...}, train=..., evaluate=...), which runs your own functions"
ELSEWHERE = {
    **dict.fromkeys(("pruning_ratio", "ch_sparsity", "sparsity", "amount", "rate", "prune_ratio", "target_ratio", "percent"), "ratio=0.5"),
    **dict.fromkeys(("flops", "mac", "target_flops", "max_flops", "ops", "gflops", "gmacs"), 'macs=0.5 (or macs="3 GFLOPs")'),
    **dict.fromkeys(("parameters", "param", "n_params", "num_params", "max_params", "target_params"), 'params="1M"'),
    **dict.fromkeys(("filesize", "file_size", "bytes", "mb", "model_size"), 'size="5 MB"'),
    **dict.fromkeys(("mem", "peak_memory", "activations", "max_memory"), 'memory="8 MB"'),
    **dict.fromkeys(("time", "ms", "time_ms", "latency_ms", "seconds", "max_latency"), 'latency="8 ms"'),
    **dict.fromkeys(("speed", "faster", "acceleration", "speed_up"), "speedup=2"),
    **dict.fromkeys(("importance", "metric", "method", "criteria", "saliency"), 'score="l2"'),
    **dict.fromkeys(("ignored_layers", "ignore", "ignored", "exclude", "excluded", "skip", "frozen", "unprunable", "dont_prune", "ignored_params"), _KEEP),
    **dict.fromkeys(("only", "include", "layers", "modules", "targets", "target_modules", "root_module_types"), _SHARES),
    **dict.fromkeys(("pruning_ratio_dict", "layer_ratios", "per_layer", "ratio_dict"), 'widths=graphprune.Widths(ratios={"layer1.*": 0.2})'),
    **dict.fromkeys(("round_to", "divisor", "align", "alignment", "channel_multiple"), "widths=graphprune.Widths(multiple_of=8)"),
    **dict.fromkeys(("min_channels", "min_width", "minimum", "at_least"), "widths=graphprune.Widths(at_least=4)"),
    **dict.fromkeys(("uniform", "to"), "widths=graphprune.Widths(...)"),
    **dict.fromkeys(("global_pruning", "globally", "isomorphic"), 'scope="global" or scope="isomorphic"'),
    **dict.fromkeys(("data", "loader", "dataloader", "train_loader", "inputs", "calib", "calibration_data", "calib_loader", "dataset"), _DATA),
    **dict.fromkeys(("steps", "iterative_steps", "epochs", "train", "train_fn", "evaluate", "eval_fn", "finetune", "fine_tune"), _LOOP),
    **dict.fromkeys(("heads", "num_heads", "prune_num_heads"), 'what="heads" (heads are found from the run)'),
    **dict.fromkeys(("free_outputs", "output", "outputs_to_keep"), "outputs=... (the outputs that keep their size; the others may shrink)"),
    **dict.fromkeys(("device", "cuda", "dtype"), "model.to(...) before the call: the model and the example say where"),
    **dict.fromkeys(("verbose", "progress", "quiet"), "repair=graphprune.Repair(batches, progress=False), or nothing: only long runs show a bar"),
    **dict.fromkeys(("seed", "generator"), "torch.manual_seed(0); a cut draws nothing but score=graphprune.scores.random.with_(seed=0)"),
    **dict.fromkeys(("dry_run", "plan_only"), "graphprune.plan(...), which cuts nothing"),
    **dict.fromkeys(("check", "strict", "self_check"), "verify=True"),
    **dict.fromkeys(("copy", "in_place"), "inplace=True"),
    **dict.fromkeys(("input", "inputs_example", "example_inputs", "dummy_input", "sample_input", "x"), "example_input, the second argument"),
}
OLD = ("criterion", "batches", "loss", "granularity", "calibration", *WIDTHS, *RUNTIME)
F = TypeVar("F", bound=Callable[..., Any])


def taking(options: type) -> Callable[[F], F]:
    """A function of a model, an example, a ratio and ``options`` (a TypedDict) as it is called: it knows each by name, and the old spellings of some.

    An old spelling works, with a DeprecationWarning; a name that is none raises :class:`~graphprune.errors.UnknownOption` with the nearest one.
    """

    def made(function: F) -> F:
        names = options.__annotations__
        first = list(inspect.signature(function).parameters.values())[:-1]  # the last one are the options

        known = [*(each.name for each in first), *names]

        @functools.wraps(function)
        def call(*args: Any, **asked: Any) -> Any:
            asked = modern(asked, "repair" in names)
            if unknown := next((name for name in asked if name not in known), None):
                raise UnknownOption(_unknown(function.__name__, unknown, known))
            return function(*args, **asked)

        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS.get(name), annotation=getattr(hint, "__forward_arg__", hint))
            for name, hint in names.items()
        ]
        call.__signature__ = inspect.Signature([*first, *more])  # type: ignore[attr-defined]  # for help() and whoever completes names
        return call  # type: ignore[return-value]

    return made


def _unknown(function: str, name: str, known: list[str]) -> str:
    """What is wrong with an option that a function does not have, and what is written here.

    >>> _unknown("shrink", "pruning_ratio", ["ratio"]), _unknown("shrink", "sizes", ["ratio", "size"])
    ("shrink has no option 'pruning_ratio'; write ratio=0.5", "shrink has no option 'sizes'; the nearest is size=")
    """
    if function == "plan" and name in ("repair", "verify", "inplace", "return_plan"):
        return f"plan has no option {name!r}: it decides and cuts nothing; give it to shrink, or to what follows (graphprune.apply, graphprune.repair)"
    near = nearest(name, known)
    words = ELSEWHERE.get(name.lower())
    if words is None:
        listed = sorted(known[2:], key="return_plan".__eq__)  # how the result comes back is said last
        words = f"{', '.join(f'{each}=' for each in near)}" if near else ", ".join(f"{each}=" for each in listed)
        return f"{function} has no option {name!r}; {('the nearest is ' if len(near) == 1 else 'the nearest are ') if near else 'there are '}{words}"
    return f"{function} has no option {name!r}; write {words}"


def modern(options: dict[str, Any], repairs: bool = True) -> dict[str, Any]:
    """The options in the present spelling; raises :class:`~graphprune.errors.BadOption` where one is given in both."""
    if not any(name in options for name in OLD) and options.get("scope") != "optimal" and not _steps(options):
        return options
    new = {name: value for name, value in options.items() if name not in OLD}
    old = {name: options[name] for name in OLD if name in options}
    if new.get("scope") == "optimal":
        new["scope"] = "allocated"
        _say(("scope",), "scope='allocated'")
    _move(old, new, "granularity", "what")
    _move(old, new, "criterion", "score")
    _data(old, new)
    _collect(old, new, WIDTHS, "widths", Widths)
    _runtime(old, new)
    if repairs:
        _repair(old, new)
    elif "calibration" in old:
        raise BadOption("calibration= repairs what was cut, and a plan cuts nothing; leave it out")
    return new


def _say(names: tuple[str, ...], text: str) -> None:
    shown = " and ".join(f"{name}=" for name in names)
    warn(f"{shown} {'is an old spelling' if len(names) == 1 else 'are old spellings'}; write {text}", DeprecationWarning)


def _move(old: dict, new: dict, before: str, now: str) -> None:
    if before not in old:
        return
    if now in new:
        raise BadOption(f"{before}= is the old spelling of {now}=; give {now}= alone")
    new[now] = old.pop(before)
    _say((before,), f"{now}={new[now]!r}")


def _data(old: dict, new: dict) -> None:
    """``batches`` and ``loss`` go into the score."""
    names = tuple(name for name in ("batches", "loss") if name in old)
    batches, loss = old.pop("batches", None), old.pop("loss", None)
    score = new.get("score", "l2")
    if isinstance(score, OnData) and names:
        raise BadOption("the score has its data already; leave batches= and loss= out")
    if batches is None and loss is None:
        return
    check_data(() if batches is None else batches, loss)
    if batches is not None:
        new["score"] = OnData(score, batches, loss)
    _say(names, f"score=graphprune.scores.on({score if isinstance(score, str) else '...'!r}, batches{', loss' if loss is not None else ''})")


def _collect(old: dict, new: dict, table: dict[str, str], now: str, make: Callable[..., Any]) -> None:
    facts = {table[name]: old.pop(name) for name in table if name in old}
    if not facts:
        return
    if new.get(now) is not None:
        raise BadOption(f"{', '.join(facts)} belong to {now}=; give {now}= alone")
    new[now] = make(**facts)
    _say(tuple(name for name in table if table[name] in facts), f"{now}=graphprune.{new[now]!r}")


def _runtime(old: dict, new: dict) -> None:
    """Where nothing is timed, a number of threads has no effect and is left out."""
    times = any(new.get(name) is not None for name in ("speedup", "latency"))
    _collect(old, new, RUNTIME, "on", Runtime)
    on = new.get("on")
    widths = new.get("widths")
    aligned = isinstance(widths, Widths) and widths.multiple_of == "auto"
    if isinstance(on, Runtime) and not times and not aligned and on == Runtime(threads=on.threads):
        new.pop("on")


def _steps(options: dict[str, Any]) -> bool:
    return "calibration" in options


def _repairs(value: Any) -> bool:
    """Whether a value says with what to repair, and not only by which steps."""
    steps = isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(step, str) for step in value))
    return isinstance(value, Iterable | Repair) and not steps


def _repair(old: dict, new: dict) -> None:
    if "calibration" not in old:
        return
    calibration, steps = old.pop("calibration"), new.pop("repair", "auto")
    if _repairs(steps):
        raise BadOption("calibration= is the old spelling of repair=Repair(batches); give repair= alone")
    if calibration is None:
        new["repair"] = steps
        return
    new["repair"] = None if steps in (None, "none") else Repair(calibration, steps)
    _say(("calibration",), "repair=batches" if steps == "auto" else f"repair=graphprune.Repair(batches, {steps!r})")
