"""``python -m graphprune`` is the command ``graphprune``."""

from .command import main

if __name__ == "__main__":
    raise SystemExit(main())
