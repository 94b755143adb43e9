"""The nearest right name for a misspelt one."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` to end a message with, or nothing where no name is near.

    Example:
        >>> nearest("digts", ["digits", "cifar10"])
        "; did you mean 'digits'?"
    """
    found = get_close_matches(name[:100], list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def nearest_path(path: Path) -> str:
    """The same for a file or folder, among those in its place."""
    try:
        beside = {entry.name: str(path.with_name(entry.name)) for entry in path.parent.iterdir()}
    except (OSError, ValueError):
        return ""
    found = get_close_matches(path.name[:100], beside, n=1)
    return f"; did you mean {beside[found[0]]!r}?" if found else ""
