"""The record of a run: progress bar, log, curves, picture sheets, and the run's page.

``saved_models/<run>/log.jsonl`` is the log; ``images/<run>/`` has sheets, ``curves.png`` and ``index.html``.
"""

from __future__ import annotations

from utils import InputError, Progress, mean_over_ranks, name_file, print0, rank, replacing, world_size

import html
import json
import math
import re
import string
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pictures import quantise, to_picture

IMAGES = Path("images")  # below the working directory


class Record:
    """Shows and keeps how a run goes. Every rank has one; only rank 0 writes.

    ``log`` gets a line every ``interval`` steps: the means since the last line, over steps and ranks. Values stay on
    the device until they are shown, so that a step waits for nothing.
    """

    CURVE_POINTS = 1000  # at most so many lines of the log are drawn
    SHEETS_SHOWN = 200  # at most so many sheets are on the page's slider
    SETTLED_SECONDS = 20  # of training before its duration is estimated
    PATIENCE = 1000  # steps that a sign of collapse lasts before the warning
    PAGE_SECONDS = 60  # between two drawings of the page, each of which takes about a second

    def __init__(
        self,
        name: str,
        log: Path,
        settings: Mapping[str, Any],
        total_steps: int,
        interval: int,
        start: int = 0,
        defaults: Mapping[str, Any] | None = None,
        symptoms: Callable[[Mapping[str, Any]], Iterable[str]] = lambda values: (),
        last_step: int | None = None,
    ):
        """``defaults`` of the ``settings``; ``symptoms``: signs of collapse in the values of a line of the log (see
        ``System.symptoms``); ``last_step`` of this process, where it is to leave before the end of the run.
        """
        self.name, self.log, self.settings, self.defaults = name, log, settings, defaults or {}
        self.total_steps, self.interval, self.last_step = total_steps, interval, last_step or total_steps
        self.symptoms = symptoms
        self.since_step: dict[str, int] = {}  # when each present symptom was first seen
        self.warned: set[str] = set()
        self.folder = IMAGES / name
        self.step = self.first = start
        self.started = time.perf_counter()
        self.columns: list[str] = []  # of the sheets
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.sums: Tensor | None = None
        self.count = 0
        self.images_since = 0
        self.since = time.perf_counter()
        if rank() == 0:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._cut_log(start)
        self.bar = Progress(total=self.last_step, initial=start, disable=rank() != 0, smoothing=0.05, unit="step")
        self._shown = time.perf_counter()
        self._drawn = self._shown
        self._announced = False
        if rank() == 0:
            self._write_page()

    # -- resuming ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        sums = None if self.sums is None else self.sums.cpu()
        return {"names": self.names, "lengths": self.lengths, "sums": sums, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Raises InputError for a state that is none of ``state_dict``."""
        names: Any = state.get("names")
        lengths: Any = state.get("lengths")
        sums: Any = state.get("sums")
        count: Any = state.get("count")
        sound = isinstance(names, list) and isinstance(lengths, list) and len(names) == len(lengths)
        sound = sound and all(isinstance(name, str) for name in names)
        sound = sound and all(type(length) is int and length > 0 for length in lengths)
        sound = sound and type(count) is int and count >= 0
        if isinstance(sums, Tensor):
            sound = sound and sums.shape == (sum(lengths),) and sums.dtype == torch.float32
        else:
            sound = sound and sums is None and not names
        if not sound:
            raise InputError("--resume: the checkpoint's record: expected names, lengths, sums and count that fit")
        self.names, self.lengths, self.count = names, lengths, count
        self.sums = None if sums is None else sums.contiguous().to(device)

    def _cut_log(self, step: int) -> None:
        """Drop the lines that a stopped run wrote after its checkpoint."""
        kept = [line for line, entry in read_log(self.log) if entry["step"] <= step]
        with replacing(self.log) as path:
            path.write_text("".join(line + "\n" for line in kept))

    # -- each step ---------------------------------------------------------------------------------------

    def add(self, values: Mapping[str, Tensor], images: int, epoch: int, lr: float) -> None:
        """Take one step's scalars and vectors; ``images`` is the number of pictures this rank has just seen.

        Raises InputError where a mean that is to be logged is not finite.
        """
        self.step += 1
        flat = torch.cat([v.detach().reshape(-1).float() for v in values.values()])
        if self.sums is None:
            self.names, self.lengths = list(values), [v.numel() for v in values.values()]
            self.sums = torch.zeros_like(flat)
        if self.sums.shape != flat.shape:
            raise InputError("--resume: the checkpoint's record is of another system's losses")
        self.sums += flat
        self.count += 1
        self.images_since += images
        self.bar.update()
        now = time.perf_counter()
        if not self.bar.disable and now - self._shown > max(2.0, self.bar.mininterval):
            self._shown = now
            self._show(flat, epoch)
        if not self._announced and self.step - self.first >= 5 and now - self.started > self.SETTLED_SECONDS:
            self._announced = True
            self._announce()
        if self.step % self.interval == 0 or self.step == self.total_steps:
            self._write_line(epoch, lr)

    def _named(self, flat: Tensor) -> dict[str, Any]:
        """Values by their names: numbers, and lists for vectors."""
        values = flat.tolist()
        named = {}
        for name, length in zip(self.names, self.lengths, strict=True):
            taken, values = values[:length], values[length:]
            named[name] = taken[0] if length == 1 else taken
        return named

    def _write_line(self, epoch: int, lr: float) -> None:
        assert self.sums is not None
        means = mean_over_ranks(self.sums.cpu() / self.count)
        speed = round(self._images_per_s(), 3)
        self.check_finite()
        self.sums.zero_()
        self.count = self.images_since = 0
        if rank() == 0:
            values = self._named(means)
            self._append({"step": self.step, "epoch": epoch + 1, **values, "lr": lr, "images_per_s": speed})
            self._warn_of_collapse(values)
            self.page()
        self.since = time.perf_counter()

    def _announce(self) -> None:
        """Print the estimated duration, once."""
        print0(
            f"about {self.time_left()} to go; pictures and curves: {self.folder}/index.html; Ctrl-C saves and leaves, "
            "--resume goes on"
        )
        if (self.last_step - self.step) * (time.perf_counter() - self.started) > 86400 * (self.step - self.first):
            print0("--preset small trains a small network on small pictures, within an evening on two CPU cores")

    def check_finite(self) -> None:
        """Raise InputError, on every rank, where a value since the last line of the log was NaN or infinite."""
        if self.sums is None:
            return
        finite = mean_over_ranks(self.sums.isfinite().float().cpu()) == 1
        if wrong := [name for name, value in self._named(finite).items() if not np.all(value)]:
            first = self.step - self.count + 1
            raise InputError(
                f"the run has diverged: {', '.join(wrong)} not finite between step {first} and step {self.step}. "
                "Checkpoints from before are kept; docs/training.md, 'When a run diverges', says how to go on"
            )

    def _warn_of_collapse(self, values: Mapping[str, Any]) -> None:
        present = set(self.symptoms(values))
        self.since_step = {symptom: self.since_step.get(symptom, self.step) for symptom in present}
        for symptom, start in self.since_step.items():
            if self.step - start >= self.PATIENCE and symptom not in self.warned:
                self.warned.add(symptom)
                print0(f"warning: since step {start} {symptom}; docs/training.md, 'Watch the masks', says what to do")

    def _images_per_s(self) -> float:
        return world_size() * self.images_since / (time.perf_counter() - self.since)

    def add_validation(self, figures: Mapping[str, float], epoch: int, seconds: float) -> None:
        """Log the figures of an evaluation. Its ``seconds`` do not count as training. Only rank 0 calls this.

        The next steps stop the run if the figures are not finite because the weights are not.
        """
        known = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no NaN
        self._append({"step": self.step, "epoch": epoch + 1, "validation": known})
        self.since += seconds
        print0(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.never_fatal("log"), name_file(self.log), open(self.log, "a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    @contextmanager
    def never_fatal(self, what: str) -> Iterator[None]:
        """Turn any error into a warning, said once for each ``what``: a picture or a line must never cost a run."""
        try:
            yield
        except Exception as error:
            if what not in self.warned:
                self.warned.add(what)
                print0(f"warning: no {what}, training goes on ({type(error).__name__}: {error})")

    def _show(self, flat: Tensor, epoch: int) -> None:
        scalars = {name: value for name, value in self._named(flat).items() if not isinstance(value, list)}
        shown = [f"{self._images_per_s():.1f} images/s", *(f"{name} {value:.3f}" for name, value in scalars.items())]
        self.bar.set_description(f"epoch {epoch + 1}", refresh=False)
        self.bar.set_postfix_str(" ".join(shown), refresh=False)

    # -- pictures ----------------------------------------------------------------------------------------

    def sheet(self, columns: Mapping[str, Tensor]) -> None:
        """Save a sheet of named columns of pictures, (B, channels or 1, H, W) in [-1, 1], and show it on the page."""
        self.columns = list(columns)
        with self.never_fatal("sheet"), replacing(self.folder / f"{self.step:08d}.png") as path:
            draw_sheet(columns).save(path)
        self._write_page()

    def page(self, final: bool = False) -> None:
        """Draw the curves and write ``index.html``: ``final``, or ``PAGE_SECONDS`` after the last time."""
        now = time.perf_counter()
        if rank() != 0 or not (final or now - self._drawn > self.PAGE_SECONDS):
            return
        self._drawn = now
        with self.never_fatal("curves"):
            entries = [entry for _, entry in read_log(self.log)]
            validations = [entry for entry in entries if "validation" in entry]
            if history := thin([entry for entry in entries if "validation" not in entry], self.CURVE_POINTS):
                with replacing(self.folder / "curves.png") as path:
                    draw_curves(history, validations, path)
        self._write_page(final)

    def _write_page(self, final: bool = False) -> None:
        with self.never_fatal("page"):
            sheets = thin(sorted(p.name for p in self.folder.glob("[0-9]*.png")), self.SHEETS_SHOWN)
            kinds = dict.fromkeys(name.partition(" ")[0] for name in self.columns)
            changed = {k: v for k, v in self.settings.items() if v != self.defaults.get(k, v)}
            words = "".join(f"<dt>{kind}<dd>{WORDS[kind]}" for kind in kinds if kind in WORDS)
            page = self.folder / "index.html"
            if not kinds and page.exists():  # resumed, and no sheet drawn since
                words = page.read_text(encoding="utf-8").partition("<dl>")[2].partition("</dl>")[0]
            values = {
                "name": html.escape(self.name),
                "state": self._progress(final),
                "running": "false" if final else "true",
                "sheets": json.dumps(sheets),
                "last": max(0, len(sheets) - 1),
                "hidden": "" if sheets else "hidden",
                "none": "" if sheets else "The first sheet is still to come.",
                "words": words,
                "curves": '<figure><img src="curves.png" class="curves" alt="loss curves"></figure>'
                if (self.folder / "curves.png").exists()
                else "<p>The curves come with the first line of the log (--log_interval).",
                "links": links(self.folder),
                "changed": tabulate(changed),
                "settings": tabulate(self.settings),
            }
            with replacing(page) as path:
                path.write_text(string.Template(PAGE).substitute(values), encoding="utf-8")

    def _progress(self, final: bool) -> str:
        """Where the run is, and how long it will take; when that was, because a killed run says no more."""
        state = f"step {self.step:,} of {self.total_steps:,}"
        if final or self.step == self.first:
            return state + (": done" if self.step == self.total_steps else ": stopped" if final else "")
        return f"{state}, about {self.time_left()} left ({datetime.now():%d %B, %H:%M})"

    def time_left(self) -> str:
        """In words, by the speed since the start of this process."""
        passed, steps = time.perf_counter() - self.started, self.step - self.first
        return duration(passed / max(1, steps) * max(0, self.last_step - self.step))

    def close(self) -> None:
        self.bar.close()


def read_log(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a log, each with what it holds, without those that are damaged (by a kill or a full disk)."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            entry["step"] + 0  # a number
        except (ValueError, TypeError, KeyError):
            continue
        yield line, entry


def thin(items: Sequence[Any], most: int) -> list[Any]:
    """At most about ``most`` items at equal distances, the last one always."""
    stride = -(-len(items) // most) if items else 1
    return [*items[:-1:stride], *items[-1:]]


# The columns of sheets in words, by the first part of their names.
WORDS = {
    "real": "a real picture: an input, or of a pair what the output should be",
    "fake": "its translation",
    "attention": "where the generator paints: white is painted anew, black is kept (U-GAT-IT: where it looks)",
    "recovered": "there and back: the translation translated back, which should be the input again",
    "global": "where the global discriminator looks",
    "local": "where the local discriminator looks",
    "sample": "a picture from noise",
}

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark }
  body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5em auto 4em; max-width: 1200px; padding: 0 1em }
  h1, h2 { line-height: 1.2; margin: 0; overflow-wrap: anywhere }
  h2 { font-size: 1.25em; margin: 2em 0 0.6em }
  small, dt, th { font-size: 0.9em; font-weight: normal; opacity: 0.75 }
  figure { margin: 0; overflow-x: auto } /* on a phone pictures scroll, the page does not */
  img { display: block; max-width: max(100%, 750px) }
  #sheet { background: white; image-rendering: pixelated }
  #slider { box-sizing: border-box; margin: 0 0 0.8em; width: 100% }
  dl { display: grid; gap: 0 1.5em; grid-template-columns: max-content 1fr }
  dd { margin: 0 }
  table { border-collapse: collapse; margin-bottom: 1em }
  th, td { border-bottom: 1px solid #8884; padding: 0.15em 1.5em 0.15em 0; text-align: left; vertical-align: baseline }
  td { overflow-wrap: anywhere; padding-right: 0 }
  @media (prefers-color-scheme: dark) { .curves { filter: invert(0.93) hue-rotate(180deg) } }
</style>
<h1>$name</h1>
<p id="state">$state</p>
<h2>Pictures <small id="label"></small></h2>
<div $hidden>
<input type="range" id="slider" max="$last" value="$last" aria-label="which sheet of pictures">
<figure><img id="sheet" alt="pictures of the run"></figure>
<dl>$words</dl>
</div>
<p>$none</p>
<div id="links"><!-- begin links -->$links<!-- end links --></div>
<h2>Curves</h2>
$curves
<h2>Settings that differ from the defaults</h2>
$changed
<details><summary>All settings</summary>$settings</details>
<script>
  const sheets = $sheets, slider = document.getElementById("slider"), all = document.querySelector("details");
  function show() {
    document.getElementById("sheet").src = sheets[slider.value];
    document.getElementById("label").textContent = "after step " + parseInt(sheets[slider.value]).toLocaleString("en");
  }
  // While the run goes on the page loads itself again; a sheet that was chosen stays, and so do open settings.
  const chosen = sheets.indexOf(sessionStorage.getItem(location.pathname));
  if (chosen >= 0) slider.value = chosen;
  slider.oninput = () => {
    if (slider.value == slider.max) sessionStorage.removeItem(location.pathname);
    else sessionStorage.setItem(location.pathname, sheets[slider.value]);
    show();
  };
  if (sheets.length) show();
  if ($running) setInterval(() => all.open || location.reload(), 30000);
</script>
</html>
"""


def tabulate(settings: Mapping[str, Any]) -> str:
    rows = (f"<tr><th>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in settings.items())
    return f"<table>{''.join(rows)}</table>"


def links(folder: Path) -> str:
    """Links to what evaluate.py and translate.py have written beside the page."""
    found = sorted(p for p in folder.glob("*") if p.name.startswith(("evaluation", "translated")))
    shown = (f'<a href="{html.escape(quote(p.name))}">{html.escape(p.name)}</a>' for p in found)
    return "<p>Beside this page: " + ", ".join(shown) if found else ""


def update_links(folder: Path) -> None:
    """Show on the page of a run, if there is one, what has been written beside it since. Raises OSError."""
    page = folder / "index.html"
    if page.exists():
        before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- begin links -->")
        after = rest.partition("<!-- end links -->")[2]
        if mark and after:
            with replacing(page) as path:
                path.write_text(f"{before}{mark}{links(folder)}<!-- end links -->{after}", encoding="utf-8")


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3 h 20 min, 19 days."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // (24 * 60)} days"


def draw_sheet(
    columns: Mapping[str, Tensor], title: str = "", rows: Sequence[str] = (), least_width: int = 96
) -> Image.Image:
    """A sheet with a heading over each column and a row for each picture; values in [-1, 1].

    ``title`` stands on top, the names of the ``rows`` on the left. Small pictures are enlarged to about ``least_width``
    by repeating pixels, so that the headings fit.
    """
    batches = {name: batch.detach().float().cpu() for name, batch in columns.items()}
    channels = max(batch.shape[1] for batch in batches.values())
    stack = torch.stack([batch.expand(-1, channels, -1, -1) for batch in batches.values()], dim=1)
    zoom = max(1, round(least_width / stack.shape[-1]))
    stack = quantise(stack).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    line, width, height = 18, stack.shape[-1] + 2, stack.shape[-2] + 2
    font = ImageFont.load_default(size=12)
    left = 8 + round(max(map(font.getlength, rows))) if rows else 0
    above = line * (2 if title else 1)
    sheet = Image.new("RGB", (left + 2 + width * stack.shape[1], above + 2 + height * stack.shape[0]), "white")
    for i, j in np.ndindex(*stack.shape[:2]):
        sheet.paste(to_picture(stack[i, j]), (left + 2 + width * j, above + 2 + height * i))
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 1), title, fill="black", font=font)
    for i, name in enumerate(batches):
        draw.text((left + 2 + width * i, above - line + 1), name, fill="black", font=font)
    for i, name in enumerate(rows):
        draw.text((2, above + height * i + height // 2 - line // 2), name, fill="black", font=font)
    return sheet


def draw_curves(history: list[dict[str, Any]], validations: list[dict[str, Any]], path: Path) -> None:
    """One plot for every family of scalars (the part of their names before "_"), for every vector, for validation."""
    from matplotlib.figure import Figure  # here, because importing it takes long, and most scripts draw no curves

    nan = float("nan")
    families: dict[str, list[str]] = defaultdict(list)
    for name, value in history[-1].items():
        if name not in ("step", "epoch"):
            alone = isinstance(value, list) or name == "images_per_s"
            families[name if alone else name.split("_")[0]].append(name)
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
            values = [nan if entry.get(name) is None else entry[name] for entry in entries]
            marker = "." if len(entries) < 30 else ""  # a single value makes no line
            lines = axes.plot([entry["step"] for entry in entries], values, marker=marker, linewidth=0.8)
            labels = [name] if len(lines) == 1 else [str(k + 1) for k in range(len(lines))]
            for line, label in zip(lines, labels, strict=True):
                line.set_label(label)
            if name.startswith("mask"):
                lines[-1].set(color="black", linewidth=2)  # the background's, which tells most
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))  # a rate's six decimals would not fit
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small", ncols=5 if len(axes.lines) > 6 else 2, framealpha=0.6)
    figure.savefig(path, dpi=80)


def find_block(page: Path, name: str) -> tuple[str, str]:
    """A page's text before the marks of a block and after them. Raises InputError where they are not there."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    found = re.search(rf"^<!-- begin {name}[: ].*?^<!-- end {name} -->$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise InputError(f"{page}: expected a line <!-- begin {name} --> and, below it, a line <!-- end {name} -->")
    return text[: found.start()], text[found.end() :]


def write_block(page: Path, name: str, command: str, lines: Sequence[str]) -> None:
    """Put lines between the marks of a block, and the command that made them into the first mark.

    A page that does not exist is created with only the block. Raises InputError where the marks are missing, OSError
    where the page cannot be written.
    """
    before, after = find_block(page, name) if page.exists() else ("", "\n")
    block = "\n".join([f"<!-- begin {name}: {command} -->", "", *lines, "", f"<!-- end {name} -->"])
    page.parent.mkdir(parents=True, exist_ok=True)
    with replacing(page) as path:
        path.write_text(before + block + after, encoding="utf-8")


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table of cells."""
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines)]
