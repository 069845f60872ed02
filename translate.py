"""Translate your own pictures with a trained generator, or export it to ONNX.

    python translate.py --checkpoint horse2zebra_attentiongan --input photos --output out --masks
    python translate.py --checkpoint latest_net_G_A.pth --input horse.jpg --output out
    python translate.py --checkpoint horse2zebra_attentiongan --export horse2zebra.onnx

Pictures of any size: each output has its input's. They are written as PNG under their inputs' names, an input is never
overwritten, and a file that cannot be read is reported while all others are done.
"""

from __future__ import annotations

import argparse
import errno
import sys
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
from models import Translation, fixed_size_message, translate_any_size
from utils import InputError, print0

MOST_PIXELS = 2**20  # in a batch: about 1 GB for the default networks
# What says that one file cannot be written, and nothing of the others: too long a name, a folder or file in its place.
OF_THIS_NAME = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
AHEAD = 2  # batches that are decoded, and that may wait to be written, while the generator works


class Task(NamedTuple):
    """A picture to translate, its size (height, width) on the way through the generator, and the output's path."""

    picture: Picture
    size: tuple[int, int]
    target: Path


# ----------------------------------------------------------------------------------------------------------
#  What to do
# ----------------------------------------------------------------------------------------------------------


def find_inputs(source: Path, output: Path, recursive: bool) -> list[Picture]:
    """The pictures to translate: ``source`` itself, or those in it, ``recursive`` below it.

    Raises InputError where there is none, and where ``recursive`` would meet the pictures of an earlier output.
    """
    if source.is_file():
        return [Picture(source)]
    if not source.is_dir():
        raise InputError(f"--input {source}: no such file or folder")
    inside = output.resolve()
    if source.resolve().is_relative_to(inside):
        raise InputError(f"--output {output}: holds the --input, expected a folder of its own")
    pictures = find_pictures(source, recursive)
    met = [p.path for p in pictures if p.path.resolve().is_relative_to(inside)]
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
    """An output for each picture: its place below ``source``, as PNG.

    Where two pictures differ in their ending alone, the whole name stays ("a.jpg.png"). InputError when an output, or
    a mask beside it, would overwrite an input or another output.
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
                    raise InputError(f"--output {output}: {place} stands there already, expected a folder of its own")
    # Files are compared, not paths: links and letter case give one file several.
    inputs = {identity(p.path) for p in pictures} - {None}
    folders = {path.parent.resolve() for path in (*targets, *(p.path for p in pictures))}
    for target in targets:
        if identity(target) in inputs:
            raise InputError(f"--output {output}: {target} is an input, expected a folder of its own")
        if with_masks and mask_folder(target).resolve() in folders:
            raise InputError(f"--masks: {mask_folder(target)} would hold the masks of {target.name} and other pictures")
    return targets


def identity(path: Path) -> tuple[int, int] | None:
    """What tells an existing file from all others; None where there is none."""
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
    """Read the sizes; what cannot be read, or is not of the ``only_size``, goes to ``failed`` with the reason."""
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
    """Equal sizes together, at most ``batch_size`` pictures and, but for single ones, ``MOST_PIXELS`` pixels.

    The largest pictures come last: what runs out of memory then costs no other its turn.
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
#  Doing it
# ----------------------------------------------------------------------------------------------------------


def decode(task: Task, channels: int) -> Tensor | str:
    """uint8 (channels, height, width), or why there is none."""
    try:
        image = task.picture.open(channels)
        return to_tensor(image if image.size == task.size[::-1] else resize(image, task.size, "squash"))
    except Exception as error:  # decoders raise what they like
        return str(error) or type(error).__name__


def ahead(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``map(work, items)`` in the pool, ``AHEAD`` items in advance and no more."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def translate_batch(generator: nn.Module, images: Tensor, device: torch.device, with_masks: bool) -> list[Any]:
    """For each picture of a uint8 batch (B, channels, H, W) what ``write`` takes, or why there is nothing.

    A batch that runs out of memory is tried again picture by picture.
    """
    try:
        translation = translate_any_size(generator, normalise(images.to(device)))
        image = quantise(translation.image).cpu()
        if not with_masks:
            return [Translation(i) for i in image]
        # quantise takes [-1, 1]; uint8 is a quarter of what would wait in memory to be written.
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


def write(target: Path, translation: Translation) -> None:
    """The picture to ``target``; masks and contents, where there are any, to the folder ``<name>_masks`` beside it.

    All parts are uint8. Unless every mask has a content, the last is the background and ``attention.png`` the rest; of
    a generator with a heat map ``attention.png`` is that.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(translation.image).save(target)
    if all(part is None for part in translation[1:]):
        return
    folder = mask_folder(target)
    folder.mkdir(exist_ok=True)
    for pattern in ("attention.png", "mask_??.png", "content_??.png"):  # another generator's may lie there
        for path in folder.glob(pattern):
            path.unlink()
    if translation.heat_map is not None:
        to_pil_image(translation.heat_map).save(folder / "attention.png")
    if translation.attention is None or translation.content is None:
        return
    if len(translation.content) < len(translation.attention):
        to_pil_image(255 - translation.attention[-1:]).save(folder / "attention.png")
    for i, mask in enumerate(translation.attention, 1):
        to_pil_image(mask[None]).save(folder / f"mask_{i:02d}.png")
    for i, content in enumerate(translation.content, 1):
        to_pil_image(content).save(folder / f"content_{i:02d}.png")


@torch.inference_mode()
def translate(
    generator: nn.Module,
    batches: Sequence[Sequence[Task]],
    device: torch.device,
    with_masks: bool,
    failed: dict[Path, str],
) -> None:
    """Translate and write every batch; decoding and writing run beside the generator.

    What cannot be decoded, does not fit in memory or has a name that cannot be written to goes to ``failed``. Raises
    OSError when no file can be written: the disk is full, say.
    """
    channels = generator.settings["channels"]
    writing: deque[tuple[Task, Future]] = deque()

    def finish() -> None:
        task, written = writing.popleft()
        try:
            written.result()
        except OSError as error:
            if error.errno not in OF_THIS_NAME:
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
    """RGB in [0, 1], (B, 3, H, W), taken to 8 bits, to its luminance in every channel: Pillow's, to the last bit."""
    weights = image.new_tensor([19595, 38470, 7471]).view(3, 1, 1)  # of 2**16; float32 holds all sums exactly
    grey = (((255 * image).round() * weights).sum(dim=1, keepdim=True) + 2**15).div(2**16).floor() / 255
    return grey.expand_as(image)


class OnUnitRange(nn.Module):
    """A generator from [0, 1] to [0, 1], on pictures of any size: (B, channels, H, W) to the same.

    With ``grey`` it sees the luminance of the pictures (see ``takes_grey``). Beside the picture it returns the
    foreground attention or heat map, (B, 1, H, W) in [0, 1], where the generator has it.
    """

    def __init__(self, generator: nn.Module, grey: bool = False):
        super().__init__()
        self.generator, self.grey = generator, grey

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        if self.grey:
            image = luminance(image)
        translation = translate_any_size(self.generator, 2 * image - 1)
        parts = ((translation.image + 1) / 2, translation.foreground)
        return tuple(part for part in parts if part is not None)


def export(generator: nn.Module, path: Path, grey: bool) -> None:
    """Write ``OnUnitRange(generator, grey)`` as ONNX with free batch, height and width (batch alone for one size).

    Input "image"; outputs "translation" and, where the generator has it, "attention". Raises InputError when the
    packages for it are not there.
    """
    utils.import_optional("onnx", "--export")
    utils.import_optional("onnxscript", "--export")
    only_size = generator.settings.get("size")
    # Sizes that fit no multiple, so that nothing is taken for a constant.
    example = torch.rand(2, generator.settings["channels"], *(only_size or (62, 74)))
    free = {0: "batch"} if only_size else {0: "batch", 2: "height", 3: "width"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own making
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
    add("--checkpoint", required=True, help="a run, shipped weights, a folder or a generator file, official ones too")
    add("--direction", choices=("AtoB", "BtoA"), help="(default: the file's own, else AtoB, else BtoA)")
    add("--input", type=Path, help="a picture, or a folder of pictures")
    add("--output", type=Path, help="folder for the translations")
    add("--recursive", action="store_true", help="the pictures in sub-folders too; the output has the same folders")
    add(
        "--masks",
        action="store_true",
        help="write every mask and content, or the heat map, as well, to NAME_masks beside NAME.png",
    )
    add(
        "--batch_size",
        type=utils.at_least(1),
        help="pictures of equal size that are translated at once, fewer of large ones (default: 8)",
    )
    add(
        "--max_size",
        type=utils.at_least(1),
        help="shrink pictures whose longer side is above this, and their translations with them. A default generator "
        "needs about 1.1 kB of memory per pixel of a batch: 13 GB for one picture of 4000 x 3000",
    )
    add(
        "--export",
        type=Path,
        metavar="MODEL.onnx",
        help="write the generator as ONNX instead, RGB in [0, 1] in and out",
    )
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for values that do not fit together."""
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
        print0(f"{len(pictures) - len(failed)} of {len(pictures)} pictures translated into {options.output}")
        return 1 if failed else 0

    return utils.run_script("translate.py", work)


if __name__ == "__main__":
    sys.exit(main())
