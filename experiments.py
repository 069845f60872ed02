"""Experiments: train runs, measure them all alike, write tables and sheets into the pages of ``docs``.

    python experiments.py compare systems                  # AttentionGAN I and II, guided and not, CycleGAN, U-GAT-IT
    python experiments.py compare horses --seeds 0 1 2 --data_dir data --extractor efficientnet-lite0
    python experiments.py results                          # measure the finished runs on real pictures
    python experiments.py results --train results_horse2zebra_cyclegan
    python experiments.py ship results_apple2orange_attentiongan apple2orange_attentiongan

A run is an ordinary one, ``train.py`` with the flags that stand here. A finished run is kept, another one is resumed,
and a run of other flags is refused. A table goes between the two marks of its name in a page, a sheet beside the page.
``docs/results.json`` keeps the figures of ``results``, so that a run that is not on this machine keeps its rows.
"""

from __future__ import annotations

import utils
from utils import InputError

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import checkpoints
import datasets
import evaluate
import record
import train
from checkpoints import CHECKPOINT, DIRECTIONS, SAVED_MODELS, find_file, find_run, open_generators
from datasets import find_plain, find_side, fixed_noise
from evaluate import Reading
from metrics import EFFICIENTNET, Extractor, Features, Figure, figure, kernel_distance
from models import NOISE, translate_any_size
from options import MACHINE, all_options, parse_options, stored_options, unknown_options
from pictures import Picture, normalise, quantise, scale
from record import find_block, write_block
from systems import SYSTEMS

HERE, DOCS = Path(__file__).resolve().parent, Path("docs")
Figures = Mapping[str, Any]  # numbers, or text, by what they are
About = dict[str, Any]  # of a run: "rows" of its ``evaluation.json``, and figures that all its directions share
Row = tuple[str, Sequence[Figures]]  # of a table: its title, the figures of its seeds


class Run(NamedTuple):
    """A training: its row in the table, its name, its flags of ``train.py``, and what it is measured together with.

    ``size``: the side of the pictures that it is measured at, in pixels; 0: that of its training.
    """

    title: str
    name: str
    flags: str
    group: str
    size: int = 0


# ----------------------------------------------------------------------------------------------------------
#  Experiments: settings side by side, each from several seeds
# ----------------------------------------------------------------------------------------------------------

DRAWN = (
    "--dataset_name solid2striped --img_height 64 --img_width 64 --ngf 16 --ndf 32 --n_residual_blocks 2 "
    "--lr 0.0005 --n_epochs 3 --decay_epoch 3 --n_cpu 0 --sample_interval 0"
)
TWO = "--system attentiongan --n_layers_D 2"  # patches that fit pictures of 64 pixels
ONE = "--system attentiongan1 --n_layers_D 2"
PAIRS, NO_PAIRS = "--n_epochs 12 --decay_epoch 6", "--n_epochs 24 --decay_epoch 12 --n_residual_blocks 3"
SHARED = {  # flags of all settings of a comparison
    "systems": DRAWN,
    "ablations": f"{DRAWN} {TWO}",
    "horses": "--dataset_name horse2zebra --img_height 64 --img_width 64 --ngf 32 --n_residual_blocks 6 --n_layers_D 2 "
    "--n_epochs 4 --decay_epoch 4 --n_cpu 1 --sample_interval 0 --system attentiongan",
    "pix2pix": "--dataset_name facades --img_height 64 --img_width 64 --ngf 32 --ndf 32 --n_layers_D 2 "
    "--n_epochs 30 --decay_epoch 15 --n_cpu 0 --sample_interval 0",
    # A pass is half as long without pairs, where half of the photographs are grey.
    "colorization": "--dataset_name monet2photo_sample --task colorization --img_height 64 --img_width 64 --ngf 32 "
    "--ndf 32 --n_layers_D 2 --n_cpu 0 --sample_interval 0",
    # 500 small grey pictures, in the place of a set of grey faces with masks that is not at hand, on which nearest
    # upsampling was reported to do better than transposed convolutions of its capacity.
    "dcgan": "--dataset_name solid2striped --channels 1 --ngf 16 --ndf 16 --batch_size 16 --n_epochs 80 --n_cpu 0 "
    "--sample_interval 0 --system dcgan",
}
SETTINGS = {  # each setting's own flags
    "systems": {
        "AttentionGAN II": TWO,
        "II, guided by [mask, picture]": f"{TWO} --attn_disc concat",
        "II, guided by mask x picture": f"{TWO} --attn_disc mask",
        "II, [mask, picture], partner's mask": f"{TWO} --attn_disc concat --attn_real partner",
        "II, [mask, picture], picture's gradient": f"{TWO} --attn_disc concat --attn_grad picture",
        "II, mask x picture, picture's gradient": f"{TWO} --attn_disc mask --attn_grad picture",
        "AttentionGAN I, unguided": f"{ONE} --curriculum_epochs 1 --attn_disc none",
        "I, guided by [mask, picture]": f"{ONE} --curriculum_epochs 1 --attn_disc concat",
        "I, guided by mask x picture": f"{ONE} --curriculum_epochs 1 --attn_disc mask",
        "I, [mask, picture], no curriculum": f"{ONE} --curriculum_epochs 0 --attn_disc concat",
        "I, unguided, led to the end": f"{ONE} --curriculum_epochs 3 --attn_disc none",
        "I, [mask, picture], picture's gradient, led": f"{ONE} --curriculum_epochs 3 --attn_disc concat "
        "--attn_grad picture",
        "CycleGAN": "--system cyclegan --n_layers_D 2",
        "U-GAT-IT, light": "--system ugatit --light",
        # Two thirds of the time that AttentionGAN II takes for all of them.
        "U-GAT-IT, light, a third of the steps": "--system ugatit --light --n_epochs 1 --decay_epoch 1",
    },
    "ablations": {
        "AttentionGAN II": "",
        "identity 5": "--lambda_id 5",
        "no pool": "--pool_size 0",
        "attention kernel 7": "--attention_kernel 7",
        "nearest upsampling": "--upsample nearest",
        "rate 0.0002": "--lr 0.0002",
        "float32": "--precision float32",
    },
    "horses": {"AttentionGAN II": "", "identity 5": "--lambda_id 5"},
    # The ablation of the pix2pix paper (Table 1), labels to photographs, and CycleGAN on the same pictures unpaired.
    "pix2pix": {
        "L1": "--system pix2pix --direction BtoA --lambda_gan 0",
        "cGAN": "--system pix2pix --direction BtoA --lambda_L1 0",
        "L1 + cGAN": "--system pix2pix --direction BtoA",
        "CycleGAN, unpaired": "--system cyclegan --n_residual_blocks 3",
    },
    "colorization": {
        "L1": f"--system pix2pix --lambda_gan 0 {PAIRS}",
        "L1 + cGAN": f"--system pix2pix {PAIRS}",
        "CycleGAN, unpaired": f"--system cyclegan --upsample nearest {NO_PAIRS}",
        "AttentionGAN II, unpaired": f"--system attentiongan --upsample nearest {NO_PAIRS}",
    },
    "dcgan": {"transposed": "--upsample transposed", "nearest": "--upsample nearest"},
}
PAGES = {name: DOCS / ("ablations.md" if name in ("ablations", "horses") else "systems.md") for name in SETTINGS}


def compared_runs(comparison: str, seeds: Sequence[int]) -> list[Run]:
    """Every setting of a comparison from every seed."""
    shared, settings = SHARED[comparison], SETTINGS[comparison]
    slugs = {setting: re.sub(r"[^a-z0-9]+", "-", setting.lower()).strip("-") for setting in settings}
    return [
        Run(title, f"compare_{comparison}_{slugs[title]}_{seed}", f"{shared} {own} --seed {seed}", comparison)
        for seed in dict.fromkeys(seeds)
        for title, own in settings.items()
    ]


# ----------------------------------------------------------------------------------------------------------
#  Experiments: results on real pictures, one seed of each
# ----------------------------------------------------------------------------------------------------------

EXTRACTOR = EFFICIENTNET  # of KID and the class rate; it comes as packages, so that everybody can measure again
# Networks and pictures that one core of a processor gets through in two hours; patches that fit the pictures.
REAL = "--ngf 32 --n_residual_blocks 6 --n_layers_D 2 --upsample nearest --sample_interval 0"
REAL_SETS = {  # what the two sides show, and a schedule of 18,300 to 18,900 pairs
    "horse2zebra": ("horse", "zebra", "--n_epochs 14 --decay_epoch 9"),
    "apple2orange": ("apple", "orange", "--n_epochs 18 --decay_epoch 12"),
    "facades": ("photograph", "labels", "--n_epochs 47 --decay_epoch 31"),
    "monet2photo_sample": ("Monet", "photograph", "--n_epochs 51 --decay_epoch 34"),  # docs/monet2photo_sample.txt
    "summer2winter_yosemite": ("summer", "winter", "--n_epochs 15 --decay_epoch 10"),
}
# What others print, under their own protocols: KID × 100 from the AttentionGAN paper, FID from MMGeneration's CycleGAN.
PUBLISHED = {
    ("horse2zebra", "AtoB"): "AttentionGAN 100 KID 2.03, CycleGAN FID 64.5",
    ("horse2zebra", "BtoA"): "AttentionGAN 100 KID 6.48, CycleGAN FID 141.2",
    ("apple2orange", "AtoB"): "AttentionGAN 100 KID 10.03",
    ("apple2orange", "BtoA"): "AttentionGAN 100 KID 4.38",
    ("summer2winter_yosemite", "AtoB"): "CycleGAN FID 83.7",
    ("summer2winter_yosemite", "BtoA"): "CycleGAN FID 72.8",
}


def real_run(
    dataset: str, title: str, name: str, own: str, size: int = 64, schedule: str = "", measured: int = 0
) -> Run:
    """A run on real pictures of ``size``, ``measured`` at another one if given. Its group says at which it is."""
    flags = f"--dataset_name {dataset} --img_height {size} --img_width {size} --system {own} {REAL} "
    flags += schedule or REAL_SETS[dataset][-1]
    at = measured or size
    return Run(title, f"results_{dataset}_{name}", flags, f"{dataset}, {at} × {at}", at)


def finer_run(title: str, name: str, own: str) -> Run:
    """A run at 128 × 128 that begins with all networks of the run ``name`` at 64 × 64."""
    schedule = f"--lr 0.0001 --n_epochs 12 --decay_epoch 1 --init_from results_horse2zebra_{name}/{CHECKPOINT}"
    return real_run("horse2zebra", f"{title}, after 18,676 pairs at 64 × 64", f"{name}_128", own, 128, schedule)


def gpu_run(size: int, after: str, before: str, schedule: str) -> Run:
    """A stage of the weights that ship. Its pictures were re-encoded for the way to the GPU (WebP, quality 75)."""
    schedule += f" --batch_size 4 --decay_by step --cuda_graph --init_from results_horse2zebra_{before}/{CHECKPOINT}"
    title = f"AttentionGAN II on a GPU, after {after}"
    return real_run("horse2zebra", title, f"{LONG}_{size}", "attentiongan", size, schedule)


def late_run(title: str, name: str, before: str, size: int, schedule: str) -> Run:
    """A later stage, at batch 1 on a processor, measured at 256 × 256."""
    schedule += f" --lr 0.0001 --decay_by step --init_from results_horse2zebra_{before}/{CHECKPOINT}"
    title = f"AttentionGAN II, the same, {title}"
    return real_run("horse2zebra", title, f"{LONG}_{name}", "attentiongan", size, schedule, measured=256)


LONG = "attentiongan_long"  # the weights that ship, in seven runs, each from all networks of the one before
LED = "attentiongan1 --attn_disc none --curriculum_epochs 14"
HELD_OUT = f"--n_epochs 16 --decay_epoch 10 --eval_interval 4 --extractor {EXTRACTOR} --keep_evaluated"
RUNS = (
    real_run("horse2zebra", "AttentionGAN II", "attentiongan", "attentiongan"),
    real_run("horse2zebra", "CycleGAN", "cyclegan", "cyclegan"),
    real_run("horse2zebra", "AttentionGAN I", "attentiongan1", "attentiongan1 --curriculum_epochs 1"),
    real_run("horse2zebra", "AttentionGAN I, unguided, led", "attentiongan1_led", LED),
    finer_run("AttentionGAN II", "attentiongan", "attentiongan"),
    finer_run("CycleGAN", "cyclegan", "cyclegan"),
    finer_run("AttentionGAN I", "attentiongan1", "attentiongan1 --curriculum_epochs 0"),  # it has had its curriculum
    real_run("horse2zebra", "AttentionGAN II, a tenth held out", LONG, "attentiongan", 64, HELD_OUT),
    gpu_run(128, "19,216 pairs at 64 × 64", LONG, "--n_epochs 20 --decay_epoch 10"),
    gpu_run(256, "19,216 at 64 × 64, 26,640 at 128", f"{LONG}_128", "--n_epochs 10 --decay_epoch 5"),
    late_run("then on crops", "crops", f"{LONG}_256", 256, "--crop_size 128 --n_epochs 4 --decay_epoch 2"),
    late_run("on crops again", "crops_again", f"{LONG}_crops", 256, "--crop_size 128 --n_epochs 10 --decay_epoch 6"),
    late_run("and at 128 × 128 again", "whole", f"{LONG}_crops_again", 128, "--n_epochs 4 --decay_epoch 2"),
    late_run("and once more", "whole_again", f"{LONG}_whole", 128, "--n_epochs 2 --decay_epoch 1"),
    *(real_run(dataset, "AttentionGAN II", "attentiongan", "attentiongan") for dataset in [*REAL_SETS][1:]),
)

STORY = {
    f"results_horse2zebra_{LONG}": "19,216 pairs at 64 x 64",
    f"results_horse2zebra_{LONG}_128": "and 26,640 at 128 x 128",
    f"results_horse2zebra_{LONG}_256": "and 13,320 at 256 x 256",
    f"results_horse2zebra_{LONG}_crops_again": "and 18,676 on crops of 128 x 128",
    f"results_horse2zebra_{LONG}_whole": "and 5,336 at 128 x 128",
}


# ----------------------------------------------------------------------------------------------------------
#  Train
# ----------------------------------------------------------------------------------------------------------


def train_all(runs: Sequence[Run], jobs: int, data_dir: Path) -> int:
    """Train what is not finished of ``runs``, ``jobs`` at a time, each with its share of the processor's cores.

    Returns 0, or the number of a signal that asked to stop: it is handed on, and the runs save and leave. Raises
    InputError, before anything trains, where a run of other flags stands; and for runs that fail, when the others are
    done.
    """
    data = ["--data_dir", str(data_dir)]
    flags = {run.name: [*shlex.split(run.flags), *data] for run in runs}
    standing = {name: found for name in flags if (found := find_run(name)) is not None}
    changed = [change for name, found in standing.items() if (change := differs(name, found, flags[name]))]
    if changed:
        raise InputError("\n".join(changed))
    waiting = [name for name in flags if name not in standing or not standing[name]["finished"]]
    environment = {"OMP_NUM_THREADS": str(max(1, utils.usable_cores() // jobs)), **os.environ}
    running: dict[str, subprocess.Popen] = {}
    failures, handed_on = [], False
    with utils.StopSignals(train.SAVING) as stop:
        while running or (waiting and stop.signal is None):
            while waiting and len(running) < jobs and stop.signal is None:
                name = waiting.pop(0)
                own = ["--resume", *data] if name in standing else [*flags[name], "--auto_resume"]
                command = [sys.executable, str(HERE / "train.py"), *own, "--name", name]
                pipes: Any = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace")
                running[name] = subprocess.Popen(command, env=environment, **pipes)
            if stop.signal is not None and not handed_on:
                handed_on = True
                for child in running.values():
                    child.terminate()  # SIGTERM: save and leave
            for name, child in [*running.items()]:
                try:
                    _, messages = child.communicate(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
                del running[name]
                stopped = handed_on and not 0 <= child.returncode <= 128
                print(f"{name}: {'stopped' if stopped else 'failed' if child.returncode else 'done'}", flush=True)
                if child.returncode and not stopped:
                    _, mark, said = messages.strip().rpartition("train.py: error: ")
                    reason = said if mark else (said.splitlines() or ["no message"])[-1]
                    failures.append(f"{name}: {reason}")
    summary = "\n".join([f"{len(failures)} of {len(flags)} runs failed:", *failures])
    if failures and stop.signal is None:
        raise InputError(summary)
    if stop.signal is not None:
        print(summary if failures else "stopped; the same command goes on", file=sys.stderr)
    return stop.signal or 0


def differs(name: str, found: Mapping[str, Any], flags: Sequence[str]) -> str | None:
    """In which options, or pictures, the run that stands is not one of these flags, and what to do; None where it is.

    An option that the run does not know had its default, as ``train.py --resume`` has it, too. Raises InputError.
    """
    options = parse_options(flags)
    wanted, root = stored_options(options), Path(options.data_dir) / options.dataset_name
    known = {key: each.default for key, each in all_options(options.system).items()} | found["options"]
    if known["system"] == options.system:
        keys = sorted(wanted.keys() - set(MACHINE))
        changes = [f"--{k} {known[k]} (expected {wanted[k]})" for k in keys if known[k] != wanted[k]]
        changes += [f"{lost} (which this version does not know)" for lost in unknown_options(known, wanted)]
    else:
        changes = [f"--system {known['system']} (expected {options.system})"]
    if not changes and train.build_dataset(options).names() != found["picture_names"]:
        changes = [f"pictures of other names than those in {root}"]
    folder = SAVED_MODELS / name
    return f"{folder}: trained with {', '.join(changes)}; remove it to train it anew" if changes else None


# ----------------------------------------------------------------------------------------------------------
#  Measure
# ----------------------------------------------------------------------------------------------------------


def measure(runs: Sequence[Run], root: Path, extractor: str) -> dict[str, About]:
    """What ``evaluate.py`` says of each run on the data set in ``root``, by name. Raises InputError.

    A row has the run's "figures", those of "untranslated" pictures, and those of real ones in their place ("floor").
    """
    arguments = ["--dataset_name", root.name, "--data_dir", str(root.parent), "--extractor", extractor]
    if runs[0].size:  # of all in a group
        arguments += ["--size", str(runs[0].size)]
    options = evaluate.make_parser().parse_args([*arguments, "--checkpoint", *(run.name for run in runs)])
    evaluate.check_options(options)
    evaluate.evaluate(options)
    known = {}
    for run in runs:
        rows = json.loads((record.IMAGES / run.name / "evaluation.json").read_text())["rows"]
        found = [row for row in rows if (row["dataset"], row["extractor"]) == (root.name, extractor)]
        newest = {(row["direction"], row["weights"]): row for row in found}  # those of other sizes stand before them
        known[run.name] = {"rows": [*newest.values()]}
    return known


@utils.no_tf32()
@torch.no_grad()
def measure_samples(runs: Sequence[Run], root: Path, extractor: str, n: int = 500) -> dict[str, About]:
    """``measure`` where pictures are drawn from noise: the KID of ``n`` samples to the test pictures.

    The floor is that of all training pictures.
    """
    extract = Extractor(extractor, None, utils.pick_device())
    opened = {run.name: open_generators(run.name, noise=True)[NOISE] for run in runs}
    reading = best_reading(opened[runs[0].name][1])
    real = {split: extract(reading.images(find_plain(root, split))) for split in ("train", "test")}

    def kid(images: Features) -> Figures:
        return {f"KID{extract.suffix}": kernel_distance(images.vectors, real["test"].vectors)}

    known = {}
    for name, (generator, about) in opened.items():
        noise = fixed_noise(n, generator.settings["nz"], about["options"]["seed"])
        samples = torch.cat([quantise(part) for part in map(generator.eval(), noise.split(50))])
        figures = {"figures": kid(extract(samples)), "untranslated": {}, "floor": kid(real["train"])}
        known[name] = {"rows": [{"direction": NOISE, "weights": evaluate.LAST, **figures}]}
    return known


def find_row(about: About, direction: str) -> dict[str, Any] | None:
    """The row of a direction, by the last weights."""
    return next((r for r in about["rows"] if (r["direction"], r["weights"]) == (direction, evaluate.LAST)), None)


def best_reading(about: Mapping[str, Any], size: int = 0) -> Reading:
    """How a run sees pictures outside training, their longer side ``size`` pixels; 0: where it does best."""
    reading = evaluate.find_reading(about["options"], about["options"]["channels"])
    return reading._replace(size=scale(reading.size, size or checkpoints.best_size(about)))


def find_tests(
    root: Path, direction: str, reading: Reading, n: int | None = None
) -> tuple[list[Picture], list[Picture] | None]:
    """The first ``n`` test pictures to translate in a direction, and their truths where pairs tell them."""
    inputs = find_side(root, "test", direction[0], reading.task)[:n]
    return inputs, datasets.true_translations(root, inputs, direction, reading.task, reading.paired)


def measure_grey(root: Path, direction: str, reading: Reading) -> Figures:
    """The error of pictures of one grey, the mean of the target's training pictures, where truths are known."""
    if direction == NOISE or (truths := find_tests(root, direction, reading)[1]) is None:
        return {}
    level = normalise(reading.images(find_side(root, "train", direction[-1], reading.task))).mean()
    return {"L1": (normalise(reading.images(truths)) - level).abs().mean().item()}


def time_steps(runs: Sequence[Run], rounds: int = 5, steps: int = 10) -> dict[str, float]:
    """Training steps per second of each run on this machine, without the loader, by title: medians over rounds.

    The runs take turns, so that a machine which drifts, or has other work, harms none.
    """
    steps_of = {}
    for run in runs:
        options = parse_options(shlex.split(run.flags))
        device = utils.pick_device(options.device)
        system, optimizers, autocast = train.set_up(options, device)
        shape = options.batch_size, options.channels, options.img_height, options.img_width
        shapes = {**dict.fromkeys(("A", "B", "image"), shape), "noise": (options.batch_size, getattr(options, "nz", 0))}
        batch = {key: torch.rand(shape, device=device) * 2 - 1 for key, shape in shapes.items()}
        steps_of[run.title] = partial(train.training_step, system, optimizers, autocast, batch)
    seconds: dict[str, list[float]] = {title: [] for title in steps_of}
    for _ in range(rounds + 1):  # the first one warms up
        for title, step in steps_of.items():
            begun = time.perf_counter()
            for _ in range(steps):
                shown = step()
            next(iter(shown.values())).tolist()  # waits for the device
            seconds[title].append((time.perf_counter() - begun) / steps)
    return {title: 1 / statistics.median(times[1:]) for title, times in seconds.items()}


def hours_taken(log: Path, batch_size: int) -> float:
    """Hours that the training steps of an unpaired run took, by the speeds in its log."""
    entries = [entry for _, entry in record.read_log(log) if "images_per_s" in entry]
    before = [0, *(entry["step"] for entry in entries)]
    pairs = [batch_size * (entry["step"] - step) for entry, step in zip(entries, before, strict=False)]
    return sum(2 * n / entry["images_per_s"] for entry, n in zip(entries, pairs, strict=True)) / 3600


# ----------------------------------------------------------------------------------------------------------
#  Table
# ----------------------------------------------------------------------------------------------------------


SIZE = "million parameters of a generator"
COMPARED = (
    *map(figure, ("IoU", "AP", "change IoU", "change AP", "background error", "L1", "KID", "class rate")),
    *map(figure, ("cycle error", "change")),
    Figure("steps/s", form=".1f"),
    Figure(SIZE, form=".2f"),
)
RESULTS = (  # each has a heading, and so a column even where nothing is known
    figure("KID")._replace(form=".1f", heading="100 KID-EffNet"),
    figure("class rate")._replace(heading="class rate"),
    figure("AP")._replace(heading="attention AP"),
    figure("IoU")._replace(heading="attention IoU"),
    *(figure(name)._replace(heading=name) for name in ("background error", "change", "cycle error")),
    Figure("pairs", form=",.0f", heading="pairs"),
    Figure("hours", form=".2g", heading="hours"),
    Figure("published", heading="published"),
)


def table(rows: Sequence[Row], kinds: Sequence[Figure], blank: str) -> list[str]:
    """Markdown: a row for each title, over the figures of its seeds; ``blank`` where there are none.

    A kind with a heading has a column always, one without has one for every figure that there is.
    """
    keys = dict.fromkeys(key for _, runs in rows for run in runs for key, value in run.items() if value is not None)
    columns: list[tuple[str, Figure, list[str]]] = []
    for kind in kinds:
        found = kind.among(keys)
        columns += [(kind.heading, kind, found)] if kind.heading else [(kind.title(k), kind, [k]) for k in found]

    def cell(kind: Figure, names: Sequence[str], runs: Sequence[Figures]) -> str:
        """Mean ± standard deviation of numbers; text as it is."""
        values = [run[name] for run in runs for name in names if run.get(name) is not None]
        if not values or isinstance(values[0], str):
            return values[0] if values else blank
        return kind.write(statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else []))

    lines = [[title, *(cell(kind, names, runs) for _, kind, names in columns)] for title, runs in rows]
    return record.markdown(["", *(heading for heading, _, _ in columns)], lines)


def make_rows(runs: Sequence[Run], known: Mapping[str, About], direction: str) -> tuple[list[Row], list[Row]]:
    """Rows of what the runs are compared with, none where nothing is known; and a row for each title of the runs."""
    found = {run: row for run in runs if run.name in known and (row := find_row(known[run.name], direction))}
    beside = {"real training pictures": "floor", "untranslated": "untranslated"}
    others: list[Row] = [(title, [row[key]]) for row in [*found.values()][:1] for title, key in beside.items()]
    rows: list[Row] = []
    for title, name in {run.title: run.name for run in runs}.items():
        figures = [{**known[run.name], **row["figures"]} for run, row in found.items() if run.title == title]
        rows.append((title if figures else f"{title}: not trained, `{name}`", figures))
    return others, rows


# ----------------------------------------------------------------------------------------------------------
#  Draw
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def translate(run: str, direction: str, root: Path, n: int, *wanted: str, size: int = 0) -> dict[str, Tensor]:
    """What a run makes of its first ``n`` test pictures, or 8 samples: those of the ``wanted`` parts that there are.

    ``size``: see ``best_reading``. All are (n, channels or 1, H, W) in [-1, 1]; but masks (n, n_masks, H, W) and
    contents (n, n_contents, channels, H, W), as in ``models.Translation``.
    """
    opened = open_generators(run, noise=direction == NOISE)
    generator, about = opened[direction]
    if direction == NOISE:
        return {"sample": generator.eval()(fixed_noise(8, generator.settings["nz"], about["options"]["seed"]))}
    reading = best_reading(about, size)
    tests, truths = find_tests(root, direction, reading, n)
    inputs = normalise(reading.images(tests))
    made: Any = translate_any_size(generator.eval(), inputs)
    back, _ = opened.get(f"{direction[-1]}to{direction[0]}", (None, {}))
    parts = {
        "input": inputs,
        "output": made.image,
        "attention": None if made.foreground is None else 2 * made.foreground - 1,
        "truth": None if truths is None else normalise(reading.images(truths)),
        "recovered": None if back is None else translate_any_size(back.eval(), made.image).image,
        "masks": made.attention,
        "contents": made.content,
        "content": None if made.content is None else painted(made.attention, made.content),
    }
    return {name: parts[name] for name in wanted if parts[name] is not None}


def painted(masks: Tensor, contents: Tensor) -> Tensor:
    """(n, channels, H, W): the contents weighed by their masks, as if the background mask kept nothing."""
    masks = masks[:, : contents.shape[1], None]
    return (masks * contents).sum(dim=1) / masks.sum(dim=1).clamp_min(torch.finfo(masks.dtype).tiny)


def grid(rows: Mapping[str, Mapping[str, Tensor]]) -> Image.Image:
    """A sheet of pictures, (channels or 1, H, W), by the names of row and column; white where a row has none."""
    widest = max(rows.values(), key=len)
    channels = max(picture.shape[0] for row in rows.values() for picture in row.values())
    columns = {
        name: torch.stack([row.get(name, torch.ones_like(like)).expand(channels, -1, -1) for row in rows.values()])
        for name, like in widest.items()
    }
    return record.draw_sheet(columns, rows=list(rows))


def draw_comparison(runs: Sequence[Run], direction: str, root: Path) -> Image.Image:
    """A row for each run: its samples; or input, output, attention and truth of the first pictures."""
    rows = {}
    for run in runs:
        parts = translate(run.name, direction, root, 4, "input", "output", "attention", "truth")
        n = len(next(iter(parts.values())))
        rows[run.title] = {f"{name} {i + 1}": part[i] for i in range(n) for name, part in parts.items()}
    return grid(rows)


def draw_results(run: Run, direction: str, root: Path) -> dict[str, Image.Image]:
    """The sheets of a run, by the ends of their names: what it makes of the first test pictures; its best, median and
    worst translations, the sheet of ``evaluate.py``; every mask, brightened to its maximum, and every content of the
    first picture.
    """
    wanted = "input", "attention", "content", "output", "recovered"
    parts = translate(run.name, direction, root, 6, *wanted, "masks", "contents", size=run.size)
    sheets = {"": record.draw_sheet({name: part for name, part in parts.items() if name in wanted})}
    with Image.open(record.IMAGES / run.name / f"evaluation_{direction}.png") as judged:
        sheets["_judged"] = judged.copy()
    if "contents" in parts:
        masks, contents = parts["masks"][0], [*parts["contents"][0]]
        names = [f"{i}" for i in range(1, len(contents) + 1)] + ["background"] * (len(masks) - len(contents))
        names = [f"{name}: to {mask.max():.2f}" for name, mask in zip(names, masks, strict=True)]
        kept = contents + [parts["input"][0]] * (len(masks) - len(contents))  # what the background mask keeps
        shown = {name: 2 * mask[None] / mask.max().clamp_min(1e-6) - 1 for name, mask in zip(names, masks, strict=True)}
        sheets["_masks"] = grid({"mask": shown, "content": dict(zip(names, kept, strict=True))})
    return sheets


def draw_story(root: Path) -> Image.Image:
    """The first four test horses, and what the stages of ``STORY`` make of them, enlarged to the size of the last."""
    sizes = {run.name: run.size for run in RUNS}
    parts = {
        title: translate(name, "AtoB", root, 4, "input", "output", size=sizes.get(name, 0))
        for name, title in STORY.items()
    }
    last = [*parts.values()][-1]["input"]
    outputs = {title: F.interpolate(part["output"], size=last.shape[2:]) for title, part in parts.items()}
    return record.draw_sheet({"input": last, **outputs})


def save_sheet(picture: Image.Image, path: Path) -> None:
    with utils.replacing(path) as new:
        picture.save(new, quality=85, method=6)


# ----------------------------------------------------------------------------------------------------------
#  The script
# ----------------------------------------------------------------------------------------------------------


def check(page: Path, block: str, extractor: str) -> None:
    """Raise InputError where features or the page cannot be had: before hours of training, not after."""
    find_block(page, block)
    if extractor != "none":
        Extractor(extractor, None, torch.device("cpu"))


def compare(options: argparse.Namespace) -> int:
    """Train a comparison's runs, measure them, write its table and sheet. Returns the exit status; or InputError."""
    name, seeds, extractor = options.comparison, options.seeds, options.extractor
    shared, runs, page = parse_options(shlex.split(SHARED[name])), compared_runs(name, seeds), PAGES[name]
    root, from_noise = options.data_dir / shared.dataset_name, SYSTEMS[shared.system].system_class.data == "plain"
    if from_noise and extractor == "none":
        raise InputError("--extractor none: samples are compared by their features, expected an extractor")
    check(page, name, extractor)
    if stopped := train_all(runs, options.jobs, options.data_dir):
        return utils.exit_status(stopped)
    known = (measure_samples if from_noise else measure)(runs, root, extractor)
    first = runs[: len(SETTINGS[name])]  # those of the first seed
    speeds = time_steps(first)
    for run in first:  # what all seeds have in common
        generator, about = next(iter(open_generators(run.name, from_noise).values()))
        millions = sum(parameter.numel() for parameter in generator.parameters()) / 1e6
        known[run.name] |= {"steps/s": speeds[run.title], SIZE: millions}
    command = f"python experiments.py compare {name} --seeds {' '.join(map(str, seeds))} --extractor {extractor}"
    lines = [
        f"`{command}`: mean ± standard deviation over the seeds. {date.today():%B %Y}, PyTorch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} thread(s).",
        "",
        f"All settings: `{SHARED[name]}`.",
    ]
    directions = [d for d in (*DIRECTIONS, NOISE) if all(find_row(each, d) for each in known.values())]
    for direction in directions:
        others, rows = make_rows(runs, known, direction)
        grey = "mean grey of the training pictures", [measure_grey(root, direction, best_reading(about))]
        rows += [row for row in (*reversed(others), grey) if any(row[1])]
        lines += ["", f"**{direction}**", "", *table(rows, COMPARED, blank="–")]
    lines += ["", "**Settings**", "", *(f"- {s}: `{own or 'as above'}`" for s, own in SETTINGS[name].items())]
    sheet = DOCS / f"compare_{name}.webp"
    save_sheet(draw_comparison(first, directions[0], root), sheet)
    write_block(page, name, command, [*lines, "", f"![A row for each setting]({sheet.name})"])
    print(f"{page} written")
    return 0


def results(options: argparse.Namespace) -> int:
    """Train the named runs, measure all that are finished here, write the table and the sheets that its page shows.

    Returns the exit status. Raises InputError.
    """
    page, store = DOCS / "results.md", DOCS / "results.json"
    check(page, "results", EXTRACTOR)
    known = read_known(store)
    if stopped := train_all([run for run in RUNS if run.name in options.train], 1, options.data_dir):
        return utils.exit_status(stopped)
    for group in dict.fromkeys(run.group for run in RUNS):
        root = options.data_dir / group.partition(",")[0]
        here = [run for run in RUNS if run.group == group and is_here(run.name)]
        known |= measure(here, root, EXTRACTOR) if here else {}
        for run in here:
            name = run.name
            _, about = open_generators(name)["AtoB"]
            batch_size = about["options"]["batch_size"]
            hours = hours_taken(SAVED_MODELS / name / "log.jsonl", batch_size)
            known[name] = {"pairs": about["step"] * batch_size, "hours": hours, **known[name]}
            for direction in DIRECTIONS:
                for end, picture in draw_results(run, direction, root).items():
                    path = DOCS / f"{name}_{direction}{end}.webp"
                    if path.name in page.read_text(encoding="utf-8"):
                        save_sheet(picture, path)
    with utils.replacing(store) as new:
        new.write_text(json.dumps(known, indent=1) + "\n")
    write_block(page, "results", "python experiments.py results", table(result_rows(known), RESULTS, blank=""))
    if all(find_file(SAVED_MODELS / stage, "AtoB") for stage in STORY):
        save_sheet(draw_story(options.data_dir / "horse2zebra"), DOCS / "results_story.webp")
    print(f"{page} written")
    return 0


def read_known(store: Path) -> dict[str, About]:
    """What ``results`` has measured before, by run. Raises InputError where the file holds something else."""
    if not store.exists():
        return {}
    try:
        known = json.loads(store.read_text())
        table(result_rows(dict(known)), RESULTS, blank="")  # reads all that the table needs
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{store}: not the figures of an earlier experiments.py results ({error!r})") from error
    return known


def is_here(name: str) -> bool:
    """Whether the generators of a run are on this machine, and not those of a training that goes on."""
    found = find_run(name)
    return find_file(SAVED_MODELS / name, "AtoB") is not None and (found is None or found["finished"])


def result_rows(known: Mapping[str, About]) -> list[Row]:
    """All ``RUNS`` by group and direction, of which ``known`` says what has been measured."""
    rows: list[Row] = []
    for group, direction in dict.fromkeys((run.group, direction) for run in RUNS for direction in DIRECTIONS):
        dataset, _, size = group.partition(", ")
        source, target = REAL_SETS[dataset][:2] if direction == "AtoB" else REAL_SETS[dataset][1::-1]
        published = PUBLISHED.get((dataset, direction), "–")
        rows.append((f"**{dataset}: {source} → {target}, {size}**", [{"published": published}]))
        others, own = make_rows([run for run in RUNS if run.group == group], known, direction)
        rows += others + own
    return rows


def ship(options: argparse.Namespace) -> int:
    """Write a run's networks in half precision to ``saved_models/pretrained/NAME``, and what they make of the first
    test pictures to ``docs/NAME_<direction>.webp``. Returns the exit status. Raises InputError.
    """
    run, name = options.run, options.name
    utils.check_name("NAME", name)
    if len(options.best_size) > 2:
        raise InputError(f"--best_size: expected one size, or one for each direction, found {len(options.best_size)}")
    opened, roots = open_generators(run), {}
    for direction, (_, about) in opened.items():
        if "dataset_name" not in about.get("options", {}):
            raise InputError(f"{run}: says nothing of its data set, expected a run of train.py")
        if options.best_size:
            about["best_size"] = options.best_size[0 if direction == "AtoB" else -1]
            checkpoints.check_about(f"--best_size {about['best_size']}", about)
        roots[direction] = root = options.data_dir / about["options"]["dataset_name"]
        if not find_tests(root, direction, best_reading(about))[0]:
            raise InputError(f"{root}: found no test{direction[0]}, expected pictures to show what ships (--data_dir)")
    DOCS.mkdir(exist_ok=True)
    folder = SAVED_MODELS / "pretrained" / name
    source = checkpoints.find_generator(run, None).parent
    again = source.resolve() == folder.resolve()
    written: set[Path | None] = set()
    for generator, about in opened.values():
        written.add(path := checkpoints.save_generator(generator.half(), about, folder))
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    written.add(discriminators := checkpoints.save_discriminators(source, folder))
    if discriminators is None and not again:
        print(f"no discriminators are written: {source} has no checkpoint")
    for path in set() if again else {*folder.glob("*.pt")} - written:
        path.unlink()  # of the weights that had this name before
    for direction, root in roots.items():
        parts = translate(f"pretrained/{name}", direction, root, 6, "input", "output", "attention", "truth")
        numbered = {part: {f"{i}": picture for i, picture in enumerate(all_, 1)} for part, all_ in parts.items()}
        save_sheet(grid(numbered), DOCS / f"{name}_{direction}.webp")  # a column for each picture
    return 0


def make_parser() -> utils.Parser:
    what = "Train runs, measure them all alike, write tables and sheets into the pages of docs."
    parser = utils.Parser(what, usage=None)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(work: Callable[[argparse.Namespace], int], description: str) -> Callable[..., argparse.Action]:
        own = commands.add_parser(work.__name__, description=description, help=description, usage=None)
        own.set_defaults(work=work)
        own.add_argument("--data_dir", type=Path, default=Path("data"), help="folder that holds the data sets")
        return own.add_argument

    add = command(compare, "Settings side by side, each from several seeds.")
    add("comparison", choices=SETTINGS, help="what to compare; the flags stand in experiments.py")
    add("--seeds", type=utils.at_least(0), nargs="+", default=[0, 1, 2], help="seeds of every setting")
    add("--jobs", type=utils.at_least(1), default=2, help="runs at a time")
    add("--extractor", default="none", help="for KID, as in evaluate.py")
    add = command(results, "The table of runs on real pictures: measure those that are finished here.")
    names, what = [run.name for run in RUNS], "runs to train first, or to go on with (default: none)"
    add("--train", nargs="+", choices=names, default=[], metavar="RUN", help=what)
    add = command(ship, "Write a run's networks in half precision to saved_models/pretrained, and their sheets.")
    add("run", metavar="RUN", help="a run of train.py")
    add("name", metavar="NAME", help="its name among the shipped weights")
    best = "longer sides in pixels at which AtoB and BtoA do best, by evaluate.py --size: translate.py's default"
    add("--best_size", type=utils.at_least(8), nargs="+", default=[], metavar="N", help=best)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = make_parser().parse_args(argv)
        return options.work(options)

    return utils.run_script("experiments.py", work)


if __name__ == "__main__":
    sys.exit(main())
