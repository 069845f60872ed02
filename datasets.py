"""Pictures on disk: unpaired, paired and plain folders, the built-in set, the public sets, your own, and the loader.

    python datasets.py --dataset_name horse2zebra                                  # fetch a public set
    python datasets.py --dataset_name solid2striped                                # draw the built-in set
    python datasets.py --from_A photos/horses --from_B photos/zebras --dataset_name mine

A data set is ``data/<name>/{trainA,trainB,testA,testB}`` (test folders optional), or pix2pix's layout,
``data/<name>/{train,val,test}`` with A and B side by side in every picture, whose halves serve paired and unpaired.
Colourisation (``task``) takes one folder of colour pictures, ``data/<name>/train`` (``test`` optional): A is its grey.
Systems that make pictures from noise take any folder of pictures (see ``find_plain``).

Randomness: what happens to a training sample (crop, flip, unpaired partner, noise) is a pure function of
(seed, epoch, index), so workers, ranks and restarts change no sample. Every use of ``np.random.default_rng``
in the project starts its key with a number of its own (1 samples, 2 shuffling, 3 replay buffers, 4 drawing,
5 test shares, 6 bootstraps, 7 draws for the floor, 8 held-out shares, 9 noise of samples, 10 fixed noise,
11 neighbours of noise, 12 dropout in use), because numpy pads short keys with zeros and equal keys would give equal
streams.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tarfile
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.utils import download_url
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from utils import InputError, check_name, run_script, usable_cores

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MODES = {1: "L", 3: "RGB"}  # number of channels to Pillow's mode
SCALE = 1.12  # pictures are resized to 1.12 × the training size (286 for 256) before the random crop
RESIZE = ("squash", "short_side")
TASKS = ("translation", "colorization")
HALVES = {"A": "left", "B": "right"}  # of a picture that holds both sides


# ----------------------------------------------------------------------------------------------------------
#  Pictures
# ----------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture file, or one half of a file that holds A and B side by side, or the grey version of either."""

    path: Path
    half: str | None = None  # "left", "right"
    grey: bool = False

    def open(self, channels: int = 3) -> Image.Image:
        """Decode as 8-bit grey (``channels`` 1) or RGB (3), upright; Pillow raises what it likes for a damaged file.

        A grey version has its luminance in every channel.
        """
        with Image.open(self.path) as file:
            image = to_mode(ImageOps.exif_transpose(file), "L" if self.grey else MODES[channels])
        if self.grey:
            image = image.convert(MODES[channels])
        if self.half is not None:
            middle = image.width // 2
            image = image.crop(
                (0, 0, middle, image.height)
                if self.half == "left"
                else (image.width - middle, 0, image.width, image.height)
            )
        return image

    def read(self, channels: int = 3) -> Image.Image:
        """``open``; InputError names a file that cannot be decoded."""
        try:
            return self.open(channels)
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise InputError(f"{self.path}: cannot be read ({str(error) or type(error).__name__})") from error

    def size(self) -> tuple[int, int]:
        """(height, width) of the whole file, upright, from the head of the file alone; OSError when it is damaged."""
        with Image.open(self.path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return file.size if turned else file.size[::-1]


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Any of Pillow's modes to "L" or "RGB": 16 bits are scaled to 8, transparency is laid on white."""
    if image.mode.startswith("I"):  # I;16, I;16B and I: Pillow's own conversion clips everything above 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def find_pictures(folder: Path, recursive: bool = True) -> list[Picture]:
    """All pictures below a folder, linked folders too (or in the folder alone), in the order of their paths.

    Other and hidden files are passed over; a link whose picture has gone stays in, so that ``check`` names it. Raises
    OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # no folder has no pictures
            raise error

    found: list[Path] = []
    seen: set[str] = set()  # a linked folder may hold a link back
    for at, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(at)
        deeper = recursive and real not in seen
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if deeper else []
        if real not in seen:
            found += (Path(at, name) for name in files if not name.startswith("."))
        seen.add(real)
    return [Picture(path) for path in sorted(found) if path.suffix.lower() in EXTENSIONS]


def find_side(root: Path, split: str, side: str, task: str = TASKS[0]) -> list[Picture]:
    """The pictures of one domain (``side`` "A" or "B") of one split ("train" or "test"); [] where there are none.

    A folder ``<split><side>`` comes first; failing that, the left (A) or right (B) halves of ``<split>``
    (pix2pix's ``val`` stands in for a missing ``test``). For the ``task`` "colorization" side B is all of ``<split>``
    (or ``val``), failing that of ``<split>B``, and side A the same pictures in grey.
    """
    whole = (split, "val") if split == "test" else (split,)
    if task == "colorization":
        for name in (*whole, f"{split}B"):
            if (root / name).is_dir():
                return [p._replace(grey=side == "A") for p in find_pictures(root / name)]
        return []
    folder = root / f"{split}{side}"
    if folder.is_dir():
        return find_pictures(folder)
    for name in whole:
        if (root / name).is_dir():
            return [Picture(p.path, HALVES[side]) for p in find_pictures(root / name)]
    return []


def find_plain(root: Path, split: str) -> list[Picture]:
    """The pictures of one split ("train" or "test") of a set without domains; [] where there are none.

    From the first of these folders that exists: ``<split>``, ``<split>A``, and to train ``root`` itself, without what
    its test folders and ``val`` hold.
    """
    for name in (split, f"{split}A"):
        if (root / name).is_dir():
            return find_pictures(root / name)
    if split == "test" or not root.is_dir():
        return []
    aside = ("test", "testA", "testB", "val")
    return [p for p in find_pictures(root) if p.path.relative_to(root).parts[0] not in aside]


def load_masks(path: Path, split: str) -> dict[str, Image.Image]:
    """Object masks from a JSON file, 0/255 grey pictures by the stem of their names.

    ``split`` ("testA") is a key of the file, which holds for each name the mask as COCO's uncompressed run lengths:
    "size" [height, width] and "counts" of background and object in turn, column by column.
    """
    masks = {}
    for stem, mask in json.loads(path.read_text()).get(split, {}).items():
        (height, width), counts = mask["size"], mask["counts"]
        columns = np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height)
        masks[stem] = Image.fromarray((255 * columns.T).astype(np.uint8))
    return masks


def decoders() -> ThreadPoolExecutor:
    """Threads that decode, one per core that this process may use; not many, as each may hold a large photograph."""
    return ThreadPoolExecutor(min(8, usable_cores()))


def unreadable(pictures: Sequence[Picture]) -> dict[Path, str]:
    """Decode every picture once; the files that cannot be decoded, each with the reason."""

    def reason(picture: Picture) -> str | None:
        try:
            picture.open()
        except Exception as error:
            return str(error) or type(error).__name__
        return None

    with decoders() as pool:
        reasons = tqdm(pool.map(reason, pictures), "checking pictures", len(pictures), leave=False, delay=1)
        return {p.path: r for p, r in zip(pictures, reasons, strict=True) if r is not None}


def resize(image: Image.Image, size: tuple[int, int], how: str) -> Image.Image:
    """Bicubic resize to (height, width).

    "squash" changes the aspect, as the official code does; "short_side" keeps it and covers the size, so that
    one side may come out longer.
    """
    height, width = cover((image.height, image.width), size) if how == "short_side" else size
    return image.resize((width, height), Image.Resampling.BICUBIC)


def cover(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """A size (height, width) scaled to cover another one just so, its aspect kept."""
    scale = max(least[0] / size[0], least[1] / size[1])
    return round(scale * size[0]), round(scale * size[1])


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit picture to a uint8 tensor of shape (channels, H, W)."""
    return pil_to_tensor(image).contiguous()


def normalise(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]; what is no picture of 8 bits (noise) passes as it is."""
    return images.float().div(127.5).sub(1) if images.dtype == torch.uint8 else images


def quantise(images: Tensor) -> Tensor:
    """Float [-1, 1] to the nearest uint8 [0, 255], the inverse of ``normalise``; values beyond are clipped."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------
#  Unpaired, paired and plain data
# ----------------------------------------------------------------------------------------------------------


class PictureDataset(Dataset, ABC):
    """What all kinds of data have in common: pictures of some sides, read, kept and augmented alike.

    Takes ``root`` (the folder of the data set), the training ``size`` (height, width), ``channels`` 1 or 3, ``how`` to
    resize (see ``resize``), a ``seed``, whether to ``hold_out`` a seeded tenth of each side, at least two pictures, and
    the ``task`` (see ``find_side``). Raises InputError when a side is missing, empty or too small for that.

    ``dataset[epoch, index]`` is a dict of uint8 (channels, height, width) by side, flipped at random, with ``jitter``
    resized to 1.12 × the size and cropped at random. Pictures are decoded each time, or once if ``load`` has kept them.

    The halves of single photographs would train as well, so ``check`` refuses what cannot be a pair side by side by its
    aspect: pairs of square pictures are 2 times as wide as high, of portraits of 2:3 1.33 times, of 9:16 1.125 times,
    while single squares and portraits are not wider than high. A folder of landscapes alone passes.
    """

    LEAST_ASPECT = 1.1  # width / height of a pair side by side

    paired: bool  # whether the sides are in step, picture by picture
    jitter = True  # else pictures are as ``unaugmented`` makes them, but for flips

    def __init__(
        self,
        root: Path,
        size: tuple[int, int],
        channels: int = 3,
        how: str = "squash",
        seed: int = 0,
        hold_out: bool = False,
        task: str = TASKS[0],
    ):
        self.root, self.size, self.channels, self.how, self.seed, self.task = root, size, channels, how, seed, task
        self.scaled = (int(SCALE * size[0]), int(SCALE * size[1])) if self.jitter else size
        self.kept: dict[Picture, Tensor] = {}
        self.sides = self.find_sides("train")
        self.held_out: dict[str, list[Picture]] = {side: [] for side in self.sides}
        for d, (side, pictures) in enumerate(self.sides.items()):
            if not pictures:
                raise InputError(missing(root, side, task))
            if hold_out:
                if len(pictures) < 3:
                    raise InputError(f"{root / f'train{side}'}: {len(pictures)} pictures, --eval_interval needs 3")
                n = max(2, round(len(pictures) / 10))
                key = 0 if self.paired or pictures[0].half else d  # pairs and halves of one file stay together
                out = set(np.random.default_rng((8, seed, key)).permutation(len(pictures))[:n].tolist())
                self.held_out[side] = [p for i, p in enumerate(pictures) if i in out]
                self.sides[side] = [p for i, p in enumerate(pictures) if i not in out]

    @abstractmethod
    def find_sides(self, split: str) -> dict[str, list[Picture]]:
        """All pictures of "train" or "test" by side; [] where a side has none."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples in an epoch."""

    @abstractmethod
    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """The sample of (epoch, index)."""

    def check(self) -> None:
        """Decode every picture, the test pictures too; InputError names those that cannot be read, or not be halved."""
        all_sides = self.sides, self.held_out, self.find_sides("test")
        pictures = {p for sides in all_sides for pictures in sides.values() for p in pictures}
        refuse_unreadable(unreadable([Picture(path) for path in sorted({p.path for p in pictures})]))
        for path in sorted({p.path for p in pictures if p.half}):
            height, width = Picture(path).size()
            if width < self.LEAST_ASPECT * height:
                raise InputError(
                    f"{path}: {width} pixels wide, {height} high, expected a pair side by side, at least "
                    f"{self.LEAST_ASPECT} times as wide as high. Single photographs are for --task colorization; "
                    "narrower pairs go to trainA and trainB, under equal names"
                )

    def digest(self) -> str:
        """SHA-256 of the names of all pictures by side, those that are held out too: other pictures, another one."""
        names = [
            {side: [str(p.path.relative_to(self.root)) for p in pictures] for side, pictures in sides.items()}
            for sides in (self.sides, self.held_out)
        ]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def load(self, limit: float) -> bool:
        """Decode and resize all pictures now and keep them in memory, unless that takes more than ``limit`` bytes.

        Returns whether they are kept; samples are the same either way.
        """
        pictures = list(dict.fromkeys(picture for side in self.sides.values() for picture in side))
        least = self.channels * self.scaled[0] * self.scaled[1]  # of each; "short_side" may make it longer
        if least * len(pictures) > limit:
            return False
        kept, total = {}, 0
        with decoders() as pool:
            decoded = tqdm(pool.map(self.decode, pictures), "reading pictures", len(pictures), leave=False, delay=1)
            for picture, image in zip(pictures, decoded, strict=True):
                kept[picture] = image
                total += image.nbytes
                if total > limit:
                    pool.shutdown(cancel_futures=True)
                    return False
        self.kept = kept
        return True

    def decode(self, picture: Picture) -> Tensor:
        """uint8 (channels, height, width), to be cropped with ``jitter``: then "short_side" leaves one side longer."""
        if self.jitter:
            return to_tensor(resize(picture.read(self.channels), self.scaled, self.how))
        return unaugmented(picture, self.size, self.channels, self.how)

    def rng(self, epoch: int, index: int) -> np.random.Generator:
        """All that a sample draws."""
        return np.random.default_rng((1, self.seed, epoch, index))

    def read(self, picture: Picture) -> Tensor:
        """``decode``, or what ``load`` has kept of it."""
        return self.kept[picture] if picture in self.kept else self.decode(picture)

    def augment(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        height, width = self.size
        top = int(rng.integers(image.shape[1] - height + 1))
        left = int(rng.integers(image.shape[2] - width + 1))
        image = image[:, top : top + height, left : left + width]
        return image.flip(-1) if rng.random() < 0.5 else image

    def fixed_batch(self, n: int) -> dict[str, Tensor]:
        """What sheets show, always the same: ``n`` pictures of each side (see the function of this name)."""
        return fixed_batch(self.root, n, self.size, self.channels, self.how, self.task)


class UnpairedDataset(PictureDataset):
    """Pictures of A, each with a random partner from B; as many samples an epoch as the larger side has.

    Samples are {"A", "B"}, each cropped and flipped by itself. For "colorization" A and B share no picture: every
    second one is grey.
    """

    paired = False

    def find_sides(self, split: str) -> dict[str, list[Picture]]:
        sides = {side: find_side(self.root, split, side, self.task) for side in "AB"}
        if self.task == "colorization" and split == "train":
            return {"A": sides["A"][::2], "B": sides["B"][1::2]}
        return sides

    def __len__(self) -> int:
        return max(map(len, self.sides.values()))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        rng = self.rng(epoch, index)
        A, B = self.sides["A"], self.sides["B"]
        pair = {"A": A[index % len(A)], "B": B[rng.integers(len(B))]}
        return {side: self.augment(self.read(picture), rng) for side, picture in pair.items()}


class PairedDataset(PictureDataset):
    """Pictures of A and B that belong together: halves of one file, equal names in two folders, or grey and colour.

    Samples are {"A", "B"}, cropped and flipped alike. InputError where a picture has no partner.
    """

    paired = True

    def find_sides(self, split: str) -> dict[str, list[Picture]]:
        return in_step(self.root, split, {s: find_side(self.root, split, s, self.task) for s in "AB"})

    def check(self) -> None:
        """As of all data; InputError too where the aspect is kept and a picture has not its partner's."""
        super().check()
        for A, B in zip(*self.sides.values(), strict=True) if self.how == "short_side" else ():
            if A.path != B.path and cover(A.size(), self.scaled) != cover(B.size(), self.scaled):
                raise InputError(
                    f"{A.path} and {B.path} differ in their aspect: --resize {self.how} keeps it, expected "
                    "--resize squash"
                )

    def __len__(self) -> int:
        return len(self.sides["A"])

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        pair = {side: pictures[key[1]] for side, pictures in self.sides.items()}
        return {side: self.augment(self.read(p), self.rng(*key)) for side, p in pair.items()}  # the same draws for both


def in_step(root: Path, split: str, sides: dict[str, list[Picture]]) -> dict[str, list[Picture]]:
    """Both sides of paired data in the order of their names; InputError where they are no pairs."""
    if [p.path for p in sides["A"]] == [p.path for p in sides["B"]]:
        return sides
    if root.name == BUILT_IN:
        raise InputError(f"{root}: expected pairs, found the built-in set, whose equal names are different scenes")

    def name(picture: Picture) -> Path:
        """Without the folder of the side, and without the ending."""
        return Path(*picture.path.relative_to(root).parts[1:]).with_suffix("")

    A, B = (Counter(map(name, pictures)) for pictures in sides.values())
    lone = (A - B) + (B - A)
    if lone:
        raise InputError(
            f"{root}: expected pairs, side by side in the pictures of {split}, or with equal names in {split}A and "
            f"{split}B; found {sum(lone.values())} without a partner, such as {min(lone)}"
        )
    return {side: sorted(pictures, key=name) for side, pictures in sides.items()}


class PlainDataset(PictureDataset):
    """Pictures without domains, each with a noise vector; as many samples an epoch as pictures (see ``find_plain``).

    Takes ``nz``, the length of the noise, too. Samples are {"image": uint8 (channels, height, width), "noise": float32
    (nz,)}: the picture flipped at random and not cropped, the noise uniform in [-1, 1]. InputError for ``hold_out`` and
    for any other ``task``.
    """

    paired = jitter = False
    SAMPLES = 6  # noise vectors for each picture of a sheet

    def __init__(
        self,
        root: Path,
        size: tuple[int, int],
        channels: int = 3,
        how: str = "squash",
        seed: int = 0,
        hold_out: bool = False,
        task: str = TASKS[0],
        nz: int = 100,
    ):
        if hold_out:
            raise InputError("--eval_interval measures translations, and pictures from noise are none; expected 0")
        if task != TASKS[0]:
            raise InputError(f"--task {task} is for translations, and pictures from noise are none")
        self.nz = nz
        super().__init__(root, size, channels, how, seed)

    def find_sides(self, split: str) -> dict[str, list[Picture]]:
        pictures = find_plain(self.root, split)
        if split == "train" and not pictures:
            raise InputError(missing_plain(self.root))
        return {"image": pictures}

    def __len__(self) -> int:
        return len(self.sides["image"])

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        image = self.read(self.sides["image"][key[1]])
        if self.rng(*key).random() < 0.5:
            image = image.flip(-1)
        return {"image": image, "noise": draw_noise((9, self.seed, *key), self.nz)}

    def fixed_batch(self, n: int) -> dict[str, Tensor]:
        """The first ``n`` test pictures (training pictures without a test folder), fixed noise for ``SAMPLES`` × n."""
        shown = (self.find_sides("test")["image"] or self.sides["image"])[:n]
        noise = fixed_noise(self.SAMPLES * len(shown), self.nz, self.seed)
        return {"image": torch.stack([self.decode(picture) for picture in shown]), "noise": noise}


def draw_noise(key: Sequence[int], *shape: int) -> Tensor:
    """Noise as DCGAN's generator takes it, uniform in [-1, 1], float32, a pure function of the key ("Randomness")."""
    return torch.from_numpy(np.random.default_rng(key).uniform(-1, 1, shape).astype(np.float32))


def fixed_noise(n: int, nz: int, seed: int) -> Tensor:
    """The first ``n`` noise vectors of a seed, (n, nz): those of the sheets and of ``generate.py``."""
    return draw_noise((10, seed), n, nz)


# What a system may ask for (``System.data``). What one of them takes beyond the others (``nz``) is an option of the
# systems that ask for it.
KINDS: dict[str, type[PictureDataset]] = {"unpaired": UnpairedDataset, "paired": PairedDataset, "plain": PlainDataset}


def takes_grey(task: str, direction: str) -> bool:
    """Whether a generator of ``direction`` that was trained for ``task`` wants the grey versions of pictures."""
    return task == "colorization" and direction == "AtoB"


def as_input(path: Path, task: str, direction: str) -> Picture:
    """A picture file as a generator of ``direction`` wants it, which was trained for ``task``: grey, or as it is."""
    return Picture(path, grey=takes_grey(task, direction))


def true_translations(
    root: Path, pictures: Sequence[Picture], direction: str, task: str = TASKS[0], paired: bool = False
) -> list[Picture] | None:
    """What test pictures should become in ``direction``; None where nothing tells.

    Where a file holds both sides, its other half, its colours or its grey; where two folders do and equal names are
    pairs (``paired``), the partner: InputError then where one is lacking.
    """
    source, target = direction[0], direction[-1]
    if task == "colorization":
        return [picture._replace(grey=target == "A") for picture in pictures]
    if all(picture.half for picture in pictures):
        return [picture._replace(half=HALVES[target]) for picture in pictures]
    if not paired:
        return None
    sides = in_step(root, "test", {side: find_side(root, "test", side, task) for side in "AB"})
    partners = dict(zip(sides[source], sides[target], strict=True))
    return [partners[picture] for picture in pictures]


def unaugmented(picture: Picture, size: tuple[int, int], channels: int = 3, how: str = "squash") -> Tensor:
    """A picture as generators see it outside training: uint8 (channels, height, width), no random crop, no flip.

    "short_side" keeps the middle of what is longer than ``size`` (height, width). InputError names a damaged file.
    """
    return to_tensor(ImageOps.fit(resize(picture.read(channels), size, how), size[::-1]))


def fixed_batch(
    root: Path, n: int, size: tuple[int, int], channels: int = 3, how: str = "squash", task: str = TASKS[0]
) -> dict[str, Tensor]:
    """The first ``n`` test pictures of both sides (training pictures where there are no test folders).

    {"A": uint8 (n, channels, height, width), "B": likewise}, with fewer than ``n`` where a side has fewer; see
    ``unaugmented``. Raises InputError where a side has none.
    """
    sides = {s: (find_side(root, "test", s, task) or find_side(root, "train", s, task))[:n] for s in "AB"}
    for side, pictures in sides.items():
        if not pictures:
            raise InputError(missing(root, side, task))
    n = min(map(len, sides.values()))
    return {side: torch.stack([unaugmented(p, size, channels, how) for p in ps[:n]]) for side, ps in sides.items()}


class EpochSampler(Sampler):
    """Yields (epoch, index), shuffled by (seed, epoch), every rank its own share.

    Set ``epoch``, and ``start`` (samples of this rank to leave out, for resuming amid an epoch), before
    iterating. Rank r of n takes every n-th index, so n ranks at batch b see in each step what one process
    sees at batch n·b.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world_size: int = 1):
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((2, self.seed, self.epoch)).permutation(self.length)
        mine = order[: len(self) * self.world_size][self.rank :: self.world_size]
        return iter([(self.epoch, int(i)) for i in mine[self.start :]])

    def __len__(self) -> int:
        return self.length // self.world_size


def outlive_signals(_worker: int) -> None:
    """Ctrl-C, systemd and batch systems signal whole groups; a loader process ends when its own parent says so.

    macOS cannot tell who sent a SIGTERM: there it ends the process.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_parent, daemon=True).start()


def wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


def make_loader(
    dataset: Dataset, sampler: Sampler, batch_size: int, n_cpu: int, pin_memory: bool = False
) -> DataLoader:
    """Whole batches only. The loader draws from a generator of its own, so it leaves torch's random state alone."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=n_cpu,
        pin_memory=pin_memory,
        drop_last=True,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),
        persistent_workers=n_cpu > 0,
    )


# ----------------------------------------------------------------------------------------------------------
#  Errors that say what to do
# ----------------------------------------------------------------------------------------------------------


def missing(root: Path, side: str, task: str = TASKS[0]) -> str:
    """What to say when a data set, or one side of it, is not there."""
    colour = task == "colorization"
    folder = root if not root.is_dir() else root / ("train" if colour else f"train{side}")
    found = f"no pictures ({', '.join(EXTENSIONS)}) in it" if folder.is_dir() else "no such folder"
    if colour:
        return f"{folder}: {found}. Expected colour pictures, two at least, in {root}/train or {root}/trainB."
    elsewhere = "" if root.parent == Path("data") else f" --data_dir {root.parent}"
    own = f"python datasets.py --from_A FOLDER --from_B FOLDER --dataset_name {root.name}{elsewhere}"
    lines = [
        f"{folder}: {found}. Expected pictures in {root}/trainA and {root}/trainB (testA and testB optional).",
        f"  Your own pictures:    {own}",
        "  To try without data:  make demo",
    ]
    if root.name in (*PUBLIC_SETS, *BY_HAND):
        lines.insert(1, f"  To fetch this set:    python datasets.py --dataset_name {root.name}{elsewhere}")
    return "\n".join(lines)


def missing_plain(root: Path) -> str:
    """What to say when a data set without domains is not there."""
    found = "no such folder" if not root.is_dir() else f"no pictures ({', '.join(EXTENSIONS)}) to train on in it"
    return f"{root}: {found}. Expected pictures in {root}/train, in {root}/trainA, or in {root} itself"


def refuse_unreadable(reasons: dict[Path, str], most: int = 10) -> None:
    if reasons:
        lines = [f"  {path}: {reason}" for path, reason in list(reasons.items())[:most]]
        more = [f"  … and {len(reasons) - most} more"] if len(reasons) > most else []
        raise InputError("\n".join([f"{len(reasons)} picture(s) cannot be read; mend or remove them:", *lines, *more]))


# ----------------------------------------------------------------------------------------------------------
#  The built-in set
# ----------------------------------------------------------------------------------------------------------

BUILT_IN = "solid2striped"
BROWN, BLACK, WHITE = np.array([150.0, 95.0, 50.0]), np.array([25.0, 25.0, 25.0]), np.array([235.0, 235.0, 235.0])


def draw_scene(rng: np.random.Generator, size: int = 128) -> dict[str, Image.Image]:
    """One scene of the built-in set in both textures: {"A": brown, "B": striped, "mask": 0/255 grey}.

    One or two shaded ellipses on a soft, grainy random background. The stripes are upright, three white between four
    black across every ellipse, so that the brown scene determines the striped one.
    """
    coarse = Image.fromarray(rng.integers(90, 230, (4, 4, 3), dtype=np.uint8))
    background = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=float)
    background += rng.normal(0, 16, background.shape)  # grain: easier to leave alone than to paint anew
    y, x = np.mgrid[:size, :size] + 0.5
    scenes = {"A": background.copy(), "B": background.copy()}
    covered = np.zeros((size, size))
    for _ in range(rng.integers(1, 3)):
        a, b = rng.uniform(0.17, 0.3, 2) * size
        cx, cy = rng.uniform(0.25, 0.75, 2) * size
        angle = rng.uniform(0, np.pi)
        u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / a
        v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / b
        radius = np.hypot(u, v)
        cover = np.clip((1 - radius) * min(a, b) + 0.5, 0, 1)[..., None]  # about one pixel of soft edge
        # Lit from above left, as a sphere of the same outline would be.
        depth = np.sqrt(np.clip(1 - radius**2, 0, 1))
        light = (0.7 + 0.3 * depth - 0.15 * ((x - cx) / a + (y - cy) / b) / 2)[..., None].clip(0.4, 1.1)
        width = np.hypot(a * np.cos(angle), b * np.sin(angle))  # half of the ellipse's
        stripe = np.clip(0.5 + 2 * np.cos(3 * np.pi * (x - cx) / width), 0, 1)[..., None]
        for side, texture in (("A", BROWN), ("B", BLACK + (WHITE - BLACK) * stripe)):
            scenes[side] += cover * (light * texture - scenes[side])
        covered = np.maximum(covered, cover[..., 0])
    pictures = {side: Image.fromarray(scene.round().clip(0, 255).astype(np.uint8)) for side, scene in scenes.items()}
    return pictures | {"mask": Image.fromarray(np.where(covered > 0.5, 255, 0).astype(np.uint8))}


def draw_built_in(root: Path, n_train: int = 500, n_test: int = 50) -> None:
    """Write the built-in set to ``root``, the same files each time; nothing is done where it stands already.

    Beside ``testA`` stand ``testA_mask`` (255 on the objects) and ``testA_truth`` (the true translation),
    likewise for B.
    """
    if root.exists():
        return
    with whole_or_absent(root) as folder:
        for s, split in enumerate(("train", "test")):
            for d, (side, other) in enumerate((("A", "B"), ("B", "A"))):
                views = {side: f"{split}{side}"}
                if split == "test":
                    views |= {"mask": f"test{side}_mask", other: f"test{side}_truth"}
                for name in views.values():
                    (folder / name).mkdir()
                for i in range(n_train if split == "train" else n_test):
                    scene = draw_scene(np.random.default_rng((4, s, d, i)))
                    for view, name in views.items():
                        scene[view].save(folder / name / f"{i:03d}.png")


class whole_or_absent:
    """A folder that appears under its name only when the block has ended well; what is left of an earlier try goes."""

    def __init__(self, target: Path):
        self.target = target
        self.prefix = f".{target.name}.partial.{socket.gethostname()}."  # the disk may be shared among machines
        self.partial = target.parent / f"{self.prefix}{os.getpid()}"

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for left in self.target.parent.glob(f"{self.prefix}*"):
            if not process_lives(int(left.name.removeprefix(self.prefix))):
                shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        return self.partial

    def __exit__(self, kind, value, trace) -> None:
        try:
            if kind is None and not self.target.exists():  # else another process was faster
                os.rename(self.partial, self.target)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)


def process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ----------------------------------------------------------------------------------------------------------
#  Public sets
# ----------------------------------------------------------------------------------------------------------


class PublicSet(NamedTuple):
    """An archive on the CycleGAN authors' server and what it should hold; None and {} where that is not known."""

    archive: str
    sha256: str | None
    counts: dict[str, int]


MIRROR = "http://efrosgans.eecs.berkeley.edu"
# Checksums: TensorFlow Datasets, url_checksums/cycle_gan.txt. Counts: the papers and reports of complete copies.
PUBLIC_SETS = {
    "apple2orange": PublicSet(
        "cyclegan/datasets/apple2orange.zip",
        "845a191e9af8926408ea597001cd03a452e3300a1f44a79fe329b3d59f6e3eb8",
        {"trainA": 995, "trainB": 1019, "testA": 266, "testB": 248},
    ),
    "horse2zebra": PublicSet(
        "cyclegan/datasets/horse2zebra.zip",
        "a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1",
        {"trainA": 1067, "trainB": 1334, "testA": 120, "testB": 140},
    ),
    "monet2photo": PublicSet(
        "cyclegan/datasets/monet2photo.zip",
        "88f91b00fc228f97c9411fbf1880ec1d119c98f1722e4cfcfaa2fb35fac05b04",
        {"trainA": 1072, "trainB": 6287, "testA": 121, "testB": 751},
    ),
    "summer2winter_yosemite": PublicSet(
        "cyclegan/datasets/summer2winter_yosemite.zip",
        "167fe1726807a9d22bd106b4a6c0bd7953b688af924ac1bf967439c4961e49f9",
        {"trainA": 1231, "trainB": 962, "testA": 309, "testB": 238},
    ),
    "cezanne2photo": PublicSet(
        "cyclegan/datasets/cezanne2photo.zip",
        "3a6c10ca21f9485862f1cbd707744b9dc258954a04631271d23a3605eeb63cff",
        {},
    ),
    "ukiyoe2photo": PublicSet(
        "cyclegan/datasets/ukiyoe2photo.zip",
        "02a2a2fb5ecf425ca1bf86aca7304377da64a2a1d3b86df54eb65e4068bf3b08",
        {},
    ),
    "vangogh2photo": PublicSet(
        "cyclegan/datasets/vangogh2photo.zip",
        "362c3473e70be0944bda08d49d660eafdc2854df55d697835b8186d1d79caaff",
        {},
    ),
    "iphone2dslr_flower": PublicSet(
        "cyclegan/datasets/iphone2dslr_flower.zip",
        "8fcb5e374d631b107e1d961b8c4cd0a186aa2a4ff3e279923f4c426128de7113",
        {},
    ),
    "facades": PublicSet("pix2pix/datasets/facades.tar.gz", None, {"train": 400, "val": 100, "test": 106}),
    "maps": PublicSet("pix2pix/datasets/maps.tar.gz", None, {"train": 1096, "val": 1098}),
}
# Sets that a browser has to fetch: the page, and the counts that the papers report.
BY_HAND = {
    "selfie2anime": (
        "https://drive.google.com/file/d/1xOWj1UVgp6NKMT3HbPhBbtq2A4EDkghF/view",
        {"trainA": 3400, "trainB": 3400, "testA": 100, "testB": 100},
    )
}


def fetch(name: str, data_dir: Path, mirror: str = MIRROR, timeout: float = 60.0) -> None:
    """Download and unpack a public set to ``data_dir/name``; the folder is whole afterwards, or absent.

    An interrupted download starts anew. ``timeout`` is in seconds without any answer. Raises InputError with
    the address and the reason when the server, the archive or its checksum is not as expected, and where to go for a
    set that only a browser can fetch.
    """
    target = data_dir / name
    if name in BY_HAND:
        page, counts = BY_HAND[name]
        if not target.exists():
            raise InputError(f"{name}: download it from {page} and unpack it to {target} ({', '.join(counts)})")
        report_counts(target, counts)
        return
    if name not in PUBLIC_SETS:
        known = ", ".join((*PUBLIC_SETS, *BY_HAND))
        raise InputError(f"--dataset_name {name}: not a public set, expected one of {known}")
    archive, sha256, counts = PUBLIC_SETS[name]
    url = f"{mirror.rstrip('/')}/{archive}"
    if target.exists():
        report_counts(target, counts)
        print(f"{target} stands already; remove it to fetch it again.")
        return
    with whole_or_absent(target) as partial:
        file = partial / Path(archive).name
        print(f"fetching {url}")
        default = socket.getdefaulttimeout()
        socket.setdefaulttimeout(timeout)  # torchvision's helper sets none and would wait for ever
        try:
            download_url(url, str(partial), filename=file.name)
        except (OSError, RuntimeError, ValueError, HTTPException) as error:  # ValueError: not an address
            raise InputError(f"{url}: could not be fetched ({error}). The README lists other places.") from error
        finally:
            socket.setdefaulttimeout(default)
        if sha256 is not None:
            with open(file, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != sha256:
                raise InputError(
                    f"{url}: the archive is not the expected one or is cut short (sha256 {found}, expected {sha256})"
                )
        unpack(file, partial / "unpacked")
        folder = partial / "unpacked" / name
        if not folder.is_dir():
            inside = ", ".join(sorted(p.name for p in (partial / "unpacked").iterdir())) or "nothing"
            raise InputError(f"{url}: expected a folder {name} in the archive, found {inside}")
        report_counts(folder, counts, shown=target)
        if not target.exists():  # else another process was faster
            folder.rename(target)


def unpack(archive: Path, folder: Path) -> None:
    """Extract a .zip or .tar.gz; InputError when it is damaged or a member would land outside ``folder``."""

    def refuse_outside(members: Sequence[str]) -> None:
        for member in members:
            if not (folder / member).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{archive.name}: {member} would land outside its folder")

    folder.mkdir()
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                refuse_outside(file.namelist())
                file.extractall(folder)
        else:
            with tarfile.open(archive) as file:
                refuse_outside(file.getnames())
                for member in file.getmembers():
                    if not (member.isfile() or member.isdir()):  # a link may lead outside, too
                        raise InputError(f"{archive.name}: {member.name} is no file and no folder")
                file.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
                file.extractall(folder)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{archive.name}: cannot be unpacked ({error})") from error


def report_counts(folder: Path, counts: dict[str, int], shown: Path | None = None) -> None:
    for name in sorted(counts or (p.name for p in folder.iterdir() if p.is_dir())):
        found = len(find_pictures(folder / name)) if (folder / name).is_dir() else 0
        expected = (
            "" if name not in counts else ", as expected" if counts[name] == found else f", EXPECTED {counts[name]}"
        )
        print(f"  {(shown or folder) / name}: {found} pictures{expected}")


# ----------------------------------------------------------------------------------------------------------
#  Your own pictures
# ----------------------------------------------------------------------------------------------------------


def import_pictures(
    from_A: Path, from_B: Path, target: Path, test_share: float = 0.1, seed: int = 0, copy: bool = False
) -> None:
    """Make a data set of two folders of pictures: links (or copies), a seeded test share split off.

    Unreadable files are left out, as are all but the first of files with equal bytes, on either side (which could
    otherwise stand in train and test at once); both are reported by name. At least one picture a side stays in train.
    """
    if target.exists():
        raise InputError(f"{target} stands already; choose another --dataset_name or remove it")
    if not 0 <= test_share < 1:
        raise InputError(f"--test_share {test_share}: expected a share from 0 to below 1")
    sides: dict[str, list[Path]] = {"A": [], "B": []}
    first: dict[bytes, Path] = {}
    for side, source in (("A", from_A), ("B", from_B)):
        pictures = find_pictures(source) if source.is_dir() else []
        if not pictures:
            found = "no such folder" if not source.is_dir() else "no pictures in it"
            raise InputError(f"--from_{side} {source}: {found}, expected a folder of {', '.join(EXTENSIONS)}")
        bad = unreadable(pictures)
        for path, reason in bad.items():
            print(f"left out, unreadable: {path} ({reason})")
        for picture in pictures:
            if picture.path not in bad:
                digest = hashlib.sha256(picture.path.read_bytes()).digest()
                if digest in first:
                    print(f"left out, duplicate:  {picture.path} (the same bytes as {first[digest]})")
                else:
                    first[digest] = picture.path
                    sides[side].append(picture.path)
        if not sides[side]:
            why = "can be read" if len(bad) == len(pictures) else "is left: all are unreadable or duplicates"
            raise InputError(f"--from_{side} {source}: none of its {len(pictures)} pictures {why}")
    with whole_or_absent(target) as folder:
        for d, (side, paths) in enumerate(sides.items()):
            n_test = min(round(test_share * len(paths)), len(paths) - 1)
            test = set(np.random.default_rng((5, seed, d)).permutation(len(paths))[:n_test].tolist())
            for split in ("train", "test"):
                (folder / f"{split}{side}").mkdir()
            for i, path in enumerate(paths):
                place = folder / f"{'test' if i in test else 'train'}{side}" / f"{i:05d}_{path.name}"
                if copy:
                    shutil.copyfile(path, place)
                else:
                    place.symlink_to(path.resolve())
    report_counts(target, {})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Fetch a public data set, draw the built-in one, or make one of your own pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--dataset_name",
        required=True,
        help=f"{BUILT_IN} (drawn), {', '.join(PUBLIC_SETS)} (fetched), {', '.join(BY_HAND)} (says where to fetch it), "
        "or a new name with --from_A and --from_B",
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    parser.add_argument(
        "--from_A",
        type=Path,
        help="folder of your pictures of domain A, unpaired; pairs are laid out by hand (README, Data sets)",
    )
    parser.add_argument("--from_B", type=Path, help="folder of your pictures of domain B")
    parser.add_argument(
        "--test_share", type=float, default=0.1, help="share of your pictures that goes to testA and testB"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of that split")
    parser.add_argument("--copy", action="store_true", help="copy your pictures instead of linking them")
    parser.add_argument("--mirror", default=MIRROR, help="server to fetch from, with the same paths below it")
    options = parser.parse_args(argv)
    name, root = options.dataset_name, options.data_dir / options.dataset_name

    def work() -> int:
        check_name("--dataset_name", name)
        others = ("mirror",) if options.from_A is not None else ("test_share", "seed", "copy")
        for flag in (flag for flag in others if getattr(options, flag) != parser.get_default(flag)):
            whose = "fetching a public set" if flag == "mirror" else "--from_A and --from_B"
            raise InputError(f"--{flag} goes with {whose}, expected it there alone")
        if options.seed < 0:
            raise InputError(f"--seed {options.seed}: expected at least 0")
        if (options.from_A is None) != (options.from_B is None):
            raise InputError("--from_A and --from_B: expected both or neither")
        if options.from_A is not None:
            import_pictures(options.from_A, options.from_B, root, options.test_share, options.seed, options.copy)
        elif name == BUILT_IN:
            draw_built_in(root)
            report_counts(root, {})
        else:
            fetch(name, options.data_dir, options.mirror)
        return 0

    return run_script("datasets.py", work)


if __name__ == "__main__":
    sys.exit(main())
