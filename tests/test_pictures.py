"""Picture files of all kinds, what is decoded of them, and what is refused."""

from utils import InputError

import gc
import importlib.util
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import BLUE, GREEN, QUICK, RED, make_set, names_below, noise, pixels, plain, run, save
from PIL import ExifTags, Image, ImageCms, features

import pictures
import translate
from datasets import fixed_noise
from models import Translation
from pictures import Picture, find_pictures, normalise, resize, resize_and_crop, to_tensor, unaugmented
from prepare import import_pictures

COLOURS = [1, 2, 3, 40, 50, 60]  # of a palette
PIXELS = {
    "grey becomes three equal channels": ("L", [10, 200], {}, 3, [[10] * 3, [200] * 3]),
    "a palette is looked up": ("P", [1, 0], {}, 3, [COLOURS[3:], COLOURS[:3]]),
    "a transparent palette entry is white": ("P", [1, 0], {"transparency": 0}, 3, [COLOURS[3:], [255] * 3]),
    "a palette of transparencies": ("P", [1, 0], {"transparency": b"\x00\xff"}, 3, [COLOURS[3:], [255] * 3]),
    "grey with alpha is laid on white": ("LA", [(10, 255), (10, 0), (0, 51)], {}, 1, [10, 255, 204]),
    "alpha is laid on white": (
        "RGBA",
        [(10, 20, 30, 255), (10, 20, 30, 0), (255, 0, 0, 51)],
        {},
        3,
        [[10, 20, 30], [255, 255, 255], [255, 204, 204]],
    ),
    "a colour named transparent is white": (
        "RGB",
        [(1, 2, 3), (9, 9, 9)],
        {"transparency": (1, 2, 3)},
        3,
        [[255] * 3, [9] * 3],
    ),
}


@pytest.mark.parametrize("mode, values, options, channels, expected", PIXELS.values(), ids=PIXELS)
def test_every_mode_becomes_8_bits_without_transparency(tmp_path, mode, values, options, channels, expected):
    image = Image.new(mode, (len(values), 1))
    if mode == "P":
        image.putpalette(COLOURS)
    image.putdata(values)
    assert pixels(save(image, tmp_path / "a.png", **options), channels) == [expected]


def make_profile(space, **tags):
    """An ICC profile of the colour space "RGB ", "GRAY" or "CMYK" with these tags."""
    start, table = 132 + 12 * len(tags), b""
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", start, len(data))
        start += len(data)
    head = struct.pack(">I4xI8s", start, 0x02400000, f"{'prtr' if space == 'CMYK' else 'mntr'}{space}".encode())
    head += (b"Lab " if space == "CMYK" else b"XYZ ") + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + b"".join(tags.values())


def fixed(*numbers):
    return struct.pack(f">{len(numbers)}i", *(round(2**16 * n) for n in numbers))


def curve(*entries):
    """The tag of a table of values from 0 to 1, or of a single exponent."""
    scale = 256 if len(entries) == 1 else 65535
    return b"curv" + struct.pack(f">4xI{len(entries)}H", len(entries), *(round(scale * e) for e in entries)) + bytes(2)


def rgb_profile(matrix, tone):
    columns = {f"{c}XYZ": b"XYZ " + bytes(4) + fixed(*column) for c, column in zip("rgb", matrix.T, strict=True)}
    return make_profile("RGB ", **columns, **{f"{c}TRC": tone for c in "rgb"})


def cmyk_profile(corners):
    """Of a printer whose 16 full inks (C, M, Y, K from 0000 to 1111) look like these L, a, b of 8 bits."""
    ramp = bytes(range(256))
    head = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return make_profile("CMYK", A2B0=head + 4 * ramp + bytes(np.uint8(corners).ravel().tolist()) + 3 * ramp)


SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])  # to XYZ
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
RAMP = np.linspace(0, 1, 1024)
SRGB_TONE = np.where(RAMP <= 0.04045, RAMP / 12.92, ((RAMP + 0.055) / 1.055) ** 2.4)
INKS = [[255 - 16 * i, 128, 128] for i in range(15)] + [[0, 128, 128]]
INKS[4] = [136, 70, 180]  # magenta ink that looks green


def as_srgb(pixels, matrix, gamma):
    """8-bit sRGB of 8-bit pixels (..., 3), by the formulas of the ICC and of sRGB."""
    linear = ((pixels / 255) ** gamma @ (np.linalg.inv(SRGB) @ matrix).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("matrix", [P3, ADOBE], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_colours_of_another_profile_become_those_of_sRGB(tmp_path, matrix, ending):
    raw = np.asarray(noise(0, (8, 8)).resize((64, 64), Image.Resampling.NEAREST))
    options = {"quality": 100} | (
        {"subsampling": 0} if ending == "jpg" else {"lossless": True} if ending == "webp" else {}
    )
    plainly = save(Image.fromarray(raw), tmp_path / f"plain.{ending}", **options)
    path = save(Image.fromarray(raw), tmp_path / f"a.{ending}", icc_profile=rgb_profile(matrix, curve(2.2)), **options)
    before, after = np.asarray(Picture(plainly).open()), np.asarray(Picture(path).open(), dtype=int)
    expected = as_srgb(before, matrix, 2.2)
    assert np.abs(after - expected).max() <= 2 and np.abs(before - expected).max() > 20
    grey = np.asarray(Picture(path).open(1), dtype=int)
    assert np.abs(grey - np.asarray(Picture(path).open().convert("L"))).max() == 0


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_transparency_stays_where_it_is_whatever_the_profile(tmp_path, mode):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 255, 0, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    path = save(image.convert(mode), tmp_path / "a.png", icc_profile=rgb_profile(P3, curve(2.2)))
    (clear, opaque), expected = pixels(path)[0], as_srgb(np.array([200, 100, 50]), P3, 2.2)
    assert clear == [255] * 3 and np.abs(opaque - expected).max() <= 1


def test_grey_and_cmyk_are_converted_by_profiles_of_their_own(tmp_path):
    profile = make_profile("GRAY", wtpt=b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249), kTRC=curve(1.0))
    level = round(255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055))
    for image in (
        Image.new("L", (1, 1), 100),
        Image.new("LA", (1, 1), (100, 255)),
        Image.fromarray(np.array([[25700]], dtype=np.uint16)),
    ):
        path = save(image, tmp_path / "grey.png", icc_profile=profile)
        assert abs(pixels(path, channels=1)[0][0] - level) <= 1
    image = Image.new("CMYK", (8, 8), (0, 255, 0, 0))
    red, green, blue = pixels(save(image, tmp_path / "inks.jpg", icc_profile=cmyk_profile(INKS)))[4][4]
    assert green > red + 50 and green > blue + 50
    red, green, blue = pixels(save(image, tmp_path / "inks.jpg"))[4][4]
    assert red > green + 200 and blue > green + 200


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        rgb_profile(SRGB, curve(*SRGB_TONE)),
        make_profile("GRAY", kTRC=curve(1.0)),
        cmyk_profile(INKS),
        rgb_profile(P3, curve(2.2))[:200],
        b"no profile",
    ],
    ids=["sRGB", "sRGB of another maker", "of grey pictures", "of CMYK", "cut", "broken"],
)
def test_a_profile_of_sRGB_or_that_does_not_fit_changes_no_byte(tmp_path, profile):
    for name in ("a.png", "a.jpg"):
        one, other = save(noise(0), tmp_path / name), save(noise(0), tmp_path / f"b{name}", icc_profile=profile)
        with Image.open(other) as file:
            assert file.info["icc_profile"] == profile
        assert pixels(one) == pixels(other) and pixels(one, 1) == pixels(other, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, channels):
    values = np.array([[0, 257, 257 * 100, 257 * 253 + 200, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / "deep.png")
    with Image.open(path) as file:
        assert file.mode.startswith("I")  # else this tests nothing
    opened = np.asarray(Picture(path).open(channels)).reshape(5, -1)
    assert opened.tolist() == [[v] * channels for v in (0, 1, 100, 254, 255)]


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 100, 255], [0, 100, 255]),
        ([0, 257, 257 * 100, 65535], [0, 1, 100, 255]),
        ([0.0, 0.2, 1.0], [0, 51, 255]),
        ([-1.0, -0.6, 1.0], [0, 51, 255]),
        ([0.0, 1.5, 255.0], [0, 2, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1, 255], "-1 to 255"),
        ([0, 65536], "0 to 65536"),
        ([-1.0, 2.0], "-1 to 2"),
        ([0.0, float("nan")], "nan to nan"),
        ([0.0, float("inf")], "0 to inf"),
    ],
)
def test_whole_numbers_of_32_bits_and_fractions_are_scaled_by_their_range(tmp_path, values, expected):
    values = np.array([values], dtype=np.int32 if isinstance(values[0], int) else np.float32)
    path = save(Image.fromarray(values), tmp_path / "deep.tif")
    with Image.open(path) as file:
        assert file.mode == ("I" if values.dtype == np.int32 else "F")  # else this tests nothing
    if isinstance(expected, str):
        with pytest.raises(
            InputError, match=f"values from {expected}, expected 0 to 1, -1 to 1, 0 to 255 or 0 to 65535"
        ):
            Picture(path).read()
    else:
        assert pixels(path, channels=1) == [expected]


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation, places", [(1, "lr"), (3, "rl"), (6, "tb"), (8, "bt")])
def test_a_picture_and_its_size_come_out_upright(tmp_path, ending, orientation, places):
    image = Image.new("RGB", (32, 16), BLUE)
    image.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation  # 6: a quarter turn clockwise shows it upright
    path = save(image, tmp_path / f"a.{ending}", exif=exif, quality=95)
    opened = Picture(path).open()
    assert Picture(path).size() == (opened.height, opened.width) == ((16, 32) if orientation < 6 else (32, 16))
    middles = {"l": (4, 8), "r": (27, 8), "t": (8, 4), "b": (8, 27)}
    red, blue = (opened.getpixel(middles[place]) for place in places)
    assert red[0] > 240 and red[2] < 15 and blue[2] > 240 and blue[0] < 15


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "exif, turned",
    [
        (b"Exif\0\0garbage!", False),
        (b"Exif\0\0MM", False),
        # Orientation 6, and after it a resolution that is text, with which a picture cannot be written again.
        (
            b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x01\x1a\0\x02\0\0\0\x0372\0" + bytes(5),
            True,
        ),
    ],
    ids=["garbage", "short", "resolution"],
)
def test_a_picture_of_faulty_exif_is_read(tmp_path, ending, exif, turned):
    path = save(Image.new("RGB", (32, 16), RED), tmp_path / f"a.{ending}", exif=exif, dpi=(72, 72))
    opened = Picture(path).open()
    assert Picture(path).size() == (opened.height, opened.width) == ((32, 16) if turned else (16, 32))
    assert Picture(path).alpha() is None and opened.getpixel((8, 8))[0] > 240


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif", "A.PNG", "a.Bmp"])
def test_lossless_formats_keep_every_pixel(tmp_path, name):
    path = save(noise(1), tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert find_pictures(tmp_path) == [Picture(path)]
    assert pixels(path) == np.asarray(noise(1)).tolist()


def test_one_channel_is_the_luminance(tmp_path):
    opened = Picture(plain(tmp_path / "red.png", RED)).open(channels=1)
    assert opened.mode == "L"
    assert opened.getpixel((0, 0)) == round(0.299 * 255)


@pytest.mark.parametrize("width", [20, 21])
def test_halves_have_equal_width_and_their_own_side(tmp_path, width):
    image = Image.new("RGB", (width, 6), GREEN)
    image.paste(RED, (0, 0, 10, 6))
    image.paste(BLUE, (width - 10, 0, width, 6))
    path = save(image, tmp_path / "pair.png")
    assert pixels(path, half="left") == [[list(RED)] * 10] * 6
    assert pixels(path, half="right") == [[list(BLUE)] * 10] * 6


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "PCX"])
def test_a_file_of_another_format_is_not_decoded_whatever_its_name(tmp_path, kind):
    path = save(noise(0), tmp_path / "a.png", format=kind)
    assert "cannot identify image file" in pictures.unreadable(find_pictures(tmp_path))[path]


def test_what_would_never_end_or_fill_the_memory_is_not_decoded(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    save(noise(0), tmp_path / "large.png")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 40 * 36)
    fitting = save(noise(0), tmp_path / "long.jpg", progressive=True)
    assert pictures.unreadable(find_pictures(tmp_path)) == {tmp_path / "pipe.png": "not a regular file"}
    scans = fitting.read_bytes().count(b"\xff\xda")
    assert scans > 5
    fitting.write_bytes(fitting.read_bytes() + (201 - scans) * b"\xff\xda")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 40 * 36 - 1)
    size = "40 x 36 pixels, expected at most 0 million"
    told = {"pipe.png": "not a regular file", "large.png": size, "long.jpg": size}
    assert pictures.unreadable(find_pictures(tmp_path)) == {tmp_path / name: why for name, why in told.items()}
    monkeypatch.undo()
    assert pictures.unreadable([Picture(fitting)]) == {fitting: "a progressive JPEG of more than 200 scans"}
    gc.collect()  # a file that was left open would be a ResourceWarning, which fails the test
    assert pictures.MOST_PIXELS == Image.MAX_IMAGE_PIXELS <= 2 * 10**8


def test_heic_pictures_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    # Exports of phones are often named so.
    for name, content in (("a.heic", b"no matter what"), ("b.jpg", b"\0\0\0\x24ftypheic\0\0\0\0mif1heic")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            InputError, match=rf"{name}: cannot be read \(a HEIC picture needs .*: pip install pillow-heif\)"
        ):
            Picture(tmp_path / name).read()


def test_other_and_hidden_files_are_passed_over_and_the_order_is_that_of_the_paths(tmp_path):
    names = ["b.jpg", "a.PNG", "sub/c.webp", "0.bmp"]
    hidden = ["._b.jpg", ".hidden/d.jpg", "sub/.cache/e.png", "@eaDir/b.jpg", "sub/__MACOSX/c.png", "#recycle/a.png"]
    for name in [*names, *hidden]:
        plain(tmp_path / name)
    for name in ("list.csv", "Thumbs.db", "jpg", "notes.jpg.txt"):
        (tmp_path / name).write_text("a,b")
    (tmp_path / "folder.png").mkdir()
    assert names_below(find_pictures(tmp_path), tmp_path) == ["0.bmp", "a.PNG", "b.jpg", "sub/c.webp"]
    assert names_below(find_pictures(tmp_path / ".hidden"), tmp_path) == [".hidden/d.jpg"]  # asked for by name


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pictures.os, "scandir", scandir)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        find_pictures(tmp_path)


def test_linked_folders_are_walked_once(tmp_path):
    for name in ("side/a.png", "elsewhere/c.png", "elsewhere/deep/b.png", "elsewhere/.hidden/d.png"):
        plain(tmp_path / name)
    (tmp_path / "side" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "side")
    (tmp_path / "side" / "gone.png").symlink_to(tmp_path / "nothing.png")
    names = ["side/a.png", "side/gone.png", "side/more/c.png", "side/more/deep/b.png"]
    assert names_below(find_pictures(tmp_path / "side"), tmp_path) == names


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (64, 64), (101, 99)])
@pytest.mark.parametrize("shape", [(200, 100), (33, 77), (50, 50), (7, 300)])
def test_short_side_always_covers_the_size(size, shape):
    width, height = resize(Image.new("RGB", shape), size, "short_side").size
    assert height >= size[0] and width >= size[1]
    assert height == size[0] or width == size[1]
    assert abs(width * shape[1] - height * shape[0]) <= max(shape)  # as wide as high, to a pixel
    assert resize(Image.new("RGB", shape), size, "squash").size == size[::-1]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_tensor_holds_the_pixels_channels_first(mode):
    image = noise(3).convert(mode)
    tensor = to_tensor(image)
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
    expected = np.asarray(image).reshape(36, 40, -1)
    assert tensor.shape == (expected.shape[2], 36, 40)
    assert np.array_equal(tensor.numpy().transpose(1, 2, 0), expected)


@pytest.mark.parametrize("shape", [(33, 20), (32, 20), (20, 31), (20, 20)])
def test_the_middle_of_a_longer_side_is_cut_out_as_it_is(shape):
    image = noise(0, shape)
    found = np.asarray(resize_and_crop(image, (20, 20), "short_side"))
    left, top = (shape[0] - 20) // 2, (shape[1] - 20) // 2
    assert (found == np.asarray(image)[top : top + 20, left : left + 20]).all()


def test_a_picture_too_thin_to_keep_its_shape_is_named_before_memory_is_taken(tmp_path):
    path = plain(tmp_path / "line.png", size=(20_000, 1))
    with pytest.raises(
        InputError, match=r"line.png: cannot be read \(20000 x 1 pixels: too thin, would become 5720000"
    ):
        unaugmented(Picture(path), (286, 286), how="short_side")


def test_pictures_that_are_squashed_may_become_larger_than_a_file_may_be(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 15)
    assert resize(noise(0, (3, 3)), (4, 4), "squash").size == (4, 4)


def test_normalise_maps_0_to_minus_1_and_255_to_1_and_leaves_noise_alone():
    values = normalise(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert values.dtype == torch.float32 and values[0] == -1 and values[2] == 1
    torch.testing.assert_close(values, torch.tensor([-1.0, -0.6, 1.0]))
    vectors = fixed_noise(2, 3, 0)
    assert normalise(vectors) is vectors


# ----------------------------------------------------------------------------------------------------------
#  The whole way
# ----------------------------------------------------------------------------------------------------------


def make_every_format(folder):
    """One picture of 24 x 16 of each format and mode: what its colour is by its name, or why it cannot be read."""
    expected = {}

    def add(name, image, colour, **options):
        save(image, folder / name, **options)
        expected[name] = np.array(colour)

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    endings = ["jpg", "JPEG", "jpe", "jfif", "mpo", "png", "PNG", "webp", "bmp", "gif", "tif", "tiff", "Bmp"]
    for i, ending in enumerate([*endings, *(["avif"] if features.check("avif") else [])]):
        colour = (200 - 2 * i, 100, 50)  # each its own, because files of equal bytes are left out
        add(f"{i}.{ending}", Image.new("RGB", (24, 16), colour), colour)
    for ending in ("jpg", "tif"):
        add(f"turned_{ending}.{ending}", Image.new("RGB", (16, 24), (20, 100, 150)), (20, 100, 150), exif=exif)
    rgb = Image.new("RGB", (24, 16), (200, 100, 50))
    add("palette.png", rgb.quantize(4), (200, 100, 50))
    add("p3.png", rgb, as_srgb(np.array([200, 100, 50]), P3, 2.2), icc_profile=rgb_profile(P3, curve(2.2)))
    rgb.putalpha(51)
    add("alpha.png", rgb, (244, 224, 214))
    add("grey.png", Image.new("LA", (24, 16), (100, 255)), 100)
    add("bit.png", Image.new("1", (24, 16), 1), 255)
    add("deep.png", Image.fromarray(np.full((16, 24), 25700, np.uint16)), 100)
    add("inks.jpg", Image.new("CMYK", (24, 16), (0, 255, 255, 0)), (255, 0, 0))
    for value, level in ((0.2, 51), (-0.6, 51), (100.0, 100), (25700.0, 100), (100, 100), (25700, 100)):
        kind = np.float32 if isinstance(value, float) else np.int32
        add(f"{kind.__name__}_{value}.tif", Image.fromarray(np.full((16, 24), value, kind)), level)
    save(Image.fromarray(np.full((16, 24), -5, np.float32)), folder / "beyond.tif")
    expected["beyond.tif"] = "values from -5 to -5, expected 0 to 1"
    if importlib.util.find_spec("pillow_heif"):
        pictures.import_optional("pillow_heif", "HEIC").register_heif_opener()
        add("a.heic", Image.new("RGB", (24, 16), (90, 100, 50)), (90, 100, 50))
    else:
        (folder / "a.heic").write_bytes(b"no matter what")
        expected["a.heic"] = "a HEIC picture needs pillow_heif"
    (folder / "self.png").symlink_to("self.png")
    expected["self.png"] = "Too many levels of symbolic links"
    (folder / "itself").symlink_to("itself")
    (folder / "loop").symlink_to(".")
    for name in ("a.pdf", "b.PDF", "clip.mov"):
        (folder / name).write_text("no picture")
    return expected


def test_every_format_is_read_right_or_named_all_the_way(tmp_path, capsys, monkeypatch):
    expected = make_every_format(tmp_path / "formats")
    good = {name for name, colour in expected.items() if not isinstance(colour, str)}
    make_set(tmp_path / "other", 0, 3)

    def check(paths, name_of):
        assert {name_of(path) for path in paths} == good and len(paths) == len(good)
        for path in paths:
            image = Picture(path).read()
            assert image.size == (24, 16)
            assert np.abs(np.asarray(image) - expected[name_of(path)].astype(float)).max() <= 5, path

    def check_named(text):
        for name in expected.keys() - good:
            (line,) = (line for line in text.splitlines() if f"formats/{name}" in line)
            assert expected[name] in line

    import_pictures(tmp_path / "formats", tmp_path / "other" / "trainB", tmp_path / "data" / "small", test_share=0)
    printed = capsys.readouterr().out
    assert f"{tmp_path}/formats: {len(expected)} pictures (passed over: 2 .pdf, 1 .mov, 1 without an ending)" in printed
    check_named(printed)
    check(list((tmp_path / "data/small/trainA").iterdir()), lambda path: path.name.partition("_")[2])
    assert run(f"{QUICK} --name r --max_steps 2") == 0
    assert f"A: {len(good)} pictures, B: 3 pictures\n" in capsys.readouterr().out

    monkeypatch.setattr(translate, "translate_any_size", lambda generator, images: Translation(images))
    flags = "--recursive --input formats --output out --device cpu"
    assert translate.main(["--checkpoint", "r", *flags.split()]) == 1
    out, err = capsys.readouterr()
    assert f"{len(good)} of {len(expected)} pictures translated" in out
    assert len(err.splitlines()) == len(expected) - len(good)
    check_named(err)
    names = {Path(name).stem: name for name in good}
    check(list((tmp_path / "out").iterdir()), lambda path: names[path.stem])
