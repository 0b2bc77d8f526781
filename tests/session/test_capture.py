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
INPUTS = {"input_ids": IDS}


def layer_outputs(model: nn.Module, ids: Tensor, size: int) -> list[list[Tensor]]:
    """By layer and batch, from plain forward passes."""
    seen: list[list[Tensor]] = []
    for layer in find_stacks(model).all[0].modules:
        outputs: list[Tensor] = []
        seen.append(outputs)
        layer.register_forward_hook(lambda _, __, out, o=outputs: o.append(out[0] if isinstance(out, tuple) else out))
    for batch in ids.split(size):
        model(input_ids=batch)
    for layer in find_stacks(model).all[0].modules:
        layer._forward_hooks.clear()
    return seen


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("attention", "size"), [("sdpa", 1), ("sdpa", 2), ("eager", 2)])
def test_replay_is_the_model(kind: str, attention: str, size: int) -> None:
    model, hooks = make_model(kind), Hooks()
    model.set_attn_implementation(attention)
    layers = find_stacks(model).all[0]
    with torch.no_grad():
        wanted = layer_outputs(model, IDS, size)
        stream = capture_stream(model, layers, INPUTS, batch_size=size, hooks=hooks)
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
        stream = capture_stream(model, layers, INPUTS, batch_size=2, hooks=Hooks())
    assert {len(batch) for batch in stream._calls} == {len(layers.modules) if differ else 1}


@pytest.mark.parametrize(
    ("kind", "size", "opened"),
    [
        ("llama", 2, 0),
        ("gemma3", 2, 3),  # of the three batches the last has another shape than the first
        ("gemma3", 1, 2),  # two batches show that arguments are those of the shape
    ],
)
def test_the_first_pass_stops_at_the_door_of_the_last_layer_that_is_asked(kind: str, size: int, opened: int) -> None:
    """`opened`: batches that pass the first layer when the stream is opened."""
    model = make_model(kind)
    layers = find_stacks(model).all[0]
    runs = {"first": 0, "last": 0, "head": 0}

    def count(name: str) -> Any:
        return lambda *_: runs.update({name: runs[name] + 1})

    for name, module in {"first": layers.modules[0], "last": layers.modules[-1], "head": model.lm_head}.items():
        module.register_forward_hook(count(name))
    with torch.no_grad():
        capture_stream(model, layers, INPUTS, batch_size=size, hooks=Hooks())
    # Before, with one window each: the probe's pass, two replays, where layers' arguments differ a pass with one output changed.
    assert runs == {"first": 3 + (opened > 0) + opened, "last": 3, "head": 1}


class Positions(nn.Module):
    """Calls its two layers with arguments of their own: the first's are of the shape, the second's of the `asked` tokens, too."""

    def __init__(self, asked: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(Scaled() for _ in range(2))
        self.asked = asked

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            of_ids = input_ids[..., None] / 96 if self.asked and number else torch.zeros(())
            hidden = layer(hidden, scale=of_ids + number)
        return hidden


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)

    def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
        return super().forward(hidden) * scale


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("ids", [IDS, torch.cat([IDS[:1], IDS])], ids=["other tokens", "two equal windows first"])
def test_arguments_of_the_tokens_are_taken_from_each_batch(asked: bool, ids: Tensor) -> None:
    model = Positions(asked)
    stack = Stack("layers", (model.layers[0], model.layers[1]))
    with torch.no_grad():
        stream = capture_stream(model, stack, {"input_ids": ids}, batch_size=1, hooks=Hooks())
        for index in range(2):
            stream.advance(index)
        for found, window in zip(stream.hidden, ids, strict=True):
            assert torch.equal(found, model(window[None]))


def test_observing_leaves_the_stream_where_it_is() -> None:
    model = make_model()
    layers = find_stacks(model).all[0]
    with torch.no_grad():
        stream = capture_stream(model, layers, INPUTS, batch_size=2, hooks=Hooks())
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
        capture_stream(model, layers, INPUTS, batch_size=2, hooks=Hooks())
    assert hook_count(model) == 0


def test_a_model_that_is_broken_from_the_start_says_so() -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with torch.no_grad(), pytest.raises(NumericalError, match="not finite before anything was changed"):
        capture_stream(model, find_stacks(model).all[0], INPUTS, batch_size=2, hooks=Hooks())


def test_hidden_states_passed_by_name() -> None:
    class ByName(nn.Module):
        def forward(self, *, hidden_states: Tensor, scale: float) -> tuple[Tensor, None]:
            return hidden_states * scale, None

    call = LayerCall.of((), {"hidden_states": torch.ones(2), "scale": 3.0})
    assert torch.equal(call.run(ByName()), torch.full((2,), 3.0))


# --- parts of a batch --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_layer_takes_a_batch_part_by_part(kind: str, attention: str) -> None:
    model = make_model(kind)
    model.set_attn_implementation(attention)
    stack = find_stacks(model).all[0]
    stream = capture_stream(model, stack, INPUTS, batch_size=5, hooks=Hooks())
    parts = [slice(0, 2), slice(2, 3), slice(3, 5)]
    for index, layer in enumerate(stack.modules):
        call = stream.call(index, 0)
        assert call.comes_apart(layer, parts)
        joined = torch.cat([call.part(windows).run(layer) for windows in parts])
        assert torch.allclose(joined, call.run(layer), rtol=1e-4, atol=1e-5)
        stream.advance(index)


def test_arguments_that_are_of_the_batch_are_split_and_others_stay() -> None:
    mask, positions, scale = torch.arange(24.0).view(4, 1, 6), torch.arange(6).view(1, 6), torch.tensor(2.0)
    call = LayerCall(torch.zeros(4, 6, 8), (mask,), {"pair": (positions, mask), "more": {"scale": scale}, "none": None})
    found = call.part(slice(1, 3))
    assert found.hidden.shape == (2, 6, 8)
    assert torch.equal(found.args[0], mask[1:3])
    assert torch.equal(found.kwargs["pair"][1], mask[1:3])
    assert found.kwargs["pair"][0] is positions
    assert found.kwargs["more"]["scale"] is scale
    assert found.kwargs["none"] is None
    assert isinstance(found.kwargs["pair"], tuple)


def centred(hidden: Tensor) -> Tensor:
    """Looks at other windows."""
    return hidden - hidden.mean(0, keepdim=True)


def by_position(hidden: Tensor, *, bias: Tensor) -> Tensor:
    """Takes a bias `(L, H)` of the positions, of which there are by chance as many as windows."""
    return hidden + bias


def for_each_head(hidden: Tensor, *, slopes: Tensor) -> Tensor:
    """Takes a tensor whose first dimension is windows times heads."""
    return hidden * slopes.view(len(hidden), -1, 1)


def by_object(hidden: Tensor, *, bias: Any) -> Tensor:
    """Takes an object that holds a tensor of the batch."""
    return hidden + bias.value


class Holder:
    value = torch.rand(4, 4, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (centred, {}),
        (by_position, {"bias": torch.rand(4, 8)}),
        (for_each_head, {"slopes": torch.rand(16, 1)}),
        (by_object, {"bias": Holder}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_layer_that_does_not_come_apart_is_found(layer: Any, arguments: dict[str, Any]) -> None:
    hidden = torch.rand(4, 4, 8, generator=torch.Generator().manual_seed(0))
    call = LayerCall(hidden, (), arguments)
    assert not call.comes_apart(layer, [slice(0, 1), slice(1, 4)])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    linear = nn.Linear(64, 64).to(dtype)
    hidden = torch.rand(4, 9, 64, generator=torch.Generator().manual_seed(0)).to(dtype)

    def rounded(x: Tensor) -> Tensor:
        return x + linear(x) * (1 + torch.finfo(dtype).eps * (len(x) == 4))

    assert LayerCall(hidden, (), {}).comes_apart(rounded, [slice(0, 2), slice(2, 4)])


def test_memory_that_runs_out_is_no_answer() -> None:
    def layer(hidden: Tensor) -> Tensor:
        if len(hidden) < 4:
            raise MemoryError
        return hidden

    def full(hidden: Tensor) -> Tensor:
        if len(hidden) < 4:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return hidden

    for function, error in ((layer, MemoryError), (full, RuntimeError)):
        with pytest.raises(error):
            LayerCall(torch.rand(4, 2, 3), (), {}).comes_apart(function, [slice(0, 2), slice(2, 4)])
