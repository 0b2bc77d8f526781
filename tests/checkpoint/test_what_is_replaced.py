"""`--overwrite` replaces what this tool or `save_pretrained` wrote, and nothing else of anybody's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from armor_recipes.checkpoint.staging import check_destination, staged
from armor_recipes.errors import RecipeError

CONFIG = json.dumps({"model_type": "llama"})


def model_folder(folder: Path, *, manifest: object = None) -> Path:
    folder.mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "tokenizer.json", "generation_config.json"):
        (folder / name).write_text("x")
    (folder / "config.json").write_text(CONFIG)
    if manifest is not None:
        (folder / "armor_manifest.json").write_text(json.dumps(manifest))
    return folder


def refused(folder: Path, message: str, **options: object) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(RecipeError, match=message):
        check_destination(folder, overwrite=True, **options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=message), staged(folder, overwrite=True, **options):  # type: ignore[arg-type]
        pass
    assert sorted(folder.rglob("*")) == before


def test_what_save_pretrained_wrote_is_replaced(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "out")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    with staged(folder, overwrite=True) as fresh:
        (fresh / "config.json").write_text(CONFIG)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_the_manifest_lists_is_replaced(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "out", manifest={"format_version": 2, "files": ["LICENSE.rtf"]})
    (folder / "LICENSE.rtf").write_text("x")
    check_destination(folder, overwrite=True)
    old = model_folder(tmp_path / "old", manifest={"format_version": 1})
    (old / "recipe.yaml").write_text("x")
    check_destination(old, overwrite=True)


@pytest.mark.parametrize(
    "name",
    [
        "thesis.txt",
        ".git/HEAD",
        "data/mine.txt",
        "README.md",
        "recipe.yaml",
        "notes/",
        "train.py",
        "checkpoint-500/optimizer.pt",
    ],
)
def test_a_file_that_is_not_ours_keeps_the_folder(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "out")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("years of work")
    refused(folder, f"holds {name}, which neither this tool nor save_pretrained wrote")


def test_a_link_to_a_folder_is_not_ours(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "out")
    (tmp_path / "data").mkdir()
    (folder / "data").symlink_to(tmp_path / "data")
    refused(folder, "holds data, which neither")


@pytest.mark.parametrize(
    "config", ['{"lr": 1e-3}', "[]", "not JSON", '{"model_type": 3}', pytest.param("", id="empty")]
)
def test_a_config_json_alone_makes_no_model(tmp_path: Path, config: str) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text(config)
    refused(tmp_path / "project", "is no model")


def test_where_one_stands_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "out")
    (tmp_path / "out" / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    refused(folder, "is or holds the working directory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(folder))
    refused(folder, "is or holds the home folder")


def test_what_a_run_reads_is_never_replaced(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "out")
    refused(folder, r"is or holds the dataset mine\.txt", precious={"the dataset mine.txt": folder / "mine.txt"})
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(RecipeError, match="is or holds the recipe"):
        check_destination(link, overwrite=True, precious={"the recipe r.yaml": folder / "r.yaml"})
