"""Every kind of stack: encoders, decoders that look at them, towers, heads, layers that are called often or share weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armor_recipes.errors import PlanError
from armor_recipes.model.replay import feed
from armor_recipes.modifiers.nowag import NoWagModifier
from armor_recipes.session import Session
from tests.support.stacks import MODELS, inputs_for, make_stacked, session_on

#: Modules that are read and not called, or do not fit.
TIED = {"t5": "lm_head", "bart": "lm_head", "whisper": "proj_out", "albert": "predictions.decoder"}
IGNORED = {
    **{kind: [name] for kind, name in TIED.items()},
    "jamba": [r"re:.*dt_proj$", r"re:.*x_proj$"],
    "zamba2": [r"re:.*adapter.*", "lm_head"],
}
ARMORED: dict[str, Any] = {"targets": ["Linear"], "block_size": 4, "iterations": 2}
MATCHED: dict[str, Any] = {**ARMORED, "propagate": "matched"}
NOWAG: dict[str, Any] = {"targets": ["Linear"]}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The second moment that each module was solved with, in order."""
    found: dict[str, Tensor] = {}
    solve: Any = NoWagModifier.solve

    def solve_and_note(self: Any, module: Any, weight: Any, statistic: Any, progress: Any) -> Any:
        found[module.name] = statistic.value
        return solve(self, module, weight, statistic, progress)

    monkeypatch.setattr(NoWagModifier, "solve", solve_and_note)
    return found


def moments(
    model: nn.Module, tensors: dict[str, Tensor], names: list[str], kept: Any = lambda _, x: x, others: Any = ()
) -> dict[str, Tensor]:
    """By hand: mean squares of what the modules read, over all of their calls, in plain passes of two samples of one shape."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(kept(name, args[0]).detach().flatten(0, -2).clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for group in (tensors, *others):
            for start in range(0, len(next(iter(group.values()))), 2):
                feed(model, {name: tensor[start : start + 2] for name, tensor in group.items()})
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double().square().mean(0).float() for name, parts in seen.items() if parts}


def groups_of(session: Session) -> list[list[str]]:
    """The planned modules block by block, in the order in which the session came to them."""
    names: dict[int, list[str]] = {}
    layer = {row.name: row.layer for row in session.plan.modules}
    for name in session.results:
        names.setdefault(layer[name], []).append(name)
    return list(names.values())


def wanted(kind: str, session: Session, tensors: dict[str, Tensor], kept: Any = lambda _, x: x) -> dict[str, Tensor]:
    """What each block must have seen: all blocks before it compressed, none after."""
    model = make_stacked(kind)
    found: dict[str, Tensor] = {}
    for group in groups_of(session):
        found |= moments(model, tensors, group, kept)
        for name in group:
            model.get_parameter(f"{name}.weight").data.copy_(session.model.get_parameter(f"{name}.weight").data)
    return found


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=1e-4, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def options(kind: str, **more: Any) -> dict[str, Any]:
    return {**NOWAG, "ignore": IGNORED.get(kind, []), **more}


PASSES = {
    "albert": ["albert.encoder.albert_layer_groups"],
    "qwen3-vl": ["model.visual.deepstack_merger_list", "model.language_model.layers"],
}


@pytest.mark.parametrize("kind", sorted(set(MODELS) - {"zamba2"}))
def test_each_block_sees_the_model_compressed_so_far(kind: str, seen: dict[str, Tensor]) -> None:
    tensors = inputs_for(kind)
    with session_on(make_stacked(kind), tensors, NoWagModifier=options(kind)) as session:
        session.run()
    assert set(seen) == {row.name for row in session.plan.modules}
    assert_close(seen, wanted(kind, session, tensors))
    assert session.hooks.active == 0
    told = session.section("passes_of_the_whole_model")
    assert sorted(result.stack for result in told) == sorted(PASSES.get(kind, []))
    for result in told:  # of each of three batches one pass to count calls, and one for each block
        assert result.passes == 3 * (1 + result.blocks)
        assert "does not reproduce the model" in result.reason


@pytest.mark.parametrize("kind", ["t5", "clip", "qwen3-vl"])
def test_dense_statistics_are_those_of_the_dense_model(kind: str, seen: dict[str, Tensor]) -> None:
    tensors = inputs_for(kind)
    with session_on(make_stacked(kind), tensors, NoWagModifier=options(kind, propagate="dense")) as session:
        session.run()
    assert_close(seen, moments(make_stacked(kind), tensors, list(seen)))


# --- images of several sizes ------------------------------------------------------------------------------------------------


def of_two_sizes() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of Qwen3-VL: three samples of 4 by 4 patches, two of 4 by 6, which are more tokens of the same text."""
    small = {name: tensor[:3] for name, tensor in inputs_for("qwen3-vl").items()}
    large = {name: tensor[3:] for name, tensor in inputs_for("qwen3-vl").items()}
    large["pixel_values"] = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(3))
    large["image_grid_thw"] = torch.tensor([[1, 4, 6]] * 2)
    start, image, end = large["input_ids"][0, [1, 2, 6]].tolist()
    large["input_ids"][:, 1:9] = torch.tensor([start, *[image] * 6, end])
    large["mm_token_type_ids"] = (large["input_ids"] == image).long()
    return small, large


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_samples_of_several_shapes_are_batched_by_shape(propagate: str, seen: dict[str, Tensor]) -> None:
    small, large = of_two_sizes()
    entry = options("qwen3-vl", propagate=propagate)
    with session_on(make_stacked("qwen3-vl"), small, large, NoWagModifier=entry) as session:
        session.run()
    model = make_stacked("qwen3-vl")
    if propagate == "dense":
        assert_close(seen, moments(model, small, list(seen), others=[large]))
        return
    for group in groups_of(session):
        found = moments(model, small, group, others=[large])
        assert_close({name: seen[name] for name in group}, found)
        for name in group:
            model.get_parameter(f"{name}.weight").data.copy_(session.model.get_parameter(f"{name}.weight").data)


@pytest.mark.parametrize("refiner", ["BlockRefineModifier", "DistillationModifier"])
def test_factors_are_trained_on_samples_of_several_shapes(refiner: str) -> None:
    targets = [r"re:.*(visual\.blocks|language_model).*(qkv|q_proj|fc\d|up_proj)$"]
    entries = {"ARMORModifier": {**ARMORED, "targets": targets}, refiner: {"targets": targets, "epochs": 1}}
    with session_on(make_stacked("qwen3-vl"), *of_two_sizes(), **entries) as session:
        session.run()
    found = session.section("refinements")
    assert found
    assert all(result.losses[-1] <= result.losses[0] for result in found)


# --- weights that several layers share --------------------------------------------------------------------------------------

SHARED = "model.layers.1.shared_transformer.self_attn.q_proj"
AGAIN = SHARED.replace("layers.1", "layers.3")


def zamba(**chosen: Any) -> Session:
    """A session on Zamba2, whose shared block is planned where it is used first."""
    entries = {name: {"targets": ["Linear"], "ignore": IGNORED["zamba2"], **fields} for name, fields in chosen.items()}
    return session_on(make_stacked("zamba2"), inputs_for("zamba2"), **entries)


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_shared_weights_are_solved_once_on_all_their_uses(propagate: str, seen: dict[str, Tensor]) -> None:
    with zamba(NoWagModifier={"propagate": propagate}) as session:
        session.run()
    groups = groups_of(session)
    before = next(place for place, group in enumerate(groups) if SHARED in group)
    model = make_stacked("zamba2")
    for name in (name for group in groups[:before] for name in group) if propagate == "compressed" else ():
        model.get_parameter(f"{name}.weight").data.copy_(session.model.get_parameter(f"{name}.weight").data)
    uses = moments(model, inputs_for("zamba2"), [SHARED, AGAIN])
    torch.testing.assert_close(seen[SHARED], (uses[SHARED] + uses[AGAIN]) / 2, rtol=1e-4, atol=1e-9)
    assert list(session.results).count(SHARED) == 1
    assert session.results[SHARED].tokens == 2 * 50
    assert session.model.get_parameter(f"{AGAIN}.weight") is session.model.get_parameter(f"{SHARED}.weight")
    (told,) = session.section("passes_of_the_whole_model")
    assert told.reason == "its blocks share weights"
    (note,) = session.plan.notes
    assert note.startswith("blocks of model.layers share weights: its statistics come from passes of the whole model")


def test_a_shared_module_that_only_one_layer_calls_learns_from_that_layer(seen: dict[str, Tensor]) -> None:
    """Zamba2's layers hold each other's adapters, and read with their own what they read with the shared projection."""
    where = "model.layers.{}.shared_transformer.feed_forward.gate_up_proj{}"
    both, first, second = (where.format(1, part) for part in ("", "_adapter_list.0.0", "_adapter_list.1.0"))
    last = where.format(3, "_adapter_list.1.0")
    wanted = [r"re:.*gate_up_proj$", r"re:.*adapter_list\.\d\.0$"]
    with session_on(make_stacked("zamba2"), inputs_for("zamba2"), NoWagModifier={"targets": wanted}) as session:
        session.run()
    assert set(seen) == {both, first, second}
    by_hand = moments(make_stacked("zamba2"), inputs_for("zamba2"), [both, where.format(3, ""), first, last])
    assert_close({first: seen[first], last: seen[second]}, {name: by_hand[name] for name in (first, last)})
    torch.testing.assert_close(seen[both], (by_hand[both] + by_hand[where.format(3, "")]) / 2, rtol=1e-4, atol=1e-9)
    assert session.results[first].tokens == session.results[second].tokens == 50


def test_layers_that_share_weights_are_not_compared_by_themselves() -> None:
    wanted = r"ARMORModifier: the weight of .*shared.*used by several layers, and propagate: matched"
    with pytest.raises(PlanError, match=wanted):
        zamba(ARMORModifier=MATCHED).run()


# --- what calibration never reaches -----------------------------------------------------------------------------------------


def test_a_module_that_is_read_and_not_called_is_told_before_anything_long() -> None:
    session = session_on(
        make_stacked("jamba"), inputs_for("jamba"), NoWagModifier={**NOWAG, "ignore": [r"re:.*x_proj$"]}
    )
    wanted = r"NoWagModifier: model.layers.0.mamba.dt_proj is never called: the calibration inputs never reach it"
    with session, pytest.raises(PlanError, match=wanted):
        session.run()
    assert not session.results


def test_a_tower_without_images_is_told() -> None:
    ids = {"input_ids": inputs_for("bart")["input_ids"]}
    session = session_on(make_stacked("llava"), ids, NoWagModifier=NOWAG)
    with pytest.raises(PlanError, match=r"vision_tower.*never called.*\(with images.*\(and 13 more like it"):
        session.run()


# --- padding ----------------------------------------------------------------------------------------------------------------


def padded(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of an encoder and decoder or of one stack with masks, and boolean masks by what of the model they are for."""
    tensors = inputs_for(kind)
    read = torch.ones(5, 10, dtype=torch.long)
    for row, length in enumerate((10, 7, 4, 9, 1)):
        read[row, length:] = 0
    masks = {"read": read}
    if "decoder_input_ids" in tensors:
        tensors["decoder_input_ids"] = torch.cat([tensors["decoder_input_ids"], tensors["input_ids"][:, :3]], 1)
        masks["written"] = read.flip(0)
    tensors["attention_mask"] = read
    return {**tensors, **({"decoder_attention_mask": masks["written"]} if "written" in masks else {})}, masks


@pytest.mark.parametrize(
    ("kind", "modifier"),
    [("bart", "NoWagModifier"), ("t5", "SparseGPTModifier"), ("bert", "NoWagModifier"), ("llava", "NoWagModifier")],
)
def test_padding_is_no_token(kind: str, modifier: str, seen: dict[str, Tensor]) -> None:
    """Of encoder and decoder the masks have the same shape here, so that only the place tells which of them counts."""
    tensors, masks = padded(kind)
    ignore = [*IGNORED.get(kind, []), r"re:.*(pooler|vision|projector).*"]
    fields = {**NOWAG, "pattern": "2:4", "ignore": ignore, "propagate": "dense"}
    with session_on(make_stacked(kind), tensors, **{modifier: fields}) as session:
        session.run()

    def mask_of(name: str) -> Tensor:
        own = "decoder" in name and not re.search(r"(EncDecAttention|encoder_attn)\.(k|v)", name)
        return masks["written" if own and "written" in masks else "read"].bool()

    for name, result in session.results.items():
        assert result.tokens == int(mask_of(name).sum()), name
    place: dict[str, int] = {}

    def kept(name: str, x: Tensor) -> Tensor:
        place[name] = place.get(name, 0) + len(x)
        return x[mask_of(name)[place[name] - len(x) : place[name]]]

    if seen:
        assert_close(seen, moments(make_stacked(kind), tensors, list(seen), kept))


def test_a_mask_without_padding_changes_nothing(seen: dict[str, Tensor]) -> None:
    tensors = inputs_for("bart")
    found = []
    for more in ({}, {"attention_mask": torch.ones(5, 10, dtype=torch.long)}):
        with session_on(make_stacked("bart"), {**tensors, **more}, NoWagModifier=options("bart")) as session:
            session.run()
        found.append(dict(seen))
        seen.clear()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# --- what is trained, matched and weighed -----------------------------------------------------------------------------------------


def refined(kind: str, *refiners: str, tensors: dict[str, Tensor] | None = None, **fields: Any) -> Session:
    """A finished session with factors that refiners train."""
    armored = {**ARMORED, "ignore": [*IGNORED.get(kind, []), "classifier"], **fields}
    given = inputs_for(kind) if tensors is None else tensors
    with session_on(make_stacked(kind), given, ARMORModifier=armored, **{name: {} for name in refiners}) as session:
        session.run()
    return session


@pytest.mark.parametrize("kind", ["t5", "albert", "qwen3-vl", "swin"])
def test_every_block_is_trained_against_the_dense_one(kind: str) -> None:
    results = refined(kind, "BlockRefineModifier").section("refinements")
    assert len(results) == len({result.unit for result in results}) > 0
    for result in results:
        assert min(result.losses) <= result.losses[0]
        assert 0 < result.losses[0] < 1
    if kind == "albert":  # the tokens of three calls
        layer = next(result for result in results if "layer_groups" in result.unit)
        assert layer.tokens == 3 * 50


OUTPUTS = {"t5": "", "bert": "last_hidden_state", "clip": "image_embeds, text_embeds", "albert": ""}


@pytest.mark.parametrize("kind", sorted(OUTPUTS))
def test_a_whole_model_is_trained_on_what_it_gives(kind: str) -> None:
    (result,) = refined(kind, "DistillationModifier").section("refinements")
    assert result.outputs == OUTPUTS[kind]
    assert ("outputs" in result.to_dict()) == bool(OUTPUTS[kind])
    assert min(result.losses) <= result.losses[0]


def test_padding_counts_in_no_loss() -> None:
    """Whatever stands there: the results are the same."""
    tensors, masks = padded("bert")
    other = {**tensors, "input_ids": torch.where(masks["read"].bool(), tensors["input_ids"], 7)}
    found = [
        refined("bert", "BlockRefineModifier", "DistillationModifier", tensors=given) for given in (tensors, other)
    ]
    losses = [[result.losses for result in session.section("refinements")] for session in found]
    assert losses[0] == [pytest.approx(pair, rel=1e-4) for pair in losses[1]]
    assert found[0].section("refinements")[0].tokens == int(masks["read"].sum())


@pytest.mark.parametrize("kind", ["bart", "albert"])
def test_inputs_are_matched_with_the_dense_models(kind: str) -> None:
    session = refined(kind, **{name: value for name, value in MATCHED.items() if name != "targets"})
    assert set(session.results) == {row.name for row in session.plan.modules}
    assert all(result.stored_loss < 1 for result in session.results.values())


@pytest.mark.parametrize("kind", ["bart", "llava", "albert"])
def test_outputs_are_weighed_in_every_stack(kind: str) -> None:
    session = refined(kind, gradient_power=0.5)
    found = session.state.gradients
    assert set(found) == {row.name for row in session.plan.modules}
    assert all(bool(value.any()) for name, value in found.items() if not name.endswith(("k_proj.bias",)))


def test_without_logits_no_outputs_are_weighed() -> None:
    with pytest.raises(PlanError, match="a BertModel gives no logits"):
        refined("bert", gradient_power=0.5)
