"""The command ``graphprune``: its exit status and what is said where something goes wrong.

0: done. 1: an error that the message explains. 2: the command line is wrong, or the extra ``cli`` is not installed. 3: a target is out of reach.
130: interrupted. Nothing is written in part.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    >>> main(["list", "target"])  # doctest: +ELLIPSIS
    targets
      ratio    the share of units removed in every group
    ...
    0
    """
    try:
        import yaml  # noqa: F401  (recipes; better said now than after the work)

        from .commands.app import Interrupted, app
    except ImportError as error:
        print(f"graphprune: the command line needs {error.name}: pip install 'graphprune[cli]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    from .errors import BadAmount, BadTarget, GraphpruneError

    with warnings.catch_warnings():
        warnings.showwarning = _warned
        try:
            app(list(sys.argv[1:] if arguments is None else arguments), prog_name="graphprune")
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else 0 if done.code is None else 1
        except (Interrupted, KeyboardInterrupt):
            return _interrupted()
        except GraphpruneError as error:
            print(f"graphprune: {type(error).__name__}: {error}", file=sys.stderr)
            return 3 if isinstance(error, BadTarget) and not isinstance(error, BadAmount) else 1
    return 0


def _interrupted() -> int:
    print("graphprune: interrupted; no file was left in part", file=sys.stderr)
    return 130


def _warned(message: Warning | str, category: type[Warning], *_: object) -> None:
    """A warning without the line of code, which is not the reader's."""
    if not issubclass(category, DeprecationWarning | FutureWarning):
        print(f"graphprune: warning: {message}", file=sys.stderr)
