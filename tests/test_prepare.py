"""Putting data sets on disk: drawing the built-in one, fetching and unpacking public ones, importing pictures."""

from utils import InputError

import functools
import gc
import gzip
import hashlib
import io
import itertools
import os
import re
import socket
import stat
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from common import RED, below, noise, plain, publish, save
from conftest import Handler, Server
from PIL import Image, ImageFilter

import datasets
import prepare
from datasets import BUILT_IN, UnpairedDataset, find_side
from pictures import find_pictures
from prepare import PUBLIC_SETS, atomic_folder, draw_built_in, fetch, import_pictures, unpack

# ----------------------------------------------------------------------------------------------------------
#  The built-in set
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_in(tmp_path_factory):
    root = tmp_path_factory.mktemp("built_in") / BUILT_IN
    draw_built_in(root, n_train=3, n_test=4)
    return root


def test_built_in_set_is_the_same_each_time_and_a_smaller_one_its_start(built_in, tmp_path):
    draw_built_in(tmp_path / "again", n_train=3, n_test=4)
    larger = below(built_in)
    assert below(tmp_path / "again") == larger
    assert below(tmp_path).keys() == {"again", *(f"again/{name}" for name in larger)}  # no leftovers
    draw_built_in(tmp_path / "small", n_train=1, n_test=1)
    small = below(tmp_path / "small")
    assert small == {name: larger[name] for name in small}


def test_built_in_set_has_its_folders_and_no_picture_twice(built_in):
    counts = {folder.name: len(find_pictures(folder)) for folder in built_in.iterdir()}
    test_folders = {f"test{side}{view}": 4 for side in "AB" for view in ("", "_mask", "_truth")}
    assert counts == {"trainA": 3, "trainB": 3, **test_folders}
    contents = [p.path.read_bytes() for p in find_pictures(built_in)]
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize("side", ["A", "B"])
def test_truth_differs_from_the_test_picture_on_the_objects_and_nowhere_else(built_in, side):
    for i in range(4):
        mask_image = Image.open(built_in / f"test{side}_mask" / f"{i:03d}.png")
        mask = np.asarray(mask_image)
        assert mask_image.mode == "L" and set(np.unique(mask)) == {0, 255}
        picture, truth = (
            np.asarray(Image.open(built_in / folder / f"{i:03d}.png")).astype(int)
            for folder in (f"test{side}", f"test{side}_truth")
        )
        assert picture.shape == truth.shape == (128, 128, 3) and mask.shape == (128, 128)
        differs = np.abs(picture - truth).max(axis=-1) > 0
        around = np.asarray(mask_image.filter(ImageFilter.MaxFilter(5))) == 255  # the soft edge, 2 pixels
        assert not differs[~around].any()
        assert differs[mask == 255].mean() > 0.8


def test_B_is_striped_and_A_is_not(built_in):
    def darkest_and_lightest(picture, mask):
        grey = np.asarray(Image.open(built_in / picture / "000.png").convert("L"))
        inside = grey[np.asarray(Image.open(built_in / mask / "000.png")) == 255]
        return np.percentile(inside, [10, 90])

    dark, light = darkest_and_lightest("testB", "testB_mask")
    assert dark < 40 and light > 130
    dark, light = darkest_and_lightest("testA", "testA_mask")
    assert light - dark < 60


def test_existing_folder_is_left_alone_and_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.delattr(prepare, "draw_scene")
    (tmp_path / BUILT_IN).mkdir()
    draw_built_in(tmp_path / BUILT_IN, 1, 1)
    assert below(tmp_path) == {BUILT_IN: None}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_folder_whose_block_fails(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "set") as folder:
        (folder / "half").write_text("x")
        raise error
    assert below(tmp_path) == {}


def test_a_folder_appears_only_at_the_end_and_a_faster_process_keeps_its_own(tmp_path):
    with atomic_folder(tmp_path / "new" / "set") as folder:
        (folder / "a").write_text("x")
        assert not (tmp_path / "new" / "set").exists()
    assert below(tmp_path) == {"new": None, "new/set": None, "new/set/a": b"x"}
    assert stat.S_IMODE((tmp_path / "new" / "set").stat().st_mode) == 0o755
    with atomic_folder(tmp_path / "new" / "other") as folder:
        (folder / "mine").write_text("x")
        plain(tmp_path / "new" / "other" / "theirs.png")
    assert below(tmp_path / "new").keys() == {"set", "set/a", "other", "other/theirs.png"}


def test_leftovers_of_a_killed_process_are_removed_after_a_day(tmp_path):
    ages = {".set.partial.old": 1.01, ".set.partial.young": 0.99, ".other.partial.old": 9, "set.partial.old": 9}
    for name, days in ages.items():
        (tmp_path / name / "sub").mkdir(parents=True)
        os.utime(tmp_path / name, times=(time.time() - days * 24 * 3600,) * 2)
    with atomic_folder(tmp_path / "set"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"set", *ages} - {".set.partial.old"}


# ----------------------------------------------------------------------------------------------------------
#  Public sets, from a server on the loopback interface
# ----------------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("past_any_proxy")


def png_bytes(seed, size=(16, 8)):
    stream = io.BytesIO()
    noise(seed, size).save(stream, "PNG")
    return stream.getvalue()


ZIPPED = {f"apple2orange/{f}/{i}.png": png_bytes(i) for f in ("trainA", "trainB", "testA") for i in range(2)}
TARRED = {f"facades/{f}/{i}.png": png_bytes(i) for f in ("train", "val") for i in range(2)}
BOTH = pytest.mark.parametrize("name, members", [("apple2orange", ZIPPED), ("facades", TARRED)], ids=["zip", "tar"])


def inside(data, name):
    """The files below data/name under the names they have in the archive; nothing else may stand in data."""
    assert [p.name for p in data.iterdir()] == [name]
    return {member: content for member, content in below(data).items() if content is not None}


def refused(web, tmp_path, name="apple2orange"):
    """Why a set cannot be fetched, in one line that names the archive or its address; nothing may be left of it."""
    before = below(tmp_path)
    with pytest.raises(InputError) as error:
        fetch(name, tmp_path / "data", web.url, timeout=0.3)
    assert below(tmp_path) == {**before, "data": None}
    message = str(error.value)
    assert Path(PUBLIC_SETS[name].archive).name in message and "\n" not in message
    return message


def test_fetched_set_stands_whole_and_is_counted(web, monkeypatch, tmp_path, capsys):
    publish(web, monkeypatch, ZIPPED, checksum=True, counts={"trainA": 2, "trainB": 2, "testA": 2})
    data = tmp_path / "data"
    fetch("apple2orange", data, web.url + "/")
    assert inside(data, "apple2orange") == ZIPPED
    counted = "".join(f"  {data}/apple2orange/{folder}: 2 pictures\n" for folder in ("testA", "trainA", "trainB"))
    assert capsys.readouterr().out == f"fetching {web.url}/cyclegan/datasets/apple2orange.zip\n{counted}"


def test_other_numbers_of_pictures_than_expected_are_refused(web, monkeypatch, tmp_path):
    publish(web, monkeypatch, ZIPPED, counts={"trainA": 2, "trainB": 7, "testA": 2, "testB": 3})
    root = tmp_path / "data" / "apple2orange"
    assert refused(web, tmp_path) == (
        f"{web.url}/cyclegan/datasets/apple2orange.zip: {root}/testB: 0 pictures, expected 3; "
        f"{root}/trainB: 2 pictures, expected 7"
    )


def test_fetching_again_asks_no_server_and_counts_again(web, monkeypatch, tmp_path, capsys):
    publish(web, monkeypatch, ZIPPED, counts={"trainA": 2})
    for told in ("fetching", "exists already"):
        fetch("apple2orange", tmp_path, web.url)
        printed = capsys.readouterr().out
        assert told in printed and "trainA: 2 pictures\n" in printed and "trainB" not in printed
    publish(web, monkeypatch, ZIPPED)  # numbers that are not known are only printed
    fetch("apple2orange", tmp_path, web.url)
    assert f"{tmp_path}/apple2orange/trainB: 2 pictures\n" in capsys.readouterr().out
    publish(web, monkeypatch, ZIPPED, counts={"trainA": 2})
    (tmp_path / "apple2orange" / "trainA" / "0.png").unlink()
    with pytest.raises(InputError, match=f"^{tmp_path}/apple2orange/trainA: 1 pictures, expected 2$"):
        fetch("apple2orange", tmp_path, web.url)
    assert len(web.asked) == 1 and (tmp_path / "apple2orange").is_dir()


def test_pix2pix_set_serves_its_halves(web, monkeypatch, tmp_path, capsys):
    publish(web, monkeypatch, TARRED, "facades", counts={"train": 2, "val": 2})
    fetch("facades", tmp_path, web.url)
    assert inside(tmp_path, "facades") == TARRED
    assert capsys.readouterr().out.count(": 2 pictures\n") == 2
    pair = np.asarray(noise(1, (16, 8)))
    for side, half in (("A", pair[:, :8]), ("B", pair[:, 8:])):
        assert np.array_equal(np.asarray(find_side(tmp_path / "facades", "train", side)[1].open()), half)
    assert UnpairedDataset(tmp_path / "facades", (8, 8))[0, 1]["B"].shape == (3, 8, 8)


def test_wrong_checksum_is_told(web, monkeypatch, tmp_path):
    path = publish(web, monkeypatch, ZIPPED, checksum=True)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"more")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"sha256 {found}, expected {expected}" in refused(web, tmp_path)


@pytest.mark.parametrize("length", ["Content-Length", "chunked"])
@pytest.mark.parametrize("checksum", [False, True])
def test_connection_closed_midway_is_refused_and_the_second_try_succeeds(web, monkeypatch, tmp_path, checksum, length):
    size = publish(web, monkeypatch, ZIPPED, checksum=checksum).stat().st_size
    web.length, web.send = length, lambda content: [content[:-100]]
    expected = f"{size - 100} of {size} bytes received" if length == "Content-Length" else "IncompleteRead"
    assert f"could not be fetched ({expected}" in refused(web, tmp_path)
    web.length, web.send = "Content-Length", lambda content: [content]
    fetch("apple2orange", tmp_path / "data", web.url)
    assert inside(tmp_path / "data", "apple2orange") == ZIPPED


def test_missing_archive_names_the_address(web, tmp_path):
    expected = f"{web.url}/cyclegan/datasets/apple2orange.zip: could not be fetched (HTTP Error 404"
    assert refused(web, tmp_path).startswith(expected)
    gc.collect()  # a connection that was left open would be a ResourceWarning, which fails the test


@pytest.mark.parametrize("mirror", ["efrosgans.eecs.berkeley.edu", "http://127.0.0.1:port", "http://a b"])
def test_address_that_is_none_is_refused(tmp_path, mirror):
    with pytest.raises(InputError, match=re.escape(mirror)):
        fetch("apple2orange", tmp_path, mirror)
    assert below(tmp_path) == {}


def test_silent_server_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(InputError, match="could not be fetched"):
            fetch("apple2orange", tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)
    assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None
    assert below(tmp_path) == {}


def trickle(content):
    """Most of it at once, then 20 bytes a second for over a second."""
    yield content[:-24]
    for byte in content[-24:]:
        time.sleep(0.05)
        yield bytes([byte])


def test_slow_server_is_given_up_and_one_just_fast_enough_is_not(web, monkeypatch, tmp_path):
    publish(web, monkeypatch, ZIPPED | {"apple2orange/trainA/2.png": bytes(10**5)})  # at once: no merit later on
    web.send = trickle
    assert re.search(r"could not be fetched \(only \d bytes in 0 s\)", refused(web, tmp_path))
    monkeypatch.setattr(prepare, "LEAST_SPEED", 1)
    fetch("apple2orange", tmp_path / "data", web.url, timeout=0.3)
    assert len(inside(tmp_path / "data", "apple2orange")) == len(ZIPPED) + 1


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"])
def test_a_server_that_sends_its_lines_byte_by_byte_is_given_up(monkeypatch, tmp_path, head):
    """The head without end, or the length of the first chunk: no single wait is long."""
    monkeypatch.setattr(Handler, "handle", lambda self: [self.request.sendall(piece) for piece in drip(head)])
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        start = time.monotonic()
        with pytest.raises(InputError, match=r"could not be fetched \(only 0 bytes in 0 s\)"):
            fetch("apple2orange", tmp_path, f"http://127.0.0.1:{server.server_port}", timeout=0.3)
        assert time.monotonic() - start < 1.5 and below(tmp_path) == {}
        server.shutdown()


def drip(head):
    yield head
    for _ in range(40):
        time.sleep(0.05)
        yield b"0"


@pytest.mark.parametrize("length", ["Content-Length", ""])
def test_a_download_of_more_bytes_than_a_data_set_has_is_given_up(web, monkeypatch, tmp_path, length):
    size = publish(web, monkeypatch, ZIPPED).stat().st_size
    web.length = length
    if not length:
        web.send = lambda content: itertools.repeat(content)  # without end
    monkeypatch.setattr(prepare, "MOST_DOWNLOAD", size - 1)
    assert "could not be fetched (more than 0 MiB, expected a data set)" in refused(web, tmp_path)
    web.send = lambda content: [content]
    monkeypatch.setattr(prepare, "MOST_DOWNLOAD", size)
    fetch("apple2orange", tmp_path / "data", web.url)
    assert inside(tmp_path / "data", "apple2orange") == ZIPPED


def test_the_least_speed_and_the_most_bytes_leave_room_for_every_public_set():
    assert prepare.LEAST_SPEED <= 1000 and prepare.MOST_DOWNLOAD >= 2 * 300 * 2**20
    assert prepare.MOST_UNPACKED >= 4 * 300 * 2**20 and prepare.MOST_FILES >= 2 * 8500


# ----------------------------------------------------------------------------------------------------------
#  Archives
# ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_truncated_archive_without_checksum_is_refused(web, monkeypatch, tmp_path, name, members, kept):
    path = publish(web, monkeypatch, members, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert re.search(r"cannot be unpacked \(.*[^:]\)$", refused(web, tmp_path, name))  # with a reason


def test_however_a_tar_is_cut_no_picture_is_lost_unnoticed(tmp_path, web, monkeypatch):
    content = publish(web, monkeypatch, TARRED, "facades").read_bytes()
    archive, refusals = tmp_path / "cut.tar.gz", 0
    for length in range(0, len(content), 7):
        archive.write_bytes(content[:length])
        try:
            unpack(archive, tmp_path / f"{length}")
        except InputError:
            refusals += 1
        else:  # only padding is missing
            assert {k: v for k, v in below(tmp_path / f"{length}").items() if v is not None} == TARRED
    assert refusals > 100


@pytest.mark.parametrize("outside", ["../../../evil.txt", "apple2orange/../../../../evil.txt", "{tmp}/evil.txt"])
def test_zip_that_leads_outside_is_refused(web, monkeypatch, tmp_path, outside):
    outside = outside.format(tmp=tmp_path)
    publish(web, monkeypatch, {**ZIPPED, outside: b"evil"})
    assert refused(web, tmp_path) == f"apple2orange.zip: {outside} would land outside its folder"


@pytest.mark.parametrize("kind", ["path", "symlink", "hardlink"])
def test_tar_that_leads_outside_is_refused(web, monkeypatch, tmp_path, kind):
    (tmp_path / "secret").mkdir()
    link = tarfile.TarInfo("facades/link")
    link.type = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE
    link.linkname = "../../../../secret" if kind == "symlink" else "../../../secret"
    evil = {"../../../evil.txt": b"evil"} if kind == "path" else {link: b"", "facades/link/evil.txt": b"evil"}
    publish(web, monkeypatch, {**TARRED, **evil}, "facades")
    expected = "../../../evil.txt would land outside its folder" if kind == "path" else "facades/link is neither a file"
    assert refused(web, tmp_path, "facades").startswith(f"facades.tar.gz: {expected}")


def zip_link(name):
    link = zipfile.ZipInfo(name)
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return link


def tar_entry(name, kind):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "0.png"
    return entry


@pytest.mark.parametrize(
    "name, members, odd",
    [
        ("apple2orange", ZIPPED, zip_link("apple2orange/trainA/9.png")),
        ("facades", TARRED, tar_entry("facades/train/9.png", tarfile.SYMTYPE)),
        ("facades", TARRED, tar_entry("facades/train/9.png", tarfile.FIFOTYPE)),
    ],
    ids=["link in a zip", "link in a tar", "pipe in a tar"],
)
def test_what_is_neither_a_file_nor_a_folder_is_refused(web, monkeypatch, tmp_path, name, members, odd):
    publish(web, monkeypatch, {**members, odd: b"0.png" if name == "apple2orange" else b""}, name)
    assert re.fullmatch(r"(\w|\.)+: \w+/\w+/9\.png is neither a file nor a folder", refused(web, tmp_path, name))


@BOTH
@pytest.mark.parametrize(
    "limit, message", [("MOST_FILES", "more than {} files"), ("MOST_UNPACKED", "unpacks to 0 MiB")]
)
def test_an_archive_of_more_than_a_data_set_is_refused(web, monkeypatch, tmp_path, name, members, limit, message):
    publish(web, monkeypatch, members, name)
    found = len(members) if limit == "MOST_FILES" else sum(map(len, members.values()))
    monkeypatch.setattr(prepare, limit, found - 1)
    assert refused(web, tmp_path, name).split(": ")[1].startswith(message.format(found - 1))
    monkeypatch.setattr(prepare, limit, found)
    fetch(name, tmp_path / "data", web.url)
    assert inside(tmp_path / "data", name) == members


@pytest.mark.parametrize("limit", ["MOST_FILES", "MOST_UNPACKED"])
def test_a_tar_without_end_is_not_read_to_its_end(web, monkeypatch, tmp_path, limit):
    path = publish(web, monkeypatch, {"facades/0.png": b"0", "facades/1.png": bytes(10**6), "2.png": b"2"}, "facades")
    tar = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(tar[:5000]))  # a sound archive, cut within its second file
    assert "cannot be unpacked" in refused(web, tmp_path, "facades")
    monkeypatch.setattr(prepare, limit, 1)
    assert "cannot be unpacked" not in refused(web, tmp_path, "facades")


def test_encrypted_zip_is_refused(web, monkeypatch, tmp_path):
    path = publish(web, monkeypatch, ZIPPED)
    content = bytearray(path.read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # of each file, and in the directory at the end
        for found in re.finditer(re.escape(header), bytes(content)):
            content[found.start() + flags] |= 1
    path.write_bytes(content)
    assert re.match(r"apple2orange\.zip: cannot be unpacked \(.* is encrypted", refused(web, tmp_path))


def test_archive_of_something_else_says_what_it_holds(web, monkeypatch, tmp_path):
    publish(web, monkeypatch, {"pears/trainA/0.png": b"", "readme": b""})
    assert "expected a folder apple2orange in the archive, found pears, readme" in refused(web, tmp_path)


@pytest.mark.parametrize("name", ["apple2orange", "facades"], ids=["zip", "tar"])
def test_a_damaged_archive_is_refused_by_its_name_in_one_line_or_unpacked(web, monkeypatch, tmp_path, name):
    """Whatever zipfile, tarfile and zlib raise: UnicodeDecodeError, for example."""
    content = publish(web, monkeypatch, {f"{name}/ä{i}.png": b"some bytes" for i in range(3)}, name).read_bytes()
    archive, rng, refusals = tmp_path / Path(PUBLIC_SETS[name].archive).name, np.random.default_rng(0), 0
    content = gzip.decompress(content) if archive.suffix == ".gz" else content
    filled = np.flatnonzero(np.frombuffer(content, dtype=np.uint8))
    for i in range(150):
        damaged = bytearray(content)
        for place in rng.choice(filled, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        archive.write_bytes(gzip.compress(damaged, 1) if archive.suffix == ".gz" else damaged)
        try:
            unpack(archive, tmp_path / f"{i}")
        except InputError as error:
            assert re.fullmatch(rf"{archive.name}: .+", str(error))
            refusals += 1
    assert 50 < refusals < 150


# ----------------------------------------------------------------------------------------------------------
#  Names of public sets
# ----------------------------------------------------------------------------------------------------------


def test_a_set_that_a_browser_must_fetch_says_where_it_is_and_is_counted(tmp_path, capsys, monkeypatch):
    page, root = "https://drive.google.com/file/d/1xOWj1UVgp6NKMT3HbPhBbtq2A4EDkghF/view", tmp_path / "selfie2anime"
    with pytest.raises(InputError, match=re.escape(f"{page} and unpack it to {root} (trainA, ")):
        fetch("selfie2anime", tmp_path)
    assert below(tmp_path) == {}
    assert "python prepare.py --dataset_name selfie2anime" in datasets.missing(root, "A")
    save(noise(0), root / "trainA" / "0.png")
    with pytest.raises(
        InputError, match=f"{root}/testB: 0 pictures, expected 100; {root}/trainA: 1 pictures, expected"
    ):
        fetch("selfie2anime", tmp_path)
    assert f"{root}/trainA: 1 pictures\n" in capsys.readouterr().out
    monkeypatch.setitem(prepare.BY_HAND, "selfie2anime", (page, {"trainA": 1}))
    fetch("selfie2anime", tmp_path)


def test_every_public_set_has_a_well_formed_entry():
    for name, entry in PUBLIC_SETS.items():
        assert Path(entry.archive).name in (f"{name}.zip", f"{name}.tar.gz")
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)


# ----------------------------------------------------------------------------------------------------------
#  Your own pictures
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """Two folders of 10 and 4 pictures."""
    folders = tmp_path / "horses", tmp_path / "zebras"
    for seed, (folder, n) in enumerate(zip(folders, (10, 4), strict=True)):
        for i in range(n):
            save(noise(100 * seed + i), folder / f"p{i}.png")
    return folders


def names(folder):
    return [p.path.name for p in find_pictures(folder)]


@pytest.mark.parametrize("copy", [False, True])
def test_own_pictures_are_linked_or_copied(own, tmp_path, monkeypatch, copy):
    sources = [p.path for folder in own for p in find_pictures(folder)]
    contents = sorted(path.read_bytes() for path in sources)
    import_pictures(Path("horses"), Path("zebras"), Path("data/mine"), copy=copy)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # links hold though the sources were given relative
    found = [p.path for p in find_pictures(tmp_path / "data" / "mine")]
    assert {path.is_symlink() for path in found} == {not copy}
    assert copy or sorted(path.resolve() for path in found) == sorted(sources)
    for path in sources if copy else ():
        path.unlink()
    assert sorted(path.read_bytes() for path in found) == contents and len(found) == 14
    dataset = UnpairedDataset(tmp_path / "data" / "mine", (16, 16))  # which can be trained on
    dataset.check()
    assert len(dataset) == 9 and dataset[0, 8]["A"].shape == (3, 16, 16)


def test_test_share_is_split_off_by_the_seed(own, tmp_path):
    splits = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        import_pictures(*own, tmp_path / name, test_share=0.3, seed=seed)
        splits[name] = {f: names(tmp_path / name / f) for f in ("trainA", "testA", "trainB", "testB")}
    assert {f: len(found) for f, found in splits["one"].items()} == {"trainA": 7, "testA": 3, "trainB": 3, "testB": 1}
    assert splits["one"] == splits["again"]
    assert splits["one"]["testA"] != splits["other"]["testA"]
    assert len({*splits["one"]["trainA"], *splits["one"]["testA"]}) == 10
    assert splits["one"]["testA"] != sorted(splits["one"]["trainA"] + splits["one"]["testA"])[:3]  # not just the first


@pytest.mark.parametrize("share, kept", [(0, (1, 4)), (0.5, (1, 2)), (0.99, (1, 1))])
def test_train_is_never_empty(own, tmp_path, share, kept):
    plain(tmp_path / "single" / "0.png")
    import_pictures(tmp_path / "single", own[1], tmp_path / "mine", test_share=share)
    assert tuple(len(names(tmp_path / "mine" / f"train{side}")) for side in "AB") == kept
    assert len(names(tmp_path / "mine" / "testB")) == 4 - kept[1] and names(tmp_path / "mine" / "testA") == []


def test_duplicates_damaged_and_other_files_are_named_and_left_out(own, tmp_path, capsys):
    horses, zebras = own
    for copy in (horses / "q.png", zebras / "q.png"):  # a picture stands once, and on one side
        copy.write_bytes((horses / "p3.png").read_bytes())
    for i in range(3):  # equal names do not clash
        save(noise(50 + i), horses / f"album{i}" / "p0.png")
    (zebras / "page.jpg").write_text("not a picture")
    (zebras / "notes.txt").write_text("not a picture")
    import_pictures(horses, zebras, tmp_path / "mine", test_share=0)
    printed = capsys.readouterr().out
    assert f"{horses}: 14 pictures\n" in printed and f"{zebras}: 6 pictures (passed over: 1 .txt)\n" in printed
    for copy in (horses / "q.png", zebras / "q.png"):
        assert f"left out, duplicate:  {copy} (the same bytes as {horses}/p3.png)" in printed
    assert f"left out, unreadable: {zebras}/page.jpg (" in printed
    assert printed.count("left out") == 3
    assert f"{tmp_path}/mine/trainA: 13 pictures" in printed
    assert not any("q.png" in n or "page" in n for f in ("trainA", "trainB") for n in names(tmp_path / "mine" / f))
    assert len(names(tmp_path / "mine" / "trainA")) == 13 and len(names(tmp_path / "mine" / "trainB")) == 4


@pytest.mark.parametrize(
    "from_A, from_B, share, message",
    [
        ("none", "zebras", 0.1, "--from_A none: no such folder"),
        ("bad/a.png", "zebras", 0.1, "--from_A bad/a.png: is a file, expected a folder"),
        ("horses", "void", 0.1, "--from_B void: no pictures in it"),
        ("horses", "bad", 0.1, "--from_B bad: none of its 1 pictures can be read"),
        ("horses", "horses", 0.1, "--from_B horses: none of its 10 pictures is left: all are unreadable or duplicates"),
        ("horses", "zebras", -0.1, "--test_share -0.1: expected a share"),
        ("horses", "zebras", 1.0, "--test_share 1.0: expected a share"),
        ("horses", "zebras", float("nan"), "--test_share nan: expected a share"),
    ],
)
def test_what_cannot_be_imported_is_named(own, tmp_path, from_A, from_B, share, message):
    (tmp_path / "void").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no")
    with pytest.raises(InputError, match=f"^{message}"):
        import_pictures(Path(from_A), Path(from_B), Path("mine"), test_share=share)
    assert not (tmp_path / "mine").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine exists already"):
        import_pictures(*own, tmp_path / "mine")
    assert below(tmp_path / "mine") == {}


# ----------------------------------------------------------------------------------------------------------
#  The command line
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys):
    """Runs prepare.py: what it printed, or what it was refused with, as one line."""

    def run(*argv, status=0):
        assert prepare.main([str(a) for a in argv]) == status
        out, err = capsys.readouterr()
        assert not status or err.count("\n") == 1
        return err.strip() if status else out

    return run


def test_names_as_long_as_disks_take_are_shortened(command, tmp_path):
    for side in "AB":
        plain(tmp_path / side / f"{side * 251}.png", colour=RED if side == "A" else "blue")
    command("--dataset_name", "mine", "--data_dir", tmp_path, "--from_A", tmp_path / "A", "--from_B", tmp_path / "B")
    assert [path.name for path in (tmp_path / "mine").glob("train?/*")] == ["00000.png"] * 2


def test_command_draws_the_built_in_set(command, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "draw_built_in", functools.partial(draw_built_in, n_train=2, n_test=1))
    printed = command("--dataset_name", "solid2striped", "--data_dir", tmp_path)
    assert f"{tmp_path}/solid2striped/trainA: 2 pictures" in printed
    assert f"{tmp_path}/solid2striped/testB_truth: 1 pictures" in printed
    assert len(UnpairedDataset(tmp_path / "solid2striped", (16, 16))) == 2


def test_command_fetches_from_the_mirror(command, web, monkeypatch, tmp_path):
    publish(web, monkeypatch, ZIPPED)
    command("--dataset_name", "apple2orange", "--data_dir", tmp_path, "--mirror", web.url)
    assert inside(tmp_path, "apple2orange") == ZIPPED


def test_command_imports_own_pictures(command, own, tmp_path):
    named = ["--from_A", own[0], "--from_B", own[1], "--dataset_name", "mine", "--data_dir", tmp_path / "data"]
    command(*named, "--test_share", "0.5", "--copy")
    found = [p.path for p in find_pictures(tmp_path / "data" / "mine" / "testA")]
    assert len(found) == 5 and not found[0].is_symlink()


@pytest.mark.parametrize("name", ["a/b", "../b", "/b", "..", ".", "", "pretrained"])
def test_command_wants_a_plain_name(command, own, tmp_path, name):
    data = tmp_path / "new" / "data"
    flags = ["--from_A", own[0], "--from_B", own[1], "--dataset_name", name, "--data_dir", data]
    assert "expected a plain name" in command(*flags, status=2)
    assert not (tmp_path / "new").exists()


KNOWN = ", ".join((*PUBLIC_SETS, *prepare.BY_HAND))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dataset_name cat2dog", f"--dataset_name cat2dog: not a public set, expected one of {KNOWN}"),
        ("--copy", "--copy needs --from_A and --from_B"),
        ("--test_share 0.2", "--test_share needs --from_A and --from_B"),
        ("--seed 3", "--seed needs --from_A and --from_B"),
        ("--from_A a --from_B b --mirror here", "--mirror goes with fetching a public set"),
        ("--dataset_name solid2striped --mirror here", "--mirror goes with fetching a public set"),
        ("--from_A a --from_B b --seed -1", "--seed: expected at least 0, found -1"),
        ("--from_A a", "--from_A and --from_B: expected both or neither"),
        ("--from_B a", "--from_A and --from_B: expected both or neither"),
        ("--fetch", "unrecognized arguments: --fetch (--help lists all flags)"),
    ],
)
def test_command_refuses_what_it_cannot_do_or_would_ignore(command, tmp_path, flags, message):
    data = tmp_path / "data"
    told = command("--dataset_name", "horse2zebra", "--data_dir", data, *flags.split(), status=2)
    assert told.startswith(f"prepare.py: error: {message}")
    assert not data.exists()
