"""What changes of weights are measured to cost, held against the true divergence; experts and shared weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.events import EvaluationProgressed
from armor_recipes.model.experts import expert_of
from armor_recipes.modifiers.base import ModuleShape, WithGradients
from armor_recipes.session.measuring import Trial, change_costs
from tests.support.engine import SIZES, hook_count, make_model, rng_states
from tests.support.mixtures import VOCABULARY, make_mixture

NAMES = ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]


def windows(count: int = 4, vocabulary: int = SIZES["vocab_size"], length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(vocabulary, (1, length), generator=generator)} for _ in range(count)]


def change_of(weight: Tensor) -> Tensor:
    """A change that bfloat16 holds."""
    return (0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))).bfloat16().float()


def trials(model: nn.Module, names: list[str], **fields: Any) -> list[Trial]:
    shapes = [ModuleShape(name, *model.get_parameter(f"{name}.weight").shape, 2) for name in names]
    return [Trial(shape, lambda weight, _: change_of(weight), **fields) for shape in shapes]


@torch.no_grad()
def divergence(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> float:
    """KL(model ‖ changed model), the mean over tokens."""
    weight = model.get_parameter(f"{name}.weight")
    before = torch.cat([model(**batch).logits.flatten(0, 1) for batch in batches]).double().log_softmax(-1)
    own = weight.clone()
    weight += change_of(weight)
    after = torch.cat([model(**batch).logits.flatten(0, 1) for batch in batches]).double().log_softmax(-1)
    weight.copy_(own)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_costs_are_close_to_the_divergence_that_the_change_makes() -> None:
    model, batches = make_model("llama-gqa-tied"), windows(48)
    found = change_costs(model, trials(model, NAMES), batches, seed=0)
    assert list(found) == NAMES
    for name in NAMES:
        assert found[name] == pytest.approx(divergence(model, name, batches), rel=0.35)


def test_nothing_is_changed_and_equal_calls_give_equal_bits_on_any_number_of_threads() -> None:
    model, batches = make_model(), windows()
    state, numbers = {k: v.clone() for k, v in model.state_dict().items()}, rng_states()
    first = change_costs(model, trials(model, NAMES), batches, seed=0)
    torch.set_num_threads(2)
    try:
        told: list[Any] = []
        again = change_costs(model, trials(model, NAMES), batches, seed=0, observer=told.append)
    finally:
        torch.set_num_threads(1)
    assert first == again
    total = len(NAMES) + 2 * len(batches)
    assert told == [EvaluationProgressed(done, total, "measure") for done in range(1, total + 1)]
    assert first != change_costs(model, trials(model, NAMES), batches, seed=1)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert hook_count(model) == 0
    assert rng_states() == numbers
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_modifier_is_given_the_inputs_second_moment_and_gradients_where_it_asks() -> None:
    model, given = make_model(), []
    shape = ModuleShape(NAMES[1], 64, 32, 2)

    def change(weight: Tensor, statistic: Any) -> Tensor:
        given.append(statistic)
        return change_of(weight)

    plain = change_costs(model, [Trial(shape, change)], windows(), seed=0)
    assert change_costs(model, [Trial(shape, change, gradients=True)], windows(), seed=0) == plain
    inputs, both = given
    assert isinstance(both, WithGradients)
    assert torch.equal(both.inputs.value, inputs.value)
    assert inputs.tokens == 4 * 12
    assert both.gradients.shape == (64,)
    assert bool((both.gradients > 0).all())


def test_an_expert_that_few_tokens_reach_costs_what_its_layers_do_in_the_mean() -> None:
    model = make_mixture(unwanted={1: 2})
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and expert_of(name)]
    found = change_costs(model, trials(model, names), windows(3, VOCABULARY), seed=0)
    assert list(found) == names
    assert all(cost > 0 for cost in found.values())
    poor = [cost for name, cost in found.items() if name.startswith("model.layers.1.") and name.endswith("down_proj")]
    assert len(set(poor)) == 1  # all of them, with so little text


def test_what_a_weight_costs_is_that_of_all_who_use_it() -> None:
    model = make_model()
    alone = change_costs(model, trials(model, NAMES[1:2]), windows(24), seed=0)[NAMES[1]]
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    both = change_costs(model, trials(model, NAMES[1:2]), windows(24), seed=0)[NAMES[1]]
    assert both > 1.2 * alone


def test_what_cannot_be_measured_is_an_error() -> None:
    model = make_model()
    with pytest.raises(PlanError, match="a LlamaModel gives none"):
        change_costs(model.model, trials(model.model, ["layers.0.mlp.up_proj"]), windows(), seed=0)
    broken = make_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("inf")
    with pytest.raises(NumericalError, match=r"v_proj is not finite"):
        change_costs(broken, trials(broken, NAMES), windows(), seed=0)
