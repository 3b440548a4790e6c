"""What was run, as a file that runs again: a command, its arguments, and the version, in YAML.

>>> text = recipe_text("shrink", {"model": "net.py:net", "macs": "50%", "runtime": None})
>>> print(text)  # doctest: +ELLIPSIS
graphprune: ...
command: shrink
arguments:
  macs: 50%
  model: net.py:net
<BLANKLINE>
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadFile
from ..version import VERSION

RECIPE = "recipe.yaml"
MOST = 2**20  # characters of a recipe


def recipe_text(command: str, arguments: Mapping[str, Any]) -> str:
    """The recipe of a command; arguments that say nothing are left out."""
    import yaml

    said = {name: value for name, value in sorted(arguments.items()) if value not in (None, False, (), [], "")}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}
    return yaml.safe_dump({"graphprune": VERSION, "command": command, "arguments": plain}, sort_keys=False)


def read_recipe(file: str | Path) -> dict[str, Any]:
    """A recipe's fields; raises :class:`~graphprune.errors.BadFile` where the file is none."""
    import yaml

    try:
        text = Path(file).read_text(encoding="utf-8")
        content = yaml.safe_load(text) if len(text) <= MOST else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadFile(f"{file} is no recipe: {error}") from error
    fields = content if isinstance(content, dict) else {}
    if not isinstance(fields.get("command"), str) or not isinstance(fields.get("arguments"), dict) or not all(isinstance(k, str) for k in fields["arguments"]):
        raise BadFile(f"{file} is no recipe: it needs 'command' and 'arguments'")
    return fields
