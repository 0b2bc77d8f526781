"""The plan: exact bytes, and every reason to refuse, all at once."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BartConfig, MixtralConfig, T5Config

from armor_recipes.checkpoint.reader import inspect, read_header
from armor_recipes.errors import InputError, PlanError
from armor_recipes.plan import Plan, make_plan
from armor_recipes.plan.memory import anonymous_bytes, estimate_peak_bytes
from armor_recipes.run import apply
from armor_recipes.run.job import read_recipe
from tests.support.engine import ALL, ARMOR, ATTENTION, MLP, make_job, recipe, save_model

EDGE = "model.layers.0.mlp.down_proj"


def refusal(mapping: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as caught:
        make_job(mapping)
    return str(caught.value)


def armor(**fields: Any) -> dict[str, Any]:
    return {**ARMOR, **fields}


@pytest.mark.parametrize("block_size", [4, 16, [8, 32], "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_those_of_the_files(block_size: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "llama-gqa-tied", dtype)
    mapping = recipe(
        folder,
        tmp_path / "out",
        ARMORModifier=armor(targets=[ATTENTION], block_size=block_size),
        NoWagModifier={"targets": [MLP]},
    )
    mapping["prune_stage"]["armor_modifiers"]["ARMORModifier"]["ignore"] = ["re:.*k_proj$", "re:.*v_proj$"]
    result = apply(mapping)
    plan, found, header = result.plan, inspect(result.output), read_header(result.output)
    planned = {m.name: m for m in plan.modules}
    assert len(plan.ignored) == 4
    assert {name for name in planned if "attn" in name} == {layer.name for layer in found.layers}
    for layer in found.layers:
        module = planned[layer.name]
        assert (module.bytes_after, module.bytes_before) == (layer.nbytes, layer.dense_nbytes)
        assert module.block_size == layer.block_size
        assert module.blocks == (layer.shape[0] // layer.block_size[0], layer.shape[1] // layer.block_size[1])
        factors = sum(header[f"{layer.name}.{part}"].nbytes for part in ("armor_a", "armor_b"))
        assert module.factor_bytes == factors
        assert module.overhead_percent == pytest.approx(100 * factors / layer.dense_nbytes)
    for name in (name for name in planned if "mlp" in name):
        assert planned[name].bytes_after == header[f"{name}.weight"].nbytes == planned[name].bytes_before
        assert (planned[name].block_size, planned[name].blocks, planned[name].factor_bytes) == (None, None, 0)
    totals = plan.totals
    assert totals.bytes_after + totals.untouched_bytes == sum(info.nbytes for info in header.values())
    assert totals.bytes_before + totals.untouched_bytes == sum(i.nbytes for i in read_header(folder).values())
    assert totals.modules == len(plan.modules)


def test_rows_are_in_the_order_of_the_run(llama: Path) -> None:
    plan = make_job(recipe(llama, NoWagModifier={"targets": [MLP]}, ARMORModifier=armor(targets=[ATTENTION]))).plan
    assert [(m.layer, m.modifier.rsplit(".", 1)[-1]) for m in plan.modules] == [
        *[(0, "NoWagModifier")] * 3,
        *[(0, "ARMORModifier")] * 4,
        *[(1, "NoWagModifier")] * 3,
        *[(1, "ARMORModifier")] * 4,
    ]
    assert json.loads(json.dumps(plan.to_dict()))["modules"][0]["overhead_percent"] == 0


@pytest.mark.parametrize(
    ("target", "near"),
    [
        (r"re:.*self_atn\.q_proj$", "q_proj"),
        ("model.layers.0.mlp.downproj", "model.layers.0.mlp.down_proj"),
        ("re:q_proj$", "q_proj"),
        ("Conv1D", "model.layers"),
        ("re:^$", "model.layers"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(llama: Path, target: str, near: str) -> None:
    message = refusal(recipe(llama, ARMORModifier=armor(targets=[target])))
    assert f"target '{target}' matches no linear module" in message
    assert near in message.split("nearest: ")[1].split(". Correct")[0]


def test_of_each_kind_one_module_is_named(llama: Path) -> None:
    named = refusal(recipe(llama, ARMORModifier=armor(targets=[r"re:.*ffn\..*_proj$"])))
    names = named.split("nearest: ")[1].split(". Correct")[0].split(", ")
    assert sorted(name.rsplit(".", 1)[-1].removesuffix("_proj") for name in names) == [
        *("down", "gate", "k", "lm_head", "o", "q", "up", "v")
    ]


def test_one_dead_pattern_among_living_ones_is_an_error(llama: Path) -> None:
    assert "'re:.*nothing' matches no linear" in refusal(
        recipe(llama, ARMORModifier=armor(targets=[ALL, "re:.*nothing"]))
    )


def test_optional_may_match_nothing(llama: Path) -> None:
    mapping = recipe(llama, ARMORModifier=armor(), NoWagModifier={"targets": [r"re:.*experts.*"], "optional": True})
    assert {m.modifier.rsplit(".", 1)[-1] for m in make_job(mapping).plan.modules} == {"ARMORModifier"}


def test_a_block_that_does_not_divide_names_the_sizes_that_do(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "llama-gqa-tied")
    message = refusal(recipe(folder, ARMORModifier=armor(block_size=32)))
    assert "\n" not in message  # one line for k_proj and v_proj of both layers: 16x32
    for name in ("v_proj", "layers.0", "layers.1"):
        assert name in message
    assert "block_size 32 does not fit model.layers.0.self_attn.k_proj (16x32)" in message
    assert "sizes that fit both sides: [4, 8, 16]" in message
    assert "input side" not in message


@pytest.mark.parametrize("block_size", [3, 64, [8, 6], [48, 8]])
def test_block_sizes_that_do_not_fit(llama: Path, block_size: Any) -> None:
    assert "does not fit model.layers.0." in refusal(recipe(llama, ARMORModifier=armor(block_size=block_size)))


@pytest.mark.parametrize("fields", [{"block_size": 2}, {"pattern": "1:4"}, {"pattern": "8:16", "block_size": [8, 4]}])
def test_what_cannot_be_packed_is_planned_and_stored_dense(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = save_model(tmp_path / "m", "llama")
    armors = {"ARMORModifier": armor(targets=[ATTENTION], **fields), "ARMORModifier__b": armor(targets=[MLP])}
    result = apply(recipe(folder, tmp_path / "out", **armors))
    header = read_header(result.output)
    for module in result.plan.modules:
        packed = "mlp" in module.name
        assert module.stored_as == ("packed" if packed else "dense")
        assert (result.modules[module.name].packed is not None) == packed
        assert module.block_size is not None
        if not packed:
            assert module.factor_bytes == 0
            assert module.bytes_after == module.bytes_before == header[f"{module.name}.weight"].nbytes
    assert {row["stored_as"] for row in result.plan.to_dict()["modules"]} == {"packed", "dense"}
    card = (result.output / "README.md").read_text()
    assert (
        "8 of these weights are stored as the dense product `A · S · B`: their factors are not in the checkpoint"
        in card
    )
    assert ", ".join(sorted({"2:4", fields.get("pattern", "2:4")})) in card


def test_a_pattern_that_does_not_fit_is_refused_with_the_module(llama: Path) -> None:
    message = refusal(recipe(llama, ARMORModifier=armor(pattern="2:6")))
    assert "pattern 2:6 needs rows of a multiple of 6 entries, model.layers.0." in message
    assert "to `ignore`" in message
    message = refusal(recipe(llama, ARMORModifier=armor(pattern="4:8", block_size=[8, 4], solver="adam")))
    assert "block_size (8, 4) does not fit" in message
    assert "(adam needs multiples of 8)" in message


def test_the_language_model_head_is_a_block_of_its_own(llama: Path) -> None:
    plan = make_job(recipe(llama, ARMORModifier=armor(targets=["Linear"]))).plan
    assert [(row.name, row.layer) for row in plan.modules][-1] == ("lm_head", 2)
    assert plan.layers == ("model.layers.0", "model.layers.1", "lm_head")
    plan = make_job(recipe(llama, ARMORModifier=armor(targets=["Linear"], ignore=["lm_head"]))).plan
    assert (len(plan.modules), plan.ignored) == (14, ("lm_head",))
    assert plan.layers == ("model.layers.0", "model.layers.1")


def test_a_pattern_on_something_with_other_weights_is_refused(llama: Path) -> None:
    message = refusal(recipe(llama, ARMORModifier=armor(targets=[r"re:.*(up_proj|norm|embed_tokens)$"])))
    assert "model.embed_tokens (Embedding)" in message
    assert "narrow the pattern" in message


def test_containers_may_be_matched_along_the_way(llama: Path) -> None:
    plan = make_job(recipe(llama, ARMORModifier=armor(targets=[r"re:.*mlp.*"]))).plan
    assert len(plan.modules) == 6


def test_ignore_that_holds_everything_back_is_refused(llama: Path) -> None:
    message = refusal(recipe(llama, ARMORModifier=armor(targets=[MLP], ignore=["re:.*mlp.*"])))
    assert "`ignore` holds back all 6 modules" in message
    assert make_job(
        recipe(llama, ARMORModifier=armor(targets=[MLP], ignore=["re:.*mlp.*"], optional=True))
    ).plan.ignored


def test_two_pruning_modifiers_on_one_module_are_refused(llama: Path) -> None:
    message = refusal(
        recipe(llama, ARMORModifier=armor(), NoWagModifier={"targets": [r"re:.*layers\.0\.mlp\.up_proj$"]})
    )
    assert "model.layers.0.mlp.up_proj is already taken by ARMORModifier" in message
    assert "both prune" in message
    message = refusal(recipe(llama, ARMORModifier=armor(targets=[MLP]), ARMORModifier__more=armor(targets=[MLP])))
    assert message.count("already taken by ARMORModifier") == 6


def test_dense_inputs_are_gone_in_a_later_stage(llama: Path) -> None:
    mapping = recipe(llama, ARMORModifier=armor(targets=[ATTENTION]))
    mapping["late_stage"] = {"armor_modifiers": {"NoWagModifier": {"targets": [MLP], "propagate": "dense"}}}
    message = refusal(mapping)
    assert "NoWagModifier: propagate: dense needs the original model" in message
    assert "put the modifier into prune_stage" in message


def test_all_problems_are_told_at_once(llama: Path) -> None:
    mapping = recipe(
        llama,
        ARMORModifier=armor(targets=["re:.*upp_proj"]),
        ARMORModifier__b=armor(targets=[MLP], block_size=48),
        NoWagModifier={"targets": ["Linear"]},
        NoWagModifier__b={"targets": [ATTENTION]},
    )
    lines = refusal(mapping).splitlines()
    wanted = ("matches no linear", "block_size 48", "already taken by NoWagModifier")
    for part in wanted:
        assert any(part in line for line in lines), part
    assert all(line.startswith("<") or ":" in line for line in lines)


@pytest.fixture
def tied() -> Any:
    """Two layers with one weight `q`, one of them also that of an embedding, and a module that stands in both."""
    model: Any = type("Tiny", (nn.Module,), {})()
    parts = ("q", "k", "v")
    layer = type("Layer", (nn.ModuleDict,), {"forward": lambda self, x: self["v"](self["k"](self["q"](x)))})
    model.layers = nn.ModuleList(layer({n: nn.Linear(16, 16) for n in parts}) for _ in range(2))
    first, second = model.layers
    second["q"].weight = first["q"].weight
    second["k"] = first["k"]
    model.embed = nn.Embedding(16, 16)
    model.embed.weight = second["v"].weight
    return model


def planned(llama: Path, model: Any, **fields: Any) -> Plan:
    mapping = recipe(llama, ARMORModifier=armor(**fields))
    return make_plan(read_recipe(mapping), model, make_job(recipe(llama, ARMORModifier=ARMOR)).modifiers, itemsize=2)


def test_a_weight_of_several_layers_is_planned_once(llama: Path, tied: Any) -> None:
    plan = planned(llama, tied, targets=["re:layers.*[qk]$"])
    assert [(row.name, row.layer, row.uses) for row in plan.modules] == [
        ("layers.0.q", 0, ("layers.1.q",)),
        ("layers.0.k", 0, ("layers.1.k",)),
    ]
    assert plan.totals.bytes_before == 2 * 2 * 16 * 16
    assert plan.to_dict()["modules"][0]["uses"] == ("layers.1.q",)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"targets": [r"re:layers\.1.*q$"]},
            "layers.1.q is tied to layers.0.q (Linear), which `targets` does not match",
        ),
        ({"targets": ["layers.0.k"]}, "layers.0.k is tied to layers.1.k (Linear), which `targets` does not match"),
        (
            {"targets": ["re:layers.*q$"], "ignore": ["layers.1.q"]},
            "layers.0.q is tied to layers.1.q (Linear), which `ignore` holds back",
        ),
        ({"targets": ["re:layers.*v$"]}, "layers.1.v is tied to embed (Embedding);"),
    ],
)
def test_a_weight_is_never_changed_for_a_module_that_is_not_to_change(
    llama: Path, tied: Any, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PlanError) as caught:
        planned(llama, tied, **fields)
    assert f"the weight of {reason}" in str(caught.value)


def test_planning_reads_no_weights(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    assert len(make_job(recipe(tmp_path)).plan.modules) == 14


@pytest.mark.parametrize(
    ("config", "lists"),
    [
        (T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), ("encoder.block", "decoder.block")),
        (
            BartConfig(
                **{f"{part}_{field}": 4 for part in ("encoder", "decoder") for field in ("attention_heads", "ffn_dim")},
                architectures=["BartForConditionalGeneration"],
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
            ),
            ("model.encoder.layers", "model.decoder.layers"),
        ),
    ],
    ids=["t5", "bart"],
)
def test_layers_of_an_encoder_are_numbered_before_the_decoders(
    config: Any, lists: tuple[str, str], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    targets = [r"re:.*(encoder|decoder)\..*(q|q_proj)$"]
    mapping = recipe(tmp_path, ARMORModifier=armor(targets=targets))
    plan = make_job(mapping).plan
    assert plan.layers == tuple(f"{name}.{index}" for name in lists for index in range(2))
    assert sorted({row.layer for row in plan.modules}) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "many"},
        {"num_attention_heads": 5},
        {"hidden_act": "none of these"},
        {"model_type": "unheard of"},
        {"hidden_size": [1]},
    ],
)
def test_a_configuration_that_makes_no_model_is_an_input_error(llama: Path, tmp_path: Path, change: Any) -> None:
    config = {**json.loads((llama / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be read"):
        make_job(recipe(tmp_path))


def test_windows_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "opt")
    mapping = recipe(folder, ARMORModifier=armor(targets=[r"re:.*\.fc[12]$"]))
    mapping["calibration"]["sequence_length"] = 64
    assert len(make_job(mapping).plan.modules) == 4
    mapping["calibration"]["sequence_length"] = 65
    mapping["evaluation"] = {"perplexity": {"dataset": "builtin:pydoc-heldout", "sequence_length": 66}}
    *lines, text = refusal(mapping).splitlines()
    assert [line.split("; ")[0].split(": ", 1)[1] for line in lines] == [
        f"ARMORModifier: calibration: sequence_length 65 is longer than the 64 positions of {folder}",
        f"sequence_length 66 is longer than the 64 positions of {folder}",
    ]
    assert text.startswith("the model has no tokenizer")


def test_experts_become_linear_where_the_recipe_takes_them(tmp_path: Path) -> None:
    MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=2,
    ).save_pretrained(tmp_path)
    mapping = recipe(tmp_path, ARMORModifier=armor(targets=[ATTENTION]))
    assert make_job(mapping).plan.forms == ()
    job = make_job(recipe(tmp_path, ARMORModifier=armor(targets=[r"re:.*experts\.\d+\..*_proj$"])))
    assert job.plan.forms == ("model.layers.0.mlp.experts",)
    assert [row.name.split("experts.")[1] for row in job.plan.modules] == [
        f"{number}.{part}_proj" for number in range(2) for part in ("gate", "up", "down")
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_config_without_a_dtype_is_stored_as_its_weights_are(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", dtype=dtype)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert make_job(recipe(folder)).source.stored_dtype is dtype


def test_memory_counts_every_set_of_activations(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models' where modules are matched, and what the dense layer read; both models' for a refiner of layers, too."""
    monkeypatch.setattr("armor_recipes.plan.memory.anonymous_bytes", lambda: 0)

    def peak(samples: int, propagate: str, **others: Any) -> int:
        modifier = armor(propagate=propagate, objective="hessian", shrinkage=0.1)
        mapping = recipe(llama, ARMORModifier=modifier, **others)
        mapping["calibration"] |= {"samples": samples, "sequence_length": 30}
        return make_job(mapping).estimate.peak_bytes

    def sets(propagate: str, **others: Any) -> float:
        return (peak(128, propagate, **others) - peak(64, propagate, **others)) / (4 * 32 * 64 * 30)

    for others, expected in (({}, 1), ({"DistillationModifier": {}}, 1), ({"BlockRefineModifier": {}}, 2)):
        assert sets("dense", **others) == sets("compressed", **others) == expected
        assert sets("matched", **others) == 3


def test_memory_counts_the_parts_of_a_training_that_are_computed_at_once(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("armor_recipes.plan.memory.anonymous_bytes", lambda: 0)
    few = {"samples": 1, "batch_size": 1}  # the passes before the training take less than it
    mapping = recipe(llama, ARMORModifier=armor(calibration=few), DistillationModifier={"accumulate": 1})
    mapping["calibration"] |= {"samples": 8, "sequence_length": 512, "batch_size": 3}
    before, peaks, plans = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            job = make_job(mapping)
            peaks.append(job.estimate.peak_bytes)
            plans.append(job.plan)
    finally:
        torch.set_num_threads(before)
    (row,) = plans[0].refinements
    assert row.side_by_side == (row.parts, row.part_bytes) == (3, row.part_bytes)
    assert [more - less for less, more in pairwise(peaks)] == [row.part_bytes, row.part_bytes, 0]
    assert row.part_bytes > 512 * 12 * 96  # the logits'
    assert set(plans) == {plans[0]}


def test_memory_counts_the_logits_that_verification_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a vocabulary of 262,144 tokens, both models' for 512 tokens are 1.07 GB."""
    monkeypatch.setattr("armor_recipes.plan.memory.anonymous_bytes", lambda: 0)
    model = torch.nn.Linear(8, 8)
    model.config, model.get_output_embeddings = SimpleNamespace(hidden_size=8), lambda: torch.nn.Embedding(262_144, 1)  # type: ignore[assignment]
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert estimate_peak_bytes(model, 0, solve_bytes=0, probe=512) == 3 * weights + 2 * 4 * 512 * 262_144


def test_the_estimate_takes_the_text_part_of_a_composite_config() -> None:
    class Composite:
        hidden_size = None

        def get_text_config(self) -> SimpleNamespace:
            return SimpleNamespace(hidden_size=64)

    model, plain = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.config, plain.config = Composite(), SimpleNamespace(hidden_size=64)  # type: ignore[assignment]
    sizes = [estimate_peak_bytes(m, 10**9, solve_bytes=0) - anonymous_bytes() for m in (model, plain)]
    assert sizes[0] == pytest.approx(sizes[1], abs=2**24)
    assert sizes[0] > 4 * 64 * 10**9 - 2**24
