"""The networks: generators, discriminators and the replay buffer.

Pictures are float tensors of shape (B, channels, H, W) with values in [-1, 1]. A discriminator returns a tuple of
logits.

Convolutions that are followed by InstanceNorm or BatchNorm have no bias. The norm would subtract it again, so its
gradient is exactly zero, and Adam would turn the rounding noise of that zero into a random walk.
"""

from __future__ import annotations

from utils import InputError

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

NOISE = "generator"  # stands in the place of a direction for a generator that draws from noise


class Translation(NamedTuple):
    """What a generator made of a batch of pictures. Parts that it does not have are None.

    image: (B, channels, H, W) in [-1, 1], the translated pictures.
    attention: (B, n_masks, H, W) in [0, 1], each pixel's masks sum to 1, the last one is the background unless every
        mask has a content.
    content: (B, n_masks - 1, channels, H, W) in [-1, 1], one picture per foreground mask.
    cam_logits: (B, 2), the verdicts of a class activation map's classifiers (average and maximum pooling) on whether
        the input is of the source domain.
    heat_map: (B, 1, H, W) in [0, 1], that class activation map as the official code shows it (see ``heat_map``).
    """

    image: Tensor
    attention: Tensor | None = None
    content: Tensor | None = None
    cam_logits: Tensor | None = None
    heat_map: Tensor | None = None

    @property
    def foreground(self) -> Tensor | None:
        """(B, 1, H, W) in [0, 1]: where the generator paints, or looks; None where nothing tells.

        1 - background mask, or the heat map of a generator without masks.
        """
        if self.attention is None:
            return self.heat_map
        has_background = self.content is None or self.content.shape[1] < self.attention.shape[1]
        return 1 - self.attention[:, -1:] if has_background else None


# ----------------------------------------------------------------------------------------------------------
#  Blocks
# ----------------------------------------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """Widen to float32: softmax, tanh, mask fusion and losses need it under bf16 autocast. float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ReflectionConv2d(nn.Conv2d):
    """A convolution with reflection padding of (kernel - 1) // 2. With an odd kernel and stride 1 it keeps the size.

    It pads in the input's own type. Autocast on the CPU would widen to float32, and keep that for the backward pass.
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
            # oneDNN convolves faster in channels_last, but F.instance_norm copies to the default layout and back.
            # F.batch_norm does not, and for a single picture it computes the same.
            affine = self.weight, self.bias
            return torch.cat([F.batch_norm(picture, None, None, *affine, training=True) for picture in x.split(1)])
        return super().forward(x)


def varies(variance: Tensor, eps: float) -> Tensor:
    """Where a channel is more than rounding noise: bool, of the shape of its variances.

    A norm divides by √(variance + ε). In a channel of one value (a black frame, a blank scan) that makes noise and
    gradients 316 times larger, norm by norm, until float32 overflows. U-GAT-IT's norms make such channels zero.
    """
    return variance > 1e-4 * eps


class FlatSafeInstanceNorm2d(InstanceNorm2d):
    """InstanceNorm2d for networks whose padding keeps flat pictures flat; see ``varies``."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        # The norm's mean square is variance / (variance + ε); on the CPU the variance itself takes 30 times as long.
        share = x.detach().square().mean(dim=(2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return x * varies(share, eps=1.0).to(x.dtype)


class ResidualBlock(nn.Module):
    """x + IN(conv(ReLU(IN(conv(x))))), 3×3, reflection padding: (B, dim, H, W) to the same shape."""

    def __init__(self, dim: int, norm: type[nn.Module] = InstanceNorm2d):
        super().__init__()
        self.conv1 = ReflectionConv2d(dim, dim, 3, bias=False)
        self.conv2 = ReflectionConv2d(dim, dim, 3, bias=False)
        self.norm = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.relu(self.norm(self.conv1(x)), inplace=True)))


def norm_relu(dim: int, norm: type[nn.Module]) -> list[nn.Module]:
    return [norm(dim), nn.ReLU(inplace=True)]


def encoder(channels: int, ngf: int, n_residual_blocks: int, reflect: bool = False) -> nn.Sequential:
    """c7s1-ngf, d(2 ngf), d(4 ngf), R(4 ngf) × n: (B, channels, H, W) to (B, 4 ngf, H/4, W/4).

    ``reflect`` (U-GAT-IT): reflection padding in the convolutions of stride 2 too, and norms for flat pictures.
    """
    down = ReflectionConv2d if reflect else partial(nn.Conv2d, padding=1)
    norm = FlatSafeInstanceNorm2d if reflect else InstanceNorm2d
    return nn.Sequential(
        ReflectionConv2d(channels, ngf, 7, bias=False),
        *norm_relu(ngf, norm),
        down(ngf, 2 * ngf, 3, stride=2, bias=False),
        *norm_relu(2 * ngf, norm),
        down(2 * ngf, 4 * ngf, 3, stride=2, bias=False),
        *norm_relu(4 * ngf, norm),
        *(ResidualBlock(4 * ngf, norm) for _ in range(n_residual_blocks)),
    )


def enlarge(dim: int, upsample: str) -> list[nn.Module]:
    """(B, dim, H, W) to (B, dim/2, 2 H, 2 W) by a 3×3 convolution.

    "transposed" as in the papers. "nearest" repeats pixels first (Odena et al., 2016), so that all pixels are computed
    in the same way and no grid pattern can appear.
    """
    if upsample == "transposed":
        return [nn.ConvTranspose2d(dim, dim // 2, 3, stride=2, padding=1, output_padding=1, bias=False)]
    return [nn.Upsample(scale_factor=2), ReflectionConv2d(dim, dim // 2, 3, bias=False)]


def init_weights(network: nn.Module) -> None:
    """Draw every convolution and linear layer from N(0, 0.02), biases zero, in place (CycleGAN, Appendix 7.1).

    The factors of affine norms come from N(1, 0.02), as in the official codes of pix2pix and DCGAN.
    """
    for module in network.modules():
        is_norm = isinstance(module, (InstanceNorm2d, nn.BatchNorm2d))
        if is_norm or isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if isinstance(module.weight, Tensor):  # norms without factors have none
                nn.init.normal_(module.weight, float(is_norm), 0.02)
            if isinstance(module.bias, Tensor):
                nn.init.zeros_(module.bias)


def layer_instance_norm(x: Tensor, rho: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """γ (ρ IN(x) + (1 - ρ) LN(x)) + β (U-GAT-IT, eq. 1), in float32 at least.

    x: (B, C, H, W). rho, gamma, beta: (1 or B, C, 1, 1). IN takes mean and variance over each channel of each picture,
    LN over each picture; the variances are unbiased, as in the official PyTorch code.
    """
    x = at_least_float32(x)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    mean_in = x.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    centred = x - mean_in
    # torch.var_mean takes 30 times as long on the CPU.
    var_in = centred.square().sum(dim=(2, 3), keepdim=True) / (pixels - 1)
    # LN's statistics follow from IN's, which saves a pass over the picture.
    mean_ln = mean_in.mean(dim=1, keepdim=True)  # (B, 1, 1, 1)
    squares = (pixels - 1) * var_in + pixels * (mean_in - mean_ln).square()
    var_ln = squares.sum(dim=1, keepdim=True) / (channels * pixels - 1)
    scale_in = rho * torch.rsqrt(var_in + eps) * varies(var_in, eps)
    scale_ln = (1 - rho) * torch.rsqrt(var_ln + eps) * varies(var_ln, eps)
    # One factor and one summand for each channel, so that the picture is read once.
    return torch.addcmul(beta + gamma * scale_ln * (mean_in - mean_ln), centred, gamma * (scale_in + scale_ln))


class AdaLIN(nn.Module):
    """Adaptive layer-instance normalisation of (B, dim, H, W): γ and β, (B, dim), come with the picture, ρ in [0, 1]
    is learned and starts at 0.9."""

    def __init__(self, dim: int):
        super().__init__()
        self.rho = nn.Parameter(torch.full((1, dim, 1, 1), 0.9))

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        gamma, beta = (at_least_float32(style)[:, :, None, None] for style in (gamma, beta))
        return layer_instance_norm(x, self.rho, gamma, beta)


class ILN(nn.Module):
    """Layer-instance normalisation, (B, dim, H, W) to the same: γ, β and ρ in [0, 1] are learned, ρ starts at 0."""

    def __init__(self, dim: int):
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.gamma = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return layer_instance_norm(x, self.rho, self.gamma, self.beta)


def decoder(
    ngf: int, out_channels: int, kernel: int, upsample: str, norm: type[nn.Module] = InstanceNorm2d, bias: bool = True
) -> nn.Sequential:
    """u(2 ngf), u(ngf), c{kernel}s1: (B, 4 ngf, H/4, W/4) to (B, out_channels, H, W), no activation."""
    return nn.Sequential(
        *enlarge(4 * ngf, upsample),
        *norm_relu(2 * ngf, norm),
        *enlarge(2 * ngf, upsample),
        *norm_relu(ngf, norm),
        ReflectionConv2d(ngf, out_channels, kernel, bias=bias),
    )


class AdaLINBlock(nn.Module):
    """x + AdaLIN(conv(ReLU(AdaLIN(conv(x))))), 3×3, reflection padding: (B, dim, H, W) to the same shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = ReflectionConv2d(dim, dim, 3, bias=False)
        self.norm1 = AdaLIN(dim)
        self.conv2 = ReflectionConv2d(dim, dim, 3, bias=False)
        self.norm2 = AdaLIN(dim)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x), gamma, beta), inplace=True)), gamma, beta)


class CAM(nn.Module):
    """Class activation map (Zhou et al., CVPR 2016) as in U-GAT-IT: amplifies features that separate the domains.

    One linear classifier judges the average of the features over the picture, another their maximum. The features times
    the weights of each classifier are brought back to ``dim`` channels by a 1×1 convolution. Takes (B, dim, H, W);
    returns the same shape, before an activation, and the logits, (B, 2), in float32 at least.
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
    """A class activation map to look at: (B, 1, *size) in [0, 1], without gradient, from (B, dim, h, w).

    The features behind the CAM are summed over channels, scaled to 0 to 1 in each picture, and resized bilinearly.
    """
    heat = at_least_float32(features.detach()).sum(dim=1, keepdim=True)
    least, most = heat.amin(dim=(2, 3), keepdim=True), heat.amax(dim=(2, 3), keepdim=True)
    heat = (heat - least) / (most - least).clamp_min(torch.finfo(heat.dtype).tiny)
    return F.interpolate(heat, size=tuple(size), mode="bilinear")


class SpectralNorm(nn.Module):
    """Parametrises a layer's weight as weight / σ, σ its largest singular value (Miyato et al., ICLR 2018).

    σ comes from one step of the power iteration in each call, not kept where no gradient is wanted (sheets). torch's
    own spectral norm would work in bf16 under autocast, and takes 15 steps when it is created.
    """

    u: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(len(weight)), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            # The columns in their order in memory: flattened in another one, the weight would be copied.
            matrix = weight.permute(weight.dim_order()).flatten(1)
            with torch.no_grad():
                v = F.normalize(matrix.T @ self.u, dim=0)
            product = matrix @ v
            sigma = product.norm()  # uᵀ W v with u = W v / |W v|, and also in the gradient, u vᵀ
            if torch.is_grad_enabled():
                self.u.copy_(product.detach() / sigma.detach())
            return weight * sigma.reciprocal()  # its backward takes fewer passes than a division's


class NoiseDropout(nn.Module):
    """Dropout of one half that also acts when the network is used: pix2pix's only noise (Sec. 3.1).

    In training every call draws from torch's random state. In evaluation mode the dropped values are the same for every
    picture, and repeat with the period ``side`` in both directions. Takes (B, dim, H, W), then multiples of ``side``.
    """

    kept: Tensor

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
def evaluation_mode(network: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode within the block, so that sheets take nothing from the random state of training."""
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


class Generator(nn.Module):
    """Takes pictures (B, channels, H, W) in [-1, 1] and returns a ``Translation``; from noise see ``DCGANGenerator``.

    H and W are multiples of ``size_multiple`` and at least ``min_size``, in pixels (ValueError otherwise). For
    ``upsample`` see ``enlarge``.
    """

    settings: dict[str, Any]  # the constructor's arguments, plain values
    size_multiple: int = 4
    min_size: int = 8


class AttentionGenerator(Generator):
    """The generator of AttentionGAN, scheme II (Tang et al., TNNLS 2021, Sec. III-A).

    A shared encoder feeds a content head (n_masks - 1 pictures, tanh) and an attention head (n_masks masks,
    softmax); the output is the sum of contents × foreground masks + input × background mask. ``attention_kernel`` is
    the size of the attention head's last convolution: 1 as in the official code, 7 as the paper writes it (c7s1-10).
    Without ``background`` every mask has a content and nothing of the input is kept, the official code's variant
    for changes of shape (selfie2anime).
    """

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
        self.settings = dict(channels=channels, ngf=ngf, n_residual_blocks=n_residual_blocks, n_masks=n_masks)
        self.settings |= dict(attention_kernel=attention_kernel, background=background, upsample=upsample)
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


class ResNetGenerator(Generator):
    """The generator of CycleGAN (Zhu et al., ICCV 2017, Appendix 7.2): c7s1-64, d128, d256, R256 × 9, u128, u64,
    c7s1-3, tanh."""

    n_masks = 0  # that the decoder makes besides the picture

    def __init__(self, channels: int = 3, ngf: int = 64, n_residual_blocks: int = 9, upsample: str = "transposed"):
        super().__init__()
        self.settings = dict(channels=channels, ngf=ngf, n_residual_blocks=n_residual_blocks, upsample=upsample)
        self.encoder = encoder(channels, ngf, n_residual_blocks)
        self.decoder = decoder(ngf, self.n_masks + channels, 7, upsample)
        init_weights(self)

    def forward(self, x: Tensor) -> Translation:
        check_size(x, self.size_multiple, self.min_size)
        return Translation(torch.tanh(at_least_float32(self.decoder(self.encoder(x)))))


class SingleMaskGenerator(ResNetGenerator):
    """The generator of AttentionGAN, scheme I (Tang et al., TNNLS 2021, Sec. III-A): CycleGAN's with one output more.

    One mask (sigmoid) and one content picture (tanh): content × mask + input × (1 - mask). The masks that it returns
    are that one and the background, 1 - mask.
    """

    n_masks = 1

    def forward(self, x: Tensor) -> Translation:
        check_size(x, self.size_multiple, self.min_size)
        raw = at_least_float32(self.decoder(self.encoder(x)))  # (B, 1 + channels, H, W)
        mask, content = torch.sigmoid(raw[:, :1]), torch.tanh(raw[:, 1:])
        return Translation(content * mask + x * (1 - mask), torch.cat([mask, 1 - mask], dim=1), content[:, None])


class UNetGenerator(Generator):
    """The U-Net of pix2pix (Isola et al., CVPR 2017, Appendix 6.1.1), as in the official PyTorch code.

    ``depth`` convolutions of stride 2 (C64-C128-C256-C512-C512-…, 4×4, LeakyReLU 0.2) and as many transposed ones
    (ReLU), each of which but the innermost also sees the output of its mirror image. InstanceNorm with factors and
    biases stands where the paper has BatchNorm, and computes what that computes at the paper's batch of 1: not in the
    first, the innermost and the last. Dropout is in the decoder's blocks of equal width but the innermost: three at
    depth 8, two at 7, one at 6, none below; see ``NoiseDropout``. H and W are multiples of 2 ** depth.
    """

    def __init__(self, channels: int = 3, ngf: int = 64, depth: int = 8):
        super().__init__()
        self.settings = dict(channels=channels, ngf=ngf, depth=depth)
        self.size_multiple = self.min_size = 2**depth
        dims = [ngf * min(2**i, 8) for i in range(depth)]
        self.first = nn.Conv2d(channels, dims[0], 4, stride=2, padding=1, bias=False)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i in range(1, depth):
            down: list[nn.Module] = [
                nn.LeakyReLU(0.2),
                nn.Conv2d(dims[i - 1], dims[i], 4, stride=2, padding=1, bias=False),
            ]
            if i < depth - 1:  # the innermost has a single pixel, whose deviation is 0
                down += [InstanceNorm2d(dims[i], affine=True)]
            self.down.append(nn.Sequential(*down))
        for i in reversed(range(1, depth)):
            innermost = i == depth - 1
            up: list[nn.Module] = [
                nn.ReLU(inplace=True),
                nn.ConvTranspose2d(dims[i] * (1 if innermost else 2), dims[i - 1], 4, 2, padding=1, bias=False),
                InstanceNorm2d(dims[i - 1], affine=True),
            ]
            if not innermost and dims[i - 1] == 8 * ngf:
                up += [NoiseDropout(dims[i - 1], 2 ** (depth - i))]
            self.up.append(nn.Sequential(*up))
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


class UGATITGenerator(Generator):
    """The generator of U-GAT-IT (Kim et al., ICLR 2020, Appendix), as in the official PyTorch code.

    An encoder, a CAM whose features give γ and β by a small MLP, ``n_residual_blocks`` blocks with AdaLIN on them, and
    a decoder with ILN. ``size``, (height, width), is the one picture size that the full network takes, because its MLP
    reads the features of every place; None makes the light one, whose MLP reads their average over the picture.
    ``init``: "normal" draws all weights from N(0, 0.02) as the paper says; "default" keeps torch's own, as the official
    PyTorch code does.
    """

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
        self.encoder = encoder(channels, ngf, n_residual_blocks, reflect=True)
        self.cam = CAM(dim)
        self.mlp = nn.Sequential(
            nn.Linear(places * dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.ReLU()
        )
        self.gamma, self.beta = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.blocks = nn.ModuleList(AdaLINBlock(dim) for _ in range(n_residual_blocks))
        self.decoder = decoder(ngf, channels, 7, "nearest", ILN, bias=False)
        if init == "normal":
            init_weights(self)

    def forward(self, x: Tensor) -> Translation:
        check_size(x, self.size_multiple, self.min_size)
        size: tuple[int, int] | None = self.settings["size"]
        if size is not None and x.shape[-2:] != size:
            raise ValueError(f"picture of {x.shape[-2]} x {x.shape[-1]} pixels: {fixed_size_message(size)}")
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


class DCGANGenerator(Generator):
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


def fixed_size_message(size: tuple[int, int]) -> str:
    """Why a generator refuses pictures that are not of ``size``, (height, width)."""
    return (
        f"the full U-GAT-IT takes only pictures of its training size, {size[0]} x {size[1]} (the light one takes any)"
    )


def translate_any_size(generator: Generator, images: Tensor) -> Translation:
    """``generator`` on pictures of any size, (B, channels, H, W), H and W at least 1; the parts have their size.

    Pixels that the generator needs are added at the right and at the bottom by repeating the edge, and cut off again.
    ValueError where the generator takes only one size and this is another.
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
    """PatchGAN (Isola et al., CVPR 2017): C64-C128-C256-C512-1, 4×4, LeakyReLU 0.2, InstanceNorm except in the first.

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
    logits, (B, 2). Every call that keeps a graph is a step of the power iteration, so real and translated pictures are
    separate calls, as in the official code. ``init``: see ``UGATITGenerator``.
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

    ``ndf`` channels at first, doubled with every halving; BatchNorm but in the first. Takes (B, channels, size, size);
    returns a tuple of one logit for each picture, (B,).
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

    The paper's 7 and 5 from 256 pixels on, one less for every halving, down to 4 and 3: a logit sees the same share.
    """
    n_layers = min(7, max(4, int(math.log2(size)) - 1))
    return n_layers, max(3, n_layers - 2)


# ----------------------------------------------------------------------------------------------------------
#  Replay buffer
# ----------------------------------------------------------------------------------------------------------


class ReplayBuffer(nn.Module):
    """A history of generated pictures for the discriminator (Shrivastava et al., 2017; CycleGAN Sec. 4).

    Until ``size`` pictures are stored each new one is stored and handed back. After that, with probability 1/2, a
    stored picture is handed back and the new one takes its place, else the new one passes through. What happens to the
    k-th picture is a pure function of (seed, k), so resuming needs only ``state_dict``. ``size`` 0 stores none.
    """

    def __init__(self, size: int = 50, seed: Sequence[int] = (0,)):
        super().__init__()
        self.size = size
        self.seed = tuple(seed)
        self.seen = 0
        self.stored: Tensor | None = None  # (size, channels, H, W), filled up to min(seen, size)
        self.choices = torch.empty(0)  # (B,) what happens to each picture of the next batch, see ``choose``
        self.chosen = False

    def choose(self, n: int, device: torch.device) -> None:
        """Decide about the next ``n`` pictures, ahead of the call; else the call does it first.

        A picture's choice is -1: it passes through; a slot: it is swapped for what is stored there; ``size`` + a slot:
        it is stored there and handed back. The choices are numbers on the device, the operations are always the same:
        so a captured step (see ``train.CapturedStep``) reads new ones at each replay.
        """
        if self.size == 0:
            return
        if len(self.choices) != n or self.choices.device != device:
            self.choices = torch.empty(n, dtype=torch.long, device=device)
        for i in range(n):
            choice = self.size + self.seen
            if self.seen >= self.size:
                rng = np.random.default_rng((3, *self.seed, self.seen))  # 3: see datasets.py, "Randomness"
                choice = int(rng.integers(self.size)) if rng.random() < 0.5 else -1
            self.choices[i].fill_(choice)  # goes to the device as an argument; copying would wait
            self.seen += 1
        self.chosen = True

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) new pictures in, as many new or old ones out, detached."""
        images = images.detach()
        if self.size == 0:
            return images
        if self.stored is None:
            self.stored = images.new_zeros(self.size, *images.shape[1:])
        if self.stored.shape[1:] != images.shape[1:]:
            found, expected = (" x ".join(map(str, x.shape[1:])) for x in (self.stored, images))
            raise InputError(f"a replay buffer of another run: its pictures are {found}, expected {expected}")
        self.stored = self.stored.to(images)
        if not self.chosen:
            self.choose(len(images), images.device)
        self.chosen = False
        handed = images.clone()
        for new, out, choice in zip(images.split(1), handed.split(1), self.choices.split(1), strict=True):
            slot = choice % self.size
            old = self.stored.index_select(0, slot)
            out.copy_(torch.where((choice >= 0) & (choice < self.size), old, new))
            self.stored.index_copy_(0, slot, torch.where(choice >= 0, new, old))
        return handed

    def get_extra_state(self) -> dict[str, Any]:
        # On the CPU, so that ranks can hand theirs to another whatever its devices.
        stored = None if self.stored is None else self.stored[: min(self.seen, self.size)].to("cpu", copy=True)
        return {"seen": self.seen, "stored": stored}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state that is none of ``get_extra_state``, or not finite."""
        seen, stored = state["seen"], state["stored"]
        n = 0 if stored is None else len(stored)
        if type(seen) is not int or seen < 0 or n != min(seen, self.size):
            raise ValueError(f"a replay buffer of {self.size} has seen {seen!s:.40} pictures and stored {n}")
        if stored is not None and not (stored.is_floating_point() and stored.isfinite().all()):
            raise ValueError("a replay buffer holds pictures that are not finite")
        self.seen, self.stored = seen, None
        if stored is not None:
            self.stored = stored.new_zeros(self.size, *stored.shape[1:])
            self.stored[: len(stored)] = stored
