"""Train several settings from several seeds, measure all by one protocol, and write the table.

    python compare.py systems                      # AttentionGAN I and II, guided and not, CycleGAN, U-GAT-IT
    python compare.py ablations --seeds 0 1 2
    python compare.py horses --data_dir data --extractor efficientnet-lite0
    python compare.py pix2pix --extractor efficientnet-lite0
    python compare.py colorization --extractor efficientnet-lite0
    python compare.py dcgan --extractor efficientnet-lite0          # transposed convolutions against nearest upsampling

Every run is an ordinary one, ``train.py`` under the name ``compare_<comparison>_<setting>_<seed>``; what stands already
is resumed or, when finished, kept; what stands with other flags is refused. The table (mean ± standard deviation over
seeds) goes to ``docs/compare_<comparison>.md``, a sheet with a row for each setting beside it.
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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import evaluate
import train
import utils
from datasets import (
    BUILT_IN,
    TASKS,
    Picture,
    draw_built_in,
    find_plain,
    find_side,
    fixed_noise,
    normalise,
    quantise,
    true_translations,
    unaugmented,
)
from metrics import Extractor, kernel_distance
from models import open_generator
from utils import NOISE, InputError

HERE = Path(__file__).resolve().parent
Names = Mapping[str, Sequence[str]]  # the runs of each setting
Figures = dict[str, dict[str, float]]  # of a run, by direction
Measured = dict[str, list[Figures]]  # by setting


class Comparison(NamedTuple):
    """Flags of ``train.py``: those all settings share, and each setting's own."""

    shared: str
    settings: Mapping[str, str]


SMALL = (
    "--dataset_name solid2striped --img_height 64 --img_width 64 --ngf 16 --ndf 32 --n_residual_blocks 2 "
    "--lr 0.0005 --n_epochs 3 --decay_epoch 3 --n_cpu 0 --sample_interval 0"
)
TWO = "--system attentiongan --n_layers_D 2"  # patches that fit pictures of 64 pixels
ONE = "--system attentiongan1 --n_layers_D 2"
HORSES = (
    "--dataset_name horse2zebra --img_height 64 --img_width 64 --ngf 32 --n_residual_blocks 6 --n_layers_D 2 "
    "--n_epochs 4 --decay_epoch 4 --n_cpu 1 --sample_interval 0"
)
FACADES = (
    "--dataset_name facades --img_height 64 --img_width 64 --ngf 32 --ndf 32 --n_layers_D 2 "
    "--n_epochs 30 --decay_epoch 15 --n_cpu 0 --sample_interval 0"
)
# The set's photographs (docs/ shows a sample of 360 and 40 to test); a pass over them is half as long without pairs,
# where half of them are grey.
PHOTOGRAPHS = (
    "--dataset_name monet2photo --task colorization --img_height 64 --img_width 64 --ngf 32 --ndf 32 --n_layers_D 2 "
    "--n_cpu 0 --sample_interval 0"
)
PAIRS, NO_PAIRS = "--n_epochs 12 --decay_epoch 6", "--n_epochs 24 --decay_epoch 12 --n_residual_blocks 3"
# 500 small grey pictures, in the place of a set of grey faces with masks that is not at hand, on which nearest
# upsampling was reported to do better than transposed convolutions of its capacity.
FACES = (
    "--dataset_name solid2striped --channels 1 --ngf 16 --ndf 16 --batch_size 16 --n_epochs 80 --n_cpu 0 "
    "--sample_interval 0"
)
COMPARISONS = {
    "systems": Comparison(
        SMALL,
        {
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
    ),
    "ablations": Comparison(
        f"{SMALL} {TWO}",
        {
            "AttentionGAN II": "",
            "identity 5": "--lambda_id 5",
            "no pool": "--pool_size 0",
            "attention kernel 7": "--attention_kernel 7",
            "nearest upsampling": "--upsample nearest",
            "rate 0.0002": "--lr 0.0002",
            "float32": "--precision float32",
        },
    ),
    "horses": Comparison(
        f"{HORSES} --system attentiongan",
        {
            "AttentionGAN II": "",
            "identity 5": "--lambda_id 5",
        },
    ),
    # The ablation of the pix2pix paper (Table 1), labels to photographs, and CycleGAN on the same pictures unpaired.
    "pix2pix": Comparison(
        FACADES,
        {
            "L1": "--system pix2pix --direction BtoA --lambda_gan 0",
            "cGAN": "--system pix2pix --direction BtoA --lambda_L1 0",
            "L1 + cGAN": "--system pix2pix --direction BtoA",
            "CycleGAN, unpaired": "--system cyclegan --n_residual_blocks 3",
        },
    ),
    "colorization": Comparison(
        PHOTOGRAPHS,
        {
            "L1": f"--system pix2pix --lambda_gan 0 {PAIRS}",
            "L1 + cGAN": f"--system pix2pix {PAIRS}",
            "CycleGAN, unpaired": f"--system cyclegan --upsample nearest {NO_PAIRS}",
            "AttentionGAN II, unpaired": f"--system attentiongan --upsample nearest {NO_PAIRS}",
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


def check_features(extractor: str) -> None:
    """Raise InputError where features cannot be had: before hours of training, not after."""
    if extractor != "none":
        Extractor(extractor, None, torch.device("cpu"))


def train_all(runs: Mapping[str, str], jobs: int, extra: Sequence[str]) -> None:
    """Train what is not finished of ``runs``, flags of ``train.py`` by name, ``jobs`` at a time.

    Each has its share of the processor's cores. Raises InputError, before anything trains, where a run of other flags
    stands; and when a run fails: the others go on to their ends.
    """
    commands = {name: [*shlex.split(flags), *extra] for name, flags in runs.items()}
    standing = {name: state for name in runs if (state := find_state(name)) is not None}
    troubles = [trouble for name, state in standing.items() if (trouble := differs(name, state, commands[name]))]
    if troubles:
        raise InputError("\n".join(troubles))
    threads = max(1, utils.usable_cores() // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}

    def work(name: str) -> str | None:
        if name in standing and is_finished(standing[name]):
            return None
        flags = ["--resume", *extra] if name in standing else commands[name]
        command = [sys.executable, str(HERE / "train.py"), *flags, "--name", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(f"{name}: {'done' if done.returncode == 0 else 'failed'}", flush=True)
        _, mark, told = done.stderr.strip().rpartition("train.py: error: ")
        reason = told if mark else (told.splitlines() or ["no message"])[-1]
        return None if done.returncode == 0 else f"{name}: {reason}"

    with ThreadPoolExecutor(jobs) as pool:
        troubles = [trouble for trouble in pool.map(work, runs) if trouble]
    if troubles:
        raise InputError("\n".join([f"{len(troubles)} of {len(runs)} runs failed:", *troubles]))


def find_state(name: str) -> dict[str, Any] | None:
    """The newest checkpoint of a run, None where it has none. Raises InputError for one that cannot be read."""
    folder = utils.SAVED_MODELS / name
    return utils.Checkpoints(folder).load(quiet=True) if any(folder.glob("checkpoint*.pt")) else None


def is_finished(state: Mapping[str, Any]) -> bool:
    return state["step"] == state["options"]["n_epochs"] * state["steps_per_epoch"]


def differs(name: str, state: Mapping[str, Any], flags: Sequence[str]) -> str | None:
    """In which options, or pictures, the run that stands is not one of these flags, and what to do; None where it is.

    An option that the run does not know had its default, as ``train.py --resume`` has it, too. Raises InputError.
    """
    options = train.parse_options(flags)
    wanted, root = vars(options), Path(options.data_dir) / options.dataset_name
    known = {**vars(train.make_parser(options.system).parse_args([])), **state["options"]}
    if known["system"] == options.system:
        keys = wanted.keys() - {*train.FREE_ON_RESUME, *train.HOW_TO_START} | {"n_epochs", "decay_epoch"}
        changes = [f"--{k} {known[k]} (expected {wanted[k]})" for k in sorted(keys) if known[k] != wanted[k]]
        changes += [f"{lost} (which this version does not know)" for lost in train.lost_options(known, wanted)]
    else:
        changes = [f"--system {known['system']} (expected {options.system})"]
    if not changes:
        if options.dataset_name == BUILT_IN:
            draw_built_in(root)
        if train.build_dataset(options).digest() != state["pictures"]:
            changes = [f"pictures of other names than those in {root}"]
    folder = utils.SAVED_MODELS / name
    return f"{folder}: trained with {', '.join(changes)}; remove it to train it anew" if changes else None


# ----------------------------------------------------------------------------------------------------------
#  The table
# ----------------------------------------------------------------------------------------------------------


def collect(name: str, dataset: str, extractor: str) -> dict[str, Figures]:
    """What ``evaluation.json`` says of a run ("figures"), of its inputs ("untranslated"), of real pictures ("floor").

    Among the figures is the size of its generators.
    """
    report = json.loads((utils.IMAGES / name / "evaluation.json").read_text())
    result: dict[str, Figures] = {"figures": {}, "untranslated": {}, "floor": {}}
    for row in report["rows"]:
        if (row["dataset"], row["extractor"], row["weights"]) == (dataset, extractor, evaluate.LAST):
            for kind, figures in result.items():
                known = {k: v for k, v in row[kind].items() if v is not None}
                if known:
                    figures[row["direction"]] = known
    for direction, figures in result["figures"].items():
        figures |= count_parameters(open_generator(name, direction)[0])
    return result


def count_parameters(generator: nn.Module) -> dict[str, float]:
    return {"million parameters of a generator": sum(p.numel() for p in generator.parameters()) / 1e6}


def measure_translations(names: Names, dataset: str, data_dir: Path, extractor: str) -> Measured:
    """What ``evaluate.py`` says of each run, of the untranslated pictures and of real ones in place of translations.

    Where truths are known it is beside the error of a picture that is all grey.
    """
    arguments = ["--dataset_name", dataset, "--extractor", extractor, "--data_dir", str(data_dir)]
    status = evaluate.main([*arguments, "--checkpoint", *(name for group in names.values() for name in group)])
    if status:
        raise InputError("evaluate.py could not measure the runs")
    found = {name: collect(name, dataset, extractor) for group in names.values() for name in group}
    measured: Measured = {setting: [found[name]["figures"] for name in group] for setting, group in names.items()}
    first = next(iter(found.values()))
    beside = {"untranslated": first["untranslated"], "real training pictures": first["floor"]}
    grey: Figures = {}
    for direction in common_directions(measured):
        _, about = open_generator(next(iter(names.values()))[0], direction)
        truths = truths_of_pairs(data_dir / dataset, direction, about["options"])
        if truths is not None:
            targets = find_side(data_dir / dataset, "train", direction[-1], find_task(about["options"]))
            level = read_all(targets, about["options"]).mean()
            grey[direction] = {"L1": (truths - level).abs().mean().item()}
    beside["mean grey of the training pictures"] = grey
    return measured | {title: [figures] for title, figures in beside.items() if figures}


def find_task(options: Mapping[str, Any]) -> str:
    return options.get("task", TASKS[0])


def truths_of_pairs(root: Path, direction: str, options: Mapping[str, Any], n: int | None = None) -> Tensor | None:
    """The true translations of the first ``n`` test pictures, where a run learned from pairs; None elsewhere."""
    task = find_task(options)
    pictures = find_side(root, "test", direction[0], task)[:n]
    truths = true_translations(root, pictures, direction, task, evaluate.takes_pairs(options))
    return None if truths is None else read_all(truths, options)


def read_all(pictures: Sequence[Picture], options: Mapping[str, Any]) -> Tensor:
    """Pictures as a run of these options sees them outside training, (n, channels, height, width) in [-1, 1]."""
    size = options["img_height"], options["img_width"]
    return normalise(torch.stack([unaugmented(p, size, options["channels"], options["resize"]) for p in pictures]))


@utils.whole_float32()
@torch.no_grad()
def measure_samples(names: Names, dataset: str, data_dir: Path, extractor: str, n: int = 500) -> Measured:
    """The KID to the test pictures of ``n`` samples of each run; beside it that of the training pictures, its floor."""
    extract = Extractor(extractor, None, utils.pick_device())
    runs = {setting: [open_generator(name, NOISE) for name in group] for setting, group in names.items()}
    options = next(iter(runs.values()))[0][1]["options"]
    train_set, test_set = (
        extract(quantise(read_all(find_plain(data_dir / dataset, split), options))).vectors
        for split in ("train", "test")
    )
    kid = f"KID{extract.suffix}"
    measured: Measured = {setting: [] for setting in runs}
    for setting, group in runs.items():
        for generator, about in group:
            noise = fixed_noise(n, generator.settings["nz"], about["options"]["seed"])
            samples = torch.cat([quantise(part) for part in map(generator.eval(), noise.split(50))])
            figures = {kid: kernel_distance(extract(samples).vectors, test_set)}
            measured[setting].append({NOISE: figures | count_parameters(generator)})
    return measured | {"the training pictures": [{NOISE: {kid: kernel_distance(train_set, test_set)}}]}


def common_directions(measured: Measured) -> list[str]:
    """The directions that all runs have."""
    runs = [run for group in measured.values() for run in group]
    return [direction for direction in runs[0] if all(direction in run for run in runs)]


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
    ("million parameters of a generator", 2, 1),
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
            of_the_setting = key in ("million parameters of a generator", "steps/s")
            spread = "" if of_the_setting or len(values) < 2 else f" ± {statistics.stdev(values):.{digits}f}"
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "–")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return lines


@torch.no_grad()
def show(name: str, direction: str, root: Path, n: int = 4) -> dict[str, Tensor]:
    """What one run is judged by: its first samples; or the first ``n`` test pictures, translations, attention, truths.

    All are (n, channels or 1, H, W) in [-1, 1].
    """
    generator, about = open_generator(name, direction)
    generator.eval()
    options = about["options"]
    if direction == NOISE:
        return {"sample": generator(fixed_noise(8, generator.settings["nz"], options["seed"]))}
    inputs = read_all(find_side(root, "test", direction[0], find_task(options))[:n], options)
    translation = generator(inputs)
    attention = None if translation.foreground is None else 2 * translation.foreground - 1
    truths = truths_of_pairs(root, direction, options, len(inputs))
    columns = {"input": inputs, "output": translation.image, "attention": attention, "truth": truths}
    return {name: column for name, column in columns.items() if column is not None}


def draw(comparison: str, seed: int, direction: str, root: Path, path: Path) -> None:
    """A sheet with a row for each setting, see ``show``; white where a setting has nothing to show."""
    rows = {s: show(run_name(comparison, s, seed), direction, root) for s in COMPARISONS[comparison].settings}
    columns = {}
    widest = max(rows.values(), key=len)
    for i in range(len(next(iter(widest.values())))):
        for name, column in widest.items():
            white = torch.ones_like(column[i])
            columns[f"{name} {i + 1}"] = torch.stack([row[name][i] if name in row else white for row in rows.values()])
    utils.draw_sheet(columns, rows=list(rows)).save(path)


def compare(options: argparse.Namespace) -> None:
    """Train, measure, write. Raises InputError."""
    comparison = options.comparison
    shared, settings = COMPARISONS[comparison]
    flags = train.parse_options(shlex.split(shared))
    with torch.device("meta"):
        draws_from_noise = NOISE in train.build_system(flags).generators
    if draws_from_noise and options.extractor == "none":
        raise InputError("--extractor none: samples are compared by their features, expected an extractor")
    names = {s: [run_name(comparison, s, seed) for seed in options.seeds] for s in settings}
    runs = {
        run_name(comparison, setting, seed): f"{shared} {own} --seed {seed}"
        for seed in options.seeds
        for setting, own in settings.items()
    }
    check_features(options.extractor)
    train_all(runs, options.jobs, ["--data_dir", str(options.data_dir)])
    measure = measure_samples if draws_from_noise else measure_translations
    measured = measure(names, flags.dataset_name, options.data_dir, options.extractor)
    speeds = {setting: {"steps/s": speed} for setting, speed in time_steps(comparison).items()}
    seeds = " ".join(map(str, options.seeds))
    lines = [
        f"# Comparison: {comparison}",
        "",
        f"`python compare.py {comparison} --seeds {seeds} --extractor {options.extractor}`: "
        f"mean ± standard deviation over the seeds. {date.today():%B %Y}, PyTorch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} thread(s).",
        "",
        f"All settings: `{shared}`.",
    ]
    directions = common_directions({setting: measured[setting] for setting in settings})
    for direction in directions:
        runs = {
            setting: [run[direction] | speeds.get(setting, {}) for run in group if direction in run]
            for setting, group in measured.items()
        }
        lines += ["", f"## {direction}", "", *make_table({setting: group for setting, group in runs.items() if group})]
    lines += ["", "## Settings", "", *(f"- {s}: `{own or 'as above'}`" for s, own in settings.items())]
    out = Path("docs")
    out.mkdir(exist_ok=True)
    root = options.data_dir / flags.dataset_name
    draw(comparison, options.seeds[0], directions[0], root, out / f"compare_{comparison}.png")
    (out / f"compare_{comparison}.md").write_text(
        "\n".join(lines) + f"\n\n![A row for each setting](compare_{comparison}.png)\n", encoding="utf-8"
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
