"""`armor init`: the recipes that it writes pass, and nothing is replaced or asked for where nobody answers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from tests.support.commands import Shell
from tests.support.pages import planned_model

FLAGS = ("--calibration", "mix", "--block-size", "32")


@pytest.mark.parametrize(("block", "grow"), [("32", 0), ("48", 0), ("64", 60)])
def test_a_recipe_passes_check_and_plan(shell: Shell, tmp_path: Path, block: str, grow: int) -> None:
    model = planned_model("smollm2", tmp_path / "my model")
    done = shell("armor", "init", "sub/my.yaml", "--model", model, "--calibration", "mix", "--block-size", block)
    assert (done.code, done.err) == (0, "")
    assert done.out == "sub/my.yaml is written; next: armor-apply sub/my.yaml --plan\n"
    text = (tmp_path / "sub" / "my.yaml").read_text()
    assert (
        "# LlamaForCausalLM in bfloat16: 210 linear weights in 30 blocks (576x576, 192x576, 1536x576, 576x1536)."
        in text
    )
    assert "# output layer: tied to the embeddings, so left as it is." in text
    assert shell("armor", "check", "sub/my.yaml").code == 0
    done = shell("armor-apply", "sub/my.yaml", "--plan", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)["plan"]
    percent = 100 * plan["totals"]["bytes_after"] / plan["totals"]["bytes_before"]
    told = f"; {grow} weights take more than dense with it" if grow else ""
    assert f"block_size: {block}  # {percent:.0f} % of the dense bytes{told}; others: 8 (" in text
    assert sum(row["bytes_after"] >= row["bytes_before"] for row in plan["modules"]) == grow


def test_a_run_of_it(shell: Shell, tmp_path: Path) -> None:
    assert shell("armor", "init", "--model", "builtin:stdlib-llama", *FLAGS).code == 0
    small = ("--set", "calibration.samples=4", "--set", "evaluation.perplexity.windows=2")
    small += ("--set", "prune_stage.armor_modifiers.ARMORModifier.iterations=1")
    done = shell("armor-apply", "recipe.yaml", *small, "--quiet")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "stdlib-llama-armor" / "model.safetensors").exists()


def test_names_of_any_characters(shell: Shell, tmp_path: Path) -> None:
    model = planned_model("smollm2", tmp_path / "mödel 🎉: v1 #2")
    (tmp_path / "🎉 é.txt").write_text("A text.")
    words = ("--model", model, "--calibration", "🎉 é.txt", "--block-size", "32")
    done = shell("armor", "init", "--", "-my.yaml", *words)
    assert done.code == 2  # flags come before the dashes
    done = shell("armor", "init", *words, "--", "-my.yaml")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("next: armor-apply ./-my.yaml --plan\n")
    text = (tmp_path / "-my.yaml").read_text()
    found = yaml.safe_load(text)
    assert found["calibration"]["dataset"] == "🎉 é.txt"
    assert found["output"]["path"] == "out/mödel 🎉: v1 #2-armor"
    assert "mödel 🎉" in text
    assert shell("armor", "check", "./-my.yaml").code == 0


def test_a_model_that_writes_a_text_for_a_text(shell: Shell, tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=64).save_pretrained(tmp_path / "t5")
    words = ("armor", "init", "--model", "t5", "--block-size", "8", "--calibration")
    done = shell(*words, "builtin:random-inputs")
    assert (done.code, done.err) == (0, "")
    assert "# evaluation: what is measured" in (tmp_path / "recipe.yaml").read_text()
    assert shell("armor-apply", "recipe.yaml", "--plan", "--quiet").code == 0


def test_sides_that_no_size_divides_stay_dense(shell: Shell, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 240, "intermediate_size": 601, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 5, "num_key_value_heads": 5}
    LlamaConfig(**sizes, **heads, tie_word_embeddings=False, dtype="float32").save_pretrained(tmp_path / "odd")
    (tmp_path / "notes.txt").write_text("A text.")
    done = shell("armor", "init", "--model", "odd", "--calibration", "notes.txt", "--block-size", "24")
    assert done.code == 0, done.err
    text = (tmp_path / "recipe.yaml").read_text()
    assert "unfit: skip  # 6 weights whose sides 24 does not divide stay dense" in text
    assert "# output layer: not tied, and left as it is." in text
    assert yaml.safe_load(text)["calibration"]["dataset"] == "notes.txt"
    assert shell("armor", "check", "recipe.yaml").code == 0


def test_nothing_is_replaced_unless_it_is_asked_for(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    words = ("armor", "init", "--model", "builtin:stdlib-llama", *FLAGS)
    done = shell(*words)
    assert (done.code, "recipe.yaml exists: pass --overwrite" in done.err) == (2, True)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    assert shell(*words, "--overwrite").code == 0
    assert shell("armor", "init", ".", "--model", "builtin:stdlib-llama", *FLAGS).code == 2


def test_what_cannot_be_is_told_and_nothing_is_written(shell: Shell, tmp_path: Path) -> None:
    for words, code, says in (
        (("--model", "nowhere", *FLAGS), 5, "nowhere"),
        (
            ("--model", "builtin:stdlib-llama", "--calibration", "mix", "--block-size", "7"),
            2,
            "is none of those for this model: 8, 16,",
        ),
        (
            ("--model", "builtin:stdlib-llama", "--calibration", "builtin:continuations", "--block-size", "32"),
            5,
            "builtin:continuations is questions for an evaluation",
        ),
        ((), 2, "give --model, --calibration, --block-size, too"),
        (("--model", "builtin:stdlib-llama", "--block-size", "32"), 2, "give --calibration, too"),
        (("--model", "builtin:stdlib-llama", "--calibration", "none.txt", "--block-size", "32"), 5, "none.txt"),
        (("--model", "builtin:stdlib-llama", "--calibration", "builtin:x", "--block-size", "32"), 5, "x"),
        (("--model", "", *FLAGS), 2, "must not be empty"),
        (("--model", "builtin:stdlib-llama", "--calibration", "mix", "--block-size", "0"), 2, "--block-size"),
        (("/proc/a.yaml", "--model", "builtin:stdlib-llama", *FLAGS), 2, "recipe /proc/a.yaml cannot be written"),
        (("/dev/null", "--overwrite", "--model", "builtin:stdlib-llama", *FLAGS), 2, "is no regular file"),
    ):
        shell.monkeypatch.setattr("sys.stdin", io.StringIO())
        done = shell("armor", "init", *words)
        assert (done.code, says in done.err) == (code, True), done.err
    assert not list(tmp_path.iterdir())


def test_a_link_goes_on_leading_to_the_file(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "r.yaml").write_text("mine")
    (tmp_path / "r.yaml").symlink_to("there/r.yaml")
    assert shell("armor", "init", "r.yaml", "--overwrite", "--model", "builtin:stdlib-llama", *FLAGS).code == 0
    assert (tmp_path / "r.yaml").is_symlink()
    assert yaml.safe_load((tmp_path / "there" / "r.yaml").read_text())["model"] == "builtin:stdlib-llama"


def test_a_file_of_data_is_named_from_the_recipe(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("A text. " * 20_000)
    words = ("--model", "builtin:stdlib-llama", "--calibration", "notes.txt", "--block-size", "32")
    assert shell("armor", "init", "deep/r.yaml", *words).code == 0
    assert yaml.safe_load((tmp_path / "deep" / "r.yaml").read_text())["calibration"]["dataset"] == "../notes.txt"
    assert shell("armor-apply", "deep/r.yaml", "--plan").code == 0


@pytest.mark.parametrize(
    ("end", "code", "said"), [(EOFError, 2, "the input ended"), (KeyboardInterrupt, 130, "interrupted")]
)
def test_a_question_may_be_left_unanswered(
    shell: Shell, tmp_path: Path, end: type[BaseException], code: int, said: str
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, *_: object) -> str:
            raise end

    shell.monkeypatch.setattr("sys.stdin", Terminal())
    done = shell("armor", "init")
    assert (done.code, said in done.err) == (code, True), done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_three_questions_on_a_terminal(shell: Shell, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shell.monkeypatch.setattr("sys.stdin", Terminal("builtin:stdlib-llama\nnone.txt\n\n7\n\n"))
    done = shell("armor", "init")
    assert done.code == 0, done.err
    assert [number in done.err for number in ("1. Model", "2. Calibrate on", "3. Block size")] == [True] * 3
    assert "block sizes and bytes after: 8 (" in done.err
    assert done.err.count("2. Calibrate on") == done.err.count("3. Block size") == 2
    assert "none.txt: No such file" in done.err
    assert "give one of 8, 16, " in done.err  # not for 7
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert (
        recipe["prune_stage"]["armor_modifiers"]["ARMORModifier"]["block_size"] == 32
    )  # with 64, 16 weights would grow
    assert len(recipe["calibration"]["dataset"]) == 4
