"""Checkpoints measured on the test pictures: the protocol, the figures, the table and what is written."""

import utils
from utils import InputError

import hashlib
import json
import math
import re
import shutil
import statistics
import sys
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from common import CPU, Classifier, below, make_set, noise, save, save_generators, tiny
from conftest import ROOT
from PIL import Image, ImageFilter
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3

import evaluate
import metrics
from datasets import load_masks
from evaluate import Exam, find_entries, judge
from metrics import EFFICIENTNET, INCEPTION, Extractor
from models import ResNetGenerator, Translation, UGATITGenerator, translate_any_size
from pictures import Picture, unaugmented
from prepare import draw_built_in

SMALL = Path("data/small")


def test_figures_are_of_no_tf32_and_training_keeps_its_own(monkeypatch):
    """On CUDA PyTorch convolves in TF32 otherwise."""
    seen, own = [], torch.backends.cudnn.allow_tf32

    def find(*_):
        seen.append(torch.backends.cudnn.allow_tf32)
        raise InputError("enough")

    monkeypatch.setattr(evaluate, "find_entries", find)
    assert evaluate.main(["--checkpoint", "net", "--extractor", "none"]) == 2
    assert seen == [False] and torch.backends.cudnn.allow_tf32 is own is True


def fading(keep, towards=0.0, **settings):
    """A generator that makes ``keep`` · x + (1 - ``keep``) · ``towards``; 1 copies exactly."""
    generator = tiny(**settings)
    for head in (generator.content_head, generator.attention_head):
        nn.init.zeros_(head[-1].weight)
        nn.init.zeros_(head[-1].bias)
    nn.init.constant_(generator.content_head[-1].bias, 100 * towards)
    last = generator.attention_head[-1].bias.data
    last[-1] = 1000 if keep == 1 else math.log((len(last) - 1) * keep / (1 - keep))
    return generator


def store(folder="net", size=(32, 32), how="squash", more=None, **generators):
    """``folder/<direction>.pt`` for each, of a run with these and ``more`` options."""
    options = {"img_height": size[0], "img_width": size[1], "resize": how, **(more or {})}
    save_generators(folder, {"options": options, "step": 7}, **generators)


def run(command: str, dataset="small", extractor="none") -> int:
    options = ["--dataset_name", dataset, "--device", "cpu", "--extractor", extractor]
    return evaluate.main([*options, "--checkpoint", *command.split()])


def printed(capsys, command: str, **options) -> str:
    """What is said of a measurement."""
    capsys.readouterr()
    assert run(command, **options) == 0
    return capsys.readouterr().out


def refused(capsys, command: str, **options) -> str:
    """Why something is not measured."""
    capsys.readouterr()
    assert run(command, **options) == 2
    return capsys.readouterr().err


def report(name="net") -> dict:
    return json.loads(Path(f"images/{name}/evaluation.json").read_text(), parse_constant=pytest.fail)


def row(direction="AtoB", name="net", weights="last", **others) -> dict:
    wanted = {"direction": direction, "weights": weights, **others}
    (found,) = [r for r in report(name)["rows"] if wanted.items() <= r.items()]
    return found


def figures(direction="AtoB", name="net", weights="last") -> dict:
    return row(direction, name, weights)["figures"]


def protocol(direction="AtoB", name="net", weights="last") -> dict:
    return row(direction, name, weights)["protocol"]


def table(out: str) -> dict:
    """The printed cells by direction, label and heading, the rows in their order."""
    found = {}
    for part in out.split("\n\n")[:-1]:
        first, *lines = [re.split(r" {2,}", line.strip()) for line in part.splitlines()]
        for direction, label, *cells in lines:
            found.setdefault((direction, label), {}).update(zip(first[1:], cells, strict=True))
    return found


def read(path, size=(32, 32), channels=3) -> torch.Tensor:
    """A picture at a size, (channels, H, W) in [0, 255]."""
    with Image.open(path) as file:
        image = file.convert("RGB" if channels == 3 else "L").resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).reshape(*size, channels).permute(2, 0, 1).float()


def side(name, root=SMALL, **options) -> torch.Tensor:
    """All pictures of a folder, (N, channels, H, W) in [0, 255]."""
    return torch.stack([read(p, **options) for p in sorted((root / name).iterdir())])


@torch.no_grad()
def by_hand(generator, images):
    """Translations of a batch in whole levels of 255, and their foreground."""
    translation = generator(images / 127.5 - 1)
    foreground = translation.heat_map if translation.attention is None else 1 - translation.attention[:, -1:]
    return ((translation.image + 1) * 127.5).round().clamp(0, 255), foreground


def distance(a, b) -> float:
    """Mean absolute difference of two batches in levels, on [-1, 1]."""
    return (a - b).abs().mean().item() / 127.5


def near(value):
    return pytest.approx(value, rel=1e-5)


def changed(generator, inputs):
    """The change that the generator makes of pictures."""
    return near(distance(by_hand(generator, inputs)[0], inputs))


def features(images) -> torch.Tensor:
    return Extractor("tiny", None, CPU)(images.to(torch.uint8)).vectors


def kid(images, others) -> float:
    return metrics.kernel_distance(features(images), features(others))


def judged(where="net", root=SMALL, extractor=None, direction="AtoB", **options):
    """The measured checkpoint, without the script, and its reference."""
    exam = Exam(root, extractor, **options)
    entry = find_entries(where, [direction], CPU)[0]
    reference = exam.reference(direction, entry.reading)
    return judge(entry, reference, CPU), reference


def blobs(folder, stems, seed=0, size=(40, 36)):
    """Object masks that cover about half of the picture, in smooth patches."""
    for i, stem in enumerate(stems):
        grey = noise(seed + i, size).convert("L").filter(ImageFilter.GaussianBlur(5))
        middle = int(np.median(np.asarray(grey)))
        save(grey.point(lambda v, middle=middle: 255 * (v > middle)), Path(folder) / f"{stem}.png")


# ----------------------------------------------------------------------------------------------------------
#  Known answers
# ----------------------------------------------------------------------------------------------------------


def test_an_equal_picture_has_no_error_and_a_ratio_without_bounds(small_set, capsys):
    shutil.copytree(SMALL / "testA", SMALL / "testA_truth")
    store(AtoB=fading(1))
    cells, f = table(printed(capsys, "net")), figures()
    assert f["L1"] == 0 and f["SSIM"] == pytest.approx(1) and f["PSNR"] is None  # which JSON has not
    assert cells["AtoB", "net"]["PSNR"] == "-"


def test_a_copy_has_the_figures_of_the_input(capsys):
    root = Path("data/solid2striped")
    draw_built_in(root, n_train=3, n_test=3)
    store(more={"system": "pix2pix"}, AtoB=fading(1), BtoA=fading(1))  # shipped truths come before partners
    cells = table(printed(capsys, "net", dataset="solid2striped", extractor="tiny"))
    for direction in ("AtoB", "BtoA"):
        found = row(direction)
        f, copied = found["figures"], found["untranslated"]
        assert {"L1", "PSNR", "SSIM", "FID-tiny", "KID-tiny", "KID-tiny blocks of 10"} <= copied.keys()
        assert {key: f[key] for key in copied} == copied
        assert 0.05 < f["L1"] < 0.5 and 0.2 < f["SSIM"] < 0.95
        assert f["change"] == f["cycle error"] == f["background attention"] == f["background error"] == 0
        assert f["IoU"] == f["change IoU"] == 0  # nothing is found
    expected = distance(side("testA", root), side("testA_truth", root))
    assert figures()["L1"] == near(expected)
    assert cells["AtoB", "net"]["L1"] == cells["AtoB", "untranslated"]["L1"] == f"{expected:.3f}"


# ----------------------------------------------------------------------------------------------------------
#  Pictures
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how, channels", [("squash", 3), ("squash", 1), ("short_side", 3)])
def test_translations_and_features_are_of_upright_whole_pictures_in_8_bits(small_set, how, channels):
    generator, size = tiny(channels=channels), (24, 32)
    store(AtoB=generator, size=size, how=how)
    assert run("net", extractor="tiny") == 0

    def seen(name):
        if how == "squash":
            return side(name, size=size, channels=channels)
        paths = sorted((SMALL / name).iterdir())
        return torch.stack([unaugmented(Picture(path), size, how=how) for path in paths]).float()

    images, targets = seen("testA"), seen("testB")
    assert how == "squash" or (images - side("testA", size=size)).abs().mean() > 5
    expected, _ = by_hand(generator, images)
    written = Path("images/net/translated_AtoB")
    assert {p.name for p in written.iterdir()} == {"0.png", "1.png"}
    with Image.open(written / "0.png") as file:
        assert file.mode == ("L" if channels == 1 else "RGB")
    found = side("translated_AtoB", Path("images/net"), size=size, channels=channels)
    assert torch.equal(found, expected) and found.std() > 5
    assert protocol()["size"] == [24, 32] and protocol()["resize"] == how
    assert figures()["change"] == near(distance(expected, images))
    colours = (part.expand(-1, 3, -1, -1) for part in (expected, targets))
    assert figures()["KID-tiny"] == pytest.approx(kid(*colours), rel=1e-4)


def test_pictures_of_one_name_are_all_written_and_cannot_have_masks_or_truths(capsys):
    make_set(SMALL, tests=1)
    for i, name in enumerate(("deep/0.png", "one.png")):
        save(noise(i), SMALL / "testA" / name)
    store(AtoB=fading(1))
    assert run("net") == 0
    written, sources = Path("images/net/translated_AtoB"), {"0000_0": "0", "0001_0": "deep/0", "0002_one": "one"}
    assert {p.name for p in written.iterdir()} == {f"{name}.png" for name in sources}
    for name, source in sources.items():
        assert torch.equal(read(written / f"{name}.png"), read(SMALL / f"testA/{source}.png"))
    for folder in (SMALL / "testA_mask", SMALL / "testA_truth"):
        shutil.copytree(SMALL / "testB", folder)
        assert f"{folder}: 2 test pictures are named 0, expected names of their own" in refused(capsys, "net")
        shutil.rmtree(folder)


def test_pictures_that_are_also_in_train_are_counted_and_left_out_on_demand(capsys):
    make_set(SMALL, nA=4, nB=4, tests=4)
    copies = [("testA/1", "trainA/again"), ("testA/3", "trainB/again"), ("testB/0", "trainB/too")]
    copies += [("trainA/0", "trainB/both_0"), ("trainA/2", "trainB/both_2")]
    for source, copy in copies:
        shutil.copy(SMALL / f"{source}.png", SMALL / f"{copy}.png")
    store(AtoB=fading(0.5))
    other = save(noise(0), Path("images/net/translated_BtoA/0.png"))  # belongs to no row of these
    for flag, chosen, n_targets, left in (
        ("", [0, 1, 2, 3], 4, "of them also in train"),
        (" --dedup", [0, 2], 3, "left out: also in train"),
    ):
        sources = f"AtoB: {len(chosen)} pictures of testA (2 {left}), "
        targets = f"against {n_targets} of testB (1 {left})\ntrain: 2 pictures stand on both sides\n"
        assert sources + targets in printed(capsys, f"net{flag}")
        about = protocol()
        assert about["on_both_sides_of_train"] == 2 and about["also_in_train"] == {"A": 2, "B": 1}
        assert (about["dedup"], about["translated"], about["target"]) == (bool(flag), len(chosen), n_targets)
        assert {p.name for p in Path("images/net/translated_AtoB").iterdir()} == {f"{i}.png" for i in chosen}
        assert figures()["change"] == changed(fading(0.5), side("testA")[chosen])
    assert other.exists()
    shutil.copytree(SMALL / "testA", SMALL / "trainA", dirs_exist_ok=True)
    message = "data/small/testA: every test picture is also in train, --dedup leaves none"
    assert message in refused(capsys, "net --dedup")


def test_the_truth_of_pictures_side_by_side_is_the_other_half():
    root = Path("data/facades")
    for folder, i in (("train", 0), ("train", 1), ("test", 2), ("test", 3), ("test", 4)):
        image = noise(i, (64, 30))
        save(image, root / folder / f"{i}.png")
        for half, x in (("left", 0), ("right", 32)):
            save(image.crop((x, 0, x + 32, 30)), Path(folder, half, f"{i}.png"))
    store(AtoB=fading(0.5), BtoA=fading(1))
    assert run("net", dataset="facades", extractor="tiny") == 0
    left, right = (side(half, Path("test")) for half in ("left", "right"))
    faded, _ = by_hand(fading(0.5), left)
    assert protocol()["on_both_sides_of_train"] == 0
    assert figures("AtoB")["L1"] == near(distance(faded, right))
    assert figures("BtoA")["L1"] == near(distance(right, left))
    assert distance(faded, right) < 0.9 * distance(left, right)
    assert figures("AtoB")["KID-tiny"] == pytest.approx(kid(faded, right), rel=1e-4)


@pytest.mark.parametrize("dataset, folder", [("photos", "test"), ("solid2striped", "testB")])
def test_colourisation_is_compared_with_the_colours_and_the_masks_of_its_own_pictures(capsys, dataset, folder):
    """The built-in set's truths are of another task, and the masks of testA of other scenes."""
    root, generator = Path("data", dataset), tiny()
    if dataset == "photos":
        for i in range(3):
            save(noise(i), root / "train" / f"{i}.png")
            save(noise(10 + i), root / "test" / f"{i}.png")
        blobs(root / "test_mask", "012")
    else:
        draw_built_in(root, n_train=2, n_test=3)
    store(more={"task": "colorization"}, AtoB=generator, BtoA=generator)
    out = printed(capsys, "net", dataset=dataset, extractor="tiny")
    assert f"AtoB: 3 pictures of {folder} (0" in out and f"against 3 of {folder} " in out and "testA" not in out
    assert protocol()["on_both_sides_of_train"] == 0
    colour, masks = side(folder, root), side(f"{folder}_mask", root, channels=1)
    grey = side(folder, root, channels=1).expand(-1, 3, -1, -1)
    for direction, inputs, truths in (("AtoB", grey, colour), ("BtoA", colour, grey)):
        outputs, foreground = by_hand(generator, inputs)
        f = figures(direction)
        assert f["L1"] == near(distance(outputs, truths))
        assert f["KID-tiny"] == pytest.approx(kid(outputs, truths), rel=1e-4)
        assert f["IoU"] == pytest.approx(mean_of(iou, foreground, masks))
        assert f["background error"] == near(mean_of(off_object, differences(outputs, inputs), masks))
    save(noise(0), Path("masks/testA/000.png"))
    message = f"--mask_dir masks: no folder {folder} in it"
    assert message in refused(capsys, "net --mask_dir masks", dataset=dataset)
    store("other", AtoB=generator)
    message = "--checkpoint: found runs of colorization and of translation, expected one --task"
    assert message in refused(capsys, "net other", dataset=dataset)


def test_the_truth_of_pairs_by_name_is_the_partner_for_a_system_that_takes_pairs(capsys):
    make_set(SMALL, nB=3, tests=3)
    shutil.copy(SMALL / "testA/0.png", SMALL / "trainA/again.png")  # --dedup leaves out one side of a pair
    store(more={"system": "pix2pix"}, AtoB=fading(0.5), BtoA=fading(1))
    store("unpaired", more={"system": "cyclegan"}, AtoB=fading(0.5))
    cells = table(printed(capsys, "net unpaired --dedup"))
    A, B = side("testA"), side("testB")
    assert cells["AtoB", "untranslated at 32 x 32, pairs"]["L1"] == f"{distance(A[1:], B[1:]):.3f}"
    assert ("AtoB", "untranslated at 32 x 32") not in cells
    assert protocol("AtoB")["translated"] == 2 and protocol("BtoA")["translated"] == 3
    assert not {"L1", "PSNR", "SSIM"} & figures(name="unpaired").keys()  # to which equal names say nothing
    faded, f = by_hand(fading(0.5), A[1:])[0], figures("AtoB")
    squares = ((faded - B[1:]) / 127.5).square().mean(dim=(1, 2, 3))
    assert f["L1"] == near(distance(faded, B[1:])) and f["PSNR"] == near((10 * (4 / squares).log10()).mean().item())
    assert figures("BtoA")["L1"] == near(distance(B, A)) and "SSIM" in figures("BtoA")
    assert abs(distance(faded, B[1:]) - distance(B, A)) > 0.01
    (SMALL / "testB/1.png").unlink()
    message = "expected pairs, side by side in the pictures of test, or with equal names"
    assert message in refused(capsys, "net")


# ----------------------------------------------------------------------------------------------------------
#  Masks
# ----------------------------------------------------------------------------------------------------------


def mean_of(measure, found, masks) -> float:
    """The mean of ``measure`` over pictures."""
    return np.mean([measure(f, m) for f, m in zip(found, masks, strict=True)])


def iou(found, mask) -> float:
    found, mask = found > 0.5, mask > 127
    return ((found & mask).sum() / (found | mask).sum()).item()


def precision(found, mask) -> float:
    """Average precision from the ranks of the object's pixels, where no two are equal."""
    order = found.flatten().argsort(descending=True)
    hits = (mask > 127).flatten()[order].double()
    return ((hits.cumsum(0) / torch.arange(1, len(hits) + 1))[hits > 0]).mean().item()


def off_object(values, mask) -> float:
    return values[mask <= 127].mean().item()


def differences(images, others):
    """Where two batches differ, (N, 1, H, W), on [-1, 1]."""
    return (images - others).abs().mean(dim=1, keepdim=True) / 127.5


@pytest.mark.parametrize(
    "made_with",
    [{}, dict(network=UGATITGenerator), dict(network=UGATITGenerator, size=(32, 32))],
    ids=["masks", "heat map of the light U-GAT-IT", "heat map of the full U-GAT-IT"],
)
def test_attention_and_change_are_compared_with_the_masks_that_there_are(capsys, made_with):
    make_set(SMALL, tests=4)
    blobs(SMALL / "testA_mask", "0123", seed=5)  # --mask_dir comes first
    blobs("masks/testA", ["1", "3", "no such picture"])
    generator = tiny(**made_with)
    store(AtoB=generator, BtoA=tiny(1))
    inputs = side("testA")
    outputs, foreground = by_hand(generator, inputs)
    error = differences(outputs, inputs)
    change = error / error.amax(dim=(1, 2, 3), keepdim=True)
    for flags, root, chosen in (("", SMALL / "testA_mask", [0, 1, 2, 3]), (" --mask_dir masks", "masks/testA", [1, 3])):
        assert f"object masks for {len(chosen)}" in printed(capsys, f"net{flags}")
        f, masks = figures(), [read(f"{root}/{i}.png", channels=1) for i in chosen]
        assert f["IoU"] == pytest.approx(mean_of(iou, foreground[chosen], masks))
        assert f["change IoU"] == pytest.approx(mean_of(iou, change[chosen], masks), abs=0.003)
        assert f["AP"] == pytest.approx(mean_of(precision, foreground[chosen], masks), abs=0.002)
        # Many changes of whole levels are equal.
        assert f["change AP"] == pytest.approx(mean_of(precision, change[chosen], masks), abs=0.02)
        assert f["background attention"] == near(mean_of(off_object, foreground[chosen], masks))
        assert f["background error"] == near(mean_of(off_object, error[chosen], masks))
        assert 0 < f["IoU"] < 1 and 0 < f["change IoU"] < 1 and 0.3 < f["AP"] < 0.8
        assert f["change"] == near(distance(outputs, inputs))  # of all four
        assert protocol()["masks"] == len(chosen)
        assert protocol("BtoA")["masks"] == 0 and "IoU" not in figures("BtoA")


class PaintsWhiteBlack(nn.Module):
    """Its attention is on what is brighter than the middle, which it makes black; it keeps the rest."""

    size_multiple, min_size, settings = 4, 8, {"channels": 3}

    def forward(self, x):
        white = x[:, :1] > 0
        foreground = white.float()
        return Translation(x.masked_fill(white, -1), torch.cat([foreground, 1 - foreground], dim=1))


@pytest.mark.parametrize("how", ["squash", "short_side"])
@pytest.mark.parametrize("size", [(32, 32), (24, 24), (16, 40)])
@pytest.mark.parametrize("shape, box", [((96, 32), (56, 0, 96, 32)), ((32, 96), (0, 0, 32, 50))])
def test_masks_lie_on_their_pictures_at_any_size(monkeypatch, how, size, shape, box):
    for i in range(2):
        image = Image.new("RGB", shape)
        image.paste((255, 255, 255), (box[0] + i, *box[1:]))
        save(image, SMALL / f"testA/{i}.png")
        save(image.convert("L"), SMALL / f"testA_mask/{i}.png")
        save(noise(i), SMALL / f"testB/{i}.png")
    generator = PaintsWhiteBlack()
    about = {"options": {"img_height": size[0], "img_width": size[1], "resize": how}}
    monkeypatch.setattr(evaluate, "open_generators", lambda _: {"AtoB": (generator, about)})
    monkeypatch.setattr(evaluate, "find_generator", lambda where, _: Path(where, "AtoB.pt"))
    found, reference = judged()
    assert reference.masks.dtype == reference.masked.dtype == torch.bool
    assert reference.masks.shape == (2, 1, *size) and reference.masked.tolist() == [True, True]
    assert 0.1 < reference.masks.float().mean() < 0.9
    f = found.figures
    assert f["IoU"] == f["AP"] == f["change IoU"] == f["change AP"] == 1
    assert f["background attention"] == f["background error"] == 0 < f["change"]


def test_a_mask_that_covers_everything_says_nothing_of_the_background():
    make_set(SMALL, tests=2)
    save(Image.new("L", (40, 36), 255), SMALL / "testA_mask/0.png")
    store(AtoB=tiny())
    found, reference = judged()
    assert reference.masked.tolist() == [True, False] and reference.masks[0].all() and not reference.masks[1].any()
    assert math.isnan(found.figures["background attention"]) and math.isnan(found.figures["background error"])
    assert 0 < found.figures["IoU"] < 1
    save(Image.new("L", (40, 36)), SMALL / "testA_mask/1.png")
    found, _ = judged()  # now the second has a background, all of it
    assert found.figures["background attention"] == near(found.foreground[1].mean().item())


@pytest.mark.parametrize("options, folder", [("", "data/small/testA_mask"), (" --mask_dir masks", "masks/testA")])
def test_a_folder_of_empty_masks_is_refused(small_set, capsys, options, folder):
    for i in range(2):
        save(Image.new("L", (40, 36), i), Path(folder, f"{i}.png"))  # as a label map has it, not as a mask
    store(AtoB=tiny())
    message = f"{folder}: every mask is empty, expected objects above grey 127"
    assert message in refused(capsys, f"net{options}")
    blobs(folder, ["0"])  # one that has an object is enough
    assert run(f"net{options}") == 0 and protocol()["masks"] == 2


def test_run_lengths_go_down_the_columns_and_begin_with_background():
    run_lengths = {
        "some": {"size": [2, 4], "counts": [1, 3, 2, 1, 1]},
        "all": {"size": [4, 3], "counts": [0, 12]},
        "none": {"size": [3, 4], "counts": [12]},
    }
    Path("masks.json").write_text(json.dumps({"testA": run_lengths}))
    found = load_masks(Path("masks.json"), "testA")
    assert {mask.mode for mask in found.values()} == {"L"}
    assert {name: np.asarray(mask).tolist() for name, mask in found.items()} == {
        "some": [[0, 255, 0, 255], [255, 255, 0, 0]],
        "all": [[255] * 3] * 4,
        "none": [[0] * 4] * 3,
    }
    assert load_masks(Path("masks.json"), "testB") == {}


def test_the_shipped_masks_belong_to_horse2zebra(capsys):
    shipped = load_masks(ROOT / "data/horse2zebra_masks.json", "testA")
    assert len(shipped) == 90 and {mask.size for mask in shipped.values()} == {(256, 256)}
    shares = [(np.asarray(mask) > 127).mean() for mask in shipped.values()]
    assert all(set(np.unique(np.asarray(mask))) == {0, 255} for mask in shipped.values())
    assert min(shares) > 0.002 and max(shares) < 0.95 and 0.1 < np.mean(shares) < 0.5

    root, generator = Path("data/horse2zebra"), tiny()
    names = sorted(shipped)[3:5]
    for i, name in enumerate([*names, "of no mask"]):
        save(noise(i, (256, 256)), root / f"testA/{name}.png")
    save(noise(9, (256, 256)), root / "testB/0.png")
    store(AtoB=generator)
    assert "object masks for 2" in printed(capsys, "net", dataset="horse2zebra")
    masks = [torch.from_numpy(np.array(shipped[name].resize((32, 32), Image.Resampling.BICUBIC))) for name in names]
    _, foreground = by_hand(generator, side("testA", root)[:2])
    assert figures()["IoU"] == pytest.approx(mean_of(iou, foreground[:, 0], masks)) and 0 < figures()["IoU"] < 1


# ----------------------------------------------------------------------------------------------------------
#  Figures of sets
# ----------------------------------------------------------------------------------------------------------


def test_sets_are_compared_by_their_features_and_inputs_with_what_comes_back_from_8_bits():
    make_set(SMALL, nA=5, nB=5, tests=12)
    generators, errors = {"AtoB": tiny(0), "BtoA": tiny(1)}, []
    store(**generators)
    assert run("net", extractor="tiny") == 0
    for there, back in (("AtoB", "BtoA"), ("BtoA", "AtoB")):
        inputs, targets = side(f"test{there[0]}"), side(f"test{back[0]}")
        outputs = torch.cat([by_hand(generators[there], part)[0] for part in inputs.split(8)])
        errors.append(distance(torch.cat([by_hand(generators[back], part)[0] for part in outputs.split(8)]), inputs))
        x, y, source = map(features, (outputs, targets, inputs))
        low, high = metrics.kernel_distance_interval(x, y)
        mean, error = metrics.kernel_distance_in_blocks(x, y)
        expected = {
            "FID-tiny": metrics.frechet_distance(x, y),
            "KID-tiny": metrics.kernel_distance(x, y),
            "KID-tiny low": low,
            "KID-tiny high": high,
            "KID-tiny blocks of 10": mean,
            "KID-tiny blocks of 10, error of blocks": error,
            "KID-tiny U-GAT-IT": metrics.ugatit_kernel_distance(x, y, source),
            "change": distance(outputs, inputs),
            "cycle error": errors[-1],
        }
        assert figures(there) == near(expected)  # none is called FID or KID alone: those are Inception's
        assert row(there)["untranslated"]["KID-tiny"] == near(metrics.kernel_distance(source, y))
    assert abs(errors[0] - errors[1]) > 1e-3
    assert run("net --direction BtoA --floor_draws 2") == 0  # the way back is there too
    assert row("BtoA", extractor="none")["figures"]["cycle error"] == near(errors[1])


def floor_by_hand(n_draws, n):
    """KID and FID of each draw of n training pictures of B."""
    train, target, rng = side("trainB"), features(side("testB")), np.random.default_rng((7, 0))
    draws = [features(train[rng.permutation(len(train))[:n]]) for _ in range(n_draws)]
    return [(metrics.kernel_distance(d, target), metrics.frechet_distance(d, target)) for d in draws]


def test_the_floor_is_the_mean_and_deviation_over_draws_of_real_pictures(capsys):
    make_set(SMALL, nA=4, nB=9, tests=5)
    store(AtoB=fading(0.5))
    kids, fids = zip(*floor_by_hand(3, n=5), strict=True)
    by_kid, by_fid = statistics.stdev(kids), statistics.stdev(fids)
    for source, name in (("testB/0", "00"), ("testB/3", "33"), ("testA/1", "44")):  # which it leaves out
        shutil.copy(SMALL / f"{source}.png", SMALL / f"trainB/{name}.png")
    cells = table(printed(capsys, "net --floor_draws 3", extractor="tiny"))["AtoB", "real training pictures"]
    floor, deviation = row()["floor"], row()["floor_deviation"]
    assert floor.keys() == deviation.keys() == {"FID-tiny", "KID-tiny", "KID-tiny blocks of 10"}
    assert floor["KID-tiny"] == pytest.approx(np.mean(kids), rel=1e-4)
    assert floor["FID-tiny"] == pytest.approx(np.mean(fids), rel=1e-3)
    assert deviation["KID-tiny"] == pytest.approx(by_kid, rel=1e-3) and by_kid > 0
    assert deviation["FID-tiny"] == pytest.approx(by_fid, rel=1e-3)
    assert cells["FID-tiny"] == f"{np.mean(fids):.1f} ± {by_fid:.1f}"
    assert cells["100 KID-tiny"] == f"{100 * np.mean(kids):.2f} ± {100 * by_kid:.2f}"
    assert cells["95 % interval"] == cells["as U-GAT-IT"] == "-"
    assert run("net --floor_draws 3", extractor="tiny") == 0
    assert row()["floor"] == floor and row()["floor_deviation"] == deviation
    cells = table(printed(capsys, "net --floor_draws 1", extractor="tiny"))  # one draw has no deviation
    assert row()["floor"]["KID-tiny"] == pytest.approx(kids[0], rel=1e-4) and row()["floor_deviation"] == {}
    assert cells["AtoB", "real training pictures"]["FID-tiny"] == f"{fids[0]:.1f}"


def test_a_figure_that_one_draw_lacks_has_no_floor(monkeypatch):
    make_set(SMALL, nA=4, nB=9, tests=5)
    store(AtoB=fading(0.5))
    exam = Exam(SMALL, Extractor("tiny", None, CPU))
    reading = find_entries("net", ["AtoB"], CPU)[0].reading
    draws = iter([{"KID": 1.0, "FID": 5.0}, {"KID": math.nan, "FID": 7.0}, {"KID": 2.0, "FID": 12.0}])
    monkeypatch.setattr(metrics, "realism", lambda *_: next(draws))
    mean, deviation = exam.floor("AtoB", reading, 3)
    assert mean == {"FID": 8.0} and deviation == {"FID": pytest.approx(math.sqrt((9 + 1 + 16) / 2))}


def test_the_floor_draws_no_more_than_there_are(capsys):
    make_set(SMALL, nA=3, nB=3, tests=5)
    store(AtoB=fading(0.5))
    cells = table(printed(capsys, "net", extractor="tiny"))
    assert row()["floor"]["KID-tiny"] == pytest.approx(floor_by_hand(1, n=3)[0][0], rel=1e-4)
    assert row()["floor_deviation"] == {}  # all draws take all
    assert "±" not in cells["AtoB", "real training pictures"]["FID-tiny"]
    cells = table(printed(capsys, "net --floor_draws 0", extractor="tiny"))
    assert row()["floor"] == row()["floor_deviation"] == {}
    assert [label for _, label in cells] == ["untranslated", "net"]
    for path in sorted((SMALL / "trainB").iterdir())[1:]:
        path.unlink()
    for _ in range(2):  # with one training picture, then without any
        assert run("net", extractor="tiny") == 0
        assert row()["floor"] == {} and "KID-tiny" in figures()
        shutil.rmtree(SMALL / "trainB", ignore_errors=True)


def test_sets_too_unlike_for_blocks_have_the_other_figures(capsys):
    make_set(SMALL, nA=3, nB=4, tests=3)
    for i in range(3, 21):
        save(noise(500 + i), SMALL / f"testB/{i}.png")
    store(AtoB=fading(0.5))
    cells = table(printed(capsys, "net", extractor="tiny"))
    assert figures()["KID-tiny blocks of 10"] is None and figures()["KID-tiny U-GAT-IT"] is None
    assert figures()["KID-tiny"] > 0 and row()["floor"]["FID-tiny"] > 0
    assert cells["AtoB", "net"]["blocks of 10"] == cells["AtoB", "real training pictures"]["blocks of 10"] == "-"


def test_a_classifier_counts_the_pictures_of_the_targets_class(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "Extractor", Classifier)
    root = Path("data/horse2zebra")
    for name, bright in {"trainA": "0010", "trainB": "110", "testA": "0100", "testB": "11110"}.items():
        for i, b in enumerate(bright):
            image = noise(i + 10 * len(name) + ord(name[-1])).point(lambda v, b=b: v // 4 + 180 * (b == "1"))
            save(image, root / name / f"{i}.png")
    shutil.copytree(root, SMALL)
    store(AtoB=fading(1), BtoA=fading(0.1, towards=-1.0))
    Path("w.pth").write_bytes(b"weights")
    cells = table(printed(capsys, "net --inception w.pth", dataset="horse2zebra", extractor="any"))
    assert cells["AtoB", "net"]["zebra rate"] == "0.250" and cells["BtoA", "net"]["sorrel rate"] == "1.000"
    there, back = row("AtoB"), row("BtoA")
    assert there["protocol"]["inception_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert there["protocol"]["sheet_ordered_by"] == "probability of 'zebra'"
    assert there["figures"]["zebra rate"] == there["untranslated"]["zebra rate"] == 0.25
    assert there["floor"]["zebra rate"] == pytest.approx(2 / 3) and there["floor_deviation"] == {}
    assert back["figures"]["sorrel rate"] == 1 and back["untranslated"]["sorrel rate"] == pytest.approx(0.2)
    assert "FID-bright" in there["figures"] and "sorrel rate" not in there["figures"]

    for flags, rates in (("", {}), (" --class_B sorrel", {"sorrel rate": 0.75})):  # no classes of this set are known
        assert run(f"net{flags}", extractor="any") == 0
        for direction, expected in (("AtoB", rates), ("BtoA", {})):
            f = row(direction, dataset="small")["figures"]
            assert {key: value for key, value in f.items() if key.endswith("rate")} == expected
    message = "horse: no class of brightness, expected a name like zebra"
    assert message in refused(capsys, "net --class_A horse", extractor="any")


def test_generators_without_masks_have_only_figures_of_change(drawn):
    make_set(SMALL, tests=3)
    blobs(SMALL / "testA_mask", "012")
    store(AtoB=tiny(network=ResNetGenerator))
    assert run("net") == 0
    ((columns, options),) = drawn  # few pictures are on the sheet once
    assert list(columns) == ["input", "output"] and len(columns["output"]) == 3
    assert options["title"] == "best, median and worst by IoU of change and object"
    assert figures().keys() == {"change IoU", "change AP", "background error", "change"}
    assert 0 < figures()["change IoU"] < 1 and 0 < figures()["background error"] < 2


@pytest.mark.parametrize("where", ["run/BtoA.pt", "saved_models/run/BtoA.pt", "back"])
def test_a_single_file_or_direction_has_one_row_and_no_way_back(small_set, capsys, where):
    store("saved_models/run", AtoB=tiny(0), BtoA=tiny(1))
    store("saved_models/run/best", AtoB=tiny(2), BtoA=tiny(3))
    store("back", BtoA=tiny(1))
    shutil.copytree(SMALL / "testA", SMALL / "testB_truth")
    name = "back" if where == "back" else "run_BtoA"
    assert table(printed(capsys, where)).keys() == {("BtoA", "untranslated"), ("BtoA", name)}
    assert [(r["direction"], r["weights"]) for r in report(name)["rows"]] == [("BtoA", "last")]
    found = figures("BtoA", name)
    assert "L1" in found and "cycle error" not in found
    assert found["change"] == changed(tiny(1), side("testB"))


@pytest.mark.parametrize("direction, system", [("AtoB", "cyclegan"), ("BtoA", "cyclegan"), ("AtoB", "pix2pix")])
def test_test_pictures_of_one_side_measure_one_direction(small_set, capsys, direction, system):
    source, target = direction.split("to")
    blobs(SMALL / f"test{source}_mask", "01")
    shutil.rmtree(SMALL / f"test{target}")
    generators = {"AtoB": tiny(0), "BtoA": tiny(1)}
    store(more={"system": system}, **generators)
    lacking = f"data/small/test{target}: no test pictures there"
    said = f"{lacking}, so only {direction} is measured, without FID, KID and"
    assert said in printed(capsys, "net", extractor="tiny")
    assert [r["direction"] for r in report()["rows"]] == [direction] and protocol(direction)["target"] == 0
    f = figures(direction)
    assert f.keys() >= {"IoU", "cycle error"} and not {"KID-tiny", "L1"} & f.keys()
    assert f["change"] == changed(generators[direction], side(f"test{source}"))
    assert f"error: {lacking}\n" in refused(capsys, f"net/{target}to{source}.pt")


def test_pictures_are_read_at_the_size_that_was_asked_for(small_set, capsys):
    store(size=(16, 32), AtoB=tiny(0))
    assert run("net --size 64") == 0
    assert protocol()["size"] == [32, 64]
    assert figures()["change"] == changed(tiny(0), side("testA", size=(32, 64)))
    store("odd", size=(16, 32), AtoB=tiny(0))
    assert run("odd --size 66") == 0  # padded where the network takes only multiples
    assert protocol(name="odd")["size"] == [33, 66]
    padded = partial(translate_any_size, tiny(0))
    assert figures(name="odd")["change"] == changed(padded, side("testA", size=(33, 66)))
    store("full", AtoB=tiny(0, UGATITGenerator, size=(32, 32)))
    message = "--size 64: the full U-GAT-IT takes only pictures of its training size, 32 x 32"
    assert message in refused(capsys, "full --size 64")


# ----------------------------------------------------------------------------------------------------------
#  Rows
# ----------------------------------------------------------------------------------------------------------


def test_the_table_is_what_is_written(capsys):
    make_set(SMALL, nA=13, nB=13, tests=12)
    blobs(SMALL / "testA_mask", map(str, range(12)))
    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    store("saved_models/one", AtoB=tiny(0), BtoA=tiny(1))
    store("two", AtoB=tiny(2, ResNetGenerator))
    out = printed(capsys, "one two", extractor="tiny")
    cells, labels = table(out), ["real training pictures", "untranslated", "one", "two"]
    assert list(cells) == [("AtoB", label) for label in labels] + [("BtoA", label) for label in labels[:3]]
    assert out.count(" one ") == 2 + 1 + 2  # realism both ways, masks of A, truth of A and change of both
    assert all(len(line) < 160 for line in out.splitlines())
    of_masks = ("IoU", "AP", "background attention", "change IoU", "change AP", "background error")
    digits = {**dict.fromkeys((*of_masks, "L1", "SSIM", "cycle error", "change"), 3), "PSNR": 2}
    kinds = ("", " low", " high", " blocks of 10", " blocks of 10, error of blocks", " U-GAT-IT")
    for (direction, label), shown in cells.items():
        if label != "real training pictures":
            f = row(direction, "one")["untranslated"] if label == "untranslated" else figures(direction, label)
            assert {key: shown.get(key, "-") for key in digits} == {
                key: f"{f[key]:.{n}f}" if key in f else "-" for key, n in digits.items()
            }
            kid, low, high, blocks, error, ugatit = (f"{100 * f[f'KID-tiny{kind}']:.2f}" for kind in kinds)
            assert shown["FID-tiny"] == f"{f['FID-tiny']:.1f}" and shown["100 KID-tiny"] == kid
            assert shown["95 % interval"] == f"{low} to {high}" and shown["blocks of 10"] == f"{blocks} ± {error}"
            assert shown["as U-GAT-IT"] == ugatit
    assert cells["AtoB", "one"]["IoU"] != "-" and cells["AtoB", "two"]["IoU"] == "-"
    assert report("one")["rows"][0]["floor"] == report("two")["rows"][0]["floor"]
    assert [r["direction"] for r in report("one")["rows"]] == ["AtoB", "BtoA"]


def test_the_report_names_its_protocol(small_set, capsys):
    store(AtoB=fading(0.5))
    out = printed(capsys, "net --floor_draws 2", extractor="tiny")
    assert "features: tiny\n" in out
    assert out.endswith("written: evaluation.json, sheets and translations in images/net\n")
    assert report().keys() == {"rows"}
    found = row(dataset="small", extractor="tiny", step=7)
    measured = {"figures", "untranslated", "floor", "floor_deviation"}
    assert found.keys() == {"dataset", "extractor", "direction", "weights", "step", "protocol", *measured}
    about = found["protocol"]
    versions = about.pop("versions")
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"torchvision", "pillow", "torch-fidelity", "torchmetrics"} <= versions.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about.pop("date"))
    assert about.pop("sheet_ordered_by").startswith("likeness to the target's test pictures")
    assert about == {
        "size": [32, 32],
        "resize": "squash",
        "translated": 2,
        "target": 2,
        "masks": 0,
        "also_in_train": {"A": 0, "B": 0},
        "on_both_sides_of_train": 0,
        "dedup": False,
        "floor_draws": 2,
        "inception_sha256": None,
    }


def test_a_report_keeps_the_rows_of_other_evaluations(small_set):
    def kinds():
        return [(r["dataset"], r["extractor"], r["direction"], r["protocol"]["floor_draws"]) for r in report()["rows"]]

    shutil.copytree(SMALL, "data/other")
    store(AtoB=tiny(0), BtoA=tiny(1))
    assert run("net --direction AtoB --floor_draws 1") == 0
    first = row()
    assert run("net --direction BtoA --floor_draws 2") == 0
    assert run("net --direction AtoB --floor_draws 3", extractor="tiny") == 0
    assert run("net --direction AtoB --floor_draws 4", dataset="other") == 0
    others = [("small", "tiny", "AtoB", 3), ("other", "none", "AtoB", 4)]
    assert kinds() == [("small", "none", "AtoB", 1), ("small", "none", "BtoA", 2), *others]
    assert row(dataset="small", extractor="none") == first
    assert "KID-tiny" in row(extractor="tiny")["figures"] and "KID-tiny" not in first["figures"]

    before = row(dataset="other")
    store(AtoB=tiny(2), BtoA=tiny(3))
    assert run("net --floor_draws 5") == 0
    assert kinds() == [*others, ("small", "none", "AtoB", 5), ("small", "none", "BtoA", 5)]
    assert row(dataset="small", extractor="none")["figures"]["change"] != first["figures"]["change"]
    assert row(dataset="other") == before
    assert run("net --direction AtoB --size 64") == 0
    sizes = [r["protocol"]["size"] for r in report()["rows"] if (r["dataset"], r["extractor"]) == ("small", "none")]
    assert sizes == [[32, 32], [32, 32], [64, 64]]


def test_the_best_by_validation_has_a_row_of_its_own(small_set, capsys):
    store("saved_models/run", AtoB=tiny(0))
    store("saved_models/run/best", AtoB=tiny(1))
    store("run/best", AtoB=tiny(2))  # a plain folder of the run's name; no generators lie in it
    for _ in range(2):
        cells = table(printed(capsys, "run"))
        assert list(cells) == [("AtoB", "run"), ("AtoB", "run, best by validation")]
        assert [r["weights"] for r in report("run")["rows"]] == ["last", "best by validation"]
    inputs = side("testA")
    for seed, weights, ending in ((0, "last", "AtoB"), (1, "best by validation", "AtoB_best")):
        assert torch.equal(side(f"translated_{ending}", Path("images/run")), by_hand(tiny(seed), inputs)[0])
        assert figures(name="run", weights=weights)["change"] == changed(tiny(seed), inputs)
        assert Path(f"images/run/evaluation_{ending}.png").exists()
    shutil.rmtree("saved_models/run/best")
    assert run("run") == 0
    assert [r["weights"] for r in report("run")["rows"]] == ["best by validation", "last"]


@pytest.mark.parametrize(
    "before", ["", "milk, bread", "{}", "[1]", '{"rows": null}', '{"rows": [1]}', '{"rows": [{}]}']
)
def test_a_file_that_is_no_report_gives_way(small_set, before):
    store(AtoB=tiny())
    path = Path("images/net/evaluation.json")
    path.parent.mkdir(parents=True)
    path.write_text(before)
    assert run("net") == 0
    assert [r["direction"] for r in report()["rows"]] == ["AtoB"]


def test_two_processes_do_not_measure_one_checkpoint_at_once(small_set, monkeypatch, capsys):
    store(AtoB=tiny())
    monkeypatch.setattr(utils, "LOCK_SECONDS", 0)
    with utils.lock_folder(Path("images/net")):
        assert run("net") == 2
        expected = "images/net: another process works here; wait for its end, or measure another checkpoint"
        assert expected in capsys.readouterr().err
    assert not any(Path("images/net").iterdir()) and run("net") == 0


def test_the_spread_is_of_what_all_checkpoints_have_and_what_is_better_or_worse():
    lower = ("FID-x", "KID", "KID blocks of 10", "background attention", "background error", "L1", "cycle error")
    higher = ("zebra rate", "IoU", "AP", "change IoU", "change AP", "PSNR", "SSIM")
    neither = ("KID low", "KID high", "KID blocks of 10, error of blocks", "KID U-GAT-IT", "change")
    names = (*lower, *higher, *neither, "FID-of-some", "KID-of-some")
    rows = [evaluate.Row("x", "AtoB", dict.fromkeys(names, value), {}) for value in (4.0, 1.0, 2.0)]
    del rows[0].figures["FID-of-some"]
    rows[1].figures["KID-of-some"] = math.nan
    for given in (rows, rows[::-1]):
        median, worst = evaluate.spread_rows(given)
        assert (median.label, median.direction, worst.label, worst.direction) == ("median", "AtoB", "worst", "AtoB")
        assert median.figures == dict.fromkeys((*lower, *higher), 2.0)
        assert worst.figures == {**dict.fromkeys(lower, 4.0), **dict.fromkeys(higher, 1.0)}
    assert {*lower, *higher} > evaluate.RULES.keys()  # no sheet is ordered by what is neither


def test_a_run_by_its_path_has_its_best_row_and_spread_is_of_the_last_ones(small_set, capsys):
    for seed in (0, 1):
        store(f"saved_models/run_{seed}", AtoB=tiny(seed), BtoA=tiny(seed))
        store(f"saved_models/run_{seed}/best", AtoB=tiny(seed + 2), BtoA=tiny(seed + 2))
    cells = table(printed(capsys, "saved_models/run_0 run_1 --spread", extractor="tiny"))
    rows = ["run_0", "run_0, best by validation", "run_1", "run_1, best by validation", "median", "worst"]
    for direction in ("AtoB", "BtoA"):
        assert [label for d, label in cells if d == direction][2:] == rows
        median, worst = (cells[direction, label] for label in ("median", "worst"))
        errors = [figures(direction, f"run_{seed}")["cycle error"] for seed in (0, 1)]
        assert (median["cycle error"], worst["cycle error"]) == (f"{sum(errors) / 2:.3f}", f"{max(errors):.3f}")
        assert {part[key] for part in (median, worst) for key in ("95 % interval", "as U-GAT-IT", "change")} == {"-"}


@pytest.fixture
def kept():
    """The shares of the input in what the kept generators of a run make, there and back.

    Pictures that have more of it are nearer to the target and further from the truth.
    """
    make_set(SMALL)
    for side_ in "AB":
        for i in range(4):
            save(noise(i), SMALL / f"test{side_}/{i}.png")
            save(Image.new("RGB", (40, 36), (128, 128, 128)), SMALL / f"test{side_}_truth/{i}.png")
    store("saved_models/run", AtoB=fading(0.7), BtoA=fading(0.7))
    shares = {"100": (0.95, 0.3), "200": (0.8, 0.9), "300": (0.4, 0.35), "400": (0.1, None), "500": (0.99, None)}
    for step, pair in shares.items():
        made = {direction: fading(share) for direction, share in zip(("AtoB", "BtoA"), pair, strict=True) if share}
        store(f"saved_models/run/kept/{step}", **made)
    Path("saved_models/run/kept/600").mkdir()
    return shares


@pytest.mark.parametrize(
    "extra, extractor, chosen",
    [
        ("", "none", "300"),  # L1 0.4 + 0.35
        ("", "tiny", "200"),  # KID comes first
        ("--direction BtoA", "none", "100"),  # L1 0.3
        ("--direction AtoB", "none", "400"),
        ("--direction AtoB", "tiny", "500"),
    ],
)
def test_the_oracle_is_the_kept_generator_that_is_best_in_sum_of_all_wanted_directions(
    kept, capsys, extra, extractor, chosen
):
    cells = table(printed(capsys, f"run --oracle {extra}", extractor=extractor))
    for direction, share in zip(("AtoB", "BtoA"), kept[chosen], strict=True):
        folder = f"translated_{direction}_oracle"
        if direction in extra or not extra:
            expected, _ = by_hand(fading(share), side(f"test{direction[0]}"))
            assert torch.equal(side(folder, Path("images/run")), expected)
            found = figures(direction, "run", "best by test (oracle)")
            assert found["L1"] == near(distance(expected, side(f"test{direction[0]}_truth")))
            assert (direction, "run, best by test (oracle)") in cells
            assert figures(direction, "run", "last")["L1"] > 0  # the last stands beside it
        else:
            assert not Path("images/run", folder).exists()


def test_the_oracle_is_chosen_at_the_size_that_is_measured(kept, monkeypatch):
    sizes = set()
    translate_all = evaluate.translate_all
    monkeypatch.setattr(evaluate, "translate_all", lambda g, x, d: sizes.add(x.shape[2:]) or translate_all(g, x, d))
    assert run("run --oracle --size 24") == 0
    assert len(sizes) == 1 and max(sizes.pop()) == 24


def test_an_oracle_needs_something_to_choose_from_and_by(kept, capsys):
    for path in Path("saved_models/run/kept").glob("*/BtoA.pt"):
        path.unlink()
    for side_ in "AB":
        shutil.rmtree(SMALL / f"test{side_}_truth")
    nothing = "--oracle: nothing in saved_models/run/kept; train.py --keep_evaluated keeps"
    assert nothing in refused(capsys, "run --oracle", extractor="tiny")
    by_what = "--oracle chooses by KID or L1: needs an --extractor or true translations"
    assert by_what in refused(capsys, "run --oracle --direction AtoB")
    assert run("run --oracle --direction AtoB", extractor="tiny") == 0
    shutil.rmtree("saved_models/run/kept")
    assert nothing in refused(capsys, "run --oracle --direction AtoB", extractor="tiny")


def test_checkpoints_of_other_sizes_have_rows_of_their_own(small_set, capsys):
    """Names with a dot stay apart, too."""
    sizes, labels = {"weight_0.1": (32, 32), "weight_0.5": (16, 24)}, []
    for name, size in sizes.items():
        store(f"saved_models/{name}", AtoB=fading(1), size=size)
    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    cells = table(printed(capsys, "weight_0.1 weight_0.5"))
    for name, (height, width) in sizes.items():
        labels += [("AtoB", f"{row_of} at {height} x {width}") for row_of in ("untranslated", name)]
        assert cells[labels[-1]]["L1"] == cells[labels[-2]]["L1"]
        assert protocol(name=name)["size"] == [height, width]
        inputs, truths = (side(folder, size=(height, width)) for folder in ("testA", "testA_truth"))
        assert figures(name=name)["L1"] == near(distance(inputs, truths))
    assert list(cells) == labels


# ----------------------------------------------------------------------------------------------------------
#  The sheet
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The columns and options of each sheet."""
    calls, draw = [], evaluate.draw_sheet
    monkeypatch.setattr(evaluate, "draw_sheet", lambda columns, **o: calls.append((columns, o)) or draw(columns, **o))
    return calls


def test_the_sheet_shows_the_best_the_median_and_the_worst(drawn):
    make_set(SMALL, tests=11)
    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    store(AtoB=tiny(0), BtoA=tiny(1))
    assert run("net --direction AtoB") == 0
    ((columns, options),) = drawn
    assert list(columns) == ["input", "output", "attention", "truth", "recovered"]
    assert options["title"] == "best, median and worst by mean absolute error to the true translation"
    assert options["title"].endswith(protocol()["sheet_ordered_by"])
    assert options["rows"] == ["best"] * 3 + ["median"] * 3 + ["worst"] * 3

    inputs, truths, outputs = side("testA"), side("testA_truth"), side("translated_AtoB", Path("images/net"))
    order = (outputs - truths).abs().mean(dim=(1, 2, 3)).argsort()
    chosen = order[[0, 1, 2, 4, 5, 6, 8, 9, 10]]
    for name, images in (("input", inputs), ("output", outputs), ("truth", truths)):
        assert torch.allclose((columns[name] + 1) * 127.5, images[chosen], atol=0.01), name
    foreground = torch.cat([by_hand(tiny(0), images)[1] for images in inputs.split(8)])
    assert torch.allclose(columns["attention"], 2 * foreground[chosen] - 1, atol=1e-5)
    back = torch.cat([by_hand(tiny(1), images)[0] for images in outputs.split(8)])
    assert ((columns["recovered"] + 1) * 127.5 - back[chosen]).abs().max() < 1.01
    with Image.open("images/net/evaluation_AtoB.png") as sheet:
        assert sheet.width > 5 * 96 and sheet.height > 9 * 96


def test_what_orders_the_sheet_depends_on_what_there_is(drawn):
    make_set(SMALL, tests=4)
    store(AtoB=tiny())
    assert run("net") == 0  # a change is neither good nor bad
    assert drawn[0][1]["title"] == "first, middle and last by name" and protocol()["sheet_ordered_by"] == "name"
    assert torch.allclose((drawn[0][0]["input"] + 1) * 127.5, side("testA"), atol=0.01)

    def errors(images, truths):
        return (images.float() - truths.float()).abs().mean(dim=(1, 2, 3)) / 127.5

    store("both", AtoB=tiny(), BtoA=tiny(1))
    assert judged("both")[0].rule == "name"  # nor is a cycle error: a copy has none

    blobs("masks/testA", ["0", "2", "3"])
    masks = Path("masks")
    found, reference = judged(mask_dir=masks)
    assert found.rule == "IoU of attention and object" and found.scores[1] == -math.inf
    assert reference.masked.tolist() == [True, False, True, True]
    expected = [iou(found.foreground[i], 255 * reference.masks[i]) for i in (0, 2, 3)]
    assert found.scores[[0, 2, 3]].tolist() == pytest.approx(expected)

    found, reference = judged(mask_dir=masks, extractor=Extractor("tiny", None, CPU))
    assert found.rule.startswith("likeness to the target's test pictures")
    sets = (features(images) for images in (found.images, side("testB"), reference.inputs))
    assert torch.allclose(found.scores, metrics.resemblance(*sets), rtol=1e-4)

    found, _ = judged(mask_dir=masks, extractor=Classifier(), classes={"B": "zebra"})
    odds = found.images.float().mean(dim=(1, 2, 3)) / 127.5 - 1
    assert found.rule == "probability of 'zebra'"
    assert torch.allclose(found.scores, torch.sigmoid(2 * odds).log(), atol=1e-5)

    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    found, reference = judged(mask_dir=masks, extractor=Classifier(), classes={"B": "zebra"})
    assert found.rule == "mean absolute error to the true translation"
    assert torch.allclose(found.scores, -errors(found.images, reference.truths), atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
#  Options and what does not fit
# ----------------------------------------------------------------------------------------------------------


def test_without_an_extractor_no_extra_package_is_needed(small_set, monkeypatch, capsys):
    store(AtoB=tiny())
    for name in list(sys.modules):
        if name.split(".")[0] in ("torch_fidelity", "torchmetrics"):
            monkeypatch.setitem(sys.modules, name, None)
    assert run("net") == 0
    assert figures().keys() == {"change"} and row()["extractor"] == "none"
    assert "--extractor tiny needs torch_fidelity.utils" in refused(capsys, "net", extractor="tiny")


def test_inception_is_the_default_extractor(small_set, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", unreachable)
    store(AtoB=tiny())
    assert evaluate.main(["--dataset_name", "small", "--checkpoint", "net", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "--extractor inception-v3-compat: cannot be made" in err and f"--extractor {EFFICIENTNET}" in err
    assert "no route to host" in err and "--inception PATH" in err and not Path("images").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("net nowhere", "nowhere: no generator for AtoB found"),
        ("net/AtoB.pt --direction BtoA", "net/AtoB.pt: translates AtoB, expected BtoA (a folder serves both)"),
        ("half --direction AtoB BtoA", "half: translates AtoB, expected BtoA (a folder serves both)"),
        ("net --mask_dir nowhere", "--mask_dir nowhere: no folder testA or testB in it"),
        ("half --mask_dir nowhere", "--mask_dir nowhere: no folder testA in it"),
        ("net --mask_dir masks", "masks/testA: no mask there is named as a test picture, as 0"),
        ("net --floor_draws -1", "--floor_draws: expected at least 0, found -1"),
        (f"net --inception notes.txt --extractor {INCEPTION}", "--inception notes.txt: not a readable weights file"),
        ("net/BtoA.pt half/AtoB.pt --spread", "--spread: no two checkpoints have direction, size and resize in common"),
        ("net --data_dir elsewhere", "elsewhere/small: no such folder. Expected pictures in elsewhere/small/trainA"),
        # What would be ignored or lost.
        ("x/net x_net", "x/net and x_net would both be written to images/x_net"),
        ("net --inception w.pth", "--inception is for torch-fidelity's extractors, found --extractor none"),
        ("net --class_B zebra --extractor tiny", "--class_A and --class_B need a classifier"),
        ("net --spread", "--spread: expected several checkpoints, found one"),
        ("run saved_models/run", "--checkpoint run and saved_models/run would both be written to images/run"),
        (".", "--checkpoint .: has no name to write under, expected a run or a longer path"),
        ("net ../..", "--checkpoint ../..: has no name to write under"),
    ],
)
def test_what_does_not_fit_is_named(small_set, capsys, arguments, message):
    store(AtoB=tiny(), BtoA=tiny())
    store("half", AtoB=tiny())
    blobs("masks/testA", ["another"])
    Path("notes.txt").write_text("milk, bread")
    before = below(Path())
    err = refused(capsys, arguments)
    assert err.startswith("evaluate.py: error: ") and message in err
    assert below(Path()) == before


def test_what_is_missing_in_the_data_set_is_named(small_set, capsys):
    store(AtoB=tiny())
    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    (SMALL / "testA_truth/1.png").unlink()
    message = "data/small/testA_truth: no picture named 1, expected one for each test picture"
    assert message in refused(capsys, "net")
    (SMALL / "testA/1.png").unlink()
    assert "KID of 1 and 2 pictures: expected at least 2 each" in refused(capsys, "net", extractor="tiny")
    assert run("net") == 0  # other figures need no second picture


def test_the_folder_of_a_checkpoint_is_named_after_it():
    names = {
        "./run/": "run",
        "saved_models/run/kept/000100": "run_kept_000100",
        "saved_models/pretrained/run": "pretrained_run",
        "../official/latest_net_G_A.pth": "official_latest_net_G_A",
        "/a/b/c/d": "b_c_d",
        "saved_models": "",
    }
    assert {where: evaluate.output_name(where) for where in names} == names


def test_weights_of_this_repository_and_a_run_of_their_name_have_folders_of_their_own(small_set, capsys):
    for folder in ("saved_models/pretrained/shipped", "saved_models/shipped", "shipped"):
        Path(folder).mkdir(parents=True)
    Path("saved_models/pretrained/shipped/AtoB.pt").touch()
    assert evaluate.output_name("shipped") == "pretrained_shipped"
    Path("saved_models/shipped/AtoB.pt").touch()
    assert evaluate.output_name("saved_models/shipped") == "shipped"
    assert evaluate.output_name("pretrained/shipped") == "pretrained_shipped"
    assert "expected saved_models/shipped or pretrained/shipped" in refused(capsys, "shipped")
