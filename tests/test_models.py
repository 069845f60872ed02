import copy
import itertools
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import (
    CAM,
    ILN,
    AdaLIN,
    AttentionGenerator,
    CAMDiscriminator,
    DCGANDiscriminator,
    DCGANGenerator,
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
    heat_map,
    in_use,
    load_generator,
    load_official,
    open_generator,
    open_generators,
    pack_generator,
    translate_any_size,
)
from utils import InputError

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
    if not training:  # a picture alone is the same as among others
        torch.testing.assert_close(generator(noise[1:2]), x[1:2], rtol=0, atol=1e-12)
    assert x.shape == (3, 1, 32, 32) and x.std() > 0.05
    torch.testing.assert_close(generator(noise), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_layers", [2, 3])
def test_patchgan_is_the_plain_formula(n_layers):
    judge = random_weights(PatchDiscriminator(channels=3, ndf=2, n_layers=n_layers))
    x = picture = torch.rand(2, 3, 24, 32, dtype=torch.float64) * 2 - 1
    convolutions = [m for m in judge.layers if isinstance(m, nn.Conv2d)]
    assert [c.weight.shape[0] for c in convolutions] == [2 * 2**i for i in range(n_layers + 1)] + [1]
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


def test_dcgans_first_weights_are_the_papers():
    torch.manual_seed(0)
    for network in (DCGANGenerator(ngf=16), DCGANDiscriminator(ndf=16)):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.num_features >= 64:
                assert 0.9 < module.weight.mean() < 1.1 and 0.015 < module.weight.std() < 0.025
                assert torch.equal(module.bias, torch.zeros_like(module.bias))
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.numel() > 1000:
                assert 0.018 < module.weight.std() < 0.022 and abs(module.weight.mean()) < 0.002


def test_a_file_of_dcgans_generator_holds_the_running_statistics_and_translates_none(tmp_path):
    generator = DCGANGenerator(nz=3, ngf=4, channels=1, size=16, upsample="nearest")
    noise = torch.rand(4, 3) * 2 - 1
    for _ in range(5):
        generator(noise)
    path = tmp_path / "generator.pt"
    torch.save({**pack_generator(generator), "direction": "generator"}, path)
    for where in (path, tmp_path):
        opened, about = open_generator(where, "generator")
        assert about["direction"] == "generator"
        assert torch.equal(opened.eval()(noise[:1]), generator.eval()(noise[:1]))
        for call in (open_generator, partial(open_generator, direction="BtoA"), open_generators):
            with pytest.raises(
                InputError, match=r"generator\.pt: draws pictures from noise \(.*\) and translates none"
            ):
                call(where)
    for weights in (pack_generator(ResNetGenerator(ngf=4, n_residual_blocks=1)), official_ugatit_weights(1)):
        torch.save(weights, tmp_path / "AtoB.pt")
        with pytest.raises(InputError, match=r"AtoB\.pt: translates AtoB, expected a generator that draws from noise"):
            open_generator(tmp_path / "AtoB.pt", "generator")
    path.unlink()
    with pytest.raises(InputError, match=r"no generator for noise found\. Looked for a file, or generator\.pt in"):
        open_generator(tmp_path, "generator")


@pytest.mark.parametrize("generator", [AttentionGenerator, SingleMaskGenerator, ResNetGenerator, UGATITGenerator])
@pytest.mark.parametrize("size", [(4, 8), (30, 32), (32, 34)])
def test_a_size_that_does_not_fit_is_named(generator, size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels.*multiples of 4 and at least 8"):
        generator(ngf=4, n_residual_blocks=1)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("n_layers, size, expected", [(3, 256, 30), (3, 24, 1), (2, 64, 14), (2, 12, 1), (4, 256, 14)])
def test_discriminator_map(n_layers, size, expected):
    discriminator = PatchDiscriminator(ndf=4, n_layers=n_layers)
    (logits,) = discriminator(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 1, expected, expected)
    assert size >= discriminator.min_size


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


def test_weights_are_drawn_from_n_0_002():
    torch.manual_seed(0)
    for network in (
        AttentionGenerator(ngf=32, n_residual_blocks=2),
        PatchDiscriminator(),
        UGATITGenerator(ngf=32, n_residual_blocks=1),
        CAMDiscriminator(),
    ):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif parameter.numel() > 5000:
                assert abs(parameter.std() - 0.02) < 0.001, name
                assert abs(parameter.mean()) < 0.001, name


def test_factors_of_affine_norms_are_drawn_from_n_1_002():
    torch.manual_seed(0)
    for network in (UNetGenerator(ngf=32, depth=6), PatchDiscriminator(6, affine=True)):
        norms = [m for m in network.modules() if isinstance(m, InstanceNorm2d)]
        factors = torch.cat([norm.weight for norm in norms])
        assert abs(factors.mean() - 1) < 0.003 and abs(factors.std() - 0.02) < 0.003
        assert not any(norm.bias.any() for norm in norms)
        convolutions = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        for weight in (m.weight for m in convolutions if m.weight.numel() > 5000):
            assert abs(weight.std() - 0.02) < 0.001 and abs(weight.mean()) < 0.001


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


def official_unet_parameters(depth, ngf=64, channels=3):
    """Counted by the recursion of the official code: weights of 4 x 4 kernels, two numbers for every norm's channel."""
    widths = [ngf, 2 * ngf, 4 * ngf, *[8 * ngf] * (depth - 3)]
    total = 16 * channels * ngf + 16 * 2 * ngf * channels + channels  # the outermost block; its last layer has a bias
    for i, (outer, inner) in enumerate(itertools.pairwise(widths)):
        innermost = i == depth - 2
        total += 16 * outer * inner + (0 if innermost else 2 * inner)
        total += 16 * inner * (1 if innermost else 2) * outer + 2 * outer
    return total


@pytest.mark.parametrize("depth, millions", [(8, 54.4), (7, 41.8), (5, 16.7)])
def test_the_u_net_is_as_large_as_the_official_one(depth, millions):
    with torch.device("meta"):
        found = sum(p.numel() for p in UNetGenerator(depth=depth).parameters())
    assert found == official_unet_parameters(depth) and round(found / 1e6, 1) == millions


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
    with in_use(noise):
        fixed = noise(x)
        assert torch.equal(noise(x[:1]), fixed[:1])
    assert noise.training and torch.equal(torch.get_rng_state(), before)
    assert set(fixed.unique().tolist()) == {0.0, 2.0} and abs(fixed.mean() - 1) < 0.1
    assert all(torch.equal(one, fixed[0]) for one in fixed)
    assert torch.equal(fixed[..., :8], fixed[..., 8:]) and not torch.equal(fixed[..., :4], fixed[..., 4:8])
    with in_use(NoiseDropout(6, 8)) as another:
        assert torch.equal(another(x), fixed)
    assert not noise.state_dict()


def test_a_size_that_the_u_net_cannot_halve_is_named():
    with pytest.raises(ValueError, match=r"24 x 32 pixels.*multiples of 16 and at least 16"):
        UNetGenerator(ngf=2, depth=4)(torch.zeros(1, 3, 24, 32))


# ----------------------------------------------------------------------------------------------------------
#  U-GAT-IT: norms, class activation maps, spectral norm
# ----------------------------------------------------------------------------------------------------------


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_layer_instance_norm(x, rho, gamma, beta):
    """Picture by picture and channel by channel; variances over n - 1, as torch.var."""
    out = torch.empty_like(x)
    for b, picture in enumerate(x):
        layer_mean = picture.sum() / picture.numel()
        layer_var = ((picture - layer_mean) ** 2).sum() / (picture.numel() - 1)
        for c, channel in enumerate(picture):
            mean = channel.sum() / channel.numel()
            var = ((channel - mean) ** 2).sum() / (channel.numel() - 1)
            instance, layer = (channel - mean) / (var + 1e-5) ** 0.5, (channel - layer_mean) / (layer_var + 1e-5) ** 0.5
            out[b, c] = gamma[b, c] * (rho[c] * instance + (1 - rho[c]) * layer) + beta[b, c]
    return out


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
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels: .* training size alone, 16 x 24"):
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
#  Official checkpoints: the official networks, written from their description, with all their biases
# ----------------------------------------------------------------------------------------------------------


def official_attention_weights(ngf=4, n_blocks=2, n_masks=10, n_contents=9):
    """State dict of the official AttentionGAN generator, random weights and biases."""
    rng = torch.Generator().manual_seed(0)
    weights = {}

    def conv(name, out_channels, in_channels, kernel, transposed=False):
        shape = (in_channels, out_channels) if transposed else (out_channels, in_channels)
        weights[f"{name}.weight"] = torch.randn(*shape, kernel, kernel, generator=rng, dtype=torch.float64) * 0.3
        weights[f"{name}.bias"] = torch.randn(out_channels, generator=rng, dtype=torch.float64)

    conv("conv1", ngf, 3, 7)
    conv("conv2", 2 * ngf, ngf, 3)
    conv("conv3", 4 * ngf, 2 * ngf, 3)
    for i in range(n_blocks):
        conv(f"resnet_blocks.{i}.conv1", 4 * ngf, 4 * ngf, 3)
        conv(f"resnet_blocks.{i}.conv2", 4 * ngf, 4 * ngf, 3)
    for head, out, kernel in (("content", 3 * n_contents, 7), ("attention", n_masks, 1)):
        conv(f"deconv1_{head}", 2 * ngf, 4 * ngf, 3, transposed=True)
        conv(f"deconv2_{head}", ngf, 2 * ngf, 3, transposed=True)
        conv(f"deconv3_{head}", out, ngf, kernel)
    return weights


def convolve(x, weights, name, stride=1, reflect=0, zero=0):
    if reflect:
        x = F.pad(x, (reflect,) * 4, mode="reflect")
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=zero)


def upsample(x, weights, name):
    return F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 2, 1, 1)


def norm_relu(x):
    return F.relu(F.instance_norm(x))


def trunk(x, weights, names, blocks):
    x = norm_relu(convolve(x, weights, names[0], reflect=3))
    x = norm_relu(convolve(x, weights, names[1], stride=2, zero=1))
    x = norm_relu(convolve(x, weights, names[2], stride=2, zero=1))
    for first, second in blocks:
        y = norm_relu(convolve(x, weights, first, reflect=1))
        x = x + F.instance_norm(convolve(y, weights, second, reflect=1))
    return x


def official_attention_forward(x, weights, n_blocks=2, n_contents=9):
    blocks = [(f"resnet_blocks.{i}.conv1", f"resnet_blocks.{i}.conv2") for i in range(n_blocks)]
    features = trunk(x, weights, ("conv1", "conv2", "conv3"), blocks)
    c = norm_relu(upsample(features, weights, "deconv1_content"))
    c = norm_relu(upsample(c, weights, "deconv2_content"))
    c = torch.tanh(convolve(c, weights, "deconv3_content", reflect=3))
    a = norm_relu(upsample(features, weights, "deconv1_attention"))
    a = norm_relu(upsample(a, weights, "deconv2_attention"))
    a = torch.softmax(convolve(a, weights, "deconv3_attention"), dim=1)
    out = x * a[:, 9:].repeat(1, 3, 1, 1) if n_contents == 9 else 0
    for i in range(n_contents):
        out = out + c[:, 3 * i : 3 * i + 3] * a[:, i : i + 1].repeat(1, 3, 1, 1)
    return out


def official_cyclegan_weights(ngf=4, n_blocks=9):
    names = {"conv1": "model.1", "conv2": "model.4", "conv3": "model.7"}
    for i in range(n_blocks):
        names |= {f"resnet_blocks.{i}.conv{j}": f"model.{10 + i}.conv_block.{k}" for j, k in ((1, 1), (2, 5))}
    last = {f"deconv{j}_attention": f"model.{10 + n_blocks + k}" for j, k in ((1, 0), (2, 3))}
    source = official_attention_weights(ngf, n_blocks)
    weights = {}
    for ours, theirs in {**names, **last}.items():
        for kind in ("weight", "bias"):
            weights[f"{theirs}.{kind}"] = source[f"{ours}.{kind}"]
    weights[f"model.{17 + n_blocks}.weight"] = source["deconv3_content.weight"][:3].clone()
    weights[f"model.{17 + n_blocks}.bias"] = source["deconv3_content.bias"][:3].clone()
    return weights


def official_cyclegan_forward(x, weights, n_blocks=9):
    blocks = [(f"model.{10 + i}.conv_block.1", f"model.{10 + i}.conv_block.5") for i in range(n_blocks)]
    x = trunk(x, weights, ("model.1", "model.4", "model.7"), blocks)
    x = norm_relu(upsample(x, weights, f"model.{10 + n_blocks}"))
    x = norm_relu(upsample(x, weights, f"model.{13 + n_blocks}"))
    return torch.tanh(convolve(x, weights, f"model.{17 + n_blocks}", reflect=3))


OFFICIAL = {
    "attentiongan": (official_attention_weights, official_attention_forward, AttentionGenerator),
    "attentiongan-geo": (
        partial(official_attention_weights, n_contents=10),
        partial(official_attention_forward, n_contents=10),
        AttentionGenerator,
    ),
    "cyclegan": (official_cyclegan_weights, official_cyclegan_forward, ResNetGenerator),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_weights_compute_the_same_function(name, prefix, tmp_path):
    make, forward, network = OFFICIAL[name]
    weights = make()
    path = tmp_path / "latest_net_G_A.pth"
    # Stored as float32, so the comparison starts from float32 values.
    weights = {k: v.float().double() for k, v in weights.items()}
    torch.save({prefix + k: v.float() for k, v in weights.items()}, path)
    generator = load_official(path)
    assert isinstance(generator, network)
    x = torch.rand(2, 3, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    difference = (generator.double()(x).image - forward(x, weights)).abs().max()
    assert difference < 1e-9
    through_any, about = load_generator(path)
    assert type(through_any) is network and about == {}


def official_ugatit_weights(seed, size=None, ngf=4, n_blocks=2):
    """State dict of a generator of the official PyTorch code of U-GAT-IT; ``size`` is that of the full network."""
    rng = torch.Generator().manual_seed(seed)
    dim = 4 * ngf
    shapes = {"DownBlock.1.weight": (ngf, 3, 7, 7)}
    shapes |= {"DownBlock.5.weight": (2 * ngf, ngf, 3, 3), "DownBlock.9.weight": (dim, 2 * ngf, 3, 3)}
    for i in range(n_blocks):
        shapes |= {f"DownBlock.{12 + i}.conv_block.{j}.weight": (dim, dim, 3, 3) for j in (1, 5)}
        for j in (1, 2):
            shapes |= {f"UpBlock1_{i + 1}.conv{j}.weight": (dim, dim, 3, 3)}
            shapes |= {f"UpBlock1_{i + 1}.norm{j}.rho": (1, dim, 1, 1)}
    shapes |= {"gap_fc.weight": (1, dim), "gmp_fc.weight": (1, dim)}
    shapes |= {"conv1x1.weight": (dim, 2 * dim, 1, 1), "conv1x1.bias": (dim,)}
    shapes |= {"FC.0.weight": (dim, dim if size is None else dim * (size // 4) ** 2), "FC.2.weight": (dim, dim)}
    shapes |= {"gamma.weight": (dim, dim), "beta.weight": (dim, dim)}
    for i, out in ((2, 2 * ngf), (7, ngf)):
        shapes |= {f"UpBlock2.{i}.weight": (out, 2 * out, 3, 3)}
        shapes |= {f"UpBlock2.{i + 1}.{name}": (1, out, 1, 1) for name in ("rho", "gamma", "beta")}
    shapes |= {"UpBlock2.11.weight": (3, ngf, 7, 7)}
    weights = {k: 0.3 * torch.randn(shape, generator=rng) for k, shape in shapes.items()}
    return {k: v.abs().clamp(0, 1) if k.endswith("rho") else v for k, v in weights.items()}


def official_ugatit_forward(x, weights, n_blocks=2):
    """Picture, CAM logits, sum of the attended features."""

    def conv(x, name, reflect, stride=1):
        return F.conv2d(F.pad(x, (reflect,) * 4, mode="reflect"), weights[f"{name}.weight"], stride=stride)

    def norm(x, rho, gamma, beta):
        return plain_layer_instance_norm(x, rho.flatten(), *(s.flatten(1).expand(len(x), -1) for s in (gamma, beta)))

    x = norm_relu(conv(x, "DownBlock.1", 3))
    x = norm_relu(conv(x, "DownBlock.5", 1, stride=2))
    x = norm_relu(conv(x, "DownBlock.9", 1, stride=2))
    for i in range(n_blocks):
        y = norm_relu(conv(x, f"DownBlock.{12 + i}.conv_block.1", 1))
        x = x + F.instance_norm(conv(y, f"DownBlock.{12 + i}.conv_block.5", 1))
    by_average, by_maximum = weights["gap_fc.weight"], weights["gmp_fc.weight"]
    logits = torch.cat([x.mean(dim=(2, 3)) @ by_average.T, x.amax(dim=(2, 3)) @ by_maximum.T], dim=1)
    x = torch.cat([x * by_average[..., None, None], x * by_maximum[..., None, None]], dim=1)
    x = F.relu(F.conv2d(x, weights["conv1x1.weight"], weights["conv1x1.bias"]))
    total = x.sum(dim=1, keepdim=True)
    light = weights["FC.0.weight"].shape[1] == x.shape[1]
    style = x.mean(dim=(2, 3)) if light else x.reshape(len(x), -1)
    for name in ("FC.0", "FC.2"):
        style = F.relu(style @ weights[f"{name}.weight"].T)
    gamma, beta = style @ weights["gamma.weight"].T, style @ weights["beta.weight"].T
    for i in range(1, n_blocks + 1):
        y = F.relu(norm(conv(x, f"UpBlock1_{i}.conv1", 1), weights[f"UpBlock1_{i}.norm1.rho"], gamma, beta))
        x = x + norm(conv(y, f"UpBlock1_{i}.conv2", 1), weights[f"UpBlock1_{i}.norm2.rho"], gamma, beta)
    for i in (2, 7):
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = conv(x, f"UpBlock2.{i}", 1)
        x = F.relu(norm(x, *(weights[f"UpBlock2.{i + 1}.{name}"] for name in ("rho", "gamma", "beta"))))
    return torch.tanh(conv(x, "UpBlock2.11", 3)), logits, total


@pytest.mark.parametrize("size", [None, 16], ids=["light", "full"])
def test_official_u_gat_it_files_hold_both_directions(size, tmp_path):
    path = tmp_path / "selfie2anime_params_0100000.pt"
    weights = {"genA2B": official_ugatit_weights(1, size), "genB2A": official_ugatit_weights(2, size)}
    judges = {name: {"model.1.bias": torch.zeros(4)} for name in ("disGA", "disGB", "disLA", "disLB")}
    torch.save({**weights, **judges}, path)
    x = random(2, 3, size or 24, size or 12).clamp(-1, 1)
    opened = open_generators(path)
    assert list(opened) == ["AtoB", "BtoA"]
    for (direction, (generator, about)), state in zip(opened.items(), weights.values(), strict=True):
        assert about["direction"] == direction
        assert about.get("options") == (None if size is None else {"img_height": 16, "img_width": 16})
        t = generator.double()(x)
        image, logits, total = official_ugatit_forward(x, {k: v.double() for k, v in state.items()})
        assert image.std() > 0.1 and (t.image - image).abs().max() < 1e-9
        assert (t.cam_logits - logits).abs().max() < 1e-9
        assert (t.heat_map - heat_map(total, x.shape[-2:])).abs().max() < 1e-9
    # One of them alone, and in DataParallel's clothes.
    torch.save({f"module.{k}": v for k, v in weights["genB2A"].items()}, path)
    alone, about = load_generator(path)
    assert torch.equal(alone.double()(x).image, opened["BtoA"][0](x).image)
    assert "direction" not in about and list(open_generators(path)) == ["AtoB"]
    torch.save({"genA2B": {**weights["genA2B"], "gap_fc.bias": torch.zeros(1)}, "genB2A": {}}, path)
    with pytest.raises(ValueError, match=r"not expected: gap_fc\.bias"):  # no norm would cancel it
        load_official(path)


def test_running_statistics_of_old_checkpoints_are_dropped(tmp_path):
    weights = official_cyclegan_weights(n_blocks=6)
    weights |= {"model.2.running_mean": torch.zeros(4), "model.2.num_batches_tracked": torch.tensor(3)}
    torch.save(weights, tmp_path / "g.pth")
    assert load_official(tmp_path / "g.pth").settings["n_residual_blocks"] == 6


def test_files_that_are_no_generator_are_refused_by_name(tmp_path):
    path = tmp_path / "g.pth"

    def refusal():
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            load_official(path)
        return str(caught.value)

    torch.save({"foo.weight": torch.zeros(1), "bar": torch.zeros(1)}, path)
    assert all(part in refusal() for part in ("conv1.weight", "model.1.weight", "found bar, foo.weight"))

    weights = official_attention_weights()
    del weights["deconv2_content.weight"]
    torch.save(weights | {"extra.weight": torch.zeros(1)}, path)
    message = refusal()
    assert "missing: deconv2_content.weight" in message and "not expected: extra.weight" in message

    weights = official_attention_weights() | {"conv2.weight": torch.zeros(8, 4, 5, 5)}
    torch.save(weights, path)
    assert "conv2.weight has shape (8, 4, 5, 5), expected (8, 4, 3, 3)" in refusal()

    for content in (b"not a checkpoint", b""):  # which torch's own words would have one open unsafely
        path.write_bytes(content)
        assert re.fullmatch(
            rf"{path}: not a readable weights file \((UnpicklingError|EOFError|Ran out of input)\)", refusal()
        )
    for content, kind in (([1, 2], "list"), ({0: torch.zeros(1)}, "dict")):
        torch.save(content, path)
        assert f"expected a dictionary of weights by their names, found {kind}" in refusal()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_official(path)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "generator",
    [
        AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=3, attention_kernel=7, upsample="nearest"),
        AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=3, background=False),
        SingleMaskGenerator(3, 4, 1),
        ResNetGenerator(1, 4, 2),
        UNetGenerator(1, 4, 3),
        UGATITGenerator(1, 4, 1),
        UGATITGenerator(3, 4, 1, size=(16, 16), init="default"),
    ],
    ids=lambda g: type(g).__name__,
)
def test_our_own_files_open_as_the_same_network(generator, half, tmp_path):
    packed = pack_generator(generator)
    if half:
        packed["weights"] = {k: v.half() for k, v in packed["weights"].items()}
        generator = copy.deepcopy(generator).half().float()  # the same rounding
    torch.save({**packed, "direction": "AtoB", "step": 3}, tmp_path / "AtoB.pt")
    loaded, about = load_generator(tmp_path / "AtoB.pt")
    assert about == {"direction": "AtoB", "step": 3}
    assert type(loaded) is type(generator) and loaded.settings == generator.settings
    x = torch.rand(1, generator.settings["channels"], 16, 16) * 2 - 1
    assert torch.equal(loaded(x).image, generator(x).image)
    assert next(loaded.parameters()).dtype == torch.float32


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


def test_instance_norm_keeps_channels_last_and_is_pytorchs():
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    normed = InstanceNorm2d(5)(x)
    assert normed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normed, torch.nn.functional.instance_norm(x))


def test_affine_instance_norm_is_batch_norm_of_one_picture_in_either_layout():
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    norm = InstanceNorm2d(5, affine=True).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    parts = [F.batch_norm(one, None, None, norm.weight, norm.bias, training=True) for one in x.split(1)]
    layouts = torch.contiguous_format, torch.channels_last
    for layout in layouts:
        assert (norm(x.contiguous(memory_format=layout)) - torch.cat(parts)).abs().max() < 1e-12
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
