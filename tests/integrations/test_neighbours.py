"""What this package does to others: a neighbour that is not as we know it goes on, and so does everybody who does not need us."""

from __future__ import annotations

import importlib
import logging
import runpy
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import compressed_tensors.compressors as compressors
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.offload import module as offload_module
from compressed_tensors.quantization.utils import helpers
from transformers import AutoModelForCausalLM

import armor_recipes
from armor_recipes.checkpoint.writer import write_checkpoint
from armor_recipes.errors import ArmorError
from armor_recipes.integrations import transformers as registration
from armor_recipes.integrations import upstream, vllm
from tests.support.forks import Forks
from tests.support.packed import logits, session_model, write

KIND = "llama-attention-bias-gqa"
FORMAT = "sparse-24-bitmask"


class Upstreams(BaseCompressor):  # type: ignore[misc]
    """What compressed-tensors might call by this name again."""

    @classmethod
    def compress_module(cls, module: Any) -> None:
        """Lay nothing out: the checkpoint's tensors would be left over, and transformers would log that."""


@pytest.fixture
def _name_is_ours_again() -> Iterator[None]:
    yield
    upstream.release(FORMAT)
    registration.register()
    registration.check_registered()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "model"
    write(KIND, folder)
    return folder


@pytest.mark.usefixtures("_name_is_ours_again")
@pytest.mark.parametrize("before", [True, False], ids=["taken before us", "taken after us"])
def test_a_name_that_is_taken_ends_only_the_loading_of_our_folders(
    checkpoint: Path, tmp_path: Path, before: bool
) -> None:
    if before:
        upstream.release(FORMAT)
    BaseCompressor.register(name="sparse_24_bitmask")(Upstreams)
    registration.register()
    assert BaseCompressor.get_value_from_registry(FORMAT) is Upstreams
    said = (
        rf"format {FORMAT} is registered to .*Upstreams, not to armor_recipes: ARMOR checkpoints cannot be read in this"
    )
    for load in (armor_recipes.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ArmorError, match=said):
            load(checkpoint)
    session, _ = session_model(KIND)
    write_checkpoint(session, {}, tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(armor_recipes.load(tmp_path / "dense")), logits(session))


@pytest.mark.usefixtures("_name_is_ours_again")
def test_the_name_as_an_alias_of_another_format(checkpoint: Path) -> None:
    upstream.release(FORMAT)
    BaseCompressor.register(name="another-format", alias=[FORMAT])(Upstreams)
    registration.register()
    with pytest.raises(ArmorError, match=r"registered to .*Upstreams"):
        armor_recipes.load(checkpoint)
    upstream.release("another-format")


@pytest.mark.usefixtures("_name_is_ours_again")
def test_other_names_are_registered_as_ever() -> None:
    BaseCompressor.register(name="another-format")(Upstreams)
    assert BaseCompressor.get_value_from_registry("another-format") is Upstreams
    with pytest.raises(KeyError):  # as without us
        BaseCompressor.register(name="another-format")(type("Other", (Upstreams,), {}))
    registration.check_registered()
    upstream.release("another-format")


def test_reloading_registers_once() -> None:
    hook, ours = ModelCompressor.add_decompress_hook, registration.ArmorCompressor
    try:
        importlib.reload(registration)
        registration.check_registered()
        assert ModelCompressor.add_decompress_hook is hook
    finally:
        registration.ArmorCompressor = ours  # type: ignore[misc]  # other modules hold on to it
        upstream.release(FORMAT)
        registration.register()


ROOT = Path(__file__).parents[2]
NAMES: list[tuple[Any, str]] = [
    (offload_module, "unwrap_offload_forward"),
    (helpers, "is_module_quantized"),
    (compressors, "ModelCompressor"),
    (ModelCompressor, "add_decompress_hook"),
    (ModelCompressor, "compress_model"),
]


@pytest.mark.parametrize(("owner", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_name_that_this_version_lacks_is_told_with_the_versions_that_work(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    monkeypatch.delattr(owner, name)
    said = rf"compressed-tensors {version('compressed-tensors')} is none that armor_recipes works with .*{name}.*>=0\.17,<0\.21"
    with pytest.raises(ArmorError, match=said):
        runpy.run_path(str(upstream.__file__))


OTHER_VERSION = """
import sys, warnings
import compressed_tensors.offload.module as theirs
del theirs.unwrap_offload_forward
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import armor_recipes
    import compressed_tensors.compressors
print([str(w.message) for w in warned if issubclass(w.category, RuntimeWarning)])
for name in ("load", "apply", "to_dense"):
    try:
        getattr(armor_recipes, name)
    except armor_recipes.errors.ArmorError as error:
        print(name, error)
"""


def test_importing_us_beside_another_version_warns_and_using_us_says_why(tmp_path: Path, forks: Forks) -> None:
    warned, *used = forks.run(OTHER_VERSION, folder=tmp_path, path=ROOT).splitlines()
    assert (
        warned.count("armor_recipes does not work with compressed_tensors.compressors in this process: ArmorError:")
        == 1
    )
    assert [line.split()[0] for line in used] == ["load", "apply", "to_dense"]
    assert all("unwrap_offload_forward" in line and ">=0.17,<0.21" in line for line in used)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libcuda.so is missing')", "ImportError: libcuda.so is missing"),
        ("raise AttributeError('moved')", "AttributeError: moved"),
        ("raise RuntimeError('no device')", "RuntimeError: no device"),
        ("", "No module named 'vllm.model_executor'"),
    ],
)
def test_a_vllm_that_does_not_fit_serves_without_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: str, reason: str
) -> None:
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"{vllm.__name__}.plugin", raising=False)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "envs.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="armor_recipes"):
        vllm.register()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("armor_recipes", "WARNING")
    assert record.getMessage().startswith("ARMOR checkpoints are not served in this process")
    assert reason in record.getMessage()
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]
