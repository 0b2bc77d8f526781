"""Layers run one by one give the activations that the model itself has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.model.blocks import Stack, find_stacks
from armor_recipes.model.hooks import Hooks
from armor_recipes.model.replay import LayerCall, capture_stream
from tests.support.engine import MODELS, hook_count, make_model

IDS = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(3))


def layer_outputs(model: nn.Module, ids: Tensor) -> list[list[Tensor]]:
    """By layer and batch, from plain forward passes."""
    seen: list[list[Tensor]] = []
    for layer in find_stacks(model).all[0].modules:
        outputs: list[Tensor] = []
        seen.append(outputs)
        layer.register_forward_hook(lambda _, __, out, o=outputs: o.append(out[0] if isinstance(out, tuple) else out))
    for batch in ids.split(2):
        model(input_ids=batch)
    for layer in find_stacks(model).all[0].modules:
        layer._forward_hooks.clear()
    return seen


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_replay_is_the_model(kind: str, attention: str) -> None:
    model, hooks = make_model(kind), Hooks()
    model.set_attn_implementation(attention)
    layers = find_stacks(model).all[0]
    with torch.no_grad():
        wanted = layer_outputs(model, IDS)
        stream = capture_stream(model, layers, IDS, batch_size=2, hooks=hooks)
        for index in range(len(layers.modules)):
            stream.advance(index)
            for found, output in zip(stream.hidden, wanted[index], strict=True):
                assert torch.equal(found, output), (index, float((found - output).abs().max()))
    assert hook_count(model) == 0


@pytest.mark.parametrize(("kind", "differ"), [("llama", False), ("gemma3", True), ("qwen2-sliding", True)])
def test_arguments_are_kept_for_each_layer_only_where_they_differ(kind: str, differ: bool) -> None:
    model = make_model(kind)
    layers = find_stacks(model).all[0]
    with torch.no_grad():
        stream = capture_stream(model, layers, IDS, batch_size=2, hooks=Hooks())
    assert {len(batch) for batch in stream._calls} == {len(layers.modules) if differ else 1}


def test_the_first_pass_stops_at_the_first_layer() -> None:
    model = make_model()
    layers = find_stacks(model).all[0]
    passes = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        capture_stream(model, layers, IDS, batch_size=2, hooks=Hooks())
    assert len(passes) == 1  # the probe's, with one window


def test_observing_leaves_the_stream_where_it_is() -> None:
    model = make_model()
    layers = find_stacks(model).all[0]
    with torch.no_grad():
        stream = capture_stream(model, layers, IDS, batch_size=2, hooks=Hooks())
        before = [hidden.clone() for hidden in stream.hidden]
        stream.observe(0)
    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))


class SharedState(nn.Module):
    """A layer that looks at what the layer before it left behind, as some models do."""

    notes: list[float] = []  # noqa: RUF012 - shared on purpose

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        self.notes.append(1.0)
        return hidden * len(self.notes)


class Odd(nn.Module):
    """Embeds ids and runs its layers, calling some of them `times`."""

    def __init__(self, layer: type[nn.Module], times: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.times = times
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            for _ in range(self.times):
                hidden = layer(hidden)
        return hidden


class Double(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)


@pytest.mark.parametrize("model", [Odd(SharedState), Odd(Double, times=2)], ids=["shared-state", "called-twice"])
def test_layers_that_cannot_be_run_one_by_one_are_refused(model: Odd) -> None:
    SharedState.notes.clear()
    layers = Stack("layers", (model.layers[0], model.layers[1]))
    with torch.no_grad(), pytest.raises(PlanError, match="share state"):
        capture_stream(model, layers, IDS, batch_size=2, hooks=Hooks())
    assert hook_count(model) == 0


def test_a_model_that_is_broken_from_the_start_says_so() -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with torch.no_grad(), pytest.raises(NumericalError, match="not finite before anything was changed"):
        capture_stream(model, find_stacks(model).all[0], IDS, batch_size=2, hooks=Hooks())


def test_hidden_states_passed_by_name() -> None:
    class ByName(nn.Module):
        def forward(self, *, hidden_states: Tensor, scale: float) -> tuple[Tensor, None]:
            return hidden_states * scale, None

    call = LayerCall.of((), {"hidden_states": torch.ones(2), "scale": 3.0})
    assert torch.equal(call.run(ByName()), torch.full((2,), 3.0))
