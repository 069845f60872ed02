"""The command line of a training: every option with its default, type, bounds and help, and what a resumed run keeps.

A system declares its own options (systems.py). All others stand here, by groups.
"""

from __future__ import annotations

import utils
from utils import InputError, Option, option, options_of, print0

import argparse
import difflib
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

import checkpoints
from checkpoints import CHECKPOINT, SAVED_MODELS
from datasets import BUILT_IN, TASKS
from metrics import EFFICIENTNET, INCEPTION, check_extractor
from models import fixed_size_message
from pictures import RESIZE
from systems import SYSTEMS, System

PRESETS = ("full", "small")

# ----------------------------------------------------------------------------------------------------------
#  Options. A resumed run may change n_epochs, decay_epoch and those of MachineOptions. Checkpoints leave out
#  those of RunOptions, generator files those of MachineOptions too.
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    dataset_name: str = option("horse2zebra", f"folder below --data_dir; {BUILT_IN} is drawn on first use")
    task: str = option(
        "translation",
        "colorization: the pictures of train (or trainB) and test (or testB) are B, their grey versions A",
        choices=TASKS,
    )
    img_height: int = option(256, "height of the pictures, pixels", least=1, most=2**14)
    img_width: int = option(256, "width of the pictures, pixels", least=1, most=2**14)
    crop_size: int = option(
        0,
        "train on square crops of N pixels of such pictures, for less time and memory; 0: crops of their size",
        least=0,
        most=2**14,
    )
    resize: str = option(
        "squash",
        "before the crop, resize both sides to 1.12 x the size as in the official code (squash), or keep the aspect",
        choices=RESIZE,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    n_epochs: int = option(200, "epochs in all", least=1, most=10**7)
    decay_epoch: int | None = option(
        None, "epochs at the full rate, then it falls linearly to zero (default: half of --n_epochs)", type=int, least=1
    )
    decay_by: str = option("epoch", "how often the rate falls after --decay_epoch", choices=("epoch", "step", "never"))
    batch_size: int = option(1, "samples per step and process", least=1, most=2**20)
    lr: float = option(2e-4, "Adam: learning rate", least=0)
    b1: float = option(0.5, "Adam: decay of the first moment", least=0, below=1)
    b2: float = option(0.999, "Adam: decay of the second moment", least=0, below=1)
    weight_decay: float = option(0.0, "Adam: this share of every weight is added to its gradient", least=0)
    # torch takes seeds below 2 ** 64, and ranks add to theirs.
    seed: int = option(0, "seed of weights, shuffling, crops, flips and replay buffers", least=0, most=2**62)
    preset: str = option(
        "full", "small: for an evening on two CPU cores, 64 x 64 pixels and small networks", choices=PRESETS
    )
    precision: str = option(
        "auto", "auto: bf16 where the hardware multiplies it, else float32", choices=("auto", "float32", "bf16")
    )
    init_from: str | None = option(
        None,
        f"start from a run, weights or folder (discriminators where they fit); RUN/{CHECKPOINT}: all networks",
        type=str,
    )
    eval_interval: int = option(
        0,
        "epochs between evaluations on a tenth of the training pictures, which is then not trained on: the generators "
        "of the least KID (mean of both directions) are kept in the run's folder best; 0: none",
        least=0,
    )
    extractor: str = option(INCEPTION, f"whose features that KID compares, as in evaluate.py: {EFFICIENTNET}, ...")
    keep_evaluated: bool = option(False, "keep the generators of every evaluation, for evaluate.py --oracle")
    log_interval: int = option(50, "steps between lines of log.jsonl", least=1)
    sample_interval: int = option(
        1000, "steps between picture sheets, after those at 1, 2, 4, 8, ...; 0: only at the end of the run", least=0
    )


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    data_dir: str = option("data", "folder that holds the data sets")
    cache_gb: float = option(2.0, "GB per process for decoded pictures, kept if all fit; 0: none are kept", least=0)
    n_cpu: int = option(2, "processes that decode what is not kept in memory; 0: the main one", least=0, most=1024)
    device: str = option("auto", "cuda, cuda:1, mps, cpu, or auto")
    compile: bool = option(False, "compile the networks first (torch.compile), for long runs")
    cuda_graph: bool = option(False, "capture a step as a CUDA graph and replay it, on one GPU")
    checkpoint_interval: int = option(1, "epochs between checkpoints; 0: only by time and at the end", least=0)
    checkpoint_minutes: float = option(15.0, "minutes between checkpoints within an epoch; 0: none", least=0)
    inception: str | None = option(None, "file with the extractor's weights, instead of fetching them", type=str)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    name: str | None = option(None, "name of the run (default: <dataset_name>_<system>)", type=str)
    resume: bool = option(
        False, "go on with the run of this name exactly at its checkpoint; options not given are the run's own"
    )
    auto_resume: bool = option(
        False, "as --resume where the run has a checkpoint, else start it; restarts by torchrun do so by themselves"
    )
    overwrite: bool = option(False, "delete the run of this name and start anew")
    max_steps: int = option(0, "save and leave after so many steps of the run, for a first try; 0: none", least=0)


MACHINE = tuple(options_of(MachineOptions))
FREE_ON_RESUME = ("n_epochs", "decay_epoch", *MACHINE)
DEFAULT_SYSTEM = "attentiongan"
SMALL = {"img_height": 64, "img_width": 64, "ngf": 32, "n_layers_D": 2, "upsample": "nearest"}
SMALL |= {"n_residual_blocks": 6, "n_epochs": 15, "decay_epoch": 10}
# Flags of other projects, each with ours, for the error message.
FOREIGN = {
    "--epoch": "--resume goes on at the checkpoint's epoch",
    "--epochs": "here --n_epochs",
    **dict.fromkeys(("--niter", "--niter_decay"), "here --n_epochs and --decay_epoch"),
    "--dataset": "here --dataset_name",
    "--dataroot": "here --data_dir (the folder above) and --dataset_name",
    **dict.fromkeys(("--gpu_ids", "--gpu"), "here --device cuda:0, or train_dist.py for several"),
    "--cuda": "here --device cuda",
    **dict.fromkeys(("--img_size", "--image_size"), "here --img_height and --img_width"),
    "--n_epochs_decay": "here --n_epochs is the sum, and --decay_epoch where the rate begins to fall",
    "--load_size": "here 1.12 x --img_height and --img_width",
    "--continue_train": "here --resume",
    "--model": "here --system",
    "--batchSize": "here --batch_size",
    **dict.fromkeys(("--lambda_A", "--lambda_B"), "here --lambda_cyc, for both directions"),
    "--lambda_identity": "here --lambda_id, which is lambda_A x lambda_identity",
    **dict.fromkeys(("--num_workers", "--num_threads"), "here --n_cpu"),
    "--checkpoints_dir": "runs are in saved_models/NAME (--name)",
}


def option_groups(system: str, preset: str = "full") -> dict[str, dict[str, Option]]:
    """All options by group and name, with the defaults of ``system`` and of the preset."""
    which = Option(str, DEFAULT_SYSTEM, "what to train; its defaults are shown here", choices=tuple(sorted(SYSTEMS)))
    groups = {
        "data": options_of(DataOptions),
        "system": {"system": which, **options_of(SYSTEMS[system])},
        "training": options_of(TrainingOptions),
        "machine (may change with --resume)": options_of(MachineOptions),
        "run": options_of(RunOptions),
    }
    presets = {**SYSTEMS[system].presets, **(SMALL if preset == "small" else {})}
    for group in groups.values():
        for name in group.keys() & presets.keys():
            # A small preset never gives a system more blocks than its own default.
            smaller = preset == "small" and name == "n_residual_blocks" and group[name].default < presets[name]
            group[name] = group[name] if smaller else replace(group[name], default=presets[name])
    return groups


def all_options(system: str, preset: str = "full") -> dict[str, Option]:
    return {name: each for group in option_groups(system, preset).values() for name, each in group.items()}


def stored_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that checkpoints hold."""
    names = all_options(options.system).keys() - options_of(RunOptions).keys()
    return {name: getattr(options, name) for name in sorted(names)}


def make_parser(system: str = DEFAULT_SYSTEM, preset: str = "full") -> utils.Parser:
    """All flags with these defaults; the names are those of PyTorch-GAN where it has the flag."""
    parser = utils.Parser(f"Train {system}.")
    for title, group in option_groups(system, preset).items():
        utils.add_options(parser, title, group)
    for name in ("compile", "cuda_graph"):
        told = f"go on without the --{name} of the run, where it cannot be had"
        parser.add_argument(f"--no_{name}", dest=name, action="store_false", default=False, help=told)
    return parser


def parse_options(
    argv: Sequence[str] | None = None, extend: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """Options from the command line; with --resume, those not given are the run's own.

    ``extend`` adds a launcher's flags. All values are plain (numbers, strings, booleans, None). Raises InputError for
    flags that cannot be read and values that do not fit together.
    """
    known = first_flags(argv)
    own, resumed = {}, None
    files = checkpoints.CheckpointFiles(SAVED_MODELS / known.name)
    restarted = known.auto_resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if (known.resume or (restarted and files.exist())) and not known.help:
        resumed = files.load(quiet=True)
        own = resumed["options"]
        for key, choices in (("system", (*SYSTEMS,)), ("preset", PRESETS)):
            if own.get(key, choices[0]) not in choices:
                raise InputError(f"{files.newest}: options.{key}: {own[key]!s:.40}, expected {' or '.join(choices)}")

    system = own.get("system", known.system)
    # An unknown system is refused by the parser itself.
    parser = make_parser(system if system in SYSTEMS else DEFAULT_SYSTEM, own.get("preset", known.preset))
    extend(parser)
    defaults = vars(parser.parse_args([]))
    unset = object()  # tells which flags were given
    namespace, unknown = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset)))
    if unknown:
        parser.error(explain_unknown(unknown[0].partition("=")[0], system))
    given = {key: value for key, value in vars(namespace).items() if value is not unset}
    if resumed is not None and not known.resume:  # the command that started the run: what was for the start is over
        given |= {"resume": True, "overwrite": False, "init_from": own.get("init_from")}
    if resumed is None and restarted:  # by torchrun, too, which does not add the flag
        given["auto_resume"] = True

    for key in ("init_from", "overwrite"):
        if known.resume and given.get(key):
            raise InputError(f"--resume goes on with a run, --{key} starts one; expected one of the two")
    refuse_changes(own, given)
    if lost := unknown_options(own, defaults):
        raise InputError(f"--resume: the run has {', '.join(lost)}, which this version does not know")
    options = argparse.Namespace(**{**defaults, **own, **given, "name": known.name})
    if options.decay_by == "never" and given.get("decay_epoch"):
        raise InputError("--decay_epoch: --decay_by never keeps the rate, expected epoch or step with it")
    if {**own, **given}.get("decay_epoch") is None:
        preset = options.decay_epoch  # may lie beyond a shorter run
        options.decay_epoch = preset if preset and preset <= options.n_epochs else max(1, options.n_epochs // 2)
    with torch.device("meta"):  # takes no memory, whatever the options say
        built = check_options(options)
    if resumed is not None:
        checkpoints.check_networks(f"saved_models/{known.name}", resumed["networks"], built, built.trained())
    if options.n_epochs < own.get("n_epochs", 1):
        raise InputError(f"--n_epochs {options.n_epochs}: expected at least {own['n_epochs']}")
    return options


def first_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags that decide the defaults of all others: system, preset, and the run that is resumed, by its name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("system", "preset", "dataset_name", "name"):
        parser.add_argument(f"--{name}", default=all_options(DEFAULT_SYSTEM)[name].default)
    for name in ("resume", "auto_resume"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    known = parser.parse_known_args(argv)[0]
    if known.name is None:
        utils.check_name("--dataset_name", known.dataset_name)
        known.name = f"{known.dataset_name}_{known.system}"
    utils.check_name("--name", known.name)
    return known


def refuse_changes(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise InputError for a flag that differs from the run's option and may not change; print those that may."""
    for key in own.keys() & given.keys():
        if given[key] != own[key]:
            if key not in FREE_ON_RESUME:
                raise InputError(
                    f"--resume: --{key} {given[key]} differs from the run's {own[key]}; "
                    f"only {', '.join('--' + k for k in FREE_ON_RESUME)} may change"
                )
            print0(f"--{key} was {own[key]}, is now {given[key]}")


def explain_unknown(flag: str, system: str) -> str:
    """One line on a flag that ``system`` does not have."""
    others = [name for name, declared in SYSTEMS.items() if flag.removeprefix("--") in options_of(declared)]
    if flag in FOREIGN:
        return f"{flag}: {FOREIGN[flag]}"
    if others:
        return f"{flag} belongs to --system {' or '.join(others)}, found --system {system}"
    near = difflib.get_close_matches(flag, [f"--{name}" for name in all_options(system)], n=3)
    return f"{flag}: no flag of {system}" + (f"; near: {', '.join(near)}" if near else "")


def unknown_options(own: Mapping[str, Any], known: Container[str]) -> list[str]:
    """The options, with their values, that a run of another version uses and that are not among ``known``."""
    return [f"--{key} {value}" for key, value in sorted(own.items()) if value and key not in known]


def check_options(options: argparse.Namespace) -> System:
    """Build the system of the options. Raises InputError for values out of bounds, or that do not fit together."""
    for name, each in all_options(options.system).items():
        each.check(name, getattr(options, name))
    if options.decay_epoch > options.n_epochs:
        raise InputError(
            f"--decay_epoch {options.decay_epoch} lies beyond --n_epochs {options.n_epochs}; "
            "equal to it, the learning rate stays constant"
        )
    check_extractor(options.extractor, options.inception)
    given = {"keep_evaluated": options.keep_evaluated, "inception": options.inception}
    given["extractor"] = options.extractor != INCEPTION
    for flag in (flag for flag, value in given.items() if value and not options.eval_interval):
        raise InputError(f"--{flag} is for evaluations during training, expected --eval_interval with it")
    if options.eval_interval and options.extractor == "none":
        raise InputError("--extractor none: --eval_interval compares features, expected an extractor")
    if SYSTEMS[options.system].system_class.data == "plain":
        if options.eval_interval:
            raise InputError("--eval_interval measures translations, and pictures from noise are none; expected 0")
        if options.task != "translation":
            raise InputError(f"--task {options.task} is for translations, and pictures from noise are none")
        if options.crop_size:
            raise InputError(f"--crop_size {options.crop_size}: {options.system} crops no pictures, expected 0")
    if options.task == "colorization" and options.channels != 3:
        raise InputError(f"--task colorization makes colours: --channels {options.channels}, expected 3")
    system = build_system(options)
    for key in ("img_height", "img_width", "crop_size"):
        size = getattr(options, key)
        if size and (size % system.size_multiple or size < system.min_size):  # only a crop_size may be 0
            raise InputError(
                f"--{key} {size}: expected a multiple of {system.size_multiple}, at least {system.min_size}"
            )
    if options.crop_size > (least := min(options.img_height, options.img_width)):
        raise InputError(f"--crop_size {options.crop_size}: expected at most {least}, the size of the pictures")
    fixed = system.generator(next(iter(system.generators))).settings.get("size")
    if options.crop_size and fixed is not None:
        raise InputError(f"--crop_size {options.crop_size}: {fixed_size_message(fixed)}")
    return system


def build_system(options: argparse.Namespace) -> System:
    """The system that the options describe. Each rank's replay buffers have their own random numbers."""
    declared = SYSTEMS[options.system]
    own = declared(**{each.name: getattr(options, each.name) for each in fields(declared)})
    return own.build((options.img_height, options.img_width), (options.seed, utils.rank()))
