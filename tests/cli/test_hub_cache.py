"""A hub model of which the local cache has the files, without a network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from armor_recipes import builtin
from tests.support.commands import surroundings
from tests.support.engine import ARMOR, recipe, save_model

REVISION = "0123456789abcdef0123456789abcdef01234567"

#: A run, and then a plan with an adapter in the model's folder. The place of the cache is read when a hub's client is imported.
TWICE = """
import sys
from pathlib import Path
from armor_recipes.cli.apply import main
file, link = sys.argv[1:]
sys.argv[1:] = [file, "--quiet"]
try:
    main()
except SystemExit as done:
    print("exit code", done.code or 0, file=sys.stderr)
Path(link).write_text("{}")
sys.argv[1:] = [file, "--plan"]
main()
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The hub's cache with the model org/model: links of a snapshot to blobs; its config.json names no dtype."""
    model = save_model(tmp_path / "model")
    config = {k: v for k, v in json.loads((model / "config.json").read_text()).items() if k != "dtype"}
    (model / "config.json").write_text(json.dumps(config))
    shutil.copyfile(builtin.model_folder("stdlib-llama") / "tokenizer.json", model / "tokenizer.json")
    (model / "added_tokens.json").write_text("{}")
    (model / "LICENSE.txt").write_text("as it is")
    home = tmp_path / "cache" / "models--org--model"
    snapshot = home / "snapshots" / REVISION
    for folder in (snapshot, home / "blobs", home / "refs"):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return tmp_path / "cache"


def test_a_cached_hub_model(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    mapping = recipe("org/model", tmp_path / "out", ARMORModifier={**ARMOR, "iterations": 1})
    file.write_text(yaml.safe_dump(mapping))
    link = cache / "models--org--model" / "snapshots" / REVISION / "adapter_config.json"
    environment = {**surroundings(), "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TWICE, str(file), str(link)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("exit code 0\n"), done.stderr
    assert done.returncode == 3
    assert "holds a PEFT adapter" in done.stderr
    out = tmp_path / "out"
    assert (out / "LICENSE.txt").read_text() == "as it is"
    assert (out / "added_tokens.json").read_text() == "{}"
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["base_model"] == "org/model"
    assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {"torch.bfloat16", "torch.uint8"}
