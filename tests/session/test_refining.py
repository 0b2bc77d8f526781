"""The dense model beside the changed one, shared inputs, and where in a recipe a refiner may stand."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from armor_recipes.calibration.inputs import some_of
from armor_recipes.checkpoint.reader import read_header
from armor_recipes.errors import PlanError
from armor_recipes.events import Event, ModuleFinished, SolveProgressed, UnitRefined
from armor_recipes.model.blocks import find_stacks
from armor_recipes.model.hooks import Hooks
from armor_recipes.model.replay import capture_stream
from armor_recipes.model.survey import survey
from armor_recipes.model.views import dense_view
from armor_recipes.modifiers import RefineTask
from armor_recipes.modifiers.block_refine import BlockRefineModifier
from armor_recipes.modifiers.distillation import DistillationModifier
from armor_recipes.run import apply
from tests.support.engine import (
    ALL,
    ARMOR,
    ATTENTION,
    MLP,
    MODELS,
    SIZES,
    hook_count,
    make_job,
    make_model,
    make_session,
    recipe,
)

IDS = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(3))
INPUTS = {"input_ids": IDS}
SLIDING = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
MORE = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **SLIDING, final_logit_softcapping=5.0)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **SLIDING, use_sliding_window=True, max_window_layers=1)),
}
REFINERS = ["BlockRefineModifier", "DistillationModifier"]


def with_refiner(model: Path | str, *names: str, output: Path | str = "out", **fields: Any) -> dict[str, Any]:
    """ARMOR everywhere, then refiners."""
    return recipe(model, output, ARMORModifier=ARMOR, **{name: {"learning_rate": 0.003, **fields} for name in names})


@pytest.mark.parametrize("refiner", REFINERS)
def test_steps_of_a_training_count_as_they_are_done(refiner: str, llama: Path) -> None:
    seen: list[Event] = []
    make_session(make_job(with_refiner(llama, refiner, epochs=2)), observer=seen.append).run()
    shares = [
        event.share
        for event in seen
        if isinstance(event, ModuleFinished | UnitRefined) or (isinstance(event, SolveProgressed) and event.share)
    ]
    trained = [event for event in seen if isinstance(event, SolveProgressed) and event.share is not None]
    assert {event.module for event in trained} == {event.unit for event in seen if isinstance(event, UnitRefined)}
    assert len({event.share for event in trained}) == len(trained) > 1
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


# --- the dense model ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("kind", [*MODELS, *MORE])
def test_the_dense_view_is_the_model_before_its_changes(
    kind: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.engine.MODELS", {**MODELS, **MORE})
    model: Any = make_model(kind)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    layers = find_stacks(model).all[0]
    wanted = model(input_ids=IDS, use_cache=False).logits
    changed = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (name.startswith(layers.names) and name.endswith("weight")) or name == "model.norm.weight"
    }
    dense = {name: p.bfloat16() if narrow else p.clone() for name, p in changed.items()}
    for parameter in changed.values():
        parameter.mul_(0.5)
    other = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(dense_view(model, dense)(input_ids=IDS, use_cache=False).logits, wanted)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, other)
    assert not torch.equal(other, wanted)
    assert find_stacks(model).all[0] == layers
    assert hook_count(model) == 0


class Layer(nn.Module):
    """Answers in a tuple; `kind` is what the model below asks of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.kind = "causal"

    def forward(self, hidden: Tensor, *, scale: float) -> tuple[Tensor, str]:
        return hidden + scale * self.linear(hidden), "unused"


class Model(nn.Module):
    """Keeps its layers at the top, reads an attribute of each, and takes the first of what each answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.LayerNorm(32)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, scale={"causal": 0.5}[layer.kind])[0]
        return SimpleNamespace(logits=self.norm(hidden) @ self.embed.weight.T)


# --- the stream --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_call_takes_the_hidden_states_of_now(kind: str) -> None:
    model = make_model(kind)
    layers = find_stacks(model).all[0]
    stream = capture_stream(model, layers, INPUTS, batch_size=2, hooks=Hooks())
    assert [batch["input_ids"].shape for batch in stream.batches] == [(2, 12), (2, 12), (1, 12)]
    for index, layer in enumerate(layers.modules):
        outputs = [stream.call(index, batch).run(layer) for batch in range(3)]
        stream.advance(index)
        assert all(torch.equal(one, two) for one, two in zip(outputs, stream.hidden, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_activations_that_were_passed_are_not_kept(kind: str) -> None:
    model = make_model(kind)
    layers = find_stacks(model).all[0]
    stream = capture_stream(model, layers, INPUTS, batch_size=2, hooks=Hooks())
    old = [weakref.ref(hidden) for hidden in stream.hidden]
    stream.advance(0)
    assert [ref() for ref in old] == [None] * 3


# --- modules that read the same input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2-bias", "gemma3"])
def test_modules_that_read_the_same_tensor_are_found(kind: str) -> None:
    model = make_model(kind)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    with torch.no_grad():
        found = survey(model, find_stacks(model), names, some_of(INPUTS, slice(1)), Hooks(), {}).readers
    for name in names:
        layer, _, module = name.rpartition(".")
        first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(module, module)
        assert found[name] == f"{layer}.{first}"
    assert hook_count(model) == 0


def test_the_first_that_is_named_stands_for_all() -> None:
    model = make_model()
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "vok"]
    with torch.no_grad():
        found = survey(model, find_stacks(model), names, some_of(INPUTS, slice(1)), Hooks(), {}).readers
    assert [found[name] for name in names] == [names[0], names[1], names[0]]


def test_modules_that_are_called_twice_or_never_stand_for_themselves() -> None:
    class Odd(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.twice, self.never = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, hidden: Tensor, *, scale: float) -> tuple[Tensor, str]:
            return self.linear(hidden) + self.same(input=hidden) + self.twice(self.twice(hidden)), "unused"

    model = Model()
    model.layers = nn.ModuleList([Odd()])
    names = [f"layers.0.{name}" for name in ("linear", "same", "twice", "never")]
    with torch.no_grad():
        found = survey(model, find_stacks(model), names, some_of(INPUTS, slice(1)), Hooks(), {}).readers
    assert list(found.values()) == [names[0], names[0], names[2], names[3]]


# --- where a refiner may stand ---------------------------------------------------------------------------------------------------


def refusal(mapping: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as caught:
        make_job(mapping)
    return str(caught.value)


@pytest.mark.parametrize("name", REFINERS)
def test_the_plan_tells_what_is_trained(llama: Path, name: str) -> None:
    plan = make_job(with_refiner(llama, name)).plan
    layers = [(None, "model")] if name == "DistillationModifier" else [(0, "model.layers.0"), (1, "model.layers.1")]
    assert [(r.layer, r.unit) for r in plan.refinements] == layers
    assert [m for r in plan.refinements for m in r.modules] == [m.name for m in plan.modules]
    assert {r.tokens for r in plan.refinements} == {60}
    assert all(r.flops > 0 and r.peak_bytes > 0 for r in plan.refinements)
    assert plan.to_dict()["refinements"][0]["unit"] == layers[0][1]
    alone = make_job(recipe(llama)).plan
    assert plan.totals.bytes_after == alone.totals.bytes_after


@pytest.mark.parametrize("name", REFINERS)
def test_a_refiner_needs_factors_made_before_it_in_its_stage(llama: Path, name: str) -> None:
    wanted = f": {name}: no modifier before it in prune_stage makes 2:4 factors"
    alone = recipe(llama, **{name: {}})
    pruned = recipe(llama, NoWagModifier={"targets": [ALL]}, **{name: {}})
    first = recipe(llama, **{name: {}}, ARMORModifier=ARMOR)
    dense = recipe(llama, ARMORModifier={**ARMOR, "pattern": "4:8"}, **{name: {}})
    elsewhere = recipe(llama, ARMORModifier={**ARMOR, "targets": [MLP]}, **{name: {"targets": [ATTENTION]}})
    for mapping in (alone, pruned, first, dense, elsewhere):
        message = refusal(mapping)
        assert wanted in message
        assert "put it after an ARMORModifier of the same stage" in message


def test_block_refinement_belongs_into_the_first_stage(llama: Path) -> None:
    name, mapping = "BlockRefineModifier", recipe(llama)
    mapping["late_stage"] = {"refine_modifiers": {name: {}}}
    message = refusal(mapping)
    assert f"the recipe mapping: {name}: no modifier before it in late_stage" in message
    mapping["late_stage"]["refine_modifiers"] = {"ARMORModifier": {**ARMOR, "targets": [MLP]}, name: {}}
    mapping["prune_stage"]["armor_modifiers"]["ARMORModifier"] = {**ARMOR, "targets": [ATTENTION]}
    assert f"{name}: it needs the original model, but stage late_stage comes after prune_stage" in refusal(mapping)


def test_distillation_in_a_later_stage_aims_at_the_model_before_the_first(llama: Path, tmp_path: Path) -> None:
    """With ARMOR on the dense model's inputs, what follows sees the same in a stage of its own: bytes are those of one stage."""
    cores = {"targets": [ALL], "config_groups": {"core": {"weights": {"num_bits": 8, "strategy": "channel"}}}}
    late = {"QuantizationModifier": cores, "DistillationModifier": {"learning_rate": 0.003, "compute_dtype": "float32"}}
    first = {**ARMOR, "propagate": "dense"}
    one = recipe(llama, tmp_path / "one", ARMORModifier=first, **late)
    two = {**recipe(llama, tmp_path / "two", ARMORModifier=first), "late_stage": {"tune_modifiers": late}}
    found = [apply(mapping) for mapping in (one, two)]
    assert [step.losses for step in found[0].refinements] == [step.losses for step in found[1].refinements]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", REFINERS)
def test_too_few_batches_are_refused_at_plan_time(llama: Path, name: str) -> None:
    mapping = with_refiner(llama, name)
    mapping["calibration"]["batch_size"] = 5
    message = refusal(mapping)
    assert f"{name}: training needs at least 2 calibration batches" in message
    assert "raise `calibration.samples` or lower `calibration.batch_size`" in message


@pytest.mark.parametrize("name", REFINERS)
def test_a_refiner_that_is_optional_may_match_nothing(llama: Path, name: str) -> None:
    mapping = with_refiner(llama, name, targets=["re:.*experts.*"], optional=True)
    assert make_job(mapping).plan.refinements == ()
    mapping = with_refiner(llama, name, targets=["re:.*experts.*"])
    assert "matches no linear module" in refusal(mapping)


# --- in a run ----------------------------------------------------------------------------------------------------------------


def seen_targets(monkeypatch: pytest.MonkeyPatch, kind: Any) -> list[list[Tensor]]:
    """The targets of each unit that a refiner of this kind is asked to train, as it goes along."""
    seen: list[list[Tensor]] = []
    refine = kind.refine

    def look(self: Any, task: RefineTask, progress: Any) -> Any:
        with torch.no_grad():
            seen.append([task.target(i).output.clone() for i in range(task.batches)])
        return refine(self, task, progress)

    monkeypatch.setattr(kind, "refine", look)
    return seen


def test_distillation_aims_at_the_dense_logits_each_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_targets(monkeypatch, DistillationModifier)
    mapping = with_refiner(llama, "BlockRefineModifier", "DistillationModifier")
    modifiers = mapping["prune_stage"]["armor_modifiers"]
    modifiers["DistillationModifier"]["compute_dtype"] = "float32"
    modifiers["DistillationModifier@again"] = {"compute_dtype": "float32"}
    session = make_session(make_job(mapping))
    ids = next(iter(session.tokens.values())).ids
    with torch.no_grad():
        wanted = [session.model(input_ids=batch).logits for batch in ids.split(2)]
    with session:
        session.run()
    assert [r.unit for r in session.section("refinements")] == ["model.layers.0", "model.layers.1", "model", "model"]
    assert session.section("refinements")[2].norm_values > 0  # the last norm has changed before the second looks
    assert len(seen) == 2
    for targets in seen:
        assert all(torch.equal(one, two) for one, two in zip(targets, wanted, strict=True))
    names = [name.split(".")[-1] for name in session.results["model.layers.0.mlp.up_proj"].refined]
    assert names == ["BlockRefineModifier", "DistillationModifier", "DistillationModifier@again"]


def test_block_refinement_aims_at_the_dense_layers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_targets(monkeypatch, BlockRefineModifier)
    session = make_session(make_job(with_refiner(llama, "BlockRefineModifier")))
    ids = next(iter(session.tokens.values())).ids
    wanted: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for batch in ids.split(2):
            states = session.model(input_ids=batch, output_hidden_states=True).hidden_states
            wanted[0].append(states[1])
        stream = capture_stream(session.model, session.stacks.all[0], {"input_ids": ids}, batch_size=2, hooks=Hooks())
        stream.advance(0)
        stream.advance(1)
        wanted[1] = [hidden.clone() for hidden in stream.hidden]
    with session:
        session.run()
    for targets, dense in zip(seen, wanted, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(targets, dense, strict=True))


@pytest.mark.parametrize("name", REFINERS)
def test_layers_behind_the_last_target_still_lead_to_the_logits(llama: Path, name: str) -> None:
    mapping = with_refiner(llama, name)
    mapping["prune_stage"]["armor_modifiers"]["ARMORModifier"] = {**ARMOR, "targets": [r"re:.*layers\.0\.mlp.*"]}
    with make_session(make_job(mapping)) as session:
        session.run()
    assert [r.modules for r in session.section("refinements")] == [3]
    assert list(session.results) == [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]


@pytest.mark.parametrize("name", REFINERS)
def test_a_dense_output_holds_the_refined_products(llama: Path, tmp_path: Path, name: str) -> None:
    outputs = []
    for number, names in enumerate([(), (name,)]):
        mapping = with_refiner(llama, *names, output=tmp_path / str(number))
        mapping["output"]["format"] = "dense"
        result = apply(mapping)
        assert all(module.packed is None for module in result.modules.values())
        assert all(
            module.refined == result.modules["model.layers.0.mlp.up_proj"].refined for module in result.modules.values()
        )
        outputs.append(result)
    assert read_header(outputs[0].output).keys() == read_header(outputs[1].output).keys()
    assert not any(".armor_" in tensor for tensor in read_header(outputs[1].output))
    assert outputs[1].refinements[0].losses[0] > min(outputs[1].refinements[0].losses)


def test_factors_are_kept_only_for_a_refiner(llama: Path) -> None:
    for mapping, kept in ((recipe(llama), 0), (with_refiner(llama, "DistillationModifier"), 14)):
        with make_session(make_job(mapping), keep_packed=False) as session:
            session.run()
        assert len(session.state.factors) == kept
