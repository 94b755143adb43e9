"""What training carries from one step to the next."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ehap_jax._paths import path_name
from ehap_jax._random_key import random_key


class TrainState(NamedTuple):
    """Everything a step reads and writes; two equal states continue bit for bit alike.

    params: the pytree that is differentiated.
    model_state: the other collections of the variables by name, `{"batch_stats": ...}`, or any pytree a `forward`
        threads through: quantisation ranges, masks.
    opt_state: the optax state.
    step: int32 (), updates made so far.
    key: PRNG key of the run, never changed; shuffles and augmentations fold the epoch and the step into it.
    average: the moving average of the variables, or () where none is kept.
    """

    params: Any
    model_state: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    average: Any = ()

    @property
    def variables(self) -> dict[str, Any]:
        """`{"params": params, **model_state}`, as an `apply` takes them."""
        return {"params": self.params, **self.model_state}

    @property
    def averaged(self) -> dict[str, Any]:
        """The moving average of the variables where one is kept, else the variables."""
        return self.average or self.variables


def create_train_state(
    variables: Mapping[str, Any], optimizer: optax.GradientTransformation, key: jax.Array, *, average: bool = False
) -> TrainState:
    """The state before the first step, from variables `{"params": ..., **model_state}`.

    Args:
        variables: to start from.
        optimizer: the one `make_epoch` gets.
        key: of shuffles and augmentation.
        average: keep a moving average of the variables, too.

    Raises:
        KeyError: there is no "params" collection.
        TypeError: `key` is no random key.
        ValueError: a weight is not finite; the message names its path.
    """
    key = random_key(key)
    if "params" not in variables:
        raise KeyError(f"variables have no 'params' collection, only {sorted(variables)}")
    check_finite(variables, "cannot train")
    model_state = {name: value for name, value in variables.items() if name != "params"}
    params = variables["params"]
    start = jax.tree.map(jnp.asarray, dict(variables)) if average else ()
    return TrainState(params, model_state, optimizer.init(params), jnp.zeros((), jnp.int32), key, start)


def check_finite(tree: Any, problem: str) -> None:
    """Raise unless every floating-point leaf of `tree` is finite.

    Args:
        tree: any pytree of arrays.
        problem: what fails, to begin the message with, such as "cannot train".

    Raises:
        ValueError: naming the path and the number of non-finite elements of the first five leaves at fault.
    """
    named = [
        (path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
    ]
    counts = jax.device_get(_count_non_finite([leaf for _, leaf in named]))
    bad = [f"{name} ({int(count)} of {leaf.size})" for (name, leaf), count in zip(named, counts, strict=True) if count]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"{problem}: NaN or infinity in {', '.join(bad[:5])}{more}")


@jax.jit
def _count_non_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(~jnp.isfinite(leaf)) for leaf in leaves]
