"""What every refiner keeps to: the best held-out state stays, masks and all else stay, and bits depend on the inputs alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from armor_recipes.errors import CheckpointError, NumericalError, PlanError
from armor_recipes.model.calls import LayerCall
from armor_recipes.modifiers import ModuleShape, Refiner, RefineTask, RefineUnit, UnitOutput, modifiers, training
from armor_recipes.modifiers.distillation import DistillationModifier
from armor_recipes.modifiers.distillation import modifier as distillation
from armor_recipes.modifiers.distillation.modifier import relative_error
from armor_recipes.modifiers.kinds import refiner
from armor_recipes.modifiers.kinds.refiner import _converted
from armor_recipes.modifiers.optimizers import root_mean_square
from armor_recipes.modifiers.training import RefineConfig, schedule, split_batches
from armor_recipes.session import Session
from armor_recipes.solver import TrainableFactors, factorize
from tests.support.engine import ALL, ARMOR, core, make_job, make_model, make_session, recipe, rng_states, save_model

REFINERS = {name: kind for name, kind in modifiers().items() if issubclass(kind, Refiner)}
#: Learns on the problem below within a few epochs.
FAST = {"learning_rate": 0.01, "held_out": 0.25, "accumulate": 1, "core": True}


@pytest.fixture(params=REFINERS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(params=["adam", "muon"])
def make(name: str, request: pytest.FixtureRequest) -> Callable[..., Refiner[Any]]:
    faster = {"learning_rate": 0.017} if request.param == "muon" else {}  # its steps are half as long, and lag at first
    common = {**FAST, "optimizer": request.param, **faster}
    return lambda **fields: REFINERS[name](REFINERS[name].config_type(**{**common, **fields}))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Problem:
    """One pruned linear map and a scale after it, against the dense map."""

    task: RefineTask
    factors: TrainableFactors
    scale: nn.Parameter

    def state(self) -> list[Tensor]:
        """A copy of all that may be trained."""
        return [p.detach().clone() for p in (self.factors.a, self.factors.core, self.factors.b, self.scale)]

    def loss(self, refiner: Any, batches: list[int]) -> float:
        """Mean loss of some batches."""
        with torch.no_grad():
            values = [float(refiner.loss(self.task.forward(i), self.task.target(i))) for i in batches]
        return sum(values) / len(values)


def problem(
    *, batches: int = 8, windows: int = 2, rows: int = 20, side: int = 16, parts: Sequence[slice] = ()
) -> Problem:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(side, 2 * side, generator=generator)
    inputs = [torch.randn(windows, rows, 2 * side, generator=generator) for _ in range(batches)]
    found = factorize(weight, torch.ones(2 * side), block_size=4, iterations=0, seed=0)
    factors = TrainableFactors(found.a, found.core, found.mask, found.b)
    scale = nn.Parameter(torch.ones(side))
    task = RefineTask(
        factors={"model.layers.0.mlp.up_proj": factors},
        vectors={"model.layers.0.norm.weight": scale},
        batches=batches,
        forward=lambda i, part=slice(None): UnitOutput(factors.product(inputs[i][part]) * scale),
        target=lambda i, part=slice(None): UnitOutput(inputs[i][part] @ weight.T),
        parts=[parts] * batches if parts else (),
    )
    return Problem(task, factors, scale)


# --- the contract of `refine` ----------------------------------------------------------------------------------------------


def test_the_class_declares_itself(name: str) -> None:
    kind = REFINERS[name]
    assert kind.scope in ("layer", "model")
    assert kind.category == "refine"
    assert kind.__doc__
    assert kind.config_type.needs_calibration
    assert kind.config_type().targets == ("Linear",)


def test_training_lowers_the_held_out_loss_and_keeps_the_best(make: Callable[..., Any]) -> None:
    refiner, p = make(epochs=4), problem()
    held, _ = split_batches(8, 0.25)
    start = p.loss(refiner, held)
    outcome = refiner.refine(p.task, None)
    assert outcome.losses[0] == start
    assert outcome.losses[-1] < 0.8 * start
    assert p.loss(refiner, held) == min(outcome.losses)
    assert outcome.stop_reason in ("epochs", "held-out loss")
    assert outcome.steps == (len(outcome.losses) - 1) * 6


def test_the_last_epoch_is_the_first_that_does_not_help(make: Callable[..., Any]) -> None:
    refiner, p = make(epochs=50, learning_rate=0.2), problem()
    outcome = refiner.refine(p.task, None)
    assert outcome.stop_reason == "held-out loss"
    assert len(outcome.losses) < 51
    assert outcome.losses[-1] >= min(outcome.losses)
    assert p.loss(refiner, split_batches(8, 0.25)[0]) == min(outcome.losses)


def test_a_learning_rate_far_too_high_ends_where_it_began(make: Callable[..., Any]) -> None:
    p = problem()
    before = p.state()
    outcome = make(learning_rate=1.0, epochs=3).refine(p.task, None)
    assert outcome.losses[0] == min(outcome.losses)
    assert outcome.losses[1] > outcome.losses[0]
    assert (len(outcome.losses), outcome.stop_reason) == (2, "held-out loss")
    assert all(torch.equal(now, old) for now, old in zip(p.state(), before, strict=True))


def test_one_gradient_a_thousand_times_as_long_is_clipped_and_counted(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, trained = split_batches(8, 0.25)

    def trained_with_a_spike() -> tuple[int, float]:
        p, refiner = problem(), make(epochs=4)

        def forward(batch: int) -> UnitOutput:
            y = p.task.forward(batch).output
            return UnitOutput(y + 999 * (y - y.detach()) if batch == trained[2] else y)

        outcome = refiner.refine(replace(p.task, forward=forward), None)
        return outcome.clipped, p.loss(refiner, held)

    clipped, loss = trained_with_a_spike()
    monkeypatch.setattr(training, "_LONGEST", math.inf)
    none, unclipped = trained_with_a_spike()
    assert clipped >= 4 > none == 0
    assert loss < unclipped


@pytest.mark.parametrize("where", ["held out", "trained on"])
def test_a_loss_that_is_not_finite_is_an_error(make: Callable[..., Any], where: str) -> None:
    p = problem()
    held, trained = split_batches(8, 0.25)
    broken = held[0] if where == "held out" else trained[0]

    def forward(batch: int) -> UnitOutput:
        return UnitOutput(p.task.forward(batch).output * (math.inf if batch == broken else 1.0))

    with pytest.raises(NumericalError, match="lower `learning_rate`"):
        make().refine(replace(p.task, forward=forward), None)


def test_norms_stay_where_they_are_not_asked_for(make: Callable[..., Any]) -> None:
    p, q = problem(), problem()
    make(norms=False).refine(p.task, None)
    make().refine(q.task, None)
    assert torch.equal(p.scale, torch.ones(16))
    assert not torch.equal(q.scale, torch.ones(16))
    assert not torch.equal(p.factors.a, problem().factors.a)


def test_the_core_stays_unless_it_is_asked_for(make: Callable[..., Any]) -> None:
    p, q = problem(), problem()
    make(core=False).refine(p.task, None)
    make().refine(q.task, None)
    assert torch.equal(p.factors.core, problem().factors.core)
    assert not torch.equal(q.factors.core, p.factors.core)
    assert torch.equal(q.factors.mask, p.factors.mask)


def test_a_step_takes_the_mean_gradient_of_its_batches(make: Callable[..., Any]) -> None:
    """With all batches in one step their order has no say but for rounding."""
    states = []
    for seed in (0, 1):
        p = problem()
        outcome = make(accumulate=6, seed=seed).refine(p.task, None)
        assert outcome.steps == 1
        states.append(p.factors.a.detach())
    moved = float((states[0] - problem().factors.a.detach()).norm())
    assert moved > 0
    assert float((states[0] - states[1]).norm()) <= 1e-3 * moved


def test_a_part_that_no_batch_reaches_stays(make: Callable[..., Any]) -> None:
    """An expert that no token went to."""
    p = problem()
    idle, start = problem().factors, problem().factors
    outcome = make().refine(replace(p.task, factors={**p.task.factors, "model.layers.0.mlp.idle": idle}), None)
    assert outcome.losses[-1] < outcome.losses[0]
    assert all(torch.equal(getattr(idle, part), getattr(start, part)) for part in ("a", "core", "b"))


@pytest.mark.usefixtures("threads")
def test_torch_has_its_threads_again_afterwards(make: Callable[..., Any]) -> None:
    torch.set_num_threads(2)
    make().refine(problem().task, None)
    assert torch.get_num_threads() == 2


def test_masks_stay(make: Callable[..., Any]) -> None:
    p = problem()
    make().refine(p.task, None)
    assert torch.equal(p.factors.mask, problem().factors.mask)
    assert not bool(p.factors.core[~p.factors.mask].any())


def test_progress_counts_steps(make: Callable[..., Any]) -> None:
    calls: list[tuple[int, int, float]] = []
    outcome = make(epochs=2).refine(problem().task, lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == list(range(1, outcome.steps + 1))
    assert {at_most for _, at_most, _ in calls} == {12}
    assert [loss for _, _, loss in calls][:7] == [outcome.losses[0]] * 6 + [outcome.losses[1]]


def test_global_generators_are_left_alone_and_have_no_say(make: Callable[..., Any]) -> None:
    before, states = rng_states(), []
    for seed in (1, 2):
        p = problem()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            outcome = make(epochs=2).refine(p.task, None)
        states.append((p.state(), outcome))
    assert rng_states() == before
    assert states[0][1] == states[1][1]
    assert all(torch.equal(one, two) for one, two in zip(states[0][0], states[1][0], strict=True))


def test_the_seed_orders_the_batches(make: Callable[..., Any]) -> None:
    found = [make(seed=seed).refine(problem().task, None).losses for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]


SINGLE = [slice(i, i + 1) for i in range(5)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("accumulate", "parts"),
    [(3, []), (1, SINGLE), (2, SINGLE), (2, [slice(0, 2), slice(2, 5)])],
    ids=["whole", "one batch", "two batches", "uneven"],
)
def test_bits_do_not_depend_on_the_number_of_threads(
    make: Callable[..., Any], accumulate: int, parts: list[slice]
) -> None:
    states = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        # Far more numbers than torch sums on one thread, and no multiple of what it takes at once.
        p = problem(batches=4, windows=5, rows=67, side=116, parts=parts)
        outcome = make(accumulate=accumulate).refine(p.task, None)
        states.append((p.state(), outcome))
    for state, outcome in states[1:]:
        assert outcome == states[0][1]
        assert all(torch.equal(one, two) for one, two in zip(state, states[0][0], strict=True))


def test_a_batch_part_by_part_is_the_batch_but_for_rounding(make: Callable[..., Any]) -> None:
    found = []
    for parts in ([], SINGLE, [slice(0, 2), slice(2, 5)]):
        p = problem(windows=5, parts=parts)
        outcome = make(epochs=2, accumulate=2).refine(p.task, None)
        found.append((outcome, p.factors.a.detach()))
    moved = float((found[0][1] - problem().factors.a.detach()).norm())
    for outcome, a in found[1:]:
        assert outcome.losses == pytest.approx(found[0][0].losses, rel=1e-4)
        assert (outcome.steps, outcome.clipped) == (found[0][0].steps, found[0][0].clipped)
        assert float((a - found[0][1]).norm()) <= 1e-2 * moved


@pytest.mark.usefixtures("threads")
def test_one_batch_at_a_time_keeps_all_threads_at_work(make: Callable[..., Any]) -> None:
    """All windows of a batch meet in each of their passes, those of the held-out batch too."""
    torch.set_num_threads(4)
    p = problem(batches=2, windows=4, parts=SINGLE[:4])
    meeting = threading.Barrier(4)

    def forward(batch: int, windows: slice) -> UnitOutput:
        meeting.wait(20)
        return p.task.forward(batch, windows)

    outcome = make(accumulate=1).refine(replace(p.task, forward=forward), None)
    assert outcome.steps == 1


@pytest.mark.usefixtures("threads")
def test_the_scale_of_a_step_does_not_depend_on_the_number_of_threads() -> None:
    x = (5 * torch.randn(300_001, generator=torch.Generator().manual_seed(1))).exp()  # any order has its own sum
    found = set()
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.add(root_mean_square(x))
    assert len(found) == 1
    assert found.pop() == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-6)


def test_half_precision_outputs_are_measured_in_full(make: Callable[..., Any]) -> None:
    p = problem()
    refiner = make()
    target = p.task.target(0).output
    output = (target + 0.01 * target.flip(-1)).bfloat16()
    half, full = (
        float(refiner.loss(UnitOutput(output.to(kind)), UnitOutput(target.bfloat16().to(kind))))
        for kind in (torch.bfloat16, torch.float32)
    )
    assert half == full


def test_a_perfect_output_has_no_loss(make: Callable[..., Any]) -> None:
    target = problem().task.target(0)
    other = UnitOutput(target.output + 0.1 * target.output.flip(-1))
    assert float(make().loss(target, target)) == pytest.approx(0, abs=1e-7)
    assert float(make().loss(other, target)) > 1e-4


def test_the_losses_are_the_published_ones() -> None:
    output, target = (torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    found = {
        name: float(kind(kind.config_type()).loss(UnitOutput(output), UnitOutput(target)))  # type: ignore[attr-defined]
        for name, kind in REFINERS.items()
    }
    wanted = target.double().softmax(-1)
    divergence = (wanted * (wanted.log() - output.double().log_softmax(-1))).sum(-1).mean()
    assert found == {
        "BlockRefineModifier": pytest.approx(float((output - target).norm() ** 2 / target.norm() ** 2), rel=1e-5),
        "DistillationModifier": pytest.approx(float(divergence), rel=1e-5),
    }


@pytest.mark.parametrize("at_once", [1, 64 * 50, 1 << 19])
@pytest.mark.parametrize("rows", [3, 64, 131])
def test_the_divergences_gradient_is_that_of_plain_autograd(
    rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(distillation._AT_ONCE, "cpu", at_once)
    output, target = (torch.randn(1, rows, 50, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    output.requires_grad_()
    kind: Any = REFINERS["DistillationModifier"]
    loss = 3 * kind(kind.config_type()).loss(UnitOutput(output), UnitOutput(target))
    (found,) = torch.autograd.grad(loss, output)
    wanted = target.double().softmax(-1)
    plain = 3 * (wanted * (wanted.log() - output.double().log_softmax(-1))).sum(-1).mean()
    assert torch.allclose(found, torch.autograd.grad(plain, output)[0], rtol=1e-4, atol=1e-7)


def test_hidden_states_count_by_their_weight_and_each_token_by_itself() -> None:
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    hidden[0, 0] *= 1000  # a massive activation
    kind: Any = REFINERS["DistillationModifier"]
    wanted = UnitOutput(logits, (hidden, hidden))
    found = UnitOutput(logits, (1.1 * hidden, hidden))
    loss = kind(kind.config_type(hidden_weight=2.0)).loss(found, wanted)
    assert float(loss) == pytest.approx(2.0 * math.log1p(0.01) / 2, rel=1e-3)


def test_a_token_that_explodes_does_not_own_the_hidden_states_gradient() -> None:
    wanted = torch.randn(1, 64, 6, generator=torch.Generator().manual_seed(1))
    found = 1.2 * wanted
    found[0, 1] *= 30  # activations that the dense model does not have here
    found.requires_grad_()
    (gradient,) = torch.autograd.grad(relative_error(found, wanted), found)
    lengths = gradient[0].norm(dim=-1) * wanted[0].norm(dim=-1)  # of the relative error
    assert lengths[1] < lengths[0]
    assert torch.sum(gradient[0, 1] * wanted[0, 1]) > 0  # and it is still led back


@pytest.mark.parametrize(
    ("asked", "total", "layers"),
    [(5, 30, (5, 11, 17, 23, 29)), (1, 4, (3,)), (9, 3, (0, 1, 2)), ("all", 3, (0, 1, 2)), (0, 8, ())],
)
def test_hidden_layers_are_evenly_spread(asked: int | str, total: int, layers: tuple[int, ...]) -> None:
    kind: Any = REFINERS["DistillationModifier"]
    assert kind(kind.config_type(hidden_layers=asked)).hidden_layers(total) == layers


class WithAllLogits(nn.Module):
    """A causal model that cannot be asked for the logits of some tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config, self.inner = model.config, model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("wrap", [lambda model: model, WithAllLogits])
@pytest.mark.parametrize(("stride", "first"), [(1, 0), (3, 0), (3, 4), (40, 7)])
@torch.no_grad()
def test_logits_of_every_nth_token_with_the_masks_of_the_same(stride: int, first: int, wrap: Any) -> None:
    model = make_model()
    ids = torch.arange(26).view(2, 13) % 32
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    wanted = list(range(first % stride if stride < 13 else 0, 13, stride))
    found, thinned = refiner._some_logits(wrap(model), {"input_ids": ids, "attention_mask": mask}, stride, first)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert found.logits
    assert torch.allclose(found.tensors[0], logits[:, wanted], atol=1e-6)
    assert torch.equal(thinned["attention_mask"], mask[:, wanted])


@pytest.mark.parametrize(("asked", "head", "stride"), [("auto", 0, 1), ("auto", 128, 1), ("auto", 257, 3), (5, 0, 5)])
def test_logits_of_a_large_vocabulary_are_compared_at_some_tokens(asked: int | str, head: int, stride: int) -> None:
    made: Any = DistillationModifier(DistillationModifier.config_type(logit_stride=asked))
    one = replace(unit(4096, 512), head=head)
    assert made.logit_stride(one) == stride
    assert made.plan(one).flops == pytest.approx(
        made.plan(unit(4096, 512)).flops * (1 - (head - head / stride) / 10_000)
    )


def test_a_session_compares_some_logits_and_tells_it(llama: Path) -> None:
    (found,) = run(mapping(llama, "DistillationModifier", epochs=2, logit_stride=4)).section("refinements")
    assert min(found.losses) < 0.95 * found.losses[0]
    assert found.record()["logit_stride"] == 4
    (plain,) = run(mapping(llama, "DistillationModifier")).section("refinements")
    assert "logit_stride" not in plain.record()


# --- the plan ----------------------------------------------------------------------------------------------------------------


def unit(tokens: int, batch_tokens: int) -> RefineUnit:
    return RefineUnit((ModuleShape("m", 8, 16, 2),), 200, 10_000, 32, tokens, batch_tokens, 2)


def test_a_plan_counts_the_passes(make: Callable[..., Any]) -> None:
    one, two = (make(epochs=epochs).plan(unit(64, 16)) for epochs in (1, 2))
    passes = 4 if make().scope == "model" else 3  # with the core's gradients, and the dense model beside
    assert one.flops == 2 * passes * 10_000 * 64
    assert two.flops == 2 * one.flops
    assert one.stored_bytes == 0
    assert one.peak_bytes > 4 * 4 * 200


def test_a_plan_counts_the_parts_of_a_step_and_what_each_keeps(make: Callable[..., Any]) -> None:
    one, three = (make(accumulate=count).plan(unit(64, 16)) for count in (1, 3))
    assert (one.parts, three.parts) == (2, 6)
    assert one.part_bytes == three.part_bytes == 4 * 200 + 8 * (6 * (8 + 16) + 12 * 32)
    assert one.peak_bytes == three.peak_bytes


def test_fewer_than_two_batches_are_refused(make: Callable[..., Any]) -> None:
    for tokens, batch in ((16, 16), (8, 16)):
        with pytest.raises(
            PlanError, match=r"at least 2 .*raise `calibration\.samples` or lower `calibration\.batch_size`"
        ):
            make().plan(unit(tokens, batch))
    assert make().plan(unit(24, 16)).flops  # a batch and a half are two
    with pytest.raises(PlanError, match="there is 1"):
        make().refine(problem(batches=1).task, None)  # fewer came than were planned


@given(st.integers(2, 500), st.floats(0.001, 0.5))
def test_held_out_batches_are_a_share_that_is_evenly_spread(batches: int, share: float) -> None:
    held, trained = split_batches(batches, share)
    assert sorted(held + trained) == list(range(batches))
    assert held == sorted(set(held))
    assert trained
    assert len(held) == min(max(1, round(batches * share)), batches - 1)
    gaps = [b - a for a, b in pairwise(held)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 3000))
def test_the_learning_rate_rises_and_then_falls(total: int) -> None:
    rates = [schedule(step, total) for step in range(total)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert peak <= 0.05 * total
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if total > 100:
        assert max(rates) > 0.98
        assert rates[-1] < 0.03


def test_the_config_refuses_what_makes_no_sense(name: str) -> None:
    kind = REFINERS[name].config_type
    assert issubclass(kind, RefineConfig)
    for fields in (
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"learning_rate": 1.5},
        {"held_out": 0.6},
        {"held_out": 0.0},
        {"optimizer": "sgd"},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            kind(**fields)


# --- in a session ------------------------------------------------------------------------------------------------------------


def mapping(folder: Path, name: str = "", armor: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """ARMOR with dense inputs, so that no layer's masks depend on what is done to the ones before; then the refiner."""
    entries = {"ARMORModifier": {**ARMOR, "propagate": "dense", **(armor or {})}}
    if name:
        entries[name] = {**FAST, "learning_rate": 0.003, **fields}
    found = recipe(folder, **entries)
    found["calibration"] |= {"samples": 24, "sequence_length": 16}
    return found


def run(mapping: dict[str, Any], **options: Any) -> Session:
    with make_session(make_job(mapping), **options) as session:
        session.run()
    return session


def is_norm(parameter: str) -> bool:
    return "norm" in parameter


@pytest.fixture(scope="module")
def pruned(llama: Path) -> Session:
    """The model after ARMOR alone."""
    return run(mapping(llama))


@pytest.fixture(scope="module")
def refined(llama: Path) -> Callable[[str], Session]:
    """The model after ARMOR and a refiner, one for all tests, which leave it as it is."""
    return cache(lambda name: run(mapping(llama, name)))


def test_only_factors_and_norms_change(
    llama: Path, pruned: Session, refined: Callable[[str], Session], name: str
) -> None:
    session = refined(name)
    dense = dict(make_session(make_job(mapping(llama))).model.named_parameters())
    for parameter, value in session.model.named_parameters():
        if not is_norm(parameter) and parameter.removesuffix(".weight") not in session.results:
            assert torch.equal(value, dense[parameter]), parameter
    for module, result in session.results.items():
        before, after = pruned.results[module].packed, result.packed
        assert before is not None
        assert after is not None
        assert torch.equal(before.bitmask, after.bitmask)
        assert not torch.equal(before.values, after.values)
        assert not torch.equal(before.a, after.a)
        assert not torch.equal(before.b, after.b)
        assert (result.losses, result.stored_loss) == (
            pruned.results[module].losses,
            pruned.results[module].stored_loss,
        )
        assert result.refined == (f"prune_stage.armor_modifiers.{name}",)
        weight = session.model.get_parameter(f"{module}.weight")
        assert torch.equal(weight, after.fold(torch.float32))
    assert len(session.results) == 14


@pytest.mark.parametrize(
    "scheme",
    [core(8), core(4, 32), {"scheme": "W8A8"}, {"scheme": "FP8_DYNAMIC"}],
    ids=["int8", "int4 in groups", "W8A8", "FP8_DYNAMIC"],
)
def test_a_quantised_core_stays_and_what_is_around_it_learns(llama: Path, name: str, scheme: dict[str, Any]) -> None:
    quantiser = {"targets": [ALL], "rounding": "nearest", "resolve": False, **scheme}
    entries = {"ARMORModifier": ARMOR, "QuantizationModifier": quantiser}
    refiner = {**FAST, "core": False, "learning_rate": 0.003, "compute_dtype": "float32"}
    if REFINERS[name].scope == "layer":
        del refiner["compute_dtype"]
    found = [recipe(llama, **entries), recipe(llama, **entries, **{name: refiner})]
    for one in found:
        one["calibration"] |= {"samples": 24, "sequence_length": 16}
    before, after = map(run, found)
    for module, result in after.results.items():
        ours, theirs = result.packed, before.results[module].packed
        assert ours is not None
        assert theirs is not None
        assert (ours.core, ours.activations, ours.group_size) == (theirs.core, theirs.activations, theirs.group_size)
        assert ours.scale is not None
        assert theirs.scale is not None
        # A layer's own refiner changes what comes into the next one before that is pruned and quantised.
        if REFINERS[name].scope == "model" or module.startswith("model.layers.0."):
            assert torch.equal(ours.values.view(torch.uint8), theirs.values.view(torch.uint8))
            assert torch.equal(ours.bitmask, theirs.bitmask)
            assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(after.model.get_parameter(f"{module}.weight"), ours.fold(torch.float32))
        assert not torch.equal(ours.a, theirs.a)
        assert not torch.equal(ours.b, theirs.b)
    assert len(after.results) == 14
    first, *others = after.section("refinements")
    assert min(first.losses) < 0.95 * first.losses[0]
    assert all(min(one.losses) < one.losses[0] for one in others)


def test_training_in_a_session_lowers_the_held_out_loss(llama: Path, name: str) -> None:
    session = run(mapping(llama, name, epochs=2))
    units = [refinement.unit for refinement in session.section("refinements")]
    assert units == (["model"] if REFINERS[name].scope == "model" else ["model.layers.0", "model.layers.1"])
    for refinement in session.section("refinements"):
        assert min(refinement.losses) < 0.95 * refinement.losses[0]
        assert refinement.tokens == 24 * 16
        assert refinement.steps == 9 * (len(refinement.losses) - 1)
        assert refinement.seconds > 0
    assert sum(refinement.modules for refinement in session.section("refinements")) == 14
    norms = sum(p.numel() for n, p in session.model.named_parameters() if is_norm(n))
    trained = sum(refinement.norm_values for refinement in session.section("refinements"))
    assert trained == (norms if REFINERS[name].scope == "model" else norms - 32)


@pytest.mark.usefixtures("threads")
def test_a_session_trains_part_by_part(llama: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bits that do not depend on threads, and results that are those of whole batches but for rounding."""
    found = mapping(llama, name, accumulate=1)
    found["calibration"] |= {"samples": 23, "batch_size": 4}
    whole = run(found)
    monkeypatch.setattr(refiner, "_PART_TOKENS", 16)
    sessions = []
    for count in (1, 2):
        torch.set_num_threads(count)
        sessions.append(run(found))
    first, second = (session.section("refinements") for session in sessions)
    assert [r.to_dict() for r in first] == [r.to_dict() for r in second]
    parameters = zip(*(session.model.named_parameters() for session in sessions), strict=True)
    assert [one[0] for one, two in parameters if not torch.equal(one[1], two[1])] == []
    for apart, together in zip(first, whole.section("refinements"), strict=True):
        assert apart.losses != together.losses
        assert apart.losses == pytest.approx(together.losses, rel=1e-3)
        assert (apart.steps, apart.tokens, apart.whole_batches) == (together.steps, together.tokens, 0)


def test_batches_that_a_layer_takes_as_a_whole_only_are_counted(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = mapping(llama, "BlockRefineModifier")
    found["calibration"] |= {"samples": 23, "batch_size": 4}
    whole = run(found)
    monkeypatch.setattr(refiner, "_PART_TOKENS", 16)
    tried: list[int] = []

    def comes_apart(call: LayerCall, layer: nn.Module, parts: Sequence[slice]) -> bool:
        tried.append(len(parts))
        return len(call.hidden) == 3

    monkeypatch.setattr(LayerCall, "comes_apart", comes_apart)
    session = run(found)
    assert tried == [4, 3] * 2
    assert [r.whole_batches for r in session.section("refinements")] == [5, 5]
    assert [r.whole_batches for r in whole.section("refinements")] == [0, 0]
    assert session.section("refinements")[0].losses == pytest.approx(whole.section("refinements")[0].losses, rel=1e-3)


@pytest.mark.parametrize(
    ("windows", "tokens", "parts"),
    [
        (1, 16, [(0, 1)]),
        (4, 512, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (3, 4096, [(0, 1), (1, 2), (2, 3)]),
        (8, 256, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (5, 200, [(0, 5)]),
        (7, 200, [(0, 3), (3, 7)]),
        (8, 16, [(0, 8)]),
    ],
)
def test_parts_are_of_as_few_windows_as_make_enough_tokens(windows: int, tokens: int, parts: list[Any]) -> None:
    ids, hidden = torch.zeros(windows, tokens), torch.zeros(windows, tokens, 2)
    assert refiner._parts([ids, hidden]) == [[slice(*pair) for pair in parts]] * 2
    assert refiner._parts([ids.to("meta")]) == []  # as a GPU's


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_training_that_does_not_help_leaves_every_bit(llama: Path, name: str, packed: bool) -> None:
    without = run(mapping(llama), keep_packed=packed)
    session = run(mapping(llama, name, learning_rate=1.0), keep_packed=packed)
    assert all(r.losses[0] == min(r.losses) and r.norm_values == 0 for r in session.section("refinements"))
    for one, two in zip(session.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_norms_false_leaves_the_norms(llama: Path, name: str) -> None:
    session = run(mapping(llama, name, norms=False))
    dense = dict(make_session(make_job(mapping(llama))).model.named_parameters())
    for parameter, value in session.model.named_parameters():
        if is_norm(parameter):
            assert torch.equal(value, dense[parameter])
    assert {refinement.norm_values for refinement in session.section("refinements")} == {0}


def test_flags_of_the_model_are_given_back(llama: Path, name: str) -> None:
    session = make_session(make_job(mapping(llama, name)))
    session.model.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    session.model.train()
    before = {n: p.requires_grad for n, p in session.model.named_parameters()}
    assert set(before.values()) == {True, False}
    with session:
        session.run()
    assert {n: p.requires_grad for n, p in session.model.named_parameters()} == before
    assert session.model.training
    assert all(p.grad is None for p in session.model.parameters())


def test_only_the_targets_are_trained(llama: Path, pruned: Session, name: str) -> None:
    session = run(mapping(llama, name, targets=[r"re:.*q_proj$"], ignore=[r"re:.*layers\.1.*"], norms=False))
    changed = {n for n, p in session.model.named_parameters() if not torch.equal(p, pruned.model.get_parameter(n))}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}
    assert [r.modules for r in session.section("refinements")] == [1]


@pytest.fixture(scope="module")
def untrained(llama: Path) -> Session:
    """The model after ARMOR alone, with shared input factors."""
    return run(mapping(llama, armor={"share_input_factor": True}))


def test_a_shared_input_factor_stays_one(
    llama: Path, untrained: Session, refined: Callable[[str], Session], name: str
) -> None:
    shared = run(mapping(llama, name, armor={"share_input_factor": True}))
    for layer in (0, 1):
        for group in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            packed = [shared.results[f"model.layers.{layer}.{module}"].packed for module in group]
            before = untrained.results[f"model.layers.{layer}.{group[0]}"].packed
            assert before is not None
            assert all(p is not None and torch.equal(p.b, packed[0].b) for p in packed)  # type: ignore[union-attr]
            assert not torch.equal(packed[0].b, before.b)  # type: ignore[union-attr]
    free = [refined(name).results[f"model.layers.0.mlp.{m}_proj"].packed for m in ("gate", "up")]
    assert not torch.equal(free[0].b, free[1].b)  # type: ignore[union-attr]


def test_errors_name_the_line_and_the_unit(llama: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refine(*_: Any) -> Any:
        raise NumericalError("all is lost")

    monkeypatch.setattr(REFINERS[name], "refine", refine)
    session = make_session(make_job(mapping(llama, name)))
    flags = {n: p.requires_grad for n, p in session.model.named_parameters()}
    with session, pytest.raises(NumericalError, match=rf": {name}: model(\.layers\.0)?: all is lost"):
        session.run()
    assert {n: p.requires_grad for n, p in session.model.named_parameters()} == flags


def test_a_value_that_overflows_names_its_module(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refine: Any = REFINERS[name].refine

    def explode(self: Any, task: RefineTask, progress: Any) -> Any:
        outcome = refine(self, task, progress)
        task.factors[min(task.factors)].a.data[0, 0, 0] = 1e6  # more than float16 holds
        return outcome

    monkeypatch.setattr(REFINERS[name], "refine", explode)
    session = make_session(make_job(mapping(save_model(tmp_path / "m", dtype=torch.float16), name)))
    with (
        session,
        pytest.raises(CheckpointError, match=r"model(\.layers\.0)?: model\.layers\.0\.mlp\.down_proj: .*not finite"),
    ):
        session.run()


def test_fewer_windows_than_planned_are_an_error_of_ours(llama: Path, name: str) -> None:
    job = make_job(mapping(llama, name))
    session = make_session(job)
    session.tokens = {
        spec: replace(found, tensors={"input_ids": found.ids[:2]}) for spec, found in session.tokens.items()
    }
    with session, pytest.raises(PlanError, match=rf"{name}: model.*there is 1"):
        session.run()


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_half_precision_compute(llama: Path, name: str, compute: str) -> None:
    found = mapping(llama, name)
    found["model"] = {"id": str(llama), "compute_dtype": compute}
    session = run(found)
    for module, result in session.results.items():
        assert result.packed is not None
        assert session.model.get_parameter(f"{module}.weight").dtype == getattr(torch, compute)
    assert all(min(r.losses) < r.losses[0] for r in session.section("refinements"))


@pytest.mark.parametrize(
    ("asked", "fast", "model", "taken"),
    [
        ("auto", True, "float32", "bfloat16"),
        ("auto", False, "float32", "float32"),
        ("auto", False, "bfloat16", "bfloat16"),
        ("bfloat16", False, "float32", "bfloat16"),
        ("float32", True, "bfloat16", "float32"),
    ],
)
def test_both_models_of_a_distillation_run_in_its_compute_dtype(
    llama: Path, monkeypatch: pytest.MonkeyPatch, asked: str, fast: bool, model: str, taken: str
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr("armor_recipes.modifiers.distillation.modifier.multiplies_bfloat16", lambda device: fast)
    loss = DistillationModifier.loss

    def look(self: Any, found: UnitOutput, wanted: UnitOutput) -> Tensor:
        seen.extend([found.output, wanted.output, *found.hidden, *wanted.hidden])
        return loss(self, found, wanted)

    monkeypatch.setattr(DistillationModifier, "loss", look)
    recipe = mapping(llama, "DistillationModifier", compute_dtype=asked)
    recipe["model"] = {"id": str(llama), "compute_dtype": model}
    session = run(recipe)
    assert {part.dtype for part in seen} == {getattr(torch, taken)}
    (refinement,) = session.section("refinements")
    assert refinement.compute_dtype == taken
    assert min(refinement.losses) < refinement.losses[0]
    assert {parameter.dtype for parameter in session.model.parameters()} == {getattr(torch, model)}


@pytest.mark.usefixtures("threads")
def test_training_in_bfloat16_does_not_depend_on_threads_and_is_near_that_in_float32(llama: Path) -> None:
    def losses(compute: str, threads: int) -> tuple[float, ...]:
        torch.set_num_threads(threads)
        return run(mapping(llama, "DistillationModifier", compute_dtype=compute)).section("refinements")[0].losses

    narrow = losses("bfloat16", 1)
    assert losses("bfloat16", 2) == narrow
    assert narrow == pytest.approx(losses("float32", 2), rel=0.02)


def test_a_view_in_another_dtype_keeps_what_is_shared_and_leaves_the_model() -> None:
    model = make_model("llama-gqa-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    left = "model.layers.0.mlp.up_proj.weight"
    view = _converted(model, torch.bfloat16, but={left})
    assert view.lm_head.weight is view.model.embed_tokens.weight
    dtypes = {name: parameter.dtype for name, parameter in view.named_parameters()}
    assert dtypes.pop(left) == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert _converted(model, torch.float32, but=()) is model
