"""NaN and infinity, brought in at many places: the run ends with exit code 4 and names where they came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from armor_recipes.calibration.moment_range import MomentAndRange
from armor_recipes.calibration.ranges import InputRange
from armor_recipes.calibration.split import SplitGram
from armor_recipes.calibration.statistics import InputGram, InputSecondMoment, InputSize
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.errors import NumericalError
from armor_recipes.modifiers.block_refine.modifier import BlockRefineModifier
from armor_recipes.modifiers.distillation.modifier import DistillationModifier
from armor_recipes.modifiers.magnitude.modifier import MagnitudeModifier
from armor_recipes.run import job
from armor_recipes.session.gradients import GradientPass
from tests.support.commands import Shell
from tests.support.engine import ALL, ARMOR, MLP, SIZES, make_job, make_model, recipe
from tests.support.tokenizers import byte_tokenizer

BAD = [math.nan, math.inf, -math.inf]
PERPLEXITY = {"perplexity": {"dataset": "./letters.txt", "sequence_length": 32, "windows": 2}}
FIDELITY = {"fidelity": {"dataset": "builtin:random-tokens", "samples": 4, "sequence_length": 12}}
TRAINED: dict[str, Any] = {"epochs": 1, "held_out": 0.4}
LAST = "model.layers.1.mlp.down_proj"


def run(shell: Shell, folder: Path, evaluation: object = None, **modifiers: dict[str, Any]) -> str:
    """Run a recipe on the model in `folder/m`; it must fail as a numerical error and leave nothing in place."""
    mapping = recipe(folder / "m", folder / "out", **modifiers)
    if evaluation is not None:
        mapping["evaluation"] = evaluation
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(mapping, sort_keys=False))
    done = shell("armor-apply", file, "--quiet")
    assert done.code == 4, done.err
    assert not (folder / "out").exists()
    return done.err


def spoiled(folder: Path, change: Callable[[Any], None]) -> None:
    """A model whose numbers somebody has changed."""
    model = make_model()
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder / "m")


NORMS = ["input_layernorm", "post_attention_layernorm"]
UNTOUCHED = [f"model.layers.{layer}.{norm}" for layer in (0, 1) for norm in NORMS] + ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", UNTOUCHED)
def test_weights_that_the_recipe_leaves_alone(shell: Shell, tmp_path: Path, name: str, bad: float) -> None:
    spoiled(tmp_path, lambda model: model.get_parameter(f"{name}.weight").view(-1)[3].fill_(bad))
    told = run(shell, tmp_path, ARMORModifier={**ARMOR, "targets": [LAST]})
    assert f"the output of {name} is not finite before anything was changed" in told


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("bad", BAD)
def test_weights_that_it_takes(shell: Shell, tmp_path: Path, name: str, bad: float) -> None:
    spoiled(tmp_path, lambda model: model.get_parameter(f"model.layers.1.self_attn.{name}.weight")[5, 6].fill_(bad))
    assert f"hold numbers that are not finite: model.layers.1.self_attn.{name} (1); mend" in run(shell, tmp_path)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("name", "where"), [("model.norm", "model.norm"), ("lm_head", "lm_head"), ("model.layers.1.input_layernorm",) * 2]
)
@pytest.mark.parametrize(("measure", "of"), [(PERPLEXITY, "window"), (FIDELITY, "logits of a sample")])
def test_what_evaluation_measures(
    shell: Shell, tmp_path: Path, name: str, where: str, measure: object, of: str, bad: float
) -> None:
    spoiled(tmp_path, lambda model: model.get_parameter(f"{name}.weight").view(-1)[2].fill_(bad))
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 9)  # whose ids are below 96
    told = run(shell, tmp_path, measure)
    assert f"the output of {where} is the first that is not finite" in told
    assert of in told


def test_a_norm_that_spoils_all_logits_without_evaluation(shell: Shell, tmp_path: Path) -> None:
    spoiled(tmp_path, lambda model: model.model.norm.weight[0].fill_(torch.nan))
    assert "the output of model.norm in the compressed model is not finite on one sample" in run(shell, tmp_path)


def later_token(folder: Path) -> int:
    """A token of the calibration that its first sample does not have."""
    (spec,) = {entry.config.calibration for entry in make_job(recipe(folder)).recipe.modifiers}
    ids = build_tokens(spec, tokenizer=None, vocab_size=SIZES["vocab_size"]).ids
    return next(int(token) for token in ids[-1] if token not in ids[:4])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("targets", "where"),
    [([ALL], "model.layers.0.self_attn.q_proj"), ([LAST], "model.layers.0.input_layernorm")],
    ids=["a statistic of it", "a block that it passes"],
)
@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_activations_of_a_later_sample(
    shell: Shell, tmp_path: Path, targets: list[str], where: str, propagate: str, bad: float
) -> None:
    make_model().save_pretrained(tmp_path / "m")
    token = later_token(tmp_path / "m")
    spoiled(tmp_path, lambda model: model.model.embed_tokens.weight[token, 0].fill_(bad))
    told = run(shell, tmp_path, ARMORModifier={**ARMOR, "targets": targets, "propagate": propagate})
    # A dense stream passes the block as its inputs are looked at, and finds it first.
    passed = targets == [LAST] or propagate == "dense"
    assert f"of {'model.layers.0.input_layernorm' if passed else where} " in told
    assert "not finite" in told
    assert ("in batch 2 (from 0) of the calibration" in told) == passed


STATISTICS: list[Callable[[], Any]] = [
    lambda: InputSecondMoment("some.module", 8),
    lambda: InputSize("some.module", 8),
    lambda: InputGram("some.module", 8),
    lambda: SplitGram("some.module", 8),
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("make", STATISTICS, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("place", [(0, 0, 0), (3, 4, 7)])
def test_a_statistic(make: Callable[[], Any], place: tuple[int, int, int], bad: float) -> None:
    x = torch.ones(4, 5, 8)
    x[place] = bad
    statistic = make()
    for window in x:
        statistic.update(window[None])
    with pytest.raises(NumericalError, match=r"the inputs of some\.module are not finite .* in 1 of 8 channels"):
        _ = statistic.value


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize("moment", [False, True])
def test_a_range(call: int, bad: float, moment: bool) -> None:
    found = InputRange("some.module", 8)
    statistic = MomentAndRange(InputGram("some.module", 8), found) if moment else found
    for place in range(4):
        x = torch.ones(2, 8)
        x[1, 5] = bad if place == call else 2.0
        statistic.update(x)
    with pytest.raises(NumericalError, match=r"the inputs of some\.module are not finite in 1 of 4 calls"):
        found.extremes()


def test_gradients(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path / "m")
    add = GradientPass._add

    def spoil(self: GradientPass, name: str, gradient: Tensor) -> None:
        add(self, name, gradient * (math.inf if name == LAST else 1.0))

    monkeypatch.setattr(GradientPass, "_add", spoil)
    told = run(shell, tmp_path, ARMORModifier={**ARMOR, "gradient_power": 0.5})
    assert f"the gradients at the outputs of {LAST} are not finite" in told


@pytest.mark.parametrize(("kind", "unit"), [(BlockRefineModifier, "model.layers.0: "), (DistillationModifier, "")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("after", [0, 2])
def test_a_training_loss(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, unit: str, bad: float, after: int
) -> None:
    make_model().save_pretrained(tmp_path / "m")
    loss, calls = kind.loss, []

    def spoil(self: Any, found: Any, wanted: Any) -> Tensor:
        calls.append(1)
        value: Tensor = loss(self, found, wanted)
        return value * bad if len(calls) > after else value

    monkeypatch.setattr(kind, "loss", spoil)
    told = run(shell, tmp_path, ARMORModifier=ARMOR, **{kind.__name__: TRAINED})
    assert f"recipe.yaml:14: {kind.__name__}: {unit}a training loss is" in told


@pytest.mark.parametrize("bad", BAD)
def test_a_weight_that_a_modifier_gives(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    make_model().save_pretrained(tmp_path / "m")
    monkeypatch.setattr(MagnitudeModifier, "prune", lambda _, weight, __: (torch.full_like(weight, bad), {}))
    monkeypatch.setattr(MagnitudeModifier, "loss", lambda *_: 0.5)
    told = run(shell, tmp_path, MagnitudeModifier={"targets": [MLP]})
    assert "new numbers of model.layers.0.mlp.gate_proj.weight are not finite" in told


def test_a_loss_that_a_modifier_gives(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path / "m")
    monkeypatch.setattr(MagnitudeModifier, "loss", lambda *_: math.nan)
    assert "a loss of model.layers.0.mlp.gate_proj is nan" in run(shell, tmp_path, MagnitudeModifier={"targets": [MLP]})


def test_a_block_whose_new_weights_are_too_large(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite weights whose products are not: seen as the stream passes the block, and in the last one as the folder is verified."""
    make_model().save_pretrained(tmp_path / "m")
    monkeypatch.setattr(MagnitudeModifier, "prune", lambda _, weight, __: (torch.full_like(weight, 1e30), {}))
    monkeypatch.setattr(MagnitudeModifier, "loss", lambda *_: 0.5)
    first = run(shell, tmp_path, MagnitudeModifier={"targets": [r"re:.*layers\.[01]\.mlp\.(up|down)_proj"]})
    assert "the output of model.layers.0.mlp.down_proj is not finite in batch 0" in first or "the inputs of" in first
    last = run(shell, tmp_path, MagnitudeModifier={"targets": [r"re:.*layers\.1\.mlp\.(up|down)_proj"]})
    assert "the output of model.layers.1.mlp" in last
    assert "in the compressed model is not finite on one sample" in last
    assert "the weights, written in full, are kept in" in last or "what was written is complete and kept in" in last


def test_nothing_of_a_failed_step_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"
    make_model().save_pretrained(folder)
    monkeypatch.setattr(MagnitudeModifier, "loss", lambda *_: math.nan)
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NumericalError):
        job.apply(recipe(folder, tmp_path / "out", MagnitudeModifier={"targets": [MLP]}), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
