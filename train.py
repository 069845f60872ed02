"""Train a system on one device.

    python train.py --dataset_name horse2zebra
    python train.py --dataset_name horse2zebra --resume

``train`` is the procedure, its loop the algorithm; ``train_dist.py`` runs the same on many processes.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from datasets import (
    BUILT_IN,
    KINDS,
    MODES,
    RESIZE,
    TASKS,
    EpochSampler,
    PictureDataset,
    draw_built_in,
    make_loader,
    normalise,
    quantise,
    unaugmented,
)
from metrics import EFFICIENTNET, INCEPTION, Extractor, check_extractor, kernel_distance
from models import in_use, open_generators, pack_generator
from systems import GAN_LOSSES, SYSTEMS, TRAINING_PRESETS, Batch, System
from utils import SAVED_MODELS, InputError, say

# ----------------------------------------------------------------------------------------------------------
#  Options
# ----------------------------------------------------------------------------------------------------------

# Help for the options that a system's builder declares; a default stands there (see systems.py).
SYSTEM_HELP = {
    "channels": "colour channels of the pictures: 3 RGB, 1 grey",
    "nz": "length of a noise vector",
    "ngf": "channels of the generators' first convolution; of dcgan's, which runs the other way, before the last",
    "ndf": "channels of the discriminators' first convolution",
    "n_residual_blocks": "residual blocks of each generator",
    "n_layers_D": "stride-2 layers of the PatchGAN: 3 judges patches of 70 x 70 pixels, 2 of 34 x 34",
    "n_masks": "attention masks, the last one the background's if there is no --no_background",
    "attention_kernel": "last kernel of the attention head: 1 as the official code, 7 as the paper",
    "no_background": "give every mask a content and keep nothing of the input, for changes of shape (selfie2anime)",
    "upsample": "how generators enlarge: transposed convolutions as the papers, or nearest neighbour and convolution",
    "attn_disc": "attention-guided discriminator beside the plain one: sees [mask, picture] (concat) or their "
    "product (mask)",
    "attn_real": "mask it sees of a real picture: what the generator from that side makes of it (own), or that of the "
    "translation it stands against as the paper writes (partner)",
    "attn_grad": "what its gradients reach the generator through: picture and mask (both), or the picture alone",
    "unet_depth": "how often the U-Net halves the picture, whose sides are multiples of 2 to its power; "
    "0: log2 of the smaller side",
    "direction": "which side is translated into the other; of facades the labels are B",
    "gan_loss": "adversarial loss: cross-entropy as the paper (bce) or least squares",
    "lambda_L1": "weight of |output - truth|; 0: the conditional GAN alone",
    "light": "small generators, whose MLP reads averages over the picture; later they take pictures of any size",
    "init": "first weights: N(0, 0.02) as the paper says (normal), or torch's own as the official code (default)",
    "lambda_gan": "weight of each adversarial term; 0, of pix2pix: L1 alone, without discriminator",
    "lambda_cam": "weight of the cross-entropy of the generators' class activation maps",
    "lambda_pixel": "weight of each direction's |output - input|",
    "lambda_tv": "weight of each mask's total variation, a sum over its pixels",
    "curriculum_epochs": "epochs that the adversarial terms lead (0.99 to 0.01), as in scheme I's official code, then "
    "0.5 to 0.5; 0: plain weights; as many as --n_epochs: to the end",
    "lambda_cyc": "weight of each direction's cycle loss",
    "lambda_id": "weight of each direction's identity loss (AttentionGAN: 0.5 in the paper, 5 in the official code)",
    "pool_size": "generated pictures each replay buffer keeps; 0 turns it off",
}
SYSTEM_CHOICES = {
    "upsample": ("transposed", "nearest"),
    "attn_disc": ("none", "concat", "mask"),
    "attn_real": ("own", "partner"),
    "attn_grad": ("both", "picture"),
    "init": ("normal", "default"),
    "direction": ("AtoB", "BtoA"),
    "gan_loss": tuple(GAN_LOSSES),
}
# Keywords of builders that are no flags of their system.
SHARED = ("seed", "img_height", "img_width")
# Where and how a run goes on, and nothing of what it learns: the files of generators leave it out.
MACHINE = (
    "n_cpu",
    "cache_gb",
    "data_dir",
    "device",
    "compile",
    "checkpoint_interval",
    "checkpoint_minutes",
    "inception",
)
# What a resumed run may change without ceasing to be the same run.
FREE_ON_RESUME = ("n_epochs", "decay_epoch", *MACHINE)
# What a run leaves that has saved nothing yet.
TRACES = re.compile(r"log\.(jsonl|partial)|\d{8}\.png|curves\.png|index\.html|\..*\.partial")
MOST_SEED = 2**62  # torch takes less than 2 ** 64, and ranks add to it
DEFAULT_SYSTEM, DEFAULT_DATASET = "attentiongan", "horse2zebra"
# What says how to start and is no property of the run.
HOW_TO_START = ("name", "resume", "overwrite")

EPILOG = """\
The defaults are CycleGAN's schedule, which the official AttentionGAN options share: batch 1, 200 epochs, the
rate falling to zero from epoch 100. The official AttentionGAN script trains instead with
  --batch_size 4 --n_epochs 60 --decay_epoch 60 --lambda_id 5
U-GAT-IT (--system ugatit) has defaults of its own: 294 epochs, on selfie2anime 999,600 steps.
DCGAN (--system dcgan), too: 64 x 64, batch 128, 25 epochs at one rate, the middle of each picture (short_side).
"""


def system_options(system: str) -> dict[str, Any]:
    """The options that are a system's own and their defaults, as its builder declares them."""
    parameters = inspect.signature(SYSTEMS[system]).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in SHARED}


def make_parser(system: str) -> argparse.ArgumentParser:
    """All options with the defaults of ``system``; the flag names are those of PyTorch-GAN where it has them."""
    parser = argparse.ArgumentParser(
        description=f"Train {system}.", epilog=EPILOG, formatter_class=utils.HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", default=DEFAULT_DATASET, help=f"folder below --data_dir; {BUILT_IN} is drawn on first use")
    add("--data_dir", default="data", help="folder that holds the data sets")
    add(
        "--task",
        choices=TASKS,
        default=TASKS[0],
        help="colorization: the pictures of train (or trainB) and test (or testB) are B, their grey versions A",
    )
    add("--img_height", type=int, default=256, help="height of the training pictures, pixels")
    add("--img_width", type=int, default=256, help="width of the training pictures, pixels")
    add(
        "--resize",
        choices=RESIZE,
        default="squash",
        help="before the crop, resize both sides to 1.12 x the size as the official code (squash), or keep the aspect",
    )
    add(
        "--cache_gb",
        type=float,
        default=2.0,
        help="training pictures are decoded once and kept in memory if all fit into so many GB per process; 0: never",
    )
    add(
        "--n_cpu",
        type=int,
        default=2,
        help="processes that decode pictures where they are not kept in memory; 0 decodes in the main process",
    )
    add = parser.add_argument_group("system").add_argument
    add("--system", choices=sorted(SYSTEMS), default="attentiongan", help="what to train; its defaults are shown here")
    for name, default in system_options(system).items():
        if isinstance(default, bool):
            add(f"--{name}", action="store_true", help=SYSTEM_HELP[name])
        else:
            choices = SYSTEM_CHOICES.get(name)
            add(f"--{name}", type=type(default), default=default, choices=choices, help=SYSTEM_HELP[name])
    add = parser.add_argument_group("training").add_argument
    add("--n_epochs", type=int, default=200, help="epochs in all")
    add(
        "--decay_epoch",
        type=int,
        help="epochs at the full rate, which then falls linearly to zero; equal to --n_epochs it stays constant "
        "(default: half of --n_epochs)",
    )
    add(
        "--decay_by",
        choices=("epoch", "step", "never"),
        default="epoch",
        help="how often the rate falls after --decay_epoch",
    )
    add("--batch_size", type=int, default=1, help="samples per step and process")
    add("--lr", type=float, default=2e-4, help="Adam: learning rate")
    add("--b1", type=float, default=0.5, help="Adam: decay of the first moment")
    add("--b2", type=float, default=0.999, help="Adam: decay of the second moment")
    add("--weight_decay", type=float, default=0.0, help="Adam: this share of every weight is added to its gradient")
    add("--seed", type=int, default=0, help="seed of weights, shuffling, crops, flips and replay buffers")
    add(
        "--init_from",
        help="start from the generators of a run, shipped weights or a folder; RUN/checkpoint.pt: from all networks",
    )
    add = parser.add_argument_group("run").add_argument
    add("--name", help="name of the run (default: <dataset_name>_<system>)")
    add(
        "--resume",
        action="store_true",
        help="go on with the run of this name exactly where its checkpoint stands; options not given are the run's own",
    )
    add("--overwrite", action="store_true", help="delete the run of this name and start anew")
    add(
        "--checkpoint_interval", type=int, default=1, help="epochs between checkpoints; 0: by time and at the end alone"
    )
    add("--checkpoint_minutes", type=float, default=15, help="minutes between checkpoints amid an epoch; 0: none")
    add(
        "--sample_interval", type=int, default=1000, help="steps between picture sheets; 0: at the end of the run alone"
    )
    add(
        "--eval_interval",
        type=int,
        default=0,
        help="epochs between evaluations on a tenth of the training pictures, which is then held out of training: the "
        "generators of the least KID (mean of both directions) are kept in the run's folder best; 0: none",
    )
    add(
        "--extractor",
        default=INCEPTION,
        help=f"whose features that KID compares (as in evaluate.py: {EFFICIENTNET}, ...)",
    )
    add("--inception", help="file with the extractor's weights, instead of fetching them")
    add(
        "--keep_evaluated",
        action="store_true",
        help="keep the generators of every evaluation, for evaluate.py --oracle",
    )
    add("--log_interval", type=int, default=50, help="steps between lines of log.jsonl")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    add(
        "--precision",
        choices=("auto", "float32", "bf16"),
        default="auto",
        help="auto: bf16 where the hardware multiplies it natively",
    )
    add("--compile", action="store_true", help="compile the networks first (torch.compile), for long runs")
    parser.set_defaults(**TRAINING_PRESETS.get(system, {}))
    return parser


def parse_options(
    argv: Sequence[str] | None = None, extend: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """Options from the command line; with --resume, those not given are the run's own.

    ``extend`` adds a launcher's flags. All values are plain (numbers, strings, booleans, None). Raises
    InputError for values that do not fit together; argparse itself exits on what it cannot read.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--system", default=DEFAULT_SYSTEM)
    first.add_argument("--dataset_name", default=DEFAULT_DATASET)
    first.add_argument("--name")
    first.add_argument("--resume", action="store_true")
    first.add_argument("-h", "--help", action="store_true")
    known = first.parse_known_args(argv)[0]
    if known.name is None:
        utils.check_name("--dataset_name", known.dataset_name)
    name = f"{known.dataset_name}_{known.system}" if known.name is None else known.name
    utils.check_name("--name", name)
    own = utils.Checkpoints(SAVED_MODELS / name).load(quiet=True)["options"] if known.resume and not known.help else {}

    system = own.get("system", known.system)
    parser = make_parser(system if system in SYSTEMS else DEFAULT_SYSTEM)  # else argparse refuses --system itself
    extend(parser)
    defaults = vars(parser.parse_args([]))
    unset = object()
    namespace, unknown = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset)))
    if unknown:
        parser.error(f"{' '.join(unknown)}: no option of {system}, see --help")
    given = {key: value for key, value in vars(namespace).items() if value is not unset}

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
            say(f"--{key} was {own[key]}, is now {given[key]}")
    if lost := lost_options(own, defaults):
        raise InputError(f"--resume: the run has {', '.join(lost)}, which this version does not know")
    options = argparse.Namespace(**{**defaults, **own, **given, "name": name})
    if options.decay_by == "never" and given.get("decay_epoch"):
        raise InputError("--decay_epoch: --decay_by never keeps the rate, expected epoch or step with it")
    if options.decay_epoch is None:
        options.decay_epoch = max(1, options.n_epochs // 2)
    check_options(options, at_least_epochs=own.get("n_epochs", 1))
    return options


def lost_options(own: Mapping[str, Any], known: Container[str]) -> list[str]:
    """What a run of another version has in use, with its value, that is not among the options ``known`` here."""
    return [f"--{key} {value}" for key, value in sorted(own.items()) if value and key not in known]


def check_options(options: argparse.Namespace, at_least_epochs: int = 1) -> None:
    """Raise InputError for values that cannot be meant, alone or together."""
    least = {
        "n_epochs": at_least_epochs,
        "decay_epoch": 1,
        "batch_size": 1,
        "img_height": 1,
        "img_width": 1,
        "log_interval": 1,
        "seed": 0,
        "n_cpu": 0,
        "cache_gb": 0,
        "sample_interval": 0,
        "eval_interval": 0,
        "checkpoint_interval": 0,
        "checkpoint_minutes": 0,
        "pool_size": 0,
        "curriculum_epochs": 0,
        "nz": 1,
        "ngf": 1,
        "ndf": 1,
        "n_masks": 2,
        "n_residual_blocks": 0,
        "n_layers_D": 1,
        "unet_depth": 0,
    }
    finite = ["lr", "weight_decay", *(key for key in vars(options) if key.startswith("lambda_"))]
    for key, bound in {**least, **dict.fromkeys(finite, 0)}.items():
        value = getattr(options, key, bound)
        if not value >= bound:  # nan is not
            raise InputError(f"--{key} {value}: expected at least {bound}")
        if key in finite and value == math.inf:
            raise InputError(f"--{key} {value}: expected a finite number")
    if options.seed > MOST_SEED:
        raise InputError(f"--seed {options.seed}: expected at most {MOST_SEED}")
    for key in ("b1", "b2"):
        if not 0 <= getattr(options, key) < 1:
            raise InputError(f"--{key} {getattr(options, key)}: expected 0 or more, below 1")
    if options.decay_epoch > options.n_epochs:
        raise InputError(
            f"--decay_epoch {options.decay_epoch} lies beyond --n_epochs {options.n_epochs}; "
            "equal to it, the learning rate stays constant"
        )
    check_extractor(options.extractor, options.inception)
    given = {"keep_evaluated": options.keep_evaluated, "inception": options.inception}
    given["extractor"] = options.extractor != INCEPTION
    for flag in (flag for flag, value in given.items() if value and not options.eval_interval):
        raise InputError(f"--{flag} is for evaluations while training, expected --eval_interval with it")
    if options.eval_interval and options.extractor == "none":
        raise InputError("--extractor none: --eval_interval compares features, expected an extractor")
    if options.channels not in MODES:
        raise InputError(f"--channels {options.channels}: expected one of {list(MODES)}")
    if options.task == "colorization" and options.channels != 3:
        raise InputError(f"--task colorization makes colours: --channels {options.channels}, expected 3")
    if getattr(options, "attention_kernel", 1) not in (1, 7):
        raise InputError(f"--attention_kernel {options.attention_kernel}: expected 1 (official code) or 7 (paper)")
    with torch.device("meta"):
        system = build_system(options)
    for key in ("img_height", "img_width"):
        size = getattr(options, key)
        if size % system.size_multiple or size < system.min_size:
            raise InputError(
                f"--{key} {size}: expected a multiple of {system.size_multiple}, at least {system.min_size}"
            )


# ----------------------------------------------------------------------------------------------------------
#  Building
# ----------------------------------------------------------------------------------------------------------


def build_system(options: argparse.Namespace) -> System:
    """The system that the options describe; the replay buffers of every rank draw from a stream of their own."""
    given = {**vars(options), "seed": (options.seed, utils.rank())}
    build = SYSTEMS[options.system]
    return build(**{key: given[key] for key in inspect.signature(build).parameters})


def set_up(
    options: argparse.Namespace, device: torch.device
) -> tuple[System, dict[str, torch.optim.Optimizer], Callable[[], Any]]:
    """All that ``play`` wants: the system on its device, each player's optimizer, and a maker of autocast contexts."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    system = build_system(options).to(device).to(memory_format=utils.pick_layout(device))
    if options.compile:
        torch._dynamo.config.recompile_limit = 16  # U-GAT-IT's discriminators can need more than 8
        for network in (system.get_submodule(name) for turn in system.turns for name in turn.networks):
            network.compile(dynamic=False)  # in place: the names of the weights stay
    if utils.rank():  # dropout on every rank of its own
        torch.manual_seed(options.seed + 1_000_003 * utils.rank())
    optimizers: dict[str, torch.optim.Optimizer] = {
        turn.player: torch.optim.Adam(
            trained_parameters(system, turn.networks),
            options.lr,
            (options.b1, options.b2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        for turn in system.turns
    }
    return system, optimizers, utils.make_autocast(device, options.precision)


def build_dataset(options: argparse.Namespace) -> PictureDataset:
    with torch.device("meta"):
        make = KINDS[build_system(options).data]
    given = {
        **vars(options),
        "root": Path(options.data_dir) / options.dataset_name,
        "size": (options.img_height, options.img_width),
        "how": options.resize,
        "hold_out": options.eval_interval > 0,
    }
    return make(**{key: given[key] for key in inspect.signature(make).parameters})


def trained_parameters(system: System, networks: Sequence[str]) -> list[Tensor]:
    return [p for name in networks for p in system.get_submodule(name).parameters()]


def load_generators(system: System, where: str) -> None:
    """Give the generators the weights found at ``where``, a run, a name, a folder or a file that holds all of them.

    Raises InputError where they do not fit.
    """
    opened = open_generators(where, noise=utils.NOISE in system.generators)
    for direction, name in system.generators.items():
        if direction not in opened:
            raise InputError(
                f"--init_from {where} translates {', '.join(opened)} alone, expected a run or folder with a generator "
                f"for {direction}"
            )
        source, _ = opened[direction]
        network = system.get_submodule(name)
        if type(source) is not type(network) or source.settings != network.settings:
            raise InputError(
                f"--init_from {where} holds {type(source).__name__} {source.settings} for {direction}, "
                f"expected {type(network).__name__} {network.settings}"
            )
        network.load_state_dict(source.state_dict())
        say(f"{name} starts from {where}")


def load_networks(system: System, where: str) -> None:
    """Give all networks, discriminators too, the weights in the checkpoint ``where`` of a run. Raises InputError."""
    path = next((place for place in utils.places(where) if place.is_file()), None)
    if path is None:
        raise InputError(f"--init_from {where}: no such checkpoint")
    found = utils.Checkpoints(path.parent).load()["networks"]
    expected = {name: system.get_submodule(name).state_dict() for turn in system.turns for name in turn.networks}
    for name, weights in expected.items():
        shapes, own = ({k: tuple(v.shape) for k, v in part.items()} for part in (found.get(name, {}), weights))
        for key in {**own, **shapes}:
            held, wanted = (part.get(key, "nothing") for part in (shapes, own))
            if held != wanted:
                raise InputError(f"--init_from {where} has {held} for {name}.{key}, expected {wanted}")
        system.get_submodule(name).load_state_dict(found[name])
    say(f"{', '.join(expected)} start from {path}")
    if found.keys() - expected.keys():
        say(
            f"{', '.join(sorted(found.keys() - expected.keys()))} of that checkpoint are left out: this system has none"
        )


def prepare(options: argparse.Namespace) -> None:
    """All that one process does before any training: draw the built-in set, check the pictures and the run's name.

    Raises InputError.
    """
    root = Path(options.data_dir) / options.dataset_name
    if options.dataset_name == BUILT_IN:
        draw_built_in(root)
    build_dataset(options).check()
    if not (options.resume or options.overwrite):
        check_standing(options)


def check_standing(options: argparse.Namespace) -> None:
    """Raise InputError where a run of this name stands."""
    for folder in folders(options):
        kept = [p for p in sorted(folder.rglob("*")) if not p.is_dir() and not TRACES.fullmatch(p.name)]
        if kept:
            go_on = "go on with it (--resume), " if any(p.match("checkpoint*.pt") for p in kept) else ""
            raise InputError(
                f"a run named {options.name} stands already ({kept[0]}); {go_on}"
                "name this one otherwise (--name), or replace that one (--overwrite)"
            )


def folders(options: argparse.Namespace) -> tuple[Path, Path]:
    """What belongs to a run's name."""
    return SAVED_MODELS / options.name, utils.IMAGES / options.name


def clear_name(options: argparse.Namespace) -> None:
    """Empty the folders of a run that starts anew: last of all, when nothing is refused any more.

    The folders themselves stay: they may be links to a larger disk, and this process holds one (``utils.hold``). It may
    have waited for it, and whoever had it may have saved meanwhile: InputError then.
    """
    utils.barrier()
    if utils.rank() == 0:
        if not options.overwrite:
            check_standing(options)
        for path in (path for folder in folders(options) if folder.is_dir() for path in folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    utils.barrier()


# ----------------------------------------------------------------------------------------------------------
#  The state of a run
# ----------------------------------------------------------------------------------------------------------


class Run:
    """What a run's checkpoint holds: networks, optimizers, position, and each rank's own (pools, random states)."""

    def __init__(
        self,
        options: argparse.Namespace,
        system: System,
        optimizers: dict[str, torch.optim.Optimizer],
        steps_per_epoch: int,
        pictures: str,
        device: torch.device,
    ):
        self.options, self.system, self.optimizers, self.device = options, system, optimizers, device
        self.steps_per_epoch, self.pictures = steps_per_epoch, pictures
        self.networks = [name for name, child in system.named_children() if any(True for _ in child.parameters())]
        self.checkpoints = utils.Checkpoints(SAVED_MODELS / options.name)
        self.saved_at = time.monotonic()
        self.best = float("inf")  # of the evaluations so far

    def save_generators(self, folder: Path, step: int) -> None:
        """Write the generators' small files, each with what it needs to be used rightly."""
        folder.mkdir(parents=True, exist_ok=True)
        for direction, name in self.system.generators.items():
            packed = pack_generator(self.system.get_submodule(name))
            options = {key: value for key, value in self.own_options().items() if key not in MACHINE}
            about = {"direction": direction, "options": options, "step": step}
            utils.save_atomically({**packed, **about}, folder / f"{direction}.pt")

    def own_options(self) -> dict[str, Any]:
        """The options that make the run what it is: none of a launcher's, nor how it was started."""
        keys = vars(make_parser(self.options.system).parse_args([])).keys() - set(HOW_TO_START)
        return {key: getattr(self.options, key) for key in sorted(keys)}

    def save(self, record: utils.Record) -> None:
        """Write the checkpoint and the generators' small files. Every rank calls this; rank 0 writes."""
        own: dict[str, Any] = {
            "children": {n: m.state_dict() for n, m in self.system.named_children() if n not in self.networks},
            "record": record.state_dict(),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            own["random_cuda"] = torch.cuda.get_rng_state(self.device)
        ranks = utils.gather(own)
        self.saved_at = time.monotonic()
        if ranks is None:
            return
        # First: a run whose checkpoint says that it is done has all its generators.
        self.save_generators(SAVED_MODELS / self.options.name, record.step)
        self.checkpoints.save(
            {
                "options": self.own_options(),
                "step": record.step,
                "steps_per_epoch": self.steps_per_epoch,
                "pictures": self.pictures,
                "best": self.best,
                "networks": {name: self.system.get_submodule(name).state_dict() for name in self.networks},
                "optimizers": {player: optimizer.state_dict() for player, optimizer in self.optimizers.items()},
                "ranks": ranks,
            }
        )

    def load(self) -> dict[str, Any]:
        """Restore everything but the record; returns the checkpoint. Raises InputError where it does not fit."""
        state = self.checkpoints.load()
        for what, found in (("processes", utils.world_size()), ("steps per epoch", self.steps_per_epoch)):
            expected = len(state["ranks"]) if what == "processes" else state["steps_per_epoch"]
            if found != expected:
                raise InputError(f"--resume: the run had {expected} {what}, this one has {found}")
        if state["pictures"] != self.pictures:
            root = Path(self.options.data_dir) / self.options.dataset_name
            raise InputError(f"--resume: the pictures in {root} have other names than the run's, expected the same")
        for name, weights in state["networks"].items():
            self.system.get_submodule(name).load_state_dict(weights)
        for player, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][player])
            take_layout(optimizer)
        self.best = state.get("best", self.best)
        own = state["ranks"][utils.rank()]
        for name, child in own["children"].items():
            self.system.get_submodule(name).load_state_dict(child)
        torch.set_rng_state(own["random"])
        if "random_cuda" in own and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["random_cuda"], self.device)
        return state

    def due(self) -> bool:
        """Whether it is time for a checkpoint amid an epoch, by rank 0's clock."""
        minutes = self.options.checkpoint_minutes
        return utils.rank() == 0 and minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes


class Validation:
    """How near the translations of held-out training pictures come to held-out pictures of the other side.

    Test pictures take no part, so generators may be chosen by it. Raises InputError when the extractor cannot be had.
    """

    @utils.whole_float32()
    def __init__(self, options: argparse.Namespace, dataset: PictureDataset, device: torch.device):
        self.device = device
        with torch.random.fork_rng(devices=[]):  # building a network draws weights; the run must not notice
            self.extractor = Extractor(options.extractor, options.inception and Path(options.inception), device)
        self.images = {
            side: torch.stack([unaugmented(p, dataset.size, dataset.channels, dataset.how) for p in pictures])
            for side, pictures in dataset.held_out.items()
        }
        self.features = {side: self.extractor(images).vectors for side, images in self.images.items()}

    @utils.whole_float32()
    @torch.no_grad()
    def __call__(self, system: System) -> dict[str, float]:
        """The KID of every direction, in float32."""
        figures = {}
        for direction, name in system.generators.items():
            reals = (normalise(batch.to(self.device)) for batch in self.images[direction[0]].split(8))
            with in_use(system.get_submodule(name)) as generator:
                fakes = torch.cat([quantise(generator(real).image).cpu() for real in reals])
            distance = kernel_distance(self.extractor(fakes).vectors, self.features[direction[-1]])
            figures[f"KID{self.extractor.suffix}_{direction}"] = distance
        return figures


def validate(validation: Validation, run: Run, record: utils.Record, epoch: int) -> None:
    """Evaluate, log, and keep the generators if they are the best so far. For rank 0 alone."""
    start = time.perf_counter()
    figures = validation(run.system)
    mean = sum(figures.values()) / len(figures)
    folder = SAVED_MODELS / run.options.name
    if mean < run.best:
        run.best = mean
        run.save_generators(folder / "best", record.step)
    if run.options.keep_evaluated:
        run.save_generators(folder / "kept" / f"{record.step:08d}", record.step)
    record.note_validation(figures, epoch, time.perf_counter() - start)


def take_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory layout of their parameters, which differs between CUDA and the CPU.

    ``load_state_dict`` keeps the file's, and fused Adam would pair the wrong elements.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


# ----------------------------------------------------------------------------------------------------------
#  Training
# ----------------------------------------------------------------------------------------------------------


def play(
    system: System, optimizers: dict[str, torch.optim.Optimizer], autocast: Callable[[], Any], batch: Batch
) -> dict[str, Tensor]:
    """One step of the game: the generators run once, then each player makes its move. Returns what to log."""
    with autocast():
        fakes = system(batch)
    shown: dict[str, Tensor] = {}
    for turn in system.turns:
        with autocast():
            losses = turn.losses(batch, fakes)
        update(optimizers[turn.player], losses)
        shown |= losses
    system.settle()
    return shown | system.measures(batch, fakes)


def update(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
    """Change this player's networks alone: no gradient is worked out for the others'."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward(inputs=parameters)
    optimizer.step()


def learning_rate(options: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """The rate of a step, counted from 0: constant for ``decay_epoch`` epochs, then linear towards zero.

    It falls with each epoch, by the rule of the official AttentionGAN code, or (``decay_by`` "step") with each step; it
    would reach zero in the one after the last. With ``decay_by`` "never" it stays.
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
) -> int:
    """Train to the end, or until a signal, and save. ``prepare`` comes before.

    ``distribute`` returns the system with its networks wrapped for many processes; ``device_name`` is this
    process's device where it is not the options'; ``listening`` has noted signals since before. Returns 0, or the
    number of the signal that ended the run early. Raises InputError.
    """
    device = utils.pick_device(device_name or options.device)
    system, optimizers, autocast = set_up(options, device)
    if options.init_from and not options.resume:
        load = load_networks if Path(options.init_from).name == "checkpoint.pt" else load_generators
        load(system, options.init_from)

    dataset = build_dataset(options)
    validation = Validation(options, dataset, device) if options.eval_interval and utils.rank() == 0 else None
    sampler = EpochSampler(len(dataset), options.seed, utils.rank(), utils.world_size())
    n_cpu = 0 if dataset.load(options.cache_gb * 1e9) else options.n_cpu  # what is decoded needs no processes
    loader = make_loader(dataset, sampler, options.batch_size, n_cpu, pin_memory=device.type == "cuda")
    if len(loader) == 0:
        raise InputError(
            f"{len(dataset)} samples in {options.data_dir}/{options.dataset_name} do not fill one batch of "
            f"{options.batch_size} on each of {utils.world_size()} process(es); lower --batch_size"
        )
    samples = next(utils.to_device([dataset.fixed_batch(4)], device, normalise))

    run = Run(options, system, optimizers, len(loader), dataset.digest(), device)
    state = run.load() if options.resume else {"step": 0}
    total = options.n_epochs * len(loader)
    if not options.resume:
        clear_name(options)
    record = utils.Record(options.name, vars(options), total, options.log_interval, state["step"])
    if options.resume:
        record.load_state_dict(state["ranks"][utils.rank()]["record"], device)
    first, done = divmod(state["step"], len(loader))
    effective = options.batch_size * utils.world_size()
    say(
        f"{'resuming' if options.resume else 'training'} {options.name}: {options.system} on {options.dataset_name}, "
        f"{options.img_height} x {options.img_width}, step {state['step']} of {total}, batch {options.batch_size} x "
        f"{utils.world_size()} process(es) = {effective}, {device.type}, "
        f"{'bf16' if autocast.keywords['enabled'] else 'float32'}"
    )

    players = distribute(system)
    # What is looked at has batches of its own, and may have another mode: compiling for it would halt a run midway.
    aside = partial(torch.compiler.set_stance, "force_eager") if options.compile else nullcontext
    start = time.perf_counter()
    with nullcontext(listening) if listening else utils.StopSignals() as stop, closing(record):
        for epoch in range(first, options.n_epochs):
            sampler.epoch, sampler.start = epoch, done * options.batch_size
            for batch in utils.to_device(loader, device, normalise):
                lr = learning_rate(options, record.step, len(loader))
                for group in (g for optimizer in optimizers.values() for g in optimizer.param_groups):
                    group["lr"] = lr
                players.begin(epoch)
                images = sum(len(value) for value in batch.values() if value.ndim == 4)  # noise is none
                record.note(play(players, optimizers, autocast, batch), images, epoch, lr)
                if options.compile and record.step == state["step"] + 1:
                    say(f"compiled, and took the first step, in {time.perf_counter() - start:.0f} s")
                if utils.rank() == 0 and time_for(record.step, options.sample_interval, total):
                    with aside(), autocast():
                        record.sheet(system.sheet(samples))
                if validation is not None and time_for(record.step, options.eval_interval * len(loader), total):
                    with aside():
                        validate(validation, run, record, epoch)
                stopped, save = utils.any_rank([stop.signal is not None, run.due()])
                if stopped or save:
                    run.save(record)
                if stopped:
                    break
            if stopped:
                break
            done = 0
            if time_for(epoch + 1, options.checkpoint_interval, options.n_epochs):
                run.save(record)
        record.page(final=True)
        utils.barrier()  # no rank leaves before rank 0 has saved
    if record.step == total:
        say(f"done: see {record.folder}/index.html; weights in {SAVED_MODELS / options.name}")
        return 0
    say(f"stopped after step {record.step} of {total}, saved; the same command with --resume goes on")
    return stop.signal or signal.SIGTERM


def time_for(count: int, interval: int, last: int) -> bool:
    """Every ``interval`` (never for 0), and at the last."""
    return count == last or (interval > 0 and count % interval == 0)


@contextmanager
def clear_errors(options: argparse.Namespace) -> Iterator[None]:
    """Turn running out of memory into an InputError that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not utils.is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory with --batch_size {options.batch_size}, --img_height {options.img_height} and "
            f"--img_width {options.img_width}: lower these, or --ngf; saved checkpoints stand"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = parse_options(argv)
        prepare(options)
        with clear_errors(options), utils.hold(SAVED_MODELS / options.name):
            return utils.exit_status(train(options))

    return utils.run_script("train.py", work)


if __name__ == "__main__":
    sys.exit(main())
