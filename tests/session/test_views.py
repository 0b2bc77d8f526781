"""Views share all but what is replaced, and leave the module alone."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from armor_recipes.model.views import view


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4)))


@pytest.fixture
def model() -> nn.Sequential:
    with torch.random.fork_rng():
        return make()


X = torch.arange(12.0).view(3, 4)


def test_a_replaced_module_and_parameter_count_in_the_view_alone(model: nn.Sequential) -> None:
    before = model(X)
    weight = torch.full((4,), 3.0, requires_grad=True)
    found = view(model, {"1.0": nn.Identity(), "1.1.weight": weight})
    wanted = 3 * nn.functional.layer_norm(model[0](X), (4,))
    assert torch.allclose(found(X), wanted, atol=1e-6)
    found(X).sum().backward()
    assert weight.grad is not None
    assert torch.equal(model(X), before)
    assert isinstance(model[1][0], nn.Linear)  # type: ignore[index]
    assert found[0] is model[0]


def test_an_empty_view_computes_the_same(model: nn.Sequential) -> None:
    assert torch.equal(view(model, {})(X), model(X))


def test_hooks_of_a_view_are_its_own(model: nn.Sequential) -> None:
    seen: list[Tensor] = []
    found = view(model, {"1.0": nn.Identity()})
    found[1].register_forward_hook(lambda _, __, output: seen.append(output))
    model(X)
    assert seen == []
    found(X)
    assert len(seen) == 1


def test_a_module_without_replacements_is_copied_on_request(model: nn.Sequential) -> None:
    found = view(model, {"0": nn.Identity()}, copied=["1.0"])
    found[1][0].register_forward_hook(lambda _, __, output: 2 * output)  # type: ignore[index]
    assert torch.allclose(found(X), model[1][1](2 * model[1][0](X)))  # type: ignore[index]
    assert not model[1][0]._forward_hooks  # type: ignore[index]
    assert found[1][1] is model[1][1]  # type: ignore[index]


def test_threads_run_views_of_one_module_at_once(model: nn.Sequential) -> None:
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        for _ in range(50):
            found[number] = view(model, {"1.1.bias": torch.full((4,), float(number))})(X).detach()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(found[i] - found[0], torch.full((3, 4), float(i)), atol=1e-5) for i in range(4))


def test_a_path_that_does_not_exist_is_an_error(model: nn.Sequential) -> None:
    with pytest.raises(KeyError):
        view(model, {"7.weight": torch.ones(1)})
