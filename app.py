"""A page to play with trained generators in the browser, after ``pip install -r requirements-app.txt``.

It is served to this machine only, unless ``--host`` says otherwise. Uploads and results lie in a temporary folder; they
are deleted within ten minutes and at the end. The process refuses every connection to another machine.
"""

from __future__ import annotations

import utils
from utils import InputError

import html
import os
import re
import socket
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import checkpoints
from checkpoints import DIRECTIONS
from datasets import BUILT_IN, as_input, find_side
from models import Generator
from pictures import to_picture, to_tensor
from prepare import draw_scene
from translate import Decoded, Painted, decode, fit, overlay, plan, to_full_size, translate_batch

DOCS = Path(__file__).resolve().parent / "docs"
FIRST = "pretrained/horse2zebra_attentiongan"  # what the page starts with, if it is there
UPLOAD = "upload"  # stands for the visitor's own file among the names of weights
SIZES = (64, 128, 256, 512, 1024)  # of the longer side in the generator; 1024 squared: 1 GB for the default networks
LARGEST = 2048  # longer side of what the page shows and gives back
MOST_PICTURES, MOST_WAITING, MOST_BYTES = 32, 32, "200mb"  # at once, in the queue, of one upload
KEPT_SECONDS = 540  # looked at once a minute


class Weights(NamedTuple):
    """Generators by direction, in evaluation mode on their device, and what their files say of them."""

    generators: dict[str, Generator]
    about: Mapping[str, Mapping[str, Any]]  # by direction
    task: str
    dataset: str
    only_size: tuple[int, int] | None  # the only (height, width) that they take


def list_weights() -> list[tuple[str, str]]:
    """The runs and shipped weights that translate pictures, as (label, what ``open_generators`` takes)."""
    found = []
    for name in checkpoints.known_names(*DIRECTIONS):
        shipped = name.startswith("pretrained/")
        where = name if shipped else str(checkpoints.SAVED_MODELS / name)
        found.append((f"{Path(name).name} ({'shipped' if shipped else 'a run'})", where))
    return sorted(found, key=lambda each: each[1] != FIRST)


@lru_cache(maxsize=2)
def open_weights(where: str, device: torch.device, changed: int) -> Weights:
    """Open the generators at ``where``; ``changed`` is their file's time, for a run that goes on. Raises InputError."""
    opened = checkpoints.open_generators(where)
    layout = utils.pick_layout(device)
    generators = {name: each.to(device).to(memory_format=layout).eval() for name, (each, _) in opened.items()}
    generator, about = next(iter(opened.values()))
    options = about.get("options", {})
    task, dataset = options.get("task", "translation"), options.get("dataset_name", "")
    abouts = {direction: each for direction, (_, each) in opened.items()}
    return Weights(generators, abouts, task, dataset, generator.settings.get("size"))


def name_directions(weights: Weights) -> list[tuple[str, str]]:
    """(label, direction): "horse → zebra" where the data set is called horse2zebra, else "A → B"."""
    sides = ["grey", "colour"] if weights.task == "colorization" else weights.dataset.split("_")[0].split("2")
    a, b = sides if len(sides) == 2 and all(sides) else ("A", "B")
    return [(f"{a} → {b}" if direction == "AtoB" else f"{b} → {a}", direction) for direction in weights.generators]


def name_sizes(weights: Weights, direction: str) -> tuple[list[tuple[str, int]], int]:
    """(label, longer side in pixels) of each size at which the generator may see a picture, and the best of them."""
    about = weights.about[direction]
    best = max(weights.only_size or (min(checkpoints.best_size(about), SIZES[-1]),))
    if weights.only_size is not None:
        return [(f"{best} (the only one that these weights take)", best)], best
    why = "best" if "best_size" in about else "trained"
    return [(f"{n} ({why})" if n == best else f"{n}", n) for n in sorted({*SIZES, best})], best


# ----------------------------------------------------------------------------------------------------------
#  Pictures
# ----------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What became of one picture, of its size; masks and contents in the size in which the generator saw it.

    None or [] is what the weights do not have.
    """

    name: str
    remark: str
    before: Image.Image
    after: Image.Image
    foreground: Image.Image | None  # grey, white where the generator paints
    back: Image.Image | None
    masks: list[tuple[Image.Image, str]]
    contents: list[tuple[Image.Image, str]]


@torch.inference_mode()
def translate(weights: Weights, direction: str, path: Path, longest: int, device: torch.device) -> Answer:
    """Translate one picture, and back where the other generator is there. Raises InputError, one or two sentences."""
    if direction not in weights.generators:
        raise InputError("Choose a direction first.")
    if not path.exists():
        raise InputError(f"{path.name} has been deleted in the meantime. Give it again.")
    generator = weights.generators[direction]
    failed: dict[Path, str] = {}
    picture = as_input(path, weights.task, direction)
    tasks = plan([picture], [path.with_suffix(".png")], longest, LARGEST, weights.only_size, failed)
    decoded = decode(tasks[0], generator.settings["channels"], False) if tasks else failed[path]
    if isinstance(decoded, str):
        reason = decoded.replace(str(path), path.name).rstrip(".")
        raise InputError(f"{path.name} cannot be read as a picture: {reason}.")

    def paint(generator: Generator, decoded: Decoded) -> tuple[Painted, Image.Image]:
        (painted,) = translate_batch(generator, decoded.seen[None], device, nullcontext, True)
        if isinstance(painted, str):
            raise InputError(f"{path.name} does not fit into the memory at this size. Choose a smaller one.")
        return painted, to_picture(to_full_size(painted, decoded))

    painted, after = paint(generator, decoded)
    back, other = None, weights.generators.get(f"{direction[-1]}to{direction[0]}")
    if other is not None:
        back = paint(other, Decoded(to_tensor(fit(after, tasks[0].size)), to_tensor(after), None))[1]
    (height, width), size = tasks[0].size, after.size
    seen = "" if (width, height) == size else f"; the network saw it at {width} × {height}"
    return Answer(
        path.name,
        f"{path.name}: {size[0]} × {size[1]} pixels{seen}.",
        to_picture(decoded.full),
        after,
        None if painted.foreground is None else fit(to_picture(painted.foreground), size[::-1]),
        back,
        [(to_picture(mask[None]), f"{i}: {mask.float().mean() / 255:.0%}") for i, mask in enumerate(painted.masks, 1)],
        [(to_picture(content), f"{i}") for i, content in enumerate(painted.contents, 1)],
    )


def pack(answers: Sequence[Answer], path: Path) -> None:
    """A zip with NAME.png, and NAME_attention.png where there is one; numbered where two would have one name."""
    stems = [Path(answer.name).stem for answer in answers]
    names = [f"{stem}{end}".casefold() for stem in stems for end in ("", "_attention")]  # some disks ignore case
    if len(set(names)) < len(names):
        stems = [f"{i:02d}_{stem}" for i, stem in enumerate(stems, 1)]
    with zipfile.ZipFile(path, "w") as archive:
        for answer, stem in zip(answers, stems, strict=True):
            for end, image in (("", answer.after), ("_attention", answer.foreground)):
                if image is not None:
                    with archive.open(f"{stem}{end}.png", "w") as file:
                        image.save(file, "PNG")


def find_examples(where: str, weights: Weights, direction: str) -> Iterator[tuple[str, Image.Image]]:
    """(name, picture) to try a direction with: test pictures of the weights' own set; or the inputs on the sheet in
    docs of shipped weights; or test pictures of all sets in data and drawn ones. What cannot be read is left out.
    """
    side, sheet, own = direction[0], DOCS / f"{Path(where).name}_{direction}.webp", Path("data", weights.dataset)
    tests = {}
    for root in sorted(Path("data").glob("*/")):
        with suppress(InputError, OSError):  # of another layout, or locked
            tests[root] = find_side(root, "test", side, weights.task)
    if not tests.get(own) and where.startswith("pretrained/") and sheet.exists():
        with Image.open(sheet) as image:  # see record.draw_sheet: six inputs are the first row, right of its name
            step = (image.width - 60) // 6
            for i, left in enumerate(range(image.width - 6 * step, image.width, step), 1):
                input_ = image.convert("RGB").crop((left, 20, left + step - 2, 20 + step - 2))
                yield f"{weights.dataset} {side} {i}", input_
        return
    chosen = {own: tests[own][:6]} if tests.get(own) else {root: pictures[:2] for root, pictures in tests.items()}
    for root, pictures in chosen.items():
        for each in pictures:
            with suppress(InputError):
                yield f"{root.name} {side} {each.path.stem}", each.read()
    for i in range(0 if own in chosen else 3):
        yield f"{BUILT_IN} {side} {i}", draw_scene(np.random.default_rng((4, 1, "AB".index(side), i)))[side]


# ----------------------------------------------------------------------------------------------------------
#  The page
# ----------------------------------------------------------------------------------------------------------

INTRODUCTION = """# Turn one kind of picture into another
A network has looked at many pictures of two kinds, horses and zebras for instance, and has learned to turn one kind
into the other. Choose what it has learned, give it a picture, and press *Translate*. The computer that serves this page
does all the work: your pictures are sent nowhere else, and are deleted within ten minutes."""
INSIDE = """The network paints several pictures, the contents. The mask of the same number says where each one is used,
white for fully, black for not at all. A mask without a content keeps your picture. The result is the sum of all."""
CSS = """
.html-container { padding: 0 !important }
#back img, #attention img { height: 100%; width: 100%; object-fit: contain }
#weights input { padding-right: 24px; text-overflow: ellipsis }
.tiles .grid-wrap { min-height: 0 }
.tiles .grid-container { grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) }
"""


def make_page(gr: Any, device: torch.device, folder: Path) -> Any:
    """The page, a ``gradio.Blocks``. ``folder`` takes the files that it offers: examples and zips."""

    def in_sentences(work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def guarded(*arguments: Any, **others: Any) -> Any:
            try:
                return work(*arguments, **others)
            except (InputError, OSError) as error:
                own = rf"{re.escape(str(folder.parent))}[\\/]\w+[\\/]"  # the visitor's file: only its name is shown
                text = re.sub(own, "", str(error))
                raise gr.Error(html.escape(text), duration=None, print_exception=False) from error

        return guarded

    def opened(where: str, file: str | None) -> Weights:
        if where == UPLOAD and not (file and Path(file).exists()):
            raise InputError("Give a file of weights first.")
        if where != UPLOAD and where not in dict(list_weights()).values():
            raise InputError("These weights are gone. Load the page again.")
        path = checkpoints.find_generator(str(file) if where == UPLOAD else where, None)
        return open_weights(str(path) if where == UPLOAD else where, device, path.stat().st_mtime_ns)

    @in_sentences
    def choose(where: str, file: str | None, direction: str | None) -> list[Any]:
        """What the other fields offer for these weights."""
        if where == UPLOAD and file is None:
            return [gr.update(visible=True), *(gr.update(choices=[], value=None),) * 2, gr.Dataset(samples=[])]
        weights = opened(where, file)
        direction = direction if direction in weights.generators else next(iter(weights.generators))
        directions = gr.update(choices=name_directions(weights), value=direction)
        sizes, best = name_sizes(weights, direction)
        shown = [gr.update(visible=where == UPLOAD), directions, gr.update(choices=sizes, value=best)]
        return [*shown, offer(where, file, direction)]

    @in_sentences
    def offer(where: str, file: str | None, direction: str) -> Any:
        weights, paths = opened(where, file), {}
        place = folder / weights.task  # of which the same files give other examples
        place.mkdir(exist_ok=True)
        for name, image in find_examples(where, weights, direction):
            paths[name] = place / f"{name}.png"
            if not paths[name].exists():
                image.thumbnail((512, 512))
                image.save(paths[name])
        return gr.Dataset(samples=[[str(path)] for path in paths.values()])

    @in_sentences
    def answer_one(where: str, file: str | None, direction: str, size: int, path: str | None) -> list[Any]:
        if path is None:
            raise InputError("Give a picture first: drop, paste or photograph one, or press an example.")
        answer = translate(opened(where, file), direction, Path(path), size, device)
        painted = None if answer.foreground is None else overlay(answer.before, answer.foreground)
        told = "These weights do not tell."
        if painted is not None:
            what = "painted anew; the rest of your picture is kept" if answer.masks else "where the network looks most"
            told = f"Orange is {what}."
        shown = [gr.update(value=image, visible=image is not None) for image in (painted, answer.back)]
        shown += [gr.update(visible=bool(answer.masks)), answer.masks, answer.contents]
        said = html.escape(answer.remark), (answer.before, answer.after), f"### Where it paints\n{told}"
        return [gr.update(visible=True), gr.update(visible=False), *said, *shown]

    bar = gr.Progress()  # gradio looks for it among the defaults

    @in_sentences
    def answer_many(
        where: str, file: str | None, direction: str, size: int, paths: list[str] | None, progress: Any = bar
    ) -> list[Any]:
        if not paths or len(paths) > MOST_PICTURES:
            raise InputError(f"Give at least one picture and at most {MOST_PICTURES}.")
        weights = opened(where, file)
        answers, remarks = [], []
        for path in progress.tqdm(paths, unit="pictures"):
            try:
                answers.append(translate(weights, direction, Path(path), size, device))
                remarks.append(answers[-1].remark)
            except InputError as error:
                remarks.append(f"Not translated: {error}")
        if not answers:
            raise InputError(" ".join(remarks))
        path = Path(tempfile.mkdtemp(dir=folder)) / "translated.zip"
        pack(answers, path)
        shown = ["<br>".join(map(html.escape, remarks)), [(a.after, a.name) for a in answers], str(path)]
        return [gr.update(visible=False), gr.update(visible=True), *shown]

    plain: dict[str, Any] = dict(format="png", interactive=False, buttons=["download", "fullscreen"])
    tiles = dict(**plain, height="auto", show_label=False, elem_classes="tiles")
    with gr.Blocks(title="Translate pictures", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                weights = gr.Dropdown(label="What it has learned (weights)", elem_id="weights")
                file = gr.File(label="Weights: AtoB.pt of a run, or an official file", visible=False, elem_id="file")
                direction = gr.Radio([], label="Direction", elem_id="direction")
                label = "Size at which the network sees it: the longer side, in pixels"
                info = f"The result has the size of your picture (at most {LARGEST})."
                size = gr.Radio([], label=label, info=info, elem_id="size")
                with gr.Tab("One picture"):
                    given = dict(type="filepath", sources=["upload", "webcam", "clipboard"], height=300, elem_id="one")
                    one = gr.Image(label="Drop, paste or photograph a picture", **given)
                    go_one = gr.Button("Translate", variant="primary", elem_id="go_one")
                    label = "Or press one of these, to see it translated"
                    examples = gr.Dataset(components=[one], samples=[], label=label, samples_per_page=18)
                with gr.Tab("Several pictures"):
                    label = f"Drop up to {MOST_PICTURES} pictures"
                    many = gr.File(label=label, file_count="multiple", height=300, elem_id="many")
                    go_many = gr.Button("Translate all", variant="primary", elem_id="go_many")
            with gr.Column():
                remark = gr.HTML("The result appears here.", elem_id="remark")
                with gr.Column(visible=False) as single:
                    gr.Markdown("### Before and after\nMove the line.")
                    slider = gr.ImageSlider(show_label=False, elem_id="answer", **plain)
                    told = gr.Markdown(elem_id="told")
                    attention = gr.Image(show_label=False, height=300, elem_id="attention", **plain)
                    gr.Markdown("### And back\nThe result, translated back: it should be your picture again.")
                    back = gr.Image(show_label=False, height=300, elem_id="back", **plain)
                    with gr.Accordion("Look inside: all masks and contents", open=False, elem_id="inside") as inside:
                        gr.Markdown(f"{INSIDE}\n#### Masks, and how much of the picture each one covers")
                        masks = gr.Gallery(**tiles)
                        gr.Markdown("#### Contents")
                        contents = gr.Gallery(**tiles)
                with gr.Column(visible=False) as several:
                    gallery = gr.Gallery(elem_id="gallery", **tiles)
                    archive = gr.File(label="All results", elem_id="archive")
        one.preprocess = lambda given: given and given.path  # our own reader decodes it, and says what is wrong

        def refresh(chosen: str | None) -> Any:
            choices = [*list_weights(), ("a file of mine", UPLOAD)]
            return gr.update(choices=choices, value=chosen or choices[0][1])

        asked, quiet = [weights, file, direction], dict(api_visibility="private", show_progress="hidden")
        page.load(refresh, weights, weights, **quiet)
        changed = [weights.change, file.upload, direction.input]
        gr.on(changed, choose, asked, [file, direction, size, examples], **quiet)
        # One at a time: a translation takes all cores.
        loud = dict(api_visibility="private", scroll_to_output=True, concurrency_id="translate")
        outputs = [single, several, remark, slider, told, attention, back, inside, masks, contents]
        go_one.click(answer_one, [*asked, size, one], outputs, **loud)
        pressed = examples.click(lambda sample: sample[0], examples, one, **quiet)
        pressed.then(answer_one, [*asked, size, one], outputs, **loud)
        go_many.click(answer_many, [*asked, size, many], [single, several, remark, gallery, archive], **loud)
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)


# ----------------------------------------------------------------------------------------------------------
#  The script
# ----------------------------------------------------------------------------------------------------------


def stay_here(host: str) -> None:
    """Let this process reach no other machine: connections and look-ups of names raise PermissionError."""
    own = {"localhost", "127.0.0.1", "::1", host, *(str(found[4][0]) for found in socket.getaddrinfo(host, 0))}

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
            target = arguments[event in ("socket.connect", "socket.sendto")]
            target = target[0] if isinstance(target, tuple) else target if event.startswith("socket.get") else None
            target = target.decode(errors="replace") if isinstance(target, bytes) else target
            if target and target not in own:
                raise PermissionError(f"{target}: this page reaches no other machine")

    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        del os.environ[name]  # gradio asks its own server whether it runs, and would ask the proxy for it
    sys.addaudithook(refuse)


def make_parser() -> utils.Parser:
    parser = utils.Parser("A page to play with trained generators in the browser.")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=utils.at_least(1), default=7860, help="port to serve at")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = make_parser().parse_args(argv)
        device = utils.pick_device(options.device)
        try:
            socket.create_server((options.host, options.port)).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--host {options.host} --port {options.port}: {error}") from error
        with tempfile.TemporaryDirectory(prefix="attentiongan_") as folder, utils.StopSignals() as stop:
            os.environ |= dict(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
            gr = utils.import_optional("gradio", "app.py", "pip install -r requirements-app.txt")
            stay_here(options.host)
            offered = Path(tempfile.mkdtemp(dir=folder))
            page = make_page(gr, device, offered)
            off = dict.fromkeys(("share", "pwa", "mcp_server", "ssr_mode", "inline", "enable_monitoring"), False)
            own = dict(quiet=True, prevent_thread_lock=True, footer_links=[], max_file_size=MOST_BYTES, css=CSS)
            theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
            page.launch(server_name=options.host, server_port=options.port, theme=theme, **off, **own)
            print(f"Open {page.local_url} in a browser. Ctrl-C ends the page.", flush=True)
            while stop.signal is None:
                time.sleep(0.2)
                for path in offered.glob("*/*.zip"):
                    if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                        path.unlink()
            page.close(verbose=False)
        return 0

    return utils.run_script("app.py", work)


if __name__ == "__main__":
    sys.exit(main())
