"""The pretended device (where there is no GPU) has to be known before anything runs backward: autograd starts its threads once, for the devices there are."""

from contextlib import suppress

import torch

if not torch.cuda.is_available():
    with suppress(ImportError):  # a torch older than 2.10 cannot pretend
        import pretended  # noqa: F401


def pytest_configure(config):
    """Networks that are mostly whole are what many tests are about; that this is said has tests of its own."""
    config.addinivalue_line("filterwarnings", "ignore::graphprune.errors.LessThanAsked")
