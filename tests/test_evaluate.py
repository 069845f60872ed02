"""Checkpoints measured on the test pictures: the protocol, the figures, the table and what is written."""

from utils import InputError

import hashlib
import json
import math
import re
import shutil
import statistics
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from common import CPU, Classifier, below, make_set, noise, save
from conftest import ROOT
from PIL import Image, ImageFilter
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3

import evaluate
import metrics
from checkpoints import pack_generator
from datasets import load_masks, unaugmented
from evaluate import Exam, Reading, find_entries, judge
from metrics import EFFICIENTNET, Extractor, Features
from models import AttentionGenerator, ResNetGenerator, Translation, UGATITGenerator
from pictures import Picture
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


def tiny(seed=0, network=AttentionGenerator, **settings):
    """A small generator with larger weights than at the start, where all masks are equal; of 2 masks none dominates."""
    torch.manual_seed(seed)
    if network is AttentionGenerator:
        settings = {"n_masks": 2, **settings}
    generator = network(ngf=4, n_residual_blocks=1, **settings).eval()
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.5)
    return generator


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
    """``folder/<direction>.pt`` for each, as train.py writes them, with ``more`` options."""
    Path(folder).mkdir(parents=True)
    options = {"img_height": size[0], "img_width": size[1], "resize": how, **(more or {})}
    for direction, generator in generators.items():
        about = {"direction": direction, "options": options, "step": 7}
        torch.save({**pack_generator(generator), **about}, f"{folder}/{direction}.pt")


def run(command: str, dataset="small", extractor="none") -> int:
    options = ["--dataset_name", dataset, "--device", "cpu", "--extractor", extractor]
    return evaluate.main([*options, "--checkpoint", *command.split()])


def report(name="net") -> dict:
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(Path(f"images/{name}/evaluation.json").read_text(), parse_constant=refuse)


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
    return ((translation.image + 1) * 127.5).round().clamp(0, 255), translation.foreground


def distance(a, b) -> float:
    """Mean absolute difference of two batches in levels, on [-1, 1]."""
    return (a - b).abs().mean().item() / 127.5


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


class Perfect(nn.Module):
    """Stands for a trained generator: finds the objects and knows the truth of each test picture."""

    def __init__(self, root: Path):
        super().__init__()
        self.settings = {"channels": 3}
        self.inputs, self.truths = (side(name, root, size=(64, 64)) for name in ("testA", "testA_truth"))
        grey = side("testA_mask", root, size=(64, 64), channels=1)
        self.masks = (grey > 127).float()

    def forward(self, x):
        levels = (x + 1) * 127.5
        chosen = [[torch.allclose(image, known, atol=0.1) for known in self.inputs].index(True) for image in levels]
        foreground = self.masks[chosen]
        return Translation(self.truths[chosen] / 127.5 - 1, torch.cat([foreground, 1 - foreground], dim=1))


def stand_in(monkeypatch, generator, size=(64, 64), how="squash"):
    """Every checkpoint is ``generator``, from A to B."""
    about = {"options": {"img_height": size[0], "img_width": size[1], "resize": how}}
    monkeypatch.setattr(evaluate, "open_generators", lambda *_: {"AtoB": (generator, about)})
    monkeypatch.setattr(evaluate, "find_generator", lambda where, _: Path(where, "AtoB.pt"))


def test_a_perfect_translator_is_measured_as_perfect(monkeypatch, capsys):
    root = Path("data/solid2striped")
    draw_built_in(root, n_train=2, n_test=9)
    stand_in(monkeypatch, Perfect(root))
    found, _ = judged(root=root)
    f = found.figures
    assert f["IoU"] == f["AP"] == 1 and f["background attention"] == 0
    assert f["L1"] == 0 and f["SSIM"] == pytest.approx(1) and f["PSNR"] == math.inf
    # It changes only the objects, except for soft edges, and not all of an object changes much.
    assert 0 < f["background error"] < 0.05 < f["change"]
    assert 0.3 < f["change IoU"] < 1 and 0.9 < f["change AP"] < 1
    assert found.scores.tolist() == [0] * 9

    # A figure without bounds is still JSON.
    assert run("perfect", dataset="solid2striped") == 0
    written = row(name="perfect")
    assert written["figures"]["L1"] == 0 and written["figures"]["PSNR"] is None
    assert 5 < written["untranslated"]["PSNR"] < 30
    assert table(capsys.readouterr().out)["AtoB", "perfect"]["PSNR"] == "-"


def test_a_copy_has_the_figures_of_the_input(capsys):
    draw_built_in(Path("data/solid2striped"), n_train=3, n_test=3)
    store(more={"system": "pix2pix"}, AtoB=fading(1), BtoA=fading(1))  # shipped truths come before partners
    assert run("net", dataset="solid2striped", extractor="tiny") == 0
    for direction in ("AtoB", "BtoA"):
        found = row(direction)
        f, copied = found["figures"], found["untranslated"]
        assert {"L1", "PSNR", "SSIM", "FID-tiny", "KID-tiny", "KID-tiny blocks of 10"} <= copied.keys()
        assert {key: f[key] for key in copied} == copied
        assert 0.05 < f["L1"] < 0.5 and 0.2 < f["SSIM"] < 0.95
        assert f["change"] == f["cycle error"] == f["background attention"] == f["background error"] == 0
        assert f["IoU"] == f["change IoU"] == 0  # nothing is found
    truth = Path("data/solid2striped")
    expected = distance(side("testA", truth), side("testA_truth", truth))
    assert figures()["L1"] == pytest.approx(expected, rel=1e-5)
    cells = table(capsys.readouterr().out)
    assert cells["AtoB", "net"]["L1"] == cells["AtoB", "untranslated"]["L1"] == f"{expected:.3f}"


def test_the_same_pictures_are_near_and_noise_is_far():
    root = Path("data/solid2striped")
    draw_built_in(root, n_train=6, n_test=6)
    for split in ("train", "test"):
        shutil.rmtree(root / f"{split}B")
        shutil.copytree(root / f"{split}A", root / f"{split}B")
    store(AtoB=fading(1), BtoA=tiny(network=ResNetGenerator))
    assert run("net", dataset="solid2striped", extractor="tiny") == 0
    copy, far, floor = figures("AtoB"), figures("BtoA"), row("AtoB")["floor"]
    assert copy["FID-tiny"] == pytest.approx(0, abs=1e-4) and copy["KID-tiny"] < 0
    assert floor["FID-tiny"] > 1e-3
    assert far["FID-tiny"] > 5 * floor["FID-tiny"] and far["KID-tiny"] > 5 * abs(floor["KID-tiny"])
    assert far["KID-tiny low"] > 0


# ----------------------------------------------------------------------------------------------------------
#  Pictures
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["squash", "short_side"])
def test_translations_are_of_upright_whole_pictures_in_8_bits(small_set, how):
    generator, size = tiny(), (24, 32)
    store(AtoB=generator, size=size, how=how)
    assert run("net") == 0
    paths = sorted((SMALL / "testA").iterdir())
    if how == "squash":
        images = torch.stack([read(path, size) for path in paths])
    else:
        images = torch.stack([unaugmented(Picture(path), size, how=how) for path in paths]).float()
        assert (images - torch.stack([read(path, size) for path in paths])).abs().mean() > 5
    expected, _ = by_hand(generator, images)
    written = Path("images/net/translated_AtoB")
    assert {p.name for p in written.iterdir()} == {"0.png", "1.png"}
    found = side("translated_AtoB", Path("images/net"), size=size)
    assert torch.equal(found, expected) and found.std() > 5
    assert protocol()["size"] == [24, 32] and protocol()["resize"] == how
    assert figures()["change"] == pytest.approx(distance(expected, images), rel=1e-5)


def test_grey_generators_are_measured_on_grey_pictures(small_set):
    generator = tiny(channels=1)
    store(AtoB=generator)
    assert run("net", extractor="tiny") == 0
    images = side("testA", channels=1)
    expected, _ = by_hand(generator, images)
    with Image.open("images/net/translated_AtoB/0.png") as file:
        assert file.mode == "L"
    assert torch.equal(side("translated_AtoB", Path("images/net"), channels=1), expected)
    colours = (grey.repeat(1, 3, 1, 1) for grey in (expected, side("testB", channels=1)))
    assert figures()["KID-tiny"] == pytest.approx(kid(*colours), rel=1e-4)


def test_pictures_of_one_name_are_all_written(tmp_path):
    make_set(SMALL, tests=1)
    for i, name in enumerate(("deep/0.png", "one.png")):
        save(noise(i), SMALL / "testA" / name)
    store(AtoB=fading(1))
    assert run("net") == 0
    written = Path("images/net/translated_AtoB")
    assert {p.name for p in written.iterdir()} == {"0000_0.png", "0001_0.png", "0002_one.png"}
    for path, source in (("0000_0", "0"), ("0001_0", "deep/0"), ("0002_one", "one")):
        assert torch.equal(read(written / f"{path}.png"), read(SMALL / "testA" / f"{source}.png"))


def test_pictures_that_are_also_in_train_are_counted_and_left_out_on_demand(capsys):
    make_set(SMALL, nA=4, nB=4, tests=4)
    shutil.copy(SMALL / "testA/1.png", SMALL / "trainA/again.png")
    shutil.copy(SMALL / "testA/3.png", SMALL / "trainB/again.png")
    shutil.copy(SMALL / "testB/0.png", SMALL / "trainB/too.png")
    for name in ("0.png", "2.png"):
        shutil.copy(SMALL / "trainA" / name, SMALL / "trainB" / f"both_{name}")
    store(AtoB=fading(0.5))
    assert run("net") == 0
    whole = protocol()
    assert whole["on_both_sides_of_train"] == 2
    assert whole["also_in_train"] == {"A": 2, "B": 1} and whole["dedup"] is False
    assert (whole["translated"], whole["target"]) == (4, 4)
    assert {p.name for p in Path("images/net/translated_AtoB").iterdir()} == {f"{i}.png" for i in range(4)}
    out = capsys.readouterr().out
    assert "AtoB: 4 pictures of testA (2 that are also in train among them)" in out
    assert "\ntrain: 2 pictures stand on both sides\n" in out
    Path("images/net/translated_BtoA").mkdir()
    save(noise(0), Path("images/net/translated_BtoA/0.png"))  # what belongs to no row of this one stays
    assert run("net --dedup") == 0
    less = protocol()
    assert less["also_in_train"] == {"A": 2, "B": 1} and less["dedup"] is True
    assert (less["translated"], less["target"]) == (2, 3)
    out = capsys.readouterr().out
    assert "2 pictures of testA (2 that are also in train left out), against 3 of testB (1 left out)" in out
    assert {p.name for p in Path("images/net/translated_AtoB").iterdir()} == {"0.png", "2.png"}
    assert Path("images/net/translated_BtoA/0.png").exists()
    kept = side("testA")[[0, 2]]
    assert figures()["change"] == pytest.approx(distance(by_hand(fading(0.5), kept)[0], kept), rel=1e-5)
    for i in range(4):
        shutil.copy(SMALL / f"testA/{i}.png", SMALL / f"trainA/all{i}.png")
    assert run("net --dedup") == 2
    message = "data/small/testA: every test picture is also in train, --dedup leaves none"
    assert message in capsys.readouterr().err


def test_the_truth_of_pictures_side_by_side_is_the_other_half():
    root = Path("data/facades")
    for split, n in (("train", 2), ("test", 3)):
        for i in range(n):
            save(noise(10 * n + i, (64, 30)), root / split / f"{i}.png")
    store(AtoB=fading(0.5), BtoA=fading(1))
    assert run("net", dataset="facades", extractor="tiny") == 0
    halves = {"left": [], "right": []}
    for i in range(3):
        image = Image.open(root / f"test/{i}.png")
        for half, box in (("left", (0, 0, 32, 30)), ("right", (32, 0, 64, 30))):
            save(image.crop(box), Path(half) / f"{i}.png")
            halves[half].append(read(Path(half) / f"{i}.png"))
    left, right = (torch.stack(halves[half]) for half in ("left", "right"))
    faded, _ = by_hand(fading(0.5), left)
    assert protocol()["on_both_sides_of_train"] == 0
    assert figures("AtoB")["L1"] == pytest.approx(distance(faded, right), rel=1e-5)
    assert figures("BtoA")["L1"] == pytest.approx(distance(right, left), rel=1e-5)
    assert distance(faded, right) < 0.9 * distance(left, right)
    assert figures("AtoB")["KID-tiny"] == pytest.approx(kid(faded, right), rel=1e-4)


@pytest.mark.parametrize("folders", [("train", "test"), ("trainB", "testB")])
def test_the_truth_of_a_grey_picture_is_its_colours(folders, capsys):
    for folder in folders:
        for i in range(3):
            save(noise(10 * len(folder) + i, (32, 32)), Path("data/photos") / folder / f"{i}.png")
    store(more={"task": "colorization"}, AtoB=fading(0.5), BtoA=fading(0.5))
    assert run("net", dataset="photos", extractor="tiny") == 0
    colour = side(folders[1], Path("data/photos"))
    grey = side(folders[1], Path("data/photos"), channels=1).expand(-1, 3, -1, -1)
    coloured, _ = by_hand(fading(0.5), grey)
    assert protocol()["on_both_sides_of_train"] == 0
    assert figures("AtoB")["L1"] == pytest.approx(distance(coloured, colour), rel=1e-5)
    assert figures("BtoA")["L1"] == pytest.approx(distance(by_hand(fading(0.5), colour)[0], grey), rel=1e-5)
    assert figures("AtoB")["KID-tiny"] == pytest.approx(kid(coloured, colour), rel=1e-4)
    store("other", AtoB=fading(0.5))
    capsys.readouterr()
    assert run("net other", dataset="photos") == 2
    assert "--checkpoint: found runs of colorization and of translation, expected one --task" in capsys.readouterr().err


def test_colourisation_is_compared_with_what_belongs_to_its_own_pictures(capsys):
    """The built-in set's truths are of another task, and the masks of testA of other scenes."""
    root = Path("data/solid2striped")
    draw_built_in(root, n_train=2, n_test=3)
    generator = tiny()
    store(more={"task": "colorization"}, AtoB=generator, BtoA=generator)
    assert run("net", dataset="solid2striped") == 0
    colour, masks = side("testB", root), side("testB_mask", root, channels=1)
    grey = side("testB", root, channels=1).expand(-1, 3, -1, -1)
    for direction, inputs, truths in (("AtoB", grey, colour), ("BtoA", colour, grey)):
        outputs, foreground = by_hand(generator, inputs)
        f = figures(direction)
        assert f["L1"] == pytest.approx(distance(outputs, truths), rel=1e-5)
        assert f["IoU"] == pytest.approx(mean_of(iou, foreground, masks))
        error = (outputs - inputs).abs().mean(dim=1, keepdim=True) / 127.5
        assert f["background error"] == pytest.approx(mean_of(off_object, error, masks), rel=1e-5)
    out = capsys.readouterr().out
    assert "AtoB: 3 pictures of testB (0" in out and "against 3 of testB" in out and "testA" not in out
    save(noise(0), Path("masks/testA/000.png"))
    assert run("net --mask_dir masks", dataset="solid2striped") == 2
    assert "--mask_dir masks: no folder testB in it" in capsys.readouterr().err


def test_the_truth_of_pairs_by_name_is_the_partner_for_a_system_that_takes_pairs(capsys):
    for folder in ("trainA", "trainB", "testA", "testB"):
        for i in range(3):
            save(noise(10 * len(folder) + 100 * ord(folder[-1]) + i), Path("data/small") / folder / f"{i}.png")
    shutil.copy("data/small/testA/0.png", "data/small/trainA/again.png")  # --dedup leaves out one side of a pair
    store(more={"system": "pix2pix"}, AtoB=fading(0.5), BtoA=fading(1))
    store("unpaired", more={"system": "cyclegan"}, AtoB=fading(0.5))
    assert run("net unpaired --dedup") == 0
    A, B = side("testA"), side("testB")
    assert protocol("AtoB")["translated"] == 2 and protocol("BtoA")["translated"] == 3
    assert not {"L1", "PSNR", "SSIM"} & figures(name="unpaired").keys()  # to which equal names say nothing
    cells = table(capsys.readouterr().out)
    untranslated = f"{distance(A[1:], B[1:]):.3f}"
    assert cells["AtoB", "untranslated at 32 x 32, pairs"]["L1"] == untranslated
    assert ("AtoB", "untranslated at 32 x 32") not in cells
    faded = by_hand(fading(0.5), A[1:])[0]
    assert figures("AtoB")["L1"] == pytest.approx(distance(faded, B[1:]), rel=1e-5)
    squares = ((faded - B[1:]) / 127.5).square().mean(dim=(1, 2, 3))
    assert figures("AtoB")["PSNR"] == pytest.approx((10 * (4 / squares).log10()).mean().item(), rel=1e-5)
    assert figures("BtoA")["L1"] == pytest.approx(distance(B, A), rel=1e-5) and "SSIM" in figures("BtoA")
    assert abs(distance(faded, B[1:]) - distance(B, A)) > 0.01
    Path("data/small/testB/1.png").unlink()
    assert run("net") == 2
    assert "expected pairs, side by side in the pictures of test, or with equal names" in capsys.readouterr().err


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


def test_attention_and_change_are_compared_with_the_masks_of_the_set(capsys):
    make_set(SMALL, tests=3)
    blobs(SMALL / "testA_mask", "012")
    generator = tiny()
    store(AtoB=generator, BtoA=tiny(1))
    assert run("net") == 0
    inputs = side("testA")
    outputs, foreground = by_hand(generator, inputs)
    masks = side("testA_mask", channels=1)
    change = (outputs - inputs).abs().mean(dim=1, keepdim=True)
    change = change / change.amax(dim=(1, 2, 3), keepdim=True)
    f = figures()
    assert f["IoU"] == pytest.approx(mean_of(iou, foreground, masks))
    assert f["change IoU"] == pytest.approx(mean_of(iou, change, masks), abs=0.003)
    assert f["AP"] == pytest.approx(mean_of(precision, foreground, masks), abs=0.002) and 0.3 < f["AP"] < 0.8
    # Many changes of whole levels are equal.
    assert f["change AP"] == pytest.approx(mean_of(precision, change, masks), abs=0.02)
    assert f["background attention"] == pytest.approx(mean_of(off_object, foreground, masks), rel=1e-5)
    error = (outputs - inputs).abs().mean(dim=1, keepdim=True) / 127.5
    assert f["background error"] == pytest.approx(mean_of(off_object, error, masks), rel=1e-5)
    assert 0 < f["IoU"] < 1 and 0 < f["change IoU"] < 1
    assert protocol()["masks"] == 3 and protocol("BtoA")["masks"] == 0 and "IoU" not in figures("BtoA")
    assert "object masks for 3" in capsys.readouterr().out


def test_masks_of_some_pictures_measure_only_those():
    make_set(SMALL, tests=4)
    blobs(SMALL / "testA_mask", "0123", seed=5)  # --mask_dir comes first
    blobs("masks/testA", ["1", "3", "no such picture"])
    generator = tiny()
    store(AtoB=generator)
    assert run("net --mask_dir masks") == 0
    inputs = side("testA")
    outputs, foreground = by_hand(generator, inputs)
    masks = [read(f"masks/testA/{i}.png", channels=1) for i in (1, 3)]
    assert figures()["IoU"] == pytest.approx(mean_of(iou, foreground[[1, 3]], masks)) and protocol()["masks"] == 2
    error = (outputs - inputs).abs().mean(dim=1, keepdim=True)[[1, 3]] / 127.5
    assert figures()["background error"] == pytest.approx(mean_of(off_object, error, masks), rel=1e-5)
    assert figures()["change"] == pytest.approx(distance(outputs, inputs), rel=1e-5)  # of all four


@pytest.mark.parametrize("size", [None, (32, 32)], ids=["light", "full"])
def test_u_gat_its_heat_map_is_scored_as_attention(size):
    make_set(SMALL, tests=3)
    blobs(SMALL / "testA_mask", "012", seed=5)
    generator = tiny(network=UGATITGenerator, size=size)
    store(AtoB=generator)
    assert run("net") == 0
    with torch.no_grad():
        heat = generator(side("testA") / 127.5 - 1).heat_map
    masks = [read(SMALL / f"testA_mask/{i}.png", channels=1) for i in range(3)]
    assert figures()["IoU"] == pytest.approx(mean_of(iou, heat, masks))
    off = mean_of(off_object, heat, masks)
    assert figures()["background attention"] == pytest.approx(off, rel=1e-5) and 0 < figures()["AP"] < 1


class FindsWhite(nn.Module):
    """Copies pictures; its attention is on what is brighter than the middle."""

    def __init__(self):
        super().__init__()
        self.settings = {"channels": 3}

    def forward(self, x):
        foreground = (x[:, :1] > 0).float()
        return Translation(x, torch.cat([foreground, 1 - foreground], dim=1))


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
    stand_in(monkeypatch, FindsWhite(), size, how)
    found, reference = judged()
    assert reference.masks.dtype == reference.masked.dtype == torch.bool
    assert reference.masks.shape == (2, 1, *size) and reference.masked.tolist() == [True, True]
    assert 0.1 < reference.masks.float().mean() < 0.9
    assert found.figures["IoU"] == found.figures["AP"] == 1 and found.figures["background attention"] == 0


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
    assert found.figures["background attention"] == pytest.approx(found.foreground[1].mean().item(), rel=1e-5)


@pytest.mark.parametrize("options", ["", " --mask_dir masks"])
def test_a_folder_of_empty_masks_is_refused(small_set, capsys, options):
    folder = Path("masks/testA") if options else SMALL / "testA_mask"
    for i in range(2):
        blobs(folder, [str(i)], seed=i)
        with Image.open(folder / f"{i}.png") as file:
            save(file.point(lambda v: v // 255), folder / f"{i}.png")
    store(AtoB=tiny())
    assert run(f"net{options}") == 2
    message = "testA_mask: every mask is empty, expected objects above grey 127"
    assert message.replace("testA_mask", str(folder).removeprefix("data/small/")) in capsys.readouterr().err
    blobs(folder, ["0"])  # one that has an object is enough
    assert run(f"net{options}") == 0 and protocol()["masks"] == 2


@pytest.mark.parametrize("kind", ["mask", "truth"])
def test_pictures_of_one_name_cannot_have_masks_or_truths(small_set, capsys, kind):
    save(noise(5), SMALL / "testA/deep/0.png")
    shutil.copytree(SMALL / "testB", SMALL / f"testA_{kind}")
    store(AtoB=tiny())
    assert run("net") == 2
    message = f"data/small/testA_{kind}: 2 test pictures are named 0, expected names of their own"
    assert message in capsys.readouterr().err


def encode(mask) -> dict:
    """COCO's uncompressed run lengths of a mask, (H, W) of bool: down the columns, background first."""
    counts, value = [0], False
    for column in mask.T.tolist():
        for pixel in column:
            if pixel != value:
                counts.append(0)
                value = pixel
            counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def test_run_lengths_come_back_as_the_masks_that_they_were():
    rng = np.random.default_rng(0)
    masks = {"a": rng.random((5, 8)) > 0.5, "b": np.ones((4, 3), bool), "c": np.zeros((3, 4), bool)}
    masks["d"] = np.arange(12).reshape(3, 4) % 4 < 2
    Path("masks.json").write_text(json.dumps({"testA": {name: encode(mask) for name, mask in masks.items()}}))
    found = load_masks(Path("masks.json"), "testA")
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        assert found[name].mode == "L" and np.array_equal(np.asarray(found[name]), 255 * mask.astype(np.uint8))
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
        save(noise(i, (256, 256)), root / f"testA/{name}.jpg")
    save(noise(9, (256, 256)), root / "testB/0.jpg")
    store(AtoB=generator)
    assert run("net", dataset="horse2zebra") == 0
    assert "object masks for 2" in capsys.readouterr().out
    masks = [shipped[name].resize((32, 32), Image.Resampling.BICUBIC) for name in names]
    _, foreground = by_hand(generator, torch.stack([read(root / f"testA/{name}.jpg") for name in names]))
    tensors = [torch.from_numpy(np.array(mask))[None] for mask in masks]
    assert figures()["IoU"] == pytest.approx(mean_of(iou, foreground, tensors)) and 0 < figures()["IoU"] < 1


# ----------------------------------------------------------------------------------------------------------
#  Figures of sets
# ----------------------------------------------------------------------------------------------------------


def test_sets_are_compared_by_their_features():
    make_set(SMALL, nA=5, nB=5, tests=12)
    generator = tiny()
    store(AtoB=generator)
    assert run("net", extractor="tiny") == 0
    inputs, targets = side("testA"), side("testB")
    parts = [by_hand(generator, part)[0] for part in inputs.split(8)]
    x, y, source = map(features, (torch.cat(parts), targets, inputs))
    f = figures()
    assert f["FID-tiny"] == pytest.approx(metrics.frechet_distance(x, y), rel=1e-4)
    assert f["KID-tiny"] == pytest.approx(metrics.kernel_distance(x, y), rel=1e-5)
    assert [f["KID-tiny low"], f["KID-tiny high"]] == pytest.approx(metrics.kernel_distance_interval(x, y), rel=1e-4)
    blocks = f["KID-tiny blocks of 10"], f["KID-tiny blocks of 10, error of blocks"]
    assert blocks == pytest.approx(metrics.kernel_distance_in_blocks(x, y), rel=1e-4)
    assert f["KID-tiny U-GAT-IT"] == pytest.approx(metrics.ugatit_kernel_distance(x, y, source), rel=1e-4)
    assert row()["untranslated"]["KID-tiny"] == pytest.approx(metrics.kernel_distance(source, y), rel=1e-5)
    assert "FID" not in f and "KID" not in f  # those are Inception's


def floor_by_hand(n_draws, index, n):
    """KID and FID of each draw of n training pictures of B."""
    train, target = side("trainB"), features(side("testB"))
    rng = np.random.default_rng((7, index))
    draws = [features(train[rng.permutation(len(train))[:n]]) for _ in range(n_draws)]
    return [(metrics.kernel_distance(d, target), metrics.frechet_distance(d, target)) for d in draws]


def test_the_floor_is_the_mean_and_deviation_over_draws_of_real_pictures(capsys):
    make_set(SMALL, nA=4, nB=9, tests=5)
    store(AtoB=fading(0.5))
    copies = {"testB/0.png": "00.png", "testB/3.png": "33.png", "testA/1.png": "44.png"}
    for source, name in copies.items():  # which it leaves out
        shutil.copy(SMALL / source, SMALL / "trainB" / name)
    assert run("net --floor_draws 3", extractor="tiny") == 0
    found = row()
    for name in copies.values():
        (SMALL / "trainB" / name).unlink()
    kids, fids = zip(*floor_by_hand(3, 0, n=5), strict=True)
    assert found["floor"]["KID-tiny"] == pytest.approx(np.mean(kids), rel=1e-4)
    by_kid, by_fid = statistics.stdev(kids), statistics.stdev(fids)
    assert found["floor_deviation"]["KID-tiny"] == pytest.approx(by_kid, rel=1e-3) and by_kid > 0
    assert found["floor"]["FID-tiny"] == pytest.approx(np.mean(fids), rel=1e-3)
    assert found["floor_deviation"]["FID-tiny"] == pytest.approx(by_fid, rel=1e-3)
    assert found["floor"].keys() == found["floor_deviation"].keys() == {"FID-tiny", "KID-tiny", "KID-tiny blocks of 10"}
    cells = table(capsys.readouterr().out)["AtoB", "real training pictures"]
    assert cells["FID-tiny"] == f"{np.mean(fids):.1f} ± {by_fid:.1f}"
    assert cells["100 KID-tiny"] == f"{100 * np.mean(kids):.2f} ± {100 * by_kid:.2f}"
    assert cells["95 % interval"] == cells["as U-GAT-IT"] == "-"
    shutil.rmtree("images")
    assert run("net --floor_draws 3", extractor="tiny") == 0
    assert row()["floor"] == found["floor"] and row()["floor_deviation"] == found["floor_deviation"]
    capsys.readouterr()
    assert run("net --floor_draws 1", extractor="tiny") == 0  # one draw has no deviation
    assert row()["floor"]["KID-tiny"] == pytest.approx(kids[0], rel=1e-4) and row()["floor_deviation"] == {}
    assert table(capsys.readouterr().out)["AtoB", "real training pictures"]["FID-tiny"] == f"{fids[0]:.1f}"


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
    assert run("net", extractor="tiny") == 0
    kids, _ = zip(*floor_by_hand(1, 0, n=3), strict=True)
    assert row()["floor"]["KID-tiny"] == pytest.approx(kids[0], rel=1e-4)
    assert row()["floor_deviation"] == {}  # all draws take all
    assert "±" not in table(capsys.readouterr().out)["AtoB", "real training pictures"]["FID-tiny"]
    capsys.readouterr()
    assert run("net --floor_draws 0", extractor="tiny") == 0
    assert row()["floor"] == row()["floor_deviation"] == {}
    assert [label for _, label in table(capsys.readouterr().out)] == ["untranslated", "net"]
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
    assert run("net", extractor="tiny") == 0
    assert figures()["KID-tiny blocks of 10"] is None and figures()["KID-tiny U-GAT-IT"] is None
    assert figures()["KID-tiny"] > 0 and row()["floor"]["FID-tiny"] > 0
    cells = table(capsys.readouterr().out)
    assert cells["AtoB", "net"]["blocks of 10"] == cells["AtoB", "real training pictures"]["blocks of 10"] == "-"


def test_a_classifier_counts_the_pictures_of_the_targets_class(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "Extractor", Classifier)
    root = Path("data/horse2zebra")
    for name, bright in {"trainA": "0010", "trainB": "110", "testA": "0100", "testB": "11110"}.items():
        for i, b in enumerate(bright):
            image = noise(i + 10 * len(name) + ord(name[-1])).point(lambda v, b=b: v // 4 + 180 * (b == "1"))
            save(image, root / name / f"{i}.png")
    store(AtoB=fading(1), BtoA=fading(0.1, towards=-1.0))
    Path("w.pth").write_bytes(b"weights")
    assert run("net --inception w.pth", dataset="horse2zebra", extractor="any") == 0
    there, back = row("AtoB"), row("BtoA")
    assert there["protocol"]["inception_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert there["figures"]["zebra rate"] == there["untranslated"]["zebra rate"] == 0.25
    assert there["floor"]["zebra rate"] == pytest.approx(2 / 3) and there["floor_deviation"] == {}
    assert back["figures"]["sorrel rate"] == 1 and back["untranslated"]["sorrel rate"] == pytest.approx(0.2)
    assert there["protocol"]["sheet_ordered_by"] == "probability of 'zebra'"
    assert "sorrel rate" not in there["figures"]
    cells = table(capsys.readouterr().out)
    assert cells["AtoB", "net"]["zebra rate"] == "0.250" and cells["BtoA", "net"]["sorrel rate"] == "1.000"
    assert "FID-bright" in there["figures"]

    shutil.copytree(root, SMALL)
    shutil.rmtree("images")
    assert run("net", extractor="any") == 0  # no known classes
    assert not any(key.endswith("rate") for key in figures())
    assert run("net --class_B sorrel", extractor="any") == 0
    assert figures()["sorrel rate"] == 0.75 and "sorrel rate" not in figures("BtoA")
    assert run("net --class_A horse", extractor="any") == 2
    assert "horse: no class of brightness, expected a name like zebra" in capsys.readouterr().err


def test_cycle_errors_are_of_the_pictures_in_8_bits_and_back():
    make_set(SMALL, tests=3)
    generators = {"AtoB": tiny(0), "BtoA": tiny(1)}
    store(**generators)
    assert run("net") == 0
    for first, second in (("AtoB", "BtoA"), ("BtoA", "AtoB")):
        inputs = side(f"test{first[0]}")
        there, _ = by_hand(generators[first], inputs)
        back, _ = by_hand(generators[second], there)
        assert figures(first)["cycle error"] == pytest.approx(distance(back, inputs), rel=1e-5)
    assert abs(figures("AtoB")["cycle error"] - figures("BtoA")["cycle error"]) > 1e-3
    assert run("net --direction BtoA") == 0  # the way back is there too
    assert figures("BtoA")["cycle error"] == pytest.approx(distance(back, inputs), rel=1e-5)


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


@pytest.mark.parametrize(
    "where, name",
    [
        ("net/BtoA.pt", "net_BtoA"),
        ("back", "back"),
        ("run/BtoA.pt", "run_BtoA"),
        ("saved_models/run/BtoA.pt", "run_BtoA"),
    ],
)
def test_a_single_file_or_direction_has_one_row_and_no_way_back(small_set, capsys, where, name):
    for folder in ("net", "saved_models/run"):
        store(folder, AtoB=tiny(0), BtoA=tiny(1))
    store("saved_models/run/best", AtoB=tiny(2), BtoA=tiny(3))
    store("back", BtoA=tiny(1))
    shutil.copytree(SMALL / "testA", SMALL / "testB_truth")
    assert run(where) == 0
    assert [(r["direction"], r["weights"]) for r in report(name)["rows"]] == [("BtoA", "last")]
    found, inputs = figures("BtoA", name), side("testB")
    assert "L1" in found and "cycle error" not in found
    assert found["change"] == pytest.approx(distance(by_hand(tiny(1), inputs)[0], inputs), rel=1e-5)
    assert table(capsys.readouterr().out).keys() == {("BtoA", "untranslated"), ("BtoA", name)}


@pytest.mark.parametrize("direction, system", [("AtoB", "cyclegan"), ("BtoA", "cyclegan"), ("AtoB", "pix2pix")])
def test_test_pictures_of_one_side_measure_one_direction(small_set, capsys, direction, system):
    there, lacking = f"test{direction[0]}", f"test{direction[-1]}"
    blobs(SMALL / f"{there}_mask", "01")
    shutil.rmtree(SMALL / lacking)
    generators = {"AtoB": tiny(0), "BtoA": tiny(1)}
    store(more={"system": system}, **generators)
    assert run("net", extractor="tiny") == 0
    said = f"data/small/{lacking}: no test pictures there, so only {direction} is measured, without FID, KID and"
    assert said in capsys.readouterr().out
    assert [r["direction"] for r in report()["rows"]] == [direction] and protocol(direction)["target"] == 0
    inputs, f = side(there), figures(direction)
    assert f.keys() >= {"IoU", "cycle error"} and not {"KID-tiny", "L1"} & f.keys()
    assert f["change"] == pytest.approx(distance(by_hand(generators[direction], inputs)[0], inputs), rel=1e-5)
    other = f"{direction[-1]}to{direction[0]}"
    assert run(f"net/{other}.pt") == 2
    assert f"error: data/small/{lacking}: no test pictures there\n" in capsys.readouterr().err


def test_pictures_are_read_at_the_size_that_was_asked_for(small_set, capsys):
    store(size=(16, 32), AtoB=tiny(0))
    assert run("net --size 64") == 0
    assert protocol()["size"] == [32, 64]
    inputs = side("testA", size=(32, 64))
    assert figures()["change"] == pytest.approx(distance(by_hand(tiny(0), inputs)[0], inputs), rel=1e-5)
    assert run("net --size 66") == 2
    assert "--size 66: 33 x 66 pixels, expected multiples of 4, at least 8" in capsys.readouterr().err
    store("full", AtoB=tiny(0, UGATITGenerator, size=(32, 32)))
    assert run("full --size 64") == 2
    assert "--size 64: the full U-GAT-IT takes only pictures of its training size, 32 x 32" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
#  Rows
# ----------------------------------------------------------------------------------------------------------


def test_the_table_is_what_is_written(capsys):
    make_set(SMALL, nA=13, nB=13, tests=12)
    blobs(SMALL / "testA_mask", map(str, range(12)))
    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    store("saved_models/one", AtoB=tiny(0), BtoA=tiny(1))
    store("two", AtoB=tiny(2, ResNetGenerator))
    assert run("one two", extractor="tiny") == 0
    out = capsys.readouterr().out
    cells = table(out)
    labels = ["real training pictures", "untranslated", "one", "two"]
    expected = [("AtoB", label) for label in labels] + [("BtoA", label) for label in labels[:3]]
    assert list(cells) == expected
    assert out.count(" one ") == 2 + 1 + 2  # realism both ways, masks of A, truth of A and change of both

    def shown(value, digits, beside=None):
        return "-" if value is None else f"{value:.{digits}f}" + ("" if beside is None else f" ± {beside:.{digits}f}")

    for (direction, label), row_of in cells.items():
        if label in ("one", "two"):
            f = figures(direction, label)
        elif label == "untranslated":
            f = row(direction, "one")["untranslated"]
        else:
            continue
        kid = "KID-tiny"
        hundred = {key: 100 * value for key, value in f.items() if key.startswith(kid)}
        assert row_of["FID-tiny"] == shown(f["FID-tiny"], 1) and row_of[f"100 {kid}"] == shown(hundred[kid], 2)
        assert row_of["95 % interval"] == f"{hundred[f'{kid} low']:.2f} to {hundred[f'{kid} high']:.2f}"
        blocks = hundred[f"{kid} blocks of 10"], 2, hundred[f"{kid} blocks of 10, error of blocks"]
        assert row_of["blocks of 10"] == shown(*blocks)
        assert row_of["as U-GAT-IT"] == shown(hundred[f"{kid} U-GAT-IT"], 2)
        for key in ("IoU", "AP", "background attention", "change IoU", "change AP", "background error"):
            assert row_of.get(key, "-") == shown(f.get(key), 3)
        for key, digits in {"L1": 3, "PSNR": 2, "SSIM": 3, "cycle error": 3, "change": 3}.items():
            assert row_of.get(key, "-") == shown(f.get(key), digits)
    assert cells["AtoB", "one"]["IoU"] != "-" and cells["AtoB", "two"]["IoU"] == "-"
    assert report("one")["rows"][0]["floor"] == report("two")["rows"][0]["floor"]
    assert [r["direction"] for r in report("one")["rows"]] == ["AtoB", "BtoA"]
    assert all(len(line) < 160 for line in out.splitlines())


def test_the_report_names_its_protocol(small_set, capsys):
    store(AtoB=fading(0.5))
    assert run("net --floor_draws 2", extractor="tiny") == 0
    assert report().keys() == {"rows"}
    found = row()
    about = found.pop("protocol")
    measured = {"figures", "untranslated", "floor", "floor_deviation"}
    assert {key: value for key, value in found.items() if key not in measured} == {
        "dataset": "small",
        "extractor": "tiny",
        "direction": "AtoB",
        "weights": "last",
        "step": 7,
    }
    assert measured <= found.keys()
    found_versions, day = about.pop("versions"), about.pop("date")
    assert found_versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"torchvision", "pillow", "torch-fidelity", "torchmetrics"} <= found_versions.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
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
    out = capsys.readouterr().out
    assert "features: tiny\n" in out
    assert out.endswith("written: evaluation.json, sheets and translations in images/net\n")


def test_a_report_keeps_the_rows_of_other_evaluations(small_set):
    def kinds():
        return [(r["dataset"], r["extractor"], r["direction"], r["protocol"]["floor_draws"]) for r in report()["rows"]]

    store(AtoB=tiny(0), BtoA=tiny(1))
    assert run("net --direction AtoB --floor_draws 1") == 0
    first = row()
    assert run("net --direction BtoA --floor_draws 2") == 0
    assert kinds() == [("small", "none", "AtoB", 1), ("small", "none", "BtoA", 2)] and row() == first
    assert run("net --direction AtoB --floor_draws 3", extractor="tiny") == 0
    shutil.copytree(SMALL, "data/other")
    assert run("net --direction AtoB --floor_draws 4", dataset="other") == 0
    assert kinds()[2:] == [("small", "tiny", "AtoB", 3), ("other", "none", "AtoB", 4)]
    before = row(dataset="other")
    assert row(dataset="small", extractor="none") == first
    assert "KID-tiny" in row(extractor="tiny")["figures"] and "KID-tiny" not in first["figures"]

    store("new", AtoB=tiny(2), BtoA=tiny(3))
    shutil.copytree("new", "net", dirs_exist_ok=True)
    assert run("net --floor_draws 5") == 0
    assert kinds() == [
        ("small", "tiny", "AtoB", 3),
        ("other", "none", "AtoB", 4),
        ("small", "none", "AtoB", 5),
        ("small", "none", "BtoA", 5),
    ]
    assert row(dataset="small", extractor="none")["figures"]["change"] != first["figures"]["change"]
    assert row(dataset="other") == before


def test_the_best_by_validation_has_a_row_of_its_own(small_set, capsys):
    generators = {"last": tiny(0), "best": tiny(1)}
    store("saved_models/run", AtoB=generators["last"])
    store("saved_models/run/best", AtoB=generators["best"])
    store("run/best", AtoB=tiny(2))  # a plain folder of the run's name; no generators lie in it
    for _ in range(2):
        assert run("run") == 0
        assert [r["weights"] for r in report("run")["rows"]] == ["last", "best by validation"]
        assert list(table(capsys.readouterr().out)) == [("AtoB", "run"), ("AtoB", "run, best by validation")]
    inputs = side("testA")
    for key, weights, folder in (("last", "last", "AtoB"), ("best", "best by validation", "AtoB_best")):
        expected, _ = by_hand(generators[key], inputs)
        assert torch.equal(side(f"translated_{folder}", Path("images/run")), expected)
        assert figures(name="run", weights=weights)["change"] == pytest.approx(distance(expected, inputs), rel=1e-5)
        assert Path(f"images/run/evaluation_{folder}.png").exists()
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


def test_reports_are_there_before_the_table(small_set, monkeypatch):
    def broken(*_):
        raise UnicodeEncodeError("ascii", "±", 0, 1, "ordinal not in range(128)")

    store("one", AtoB=tiny(0))
    store("two", AtoB=tiny(1))
    monkeypatch.setattr(evaluate, "print_table", broken)
    with pytest.raises(UnicodeEncodeError):
        run("one two")
    assert all(figures(name=name)["change"] > 0 for name in ("one", "two"))


def test_the_median_and_the_worst_stand_below_the_checkpoints(capsys):
    make_set(SMALL, tests=4)
    blobs(SMALL / "testA_mask", "0123")
    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    names = [f"run_{seed}" for seed in range(3)]
    for seed, name in enumerate(names):
        store(name, AtoB=tiny(seed), BtoA=tiny(10 + seed))
    assert run(f"{' '.join(names)} --spread", extractor="tiny") == 0
    cells = table(capsys.readouterr().out)
    assert [label for d, label in cells if d == "AtoB"][2:] == [*names, "median", "worst"]
    lower = {"FID-tiny": 1, "100 KID-tiny": 1, "L1": 1, "background attention": 1, "background error": 1}
    lower["cycle error"] = 1
    higher = ("IoU", "AP", "change IoU", "change AP", "PSNR", "SSIM")
    for key in (*lower, *higher):
        values = [float(cells["AtoB", name][key]) for name in names]
        assert len(set(values)) > 1
        assert float(cells["AtoB", "median"][key]) == statistics.median(values), key
        assert float(cells["AtoB", "worst"][key]) == (max if key in lower else min)(values), key
    both = [float(cells["BtoA", name]["cycle error"]) for name in names]
    assert float(cells["BtoA", "worst"]["cycle error"]) == max(both)
    for label in ("median", "worst"):
        for key in ("95 % interval", "as U-GAT-IT", "change"):
            assert cells["AtoB", label].get(key, "-") == "-" != cells["AtoB", names[0]][key]


def test_the_spread_leaves_out_what_is_no_better_or_worse():
    keys = ("KID", "KID low", "KID high", "KID blocks of 10", "KID blocks of 10, error of blocks")
    figures_of = [dict(zip(keys, v, strict=True)) for v in ((0.1, 0.0, 0.2, 0.3, 0.1), (0.4, 0.1, 0.5, 0.5, 0.2))]
    for found in figures_of:
        found |= {"KID U-GAT-IT": 2.0, "change": 0.3, "change IoU": found["KID"], "zebra rate": found["KID"]}
    rows = [evaluate.Row("x", "AtoB", found, {}) for found in figures_of]
    median, worst = evaluate.spread_rows(rows)
    assert median.figures == pytest.approx(dict(zip(worst.figures, (0.25, 0.4, 0.25, 0.25), strict=True)))
    assert worst.figures == {"KID": 0.4, "KID blocks of 10": 0.5, "change IoU": 0.1, "zebra rate": 0.1}


def test_the_spread_is_of_what_all_checkpoints_have(capsys):
    make_set(SMALL, tests=3)
    blobs(SMALL / "testA_mask", "012")
    store("one", AtoB=tiny(0), BtoA=tiny(1))
    store("two", AtoB=tiny(2, ResNetGenerator))
    for order in ("one two", "two one"):
        assert run(f"{order} --spread") == 0
        cells = table(capsys.readouterr().out)
        errors = [float(cells["AtoB", name]["background error"]) for name in ("one", "two")]
        assert float(cells["AtoB", "worst"]["background error"]) == max(errors)
        assert cells["AtoB", "worst"]["IoU"] == cells["AtoB", "median"]["IoU"] == "-"


@pytest.fixture
def kept():
    """A run with three kept generators; nearer to the input (more kept) is nearer to the target, further from truth."""
    make_set(SMALL, tests=4)
    for side_ in "AB":  # distances grow as pictures fade, both ways
        shutil.rmtree(SMALL / f"test{side_}")
        for i in range(4):
            save(noise(i), SMALL / f"test{side_}/{i}.png")
            save(Image.new("RGB", (40, 36), (128, 128, 128)), SMALL / f"test{side_}_truth/{i}.png")
    store("saved_models/run", AtoB=fading(0.7), BtoA=fading(0.7))
    shares = {"000100": (0.95, 0.3), "000200": (0.8, 0.9), "000300": (0.4, 0.35)}
    for step, (there, back) in shares.items():
        store(f"saved_models/run/kept/{step}", AtoB=fading(there), BtoA=fading(back))
    return shares


@pytest.mark.parametrize(
    "extra, extractor, chosen",
    [
        ("", "none", "000300"),  # L1 0.4 + 0.35
        ("--direction BtoA", "none", "000100"),  # L1 0.3
        ("", "tiny", "000200"),  # KID comes first
        ("--direction AtoB", "tiny", "000100"),
    ],
)
def test_the_oracle_is_the_kept_generator_that_is_best_in_sum(kept, capsys, extra, extractor, chosen):
    assert run(f"run --oracle {extra}", extractor=extractor) == 0
    out = capsys.readouterr().out
    for i, direction in enumerate(("AtoB", "BtoA")):
        if direction in extra or not extra:
            expected, _ = by_hand(fading(kept[chosen][i]), side(f"test{direction[0]}"))
            found = side(f"translated_{direction}_oracle", Path("images/run"))
            assert torch.equal(found, expected)
            assert figures(direction, "run", "best by test (oracle)")["L1"] == pytest.approx(
                distance(expected, side(f"test{direction[0]}_truth")), rel=1e-5
            )
            assert (direction, "run, best by test (oracle)") in table(out)
            assert figures(direction, "run", "last")["L1"] > 0  # the last stands beside it
        else:
            assert not Path(f"images/run/translated_{direction}_oracle").exists()


@pytest.mark.parametrize("extractor, keep, chosen", [("none", 0.1, "000300"), ("tiny", 0.99, "000200")])
def test_the_oracle_has_all_wanted_directions(kept, extractor, keep, chosen):
    store("saved_models/run/kept/000400", AtoB=fading(keep))  # better than all others, one way
    Path("saved_models/run/kept/000500").mkdir()

    def translations(direction):
        return side(f"translated_{direction}_oracle", Path("images/run"))

    assert run("run --oracle", extractor=extractor) == 0
    for direction, share in zip(("AtoB", "BtoA"), kept[chosen], strict=True):
        assert torch.equal(translations(direction), by_hand(fading(share), side(f"test{direction[0]}"))[0])
    assert run("run --oracle --direction AtoB", extractor=extractor) == 0
    assert torch.equal(translations("AtoB"), by_hand(fading(keep), side("testA"))[0])


def test_an_oracle_needs_something_to_choose_from_and_by(kept, capsys):
    nothing = "--oracle: nothing in saved_models/run/kept; train.py --keep_evaluated keeps"
    for folder in Path("saved_models/run/kept").iterdir():
        (folder / "BtoA.pt").unlink()
    assert run("run --oracle", extractor="tiny") == 2
    assert nothing in capsys.readouterr().err
    assert run("run --oracle --direction AtoB", extractor="tiny") == 0
    for side_ in "AB":
        shutil.rmtree(SMALL / f"test{side_}_truth")
    assert run("run --oracle --direction AtoB") == 2
    assert "--oracle chooses by KID or L1: needs an --extractor or true translations" in capsys.readouterr().err
    shutil.rmtree("saved_models/run/kept")
    assert run("run --oracle", extractor="tiny") == 2
    assert nothing in capsys.readouterr().err


def test_checkpoints_of_other_sizes_have_rows_of_their_own(small_set, capsys):
    """Names with a dot stay apart, too."""
    store("saved_models/weight_0.1", AtoB=fading(1))
    store("saved_models/weight_0.5", AtoB=fading(1), size=(16, 24))
    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    assert run("weight_0.1 weight_0.5") == 0
    cells = table(capsys.readouterr().out)
    assert [label for _, label in cells] == [
        *("untranslated at 32 x 32", "weight_0.1 at 32 x 32"),
        *("untranslated at 16 x 24", "weight_0.5 at 16 x 24"),
    ]
    assert cells["AtoB", "weight_0.5 at 16 x 24"]["L1"] == cells["AtoB", "untranslated at 16 x 24"]["L1"]
    assert protocol(name="weight_0.1")["size"] == [32, 32] and protocol(name="weight_0.5")["size"] == [16, 24]
    expected = distance(side("testA", size=(16, 24)), side("testA_truth", size=(16, 24)))
    assert figures(name="weight_0.5")["L1"] == pytest.approx(expected, rel=1e-5)


class MeanColours:
    suffix, categories = "-pixels", ()

    def __call__(self, images):
        return Features(images.float().mean(dim=(2, 3)), None)


def test_features_are_of_the_pictures_as_they_are_read(small_set):
    save(noise(9, size=(40, 20)), SMALL / "testB" / "long.png")
    exam = Exam(SMALL, MeanColours())
    found = []
    for how in ("squash", "short_side"):
        reference = exam.reference("AtoB", Reading((12, 12), 3, how))
        found.append(reference.real.targets.vectors)
        targets, _ = exam.side("B", Reading((12, 12), 3, how))
        assert torch.equal(found[-1], targets.float().mean(dim=(2, 3)))
    assert not torch.equal(*found)


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

    paths = sorted((SMALL / "testA").iterdir())
    outputs = torch.stack([read(f"images/net/translated_AtoB/{p.stem}.png") for p in paths])
    inputs, truths = (torch.stack([read(SMALL / name / p.name) for p in paths]) for name in ("testA", "testA_truth"))
    order = (outputs - truths).abs().mean(dim=(1, 2, 3)).argsort()
    chosen = order[[0, 1, 2, 4, 5, 6, 8, 9, 10]]
    for name, images in (("input", inputs), ("output", outputs), ("truth", truths)):
        assert torch.allclose((columns[name] + 1) * 127.5, images[chosen], atol=0.01), name
    parts = [by_hand(tiny(0), images)[1] for images in inputs.split(8)]
    assert torch.allclose(columns["attention"], 2 * torch.cat(parts)[chosen] - 1, atol=1e-5)
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

    store("both", AtoB=tiny(), BtoA=tiny(1))
    found, reference = judged("both")
    errors = (found.recovered.float() - reference.inputs.float()).abs().mean(dim=(1, 2, 3)) / 127.5
    assert found.rule == "cycle error" and torch.allclose(found.scores, -errors, atol=1e-6)

    blobs("masks/testA", ["0", "2", "3"])
    found, reference = judged(mask_dir=Path("masks"))
    assert found.rule == "IoU of attention and object" and found.scores[1] == -math.inf
    assert reference.masked.tolist() == [True, False, True, True]
    expected = [iou(found.foreground[i], 255 * reference.masks[i]) for i in (0, 2, 3)]
    assert found.scores[[0, 2, 3]].tolist() == pytest.approx(expected)

    extractor = Extractor("tiny", None, CPU)
    found, reference = judged(mask_dir=Path("masks"), extractor=extractor)
    assert found.rule.startswith("likeness to the target's test pictures")
    sets = (features(images) for images in (found.images, side("testB"), reference.inputs))
    assert torch.allclose(found.scores, metrics.resemblance(*sets), rtol=1e-4)

    found, _ = judged(extractor=Classifier(), classes={"B": "zebra"})
    odds = found.images.float().mean(dim=(1, 2, 3)) / 127.5 - 1
    assert found.rule == "probability of 'zebra'"
    assert torch.allclose(found.scores, torch.sigmoid(2 * odds).log(), atol=1e-5)

    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    found, reference = judged(extractor=Classifier(), classes={"B": "zebra"}, mask_dir=Path("masks"))
    errors = (found.images.float() - reference.truths.float()).abs().mean(dim=(1, 2, 3)) / 127.5
    assert found.rule == "mean absolute error to the true translation"
    assert torch.allclose(found.scores, -errors, atol=1e-6)


def test_no_sheet_is_ordered_by_a_figure_that_is_neither_good_nor_bad():
    assert all(metrics.figure(name).better in ("low", "high") for name in evaluate.RULES)
    assert not any(metrics.figure(name).better for name in ("change", "KID low", "KID high", "KID U-GAT-IT", "pairs"))


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
    assert run("net", extractor="tiny") == 2
    assert "--extractor tiny needs torch_fidelity.utils" in capsys.readouterr().err


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
        ("nowhere", "nowhere: no generator for AtoB found"),
        ("net nowhere", "nowhere: no generator for AtoB found"),
        ("net/AtoB.pt --direction BtoA", "net/AtoB.pt: translates AtoB, expected BtoA (a folder serves both)"),
        ("half --direction AtoB BtoA", "half: translates AtoB, expected BtoA (a folder serves both)"),
        ("net --mask_dir nowhere", "--mask_dir nowhere: no folder testA or testB in it"),
        ("half --mask_dir nowhere", "--mask_dir nowhere: no folder testA in it"),
        ("net --mask_dir masks --direction BtoA", "--mask_dir masks: no folder testB in it"),
        ("net --mask_dir masks", "masks/testA: no mask there is named as a test picture, as 0"),
        ("net --floor_draws -1", "--floor_draws: expected at least 0, found -1"),
        ("net --extractor huge", f"--extractor huge: unknown, expected {EFFICIENTNET}, "),
        (
            "net --inception notes.txt --extractor inception-v3-compat",
            "--inception notes.txt: not a readable weights file",
        ),
        ("net --oracle", "--oracle: nothing in net/kept"),
        ("net/BtoA.pt half/AtoB.pt --spread", "--spread: no two checkpoints have direction, size and resize in common"),
        ("net --data_dir elsewhere", "elsewhere/small: no such folder. Expected pictures in elsewhere/small/trainA"),
        ("notes.txt", "notes.txt: not a readable weights file"),
        # What would be ignored or lost.
        ("x/net x_net", "x/net and x_net would both be written to images/x_net"),
        ("net --inception w.pth", "--inception is for torch-fidelity's extractors, found --extractor none"),
        (f"net --inception w.pth --extractor {EFFICIENTNET}", f"found --extractor {EFFICIENTNET}"),
        ("net --class_B zebra --extractor tiny", "--class_A and --class_B need a classifier"),
        ("net --spread", "--spread: expected several checkpoints, found one"),
        ("net net --spread", "--checkpoint net and net would both be written to images/net"),
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
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("evaluate.py: error: ") and message in err
    assert below(Path()) == before


@pytest.mark.parametrize(
    "missing, extractor, message",
    [
        ("testA", "none", "data/small/testA: no test pictures there"),
        ("testA_truth/1.png", "none", "data/small/testA_truth: no picture named 1, expected one for each test picture"),
        ("testA/1.png", "tiny", "KID of 1 and 2 pictures: expected at least 2 each"),
    ],
)
def test_what_is_missing_in_the_data_set_is_named(small_set, capsys, missing, extractor, message):
    store(AtoB=tiny())
    shutil.copytree(SMALL / "testB", SMALL / "testA_truth")
    assert run("net") == 0
    path = SMALL / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    assert run("net", extractor=extractor) == 2
    assert message in capsys.readouterr().err
    assert extractor == "none" or run("net") == 0  # other figures need no second picture


def test_a_run_by_its_path_has_its_best_row_and_spread_is_of_the_last_ones(small_set, capsys):
    for seed in (0, 1):
        store(f"saved_models/run_{seed}", AtoB=tiny(seed), BtoA=tiny(seed))
        store(f"saved_models/run_{seed}/best", AtoB=tiny(seed + 2), BtoA=tiny(seed + 2))
    assert run("saved_models/run_0 run_1 --spread --direction AtoB") == 0
    out = capsys.readouterr().out
    assert "run_0, best by validation" in out and "run_1, best by validation" in out
    errors = [figures(name=f"run_{seed}")["cycle error"] for seed in (0, 1)]
    assert f"median {sum(errors) / 2:.3f}".split() == re.search(r"median +[\d.]+", out)[0].split()
    assert f"worst {max(errors):.3f}".split() == re.search(r"worst +[\d.]+", out)[0].split()


@pytest.mark.parametrize(
    "where, name",
    [
        ("run", "run"),
        ("./run/", "run"),
        ("saved_models/run", "run"),
        ("saved_models/run/AtoB.pt", "run_AtoB"),
        ("saved_models/run/kept/000100", "run_kept_000100"),
        ("saved_models/pretrained/run", "pretrained_run"),
        ("weight_0.1", "weight_0.1"),
        ("../official/latest_net_G_A.pth", "official_latest_net_G_A"),
        ("/a/b/c/d", "b_c_d"),
        (".", ""),
        ("saved_models", ""),
    ],
)
def test_the_folder_of_a_checkpoint_is_named_after_it(where, name):
    assert evaluate.output_name(where) == name


def test_weights_of_this_repository_and_a_run_of_their_name_have_folders_of_their_own(small_set, capsys):
    for folder in ("saved_models/pretrained/shipped", "saved_models/shipped", "shipped"):
        Path(folder).mkdir(parents=True)
    Path("saved_models/pretrained/shipped/AtoB.pt").touch()
    assert evaluate.output_name("shipped") == "pretrained_shipped"
    Path("saved_models/shipped/AtoB.pt").touch()
    assert evaluate.output_name("saved_models/shipped") == "shipped"
    assert evaluate.output_name("pretrained/shipped") == "pretrained_shipped"
    assert run("shipped") == 2
    assert "expected saved_models/shipped or pretrained/shipped" in capsys.readouterr().err


def test_help_shows_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    assert stop.value.code == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    for default in ("horse2zebra", "data", "inception-v3-compat", "5", "auto", "all a checkpoint has"):
        assert f"(default: {default})" in shown
    assert "(default: False)" not in shown and "(default: None)" not in shown
