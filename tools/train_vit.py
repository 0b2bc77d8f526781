"""Train the small vision transformer that benchmarks/kinds.py prunes, and write it with its images.

    python tools/train_vit.py --output models/digits-vit

transformers' ViTForImageClassification on handwritten digits (tools/digits.py): a few minutes on one core, and one seed. Beside the
model lie `calibration.safetensors` (`pixel_values`, of training scans) and `heldout.safetensors` (`pixel_values` and
`labels`, of scans that training never saw).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import SIDE, Labelled, place, placed, read_scans, split
from safetensors.torch import save_file
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification
from wheel import make_folder

EPOCHS, BATCH, RATE, WARM_UP = 120, 64, 1e-3, 100
CONFIG = ViTConfig(
    image_size=SIDE,
    patch_size=7,
    num_channels=1,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CONFIG.num_labels = 10  # a property, unknown to type checkers as an argument


def accuracy(model: torch.nn.Module, images: Labelled) -> float:
    """Share of images whose class has the highest logit."""
    with torch.inference_mode():
        found = [model(pixel_values=batch).logits.argmax(-1) for batch in images.pixels.split(256)]
    return float((torch.cat(found) == images.labels).double().mean())


def rate_at(step: int, total: int) -> float:
    """Linear warm-up, then down to 0 by a half cosine, relative to `RATE`."""
    falling = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / total)).item())
    return min(1.0, (step + 1) / WARM_UP) * falling


def train(scans: Labelled, held_out: Labelled) -> ViTForImageClassification:
    """A model trained on new placements of the scans in each epoch."""
    torch.manual_seed(0)  # transformers draws the first weights from the global generator
    model = ViTForImageClassification(CONFIG)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = -(-len(scans.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, EPOCHS * steps))
    for epoch in range(EPOCHS):
        model.train()
        images = place(scans, generator)
        for picked in torch.randperm(len(images.labels), generator=generator).split(BATCH):
            loss = functional.cross_entropy(model(pixel_values=images.pixels[picked]).logits, images.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: held-out accuracy {accuracy(model.eval(), held_out):.4f}", flush=True)
    model.eval()
    return model


def fill(staged: Path, _: Path) -> None:
    """Train, and write model and images."""
    torch.set_num_threads(1)  # the same bits on every number of cores
    scans, rest = split(read_scans())
    held_out = placed(rest, times=4, seed=2)
    train(scans, held_out).save_pretrained(staged)
    save_file({"pixel_values": placed(scans, times=1, seed=3).pixels}, staged / "calibration.safetensors")
    save_file({"pixel_values": held_out.pixels, "labels": held_out.labels}, staged / "heldout.safetensors")


def main() -> None:
    """Parse the command line; train unless the folder is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the model folder to make")
    make_folder(parser.parse_args().output.absolute(), fill)


if __name__ == "__main__":
    main()
