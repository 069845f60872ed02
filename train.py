"""Train a system on one device.

    python train.py --dataset_name horse2zebra
    python train.py --dataset_name horse2zebra --resume

``train`` is the whole procedure and its loop is the algorithm. ``train_dist.py`` runs the same on many processes.
"""

from __future__ import annotations

import utils
from utils import InputError, Option, option, options_of, print0

import argparse
import difflib
import inspect
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoints
import record
from checkpoints import SAVED_MODELS
from datasets import BUILT_IN, KINDS, RESIZE, TASKS, EpochSampler, PictureDataset, make_loader, normalise
from metrics import EFFICIENTNET, INCEPTION, Validation, check_extractor
from prepare import draw_built_in
from systems import SYSTEMS, Batch, System

# ----------------------------------------------------------------------------------------------------------
#  Options. A resumed run may change n_epochs, decay_epoch and those of MachineOptions. Checkpoints leave out
#  those of RunOptions, generator files those of MachineOptions too.
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    dataset_name: str = option("horse2zebra", f"folder below --data_dir; {BUILT_IN} is drawn on first use")
    task: str = option(
        TASKS[0],
        "colorization: the pictures of train (or trainB) and test (or testB) are B, their grey versions A",
        choices=TASKS,
    )
    img_height: int = option(256, "height of the training pictures, pixels", least=1, most=2**14)
    img_width: int = option(256, "width of the training pictures, pixels", least=1, most=2**14)
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
        "full", "small: for an evening on two CPU cores, 64 x 64 pixels and small networks", choices=("full", "small")
    )
    precision: str = option(
        "auto", "auto: bf16 where the hardware multiplies it, else float32", choices=("auto", "float32", "bf16")
    )
    init_from: str | None = option(
        None, "start from the generators of a run, weights or folder; RUN/checkpoint.pt: from all networks", type=str
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
    cuda_graph: bool = option(False, "capture a step as a CUDA graph and replay it, on one GPU; never tried on one yet")
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
# Files that a run may have written before its first checkpoint. They do not block a new run of its name.
TRACES = re.compile(r"log\.(jsonl|partial)|\d{8}\.png|curves\.png|index\.html|\..*\.partial|\.partial\..*")
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
    **dict.fromkeys(("--img_size", "--image_size", "--crop_size"), "here --img_height and --img_width"),
    "--load_size": "here 1.12 x --img_height and --img_width",
    "--continue_train": "here --resume",
    "--model": "here --system",
    "--batchSize": "here --batch_size",
    **dict.fromkeys(("--lambda_A", "--lambda_B"), "here --lambda_cyc, for both directions"),
    "--lambda_identity": "here --lambda_id, which is lambda_A x lambda_identity",
    **dict.fromkeys(("--num_workers", "--num_threads"), "here --n_cpu"),
    "--checkpoints_dir": "runs are in saved_models/NAME (--name)",
}
SAVING = "saving, then leaving; Ctrl-C once more leaves at once"
EPILOG = """\
The defaults are CycleGAN's schedule, which the official AttentionGAN options share: batch 1, 200 epochs, the
rate falling to zero from epoch 100. The official AttentionGAN script for horse2zebra trains instead with
  --batch_size 4 --n_epochs 60 --decay_epoch 60 --lambda_id 5
"""


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
    parser = utils.Parser(f"Train {system}.", EPILOG)
    for title, group in option_groups(system, preset).items():
        utils.add_options(parser, title, group)
    return parser


def parse_options(
    argv: Sequence[str] | None = None, extend: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """Options from the command line; with --resume, those not given are the run's own.

    ``extend`` adds a launcher's flags. All values are plain (numbers, strings, booleans, None). Raises InputError for
    flags that cannot be read and values that do not fit together.
    """
    # First the flags that decide the defaults of all others: system, preset, and the run that is resumed.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("system", "preset", "dataset_name", "name"):
        first.add_argument(f"--{name}", default=all_options(DEFAULT_SYSTEM)[name].default)
    for name in ("resume", "auto_resume"):
        first.add_argument(f"--{name}", action="store_true")
    first.add_argument("-h", "--help", action="store_true")
    known = first.parse_known_args(argv)[0]
    if known.name is None:
        utils.check_name("--dataset_name", known.dataset_name)
    name = f"{known.dataset_name}_{known.system}" if known.name is None else known.name
    utils.check_name("--name", name)
    own, resumed = {}, None
    files = checkpoints.CheckpointFiles(SAVED_MODELS / name)
    restarted = known.auto_resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if (known.resume or (restarted and files.exist())) and not known.help:
        resumed = files.load(quiet=True)
        own = resumed["options"]
        if own["system"] not in SYSTEMS or own.get("preset", "full") not in ("full", "small"):
            raise InputError(f"{files.newest}: options: unknown system or preset, expected one of {', '.join(SYSTEMS)}")

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
    if resumed is not None and not known.resume:  # the command that started the run
        given |= {"resume": True, "overwrite": False, "init_from": own.get("init_from")}

    for key in ("init_from", "overwrite"):
        if known.resume and given.get(key):
            raise InputError(f"--resume goes on with a run, --{key} starts one; expected one of the two")
    for key in own.keys() & given.keys():
        if given[key] != own[key]:
            if key not in FREE_ON_RESUME:
                raise InputError(
                    f"--resume: --{key} {given[key]} differs from the run's {own[key]}; "
                    f"only {', '.join('--' + k for k in FREE_ON_RESUME)} may change"
                )
            print0(f"--{key} was {own[key]}, is now {given[key]}")
    if lost := unknown_options(own, defaults):
        raise InputError(f"--resume: the run has {', '.join(lost)}, which this version does not know")
    options = argparse.Namespace(**{**defaults, **own, **given, "name": name})
    if options.decay_by == "never" and given.get("decay_epoch"):
        raise InputError("--decay_epoch: --decay_by never keeps the rate, expected epoch or step with it")
    if options.decay_epoch is None:
        options.decay_epoch = max(1, options.n_epochs // 2)
    with torch.device("meta"):  # takes no memory, whatever the options say
        built = check_options(options)
    if resumed is not None:
        checkpoints.check_networks(f"saved_models/{name}", resumed["networks"], built, built.trained())
    if options.n_epochs < own.get("n_epochs", 1):
        raise InputError(f"--n_epochs {options.n_epochs}: expected at least {own['n_epochs']}")
    return options


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
    if options.task == "colorization" and options.channels != 3:
        raise InputError(f"--task colorization makes colours: --channels {options.channels}, expected 3")
    system = build_system(options)
    for key in ("img_height", "img_width"):
        size = getattr(options, key)
        if size % system.size_multiple or size < system.min_size:
            raise InputError(
                f"--{key} {size}: expected a multiple of {system.size_multiple}, at least {system.min_size}"
            )
    return system


# ----------------------------------------------------------------------------------------------------------
#  Building
# ----------------------------------------------------------------------------------------------------------


def build_system(options: argparse.Namespace) -> System:
    """The system that the options describe. Each rank's replay buffers have their own random numbers."""
    declared = SYSTEMS[options.system]
    own = declared(**{each.name: getattr(options, each.name) for each in fields(declared)})
    return own.build((options.img_height, options.img_width), (options.seed, utils.rank()))


def set_up(
    options: argparse.Namespace, device: torch.device
) -> tuple[System, dict[str, torch.optim.Optimizer], partial[torch.autocast]]:
    """What ``training_step`` takes: the system on its device, each player's optimizer, a maker of autocast contexts.

    Raises InputError for ``cuda_graph`` where a step cannot be captured.
    """
    if options.cuda_graph:
        if device.type != "cuda" or options.compile or utils.world_size() > 1:
            found = f"--device {device}, {utils.world_size()} process(es){', --compile' if options.compile else ''}"
            raise InputError(f"--cuda_graph: expected one process on CUDA without --compile, found {found}")
        torch.cuda.set_device(device)  # on which streams are then made
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    system = build_system(options).to(device).to(memory_format=utils.pick_layout(device))
    if options.compile:
        torch._dynamo.config.recompile_limit = 16  # U-GAT-IT's discriminators can need more than 8
        for name in system.trained():
            system.get_submodule(name).compile(dynamic=False)  # in place, so the names of the weights stay
    if utils.rank():  # each rank draws its own dropout
        torch.manual_seed(options.seed + 1_000_003 * utils.rank())
    adam = partial(torch.optim.Adam, lr=options.lr, betas=(options.b1, options.b2), weight_decay=options.weight_decay)
    parameters = {turn.player: trained_parameters(system, turn.networks) for turn in system.turns}
    optimizers: dict[str, torch.optim.Optimizer] = {k: adam(each, fused=True) for k, each in parameters.items()}
    return system, optimizers, utils.make_autocast(device, options.precision)


def build_dataset(options: argparse.Namespace) -> PictureDataset:
    make = KINDS[SYSTEMS[options.system].game.data]
    given = {**vars(options), "root": data_folder(options), "size": (options.img_height, options.img_width)}
    given |= {"how": options.resize, "hold_out": options.eval_interval > 0}
    return make(**{key: given[key] for key in inspect.signature(make).parameters})


def data_folder(options: argparse.Namespace) -> Path:
    return Path(options.data_dir) / options.dataset_name


def trained_parameters(system: System, networks: Sequence[str]) -> list[Tensor]:
    return [p for name in networks for p in system.get_submodule(name).parameters()]


def prepare_run(options: argparse.Namespace, limit: float = 0.0) -> PictureDataset:
    """What one process does before any training: draw the built-in set, check name and pictures.

    Returns the data set, with its pictures in memory where they take at most ``limit`` bytes. Raises InputError.
    """
    if options.dataset_name == BUILT_IN:
        draw_built_in(data_folder(options))
    if not (options.resume or options.overwrite):
        refuse_existing_run(options)
    dataset = build_dataset(options)
    dataset.check(limit)
    return dataset


def refuse_existing_run(options: argparse.Namespace) -> None:
    """Raise InputError where a run of this name exists."""
    for folder in run_folders(options):
        kept = [p for p in sorted(folder.rglob("*")) if not p.is_dir() and not TRACES.fullmatch(p.name)]
        if kept:
            go_on = "go on with it (--resume), " if checkpoints.CheckpointFiles(folder).exist() else ""
            raise InputError(
                f"a run named {options.name} exists already ({kept[0]}); {go_on}"
                "choose another --name, or replace that one (--overwrite)"
            )


def run_folders(options: argparse.Namespace) -> tuple[Path, Path]:
    return SAVED_MODELS / options.name, record.IMAGES / options.name


def empty_run_folders(options: argparse.Namespace) -> None:
    """Empty the folders of a run that starts anew. This comes last, when nothing can be refused any more.

    The folders themselves stay: they may be links to a larger disk, and this process has locked one. It may have waited
    for the lock, and another process may have saved there meanwhile: then this raises InputError.
    """
    utils.barrier()
    if utils.rank() == 0:
        if not options.overwrite:
            refuse_existing_run(options)
        for path in (path for folder in run_folders(options) if folder.is_dir() for path in folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    utils.barrier()


# ----------------------------------------------------------------------------------------------------------
#  Training
# ----------------------------------------------------------------------------------------------------------


def training_step(
    system: System, optimizers: dict[str, torch.optim.Optimizer], autocast: Callable[[], Any], batch: Batch
) -> dict[str, Tensor]:
    """One step of the game: the generators run once, then each player takes its turn. Returns what to log."""
    with autocast():
        fakes = system(batch)
    shown: dict[str, Tensor] = {}
    for turn in system.turns:
        with autocast():
            losses = turn.losses(batch, fakes)
        update(optimizers[turn.player], losses)
        shown |= losses
    system.after_step()
    return shown | system.measures(batch, fakes)


def update(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
    """Change only this player's networks: the gradients of the others are not computed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward(inputs=parameters)
    optimizer.step()


class CapturedStep:
    """``training_step`` as a CUDA graph: the device repeats a step's kernels, without the host launching each of them.

    The first steps run as usual; they are the warm-up that capturing needs. What a replay reads lies in tensors that
    stay where they are: the batch, the learning rates, the choices of the replay buffers. Loss factors are constants of
    the graph, and a step with others is captured anew.
    """

    WARM_UP = 3  # steps

    def __init__(self, system: System, optimizers: dict[str, torch.optim.Optimizer], autocast: Callable[[], Any]):
        self.system = system
        self.batch: dict[str, Tensor] = {}
        self.step = partial(training_step, system, optimizers, autocast, self.batch)
        self.groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
        self.rates = [torch.zeros((), device=group["params"][0].device) for group in self.groups]
        self.stream = torch.cuda.Stream()
        self.steps = 0
        self.factors: tuple[float, ...] | None = None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Take a step, of a batch of the same shapes. Returns what to log."""
        for key, value in batch.items():
            self.batch.setdefault(key, value.clone()).copy_(value)
        self.steps += 1
        if self.steps <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                shown = self.step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return shown
        for rate, group in zip(self.rates, self.groups, strict=True):
            rate.fill_(group["lr"])
        self.system.choose(self.batch)
        if self.factors != self.system.factors:
            self.capture()
        self.graph.replay()
        return {name: value.detach().clone() for name, value in self.shown.items()}  # the next replay changes them

    def capture(self) -> None:
        """Record a step, which is not run. Afterwards the optimizers are as they were, and so are checkpoints."""
        kept = [(group["lr"], group["capturable"]) for group in self.groups]
        for rate, group in zip(self.rates, self.groups, strict=True):
            group.update(lr=rate, capturable=True)
        self.factors, self.graph = self.system.factors, torch.cuda.CUDAGraph()
        # Meanwhile the loader's thread may ask for pinned memory, which only this mode allows.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.shown = self.step()
        for (lr, capturable), group in zip(kept, self.groups, strict=True):
            group.update(lr=lr, capturable=capturable)


def learning_rate(options: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """The rate of a step, counted from 0: constant for ``decay_epoch`` epochs, then linear towards zero.

    It falls with each epoch, as in the official AttentionGAN code, or (``decay_by`` "step") with each step; it would
    reach zero in the one after the last. With ``decay_by`` "never" it stays.
    """
    if options.decay_by == "never":
        return options.lr
    by_step = options.decay_by == "step"
    done, unit = (step, steps_per_epoch) if by_step else (step // steps_per_epoch, 1)
    constant, total = unit * options.decay_epoch, unit * options.n_epochs
    return options.lr * (1 - max(0, done + 1 - constant) / (total - constant + 1))


def train(
    options: argparse.Namespace,
    distribute: Callable[[System], System] = lambda system: system,
    device_name: str | None = None,
    listening: utils.StopSignals | None = None,
    dataset: PictureDataset | None = None,
) -> int:
    """Train to the end, or until a signal, and save. ``prepare_run`` comes before.

    ``distribute`` wraps the networks for many processes. ``device_name`` is this process's device where it is not that
    of the options. ``listening``: StopSignals that the caller has entered already. ``dataset``: what ``prepare_run``
    returns. Returns 0, or the number of the signal that ended the run early. Raises InputError.
    """
    device = utils.pick_device(device_name or options.device)
    system, optimizers, autocast = set_up(options, device)
    if options.init_from and not options.resume:
        checkpoints.init_from(system, options.init_from)

    dataset = build_dataset(options) if dataset is None else dataset
    validation = None
    if options.eval_interval and utils.rank() == 0:
        validation = Validation(options.extractor, options.inception, dataset, device)
    sampler = EpochSampler(len(dataset), options.seed, utils.rank(), utils.world_size())
    n_cpu = 0 if dataset.load(options.cache_gb * 1e9) else options.n_cpu  # decoded pictures need no processes
    loader = make_loader(dataset, sampler, options.batch_size, n_cpu, pin_memory=device.type == "cuda")
    if len(loader) == 0:
        raise InputError(
            f"{len(dataset)} samples in {data_folder(options)} do not fill one batch of "
            f"{options.batch_size} on each of {utils.world_size()} process(es); lower --batch_size"
        )
    samples = next(utils.to_device([dataset.fixed_batch(4)], device, normalise))

    folder = SAVED_MODELS / options.name
    state = checkpoints.RunState(
        folder,
        options=stored_options(options),
        leave_out=MACHINE,
        system=system,
        optimizers=optimizers,
        steps_per_epoch=len(loader),
        dataset=dataset,
        device=device,
    )
    restored: dict[str, Any] = state.load() if options.resume else {"step": 0}
    total = options.n_epochs * len(loader)
    if not options.resume:
        empty_run_folders(options)
    log = record.Record(
        options.name,
        log=folder / "log.jsonl",
        settings=vars(options),
        total_steps=total,
        interval=options.log_interval,
        start=restored["step"],
        defaults={name: each.default for name, each in all_options(options.system, options.preset).items()},
        symptoms=system.symptoms,
    )
    if options.resume:
        log.load_state_dict(restored["ranks"][utils.rank()]["record"], device)
    first, done = divmod(restored["step"], len(loader))
    effective = options.batch_size * utils.world_size()
    print0(
        f"{'resuming' if options.resume else 'training'} {options.name}: {options.system} on {options.dataset_name}, "
        f"{options.img_height} x {options.img_width}, step {restored['step']} of {total}, batch {options.batch_size} x "
        f"{utils.world_size()} process(es) = {effective}, {device.type}, "
        f"{'bf16' if autocast.keywords['enabled'] else 'float32'}"
    )
    print0(dataset.describe())

    players = distribute(system)
    # Sheets and validation have other batch sizes and modes, for which compiled networks would compile again.
    eager = partial(torch.compiler.set_stance, "force_eager") if options.compile else nullcontext
    captured = CapturedStep(players, optimizers, autocast) if options.cuda_graph else None
    start = time.perf_counter()
    with nullcontext(listening) if listening else utils.StopSignals(SAVING) as stop, closing(log):
        for epoch in range(first, options.n_epochs):
            sampler.epoch, sampler.start = epoch, done * options.batch_size
            for batch in utils.to_device(loader, device, normalise):
                lr = learning_rate(options, log.step, len(loader))
                for group in (g for optimizer in optimizers.values() for g in optimizer.param_groups):
                    group["lr"] = lr
                players.set_epoch(epoch)
                images = sum(len(value) for value in batch.values() if value.ndim == 4)  # noise is no picture
                shown = captured(batch) if captured else training_step(players, optimizers, autocast, batch)
                log.add(shown, images, epoch, lr)
                if options.compile and log.step == restored["step"] + 1:
                    print0(f"compiled, and took the first step, in {time.perf_counter() - start:.0f} s")
                if utils.rank() == 0 and sheet_is_due(log.step, options.sample_interval, total):
                    with eager(), autocast():
                        log.sheet(system.sheet(samples))
                if validation is not None and is_due(log.step, options.eval_interval * len(loader), total):
                    with eager():
                        validate(validation, system, state, log, epoch, options.keep_evaluated)
                enough = 0 < options.max_steps <= log.step < total
                stopped, save = utils.any_rank(
                    [enough or stop.signal is not None, state.is_due(options.checkpoint_minutes)]
                )
                if stopped or save:
                    log.check_finite()
                    state.save(log.step, log.state_dict())
                if stopped:
                    break
            if stopped:
                break
            done = 0
            if is_due(epoch + 1, options.checkpoint_interval, options.n_epochs):
                log.check_finite()
                state.save(log.step, log.state_dict())
        log.page(final=True)
        utils.barrier()  # no rank leaves before rank 0 has saved
    if log.step == total:
        print0(f"done: see {log.folder}/index.html; weights in {folder}")
        return 0
    how = "--resume without --max_steps" if enough else "the same command with --resume"
    print0(f"stopped after step {log.step} of {total}, saved; {how} goes on")
    return 0 if enough else stop.signal or signal.SIGTERM


def validate(
    validation: Validation, system: System, state: checkpoints.RunState, log: record.Record, epoch: int, keep: bool
) -> None:
    """Evaluate, log, and save the generators if they are the best so far. Only rank 0 calls this."""
    start = time.perf_counter()
    figures = validation(system)
    mean = sum(figures.values()) / len(figures)
    if mean < state.best:
        state.best = mean
        state.save_generators(log.step, checkpoints.BEST)
    if keep:
        state.save_generators(log.step, f"{checkpoints.KEPT}/{log.step:08d}")
    log.add_validation(figures, epoch, time.perf_counter() - start)


def is_due(count: int, interval: int, last: int) -> bool:
    """Every ``interval`` (never for 0), and at the last."""
    return count == last or (interval > 0 and count % interval == 0)


def sheet_is_due(step: int, interval: int, last: int) -> bool:
    """As ``is_due``, and after steps 1, 2, 4, 8, … up to the interval: a run changes most at its start."""
    return is_due(step, interval, last) or (step < interval and step & (step - 1) == 0)


@contextmanager
def explain_out_of_memory(options: argparse.Namespace) -> Iterator[None]:
    """Turn running out of memory into an InputError that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if options.n_cpu and any(word in str(error) for word in ("shared memory", "</torch_", "Bus error")):
            raise InputError(
                f"--n_cpu {options.n_cpu}: its processes ran out of shared memory (/dev/shm), expected --n_cpu 0 or a "
                "larger one (docker run --shm-size 1g); saved checkpoints are kept"
            ) from error
        if not utils.is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory with --batch_size {options.batch_size}, --img_height {options.img_height} and "
            f"--img_width {options.img_width}: lower these, or --ngf; saved checkpoints are kept"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = parse_options(argv)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"train.py is one process, found WORLD_SIZE {os.environ['WORLD_SIZE']}: expected train_dist.py"
            )
        dataset = prepare_run(options, options.cache_gb * 1e9)
        with explain_out_of_memory(options), utils.lock_folder(SAVED_MODELS / options.name):
            return utils.exit_status(train(options, dataset=dataset))

    return utils.run_script("train.py", work)


if __name__ == "__main__":
    sys.exit(main())
