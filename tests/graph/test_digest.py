"""Two functions have one digest where they compute the same, derivatives included, and only there."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import program_digest

X = jnp.ones((2, 2))
STEPS = np.arange(2, dtype=np.int32)


def functions(scale):
    """The same functions for every ``scale``, but for the value of an array that each closes over, or a number."""
    c = jnp.full((2, 2), scale, jnp.float32)

    @jax.custom_jvp
    def forward_rule(x):
        return x * 2

    forward_rule.defjvp(lambda primals, tangents: (primals[0] * 2, tangents[0] * c))

    @jax.custom_jvp
    def rule_of_itself(x):
        return x * 2

    rule_of_itself.defjvp(
        lambda primals, tangents: (rule_of_itself(primals[0]), tangents[0] * forward_rule(primals[0]))
    )

    @jax.custom_vjp
    def forward_pass(x):
        return x * 2

    forward_pass.defvjp(lambda x: (x * 2, c), lambda kept, ct: (ct * kept,))

    @jax.custom_vjp
    def backward_pass(x, steps):
        return x * 2

    backward_pass.defvjp(lambda x, steps: (x * 2, None), lambda kept, ct: (ct * c, None))

    return {
        "closure": lambda x: x * c,
        "jit": jax.jit(lambda x: x * c),
        "jit in jit": jax.jit(lambda x: jax.jit(lambda x: x * c)(x)),
        "number in jit": jax.jit(lambda x: x * jnp.float32(scale)),
        "custom_jvp": forward_rule,
        "second derivative": rule_of_itself,
        "custom_vjp, forward": forward_pass,
        "custom_vjp, backward": lambda x: backward_pass(x, STEPS),
        "vmap": lambda x: jax.vmap(forward_rule)(x[None]),
        "scan": lambda x: jax.lax.scan(jax.jit(lambda x, _: (x * c, None)), x, length=3)[0],
        "cond": lambda x: jax.lax.cond(x.sum() > 0, jax.jit(lambda x: x * c), lambda x: x, x),
        "while": lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, jax.jit(lambda x: x + c), x),
        "checkpoint": jax.checkpoint(lambda x: x * c, policy=jax.checkpoint_policies.dots_saveable),
    }


ALL = tuple(functions(1.0))


def digest(name, scale=1.0):
    return program_digest(functions(scale)[name], X, derivatives=2)


@pytest.mark.parametrize("name", ALL)
def test_what_is_closed_over_counts_and_names_do_not(name):
    assert digest(name) == digest(name) != digest(name, 5.0)


def test_how_a_function_is_wrapped_does_not_count():
    assert digest("closure") == digest("jit") == digest("jit in jit")


def test_rules_count_where_the_function_is_differentiated():
    for name, derivatives in (("custom_jvp", 1), ("second derivative", 2)):
        one, other = (functions(scale)[name] for scale in (1.0, 5.0))
        for order in range(3):
            same = program_digest(one, X, derivatives=order) == program_digest(other, X, derivatives=order)
            assert same == (order < derivatives)


@pytest.mark.slow
def test_digests_are_the_same_in_another_process():
    program = "from tests.graph.test_digest import ALL, digest; print([digest(name) for name in ALL])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.strip() == str([digest(name) for name in ALL])


def test_functions_of_the_host_are_refused():
    def call(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(ValueError, match=r"pure_callback at .*test_digest.py.* runs a Python function"):
        program_digest(jax.jit(call), X)
