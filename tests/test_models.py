import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import (
    AttentionGenerator,
    InstanceNorm2d,
    PatchDiscriminator,
    ReflectionConv2d,
    ReplayBuffer,
    ResNetGenerator,
    SingleMaskGenerator,
    load_generator,
    load_official,
    pack_generator,
)

# Published counts (with biases everywhere) less the biases that InstanceNorm cancels.
STEM_AND_BLOCKS = 64 + 128 + 256 + 9 * 2 * 256
HEAD = 128 + 64
PARAMETERS = {
    "AttentionGenerator": (AttentionGenerator, 11_822_949 - STEM_AND_BLOCKS - 2 * HEAD),
    "AttentionGAN-geo": (lambda: AttentionGenerator(background=False), 11_832_360 - STEM_AND_BLOCKS - 2 * HEAD),
    "SingleMaskGenerator": (SingleMaskGenerator, 11_378_179 + 64 * 49 + 1 - STEM_AND_BLOCKS - HEAD),  # a fourth output
    "ResNetGenerator": (ResNetGenerator, 11_378_179 - STEM_AND_BLOCKS - HEAD),
    "PatchDiscriminator": (PatchDiscriminator, 2_764_737 - (128 + 256 + 512)),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_official_ones_less_the_cancelled_biases(name):
    network, expected = PARAMETERS[name]
    assert sum(p.numel() for p in network().parameters()) == expected


@pytest.mark.parametrize("kernel", [1, 7])
@pytest.mark.parametrize("height, width", [(8, 8), (20, 32)])
def test_attention_generator_fuses_masks_that_sum_to_one(kernel, height, width):
    generator = AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=5, attention_kernel=kernel)
    x = torch.rand(2, 3, height, width) * 2 - 1
    for parameter in generator.parameters():  # far from the start, where all masks are alike
        nn.init.normal_(parameter, std=0.5)
    image, attention, content = generator(x)
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
    image, attention, content = generator(x)
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
    image, attention, content = generator(x)
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
    image, attention, content = generator(torch.zeros(1, 1, 12, 12))
    assert (image.shape, attention.shape, content.shape) == ((1, 1, 12, 12), (1, 2, 12, 12), (1, 1, 1, 12, 12))
    assert ResNetGenerator(ngf=4, n_residual_blocks=1)(torch.zeros(1, 3, 16, 8)).image.shape == (1, 3, 16, 8)
    assert ResNetGenerator(ngf=4, n_residual_blocks=1)(torch.zeros(1, 3, 8, 8)).foreground is None


@pytest.mark.parametrize("generator", [AttentionGenerator, SingleMaskGenerator, ResNetGenerator])
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
    for network in (AttentionGenerator(ngf=32, n_residual_blocks=2), PatchDiscriminator()):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif parameter.numel() > 5000:
                assert abs(parameter.std() - 0.02) < 0.001, name
                assert abs(parameter.mean()) < 0.001, name


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

    path.write_bytes(b"not a checkpoint")
    assert "not a readable weights file" in refusal()
    torch.save([1, 2], path)
    assert "expected a dictionary of weights, found list" in refusal()
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
    ],
    ids=lambda g: type(g).__name__,
)
def test_our_own_files_open_as_the_same_network(generator, half, tmp_path):
    packed = pack_generator(generator)
    if half:
        packed["weights"] = {k: v.half() for k, v in packed["weights"].items()}
    torch.save({**packed, "direction": "AtoB", "step": 3}, tmp_path / "AtoB.pt")
    loaded, about = load_generator(tmp_path / "AtoB.pt")
    assert about == {"direction": "AtoB", "step": 3}
    assert type(loaded) is type(generator) and loaded.settings == generator.settings
    x = torch.rand(1, generator.settings["channels"], 16, 16) * 2 - 1
    expected = generator(x).image
    assert np.allclose(loaded(x).image.detach(), expected.detach(), atol=2e-3 if half else 0, rtol=0)
    assert next(loaded.parameters()).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------
#  Layouts and types
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AttentionGenerator", "PatchDiscriminator"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_layout_changes_no_value_and_no_gradient(name, n):
    """channels_last goes another way through the norms."""
    torch.manual_seed(0)
    network = (AttentionGenerator(3, 4, 2, 3) if name == "AttentionGenerator" else PatchDiscriminator(3, 4, 2)).double()
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
