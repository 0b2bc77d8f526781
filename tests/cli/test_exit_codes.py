"""Every documented exit code, provoked for real; and no traceback for whatever a user gets wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

from armor_recipes.errors import InputError
from armor_recipes.run import data, job, planning
from tests.support.commands import Shell, write_recipe
from tests.support.engine import ARMOR, make_model
from tests.support.tokenizers import byte_tokenizer


def fail_with(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.fixture
def file(llama: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, llama)


def test_0_done(shell: Shell, file: Path) -> None:
    done = shell("armor-apply", file)
    assert (done.code, done.err.splitlines()[-1]) == (0, "verify")


def test_1_a_bug_here_shows_its_traceback(shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(data, "build_inputs", fail)
    done = shell("armor-apply", file)
    assert done.code == 1
    assert "Traceback" in done.err
    assert "this is a bug in armor-recipes (ZeroDivisionError); please report it" in done.err


@pytest.mark.parametrize(
    "error",
    [SystemExit(0), SystemExit(), SystemExit(2), SystemExit("bye"), typer.Exit(0), typer.Abort(), EOFError()],
    ids=repr,
)
@pytest.mark.parametrize(("module", "name"), [(data, "build_inputs"), (job, "write_checkpoint")])
def test_1_what_typer_takes_for_an_end_of_its_own_is_none_in_a_run(
    shell: Shell,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    error: BaseException,
) -> None:
    monkeypatch.setattr(module, name, fail_with(error))
    done = shell("armor-apply", file)
    assert done.code == 1
    if isinstance(error, SystemExit):
        said = f"error: something called sys.exit({error.code!r}) in the middle of the run, which ended it: {__file__}, line "
        assert done.err.splitlines()[-1].startswith(said)
        assert "Traceback" not in done.err
    else:
        assert f"this is a bug in armor-recipes ({type(error).__name__})" in done.err
    cut = name == "write_checkpoint" and not isinstance(
        error, Exception
    )  # after its steps, and not by an error of the run's own
    journal = [".out.journal"] if cut else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*journal, "recipe.yaml"]


USAGE = [
    ("armor-apply",),
    ("armor-apply", "--no-such-flag"),
    ("armor-apply", "no-such-recipe"),
    ("armor-apply", "."),
    ("armor-apply", "{file}", "--set"),
    ("armor-apply", "{file}", "--set", "nonsense"),
    ("armor-apply", "{file}", "--set", "calibration.samples=many"),
    ("armor-apply", "{file}", "--set", "prune_stage.armor_modifiers.ARMORModifier.block_sise=3"),
    ("armor-apply", "{file}", "--set", "output.path="),
    ("armor-apply", "{file}", "--output", ""),
    ("armor-apply", "{file}", "--output", "recipe.yaml"),
    ("armor-apply", "{file}", "--output", "recipe.yaml/below"),
    ("armor-apply", "{file}", "--output", "/"),
    ("armor-apply", "{file}", "--output", "n" * 300),
    ("armor-apply", "{file}", "--overwrite", "--output", "."),
    ("armor-apply", "{file}", "--device", "toaster"),
    ("armor-apply", "{file}", "--device", "meta"),
    ("armor-apply", "{file}", "--device", "cpu:x"),
    ("armor-apply", "{file}", "--report", "."),
    ("armor-apply", "{file}", "--report", "recipe.yaml/below"),
    ("armor", "no-such-verb"),
    ("armor", "eval"),
    ("armor", "eval", ""),
    ("armor", "eval", "builtin:stdlib-llama", "--windows", "0"),
    ("armor", "eval", "builtin:stdlib-llama", "--sequence-length", "1"),
    ("armor", "eval", "builtin:stdlib-llama", "--dataset", ""),
    ("armor", "eval", "builtin:stdlib-llama", "--device", "toaster"),
    ("armor", "recipes", "no-such-recipe"),
    ("armor", "convert", "no-such-recipe.py"),
    ("armor", "inspect"),
]


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_2_recipe_or_usage(shell: Shell, file: Path, words: tuple[str, ...]) -> None:
    done = shell(*(word.format(file=file) for word in words))
    assert done.code == 2, done.err
    assert done.err.strip()
    assert not done.out


def test_2_says_what_would_do(shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell("armor", "apply", file).err.endswith("To run a recipe: armor-apply RECIPE\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "; use cpu (`armor doctor` says why there is no GPU)" in shell("armor-apply", file, "--device", "meta").err


def test_2_all_errors_of_a_recipe_at_once(shell: Shell, file: Path) -> None:
    text = file.read_text().replace("samples: 5", "sampels: 5").replace("iterations: 3", "iterations: -3")
    file.write_text(text)
    done = shell("armor-apply", file)
    assert done.code == 2
    assert "sampels: unknown key; nearest valid key: samples" in done.err
    assert "iterations: must be" in done.err
    assert done.err.count("recipe.yaml:") == 2


def test_3_plan_refused(shell: Shell, file: Path) -> None:
    done = shell("armor-apply", file, "--set", "prune_stage.armor_modifiers.ARMORModifier.block_size=48")
    assert done.code == 3
    assert "sizes that fit both sides" in done.err


@pytest.mark.parametrize("taken", [False, True])
def test_4_numerical_failure(shell: Shell, tmp_path: Path, taken: bool) -> None:
    model = make_model()
    part = model.model.layers[1].mlp.up_proj if taken else model.model.layers[1].input_layernorm
    part.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "m")
    done = shell("armor-apply", write_recipe(tmp_path, tmp_path / "m"))
    assert done.code == 4
    assert ("model.layers.1.mlp.up_proj (" if taken else "not finite before anything was changed") in done.err
    assert not (tmp_path / "out").exists()


BROKEN_MODELS: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": "x"},
    "heads": {"num_attention_heads": 5},
    "activation": {"hidden_act": "none"},
    "type": {"model_type": "unheard"},
    "sizes": {"intermediate_size": 128},
    "layers": {"num_hidden_layers": 9},
}


@pytest.mark.parametrize("change", BROKEN_MODELS.values(), ids=BROKEN_MODELS)
def test_5_a_broken_model(shell: Shell, llama: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(llama, tmp_path / "m")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    done = shell("armor-apply", write_recipe(tmp_path, tmp_path / "m"))
    assert done.code == 5, done.err


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"version": 3}', '{"tokenizer_class": "Nothing"}'])
def test_5_a_broken_tokenizer(shell: Shell, llama: Path, tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(llama, tmp_path / "m")
    (tmp_path / "m" / name).write_text(content)
    done = shell("armor-apply", write_recipe(tmp_path, tmp_path / "m"))
    assert done.code in (0, 5), done.err  # transformers makes do with some of these
    assert done.code == 0 or "error: the tokenizer of" in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("armor-apply", "{file}", "--set", "model.id=no/where"),
        ("armor-apply", "{file}", "--set", "model.id=builtin:nothing"),
        ("armor-apply", "{file}", "--set", "calibration.dataset=missing.txt"),
        ("armor-apply", "{file}", "--set", "calibration.dataset=builtin:pydoc"),  # the model has no tokenizer
        ("armor-apply", "{file}", "--set", "evaluation.perplexity.dataset=builtin:pydoc-heldout"),
        ("armor-apply", "quickstart", "--set", "calibration.samples=100000000"),
        ("armor", "eval", "no/where"),
        ("armor", "eval", "."),
        ("armor", "eval", "builtin:stdlib-llama", "--dataset", "missing.txt"),
        ("armor", "eval", "builtin:stdlib-llama", "--dataset", "builtin:nothing"),
        ("armor", "eval", "builtin:stdlib-llama", "--windows", "100000000"),
        ("armor", "inspect", "missing"),
        ("armor", "inspect", "recipe.yaml"),
        ("armor", "inspect", "."),
        ("armor", "inspect", ""),
        ("armor", "inspect", "{model}"),  # a dense one
    ],
    ids=" ".join,
)
def test_5_input_unreadable(shell: Shell, file: Path, llama: Path, words: tuple[str, ...]) -> None:
    done = shell(*(word.format(file=file, model=llama) for word in words))
    assert done.code == 5, done.err
    assert done.err.splitlines()[-1].startswith("error: ")
    assert re.search(r" \(see docs/errors\.md#(input|checkpoint)error\)$", done.err.strip())


def test_6_verification_mismatch(shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write: Any = vars(job)["write_checkpoint"]

    def write_then_change(model: Any, *args: Any, **options: Any) -> None:
        write(model, *args, **options)
        model.model.norm.weight.data.add_(1)

    monkeypatch.setattr(job, "write_checkpoint", write_then_change)
    done = shell("armor-apply", file)
    assert done.code == 6
    assert "what was written is complete and kept in" in done.err
    assert not (tmp_path / "out").exists()


def test_7_memory(shell: Shell, file: Path) -> None:
    done = shell("armor-apply", file, "--set", "calibration.samples=1000000000000")
    assert done.code == 7
    assert "lower calibration samples" in done.err


def test_7_disk(shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "out/model.safetensors")

    monkeypatch.setattr(job, "write_checkpoint", fail)
    done = shell("armor-apply", file)
    assert done.code == 7
    assert "no space left" in done.err


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


RAN_OUT: list[tuple[BaseException, str]] = [
    (OSError(28, "No space left on device", "some/file"), "no space left on the disk of some/file"),
    (OSError(122, "Disk quota exceeded"), "no space left on the disk of the output or of the cache"),
    (OSError(27, "File too large", "some/file"), "no space left on the disk of some/file"),
    (OSError(12, "Cannot allocate memory"), "out of memory"),
    (MemoryError(), "out of memory (MemoryError)"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (CUDA out of memory)"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"), "out of memory"),
    (Exception("I/O error: No space left on device (os error 28)"), "no space left on the disk"),
    (caused(InputError("model m cannot be read"), OSError(28, "No space left on device")), "model m cannot be read"),
]


@pytest.mark.parametrize(("error", "said"), RAN_OUT, ids=[repr(error) for error, _ in RAN_OUT])
def test_7_whatever_ran_out_before_or_after_the_run(
    shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    monkeypatch.setattr(planning, "make_plan", fail_with(error))
    done = shell("armor-apply", file)
    assert (done.code, done.err.count("\n")) == (7, 1), done.err
    assert done.err.startswith(f"error: {said}")


def test_8_a_bound_on_perplexity(shell: Shell, llama: Path, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(shutil.copytree(llama, tmp_path / "m"))
    (tmp_path / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 9)  # whose ids are below 96
    words = [
        "evaluation.perplexity={dataset: ./letters.txt, sequence_length: 32}",
        "evaluation.max_perplexity_ratio=0.1",
    ]
    sets = [part for word in words for part in ("--set", word)]
    done = shell("armor-apply", write_recipe(tmp_path, tmp_path / "m"), *sets, "--json")
    assert (done.code, done.out) == (8, "")
    assert "evaluation.max_perplexity_ratio allows 0.1" in done.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["m", "out.rejected"]


def test_130_an_interrupt(shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "write_checkpoint", interrupt)
    done = shell("armor-apply", file)
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        f"interrupted; what was done is kept in {tmp_path / '.out.journal'}: the same command goes on from there, and with --fresh "
        "it starts over"
    )
    assert not (tmp_path / "out").exists()


def test_130_an_interrupt_before_anything_was_done(
    shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(job, "load_model", fail_with(KeyboardInterrupt()))
    done = shell("armor-apply", file)
    assert (done.code, done.err.splitlines()[-1]) == (130, "interrupted; nothing half-written was left behind")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_existing_output_is_refused_before_anything_is_loaded(shell: Shell, file: Path) -> None:
    assert shell("armor-apply", file, "--quiet").code == 0
    done = shell("armor-apply", file)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--overwrite" in done.err
    assert (
        shell(
            "armor-apply",
            file,
            "--overwrite",
            "--set",
            f"prune_stage.armor_modifiers.ARMORModifier.seed={ARMOR['iterations']}",
        ).code
        == 0
    )
