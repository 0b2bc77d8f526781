"""Steps of training, relative to each tensor's root mean square: Adam's for all, or Muon's for the blocks of A and B."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Literal

import torch
from torch import Tensor, nn

_BETAS = (0.9, 0.95)
#: Losses and so gradients are tiny where activations are; Adam's usual 1e-8 would damp its steps there.
_EPSILON = 1e-15
#: Of Muon: momentum, the quintic whose iterates bring singular values near 1, how often it is applied, and the root mean
#: square of an update before the rate (Adam's are 1 at most), so that one rate serves both.
_MOMENTUM, _QUINTIC, _ITERATIONS, _UPDATE = 0.95, (3.4445, -4.7750, 2.0315), 5, 0.5
#: Values in one sum: few enough that torch does not split it over threads, on whose number its bits would then depend.
_SUMMED_AT_ONCE = 1 << 14


class Optimizer:
    """Steps along the gradients of `parameters`, each in units of the root mean square that the tensor has at first.

    `muon` (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) for blocks `(K, b, b)`: the momentum
    of each block's gradient, with its singular values made 1, so that no direction of a block waits for the others. Everything
    else takes Adam's steps (arXiv 1412.6980).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], name: Literal["adam", "muon"]) -> None:
        scaled = [(p, root_mean_square(p.detach())) for p in parameters]
        by_muon = [p.dim() == 3 and name == "muon" for p in parameters]
        self._blocks = [(*pair, torch.zeros_like(pair[0])) for pair, muon in zip(scaled, by_muon, strict=True) if muon]
        groups = [{"params": [p], "scale": s} for (p, s), muon in zip(scaled, by_muon, strict=True) if not muon]
        self._adam = torch.optim.Adam(groups, lr=0.0, betas=_BETAS, eps=_EPSILON, fused=True) if groups else None

    @property
    def state(self) -> dict[str, Tensor]:
        """All moments, by name; empty before the first step but for Muon's."""
        moments = {} if self._adam is None else self._adam.state_dict()["state"]
        found = {f"adam/{place}/{name}": value for place, parts in moments.items() for name, value in parts.items()}
        return found | {f"muon/{place}": momentum for place, (_, _, momentum) in enumerate(self._blocks)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put moments back that `state` gave of an optimizer of the same parameters."""
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            kind, place, *part = name.split("/")
            if kind == "muon":
                self._blocks[int(place)][2].copy_(value)
            else:
                moments.setdefault(int(place), {})[part[0]] = value
        if self._adam is not None:
            self._adam.load_state_dict({**self._adam.state_dict(), "state": moments})

    def step(self, rate: float, workers: Executor) -> None:
        """Change each parameter by its `grad`, which is None afterwards; one worker to a tensor of blocks."""
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = rate * group["scale"]
            self._adam.step()
            self._adam.zero_grad(set_to_none=True)
        list(workers.map(lambda entry: _muon_step(*entry, rate=rate), self._blocks))


def _muon_step(parameter: nn.Parameter, scale: float, momentum: Tensor, *, rate: float) -> None:
    with torch.no_grad():
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        update = orthogonalized(gradient.lerp_(momentum, _MOMENTUM))  # Nesterov's
        parameter.sub_(update, alpha=rate * scale * _UPDATE * math.sqrt(parameter.shape[-1]))


def orthogonalized(blocks: Tensor) -> Tensor:
    """`blocks` `(K, b, b)`, each with its singular values brought to about 1 (0.7 to 1.2); zeros stay zeros.

    Newton and Schulz's iteration with Muon's coefficients: singular values above a 500th of the block's norm get there in five
    rounds, smaller ones grow 480 times, and none converges to 1 exactly. The root mean square of a block is then about 1/√b.
    """
    _, exponents = torch.frexp(blocks.abs().amax((-2, -1), keepdim=True))
    x = torch.ldexp(blocks, -exponents)  # exact, and then no square underflows that counts
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    first, third, fifth = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=third, alpha=fifth), x, beta=first)
    return x


def root_mean_square(x: Tensor) -> float:
    """Of all numbers of a tensor; its bits do not depend on the number of threads either."""
    parts = [part.square().sum(dtype=torch.float64) for part in x.flatten().split(_SUMMED_AT_ONCE)]
    return math.sqrt(float(torch.stack(parts).sum()) / x.numel())
