"""What is refused before the first layer, and before a weight is read; each tried through the real command."""

from __future__ import annotations

import re
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from tests.support.commands import Shell, finished, forked, write_recipe
from tests.support.engine import ARMOR, make_model, recipe
from tests.support.forks import Fork, Forks
from tests.support.tokenizers import byte_tokenizer

LONG = {**ARMOR, "iterations": 10**7, "targets": [r"re:.*layers\.1\..*q_proj$"], "solver": "adam"}
SHORT = {**ARMOR, "iterations": 1, "targets": [r"re:.*layers\.0\..*q_proj$"]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def file(llama: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, llama)


def problems(done: Any, code: int) -> list[str]:
    """What a run was refused for, which must have read no weight."""
    assert done.code == code, done.err
    assert not done.out
    before, _, said = done.err.partition("error: ")
    assert "load weights" not in before
    said, see, page = str(said).rpartition(" (see ")
    assert (see, page.startswith("docs/errors.md#"), page.endswith("error)\n")) == (" (see ", True, True)
    return said.splitlines()


# --- two runs on one output ---------------------------------------------------------------------------------------------


def reach(running: Fork, text: str) -> None:
    """Wait until a command has said this."""
    assert any(text in line for line in running.stderr), "the command ended before that"


@pytest.fixture
def busy(llama: Path, tmp_path: Path, forks: Forks) -> Iterator[Fork]:
    """A run on `out` in another process, in the middle of a solve."""
    file = write_recipe(tmp_path, llama, ARMORModifier=SHORT, ARMORModifier__long=LONG)
    running = forked(forks, "armor-apply", file, cwd=tmp_path)
    reach(running, "layer 1/")
    yield running
    running.kill()
    finished(running)


def test_two_runs_on_one_output(shell: Shell, busy: Fork, llama: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, llama, ARMORModifier=SHORT)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for words in ([], ["--overwrite"], ["--output", tmp_path / "link" / "out"], ["--output", "deep/../out"]):
        (line,) = problems(shell("armor-apply", file, *words), 6)
        assert line.startswith(f"{tmp_path / 'out'} is being written by another run (process {busy.pid} on ")
        assert f" on {socket.gethostname()}, since 20" in line
    assert names(tmp_path) == [".out.journal", ".out.lock", "link", "recipe.yaml"]

    beside = shell("armor-apply", file, "--output", "out2", "--quiet")
    assert (beside.code, beside.err) == (0, "")
    exported = shell("armor", "export", "out2", "out", "--to", "dense")
    assert (exported.code, names(tmp_path)) == (6, [".out.journal", ".out.lock", "link", "out2", "recipe.yaml"])

    busy.send_signal(signal.SIGKILL)  # which leaves the file, and no lock
    busy.wait()
    assert ".out.lock" in names(tmp_path)
    assert f"{tmp_path / '.out.journal'} is the journal of another run:" in shell("armor-apply", file, "--quiet").err
    assert shell("armor-apply", file, "--quiet", "--fresh").code == 0
    assert names(tmp_path) == ["link", "out", "out2", "recipe.yaml"]


def test_an_output_that_came_meanwhile_is_found_before_anything_is_read(
    shell: Shell, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that held the lock while this one looked."""
    from armor_recipes.run import job

    def come(output: Path) -> None:
        output.mkdir()
        (output / "config.json").write_text("{}")

    monkeypatch.setattr(job, "recover", come)
    (line,) = problems(shell("armor-apply", file), 2)
    assert "exists: pass --overwrite" in line
    assert names(tmp_path) == ["out", "recipe.yaml"]


# --- too little disk ----------------------------------------------------------------------------------------------------


def test_too_little_disk(shell: Shell, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12_340_000))
    (line,) = problems(shell("armor-apply", file), 7)
    assert re.match(r"about 0\.016\d GB are to be written, and 0\.0123 GB are free on the disk of ", line)
    assert "set output.path" in line
    assert names(tmp_path) == ["recipe.yaml"]


def test_what_is_replaced_stays_until_then_and_is_no_room(
    shell: Shell, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("armor-apply", file, "--quiet").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    (line,) = problems(shell("armor-apply", file, "--overwrite"), 7)
    assert "0 GB are free" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, of which less than a run wants is free."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this user may mount nothing")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_for_real(shell: Shell, file: Path, small_disk: Path) -> None:
    (line,) = problems(shell("armor-apply", file, "--output", small_disk / "deep" / "out"), 7)
    assert " GB are to be written, and 0.0041" in line
    assert f" GB are free on the disk of {small_disk / 'deep'} (" in line
    assert list(small_disk.rglob("*")) == []


def test_a_limit_on_the_size_of_files(shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (20_000, 20_000))
    (line,) = problems(shell("armor-apply", file), 7)
    assert line.endswith("and this process may write 2e-05 GB to one: raise the limit (ulimit -f)")


# --- a tokenizer that cannot be saved, and what else is written -----------------------------------------------------------


@pytest.fixture
def texts(llama: Path, tmp_path: Path) -> Path:
    """A recipe on a model with a tokenizer (one id a byte), calibrated on a text of its own."""
    model = make_model()
    model.resize_token_embeddings(257)
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    mapping = recipe(tmp_path / "m", tmp_path / "out")
    mapping["calibration"] = {
        "dataset": "text.txt",
        "samples": {"at_most": 50},
        "sequence_length": 12,
        "batch_size": 16,
    }
    return written(tmp_path, mapping)


def written(folder: Path, mapping: dict[str, Any]) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    return folder / "recipe.yaml"


def test_a_tokenizer_that_cannot_be_saved(shell: Shell, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("the slow tokenizer has no vocabulary file")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    (line,) = problems(shell("armor-apply", texts), 5)
    assert line.startswith(f"the tokenizer of {texts.parent / 'm'} cannot be saved (ValueError: the slow tokenizer has")
    assert names(texts.parent) == ["m", "recipe.yaml", "text.txt"]


def test_a_tokenizer_that_a_full_disk_does_not_take(shell: Shell, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    assert "no space left" in problems(shell("armor-apply", texts), 7)[0]


def test_a_licence_with_an_impossible_date_and_an_unreadable_card(shell: Shell, texts: Path) -> None:
    (texts.parent / "m" / "README.md").write_text("---\nlicense: mit\ndate: 2024-13-45\n---\n")
    assert shell("armor-apply", texts, "--quiet").code == 0
    (texts.parent / "m" / "LICENSE").symlink_to("LICENSE")  # a link to itself is no file
    (texts.parent / "m" / "NOTICE").mkdir()
    assert shell("armor-apply", texts, "--quiet", "--overwrite").code == 0


def test_a_configuration_that_cannot_be_saved(shell: Shell, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that transformers finds inconsistent, say."""
    from transformers import GenerationConfig

    def fail(*_: object, **__: object) -> None:
        raise ValueError("GenerationConfig is invalid:\n- `temperature`")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", fail)
    (line,) = problems(shell("armor-apply", texts), 5)
    assert (
        "cannot be saved (ValueError: GenerationConfig is invalid: - `temperature`): correct it, or generation_co"
        in line
    )


# --- windows and data ---------------------------------------------------------------------------------------------------


def with_modifiers(file: Path, **modifiers: dict[str, Any]) -> Path:
    mapping = yaml.safe_load(file.read_text())
    mapping["prune_stage"]["armor_modifiers"] |= modifiers
    return written(file.parent, mapping)


REFINERS = {"BlockRefineModifier": {"epochs": 1}, "DistillationModifier": {"epochs": 1}}


@pytest.mark.parametrize("refiner", REFINERS)
def test_too_few_windows_for_a_refiner(shell: Shell, texts: Path, refiner: str) -> None:
    """50 were allowed, so that the plan sees four batches; 11 came, which make one."""
    file = with_modifiers(texts, **{refiner: REFINERS[refiner]})
    assert shell("armor-apply", file, "--plan").code == 0
    (line,) = problems(shell("armor-apply", file), 3)
    assert f"recipe.yaml:15: {refiner}: training needs at least 2 calibration batches" in line
    assert "there is 1:" in line
    assert names(texts.parent) == ["m", "recipe.yaml", "text.txt"]
    assert shell("armor-apply", file, "--quiet", "--set", "calibration.batch_size=8").code == 0


def test_too_few_windows_to_choose_a_shrinkage_on(shell: Shell, texts: Path) -> None:
    place = "prune_stage.armor_modifiers.ARMORModifier"
    words = ["--set", f"{place}.objective=hessian", "--set", f"{place}.shrinkage=auto"]
    (line,) = problems(shell("armor-apply", texts, *words, "--set", "calibration.samples=3"), 3)
    assert "ARMORModifier: `shrinkage: auto` cannot be chosen on fewer than 4 calibration windows" in line
    assert shell("armor-apply", texts, *words, "--set", "calibration.samples=4", "--quiet").code == 0


def test_everything_at_once_in_the_class_of_the_first(
    shell: Shell, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(texts)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    file = with_modifiers(texts, **REFINERS)
    found = problems(shell("armor-apply", file, "--set", "evaluation.perplexity.dataset=missing.txt"), 7)
    assert [line.partition(" ")[0] for line in found] == ["about", f"{file}:15:", f"{file}:17:", "no"]
    assert "BlockRefineModifier" in found[1]
    assert "DistillationModifier" in found[2]


@pytest.mark.parametrize("words", [[], ["--plan"]])
def test_everything_that_is_wrong_with_a_plan_at_once(shell: Shell, texts: Path, words: list[str]) -> None:
    mapping = yaml.safe_load(texts.read_text())
    mapping["serve"] = {"tensor_parallel": [3]}
    mapping["calibration"]["sequence_length"] = 10_000
    mapping["prune_stage"]["armor_modifiers"] = {
        "ARMORModifier": {**ARMOR, "targets": ["re:.*q_proj$"], "block_size": 8},
        "ARMORModifier@wide": {**ARMOR, "targets": ["re:.*down_proj$"], "block_size": 48},
    }
    mapping["evaluation"] = {"perplexity": {"dataset": "missing.txt"}}
    found = problems(shell("armor-apply", written(texts.parent, mapping), *words), 3)
    for text in (
        "sequence_length 10000 is longer than",
        "block_size 48 does not fit model.layers.0.mlp.down_proj",
        "serve.tensor_parallel 3: model.layers.0.self_attn.q_proj",
        "text.txt has only",
        "no such file or folder",
    ):
        assert any(text in line for line in found), (text, found)


def test_a_plan_looks_whether_data_are_there_and_the_output_is_free(shell: Shell, texts: Path) -> None:
    model = yaml.safe_load(texts.read_text())["model"]
    words = ["--set", "evaluation.perplexity.dataset=builtin:nothing", "--set", "calibration.dataset=gone.txt"]
    found = problems(shell("armor-apply", texts, "--plan", *words, "--output", model), 2)
    for text in ("is never replaced", "there is no embedded text 'nothing'", "gone.txt: No such file"):
        assert any(text in line for line in found), (text, found)
    assert shell("armor-apply", texts, "--plan").code == 0


def test_the_headers_of_the_model_are_read_once(shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from armor_recipes.checkpoint import stored

    read: list[Path] = []
    header = stored.read_header
    monkeypatch.setattr(stored, "read_header", lambda folder: read.append(folder) or header(folder))
    assert shell("armor-apply", file, "--quiet").code == 0
    model = yaml.safe_load(file.read_text())["model"]
    assert [folder for folder in read if str(folder) == model] == [Path(model)]
