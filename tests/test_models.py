"""Networks against plain formulas of papers and official code; the replay buffer."""

from utils import InputError

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import plain_layer_instance_norm
from torch import nn

from models import (
    CAM,
    ILN,
    AdaLIN,
    AttentionGenerator,
    CAMDiscriminator,
    DCGANDiscriminator,
    DCGANGenerator,
    FlatSafeInstanceNorm2d,
    InstanceNorm2d,
    NoiseDropout,
    PatchDiscriminator,
    ReflectionConv2d,
    ReplayBuffer,
    ResNetGenerator,
    SingleMaskGenerator,
    UGATITGenerator,
    UNetGenerator,
    depths,
    evaluation_mode,
    heat_map,
    layer_instance_norm,
    translate_any_size,
)

RESIDUAL = (AttentionGenerator, SingleMaskGenerator, ResNetGenerator, UGATITGenerator)

# Published counts (with biases everywhere) less the biases that InstanceNorm cancels.
STEM_AND_BLOCKS = 64 + 128 + 256 + 9 * 2 * 256
HEAD = 128 + 64
PARAMETERS = {
    "AttentionGenerator": (AttentionGenerator, 11_822_949 - STEM_AND_BLOCKS - 2 * HEAD),
    "AttentionGAN-geo": (lambda: AttentionGenerator(background=False), 11_832_360 - STEM_AND_BLOCKS - 2 * HEAD),
    "SingleMaskGenerator": (SingleMaskGenerator, 11_378_179 + 64 * 49 + 1 - STEM_AND_BLOCKS - HEAD),  # a fourth output
    "ResNetGenerator": (ResNetGenerator, 11_378_179 - STEM_AND_BLOCKS - HEAD),
    "PatchDiscriminator": (PatchDiscriminator, 2_764_737 - (128 + 256 + 512)),
    # Nor do the official U-Net and its discriminator have such biases; BatchNorm has factors and biases there.
    "UNetGenerator, depth 8": (UNetGenerator, 54_413_955),
    "UNetGenerator, depth 7": (partial(UNetGenerator, depth=7), 41_828_995),
    "UNetGenerator, depth 5": (partial(UNetGenerator, depth=5), 16_659_075),
    "PatchDiscriminator, conditional": (partial(PatchDiscriminator, 6, affine=True), 2_768_705),
    # The official PyTorch code of U-GAT-IT has no such biases.
    "UGATITGenerator, full": (partial(UGATITGenerator, size=(256, 256)), 278_959_808),
    "UGATITGenerator, light": (UGATITGenerator, 10_589_888),
    "CAMDiscriminator, global": (partial(CAMDiscriminator, n_layers=7), 53_130_176),
    "CAMDiscriminator, local": (partial(CAMDiscriminator, n_layers=5), 3_290_560),
    # Those of pytorch/examples.
    "DCGANGenerator": (DCGANGenerator, 3_576_704),
    "DCGANDiscriminator": (DCGANDiscriminator, 2_765_568),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_official_ones_less_the_cancelled_biases(name):
    network, expected = PARAMETERS[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in network().parameters()) == expected


@pytest.mark.parametrize("size", DCGANGenerator.sizes)
@pytest.mark.parametrize("ngf", [16, 32, 64, 128])
def test_both_ways_of_dcgan_to_enlarge_have_about_as_many_parameters(size, ngf):
    with torch.device("meta"):
        transposed, nearest = (
            sum(p.numel() for p in DCGANGenerator(ngf=ngf, size=size, upsample=upsample).parameters())
            for upsample in ("transposed", "nearest")
        )
    assert abs(nearest / transposed - 1) < 0.02


@pytest.mark.parametrize("kernel", [1, 7])
@pytest.mark.parametrize("height, width", [(8, 8), (20, 32)])
def test_attention_generator_fuses_masks_that_sum_to_one(kernel, height, width):
    generator = AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=5, attention_kernel=kernel)
    x = torch.rand(2, 3, height, width) * 2 - 1
    for parameter in generator.parameters():  # far from the start, where all masks are alike
        nn.init.normal_(parameter, std=0.5)
    image, attention, content = generator(x)[:3]
    assert image.shape == x.shape
    assert attention.shape == (2, 5, height, width)
    assert content.shape == (2, 4, 3, height, width)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(2, height, width))
    assert attention.std() > 0.05
    assert content.abs().max() <= 1
    assert image.abs().max() <= 1 + 1e-6
    by_hand = x * attention[:, 4:5]
    for i in range(4):
        by_hand = by_hand + content[:, i] * attention[:, i : i + 1]
    torch.testing.assert_close(image, by_hand)
    torch.testing.assert_close(generator(x).foreground, attention[:, :4].sum(dim=1, keepdim=True))


def test_without_background_nothing_of_the_input_is_kept():
    generator = AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=3, background=False, upsample="nearest")
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.5)
    image, attention, content = generator(x)[:3]
    assert content.shape == (2, 3, 3, 8, 12) and attention.shape == (2, 3, 8, 12)
    by_hand = sum(content[:, i] * attention[:, i : i + 1] for i in range(3))
    torch.testing.assert_close(image, by_hand)
    assert generator(x).foreground is None


@pytest.mark.parametrize("channels", [1, 3])
def test_scheme_one_fuses_one_content_by_one_mask(channels):
    generator = SingleMaskGenerator(channels, ngf=4, n_residual_blocks=1)
    x = torch.rand(2, channels, 8, 12) * 2 - 1
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.5)
    raw = generator.decoder(generator.encoder(x))
    mask, painted = 1 / (1 + torch.exp(-raw[:, :1])), torch.tanh(raw[:, 1:])
    image, attention, content = generator(x)[:3]
    assert mask.std() > 0.05 and content.shape == (2, 1, channels, 8, 12)
    torch.testing.assert_close(content[:, 0], painted)
    torch.testing.assert_close(attention, torch.cat([mask, 1 - mask], dim=1))
    torch.testing.assert_close(generator(x).foreground, mask)
    torch.testing.assert_close(image, painted * mask + x * (1 - mask))


def period_two(images: torch.Tensor) -> float:
    """How much of (B, C, H, W) differs between pixels of even and of odd rows and columns, inside the border."""
    inner = images[..., 4:-4, 4:-4]
    means = torch.stack([inner[..., i::2, j::2].mean(dim=(2, 3)) for i in (0, 1) for j in (0, 1)])
    return (means.std(dim=0) / inner.std()).max().item()


@pytest.mark.parametrize("generator", [AttentionGenerator, SingleMaskGenerator, ResNetGenerator])
def test_nearest_upsampling_knows_no_grid(generator):
    """Transposed convolutions give every second row and column filters of their own, and so a pattern."""
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(8, 3, 8, 8), size=(64, 64), mode="bicubic").clamp(0, 1) * 2 - 1

    def pattern(upsample):
        network = generator(ngf=8, n_residual_blocks=1, upsample=upsample)
        decoder = network.attention_head if generator is AttentionGenerator else network.decoder
        with torch.no_grad():
            return period_two(decoder(network.encoder(x)))

    assert pattern("nearest") < 0.1 < 0.3 < pattern("transposed")


def test_other_channels_and_widths():
    generator = AttentionGenerator(channels=1, ngf=4, n_residual_blocks=0, n_masks=2)
    image, attention, content = generator(torch.zeros(1, 1, 12, 12))[:3]
    assert (image.shape, attention.shape, content.shape) == ((1, 1, 12, 12), (1, 2, 12, 12), (1, 1, 1, 12, 12))
    assert ResNetGenerator(ngf=4, n_residual_blocks=1)(torch.zeros(1, 3, 16, 8)).image.shape == (1, 3, 16, 8)
    assert ResNetGenerator(ngf=4, n_residual_blocks=1)(torch.zeros(1, 3, 8, 8)).foreground is None


def plain_batch_norm(x, norm, training):
    """By its formula: over batch and places, or by the running statistics."""
    running = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    over = dict(dim=(0, 2, 3), keepdim=True)
    mean, var = (x.mean(**over), x.var(**over, correction=0)) if training else running
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def random_weights(network):
    """Far from the start, and running statistics of some data."""
    torch.manual_seed(1)
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.3) if not key.endswith("var") else nn.init.uniform_(tensor, 0.5, 2)
    return network.double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_dcgans_generator_is_the_plain_formula(upsample, training):
    generator = random_weights(DCGANGenerator(nz=5, ngf=4, channels=1, size=32, upsample=upsample)).train(training)
    noise = torch.rand(3, 5, dtype=torch.float64) * 2 - 1
    convolutions = [m for m in generator.layers if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    norms = [m for m in generator.layers if isinstance(m, nn.BatchNorm2d)]
    assert len(convolutions) == 4 and len(norms) == 3 and all(c.bias is None for c in convolutions)
    projected = torch.einsum("bz,zcij->bcij", noise, convolutions[0].weight)  # (3, 4 ngf, 4, 4)
    x = F.relu(plain_batch_norm(projected, norms[0], training))
    for i in (1, 2, 3):
        if upsample == "transposed":
            spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2] + 1, 2 * x.shape[3] + 1)  # a zero between pixels
            spread[..., 1::2, 1::2] = x
            kernel = convolutions[i].weight.transpose(0, 1).flip(2, 3)
            x = F.conv2d(F.pad(spread, (1, 1, 1, 1)), kernel)
        else:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = F.conv2d(F.pad(x, (1, 1, 1, 1)), convolutions[i].weight)
        x = F.relu(plain_batch_norm(x, norms[i], training)) if i < 3 else torch.tanh(x)
    if not training:  # a picture by itself is the same as among others
        torch.testing.assert_close(generator(noise[1:2]), x[1:2], rtol=0, atol=1e-12)
    assert x.shape == (3, 1, 32, 32) and x.std() > 0.05
    torch.testing.assert_close(generator(noise), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_layers, size", [(2, (12, 64)), (3, (24, 32)), (4, (48, 256))])
def test_patchgan_is_the_plain_formula_down_to_its_least_size(n_layers, size):
    judge = random_weights(PatchDiscriminator(channels=3, ndf=2, n_layers=n_layers))
    assert judge.min_size == size[0]
    x = picture = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    convolutions = [m for m in judge.layers if isinstance(m, nn.Conv2d)]
    assert [c.weight.shape[0] for c in convolutions] == [*(2, 4, 8, 16, 16)[: n_layers + 1], 1]
    for i, convolution in enumerate(convolutions):
        x = F.conv2d(x, convolution.weight, convolution.bias, stride=2 if i < n_layers else 1, padding=1)
        if 0 < i <= n_layers:
            mean = x.mean(dim=(2, 3), keepdim=True)
            x = (x - mean) / ((x - mean).square().mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()
        if i <= n_layers:
            x = torch.where(x > 0, x, 0.2 * x)
    (found,) = judge(picture)
    assert found.shape == (2, 1, *(n // 2**n_layers - 2 for n in picture.shape[2:]))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_dcgans_discriminator_is_the_plain_formula():
    judge = random_weights(DCGANDiscriminator(channels=3, ndf=4, size=32))
    x = picture = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
    convolutions = [m for m in judge.layers if isinstance(m, nn.Conv2d)]
    norms = [None, *(m for m in judge.layers if isinstance(m, nn.BatchNorm2d))]
    assert [c.weight.shape[0] for c in convolutions] == [4, 8, 16, 1] and len(norms) == 3
    for convolution, norm in zip(convolutions, norms, strict=False):
        x = F.conv2d(x, convolution.weight, stride=2, padding=1)
        x = F.leaky_relu(x if norm is None else plain_batch_norm(x, norm, training=True), 0.2)
    assert x.shape == (3, 16, 4, 4)
    logits = (x * convolutions[-1].weight).sum(dim=(1, 2, 3))
    (found,) = judge(picture)
    assert found.shape == (3,)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-12)


SIZES = {
    **{partial(kind, n_residual_blocks=1): ((4, 8), (30, 32), (32, 34)) for kind in RESIDUAL},
    partial(UNetGenerator, depth=4): ((24, 32),),
}


@pytest.mark.parametrize("generator, size", [(generator, size) for generator, sizes in SIZES.items() for size in sizes])
def test_a_size_that_does_not_fit_is_named(generator, size):
    needed = "16 and at least 16" if generator.func is UNetGenerator else "4 and at least 8"
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels.*multiples of {needed}"):
        generator(ngf=4)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("n_layers, field", [(2, 34), (3, 70), (4, 142)])
def test_a_logit_sees_a_patch_of_the_stated_size(n_layers, field):
    # InstanceNorm looks at the whole map; without it, what a logit depends on is its receptive field.
    layers = PatchDiscriminator(ndf=2, n_layers=n_layers).layers
    convolutions = nn.Sequential(*(m for m in layers if not isinstance(m, nn.InstanceNorm2d)))
    for parameter in convolutions.parameters():
        nn.init.constant_(parameter, 0.01)
    x = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = convolutions(x)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == field


def test_weights_are_drawn_from_n_0_002_and_factors_of_norms_from_n_1_002():
    torch.manual_seed(0)
    for network in (
        AttentionGenerator(ngf=32, n_residual_blocks=2),
        PatchDiscriminator(),
        UGATITGenerator(ngf=32, n_residual_blocks=1),
        CAMDiscriminator(),
        affine := UNetGenerator(ngf=32, depth=6),
        conditional := PatchDiscriminator(6, affine=True),
        noisy := DCGANGenerator(ngf=64),
        judge := DCGANDiscriminator(ndf=64),
    ):
        factors = [p for name, p in network.named_parameters() if p.ndim == 1 and name.endswith("weight")]
        assert bool(factors) == (network in (affine, conditional, noisy, judge))
        if factors:
            drawn = torch.cat(factors)
            assert abs(drawn.mean() - 1) < 0.003 and abs(drawn.std() - 0.02) < 0.003
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif parameter.numel() > 5000:
                assert abs(parameter.std() - 0.02) < 0.001, name
                assert abs(parameter.mean()) < 0.001, name


def test_u_gat_it_may_start_from_torchs_own_weights():
    """Uniform, of a width that depends on the layer."""
    torch.manual_seed(0)
    for network in (UGATITGenerator(ngf=32, n_residual_blocks=1, init="default"), CAMDiscriminator(init="default")):
        for name, parameter in network.named_parameters():
            if parameter.numel() > 5000:
                bound = parameter[0].numel() ** -0.5
                assert parameter.abs().max() <= bound and abs(parameter.std() / bound - 3**-0.5) < 0.02, name


# ----------------------------------------------------------------------------------------------------------
#  pix2pix: the U-Net and its noise
# ----------------------------------------------------------------------------------------------------------


def official_unet(x, net, kept):
    """The official code's recursion on the weights of ours: BatchNorm over the batch, activations in place.

    ``kept``: what dropout leaves, by level, for those levels where the official code has dropout.
    """
    depth = net.settings["depth"]

    def norm(x, layer):
        return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)

    def block(x, level):
        x = F.leaky_relu(x, 0.2, inplace=True)  # so that x is not what it was when it is concatenated
        down, up = net.down[level - 1], net.up[depth - 1 - level]
        y = F.conv2d(x, down[1].weight, stride=2, padding=1)
        if level < depth - 1:
            y = block(norm(y, down[2]), level + 1)
        y = norm(F.conv_transpose2d(F.relu(y, inplace=True), up[1].weight, stride=2, padding=1), up[2])
        return torch.cat([x, 2 * y * kept[level] if level in kept else y], dim=1)

    x = F.relu(block(F.conv2d(x, net.first.weight, stride=2, padding=1), 1), inplace=True)
    return torch.tanh(F.conv_transpose2d(x, net.last[1].weight, net.last[1].bias, stride=2, padding=1))


@pytest.mark.parametrize("depth, size", [(6, (64, 64)), (5, (32, 64)), (7, (128, 128))])
def test_the_u_net_is_the_official_one_at_its_batch_of_one(depth, size):
    torch.manual_seed(depth)
    net = UNetGenerator(ngf=2, depth=depth).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    levels = range(4, depth - 1)  # num_downs - 5 blocks
    kept = {level: next(m for m in net.up[depth - 1 - level] if isinstance(m, NoiseDropout)).kept for level in levels}
    assert sum(isinstance(m, NoiseDropout) for m in net.modules()) == len(kept)
    x = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    ours, theirs = net(x).image, torch.cat([official_unet(one, net, kept) for one in x.split(1)])
    assert (ours - theirs).abs().max() < 1e-10 and ours.std() > 0.1
    weights = list(net.parameters())
    for mine, official in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (ours, theirs)), strict=True):
        assert (mine - official).abs().max() < 1e-9 * official.abs().max()


def test_noise_is_drawn_in_training_and_fixed_in_use():
    noise, x = NoiseDropout(6, 8), torch.ones(3, 6, 8, 16)
    torch.manual_seed(0)
    first, second = noise(x), noise(x)
    assert set(first.unique().tolist()) == {0.0, 2.0} and abs(first.mean() - 1) < 0.1
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    torch.manual_seed(0)
    assert torch.equal(noise(x), first)
    before = torch.get_rng_state()
    with evaluation_mode(noise):
        fixed = noise(x)
        assert torch.equal(noise(x[:1]), fixed[:1])
    assert noise.training and torch.equal(torch.get_rng_state(), before)
    assert set(fixed.unique().tolist()) == {0.0, 2.0} and abs(fixed.mean() - 1) < 0.1
    assert all(torch.equal(one, fixed[0]) for one in fixed)
    assert torch.equal(fixed[..., :8], fixed[..., 8:]) and not torch.equal(fixed[..., :4], fixed[..., 4:8])
    with evaluation_mode(NoiseDropout(6, 8)) as another:
        assert torch.equal(another(x), fixed)
    assert not noise.state_dict()


# ----------------------------------------------------------------------------------------------------------
#  U-GAT-IT: norms, class activation maps, spectral norm
# ----------------------------------------------------------------------------------------------------------


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_adalin_and_iln_are_their_formulas():
    x = 3 * random(2, 5, 4, 6) + random(1, 5, 1, 1, seed=1)
    gamma, beta = random(2, 5, seed=2), random(2, 5, seed=3)
    adaptive, learned = AdaLIN(5).double(), ILN(5).double()
    assert torch.equal(adaptive.rho.flatten(), torch.full((5,), 0.9, dtype=torch.float32).double())
    assert not learned.rho.any() and (learned.gamma == 1).all() and not learned.beta.any()
    for rho in (torch.linspace(0, 1, 5, dtype=torch.float64), None):
        if rho is not None:
            adaptive.rho.data[0, :, 0, 0] = learned.rho.data[0, :, 0, 0] = rho
        learned.gamma.data, learned.beta.data = gamma[:1, :, None, None], beta[:1, :, None, None]
        expected = plain_layer_instance_norm(x, adaptive.rho.flatten(), gamma, beta)
        assert (adaptive(x, gamma, beta) - expected).abs().max() < 1e-12
        same = [style[:1].expand(2, -1) for style in (gamma, beta)]
        expected = plain_layer_instance_norm(x, learned.rho.flatten(), *same)
        assert (learned(x) - expected).abs().max() < 1e-12
    assert adaptive(x.bfloat16().float(), gamma.bfloat16(), beta.bfloat16()).dtype == torch.float64


def test_a_class_activation_map_is_its_formula():
    cam, x = CAM(6).double(), random(2, 6, 3, 4)
    found, logits = cam(x)
    average, maximum = cam.average.weight[0], cam.maximum.weight[0]
    for b, picture in enumerate(x):
        assert abs(logits[b, 0] - sum(w * c.mean() for w, c in zip(average, picture, strict=True))) < 1e-12
        assert abs(logits[b, 1] - sum(w * c.max() for w, c in zip(maximum, picture, strict=True))) < 1e-12
        weighed = [w * c for weights in (average, maximum) for w, c in zip(weights, picture, strict=True)]
        for k, row in enumerate(cam.mix.weight[:, :, 0, 0]):
            expected = cam.mix.bias[k] + sum(w * c for w, c in zip(row, weighed, strict=True))
            assert (found[b, k] - expected).abs().max() < 1e-12


def test_a_heat_map_goes_from_zero_to_one_in_every_picture():
    features = random(3, 4, 4, 2).requires_grad_()
    features.data[1] *= 100
    features.data[2] = 0.5  # alike everywhere: nothing stands out
    found = heat_map(features, (8, 4))
    assert found.shape == (3, 1, 8, 4) and not found.requires_grad and not found[2].any()
    for picture, shown in zip(features[:2].detach(), found, strict=False):
        total = picture.sum(dim=0)
        total = (total - total.min()) / (total.max() - total.min())
        for i in range(8):  # bilinear, centres of pixels at halves
            for j in range(4):
                y, x = ((n + 0.5) / 2 - 0.5 for n in (i, j))
                y, x = min(max(y, 0), 3), min(max(x, 0), 1)
                (top, down), (left, right) = ((int(n), min(int(n) + 1, last)) for n, last in ((y, 3), (x, 1)))
                upper = total[top, left] * (1 - x % 1) + total[top, right] * (x % 1)
                lower = total[down, left] * (1 - x % 1) + total[down, right] * (x % 1)
                assert abs(shown[0, i, j] - (upper * (1 - y % 1) + lower * (y % 1))) < 1e-12


def power_iteration(weight, u):
    """The weight over the value that one step finds; no gradient flows through the step."""
    matrix = weight.reshape(len(weight), -1)
    v = matrix.detach().T @ u
    v = v / v.norm()
    u = matrix.detach() @ v
    u = u / u.norm()
    return weight / (u @ matrix @ v), u


def plain_discriminator(x, weights, us, n_layers):
    """The official discriminator with the weights of ours; ``us`` holds the iterations' vectors and moves on."""

    def normed(name):
        weight, u = power_iteration(weights[f"{name}.parametrizations.weight.original"], us[name])
        us[name] = u
        return weight

    def reflected(x, weight, bias=None, stride=1):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, bias, stride)

    for i in range(n_layers - 1):
        stride = 2 if i < n_layers - 2 else 1
        x = F.leaky_relu(reflected(x, normed(f"layers.{i}"), weights[f"layers.{i}.bias"], stride), 0.2)
    logits, weighed = [], []
    for name, pooled in (("average", x.mean(dim=(2, 3))), ("maximum", x.amax(dim=(2, 3)))):
        logits.append(pooled @ normed(f"cam.{name}").T)
        weighed.append(x * weights[f"cam.{name}.parametrizations.weight.original"][..., None, None])
    x = F.conv2d(torch.cat(weighed, dim=1), weights["cam.mix.weight"], weights["cam.mix.bias"])
    x = F.leaky_relu(x, 0.2)
    return reflected(x, normed("verdict")), torch.cat(logits, dim=1), x.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("n_layers, size", [(3, (12, 16)), (5, (24, 32))])
def test_a_discriminator_is_the_official_one_call_after_call(n_layers, size):
    torch.manual_seed(0)
    discriminator = CAMDiscriminator(ndf=2, n_layers=n_layers, init="default").double()
    weights, start = dict(discriminator.named_parameters()), dict(discriminator.named_buffers())
    us = {name.removesuffix(".parametrizations.weight.0.u"): u.clone() for name, u in start.items()}
    # Real and translated pictures in calls of their own, the power iteration a step ahead in the second.
    calls = [random(2, 3, *size, seed=seed) for seed in range(2)]
    for x in calls:
        with torch.no_grad():  # leaves no trace
            again = discriminator(x)
            heat = discriminator.heat_map(x)
        found, (logit_map, logits, total) = discriminator(x), plain_discriminator(x, weights, us, n_layers)
        assert found[0].shape == (2, 1, *(n // 2 ** (n_layers - 2) - 2 for n in size)) and found[1].shape == (2, 2)
        for ours, plain, before in zip(found, (logit_map, logits), again, strict=True):
            assert (ours - plain).abs().max() < 1e-12 and torch.equal(ours, before)
        assert (heat - heat_map(total, size)).abs().max() < 1e-12
        parameters = list(weights.values())
        gradients = [
            torch.autograd.grad(sum(p.square().sum() for p in o), parameters) for o in (found, (logit_map, logits))
        ]
        for ours, plain in zip(*gradients, strict=True):
            assert plain.abs().max() > 0 and (ours - plain).abs().max() < 1e-12 * max(1, plain.abs().max())
    for _ in range(300):
        discriminator(calls[0])
    for layer in (*discriminator.layers, discriminator.verdict):
        with torch.no_grad():
            assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2) - 1) < 1e-6


def test_the_norms_of_u_gat_it_leave_flat_channels_at_zero():
    """Dividing by their deviation would only enlarge rounding noise, from norm to norm."""
    x, flat = random(2, 3, 6, 6), torch.full((2, 3, 6, 6), 0.3, dtype=torch.float64) + 1e-6 * random(2, 3, 6, 6)
    x[0, 1] = flat[0, 1]
    expected = F.instance_norm(x)
    assert expected[0, 1].std() > 1e-4  # else there is nothing to leave
    expected[0, 1] = 0
    assert (FlatSafeInstanceNorm2d(3)(x) - expected).abs().max() < 1e-12
    gamma, beta = random(2, 3, 1, 1, seed=1), random(2, 3, 1, 1, seed=2)
    for rho in (0.0, 1.0):  # the layer's statistics, the instance's
        assert (layer_instance_norm(flat, torch.tensor(rho), gamma, beta) - beta).abs().max() < 1e-12
        assert (layer_instance_norm(flat * 1e4, torch.tensor(rho), gamma, beta) - beta).abs().max() > 0.1

    torch.manual_seed(0)
    generator = UGATITGenerator(ngf=8)
    for shade in (-1.0, 0.3):
        t = generator(torch.full((1, 3, 32, 32), shade))
        gradients = torch.autograd.grad(t.image.square().sum(), list(generator.parameters()), allow_unused=True)
        assert max(g.abs().max() for g in gradients if g is not None) < 1e-6


def test_the_discriminators_depth_follows_the_pictures():
    sizes = {512: (7, 5), 256: (7, 5), 255: (6, 4), 128: (6, 4), 64: (5, 3), 32: (4, 3), 16: (4, 3), 12: (4, 3)}
    for size, expected in sizes.items():
        assert depths(size) == expected
        for n_layers in expected:
            with torch.device("meta"):
                assert CAMDiscriminator(ndf=1, n_layers=n_layers).min_size <= size
    for n_layers in (3, 4, 5):
        discriminator = CAMDiscriminator(ndf=1, n_layers=n_layers)
        least = discriminator.min_size
        assert discriminator(torch.rand(1, 3, least, least))[0].shape == (1, 1, 1, 1)
        with pytest.raises(RuntimeError, match="Padding size"):
            discriminator(torch.rand(1, 3, least - 1, least))


def test_the_full_u_gat_it_takes_one_size_and_the_light_one_any():
    full, light = (UGATITGenerator(ngf=4, n_residual_blocks=1, size=size) for size in ((16, 24), None))
    for network, size in ((full, (16, 24)), (light, (8, 12)), (light, (16, 24))):
        t = network(torch.rand(2, 3, *size))
        assert t.image.shape == (2, 3, *size) and t.image.abs().max() <= 1
        assert t.cam_logits.shape == (2, 2) and t.attention is None and t.content is None
        assert t.foreground is t.heat_map and t.heat_map.shape == (2, 1, *size)
        assert t.heat_map.amin() >= 0 and 0.5 < t.heat_map.amax() <= 1
    for size in ((24, 16), (16, 28)):
        with pytest.raises(
            ValueError, match=f"{size[0]} x {size[1]} pixels: .* only pictures of its training size, 16 x 24 "
        ):
            full(torch.rand(1, 3, *size))
    assert translate_any_size(light, torch.rand(5, 3, 1, 2)).cam_logits.shape == (5, 2)


# ----------------------------------------------------------------------------------------------------------
#  Replay buffer
# ----------------------------------------------------------------------------------------------------------


def numbered(*values):
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)


def test_the_buffer_fills_then_swaps_half_of_the_time():
    buffer = ReplayBuffer(size=10, seed=(1,))
    for start in (0, 5):
        batch = numbered(*range(start, start + 5))
        assert torch.equal(buffer(batch), batch)
    held, swapped = set(range(10)), 0
    for k in range(10, 1010):
        handed = int(buffer(numbered(k)))
        if handed != k:
            assert handed in held  # an old one came back, and its place is taken
            held = held - {handed} | {k}
            swapped += 1
        assert set(buffer.stored.flatten().int().tolist()) == held
    assert 440 < swapped < 560


def test_within_a_batch_the_buffer_works_picture_by_picture():
    one, many = ReplayBuffer(size=4, seed=(7,)), ReplayBuffer(size=4, seed=(7,))
    singly = torch.cat([one(numbered(k)) for k in range(60)])
    batched = torch.cat([many(numbered(*range(k, k + 6))) for k in range(0, 60, 6)])
    assert torch.equal(singly, batched)
    assert not torch.equal(singly.flatten(), torch.arange(60.0))


def test_the_buffer_goes_on_from_its_state():
    straight, stopped = ReplayBuffer(size=3, seed=(1, 0)), ReplayBuffer(size=3, seed=(1, 0))
    for k in range(7):
        straight(numbered(k))
        stopped(numbered(k))
    resumed = ReplayBuffer(size=3, seed=(1, 0))
    resumed.load_state_dict(stopped.state_dict())
    for k in range(7, 40):
        assert torch.equal(straight(numbered(k)), resumed(numbered(k)))
    empty = ReplayBuffer(size=3)
    empty.load_state_dict(ReplayBuffer(size=3).state_dict())
    assert empty.seen == 0


def test_a_buffer_refuses_a_state_or_pictures_that_do_not_fit():
    full = torch.zeros(3, 3, 4, 4)
    for seen, stored in (
        (-1, None),
        (2.0, full[:2]),
        (2, None),
        (2, full),
        (9, full[:2]),
        (9, full / 0),
        (9, full.long()),
    ):
        with pytest.raises(ValueError, match="replay buffer"):
            ReplayBuffer(size=3).set_extra_state({"seen": seen, "stored": stored})
    buffer = ReplayBuffer(size=3)
    buffer.set_extra_state({"seen": 9, "stored": full})
    with pytest.raises(
        InputError, match=r"a replay buffer of another run: its pictures are 3 x 4 x 4, expected 3 x 8 x 8$"
    ):
        buffer(torch.zeros(1, 3, 8, 8))


def test_seeds_differ_and_size_zero_passes_through_detached():
    run = {}
    for seed in ((1, 0), (1, 1)):
        buffer = ReplayBuffer(size=2, seed=seed)
        run[seed] = [int(buffer(numbered(k))) for k in range(50)]
    assert run[1, 0] != run[1, 1]
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    handed = ReplayBuffer(size=0)(images)
    assert torch.equal(handed, images) and not handed.requires_grad


# ----------------------------------------------------------------------------------------------------------
#  Layouts and types
# ----------------------------------------------------------------------------------------------------------


LAID_OUT = {
    "AttentionGenerator": partial(AttentionGenerator, 3, 4, 2, 3),
    "PatchDiscriminator": partial(PatchDiscriminator, 3, 4, 2),
    "UNetGenerator": partial(UNetGenerator, 3, 4, 3),
}


@pytest.mark.parametrize("name", LAID_OUT)
@pytest.mark.parametrize("n", [1, 3])
def test_the_layout_changes_no_value_and_no_gradient(name, n):
    """channels_last goes another way through the norms."""
    torch.manual_seed(0)
    network = LAID_OUT[name]().double()
    x = torch.rand(n, 3, 24, 16, dtype=torch.float64, requires_grad=True)

    def results(layout):
        network.to(memory_format=layout)
        out = network(x.contiguous(memory_format=layout))[0]
        return out, *torch.autograd.grad(out.square().sum(), [x, *network.parameters()])

    for ours, plain in zip(results(torch.channels_last), results(torch.contiguous_format), strict=True):
        assert (ours - plain).abs().max() < 1e-9 * plain.abs().max()


@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_is_batch_norm_of_one_picture_in_either_layout_and_keeps_it(affine):
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    norm = InstanceNorm2d(5, affine=affine).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    factors = dict(weight=norm.weight, bias=norm.bias)
    expected = torch.cat([F.batch_norm(one, None, None, **factors, training=True) for one in x.split(1)])
    torch.testing.assert_close(expected, F.instance_norm(x, **factors))
    layouts = torch.contiguous_format, torch.channels_last
    for layout in layouts:
        normed = norm(x.contiguous(memory_format=layout))
        assert (normed - expected).abs().max() < 1e-12 and normed.is_contiguous(memory_format=layout)
    for layout in layouts:
        with torch.autocast("cpu", torch.bfloat16):
            assert norm.float()(x.bfloat16().contiguous(memory_format=layout)).dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_reflection_padding_is_pytorchs_and_stays_in_bf16(kernel):
    conv = ReflectionConv2d(3, 4, kernel)
    plain = nn.Conv2d(3, 4, kernel, padding=kernel // 2, padding_mode="reflect")
    plain.load_state_dict(conv.state_dict())
    x = torch.rand(1, 3, 8, 9)
    assert torch.equal(conv(x), plain(x))
    kept = []
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        y = conv(x.bfloat16().requires_grad_())
        assert torch.equal(y, plain(x.bfloat16()))
    assert y.dtype == torch.bfloat16 and {t.dtype for t in kept[:2]} == {torch.bfloat16}
