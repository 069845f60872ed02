"""Train a system on one device.

    python train.py --dataset_name horse2zebra
    python train.py --dataset_name horse2zebra --resume

``train`` is the whole procedure and its loop is the algorithm. ``train_dist.py`` runs the same on many processes.
"""

from __future__ import annotations

import utils
from utils import InputError, first_line, print0

import argparse
import inspect
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import checkpoints
import record
from checkpoints import SAVED_MODELS
from datasets import BUILT_IN, KINDS, EpochSampler, PictureDataset, make_loader
from metrics import Validation
from options import MACHINE, all_options, build_system, parse_options, stored_options
from pictures import normalise
from prepare import draw_built_in
from systems import SYSTEMS, Batch, System

# Files that a run may have written before its first checkpoint. They do not block a new run of its name.
TRACES = re.compile(r"log\.jsonl|\d{8}\.png|curves\.png|index\.html|\.partial\..*")
SAVING = "saving, then leaving; Ctrl-C once more leaves at once"

# ----------------------------------------------------------------------------------------------------------
#  Building
# ----------------------------------------------------------------------------------------------------------


def set_up(
    options: argparse.Namespace, device: torch.device
) -> tuple[System, dict[str, torch.optim.Optimizer], partial[torch.autocast]]:
    """What ``training_step`` takes: the system on its device, each player's optimizer, a maker of autocast contexts.

    Seeds PyTorch, and sets for the whole process what makes it faster. Raises InputError for ``cuda_graph`` where a
    step cannot be captured, and for ``compile`` where torch cannot.
    """
    if options.cuda_graph:
        if device.type != "cuda" or options.compile or dist.is_initialized():
            found = f"--device {device}{', --compile' if options.compile else ''}"
            found += ", train_dist.py" if dist.is_initialized() else ""
            wanted = "expected train.py on CUDA without --compile (--no_cuda_graph goes on with a run without it)"
            raise InputError(f"--cuda_graph: {wanted}, found {found}")
        torch.cuda.set_device(device)  # where new streams are made
    if options.compile:
        try:
            probe = nn.ReLU()
            probe.compile(dynamic=False)
            probe(torch.zeros(1, device=device))
        except Exception as error:  # it needs a compiler of the system, and raises what it likes
            wanted = "expected what torch.compile needs (--no_compile goes on with a run without it)"
            raise InputError(f"--compile: {wanted}, found {first_line(error)}") from error
    if device.type == "cpu":
        utils.keep_freed_memory()
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
    optimizers: dict[str, torch.optim.Optimizer] = {
        turn.player: adam(trained_parameters(system, turn.networks), fused=True) for turn in system.turns
    }
    return system, optimizers, utils.make_autocast(device, options.precision)


def build_dataset(options: argparse.Namespace) -> PictureDataset:
    """The training data; the built-in set is drawn where it is first needed."""
    if options.dataset_name == BUILT_IN:
        draw_built_in(data_folder(options))
    make = KINDS[SYSTEMS[options.system].system_class.data]
    given = {**vars(options), "root": data_folder(options), "size": (options.img_height, options.img_width)}
    given |= {"how": options.resize, "hold_out": options.eval_interval > 0}
    return make(**{key: given[key] for key in inspect.signature(make).parameters})


def data_folder(options: argparse.Namespace) -> Path:
    return Path(options.data_dir) / options.dataset_name


def trained_parameters(system: System, networks: Sequence[str]) -> list[Tensor]:
    return [p for name in networks for p in system.get_submodule(name).parameters()]


def prepare_run(options: argparse.Namespace, limit: float = 0.0) -> PictureDataset:
    """What one process does before any training: check name and pictures.

    Returns the data set, with its pictures in memory where they take at most ``limit`` bytes. Raises InputError.
    """
    if not (options.resume or options.overwrite):
        refuse_existing_run(options)
    dataset = build_dataset(options)
    dataset.check(limit)
    return dataset


def refuse_existing_run(options: argparse.Namespace) -> None:
    """Raise InputError where a run of this name exists."""
    for folder in run_folders(options):
        kept = [p for p in sorted(folder.rglob("*")) if not p.is_dir() and not TRACES.fullmatch(p.name)]
        if options.auto_resume:  # killed before its first checkpoint, the run may have evaluated itself already
            evaluated = folder / checkpoints.BEST, folder / checkpoints.KEPT
            kept = [p for p in kept if not any(p.is_relative_to(place) for place in evaluated)]
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
    """One training step: the generators run once, then each player takes its turn. Returns what to log."""
    with autocast():
        fakes = system(batch)
    shown: dict[str, Tensor] = {}
    for turn in system.turns:
        with autocast():
            losses = turn.losses(batch, fakes)
        update(optimizers[turn.player], losses)
        shown |= {name: loss.detach() for name, loss in losses.items()}  # their graph would live on into the next step
    system.after_step()
    return shown | system.measures(batch, fakes)


def update(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
    """Change only this player's networks: the gradients of the others are not computed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward(inputs=parameters)
    optimizer.step()


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

    ``distribute`` wraps the networks for many processes. ``device_name``: this process's device; None: the options'.
    ``listening``: StopSignals that the caller has entered already. ``dataset``: what ``prepare_run``
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
    first_step, logged = state.load() if options.resume else (0, {})
    total = options.n_epochs * len(loader)
    if 0 < options.max_steps <= first_step < total:
        print0(f"--max_steps {options.max_steps}: the run is at step {first_step} already")
        return 0
    if not options.resume:
        empty_run_folders(options)
    log = record.Record(
        options.name,
        log=folder / "log.jsonl",
        settings=vars(options),
        total_steps=total,
        interval=options.log_interval,
        start=first_step,
        defaults={name: each.default for name, each in all_options(options.system, options.preset).items()},
        symptoms=system.symptoms,
        last_step=min(options.max_steps, total),
    )
    if options.resume:
        log.load_state_dict(logged, device)
    first_epoch, done = divmod(first_step, len(loader))
    effective = options.batch_size * utils.world_size()
    crops = f" in crops of {options.crop_size}" if options.crop_size else ""
    print0(
        f"{'resuming' if options.resume else 'training'} {options.name}: {options.system} on {options.dataset_name}, "
        f"{options.img_height} x {options.img_width}{crops}, step {first_step} of {total}, batch "
        f"{options.batch_size} x {utils.world_size()} process(es) = {effective}, {device.type}, "
        f"{'bf16' if autocast.keywords['enabled'] else 'float32'}"
    )
    print0(dataset.describe())

    wrapped = distribute(system)
    # Sheets and validation have other batch sizes and modes, for which compiled networks would compile again.
    eager = partial(torch.compiler.set_stance, "force_eager") if options.compile else nullcontext
    captured = CapturedStep(wrapped, optimizers, autocast) if options.cuda_graph else None
    start = time.perf_counter()
    with nullcontext(listening) if listening else utils.StopSignals(SAVING) as stop, closing(log):
        for epoch in range(first_epoch, options.n_epochs):
            sampler.epoch, sampler.start = epoch, done * options.batch_size
            for batch in utils.to_device(loader, device, normalise):
                lr = learning_rate(options, log.step, len(loader))
                for group in (g for optimizer in optimizers.values() for g in optimizer.param_groups):
                    group["lr"] = lr
                wrapped.set_epoch(epoch)
                images = sum(len(value) for value in batch.values() if value.ndim == 4)  # noise is no picture
                shown = captured(batch) if captured else training_step(wrapped, optimizers, autocast, batch)
                log.add(shown, images, epoch, lr)
                if options.compile and log.step == first_step + 1:
                    print0(f"compiled, and took the first step, in {time.perf_counter() - start:.0f} s")
                if utils.rank() == 0 and sheet_is_due(log.step, options.sample_interval, total):
                    with eager(), autocast():
                        log.sheet(system.sheet(samples))
                if validation is not None and is_due(log.step, options.eval_interval * len(loader), total):
                    with eager():
                        validate(validation, system, state, log, epoch, options.keep_evaluated)
                enough = 0 < options.max_steps <= log.step < total
                ends_interval = is_due(log.step, options.checkpoint_interval * len(loader), total)
                stopped, save = utils.any_rank(
                    [enough or stop.signal is not None, ends_interval or state.is_due(options.checkpoint_minutes)]
                )
                if stopped or save:
                    log.check_finite()
                    state.save(log.step, log.state_dict())
                if stopped:
                    break
            if stopped:
                break
            done = 0
        log.page(final=True)
        utils.barrier()  # no rank leaves before rank 0 has saved
    if log.step == total:
        print0(f"done: see {log.folder}/index.html; weights in {folder}")
        return 0
    print0(f"stopped after step {log.step} of {total}, saved; --name {options.name} --resume goes on")
    return 0 if enough else stop.signal or signal.SIGTERM  # another rank's signal


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


# ----------------------------------------------------------------------------------------------------------
#  The step as a CUDA graph
# ----------------------------------------------------------------------------------------------------------


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
        return {name: value.clone() for name, value in self.shown.items()}  # the next replay changes them

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


# ----------------------------------------------------------------------------------------------------------
#  The script
# ----------------------------------------------------------------------------------------------------------


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
            f"--img_width {options.img_width}: lower these, or --ngf, or train on smaller crops (--crop_size); saved "
            "checkpoints are kept"
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
