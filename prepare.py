"""Put a data set on disk: draw the built-in one, fetch a public one, or make one of your own pictures.

python prepare.py --dataset_name horse2zebra                                  # fetch a public set
python prepare.py --dataset_name solid2striped                                # draw the built-in set
python prepare.py --from_A photos/horses --from_B photos/zebras --dataset_name mine
"""

from __future__ import annotations

from utils import InputError, Parser, Progress, at_least, check_name, first_line, run_script

import hashlib
import os
import shutil
import stat
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError

import numpy as np
from PIL import Image

from datasets import BUILT_IN
from pictures import EXTENSIONS, find_files, find_pictures, tell_found, unreadable

# ----------------------------------------------------------------------------------------------------------
#  The built-in set
# ----------------------------------------------------------------------------------------------------------

DAY = 24 * 3600  # seconds
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

    Beside ``testA`` stand ``testA_mask`` (255 on the objects) and ``testA_truth`` (the translation), likewise for B.
    """
    if root.exists():
        return
    with atomic_folder(root) as folder:
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


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder that appears as ``target`` only when the block has ended well."""
    prefix = f".{target.name}.partial."
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{prefix}*"):  # from a process that was killed
        if time.time() - left.stat().st_mtime > DAY:
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    partial.chmod(0o755)
    try:
        yield partial
        if not target.exists():  # another process may have been faster
            os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------
#  Public sets
# ----------------------------------------------------------------------------------------------------------


class PublicSet(NamedTuple):
    """An archive on the CycleGAN authors' server and what it should hold; None and {} where that is not known."""

    archive: str
    sha256: str | None
    counts: dict[str, int]


MIRROR = "http://efrosgans.eecs.berkeley.edu"
# The largest of these sets (monet2photo, iphone2dslr_flower) have about 300 MiB and 8,000 files.
MOST_DOWNLOAD, MOST_UNPACKED, MOST_FILES = 2**30, 2**32, 20_000
LEAST_SPEED = 1000  # bytes per second
# From TensorFlow Datasets, url_checksums/cycle_gan.txt.
SHA256 = {
    "apple2orange": "845a191e9af8926408ea597001cd03a452e3300a1f44a79fe329b3d59f6e3eb8",
    "horse2zebra": "a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1",
    "monet2photo": "88f91b00fc228f97c9411fbf1880ec1d119c98f1722e4cfcfaa2fb35fac05b04",
    "summer2winter_yosemite": "167fe1726807a9d22bd106b4a6c0bd7953b688af924ac1bf967439c4961e49f9",
    "cezanne2photo": "3a6c10ca21f9485862f1cbd707744b9dc258954a04631271d23a3605eeb63cff",
    "ukiyoe2photo": "02a2a2fb5ecf425ca1bf86aca7304377da64a2a1d3b86df54eb65e4068bf3b08",
    "vangogh2photo": "362c3473e70be0944bda08d49d660eafdc2854df55d697835b8186d1d79caaff",
    "iphone2dslr_flower": "8fcb5e374d631b107e1d961b8c4cd0a186aa2a4ff3e279923f4c426128de7113",
}
# From the papers and reports of complete copies.
COUNTS = {
    "apple2orange": {"trainA": 995, "trainB": 1019, "testA": 266, "testB": 248},
    "horse2zebra": {"trainA": 1067, "trainB": 1334, "testA": 120, "testB": 140},
    "monet2photo": {"trainA": 1072, "trainB": 6287, "testA": 121, "testB": 751},
    "summer2winter_yosemite": {"trainA": 1231, "trainB": 962, "testA": 309, "testB": 238},
    "facades": {"train": 400, "val": 100, "test": 106},
    "maps": {"train": 1096, "val": 1098},
}
PUBLIC_SETS = {n: PublicSet(f"cyclegan/datasets/{n}.zip", SHA256[n], COUNTS.get(n, {})) for n in SHA256}
PUBLIC_SETS |= {n: PublicSet(f"pix2pix/datasets/{n}.tar.gz", None, COUNTS[n]) for n in ("facades", "maps")}
# Sets that a browser has to fetch: the page, and the counts that the papers report.
BY_HAND = {
    "selfie2anime": (
        "https://drive.google.com/file/d/1xOWj1UVgp6NKMT3HbPhBbtq2A4EDkghF/view",
        {"trainA": 3400, "trainB": 3400, "testA": 100, "testB": 100},
    )
}


def fetch(name: str, data_dir: Path, mirror: str = MIRROR, timeout: float = 60.0) -> None:
    """Download and unpack a public set to ``data_dir/name``. Afterwards the folder is complete, or absent.

    An interrupted download starts anew. ``timeout`` is in seconds, see ``download``. Raises InputError with the address
    and the reason when the server, the archive, its checksum or its numbers of pictures are not as expected, and where
    to go for a set that only a browser can fetch.
    """
    target = data_dir / name
    if name in BY_HAND:
        page, counts = BY_HAND[name]
        if not target.exists():
            raise InputError(f"{name}: download it from {page} and unpack it to {target} ({', '.join(counts)})")
        report_counts(target, counts)
        return
    if name not in PUBLIC_SETS:
        raise InputError(
            f"--dataset_name {name}: not a public set, expected one of {', '.join((*PUBLIC_SETS, *BY_HAND))}"
        )
    archive, sha256, counts = PUBLIC_SETS[name]
    url = f"{mirror.rstrip('/')}/{archive}"
    if target.exists():
        print(f"{target} exists already; remove it to fetch it again.")
        report_counts(target, counts)
        return
    with atomic_folder(target) as partial:
        file = partial / Path(archive).name
        print(f"fetching {url}")
        try:
            download(url, file, timeout)
        except (OSError, ValueError, HTTPException) as error:  # ValueError: not an address
            if isinstance(error, HTTPError):
                error.close()  # it is the server's answer, too
            raise InputError(f"{url}: could not be fetched ({error}). docs/data.md lists other places.") from error
        if sha256 is not None and (found := digest(file)) != sha256:
            raise InputError(f"{url}: another archive, or cut short (sha256 {found}, expected {sha256})")
        unpack(file, partial / "unpacked")
        folder = partial / "unpacked" / name
        if not folder.is_dir():
            inside = ", ".join(sorted(p.name for p in (partial / "unpacked").iterdir())) or "nothing"
            raise InputError(f"{url}: expected a folder {name} in the archive, found {inside}")
        try:
            report_counts(folder, counts, shown=target)
        except InputError as error:
            raise InputError(f"{url}: {error}") from error
        if not target.exists():  # another process may have been faster
            folder.rename(target)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, timeout: float) -> None:
    """Fetch a file. Raises OSError where the server sends less than ``LEAST_SPEED`` over ``timeout`` seconds, more than
    ``MOST_DOWNLOAD``, or less than it has announced; and what urllib raises.
    """
    done: Future[None] = Future()
    with open(path, "wb") as file:
        # In a thread, because a server that sends the lines around the content byte by byte holds the reader for ever.
        threading.Thread(target=receive, args=(url, file, timeout, done), daemon=True).start()
        size = 0
        while not wait([done], timeout).done:
            before, size = size, file.tell()
            if size - before < LEAST_SPEED * timeout:
                raise OSError(f"only {size - before} bytes in {timeout:.0f} s")
        done.result()


def receive(url: str, file: BinaryIO, timeout: float, done: Future[None]) -> None:
    """The thread of ``download``. It ends when the file has been closed."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            announced = int(response.headers.get("Content-Length") or 0)
            with Progress(total=announced or None, unit="B", unit_scale=True) as bar:
                while chunk := response.read1(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if file.tell() > MOST_DOWNLOAD:
                        raise OSError(f"more than {MOST_DOWNLOAD >> 20} MiB, expected a data set")
        if file.tell() < announced:
            raise OSError(f"{file.tell()} of {announced} bytes received")
        done.set_result(None)
    except BaseException as error:
        done.set_exception(error)


def unpack(archive: Path, folder: Path) -> None:
    """Extract a .zip or .tar.gz of pictures.

    Raises InputError when it is damaged or encrypted, has a member that is a link or would land outside ``folder``, or
    more files or bytes than ``MOST_FILES`` and ``MOST_UNPACKED``.
    """
    folder.mkdir()
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                entries = file.infolist()
                links = [e.filename for e in entries if stat.S_ISLNK(e.external_attr >> 16)]
                check_members(archive, folder, [e.filename for e in entries], sum(e.file_size for e in entries), links)
                file.extractall(folder)
        else:
            with tarfile.open(archive, "r:gz") as file:
                members, n_bytes = [], 0
                for member in file:  # one by one: an archive without end is refused on the way
                    members.append(member)
                    n_bytes += member.size
                    if len(members) > MOST_FILES or n_bytes > MOST_UNPACKED:
                        break
                links = [m.name for m in members if not (m.isfile() or m.isdir())]
                check_members(archive, folder, [m.name for m in members], n_bytes, links)
                file.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
                file.extractall(folder)
    except InputError:
        raise
    except Exception as error:  # zipfile and tarfile raise anything: OSError, zlib.error, UnicodeDecodeError, ...
        raise InputError(f"{archive.name}: cannot be unpacked ({first_line(error)})") from error


def check_members(archive: Path, folder: Path, names: Sequence[str], n_bytes: int, links: Sequence[str]) -> None:
    """Raise InputError for what an archive of pictures does not hold, before anything is extracted."""
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{archive.name}: {name} would land outside its folder")
    if links:
        raise InputError(f"{archive.name}: {links[0]} is neither a file nor a folder")
    if len(names) > MOST_FILES:
        raise InputError(f"{archive.name}: more than {MOST_FILES} files, expected a data set")
    if n_bytes > MOST_UNPACKED:
        raise InputError(f"{archive.name}: unpacks to {n_bytes >> 20} MiB, expected at most {MOST_UNPACKED >> 20}")


def report_counts(folder: Path, counts: dict[str, int], shown: Path | None = None) -> None:
    """Print how many pictures each sub-folder holds. Raises InputError where ``counts`` are others."""
    wrong = []
    for name in sorted(counts or (p.name for p in folder.iterdir() if p.is_dir())):
        found = len(find_pictures(folder / name))
        print(f"  {(shown or folder) / name}: {found} pictures")
        if found != counts.get(name, found):
            wrong.append(f"{(shown or folder) / name}: {found} pictures, expected {counts[name]}")
    if wrong:
        raise InputError("; ".join(wrong))


# ----------------------------------------------------------------------------------------------------------
#  Your own pictures
# ----------------------------------------------------------------------------------------------------------


def import_pictures(
    from_A: Path, from_B: Path, target: Path, test_share: float = 0.1, seed: int = 0, copy: bool = False
) -> None:
    """Make a data set of two folders of pictures: links (or copies), a seeded test share split off.

    Unreadable files are left out by name, as are all but the first of files with equal bytes, on either side (they
    could stand in train and test at once). At least one picture a side stays in train. Raises InputError where
    ``target`` exists, ``test_share`` is not in [0, 1), or a side has no picture that can be read.
    """
    if target.exists():
        raise InputError(f"{target} exists already; choose another --dataset_name or remove it")
    if not 0 <= test_share < 1:
        raise InputError(f"--test_share {test_share}: expected a share from 0 to below 1")
    sides: dict[str, list[Path]] = {"A": [], "B": []}
    first: dict[str, Path] = {}
    sources, wanted = {"A": from_A, "B": from_B}, f"expected a folder of {', '.join(EXTENSIONS)}"
    for side, source in sources.items():
        if not source.is_dir():
            raise InputError(
                f"--from_{side} {source}: {'is a file' if source.exists() else 'no such folder'}, {wanted}"
            )
    for side, source in sources.items():
        pictures = find_pictures(source)
        print(tell_found(str(source), len(pictures), find_files(source)))
        if not pictures:
            raise InputError(f"--from_{side} {source}: no pictures in it, {wanted}")
        bad = unreadable(pictures)
        for path, reason in bad.items():
            print(f"left out, unreadable: {path} ({reason})")
        for picture in pictures:
            if picture.path not in bad:
                if (found := digest(picture.path)) in first:
                    print(f"left out, duplicate:  {picture.path} (the same bytes as {first[found]})")
                else:
                    first[found] = picture.path
                    sides[side].append(picture.path)
        if not sides[side]:
            why = "can be read" if len(bad) == len(pictures) else "is left: all are unreadable or duplicates"
            raise InputError(f"--from_{side} {source}: none of its {len(pictures)} pictures {why}")
    with atomic_folder(target) as folder:
        for d, (side, paths) in enumerate(sides.items()):
            n_test = min(round(test_share * len(paths)), len(paths) - 1)
            test = set(np.random.default_rng((5, seed, d)).permutation(len(paths))[:n_test].tolist())
            for split in ("train", "test"):
                (folder / f"{split}{side}").mkdir()
            for i, path in enumerate(paths):
                name = f"{i:05d}_{path.name}"
                if len(os.fsencode(name)) > 255:  # the most that disks take
                    name = f"{i:05d}{path.suffix}"
                place = folder / f"{'test' if i in test else 'train'}{side}" / name
                if copy:
                    shutil.copyfile(path, place)
                else:
                    place.symlink_to(path.resolve())
    report_counts(target, {})


def make_parser() -> Parser:
    parser = Parser("Fetch a public data set, draw the built-in one, or make one of your own pictures.")
    add = parser.add_argument
    sets = f"{BUILT_IN} (drawn), {', '.join(PUBLIC_SETS)} (fetched), {', '.join(BY_HAND)} (says where to fetch it)"
    add("--dataset_name", required=True, help=f"{sets}, or a new name with --from_A and --from_B")
    add("--data_dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    add("--from_A", type=Path, help="folder of your pictures of domain A, unpaired; for pairs see docs/data.md")
    add("--from_B", type=Path, help="folder of your pictures of domain B")
    add("--test_share", type=float, default=0.1, help="share of your pictures that goes to testA and testB")
    add("--seed", type=at_least(0), default=0, help="seed of that split")
    add("--copy", action="store_true", help="copy your pictures instead of linking them")
    add("--mirror", default=MIRROR, help="server to fetch from, with the same paths below it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        parser = make_parser()
        options = parser.parse_args(argv)
        name, root = options.dataset_name, options.data_dir / options.dataset_name
        check_name("--dataset_name", name)
        own = "test_share", "seed", "copy"
        needed = {} if options.from_A is not None else dict.fromkeys(own, "needs --from_A and --from_B")
        if options.from_A is not None or name == BUILT_IN:
            needed["mirror"] = "goes with fetching a public set"
        for flag in (flag for flag in needed if getattr(options, flag) != parser.get_default(flag)):
            raise InputError(f"--{flag} {needed[flag]}")
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

    return run_script("prepare.py", work)


if __name__ == "__main__":
    sys.exit(main())
