"""`ChannelPermutationModifier`: the function stays, masks keep more, and where channels mix nothing is left changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import armor_recipes
from armor_recipes.errors import PlanError
from armor_recipes.events import ChannelsReordered, Event
from armor_recipes.modifiers import Chain, ModuleShape, modifiers
from armor_recipes.modifiers.permutation import ChannelPermutationConfig, ChannelPermutationModifier
from armor_recipes.plan import Plan, Rates, estimate_run
from armor_recipes.run import apply
from tests.support.engine import ALL, MLP, logits, make_job, make_model, make_session, recipe, save_model

CONSUMERS = [r"re:.*mlp\.down_proj$", r"re:.*self_attn\.o_proj$"]
PERMUTE: dict[str, Any] = {"targets": CONSUMERS}
KINDS = ["llama", "llama-gqa-tied", "qwen2-bias", "gemma3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(tmp_path_factory.mktemp("models") / kind, kind) for kind in KINDS}


def plan(model: Path, **entries: Any) -> Plan:
    return make_job(recipe(model, **entries)).plan


# --- the function stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_permutation_alone_leaves_the_logits(models: dict[str, Path], kind: str, propagate: str) -> None:
    model = make_model(kind)
    before, old = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    job = make_job(recipe(models[kind], ChannelPermutationModifier={**PERMUTE, "propagate": propagate}))
    with make_session(job, model) as session:
        assert session.run() == {}
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=2e-4)
    layers = model.config.num_hidden_layers
    assert [row.consumer.split(".", 2)[-1] for row in session.section("rearrangements")] == [
        f"{layer}.{name}" for layer in range(layers) for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert all(row.kept_after >= row.kept_before for row in session.section("rearrangements"))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    named = {name for row in session.section("rearrangements") if row.moved for name in (row.consumer, *row.producers)}
    assert changed == {name for name in old if name.rsplit(".", 1)[0] in named} - {
        f"{row.consumer}.bias" for row in session.section("rearrangements")
    }
    for name in changed:
        assert torch.equal(model.state_dict()[name].flatten().sort().values, old[name].flatten().sort().values)


def test_value_channels_stay_in_their_heads(models: dict[str, Path]) -> None:
    model = make_model("llama-gqa-tied")  # 4 query heads of 8 channels on 2 key-value heads
    name = "model.layers.0.self_attn"
    v, o = (model.get_parameter(f"{name}.{part}_proj.weight").clone() for part in "vo")
    job = make_job(recipe(models["llama-gqa-tied"], ChannelPermutationModifier=PERMUTE))
    with make_session(job, model) as session:
        session.run()
    found = order_of(v, model.get_parameter(f"{name}.v_proj.weight"))
    columns = order_of(o.T, model.get_parameter(f"{name}.o_proj.weight").T).view(4, 8)
    assert torch.equal(found.view(2, 8) // 8, torch.arange(2)[:, None].expand(2, 8))
    assert torch.equal(columns // 8, torch.arange(4)[:, None].expand(4, 8))
    assert torch.equal(columns % 8, (found.view(2, 8) % 8).repeat_interleave(2, 0))
    row = session.section("rearrangements")[0]
    assert row.order_sha256 == hashlib.sha256(columns.flatten().numpy().tobytes()).hexdigest()
    assert row.moved == int((columns.flatten() != torch.arange(32)).sum()) > 0
    assert row.tokens == 60


def order_of(old: Tensor, new: Tensor) -> Tensor:
    """Which of the old rows each new row is."""
    same = (old[None] == new[:, None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.long().argmax(1)


# --- and masks keep more -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
@pytest.mark.parametrize(
    ("pruner", "fields"),
    [("NoWagModifier", {}), ("ARMORModifier", {"block_size": 8, "iterations": 20, "tolerance": 0.0})],
)
def test_the_consumers_loss_is_lower(
    models: dict[str, Path], propagate: str, pruner: str, fields: dict[str, Any]
) -> None:
    model = models["llama-gqa-tied"]
    prune = {pruner: {"targets": CONSUMERS, "propagate": propagate, **fields}}
    losses = []
    for entries in (prune, {"ChannelPermutationModifier": {**PERMUTE, "propagate": propagate}, **prune}):
        with make_session(make_job(recipe(model, **entries))) as session:
            losses.append({name: result.stored_loss for name, result in session.run().items()})
            rows = session.section("rearrangements")
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        assert losses[1][name] < losses[0][name]
    if pruner == "NoWagModifier":  # of layer 0, whose inputs are those that the permutation saw
        assert 1 - rows[0].kept_after == pytest.approx(losses[1]["model.layers.0.self_attn.o_proj"], abs=2e-3)
        assert 1 - rows[0].kept_before == pytest.approx(losses[0]["model.layers.0.self_attn.o_proj"], abs=2e-3)


@pytest.mark.parametrize("refine", ["BlockRefineModifier", "DistillationModifier"])
def test_dense_streams_and_refiners_see_the_new_order(models: dict[str, Path], refine: str) -> None:
    fields = {"targets": [ALL], "block_size": 8, "iterations": 5, "objective": "hessian", "propagate": "matched"}
    entries = {"ChannelPermutationModifier": PERMUTE, "ARMORModifier": fields, refine: {}}
    with make_session(make_job(recipe(models["llama-gqa-tied"], **entries))) as session:
        results = session.run()
    assert len(session.section("rearrangements")) == 4
    assert all(result.stored_loss < 0.2 for result in results.values())
    assert all(min(row.losses) < 0.2 for row in session.section("refinements"))


def test_a_checkpoint_holds_all_that_was_permuted(models: dict[str, Path], tmp_path: Path) -> None:
    events: list[Event] = []
    mapping = recipe(
        models["qwen2-bias"],
        tmp_path / "out",
        ChannelPermutationModifier=PERMUTE,
        ARMORModifier={"targets": [r"re:.*down_proj$"], "block_size": 8, "iterations": 2},
    )
    result = apply(mapping, observer=events.append)
    saved = load_file(result.output / "model.safetensors")
    source = load_file(models["qwen2-bias"] / "model.safetensors")
    for part in ("v_proj", "o_proj"):
        name = f"model.layers.1.self_attn.{part}.weight"
        assert not torch.equal(saved[name], source[name])
        assert torch.equal(saved[name].flatten().sort().values, source[name].flatten().sort().values)
    bias = "model.layers.1.self_attn.v_proj.bias"
    assert not torch.equal(saved[bias], source[bias])
    rows = json.loads((result.output / "armor_manifest.json").read_text())["rearrangements"]
    assert [row["consumer"] for row in rows] == [row.consumer for row in result.rearrangements]
    assert len(rows) == 4
    assert rows[1] == {
        "modifier": "prune_stage.armor_modifiers.ChannelPermutationModifier",
        "consumer": "model.layers.0.mlp.down_proj",
        "producers": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
        "kept_before": result.rearrangements[1].kept_before,
        "kept_after": result.rearrangements[1].kept_after,
        "moved": result.rearrangements[1].moved,
        "order_sha256": result.rearrangements[1].order_sha256,
        "tokens": 60,
    }
    told = [event for event in events if isinstance(event, ChannelsReordered)]
    assert [event.module for event in told] == [row["consumer"] for row in rows]
    assert told[0].share < told[-1].share <= 1
    assert armor_recipes.load(result.output).config.model_type == "qwen2"


def test_equal_runs_write_equal_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    entries = {"ChannelPermutationModifier": PERMUTE, "NoWagModifier": {"targets": [ALL]}}
    one, two = (apply(recipe(models["llama"], tmp_path / name, **entries)).output for name in ("one", "two"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert json.loads((one / "armor_manifest.json").read_text())["rearrangements"]


# --- where channels mix ------------------------------------------------------------------------------------------------------


class _Mixed(nn.Module):
    """Gives each channel a factor of its own."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", torch.linspace(0.5, 2.0, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.scale, Tensor)
        return self.inner(x) * self.scale


def test_a_layer_that_is_another_function_is_refused_and_restored(models: dict[str, Path]) -> None:
    model = make_model("llama")
    assert isinstance(model, LlamaForCausalLM)
    mlp: Any = model.model.layers[1].mlp
    mlp.act_fn = _Mixed(mlp.act_fn, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    job = make_job(
        recipe(models["llama"], ChannelPermutationModifier={"targets": [r"re:.*layers\.1\.mlp\.down_proj$"]})
    )
    with make_session(job, model) as session, pytest.raises(PlanError) as error:
        session.run()
    message = str(error.value)
    assert "ChannelPermutationModifier: " in message
    assert (
        "between model.layers.1.mlp.gate_proj and model.layers.1.mlp.up_proj and model.layers.1.mlp.down_proj"
        in message
    )
    assert "something between them mixes or scales channels" in message
    assert "add 'model.layers.1.mlp.down_proj' to `ignore`" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert session.section("rearrangements") == []


@pytest.mark.parametrize(
    ("links", "heads"),
    [
        ({"down_proj": ["up_proj"]}, []),  # gate_proj keeps its order
        ({"o_proj": ["v_proj"]}, []),  # channels leave their heads
        ({"o_proj": ["k_proj"]}, ["o_proj"]),  # not what o_proj reads
    ],
)
def test_wrong_producers_are_refused_and_weights_restored(
    models: dict[str, Path], links: dict[str, list[str]], heads: list[str]
) -> None:
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (consumer,) = links
    fields = {"targets": [f"re:.*{consumer}$"], "producers": links, "within_heads": heads}
    job = make_job(recipe(models["llama"], ChannelPermutationModifier=fields))
    with (
        make_session(job, model) as session,
        pytest.raises(PlanError, match=rf"{consumer}.*The weights are as they were"),
    ):
        session.run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_producers_not_named_stay_and_are_told_apart(models: dict[str, Path]) -> None:
    found = plan(models["llama"], ChannelPermutationModifier={"targets": [MLP], "ignore": [r"re:.*(gate|up)_proj$"]})
    assert [row.chain.names for row in found.rearrangements] == [
        tuple(f"model.layers.{layer}.mlp.{part}_proj" for part in ("down", "gate", "up")) for layer in (0, 1)
    ]
    assert found.modules == ()
    assert found.takes("prune_stage.armor_modifiers.ChannelPermutationModifier")


# --- the plan ----------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no producers known": ({"targets": [r"re:.*q_proj$"]}, r"does not say what makes the inputs of .*q_proj.*`ignore`"),
    "no such producer": (
        {"producers": {"down_proj": ["gate"]}},
        r"mlp\.gate is to make the inputs of .*no such module",
    ),
    "no linear producer": ({"producers": {"down_proj": ["act_fn"]}}, r"it is a SiLU\w*; correct `producers`"),
    "rows that are not columns": (
        {"producers": {"down_proj": ["down_proj"]}},
        r"rows are not the consumer's columns",
    ),
    "rows that differ": ({"producers": {"down_proj": ["gate_proj", "down_proj"]}}, "differ in their rows"),
    "heads that do not fit": ({"targets": [r"re:.*o_proj$"], "head_dim": 12}, "heads of 12 channels do not fit"),
    "blocks that do not fit": ({"block_size": 24}, r"block_size 24 must be a multiple of 4 that divides"),
    "a head without groups": (
        {"targets": [r"re:.*o_proj$"], "pattern": "8:16"},
        "8:16 needs a multiple of 16 channels",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_the_plan_refuses(models: dict[str, Path], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(models["llama"], ChannelPermutationModifier={"targets": [r"re:.*down_proj$"], **fields})


def test_it_stands_first_in_its_stage(models: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match=r"NoWagModifier.*stands before it in prune_stage; move it to the front"):
        plan(models["llama"], NoWagModifier={"targets": [ALL]}, ChannelPermutationModifier=PERMUTE)


def test_what_an_earlier_stage_changed_is_refused(models: dict[str, Path]) -> None:
    mapping = recipe(models["llama"], NoWagModifier={"targets": [MLP]})
    mapping["later_stage"] = {"more_modifiers": {"ChannelPermutationModifier": PERMUTE}}
    with pytest.raises(PlanError, match=r"down_proj is changed by NoWagModifier in prune_stage, before it"):
        make_job(mapping)


def test_a_stage_of_its_own_will_do(models: dict[str, Path]) -> None:
    mapping = recipe(models["llama"], NoWagModifier={"targets": [MLP]})
    mapping = {key: value for key, value in mapping.items() if key != "prune_stage"} | {
        "first_stage": {"more_modifiers": {"ChannelPermutationModifier": PERMUTE}},
        "prune_stage": mapping["prune_stage"],
    }
    with make_session(make_job(mapping)) as session:
        assert len(session.run()) == 6
        assert len(session.section("rearrangements")) == 4


def test_no_channels_are_reordered_twice(models: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match=r"the columns of model\.layers\.0\.mlp\.down_proj are already reordered"):
        plan(models["llama"], ChannelPermutationModifier=PERMUTE, ChannelPermutationModifier__b=PERMUTE)


def test_the_cost_counts(models: dict[str, Path]) -> None:
    prune = {"NoWagModifier": {"targets": [ALL]}}
    without, found = plan(models["llama"], **prune), plan(models["llama"], ChannelPermutationModifier=PERMUTE, **prune)
    assert [row.flops for row in found.modules] == [row.flops for row in without.modules]
    job = make_job(recipe(models["llama"], ChannelPermutationModifier=PERMUTE, **prune))
    rates = Rates(0.0, 0.0, {"": 1e-3}, {}, {})
    estimate = estimate_run(job.plan, job.recipe, job.shapes, job.modifiers, rates=rates)
    permutes, prunes = estimate.cpu_seconds_by_entry.values()
    assert permutes / prunes == pytest.approx(
        sum(row.flops for row in found.rearrangements) / sum(row.flops for row in found.modules)
    )
    assert found.totals.bytes_after == without.totals.bytes_after
    assert len(found.to_dict()["rearrangements"]) == 4


# --- the modifier itself -----------------------------------------------------------------------------------------------------


def make(**fields: Any) -> ChannelPermutationModifier:
    assert modifiers()["ChannelPermutationModifier"] is ChannelPermutationModifier
    return ChannelPermutationModifier(ChannelPermutationConfig(targets=("Linear",), **fields))


@pytest.mark.parametrize("block", [4, 8, 64, 128])
def test_blocks_change_the_sequence_of_groups_alone(block: int) -> None:
    chain = Chain(ModuleShape("a.down_proj", 16, 64, 2), (ModuleShape("a.up_proj", 64, 16, 2),), None)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    plain, gathered = make(), make(block_size=block)
    statistic = plain.statistic(chain.consumer)
    statistic.update(torch.randn(9, 64, generator=torch.Generator().manual_seed(1)))
    assert gathered.plan(chain) == plain.plan(chain)
    one, two = (modifier.rearrange(chain, weight, statistic) for modifier in (plain, gathered))
    assert two.kept == pytest.approx(one.kept)
    assert sorted(two.columns.view(-1, 4).tolist()) == sorted(one.columns.view(-1, 4).tolist())
    assert torch.equal(two.columns, one.columns) == (block >= 64)


def test_the_longest_name_counts() -> None:
    modifier = make(producers={"down_proj": "up_proj", "shared.down_proj": ["shared.a", "b"]})
    assert modifier.producers("x.mlp.down_proj") == ("x.mlp.up_proj",)
    assert modifier.producers("x.shared.down_proj") == ("x.shared.a", "x.b")
    with pytest.raises(PlanError):
        modifier.producers("x.mydown_proj")


def test_heads_are_found() -> None:
    shapes = ModuleShape("a.o_proj", 24, 32, 2), (ModuleShape("a.v_proj", 16, 24, 2),)
    with pytest.raises(PlanError, match=r"tells no head size for a\.o_proj; set `head_dim`"):
        make().plan(Chain(*shapes, None))
    assert make(head_dim=8).plan(Chain(*shapes, None)) == make().plan(Chain(*shapes, 8))
    assert make().plan(Chain(*shapes, 8)).stored_bytes == 2 * (24 * 32 + 16 * 24)


@pytest.mark.parametrize(
    "fields",
    [
        {"producers": ["gate_proj"]},
        {"producers": {"o_proj": []}},
        {"producers": {"": ["x"]}},
        {"within_heads": [""]},
        {"sweeps": 0},
    ],
)
def test_what_a_recipe_may_not_say(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        make(**fields)
