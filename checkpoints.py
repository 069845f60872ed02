"""Everything that is written and read as weights: runs, generator files, shipped weights, official formats.

A run lives in ``saved_models/<name>/``:

    checkpoint.pt             all that is needed to go on exactly
    checkpoint_previous.pt    the one before it, in case the newest is damaged
    checkpoint_fresh.pt       a complete newer one, where a save was killed before its end
    AtoB.pt, BtoA.pt          the generators, each with what is needed to use it (generator.pt draws from noise)
    discriminators.pt         only of shipped weights: the other networks, to go on training
    best/, kept/<step>/       the same files: best by validation, and of every evaluation

Only this module knows these names and what the files hold. Weights that ship with the project have the layout of a run
and lie in ``saved_models/pretrained/<name>/`` beside the code. Files are read without running code that they may hold.
"""

from __future__ import annotations

import utils
from utils import InputError, Option, first_line, print0

import copy
import inspect
import math
import os
import pickle
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import TASKS, PictureDataset
from models import (
    NOISE,
    AttentionGenerator,
    DCGANGenerator,
    Generator,
    ResNetGenerator,
    SingleMaskGenerator,
    UGATITGenerator,
    UNetGenerator,
)
from pictures import RESIZE

SAVED_MODELS = Path("saved_models")  # runs, below the working directory
PRETRAINED = Path(__file__).resolve().parent / SAVED_MODELS / "pretrained"
BEST, KEPT = "best", "kept"
DIRECTIONS = ("AtoB", "BtoA")
CHECKPOINT, DISCRIMINATORS = "checkpoint.pt", "discriminators.pt"
# The names that a generator's file may have in a folder: ours, and the official one.
FILES = {"AtoB": ("AtoB.pt", "latest_net_G_A.pth"), "BtoA": ("BtoA.pt", "latest_net_G_B.pth"), NOISE: (f"{NOISE}.pt",)}
MADE_BY = {  # kinds of generators, and the system that makes each
    AttentionGenerator: "attentiongan",
    SingleMaskGenerator: "attentiongan1",
    ResNetGenerator: "cyclegan",
    UNetGenerator: "pix2pix",
    UGATITGenerator: "ugatit",
    DCGANGenerator: "dcgan",
}
GENERATORS: dict[str, type[Generator]] = {kind.__name__: kind for kind in MADE_BY}

# ----------------------------------------------------------------------------------------------------------
#  Names: what a user may write where a checkpoint is asked for
# ----------------------------------------------------------------------------------------------------------


def candidate_paths(where: str | Path) -> list[Path]:
    """Where a checkpoint may lie: the path itself, a run, shipped weights."""
    return [Path(where), SAVED_MODELS / where, *shipped_paths(where)]


def shipped_paths(where: str | Path) -> list[Path]:
    """Where shipped weights of this name may lie. They can also be written ``pretrained/<name>``."""
    name = Path(where).name if Path(where).parts[:-1] == ("pretrained",) else where
    return [SAVED_MODELS / "pretrained" / name, PRETRAINED / name]


def find_generator(where: str | Path, direction: str | None) -> Path:
    """The generator file for a direction; for None any file, "AtoB" before "BtoA".

    ``where`` is a file, a folder, the name of a run or of shipped weights. A folder holds ``AtoB.pt`` and ``BtoA.pt``,
    or the official ``latest_net_G_A.pth`` and ``latest_net_G_B.pth``, or ``generator.pt`` for ``NOISE``, which is
    returned for other directions too: ``open_generator`` then says what it is. Raises InputError where nothing fits,
    and where a run and shipped weights have the same name.
    """
    wanted = DIRECTIONS if direction is None else (direction,)
    names = [name for each in wanted for name in FILES[each]]
    for place in candidate_paths(where):
        if place.is_file():
            if direction in DIRECTIONS and place.name in {FILES[d][1] for d in DIRECTIONS} - set(names):
                raise InputError(f"{place}: translates the other way, expected a file or folder for {direction}")
            return place
        if found := find_file(place, *wanted, NOISE):
            is_run = len(Path(where).parts) == 1 and place == SAVED_MODELS / where
            if is_run and any(find_file(shipped, *wanted, NOISE) for shipped in shipped_paths(where)):
                raise InputError(
                    f"{where} is a run and the name of shipped weights: "
                    f"expected {SAVED_MODELS / where} or pretrained/{where}"
                )
            return found
    what = "noise" if direction == NOISE else " or ".join(wanted)
    places = {place.resolve(): place for place in reversed(candidate_paths(where))}  # without a place's second name
    looked = ", ".join(map(str, reversed(places.values())))
    raise InputError(
        f"{where}: no generator for {what} found. Looked for a file, or {' or '.join(names)} in {looked}. "
        f"There are: {', '.join(known_names(*wanted)) or 'none'}"
    )


def find_file(folder: Path, *directions: str) -> Path | None:
    """The first generator file of these directions in a folder, None where it has none."""
    return next((folder / n for d in directions for n in FILES[d] if (folder / n).is_file()), None)


def known_names(*directions: str) -> list[str]:
    """Runs below the working directory, and shipped weights, that have a generator for one of these directions."""
    places = SAVED_MODELS, SAVED_MODELS / "pretrained", PRETRAINED
    runs, *shipped = ({p.name for p in place.glob("*/") if find_file(p, *directions)} for place in places)
    return sorted(runs) + [f"pretrained/{name}" for name in sorted(set().union(*shipped))]


def is_file(where: str | Path) -> bool:
    """Whether ``where`` is a single file, not a folder or a name."""
    return any(place.is_file() for place in candidate_paths(where))


def is_shipped(where: str | Path) -> bool:
    """Whether ``where`` stands for weights that ship with the project."""
    found = find_generator(where, None).resolve()
    return any(found.is_relative_to(p.resolve()) for p in (SAVED_MODELS / "pretrained", PRETRAINED))


# ----------------------------------------------------------------------------------------------------------
#  Writing
# ----------------------------------------------------------------------------------------------------------


def save_atomic(state: Any, path: Path) -> None:
    """torch.save, flushed to the disk, then renamed: ``path`` is old or new, never half. Raises OSError."""
    with utils.replacing(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def pack_generator(generator: Generator) -> dict[str, Any]:
    """Weights, and the plain values that build the network again, for ``load_generator``."""
    return {
        "generator": type(generator).__name__,
        "settings": dict(generator.settings),
        "weights": generator.state_dict(),
    }


def save_generator(generator: Generator, about: Mapping[str, Any], folder: Path) -> Path:
    """Write a generator file; ``about`` has at least its "direction". Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[about["direction"]][0]
    save_atomic({**pack_generator(generator), **about}, path)
    return path


def save_discriminators(run: Path, folder: Path) -> Path | None:
    """Write the networks that are no generators, of the run in ``run``, in half precision, for ``init_from``.

    Returns the path; None where there is no checkpoint.
    """
    files = CheckpointFiles(run)
    if not files.exist():
        return None
    networks = files.load(resume=False)["networks"]
    halves = {
        name: {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        for name, weights in networks.items()
        if not name.startswith("G")
    }
    save_atomic({"networks": halves}, folder / DISCRIMINATORS)
    return folder / DISCRIMINATORS


# ----------------------------------------------------------------------------------------------------------
#  The state of a run
# ----------------------------------------------------------------------------------------------------------


class CheckpointFiles:
    """The checkpoints of one run on disk."""

    FORMAT = 2

    def __init__(self, folder: Path):
        self.folder = folder
        self.newest = folder / CHECKPOINT
        self.previous = folder / "checkpoint_previous.pt"
        self.fresh = folder / "checkpoint_fresh.pt"
        self.damaged: set[Path] = set()
        self.loaded: Path | None = None  # what ``load`` returned the state of

    def exist(self) -> bool:
        return any(path.exists() for path in (self.fresh, self.newest, self.previous))

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state; ``rotate`` makes it the newest. A killed save is still found by ``load``."""
        save_atomic({"format": self.FORMAT, **state}, self.fresh)

    def rotate(self) -> None:
        """Give the state that ``save`` has written the name of the newest one."""
        if self.newest.exists() and self.newest not in self.damaged:
            os.replace(self.newest, self.previous)
        os.replace(self.fresh, self.newest)
        self.damaged.clear()

    def load(self, quiet: bool = False, resume: bool = True) -> dict[str, Any]:
        """The newest sound state, tensors mapped from the file; warns of damaged ones that are newer.

        ``quiet``: no warning, and the sums of the tensors are not checked, which takes as long as reading them. Without
        ``resume`` the state may lack what only resuming needs: optimizers and ranks. Raises InputError when there is
        none, or one of another format.
        """
        troubles = []
        for path in (self.fresh, self.newest, self.previous):
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                found = state["format"]
                check_sums(path, only_plain=quiet)
            except Exception as error:  # a damaged file makes the unpickler raise anything
                self.damaged.add(path)
                troubles.append(f"{path}: damaged ({first_line(error)})")
                continue
            if found != self.FORMAT:
                raise InputError(f"{path}: checkpoint format {found!s:.40}, this code reads format {self.FORMAT}")
            check_state(path, state, resume)
            for trouble in () if quiet else troubles:
                print0(f"warning: {trouble}; going back to {path}, step {state['step']}")
            self.loaded = path
            return state
        raise InputError("; ".join(troubles) or f"{self.newest}: no such checkpoint, nothing to resume")


def check_sums(path: Path, only_plain: bool = False) -> None:
    """Raise OSError or BadZipFile where a file of ``torch.save`` has changed since, which torch itself does not check.

    ``only_plain``: look only at its plain values, not at its tensors. A compressed file is refused, because it could
    take any amount of memory.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise OSError("is compressed, expected a file of torch.save")
            if entry.filename.endswith("/data.pkl") or not only_plain:
                with archive.open(entry) as file:
                    while file.read(2**20):  # raises BadZipFile at the end where the sum is another
                        pass


def check_state(path: Path, state: Mapping[str, Any], resume: bool = True) -> None:
    """Raise InputError, naming file and field, where a checkpoint does not have the plain values of a run.

    Without ``resume`` only its networks matter.
    """
    expected: dict[str, type] = {"networks": dict}
    if resume:
        expected |= {"options": dict, "step": int, "steps_per_epoch": int, "picture_names": list}
        expected |= {"optimizers": dict, "ranks": list}
    for key, kind in expected.items():
        if type(state.get(key)) is not kind:
            raise InputError(f"{path}: {key}: expected {kind.__name__}, found {describe(state.get(key))}")
    if not resume:
        return
    options, step = state["options"], state["step"]
    if state["steps_per_epoch"] < 1 or not state["ranks"]:
        raise InputError(f"{path}: steps_per_epoch or ranks: expected a run that has begun")
    n_epochs = options.get("n_epochs")
    if type(n_epochs) is not int or not 0 <= step <= n_epochs * state["steps_per_epoch"]:
        raise InputError(f"{path}: step or options.n_epochs: {step} does not lie within {describe(n_epochs)} epochs")
    if not isinstance(state.get("best", 0.0), float | int):
        raise InputError(f"{path}: best: expected a number, found {describe(state['best'])}")
    if not all(isinstance(name, str) for name in state["picture_names"]):
        raise InputError(f"{path}: picture_names: expected a list of names")
    for key in ("system", "dataset_name", "data_dir"):
        if not isinstance(options.get(key), str):
            raise InputError(f"{path}: options.{key}: expected a name, found {describe(options.get(key))}")
    if not all(isinstance(key, str) and is_plain(value) for key, value in options.items()):
        raise InputError(f"{path}: options: expected numbers, strings and booleans by their names")
    for i, own in enumerate(state["ranks"]):
        parts = {"children": dict, "record": dict, "random": Tensor}
        if not isinstance(own, dict) or any(not isinstance(own.get(k), kind) for k, kind in parts.items()):
            raise InputError(f"{path}: ranks[{i}]: expected {', '.join(parts)}")


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float)


def describe(value: Any) -> str:
    """A short description of a wrong value, however large it is."""
    return f"{value!r:.40}" if is_plain(value) else type(value).__name__


def find_run(name: str) -> dict[str, Any] | None:
    """A run's options, the names of its pictures, its processes, and whether it is finished: has taken all steps and
    written its generators, which come last in a save. None where it has no checkpoint.

    Raises InputError for one that cannot be read.
    """
    files = CheckpointFiles(SAVED_MODELS / name)
    if not files.exist():
        return None
    state = files.load(quiet=True)
    last = state["options"]["n_epochs"] * state["steps_per_epoch"]
    finished = state["step"] == last and files.loaded != files.fresh
    found = {key: state[key] for key in ("options", "picture_names")}
    return {**found, "processes": len(state["ranks"]), "finished": finished}


class RunState:
    """What a run's checkpoint holds: networks, optimizers, position, and of each rank its pools and random states.

    Takes the run's folder, its ``options`` (plain values), and the names of those that generator files leave out.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Any],
        leave_out: Iterable[str],
        system: Any,
        optimizers: Mapping[str, torch.optim.Optimizer],
        steps_per_epoch: int,
        dataset: PictureDataset,
        device: torch.device,
    ):
        self.folder, self.options, self.leave_out = folder, dict(options), set(leave_out)
        self.system, self.optimizers, self.device = system, optimizers, device
        self.steps_per_epoch, self.halves, self.picture_names = steps_per_epoch, dataset.halves, dataset.names()
        self.networks = system.trained()
        self.files = CheckpointFiles(folder)
        self.saved_at = time.monotonic()
        self.best = float("inf")  # the smallest mean of an evaluation so far

    def save_generators(self, step: int, place: str = "") -> None:
        """Write the generators' files to the run's folder, or to ``place`` in it."""
        options = {key: value for key, value in self.options.items() if key not in self.leave_out}
        for direction in self.system.generators:
            about = {"direction": direction, "options": options, "step": step, "halves": self.halves}
            save_generator(self.system.generator(direction), about, self.folder / place)

    def save(self, step: int, record: Mapping[str, Any]) -> None:
        """Write checkpoint and generators. Every rank calls this with its own ``record``; rank 0 writes.

        Raises InputError, on every rank and before anything is written, where weights are not finite.
        """
        weights = [p for name in self.networks for p in self.system.get_submodule(name).parameters()]
        if utils.any_rank([not all(bool(p.isfinite().all()) for p in weights)])[0]:
            raise InputError(
                f"the run has diverged: weights are not finite after step {step}. Checkpoints from before are kept; "
                "docs/training.md, 'When a run diverges', says how to go on"
            )
        own: dict[str, Any] = {
            "children": {n: m.state_dict() for n, m in self.system.named_children() if n not in self.networks},
            "record": record,
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            own["random_cuda"] = torch.cuda.get_rng_state(self.device)
        ranks = utils.gather(own)
        self.saved_at = time.monotonic()
        if ranks is None:
            return
        self.files.save(
            {
                "options": self.options,
                "step": step,
                "steps_per_epoch": self.steps_per_epoch,
                "picture_names": self.picture_names,
                "best": self.best,
                "networks": {name: self.system.get_submodule(name).state_dict() for name in self.networks},
                "optimizers": {player: optimizer.state_dict() for player, optimizer in self.optimizers.items()},
                "ranks": ranks,
            }
        )
        # Generators come before the checkpoint gets its name: a run that is done by its checkpoint has its generators.
        self.save_generators(step)
        self.files.rotate()

    def load(self) -> tuple[int, Mapping[str, Any]]:
        """Restore everything except the record. Returns the step and the ``record`` that this rank gave ``save``.

        Keeps nothing of the file, which Windows could not replace then. Raises InputError where it does not fit.
        """
        state = self.files.load()
        if state["picture_names"] != self.picture_names:
            root = Path(self.options["data_dir"]) / self.options["dataset_name"]
            before, now = set(state["picture_names"]), set(self.picture_names)
            lost, new = sorted(before - now), sorted(now - before)
            told = "; ".join(f"{what} {some(names)}" for what, names in (("missing:", lost), ("new:", new)) if names)
            raise InputError(f"--resume: {root} has other pictures than the run's, expected the same. {told}".rstrip())
        for what, found in (("processes", utils.world_size()), ("steps per epoch", self.steps_per_epoch)):
            expected = len(state["ranks"]) if what == "processes" else state["steps_per_epoch"]
            if found != expected:
                raise InputError(f"--resume: the run had {expected} {what}, this one has {found}")
        path = self.files.loaded
        check_networks(f"{path}", state["networks"], self.system, self.networks)
        for name in self.networks:
            self.system.get_submodule(name).load_state_dict(state["networks"][name])
        own = state["ranks"][utils.rank()]
        try:
            for player, optimizer in self.optimizers.items():
                load_moments(optimizer, state["optimizers"][player])
            for name, child in own["children"].items():
                self.system.get_submodule(name).load_state_dict(child)
            torch.set_rng_state(own["random"])
        except Exception as error:  # torch raises anything for parts of a wrong kind
            raise InputError(f"{path}: optimizers or ranks do not fit this run ({first_line(error)})") from error
        self.best = state.get("best", self.best)
        if "random_cuda" in own and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["random_cuda"], self.device)
        utils.barrier()  # all ranks have read it
        if utils.rank() == 0 and self.files.loaded == self.files.fresh:
            self.save_generators(state["step"])  # a killed save is finished here
            self.files.rotate()
        return state["step"], copy.deepcopy(own["record"])

    def is_due(self, minutes: float) -> bool:
        """Whether the last save was ``minutes`` ago, by rank 0's clock; never for 0."""
        return utils.rank() == 0 and minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes


def load_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Restore the state of Adam from its ``state_dict``; its settings are those of the run's options.

    A parameter that never had a gradient has no moments. Raises InputError for those that do not fit the parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = saved["state"]
    if not state.keys() <= set(range(len(parameters))):
        raise InputError(f"moments of weights {some(state)}, expected those of 0 to {len(parameters) - 1}")
    for i, own in state.items():
        check_names(f"state of weight {i}", own, {"step", "exp_avg", "exp_avg_sq"})
        for name, shape in (("step", ()), ("exp_avg", parameters[i].shape), ("exp_avg_sq", parameters[i].shape)):
            check_tensor(name, own[name])
            if own[name].shape != shape:
                raise InputError(f"{name} of shape {tuple(own[name].shape)}, expected {tuple(shape)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # The moments keep the memory layout of the file, which differs between CUDA and the CPU, and fused Adam would pair
    # the wrong elements.
    for parameter, own in optimizer.state.items():
        own |= {name: torch.empty_like(parameter).copy_(own[name]) for name in ("exp_avg", "exp_avg_sq")}
        own["step"] = own["step"].clone()  # else it is a part of the mapped file


# ----------------------------------------------------------------------------------------------------------
#  Starting from weights (--init_from)
# ----------------------------------------------------------------------------------------------------------


def init_from(system: Any, where: str) -> None:
    """Give a new run the weights at ``where``: all networks of a checkpoint; or the generators of a run, shipped
    weights, a folder or a file, and the discriminators where there are some beside them that fit.

    Raises InputError where the generators, or networks of a checkpoint, do not fit.
    """
    if Path(where).name == CHECKPOINT:
        path = next((place for place in candidate_paths(where) if CheckpointFiles(place.parent).exist()), None)
        if path is None:
            raise InputError(f"--init_from {where}: no such checkpoint")
        found, names = read_networks(path), system.trained()
        try:
            check_networks(f"--init_from {path}", found, system, names)
        except InputError as error:
            flags = ""
            with suppress(InputError):  # where the generators' files are gone
                source, about = next(iter(open_generators(path.parent, NOISE in system.generators).values()))
                flags = f"; these flags fit: {fitting_flags(source)}{discriminator_flags(about)}"
            raise InputError(f"{error}{flags}") from error
        init_networks(system, path, found, names)
        return
    about = init_generators(system, where)
    folder, names = find_generator(where, None).parent, sorted({*system.trained()} - {*system.generators.values()})
    path, why = None, ""
    if (folder / DISCRIMINATORS).exists():
        path = folder / DISCRIMINATORS
    elif CheckpointFiles(folder).exist():
        path = folder / CHECKPOINT
    if names and path is not None and not is_file(where):  # pix2pix by L1 alone has none
        found, fitting = read_networks(path), []
        for name in names:
            try:
                check_networks(f"--init_from {path}", found, system, [name])
                fitting.append(name)
            except InputError as error:
                why = why or f". Those beside the generators come from a run with{discriminator_flags(about)}; {error}"
        if fitting:
            init_networks(system, path, found, fitting)
        names = [name for name in names if name not in fitting]
    if names:
        print0(f"{', '.join(names)} start anew: docs/training.md, 'Start from weights', says what that means{why}")


def init_generators(system: Any, where: str) -> dict[str, Any]:
    """Returns what the generators' files say of themselves."""
    opened = open_generators(where, noise=NOISE in system.generators)
    for direction, name in system.generators.items():
        if direction not in opened:
            raise InputError(
                f"--init_from {where} translates only {', '.join(opened)}, expected a run or folder with a generator "
                f"for {direction}"
            )
        source, about = opened[direction]
        network = system.get_submodule(name)
        if type(source) is not type(network) or source.settings != network.settings:
            raise InputError(
                f"--init_from {where} holds another {type(source).__name__} for {direction} than this run's "
                f"{type(network).__name__}; these flags fit: {fitting_flags(source)}{discriminator_flags(about)}"
            )
        network.load_state_dict(source.state_dict())
        print0(f"{name} starts from {where}")
    return about


def discriminator_flags(about: Mapping[str, Any]) -> str:
    """The flags of the run's discriminators, each after a space, as far as a generator file says."""
    options = about.get("options", {})
    flags = ["ndf", "n_layers_D", "attn_disc"]
    flags += ["img_height", "img_width"] * bool(options.get("light"))  # U-GAT-IT's have as many layers as these allow
    flags += ["lambda_gan"] * (options.get("lambda_gan") == 0)  # pix2pix by L1 alone has none
    return "".join(f" --{flag} {options[flag]}" for flag in flags if flag in options)


def fitting_flags(generator: Generator) -> str:
    """The flags of train.py that make such a generator."""
    flags = {"system": MADE_BY[type(generator)], **generator.settings}
    if not flags.pop("background", True):
        flags["no_background"] = ""
    if "depth" in flags:
        flags["unet_depth"] = flags.pop("depth")
    size = flags.pop("size", ())
    if size is None:
        flags["light"] = ""
    elif size:
        flags["img_height"], flags["img_width"] = (size, size) if isinstance(size, int) else size
    return " ".join(f"--{name} {value}".strip() for name, value in flags.items())


def read_networks(path: Path) -> dict[str, Any]:
    """The networks of a checkpoint, or of the discriminators that ship, by name. Raises InputError."""
    whole = path.name == CHECKPOINT
    found = (CheckpointFiles(path.parent).load(resume=False) if whole else read_weights(path)).get("networks")
    if not isinstance(found, dict):
        raise InputError(f"{path}: networks: expected weights by names of networks, found {describe(found)}")
    return found


def init_networks(system: Any, path: Path, found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Give the networks of these names the weights that were ``found`` in ``path``."""
    for name in names:
        system.get_submodule(name).load_state_dict(found[name])
    print0(f"{', '.join(names)} start from {path}")
    if left := sorted(found.keys() - {*system.trained()}):
        print0(f"{', '.join(left)} of that checkpoint are not used: this system has none")


# ----------------------------------------------------------------------------------------------------------
#  Opening generators
# ----------------------------------------------------------------------------------------------------------


def load_generator(path: str | Path, direction: str | None = None) -> tuple[Generator, dict[str, Any]]:
    """Open a generator file: one that ``train.py`` wrote, or an official checkpoint (see ``load_official``).

    ``direction`` says which of two generators is meant, where a file holds both. Returns the generator in float32 on
    the CPU, and what the file says of itself: direction, options, step. Most official files say nothing; "directions"
    where it holds both. Raises FileNotFoundError, or InputError that names the field when the file holds no generator.
    """
    content = read_weights(path)
    if "networks" in content:
        raise InputError(f"{path}: networks of a training, expected a generator's file, such as AtoB.pt beside it")
    if "generator" not in content:
        generator = load_official(path, direction, content)
        about: dict[str, Any] = {}
        if generator.settings.get("size") is not None:
            about["options"] = dict(zip(("img_height", "img_width"), generator.settings["size"], strict=True))
        if content.keys() >= set(UGATIT_NAMES.values()):
            about |= {"direction": direction or "AtoB", "directions": DIRECTIONS}
        return generator, about
    kind = content["generator"]
    settings: Any = content.get("settings")
    if not isinstance(kind, str) or kind not in GENERATORS:
        raise InputError(f"{path}: generator: {describe(kind)}, expected one of {sorted(GENERATORS)}")
    make = GENERATORS[kind]
    check_settings(path, make, settings)
    about = {k: v for k, v in content.items() if k not in ("generator", "settings", "weights")}
    check_about(path, about)
    with torch.device("meta"):  # before memory is taken for it
        expected = make(**settings).state_dict()
    check_weights(f"{path}", content.get("weights"), expected)
    generator = make(**settings)
    generator.load_state_dict(content["weights"])
    return generator, about


def check_settings(path: str | Path, make: type[Generator], settings: Any) -> None:
    """Raise InputError where the settings in a file are not arguments of the network, or beyond all reason."""
    known = inspect.signature(make).parameters
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise InputError(f"{path}: settings: expected arguments of {make.__name__}, found {describe(settings)}")
    bounds: dict[str, dict[str, Any]] = {"n_residual_blocks": dict(least=0, most=256), "depth": dict(least=1, most=12)}
    bounds |= {"upsample": dict(choices=("transposed", "nearest")), "size": dict(choices=DCGANGenerator.sizes)}
    for key, value in settings.items():
        where = f"{path}: settings.{key}: {describe(value)}"
        if key not in known:
            raise InputError(f"{where}, which {make.__name__} does not know")
        kind = type(known[key].default)
        wanted = Option(kind, 0, "", **bounds.get(key, dict(least=1, most=4096) if kind is int else {})).expected(value)
        if key == "size" and kind is not int:  # U-GAT-IT's
            sides = value if isinstance(value, tuple) else ()
            fits = value is None or (len(sides) == 2 and all(type(n) is int and 8 <= n <= 4096 for n in sides))
            wanted = None if fits else "None or (height, width)"
        if wanted is not None:
            raise InputError(f"{where}, expected {wanted}")


COUNT = partial(Option, int, 0, "")
SAID = {  # of themselves, by generator files; what is not here is not read
    "direction": Option(str, "", "", choices=(*DIRECTIONS, NOISE)),
    "step": COUNT(least=0),
    "best_size": COUNT(least=8, most=2**14),
    "halves": Option(bool, False, ""),
    "options.img_height": COUNT(least=1, most=2**14),
    "options.img_width": COUNT(least=1, most=2**14),
    "options.channels": COUNT(choices=(1, 3)),
    "options.batch_size": COUNT(least=1, most=2**20),
    "options.seed": COUNT(least=0, most=2**62),
    "options.n_epochs": COUNT(least=1, most=10**7),
    "options.resize": Option(str, "", "", choices=RESIZE),
    "options.task": Option(str, "", "", choices=TASKS),
    "options.system": Option(str, "", ""),
    "options.dataset_name": Option(str, "", ""),
}


def check_about(path: str | Path, about: Mapping[str, Any]) -> None:
    """Raise InputError where what a generator file says of itself is not of the kind that its readers expect."""
    options = about.get("options", {})
    if not isinstance(options, dict) or not all(isinstance(k, str) and is_plain(v) for k, v in options.items()):
        raise InputError(f"{path}: options: expected numbers, strings and booleans by their names")
    said = {"direction": None, **about, **{f"options.{key}": value for key, value in options.items()}}
    for key, option in SAID.items():
        if key in said and (wanted := option.expected(said[key])) is not None:
            raise InputError(f"{path}: {key}: {describe(said[key])}, expected {wanted}")


def check_networks(where: str, found: Mapping[str, Any], system: Any, names: Iterable[str]) -> None:
    """Raise InputError where the networks of a checkpoint lack one of ``names``, or do not fit the system's."""
    for name in names:
        if name not in found:
            raise InputError(f"{where}: no network {name}, found {some(found)}")
        check_weights(f"{where}: {name}", found[name], system.get_submodule(name).state_dict())


def check_weights(where: str, weights: Any, expected: Mapping[str, Tensor]) -> None:
    """Raise InputError, naming the key, where weights are not those of ``expected`` (which may be on the meta device).

    Names, shapes and types are compared, and every value must be stored and finite.
    """
    if not isinstance(weights, Mapping):
        raise InputError(f"{where}: expected weights by their names, found {describe(weights)}")
    check_names(where, weights, expected.keys())
    for key, wanted in expected.items():
        check_tensor(f"{where}: {key}", weights[key], floats=wanted.is_floating_point())
        if weights[key].shape != wanted.shape:
            raise InputError(f"{where}: {key} has shape {tuple(weights[key].shape)}, expected {tuple(wanted.shape)}")


def check_names(where: str, weights: Mapping[str, Any], expected: Set[str]) -> None:
    if weights.keys() != expected:
        missing, unknown = some(expected - weights.keys()), some(weights.keys() - expected)
        raise InputError(f"{where}: expected but missing: {missing}; found but not expected: {unknown}")


def check_tensor(where: str, value: Any, floats: bool = True) -> None:
    """Raise InputError where a value is no tensor of this kind, not stored in full (a stride of 0), or not finite."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise InputError(f"{where}: expected a tensor, found {describe(value)}")
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64) if floats else (torch.int64,)
    if value.dtype not in kinds:
        raise InputError(f"{where} is of {value.dtype}, expected {kinds[0]}")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise InputError(f"{where} is not stored in full, expected a value for each weight")
    if floats and not value.isfinite().all():
        raise InputError(f"{where} is not finite: these weights come from a run that has diverged")


def open_generator(where: str | Path, direction: str | None = None) -> tuple[Generator, dict[str, Any]]:
    """``load_generator`` for a run, shipped weights, a folder or a file (see ``find_generator``).

    What is returned of the file always has a direction. Raises InputError when there is no generator for ``direction``:
    "AtoB", "BtoA", None (the file's own, else "AtoB"), or ``NOISE`` for a generator that draws from noise.
    """
    path = find_generator(where, direction)
    translates = None if direction == NOISE else direction
    generator, about = load_generator(path, translates)
    if "direction" not in about:  # official files have it only in their names
        about["direction"] = "BtoA" if path.stem.endswith("_B") else translates or "AtoB"
    if about["direction"] == NOISE != direction:
        raise InputError(f"{path}: draws pictures from noise (see generate.py) and translates none")
    if direction == NOISE != about["direction"]:
        raise InputError(f"{path}: translates {about['direction']}, expected a generator that draws from noise (dcgan)")
    if direction is not None and about["direction"] != direction:
        raise InputError(f"{path}: translates {about['direction']}, expected {direction} (a folder serves both)")
    return generator, about


def open_generators(where: str | Path, noise: bool = False) -> dict[str, tuple[Generator, dict[str, Any]]]:
    """``open_generator`` for every direction that ``where`` has: both for most folders and runs, one for most files.

    With ``noise`` the one generator that draws from noise. Raises InputError when there is none.
    """
    if noise:
        return {NOISE: open_generator(where, NOISE)}
    if is_file(where):
        generator, about = open_generator(where)
        others = [d for d in about.get("directions", ()) if d != about["direction"]]
        return {about["direction"]: (generator, about)} | {d: open_generator(where, d) for d in others}
    opened = {}
    for direction in DIRECTIONS:
        if any(find_file(place, direction) for place in candidate_paths(where)):
            opened[direction] = open_generator(where, direction)
    return opened or {"AtoB": open_generator(where, "AtoB")}


def read_weights(path: str | Path) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``. Raises FileNotFoundError, or InputError where it holds none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the weights of a generator")
    try:
        if zipfile.is_zipfile(path):
            check_sums(Path(path))
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise OSError("a TorchScript archive, expected a dictionary of weights")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds other Python objects than weights, as a whole pickled model does"
        raise InputError(f"{path}: not a readable weights file ({reason}; expected its state_dict)") from error
    except Exception as error:  # the unpickler raises anything: EOFError, RuntimeError, ...
        raise InputError(f"{path}: not a readable weights file ({first_line(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: expected a dictionary of weights by their names, found {type(content).__name__}")
    return content


def best_size(about: Mapping[str, Any]) -> int:
    """The longer side, in pixels, at which a generator does best, from what its file says of itself.

    That is the size measured before it was shipped, else its training size. Official files do not say: 256.
    """
    options = about.get("options", {})
    return about.get("best_size") or max(options.get("img_height", 256), options.get("img_width", 256))


# ----------------------------------------------------------------------------------------------------------
#  Official formats
# ----------------------------------------------------------------------------------------------------------

# The names of the generators in the official U-GAT-IT code's files, which hold both beside the discriminators.
UGATIT_NAMES = {"AtoB": "genA2B", "BtoA": "genB2A"}
NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def load_official(path: str | Path, direction: str | None, content: Mapping[str, Any]) -> Generator:
    """The generator in the ``content`` of a file of the official AttentionGAN, CycleGAN or UGATIT-pytorch code.

    Accepted: AttentionGAN's ``latest_net_G_A.pth`` (``conv1.weight`` … ``deconv3_attention.bias``), with a background
    mask or, as AttentionGAN-geo, without; the ``resnet_6blocks`` / ``resnet_9blocks`` generators of CycleGAN
    (``model.1.weight`` …); U-GAT-IT's ``<data set>_params_<step>.pt``, of which ``direction`` (None: "AtoB") takes
    ``genA2B`` or ``genB2A``, or one of these alone (``DownBlock.1.weight`` …), full or light. Each with or without a
    ``module.`` in front. Sizes are read from the weights. Biases (and running statistics) that InstanceNorm cancels
    are dropped, so the network computes the same function. Where these biases are missing, the generator was trained
    without InstanceNorm (``--norm none``), and is refused.

    In float32 on the CPU. Raises InputError that names the keys that were expected and those that were found.
    """
    inner = content.get(UGATIT_NAMES[direction or "AtoB"], content)
    if not isinstance(inner, dict) or not all(isinstance(key, str) for key in inner):
        raise InputError(f"{path}: expected weights by their names, found {describe(inner)}")
    weights = {k.removeprefix("module."): v for k, v in inner.items() if not k.endswith(NORM_STATISTICS)}
    for key, value in weights.items():
        check_tensor(f"{path}: {key}", value)
    try:
        generator, layers = recognise(path, weights)
    except (IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path}: its first layers have no shapes of an official generator ({error})") from error
    own = generator.state_dict()
    renamed: dict[str, str] = {}
    cancelled: set[str] = set()
    for official, ours in layers.items():
        parts = [key.removeprefix(f"{ours}.") for key in own if key.rpartition(".")[0] == ours]
        renamed |= {f"{official}.{part}": f"{ours}.{part}" for part in parts}
        if not isinstance(generator, UGATITGenerator) and "bias" not in parts:
            cancelled.add(f"{official}.bias")
    check_names(f"{path}: {type(generator).__name__}", weights, renamed.keys() | cancelled)
    used = {official: own[ours] for official, ours in renamed.items()}
    check_weights(f"{path}", {key: weights[key] for key in used}, used)
    generator.load_state_dict({ours: weights[key] for key, ours in renamed.items()})
    return generator


def recognise(path: str | Path, weights: Mapping[str, Tensor]) -> tuple[Generator, dict[str, str]]:
    """A new generator of the right kind and sizes, and official names of layers to ours. Raises InputError."""
    encoder = {0: "encoder.0", 1: "encoder.3", 2: "encoder.6"}  # our three convolutions before the blocks

    def blocks(official: str, numbers: Sequence[int], first: int, n: int) -> Iterator[tuple[str, str]]:
        for i in range(n):
            for j, number in enumerate(numbers, 1):
                yield f"{official.format(first + i)}{number}", f"encoder.{9 + i}.conv{j}"

    if "conv1.weight" in weights and "deconv3_attention.weight" in weights:
        n = sum(k.startswith("resnet_blocks.") and k.endswith(".conv1.weight") for k in weights)
        stem, head = weights["conv1.weight"], weights["deconv3_attention.weight"]
        contents = weights.get("deconv3_content.weight", stem).shape[0] // stem.shape[1]
        background = contents != head.shape[0]  # AttentionGAN-geo has a content for every mask
        layers = {f"conv{i + 1}": ours for i, ours in encoder.items()}
        layers |= dict(blocks("resnet_blocks.{}.conv", (1, 2), 0, n))
        for part in ("content", "attention"):
            layers |= {f"deconv{i}_{part}": f"{part}_head.{3 * i - 3}" for i in (1, 2, 3)}
        sizes = stem.shape[1], stem.shape[0], n, head.shape[0], head.shape[-1]
        return AttentionGenerator(*sizes, background), layers
    if "model.1.weight" in weights and "model.10.conv_block.1.weight" in weights:
        n = sum(k.endswith(".conv_block.1.weight") for k in weights)
        stem = weights["model.1.weight"]
        layers = {f"model.{3 * i + 1}": ours for i, ours in encoder.items()}
        layers |= dict(blocks("model.{}.conv_block.", (1, 5), 10, n))
        layers |= {f"model.{10 + n}": "decoder.0", f"model.{13 + n}": "decoder.3", f"model.{17 + n}": "decoder.6"}
        return ResNetGenerator(stem.shape[1], stem.shape[0], n), layers
    if "DownBlock.1.weight" in weights and "FC.0.weight" in weights:
        n = sum(k.startswith("UpBlock1_") and k.endswith(".conv1.weight") for k in weights)
        stem, mlp = weights["DownBlock.1.weight"], weights["FC.0.weight"].shape
        dim, inputs = mlp[0], mlp[-1]
        side = 4 * math.isqrt(inputs // dim)  # pictures were square; the light network's MLP reads a single place
        layers = {f"DownBlock.{4 * i + 1}": ours for i, ours in encoder.items()}
        layers |= dict(blocks("DownBlock.{}.conv_block.", (1, 5), 12, n))
        layers |= {"gap_fc": "cam.average", "gmp_fc": "cam.maximum", "conv1x1": "cam.mix"}
        layers |= {"FC.0": "mlp.0", "FC.2": "mlp.2", "gamma": "gamma", "beta": "beta"}
        for i in range(n):
            block = ("conv1", "norm1", "conv2", "norm2")
            layers |= {f"UpBlock1_{i + 1}.{part}": f"blocks.{i}.{part}" for part in block}
        up = {2: 1, 3: 2, 7: 5, 8: 6, 11: 8}  # convolution, ILN, convolution, ILN, last convolution
        layers |= {f"UpBlock2.{official}": f"decoder.{ours}" for official, ours in up.items()}
        return UGATITGenerator(stem.shape[1], stem.shape[0], n, None if inputs == dim else (side, side)), layers
    raise InputError(
        f"{path}: not an official generator. Expected AttentionGAN's keys (conv1.weight … deconv3_attention.bias), "
        "CycleGAN's (model.1.weight … model.26.bias of resnet_9blocks) or U-GAT-IT's (genA2B and genB2A, each "
        f"DownBlock.1.weight … UpBlock2.11.weight); found {some(weights)}"
    )


def some(keys: Iterable[str]) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "") if names else "nothing"
