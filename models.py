"""The networks: generators, discriminators and the replay buffer.

Pictures are float tensors of shape (B, channels, H, W) with values in [-1, 1]. A generator returns a
``Translation``; a discriminator returns a tuple of logit maps (one for the PatchGAN).

Convolutions that are followed by InstanceNorm carry no bias: the norm subtracts it again, its gradient is
exactly zero, and Adam would turn the rounding noise of that zero into a random walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import InputError, find_generator, places


class Translation(NamedTuple):
    """What a generator made of a batch of pictures.

    image: (B, channels, H, W) in [-1, 1], the translated pictures.
    attention: (B, n_masks, H, W), each pixel's masks sum to 1, the last one is the background unless every mask has
        a content; None where the generator has no masks.
    content: (B, n_masks - 1, channels, H, W) in [-1, 1], one picture per foreground mask; None likewise.
    """

    image: Tensor
    attention: Tensor | None = None
    content: Tensor | None = None

    @property
    def foreground(self) -> Tensor | None:
        """(B, 1, H, W) in [0, 1]: the share of each pixel that is new, 1 - background mask; None without that mask."""
        if self.attention is None:
            return None
        has_background = self.content is None or self.content.shape[1] < self.attention.shape[1]
        return 1 - self.attention[:, -1:] if has_background else None


# ----------------------------------------------------------------------------------------------------------
#  Blocks
# ----------------------------------------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """Softmax, tanh, mask fusion and losses want float32 under bf16 autocast; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ReflectionConv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps the size by reflection padding.

    It pads in the input's own type: autocast on the CPU would widen to float32 first, and keep that for the backward
    pass.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x, [side for size in self.kernel_size[::-1] for side in (size // 2, size // 2)], mode="reflect")
        return super().forward(x)


class InstanceNorm2d(nn.InstanceNorm2d):
    """PyTorch's, without affine parameters; (B, C, H, W) to the same shape, on the CPU in the same layout too."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not x.is_contiguous():
            # channels_last, in which oneDNN convolves faster, but F.instance_norm copies to the default layout and
            # back. BatchNorm does not, and for a single picture it is the same.
            return torch.cat([F.batch_norm(picture, None, None, training=True) for picture in x.split(1)])
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


def encoder(channels: int, ngf: int, n_residual_blocks: int) -> nn.Sequential:
    """c7s1-ngf, d(2 ngf), d(4 ngf), R(4 ngf) × n: (B, channels, H, W) to (B, 4 ngf, H/4, W/4)."""
    return nn.Sequential(
        ReflectionConv2d(channels, ngf, 7, bias=False),
        *norm_relu(ngf),
        nn.Conv2d(ngf, 2 * ngf, 3, stride=2, padding=1, bias=False),
        *norm_relu(2 * ngf),
        nn.Conv2d(2 * ngf, 4 * ngf, 3, stride=2, padding=1, bias=False),
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
    """Draw every convolution from N(0, std) and set its bias to zero, in place (CycleGAN, Appendix 7.1)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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
    """The generator of AttentionGAN, scheme II (Tang et al., TNNLS 2021, Sec. III-B).

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


def translate_any_size(generator: nn.Module, images: Tensor) -> Translation:
    """``generator`` on pictures of any size, (B, channels, H, W), H and W at least 1; the parts have their size.

    What the generator's ``size_multiple`` and ``min_size`` ask for is added at the right and at the bottom by
    repeating the edge, and cut off again.
    """
    height, width = images.shape[-2:]
    multiple, least = generator.size_multiple, generator.min_size
    fitting_height, fitting_width = ((max(n, least) + multiple - 1) // multiple * multiple for n in (height, width))
    padded = F.pad(images, (0, fitting_width - width, 0, fitting_height - height), mode="replicate")
    return Translation(*(None if part is None else part[..., :height, :width] for part in generator(padded)))


# ----------------------------------------------------------------------------------------------------------
#  Discriminators
# ----------------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., CVPR 2017): C64-C128-C256-C512-1, 4×4, LeakyReLU 0.2, InstanceNorm but in the first.

    Every logit judges one patch: 70×70 pixels with ``n_layers`` 3 (34×34 with 2, 142×142 with 4). Takes
    (B, channels, H, W), each side at least ``min_size``; returns a tuple of one logit map,
    (B, 1, H/8 - 2, W/8 - 2) with 3 layers.
    """

    def __init__(self, channels: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        self.min_size = 3 * 2**n_layers  # below, the last norm would see a single pixel
        dims = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(1, n_layers + 1):
            stride = 2 if i < n_layers else 1
            layers += [
                nn.Conv2d(dims[i - 1], dims[i], 4, stride, padding=1, bias=False),
                InstanceNorm2d(dims[i]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers += [nn.Conv2d(dims[-1], 1, 4, padding=1)]
        self.layers = nn.Sequential(*layers)
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (at_least_float32(self.layers(x)),)


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
    cls.__name__: cls for cls in (AttentionGenerator, SingleMaskGenerator, ResNetGenerator)
}


def pack_generator(generator: nn.Module) -> dict[str, Any]:
    """Weights and what is needed to build the network again: plain values, for ``load_generator``."""
    return {
        "generator": type(generator).__name__,
        "settings": dict(generator.settings),
        "weights": generator.state_dict(),
    }


def load_generator(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Open a generator file: one that ``train.py`` wrote, or an official checkpoint (see ``load_official``).

    Returns the generator in float32 on the CPU, and what the file says of itself (direction, options, epoch:
    empty for official files). Raises FileNotFoundError, or ValueError when the file holds no generator.
    """
    content = _read(path)
    if "generator" not in content:
        return load_official(path), {}
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
    ("AtoB", "BtoA", or None: a file's own, else "AtoB").
    """
    path = find_generator(where, direction)
    try:
        generator, about = load_generator(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if "direction" not in about:  # official files tell it by their names alone
        about["direction"] = "BtoA" if path.stem.endswith("_B") else direction or "AtoB"
    if direction is not None and about["direction"] != direction:
        raise InputError(f"{path}: translates {about['direction']}, expected {direction} (a folder serves both)")
    return generator, about


def open_generators(where: str | Path) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """``open_generator`` for every direction that ``where`` has: one for a file, both for most folders and runs.

    Raises InputError when there is none.
    """
    if any(place.is_file() for place in places(where)):
        generator, about = open_generator(where)
        return {about["direction"]: (generator, about)}
    opened = {}
    for direction in ("AtoB", "BtoA"):
        try:
            find_generator(where, direction)
        except InputError:
            continue
        opened[direction] = open_generator(where, direction)
    return opened or {"AtoB": open_generator(where, "AtoB")}


def load_official(path: str | Path) -> nn.Module:
    """Open a generator of the official AttentionGAN or pytorch-CycleGAN-and-pix2pix code.

    Accepted: AttentionGAN's ``latest_net_G_A.pth`` (``conv1.weight`` … ``deconv3_attention.bias``), with a background
    mask or, as AttentionGAN-geo, without, and the
    ``resnet_6blocks`` / ``resnet_9blocks`` generators of CycleGAN (``model.1.weight`` …), each with or without
    a ``module.`` in front. Sizes are read from the weights. Biases (and running statistics) that InstanceNorm
    cancels are dropped, so the network computes the same function.

    Returns the generator in float32 on the CPU. Raises FileNotFoundError, or ValueError that names the keys
    that were expected and those that were found.
    """
    weights = {k.removeprefix("module."): v for k, v in _read(path).items()}
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
    elif "model.1.weight" in weights and "model.10.conv_block.1.weight" in weights:
        n_blocks = sum(k.endswith(".conv_block.1.weight") for k in weights)
        stem, n = weights["model.1.weight"], n_blocks  # what follows the blocks is numbered on from them
        generator = ResNetGenerator(stem.shape[1], stem.shape[0], n_blocks)
        names = [
            *(f"model.{i}.weight" for i in (1, 4, 7)),
            *(f"model.{10 + i}.conv_block.{j}.weight" for i in range(n) for j in (1, 5)),
            *(f"model.{i}" for i in (f"{10 + n}.weight", f"{13 + n}.weight", f"{17 + n}.weight", f"{17 + n}.bias")),
        ]
    else:
        raise ValueError(
            f"{path}: not an official generator. Expected AttentionGAN's keys (conv1.weight … "
            "deconv3_attention.bias) or CycleGAN's (model.1.weight … model.26.bias of resnet_9blocks); found "
            f"{_some(weights)}"
        )
    # Ours stand in the same order as `names`: encoder, then content (or picture), then attention head.
    cancelled = {n.removesuffix("weight") + "bias" for n in names} - set(names)
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
        raise ValueError(f"{path}: not a readable weights file ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary of weights, found {type(content).__name__}")
    return content


def _some(keys: Any, most: int = 6) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "") if names else "nothing"
