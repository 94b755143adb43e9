"""The INT8 network as a PyTorch module that computes the very same integers as `IntegerNetwork`.

Sums of int8 · uint8 products are formed in float64, where every partial sum is an exact integer, on any device. All
that rounds afterwards is one float32 product or one fused multiply-add per value, as in `ehap_jax.quant` and in ONNX
Runtime, so the integers agree bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ehap_jax.quant import IntegerNetwork
from ehap_jax.quant import integer_arithmetic as arithmetic
from ehap_jax.quant.program import (
    AddStep,
    ClipStep,
    DequantizeStep,
    FloatLayerStep,
    FloatStep,
    IntegerGrid,
    Integers,
    LayerStep,
    MoveStep,
    PoolStep,
    QuantizeStep,
    RequantizeStep,
    ScaleStep,
    Step,
    Target,
)

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise ImportError("interop.torch_integer needs PyTorch: pip install 'ehap-jax[torch]'") from error

ZERO = IntegerGrid(1.0, 0, 0, 255)
"""The grid of the 0 that is added to bring integers to another grid."""

NHWC = (0, 3, 1, 2)
HWIO = (3, 2, 0, 1)
PLAIN_PRODUCT = (((1,), (0,)), ((), ()))


class IntegerLayer(nn.Module):
    """kernel: int8, (out, in, h, w), (out, in) or (channels,). bias: int32, (out,)."""

    kernel: torch.Tensor
    bias: torch.Tensor

    def __init__(self, kernel: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        axes = {4: HWIO, 2: (1, 0)}.get(kernel.ndim, tuple(range(kernel.ndim)))
        self.register_buffer("kernel", torch.from_numpy(np.array(kernel.transpose(axes), order="C")))
        self.register_buffer("bias", torch.from_numpy(np.array(bias)))


class IntegerModule(nn.Module):
    """An `IntegerNetwork` in PyTorch, for any batch size.

    Its state dict holds int8 kernels and int32 biases ("layers.layer0.kernel", …), and the float32 multipliers from a
    layer's sums to each tensor that is made of them ("multiplier0", …); `layer_numbers` and `multiplier_numbers` say
    which is which. The scales and zero points of the activations are fixed when it is made.

    Args:
        network: what `to_integer` returned.
        image_shape: (height, width, channels) of one image.

    Raises:
        NotImplementedError: an operation of the network, or a layer left in floating point, that has no counterpart
            here (the message names it and its source line).

    Example:
        >>> import jax, numpy as np
        >>> from ehap_jax.models import ResNet, eval_apply, init_variables
        >>> from ehap_jax.quant import fake_quant, to_integer
        >>> apply = eval_apply(model := ResNet(8, 10, widths=(2, 2, 4)))
        >>> variables = init_variables(model, jax.random.key(0), (8, 8, 3))
        >>> q, x = fake_quant(apply), np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("f4")
        >>> _, ranges = jax.jit(lambda v, r: q.apply(v, r, x, update=True))(variables, q.init(variables, x))
        >>> network = to_integer(q, variables, ranges, example=x)
        >>> module = IntegerModule(network, (8, 8, 3))
        >>> logits = module(torch.from_numpy(x).permute(0, 3, 1, 2))
        >>> bool((logits.numpy() == np.asarray(jax.jit(network)(x))).all())
        True
    """

    def __init__(self, network: IntegerNetwork, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        example = np.zeros((1, *image_shape), np.float32)
        program = network.structure.program(example)
        if len(program.inputs) != 1 or len(program.outputs) != 1 or not isinstance(program.outputs[0], str):
            raise NotImplementedError("only networks from one image tensor to one tensor of logits are converted")
        self.steps, self.input, self.output = program.steps, program.inputs[0], program.outputs[0]
        self.integers = program.integers
        self.layers = nn.ModuleDict()
        self.layer_numbers: dict[str, int] = {}
        self.multiplier_numbers: dict[str, int] = {}
        for step in self.steps:
            _check(step)
            if isinstance(step, LayerStep | ScaleStep):
                name, target = _layer_name(step), _target_name(step)
                if name not in self.layer_numbers:
                    weights, number = network.layers[name], len(self.layer_numbers)
                    self.layer_numbers[name] = number
                    self.layers[f"layer{number}"] = IntegerLayer(np.asarray(weights.kernel), np.asarray(weights.bias))
                number = self.multiplier_numbers[target] = len(self.multiplier_numbers)
                multiplier = np.array(network.multipliers[target])
                self.register_buffer(f"multiplier{number}", torch.from_numpy(multiplier))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes), float32, of normalised images (N, channels, height, width)."""
        return self._run(x)[self.output]

    def tensors(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every quantised activation by name, as int32 integers of its grid, channels last as in JAX."""
        found = self._run(x)
        return {name: found[out.name] for name, out in self.integers.items()}

    def _run(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = {self.input: x.permute(0, 2, 3, 1)}
        for step in self.steps:
            self._step(step, tensors)
        return tensors

    def _step(self, step: Step, tensors: dict[str, torch.Tensor]) -> None:
        match step:
            case QuantizeStep(source, target):
                scale = torch.tensor(np.float32(target.out.grid.scale), device=tensors[source].device)
                tensors[target.out.name] = _round_to(tensors[source].float() / scale, target)
            case DequantizeStep(source, out):
                tensors[out] = (tensors[source.name] - source.grid.zero).float() * _float32(source.grid.scale)
            case ClipStep(source, target):
                tensors[target.out.name] = tensors[source.name].clamp(target.low, target.high)
            case RequantizeStep(source, target):
                q = tensors[source.name]
                tensors[target.out.name] = _add(q, source.grid, torch.zeros_like(q), ZERO, target)
            case LayerStep(site, source, target):
                total = _accumulate(step, self._layer(step).kernel, tensors[source.name] - source.grid.zero)
                self._finish(step, total, site.out_axis, tensors)
            case ScaleStep(scale, _, source, target):
                kernel = self._layer(step).kernel
                x = (tensors[source.name] - source.grid.zero).double()
                total = x * _along(kernel.double(), scale.axis, x.ndim)
                self._finish(step, total.reshape(-1, *target.out.shape[1:]), scale.axis, tensors)
            case AddStep(a, b, subtract, target):
                second, grid = tensors[b.name], b.grid
                if subtract:
                    limits = np.iinfo(grid.dtype)
                    second, grid = int(limits.min) + int(limits.max) - second, arithmetic.negated(grid)
                tensors[target.out.name] = _add(tensors[a.name], a.grid, second, grid, target)
            case PoolStep(pool, source, target):
                total = (tensors[source.name] - source.grid.zero).long().sum(dim=tuple(pool.reduce.params["axes"]))
                multiplier = arithmetic.pool_multiplier(source.grid, target.out.grid, pool.count)
                steps = total.float() * _float32(multiplier)
                tensors[target.out.name] = _round_to(steps, target).reshape(-1, *target.out.shape[1:])
            case MoveStep(_, _, out):
                tensors[out.name] = _move(step, tensors)

    def _layer(self, step: LayerStep | ScaleStep) -> IntegerLayer:
        layer = self.layers[f"layer{self.layer_numbers[_layer_name(step)]}"]
        assert isinstance(layer, IntegerLayer)
        return layer

    def _finish(
        self, step: LayerStep | ScaleStep, total: torch.Tensor, axis: int | None, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Bias, and the scale of the result."""
        target = step.target
        multiplier = self.get_buffer(f"multiplier{self.multiplier_numbers[_target_name(step)]}")
        total = (total + _along(self._layer(step).bias.double(), axis, total.ndim)).float()
        steps = total * _along(multiplier, axis, total.ndim)
        tensors[_target_name(step)] = steps if isinstance(target, str) else _round_to(steps, target)


def _layer_name(step: LayerStep | ScaleStep) -> str:
    return step.site.name if isinstance(step, LayerStep) else step.name


def _target_name(step: LayerStep | ScaleStep) -> str:
    return step.target if isinstance(step.target, str) else step.target.out.name


def _float32(value: Any) -> float:
    """A Python number with the value of a float32: PyTorch multiplies float32 tensors by it in float32."""
    return float(np.float32(value))


def _along(vector: torch.Tensor, axis: int | None, rank: int) -> torch.Tensor:
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])


def _round_to(steps: torch.Tensor, target: Target) -> torch.Tensor:
    zero = target.out.grid.zero
    return steps.round().clamp(target.low - zero, target.high - zero).int() + zero


def _add(a: torch.Tensor, a_grid: IntegerGrid, b: torch.Tensor, b_grid: IntegerGrid, target: Target) -> torch.Tensor:
    """rint(fma(a, a_ratio, fma(b, b_ratio, fixed))): what float64 holds exactly is rounded to float32 once."""
    numbers = arithmetic.add_numbers(a_grid, b_grid, target.out.grid)
    inner = (b.double() * float(numbers.b_ratio) + float(numbers.fixed)).float()
    steps = (a.double() * float(numbers.a_ratio) + inner.double()).float()
    return steps.round().clamp(target.low, target.high).int()


def _accumulate(step: LayerStep, kernel: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    """Σ (x_q − zero) · w_q, exact."""
    x, params = centred.double(), step.site.node.params
    if step.site.node.name == "dot_general":
        return x @ kernel.double().T
    (top, bottom), (left, right) = params["padding"]
    x = F.pad(x.permute(0, 3, 1, 2), (int(left), int(right), int(top), int(bottom)))
    y = F.conv2d(
        x,
        kernel.double(),
        stride=params["window_strides"],
        dilation=params["rhs_dilation"],
        groups=params["feature_group_count"],
    )
    return y.permute(0, 2, 3, 1)


def _move(step: MoveStep, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A rearrangement of integers; the batch is the first axis."""
    source, params, grid = step.operands[0], step.node.params, step.out.grid
    assert isinstance(source, Integers)
    x = tensors[source.name]
    match step.node.name:
        case "slice":
            strides = params["strides"] or (1,) * x.ndim
            bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
            return x[(slice(None), *[slice(*each) for each in list(bounds)[1:]])]
        case "pad":
            widths = [int(n) for low, high, _ in reversed(params["padding_config"]) for n in (low, high)]
            return F.pad(x, widths, value=int(np.asarray(step.operands[1])))
        case "reshape":
            return x.reshape(-1, *step.out.shape[1:])
        case "gather":
            (axis,) = params["dimension_numbers"].start_index_map
            indices = torch.from_numpy(np.array(step.operands[1])[..., 0]).long().to(x.device)
            inside = (indices >= 0) & (indices < x.shape[axis])
            found = x.index_select(axis, indices.clamp(0, x.shape[axis] - 1))
            return torch.where(_along(inside, axis, x.ndim), found, torch.full_like(found, grid.zero))
        case _:  # reduce_window_max
            window, strides = params["window_dimensions"][1:3], params["window_strides"][1:3]
            return F.max_pool2d(x.permute(0, 3, 1, 2).double(), window, strides).permute(0, 2, 3, 1).int()


def _check(step: Step) -> None:
    """Raise NotImplementedError for what the functions above do not compute."""
    match step:
        case LayerStep(site, _, _):
            params = site.node.params
            moved = any(tail.vector is None and tail.node.name != "convert_element_type" for tail in site.tail)
            if site.node.name == "dot_general":
                usual = params["dimension_numbers"] == PLAIN_PRODUCT and site.kernel_operand == 1
            else:
                numbers = params["dimension_numbers"]
                specs = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
                usual = specs == (NHWC, HWIO, NHWC) and set(params["lhs_dilation"]) == {1}
                usual = usual and params["batch_group_count"] == 1
            if moved or not usual:
                raise NotImplementedError(f"{site.name} at {site.node.source}: only plain NHWC convolutions and x @ w")
        case PoolStep(pool, _, _) if pool.reduce.name != "reduce_sum" or 0 in pool.reduce.params["axes"]:
            raise NotImplementedError(f"a mean over windows at {pool.reduce.source} has no counterpart here")
        case AddStep(a, b, _, target):
            _check_exact(a.grid, b.grid, target)
        case RequantizeStep(source, target):
            _check_exact(source.grid, ZERO, target)
        case MoveStep():
            _check_move(step)
        case QuantizeStep() | DequantizeStep() | ClipStep() | ScaleStep() | PoolStep():
            pass
        case FloatLayerStep(site, _, _):
            raise NotImplementedError(f"{site.name}, left in floating point, has no counterpart in the PyTorch module")
        case FloatStep(node, _, _):
            raise NotImplementedError(f"{node.name} at {node.source} has no counterpart in the PyTorch module")


def _check_move(step: MoveStep) -> None:
    params = step.node.params
    known = {
        "slice": lambda: params["start_indices"][0] == 0 and (params["strides"] or (1,))[0] == 1,
        "pad": lambda: (
            tuple(map(int, params["padding_config"][0])) == (0, 0, 0)
            and all(int(inside) == 0 for _, _, inside in params["padding_config"])
        ),
        "reshape": lambda: True,
        "gather": lambda: (
            len(params["dimension_numbers"].start_index_map) == 1
            and params["dimension_numbers"].start_index_map == params["dimension_numbers"].collapsed_slice_dims
            and params["fill_value"] == 0
        ),
        "reduce_window_max": lambda: (
            len(params["window_dimensions"]) == 4
            and not np.any(params["padding"])
            and (params["window_dimensions"][0], params["window_dimensions"][3]) == (1, 1)
            and {*params["base_dilation"], *params["window_dilation"]} == {1}
        ),
    }
    batch_stays = step.out.shape[0] == 1 == step.operands[0].shape[0]
    if step.node.name not in known or not batch_stays or not known[step.node.name]():
        raise NotImplementedError(f"this {step.node.name} at {step.node.source} has no counterpart here")


def _check_exact(a: IntegerGrid, b: IntegerGrid, target: Target) -> None:
    """Whether float64 holds q · ratio + addend exactly: 53 bits from the largest to the last of the smallest."""
    numbers = [float(n) for n in arithmetic.add_numbers(a, b, target.out.grid)]
    last = min(np.frexp(n)[1] - 24 for n in numbers if n)
    largest = sum(abs(n) * size for n, size in zip(numbers, (a.high, b.high, 1), strict=True))
    if np.frexp(largest)[1] - last > 53:
        raise NotImplementedError(f"the scales of the sum {target.out.name} lie too far apart: ratios {numbers[:2]}")
