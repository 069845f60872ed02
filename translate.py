"""Translate your own pictures with a trained generator, or export it to ONNX.

    python translate.py --checkpoint horse2zebra_attentiongan --input photos --output out --masks
    python translate.py --checkpoint latest_net_G_A.pth --input horse.jpg --output out
    python translate.py --checkpoint horse2zebra_attentiongan --export horse2zebra.onnx

Pictures may have any size, and an output has the size of its input. A generator sees every picture in the size at
which it does best (``--size``); what it left alone is as sharp as in the input. Outputs have the names of their
inputs, and an input is never overwritten. A file that cannot be read is reported, and all others are translated. With
``--masks``, ``before_after.jpg`` shows the first pictures of a folder beside their translations.
"""

from __future__ import annotations

import utils
from utils import InputError, first_line

import argparse
import errno
import os
import sys
import threading
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from checkpoints import best_size, open_generator
from datasets import HALVES, as_input, takes_grey
from models import Generator, fixed_size_message, translate_any_size
from pictures import Picture, find_pictures, normalise, quantise, resize, scale, to_picture, to_tensor
from record import draw_sheet

MOST_SEEN = 2**20  # pixels that the generator sees in a batch: about 1 GB for the default networks
MOST_WRITTEN = 2**25  # pixels of a batch's outputs: photographs are large, however small the generator sees them
LARGEST_SIDE = {"png": 2**31 - 1, "jpg": 65_500, "webp": 16_383}  # by ending, the most pixels that a side may have
QUALITY = 95  # of JPEG and WebP
SHOWN, THUMBNAIL = 12, (224, 224)  # pictures on the sheet, and the size of each
SHEET = "before_after.jpg"
ORANGE = (255, 96, 0)
# Errors that concern the name of one file and no other file: it is too long, or a folder or file is in its place.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
AHEAD = 2  # batches that are decoded in advance, and batches that may wait to be written


class Task(NamedTuple):
    """A picture to translate, the sizes (height, width) in which the generator sees it and in which the output is
    written, and the path of the output.
    """

    picture: Picture
    size: tuple[int, int]
    output_size: tuple[int, int]
    target: Path


class Decoded(NamedTuple):
    """A picture, uint8 (channels, height, width), in both sizes of its task, and its alpha (1, height, width)."""

    seen: Tensor
    full: Tensor
    alpha: Tensor | None


# ----------------------------------------------------------------------------------------------------------
#  Inputs and outputs
# ----------------------------------------------------------------------------------------------------------


def find_inputs(source: Path, output: Path, recursive: bool) -> list[Picture]:
    """The pictures to translate: the file ``source`` or those in that folder, with ``recursive`` all below it.

    Raises InputError where there is none, where ``output`` holds ``source``, and where ``recursive`` would find
    pictures in ``output``.
    """
    if source.is_file():
        return [Picture(source)]
    if not source.is_dir():
        raise InputError(f"--input {source}: no such file or folder")
    inside = output.resolve()
    if source.resolve().is_relative_to(inside):
        raise InputError(f"--output {output}: holds the --input, expected a folder of its own")
    pictures = find_pictures(source, recursive)
    # A link to itself has no resolve(); it is named later.
    met = [p.path for p in pictures if Path(os.path.realpath(p.path)).is_relative_to(inside)]
    if met:
        raise InputError(
            f"--output {output}: lies in --input {source} and holds pictures ({met[0]}), which --recursive would "
            "translate and overwrite, expected a folder elsewhere or an empty one"
        )
    if not pictures:
        deeper = "; --recursive looks in its sub-folders, too" if any(p.is_dir() for p in source.iterdir()) else ""
        raise InputError(f"--input {source}: no pictures in it{deeper}")
    return pictures


def name_outputs(
    pictures: Sequence[Picture], source: Path, output: Path, with_masks: bool, ending: str = ".png"
) -> list[Path]:
    """The path of each picture's output: the same place and name below ``output`` as below ``source``.

    Pictures whose names differ only in the ending keep it: "a.jpg.png". Raises InputError where an output, or the
    folder of its masks, would overwrite an input, another output, or a file beside a single input.
    """
    places = [output / (p.path.name if source.is_file() else p.path.relative_to(source)) for p in pictures]
    alike = Counter(str(place.with_suffix("")).casefold() for place in places)  # some disks ignore case
    targets = [
        place.with_suffix(ending)
        if alike[str(place.with_suffix("")).casefold()] == 1
        else place.with_name(f"{place.name}{ending}")
        for place in places
    ]
    counts = Counter(str(target).casefold() for target in targets)
    for target in targets:
        if counts[str(target).casefold()] > 1:
            raise InputError(f"--input {source}: two pictures would be written to {target}; rename one")
        if source.is_file() and output.resolve() == source.parent.resolve():
            for place in (target, mask_folder(target)) if with_masks else (target,):
                if place.exists():
                    raise InputError(f"--output {output}: {place} exists already, expected a folder of its own")
    if with_masks and source.is_dir() and str(output / SHEET).casefold() in counts:
        raise InputError(f"--masks: {output / SHEET} is the sheet's, expected another name for a picture of {source}")
    # By inode, because one file can have several paths: by links, and by letter case on macOS and Windows.
    inputs = {identity(p.path) for p in pictures} - {None}
    folders = {path.parent.resolve() for path in (*targets, *(p.path for p in pictures))}
    for target in targets:
        if identity(target) in inputs:
            raise InputError(f"--output {output}: {target} is an input, expected a folder of its own")
        if with_masks and mask_folder(target).resolve() in folders:
            raise InputError(f"--masks: {mask_folder(target)} would hold the masks of {target.name} and other pictures")
    return targets


def identity(path: Path) -> tuple[int, int] | None:
    """The device and inode of a file, equal for all its paths; None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def mask_folder(target: Path) -> Path:
    return target.with_name(f"{target.stem}_masks")


def plan(
    pictures: Sequence[Picture],
    targets: Sequence[Path],
    longest: int | None,
    max_size: int | None,
    only_size: tuple[int, int] | None,
    failed: dict[Path, str],
) -> list[Task]:
    """Make the tasks from the sizes of the pictures: outputs of at most ``max_size`` pixels on their longer side.

    The generator sees a picture with ``longest`` pixels on its longer side, for None in the size of the output; with an
    ``only_size`` it sees them all in this size, whatever their shape. A picture whose size cannot be read, or be
    written in the format of its target, goes to ``failed`` with the reason.
    """
    tasks = []
    for picture, target in zip(pictures, targets, strict=True):
        try:
            height, width = picture.size()
            output_size = height, width // 2 if picture.half else width
            if not output_size[1]:
                raise ValueError(f"{width} pixel wide, too narrow to be halved")
            if max_size is not None and max(output_size) > max_size:
                output_size = scale(output_size, max_size)
            seen = output_size if longest is None else scale(output_size, longest)
            if max(output_size) > (most := LARGEST_SIDE[target.suffix[1:]]):
                raise ValueError(f"{target.suffix[1:]} has at most {most} pixels a side, expected --max_size {most}")
            tasks.append(Task(picture, only_size or seen, output_size, target))
        except Exception as error:  # decoders raise what they like
            failed[picture.path] = first_line(error)
    return tasks


def make_batches(tasks: Sequence[Task], batch_size: int) -> list[list[Task]]:
    """Batches of one size, of at most ``batch_size`` pictures, but at least one; see ``MOST_SEEN``, ``MOST_WRITTEN``.

    The largest pictures come last, so that all others are done if these run out of memory.
    """
    groups = defaultdict(list)
    for task in tasks:
        groups[task.size].append(task)
    batches = []
    for (height, width), group in sorted(groups.items(), key=lambda item: item[0][0] * item[0][1]):
        largest = max(task.output_size[0] * task.output_size[1] for task in group)
        n = max(1, min(batch_size, MOST_SEEN // (height * width), MOST_WRITTEN // largest))
        batches += [group[i : i + n] for i in range(0, len(group), n)]
    return batches


# ----------------------------------------------------------------------------------------------------------
#  Translating
# ----------------------------------------------------------------------------------------------------------


def decode(task: Task, channels: int, keep_alpha: bool) -> Decoded | str:
    """The picture of a task, or the reason why it cannot be read."""
    try:
        image = task.picture.open(channels)
        full = to_tensor(fit(image, task.output_size))
        seen = full if task.size == task.output_size else to_tensor(fit(image, task.size))
        alpha = task.picture.alpha() if keep_alpha else None
        return Decoded(seen, full, None if alpha is None else to_tensor(fit(alpha, task.output_size)))
    except Exception as error:  # decoders raise what they like
        return first_line(error)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size[::-1] else resize(image, size, "squash")


def ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``map(work, items)`` in the pool, at most ``AHEAD`` items in advance."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Painted(NamedTuple):
    """What a generator made of one picture; all uint8, because what waits to be written so takes less memory.

    image: (channels, h, w). foreground: (1, h, w), see ``models.Translation``; None where the generator has none.
    background: (1, h, w), how much of the input is kept at each place; None where nothing is. masks: (n, h, w) and
    contents: (m, channels, h, w), [] where they are not asked for.
    """

    image: Tensor
    foreground: Tensor | None
    background: Tensor | None
    masks: Sequence[Tensor] = ()
    contents: Sequence[Tensor] = ()


def translate_batch(
    generator: Generator, images: Tensor, device: torch.device, autocast: Callable[[], Any], with_masks: bool
) -> list[Painted | str]:
    """Translate a uint8 batch (B, channels, H, W); for each picture the result, or the reason why there is none.

    A batch that runs out of memory is tried again picture by picture.
    """
    try:
        batch = normalise(images.to(device)).contiguous(memory_format=utils.pick_layout(device))
        with autocast():
            made = translate_any_size(generator, batch)
        n, foreground = len(images), made.foreground

        def split(part: Tensor | None, low: float = 0.0) -> list[Any]:
            """A part of each picture, from [low, 1] to 8 bits."""
            return [None] * n if part is None else [*quantise((part.float() - low) / (1 - low) * 2 - 1).cpu()]

        background = None if foreground is None or made.attention is None else 1 - foreground
        shown = [split(made.image, -1), split(foreground), split(background)]
        if with_masks and made.attention is not None and made.content is not None:
            shown += [split(made.attention), split(made.content, -1)]
        return [Painted(*parts) for parts in zip(*shown, strict=True)]
    except (MemoryError, RuntimeError) as error:
        if not utils.is_out_of_memory(error):
            raise
    if len(images) == 1:
        return [f"out of memory at {images.shape[-1]} x {images.shape[-2]} pixels; --size or --max_size shrink"]
    singles = (translate_batch(generator, image[None], device, autocast, with_masks) for image in images)
    return [result for results in singles for result in results]


def to_full_size(painted: Painted, decoded: Decoded) -> Tensor:
    """The output, uint8 (channels, H, W), in the full size of a picture.

    Where the generator saw another size, what it painted is resized, and what it kept comes from the input.
    """
    if decoded.seen.shape == decoded.full.shape:
        return painted.image
    kept = torch.zeros_like(painted.image[:1]) if painted.background is None else painted.background
    added = normalise(painted.image) - kept / 255 * normalise(decoded.seen)

    def enlarge(channel: Tensor) -> Tensor:
        return F.interpolate(channel[None, None], decoded.full.shape[-2:], mode="bicubic", antialias=True)[0, 0]

    kept = enlarge(kept[0] / 255)
    # One channel after another: a photograph in float32 is large.
    channels = zip(added, decoded.full, strict=True)
    return torch.stack([quantise(enlarge(new) + kept * normalise(full)) for new, full in channels])


def save(image: Image.Image, path: Path) -> None:
    """Write a picture. ``path`` is complete or not there, also when this process is killed."""
    # Of this process and thread, and not longer for a long name.
    partial = path.with_name(f".partial.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        image.save(partial, quality=QUALITY)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write(task: Task, decoded: Decoded, painted: Painted, with_masks: bool, shown: bool) -> dict[str, Image.Image]:
    """Write the output, and with ``with_masks`` the folder ``<name>_masks`` beside it.

    The folder has ``attention.png``, the foreground; ``overlay.png``, the input in grey with the foreground in orange;
    and every mask and content in the size in which the generator saw the picture. Returns the thumbnails by column of
    what is ``shown`` on the sheet.
    """
    output = to_picture(to_full_size(painted, decoded))
    pictures = {"input": to_picture(decoded.full), "translation": output}
    if painted.foreground is not None:
        pictures["attention"] = fit(to_picture(painted.foreground), task.output_size)
    thumbnails = {name: ImageOps.pad(image, THUMBNAIL, color="white") for name, image in pictures.items() if shown}
    if decoded.alpha is not None:  # what was laid on white is taken off it again, else edges would be whitened twice
        colours = 255 - (255 - to_tensor(output)) * (255 / decoded.alpha.clamp(min=1))
        output = to_picture(colours.round().clamp(0, 255).to(torch.uint8))
        output.putalpha(to_picture(decoded.alpha))
    task.target.parent.mkdir(parents=True, exist_ok=True)
    save(output, task.target)
    if not with_masks:
        return thumbnails
    folder = mask_folder(task.target)
    folder.mkdir(exist_ok=True)
    for pattern in ("attention.png", "overlay.png", "mask_??.png", "content_??.png"):  # of an earlier generator
        for path in folder.glob(pattern):
            path.unlink()
    if "attention" in pictures:
        save(pictures["attention"], folder / "attention.png")
        save(overlay(pictures["input"], pictures["attention"]), folder / "overlay.png")
    for i, mask in enumerate(painted.masks, 1):
        save(to_picture(mask[None]), folder / f"mask_{i:02d}.png")
    for i, content in enumerate(painted.contents, 1):
        save(to_picture(content), folder / f"content_{i:02d}.png")
    return thumbnails


def overlay(picture: Image.Image, foreground: Image.Image) -> Image.Image:
    """The picture in grey, and the foreground over it in orange."""
    orange = Image.new("RGB", picture.size, ORANGE)
    return Image.composite(orange, picture.convert("L").convert("RGB"), foreground.point(lambda value: 0.7 * value))


@torch.inference_mode()
def translate(
    generator: Generator,
    batches: Sequence[Sequence[Task]],
    device: torch.device,
    autocast: Callable[[], Any],
    failed: dict[Path, str],
    with_masks: bool = False,
    keep_alpha: bool = False,
    shown: Container[Path] = (),
) -> dict[Path, dict[str, Image.Image]]:
    """Translate and write all batches; threads decode and write while the generator works.

    A picture that cannot be decoded, does not fit in memory, or whose output's name cannot be written goes to
    ``failed`` with the reason. Raises OSError for other errors of writing, such as a full disk. Returns the thumbnails
    of the pictures that are ``shown`` (see ``write``).
    """
    channels = generator.settings["channels"]
    generator.to(device).to(memory_format=utils.pick_layout(device))
    writing: deque[tuple[Task, Future]] = deque()
    thumbnails: dict[Path, dict[str, Image.Image]] = {}

    def finish() -> None:
        task, written = writing.popleft()
        try:
            if columns := written.result():
                thumbnails[task.picture.path] = columns
        except OSError as error:
            if error.errno not in NAME_ERRORS:
                raise OSError(f"{task.target}: could not be written ({error})") from error
            failed[task.picture.path] = str(error)
        except (MemoryError, RuntimeError) as error:
            if not utils.is_out_of_memory(error):
                raise
            height, width = task.output_size
            failed[task.picture.path] = f"out of memory while writing {height} x {width} pixels; --max_size shrinks"

    def read(batch: Sequence[Task]) -> tuple[list[Task], list[Decoded]]:
        """The tasks whose pictures can be decoded."""
        tried = [(task, decode(task, channels, keep_alpha)) for task in batch]
        failed.update((task.picture.path, found) for task, found in tried if isinstance(found, str))
        return [t for t, found in tried if isinstance(found, Decoded)], [d for _, d in tried if isinstance(d, Decoded)]

    with (
        ThreadPoolExecutor(2) as readers,
        ThreadPoolExecutor(2) as writers,
        utils.Progress(total=sum(map(len, batches)), desc="translating", unit="picture") as bar,
    ):
        for tasks, decoded in ahead(readers, read, batches):
            seen = [picture.seen for picture in decoded]
            results = translate_batch(generator, torch.stack(seen), device, autocast, with_masks) if seen else []
            for task, picture, result in zip(tasks, decoded, results, strict=True):
                if isinstance(result, str):
                    failed[task.picture.path] = result
                else:
                    on_sheet = task.picture.path in shown
                    writing.append((task, writers.submit(write, task, picture, result, with_masks, on_sheet)))
            while len(writing) > AHEAD * len(tasks):
                finish()
            bar.update(len(tasks))
        while writing:
            finish()
    return thumbnails


def draw_thumbnails(thumbnails: Mapping[Path, Mapping[str, Image.Image]]) -> Image.Image:
    """A sheet with a row for each picture, in the order of their paths."""
    rows = [thumbnails[path] for path in sorted(thumbnails)]
    columns = {name: torch.stack([normalise(to_tensor(row[name])) for row in rows]) for name in rows[0]}
    return draw_sheet(columns, rows=[path.name for path in sorted(thumbnails)])


# ----------------------------------------------------------------------------------------------------------
#  ONNX
# ----------------------------------------------------------------------------------------------------------


def luminance(image: Tensor) -> Tensor:
    """The luminance of RGB in [0, 1], (B, 3, H, W), in every channel: of the 8-bit picture, and equal to Pillow's."""
    weights = image.new_tensor([19595, 38470, 7471]).view(3, 1, 1)  # of 2**16; float32 holds all sums exactly
    grey = (((255 * image).round() * weights).sum(dim=1, keepdim=True) + 2**15).div(2**16).floor() / 255
    return grey.expand_as(image)


class OnUnitRange(nn.Module):
    """A generator for pictures of any size in [0, 1]: (B, channels, H, W) to the same.

    With ``grey`` the generator gets the luminance of the pictures (see ``takes_grey``). Returns the translation and,
    where the generator has it, the foreground attention or heat map, (B, 1, H, W) in [0, 1].
    """

    def __init__(self, generator: Generator, grey: bool = False):
        super().__init__()
        self.generator, self.grey = generator, grey

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        if self.grey:
            image = luminance(image)
        translation = translate_any_size(self.generator, 2 * image - 1)
        parts = ((translation.image + 1) / 2, translation.foreground)
        return tuple(part for part in parts if part is not None)


def export(generator: Generator, path: Path, grey: bool) -> None:
    """Write ``OnUnitRange(generator, grey)`` as ONNX, for any batch, height and width.

    Of a generator that takes only one size, only the batch is free. The input is "image"; the outputs are "translation"
    and, where the generator has it, "attention". Raises InputError when onnx or onnxscript is not installed.
    """
    utils.import_optional("onnx", "--export")
    utils.import_optional("onnxscript", "--export")
    only_size = generator.settings.get("size")
    # Sizes that are no multiples, so that the exporter sees the padding and takes no size for a constant.
    example = torch.rand(2, generator.settings["channels"], *(only_size or (62, 74)))
    free = {0: "batch"} if only_size else {0: "batch", 2: "height", 3: "width"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come from inside the exporter
        wrapped = OnUnitRange(generator, grey).eval()
        outputs = ["translation", "attention"][: len(wrapped(example))]
        torch.onnx.export(
            wrapped,
            (example,),
            path,
            input_names=["image"],
            output_names=outputs,
            dynamic_shapes=(free,),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


# ----------------------------------------------------------------------------------------------------------
#  The script
# ----------------------------------------------------------------------------------------------------------


def size(text: str) -> int:
    return 0 if text == "native" else utils.at_least(8)(text)


def make_parser() -> utils.Parser:
    parser = utils.Parser("Translate pictures with a trained generator, or export it to ONNX.")
    add = parser.add_argument
    weights = "a run, shipped weights, a folder or a generator file, also an official one"
    add("--checkpoint", required=True, help=weights)
    way = "which way to translate (default: the file's own, else AtoB, else BtoA)"
    add("--direction", choices=("AtoB", "BtoA"), help=way)
    add("--input", type=Path, help="a picture, or a folder of pictures")
    add("--output", type=Path, help="folder for the translations")
    deeper = "also the pictures in sub-folders; the output gets the same sub-folders"
    add("--recursive", action="store_true", help=deeper)
    masks = "also write attention, overlay, every mask and content to NAME_masks, and a sheet of the folder"
    add("--masks", action="store_true", help=masks)
    seen = "the generator sees pictures with N pixels on their longer side, and the output is brought back to the "
    seen += "input's size; native: it sees them as they are (default: where it does best, else its training size)"
    add("--size", type=size, metavar="N|native", help=seen)
    max_size = "shrink pictures whose longer side is longer than this; the translations are as small"
    add("--max_size", type=utils.at_least(1), help=max_size)
    half = "for pictures that hold A and B side by side: the half to translate (auto: the input's, where the weights "
    half += "were trained on such pictures and all of these look like them)"
    add("--half", choices=("auto", "left", "right", "none"), default="auto", help=half)
    add("--format", choices=LARGEST_SIDE, default="png", help="of the translations")
    add("--keep_alpha", action="store_true", help="keep transparency, which otherwise is laid on white")
    precision = "auto: bf16 where the hardware multiplies it natively, else float32"
    add("--precision", choices=("auto", "float32", "bf16"), default="auto", help=precision)
    batch_size = "pictures of one size that are translated at once, fewer of large ones (default: 8)"
    add("--batch_size", type=utils.at_least(1), help=batch_size)
    model = "write the generator as ONNX instead; pictures are RGB in [0, 1]"
    add("--export", type=Path, metavar="MODEL.onnx", help=model)
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not fit together."""
    if options.export is not None:
        defaults = vars(make_parser().parse_args(["--checkpoint", options.checkpoint]))
        used = "checkpoint", "direction", "export"
        others = [name for name, value in vars(options).items() if name not in used and value != defaults[name]]
        if others:
            raise InputError(f"--export writes a model, --{others[0]} is for translating; expected one of the two")
        if options.export.suffix != ".onnx" or not options.export.parent.is_dir():
            raise InputError(f"--export {options.export}: expected a name ending in .onnx, in a folder that exists")
    elif options.input is None or options.output is None:
        raise InputError("expected --input and --output, or --export")
    elif options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output {options.output}: is a file, expected a folder")
    if options.keep_alpha and options.format == "jpg":
        raise InputError("--keep_alpha: --format jpg has no transparency, expected png or webp")


def choose_half(pictures: Sequence[Picture], half: str, about: Mapping[str, Any]) -> list[Picture]:
    """The half of each picture that ``--half`` means (see there)."""
    if half == "auto":
        pairs = count_pairs(pictures, about) if about.get("halves") else 0
        half, what = "none", "all of each (--half left or right: a half of each)"
        if pairs == len(pictures):
            half = HALVES[about["direction"][0]]
            what = f"the {half} halves (--half none: all of each)"
        if pairs:
            print(f"{pairs} of {len(pictures)} pictures look like two side by side: translating {what}")
    return [picture if half == "none" else picture._replace(half=half) for picture in pictures]


def count_pairs(pictures: Sequence[Picture], about: Mapping[str, Any]) -> int:
    """How many pictures are about twice as wide as those of training; all, where all that can be read are."""
    trained = about.get("options", {})
    wanted = 2 * trained.get("img_width", 256) / trained.get("img_height", 256)
    aspects = []
    for picture in pictures:
        with suppress(Exception):  # decoders raise what they like; ``plan`` names the picture
            height, width = picture.size()
            aspects.append(width / height)
    pairs = sum(0.8 < aspect / wanted < 1.25 for aspect in aspects)
    return len(pictures) if aspects and pairs == len(aspects) else pairs


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = make_parser().parse_args(argv)
        check_options(options)
        device = utils.pick_device(options.device)
        generator, about = open_generator(options.checkpoint, options.direction)
        generator.eval()
        only_size = generator.settings.get("size")
        if only_size and options.size not in (None, max(only_size)):
            raise InputError(f"--size: {fixed_size_message(only_size)}")
        task = about.get("options", {}).get("task", "translation")
        if options.export is not None:
            export(generator, options.export, takes_grey(task, about["direction"]))
            sizes = "height and width" if only_size is None else f"pictures of {only_size[0]} x {only_size[1]}"
            print(f"{options.export}: image to translation, values in [0, 1], any batch, {sizes}")
            return 0
        probe = torch.zeros(1, generator.settings["channels"], *(only_size or (1, 1)))
        if options.masks and all(part is None for part in translate_any_size(generator, probe)[1:]):
            raise InputError(f"--masks: {options.checkpoint} holds a {type(generator).__name__}, which has none")
        found = find_inputs(options.input, options.output, options.recursive)
        pictures = [as_input(picture.path, task, about["direction"]) for picture in found]
        pictures = choose_half(pictures, options.half, about)
        targets = name_outputs(pictures, options.input, options.output, options.masks, f".{options.format}")
        longest = best_size(about) if options.size is None else options.size or None
        failed: dict[Path, str] = {}
        tasks = plan(pictures, targets, longest, options.max_size, only_size, failed)
        shown = [picture.path for picture in pictures[:SHOWN]] if options.masks and options.input.is_dir() else []
        with utils.lock_folder(options.output, "choose another --output"):
            try:
                thumbnails = translate(
                    generator,
                    make_batches(tasks, options.batch_size or 8),
                    device,
                    utils.make_autocast(device, options.precision),
                    failed,
                    options.masks,
                    options.keep_alpha,
                    shown,
                )
                if thumbnails:
                    save(draw_thumbnails(thumbnails), options.output / SHEET)
            finally:
                for path, reason in failed.items():
                    print(f"not translated: {path}: {reason}", file=sys.stderr)
        done, direction = len(pictures) - len(failed), about["direction"]
        print(f"{done} of {len(pictures)} pictures translated ({direction}) into {options.output}")
        if any(task.size != task.output_size for task in tasks):
            seen = f"{only_size[0]} x {only_size[1]}, its only size" if only_size else f"{longest} pixels (--size)"
            most = f", at most {options.max_size} pixels (--max_size)" if options.max_size else ""
            print(f"the generator saw them at {seen}; outputs have the size of their inputs{most}")
        return 1 if failed else 0

    return utils.run_script("translate.py", work)


if __name__ == "__main__":
    sys.exit(main())
