"""`armor lock` and `armor-apply --locked`: what a lock holds and refuses, and what becomes of a run that made other tensors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from armor_recipes.errors import RecipeError
from armor_recipes.modifiers.armor import ARMORModifier
from armor_recipes.run import apply
from armor_recipes.run.recipe_lock import read_lock
from tests.support.commands import Shell, finished, process
from tests.support.engine import ATTENTION, make_model, recipe

KEY = "prune_stage.armor_modifiers.ARMORModifier"
TEXT = "It was a bright cold day in April, and the clocks were striking.\n"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A recipe that calibrates on a file of its own, and what is to be read."""
    (tmp_path / "notes.txt").write_text(TEXT * 60)
    fields = {"targets": [r"re:.*layers\.0.*q_proj$"], "block_size": 32, "iterations": 2}
    mapping = recipe("builtin:stdlib-llama", "out", ARMORModifier=fields)
    mapping["calibration"] = {"dataset": "notes.txt", "samples": 4, "sequence_length": 32}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    return tmp_path


@pytest.fixture
def random(tmp_path: Path, llama: Path) -> Path:
    """A recipe that takes no time."""
    mapping = recipe(llama, "out", ARMORModifier={"targets": [ATTENTION], "block_size": 8, "iterations": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    return tmp_path


def test_a_lock_holds_and_learns_the_tensors(shell: Shell, random: Path) -> None:
    assert shell("armor-apply", "recipe.yaml", "--locked").code == 2  # there is none yet
    done = shell("armor", "lock", "recipe.yaml")
    assert (done.code, "0 tensors" in done.out) == (0, True)
    first = shell("armor-apply", "recipe.yaml", "--locked")
    assert (first.code, "it knew no tensors, and has the hashes of 45 now" in first.err) == (0, True)
    tensors = json.loads((random / "out" / "armor_manifest.json").read_text())["tensors"]
    assert dict(read_lock(random / "recipe.lock.yaml").tensors) == tensors
    again = shell("armor-apply", "recipe.yaml", "--locked", "--output", "elsewhere")
    assert (again.code, "the same bytes of all 45 tensors" in again.err) == (0, True)
    assert "it knows 45 tensors" in shell("armor", "lock", "recipe.yaml", "--check").out
    before = (random / "recipe.lock.yaml").read_bytes()
    assert "45 tensors" in shell("armor", "lock", "recipe.yaml").out  # nothing differs: they are kept
    assert (random / "recipe.lock.yaml").read_bytes() == before
    assert "0 tensors" in shell("armor", "lock", "recipe.yaml", "--set", f"{KEY}.iterations=3").out


def test_one_changed_token_is_refused_before_anything_is_computed(shell: Shell, notes: Path) -> None:
    assert shell("armor", "lock", "recipe.yaml").code == 0
    (notes / "notes.txt").write_text(TEXT.replace("cold", "warm") + TEXT * 59)
    done = shell("armor-apply", "recipe.yaml", "--locked")
    assert (done.code, "nothing was computed" in done.err, "load weights" in done.err) == (6, True, False)
    (line,) = re.findall(r"recipe\.lock\.yaml:(\d+): datasets\.0\.sha256: locked \"[0-9a-f]{64}\", now", done.err)
    assert "sha256" in (notes / "recipe.lock.yaml").read_text().splitlines()[int(line) - 1]
    assert not (notes / "out").exists()
    (notes / "notes.txt").write_text(TEXT.replace("cold", "warm") * 60)  # of every sample
    done = shell("armor", "lock", "recipe.yaml", "--check")
    assert (done.code, "tokens.0.sha256: locked" in done.err) == (6, True)


def test_every_difference_is_listed_with_both_values(
    shell: Shell, random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("armor", "lock", "recipe.yaml").code == 0
    monkeypatch.setattr("armor_recipes.run.recipe_lock.machine_class", lambda _: {"level": "none"})
    monkeypatch.setattr("armor_recipes.report.manifest.release_of", lambda _: "9999")
    done = shell("armor-apply", "recipe.yaml", "--locked", "--set", f"{KEY}.iterations=7", "--set", f"{KEY}.seed=1")
    assert done.code == 6
    for said in (
        f"recipe.{KEY}.iterations: locked 2, now 7",
        f"recipe.{KEY}.seed: locked nothing, now 1",
        f"seeds.{KEY}: locked 0, now 1",
        'now "9999"',
        'machine.level: locked "',
        "the same bytes are not promised",
    ):
        assert said in done.err, said


def test_a_changed_file_of_the_model_is_refused(shell: Shell, random: Path, llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in llama.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert shell("armor", "lock", "recipe.yaml", "--set", "model.id=copy").code == 0
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    (copy / "notes").write_text("which no run reads")
    done = shell("armor-apply", "recipe.yaml", "--locked", "--set", "model.id=copy")
    assert (done.code, done.err.count(": locked ")) == (6, 1)
    assert "model.files.model.safetensors: locked" in done.err


def test_another_tensor_keeps_the_output_out_of_its_place(shell: Shell, random: Path) -> None:
    shell("armor", "lock", "recipe.yaml")
    assert shell("armor-apply", "recipe.yaml", "--locked").code == 0
    file = random / "recipe.lock.yaml"
    text = file.read_text()
    name = "model.layers.1.self_attn.q_proj.armor_a"
    file.write_text(re.sub(rf"[0-9a-f]{{64}}  {re.escape(name)}", f"{'0' * 64}  {name}", text))
    done = shell("armor-apply", "recipe.yaml", "--locked", "--output", "again")
    line = file.read_text().splitlines().index(f"  {'0' * 64}  {name}") + 1
    assert (done.code, f"recipe.lock.yaml:{line}: {name}: locked {'0' * 64}, made " in done.err) == (6, True)
    assert not (random / "again").exists()
    assert shell("armor", "verify", "again.unverified").code == 0
    assert "1 tensor(s) are not those" in done.err


def test_tensors_come_from_an_output_of_the_same_recipe(shell: Shell, random: Path) -> None:
    assert shell("armor-apply", "recipe.yaml").code == 0
    assert "45 tensors" in shell("armor", "lock", "recipe.yaml", "--from", "out").out
    assert "the same bytes" in shell("armor-apply", "recipe.yaml", "--locked", "--overwrite").err
    done = shell("armor", "lock", "recipe.yaml", "--from", "out", "--set", f"{KEY}.iterations=3")
    assert (done.code, "recipe_sha256: armor_manifest.json says" in done.err) == (6, True)
    manifest = random / "out" / "armor_manifest.json"
    old = json.loads(manifest.read_text())
    del old["machine"]  # as earlier releases wrote it
    manifest.write_text(json.dumps(old))
    assert shell("armor", "verify", "out").code == 0
    done = shell("armor", "lock", "recipe.yaml", "--from", "out")
    assert (done.code, "machine: armor_manifest.json says null" in done.err) == (6, True)


def test_sizes_that_a_measurement_settles_are_locked_by_a_run(shell: Shell, random: Path) -> None:
    sizes = f'{KEY}.block_size={{"budget": 0.9}}'
    assert shell("armor", "lock", "recipe.yaml", "--set", sizes).code == 0
    done = shell("armor", "lock", "recipe.yaml", "--set", sizes, "--from", "out")
    assert (done.code, "leaves sizes to a measurement" in done.err) == (2, True)
    for said in ("it knew no tensors", "the same bytes of all"):
        done = shell("armor-apply", "recipe.yaml", "--set", sizes, "--locked", "--overwrite")
        assert (done.code, said in done.err) == (0, True)
    assert shell("armor", "lock", "recipe.yaml", "--set", sizes, "--check", "--from", "out").code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("lock_version: 1", "lock_version: 2"), ":2: lock_version: is 2, and this release reads 1"),
        (("lock_version: 1", "version: 1"), "has no `lock_version`"),
        (("device: cpu", "device: cpu\nmore: 1"), "more: unknown key"),
        (("device: cpu", "device: [cpu]"), "device: must be text"),
        (("device: cpu", "device: !!python/object/apply:os.system [id]"), "device: the YAML tag"),
        (("recipe_sha256: ", "recipe_sha256: x"), ":3: recipe_sha256: "),
        (("device: cpu", "device: cpu\ndevice: cpu"), "the key is already given"),
        (("tensors: |\n", "tensors: |\n  x\n"), "tensors: must be a SHA-256"),
    ],
)
def test_what_is_wrong_with_a_lock_is_told_with_its_line(
    shell: Shell, random: Path, change: tuple[str, str], said: str
) -> None:
    shell("armor-apply", "recipe.yaml", "--quiet")
    shell("armor", "lock", "recipe.yaml", "--from", "out")
    file = random / "recipe.lock.yaml"
    file.write_text(file.read_text().replace(*change, 1))
    done = shell("armor-apply", "recipe.yaml", "--locked", "--overwrite")
    assert (done.code, said in done.err) == (2, True), done.err
    assert shell("armor-apply", "recipe.yaml", "--locked", "--plan").code == 2


def test_what_is_no_lock_is_not_replaced(shell: Shell, random: Path) -> None:
    (random / "recipe.lock.yaml").write_text("mine: 1\n")
    assert shell("armor", "lock", "recipe.yaml").code == 2
    assert shell("armor", "lock", "recipe.yaml", "--from", "out").code == 2
    assert (random / "recipe.lock.yaml").read_text() == "mine: 1\n"


def test_the_lock_of_a_recipe_of_the_package_is_in_the_working_directory(shell: Shell, tmp_path: Path) -> None:
    small = ("--set", "calibration.samples=2", "--set", "calibration.sequence_length=16")
    done = shell("armor", "lock", "quickstart", *small, "--set", "evaluation.perplexity.windows=1")
    assert (done.code, [path.name for path in tmp_path.iterdir()]) == (0, ["quickstart.lock.yaml"])


def test_python_takes_a_lock_and_no_model_in_memory_beside_it(shell: Shell, random: Path) -> None:
    shell("armor", "lock", "recipe.yaml")
    assert "it knew no tensors" in str(apply("recipe.yaml", lock="recipe.lock.yaml").promise)
    with pytest.raises(RecipeError, match="a model or tokenizer in memory"):
        apply("recipe.yaml", make_model(), output="again", lock="recipe.lock.yaml")


def test_a_teacher_is_locked_as_the_model_is(shell: Shell, random: Path, llama: Path) -> None:
    assert shell("armor-apply", "recipe.yaml", "--quiet").code == 0
    dense = random / "dense"
    shutil.copytree(llama, dense)
    refiner = {"DistillationModifier": {"epochs": 1, "calibration": {"samples": 32}}}
    mapping = {**recipe("out", "taught", **refiner), "model": {"id": "out", "teacher": "dense"}}
    (random / "taught.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    assert shell("armor", "lock", "taught.yaml").code == 0
    assert shell("armor", "lock", "taught.yaml", "--check").code == 0
    config = dense / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    done = shell("armor", "lock", "taught.yaml", "--check")
    assert (done.code, done.err.count(": locked "), "teacher.files.config.json" in done.err) == (6, 1, True)


def test_the_release_of_a_plug_in_is_locked(shell: Shell, random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ARMORModifier, "__module__", "plugin.modifier")
    monkeypatch.setattr("armor_recipes.run.recipe_lock.packages_distributions", lambda: {"plugin": ["numpy", "numpy"]})
    monkeypatch.setattr("armor_recipes.run.recipe_lock.release_of", lambda name: f"{name} 7")
    assert shell("armor", "lock", "recipe.yaml").code == 0
    assert read_lock(random / "recipe.lock.yaml").content.versions["numpy"] == "numpy 7"


def test_another_machine_class_is_refused_with_what_is_promised_there(shell: Shell, random: Path) -> None:
    assert shell("armor", "lock", "recipe.yaml").code == 0
    elsewhere = process("armor-apply", "recipe.yaml", "--locked", cwd=random, ATEN_CPU_CAPABILITY="default")
    done = finished(elsewhere)
    assert (done.code, done.err.count(": locked ")) == (6, 2)
    assert 'machine.level: locked "' in done.err
    assert 'machine.limits: locked "", now "ATEN_CPU_CAPABILITY=default"' in done.err
    assert "armor diff A B --tolerance" in done.err
    assert not (random / "out").exists()
