"""Train several settings from several seeds, measure all by one protocol, and write the table.

    python compare.py systems                      # AttentionGAN I and II, guided and not, CycleGAN
    python compare.py ablations --seeds 0 1 2
    python compare.py horses --data_dir data --extractor efficientnet-lite0
    python compare.py dcgan --extractor efficientnet-lite0          # transposed convolutions against nearest upsampling

Every run is an ordinary one, ``train.py`` under the name ``compare_<comparison>_<setting>_<seed>``; what stands already
is resumed or, when finished, kept. The table (mean ± standard deviation over seeds) goes to
``docs/compare_<comparison>.md``, a sheet with a row for each setting beside it.
"""

from __future__ import annotations

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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import evaluate
import train
import utils
from datasets import find_plain, find_side, fixed_noise, normalise, quantise, unaugmented
from metrics import Extractor, kernel_distance
from models import open_generator
from utils import NOISE, InputError

HERE = Path(__file__).resolve().parent


class Comparison(NamedTuple):
    """Flags of ``train.py``: those all settings share, and each setting's own."""

    shared: str
    settings: Mapping[str, str]


SMALL = (
    "--dataset_name solid2striped --img_height 64 --img_width 64 --ngf 16 --ndf 32 --n_residual_blocks 2 "
    "--n_layers_D 2 --lr 0.0005 --n_epochs 3 --decay_epoch 3 --n_cpu 0 --sample_interval 0"
)
HORSES = (
    "--dataset_name horse2zebra --img_height 64 --img_width 64 --ngf 32 --n_residual_blocks 6 --n_layers_D 2 "
    "--n_epochs 4 --decay_epoch 4 --n_cpu 1 --sample_interval 0"
)
# 500 small grey pictures, in the place of a set of grey faces with masks that is not at hand, on which nearest
# upsampling was reported to do better than transposed convolutions of its capacity.
FACES = (
    "--dataset_name solid2striped --channels 1 --ngf 32 --ndf 32 --batch_size 32 --n_epochs 200 --n_cpu 0 "
    "--sample_interval 0"
)
COMPARISONS = {
    "systems": Comparison(
        SMALL,
        {
            "AttentionGAN II": "--system attentiongan",
            "II, guided by [mask, picture]": "--system attentiongan --attn_disc concat",
            "II, guided by mask x picture": "--system attentiongan --attn_disc mask",
            "AttentionGAN I, unguided": "--system attentiongan1 --curriculum_epochs 1 --attn_disc none",
            "I, guided by [mask, picture]": "--system attentiongan1 --curriculum_epochs 1 --attn_disc concat",
            "I, guided by mask x picture": "--system attentiongan1 --curriculum_epochs 1 --attn_disc mask",
            "I, [mask, picture], no curriculum": "--system attentiongan1 --curriculum_epochs 0 --attn_disc concat",
            "CycleGAN": "--system cyclegan",
        },
    ),
    "ablations": Comparison(
        f"{SMALL} --system attentiongan",
        {
            "AttentionGAN II": "",
            "identity 5": "--lambda_id 5",
            "warm-up 500": "--lambda_warmup 500",
            "no pool": "--pool_size 0",
            "attention kernel 7": "--attention_kernel 7",
            "nearest upsampling": "--upsample nearest",
            "rate 0.0002": "--lr 0.0002",
            "averaged 0.99": "--ema_decay 0.99",
            "float32": "--precision float32",
        },
    ),
    "horses": Comparison(
        f"{HORSES} --system attentiongan",
        {
            "AttentionGAN II": "",
            "identity 5": "--lambda_id 5",
            "warm-up 3000": "--lambda_warmup 3000",
            "nearest upsampling": "--upsample nearest",
            "nearest, warm-up 3000": "--upsample nearest --lambda_warmup 3000",
        },
    ),
    "dcgan": Comparison(
        f"{FACES} --system dcgan",
        {"transposed": "--upsample transposed", "nearest": "--upsample nearest"},
    ),
}


def run_name(comparison: str, setting: str, seed: int) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", setting.lower()).strip("-")
    return f"compare_{comparison}_{slug}_{seed}"


# ----------------------------------------------------------------------------------------------------------
#  Training
# ----------------------------------------------------------------------------------------------------------


def train_all(comparison: str, seeds: Sequence[int], jobs: int, extra: Sequence[str]) -> None:
    """Run what is not finished, ``jobs`` at a time, each with its share of the processor's cores.

    Raises InputError when a run fails; the others go on to their ends.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    shared, settings = COMPARISONS[comparison]

    def work(task: tuple[str, int]) -> str | None:
        setting, seed = task
        name = run_name(comparison, setting, seed)
        if is_finished(name):
            return None
        resume = (utils.SAVED_MODELS / name / "checkpoint.pt").exists()
        flags = ["--resume"] if resume else shlex.split(f"{shared} {settings[setting]} --seed {seed}")
        command = [sys.executable, str(HERE / "train.py"), *flags, *extra, "--name", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(f"{name}: {'done' if done.returncode == 0 else 'failed'}", flush=True)
        return None if done.returncode == 0 else f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"

    tasks = [(setting, seed) for seed in seeds for setting in settings]
    with ThreadPoolExecutor(jobs) as pool:
        troubles = [trouble for trouble in pool.map(work, tasks) if trouble]
    if troubles:
        raise InputError("\n".join([f"{len(troubles)} of {len(tasks)} runs failed:", *troubles]))


def is_finished(name: str) -> bool:
    try:
        state = utils.Checkpoints(utils.SAVED_MODELS / name).load(quiet=True)
    except InputError:
        return False
    return state["step"] == state["options"]["n_epochs"] * state["steps_per_epoch"]


# ----------------------------------------------------------------------------------------------------------
#  The table
# ----------------------------------------------------------------------------------------------------------


def collect(name: str, dataset: str, extractor: str) -> dict[str, dict[str, float]]:
    """The figures of one run by direction, from ``evaluation.json``, and the size of its generators."""
    report = json.loads((utils.IMAGES / name / "evaluation.json").read_text())
    result = {}
    for row in report["rows"]:
        if (row["dataset"], row["extractor"], row["weights"]) == (dataset, extractor, evaluate.LAST):
            generator, _ = open_generator(name, row["direction"])
            size = {"million parameters": sum(p.numel() for p in generator.parameters()) / 1e6}
            result[row["direction"]] = {k: v for k, v in row["figures"].items() if v is not None} | size
    return result


@torch.no_grad()
def measure_samples(
    names: Mapping[str, Sequence[str]], root: Path, extractor: Extractor, n: int = 500
) -> dict[str, list[dict[str, float]]]:
    """The KID to the test pictures of ``n`` samples of each run by setting, and of the training pictures, its floor."""
    runs = {setting: [open_generator(name, NOISE) for name in group] for setting, group in names.items()}
    options = next(iter(runs.values()))[0][1]["options"]
    size = options["img_height"], options["img_width"]
    real = {}
    for split in ("train", "test"):
        pictures = [unaugmented(p, size, options["channels"], options["resize"]) for p in find_plain(root, split)]
        real[split] = extractor(torch.stack(pictures)).vectors
    kid = f"KID{extractor.suffix}"
    collected: dict[str, list[dict[str, float]]] = {setting: [] for setting in runs}
    for setting, group in runs.items():
        for generator, about in group:
            noise = fixed_noise(n, generator.settings["nz"], about["options"]["seed"])
            samples = torch.cat([quantise(part) for part in map(generator.eval(), noise.split(50))])
            figures = {kid: kernel_distance(extractor(samples).vectors, real["test"])}
            figures["million parameters"] = sum(p.numel() for p in generator.parameters()) / 1e6
            collected[setting].append(figures)
    return collected | {"the training pictures": [{kid: kernel_distance(real["train"], real["test"])}]}


def time_steps(comparison: str, rounds: int = 5, steps: int = 10) -> dict[str, float]:
    """Training steps per second of each setting on this machine, without the loader: medians over rounds.

    The settings take turns, so that a machine which drifts, or has other work, harms none.
    """
    shared, settings = COMPARISONS[comparison]
    games = {}
    for setting, flags in settings.items():
        options = train.parse_options(shlex.split(f"{shared} {flags}"))
        device = utils.pick_device(options.device)
        system, optimizers, autocast = train.set_up(options, device)
        shape = options.batch_size, options.channels, options.img_height, options.img_width
        shapes = {**dict.fromkeys(("A", "B", "image"), shape), "noise": (options.batch_size, getattr(options, "nz", 0))}
        batch = {key: torch.rand(shape, device=device) * 2 - 1 for key, shape in shapes.items()}
        games[setting] = partial(train.play, system, optimizers, autocast, batch)
    seconds: dict[str, list[float]] = {setting: [] for setting in games}
    for _ in range(rounds + 1):  # the first one warms up
        for setting, play in games.items():
            start = time.perf_counter()
            for _ in range(steps):
                shown = play()
            next(iter(shown.values())).tolist()  # waits for the device
            seconds[setting].append((time.perf_counter() - start) / steps)
    return {setting: 1 / statistics.median(times[1:]) for setting, times in seconds.items()}


# Figures of the table: key, digits, factor.
COLUMNS = (
    ("IoU", 3, 1),
    ("AP", 3, 1),
    ("change IoU", 3, 1),
    ("change AP", 3, 1),
    ("background error", 3, 1),
    ("L1", 3, 1),
    ("KID", 2, 100),
    (" rate", 3, 1),
    ("cycle error", 3, 1),
    ("change", 3, 1),
    ("steps/s", 1, 1),
    ("million parameters", 2, 1),
)


def make_table(settings: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Markdown: a row for each setting, mean ± standard deviation over the figures of its seeds."""
    keys = list(dict.fromkeys(key for runs in settings.values() for run in runs for key in run))
    columns = []
    for wanted, digits, factor in COLUMNS:
        for key in keys:
            plain_kid = wanted == "KID" and key.startswith("KID") and " " not in key
            if key == wanted or plain_kid or (wanted == " rate" and key.endswith(wanted)):
                columns.append((key, digits, factor))
    lines = ["| | " + " | ".join(f"{f} {k}" if f != 1 else k for k, _, f in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for setting, runs in settings.items():
        cells = []
        for key, digits, factor in columns:
            values = [factor * run[key] for run in runs if key in run]
            of_the_setting = key in ("million parameters", "steps/s")
            spread = "" if of_the_setting or len(values) < 2 else f" ± {statistics.stdev(values):.{digits}f}"
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "–")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return lines


@torch.no_grad()
def draw(comparison: str, seed: int, root: Path, path: Path, n: int = 4) -> None:
    """A sheet with a row for each setting: the first ``n`` test pictures of A, their translations, the attention."""
    rows = []
    for setting in COMPARISONS[comparison].settings:
        generator, about = open_generator(run_name(comparison, setting, seed), "AtoB")
        options = about["options"]
        size = options["img_height"], options["img_width"]
        pictures = find_side(root, "test", "A")[:n]
        images = torch.stack([unaugmented(p, size, options["channels"], options["resize"]) for p in pictures])
        inputs = normalise(images)
        translation = generator(inputs)
        attention = translation.foreground
        blank = torch.ones_like(inputs[:, :1])
        rows.append((inputs, translation.image, blank if attention is None else 2 * attention - 1))
    columns = {}
    for i in range(len(rows[0][0])):
        for name, column in zip(("input", "output", "attention"), zip(*rows, strict=True), strict=True):
            columns[f"{name} {i + 1}"] = torch.stack([batch[i] for batch in column])
    utils.draw_sheet(columns, rows=list(COMPARISONS[comparison].settings)).save(path)


@torch.no_grad()
def draw_samples(comparison: str, seed: int, root: Path, path: Path, n: int = 8) -> None:
    """A sheet with a row for each setting: what it makes of the first ``n`` noise vectors of the seed."""
    rows = []
    for setting in COMPARISONS[comparison].settings:
        generator, _ = open_generator(run_name(comparison, setting, seed), NOISE)
        rows.append(generator.eval()(fixed_noise(n, generator.settings["nz"], seed)))
    columns = {f"sample {i}": column for i, column in enumerate(torch.stack(rows, dim=1), 1)}
    utils.draw_sheet(columns, rows=list(COMPARISONS[comparison].settings)).save(path)


def compare(options: argparse.Namespace) -> None:
    """Train, measure, write. Raises InputError."""
    comparison = options.comparison
    shared, settings = COMPARISONS[comparison]
    flags = train.parse_options(shlex.split(shared))
    dataset, root = flags.dataset_name, options.data_dir / flags.dataset_name
    with torch.device("meta"):
        directions = tuple(train.build_system(flags).generators)
    extractor = Extractor(options.extractor, None, utils.pick_device()) if directions == (NOISE,) else None
    extra = ["--data_dir", str(options.data_dir)]
    train_all(comparison, options.seeds, options.jobs, extra)
    names = {s: [run_name(comparison, s, seed) for seed in options.seeds] for s in settings}
    if extractor is not None:
        measured = measure_samples(names, root, extractor)
        collected = {setting: [{NOISE: figures} for figures in runs] for setting, runs in measured.items()}
    else:
        arguments = ["--dataset_name", dataset, "--extractor", options.extractor, *extra]
        status = evaluate.main([*arguments, "--checkpoint", *(name for group in names.values() for name in group)])
        if status:
            raise InputError("evaluate.py could not measure the runs")
        collected = {
            setting: [collect(name, dataset, options.extractor) for name in group] for setting, group in names.items()
        }
    speeds = {setting: {"steps/s": speed} for setting, speed in time_steps(comparison).items()}
    seeds = " ".join(map(str, options.seeds))
    lines = [
        f"# Comparison: {comparison}",
        "",
        f"`python compare.py {comparison} --seeds {seeds} --extractor {options.extractor}`: "
        f"mean ± standard deviation over the seeds. {date.today():%B %Y}, PyTorch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores.",
        "",
        f"All settings: `{shared}`.",
    ]
    for direction in directions:
        runs = {
            s: [run[direction] | speeds.get(s, {}) for run in group if direction in run]
            for s, group in collected.items()
        }
        lines += ["", f"## {direction}", "", *make_table(runs)]
    lines += ["", "## Settings", "", *(f"- {s}: `{own or 'as above'}`" for s, own in settings.items())]
    out = Path("docs")
    out.mkdir(exist_ok=True)
    draw_rows = draw if extractor is None else draw_samples
    draw_rows(comparison, options.seeds[0], root, out / f"compare_{comparison}.png")
    (out / f"compare_{comparison}.md").write_text(
        "\n".join(lines) + f"\n\n![A row for each setting](compare_{comparison}.png)\n"
    )
    print(f"{out / f'compare_{comparison}.md'} written")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train settings from several seeds, measure them alike, write the table.",
        formatter_class=utils.HelpFormatter,
    )
    parser.add_argument("comparison", choices=COMPARISONS, help="what to compare; the flags stand in compare.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every setting")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    parser.add_argument("--extractor", default="none", help="for KID, as in evaluate.py")
    options = parser.parse_args(argv)

    def work() -> int:
        if options.jobs < 1:
            raise InputError(f"--jobs {options.jobs}: expected at least 1")
        compare(options)
        return 0

    return utils.run_script("compare.py", work)


if __name__ == "__main__":
    sys.exit(main())
