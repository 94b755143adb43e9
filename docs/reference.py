"""Write the pages of the API reference: one per room, with every public name in it, from where it is defined.

python docs/reference.py FOLDER
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOMS = ("graph", "curvature", "pruning", "quant", "models", "data", "training", "report")


def public_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Those of ``__all__``, or else what the module imports from its own package."""
    own = [
        n for n, x in vars(module).items() if n[0] != "_" and getattr(x, "__module__", "").startswith(module.__name__)
    ]
    for name in sorted(getattr(module, "__all__", own), key=str.lower):
        yield name, getattr(module, name)


def defined_at(module: ModuleType, name: str, value: Any) -> str:
    """The dotted path to the definition: a submodule may have the name of what it defines.

    Raises:
        LookupError: no source file of the package assigns the name.
    """
    written = inspect.unwrap(value)
    if inspect.isfunction(written) or inspect.isclass(written):
        return f"{written.__module__}.{written.__qualname__}"
    for found, candidate in sorted(sys.modules.items()):
        holds = found.startswith(f"{module.__name__}.") and vars(candidate).get(name) is value
        if holds and f"\n{name}" in inspect.getsource(candidate):
            return f"{found}.{name}"
    raise LookupError(f"where is {module.__name__}.{name} defined?")


def page(module: ModuleType) -> str:
    """Markdown for mkdocstrings.

    Raises:
        ValueError: a public function or class has no docstring.
    """
    lines = [f"# {module.__name__}", "", inspect.cleandoc(module.__doc__ or ""), ""]
    for name, value in public_names(module):
        if callable(value) and not inspect.getdoc(value):
            raise ValueError(f"{module.__name__}.{name} has no docstring")
        lines += [f"::: {defined_at(module, name, value)}", ""]
    return "\n".join(lines)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"ehap_jax.{room}" for room in ROOMS), "interop"):
        module = importlib.import_module(name)
        (folder / f"{name.rpartition('.')[2]}.md").write_text(page(module), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
