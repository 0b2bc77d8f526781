"""SmoothQuant by structure: the function stays on every architecture here, and activations lose their outliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import armor_recipes
from armor_recipes.errors import PlanError
from armor_recipes.modifiers import modifiers
from armor_recipes.session import Session
from armor_recipes.solver.smoothing import smoothing_scales
from tests.support.engine import ALL, ARMOR, make_job, make_model, make_session, recipe, save_model

CONFIG = modifiers()["SmoothQuantModifier"].config_type


def logits(model: Any) -> Tensor:
    found: Tensor = model(torch.arange(20).reshape(2, 10)).logits.detach()
    return found


def smoothed(folder: Path, kind: str, **fields: Any) -> tuple[Tensor, Session]:
    """The dense logits, and a session that has run."""
    source = save_model(folder / kind, kind, torch.float32)
    job = make_job(recipe(source, SmoothQuantModifier=fields))
    with torch.no_grad():
        dense = logits(make_model(kind, torch.float32))
        with make_session(job) as session:
            session.run()
    return dense, session


def test_scales_by_hand() -> None:
    weights = [torch.tensor([[1.0, -4.0, 0.0]]), torch.tensor([[0.5, 2.0, 0.0], [-2.0, 0.0, 0.0]])]
    spread = torch.tensor([16.0, 2.0, 9.0])
    assert smoothing_scales(spread, weights, strength=0.5).tolist() == pytest.approx([2.0, 0.5, 9.0])
    assert smoothing_scales(spread, weights, strength=1.0).tolist() == pytest.approx([16.0, 2.0, 9.0])
    assert smoothing_scales(torch.zeros(3), weights, strength=0.5).tolist() == pytest.approx([1e-5] * 3)
    with pytest.raises(ValueError, match=r"weights must be \(O, 2\), got \[\(1, 3\), \(2, 3\)\]"):
        smoothing_scales(torch.ones(2), weights, strength=0.5)


@pytest.mark.parametrize(
    ("kind", "readers"),
    [
        ("llama", {"input_layernorm": 3, "post_attention_layernorm": 2}),
        ("qwen2-bias", {"input_layernorm": 3, "post_attention_layernorm": 2}),
        ("gemma3", {"input_layernorm": 3, "pre_feedforward_layernorm": 2}),
        ("gpt-neox", {"input_layernorm": 1, "post_attention_layernorm": 1}),
        ("opt", {"self_attn_layer_norm": 3, "final_layer_norm": 1}),
    ],
)
def test_norms_and_who_reads_them_are_found(kind: str, readers: dict[str, int], tmp_path: Path) -> None:
    dense, session = smoothed(tmp_path, kind)
    found = {
        result.source.rsplit(".", 1)[-1]: len(result.readers) for result in session.state.results if not result.left
    }
    assert found == readers
    assert all(
        result.left == "no target reads its output"
        for result in session.state.results
        if result.source.rsplit(".", 1)[-1] not in readers
    )
    with torch.no_grad():
        torch.testing.assert_close(logits(session.model), dense, rtol=1e-4, atol=1e-4)
    plain = make_model(kind, torch.float32)
    changed = [n for n, p in session.model.named_parameters() if not torch.equal(p, plain.get_parameter(n))]
    assert len([name for name in changed if "norm" not in name]) == sum(readers.values()) * len(session.plan.layers)


def test_targets_and_ignore_choose_norms(tmp_path: Path) -> None:
    _, session = smoothed(tmp_path, "llama", targets=[r"re:.*q_proj$"], ignore=[r"re:.*layers\.0\.input_layernorm"])
    done = {result.source: result.readers for result in session.state.results if not result.left}
    where = "model.layers.1"
    assert done == {f"{where}.input_layernorm": tuple(f"{where}.self_attn.{p}_proj" for p in "qkv")}


def test_a_linear_module_may_be_smoothed_by_mappings(tmp_path: Path) -> None:
    dense, session = smoothed(tmp_path, "llama", mappings=[[[r"re:.*down_proj"], r"re:.*up_proj"]])
    assert [result.readers for result in session.state.results] == [
        (f"model.layers.{layer}.mlp.down_proj",) for layer in (0, 1)
    ]
    with torch.no_grad():
        torch.testing.assert_close(logits(session.model), dense, rtol=1e-4, atol=1e-4)


def test_mappings_that_change_the_function_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"SmoothQuantModifier: model.layers.0.input_layernorm: `mappings` cannot be smoothed"
    ):
        smoothed(tmp_path, "llama", mappings=[[[r"re:.*q_proj"], r"re:.*input_layernorm"]])
    with pytest.raises(PlanError, match="no module was found whose outputs"):
        smoothed(tmp_path, "llama", mappings=[[[r"re:.*q_proj"], r"re:.*no_such_norm"]])
    with pytest.raises(ValidationError):
        CONFIG(mappings=[[["re:.*q_proj"]]])


GROUPS = {"config_groups": {"all": {"weights": {"num_bits": 4, "group_size": 16}}}}
ATTENTION_INPUT = [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]


@pytest.mark.parametrize("modifier", ["SmoothQuantModifier", "AWQModifier"])
@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (
            [["re:.*down_proj"], "re:.*input_layernorm"],
            r"puts out 32 numbers, and model\.layers\.0\.mlp\.down_proj reads 64",
        ),
        ([["re:.*o_proj"], "re:.*self_attn$"], r"model\.layers\.0\.self_attn: .*it has layers in it"),
        ([["re:.*q_proj", "re:.*down_proj"], "re:.*input_layernorm"], r"puts out 32 numbers, and .*down_proj reads 64"),
        (
            [["re:.*gate_proj"], "re:.*nope"],
            r"\['re:\.\*gate_proj'\] could read: 're:\.\*nope' matches nothing inside of a layer",
        ),
        ([["re:.*nope"], "re:.*post_attention_layernorm"], r"found by \['re:\.\*nope'\], to read the outputs of"),
        ([["re:.*q_proj"], "re:.*embed_tokens"], r"'re:\.\*embed_tokens' matches nothing inside of a layer"),
    ],
    ids=str,
)
def test_pairs_that_do_not_fit_are_told_beside_one_that_does(
    tmp_path: Path, modifier: str, pair: list[Any], text: str
) -> None:
    after = {"QuantizationModifier": {"targets": [ALL], **GROUPS}} if modifier == "AWQModifier" else {}
    fields = {"mappings": [ATTENTION_INPUT, pair], **({"n_grid": 4} if after else {})}
    with pytest.raises(PlanError, match=text):
        armor_recipes.apply(recipe(save_model(tmp_path / "model"), tmp_path / "out", **{modifier: fields}, **after))


@pytest.mark.parametrize("pair", [[["re:("], "re:x"], [["re:x"], "re:("], [[], "re:x"]], ids=str)
def test_patterns_of_pairs_are_read_with_the_recipe(pair: list[Any]) -> None:
    with pytest.raises(ValidationError):
        CONFIG(mappings=[pair])


def test_it_comes_before_factors(llama: Path) -> None:
    with pytest.raises(PlanError, match=r"it changes a layer before others .* move it to the front"):
        make_job(recipe(llama, ARMORModifier=ARMOR, SmoothQuantModifier={}))
    assert make_job(recipe(llama, SmoothQuantModifier={}, ARMORModifier=ARMOR)).plan.modules
