"""Small networks of every kind, and the traces of their dense float64 Hessians."""

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.curvature import Policy
from ehap_jax.curvature.problem import path_name

DOUBLE = Policy("float64")


def conv(x, w, stride=1, padding="SAME", groups=1, dilation=1, lhs_dilation=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        padding,
        lhs_dilation=(lhs_dilation, lhs_dilation),
        rhs_dilation=(dilation, dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def norm(p, x):
    return x * p["scale"].reshape((1,) * (x.ndim - 1) + (-1,)) + p["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def plain(p, x):
    h = jax.nn.relu(norm(p["n1"], conv(x, p["w1"])))
    h = jax.nn.relu(conv(h, p["w2"], stride=2, padding=((1, 0), (0, 2))))
    h = jax.nn.relu(conv(h, p["w3"], dilation=2))
    return h.mean((1, 2)) @ p["out"] + p["b"][None]


def residual_a(p, x):
    h = jax.nn.relu(conv(x, p["w1"]))
    y = conv(jax.nn.relu(conv(h, p["w2"], stride=2)), p["w3"])
    y = jax.nn.relu(y + jnp.pad(h[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1))))
    return y.mean((1, 2)) @ p["out"]


def residual_b(p, x):
    h = jax.nn.relu(conv(x, p["w1"]))
    y = conv(jax.nn.relu(conv(h, p["w2"], stride=2)), p["w3"])
    y = jax.nn.relu(norm(p["n3"], y) + conv(h, p["short"], stride=2))
    return y.mean((1, 2)) @ p["out"]


def preactivation(p, x):
    h = conv(x, p["w1"])
    for i in (2, 3):
        h = h + conv(jax.nn.relu(norm(p["n1"], h)), p[f"w{i}"])
    return jax.nn.relu(h).mean((1, 2)) @ p["out"]


def max_pool(p, x):
    h = jax.nn.relu(conv(x, p["w1"], padding="VALID"))
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = jax.nn.leaky_relu(h.reshape(x.shape[0], -1) @ p["fc"])
    return jnp.clip(h, -1, 1) @ p["out"]


def depthwise(p, x):
    h = jax.nn.relu6(conv(x, p["w1"]))
    h = jax.nn.relu(conv(h, p["depth"], groups=4))
    h = jax.nn.relu(conv(h, p["grouped"], groups=2))
    return h.mean((1, 2)) @ p["out"]


def concat(p, x):
    h = jax.nn.relu(conv(x, p["w1"]))
    h = jnp.concatenate([h, jax.nn.relu(conv(h, p["w2"]))], axis=-1)
    h = jnp.concatenate([h, conv(h, p["w3"])], axis=-1)
    return h.mean((1, 2)) @ p["out"]


def shared(p, x):
    """One kernel on two parallel branches, plainly on one and transposed on the other."""
    h = conv(x, p["w1"])
    a = jax.nn.relu(conv(h, p["w2"]))
    b = jnp.abs(conv(-2 * h, p["w2"], stride=1, dilation=2))
    flipped = jnp.abs(conv(h, jnp.transpose(p["w2"], (0, 1, 3, 2)) * p["scale"][None, None, None]))
    return (a - b + flipped).mean((1, 2)) @ p["out"]


def tokens(p, x):
    """Dense layers on leading axes, a kernel read from the right, several output axes, an embedding."""
    t = x.reshape(x.shape[0], 25, 2)
    h = jax.nn.relu(jnp.einsum("btc,chd->bthd", t, p["heads"]) + p["place"][None, :, None])
    h = jax.nn.relu(jnp.einsum("of,btf->bto", p["left"], h.reshape(*h.shape[:2], -1)))
    h = jnp.maximum(jnp.einsum("btf,tfo->bto", h, p["own"]), 0)
    return h.mean(1) @ p["out"] * p["gain"][0, None]


def upsampled(p, x):
    """An input dilation, a checkpointed part and another layout."""

    def inside(w, h):
        return jax.nn.relu(conv(h, w, lhs_dilation=2, padding=((1, 1), (2, 0))))

    h = jax.checkpoint(inside)(p["w1"], x)
    h = jax.lax.conv_general_dilated(
        jnp.transpose(h, (0, 3, 1, 2)), p["w2"], (2, 1), "SAME", dimension_numbers=("NCHW", "IOHW", "NCHW")
    )
    return jax.nn.relu(h).mean((2, 3)) @ p["out"]


NETWORKS = {
    "plain": (plain, dict(w1=(3, 3, 2, 3), n1=3, w2=(3, 3, 3, 3), w3=(2, 2, 3, 2), out=(2, 4), b=4), {}),
    "residual A": (residual_a, dict(w1=(3, 3, 2, 2), w2=(3, 3, 2, 4), w3=(3, 3, 4, 4), out=(4, 3)), {}),
    "residual B": (
        residual_b,
        dict(w1=(3, 3, 2, 2), w2=(3, 3, 2, 3), w3=(3, 3, 3, 3), n3=3, short=(1, 1, 2, 3), out=(3, 3)),
        {},
    ),
    "pre-activation": (
        preactivation,
        dict(w1=(3, 3, 2, 3), n1=3, w2=(3, 3, 3, 3), w3=(3, 3, 3, 3), out=(3, 3)),
        {},
    ),
    "max-pool": (max_pool, dict(w1=(2, 2, 2, 3), fc=(12, 5), out=(5, 3)), {}),
    "depthwise": (
        depthwise,
        dict(w1=(1, 1, 2, 4), depth=(3, 3, 1, 4), grouped=(2, 2, 2, 6), out=(6, 3)),
        {},
    ),
    "concat": (concat, dict(w1=(3, 3, 2, 2), w2=(3, 3, 2, 2), w3=(1, 1, 4, 3), out=(7, 3)), {}),
    "shared": (shared, dict(w1=(3, 3, 2, 3), w2=(3, 3, 3, 3), scale=3, out=(3, 3)), {}),
    "tokens": (
        tokens,
        dict(heads=(2, 2, 3), place=(25, 3), left=(4, 6), own=(25, 4, 3), out=(3, 4), gain=(1, 4)),
        {"left": 0},
    ),
    "upsampled": (upsampled, dict(w1=(3, 3, 2, 3), w2=(3, 4, 2, 2), out=(4, 3)), {"w2": 1}),
}


def make(name, double=True):
    """The network, its parameters and a batch of 5 images with labels, in float64."""
    model, shapes, axes = NETWORKS[name]
    rng = np.random.default_rng(sorted(NETWORKS).index(name))
    dtype = jnp.float64 if double else jnp.float32

    def leaf(shape):
        if isinstance(shape, int):
            return {
                "scale": jnp.asarray(1 + rng.normal(size=shape) / 5, dtype),
                "bias": jnp.asarray(rng.normal(size=shape) / 5, dtype),
            }
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])) * 1.5, dtype)

    params = {path: leaf(shape) for path, shape in shapes.items()}
    for path in ("scale", "b"):
        if path in params:
            params[path] = params[path]["scale"]
    x = jnp.asarray(rng.normal(size=(5, 5, 5, 2)), dtype)
    return model, params, x, axes


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def dense_traces(model, params, x, labels, loss, axes):
    """Traces of the diagonal blocks of the dense Hessian of the mean loss, by path and output channel."""
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    kernels = {path: leaf for path, leaf in named if leaf.ndim >= 2}
    ends = np.cumsum([leaf.size for leaf in kernels.values()])[:-1].tolist()

    def of_vector(vector):
        parts = zip(kernels.items(), jnp.split(vector, ends), strict=True)
        new = {path: part.reshape(leaf.shape) for (path, leaf), part in parts}
        leaves = [new.get(path, leaf) for path, leaf in named]
        return jax.vmap(loss)(model(jax.tree.unflatten(jax.tree.structure(params), leaves), x), labels).mean()

    vector = jnp.concatenate([leaf.ravel() for leaf in kernels.values()])
    H = jax.jit(jax.hessian(of_vector))(vector)
    found = {}
    for (path, leaf), diagonal in zip(kernels.items(), np.split(np.diag(H), ends), strict=True):
        axis = axes.get(path, -1) % leaf.ndim
        found[path] = diagonal.reshape(leaf.shape).sum(tuple(a for a in range(leaf.ndim) if a != axis))
    return found


def close(trace, truth, rtol=1e-10):
    for path, expected in truth.items():
        scale = np.abs(expected).max() or 1.0
        np.testing.assert_allclose(np.asarray(trace.mean[path]), expected, rtol=rtol, atol=rtol * scale, err_msg=path)


def small(p, x):
    """Two dense layers: quick to compile."""
    return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["out"]


def smooth(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["out"]
