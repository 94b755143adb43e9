"""Orbax checkpoints that resume bit for bit."""

import errno
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")

_BYTES_PER_LEAF = 2048
"""What Orbax writes beside the numbers."""


class Checkpoints:
    """The newest states of one training run in a directory, each written under a temporary name and then renamed.

    A kill at any moment leaves either the earlier checkpoint or the later one, never half of one. PRNG keys are
    stored as their data and come back as keys. Any pytree of arrays can be stored, not only a `TrainState`.

    Args:
        directory: made on first use; holds one subdirectory per step.
        keep: how many of the newest checkpoints to keep.

    Example:
        >>> import tempfile
        >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
        ...     checkpoints.save(3, {"w": jnp.ones(2)})
        ...     checkpoints.restore({"w": jnp.zeros(2)})["w"].tolist()
        [1.0, 1.0]
    """

    def __init__(self, directory: str | Path, *, keep: int = 1) -> None:
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = Path(directory).absolute()
        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release what Orbax holds; nothing is lost without it."""
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Write `state` as checkpoint number `step`, on disk when this returns.

        Raises:
            ValueError: that step is already there, or is older than the newest.
            OSError: there is no space left for it; nothing was written.
        """
        newest = self.latest()
        if newest is not None and step <= newest:
            raise ValueError(f"{self.directory} already has checkpoint {newest}; cannot save {step} after it")
        plain = _without_keys(state)
        _check_space(self.directory, plain)
        self._manager.save(step, args=self._ocp.args.StandardSave(plain), force=True)
        self._manager.wait_until_finished()

    def restore(self, like: State, step: int | None = None) -> State:
        """The state stored at `step` (default: the newest), of the structure, shapes and dtypes of `like`.

        Args:
            like: a state of the same structure, of arrays or `jax.ShapeDtypeStruct`; keys must be real keys.
            step: which checkpoint.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the stored tree has other paths, shapes or dtypes; the message names the first that differ.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(f"no checkpoint{'' if step is None else f' {step}'} in {self.directory}")
        wanted = _without_keys(like)
        self._check(self._manager.item_metadata(step).tree, wanted, step)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", here)), wanted
        )
        restored = self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))
        return jax.tree.map(_with_key, like, restored)

    def _check(self, stored: Any, wanted: Any, step: int) -> None:
        there, here = _signature(stored), _signature(wanted)
        if there != here:
            differing = [path for path in sorted(there.keys() | here.keys()) if there.get(path) != here.get(path)]
            lines = [f"{path}: stored {there.get(path)}, expected {here.get(path)}" for path in differing[:3]]
            raise ValueError(
                f"checkpoint {step} in {self.directory} does not fit ({len(differing)} leaves): " + "; ".join(lines)
            )


def _check_space(directory: Path, state: Any) -> None:
    """Raise where the disk is too full: Orbax fails in many threads at once, each with a traceback of its own."""
    leaves = jax.tree.leaves(state)
    needed = sum(leaf.nbytes for leaf in leaves) + _BYTES_PER_LEAF * (len(leaves) + 16)
    free = shutil.disk_usage(directory).free
    if free < needed:
        text = f"{os.strerror(errno.ENOSPC)}: a checkpoint takes about {needed:,} bytes, there are {free:,}"
        raise OSError(errno.ENOSPC, text, str(directory))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _with_key(like: Any, leaf: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like)) if _is_key(like) else leaf


def _signature(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), jnp.dtype(leaf.dtype).name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
