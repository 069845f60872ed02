"""The networks: generators, discriminators and the replay buffer.

Pictures are float tensors of shape (B, channels, H, W) with values in [-1, 1]. A generator returns a
``Translation`` (one that draws from noise the pictures alone); a discriminator returns a tuple of logits (one map for
the PatchGAN).

Convolutions that are followed by InstanceNorm or BatchNorm carry no bias: the norm subtracts it again, its gradient is
exactly zero, and Adam would turn the rounding noise of that zero into a random walk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from utils import NOISE, InputError, find_generator, first_line, places, say


class Translation(NamedTuple):
    """What a generator made of a batch of pictures.

    image: (B, channels, H, W) in [-1, 1], the translated pictures.
    attention: (B, n_masks, H, W), each pixel's masks sum to 1, the last one is the background unless every mask has
        a content; None where the generator has no masks.
    content: (B, n_masks - 1, channels, H, W) in [-1, 1], one picture per foreground mask; None likewise.
    cam_logits: (B, 2), the verdicts of a class activation map's classifiers (average and maximum pooling) on whether
        the input is of the source domain; None where the generator has none.
    heat_map: (B, 1, H, W) in [0, 1], that class activation map as the official code shows it (see ``heat_map``); None
        likewise.
    """

    image: Tensor
    attention: Tensor | None = None
    content: Tensor | None = None
    cam_logits: Tensor | None = None
    heat_map: Tensor | None = None

    @property
    def foreground(self) -> Tensor | None:
        """(B, 1, H, W) in [0, 1]: where the generator is at work; None where it does not tell.

        The share of each pixel that is new, 1 - background mask, or the heat map of a generator without masks.
        """
        if self.attention is None:
            return self.heat_map
        has_background = self.content is None or self.content.shape[1] < self.attention.shape[1]
        return 1 - self.attention[:, -1:] if has_background else None


# ----------------------------------------------------------------------------------------------------------
#  Blocks
# ----------------------------------------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """Softmax, tanh, mask fusion and losses want float32 under bf16 autocast; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ReflectionConv2d(nn.Conv2d):
    """A convolution with reflection padding of (kernel - 1) // 2: with an odd kernel and stride 1 it keeps the size.

    It pads in the input's own type: autocast on the CPU would widen to float32 first, and keep that for the backward
    pass.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x, 4 * [(self.kernel_size[0] - 1) // 2], mode="reflect")
        return super().forward(x)


class InstanceNorm2d(nn.InstanceNorm2d):
    """PyTorch's, without running statistics; (B, C, H, W) to the same shape, on the CPU in the same layout too."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not x.is_contiguous():
            # channels_last, in which oneDNN convolves faster, but F.instance_norm copies to the default layout and
            # back. BatchNorm does not, and for a single picture it is the same.
            affine = self.weight, self.bias
            return torch.cat([F.batch_norm(picture, None, None, *affine, training=True) for picture in x.split(1)])
        return super().forward(x)


class ResidualBlock(nn.Module):
    """x + IN(conv(ReLU(IN(conv(x))))), 3×3, reflection padding, no ReLU after the sum.

    The block of CycleGAN and AttentionGAN: (B, dim, H, W) to the same shape.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = ReflectionConv2d(dim, dim, 3, bias=False)
        self.conv2 = ReflectionConv2d(dim, dim, 3, bias=False)
        self.norm = InstanceNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.relu(self.norm(self.conv1(x)), inplace=True)))


def norm_relu(dim: int) -> list[nn.Module]:
    return [InstanceNorm2d(dim), nn.ReLU(inplace=True)]


def encoder(channels: int, ngf: int, n_residual_blocks: int, down_padding: str = "zeros") -> nn.Sequential:
    """c7s1-ngf, d(2 ngf), d(4 ngf), R(4 ngf) × n: (B, channels, H, W) to (B, 4 ngf, H/4, W/4).

    ``down_padding``: what the two convolutions of stride 2 see beyond the border, "zeros" or "reflect".
    """
    down = ReflectionConv2d if down_padding == "reflect" else partial(nn.Conv2d, padding=1)
    return nn.Sequential(
        ReflectionConv2d(channels, ngf, 7, bias=False),
        *norm_relu(ngf),
        down(ngf, 2 * ngf, 3, stride=2, bias=False),
        *norm_relu(2 * ngf),
        down(2 * ngf, 4 * ngf, 3, stride=2, bias=False),
        *norm_relu(4 * ngf),
        *(ResidualBlock(4 * ngf) for _ in range(n_residual_blocks)),
    )


def enlarge(dim: int, upsample: str) -> list[nn.Module]:
    """(B, dim, H, W) to (B, dim/2, 2 H, 2 W) by a 3×3 convolution.

    "transposed" as in the papers; "nearest" repeats pixels first (Odena et al., 2016), so that no pixel's place in
    the grid tells it from its neighbours.
    """
    if upsample == "transposed":
        return [nn.ConvTranspose2d(dim, dim // 2, 3, stride=2, padding=1, output_padding=1, bias=False)]
    return [nn.Upsample(scale_factor=2), ReflectionConv2d(dim, dim // 2, 3, bias=False)]


def decoder(ngf: int, out_channels: int, kernel: int, upsample: str = "transposed") -> nn.Sequential:
    """u(2 ngf), u(ngf), c{kernel}s1: (B, 4 ngf, H/4, W/4) to (B, out_channels, H, W), no activation."""
    return nn.Sequential(
        *enlarge(4 * ngf, upsample),
        *norm_relu(2 * ngf),
        *enlarge(2 * ngf, upsample),
        *norm_relu(ngf),
        ReflectionConv2d(ngf, out_channels, kernel),
    )


def init_weights(network: nn.Module, std: float = 0.02) -> None:
    """Draw every convolution and linear layer from N(0, std), biases zero, in place (CycleGAN, Appendix 7.1).

    The factors of affine norms come from N(1, std), as in the official codes of pix2pix and DCGAN.
    """
    for module in network.modules():
        is_norm = isinstance(module, (InstanceNorm2d, nn.BatchNorm2d)) and module.affine
        if is_norm or isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, float(is_norm), std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def layer_instance_norm(x: Tensor, rho: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """γ (ρ IN(x) + (1 - ρ) LN(x)) + β (U-GAT-IT, eq. 1), in float32 at least.

    x: (B, C, H, W). rho, gamma, beta: (1 or B, C, 1, 1). IN takes mean and variance over each channel of each picture,
    LN over each picture; the variances are unbiased, as in the official PyTorch code.
    """
    x = at_least_float32(x)
    var_in, mean_in = torch.var_mean(x, dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    # LN's follow from IN's, which spares a pass over the picture.
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    mean_ln = mean_in.mean(dim=1, keepdim=True)  # (B, 1, 1, 1)
    squares = (pixels - 1) * var_in + pixels * (mean_in - mean_ln).square()
    var_ln = squares.sum(dim=1, keepdim=True) / (channels * pixels - 1)
    scale_in, scale_ln = rho * torch.rsqrt(var_in + eps), (1 - rho) * torch.rsqrt(var_ln + eps)
    # All of it is one factor and one summand for each channel, so that the picture is passed over once.
    return x * (gamma * (scale_in + scale_ln)) + (beta - gamma * (scale_in * mean_in + scale_ln * mean_ln))


class AdaLIN(nn.Module):
    """Adaptive layer-instance normalisation: γ and β come with the picture, ρ in [0, 1] is learned, 0.9 at first.

    Takes (B, dim, H, W) and γ, β, (B, dim). Whoever trains it keeps ρ in its bounds.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.rho = nn.Parameter(torch.full((1, dim, 1, 1), 0.9))

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        gamma, beta = (at_least_float32(style)[:, :, None, None] for style in (gamma, beta))
        return layer_instance_norm(x, self.rho, gamma, beta)


class ILN(nn.Module):
    """Layer-instance normalisation, (B, dim, H, W) to the same: γ, β and ρ in [0, 1] are learned, ρ is 0 at first."""

    def __init__(self, dim: int):
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.gamma = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return layer_instance_norm(x, self.rho, self.gamma, self.beta)


class AdaLINBlock(nn.Module):
    """x + AdaLIN(conv(ReLU(AdaLIN(conv(x))))), 3×3, reflection padding: (B, dim, H, W) to the same shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = ReflectionConv2d(dim, dim, 3, bias=False)
        self.norm1 = AdaLIN(dim)
        self.conv2 = ReflectionConv2d(dim, dim, 3, bias=False)
        self.norm2 = AdaLIN(dim)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x), gamma, beta))), gamma, beta)


class CAM(nn.Module):
    """Class activation map (Zhou et al., CVPR 2016) as U-GAT-IT has it: what tells two domains apart is amplified.

    Two linear classifiers judge the features, pooled by average and by maximum; the features times each one's weights
    are brought back to ``dim`` channels by a 1×1 convolution. Takes (B, dim, H, W); returns the same shape, before an
    activation, and the logits, (B, 2), in float32 at least.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.average, self.maximum = nn.Linear(dim, 1, bias=False), nn.Linear(dim, 1, bias=False)
        self.mix = nn.Conv2d(2 * dim, dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            pixels = x.flatten(2)  # (B, dim, H W)
            logits = torch.cat([self.average(pixels.mean(dim=2)), self.maximum(pixels.max(dim=2).values)], dim=1)
            # Under spectral norm these are the weights before it, as in the official code; the logits see them after.
            weights = [next(classifier.parameters())[..., None, None] for classifier in (self.average, self.maximum)]
            weighed = torch.cat([x * weight for weight in weights], dim=1)  # (B, 2 dim, H, W)
        return self.mix(weighed), logits


def heat_map(features: Tensor, size: Sequence[int]) -> Tensor:
    """A class activation map for the eye: (B, 1, *size) in [0, 1], without gradient, from (B, dim, h, w).

    The sum over the channels of what follows the CAM, each picture's least value 0 and greatest 1, then resized
    bilinearly.
    """
    heat = at_least_float32(features.detach()).sum(dim=1, keepdim=True)
    least, most = heat.amin(dim=(2, 3), keepdim=True), heat.amax(dim=(2, 3), keepdim=True)
    heat = (heat - least) / (most - least).clamp_min(torch.finfo(heat.dtype).tiny)
    return F.interpolate(heat, size=tuple(size), mode="bilinear")


class SpectralNorm(nn.Module):
    """Parametrises a layer's weight as weight / σ, σ its largest singular value (Miyato et al., ICLR 2018).

    σ comes from one step of the power iteration in each call; where no gradient is wanted (sheets, evaluation) the step
    leaves no trace. torch's own would work in bf16 under autocast, and takes 15 steps when it is made.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(len(weight)), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            with torch.no_grad():
                v = F.normalize(matrix.T @ self.u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
            if torch.is_grad_enabled():
                self.u.copy_(u)
            return weight * (u @ matrix @ v).reciprocal()  # its backward takes fewer passes than a division's


class NoiseDropout(nn.Module):
    """Half of all values are dropped and the others doubled, in use as in training: pix2pix's only noise (Sec. 3.1).

    While training every call draws from torch's random state. In evaluation mode what is kept never changes, is the
    same for every picture, and repeats itself with the period ``side`` in both directions, so that a picture's
    translation depends on nothing else. Takes (B, dim, H, W), H and W multiples of ``side`` then.
    """

    def __init__(self, dim: int, side: int):
        super().__init__()
        kept = np.random.default_rng((12, side)).random((1, dim, side, side)) < 0.5  # 12: see datasets.py, "Randomness"
        self.register_buffer("kept", torch.from_numpy(kept), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.dropout(x, 0.5)
        side = self.kept.shape[-1]
        return 2 * x * self.kept.tile(1, 1, x.shape[2] // side, x.shape[3] // side)


@contextmanager
def in_use(network: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode for the block: pictures to be looked at draw nothing from the random state of training."""
    try:
        yield network.eval()
    finally:
        network.train()


def check_size(x: Tensor, multiple: int, least: int) -> None:
    height, width = x.shape[-2:]
    if height % multiple or width % multiple or min(height, width) < least:
        raise ValueError(
            f"picture of {height} x {width} pixels: expected both sides to be multiples of {multiple} "
            f"and at least {least}"
        )


# ----------------------------------------------------------------------------------------------------------
#  Generators
# ----------------------------------------------------------------------------------------------------------


class AttentionGenerator(nn.Module):
    """The generator of AttentionGAN, scheme II (Tang et al., TNNLS 2021, Sec. III-A).

    A shared encoder feeds a content head (n_masks - 1 pictures, tanh) and an attention head (n_masks masks,
    softmax); the output is the sum of contents × foreground masks + input × background mask.

    Takes (B, channels, H, W) in [-1, 1], H and W multiples of ``size_multiple`` and at least ``min_size``
    (ValueError otherwise); returns a ``Translation`` with all three parts. ``attention_kernel`` is the size of
    the attention head's last convolution: 1 as in the official code, 7 as the paper writes it (c7s1-10).
    Without ``background`` every mask has a content and nothing of the input is kept, the official code's variant
    for changes of shape (selfie2anime). ``upsample``: see ``enlarge``.
    """

    size_multiple = 4
    min_size = 8

    def __init__(
        self,
        channels: int = 3,
        ngf: int = 64,
        n_residual_blocks: int = 9,
        n_masks: int = 10,
        attention_kernel: int = 1,
        background: bool = True,
        upsample: str = "transposed",
    ):
        super().__init__()
        self.settings = dict(
            channels=channels,
            ngf=ngf,
            n_residual_blocks=n_residual_blocks,
            n_masks=n_masks,
            attention_kernel=attention_kernel,
            background=background,
            upsample=upsample,
        )
        n_contents = n_masks - 1 if background else n_masks
        self.encoder = encoder(channels, ngf, n_residual_blocks)
        self.content_head = decoder(ngf, n_contents * channels, 7, upsample)
        self.attention_head = decoder(ngf, n_masks, attention_kernel, upsample)
        init_weights(self)

    def forward(self, x: Tensor) -> Translation:
        check_size(x, self.size_multiple, self.min_size)
        features = self.encoder(x)  # (B, 4 ngf, H/4, W/4)
        content = torch.tanh(at_least_float32(self.content_head(features)))  # (B, (n - 1) channels, H, W)
        content = content.unflatten(1, (-1, x.shape[1]))  # (B, n - 1, channels, H, W)
        attention = at_least_float32(self.attention_head(features)).softmax(dim=1)  # (B, n, H, W)
        image = (content * attention[:, : content.shape[1], None]).sum(dim=1)  # (B, channels, H, W)
        if self.settings["background"]:
            image = image + x * attention[:, -1:]
        return Translation(image, attention, content)


class SingleMaskGenerator(nn.Module):
    """The generator of AttentionGAN, scheme I (Tang et al., TNNLS 2021, Sec. III-A): CycleGAN's with one output more.

    One mask (sigmoid) and one content picture (tanh): content × mask + input × (1 - mask). Takes (B, channels, H, W)
    in [-1, 1], H and W multiples of ``size_multiple`` and at least ``min_size`` (ValueError otherwise); returns a
    ``Translation`` whose masks are that one and the background, 1 - mask. ``upsample``: see ``enlarge``.
    """

    size_multiple = 4
    min_size = 8

    def __init__(self, channels: int = 3, ngf: int = 64, n_residual_blocks: int = 9, upsample: str = "transposed"):
        super().__init__()
        self.settings = dict(channels=channels, ngf=ngf, n_residual_blocks=n_residual_blocks, upsample=upsample)
        self.encoder = encoder(channels, ngf, n_residual_blocks)
        self.decoder = decoder(ngf, 1 + channels, 7, upsample)
        init_weights(self)

    def forward(self, x: Tensor) -> Translation:
        check_size(x, self.size_multiple, self.min_size)
        raw = at_least_float32(self.decoder(self.encoder(x)))  # (B, 1 + channels, H, W)
        mask, content = torch.sigmoid(raw[:, :1]), torch.tanh(raw[:, 1:])
        return Translation(content * mask + x * (1 - mask), torch.cat([mask, 1 - mask], dim=1), content[:, None])


class ResNetGenerator(nn.Module):
    """The generator of CycleGAN (Zhu et al., ICCV 2017, Appendix 7.2): c7s1-64, d128, d256, R256 × 9, u128, u64,
    c7s1-3, tanh.

    Takes (B, channels, H, W) in [-1, 1], H and W multiples of ``size_multiple`` and at least ``min_size``
    (ValueError otherwise); returns a ``Translation`` with the picture alone. ``upsample``: see ``enlarge``.
    """

    size_multiple = 4
    min_size = 8

    def __init__(self, channels: int = 3, ngf: int = 64, n_residual_blocks: int = 9, upsample: str = "transposed"):
        super().__init__()
        self.settings = dict(channels=channels, ngf=ngf, n_residual_blocks=n_residual_blocks, upsample=upsample)
        self.encoder = encoder(channels, ngf, n_residual_blocks)
        self.decoder = decoder(ngf, channels, 7, upsample)
        init_weights(self)

    def forward(self, x: Tensor) -> Translation:
        check_size(x, self.size_multiple, self.min_size)
        return Translation(torch.tanh(at_least_float32(self.decoder(self.encoder(x)))))


class UNetGenerator(nn.Module):
    """The U-Net of pix2pix (Isola et al., CVPR 2017, Appendix 6.1.1), as in the official PyTorch code.

    ``depth`` convolutions of stride 2 (C64-C128-C256-C512-C512-…, 4×4, LeakyReLU 0.2) and as many transposed ones
    (ReLU), each of which but the innermost also sees the output of its mirror image. InstanceNorm with factors and
    biases stands where the paper has BatchNorm, and computes what that computes at the paper's batch of 1: not in the
    first, the innermost and the last. Dropout is in the decoder's blocks of equal width but the innermost: three at
    depth 8, two at 7, none below 6; see ``NoiseDropout``.

    Takes (B, channels, H, W) in [-1, 1], H and W multiples of 2 ** depth (ValueError otherwise); returns a
    ``Translation`` with the picture alone.
    """

    def __init__(self, channels: int = 3, ngf: int = 64, depth: int = 8):
        super().__init__()
        self.settings = dict(channels=channels, ngf=ngf, depth=depth)
        self.size_multiple = self.min_size = 2**depth
        dims = [ngf * min(2**i, 8) for i in range(depth)]
        self.first = nn.Conv2d(channels, dims[0], 4, stride=2, padding=1, bias=False)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i in range(1, depth):
            norm = [InstanceNorm2d(dims[i], affine=True)] if i < depth - 1 else []  # a single pixel has no deviation
            conv = nn.Conv2d(dims[i - 1], dims[i], 4, stride=2, padding=1, bias=False)
            self.down.append(nn.Sequential(nn.LeakyReLU(0.2), conv, *norm))
        for i in reversed(range(1, depth)):
            innermost = i == depth - 1
            conv = nn.ConvTranspose2d(dims[i] * (1 if innermost else 2), dims[i - 1], 4, 2, padding=1, bias=False)
            noise = [] if innermost or dims[i - 1] < 8 * ngf else [NoiseDropout(dims[i - 1], 2 ** (depth - i))]
            norm = InstanceNorm2d(dims[i - 1], affine=True)
            self.up.append(nn.Sequential(nn.ReLU(inplace=True), conv, norm, *noise))
        self.last = nn.Sequential(
            nn.ReLU(inplace=True), nn.ConvTranspose2d(2 * dims[0], channels, 4, stride=2, padding=1)
        )
        init_weights(self)

    def forward(self, x: Tensor) -> Translation:
        check_size(x, self.size_multiple, self.min_size)
        x = self.first(x)  # (B, ngf, H/2, W/2)
        passed = []
        for down in self.down:
            passed.append(x)
            x = down(x)
        for up in self.up:
            x = torch.cat([passed.pop(), up(x)], dim=1)
        return Translation(torch.tanh(at_least_float32(self.last(x))))


class UGATITGenerator(nn.Module):
    """The generator of U-GAT-IT (Kim et al., ICLR 2020, Appendix), as in the official PyTorch code.

    An encoder, a CAM whose features give γ and β by a small MLP, ``n_residual_blocks`` blocks with AdaLIN on them, and
    a decoder with ILN. ``size``, (height, width), is the one picture size that the full network takes, because its MLP
    reads the features of every place; None makes the light one, whose MLP reads their average over the picture. Takes
    (B, channels, H, W) in [-1, 1], H and W multiples of ``size_multiple`` and at least ``min_size`` (ValueError
    otherwise); returns a ``Translation`` with picture, CAM logits and heat map.

    ``init``: "normal" draws all weights from N(0, 0.02) as the paper says; "default" leaves them as torch drew them,
    which the official PyTorch code does.
    """

    size_multiple = 4
    min_size = 8

    def __init__(
        self,
        channels: int = 3,
        ngf: int = 64,
        n_residual_blocks: int = 4,
        size: tuple[int, int] | None = None,
        init: str = "normal",
    ):
        super().__init__()
        self.settings = dict(channels=channels, ngf=ngf, n_residual_blocks=n_residual_blocks, size=size)
        dim = 4 * ngf
        places = 1 if size is None else (size[0] // 4) * (size[1] // 4)
        self.encoder = encoder(channels, ngf, n_residual_blocks, down_padding="reflect")
        self.cam = CAM(dim)
        self.mlp = nn.Sequential(
            nn.Linear(places * dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.ReLU()
        )
        self.gamma, self.beta = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.blocks = nn.ModuleList(AdaLINBlock(dim) for _ in range(n_residual_blocks))
        self.decoder = nn.Sequential(
            *enlarge(dim, "nearest"),
            ILN(2 * ngf),
            nn.ReLU(),
            *enlarge(2 * ngf, "nearest"),
            ILN(ngf),
            nn.ReLU(),
            ReflectionConv2d(ngf, channels, 7, bias=False),
        )
        if init == "normal":
            init_weights(self)

    def forward(self, x: Tensor) -> Translation:
        check_size(x, self.size_multiple, self.min_size)
        size = self.settings["size"]
        if size is not None and x.shape[-2:] != size:
            raise ValueError(f"picture of {x.shape[-2]} x {x.shape[-1]} pixels: {one_size(size)}")
        features, logits = self.cam(self.encoder(x))
        features = F.relu(features)  # (B, 4 ngf, H/4, W/4)
        seen = features.mean(dim=(2, 3)) if size is None else features.flatten(1)
        style = self.mlp(seen)  # (B, 4 ngf)
        gamma, beta = self.gamma(style), self.beta(style)
        painted = features
        for block in self.blocks:
            painted = block(painted, gamma, beta)
        image = torch.tanh(at_least_float32(self.decoder(painted)))
        return Translation(image, cam_logits=logits, heat_map=heat_map(features, x.shape[-2:]))


class DCGANGenerator(nn.Module):
    """The generator of DCGAN (Radford et al., ICLR 2016): noise is projected to 4×4, then doubled up to ``size``.

    BatchNorm and ReLU follow every layer but the last, which ends in tanh. ``upsample``: "transposed" doubles by
    transposed convolutions (4×4, stride 2) as the paper, "nearest" repeats pixels and convolves (3×3), with channels
    wide enough to have as many parameters (see ``noise_widths``). ``size`` is one of ``sizes``.

    Takes (B, nz) noise, as it was trained on; returns (B, channels, size, size) in [-1, 1]. In evaluation mode
    BatchNorm uses its running statistics, and a picture does not depend on the others of its batch.
    """

    sizes = (16, 32, 64, 128)

    def __init__(self, nz: int = 100, ngf: int = 64, channels: int = 3, size: int = 64, upsample: str = "transposed"):
        super().__init__()
        self.settings = dict(nz=nz, ngf=ngf, channels=channels, size=size, upsample=upsample)
        widths = noise_widths(nz, ngf, channels, size, upsample)
        layers: list[nn.Module] = [nn.ConvTranspose2d(nz, widths[0], 4, bias=False)]  # of one pixel: a projection
        for width, following in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            if upsample == "transposed":
                layers += [nn.ConvTranspose2d(width, following, 4, stride=2, padding=1, bias=False)]
            else:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, following, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers)
        init_weights(self)

    def forward(self, noise: Tensor) -> Tensor:
        return torch.tanh(at_least_float32(self.layers(noise[:, :, None, None])))


def noise_widths(nz: int, ngf: int, channels: int, size: int, upsample: str) -> list[int]:
    """Channels of DCGAN's generator at 4×4, 8×8, … up to half of ``size``: halved each time, ``ngf`` at the last.

    With "nearest", whose 3×3 kernels have fewer weights, ``ngf`` gives way to the number that brings the parameters
    nearest to those of the transposed one.
    """

    def widths(last: int) -> list[int]:
        return [last * size // 2 ** (i + 3) for i in range(int(math.log2(size)) - 2)]

    def parameters(dims: list[int], kernel: int) -> int:
        weights = sum(a * b for a, b in zip(dims, [*dims[1:], channels], strict=True))
        return 16 * nz * dims[0] + kernel**2 * weights + 2 * sum(dims)

    if upsample == "transposed":
        return widths(ngf)
    wanted = parameters(widths(ngf), 4)
    return widths(min(range(ngf, 2 * ngf), key=lambda last: abs(parameters(widths(last), 3) - wanted)))


def one_size(size: tuple[int, int]) -> str:
    """Why a generator refuses pictures that are not of ``size``, (height, width)."""
    return f"the full U-GAT-IT takes pictures of its training size alone, {size[0]} x {size[1]} (the light one any)"


def translate_any_size(generator: nn.Module, images: Tensor) -> Translation:
    """``generator`` on pictures of any size, (B, channels, H, W), H and W at least 1; the parts have their size.

    What the generator's ``size_multiple`` and ``min_size`` ask for is added at the right and at the bottom by
    repeating the edge, and cut off again. ValueError where the generator takes one size alone and this is another.
    """
    height, width = images.shape[-2:]
    multiple, least = generator.size_multiple, generator.min_size
    fitting_height, fitting_width = ((max(n, least) + multiple - 1) // multiple * multiple for n in (height, width))
    padded = F.pad(images, (0, fitting_width - width, 0, fitting_height - height), mode="replicate")
    # All parts but the logits are pictures.
    return Translation(*(p if p is None or p.ndim == 2 else p[..., :height, :width] for p in generator(padded)))


# ----------------------------------------------------------------------------------------------------------
#  Discriminators
# ----------------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., CVPR 2017): C64-C128-C256-C512-1, 4×4, LeakyReLU 0.2, InstanceNorm but in the first.

    Every logit judges one patch: 70×70 pixels with ``n_layers`` 3 (34×34 with 2, 142×142 with 4). ``affine`` norms have
    factors and biases, like the BatchNorm of pix2pix. Takes (B, channels, H, W), each side at least ``min_size``;
    returns a tuple of one logit map, (B, 1, H/8 - 2, W/8 - 2) with 3 layers.
    """

    def __init__(self, channels: int = 3, ndf: int = 64, n_layers: int = 3, affine: bool = False):
        super().__init__()
        self.min_size = 3 * 2**n_layers  # below, the last norm would see a single pixel
        dims = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(1, n_layers + 1):
            stride = 2 if i < n_layers else 1
            layers += [
                nn.Conv2d(dims[i - 1], dims[i], 4, stride, padding=1, bias=False),
                InstanceNorm2d(dims[i], affine=affine),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers += [nn.Conv2d(dims[-1], 1, 4, padding=1)]
        self.layers = nn.Sequential(*layers)
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (at_least_float32(self.layers(x)),)


class CAMDiscriminator(nn.Module):
    """One scale of U-GAT-IT's discriminators: spectral norm, reflection padding, 4×4, LeakyReLU 0.2, a CAM.

    ``n_layers`` - 2 convolutions of stride 2 and one of stride 1, each but the first with twice the channels, then the
    CAM and the verdict; the paper's are 7 (global) and 5 (local), at 256 × 256. Takes (B, channels, H, W), each side at
    least ``min_size``; returns the logit map, (B, 1, H/s - 2, W/s - 2) with s = 2 ** (n_layers - 2), and the CAM's
    logits, (B, 2). Every call that keeps a graph is a step of the power iteration, so real and translated pictures go
    through in calls of their own, as in the official code. ``init``: see ``UGATITGenerator``.
    """

    def __init__(self, channels: int = 3, ndf: int = 64, n_layers: int = 5, init: str = "normal"):
        super().__init__()
        self.min_size = 3 * 2 ** (n_layers - 2)  # below, the verdict could not reflect its border
        dims = [channels, *(ndf * 2**i for i in range(n_layers - 1))]
        strides = [2] * (n_layers - 2) + [1]
        self.layers = nn.ModuleList(
            ReflectionConv2d(dims[i], dims[i + 1], 4, stride) for i, stride in enumerate(strides)
        )
        self.cam = CAM(dims[-1])
        self.verdict = ReflectionConv2d(dims[-1], 1, 4, bias=False)
        if init == "normal":
            init_weights(self)
        for layer in (*self.layers, self.cam.average, self.cam.maximum, self.verdict):
            # "unsafe" leaves out a trial call, for which there is no autocast on the meta device.
            register_parametrization(layer, "weight", SpectralNorm(layer.weight), unsafe=True)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        features, logits = self.cam(x)
        return F.leaky_relu(features, 0.2), logits

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features, logits = self.attend(x)
        return at_least_float32(self.verdict(features)), logits

    @torch.no_grad()
    def heat_map(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) in [0, 1]: where it looks."""
        return heat_map(self.attend(x)[0], x.shape[-2:])


class DCGANDiscriminator(nn.Module):
    """The discriminator of DCGAN (Radford et al., ICLR 2016): 4×4 convolutions of stride 2 down to 4×4, LeakyReLU 0.2.

    ``ndf`` channels at first, doubled with every halving; BatchNorm but in the first. Takes (B, channels, size, size),
    real and generated pictures in calls of their own, because BatchNorm sees the batch; returns a tuple of one logit
    for each picture, (B,).
    """

    def __init__(self, channels: int = 3, ndf: int = 64, size: int = 64):
        super().__init__()
        dims = [ndf * 2**i for i in range(int(math.log2(size)) - 2)]
        layers: list[nn.Module] = [
            nn.Conv2d(channels, ndf, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for width, following in pairwise(dims):
            layers += [
                nn.Conv2d(width, following, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(following),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers += [nn.Conv2d(dims[-1], 1, 4, bias=False)]
        self.layers = nn.Sequential(*layers)
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (at_least_float32(self.layers(x)).flatten(),)


def depths(size: int) -> tuple[int, int]:
    """``n_layers`` of the global and the local discriminator for pictures whose shorter side is ``size`` pixels.

    The paper's 7 and 5 from 256 pixels on, one less for every halving, so that what a logit sees of the picture stays
    the same, down to 4 and 3.
    """
    n_layers = min(7, max(4, int(math.log2(size)) - 1))
    return n_layers, max(3, n_layers - 2)


# ----------------------------------------------------------------------------------------------------------
#  Replay buffer
# ----------------------------------------------------------------------------------------------------------


class ReplayBuffer(nn.Module):
    """A history of generated pictures for the discriminator (Shrivastava et al., 2017; CycleGAN Sec. 4).

    Until ``size`` pictures are stored each new one is stored and handed back. After that, with probability
    1/2, a stored picture is handed back and the new one takes its place, else the new one passes through.
    What happens to the k-th picture is a pure function of (seed, k), so ``state_dict`` (the stored pictures
    and k) is all that resuming needs. ``size`` 0 hands every picture straight back.
    """

    def __init__(self, size: int = 50, seed: Sequence[int] = (0,)):
        super().__init__()
        self.size = size
        self.seed = tuple(seed)
        self.seen = 0
        self.stored: Tensor | None = None  # (size, channels, H, W), filled up to min(seen, size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) new pictures in, as many new or old ones out, detached."""
        images = images.detach()
        if self.size == 0:
            return images
        if self.stored is None:
            self.stored = images.new_zeros(self.size, *images.shape[1:])
        self.stored = self.stored.to(images)
        handed = images.clone()
        for i, image in enumerate(images):
            if self.seen < self.size:
                self.stored[self.seen] = image
            else:
                rng = np.random.default_rng((3, *self.seed, self.seen))  # 3: see datasets.py, "Randomness"
                if rng.random() < 0.5:
                    slot = int(rng.integers(self.size))
                    handed[i] = self.stored[slot]
                    self.stored[slot] = image
            self.seen += 1
        return handed

    def get_extra_state(self) -> dict[str, Any]:
        # On the CPU, so that ranks can hand theirs to another whatever its devices.
        stored = None if self.stored is None else self.stored[: min(self.seen, self.size)].to("cpu", copy=True)
        return {"seen": self.seen, "stored": stored}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self.stored = None
        if state["stored"] is not None:
            self.stored = state["stored"].new_zeros(self.size, *state["stored"].shape[1:])
            self.stored[: len(state["stored"])] = state["stored"]


# ----------------------------------------------------------------------------------------------------------
#  Generators on disk
# ----------------------------------------------------------------------------------------------------------

GENERATORS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        AttentionGenerator,
        SingleMaskGenerator,
        ResNetGenerator,
        UNetGenerator,
        UGATITGenerator,
        DCGANGenerator,
    )
}


def pack_generator(generator: nn.Module) -> dict[str, Any]:
    """Weights and what is needed to build the network again: plain values, for ``load_generator``."""
    return {
        "generator": type(generator).__name__,
        "settings": dict(generator.settings),
        "weights": generator.state_dict(),
    }


def load_generator(path: str | Path, direction: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Open a generator file: one that ``train.py`` wrote, or an official checkpoint (see ``load_official``).

    ``direction`` says which of two generators is meant, where a file holds both. Returns the generator in float32 on
    the CPU, and what the file says of itself (direction, options, epoch: empty for most official files; "directions"
    where it holds both). Raises FileNotFoundError, or ValueError when the file holds no generator.
    """
    content = _read(path)
    if "generator" not in content:
        generator = load_official(path, direction)
        about: dict[str, Any] = {}
        if generator.settings.get("size") is not None:
            about["options"] = dict(zip(("img_height", "img_width"), generator.settings["size"], strict=True))
        if content.keys() >= set(UGATIT_NAMES.values()):
            about |= {"direction": direction or "AtoB", "directions": tuple(UGATIT_NAMES)}
        return generator, about
    if content["generator"] not in GENERATORS:
        raise ValueError(f"{path}: unknown generator {content['generator']!r}, expected one of {sorted(GENERATORS)}")
    try:
        generator = GENERATORS[content["generator"]](**content["settings"])
        generator.load_state_dict(content["weights"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: weights and settings do not fit {content['generator']} ({error})") from error
    return generator, {k: v for k, v in content.items() if k not in ("generator", "settings", "weights")}


def open_generator(where: str | Path, direction: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """``load_generator`` for a run, shipped weights, a folder or a file (see ``utils.find_generator``).

    What it says of itself always has its direction. Raises InputError when there is no generator for ``direction``
    ("AtoB", "BtoA", or None: a file's own, else "AtoB"; ``NOISE`` for one that draws from noise).
    """
    path = find_generator(where, direction)
    shipped = places(where)[-1] / path.name
    if shipped.is_file() and path != shipped:
        say(f"{where}: taking {path}, not {shipped}")
    way = None if direction == NOISE else direction
    try:
        generator, about = load_generator(path, way)
    except ValueError as error:
        raise InputError(str(error)) from error
    if "direction" not in about:  # official files tell it by their names alone
        about["direction"] = "BtoA" if path.stem.endswith("_B") else way or "AtoB"
    if about["direction"] == NOISE != direction:
        raise InputError(f"{path}: draws pictures from noise (generate.py shows them) and translates none")
    if direction == NOISE != about["direction"]:
        raise InputError(f"{path}: translates {about['direction']}, expected a generator that draws from noise (dcgan)")
    if direction is not None and about["direction"] != direction:
        raise InputError(f"{path}: translates {about['direction']}, expected {direction} (a folder serves both)")
    return generator, about


def open_generators(where: str | Path, noise: bool = False) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """``open_generator`` for every direction that ``where`` has: both for most folders and runs, one for most files.

    With ``noise`` it is the one generator that draws from noise. Raises InputError when there is none.
    """
    if noise:
        return {NOISE: open_generator(where, NOISE)}
    if any(place.is_file() for place in places(where)):
        generator, about = open_generator(where)
        others = [d for d in about.get("directions", ()) if d != about["direction"]]
        return {about["direction"]: (generator, about)} | {d: open_generator(where, d) for d in others}
    opened = {}
    for direction in ("AtoB", "BtoA"):
        try:
            find_generator(where, direction)
        except InputError:
            continue
        opened[direction] = open_generator(where, direction)
    return opened or {"AtoB": open_generator(where, "AtoB")}


# Where the official U-GAT-IT code keeps the generator of each direction, in one file with the discriminators.
UGATIT_NAMES = {"AtoB": "genA2B", "BtoA": "genB2A"}


def load_official(path: str | Path, direction: str | None = None) -> nn.Module:
    """Open a generator of the official AttentionGAN, pytorch-CycleGAN-and-pix2pix or UGATIT-pytorch code.

    Accepted: AttentionGAN's ``latest_net_G_A.pth`` (``conv1.weight`` … ``deconv3_attention.bias``), with a background
    mask or, as AttentionGAN-geo, without; the ``resnet_6blocks`` / ``resnet_9blocks`` generators of CycleGAN
    (``model.1.weight`` …); U-GAT-IT's ``<data set>_params_<step>.pt``, of which ``direction`` (None: "AtoB") takes
    ``genA2B`` or ``genB2A``, or one of these alone (``DownBlock.1.weight`` …), full or light. Each with or without a
    ``module.`` in front. Sizes are read from the weights. Biases (and running statistics) that InstanceNorm
    cancels are dropped, so the network computes the same function.

    Returns the generator in float32 on the CPU. Raises FileNotFoundError, or ValueError that names the keys
    that were expected and those that were found.
    """
    content = _read(path)
    weights = {k.removeprefix("module."): v for k, v in content.get(UGATIT_NAMES[direction or "AtoB"], content).items()}
    cancelled: set[str] = set()  # U-GAT-IT's has no biases that a norm cancels
    if "conv1.weight" in weights and "deconv3_attention.weight" in weights:
        n_blocks = sum(k.startswith("resnet_blocks.") and k.endswith(".conv1.weight") for k in weights)
        stem, head = weights["conv1.weight"], weights["deconv3_attention.weight"]
        contents = weights.get("deconv3_content.weight", stem).shape[0] // stem.shape[1]
        background = contents != head.shape[0]  # AttentionGAN-geo has a content for every mask
        generator: nn.Module = AttentionGenerator(
            stem.shape[1], stem.shape[0], n_blocks, head.shape[0], head.shape[-1], background
        )
        names = [
            *(f"conv{i}.weight" for i in (1, 2, 3)),
            *(f"resnet_blocks.{i}.conv{j}.weight" for i in range(n_blocks) for j in (1, 2)),
            *(f"deconv{i}_content.{w}" for i, w in ((1, "weight"), (2, "weight"), (3, "weight"), (3, "bias"))),
            *(f"deconv{i}_attention.{w}" for i, w in ((1, "weight"), (2, "weight"), (3, "weight"), (3, "bias"))),
        ]
        cancelled = {n.removesuffix("weight") + "bias" for n in names} - set(names)
    elif "model.1.weight" in weights and "model.10.conv_block.1.weight" in weights:
        n_blocks = sum(k.endswith(".conv_block.1.weight") for k in weights)
        stem, n = weights["model.1.weight"], n_blocks  # what follows the blocks is numbered on from them
        generator = ResNetGenerator(stem.shape[1], stem.shape[0], n_blocks)
        names = [
            *(f"model.{i}.weight" for i in (1, 4, 7)),
            *(f"model.{10 + i}.conv_block.{j}.weight" for i in range(n) for j in (1, 5)),
            *(f"model.{i}" for i in (f"{10 + n}.weight", f"{13 + n}.weight", f"{17 + n}.weight", f"{17 + n}.bias")),
        ]
        cancelled = {n.removesuffix("weight") + "bias" for n in names} - set(names)
    elif "DownBlock.1.weight" in weights and "FC.0.weight" in weights:
        n_blocks = sum(k.startswith("UpBlock1_") and k.endswith(".conv1.weight") for k in weights)
        stem, (dim, inputs) = weights["DownBlock.1.weight"], weights["FC.0.weight"].shape
        side = 4 * math.isqrt(inputs // dim)  # pictures were square; the light network's MLP reads a single place
        generator = UGATITGenerator(stem.shape[1], stem.shape[0], n_blocks, None if inputs == dim else (side, side))
        names = [
            *(f"DownBlock.{i}.weight" for i in (1, 5, 9)),
            *(f"DownBlock.{12 + i}.conv_block.{j}.weight" for i in range(n_blocks) for j in (1, 5)),
            *("gap_fc.weight", "gmp_fc.weight", "conv1x1.weight", "conv1x1.bias"),
            *("FC.0.weight", "FC.2.weight", "gamma.weight", "beta.weight"),
            *(
                f"UpBlock1_{1 + i}.{part}{j}.{w}"
                for i in range(n_blocks)
                for j in (1, 2)
                for part, w in (("conv", "weight"), ("norm", "rho"))
            ),
            *("UpBlock2.2.weight", *(f"UpBlock2.3.{w}" for w in ("rho", "gamma", "beta"))),
            *("UpBlock2.7.weight", *(f"UpBlock2.8.{w}" for w in ("rho", "gamma", "beta"))),
            "UpBlock2.11.weight",
        ]
    else:
        raise ValueError(
            f"{path}: not an official generator. Expected AttentionGAN's keys (conv1.weight … "
            "deconv3_attention.bias), CycleGAN's (model.1.weight … model.26.bias of resnet_9blocks) or U-GAT-IT's "
            f"(genA2B and genB2A, each DownBlock.1.weight … UpBlock2.11.weight); found {_some(weights)}"
        )
    # Ours stand in the same order as `names`, network part by network part.
    found = {
        k
        for k in weights
        if k not in cancelled and not k.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    if found != set(names):
        raise ValueError(
            f"{path}: keys do not fit {type(generator).__name__}. Expected but missing: "
            f"{_some(set(names) - found)}; found but not expected: {_some(found - set(names))}"
        )
    shapes = {official: tensor.shape for official, tensor in zip(names, generator.state_dict().values(), strict=True)}
    wrong = [k for k in names if weights[k].shape != shapes[k]]
    if wrong:
        k = wrong[0]
        raise ValueError(f"{path}: {k} has shape {tuple(weights[k].shape)}, expected {tuple(shapes[k])}")
    generator.load_state_dict(dict(zip(generator.state_dict(), (weights[k] for k in names), strict=True)))
    return generator


def _read(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the weights of a generator")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what it likes: EOFError, RuntimeError, UnpicklingError, ...
        raise ValueError(f"{path}: not a readable weights file ({first_line(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: expected a dictionary of weights by their names, found {type(content).__name__}")
    return content


def _some(keys: Any, most: int = 6) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "") if names else "nothing"
