"""The Hessian trace per channel in PyTorch: as EHAP's released code computes it, and as its paper means it.

Both estimate `Tr(H_cc)` for every output channel c of every convolution and dense kernel, H the Hessian of the mean
cross-entropy in eval mode, by Hutchinson's `mean_i v_i,c · (H v_i)_c` with Rademacher v_i over all kernels at once
(HAP, arXiv 2101.08940, eq. 8; EHAP, arXiv 2306.07030, section 3).

`published_trace` reproduces what the released mixed-precision code does. It lowers the gradient scaler by 2⁸ before
each probe and never divides the scale out of Hv, so probe i (from 1) carries the weight 2^(16 - 8i) where all should
carry the same: the first has 99.6 % of the sum, and from the 21st on the scale itself is 0 in float32. Its data loop
keeps the last batch of the loader: of 50,000 images in batches of 512, that is one of 336.

`fixed_trace` gives every probe the same weight, on the batch it is given, and stays on the device until the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise ImportError("interop.reference needs PyTorch: pip install 'ehap-jax[torch]'") from error

Probe = Mapping[str, torch.Tensor]
"""One value per weight: parameter name -> tensor of the parameter's shape."""

FIRST_SCALE = 2.0**16
"""PyTorch's initial gradient scale, before the first division by `DECAY`."""

DECAY = 2.0**8
"""What the released code divides the scale by before every probe."""


@dataclass(frozen=True)
class ReferenceTrace:
    """Per-probe products and their mean.

    Attributes:
        products: parameter name -> (probes, channels), `w_i · v_i,c · (H v_i)_c`, w_i the weight given to probe i.
        weights: w_i as a (probes,) tensor.
    """

    products: Mapping[str, torch.Tensor]
    weights: torch.Tensor

    @property
    def mean(self) -> dict[str, torch.Tensor]:
        """Parameter name -> (channels,), the estimate: the plain mean over probes, weights and all."""
        return {name: value.mean(dim=0) for name, value in self.products.items()}

    def sensitivity(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """HAP's score per channel: mean trace / weights in the channel · squared norm of the channel's weights."""
        weights = dict(model.named_parameters())
        scores = {}
        for name, trace in self.mean.items():
            rows = weights[name].detach().flatten(1)
            scores[name] = trace / rows.shape[1] * rows.square().sum(dim=1)
        return scores


def kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters EHAP probes: those of convolutions and dense layers with two axes or four."""
    return {name: p for name, p in model.named_parameters() if p.ndim in (2, 4)}


def rademacher_probes(model: nn.Module, num_probes: int, *, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Draw probes of ±1 over all kernels, one at a time, from a seeded CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_probes):
        yield {
            name: (torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p.device, p.dtype)
            for name, p in kernels(model).items()
        }


def last_batch(images: torch.Tensor, labels: torch.Tensor, batch_size: int = 512) -> Any:
    """The batch a loop that overwrites its variable is left with: the last, incomplete one.

    Example:
        >>> len(last_batch(torch.zeros(50_000, 1), torch.zeros(50_000))[1])
        336
    """
    start = (len(labels) - 1) // batch_size * batch_size
    return images[start:], labels[start:]


def fixed_trace(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    probes: Iterable[Probe],
    *,
    probes_per_step: int = 1,
) -> ReferenceTrace:
    """Hutchinson's estimate with equal weights.

    Args:
        model: the network; put into eval mode for the computation and back afterwards.
        images: (N, C, H, W), already normalised; labels: (N,) class numbers.
        probes: probes over `kernels(model)`, for example from `rademacher_probes`.
        probes_per_step: Hessian-vector products computed at once (a batched backward pass).

    Raises:
        ValueError: no probes, or a probe whose names or shapes are not those of the kernels.
        FloatingPointError: a product is not finite.
    """
    params = kernels(model)
    chunks: list[dict[str, torch.Tensor]] = []
    with eval_mode(model):
        gradients = gradients_of(model, images, labels, params)
        for group in _grouped(probes, probes_per_step):
            for probe in group:
                check_probe(probe, params)
            stacked = {name: torch.stack([probe[name] for probe in group]) for name in params}
            Hv = _products(gradients, params, stacked)
            chunks.append({name: (stacked[name] * Hv[name]).flatten(2).sum(dim=2) for name in params})
    if not chunks:
        raise ValueError("no probes were given")
    products = {name: torch.cat([chunk[name] for chunk in chunks]) for name in params}
    for name, value in products.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"v · Hv of {name} is not finite")
    return ReferenceTrace(products, torch.ones(len(products[next(iter(products))])))


def published_trace(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    probes: Iterable[Probe],
    *,
    autocast: bool = False,
) -> ReferenceTrace:
    """What EHAP's released mixed-precision code averages: probe i scaled by 2^(16 - 8i) and never unscaled.

    Args:
        model, images, labels, probes: as for `fixed_trace`.
        autocast: compute in float16 under autocast as the released code does (on a GPU); False keeps float32, where
            the only defect left is the decaying scale.

    Raises:
        ValueError: no probes, or a probe that does not fit the kernels.
    """
    params = kernels(model)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    scales: list[torch.Tensor] = []
    scale = torch.tensor(FIRST_SCALE, dtype=torch.float32, device=images.device)
    half = torch.float16 if autocast else None
    with eval_mode(model):
        gradients = gradients_of(model, images, labels, params, autocast=half, scale=scale)
        for probe in probes:
            check_probe(probe, params)
            scale = scale / DECAY
            scaled = [gradient * scale.to(gradient.dtype) for gradient in gradients]
            Hv = torch.autograd.grad(scaled, list(params.values()), [probe[name] for name in params], retain_graph=True)
            for name, product in zip(params, Hv, strict=True):
                rows[name].append((product * probe[name]).flatten(1).sum(dim=1))
            scales.append(scale)
    if not scales:
        raise ValueError("no probes were given")
    return ReferenceTrace({name: torch.stack(values) for name, values in rows.items()}, torch.stack(scales))


class eval_mode:
    """Eval mode inside, what it was before outside."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.before)


def gradients_of(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    params: Mapping[str, nn.Parameter],
    *,
    autocast: torch.dtype | None = None,
    scale: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The gradient in `params`, differentiable; the loss is multiplied by `scale` and the gradient divided by it."""
    with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
        loss = F.cross_entropy(model(images), labels)
    factor = torch.ones((), dtype=loss.dtype, device=loss.device) if scale is None else scale.to(loss.dtype)
    found = torch.autograd.grad(loss * factor, list(params.values()), create_graph=True)
    return [gradient / factor.to(gradient.dtype) for gradient in found]


def _products(
    gradients: list[torch.Tensor], params: Mapping[str, nn.Parameter], stacked: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    inputs, vectors = list(params.values()), [stacked[name] for name in params]
    if len(vectors[0]) == 1:
        found = torch.autograd.grad(gradients, inputs, [v[0] for v in vectors], retain_graph=True)
        return {name: value[None] for name, value in zip(params, found, strict=True)}
    found = torch.autograd.grad(gradients, inputs, vectors, retain_graph=True, is_grads_batched=True)
    return dict(zip(params, found, strict=True))


def _grouped(probes: Iterable[Probe], size: int) -> Iterator[list[Probe]]:
    group: list[Probe] = []
    for probe in probes:
        group.append(probe)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def check_probe(probe: Probe, params: Mapping[str, nn.Parameter]) -> None:
    """Raise a ValueError unless the probe has a tensor of the right shape for every kernel."""
    if probe.keys() != params.keys():
        odd = sorted(probe.keys() ^ params.keys())
        raise ValueError(f"the probe must have one tensor per kernel; {odd[0]!r} is in only one of them")
    for name, parameter in params.items():
        if probe[name].shape != parameter.shape:
            raise ValueError(
                f"probe of {name}: expected shape {tuple(parameter.shape)}, found {tuple(probe[name].shape)}"
            )
