"""The machine: device and precision, ranks, signals, checkpoints, and the record of a run.

Nothing here knows a network or a data set.
"""

from __future__ import annotations

import argparse
import fcntl
import html
import importlib
import json
import os
import pickle
import signal
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

HOLD_SECONDS = 10  # for which a folder that another process holds is waited for
SAVED_MODELS = Path("saved_models")  # checkpoints and weights, below the working directory
IMAGES = Path("images")  # sheets, curves and pages
NOISE = "generator"  # in the place of a direction, for a generator that draws from noise and translates none


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was found and what was expected."""


def check_name(flag: str, name: str) -> None:
    """Refuse names of runs and data sets that would lead out of their folder, or to the shipped weights."""
    if name in ("", ".", "..", "pretrained") or Path(name).name != name:
        raise InputError(f"{flag} {name}: expected a plain name, without folders")


# ----------------------------------------------------------------------------------------------------------
#  Device and precision
# ----------------------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """The device called ``name``, with its index; "auto" takes CUDA, then MPS, then the CPU.

    Raises InputError where it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("expected cuda, mps or cpu")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: not usable here ({first_line(error)})") from error


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 natively; elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def make_autocast(device: torch.device, precision: str = "auto") -> Callable[[], torch.autocast]:
    """A maker of autocast contexts: bf16 if ``precision`` is "bf16", or "auto" and the hardware has it.

    Weights are cast once per context, so open one per forward or turn and none across an optimizer step.
    """
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)


def whole_float32() -> AbstractContextManager:
    """For figures: convolutions without the TF32 that is PyTorch's default on CUDA. A decorator, too."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def usable_cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_layout(device: torch.device) -> torch.memory_format:
    """The layout of pictures and weights in which the device convolves fastest."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


# ----------------------------------------------------------------------------------------------------------
#  Ranks: every function is right in a single process too
# ----------------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a CPU tensor over all ranks, on every rank."""
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values


def any_rank(flags: Iterable[bool]) -> list[bool]:
    """For each flag whether it is set on any rank: how ranks agree to stop or save together."""
    agreed = torch.tensor([int(f) for f in flags])
    if world_size() > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return [bool(f) for f in agreed]


def gather(value: Any) -> list[Any] | None:
    """Every rank's value in the order of ranks, on rank 0; None on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def say(message: str) -> None:
    """Print on rank 0, above the progress bar if there is one."""
    if rank() == 0:
        tqdm.write(message)


# ----------------------------------------------------------------------------------------------------------
#  Signals
# ----------------------------------------------------------------------------------------------------------


class StopSignals:
    """Turns Ctrl-C, SIGTERM and a closed terminal (SIGHUP) into a wish to stop, ``signal``, for the block.

    A second Ctrl-C interrupts at once. A signal that was ignored before (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]

    def __enter__(self) -> StopSignals:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if number == getattr(signal, "SIGHUP", None):
            # The terminal is gone: writing to it would fail, and with it the save that is to come.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nowhere, terminal)


def exit_status(number: int) -> int:
    """The status of a script that the signal ``number`` ended, as shells have it; 0 for 0."""
    return 128 + number if number else 0


def need(package: str, what_for: str, how: str = "pip install -r requirements-extras.txt") -> ModuleType:
    """Import a package that only some uses need; InputError says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{what_for} needs {package}, which cannot be imported ({error}): {how}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python or torch says so; but for CUDA's allocator, torch raises a plain RuntimeError."""
    words = ("allocate memory", "out of memory", "not enough memory", "status_alloc_failed", "invalid buffer size")
    words += ("unable to find an engine",)  # cuDNN's, where no way to convolve finds room for its workspace
    return isinstance(error, MemoryError) or any(w in str(error).lower() for w in words)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and leaves the epilog's lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False or "(default" in (action.help or "")
        return action.help if hidden else super()._get_help_string(action)


def run_script(name: str, work: Callable[[], int]) -> int:
    """Do a script's work and return its exit status; what the user can mend is told in a line, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without "×" must not end it
            stream.reconfigure(errors="replace")
    try:
        return work()
    except (InputError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun once on every machine
            print(f"{name}: error: {in_a_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted at once; what was saved before stands", file=sys.stderr)
        return exit_status(signal.SIGINT)


def first_line(error: BaseException) -> str:
    """What an error says first; of torch's unpickler its name alone, as it advises to open the file unsafely."""
    lines = [] if isinstance(error, pickle.UnpicklingError) else str(error).strip().splitlines()
    return (lines or [type(error).__name__])[0]


def in_a_line(error: Exception) -> str:
    """What an error says, without the traceback in front of an InputError from a loader's process or a rank's."""
    return str(error).rpartition("InputError: ")[2].strip()


# ----------------------------------------------------------------------------------------------------------
#  Files
# ----------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong, which the system does not where a disk is full. Raises OSError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer turns a failed write into a RuntimeError
        raise OSError(f"{path}: could not be written ({first_line(error)})") from error


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep a folder for this process; the kernel frees it however the process ends.

    Raises InputError where another process holds it, after ``HOLD_SECONDS``: a killed run's workers take a moment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + HOLD_SECONDS
    try:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{folder}: another process is training this run; expected its end, or another --name"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(held)


def save_atomically(state: Any, path: Path) -> None:
    """torch.save to a temporary file, flushed to the disk, then renamed: ``path`` is old or new, never half.

    Raises OSError (a full disk, say) and leaves what stood at ``path`` as it was.
    """
    partial_path = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            with open(partial_path, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)


class Checkpoints:
    """The full state of one run on disk: the newest, and the one before it in case the newest is damaged."""

    FORMAT = 2

    def __init__(self, folder: Path):
        self.newest = folder / "checkpoint.pt"
        self.previous = folder / "checkpoint_previous.pt"
        self.fresh = folder / "checkpoint_fresh.pt"  # whole, and newer than both, where a save was killed
        self.damaged: set[Path] = set()

    def save(self, state: Mapping[str, Any]) -> None:
        save_atomically({"format": self.FORMAT, **state}, self.fresh)
        if self.newest.exists() and self.newest not in self.damaged:
            os.replace(self.newest, self.previous)
        os.replace(self.fresh, self.newest)
        self.damaged.clear()

    def load(self, quiet: bool = False) -> dict[str, Any]:
        """The newest sound state, tensors mapped from the file; warns of damaged ones that are newer.

        ``quiet``: no warning, and no look at what the tensors hold, which takes as long as reading them. Raises
        InputError when there is none, or one of another format.
        """
        troubles = []
        for path in (self.fresh, self.newest, self.previous):
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                found = state["format"]
                if not quiet:
                    check_sums(path)
            except Exception as error:  # a damaged file makes the unpickler raise what it likes
                self.damaged.add(path)
                troubles.append(f"{path}: damaged ({first_line(error)})")
                continue
            if found != self.FORMAT:
                raise InputError(f"{path}: checkpoint format {found}, this code reads format {self.FORMAT}")
            for trouble in () if quiet else troubles:
                say(f"warning: {trouble}; going back to {path}, step {state['step']}")
            return state
        raise InputError("; ".join(troubles) or f"{self.newest}: no such checkpoint, nothing to resume")


def check_sums(path: Path) -> None:
    """Raise OSError where a file of ``torch.save`` is not what was written: torch itself does not compare the sums."""
    with zipfile.ZipFile(path) as archive:
        if altered := archive.testzip():
            raise OSError(f"{altered} is not what was written")


def find_generator(where: str | Path, direction: str | None) -> Path:
    """The generator file for a direction that ``where`` stands for; for None any file, "AtoB" before "BtoA".

    ``where`` is a file, a folder, the name of a run (``saved_models/<name>``) or of shipped weights
    (``saved_models/pretrained/<name>``). A folder holds ``AtoB.pt`` and ``BtoA.pt``, as ``train.py`` writes
    them, or the official ``latest_net_G_A.pth`` and ``latest_net_G_B.pth``; or ``generator.pt`` for ``NOISE``, which
    is found for a direction too, so that whoever opens it can say what it is. InputError where nothing fits.
    """
    official = {"AtoB": "latest_net_G_A.pth", "BtoA": "latest_net_G_B.pth"}
    wanted = tuple(official) if direction is None else (direction,)
    names = [name for each in wanted for name in (f"{each}.pt", official.get(each)) if name]
    for place in places(where):
        if place.is_file():
            if direction in official and place.name.startswith("latest_net_G_") and place.name not in names:
                raise InputError(f"{place}: translates the other way, expected a file or folder for {direction}")
            return place
        for name in (*names, f"{NOISE}.pt"):
            if (place / name).is_file():
                return place / name
    what = "noise" if direction == NOISE else " or ".join(wanted)
    looked = ", ".join(dict.fromkeys(map(str, places(where))))
    raise InputError(f"{where}: no generator for {what} found. Looked for a file, or {' or '.join(names)} in {looked}")


def places(where: str | Path) -> list[Path]:
    """Where a checkpoint may lie: the path itself, a run, shipped weights."""
    return [Path(where), SAVED_MODELS / where, SAVED_MODELS / "pretrained" / where]


# ----------------------------------------------------------------------------------------------------------
#  The record of a run: bar, log, curves, sheets, page
# ----------------------------------------------------------------------------------------------------------


class Record:
    """Shows and keeps how a run goes. All ranks keep one; only rank 0's writes.

    ``log.jsonl`` in the run's folder of ``saved_models`` gets a line every ``interval`` steps: the means since
    the last line, over steps and ranks. The run's folder of ``images`` gets sheets, ``curves.png`` and
    ``index.html``. Values stay on the device until they are shown, so that a step waits for nothing.
    """

    CURVE_POINTS = 1000  # the curves' history is thinned to this, so that drawing them costs the same for ever
    SHEETS_SHOWN = 200  # likewise the page's slider
    PAGE_SECONDS = 60  # between two drawings of the page while the run goes on

    def __init__(self, name: str, settings: Mapping[str, Any], total_steps: int, interval: int, start: int = 0):
        self.name, self.settings, self.total_steps, self.interval = name, settings, total_steps, interval
        self.log_path = SAVED_MODELS / name / "log.jsonl"
        self.folder = IMAGES / name
        self.step = start
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.sums: Tensor | None = None
        self.count = 0
        self.history: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.stride = 1  # the history holds every stride-th line
        self.lines = 0
        self.images_since = 0
        self.since = time.perf_counter()
        if rank() == 0:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._cut_log(start)
        quiet = rank() != 0
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps,
            initial=start,
            disable=quiet,
            dynamic_ncols=terminal,
            mininterval=0.5 if terminal else 30,
            smoothing=0.05,
            unit="step",
        )
        self._shown = time.perf_counter()
        self._drawn = self._shown

    # -- what must survive a restart ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        sums = None if self.sums is None else self.sums.cpu()
        return {"names": self.names, "lengths": self.lengths, "sums": sums, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.names, self.lengths, self.count = list(state["names"]), list(state["lengths"]), state["count"]
        self.sums = None if state["sums"] is None else state["sums"].to(device)

    def _cut_log(self, step: int) -> None:
        """Drop the lines that a stopped run wrote past its checkpoint; read the others for the curves."""
        kept = []
        if self.log_path.exists():
            for line in self.log_path.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    past = entry["step"] > step
                except (ValueError, TypeError, KeyError):  # the half line of a killed run, or what a disk made of it
                    break
                if past:
                    break
                kept.append(line)
                if "validation" in entry:
                    self.validations.append(entry)
                else:
                    self._remember(entry)
        fresh = self.log_path.with_suffix(".partial")
        with writing(fresh):
            fresh.write_text("".join(line + "\n" for line in kept))
        os.replace(fresh, self.log_path)

    # -- each step ---------------------------------------------------------------------------------------

    def note(self, values: Mapping[str, Tensor], images: int, epoch: int, lr: float) -> None:
        """Take one step's scalars and vectors; ``images`` is the number of pictures this rank has just seen."""
        self.step += 1
        flat = torch.cat([v.detach().reshape(-1).float() for v in values.values()])
        if self.sums is None:
            self.names, self.lengths = list(values), [v.numel() for v in values.values()]
            self.sums = torch.zeros_like(flat)
        self.sums += flat
        self.count += 1
        self.images_since += images
        self.bar.update()
        now = time.perf_counter()
        if not self.bar.disable and now - self._shown > max(2.0, self.bar.mininterval):
            self._shown = now
            self._show(flat, epoch)
        if self.step % self.interval == 0 or self.step == self.total_steps:
            self._write_line(epoch, lr)

    def _write_line(self, epoch: int, lr: float) -> None:
        assert self.sums is not None
        means = mean_over_ranks(self.sums.cpu() / self.count).tolist()
        seconds = time.perf_counter() - self.since
        entry: dict[str, Any] = {"step": self.step, "epoch": epoch + 1}
        for name, length in zip(self.names, self.lengths, strict=True):
            taken, means = means[:length], means[length:]
            entry[name] = taken[0] if length == 1 else taken
        entry |= {"lr": lr, "images_per_s": round(world_size() * self.images_since / seconds, 3)}
        self.sums.zero_()
        self.count = self.images_since = 0
        if rank() == 0:
            self._append(entry)
            self._remember(entry)
            self.page()
        self.since = time.perf_counter()

    def note_validation(self, figures: Mapping[str, float], epoch: int, seconds: float) -> None:
        """Take the figures of an evaluation, which took ``seconds`` that do not count as training's. Rank 0 alone."""
        entry = {"step": self.step, "epoch": epoch + 1, "validation": dict(figures)}
        self._append(entry)
        self.validations.append(entry)
        self.since += seconds
        say(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def _append(self, entry: Mapping[str, Any]) -> None:
        with writing(self.log_path), open(self.log_path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def _remember(self, entry: dict[str, Any]) -> None:
        if self.lines % self.stride == 0:
            self.history.append(entry)
        self.lines += 1
        if len(self.history) > self.CURVE_POINTS:
            self.history = self.history[::2]
            self.stride *= 2

    def _show(self, flat: Tensor, epoch: int) -> None:
        values = flat.tolist()
        shown, at = {}, 0
        for name, length in zip(self.names, self.lengths, strict=True):
            if length == 1:
                shown[name] = f"{values[at]:.3f}"
            at += length
        seconds = time.perf_counter() - self.since
        speed = f"{world_size() * self.images_since / seconds:.1f} images/s"
        self.bar.set_description(f"epoch {epoch + 1}", refresh=False)
        self.bar.set_postfix_str(" ".join([speed, *(f"{k} {v}" for k, v in shown.items())]), refresh=False)

    # -- pictures ----------------------------------------------------------------------------------------

    def sheet(self, columns: Mapping[str, Tensor]) -> None:
        """Save a sheet of named columns of pictures, (B, channels or 1, H, W) in [-1, 1]."""
        sheet, path = draw_sheet(columns), self.folder / f"{self.step:08d}.png"
        with writing(path):
            sheet.save(path)

    def page(self, final: bool = False) -> None:
        """Draw the curves and write ``index.html``; both cost the same however long the run is.

        They take about a second, so ``PAGE_SECONDS`` lie between two drawings, but for the ``final`` one.
        """
        now = time.perf_counter()
        if rank() != 0 or not (final or now - self._drawn > self.PAGE_SECONDS):
            return
        self._drawn = now
        if self.history:
            with writing(self.folder / "curves.png"):
                draw_curves(self.history, self.validations, self.folder / "curves.png")
        sheets = sorted(p.name for p in self.folder.glob("[0-9]*.png"))
        shown = sheets[:: max(1, -(-len(sheets) // self.SHEETS_SHOWN))]
        if sheets and shown[-1] != sheets[-1]:
            shown.append(sheets[-1])
        rows = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in self.settings.items())
        state = f"step {self.step} of {self.total_steps}"
        with writing(self.folder / "index.html"):
            (self.folder / "index.html").write_text(
                PAGE.format(
                    name=html.escape(self.name),
                    state=state,
                    sheets=json.dumps(shown),
                    last=max(0, len(shown) - 1),
                    rows=rows,
                ),
                encoding="utf-8",
            )

    def close(self) -> None:
        self.bar.close()


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{name}</title>
<style>
  body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }}
  img {{ max-width: 100%; image-rendering: pixelated }}
  input {{ width: 100% }}
  table {{ border-collapse: collapse }}
  td {{ border-bottom: 1px solid #ddd; padding: 0 1.5em 0 0; font-family: monospace }}
</style>
<h1>{name}</h1>
<p>{state}</p>
<h2>Sheets <small id="label"></small></h2>
<input type="range" id="slider" min="0" max="{last}" value="{last}">
<img id="sheet" alt="no sheet yet">
<h2>Curves</h2>
<img src="curves.png" alt="no curves yet">
<h2>Settings</h2>
<table>{rows}</table>
<script>
  const sheets = {sheets}, slider = document.getElementById("slider");
  function show() {{
    if (!sheets.length) return;
    document.getElementById("sheet").src = sheets[slider.value];
    document.getElementById("label").textContent = "after step " + parseInt(sheets[slider.value]);
  }}
  slider.oninput = show;
  show();
</script>
"""


def draw_sheet(
    columns: Mapping[str, Tensor], title: str = "", rows: Sequence[str] = (), least_width: int = 96
) -> Image.Image:
    """A sheet with a heading over each column and a row for each picture; values in [-1, 1].

    ``title`` stands above all of it, the names of the ``rows`` on the left.

    Small pictures are enlarged by whole pixels to about ``least_width``, so that the headings fit.
    """
    batches = {name: batch.detach().float().cpu() for name, batch in columns.items()}
    channels = max(batch.shape[1] for batch in batches.values())
    stack = torch.stack([batch.expand(-1, channels, -1, -1) for batch in batches.values()], dim=1)
    zoom = max(1, round(least_width / stack.shape[-1]))
    pictures = stack.flatten(0, 1).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    grid = to_pil_image(
        make_grid(pictures.clamp(-1, 1), nrow=len(batches), padding=2, normalize=True, value_range=(-1, 1), pad_value=1)
    )
    line, width, height = 18, pictures.shape[-1] + 2, pictures.shape[-2] + 2
    font = ImageFont.load_default(size=12)
    left = 8 + round(max(map(font.getlength, rows))) if rows else 0
    above = line * (2 if title else 1)
    sheet = Image.new("RGB", (left + grid.width, grid.height + above), "white")
    sheet.paste(grid, (left, above))
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 1), title, fill="black", font=font)
    for i, name in enumerate(batches):
        draw.text((left + 2 + width * i, above - line + 1), name, fill="black", font=font)
    for i, name in enumerate(rows):
        draw.text((2, above + height * i + height // 2 - line // 2), name, fill="black", font=font)
    return sheet


def draw_curves(history: list[dict[str, Any]], validations: list[dict[str, Any]], path: Path) -> None:
    """One plot for every family of scalars (the part of their names before "_"), for every vector, for validation."""
    families: dict[str, list[str]] = defaultdict(list)
    for name, value in history[-1].items():
        if name not in ("step", "epoch"):
            families[name if isinstance(value, list) or name in ("lr", "images_per_s") else name.split("_")[0]].append(
                name
            )
    plots = {family: [(name, history) for name in names] for family, names in families.items()}
    if validations:
        flat = [{"step": entry["step"], **entry["validation"]} for entry in validations]
        plots["validation"] = [(name, flat) for name in validations[-1]["validation"]]
    height = 3 * -(-len(plots) // 3)  # inches
    figure = Figure(figsize=(15, height))
    # Not layout="constrained": it takes twice as long, and training waits for it.
    figure.subplots_adjust(0.04, 0.3 / height, 0.99, 1 - 0.3 / height, wspace=0.13, hspace=0.28)
    for i, (family, curves) in enumerate(plots.items()):
        axes = figure.add_subplot(height // 3, 3, i + 1)
        axes.set_title(family)
        for name, entries in curves:
            values = [entry.get(name, float("nan")) for entry in entries]
            lines = axes.plot([entry["step"] for entry in entries], values, linewidth=0.8)
            labels = [name] if len(lines) == 1 else [str(k + 1) for k in range(len(lines))]
            for line, label in zip(lines, labels, strict=True):
                line.set_label(label)
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))  # a rate's six decimals would not fit
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize="xx-small", ncols=2)
    figure.savefig(path, dpi=80)


def to_device(
    batches: Iterable[Mapping[str, Tensor]], device: torch.device, convert: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Move batches to the device as they come from the loader, then convert them there."""
    layouts = {4: pick_layout(device)}  # of pictures
    pinned = device.type == "cuda"  # what MPS still reads must not be freed meanwhile, and nothing tells it
    for batch in batches:
        moved = {key: convert(value.to(device, non_blocking=pinned)) for key, value in batch.items()}
        yield {k: v.contiguous(memory_format=layouts.get(v.ndim, torch.contiguous_format)) for k, v in moved.items()}
