"""``python -m graphprune``: the names of all scores, granularities, targets and repairs, with one line each; a kind as argument shows only that one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import available
from .catalogue import KINDS, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what can be asked for; returns the exit status.

    >>> main(["target"])  # doctest: +ELLIPSIS
    targets
      ratio    the share of units removed in every group
    ...
    0
    """
    parser = argparse.ArgumentParser(prog="python -m graphprune", description="What can be asked of graphprune.shrink by name.")
    parser.add_argument("kind", nargs="*", help=f"any of {', '.join(KINDS)}; all of them by default")
    kinds = parser.parse_args(arguments).kind
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        parser.error(f"no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    print(table({kind: names for kind, names in available().items() if not kinds or kind in kinds}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
