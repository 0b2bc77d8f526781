from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from armor_recipes.calibration.inputs import InputSet, ModelInputs, Source
from armor_recipes.errors import InputError, NumericalError, ResourceError
from armor_recipes.evaluation import Measurement, Reading, Room
from armor_recipes.evaluation import room as rooms
from armor_recipes.evaluation.fidelity import Fidelity, divergences, likeness, matrices
from armor_recipes.recipe.schema import FidelitySpec
from tests.support.engine import make_model, rng_states

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6).map(lambda v: torch.tensor(v).view(2, 3))


def inputs(**tensors: Tensor) -> InputSet:
    count = len(next(iter(tensors.values())))
    return InputSet(tensors, "0" * 64, count, (Source("a", 0, 0, 0, count, count),), (0,) * count)


def fidelity(found: InputSet, **keys: Any) -> Fidelity:
    return Fidelity.read(FidelitySpec(dataset="a", **keys), Reading(None, ModelInputs(), lambda _: found))


def compared(measure: Fidelity, dense: nn.Module, other: nn.Module, folder: Path) -> Measurement:
    room = Room(folder)
    assert measure.before(dense, room) is None
    return measure.after(other, room)


def tiny(model: type[Any], config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(config).eval()


def shaken(model: nn.Module, size: float = 0.02) -> nn.Module:
    """The same model with noise on its weights."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


@given(LOGITS, LOGITS)
def test_divergence_is_at_least_0_and_what_its_definition_says(dense: Tensor, found: Tensor) -> None:
    kl = divergences(dense, found)
    p, q = (logits.double().log_softmax(-1) for logits in (dense, found))
    assert bool((kl >= 0).all())
    assert torch.allclose(kl, (p.exp() * (p - q)).sum(-1), atol=1e-12)
    assert divergences(dense, dense).tolist() == [0.0, 0.0]
    assert bool((divergences(dense, dense + 7.0) <= 1e-9).all())  # float32 rounds the sum


def test_divergence_by_hand_and_where_nothing_is_left_of_a_share() -> None:
    dense, found = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    expected = 1 / 4 * math.log((1 / 4) / (1 / 2)) + 3 / 4 * math.log((3 / 4) / (1 / 2))
    assert divergences(dense, found).item() == pytest.approx(expected, rel=1e-6)
    far = divergences(torch.tensor([[0.0, -2000.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, -2000.0]]))
    assert far.tolist() == pytest.approx([math.log(2), 1000 - math.log(2)])


@given(LOGITS, LOGITS)
def test_cosine_and_difference_are_in_their_ranges(dense: Tensor, found: Tensor) -> None:
    if not bool(dense.any()):
        dense = dense + 1
    rows = likeness(dense, found, logits=True)
    assert -1 <= rows.cosine <= 1
    assert rows.difference >= 0
    assert rows.agreement in (0.0, 0.5, 1.0)
    same = likeness(dense, dense.clone(), logits=True)
    assert (same.cosine, same.difference, same.agreement, same.divergence) == (pytest.approx(1), 0.0, 1.0, 0.0)
    flipped = likeness(dense, -dense)
    assert (flipped.cosine, flipped.difference) == (pytest.approx(-1), pytest.approx(2))


def test_by_hand() -> None:
    rows = likeness(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 0.0], [4.0, 0.0]]), logits=True)
    assert (rows.cosine, rows.difference) == (pytest.approx(9 / 25), pytest.approx(math.sqrt(32) / 5))
    assert rows.agreement == 0.5
    assert likeness(torch.ones(1, 3), torch.zeros(1, 3)).cosine == 0.0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_and_what_is_zero(broken: float) -> None:
    with pytest.raises(
        NumericalError, match="here: not all of the dense and the compressed model's outputs are finite"
    ):
        likeness(torch.ones(1, 2), torch.tensor([[1.0, broken]]), where="here")
    with pytest.raises(NumericalError, match="zero everywhere"):
        likeness(torch.zeros(1, 2), torch.ones(1, 2))


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, found = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    whole = likeness(dense, found, logits=True)
    monkeypatch.setattr("armor_recipes.evaluation.fidelity._AT_ONCE", 21)
    pieces = likeness(dense, found, logits=True)
    assert pieces.divergence == pytest.approx(whole.divergence)
    assert pieces.cosine == pytest.approx(whole.cosine)


def test_a_model_is_itself(tmp_path: Path) -> None:
    ids = torch.randint(96, (5, 7), generator=torch.Generator().manual_seed(0))
    model, before = make_model(), rng_states()
    found = compared(fidelity(inputs(input_ids=ids), batch_size=2), model, model, tmp_path)
    values = {value.name: value for value in found.values}
    assert [*values] == ["cosine", "relative_difference", "top1_agreement", "kl_divergence", "kl_divergence_p99"]
    assert values["cosine"].value == pytest.approx(1)
    assert [values[name].value for name in [*values][1:]] == [0.0, 1.0, 0.0, 0.0]
    assert values["kl_divergence"].interval == (0.0, 0.0)
    assert (found.samples, found.details) == (5, {"output": "logits", "positions": 35})
    assert rng_states() == before


def test_noise_shows_and_equal_runs_give_equal_bits(tmp_path: Path) -> None:
    ids = torch.randint(96, (4, 7), generator=torch.Generator().manual_seed(0))
    (tmp_path / "again").mkdir()
    measure = fidelity(inputs(input_ids=ids))
    found = compared(measure, make_model(), shaken(make_model()), tmp_path)
    assert 0 < found["kl_divergence"].value < 1
    assert found["cosine"].value < 1
    low, high = found["relative_difference"].interval or (0, 0)
    assert low < found["relative_difference"].value < high
    assert found == compared(measure, make_model(), shaken(make_model()), tmp_path / "again")


def test_padding_does_not_count(tmp_path: Path) -> None:
    """What stands in padded positions, and how many there are, changes no figure."""
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]])
    results = []
    for number, (batch, width) in enumerate(((ids, 6), (ids.where(mask.bool(), 0), 6), (ids, 4))):
        (folder := tmp_path / str(number)).mkdir()
        measure = fidelity(inputs(input_ids=batch[:, :width], attention_mask=mask[:, :width]))
        results.append(compared(measure, tiny(BertModel, config), shaken(tiny(BertModel, config)), folder))
    assert {found.details["positions"] for found in results} == {8}
    assert results[0].details["output"] == "last_hidden_state"
    for found in results[1:]:
        assert [v.value for v in found.values] == pytest.approx([v.value for v in results[0].values], rel=1e-5)


def test_a_sample_of_padding_alone_is_refused() -> None:
    with pytest.raises(InputError, match="attention_mask is zero everywhere"):
        fidelity(inputs(input_ids=torch.ones(2, 3), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])))


def test_encoder_and_decoder_and_images(tmp_path: Path) -> None:
    t5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    source = torch.arange(1, 11).view(2, 5)
    pairs = inputs(
        input_ids=source, decoder_input_ids=source[:, :3], decoder_attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]])
    )
    found = compared(
        fidelity(pairs), tiny(T5ForConditionalGeneration, t5), tiny(T5ForConditionalGeneration, t5), tmp_path
    )
    assert found.details == {"output": "logits", "positions": 5}
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vit = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    pixels = inputs(pixel_values=torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    model, other = tiny(ViTForImageClassification, vit), shaken(tiny(ViTForImageClassification, vit))
    found = compared(fidelity(pixels), model, other, tmp_path)
    assert found.details == {"output": "logits", "positions": 3}
    assert found["kl_divergence"].value > 0


class Outputs(nn.Module):
    """Gives what it is told to, whatever it reads."""

    def __init__(self, **outputs: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.outputs = outputs

    def forward(self, *, pixel_values: Tensor, return_dict: bool) -> SimpleNamespace:
        if pixel_values.shape[1] != 2:
            raise ValueError("two pixels each")
        return SimpleNamespace(**{name: tensor[: len(pixel_values)] for name, tensor in self.outputs.items()})


def test_which_output_is_compared(tmp_path: Path) -> None:
    pixels = inputs(pixel_values=torch.ones(2, 2))
    ones = torch.ones(2, 4)
    model = Outputs(text_embeds=ones, pooler_output=ones, other=ones, counts=ones.long())
    for asked, expected in ((None, "text_embeds"), ("other", "other")):
        assert compared(fidelity(pixels, output=asked), model, model, tmp_path).details["output"] == expected
    with pytest.raises(InputError, match="no output 'counts'; it gives text_embeds, pooler_output, other"):
        compared(fidelity(pixels, output="counts"), model, model, tmp_path)
    with pytest.raises(InputError, match="no tensor with a row for each sample"):
        compared(fidelity(pixels), Outputs(), Outputs(), tmp_path)


def test_a_model_that_refuses_its_inputs(tmp_path: Path) -> None:
    message = r"Outputs: its forward pass fails on pixel_values \(2, 3\) \(ValueError: two pixels each\)"
    with pytest.raises(InputError, match=message):
        compared(fidelity(inputs(pixel_values=torch.ones(2, 3))), Outputs(), Outputs(), tmp_path)


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms.shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * 5 * 7 * 96 - 1))
    measure = fidelity(inputs(input_ids=torch.ones(5, 7, dtype=torch.int64)))
    assert measure.dense_bytes(make_model()) == 4 * 5 * 7 * 96
    with pytest.raises(ResourceError, match=r"lower `samples` or `sequence_length` of evaluation.fidelity"):
        measure.before(make_model(), Room(tmp_path))


def test_outputs_of_other_shapes_and_matrices() -> None:
    with pytest.raises(NumericalError, match="must be equal"):
        matrices(torch.ones(2, 3), torch.ones(2, 4), None)
    cube = torch.arange(8.0).view(2, 2, 2)
    assert matrices(cube, cube, None)[0].shape == (1, 8)
