"""Gradients at the outputs of modules, held against autograd by hand, and what the engine does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armor_recipes.errors import NumericalError
from armor_recipes.model.blocks import find_stacks
from armor_recipes.modifiers.base import WithGradients
from armor_recipes.modifiers.seeding import module_seed
from armor_recipes.session.gradients import output_gradients
from armor_recipes.solver.normalize import gradient_row_weights
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
    rng_states,
    save_model,
)
from tests.support.stacks import make_stacked

WEIGHED = {**ARMOR, "gradient_power": 0.5}
LINEAR = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(SIZES["vocab_size"], (2, 10), generator=generator) for _ in range(count)]


def gradients(
    model: nn.Module,
    names: list[str],
    ids: list[Tensor],
    seed: int = 0,
    uses: dict[str, tuple[str, ...]] | None = None,
) -> dict[str, Tensor]:
    found = output_gradients(
        model,
        [find_stacks(model).names[0]],
        {name: (name, *(uses or {}).get(name, ())) for name in names},
        [{"input_ids": batch} for batch in ids],
        seed=seed,
    )
    return {name: found.mean_square(name, len(model.get_parameter(f"{name}.weight"))) for name in names}


def by_hand(model: nn.Module, names: list[str], ids: list[Tensor], seed: int) -> dict[str, Tensor]:
    """Mean squares of `output.grad` of a plain cross-entropy on labels drawn by inverting the distribution function."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in names}
    for index, batch in enumerate(ids):
        outputs: dict[str, Tensor] = {}

        def keep(name: str, outputs: dict[str, Tensor] = outputs) -> Any:
            return lambda _, __, out: (out.retain_grad(), outputs.__setitem__(name, out))[0]

        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        logits = model(input_ids=batch, use_cache=False).logits.flatten(0, 1)
        generator = torch.Generator().manual_seed(module_seed(seed, f"labels of batch {index}"))
        u = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
        probabilities = logits.detach().double().softmax(-1)
        labels = torch.searchsorted(probabilities.cumsum(-1), u).squeeze(-1)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for name, output in outputs.items():
            assert output.grad is not None
            sums[name] = sums[name] + output.grad.double().square().sum((0, 1))
    model.zero_grad()
    return {name: (total / sum(b.numel() for b in ids)).float() for name, total in sums.items()}


def test_a_weight_of_several_modules_has_the_gradients_at_all_of_them() -> None:
    model = make_stacked("zamba2")
    shared, again = (f"model.layers.{layer}.shared_transformer.self_attn.q_proj" for layer in (1, 3))
    apart = by_hand(model, [shared, again], batches(), 0)
    found = gradients(model, [shared], batches(), uses={shared: (again,)})
    torch.testing.assert_close(found[shared], (apart[shared] + apart[again]) / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["llama", "llama-gqa-tied", "qwen2-sliding"])
def test_they_are_those_of_a_plain_backward_pass(kind: str) -> None:
    model, ids = make_model(kind), batches()
    found = gradients(model, LINEAR, ids, seed=3)
    wanted = by_hand(model, LINEAR, ids, seed=3)
    for name in LINEAR:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=0)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_family_has_them_and_is_left_as_it_was(kind: str) -> None:
    model = make_model(kind)
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and "layers." in name]
    states, wanted = rng_states(), [p.requires_grad for p in model.parameters()]
    found = gradients(model, names, batches(1))
    assert all(bool((found[name] > 0).any()) for name in names)
    assert rng_states() == states
    assert hook_count(model) == 0
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())


def test_bits_depend_on_the_seed_and_not_on_threads() -> None:
    model, found = make_model(), []
    for threads, seed in ((1, 0), (3, 0), (1, 1)):
        torch.set_num_threads(threads)
        found.append(gradients(model, LINEAR, batches(4), seed))
    torch.set_num_threads(1)
    assert all(torch.equal(found[0][name], found[1][name]) for name in LINEAR)
    assert not any(torch.equal(found[0][name], found[2][name]) for name in LINEAR)


class _Skipping(nn.Module):
    """A layer's MLP that does not use what its module makes, makes it of a constant, or calls it never."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.reads = inner, "input"

    def forward(self, x: Tensor) -> Tensor:
        if self.reads:
            self.inner(x if self.reads == "input" else torch.ones_like(x))
        return x


def test_outputs_that_reach_nothing_have_none_and_modules_not_called_are_an_error() -> None:
    model = make_model()
    layer = model.get_submodule("model.layers.0")
    layer.mlp = _Skipping(nn.Linear(32, 16, bias=False))
    name = "model.layers.0.mlp.inner"
    for reads in ("input", "a constant"):
        layer.mlp.reads = reads
        assert torch.equal(gradients(model, [name], batches(1))[name], torch.zeros(16))
    layer.mlp.reads = ""
    with pytest.raises(NumericalError, match=r"no calibration token reached model\.layers\.0\.mlp\.inner"):
        gradients(model, [name], batches(1))


def test_gradients_that_are_not_finite_are_an_error() -> None:
    model = make_model()
    model.get_parameter("lm_head.weight").data[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"gradients at the outputs of model\.layers\.0\.self_attn\.q_proj"):
        gradients(model, LINEAR, batches(1))


def test_the_engine_says_where(tmp_path: Path) -> None:
    session = make_session(make_job(recipe(save_model(tmp_path / "m"), ARMORModifier=WEIGHED)))
    session.model.get_parameter("lm_head.weight").data[0, 0] = float("inf")
    with (
        session,
        pytest.raises(NumericalError, match=r"ARMORModifier: the gradients at the outputs of model\.layers\.0"),
    ):
        session.run()


def solved_with(monkeypatch: pytest.MonkeyPatch, mapping: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """The row weights that each solve was given, by module, and the finished session."""
    from armor_recipes.modifiers.armor import modifier as module

    session, given = make_session(make_job(mapping)), {}
    real = module.factorize

    def factorize(weight: Tensor, *args: Any, row_weights: Tensor | None = None, **options: Any) -> Any:
        name = next(n for n, p in dense.items() if p.shape == weight.shape and torch.equal(p, weight))
        given[name] = row_weights
        return real(weight, *args, row_weights=row_weights, **options)

    dense = {name: value.detach().clone() for name, value in session.model.named_parameters()}
    monkeypatch.setattr(module, "factorize", factorize)
    with session:
        session.run()
    return given, session


def test_the_engine_takes_them_from_the_model_as_the_stage_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "m")
    mapping = recipe(
        folder,
        ARMORModifier__attention={**WEIGHED, "targets": [ATTENTION]},
        ARMORModifier__mlp={**ARMOR, "targets": [MLP]},
    )
    given, session = solved_with(monkeypatch, mapping)
    dense = make_session(make_job(mapping)).model
    names = [m.name for m in session.plan.modules if "self_attn" in m.name]
    ids = next(iter(session.tokens.values())).ids
    wanted = gradients(dense, names, list(ids.split(2)), seed=0)
    assert {name.removesuffix(".weight") for name, found in given.items() if found is not None} == set(names)
    for name in names:
        weights, _ = gradient_row_weights(dense.get_parameter(f"{name}.weight"), wanted[name], 0.5)
        assert torch.equal(given[f"{name}.weight"], weights)


def test_they_follow_rows_that_are_reordered(tmp_path: Path) -> None:
    """Reordered channels leave the model's function, so the gradients of the reordered model are the old ones reordered."""
    mapping = recipe(
        save_model(tmp_path / "m"),
        ChannelPermutationModifier={"targets": [r"re:.*mlp\.down_proj$"], "propagate": "dense"},
        ARMORModifier={**WEIGHED, "targets": [ALL]},
    )
    with make_session(make_job(mapping)) as session:
        session.run()
        kept = dict(session.state.gradients)
    del mapping["prune_stage"]["armor_modifiers"]["ARMORModifier"]
    with make_session(make_job(mapping)) as reordered:
        reordered.run()
    assert any(row.moved for row in reordered.section("rearrangements"))
    ids = next(iter(reordered.tokens.values())).ids
    wanted = gradients(reordered.model, sorted(kept), list(ids.split(2)))
    for name, found in kept.items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-3, atol=0)


def test_modules_that_share_a_factor_are_weighed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from armor_recipes.modifiers.armor import ARMORModifier

    seen: list[tuple[int, ...]] = []
    real = ARMORModifier.solve

    def solve(self: Any, module: Any, weight: Any, statistic: Any, progress: Any) -> Any:
        assert isinstance(statistic, WithGradients)
        seen.append((weight.shape[0], *statistic.gradients.shape))
        return real(self, module, weight, statistic, progress)

    monkeypatch.setattr(ARMORModifier, "solve", solve)
    with make_session(
        make_job(recipe(save_model(tmp_path / "m"), ARMORModifier={**WEIGHED, "share_input_factor": True}))
    ) as session:
        results = session.run()
    assert sorted(set(seen)) == [(32, 32), (96, 96), (128, 128)]
    assert all(result.stored_loss < result.losses[0] for result in results.values())
