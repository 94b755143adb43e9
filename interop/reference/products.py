"""Four ways to compute `v_c · (H v)_c` per output channel in PyTorch, for comparing what a probe costs.

Each function prepares once and returns `step(probe) -> {parameter name: (channels,) in float32}`, H being the Hessian
of the mean cross-entropy in eval mode and the probe one tensor per kernel (`interop.reference.trace`):

- `published_products`: the gradient's graph is retained and differentiated again for every probe; Hv is copied to the
  host, and every channel's dot product is read with `.item()` (what EHAP's released code does, arXiv 2306.07030);
- `vectorised_products`: the same, but the sums stay on the device, one per kernel;
- `affine_products`: that with BatchNorm in eval mode written as the multiplication and addition that it is;
- `functional_products`: `torch.func.jvp` of `torch.func.grad`, forward over reverse, through `torch.compile` if asked.

With `half`, a 16-bit dtype, `functional_products` casts the network, as autocast does not work under `torch.func`; the
others run the forward pass under autocast. The loss is multiplied by `SCALE`, which is divided out in float32. EHAP's
code divides its scale by 2⁸ before every probe and ends in subnormal numbers; here it stays: all probes cost the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from interop.reference.trace import Probe, check_probe, eval_mode, gradients_of, kernels

Step = Callable[[Probe], dict[str, torch.Tensor]]

SCALE = 2.0**8
"""Of the loss in 16 bits."""


def published_products(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, half: torch.dtype | None = None
) -> Step:
    """Double backward over a retained graph; Hv copied to the host and one `.item()` per channel.

    Args:
        model: the network; put into eval mode while its gradient is taken.
        images: (N, C, H, W), normalised; labels: (N,) class numbers.
        half: torch.float16 or torch.bfloat16; None computes in the model's dtype.

    Raises:
        ValueError: (from the step) a probe that does not fit the kernels.
    """
    second = _second_backward(model, images, labels, half)

    def step(probe: Probe) -> dict[str, torch.Tensor]:
        found = {}
        for name, product in second(probe).items():
            rows, directions = product.detach().cpu().float(), probe[name].cpu().float()
            sums = [rows[c].flatten().dot(directions[c].flatten()).item() for c in range(len(rows))]
            found[name] = torch.tensor(sums)
        return found

    return step


def vectorised_products(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, half: torch.dtype | None = None
) -> Step:
    """As `published_products`, with one sum per kernel on the device."""
    second = _second_backward(model, images, labels, half)
    return lambda probe: _channel_sums(second(probe), probe)


def affine_products(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, half: torch.dtype | None = None
) -> Step:
    """As `vectorised_products`, with every BatchNorm as the multiplication and addition that it is in eval mode."""
    return vectorised_products(_without_norms(model), images, labels, half=half)


def functional_products(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    half: torch.dtype | None = None,
    compiled: bool = False,
) -> Step:
    """`torch.func.jvp` of `torch.func.grad`; with `compiled`, the whole step through `torch.compile`.

    BatchNorm in eval mode is written as the multiplication and addition that it is: `torch.compile` fails on its
    forward derivative (PyTorch 2.13), and without it that derivative takes most of the time.

    Args and raises as `published_products`; what `torch.compile` raises comes from the first step.
    """
    network, dtype = _without_norms(model), half or images.dtype
    network = network.to(dtype)
    params = kernels(network)
    point = {name: p.detach() for name, p in params.items()}
    tensors = [*network.named_parameters(), *network.named_buffers()]
    fixed = {name: value.detach() for name, value in tensors if name not in point}
    inputs, scale = images.to(dtype), 1.0 if half is None else SCALE

    def loss(kernel: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits = torch.func.functional_call(network, {**fixed, **kernel}, inputs)
        return F.cross_entropy(logits.float() if half else logits, labels) * scale

    def products(probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        Hv = torch.func.jvp(torch.func.grad(loss), (point,), (probe,))[1]
        return {name: value / scale for name, value in _channel_sums(Hv, probe).items()}

    run = torch.compile(products) if compiled else products

    def step(probe: Probe) -> dict[str, torch.Tensor]:
        check_probe(probe, params)
        return run({name: probe[name].to(dtype) for name in params})

    return step


class _Affine(nn.Module):
    """BatchNorm with its running statistics, as one multiplication and one addition in the dtype of what it reads."""

    factor: torch.Tensor
    shift: torch.Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_var is not None and norm.running_mean is not None
        factor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias.detach() - norm.running_mean * factor
        self.register_buffer("factor", factor[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor.to(x.dtype) + self.shift.to(x.dtype)


def _without_norms(model: nn.Module) -> nn.Module:
    """A copy in eval mode with every BatchNorm as an `_Affine`."""
    network = copy.deepcopy(model).eval()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, _Affine(module))
    return network


def _second_backward(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, half: torch.dtype | None
) -> Callable[[Probe], dict[str, torch.Tensor]]:
    """`probe -> Hv` by kernel; the graph of the gradient lives as long as what is returned."""
    params, scale = kernels(model), 1.0 if half is None else SCALE
    with eval_mode(model):
        factor = torch.tensor(scale, device=images.device)
        gradients = gradients_of(model, images, labels, params, autocast=half, scale=factor)

    def second(probe: Probe) -> dict[str, torch.Tensor]:
        check_probe(probe, params)
        vectors = [probe[name] * scale for name in params]
        found = torch.autograd.grad(gradients, list(params.values()), vectors, retain_graph=True)
        return {name: value / scale for name, value in zip(params, found, strict=True)}

    return second


def _channel_sums(Hv: Mapping[str, torch.Tensor], probe: Probe) -> dict[str, torch.Tensor]:
    return {name: (value.float() * probe[name].float()).flatten(1).sum(dim=1) for name, value in Hv.items()}
