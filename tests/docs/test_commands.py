"""Blocks of the docs: the commands that are run here, page by page, in a folder of their own, and those tagged with what runs them.

Python runs in `test_python.py`, a recipe is planned in `test_recipes.py`, a shell block runs here. Where that takes hours, a
server or a download, `<!-- run by make TARGET -->` stands above the block.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

import armor_recipes
from tests.support.commands import MAINS, Shell, surroundings
from tests.support.pages import FROM_LLM_COMPRESSOR, PAGES, ROOT, Block, blocks, first_recipe, lines, named_recipes
from tests.support.tokenizers import byte_tokenizer

#: Every language that a block may have. Those that hold no command, recipe or program are not run.
RUN, SHOWN = {"bash", "python", "yaml"}, {"text", "json", "toml"}
SHELL = [page for page in PAGES if any(block.tag is None for block in blocks("bash", page=page))]
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_every_block_has_a_language_that_is_run_or_only_shown() -> None:
    fences = re.compile(r"^ *```(.*)$", re.MULTILINE)
    for page in PAGES:
        opened = fences.findall(page.read_text(encoding="utf-8"))[::2]
        assert set(opened) <= RUN | SHOWN, page


def test_tags_name_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    tagged = [block for block in blocks(*RUN) if block.tag is not None]
    wrong = [
        str(block) for block in tagged for tag in str(block.tag).split(", ") if tag.removeprefix("make ") not in targets
    ]
    assert tagged
    assert not wrong
    assert not [page for page in PAGES if re.search(r"<!-- run by .*-->\n(?! *```)", page.read_text(encoding="utf-8"))]


def test_what_is_not_tagged_is_what_the_tests_run() -> None:
    untagged = [(block, line) for block in blocks("bash") if block.tag is None for line in lines(block)]
    assert not [f"{block}: {line}" for block, line in untagged if shlex.split(line)[0] not in (*MAINS, "torchrun")]


def test_a_command_that_can_run_is_not_only_shown() -> None:
    shown = [(block, line) for block in blocks(*SHOWN) for line in lines(block)]
    assert not [f"{block}: {line}" for block, line in shown if re.match(r"(armor|armor-apply|make|python) ", line)]


def test_commands_fit_a_terminal_of_80_columns() -> None:
    wide = [
        f"{block}: {line}"
        for block in blocks("bash")
        if block.page.parent.name != "benchmarks"  # as they were run
        for line in block.text.splitlines()
        if len(line) > 80
    ]
    assert not wide


def test_commands_of_a_page_run_until_one_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    block = "{}```bash\n{}\n```\n\n"
    tag = "<!-- run by make commands -->\n"
    page.write_text(
        block.format(tag, "echo one") + block.format("", "echo two") + block.format(tag, "false; echo three")
    )
    command = [sys.executable, str(ROOT / "tools" / "commands.py"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "echo one\none\nfalse; echo three\n")
    page.write_text(block.format("", "echo two"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "has no commands that `make commands` runs" in done.stderr) == (1, True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages go on from: outputs of the first recipe and of `quickstart`, and inputs that a reader has."""
    home = tmp_path_factory.mktemp("made")
    (home / "first.yaml").write_text(first_recipe(), encoding="utf-8")
    for recipe, name in ((str(home / "first.yaml"), "first"), ("quickstart", "quickstart")):
        armor_recipes.apply(recipe, output=home / "out" / name)
    for name in ("again", "elsewhere"):
        shutil.copytree(home / "out" / "quickstart", home / "out" / name)
    sentence = "It was a bright cold day in April, and the clocks were striking.\n"
    (home / "notes.txt").write_text(sentence * 400)
    (home / "wikitext.txt").write_text(sentence * 400)
    (home / "recipe.yaml").write_text(FROM_LLM_COMPRESSOR)
    (home / "quantise.py").write_text(
        "from llmcompressor.modifiers.quantization import QuantizationModifier\n"
        'recipe = [QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])]\n'
    )
    (home / "pairs.jsonl").write_text("\n".join(json.dumps({"query": w, "document": w}) for w in ("stone", "river")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for folder in ("out/encoder", "models/encoder"):
            BertModel(BertConfig(vocab_size=300, **TINY)).save_pretrained(home / folder)
            byte_tokenizer().save_pretrained(home / folder)
        for folder in ("out/vit", "models/vit"):
            classes = {0: "cat", 1: "dog"}
            config = ViTConfig(**TINY, image_size=4, patch_size=2, id2label=classes)
            ViTForImageClassification(config).save_pretrained(home / folder)
            processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 4, "width": 4}}
            (home / folder / "preprocessor_config.json").write_text(json.dumps(processor))
    image = pytest.importorskip("PIL.Image")
    for name in ("cat", "dog"):
        (home / "photos" / name).mkdir(parents=True)
        image.new("L", (6, 5), 90).save(home / "photos" / name / "one.png")
    return home


def starts_from_nothing(page: Path) -> bool:
    """Whether the page makes `out/first` itself."""
    return page.name in ("tutorial.md", "ci.md")


@pytest.mark.slow  # a dozen runs on the embedded model
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", SHELL, ids=lambda page: page.name)
def test_commands_run(
    page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(
        made, tmp_path / "here", ignore=shutil.ignore_patterns("out") if starts_from_nothing(page) else None
    )
    (tmp_path / "here" / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path / "here")
    for name, text in named_recipes(page).items():
        Path(name).write_text(text, encoding="utf-8")
    run = runner(Shell(monkeypatch, capsys))
    for block in blocks("bash", "python", page=page):
        if block.language == "python" and block.tag == "make test-slow":  # goes on from the commands before it
            exec(compile("\n" * block.line + block.text, str(block.page), "exec"), {"__name__": "page"})
        for line in lines(block) if block.language == "bash" and block.tag is None else ():
            run(block, line)


def runner(shell: Shell) -> Callable[[Block, str], None]:
    """Runs a line of a block, which must end well; a redirection is made here."""

    def run(block: Block, line: str) -> None:
        words = shlex.split(line)
        words, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
        if words[0] in MAINS:
            done = shell(*words)
            code, out, err = done.code, done.out, done.err
        else:
            program = Path(sys.executable).with_name(words[0])
            there = subprocess.run(
                [program, *words[1:]], env=surroundings(), capture_output=True, text=True, check=False
            )
            code, out, err = there.returncode, there.stdout, there.stderr
        assert code == 0, f"{block}: {line}\n{err}"
        if target is not None:
            Path(target).write_text(out, encoding="utf-8")

    return run
