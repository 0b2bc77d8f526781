"""Experts of a mixture: their tokens are counted, and those that too few reach are treated as the recipe says, never in silence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from armor_recipes.calibration.split import SplitGram
from armor_recipes.calibration.statistics import InputGram, InputSecondMoment
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.model.blocks import find_stacks
from armor_recipes.model.experts import every_expert, expert_of, readers_within_experts
from armor_recipes.model.hooks import Hooks
from armor_recipes.modifiers.armor import ARMORModifier
from armor_recipes.modifiers.kinds.contract import BlockContext, Share
from armor_recipes.modifiers.kinds.experts import minimum_tokens
from armor_recipes.recipe import MoeSpec
from armor_recipes.session import Session
from armor_recipes.session.looking import look
from tests.support.engine import core, inputs_of
from tests.support.mixtures import (
    COUNT,
    EXPERTS,
    LAYER,
    TOP_K,
    VOCABULARY,
    make_mixture,
    mixture_recipe,
    plan_of,
    run,
    shun,
)

ARMOR: dict[str, Any] = {"targets": [EXPERTS], "block_size": 8, "iterations": 2}
HESSIAN: dict[str, Any] = {**ARMOR, "objective": "hessian"}
TOKENS = 5 * 12
POOR = f"{LAYER.format(1)}.2"
PARTS = ("gate_proj", "up_proj", "down_proj")


def poor(below: str, minimum: int = 6, **fields: Any) -> Session:
    """A run in which no token reaches expert 2 of the second layer."""
    fields = fields or {"ARMORModifier": ARMOR}
    mapping = mixture_recipe(moe={"minimum_tokens": minimum, "below": below}, **fields)
    return run(mapping, make_mixture(unwanted={1: 2}))


def told(session: Session) -> dict[str, tuple[str, str, int, int]]:
    found = session.section("experts_below")
    return {one.name: (one.modifier.split(".")[-1], one.done, one.tokens, one.used) for one in found}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj", ("model.layers.3.mlp.experts", 17, "gate_proj")),
        ("experts.0.w1", ("experts", 0, "w1")),
        ("encoder.block.1.mlp.experts.expert_4.wi", ("encoder.block.1.mlp.experts", 4, "wi")),
        ("model.layers.0.mlp.input_linear.3", ("model.layers.0.mlp", 3, "input_linear")),
        ("model.layers.3.mlp.shared_expert.gate_proj", None),
        ("model.layers.3.mlp.shared_experts.gate_proj", None),
        ("model.layers.3.mlp.gate", None),
        ("model.layers.3.mlp.experts", None),
    ],
)
def test_experts_are_known_by_their_names(name: str, found: tuple[str, int, str] | None) -> None:
    expert = expert_of(name)
    assert (None if expert is None else (expert.layer, expert.number, expert.part)) == found


def test_every_token_of_every_expert_is_counted() -> None:
    results = run(mixture_recipe(ARMORModifier=ARMOR, moe={"minimum_tokens": 1}), make_mixture()).results
    assert len(results) == 2 * COUNT * 3
    for layer in range(2):
        tokens = [[results[f"{LAYER.format(layer)}.{e}.{part}"].tokens for e in range(COUNT)] for part in PARTS]
        assert tokens[0] == tokens[1] == tokens[2]
        assert sum(tokens[0]) == TOKENS * TOP_K


def test_below_error_names_the_expert_and_says_what_to_do() -> None:
    with pytest.raises(NumericalError) as error:
        poor("error")
    text = str(error.value)
    assert "ARMORModifier: 1 of 4 experts of model.layers.1.mlp.experts see fewer calibration tokens" in text
    assert "`moe.minimum_tokens` asks for (6), by number (tokens): 2 (0)" in text
    assert "5 windows reach some experts with no token at all" in text
    assert "`layer-moment` or `skip`" in text
    assert error.value.exit_code == 4


def test_below_error_says_how_many_windows_would_do() -> None:
    model = make_mixture()
    shun(model, 1, 2, but=2)  # in each of three batches
    with pytest.raises(NumericalError, match=r"2 \(6\)\. Raise `calibration\.samples` to 6 \(there were 5 windows\)"):
        run(mixture_recipe(ARMORModifier=ARMOR, moe={"minimum_tokens": 7, "below": "error"}), model)


def test_the_minimum_of_a_statistic_where_the_recipe_names_none() -> None:
    assert minimum_tokens(MoeSpec()) == minimum_tokens(MoeSpec(), InputSecondMoment("m", 4096)) == 128
    assert minimum_tokens(MoeSpec(), SplitGram("m", 4096)) == minimum_tokens(MoeSpec(), InputGram("m", 4096)) == 4096
    assert minimum_tokens(MoeSpec(), InputGram("m", 64)) == 128
    assert minimum_tokens(MoeSpec(minimum_tokens=3), InputGram("m", 64)) == 3


def test_without_a_minimum_no_token_is_an_error_still() -> None:
    with pytest.raises(NumericalError, match=rf"no calibration token reached {POOR}"):
        poor("layer-moment", minimum=0)


def test_skip_leaves_the_expert_as_it_was_and_says_so() -> None:
    before = {n: p.clone() for n, p in make_mixture().named_parameters()}
    session = poor("skip")
    assert told(session) == {f"{POOR}.{part}": ("ARMORModifier", "skip", 0, 0) for part in PARTS}
    for part in PARTS:
        assert f"{POOR}.{part}" not in session.results
        assert f"{POOR}.{part}" not in session.state.factors
        assert torch.equal(session.model.get_parameter(f"{POOR}.{part}.weight"), before[f"{POOR}.{part}.weight"])
    assert len(session.results) == (2 * COUNT - 1) * 3


def test_layer_moment_takes_what_all_experts_of_the_layer_have_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.Tensor] = {}
    solve: Any = ARMORModifier.solve

    def spy(self: Any, module: Any, weight: torch.Tensor, statistic: Any, on_progress: Any) -> Any:
        seen[module.name] = statistic.value
        return solve(self, module, weight, statistic, on_progress)

    monkeypatch.setattr(ARMORModifier, "solve", spy)
    session = poor("layer-moment", ARMORModifier={**ARMOR, "propagate": "dense"})
    assert told(session) == {f"{POOR}.{part}": ("ARMORModifier", "layer-moment", 0, TOKENS * TOP_K) for part in PARTS}
    assert session.results[f"{POOR}.gate_proj"].tokens == 0
    (tokens,) = session.tokens.values()
    names = [f"{LAYER.format(1)}.{e}.{part}" for e in (0, 1, 3) for part in PARTS]
    inputs = inputs_of(make_mixture(unwanted={1: 2}), tokens.ids, names)
    for part in PARTS:
        rows = torch.cat([inputs[name] for name in names if name.endswith(part)])
        assert torch.allclose(seen[f"{POOR}.{part}"], rows.double().square().mean(0).float(), rtol=1e-4)


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
@pytest.mark.parametrize("below", ["layer-moment", "skip"])
def test_it_goes_with_every_statistic(below: str, propagate: str) -> None:
    fields = {
        "ARMORModifier": {**HESSIAN, "propagate": propagate, "targets": [r"re:.*experts\..*(gate|up)_proj"]},
        "SparseGPTModifier": {"targets": [r"re:.*experts\..*down_proj"], "pattern": "2:4", "propagate": propagate},
    }
    session = poor(below, **fields)
    assert {name: done for name, (_, done, _, _) in told(session).items()} == {f"{POOR}.{p}": below for p in PARTS}
    assert len(session.results) == 3 * (2 * COUNT - (below == "skip"))


def test_shrinkage_is_chosen_on_what_the_layer_has_seen() -> None:
    session = poor("layer-moment", ARMORModifier={**HESSIAN, "shrinkage": "auto"}, calibration={"batch_size": 1})
    assert 0 <= session.results[f"{POOR}.gate_proj"].measures["shrinkage"] <= 1


@pytest.mark.parametrize("below", ["layer-moment", "skip"])
def test_factors_and_training_after_it(below: str) -> None:
    fields = {
        "ARMORModifier": {**ARMOR, "share_input_factor": True},
        "BlockRefineModifier": {"epochs": 1},
        "QuantizationModifier": core(targets=[EXPERTS], iterations=1),
    }
    session = poor(below, **fields)
    by = {(one.modifier.split(".")[-1], one.done) for one in session.section("experts_below")}
    quantized = {("QuantizationModifier", "layer-moment")} if below == "layer-moment" else set()
    assert by == {("ARMORModifier", below), *quantized}
    assert (f"{POOR}.up_proj" in session.state.factors) == (below == "layer-moment")
    assert all(result.refined and result.changes for result in session.results.values())


def test_a_block_whose_experts_are_all_skipped_has_nothing_to_train() -> None:
    session = poor("skip", minimum=1000, ARMORModifier=ARMOR, BlockRefineModifier={})
    assert session.results == {}
    assert [one.unit for one in session.section("refinements_left_out")] == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("below", ["layer-moment", "skip"])
def test_gradients_at_outputs_that_no_token_reaches(below: str) -> None:
    session = poor(below, ARMORModifier={**ARMOR, "gradient_power": 0.5})
    assert (f"{POOR}.gate_proj" in session.results) == (below == "layer-moment")
    assert torch.isfinite(session.state.gradients[f"{POOR}.gate_proj"]).all()


@pytest.mark.parametrize("below", ["layer-moment", "skip"])
def test_channels_between_an_experts_modules_are_reordered(below: str) -> None:
    fields = {"targets": [r"re:.*experts\..*down_proj"]}
    session = poor(below, ChannelPermutationModifier=fields)
    assert told(session) == {
        f"{POOR}.down_proj": ("ChannelPermutationModifier", below, 0, 120 if below == "layer-moment" else 0)
    }
    assert len(session.section("rearrangements")) == 2 * COUNT - (below == "skip")


def test_all_tokens_reach_every_expert_and_outputs_stay_routed() -> None:
    model, ids = make_mixture(), torch.arange(24)[None]
    shun(model, 1, 2)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with every_expert(model):
            assert torch.allclose(model(input_ids=ids).logits, plain, rtol=1e-5, atol=1e-6)
            assert {len(x) for x in inputs_of(model, ids, [f"{POOR}.{part}" for part in PARTS]).values()} == {24}
        seen = inputs_of(model, ids, [f"{LAYER.format(1)}.{e}.down_proj" for e in (0, 1, 3)])
    assert sum(map(len, seen.values())) == 24 * TOP_K


@pytest.mark.parametrize(
    "fields", [ARMOR, HESSIAN, {**ARMOR, "propagate": "dense"}, {**HESSIAN, "propagate": "matched"}]
)
def test_calibration_of_all_experts_on_all_tokens(fields: dict[str, Any]) -> None:
    mapping = mixture_recipe(ARMORModifier=fields, calibration={"experts": "all"}, moe={"minimum_tokens": TOKENS})
    session = run(mapping, make_mixture(unwanted={1: 2}))
    assert {result.tokens for result in session.results.values()} == {TOKENS}
    assert len(session.results) == 2 * COUNT * 3
    assert not session.section("experts_below")


def test_one_statistic_serves_what_reads_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    statistic: Any = BlockContext.statistic

    def noted(self: BlockContext, share: Any, shape: Any, *first: int) -> Any:
        made.extend([] if first else [shape.name])  # with the number of a window it is a batch's part of one
        return statistic(self, share, shape, *first)

    monkeypatch.setattr(BlockContext, "statistic", noted)
    run(mixture_recipe(ARMORModifier=ARMOR, moe={"minimum_tokens": 1}), make_mixture())
    assert len(made) == 2 * COUNT * 2  # gate and up of one expert; down
    made.clear()
    run(mixture_recipe(ARMORModifier=ARMOR, calibration={"experts": "all"}, moe={"minimum_tokens": 1}), make_mixture())
    assert len(made) == 2 * (1 + COUNT)  # gate and up of all experts; down of each
    assert not any(name.endswith("up_proj") for name in made)


def test_modules_of_different_experts_never_count_as_readers_of_one_tensor() -> None:
    names = [f"{LAYER.format(0)}.{e}.{part}" for e in (1, 0) for part in ("gate_proj", "up_proj")]
    first = dict.fromkeys(["q", "k"], "q") | dict.fromkeys(names, names[0])
    assert readers_within_experts(first) == {
        "q": "q",
        "k": "q",
        names[0]: names[0],
        names[1]: names[0],
        names[2]: names[2],
        names[3]: names[2],
    }


@pytest.mark.parametrize("experts", ["routed", "all"])
def test_no_bit_depends_on_the_order_in_which_experts_are_called(experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {**HESSIAN, "share_input_factor": True}
    mapping = mixture_recipe(ARMORModifier=fields, calibration={"experts": experts}, moe={"minimum_tokens": 20})
    one = run(mapping, make_mixture())
    unique = torch.Tensor.unique
    monkeypatch.setattr(torch.Tensor, "unique", lambda self: unique(self).flip(0))
    two = run(mapping, make_mixture())
    assert list(one.results) == list(two.results)
    for name, result in one.results.items():
        other = two.results[name]
        assert replace(result, seconds=0, packed=None) == replace(other, seconds=0, packed=None), name


# --- experts that no sample comes to: of images, say, where there are none -------------------------------------------------


def passed_by(calls: int = 10**6) -> PreTrainedModel:
    """A mixture whose second layer leaves its experts alone for so many calls."""
    model = make_mixture()
    mlp = model.get_submodule("model.layers.1.mlp")
    forward: Any = mlp.forward
    left = iter(range(calls))
    mlp.forward = lambda hidden: forward(hidden) if next(left, None) is None else hidden  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("below", ["layer-moment", "error"])
def test_experts_that_no_sample_comes_to_are_told_before_anything_long(below: str) -> None:
    model = passed_by()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = r"layers.1.mlp.experts.0.gate_proj is never called.*or set `moe.below: skip` \(and 11 more like it"
    with pytest.raises(PlanError, match=wanted):
        run(mixture_recipe(ARMORModifier=ARMOR, moe={"below": below}), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_experts_that_no_sample_comes_to_are_skipped_where_the_recipe_says_so() -> None:
    session = run(mixture_recipe(ARMORModifier=ARMOR, moe={"minimum_tokens": 1, "below": "skip"}), passed_by())
    below = session.section("experts_below")
    assert [(one.tokens, one.done) for one in below] == [(0, "skip")] * 12
    assert all(one.name.startswith("model.layers.1.") for one in below)


def test_samples_are_looked_at_until_one_comes_to_the_experts() -> None:
    read, plan, instances = plan_of(mixture_recipe(ARMORModifier=ARMOR), passed_by(calls=2))
    model = passed_by(calls=2)
    (entry,) = read.modifiers
    spec = entry.config.calibration
    tokens = {spec: build_tokens(spec, tokenizer=None, vocab_size=VOCABULARY)}
    shares = [Share(entry, instances[entry.key], plan.rows_of(entry.key))]
    seen = look(model, find_stacks(model), shares, tokens, Hooks(), moe=read.moe, sharing={})
    assert "model.layers.1.mlp.experts.3.down_proj" in seen.called
