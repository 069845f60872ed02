"""Data sets: their folders, samples, and the loader."""

from utils import InputError

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from common import BLUE, RED, make_set, names_below, noise, pixels, plain, save
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset

from datasets import (
    BUILT_IN,
    EpochSampler,
    PairedDataset,
    PlainDataset,
    UnpairedDataset,
    as_input,
    find_plain,
    find_side,
    fixed_batch,
    fixed_noise,
    make_loader,
    true_translations,
)
from pictures import EXTENSIONS, RESIZE, Picture, resize, to_tensor, unaugmented


def same(a, b):
    return all(torch.equal(a[side], b[side]) for side in "AB")


def test_sides_are_folders_or_else_halves(tmp_path):
    pair = Image.new("RGB", (16, 8), RED)
    pair.paste(BLUE, (8, 0, 16, 8))
    path = save(pair, tmp_path / "train" / "pair.png")
    for side, half, colour in (("A", "left", RED), ("B", "right", BLUE)):
        assert find_side(tmp_path, "train", side) == [Picture(path, half)]
        assert pixels(path, half=half) == [[list(colour)] * 8] * 8
    own = plain(tmp_path / "trainA" / "a.png")
    assert find_side(tmp_path, "train", "A") == [Picture(own)]
    assert find_side(tmp_path, "train", "B") == [Picture(path, "right")]
    (tmp_path / "train").rename(tmp_path / "val")  # which stands in for test only
    assert find_side(tmp_path, "train", "B") == []
    assert find_side(tmp_path, "test", "B") == [Picture(tmp_path / "val" / "pair.png", "right")]
    other = plain(tmp_path / "test" / "other.png", size=(16, 8))
    assert find_side(tmp_path, "test", "A") == [Picture(other, "left")]
    for side in "AB":
        save(noise(0), tmp_path / "folders" / "train" / side / "0.png")
    with pytest.raises(InputError, match=r"folders/train: found folders A and B, expected .*/trainA and .*/trainB"):
        find_side(tmp_path / "folders", "train", "A")


# ----------------------------------------------------------------------------------------------------------
#  Unpaired data
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how, nA, nB", [("squash", 3, 2), ("short_side", 2, 5)])
def test_sample_has_the_asked_shape_and_the_epoch_is_as_long_as_the_larger_side(tmp_path, channels, how, nA, nB):
    dataset = UnpairedDataset(make_set(tmp_path, nA, nB), (16, 24), channels, how)
    assert len(dataset) == max(nA, nB) and dataset[0, 0].keys() == {"A", "B"}
    for tensor in dataset[0, 0].values():
        assert tensor.shape == (channels, 16, 24) and tensor.dtype == torch.uint8


def test_sample_is_a_function_of_seed_epoch_and_index(tmp_path):
    make_set(tmp_path)
    dataset = UnpairedDataset(tmp_path, (16, 16), seed=4)
    first = dataset[2, 1]
    dataset[0, 0], np.random.random(), torch.rand(1)  # nothing drawn in between matters
    assert same(first, dataset[2, 1])
    assert same(first, UnpairedDataset(tmp_path, (16, 16), seed=4)[2, 1])
    assert not same(first, dataset[3, 1])
    assert not same(first, dataset[2, 2])
    assert not same(first, UnpairedDataset(tmp_path, (16, 16), seed=5)[2, 1])


def test_a_picture_used_twice_in_an_epoch_is_cropped_anew(tmp_path):
    dataset = UnpairedDataset(make_set(tmp_path, 1, 4), (16, 16))
    crops = [dataset[0, i]["A"] for i in range(4)]
    assert not all(torch.equal(crops[0], crop) for crop in crops[1:])


def test_every_A_is_visited_in_turn_and_partners_are_drawn_anew_each_epoch(tmp_path):
    for i in range(4):
        plain(tmp_path / "trainA" / f"{i}.png", (10 * i, 0, 0))
        plain(tmp_path / "trainB" / f"{i}.png", (0, 10 * i, 0))
    dataset = UnpairedDataset(tmp_path, (8, 8))
    samples = [[dataset[epoch, i] for i in range(4)] for epoch in range(40)]
    visits = [[int(s["A"][0, 0, 0]) // 10 for s in epoch] for epoch in samples]
    partners = [[int(s["B"][1, 0, 0]) // 10 for s in epoch] for epoch in samples]
    assert visits == [[0, 1, 2, 3]] * 40
    assert all(set(partners_of_one) == {0, 1, 2, 3} for partners_of_one in zip(*partners, strict=True))
    plain(tmp_path / "trainB" / "4.png")
    for i in (2, 3):
        (tmp_path / "trainA" / f"{i}.png").unlink()
    dataset = UnpairedDataset(tmp_path, (8, 8))
    assert [int(dataset[0, i]["A"][0, 0, 0]) for i in range(5)] == [0, 10, 0, 10, 0]


def test_sample_is_a_crop_at_any_place_flipped_half_the_time(tmp_path):
    # 35 is 1.12 × 32, so the resize changes nothing and pixels tell where they come from.
    y, x = np.mgrid[:35, :35]
    picture = np.stack([7 * x, 7 * y, 0 * x], axis=-1).astype(np.uint8)
    for side in "AB":
        save(Image.fromarray(picture), tmp_path / f"train{side}" / "0.png")
    dataset = UnpairedDataset(tmp_path, (32, 32))
    places = {"A": [], "B": []}
    for epoch in range(200):
        for side, tensor in dataset[epoch, 0].items():
            crop = tensor.numpy().transpose(1, 2, 0)
            flipped = crop[0, 0, 0] > crop[0, -1, 0]
            upright = crop[:, ::-1] if flipped else crop
            left, top = int(upright[0, 0, 0]) // 7, int(upright[0, 0, 1]) // 7
            assert np.array_equal(upright, picture[top : top + 32, left : left + 32])
            places[side].append((left, top, bool(flipped)))
    for side in "AB":
        lefts, tops, flips = zip(*places[side], strict=True)
        assert set(lefts) == set(tops) == {0, 1, 2, 3}
        assert 70 <= sum(flips) <= 130
    assert sum(a == b for a, b in zip(places["A"], places["B"], strict=True)) < 40  # each side its own place


@pytest.mark.parametrize("how, seen", [("short_side", 90), ("squash", 180)])
def test_resize_choice_reaches_the_samples(tmp_path, how, seen):
    # 200 x 100 with the column number as red. A crop of 64 sees 64/71 of the width when squashed to 71 x 71,
    # half of that when the width is kept at 142.
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    for side in "AB":
        save(Image.fromarray(np.ascontiguousarray(columns)), tmp_path / f"train{side}" / "0.png")
    sample = UnpairedDataset(tmp_path, (64, 64), how=how)[0, 0]["A"][0]
    assert abs(int(sample.max()) - int(sample.min()) - seen) <= 4


NONE = f"no pictures ({', '.join(EXTENSIONS)}) in it"


@pytest.mark.parametrize("files, found", [(None, "no such folder"), ([], NONE), (["list.csv"], NONE)])
def test_what_is_missing_is_named_with_what_was_found_and_what_to_do(tmp_path, files, found):
    def message(root):
        with pytest.raises(InputError) as error:
            UnpairedDataset(root, (16, 16))
        return str(error.value)

    root = tmp_path / "mine"
    told = message(root)
    assert told.startswith(f"{root}: no such folder. Expected pictures in {root}/trainA and {root}/trainB")
    assert f"python prepare.py --dataset_name mine --data_dir {tmp_path}\n" in told
    assert "--from_A FOLDER --from_B FOLDER --dataset_name mine" in told and "make demo" in told
    assert "--data_dir" not in message(Path("data/maps"))  # the default
    plain(root / "trainB" / "0.png")
    if files is not None:
        (root / "trainA").mkdir()
        for name in files:
            (root / "trainA" / name).write_text("a,b")
    told = message(root)
    assert told.startswith(f"{root}/trainA: {found}") and "make demo" in told


def test_check_names_every_damaged_picture_at_once_and_shortens_a_long_list(tmp_path):
    dataset = UnpairedDataset(make_set(tmp_path, size=(64, 64), tests=1), (16, 16))
    dataset.check()

    def refusal():
        messages = set()
        for limit in (0, 1e9):  # whether they are kept in memory or not
            with pytest.raises(InputError) as error:
                UnpairedDataset(tmp_path, (16, 16)).check(limit)
            messages.add(str(error.value))
        (message,) = messages
        return message

    cut = save(noise(0, (64, 64)), tmp_path / "trainA" / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-2000])
    (tmp_path / "trainB" / "page.png").write_text("<html>not a picture</html>")
    (tmp_path / "testA" / "empty.webp").write_bytes(b"")
    (tmp_path / "trainA" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    message = refusal()
    assert message.startswith("4 picture(s) cannot be read") and "0.png" not in message
    for name in ("trainA/cut.jpg", "trainA/gone.png", "trainB/page.png", "testA/empty.webp"):
        assert f"\n  {tmp_path}/{name}: " in message
    for i in range(13):
        (tmp_path / "trainA" / f"bad{i:02d}.png").write_text("no")
    message = refusal()
    assert message.startswith("17 picture(s)") and message.endswith("and 7 more")
    assert len(message.splitlines()) == 12 and "bad08" in message and "bad09" not in message  # after empty.webp


@pytest.mark.parametrize("limit, kept, decoded", [(1e9, True, 10), (1000, False, 10)])
def test_a_start_decodes_every_picture_once(tmp_path, monkeypatch, limit, kept, decoded):
    dataset = UnpairedDataset(make_set(tmp_path, 4, 4, size=(64, 64), tests=1), (16, 16))
    counts, opened = Counter(), Picture.open

    def count(picture, *arguments):
        counts[picture.path] += 1
        return opened(picture, *arguments)

    monkeypatch.setattr(Picture, "open", count)
    dataset.check(limit)
    assert dataset.load(limit) == kept
    assert len(counts) == decoded and set(counts.values()) == {1}
    dataset[0, 0]
    assert max(counts.values()) == (1 if kept else 2)


def test_fixed_batch_takes_the_first_test_or_training_pictures_whole_as_many_of_each_side(tmp_path):
    make_set(tmp_path, 3, 2, size=(16, 16), tests=3)
    batch = fixed_batch(tmp_path, 2, (16, 16))
    for side, seed in (("A", 200), ("B", 300)):
        assert torch.equal(batch[side], torch.stack([to_tensor(noise(seed + i, (16, 16))) for i in range(2)]))
        shutil.rmtree(tmp_path / f"test{side}")
    batch = fixed_batch(tmp_path, 8, (16, 16), channels=1)
    assert batch["A"].shape == batch["B"].shape == (2, 1, 16, 16)
    for side, seed in (("A", 1), ("B", 101)):
        assert torch.equal(batch[side][1], to_tensor(noise(seed, (16, 16)).convert("L")))


def test_fixed_batch_takes_the_middle_when_the_aspect_is_kept(tmp_path):
    image = Image.new("RGB", (48, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    for side in "AB":
        save(image, tmp_path / f"train{side}" / "0.png")
    batch = fixed_batch(tmp_path, 1, (16, 16), how="short_side")["A"][0]
    assert torch.equal(batch, torch.tensor(BLUE, dtype=torch.uint8)[:, None, None].expand(3, 16, 16))


def test_pictures_are_enlarged_before_the_crop_as_in_the_official_code(tmp_path):
    assert UnpairedDataset(make_set(tmp_path, 1, 1), (256, 128)).scaled == (286, 143)


@pytest.mark.parametrize("limit", [0, 1e9])
def test_crops_of_a_size_come_from_pictures_that_sheets_show_whole(tmp_path, limit):
    data = UnpairedDataset(make_set(tmp_path, 1, 1, size=(40, 40)), (32, 32), crop_size=12)
    assert data.load(limit) == bool(limit) and data.fixed_batch(1)["A"].shape == (1, 3, 32, 32)
    whole = data.decode(data.sides["A"][0])
    assert whole.shape == (3, 35, 35)
    windows = whole.unfold(1, 12, 1).unfold(2, 12, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 12, 12)
    samples = [data[epoch, 0]["A"] for epoch in range(40)]
    for sample in samples:
        assert any((windows == view).flatten(1).all(dim=1).any() for view in (sample, sample.flip(-1)))
    assert len({sample.numpy().tobytes() for sample in samples}) > 30


def test_a_damaged_picture_is_named_wherever_it_is_read(tmp_path):
    root = make_set(tmp_path, 2, 2)
    path = next((root / "trainA").iterdir())
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(OSError):
        Picture(path).open()
    for read in (
        Picture(path).read,
        lambda: unaugmented(Picture(path), (16, 16)),
        lambda: UnpairedDataset(root, (16, 16)).load(1e9),
    ):
        with pytest.raises(InputError, match=rf"{path}: cannot be read \(.+\)"):
            read()


def test_the_names_tell_which_pictures_are_held_out(tmp_path):
    root = make_set(tmp_path / "set", 5, 4)
    names = UnpairedDataset(root, (16, 16)).names()
    root.rename(tmp_path / "moved")
    assert UnpairedDataset(tmp_path / "moved", (32, 32), how="short_side").names() == names
    held = [UnpairedDataset(tmp_path / "moved", (16, 16), seed=s, hold_out=True).names() for s in range(4)]
    assert any(one != held[0] for one in held) and names not in held and all(set(one) == set(names) for one in held)


def test_a_seeded_tenth_is_held_out_of_training(tmp_path):
    root = make_set(tmp_path, 30, 6)
    dataset = UnpairedDataset(root, (16, 16), seed=1, hold_out=True)
    assert {side: len(pictures) for side, pictures in dataset.held_out.items()} == {"A": 3, "B": 2}
    for side in "AB":
        assert sorted(dataset.sides[side] + dataset.held_out[side]) == find_side(root, "train", side)
    assert len(dataset) == 27
    again, other = (UnpairedDataset(root, (16, 16), seed=seed, hold_out=True).held_out for seed in (1, 2))
    assert dataset.held_out == again != other
    assert UnpairedDataset(root, (16, 16), seed=1).held_out == {"A": [], "B": []}
    with pytest.raises(InputError, match=r"trainB: 2 pictures, --eval_interval needs 3"):
        UnpairedDataset(make_set(tmp_path / "few", 5, 2), (16, 16), hold_out=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind, folders", [(UnpairedDataset, ["train"]), (PairedDataset, ["trainA", "trainB"])])
def test_pairs_are_held_out_together(tmp_path, kind, folders, seed):
    for folder, i in itertools.product(folders, range(30)):
        plain(tmp_path / folder / f"{i}.png", size=(16, 8))
    dataset = kind(tmp_path, (16, 16), seed=seed, hold_out=True)
    for sides, n in ((dataset.held_out, 3), (dataset.sides, 27)):
        assert [p.path.name for p in sides["A"]] == [p.path.name for p in sides["B"]] and len(sides["A"]) == n
        halves = [{p.half for p in sides[side]} for side in "AB"]
        assert halves == ([{"left"}, {"right"}] if folders == ["train"] else [{None}, {None}])


# ----------------------------------------------------------------------------------------------------------
#  Paired data
# ----------------------------------------------------------------------------------------------------------


def negative(image):
    return ImageOps.invert(image)


def side_by_side(path, seed, size=(35, 35)):
    """A picture and its negative in one file. 35 is 1.12 × 32, so the resize changes nothing."""
    left = noise(seed, size)
    both = Image.new("RGB", (2 * size[0], size[1]))
    both.paste(left, (0, 0))
    both.paste(negative(left), (size[0], 0))
    return save(both, path)


def find_crop(sample, picture):
    """Where in a picture of 35 x 35 a sample of 32 x 32 may come from: (top, left, flipped)."""
    whole, found = to_tensor(picture), []
    for top, left in itertools.product(range(4), repeat=2):
        crop = whole[:, top : top + 32, left : left + 32]
        found += [(top, left, flip) for flip in (False, True) if torch.equal(sample, crop.flip(-1) if flip else crop)]
    return found


def assert_in_step(dataset, pictures):
    """Every sample is one place of the picture of its index and of the negative, flipped alike; all places occur."""
    seen = set()
    for epoch in range(30):
        for index, picture in enumerate(pictures):
            sample = dataset[epoch, index]
            assert torch.equal(sample["A"], 255 - sample["B"])
            places = find_crop(sample["A"], picture)
            assert len(places) == 1
            seen.update(places)
    tops, lefts, flips = (set(values) for values in zip(*seen, strict=True))
    assert tops == lefts == {0, 1, 2, 3} and flips == {False, True}


def test_both_halves_of_a_pair_are_cropped_and_flipped_alike(tmp_path):
    for i in range(3):
        side_by_side(tmp_path / "train" / f"{i}.png", i)
    for split in ("val", "test"):  # of which none trains
        side_by_side(tmp_path / split / "0.png", 50)
    dataset = PairedDataset(tmp_path, (32, 32), seed=2)
    assert len(dataset) == 3
    assert_in_step(dataset, [noise(i, (35, 35)) for i in range(3)])
    assert same(dataset[4, 1], PairedDataset(tmp_path, (32, 32), seed=2)[4, 1])
    assert not same(dataset[4, 1], PairedDataset(tmp_path, (32, 32), seed=3)[4, 1])
    before = dataset[4, 1]
    assert dataset.load(6 * 3 * 35 * 35) and same(before, dataset[4, 1])


def test_equal_names_in_two_folders_are_pairs_whatever_their_endings(tmp_path):
    for i, (name, other) in enumerate((("a.png", "a.bmp"), ("a.c.png", "a.c.bmp"), ("deep/a.png", "deep/a.bmp"))):
        save(noise(i, (35, 35)), tmp_path / "trainA" / name)
        save(negative(noise(i, (35, 35))), tmp_path / "trainB" / other)
    dataset = PairedDataset(tmp_path, (32, 32))
    seeds = {"a.png": 0, "a.c.png": 1, "deep/a.png": 2}  # by their names with endings the two sides' orders differ
    order = [seeds[name] for name in names_below(dataset.sides["A"], tmp_path / "trainA")]
    assert_in_step(dataset, [noise(seed, (35, 35)) for seed in order])
    shown = dataset.fixed_batch(3)
    assert torch.equal(shown["B"], 255 - shown["A"]) and len(shown["A"].unique(dim=0)) == 3


def test_single_photographs_are_no_pairs(tmp_path):
    for split in ("train", "test"):
        for width, height in ((200, 100), (133, 100), (18, 16)):  # of squares, of portraits of 2:3 and of 9:16
            plain(tmp_path / split / f"{width}.png", size=(width, height))
    PairedDataset(tmp_path, (16, 16)).check()
    upright, turned = Image.Exif(), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for name, size, shown, exif in (
        ("train/square.png", (100, 100), "100 pixels wide, 100 high", upright),
        ("test/portrait.jpg", (100, 150), "100 pixels wide, 150 high", upright),
        ("train/turned.jpg", (150, 100), "100 pixels wide, 150 high", turned),
    ):
        Image.new("RGB", size).save(tmp_path / name, exif=exif)
        with pytest.raises(
            InputError,
            match=rf"{name}: {shown}, expected a pair side by side, at least 1\.1 times.*--task colorization",
        ):
            UnpairedDataset(tmp_path, (16, 16)).check()  # nor two domains
        with pytest.raises(InputError, match="expected a pair side by side"):
            PairedDataset(tmp_path, (16, 16)).check()
        PairedDataset(tmp_path, (16, 16), task="colorization").check()
        UnpairedDataset(tmp_path, (16, 16), task="colorization").check()
        (tmp_path / name).unlink()
    for side in "AB":  # whole pictures of any shape
        plain(tmp_path / f"train{side}" / "a.png", size=(10, 30))
    shutil.rmtree(tmp_path / "test")
    PairedDataset(tmp_path, (16, 16)).check()


@pytest.mark.parametrize(
    "lone, split, found",
    [
        (["trainA/z.png"], "train", "1 without a partner, such as z"),
        (["trainB/z.png"], "train", "1 without a partner, such as z"),
        (["testA/b.png", "testB/c.png"], "test", "2 without a partner, such as b"),
    ],
)
def test_unpaired_data_is_refused_with_a_name(tmp_path, lone, split, found):
    for side in "AB":
        plain(tmp_path / f"train{side}" / "a.png")
    PairedDataset(tmp_path, (16, 16)).check()
    for name in lone:
        plain(tmp_path / name)
    expected = f"equal names in {split}A and {split}B; found {found}$"
    with pytest.raises(
        InputError, match=rf"expected pairs, side by side in the pictures of {split}, or with {expected}"
    ):
        PairedDataset(tmp_path, (16, 16)).check()
    with pytest.raises(InputError, match="expected pairs, found the built-in set, whose equal names are different"):
        PairedDataset(make_set(tmp_path / BUILT_IN, 2, 2), (16, 16))


def test_a_pair_of_two_aspects_needs_squash(tmp_path):
    plain(tmp_path / "trainA" / "a.png", size=(20, 10))
    plain(tmp_path / "trainB" / "a.png", size=(10, 10))
    with pytest.raises(InputError, match=r"trainA/a\.png and .*trainB/a\.png differ in their aspect.*--resize squash"):
        PairedDataset(tmp_path, (16, 16), how="short_side").check()
    PairedDataset(tmp_path, (16, 16)).check()
    plain(tmp_path / "trainB" / "a.png", size=(60, 30))
    PairedDataset(tmp_path, (16, 16), how="short_side").check()
    assert PairedDataset(tmp_path, (16, 16), how="short_side")[0, 0]["A"].shape == (3, 16, 16)


# ----------------------------------------------------------------------------------------------------------
#  Colourisation
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["train", "trainB"])
def test_colourisation_pairs_a_picture_with_its_own_grey(tmp_path, folder):
    for i in range(2):
        save(noise(i, (35, 35)), tmp_path / folder / f"{i}.png")
    dataset = PairedDataset(tmp_path, (32, 32), task="colorization")
    assert len(dataset) == 2
    for epoch in range(4):
        sample = dataset[epoch, 1]
        grey = to_tensor(Image.fromarray(sample["B"].permute(1, 2, 0).numpy()).convert("L"))
        assert torch.equal(sample["A"], grey.expand(3, -1, -1)) and sample["B"].float().std(dim=0).mean() > 20
        assert len(find_crop(sample["B"], noise(1, (35, 35)))) == 1
    before = dataset[0, 0]
    assert dataset.load(4 * 3 * 35 * 35) and same(before, dataset[0, 0])  # grey and colour are kept apart


def test_unpaired_colourisation_sees_no_picture_twice(tmp_path):
    for i in range(7):
        plain(tmp_path / "train" / f"{i}.png", (200, 10 * i, 0))
    for i in range(3):
        plain(tmp_path / "test" / f"{i}.png", (0, 0, 255))
    dataset = UnpairedDataset(tmp_path, (8, 8), task="colorization")
    names = {side: [p.path.stem for p in pictures] for side, pictures in dataset.sides.items()}
    assert names == {"A": ["0", "2", "4", "6"], "B": ["1", "3", "5"]}
    for index in range(4):
        sample = dataset[0, index]
        assert len(sample["A"].unique()) == 1 and int(sample["B"][0, 0, 0]) == 200
    tests = dataset.find_sides("test")
    assert len(tests["A"]) == len(tests["B"]) == 3 and {p.grey for p in tests["A"]} == {True}
    assert torch.equal(dataset.fixed_batch(2)["A"], torch.full((2, 3, 8, 8), 29, dtype=torch.uint8))  # of blue


def test_colourisation_finds_its_pictures(tmp_path):
    with pytest.raises(
        InputError, match=r"no such folder\. Expected colour pictures, two at least, in .*train or .*trainB"
    ):
        PairedDataset(tmp_path / "nowhere", (8, 8), task="colorization")
    for folder in ("trainB", "testB", "val"):
        plain(tmp_path / folder / "a.png")
    (grey,) = find_side(tmp_path, "train", "A", "colorization")
    assert grey == Picture(tmp_path / "trainB" / "a.png", None, True)
    assert find_side(tmp_path, "train", "B", "colorization") == [grey._replace(grey=False)]
    assert find_side(tmp_path, "test", "B", "colorization") == [Picture(tmp_path / "val" / "a.png")]
    plain(tmp_path / "train" / "b.png")
    assert [p.path.name for p in find_side(tmp_path, "train", "B", "colorization")] == ["b.png"]


def test_inputs_and_truths_of_a_generator(tmp_path):
    path = save(noise(0, (8, 4)), tmp_path / "a.png")
    assert as_input(path, "colorization", "AtoB") == Picture(path, grey=True)
    for task, direction in (("colorization", "BtoA"), ("translation", "AtoB"), ("translation", "BtoA")):
        assert as_input(path, task, direction) == Picture(path)
    for paired in (False, True):
        for given, direction, task, truth in (
            (Picture(path, "left"), "AtoB", "translation", Picture(path, "right")),
            (Picture(path, "right"), "BtoA", "translation", Picture(path, "left")),
            (Picture(path, grey=True), "AtoB", "colorization", Picture(path)),
            (Picture(path), "BtoA", "colorization", Picture(path, grey=True)),
        ):
            assert true_translations(tmp_path, [given], direction, task, paired) == [truth]
    assert np.array_equal(np.asarray(Picture(path, grey=True).open(1)), np.asarray(noise(0, (8, 4)).convert("L")))


def test_the_truth_of_pairs_by_name_is_the_partner(tmp_path):
    for name, other in (("a.png", "a.bmp"), ("a.c.png", "a.c.bmp"), ("deep/a.png", "deep/a.bmp")):
        plain(tmp_path / "testA" / name)
        plain(tmp_path / "testB" / other)
    chosen = find_side(tmp_path, "test", "A")[1:]  # some of them, as after --dedup
    truths = true_translations(tmp_path, chosen, "AtoB", paired=True)
    assert [p.path.relative_to(tmp_path / "testB").with_suffix(".png") for p in truths] == [
        p.path.relative_to(tmp_path / "testA") for p in chosen
    ]
    assert true_translations(tmp_path, truths, "BtoA", paired=True) == chosen
    assert true_translations(tmp_path, chosen, "AtoB") is None
    (tmp_path / "testB" / "a.bmp").unlink()
    with pytest.raises(InputError, match=r"equal names in testA and testB; found 1 without a partner, such as a$"):
        true_translations(tmp_path, chosen, "AtoB", paired=True)


# ----------------------------------------------------------------------------------------------------------
#  Plain folders
# ----------------------------------------------------------------------------------------------------------


def test_plain_pictures_come_from_train_trainA_or_the_folder_itself(tmp_path):
    for path in ("a.png", "deep/b.png", "test/c.png", "testA/d.png", "val/e.png"):
        plain(tmp_path / path)
    assert names_below(find_plain(tmp_path, "train"), tmp_path) == ["a.png", "deep/b.png"]
    assert names_below(find_plain(tmp_path, "test"), tmp_path) == ["test/c.png"]
    plain(tmp_path / "trainA" / "f.png")
    plain(tmp_path / "trainB" / "g.png")
    assert names_below(find_plain(tmp_path, "train"), tmp_path) == ["trainA/f.png"]
    shutil.rmtree(tmp_path / "test")
    assert names_below(find_plain(tmp_path, "test"), tmp_path) == ["testA/d.png"]
    plain(tmp_path / "train" / "deep" / "h.png")
    assert names_below(find_plain(tmp_path, "train"), tmp_path) == ["train/deep/h.png"]
    assert find_plain(tmp_path / "nowhere", "train") == find_plain(tmp_path / "nowhere", "test") == []


def test_what_a_plain_set_lacks_or_cannot_do_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"faces: no such folder\. Expected pictures in .*faces/train, in .*trainA, or"
    ):
        PlainDataset(tmp_path / "faces", (16, 16))
    plain(tmp_path / "test" / "a.png")
    with pytest.raises(InputError, match=r"no pictures \(\.jpg, .*\) to train on in it"):
        PlainDataset(tmp_path, (16, 16))
    plain(tmp_path / "b.png")
    (tmp_path / "test" / "bad.png").write_text("no")
    with pytest.raises(InputError, match=r"1 picture.*\n.*test/bad\.png: "):
        PlainDataset(tmp_path, (16, 16)).check()


@pytest.mark.parametrize("how", RESIZE)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_plain_sample_is_the_picture_or_its_mirror_image_and_noise(tmp_path, how, channels):
    pictures = [noise(i, (32, 48)) for i in range(4)]
    for i, picture in enumerate(pictures):
        save(picture, tmp_path / f"{i}.png")
    dataset = PlainDataset(tmp_path, (16, 16), channels, how, seed=3, nz=50)
    assert len(dataset) == 4 and dataset.held_out == {"image": []}
    flipped, vectors = set(), []
    for epoch in range(8):
        for i, picture in enumerate(pictures):
            sample = dataset[epoch, i]
            again = PlainDataset(tmp_path, (16, 16), channels, how, seed=3, nz=50)[epoch, i]
            assert all(torch.equal(sample[key], again[key]) for key in ("image", "noise"))
            seen = picture.convert("L") if channels == 1 else picture
            upright = resize(seen, (16, 16), how)  # 16 x 24 where the aspect is kept, of which the middle is taken
            top = (upright.height - 16) // 2
            upright = to_tensor(upright)[:, top : top + 16]
            mirrored = torch.equal(sample["image"], upright.flip(-1))
            assert mirrored or torch.equal(sample["image"], upright)
            flipped.add(mirrored)
            assert sample["noise"].dtype == torch.float32 and sample["noise"].shape == (50,)
            vectors.append(sample["noise"])
    vectors = torch.stack(vectors)
    assert flipped == {True, False} and len(vectors.unique(dim=0)) == 32
    assert -1 <= vectors.min() < -0.99 < 0.99 < vectors.max() <= 1 and abs(vectors.var() - 1 / 3) < 0.03
    expected = np.random.default_rng((9, 3, 7, 2)).uniform(-1, 1, 50).astype(np.float32)
    assert np.array_equal(dataset[7, 2]["noise"].numpy(), expected)
    other = PlainDataset(tmp_path, (16, 16), channels, how, seed=4, nz=50)
    assert not torch.equal(other[0, 0]["noise"], dataset[0, 0]["noise"])

    before = [dataset[1, i] for i in range(4)]
    assert not dataset.load(4 * channels * 256 - 1) and dataset.load(4 * channels * 256)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    for i, sample in enumerate(before):
        assert all(torch.equal(sample[key], dataset[1, i][key]) for key in sample)


def test_the_fixed_batch_of_a_plain_set_has_test_pictures_and_noise_of_the_seed(tmp_path):
    for folder, seed in (("train", 0), ("test", 10)):
        for i in range(3):
            save(noise(seed + i, (16, 16)), tmp_path / folder / f"{i}.png")
    dataset = PlainDataset(tmp_path, (16, 16), seed=5, nz=7)
    batch = dataset.fixed_batch(2)
    assert torch.equal(batch["image"], torch.stack([to_tensor(noise(10 + i, (16, 16))) for i in range(2)]))
    assert torch.equal(batch["noise"], fixed_noise(2 * PlainDataset.SAMPLES, 7, 5))
    assert torch.equal(fixed_noise(3, 7, 5), fixed_noise(64, 7, 5)[:3])
    assert not torch.equal(fixed_noise(1, 7, 5)[0], dataset[0, 0]["noise"])
    shutil.rmtree(tmp_path / "test")
    batch = PlainDataset(tmp_path, (16, 16)).fixed_batch(8)
    assert len(batch["image"]) == 3 and len(batch["noise"]) == 3 * PlainDataset.SAMPLES


# ----------------------------------------------------------------------------------------------------------
#  Sampler and loader
# ----------------------------------------------------------------------------------------------------------


def order_of(length, seed=0, rank=0, world_size=1, epoch=0, start=0):
    sampler = EpochSampler(length, seed, rank, world_size)
    sampler.epoch, sampler.start = epoch, start
    return list(sampler)


@pytest.mark.parametrize("length, world_size", [(12, 1), (12, 2), (12, 3), (11, 3)])
def test_epoch_covers_every_picture_and_ranks_get_equally_many(length, world_size):
    shares = [order_of(length, rank=r, world_size=world_size, epoch=5) for r in range(world_size)]
    assert {len(share) for share in shares} == {length // world_size} == {len(EpochSampler(length, 0, 0, world_size))}
    keys = {key for share in shares for key in share}
    assert len(keys) == length // world_size * world_size and keys <= {(5, i) for i in range(length)}
    late = order_of(length, rank=world_size - 1, world_size=world_size, epoch=5, start=2)
    assert late == shares[-1][2:]


def test_order_changes_with_epoch_and_seed_only():
    def indices(**which):
        return [i for _, i in order_of(30, **which)]

    assert indices(epoch=1) == indices(epoch=1)
    assert indices(epoch=1) != list(range(30))
    assert indices(epoch=1) != indices(epoch=2)
    assert indices(epoch=1) != indices(epoch=1, seed=1)


@pytest.mark.parametrize("length", [12, 15])
def test_two_ranks_see_in_each_step_what_one_process_sees_at_twice_the_batch(length):
    def batches(keys, size):
        return [keys[i : i + size] for i in range(0, len(keys) - size + 1, size)]

    alone = batches(order_of(length, seed=3), 4)
    ranks = [batches(order_of(length, seed=3, rank=r, world_size=2), 2) for r in range(2)]
    assert len(alone) == 3
    assert [set(a) for a in alone] == [{*a, *b} for a, b in zip(*ranks, strict=True)]


def load(root, n_cpu, epochs=(0, 1), start=0, batch_size=2):
    dataset = UnpairedDataset(root, (16, 16), seed=1)
    sampler = EpochSampler(len(dataset), seed=1)
    loader = make_loader(dataset, sampler, batch_size, n_cpu)
    sampler.start, batches = start, []
    for sampler.epoch in epochs:
        batches.extend(loader)
    return batches


def test_workers_change_no_batch_and_the_loader_leaves_the_global_random_state_alone(tmp_path):
    make_set(tmp_path, 6, 4)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    alone, helped = load(tmp_path, 0), load(tmp_path, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert len(alone) == len(helped) == 6
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
    assert not same(alone[0], alone[3])  # the workers that live on were told of the new epoch


@pytest.mark.parametrize("how", RESIZE)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_kept_in_memory_give_the_same_samples_without_the_files(tmp_path, how, channels):
    root = make_set(tmp_path / "set", 6, 4, size=(30, 50))
    read, kept = (UnpairedDataset(root, (16, 20), channels, how, seed=1) for _ in range(2))
    expected = [read[epoch, i] for epoch in (0, 1) for i in range(6)]
    assert kept.load(1e6)
    shutil.rmtree(root)
    found = [kept[epoch, i] for epoch in (0, 1) for i in range(6)]
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(InputError):
        read[0, 0]


def test_pictures_are_kept_only_if_all_fit(tmp_path):
    root = make_set(tmp_path / "set", 6, 4, size=(30, 60))
    whole = 10 * 3 * 17 * 17  # 1.12 x 16, rounded down
    squashed = UnpairedDataset(root, (16, 16))
    assert not squashed.load(whole - 1) and not squashed.kept
    assert squashed.load(whole) and len(squashed.kept) == 10
    longer = UnpairedDataset(root, (16, 16), how="short_side")  # 17 x 34
    assert not longer.load(2 * whole - 1) and not longer.kept
    assert longer.load(2 * whole)
    assert not UnpairedDataset(root, (16, 16)).load(0)


def test_batches_are_the_samples_in_the_samplers_order_whole_and_also_from_amid_an_epoch(tmp_path):
    dataset = UnpairedDataset(make_set(tmp_path, 7, 4), (16, 16), seed=1)
    keys = order_of(7, seed=1, epoch=2)
    for start, batch_size, n in ((0, 2, 3), (4, 2, 1), (0, 3, 2)):
        batches = load(tmp_path, 0, epochs=[2], start=start, batch_size=batch_size)
        assert len(batches) == n
        for key, (batch, i) in zip(keys[start:], itertools.product(batches, range(batch_size)), strict=False):
            assert batch["A"].shape == (batch_size, 3, 16, 16)
            assert same({s: batch[s][i] for s in "AB"}, dataset[key])


def test_a_run_says_what_it_found(tmp_path):
    for name in ("trainA/a.png", "trainA/deep/b.png", "trainB/c.png", "testA/d.png", "val/e.png"):
        plain(tmp_path / name, size=(16, 8))
    for name in ("trainA/a.pdf", "trainA/deep/b.PDF", "trainA/c.mov", "trainA/readme", "trainB/._c.png", "testA/d.csv"):
        (tmp_path / name).write_text("no picture")
    found = "A: 2 pictures (passed over: 2 .pdf, 1 .mov, 1 without an ending), B: 1 pictures"
    assert UnpairedDataset(tmp_path, (8, 8)).describe() == found
    plain(tmp_path / "trainA" / "f.png")
    for i in range(3):
        plain(tmp_path / "trainB" / f"{i}.png")
    assert "A: 3 pictures (" in UnpairedDataset(tmp_path, (8, 8), hold_out=True).describe()
    (tmp_path / "val" / "e.txt").write_text("no picture")
    (tmp_path / "val").rename(tmp_path / "train")
    expected = "A: 1 pictures (passed over: 1 .txt), B: 1 pictures (passed over: 1 .txt)"
    assert PairedDataset(tmp_path, (8, 8), task="colorization").describe() == expected
    for name in ("train", "trainA", "trainB"):
        shutil.rmtree(tmp_path / name)
    for name in ("g.png", "more/h.png"):
        plain(tmp_path / name)
    (tmp_path / "list.csv").write_text("g")
    assert PlainDataset(tmp_path, (8, 8)).describe() == "image: 2 pictures (passed over: 1 .csv)"


class Pids(Dataset):
    def __getitem__(self, key):
        return torch.tensor(os.getpid())


def test_workers_outlive_signals_to_the_group_and_end_when_their_parent_says_so():
    batches = iter(make_loader(Pids(), EpochSampler(40, 0), 1, n_cpu=1))
    pid = int(next(batches))
    for name in ("INT", "HUP", *(["TERM"] if hasattr(signal, "sigwaitinfo") else [])):  # not from the parent
        subprocess.run([sys.executable, "-c", f"import os, signal; os.kill({pid}, signal.SIG{name})"], check=True)
    assert {int(batch) for batch in batches} == {pid}
    batches = iter(make_loader(Pids(), EpochSampler(40, 0), 1, n_cpu=1))
    (worker,) = (p for p in multiprocessing.active_children() if p.pid == int(next(batches)))
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
