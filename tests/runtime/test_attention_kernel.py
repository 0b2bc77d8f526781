"""The attention of one query a head, and where a loaded model takes it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import armor_recipes
from armor_recipes.integrations import attention
from armor_recipes.run import apply
from armor_recipes.runtime import kernel
from armor_recipes.runtime.kernel import HEAD_SIZES, attention_runs, kernel_available, run_attention_kernel
from tests.support.engine import MODELS, SIZES, recipe, save_model

pytestmark = pytest.mark.skipif(
    not kernel_available() or "avx512" not in kernel.capabilities().paths, reason="no kernel for AVX-512 BF16 here"
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    keys, values = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (torch.softmax(q.double() @ keys.mT * scale, -1) @ values).transpose(1, 2)


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_it_is_nearer_to_float64_than_its_result_can_say(size: int, heads: int, kv_heads: int) -> None:
    for length in (1, 15, 16, 17, 130):
        for scale in (size**-0.5, 3.0, -0.1, 0.0):
            q, k, v = (
                numbers(2, n, m, size, seed=m) for n, m in ((heads, 1), (kv_heads, length), (kv_heads, length + 1))
            )
            v = v[:, :, 1:]  # between whose heads are numbers that are not its own
            found, wanted = run_attention_kernel(q, k, v, scale), exact(q, k, v, scale)
            assert found.shape == (2, 1, heads, size) == wanted.shape
            assert float((found.double() - wanted).abs().max()) <= 2**-8 * float(wanted.abs().max())


def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = numbers(1, 6, 1, 64), numbers(1, 2, 77, 64), numbers(1, 2, 77, 64, seed=1)
    one = run_attention_kernel(q, k, v, 0.125)
    monkeypatch.setattr(kernel, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(run_attention_kernel(q, k, v, 0.125), one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    q, k, v = numbers(1, 2, 1, 64), numbers(1, 2, 20, 64), numbers(1, 2, 20, 64)
    k[0, 1, 18, 3] = bad
    q[0, 1, 0, 3] = 1.0
    found = run_attention_kernel(q, k, v, 0.125)[0, 0]
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_refusals() -> None:
    q, k = numbers(1, 4, 1, 64), numbers(1, 2, 5, 64)
    wrong = (
        (q.float(), k, k),
        (numbers(1, 4, 2, 64), k, k),
        (q, k, k[:, :, 1:]),
        (numbers(1, 3, 1, 64), k, k),
        (q[..., :32], k[..., :32], k[..., :32]),
        (q, k[:, :, :0], k[:, :, :0]),
        (q, k.mT.contiguous().mT, k),
        (numbers(2, 4, 1, 64), k, k),
        (q[0], k[0], k[0]),
        (q, k[0], k[0]),
        (q[:0], k[:0], k[:0]),
    )
    for tensors in wrong:
        assert not attention_runs(*tensors)
        with pytest.raises(TypeError, match="the attention kernel takes q"):
            run_attention_kernel(*tensors, 0.125)


def test_a_loaded_model_decodes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=64))  # noqa: E731
    monkeypatch.setitem(MODELS, "heads of 64", made)
    apply(recipe(save_model(tmp_path / "dense", "heads of 64"), tmp_path / "out"))
    calls: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        calls.append(k.shape[2])
        return run_attention_kernel(q, k, v, scale)

    monkeypatch.setattr(attention, "run_attention_kernel", counted)
    ids = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))

    def decoded(model: Any) -> Tensor:
        options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "output_logits": True}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
        return found.logits[1]  # type: ignore[no-any-return]

    model, folded = (armor_recipes.load(tmp_path / "out", backend=backend) for backend in ("cpu", "folded"))
    found, wanted = decoded(model), decoded(folded)
    assert calls == [8, 8]  # of two layers, of the first model alone
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    assert model.config._attn_implementation == "sdpa"
    model(ids[:, :1])  # with gradients
    with torch.no_grad():
        model(ids)
        model(ids[:, :1], attention_mask=torch.zeros(2, 1, 1, 1).bfloat16())
        for name, value in {"softcap": 30.0, "s_aux": torch.zeros(4), "position_bias": torch.zeros(1, 4, 1, 1)}.items():
            assert not attention._suits(*(numbers(1, 4, 1, 64) for _ in range(3)), {name: value})
    assert len(calls) == 2
    assert not hasattr(AttentionInterface()["sdpa"].__wrapped__, attention._OURS)  # two models, wrapped once


def test_arguments_have_the_names_that_transformers_gives_them() -> None:
    """Architectures pass them by place or by name."""
    given = inspect.signature(attention._with_kernel(sdpa_attention_forward), follow_wrapped=False).parameters
    asked = inspect.signature(sdpa_attention_forward).parameters
    assert [*given][:5] == [*asked][:5]
    q, k = numbers(1, 4, 1, 64), numbers(1, 2, 5, 64)
    named = {"query": q, "key": k, "value": k, "attention_mask": None}
    with torch.no_grad():
        for is_ours in (False, True):
            module = nn.Identity()
            module.__dict__.update({"num_key_value_groups": 2, **({attention._OURS: True} if is_ours else {})})
            found = attention._with_kernel(sdpa_attention_forward)(module=module, **named)[0]
            assert float((found.double() - exact(q, k, k, 0.125)).abs().max()) < 0.02
