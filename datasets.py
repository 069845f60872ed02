"""From the folders of a data set to training samples, and the loader.

A data set is ``data/<name>/{trainA,trainB,testA,testB}`` (test folders optional), or pix2pix's layout,
``data/<name>/{train,val,test}`` with A and B side by side in every picture; the halves serve paired and unpaired
systems. Colourisation (``task``) takes one folder of colour pictures, ``data/<name>/train`` (``test`` optional): A is
their grey. Systems that make pictures from noise take any folder of pictures (see ``find_plain``).

Randomness: what happens to a training sample (crop, flip, unpaired partner, noise) is a pure function of
(seed, epoch, index), so workers, ranks and restarts change no sample. Every use of ``np.random.default_rng`` in the
project starts its key with a number of its own: 1 samples, 2 shuffling, 3 replay buffers, 4 drawing, 5 test shares,
6 bootstraps, 7 draws for the floor, 8 held-out shares, 9 noise of samples, 10 fixed noise, 11 neighbours of noise,
12 dropout in evaluation mode. numpy pads short keys with zeros, and equal keys would give equal streams.
"""

from __future__ import annotations

from utils import InputError

import json
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pictures import (
    EXTENSIONS,
    Picture,
    cover,
    find_files,
    find_pictures,
    in_threads,
    name_unreadable,
    resize,
    resize_and_crop,
    tell_found,
    to_tensor,
    unaugmented,
    unreadable,
)

SCALE = 1.12  # pictures are resized to 1.12 × the training size (286 for 256) before the random crop
TASKS = ("translation", "colorization")
HALVES = {"A": "left", "B": "right"}  # of a picture that holds both sides
BUILT_IN = "solid2striped"  # the set that prepare.py draws


# ----------------------------------------------------------------------------------------------------------
#  Which pictures a data set has
# ----------------------------------------------------------------------------------------------------------


def find_first(root: Path, *names: str) -> list[Picture]:
    """The pictures of the first of these folders of ``root`` that exists; [] where none does."""
    return next((find_pictures(root / name) for name in names if (root / name).is_dir()), [])


def find_side(root: Path, split: str, side: str, task: str = "translation") -> list[Picture]:
    """The pictures of one domain (``side`` "A" or "B") of one split ("train" or "test"); [] where there are none.

    A folder ``<split><side>`` comes first; failing that, the left (A) or right (B) halves of ``<split>``
    (pix2pix's ``val`` stands in for a missing ``test``). For the ``task`` "colorization" side B is all of ``<split>``
    (or ``val``), failing that of ``<split>B``, and side A the same pictures in grey. Raises InputError for folders
    ``<split>/A`` and ``<split>/B``, whose pictures are no pairs.
    """
    whole = (split, "val") if split == "test" else (split,)
    if task == "colorization":
        return [p._replace(grey=side == "A") for p in find_first(root, *whole, f"{split}B")]
    if (root / f"{split}{side}").is_dir():
        return find_pictures(root / f"{split}{side}")
    for folder in (root / name for name in whole):
        if (folder / "A").is_dir() and (folder / "B").is_dir():
            raise InputError(f"{folder}: found folders A and B, expected {root / split}A and {root / split}B")
    return [p._replace(half=HALVES[side]) for p in find_first(root, *whole)]


def find_plain(root: Path, split: str) -> list[Picture]:
    """The pictures of one split ("train" or "test") of a set without domains; [] where there are none.

    From the first of these folders that exists: ``<split>``, ``<split>A``, and to train ``root`` itself, without what
    its test folders and ``val`` hold.
    """
    itself, aside = ([""], ("test", "testA", "testB", "val")) if split == "train" else ([], ())
    found = find_first(root, split, f"{split}A", *itself)
    return [p for p in found if p.path.relative_to(root).parts[0] not in aside]


def missing(root: Path, side: str, task: str = "translation") -> str:
    """The error message when a data set, or one side of it, is missing."""
    folder = root if not root.is_dir() else root / ("train" if task == "colorization" else f"train{side}")
    found = f"{folder}: no pictures ({', '.join(EXTENSIONS)}) in it" if folder.is_dir() else f"{folder}: no such folder"
    if task == "colorization":
        return f"{found}. Expected colour pictures, two at least, in {root}/train or {root}/trainB."
    named = f"--dataset_name {root.name}" + ("" if root.parent == Path("data") else f" --data_dir {root.parent}")
    return (
        f"{found}. Expected pictures in {root}/trainA and {root}/trainB (testA and testB optional).\n"
        f"  A public set:         python prepare.py {named}\n"
        f"  Your own pictures:    python prepare.py --from_A FOLDER --from_B FOLDER {named}\n"
        "  To try without data:  make demo"
    )


def match_pairs(root: Path, split: str, sides: dict[str, list[Picture]]) -> dict[str, list[Picture]]:
    """Both sides of paired data in the order of their names; InputError where a picture has no partner."""
    if [p.path for p in sides["A"]] == [p.path for p in sides["B"]]:
        return sides
    if root.name == BUILT_IN:
        raise InputError(f"{root}: expected pairs, found the built-in set, whose equal names are different scenes")

    def name(picture: Picture) -> Path:
        """Without the folder of the side, and without the ending."""
        return Path(*picture.path.relative_to(root).parts[1:]).with_suffix("")

    A, B = (Counter(map(name, pictures)) for pictures in sides.values())
    if lone := (A - B) + (B - A):
        raise InputError(
            f"{root}: expected pairs, side by side in the pictures of {split}, or with equal names in {split}A and "
            f"{split}B; found {sum(lone.values())} without a partner, such as {min(lone)}"
        )
    return {side: sorted(pictures, key=name) for side, pictures in sides.items()}


def true_translations(
    root: Path, pictures: Sequence[Picture], direction: str, task: str = "translation", paired: bool = False
) -> list[Picture] | None:
    """The true translations of test pictures in ``direction``; None where they are not known.

    The other half of a file that holds both sides; the colours or the grey of a picture; or the partner of equal name
    where two folders hold pairs (``paired``), InputError where it is missing.
    """
    source, target = direction[0], direction[-1]
    if task == "colorization":
        return [picture._replace(grey=target == "A") for picture in pictures]
    if all(picture.half for picture in pictures):
        return [picture._replace(half=HALVES[target]) for picture in pictures]
    if not paired:
        return None
    sides = match_pairs(root, "test", {side: find_side(root, "test", side, task) for side in "AB"})
    partners = dict(zip(sides[source], sides[target], strict=True))
    return [partners[picture] for picture in pictures]


def find_truths(
    root: Path, tests: Sequence[Picture], direction: str, task: str = "translation", paired: bool = False
) -> list[Picture] | None:
    """``true_translations``; but for pictures of ``testA`` those of ``testA_truth``, where there is such a folder.

    Raises InputError where one is missing.
    """
    folder, truths = root / f"test{direction[0]}", root / f"test{direction[0]}_truth"
    if task != "translation" or not truths.is_dir() or not all(p.path.is_relative_to(folder) for p in tests):
        return true_translations(root, tests, direction, task, paired)
    found = named_alike(tests, truths)
    for picture in tests:
        if picture.path.stem not in found:
            raise InputError(f"{truths}: no picture named {picture.path.stem}, expected one for each test picture")
    return [found[picture.path.stem] for picture in tests]


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


def find_masks(
    root: Path, tests: Sequence[Picture], size: tuple[int, int], how: str, mask_dir: Path | None = None
) -> dict[str, Tensor]:
    """Object masks of one side's test pictures by the stem of their names, bool (1, *size), read like the pictures.

    For pictures of ``testA`` they come from ``mask_dir/testA``, without a ``mask_dir`` from ``testA_mask`` in the
    data set, or else from the masks in this repository. Raises InputError for masks that fit no test picture.
    """
    name = tests[0].path.relative_to(root).parts[0]
    folder = root / f"{name}_mask" if mask_dir is None else mask_dir / name
    shipped = Path(__file__).parent / "data" / f"{root.name}_masks.json"
    stems = {p.path.stem for p in tests}
    masks = {}
    if folder.is_dir():
        masks = {stem: p.read(1) for stem, p in named_alike(tests, folder).items()}
        if not masks:
            raise InputError(f"{folder}: no mask there is named as a test picture, as {min(stems)}")
        if all(np.asarray(mask).max() < 128 for mask in masks.values()):
            raise InputError(f"{folder}: every mask is empty, expected objects above grey 127")
    elif mask_dir is None and shipped.exists():
        masks = {stem: mask for stem, mask in load_masks(shipped, name).items() if stem in stems}
    return {stem: to_tensor(resize_and_crop(m, size, how)) > 127 for stem, m in masks.items()}


def named_alike(tests: Sequence[Picture], folder: Path) -> dict[str, Picture]:
    """The pictures of ``folder`` that have the name of a test picture, by this name, without its ending.

    Raises InputError where two test pictures have one name.
    """
    counts = Counter(p.path.stem for p in tests)
    for name, count in counts.items():
        if count > 1:
            raise InputError(f"{folder}: {count} test pictures are named {name}, expected names of their own")
    return {p.path.stem: p for p in find_pictures(folder) if p.path.stem in counts}


def takes_grey(task: str, direction: str) -> bool:
    """Whether a generator of ``direction`` that was trained for ``task`` wants the grey versions of pictures."""
    return task == "colorization" and direction == "AtoB"


def as_input(path: Path, task: str, direction: str) -> Picture:
    """A picture file as a generator of ``direction`` wants it, which was trained for ``task``: grey, or as it is."""
    return Picture(path, grey=takes_grey(task, direction))


# ----------------------------------------------------------------------------------------------------------
#  Samples
# ----------------------------------------------------------------------------------------------------------


class PictureDataset(Dataset, ABC):
    """The common part of all kinds of data: finding, reading, caching and augmenting the pictures of each side.

    Takes ``root`` (the folder of the data set), the ``size`` (height, width) of pictures, ``channels`` 1 or 3, ``how``
    to resize (see ``resize``), a ``seed``, whether to ``hold_out`` a seeded tenth of each side (at least two pictures),
    the ``task`` (see ``find_side``), and ``crop_size``, the side of the squares that samples are (0: they are of
    ``size``). Raises InputError when a side is missing, empty or too small for that.

    ``dataset[epoch, index]`` is a dict of uint8 (channels, height, width) by side, flipped at random. With ``jitter``
    pictures are first resized to 1.12 × ``size`` and cropped at random.
    """

    # Width / height of a pair side by side: pairs of squares have 2, of 9:16 portraits 1.125; single squares and
    # portraits have at most 1. Otherwise nobody would notice a training on the halves of single photographs.
    LEAST_ASPECT = 1.1
    NAMED = 10  # unreadable pictures in one error

    paired: bool  # whether the pictures of the sides belong together one by one
    jitter = True  # False: resized and cropped in the middle, and flipped

    def __init__(
        self,
        root: Path,
        size: tuple[int, int],
        channels: int = 3,
        how: str = "squash",
        seed: int = 0,
        hold_out: bool = False,
        task: str = "translation",
        crop_size: int = 0,
    ):
        self.crop = (crop_size, crop_size) if crop_size else size
        self.root, self.size, self.channels, self.how, self.seed, self.task = root, size, channels, how, seed, task
        self.scaled = (int(SCALE * size[0]), int(SCALE * size[1])) if self.jitter else size
        self.kept: dict[Picture, Tensor] = {}
        self.room: float | None = None  # the limit of the last ``load``
        self.sides = self.find_sides("train")
        self.held_out: dict[str, list[Picture]] = {side: [] for side in self.sides}
        for d, (side, pictures) in enumerate(self.sides.items()):
            if not pictures:
                raise InputError(missing(root, side, task))
            if hold_out:
                if len(pictures) < 3:
                    raise InputError(f"{root / f'train{side}'}: {len(pictures)} pictures, --eval_interval needs 3")
                n = max(2, round(len(pictures) / 10))
                key = 0 if self.paired or pictures[0].half else d  # keep pairs and halves of one file together
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

    def check(self, limit: float = 0.0) -> None:
        """Decode every picture, the test pictures too, and ``load`` those to train on.

        InputError names pictures that cannot be read, or not be halved.
        """
        all_sides = self.sides, self.held_out, self.find_sides("test")
        pictures = {p for sides in all_sides for side in sides.values() for p in side}
        problems = self.load_all(limit)
        known = {p.path for p in self.kept} | problems.keys()
        problems |= unreadable([Picture(path) for path in sorted({p.path for p in pictures} - known)])
        if problems:
            lines = [f"{len(problems)} picture(s) cannot be read; mend or remove them:"]
            lines += [f"  {path}: {problems[path]}" for path in sorted(problems)][: self.NAMED]
            lines += [f"  … and {len(problems) - self.NAMED} more"] * (len(problems) > self.NAMED)
            raise InputError("\n".join(lines))
        for path in sorted({p.path for p in pictures if p.half}):
            height, width = Picture(path).size()
            if width < self.LEAST_ASPECT * height:
                raise InputError(
                    f"{path}: {width} pixels wide, {height} high, expected a pair side by side, at least "
                    f"{self.LEAST_ASPECT} times as wide as high. Single photographs are for --task colorization; "
                    "narrower pairs go to trainA and trainB, under equal names"
                )

    def describe(self) -> str:
        """One line: how many pictures each side has, and how many other files, by ending, lie in their folders."""
        told = []
        for side, pictures in self.sides.items():
            paths = [p.path.relative_to(self.root) for p in (*pictures, *self.held_out[side])]
            tops = sorted({path.parts[:-1][:1] for path in paths})  # () for those that lie in the root itself
            files = [f for top in tops for f in find_files(self.root.joinpath(*top), recursive=bool(top))]
            told.append(tell_found(side, len(paths), files))
        return ", ".join(told)

    def names(self) -> list[str]:
        """The names of all pictures, one side after the other, first those to train on, then those held out."""
        sides = (*self.sides.values(), *self.held_out.values())
        return [str(p.path.relative_to(self.root)) for pictures in sides for p in pictures]

    @property
    def halves(self) -> bool:
        """Whether its pictures are halves of files that hold A and B side by side."""
        return any(pictures[0].half is not None for pictures in self.sides.values())

    def load(self, limit: float) -> bool:
        """Decode and resize all pictures now and keep them in memory, unless that takes more than ``limit`` bytes: then
        False. Samples are the same either way. After ``check`` with this ``limit`` nothing is left to do. Raises
        InputError for a picture that cannot be read.
        """
        if self.room != limit:
            for path, reason in self.load_all(limit).items():
                raise InputError(f"{path}: cannot be read ({reason})")
        return bool(self.kept)

    def load_all(self, limit: float) -> dict[Path, str]:
        """``load``, without an error: returns the pictures that cannot be read, each with the reason."""
        pictures = list(dict.fromkeys(picture for side in self.sides.values() for picture in side))
        least = self.channels * self.scaled[0] * self.scaled[1]  # of each; "short_side" may make it longer
        self.kept, self.room, problems = {}, limit, {}
        if least * len(pictures) > limit:
            return {}
        for picture, image in in_threads(self.decode, pictures, "reading pictures"):
            if isinstance(image, str):
                problems[picture.path] = image
                continue
            self.kept[picture] = image
            limit -= image.nbytes
            if limit < 0:
                self.kept = {}
                break
        return problems

    def decode(self, picture: Picture) -> Tensor:
        """uint8 (channels, height, width), to be cropped with ``jitter``: then "short_side" leaves one side longer.

        Raises what ``Picture.open`` raises.
        """
        make = resize if self.jitter else resize_and_crop
        return to_tensor(make(picture.open(self.channels), self.scaled, self.how))

    def rng(self, epoch: int, index: int) -> np.random.Generator:
        """The random numbers of one sample."""
        return np.random.default_rng((1, self.seed, epoch, index))

    def read(self, picture: Picture) -> Tensor:
        """The picture that ``load`` has kept, or else ``decode`` it."""
        if picture in self.kept:
            return self.kept[picture]
        with name_unreadable(picture.path):
            return self.decode(picture)

    def augment(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Crop (channels, H, W) at a random place, and mirror one picture in two."""
        height, width = self.crop
        top = int(rng.integers(image.shape[1] - height + 1))
        left = int(rng.integers(image.shape[2] - width + 1))
        image = image[:, top : top + height, left : left + width]
        return image.flip(-1) if rng.random() < 0.5 else image

    def fixed_batch(self, n: int) -> dict[str, Tensor]:
        """The pictures that sheets show, always the same: ``n`` of each side (see the function of this name)."""
        return fixed_batch(self.root, n, self.size, self.channels, self.how, self.task, self.paired)


class UnpairedDataset(PictureDataset):
    """Pictures of A, each with a random partner from B; as many samples an epoch as the larger side has.

    Samples are {"A", "B"}, cropped and flipped independently. For "colorization" A and B share no picture: every second
    one is grey.
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
        rng, index = self.rng(*key), key[1]
        A, B = self.sides["A"], self.sides["B"]
        pair = {"A": A[index % len(A)], "B": B[rng.integers(len(B))]}
        return {side: self.augment(self.read(picture), rng) for side, picture in pair.items()}


class PairedDataset(PictureDataset):
    """Pictures of A and B that belong together: halves of one file, equal names in two folders, or grey and colour.

    Samples are {"A", "B"}, cropped and flipped alike. InputError where a picture has no partner.
    """

    paired = True

    def find_sides(self, split: str) -> dict[str, list[Picture]]:
        return match_pairs(self.root, split, {s: find_side(self.root, split, s, self.task) for s in "AB"})

    def check(self, limit: float = 0.0) -> None:
        """As of all data; InputError too where the aspect is kept and a picture has not its partner's."""
        super().check(limit)
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


class PlainDataset(PictureDataset):
    """Pictures without domains, each with a noise vector; as many samples an epoch as pictures (see ``find_plain``).

    Takes ``nz``, the length of the noise, too. Samples are {"image": uint8 (channels, height, width), "noise": float32
    (nz,)}: the picture flipped at random and not cropped, the noise uniform in [-1, 1].
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
        nz: int = 100,
    ):
        self.nz = nz
        super().__init__(root, size, channels, how, seed)

    def find_sides(self, split: str) -> dict[str, list[Picture]]:
        pictures = find_plain(self.root, split)
        if split == "train" and not pictures:
            root, endings = self.root, ", ".join(EXTENSIONS)
            found = f"no pictures ({endings}) to train on in it" if root.is_dir() else "no such folder"
            raise InputError(
                f"{root}: {found}. Expected pictures in {root}/train, in {root}/trainA, or in {root} itself"
            )
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


# The kinds of samples that a system may learn from (``System.data``). Only PlainDataset takes ``nz``.
KINDS: dict[str, type[PictureDataset]] = {"unpaired": UnpairedDataset, "paired": PairedDataset, "plain": PlainDataset}


def fixed_batch(
    root: Path,
    n: int,
    size: tuple[int, int],
    channels: int = 3,
    how: str = "squash",
    task: str = "translation",
    paired: bool = False,
) -> dict[str, Tensor]:
    """The first ``n`` test pictures of both sides (training pictures where there are no test folders).

    {"A": uint8 (n, channels, height, width), "B": likewise}, with fewer than ``n`` where a side has fewer, ``paired``
    with their partners; see ``unaugmented``. Raises InputError where a side has none, or a picture no partner.
    """
    sides = {s: find_side(root, "test", s, task) or find_side(root, "train", s, task) for s in "AB"}
    for side, pictures in sides.items():
        if not pictures:
            raise InputError(missing(root, side, task))
    sides = match_pairs(root, "test", sides) if paired else sides
    n = min(n, *map(len, sides.values()))
    return {side: torch.stack([unaugmented(p, size, channels, how) for p in ps[:n]]) for side, ps in sides.items()}


# ----------------------------------------------------------------------------------------------------------
#  The loader
# ----------------------------------------------------------------------------------------------------------


class EpochSampler(Sampler):
    """Yields (epoch, index), shuffled by (seed, epoch), every rank its own share.

    Set ``epoch``, and ``start`` (samples of this rank to leave out, for resuming within an epoch), before iterating.
    Rank r of n takes every n-th index, so n ranks at batch b see in each step what one process sees at batch n·b.
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
    """Let a loader process end only when its parent says so: Ctrl-C, systemd and batch systems signal whole groups. On
    macOS, which cannot tell who sent a SIGTERM, that ends it too.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_parent, daemon=True).start()


def wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
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
