"""What a process that runs out of memory looks like to the one that started it."""

import os


def measure(*_) -> None:
    """In the place of `recipes.torch_comparison.cost.measure`."""
    os._exit(1)
