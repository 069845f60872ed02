"""Measure trained generators on the test pictures of a data set that ships masks and true translations.

    python evaluate.py --dataset_name solid2striped --checkpoint demo
    python evaluate.py --dataset_name solid2striped --checkpoint demo_0 demo_1 demo_2 demo_3 demo_4

Beside ``testA`` the data set holds ``testA_mask`` (objects above grey 127) and ``testA_truth`` (the true
translation), file for file in the same order; likewise for B. One row for each checkpoint and direction, the
means over the test pictures: the IoU of foreground attention (1 - background mask > 1/2) with the objects, and
the mean absolute error to the truth, for the translation and for the untranslated picture, on [-1, 1].
With several checkpoints, the median and the worst of each figure follow.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import utils
from datasets import Picture, find_pictures, find_side, normalise, unaugmented
from metrics import intersection_over_union, mean_absolute_error
from models import open_generator
from utils import InputError

DIRECTIONS = ("AtoB", "BtoA")


def companions(root: Path, name: str, pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures of the folder ``name``, one for each test picture; InputError where they do not match."""
    found = find_pictures(root / name)
    if [p.path.stem for p in found] != [p.path.stem for p in pictures]:
        raise InputError(
            f"{root / name}: {len(found)} pictures, expected {len(pictures)}, named as the test pictures are"
        )
    return found


@torch.no_grad()
def evaluate(root: Path, checkpoint: str, direction: str, device: torch.device) -> dict[str, float]:
    """The figures of one generator: iou (absent for a generator without attention), error, untranslated.

    Raises InputError when the checkpoint or the pictures are not there or do not fit.
    """
    generator, about = open_generator(checkpoint, direction)
    generator.to(device).eval()
    options = about.get("options", {})
    size = options.get("img_height", 256), options.get("img_width", 256)
    channels, side = generator.settings["channels"], direction[0]

    def load(pictures: Sequence[Picture], channels: int) -> Tensor:
        tensors = [unaugmented(p, size, channels, options.get("resize", "squash")) for p in pictures]
        return normalise(torch.stack(tensors))

    pictures = find_side(root, "test", side)
    if not pictures:
        raise InputError(f"{root / f'test{side}'}: no test pictures there")
    masks = load(companions(root, f"test{side}_mask", pictures), 1)
    truths = load(companions(root, f"test{side}_truth", pictures), channels)
    reals = load(pictures, channels)
    images, foregrounds = [], []
    for real in reals:
        translation = generator(real[None].to(device))
        images.append(translation.image.cpu())
        if translation.foreground is not None:
            foregrounds.append(translation.foreground.cpu())
    figures = {
        "error": mean_absolute_error(torch.cat(images), truths).mean().item(),
        "untranslated": mean_absolute_error(reals, truths).mean().item(),
    }
    if foregrounds:
        ious = intersection_over_union(torch.cat(foregrounds), masks / 2 + 0.5)
        figures = {"iou": ious.mean().item(), **figures}
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure attention and translations against masks and true counterparts."
    )
    parser.add_argument("--dataset_name", default="solid2striped", help="folder below --data_dir")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    parser.add_argument(
        "--checkpoint", nargs="+", required=True, help="runs, shipped weights, folders or generator files"
    )
    parser.add_argument(
        "--direction",
        nargs="+",
        choices=DIRECTIONS,
        default=DIRECTIONS,
        help="which way to translate; a single file serves its own way alone",
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    options = parser.parse_args(argv)
    names = ("iou", "error", "untranslated")

    def work() -> int:
        device, root = utils.pick_device(options.device), options.data_dir / options.dataset_name
        print(f"{'checkpoint':<24}{'direction':<12}" + "".join(f"{name:>14}" for name in names))
        for direction in options.direction:
            rows = []
            for checkpoint in options.checkpoint:
                rows.append(evaluate(root, checkpoint, direction, device))
                show(checkpoint, direction, rows[-1], names)
            if len(rows) > 1:
                columns = {name: [row[name] for row in rows] for name in names if all(name in row for row in rows)}
                show("median", direction, {name: statistics.median(c) for name, c in columns.items()}, names)
                worst = {name: min(c) if name == "iou" else max(c) for name, c in columns.items()}
                show("worst", direction, worst, names)
        return 0

    return utils.run_script("evaluate.py", work)


def show(checkpoint: str, direction: str, figures: dict[str, float], names: Sequence[str]) -> None:
    cells = (f"{figures[name]:>14.3f}" if name in figures else f"{'-':>14}" for name in names)
    print(f"{checkpoint:<24}{direction:<12}" + "".join(cells))


if __name__ == "__main__":
    sys.exit(main())
