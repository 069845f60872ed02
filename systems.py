"""How networks train one another: the loss terms, one class per kind of system, its options, and the table ``SYSTEMS``.

A system owns its networks and computes the losses of each player's turn. It knows no optimizer, device, file or rank.

Notation: pictures of domains A and B, ``fake_B = G_AB(real_A)``, ``recovered_A = G_BA(fake_B)``,
``same_A = G_BA(real_A)``; ``D_A`` judges pictures of domain A. Everything is (B, channels, H, W) in [-1, 1].
"""

from __future__ import annotations

from utils import InputError, option

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import (
    ILN,
    NOISE,
    AdaLIN,
    AttentionGenerator,
    CAMDiscriminator,
    DCGANDiscriminator,
    DCGANGenerator,
    Generator,
    PatchDiscriminator,
    ReplayBuffer,
    ResNetGenerator,
    SingleMaskGenerator,
    Translation,
    UGATITGenerator,
    UNetGenerator,
    depths,
    evaluation_mode,
)

Batch = Mapping[str, Tensor]


class Turn(NamedTuple):
    """One player's turn in a training step.

    player: "G" or "D", also the key of its optimizer.
    networks: the names of the networks that it changes. Names, because a network may be wrapped later.
    losses: (batch, fakes) to named, weighted scalars. Calling it twice changes nothing but the power iteration of a
        spectral norm and the running statistics of BatchNorm.
    """

    player: str
    networks: tuple[str, ...]
    losses: Callable[[Batch, Any], dict[str, Tensor]]


class System(nn.Module, ABC):
    """What the loop sees. Children with parameters are equal on all ranks, others (replay buffers) are not."""

    data: ClassVar[str] = "unpaired"  # the kind of samples it learns from: a key of ``datasets.KINDS``
    generators: dict[str, str]  # direction ("AtoB", "BtoA" or ``NOISE``) to the name of its generator
    min_size: int  # least height and width of a training picture, in pixels
    size_multiple: int  # height and width of a training picture are multiples of this
    factors: tuple[float, ...] = ()  # of loss terms, where they change during training (see ``set_epoch``)

    def __init__(self, options: Any, size: tuple[int, int], seed: Sequence[int]):
        """``options``: its ``NetworkOptions``. ``size`` and ``seed``: see ``NetworkOptions.build``."""
        super().__init__()
        self.options = options

    @property
    @abstractmethod
    def turns(self) -> tuple[Turn, ...]:
        """The players' turns in their order."""

    def trained(self) -> list[str]:
        """The names of all networks that are trained."""
        return [name for turn in self.turns for name in turn.networks]

    def generator(self, direction: str) -> Generator:
        """The generator of a direction; never a wrapped one."""
        return cast(Generator, self.get_submodule(self.generators[direction]))

    @abstractmethod
    def forward(self, batch: Batch) -> Any:
        """Run every generator and the replay buffers once. The graph is kept for the generators' turn."""

    @abstractmethod
    def measures(self, batch: Batch, fakes: Any) -> dict[str, Tensor]:
        """Scalars or vectors to log beside the losses; no gradient flows through them."""

    @abstractmethod
    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        """Named columns of a picture sheet, each (B, channels or 1, H, W), masks too in [-1, 1]."""

    def symptoms(self, values: Mapping[str, Any]) -> list[str]:
        """Signs that training collapses, in words, from the means of losses and measures (lists for vectors)."""
        weak = sorted(name for name, value in values.items() if "D" in name.split("_") and value < 0.01)
        return [f"the discriminators' losses {', '.join(weak)} are below 0.01"] if weak else []

    def set_epoch(self, epoch: int) -> None:
        """Called before each step, epochs counted from 0, for systems whose loss weights change during training."""

    def choose(self, batch: Batch) -> None:
        """Let the replay buffers decide about the pictures of the next step ahead of it, for a CUDA graph."""
        for pool in self.children():
            if isinstance(pool, ReplayBuffer):
                pool.choose(len(batch["A"]), batch["A"].device)

    def after_step(self) -> None:
        """Called after all turns of a step, for systems that keep parameters within bounds."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Options of every system. A subclass is a row of ``SYSTEMS``: the class, and its flags, each declared once."""

    system_class: ClassVar[type[System]]
    presets: ClassVar[Mapping[str, Any]] = {}  # defaults of train.py's own options, where this system has others

    channels: int = option(3, "colour channels of the pictures: 3 RGB, 1 grey", choices=(1, 3))
    ngf: int = option(64, "channels of the generators' first convolution; of dcgan before the last", least=1, most=4096)
    ndf: int = option(64, "channels of the discriminators' first convolution", least=1, most=4096)

    def build(self, size: tuple[int, int] = (256, 256), seed: Sequence[int] = (0,)) -> System:
        """The system for training pictures of ``size`` (height, width); the weights come from torch's random state.

        ``seed`` is the key of the replay buffers' randomness. Raises InputError for options that do not fit together.
        """
        return self.system_class(self, size, seed)


# Options of several systems, which may differ in the default.
N_RESIDUAL_BLOCKS = partial(option, help="residual blocks of each generator", least=0, most=256)
N_LAYERS_D = partial(option, help="PatchGAN's stride-2 layers; 3 judges 70 x 70 pixels, 2 34 x 34", least=1, most=12)
UPSAMPLE = partial(
    option, help="enlarge by transposed convolutions (papers) or by repeating pixels", choices=("transposed", "nearest")
)
LAMBDA_GAN = partial(option, help="weight of each adversarial term; pix2pix at 0: only L1, no discriminator", least=0)
LAMBDA_CYC = partial(option, help="weight of each direction's cycle loss", least=0)
LAMBDA_ID = partial(option, help="weight of each identity loss (AttentionGAN: paper 0.5, official code 5)", least=0)


# ----------------------------------------------------------------------------------------------------------
#  Loss terms
# ----------------------------------------------------------------------------------------------------------


def least_squares(logits: Sequence[Tensor], target: float) -> Tensor:
    """LSGAN (Mao et al., 2017): mean of (logit - target)², summed over the maps of a discriminator."""
    return torch.stack([(x - target).square().mean() for x in logits]).sum()


def cross_entropy(logits: Sequence[Tensor], target: float) -> Tensor:
    """Binary cross-entropy (Goodfellow et al., 2014), likewise. Target 1 for generated pictures does not saturate."""
    return torch.stack([F.binary_cross_entropy_with_logits(x, torch.full_like(x, target)) for x in logits]).sum()


GanLoss = Callable[[Sequence[Tensor], float], Tensor]
GAN_LOSSES: dict[str, GanLoss] = {"bce": cross_entropy, "lsgan": least_squares}


def real_against_fake(judge: nn.Module, real: Tensor, fake: Tensor, gan_loss: GanLoss = least_squares) -> Tensor:
    """The loss of a discriminator, halved to slow it down (pix2pix, Sec. 3.3; CycleGAN, Appendix 7.1).

    Both go through in one call, which is exact as long as the norm is per picture.
    """
    maps = [logits.chunk(2) for logits in judge(torch.cat([real, fake]))]
    return 0.5 * (gan_loss([r for r, _ in maps], 1.0) + gan_loss([f for _, f in maps], 0.0))


def mask_measures(attention: Tensor) -> dict[str, Tensor]:
    """(n,) means of masks (B, n, H, W) in [0, 1], and their entropies in bits: 0 decided, 1 at 1/2 everywhere."""
    bits = (torch.special.entr(attention) + torch.special.entr(1 - attention)) / math.log(2)
    return {"mean": attention.mean(dim=(0, 2, 3)), "entropy": bits.mean(dim=(0, 2, 3))}


def mask_of(translation: Translation) -> Tensor:
    """(B, 1, H, W) in [0, 1]: the foreground mask of a generator that has one."""
    assert translation.foreground is not None
    return translation.foreground


def split(both: Translation) -> tuple[Translation, Translation]:
    """Undo the concatenation of two equal batches."""
    halves = [(None, None) if part is None else part.chunk(2) for part in both]
    first, second = zip(*halves, strict=True)
    return Translation(*first), Translation(*second)


# ----------------------------------------------------------------------------------------------------------
#  The two-way systems: CycleGAN, AttentionGAN I and II
# ----------------------------------------------------------------------------------------------------------


class BothDirections(System):
    """What the systems with a generator for each direction, ``G_AB`` and ``G_BA``, show of themselves."""

    G_AB: Generator
    G_BA: Generator

    @torch.no_grad()
    def measures(self, batch: Batch, fakes: Any) -> dict[str, Tensor]:
        """``change_*``: mean |output - input| in [0, 2], near 0 for a copy. Others: see ``measures_inside``."""
        measures = {}
        for way, real, fake in (("AB", batch["A"], fakes.fake_B), ("BA", batch["B"], fakes.fake_A)):
            measures[f"change_{way}"] = F.l1_loss(fake.image, real)
            measures |= self.measures_inside(way, fake)
        return measures

    @abstractmethod
    def measures_inside(self, way: str, fake: Translation) -> dict[str, Tensor]:
        """Further measures of a way, "AB" or "BA", by their full names."""

    @torch.no_grad()
    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        """For both directions: input, translation, attention or heat map, and the translation translated back."""
        columns = {}
        for source, target, there, back in (("A", "B", self.G_AB, self.G_BA), ("B", "A", self.G_BA, self.G_AB)):
            fake = there(batch[source])
            columns[f"real {source}"] = batch[source]
            columns[f"fake {target}"] = fake.image
            if fake.foreground is not None:
                columns[f"attention {source}"] = 2 * fake.foreground - 1
            columns |= self.seen(target, fake.image)
            columns[f"recovered {source}"] = back(fake.image).image
        return columns

    def seen(self, side: str, images: Tensor) -> dict[str, Tensor]:
        """Further columns: what the discriminators of a domain look at in translations to it."""
        return {}


class TwoWayFakes(NamedTuple):
    """same_* are None where the identity terms have no weight. pooled_* come from the replay buffers:
    (B, channels, H, W), with the mask as one channel more for an attention-guided discriminator."""

    fake_A: Translation
    fake_B: Translation
    recovered_A: Translation
    recovered_B: Translation
    same_A: Tensor | None
    same_B: Tensor | None
    pooled_A: Tensor
    pooled_B: Tensor


def total_variation(masks: Tensor) -> Tensor:
    """The sum of |differences| of neighbours in (B, 1, H, W), mean over the batch (AttentionGAN, scheme I)."""
    down, across = masks.diff(dim=2).abs().sum(), masks.diff(dim=3).abs().sum()
    return (down + across) / len(masks)


class TwoWay(BothDirections):
    """Two generators, two discriminators, least-squares + cycle + identity (CycleGAN, eq. 3; AttentionGAN).

    The terms are those of the official code, summed over both directions:
    L_G = Σ [ gan · LSGAN + cyc · |recovered - real|₁ + id · |same - real|₁ + pixel · |fake - real|₁ + tv · TV ],
    L_D = Σ ½ [ (D(real) - 1)² + D(pooled)² ]. Of id, pixel and tv those of weight 0 are not computed.

    ``attn_disc`` adds an attention-guided discriminator to each side (AttentionGAN, Sec. III), with terms of the same
    weight. It sees [mask, picture] ("concat") or mask × picture ("mask"). A translated picture comes with the mask it
    was made with; ``attn_grad``: gradients reach the generator through both, or only the picture. A real picture comes
    with the mask that the generator *from* its side makes of it (``attn_real`` "own"), or with that of the translation
    it is compared with ("partner", the literal reading of the paper).

    ``curriculum_epochs``: for so many the adversarial terms lead, as in the official code of scheme I. The terms that
    tie the output to the input (cycle, identity, pixel) have the factor 0.01 and the others 0.99; later all have 0.5.
    Raises InputError for guidance options without an attention-guided discriminator.
    """

    options: TwoWayOptions

    def __init__(self, options: TwoWayOptions, size: tuple[int, int], seed: Sequence[int]):
        super().__init__(options, size, seed)
        self.guided = options.attn_disc != "none"
        for flag, value, default in (("attn_real", options.attn_real, "own"), ("attn_grad", options.attn_grad, "both")):
            if not self.guided and value != default:
                raise InputError(f"--{flag} {value} needs --attn_disc concat or mask")
        channels, shape = options.channels, (options.ndf, options.n_layers_D)
        self.G_AB, self.G_BA = options.generator(), options.generator()
        self.D_A, self.D_B = (PatchDiscriminator(channels, *shape) for _ in "AB")
        if self.guided:
            inputs = channels + 1 if options.attn_disc == "concat" else channels
            self.guided_D_A, self.guided_D_B = (PatchDiscriminator(inputs, *shape) for _ in "AB")
        self.generators = {"AtoB": "G_AB", "BtoA": "G_BA"}
        self.pool_A = ReplayBuffer(options.pool_size, (*seed, 0))
        self.pool_B = ReplayBuffer(options.pool_size, (*seed, 1))
        self.min_size = max(self.G_AB.min_size, self.D_A.min_size)
        self.size_multiple = self.G_AB.size_multiple
        self.set_epoch(0)

    @property
    def turns(self) -> tuple[Turn, ...]:
        judges = ("D_A", "D_B", "guided_D_A", "guided_D_B") if self.guided else ("D_A", "D_B")
        return (Turn("G", ("G_AB", "G_BA"), self.generators_losses), Turn("D", judges, self.discriminators_losses))

    def set_epoch(self, epoch: int) -> None:
        self.factors = (1.0, 1.0)  # of the terms that lead, and of those that tie the output to the input
        if self.options.curriculum_epochs:
            self.factors = (0.99, 0.01) if epoch < self.options.curriculum_epochs else (0.5, 0.5)

    def forward(self, batch: Batch) -> TwoWayFakes:
        real_A, real_B = batch["A"], batch["B"]
        same_A = same_B = None
        if self.options.lambda_id:
            # Translation and identity in one call: exact, because InstanceNorm treats each picture by itself.
            fake_B, (same_B, *_) = split(self.G_AB(torch.cat([real_A, real_B])))
            fake_A, (same_A, *_) = split(self.G_BA(torch.cat([real_B, real_A])))
        else:
            fake_B, fake_A = self.G_AB(real_A), self.G_BA(real_B)
        recovered_A, recovered_B = self.G_BA(fake_B.image), self.G_AB(fake_A.image)
        pooled_A, pooled_B = self.pool_A(self.to_pool(fake_A)), self.pool_B(self.to_pool(fake_B))
        return TwoWayFakes(fake_A, fake_B, recovered_A, recovered_B, same_A, same_B, pooled_A, pooled_B)

    def to_pool(self, fake: Translation) -> Tensor:
        """What the replay buffer stores of a translation: the picture, and its mask for a guided discriminator."""
        return torch.cat([fake.image, mask_of(fake)], dim=1) if self.guided else fake.image

    def guide(self, images: Tensor, masks: Tensor) -> Tensor:
        """What a guided discriminator sees of (B, channels, H, W) pictures and (B, 1, H, W) masks in [0, 1]."""
        return torch.cat([masks, images], dim=1) if self.options.attn_disc == "concat" else masks * images

    def generators_losses(self, batch: Batch, fakes: TwoWayFakes) -> dict[str, Tensor]:
        weights, (leading, tying) = self.options, self.factors
        ways = (
            ("A", "B", batch["A"], fakes.fake_B, fakes.recovered_A, fakes.same_A),
            ("B", "A", batch["B"], fakes.fake_A, fakes.recovered_B, fakes.same_B),
        )
        losses = {}
        for source, target, real, fake, recovered, same in ways:
            way = f"{source}{target}"
            judge = self.get_submodule(f"D_{target}")
            losses[f"G_{way}"] = leading * weights.lambda_gan * least_squares(judge(fake.image), 1.0)
            if self.guided:
                judge = self.get_submodule(f"guided_D_{target}")
                mask = mask_of(fake) if weights.attn_grad == "both" else mask_of(fake).detach()
                logits = judge(self.guide(fake.image, mask))
                losses[f"guided_G_{way}"] = leading * weights.lambda_gan * least_squares(logits, 1.0)
            if weights.lambda_tv:
                losses[f"tv_{way}"] = leading * weights.lambda_tv * total_variation(mask_of(fake))
            losses[f"cycle_{source}"] = tying * weights.lambda_cyc * F.l1_loss(recovered.image, real)
            if same is not None:
                losses[f"identity_{source}"] = tying * weights.lambda_id * F.l1_loss(same, real)
            if weights.lambda_pixel:
                losses[f"pixel_{way}"] = tying * weights.lambda_pixel * F.l1_loss(fake.image, real)
        return losses

    def discriminators_losses(self, batch: Batch, fakes: TwoWayFakes) -> dict[str, Tensor]:
        losses = {}
        for side, pooled, own_fake in (("A", fakes.pooled_A, fakes.fake_B), ("B", fakes.pooled_B, fakes.fake_A)):
            images, masks = pooled[:, : self.options.channels], pooled[:, self.options.channels :]
            losses[f"D_{side}"] = real_against_fake(self.get_submodule(f"D_{side}"), batch[side], images)
            if self.guided:
                real_masks = mask_of(own_fake).detach() if self.options.attn_real == "own" else masks
                real = self.guide(batch[side], real_masks)
                judge = self.get_submodule(f"guided_D_{side}")
                losses[f"guided_D_{side}"] = real_against_fake(judge, real, self.guide(images, masks))
        return losses

    def symptoms(self, values: Mapping[str, Any]) -> list[str]:
        found = super().symptoms(values)
        for way in ("AB", "BA"):
            masks = values.get(f"mask_{way}_mean", [])
            if masks and self.G_AB.settings.get("background", True) and masks[-1] > 0.99:
                found.append(f"the background mask of {way} is above 0.99: the output is nearly the input")
        return found

    def measures_inside(self, way: str, fake: Translation) -> dict[str, Tensor]:
        """``mask_*``: see ``mask_measures``."""
        found = {} if fake.attention is None else mask_measures(fake.attention)
        return {f"mask_{way}_{name}": value for name, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class TwoWayOptions(NetworkOptions, ABC):
    """Options of all two-way systems."""

    system_class = TwoWay
    # Of the systems that do not have these as options.
    attn_disc, attn_real, attn_grad = "none", "own", "both"
    lambda_gan, curriculum_epochs = 1.0, 0
    lambda_id = lambda_pixel = lambda_tv = 0.0

    n_residual_blocks: int = N_RESIDUAL_BLOCKS(9)
    n_layers_D: int = N_LAYERS_D(3)
    upsample: str = UPSAMPLE("transposed")
    lambda_cyc: float = LAMBDA_CYC(10.0)
    pool_size: int = option(50, "generated pictures that each replay buffer stores; 0: none", least=0, most=2**20)

    @abstractmethod
    def generator(self) -> Generator:
        """A new generator."""


@dataclass(frozen=True, kw_only=True)
class CycleGANOptions(TwoWayOptions):
    """CycleGAN (Zhu et al., ICCV 2017)."""

    lambda_id: float = LAMBDA_ID(5.0)

    def generator(self) -> ResNetGenerator:
        return ResNetGenerator(self.channels, self.ngf, self.n_residual_blocks, self.upsample)


@dataclass(frozen=True, kw_only=True)
class GuidedOptions(TwoWayOptions, ABC):
    """Options of the systems that can have attention-guided discriminators."""

    attn_disc: str = option(
        "none",
        "attention-guided discriminator beside the plain one: it sees [mask, picture] (concat) or their product (mask)",
        choices=("none", "concat", "mask"),
    )
    attn_real: str = option(
        "own",
        "a real picture's mask: what the generator from that side makes of it (own), or that of the translation it is "
        "compared with, as the paper writes (partner)",
        choices=("own", "partner"),
    )
    attn_grad: str = option(
        "both", "whether its gradients reach the generator through the mask too (both)", choices=("both", "picture")
    )


@dataclass(frozen=True, kw_only=True)
class AttentionGANOptions(GuidedOptions):
    """AttentionGAN, scheme II (Tang et al., TNNLS 2021)."""

    n_masks: int = option(10, "attention masks; the last is the background, unless --no_background", least=2, most=1024)
    attention_kernel: int = option(1, "last kernel of the attention head: official code 1, paper 7", choices=(1, 7))
    no_background: bool = option(False, "give every mask a content and keep nothing of the input, for changes of shape")
    lambda_id: float = LAMBDA_ID(0.5)

    def generator(self) -> AttentionGenerator:
        if self.no_background and self.attn_disc != "none":
            raise InputError(f"--attn_disc {self.attn_disc} needs the background mask, expected no --no_background")
        masks = self.n_masks, self.attention_kernel, not self.no_background
        return AttentionGenerator(self.channels, self.ngf, self.n_residual_blocks, *masks, self.upsample)


@dataclass(frozen=True, kw_only=True)
class AttentionGAN1Options(GuidedOptions):
    """AttentionGAN, scheme I, with the attention-guided discriminator that the paper describes."""

    attn_disc: str = "concat"
    lambda_gan: float = LAMBDA_GAN(0.5)
    lambda_pixel: float = option(1.0, "weight of each direction's |output - input|", least=0)
    lambda_tv: float = option(1e-6, "weight of each mask's total variation, a sum over its pixels", least=0)
    curriculum_epochs: int = option(
        10, "epochs with factors 0.99 (GAN, TV) and 0.01 (cycle, pixel); later all 0.5; 0: no factors", least=0
    )

    def generator(self) -> SingleMaskGenerator:
        if not self.lambda_gan:
            raise InputError("--lambda_gan 0: only a copy is left to train for, expected a weight above 0")
        return SingleMaskGenerator(self.channels, self.ngf, self.n_residual_blocks, self.upsample)


# ----------------------------------------------------------------------------------------------------------
#  U-GAT-IT
# ----------------------------------------------------------------------------------------------------------


class UGATITFakes(NamedTuple):
    fake_A: Translation
    fake_B: Translation
    recovered_A: Translation
    recovered_B: Translation
    same_A: Translation
    same_B: Translation


class UGATIT(BothDirections):
    """U-GAT-IT (Kim et al., ICLR 2020, Sec. 2.2), with the terms of the official PyTorch code.

    Two generators with a CAM; for each domain a global and a local discriminator, each with a CAM, whose logits have a
    least-squares term like the logit map. Summed over both directions,
    L_D = Σ gan · [ Σ (D(real) - 1)² + D(fake)² ], not halved,
    L_G = Σ [ gan · Σ (D(fake) - 1)² + cyc · |recovered - real|₁ + identity · |same - real|₁ + cam · CAM ],
    with the inner sums over both scales, logit map and CAM logits. CAM is the cross-entropy of the generator's own CAM
    logits, which classify its input: source domain (translation) or target domain (identity). Every ρ stays in [0, 1].
    """

    SCALES = ("global", "local")
    options: UGATITOptions

    def __init__(self, options: UGATITOptions, size: tuple[int, int], seed: Sequence[int]):
        super().__init__(options, size, seed)
        channels, ngf, ndf, init = options.channels, options.ngf, options.ndf, options.init
        n_blocks, fixed_size = options.n_residual_blocks, None if options.light else size
        n_global, n_local = depths(min(size))
        self.G_AB, self.G_BA = (UGATITGenerator(channels, ngf, n_blocks, fixed_size, init) for _ in "AB")
        self.global_D_A, self.global_D_B = (CAMDiscriminator(channels, ndf, n_global, init) for _ in "AB")
        self.local_D_A, self.local_D_B = (CAMDiscriminator(channels, ndf, n_local, init) for _ in "AB")
        self.generators = {"AtoB": "G_AB", "BtoA": "G_BA"}
        self.min_size = max(self.G_AB.min_size, self.global_D_A.min_size, self.local_D_A.min_size)
        self.size_multiple = self.G_AB.size_multiple

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn("D", tuple(f"{scale}_D_{side}" for scale in self.SCALES for side in "AB"), self.discriminators_losses),
            Turn("G", ("G_AB", "G_BA"), self.generators_losses),
        )

    @torch.no_grad()
    def after_step(self) -> None:
        for norm in (*self.G_AB.modules(), *self.G_BA.modules()):
            if isinstance(norm, (AdaLIN, ILN)):
                norm.rho.clamp_(0, 1)

    def forward(self, batch: Batch) -> UGATITFakes:
        real_A, real_B = batch["A"], batch["B"]
        # Translation and identity in one call: exact, because all norms and the CAM treat each picture by itself. One
        # forward pass serves both players: the generators do not change in between.
        fake_B, same_B = split(self.G_AB(torch.cat([real_A, real_B])))
        fake_A, same_A = split(self.G_BA(torch.cat([real_B, real_A])))
        recovered_A, recovered_B = self.G_BA(fake_B.image), self.G_AB(fake_A.image)
        return UGATITFakes(fake_A, fake_B, recovered_A, recovered_B, same_A, same_B)

    def judge(self, side: str, images: Tensor) -> list[Tensor]:
        """The logits of both scales, maps and those of the CAMs."""
        return [x for scale in self.SCALES for x in self.get_submodule(f"{scale}_D_{side}")(images)]

    def discriminators_losses(self, batch: Batch, fakes: UGATITFakes) -> dict[str, Tensor]:
        losses = {}
        for side, fake in (("A", fakes.fake_A), ("B", fakes.fake_B)):
            on_real = least_squares(self.judge(side, batch[side]), 1.0)
            on_fake = least_squares(self.judge(side, fake.image.detach()), 0.0)
            losses[f"D_{side}"] = self.options.lambda_gan * (on_real + on_fake)
        return losses

    def generators_losses(self, batch: Batch, fakes: UGATITFakes) -> dict[str, Tensor]:
        weights = self.options
        ways = (
            ("A", "B", fakes.fake_B, fakes.recovered_A, fakes.same_A, fakes.same_B),
            ("B", "A", fakes.fake_A, fakes.recovered_B, fakes.same_B, fakes.same_A),
        )
        losses = {}
        for source, target, fake, recovered, same, same_target in ways:
            way, real = f"{source}{target}", batch[source]
            losses[f"G_{way}"] = weights.lambda_gan * least_squares(self.judge(target, fake.image), 1.0)
            losses[f"cycle_{source}"] = weights.lambda_cyc * F.l1_loss(recovered.image, real)
            losses[f"identity_{source}"] = weights.lambda_id * F.l1_loss(same.image, real)
            # Both went through the generator of this way.
            assert fake.cam_logits is not None and same_target.cam_logits is not None
            entropy = F.softplus(-fake.cam_logits).mean() + F.softplus(same_target.cam_logits).mean()
            losses[f"cam_{way}"] = weights.lambda_cam * entropy
        return losses

    def measures_inside(self, way: str, fake: Translation) -> dict[str, Tensor]:
        """``rho_*``: the mean ρ of every AdaLIN and ILN, in order."""
        norms = [m for m in self.get_submodule(f"G_{way}").modules() if isinstance(m, (AdaLIN, ILN))]
        return {f"rho_{way}": torch.stack([norm.rho.mean() for norm in norms])}

    def seen(self, side: str, images: Tensor) -> dict[str, Tensor]:
        judges = {scale: cast(CAMDiscriminator, self.get_submodule(f"{scale}_D_{side}")) for scale in self.SCALES}
        return {f"{scale} D_{side}": 2 * judge.heat_map(images) - 1 for scale, judge in judges.items()}


@dataclass(frozen=True, kw_only=True)
class UGATITOptions(NetworkOptions):
    """U-GAT-IT, full or light."""

    system_class = UGATIT
    # 294 epochs of selfie2anime's 3,400 pictures are 999,600 steps, the official 1,000,000 in whole epochs.
    presets: ClassVar[Mapping[str, Any]] = {"n_epochs": 294, "lr": 1e-4, "weight_decay": 1e-4, "decay_by": "step"}

    n_residual_blocks: int = N_RESIDUAL_BLOCKS(4, least=1)  # without one AdaLIN's parameters would get no gradient
    light: bool = option(False, "small generators, whose MLP reads averages; they later take pictures of any size")
    init: str = option(
        "normal",
        "first weights: N(0, 0.02) as the paper says (normal), or torch's own as in the official code (default)",
        choices=("normal", "default"),
    )
    lambda_gan: float = LAMBDA_GAN(1.0)
    lambda_cyc: float = LAMBDA_CYC(10.0)
    lambda_id: float = LAMBDA_ID(10.0)
    lambda_cam: float = option(1000.0, "weight of the cross-entropy of the generators' class activation maps", least=0)


# ----------------------------------------------------------------------------------------------------------
#  pix2pix
# ----------------------------------------------------------------------------------------------------------


class Paired(System):
    """pix2pix (Isola et al., CVPR 2017, eq. 4), with the terms of the official PyTorch code.

    One generator, for one ``direction``, and a discriminator that sees input and output together:
    L_D = ½ [ GAN(D([x, y]), 1) + GAN(D([x, G(x)]), 0) ],
    L_G = lambda_gan · GAN(D([x, G(x)]), 1) + lambda_L1 · |G(x) - y|₁.

    A term of weight 0 is not computed. Without the adversarial one (the paper's "L1") there is no discriminator.
    Raises InputError where no term is left, or the U-Net does not fit the size.
    """

    data = "paired"
    options: Pix2PixOptions

    def __init__(self, options: Pix2PixOptions, size: tuple[int, int], seed: Sequence[int]):
        super().__init__(options, size, seed)
        if not (options.lambda_gan or options.lambda_L1):
            raise InputError("--lambda_gan 0 --lambda_L1 0: nothing to train by, expected one of them above 0")
        if not options.lambda_gan and options.gan_loss != "bce":
            raise InputError(f"--gan_loss {options.gan_loss} needs an adversarial term, expected --lambda_gan above 0")
        most = int(math.log2(min(size)))
        if most < 2:
            raise InputError(f"--img_height {size[0]}, --img_width {size[1]}: expected at least 4")
        depth = options.unet_depth or most
        if not 2 <= depth <= most:
            raise InputError(f"--unet_depth {depth}: expected 2 to {most} at {size[0]} x {size[1]}, or 0 for the most")
        channels = options.channels
        self.G = UNetGenerator(channels, options.ngf, depth)
        self.min_size, self.size_multiple = self.G.min_size, self.G.size_multiple
        if options.lambda_gan:
            self.D = PatchDiscriminator(2 * channels, options.ndf, options.n_layers_D, affine=True)
            self.min_size = max(self.min_size, self.D.min_size)
        self.source, self.target = options.direction[0], options.direction[-1]
        self.generators = {options.direction: "G"}
        self.gan_loss = GAN_LOSSES[options.gan_loss]

    @property
    def turns(self) -> tuple[Turn, ...]:
        learn = Turn("G", ("G",), self.generator_losses)
        return (Turn("D", ("D",), self.discriminator_losses), learn) if self.options.lambda_gan else (learn,)

    def forward(self, batch: Batch) -> Tensor:
        return self.G(batch[self.source]).image

    def discriminator_losses(self, batch: Batch, fake: Tensor) -> dict[str, Tensor]:
        given, real = batch[self.source], batch[self.target]
        pairs = torch.cat([given, real], dim=1), torch.cat([given, fake.detach()], dim=1)
        return {"D": real_against_fake(self.D, *pairs, self.gan_loss)}

    def generator_losses(self, batch: Batch, fake: Tensor) -> dict[str, Tensor]:
        losses = {}
        if self.options.lambda_gan:
            logits = self.D(torch.cat([batch[self.source], fake], dim=1))
            losses["G"] = self.options.lambda_gan * self.gan_loss(logits, 1.0)
        if self.options.lambda_L1:
            losses["L1"] = self.options.lambda_L1 * F.l1_loss(fake, batch[self.target])
        return losses

    @torch.no_grad()
    def measures(self, batch: Batch, fake: Tensor) -> dict[str, Tensor]:
        """``change``: mean |output - input| in [0, 2]."""
        return {"change": F.l1_loss(fake, batch[self.source])}

    @torch.no_grad()
    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        given, real = batch[self.source], batch[self.target]
        with evaluation_mode(self.G) as generator:
            fake = generator(given).image
        return {f"real {self.source}": given, f"fake {self.target}": fake, f"real {self.target}": real}


@dataclass(frozen=True, kw_only=True)
class Pix2PixOptions(NetworkOptions):
    """pix2pix."""

    system_class = Paired

    unet_depth: int = option(
        0, "halvings of the U-Net; both sides are multiples of 2 to that; 0: log2 of the smaller one", least=0, most=12
    )
    n_layers_D: int = N_LAYERS_D(3)
    direction: str = option("AtoB", "which way to translate; of facades the labels are B", choices=("AtoB", "BtoA"))
    gan_loss: str = option(
        "bce", "adversarial loss: cross-entropy as in the paper (bce) or least squares", choices=tuple(GAN_LOSSES)
    )
    lambda_gan: float = LAMBDA_GAN(1.0)
    lambda_L1: float = option(100.0, "weight of |output - truth|; 0: only the conditional GAN", least=0)


# ----------------------------------------------------------------------------------------------------------
#  DCGAN
# ----------------------------------------------------------------------------------------------------------


class DCGAN(System):
    """DCGAN (Radford et al., ICLR 2016): pictures from noise, one generator against one discriminator.

    L_D = CE(D(real), 1) + CE(D(G(noise)), 0), L_G = CE(D(G(noise)), 1), with CE the binary cross-entropy. A batch is
    {"image": (B, channels, size, size), "noise": (B, nz)}. Real and generated pictures go through the discriminator in
    separate calls, because BatchNorm depends on the batch.
    """

    data = "plain"

    def __init__(self, options: DCGANOptions, size: tuple[int, int], seed: Sequence[int]):
        super().__init__(options, size, seed)
        height, width = size
        if height != width or height not in DCGANGenerator.sizes:
            fitting = ", ".join(map(str, DCGANGenerator.sizes))
            raise InputError(
                f"--img_height {height} --img_width {width}: dcgan makes square pictures, expected sides of {fitting}"
            )
        self.G = DCGANGenerator(options.nz, options.ngf, options.channels, height, options.upsample)
        self.D = DCGANDiscriminator(options.channels, options.ndf, height)
        self.generators = {NOISE: "G"}
        self.min_size = self.size_multiple = height

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn("D", ("D",), self.discriminator_losses), Turn("G", ("G",), self.generator_losses))

    def forward(self, batch: Batch) -> Tensor:
        return self.G(batch["noise"])

    def discriminator_losses(self, batch: Batch, fakes: Tensor) -> dict[str, Tensor]:
        return {
            "D_real": cross_entropy(self.D(batch["image"]), 1.0),
            "D_fake": cross_entropy(self.D(fakes.detach()), 0.0),
        }

    def generator_losses(self, batch: Batch, fakes: Tensor) -> dict[str, Tensor]:
        return {"G": cross_entropy(self.D(fakes), 1.0)}

    @torch.no_grad()
    def measures(self, batch: Batch, fakes: Tensor) -> dict[str, Tensor]:
        """``spread_*``: the standard deviation of a pixel over the batch, their mean; near 0 when all are alike."""
        pictures = {"real": batch["image"], "fake": fakes}
        return {f"spread_{name}": x.std(dim=0, correction=0).mean() for name, x in pictures.items()}

    @torch.no_grad()
    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        """A column of real pictures and as many columns of samples as there are noise vectors for each of them."""
        with evaluation_mode(self.G) as generator:
            samples = generator(batch["noise"]).split(len(batch["image"]))
        return {"real": batch["image"]} | {f"sample {i}": column for i, column in enumerate(samples, 1)}


@dataclass(frozen=True, kw_only=True)
class DCGANOptions(NetworkOptions):
    """DCGAN."""

    system_class = DCGAN
    presets: ClassVar[Mapping[str, Any]] = dict(  # the epochs of pytorch/examples
        img_height=64, img_width=64, resize="short_side", n_epochs=25, batch_size=128, decay_by="never"
    )

    nz: int = option(100, "length of a noise vector", least=1, most=2**16)
    upsample: str = UPSAMPLE("transposed")


SYSTEMS: dict[str, type[NetworkOptions]] = {
    "attentiongan": AttentionGANOptions,
    "attentiongan1": AttentionGAN1Options,
    "cyclegan": CycleGANOptions,
    "ugatit": UGATITOptions,
    "pix2pix": Pix2PixOptions,
    "dcgan": DCGANOptions,
}
