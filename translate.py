"""Translate your own pictures with a trained generator, or export it to ONNX.

    python translate.py --checkpoint horse2zebra_attentiongan --input photos --output out --masks
    python translate.py --checkpoint latest_net_G_A.pth --input horse.jpg --output out
    python translate.py --checkpoint horse2zebra_attentiongan --export horse2zebra.onnx

Pictures may have any size; an output has the size of its input, unless ``--max_size`` shrinks it. Outputs are PNG files
with the names of their inputs. An input is never overwritten. A file that cannot be read is reported, and all others
are translated.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import threading
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import utils
from checkpoints import open_generator
from datasets import TASKS, Picture, as_input, find_pictures, normalise, quantise, resize, takes_grey, to_tensor
from models import Generator, Translation, fixed_size_message, translate_any_size
from utils import InputError

MOST_PIXELS = 2**20  # in a batch: about 1 GB for the default networks
# Errors that concern the name of one file and no other file: it is too long, or a folder or file is in its place.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
AHEAD = 2  # batches that are decoded in advance, and batches that may wait to be written


class Task(NamedTuple):
    """A picture to translate, the size (height, width) at which it is translated, and the path of the output."""

    picture: Picture
    size: tuple[int, int]
    target: Path


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


def name_outputs(pictures: Sequence[Picture], source: Path, output: Path, with_masks: bool) -> list[Path]:
    """The path of each picture's output: the same place and name below ``output`` as below ``source``, as PNG.

    Pictures whose names differ only in the ending keep it: "a.jpg.png". Raises InputError where an output, or the
    folder of its masks, would overwrite an input, another output, or a file beside a single input.
    """
    places = [output / (p.path.name if source.is_file() else p.path.relative_to(source)) for p in pictures]
    alike = Counter(str(place.with_suffix("")).casefold() for place in places)  # some disks ignore case
    targets = [
        place.with_suffix(".png")
        if alike[str(place.with_suffix("")).casefold()] == 1
        else place.with_name(f"{place.name}.png")
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
    max_size: int | None,
    only_size: tuple[int, int] | None,
    failed: dict[Path, str],
) -> list[Task]:
    """Make the tasks from the sizes of the pictures.

    A picture whose size cannot be read, or is not ``only_size``, goes to ``failed`` with the reason.
    """
    tasks = []
    for picture, target in zip(pictures, targets, strict=True):
        try:
            height, width = picture.size()
        except Exception as error:  # decoders raise what they like
            failed[picture.path] = str(error) or type(error).__name__
            continue
        if max_size is not None and max(height, width) > max_size:
            scale = max_size / max(height, width)
            height, width = max(1, round(scale * height)), max(1, round(scale * width))
        if only_size is not None and (height, width) != only_size:
            failed[picture.path] = f"picture of {height} x {width} pixels: {fixed_size_message(only_size)}"
            continue
        tasks.append(Task(picture, (height, width), target))
    return tasks


def make_batches(tasks: Sequence[Task], batch_size: int) -> list[list[Task]]:
    """Batches of one size, with at most ``batch_size`` pictures and ``MOST_PIXELS`` pixels, but at least one picture.

    The largest pictures come last, so that all others are done if these run out of memory.
    """
    groups = defaultdict(list)
    for task in tasks:
        groups[task.size].append(task)
    batches = []
    for (height, width), group in sorted(groups.items(), key=lambda item: item[0][0] * item[0][1]):
        n = max(1, min(batch_size, MOST_PIXELS // (height * width)))
        batches += [group[i : i + n] for i in range(0, len(group), n)]
    return batches


# ----------------------------------------------------------------------------------------------------------
#  Translating
# ----------------------------------------------------------------------------------------------------------


def decode(task: Task, channels: int) -> Tensor | str:
    """The picture, uint8 (channels, height, width), or the reason why it cannot be read."""
    try:
        image = task.picture.open(channels)
        return to_tensor(image if image.size == task.size[::-1] else resize(image, task.size, "squash"))
    except Exception as error:  # decoders raise what they like
        return str(error) or type(error).__name__


def ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``map(work, items)`` in the pool, at most ``AHEAD`` items in advance."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def translate_batch(generator: Generator, images: Tensor, device: torch.device, with_masks: bool) -> list[Any]:
    """Translate a uint8 batch (B, channels, H, W): for each picture the uint8 parts for ``write``, or a reason (str).

    A batch that runs out of memory is tried again picture by picture.
    """
    try:
        translation = translate_any_size(generator, normalise(images.to(device)))
        image = quantise(translation.image).cpu()
        if not with_masks:
            return [Translation(i) for i in image]
        # In uint8, what waits to be written takes a quarter of the memory. quantise takes [-1, 1].
        shares = {"attention": translation.attention, "heat_map": translation.heat_map}
        parts = {name: 2 * share - 1 for name, share in shares.items() if share is not None}
        if translation.content is not None:
            parts["content"] = translation.content
        parts = {name: quantise(part).cpu() for name, part in parts.items()}
        return [Translation(i, **{name: part[k] for name, part in parts.items()}) for k, i in enumerate(image)]
    except (MemoryError, RuntimeError) as error:
        if not utils.is_out_of_memory(error):
            raise
    if len(images) == 1:
        return [f"out of memory at {images.shape[-1]} x {images.shape[-2]} pixels; --max_size shrinks"]
    return [result for image in images for result in translate_batch(generator, image[None], device, with_masks)]


def save(picture: Tensor, path: Path) -> None:
    """Write a uint8 picture as PNG. ``path`` is complete or not there, also when this process is killed."""
    # Of this process and thread, and not longer for a long name.
    partial = path.with_name(f".partial.{os.getpid()}.{threading.get_ident()}.png")
    try:
        to_pil_image(picture).save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write(target: Path, translation: Translation) -> None:
    """Write the picture to ``target``, and masks and contents, if any, to the folder ``<name>_masks`` beside it.

    All parts are uint8. ``attention.png`` is 1 minus the last mask where this is the background (there are fewer
    contents than masks), or the heat map of a generator that has one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    save(translation.image, target)
    if all(part is None for part in translation[1:]):
        return
    folder = mask_folder(target)
    folder.mkdir(exist_ok=True)
    for pattern in ("attention.png", "mask_??.png", "content_??.png"):  # of an earlier generator
        for path in folder.glob(pattern):
            path.unlink()
    if translation.heat_map is not None:
        save(translation.heat_map, folder / "attention.png")
    if translation.attention is None or translation.content is None:
        return
    if len(translation.content) < len(translation.attention):
        save(255 - translation.attention[-1:], folder / "attention.png")
    for i, mask in enumerate(translation.attention, 1):
        save(mask[None], folder / f"mask_{i:02d}.png")
    for i, content in enumerate(translation.content, 1):
        save(content, folder / f"content_{i:02d}.png")


@torch.inference_mode()
def translate(
    generator: Generator,
    batches: Sequence[Sequence[Task]],
    device: torch.device,
    with_masks: bool,
    failed: dict[Path, str],
) -> None:
    """Translate and write all batches; threads decode and write while the generator works.

    A picture that cannot be decoded, does not fit in memory, or whose output's name cannot be written goes to
    ``failed`` with the reason. Raises OSError for other errors of writing, such as a full disk.
    """
    channels = generator.settings["channels"]
    writing: deque[tuple[Task, Future]] = deque()

    def finish() -> None:
        task, written = writing.popleft()
        try:
            written.result()
        except OSError as error:
            if error.errno not in NAME_ERRORS:
                raise OSError(f"{task.target}: could not be written ({error})") from error
            failed[task.picture.path] = str(error)

    with (
        ThreadPoolExecutor(2) as readers,
        ThreadPoolExecutor(2) as writers,
        tqdm(total=sum(map(len, batches)), unit="picture", disable=None) as bar,
    ):
        for batch, decoded in ahead(readers, lambda b: (b, [decode(task, channels) for task in b]), batches):
            good = [(task, image) for task, image in zip(batch, decoded, strict=True) if isinstance(image, Tensor)]
            failed.update((t.picture.path, d) for t, d in zip(batch, decoded, strict=True) if isinstance(d, str))
            if good:
                results = translate_batch(generator, torch.stack([i for _, i in good]), device, with_masks)
                for (task, _), result in zip(good, results, strict=True):
                    if isinstance(result, str):
                        failed[task.picture.path] = result
                    else:
                        writing.append((task, writers.submit(write, task.target, result)))
            while len(writing) > AHEAD * len(batch):
                finish()
            bar.update(len(batch))
        while writing:
            finish()


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


def make_parser() -> utils.Parser:
    parser = utils.Parser("Translate pictures with a trained generator, or export it to ONNX.")
    add = parser.add_argument
    add(
        "--checkpoint", required=True, help="a run, shipped weights, a folder or a generator file, also an official one"
    )
    add(
        "--direction",
        choices=("AtoB", "BtoA"),
        help="which way to translate (default: the file's own, else AtoB, else BtoA)",
    )
    add("--input", type=Path, help="a picture, or a folder of pictures")
    add("--output", type=Path, help="folder for the translations")
    add(
        "--recursive",
        action="store_true",
        help="also the pictures in sub-folders; the output gets the same sub-folders",
    )
    masks = "also write every mask and content, or the heat map, to NAME_masks beside NAME.png"
    add("--masks", action="store_true", help=masks)
    batch_size = "pictures of one size that are translated at once, fewer of large ones (default: 8)"
    add("--batch_size", type=utils.at_least(1), help=batch_size)
    max_size = "shrink pictures whose longer side is longer than this; the translations are as small. A default "
    max_size += "generator needs about 1.1 kB of memory per pixel of a batch: 13 GB for one picture of 4000 x 3000"
    add("--max_size", type=utils.at_least(1), help=max_size)
    model = "write the generator as ONNX instead; pictures are RGB in [0, 1]"
    add("--export", type=Path, metavar="MODEL.onnx", help=model)
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not fit together."""
    if options.export is not None:
        others = [n for n in ("input", "output", "masks", "recursive", "max_size", "batch_size") if getattr(options, n)]
        if others:
            raise InputError(f"--export writes a model, --{others[0]} is for translating; expected one of the two")
        if options.export.suffix != ".onnx" or not options.export.parent.is_dir():
            raise InputError(f"--export {options.export}: expected a name ending in .onnx, in a folder that exists")
    elif options.input is None or options.output is None:
        raise InputError("expected --input and --output, or --export")
    elif options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output {options.output}: is a file, expected a folder")


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = make_parser().parse_args(argv)
        check_options(options)
        device = utils.pick_device(options.device)
        generator, about = open_generator(options.checkpoint, options.direction)
        generator.eval()
        only_size = generator.settings.get("size")
        task = about.get("options", {}).get("task", TASKS[0])
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
        targets = name_outputs(pictures, options.input, options.output, options.masks)
        failed: dict[Path, str] = {}
        batches = make_batches(plan(pictures, targets, options.max_size, only_size, failed), options.batch_size or 8)
        try:
            translate(generator.to(device), batches, device, options.masks, failed)
        finally:
            for path, reason in failed.items():
                print(f"not translated: {path}: {reason}", file=sys.stderr)
        print(f"{len(pictures) - len(failed)} of {len(pictures)} pictures translated into {options.output}")
        return 1 if failed else 0

    return utils.run_script("translate.py", work)


if __name__ == "__main__":
    sys.exit(main())
