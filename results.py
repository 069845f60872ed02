"""What runs on real pictures have reached: the README's table, picture sheets, weights small enough to ship.

    python results.py                                           # measure the finished runs here, write the table
    python results.py --train results_horse2zebra_cyclegan      # train one of them first, or go on with it
    python results.py --ship results_horse2zebra_attentiongan --as horse2zebra_attentiongan

A run of the table is an ordinary one, ``train.py`` with the flags that stand in ``RUNS``, and its figures are those of
``evaluate.py``. They are kept in ``docs/results.json``, so that a run which is not on this machine keeps its rows. The
table goes into the README, between two marks, sheets of each run's pictures into ``docs/``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

import compare
import evaluate
import utils
from datasets import find_side
from metrics import EFFICIENTNET
from models import Translation, open_generators, pack_generator
from utils import SAVED_MODELS, InputError

DOCS, README = Path("docs"), Path("README.md")
MARKS = "<!-- written by results.py -->\n", "<!-- down to here -->\n"
SHOWN = 6  # pictures on a sheet
EXTRACTOR = EFFICIENTNET  # of KID and the class rate; it comes as packages, so that everybody can measure again


class Run(NamedTuple):
    """Rows of the table: the data set, the pictures' side, the system as the table names it, the run's name, and the
    other flags of ``train.py``.
    """

    dataset: str
    size: int
    system: str
    name: str
    own: str

    @property
    def flags(self) -> str:
        return f"--dataset_name {self.dataset} --img_height {self.size} --img_width {self.size} {self.own}"

    @property
    def group(self) -> tuple[str, int]:
        """Runs of one are measured and shown together: figures depend on the size."""
        return self.dataset, self.size


SIDES = {
    "horse2zebra": ("horse", "zebra"),
    "apple2orange": ("apple", "orange"),
    "facades": ("photograph", "labels"),
    "monet2photo": ("Monet", "photograph"),
    "monet2photo_sample": ("Monet", "photograph"),  # its pictures: docs/monet2photo_sample.txt
    "summer2winter_yosemite": ("summer", "winter"),
}
# Networks and pictures that one core of a processor gets through in two hours; patches that fit the pictures.
SMALL = "--ngf 32 --n_residual_blocks 6 --n_layers_D 2 --upsample nearest --sample_interval 0"
# 18,300 to 18,900 pairs each.
SCHEDULES = {
    "horse2zebra": "--n_epochs 14 --decay_epoch 9",
    "apple2orange": "--n_epochs 18 --decay_epoch 12",
    "facades": "--n_epochs 47 --decay_epoch 31",
    "monet2photo": "--n_epochs 3 --decay_epoch 2",
    "monet2photo_sample": "--n_epochs 51 --decay_epoch 34",
    "summer2winter_yosemite": "--n_epochs 15 --decay_epoch 10",
}
SYSTEMS = {
    "AttentionGAN II": "--system attentiongan",
    "CycleGAN": "--system cyclegan",
    "AttentionGAN I": "--system attentiongan1 --curriculum_epochs 1",
}
RUNS = (
    *(
        Run(dataset, 64, title, f"results_{dataset}_{flags.split()[1]}", f"{flags} {SMALL} {SCHEDULES[dataset]}")
        for dataset in SIDES
        for title, flags in SYSTEMS.items()
        if dataset == "horse2zebra" or title == "AttentionGAN II"
    ),
    Run(
        "horse2zebra",
        64,
        "AttentionGAN I, unguided, led",
        "results_horse2zebra_attentiongan1_led",
        f"--system attentiongan1 --attn_disc none --curriculum_epochs 14 {SMALL} {SCHEDULES['horse2zebra']}",
    ),
    # At 64 x 64 the stripes of AttentionGAN II came out as checks, perhaps because they are narrower than the 4 x 4
    # pixels of a feature.
    *(
        Run(
            "horse2zebra",
            128,
            f"{title}, after 18,676 pairs at 64 × 64",
            f"results_horse2zebra_{system}_128",
            f"--system {system} {own}{SMALL} --lr 0.0001 --n_epochs 12 --decay_epoch 1 "
            f"--init_from results_horse2zebra_{system}/checkpoint.pt",
        )
        for title, system, own in (
            ("AttentionGAN II", "attentiongan", ""),
            ("CycleGAN", "cyclegan", ""),
            ("AttentionGAN I", "attentiongan1", "--curriculum_epochs 0 "),  # has had it
        )
    ),
)
GROUPS = tuple(dict.fromkeys(sorted((run.group for run in RUNS), key=lambda group: list(SIDES).index(group[0]))))
# What others print, under their own protocols: KID × 100 from the AttentionGAN paper, FID from MMGeneration's CycleGAN.
PUBLISHED = {
    ("horse2zebra", "AtoB"): "AttentionGAN 100 KID 2.03, CycleGAN FID 64.5",
    ("horse2zebra", "BtoA"): "AttentionGAN 100 KID 6.48, CycleGAN FID 141.2",
    ("apple2orange", "AtoB"): "AttentionGAN 100 KID 10.03",
    ("apple2orange", "BtoA"): "AttentionGAN 100 KID 4.38",
    ("summer2winter_yosemite", "AtoB"): "CycleGAN FID 83.7",
    ("summer2winter_yosemite", "BtoA"): "CycleGAN FID 72.8",
}

About = Mapping[str, Any]  # what is known of a run, see ``measure``


# ----------------------------------------------------------------------------------------------------------
#  Measuring
# ----------------------------------------------------------------------------------------------------------


def is_here(run: Run) -> bool:
    """Whether its generators are on this machine, and not those of a training that goes on."""
    state = compare.find_state(run.name)
    return (SAVED_MODELS / run.name / "AtoB.pt").exists() and (state is None or compare.is_finished(state))


def measure(dataset: str, runs: Sequence[Run], data_dir: Path) -> dict[str, About]:
    """By name, how each run of a group came about, and its rows of ``evaluation.json``. Raises InputError."""
    arguments = ["--dataset_name", dataset, "--data_dir", str(data_dir), "--extractor", EXTRACTOR]
    if evaluate.main([*arguments, "--checkpoint", *(run.name for run in runs)]):
        raise InputError(f"the runs of {dataset} could not be measured")
    known = {}
    for run in runs:
        _, about = next(iter(open_generators(run.name).values()))
        rows = json.loads((utils.IMAGES / run.name / "evaluation.json").read_text())["rows"]
        known[run.name] = {
            "pairs": about["step"] * about["options"]["batch_size"],
            "hours": hours_taken(SAVED_MODELS / run.name / "log.jsonl", about["options"]["batch_size"]),
            "rows": [row for row in rows if (row["dataset"], row["extractor"]) == (dataset, EXTRACTOR)],
        }
    return known


def hours_taken(log: Path, batch_size: int) -> float:
    """Hours that the training steps of an unpaired run took, by the speeds in its log."""
    entries = [entry for entry in map(json.loads, log.read_text().splitlines()) if "images_per_s" in entry]
    seconds, before = 0.0, 0
    for entry in entries:
        seconds += 2 * batch_size * (entry["step"] - before) / entry["images_per_s"]
        before = entry["step"]
    return seconds / 3600


# ----------------------------------------------------------------------------------------------------------
#  The table
# ----------------------------------------------------------------------------------------------------------


def make_table(known: Mapping[str, About]) -> list[str]:
    """Markdown of all ``RUNS`` by data set, size and direction; what is not in ``known`` is named and empty."""
    heads = ("", "100 KID-EffNet", "class rate", "attention AP", "attention IoU", "background error", "change")
    heads += ("cycle error", "pairs", "hours", "published")
    lines = [join(heads), "|---" * len(heads) + "|"]
    for dataset, size in GROUPS:
        for direction in evaluate.DIRECTIONS:
            source, target = SIDES[dataset] if direction == "AtoB" else SIDES[dataset][::-1]
            runs = [run for run in RUNS if run.group == (dataset, size)]
            found = {run.name: find_row(known[run.name], direction) for run in runs if run.name in known}
            published = PUBLISHED.get((dataset, direction), "–")
            lines.append(
                join([f"**{dataset}: {source} → {target}, {size} × {size}**", *[""] * (len(heads) - 2), published])
            )
            for row in list(found.values())[:1]:
                lines.append(join(["real training pictures", *cells(row["floor"]), "", "", ""]))
                lines.append(join(["untranslated", *cells(row["untranslated"]), "", "", ""]))
            for run in runs:
                if run.name in found:
                    shown, about = cells(found[run.name]["figures"]), known[run.name]
                    lines.append(join([run.system, *shown, f"{about['pairs']:,}", f"{about['hours']:.1f}", ""]))
                else:
                    lines.append(join([f"{run.system}: not trained, `{run.name}`", *[""] * (len(heads) - 1)]))
    return lines


def join(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def find_row(about: About, direction: str) -> Mapping[str, Any]:
    """The row of a direction, by the last weights."""
    return next(row for row in about["rows"] if (row["direction"], row["weights"]) == (direction, evaluate.LAST))


def cells(figures: Mapping[str, float | None]) -> list[str]:
    """From "100 KID-EffNet" to "cycle error"; empty where there is no figure."""
    kid = next((key for key in figures if key.startswith("KID") and " " not in key), "KID")
    rate = next((key for key in figures if key.endswith(" rate")), "rate")
    others = ((key, 3, 1) for key in (rate, "AP", "IoU", "background error", "change", "cycle error"))
    values = ((figures.get(key), digits, factor) for key, digits, factor in ((kid, 1, 100), *others))
    return ["" if value is None else f"{factor * value:z.{digits}f}" for value, digits, factor in values]


def write_table(known: Mapping[str, About]) -> None:
    """Put the table into the README. Raises InputError where its marks are not there."""
    text = README.read_text(encoding="utf-8")
    before, opening, rest = text.partition(MARKS[0])
    _, closing, after = rest.partition(MARKS[1])
    if not (opening and closing):
        raise InputError(f"{README}: expected {MARKS[0].strip()} and {MARKS[1].strip()} around the table")
    table = "\n".join(make_table(known))
    README.write_text(f"{before}{opening}\n{table}\n\n{closing}{after}", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------
#  Sheets
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(run: str, direction: str, data_dir: Path) -> None:
    """What a run makes of the first test pictures, ``docs/<run>_<direction>.png``.

    Beside it ``…_judged.png``, its best, median and worst translations, the sheet of ``evaluate.py``; and, where it
    has contents, ``…_masks.png``: every mask and content of the first picture.
    """
    path = DOCS / f"{run}_{direction}.png"
    shutil.copyfile(utils.IMAGES / run / f"evaluation_{direction}.png", path.with_stem(f"{path.stem}_judged"))
    opened = open_generators(run)
    (generator, about), (back, _) = opened[direction], opened[f"{direction[-1]}to{direction[0]}"]
    pictures = find_side(data_dir / about["options"]["dataset_name"], "test", direction[0])[:SHOWN]
    columns = {"input": compare.read_all(pictures, about["options"])}
    translation = generator.eval()(columns["input"])
    if translation.foreground is not None:
        columns["attention"] = 2 * translation.foreground - 1
    if translation.content is not None:
        columns["content"] = painted(translation)
        draw_masks(translation, columns["input"]).save(path.with_stem(f"{path.stem}_masks"))
    columns["output"] = translation.image
    columns["recovered"] = back.eval()(translation.image).image
    utils.draw_sheet(columns).save(path)


def painted(translation: Translation) -> Tensor:
    """(B, channels, H, W): the contents weighed by their masks, as if the background mask kept nothing."""
    masks = translation.attention[:, : translation.content.shape[1], None]
    return (masks * translation.content).sum(dim=1) / masks.sum(dim=1).clamp_min(torch.finfo(masks.dtype).tiny)


def draw_masks(translation: Translation, inputs: Tensor) -> Image.Image:
    """Masks and contents of the first picture, side by side; what the background mask keeps is the input."""
    masks, contents = translation.attention[0], translation.content[0]
    kept = torch.cat([contents, inputs[:1]])[: len(masks)]
    names = [f"{i}" for i in range(1, len(contents) + 1)] + ["background"] * (len(masks) - len(contents))
    columns = {
        name: torch.stack([(2 * mask - 1).expand_as(content), content])
        for name, mask, content in zip(names, masks, kept, strict=True)
    }
    return utils.draw_sheet(columns, rows=["mask", "content"])


# ----------------------------------------------------------------------------------------------------------
#  Shipping
# ----------------------------------------------------------------------------------------------------------


def ship(run: str, name: str, data_dir: Path) -> None:
    """Write a run's generators in half precision to ``saved_models/pretrained/<name>``, and what they make of the first
    test pictures to ``docs/<name>_<direction>.png``. Raises InputError.
    """
    utils.check_name("--as", name)
    opened, sheets = open_generators(run), {}
    for direction, (_, about) in opened.items():
        options = about.get("options", {})
        if "dataset_name" not in options:
            raise InputError(f"--ship {run}: says nothing of its data set, expected a run of train.py")
        root = data_dir / options["dataset_name"]
        if not find_side(root, "test", direction[0], compare.find_task(options)):
            raise InputError(f"{root}: found no test{direction[0]}, expected pictures to show what ships (--data_dir)")
        parts = compare.show(run, direction, root, SHOWN)
        columns = {
            f"{i + 1}": torch.stack([part[i].expand(len(parts["input"][i]), -1, -1) for part in parts.values()])
            for i in range(len(parts["input"]))
        }
        sheets[direction] = utils.draw_sheet(columns, rows=list(parts))
    folder = SAVED_MODELS / "pretrained" / name
    folder.mkdir(parents=True, exist_ok=True)
    DOCS.mkdir(exist_ok=True)
    for direction, (generator, about) in opened.items():
        path = folder / f"{direction}.pt"
        utils.save_atomically({**about, **pack_generator(generator.half())}, path)
        sheets[direction].save(DOCS / f"{name}_{direction}.png")
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


# ----------------------------------------------------------------------------------------------------------
#  The script
# ----------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Train, measure, draw, write; or ship. Raises InputError."""
    if (options.ship is None) != (options.name is None):
        raise InputError("--ship and --as: expected both or neither")
    if options.ship is not None:
        if options.train:
            raise InputError("--ship writes weights, --train trains first; expected one of the two")
        return ship(options.ship, options.name, options.data_dir)
    by_name = {run.name: run for run in RUNS}
    unknown = [name for name in options.train if name not in by_name]
    if unknown:
        raise InputError(f"--train {unknown[0]}: expected {', '.join(by_name)}")
    compare.check_features(EXTRACTOR)
    compare.train_all({name: by_name[name].flags for name in options.train}, 1, ["--data_dir", str(options.data_dir)])
    DOCS.mkdir(exist_ok=True)
    store = DOCS / "results.json"
    known = json.loads(store.read_text()) if store.exists() else {}
    for group in GROUPS:
        here = [run for run in RUNS if run.group == group and is_here(run)]
        if here:
            known |= measure(group[0], here, options.data_dir)
            for run in here:
                for direction in evaluate.DIRECTIONS:
                    draw(run.name, direction, options.data_dir)
    store.write_text(json.dumps(known, indent=1) + "\n")
    write_table(known)
    print(f"{store} and {README} written")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure the runs of the README's table and write it.", formatter_class=utils.HelpFormatter
    )
    add = parser.add_argument
    add("--train", nargs="+", default=[], metavar="RUN", help="runs of the table to train first, or to go on with")
    add("--data_dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    add("--ship", metavar="RUN", help="instead: write this run's generators in half precision")
    add("--as", dest="name", help="under this name, to saved_models/pretrained")
    options = parser.parse_args(argv)
    return utils.run_script("results.py", lambda: work(options) or 0)


if __name__ == "__main__":
    sys.exit(main())
