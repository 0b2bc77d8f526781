"""The backend `cuda`: what it refuses, its gradients and its choice of a product, without a GPU; against the reference with one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError, RecipeError
from armor_recipes.runtime import cuda
from armor_recipes.runtime.backends import BACKEND_VARIABLE, choose_backend
from tests.runtime.test_cpu_backends import holding
from tests.runtime.test_integer_kernel import quantized
from tests.runtime.test_kernel import DTYPES, TOLERANCE, error, expected, packed
from tests.support.forks import Forks

CORES = ("float", "int8", "int4")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def sample(core: str, dtype: torch.dtype = torch.float32) -> PackedLinear:
    return packed(48, 64, (16, 8), dtype) if core == "float" else quantized(48, 64, (16, 8), dtype, core, 8)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def test_no_module_of_the_package_imports_triton(forks: Forks, tmp_path: Path) -> None:
    code = "import sys, armor_recipes.runtime.cuda; assert 'armor_recipes.runtime.triton_kernel' not in sys.modules"
    forks.run(code, folder=tmp_path, path=Path(__file__).parents[2])


def test_chosen_by_name_and_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    assert choose_backend().name == choose_backend("cuda").name == "cuda"


def test_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    layer = holding(sample("float"), "cuda")
    layer.label = "model.layers.0.mlp.up_proj"
    with pytest.raises(
        RecipeError, match=r"model\.layers\.0\.mlp\.up_proj: .* needs a CUDA GPU, and torch .* sees none"
    ):
        layer.prepare()
    with pytest.raises(RecipeError, match="choose `cpu`, `auto` or `folded`"):
        layer(inputs(1))


def test_a_layer_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RecipeError, match=r'is on cpu: .* device="cuda"'):
        holding(sample("float"), "cuda").prepare()


def test_triton_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_check_device", lambda device, name: None)
    monkeypatch.setattr(cuda, "triton_available", lambda: False)
    with pytest.raises(RecipeError, match="needs Triton, which is not installed: `pip install triton`"):
        cuda.prepare_cuda(sample("float"), "layer")


def test_damaged_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_check_device", lambda device, name: None)
    monkeypatch.setattr(cuda, "triton_available", lambda: True)
    tensors = sample("float")
    tensors.bitmask[3, 2] ^= 1
    with pytest.raises(CheckpointError, match="layer: bitmask: row 3"):
        cuda.prepare_cuda(tensors, "layer")


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("tokens", [3, 17])
def test_gradients_are_those_of_the_reference(core: str, tokens: int) -> None:
    found = []
    for name in ("cuda", "reference"):
        tensors, x = sample(core), inputs(tokens).requires_grad_()
        bias = torch.arange(48.0).requires_grad_()
        kept = tensors.values if tensors.scale is None else tensors.scale
        trained = [x, bias, *(part.requires_grad_() for part in (kept, tensors.a, tensors.b))]
        backend = choose_backend(name)
        prepared = None if name == "cuda" else backend.prepare(tensors, "layer")
        y = backend.run(x, prepared, tensors, bias)
        found.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process in which the kernel runs")
def test_the_kernels_in_the_interpreter(in_interpreter: Callable[..., None]) -> None:
    """Those of the solver too: one process for both, which takes seconds to start."""
    here = Path(__file__)
    sweep = here.parents[1] / "solver" / "test_triton_sweep.py"
    in_interpreter(here.with_name("test_triton_kernel.py"), sweep, "-k", "test_triton_kernel or torch_form")


@needs_gpu
@needs_triton
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_on_a_gpu_is_the_reference(dtype: torch.dtype, core: str) -> None:
    layer = holding(sample(core, dtype), "cuda").to("cuda")
    for tokens in (0, 1, 2, 16, 17, 100):
        x = inputs(tokens, dtype)
        with torch.no_grad():
            y = layer(x.cuda()).cpu()
        truth = expected(x, sample(core, dtype), torch.arange(48).to(dtype))
        assert y.shape == truth.shape
        assert not tokens or error(y, truth) < 3 * TOLERANCE[dtype]


@needs_gpu
@needs_triton
def test_a_layer_on_a_gpu_is_moved_and_copied() -> None:
    layer, x = holding(sample("float", torch.bfloat16), "cuda").to("cuda"), inputs(20, torch.bfloat16).cuda()
    with torch.inference_mode():
        y = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        assert torch.equal(layer.cpu().cuda()(x), y)
        with pytest.raises(RecipeError, match="is on cpu"):
            layer.cpu()(x.cpu())
