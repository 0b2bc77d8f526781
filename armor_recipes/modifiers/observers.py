"""Observers by llm-compressor's names: how the range that becomes a scale is chosen from what is seen.

What is seen is laid out as `(N, *shape, G)`: N observations, for each scale of `shape` the G values of one that it is for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from armor_recipes.errors import PlanError

_NVFP4 = {"expand": 1.8, "maxshrink": 1 - 0.8 / 1.8, "grid": 200.0, "patience": 1000}
#: Steps of a GPU's kernel there: on a CPU they change nothing, there and here.
_WITHOUT_MEANING = ("triton_error_buffer", "strict")
_MOVING = {"averaging_constant": 0.01}


@dataclass(frozen=True, slots=True)
class Search:
    """Shrinks each range step by step, and takes the one whose rounding has the least Σ |error|^norm.

    Attributes:
        expand: the first range, as a multiple of what was seen.
        maxshrink: how far it shrinks, in `grid` steps for the whole of it.
        patience: steps after which it stops where no range of any scale was better.
        norm: the exponent.
        weighted: whether errors count by the mean square of their input channel.
    """

    expand: float = 1.0
    maxshrink: float = 0.2
    grid: float = 100.0
    patience: int = 5
    norm: float = 2.4
    weighted: bool = False

    @property
    def steps(self) -> int:
        """How many ranges are tried; a weighted search tries the smallest, too."""
        count = int(self.maxshrink * self.grid)
        return max(1, count) + 1 if self.weighted else count


@dataclass(frozen=True, slots=True)
class Rule:
    """How a range comes about: `over` which observations (their last, all, or a mean that moves by `averaging_constant` with
    each), and the `search` in each; None takes the smallest and largest value.
    """

    over: Literal["last", "all", "moving"]
    search: Search | None = None
    averaging_constant: float = 1.0

    @property
    def moving(self) -> float | None:
        """The share by which each observation moves the range; None where it does not move."""
        return self.averaging_constant if self.over == "moving" else None


_WEIGHTED = Search(maxshrink=0.95, grid=20, norm=3.0, weighted=True)
_RULES = {
    "memoryless_minmax": Rule("last"),
    "static_minmax": Rule("all"),
    "minmax": Rule("moving", None, **_MOVING),
    "memoryless_mse": Rule("last", Search()),
    "mse": Rule("moving", Search(), **_MOVING),
    "nvfp4_expanded_mse": Rule("last", Search(**_NVFP4)),  # type: ignore[arg-type]
    "imatrix_mse": Rule("last", _WEIGHTED),
    "nvfp4_expanded_imatrix": Rule("last", Search(**_NVFP4, weighted=True)),  # type: ignore[arg-type]
}
_ALIASES = {"fouroversix": "nvfp4_expanded_mse"}
NAMES = (*_RULES, *_ALIASES)
"""All that there are."""


def observer_of(name: str, kwargs: Mapping[str, Any] | None = None) -> Rule:
    """The observer of that name, whatever its case, with its arguments. Raises PlanError, naming those that there are."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    rule = _RULES.get(_ALIASES.get(plain, plain))
    if rule is None:
        raise PlanError(f"observer {name} is not here: take one of {', '.join(NAMES)}, or leave it out")
    given = {key: value for key, value in (kwargs or {}).items() if key not in _WITHOUT_MEANING}
    known = [] if rule.search is None else [part.name for part in fields(Search) if part.name != "weighted"]
    known += ["averaging_constant"] if rule.over == "moving" else []
    wrong = [key for key, value in given.items() if key not in known or type(value) not in (int, float) or value < 0]
    if wrong:
        raise PlanError(
            f"observer_kwargs.{wrong[0]} of observer {name} is {given[wrong[0]]!r}; it takes numbers, for "
            f"{', '.join(known) or 'nothing'}"
        )
    constant = {key: given.pop(key) for key in list(given) if key == "averaging_constant"}
    if given and rule.search is not None:
        rule = replace(rule, search=replace(rule.search, **given))
    return replace(rule, **constant)


def rule_of(args: Any, *, weight: bool) -> Rule:
    """The observer of compressed-tensors' `args`, by default `memoryless_minmax` of weights and `minmax` of activations.

    Of a weight, which is seen once, all that it is seen over are the same. Raises PlanError.
    """
    rule = observer_of(args.observer or ("memoryless_minmax" if weight else "minmax"), args.observer_kwargs)
    weighted = rule.search is not None and rule.search.weighted
    if weighted and not weight:
        raise PlanError(f"observer {args.observer} weighs the columns of a weight: for activations take mse")
    if weighted and args.strategy not in ("channel", "group", "tensor_group"):
        raise PlanError(f"observer {args.observer} is for scales of rows and groups, not for strategy: {args.strategy}")
    return replace(rule, over="last") if weight else rule


def arranged_weight(weight: Tensor, args: Any) -> Tensor:
    """A weight `(O, I)` as one observation, `(1, *shape of its scales, G)`."""
    if args.strategy == "tensor":
        return weight.reshape(1, 1, -1)
    if args.strategy == "channel":
        return weight[None, :, None]
    if args.strategy in ("group", "tensor_group"):
        groups: Tensor = weight.unflatten(1, (-1, args.group_size))
        return groups[None]
    rows, columns = args.block_structure
    o, i = weight.shape
    whole = pad(weight, (0, -i % columns, 0, -o % rows))  # 0 is in every range anyway
    blocks: Tensor = whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return blocks.transpose(1, 2).flatten(2)[None]


def weight_range(weight: Tensor, args: Any, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The smallest and largest value, in the shape of the scales, of a weight `(O, I)`; `importance` is the mean square of each
    input channel `(I,)`, for observers that weigh by it.
    """
    rule = rule_of(args, weight=True)
    seen = arranged_weight(weight, args)
    if rule.search is None or weight.is_meta:
        return seen.amin((0, -1)), seen.amax((0, -1))
    if not rule.search.weighted:
        return _searched(seen, args, rule.search)
    assert importance is not None
    share = importance.float().to(weight.device)
    share = share / (share.mean() + torch.finfo(torch.float32).tiny)
    return _searched(seen, args, rule.search, arranged_weight(share.expand(len(weight), -1), args))


@dataclass(frozen=True, slots=True)
class ActivationRange:
    """The range of one observation of activations, by compressed-tensors' args as JSON: a value, so that statistics with equal
    ones can be one.
    """

    text: str

    @classmethod
    def of(cls, args: Any) -> ActivationRange | None:
        """For these args; None where it is the smallest and largest of all values, and where nothing is seen. Raises PlanError."""
        if args is None or args.dynamic is True:
            return None
        if rule_of(args, weight=False).search is None and args.strategy == "tensor":
            return None
        return cls(json.dumps(args.model_dump(mode="json"), sort_keys=True))

    @property
    def args(self) -> Any:
        """compressed-tensors' args."""
        from compressed_tensors.quantization import QuantizationArgs

        return QuantizationArgs(**json.loads(self.text))

    def __call__(self, x: Tensor) -> Tensor:
        """Smallest and largest value, `(2, *shape of the scales)`: of inputs `(..., I)`, or with `attn_head` of states
        `(batch, tokens, heads, dimensions)`.
        """
        args = self.args
        if args.strategy == "attn_head":
            seen = x.flatten(0, 1)[:, :, None, None]
        elif args.group_size:
            seen = x.reshape(-1, x.shape[-1]).unflatten(-1, (-1, args.group_size))
        else:
            seen = x.reshape(-1, 1, x.shape[-1])
        search = rule_of(args, weight=False).search
        if search is None:
            return torch.stack((seen.amin((0, -1)), seen.amax((0, -1))))
        return torch.stack(_searched(seen, args, search))


def _searched(seen: Tensor, args: Any, search: Search, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each scale the range with the least error, in the dtype of what is seen, on the grid that a scale without a dtype of its
    own has: a global one divides out.
    """
    if args.strategy == "tensor_group":
        args = args.model_copy(update={"scale_dtype": None})
    dtype = torch.float32 if search.weighted else seen.dtype
    low, high = seen.amin((0, -1)) * search.expand, seen.amax((0, -1)) * search.expand
    best, chosen = torch.full_like(low, torch.finfo(dtype).max, dtype=dtype), (low.clone(), high.clone())
    waited = 0
    for step in range(search.steps):
        share = 1 - step / search.grid
        error = _error(seen, args, (share * low, share * high), search.norm, importance, dtype)
        better = error < best
        if better.any():
            best = torch.where(better, error, best)
            chosen = (torch.where(better, share * low, chosen[0]), torch.where(better, share * high, chosen[1]))
            waited = 0
        else:
            waited += 1
            if waited >= search.patience > 0:
                break
    return chosen


def _error(
    seen: Tensor, args: Any, bounds: tuple[Tensor, Tensor], norm: float, importance: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Σ |rounded − seen|^norm of each scale."""
    from compressed_tensors.quantization import QuantizationStrategy, fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    scale, zero = calculate_qparams(*bounds, args)
    single = args.model_copy(update={"strategy": QuantizationStrategy.TOKEN})
    rounded = fake_quantize(seen, scale[..., None], zero[..., None], single).to(dtype)
    powers = (rounded - seen.to(dtype)).abs().pow(norm)
    error: Tensor = (powers if importance is None else powers * importance).sum((0, -1))
    return error
