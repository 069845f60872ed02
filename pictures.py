"""One picture: from a file of any kind to 8-bit grey or RGB in sRGB, to a tensor, and back.

Files may come from strangers. Only ``open_image`` opens them.
"""

from __future__ import annotations

from utils import InputError, Progress, first_line, import_optional, usable_cores

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

# Formats that Pillow decodes in this process: it judges a file by its content, and would start Ghostscript for an EPS
# that is named .png. HEIF is there with pillow-heif.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
EXTENSIONS: tuple[str, ...] = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp")
EXTENSIONS += (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
MOST_PIXELS = 10**8  # of one file: 300 MB as RGB
Image.MAX_IMAGE_PIXELS = MOST_PIXELS
MOST_SCANS = 200  # of a progressive JPEG, whose decoding takes as many passes; cameras and editors write about 10
PASSED_OVER = ("@eaDir", "#recycle", "__MACOSX")  # folders of thumbnails and of deleted files
MODES = {1: "L", 3: "RGB"}  # number of channels to Pillow's mode
T = Image.Transpose
TURNS = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
TURNS |= {6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}
RESIZE = ("squash", "short_side")


# ----------------------------------------------------------------------------------------------------------
#  Reading
# ----------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture file, or one half of a file that holds A and B side by side, or the grey version of either."""

    path: Path
    half: str | None = None  # "left", "right"
    grey: bool = False

    def open(self, channels: int = 3) -> Image.Image:
        """Decode as 8-bit grey (``channels`` 1) or RGB (3), upright; a grey version has its luminance in every channel.
        Pillow raises what it likes for a damaged file.
        """
        with open_image(self.path) as file:
            image = to_mode(upright(file), "L" if self.grey else MODES[channels])
        if self.grey:
            image = image.convert(MODES[channels])
        return self.crop(image)

    def alpha(self) -> Image.Image | None:
        """The opacity, 8-bit grey, upright, of a picture that has transparency. Raises as ``open``."""
        with open_image(self.path) as file:
            image = upright(file)
            if "A" not in image.getbands() and "transparency" not in image.info:
                return None
            return self.crop(image.convert("RGBA").getchannel("A"))

    def crop(self, image: Image.Image) -> Image.Image:
        """The ``half`` of a picture."""
        left = 0 if self.half == "left" else image.width - image.width // 2
        return image if self.half is None else image.crop((left, 0, left + image.width // 2, image.height))

    def read(self, channels: int = 3) -> Image.Image:
        """``open``; InputError names a file that cannot be decoded."""
        with name_unreadable(self.path):
            return self.open(channels)

    def size(self) -> tuple[int, int]:
        """(height, width) of the whole file, upright, from the head of the file only; OSError when it is damaged."""
        with open_image(self.path) as file:
            if file.format == "TIFF":  # some versions of Pillow turn it when it is decoded
                file.load()
            return file.size if orientation(file) in (5, 6, 7, 8) else file.size[::-1]


def orientation(file: Image.Image) -> int:
    """That of its EXIF, 1 where this is damaged."""
    with suppress(Exception):  # Pillow raises what it likes
        return file.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def upright(file: Image.Image) -> Image.Image:
    """Turned by EXIF. Not ImageOps.exif_transpose, which fails where it cannot write the other entries again."""
    file.load()
    turn = TURNS.get(orientation(file))
    return file if turn is None else file.transpose(turn)


@contextmanager
def name_unreadable(path: Path) -> Iterator[None]:
    """Raise InputError with the name of a file that cannot be decoded."""
    try:
        yield
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error


def open_image(path: Path) -> Image.Image:
    """``Image.open`` for files of strangers. Raises OSError, before memory is taken, for what is not a picture file of
    ``FORMATS``, or has more than ``MOST_PIXELS`` or ``MOST_SCANS``; InputError where HEIC cannot be read here; and what
    Pillow raises for damaged files.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    with open(path, "rb") as file:
        head = file.read(32)
    is_heic = head[4:8] == b"ftyp" and (b"heic" in head or b"heix" in head)  # phones' exports are often named .jpg
    if is_heic or path.suffix.lower() in (".heic", ".heif"):
        import_optional("pillow_heif", "a HEIC picture", "pip install pillow-heif").register_heif_opener()
    Image.init()
    image = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    problem = None
    if image.width * image.height > MOST_PIXELS:
        problem = f"{image.width} x {image.height} pixels, expected at most {MOST_PIXELS // 10**6} million"
    elif image.info.get("progressive") and path.read_bytes().count(b"\xff\xda") > MOST_SCANS:
        problem = f"a progressive JPEG of more than {MOST_SCANS} scans"
    if problem is not None:
        image.close()
        raise OSError(problem)
    return image


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Any of Pillow's modes to "L" or "RGB", in sRGB: 16 bits are scaled to 8, transparency is laid on white.

    The range of fractions is read from the values: 0 to 1, -1 to 1, 0 to 255 or 0 to 65535, the first that holds them
    all; that of whole numbers of 32 bits is one of the last two. Raises ValueError for others.
    """
    profile, alpha = image.info.get("icc_profile"), None
    space = "CMYK" if image.mode == "CMYK" else "L" if Image.getmodebase(image.mode) == "L" else "RGB"
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32).clip(0, 65535)  # Pillow's own conversion clips at 255
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        numbers = np.asarray(image, dtype=np.float32)
        least, most = float(numbers.min()), float(numbers.max())
        ranges = [(0, 1), (-1, 1)] * (image.mode == "F") + [(0, 255), (0, 65535)]
        low, high = next(((a, b) for a, b in ranges if a <= least and most <= b), (None, None))
        if low is None or high is None:
            raise ValueError(f"values from {least:g} to {most:g}, expected 0 to 1, -1 to 1, 0 to 255 or 0 to 65535")
        image = Image.fromarray(((numbers - low) * (255 / (high - low))).round().astype(np.uint8))
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile and (transform := to_srgb(profile, space)) is not None:
        image = transform.apply(image.convert(space))
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


@lru_cache(maxsize=64)
def to_srgb(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from an ICC profile of pictures of mode ``space`` ("L", "RGB" or "CMYK") to sRGB, of mode RGB.

    None where a picture stays as it is: the profile is damaged, is for other modes, or is sRGB itself. Profiles that
    vendors call sRGB differ by a level or two in their rounding.
    """
    how = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    try:
        transform = ImageCms.buildTransform(BytesIO(profile), ImageCms.createProfile("sRGB"), space, "RGB", *how)
    except ImageCms.PyCMSError:
        return None
    levels = 17 * np.indices((16,) * len(space), dtype=np.uint8).reshape(len(space), -1).T
    colours = Image.frombytes(space, (len(levels), 1), levels.tobytes())
    change = np.asarray(transform.apply(colours), dtype=int) - np.asarray(colours.convert("RGB"))
    return transform if np.abs(change).max() > 2 else None


# ----------------------------------------------------------------------------------------------------------
#  Many files
# ----------------------------------------------------------------------------------------------------------


def find_files(folder: Path, recursive: bool = True) -> list[Path]:
    """All files below a folder, linked folders too (or in the folder alone), in the order of their paths.

    Hidden files and ``PASSED_OVER`` are left out. A link whose file has gone stays in, so that ``unreadable`` names it.
    Raises OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # no folder has no files
            raise error

    found: list[Path] = []
    seen: set[str] = set()  # a linked folder may hold a link back
    for at, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(at)
        deeper = recursive and real not in seen
        folders[:] = sorted(n for n in folders if deeper and not n.startswith(".") and n not in PASSED_OVER)
        if real not in seen:
            found += (Path(at, name) for name in files if not name.startswith("."))
        seen.add(real)
    return sorted(found)


def find_pictures(folder: Path, recursive: bool = True) -> list[Picture]:
    """The files of ``find_files`` that have the ending of a picture."""
    return [Picture(path) for path in find_files(folder, recursive) if path.suffix.lower() in EXTENSIONS]


def tell_found(name: str, n: int, files: Sequence[Path]) -> str:
    """What was found among ``files``: "A: 1067 pictures (passed over: 3 .pdf, 1 .mov)"."""
    endings = Counter(path.suffix.lower() or "without an ending" for path in files)
    others = ", ".join(f"{count} {ending}" for ending, count in endings.most_common() if ending not in EXTENSIONS)
    return f"{name}: {n} pictures" + (f" (passed over: {others})" if others else "")


def in_threads(work: Callable[[Picture], Any], pictures: Sequence[Picture], what: str) -> Iterator[tuple[Picture, Any]]:
    """Each picture in order, with what ``work`` returns or the reason (str) why it cannot be read.

    One thread per core, at most 8: each may hold a photograph.
    """

    def attempt(picture: Picture) -> Any:
        try:
            return work(picture)
        except Exception as error:  # decoders raise what they like
            return first_line(error)

    pool = ThreadPoolExecutor(min(8, usable_cores()))
    try:
        yield from zip(
            pictures, Progress(pool.map(attempt, pictures), what, len(pictures), leave=False, delay=1), strict=True
        )
    finally:
        pool.shutdown(cancel_futures=True)


def unreadable(pictures: Sequence[Picture]) -> dict[Path, str]:
    """Decode every picture once; the files that cannot be decoded, each with the reason."""

    def decode(picture: Picture) -> None:
        picture.open()

    return {p.path: why for p, why in in_threads(decode, pictures, "checking pictures") if why is not None}


# ----------------------------------------------------------------------------------------------------------
#  Sizes and values
# ----------------------------------------------------------------------------------------------------------


def scale(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A size (height, width) of the same shape with ``longest`` pixels on its longer side."""
    return max(1, round(size[0] * longest / max(size))), max(1, round(size[1] * longest / max(size)))


def resize(image: Image.Image, size: tuple[int, int], how: str) -> Image.Image:
    """Bicubic resize to (height, width). "squash" changes the aspect, as the official code does; "short_side" keeps it
    and covers the size, so that one side may come out longer. Raises OSError for a picture that is too thin for it.
    """
    if how == "short_side":
        size = cover((image.height, image.width), size)
        if size[0] * size[1] > MOST_PIXELS:
            raise OSError(f"{image.width} x {image.height} pixels: too thin, would become {size[1]} x {size[0]}")
    return image.resize(size[::-1], Image.Resampling.BICUBIC)


def resize_and_crop(image: Image.Image, size: tuple[int, int], how: str) -> Image.Image:
    """``resize``, and of what is longer than the size (height, width) the middle."""
    image, (height, width) = resize(image, size, how), size
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def cover(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """A size (height, width) scaled to cover another one just so, its aspect kept."""
    factor = max(least[0] / size[0], least[1] / size[1])
    return round(factor * size[0]), round(factor * size[1])


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit picture to a uint8 tensor of shape (channels, H, W). Not torchvision's, which takes seconds to import."""
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def unaugmented(picture: Picture, size: tuple[int, int], channels: int = 3, how: str = "squash") -> Tensor:
    """A picture as generators see it outside training: uint8 (channels, height, width), no random crop, no flip.

    "short_side" keeps the middle of what is longer than ``size`` (height, width). InputError names a damaged file.
    """
    with name_unreadable(picture.path):
        return to_tensor(resize_and_crop(picture.open(channels), size, how))


def to_picture(pixels: Tensor) -> Image.Image:
    """A uint8 tensor of shape (1 or 3, H, W) to an 8-bit picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).cpu().numpy())


def normalise(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]; other types (noise) are returned unchanged."""
    return images.float().div(127.5).sub(1) if images.dtype == torch.uint8 else images


def quantise(images: Tensor) -> Tensor:
    """Float [-1, 1] to the nearest uint8 [0, 255], the inverse of ``normalise``; values beyond are clipped."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
