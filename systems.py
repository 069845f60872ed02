"""How networks train one another: one class per kind of game, the loss terms, and the table ``SYSTEMS``.

A system owns its networks and prices each player's turn; the training loop pays (see ``train.py``). It knows no
optimizer, no device, no file and no rank.

Notation: pictures of domains A and B, ``fake_B = G_AB(real_A)``, ``recovered_A = G_BA(fake_B)``,
``same_A = G_BA(real_A)``; ``D_A`` judges pictures of domain A. Everything is (B, channels, H, W) in [-1, 1].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import (
    ILN,
    AdaLIN,
    AttentionGenerator,
    CAMDiscriminator,
    DCGANDiscriminator,
    DCGANGenerator,
    PatchDiscriminator,
    ReplayBuffer,
    ResNetGenerator,
    SingleMaskGenerator,
    Translation,
    UGATITGenerator,
    UNetGenerator,
    depths,
    in_use,
)
from utils import NOISE, InputError

Batch = Mapping[str, Tensor]


class Turn(NamedTuple):
    """One player's move.

    player: "G" or "D", also the key of its optimizer.
    networks: the names of what the move may change (names, so that a wrapped network leaves no stale reference).
    losses: (batch, fakes) to named, already weighted scalars; calling it twice changes nothing (but that the power
        iteration of a spectral norm and the running statistics of BatchNorm go on).
    """

    player: str
    networks: tuple[str, ...]
    losses: Callable[[Batch, Any], dict[str, Tensor]]


class System(nn.Module, ABC):
    """The interface between a game and the loop.

    Children with parameters are the same on every rank; others (replay buffers) are each rank's own.
    """

    data = "unpaired"  # the kind of samples it plays with: a key of ``datasets.KINDS``
    generators: dict[str, str]  # direction ("AtoB", or ``NOISE``) to the name of the network that translates so
    min_size: int  # least height and width of a training picture, in pixels
    size_multiple: int  # height and width of a training picture are multiples of this

    @property
    @abstractmethod
    def turns(self) -> tuple[Turn, ...]:
        """The players' moves, in order of play."""

    @abstractmethod
    def forward(self, batch: Batch) -> Any:
        """Run every generator once. The graph is kept for the generators' turn; the pools take and hand back."""

    @abstractmethod
    def measures(self, batch: Batch, fakes: Any) -> dict[str, Tensor]:
        """Scalars or vectors to log beside the losses; no gradient flows through them."""

    @abstractmethod
    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        """Named columns of a picture sheet, each (B, channels or 1, H, W), masks too in [-1, 1]."""

    def begin(self, epoch: int) -> None:
        """Called before each step, epochs counted from 0, for systems whose weights change as they train."""

    def settle(self) -> None:
        """Called after all turns of a step, for systems that keep parameters within bounds."""


# ----------------------------------------------------------------------------------------------------------
#  Loss terms
# ----------------------------------------------------------------------------------------------------------


def least_squares(logits: Sequence[Tensor], target: float) -> Tensor:
    """LSGAN (Mao et al., 2017): mean of (logit - target)², summed over the maps of a discriminator."""
    return torch.stack([(x - target).square().mean() for x in logits]).sum()


def cross_entropy(logits: Sequence[Tensor], target: float) -> Tensor:
    """Binary cross-entropy (Goodfellow et al., 2014): mean over each map of logits, summed over the maps.

    With the target 1 for generated pictures it is the generator's loss in its form that does not saturate.
    """
    return torch.stack([F.binary_cross_entropy_with_logits(x, torch.full_like(x, target)) for x in logits]).sum()


GanLoss = Callable[[Sequence[Tensor], float], Tensor]
GAN_LOSSES: dict[str, GanLoss] = {"bce": cross_entropy, "lsgan": least_squares}


def real_against_fake(
    discriminator: nn.Module, real: Tensor, fake: Tensor, gan_loss: GanLoss = least_squares
) -> Tensor:
    """The loss of a discriminator, halved to slow it down (pix2pix, Sec. 3.3; CycleGAN, Appendix 7.1).

    Both go through in one call, which is exact as long as the norm is per picture.
    """
    maps = [logits.chunk(2) for logits in discriminator(torch.cat([real, fake]))]
    return 0.5 * (gan_loss([r for r, _ in maps], 1.0) + gan_loss([f for _, f in maps], 0.0))


def mask_measures(attention: Tensor) -> dict[str, Tensor]:
    """Each mask's mean and its mean binary entropy in bits (0: every pixel decided, 1: every pixel at 1/2).

    attention: (B, n, H, W), values in [0, 1]. Both results have n entries.
    """
    bits = (torch.special.entr(attention) + torch.special.entr(1 - attention)) / math.log(2)
    return {"mean": attention.mean(dim=(0, 2, 3)), "entropy": bits.mean(dim=(0, 2, 3))}


def split(both: Translation) -> tuple[Translation, Translation]:
    """Undo the concatenation of two equal batches."""
    halves = [(None, None) if part is None else part.chunk(2) for part in both]
    first, second = zip(*halves, strict=True)
    return Translation(*first), Translation(*second)


def two_way_sheet(
    batch: Batch,
    G_AB: nn.Module,
    G_BA: nn.Module,
    seen: Callable[[str, Tensor], dict[str, Tensor]] = lambda domain, images: {},
) -> dict[str, Tensor]:
    """For both directions the input, its translation, where the generator is at work, and the way back.

    ``seen``: what discriminators have to show of translations to a domain.
    """
    columns = {}
    for source, target, there, back in (("A", "B", G_AB, G_BA), ("B", "A", G_BA, G_AB)):
        fake = there(batch[source])
        columns[f"real {source}"] = batch[source]
        columns[f"fake {target}"] = fake.image
        if fake.foreground is not None:
            columns[f"attention {source}"] = 2 * fake.foreground - 1
        columns |= seen(target, fake.image)
        columns[f"recovered {source}"] = back(fake.image).image
    return columns


# ----------------------------------------------------------------------------------------------------------
#  The two-way game: CycleGAN, AttentionGAN I and II
# ----------------------------------------------------------------------------------------------------------


class TwoWayFakes(NamedTuple):
    """same_* are None where the identity terms have no weight; pooled_* are what the replay buffers handed back,
    (B, channels, H, W), with the mask as one channel more where a guided discriminator wants it."""

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


class Weights(NamedTuple):
    """Weights of the terms of each direction; of weight 0 identity, pixel and tv are left out, the others are zero."""

    gan: float = 1.0
    cyc: float = 10.0
    identity: float = 0.0
    pixel: float = 0.0
    tv: float = 0.0


class TwoWay(System):
    """Two generators, two discriminators, least-squares + cycle + identity (CycleGAN, eq. 3; AttentionGAN).

    The terms are those of the official code, summed over both directions:
    L_G = Σ [ gan · LSGAN + cyc · |recovered - real|₁ + identity · |same - real|₁ + pixel · |fake - real|₁ + tv · TV ],
    L_D = Σ ½ [ (D(real) - 1)² + D(pooled)² ].

    ``attn_disc`` adds an attention-guided discriminator to each side (AttentionGAN, Sec. III), whose terms have the
    weight of the plain ones: it sees [mask, picture] ("concat") or mask × picture ("mask"), see ``guide``.
    A translated picture comes with the foreground mask it was made with; ``attn_grad``: gradients reach the generator
    through the picture and the mask ("both") or through the picture alone ("picture"). A real picture comes with the
    mask that the generator *from* its side makes of it (``attn_real`` "own"), or with the mask of the translation it
    stands against ("partner", the paper's letter).

    ``curriculum``: for so many epochs the adversarial terms lead, as in the official code of scheme I: the terms that
    tie the output to the input (cycle, identity, pixel) are weighed 0.01 and the others 0.99, then all 0.5.

    Raises InputError for ways of guidance without an attention-guided discriminator.
    """

    def __init__(
        self,
        generator: Callable[[], nn.Module],
        discriminator: Callable[[int], nn.Module],
        weights: Weights,
        pool_size: int,
        seed: Sequence[int],
        channels: int,
        attn_disc: str = "none",
        attn_real: str = "own",
        attn_grad: str = "both",
        curriculum: int = 0,
    ):
        super().__init__()
        for flag, value, default in (("attn_real", attn_real, "own"), ("attn_grad", attn_grad, "both")):
            if attn_disc == "none" and value != default:
                raise InputError(f"--{flag} {value} is for guidance, expected --attn_disc concat or mask with it")
        self.G_AB, self.G_BA = generator(), generator()
        self.D_A, self.D_B = discriminator(channels), discriminator(channels)
        if attn_disc != "none":
            inputs = channels + 1 if attn_disc == "concat" else channels
            self.guided_D_A, self.guided_D_B = discriminator(inputs), discriminator(inputs)
        self.generators = {"AtoB": "G_AB", "BtoA": "G_BA"}
        self.pool_A = ReplayBuffer(pool_size, (*seed, 0))
        self.pool_B = ReplayBuffer(pool_size, (*seed, 1))
        self.weights, self.channels = weights, channels
        self.attn_disc, self.attn_real, self.attn_grad = attn_disc, attn_real, attn_grad
        self.curriculum = curriculum
        self.min_size = max(self.G_AB.min_size, self.D_A.min_size)
        self.size_multiple = self.G_AB.size_multiple
        self.begin(0)

    @property
    def turns(self) -> tuple[Turn, ...]:
        judges = ("D_A", "D_B") if self.attn_disc == "none" else ("D_A", "D_B", "guided_D_A", "guided_D_B")
        return (
            Turn("G", ("G_AB", "G_BA"), self.generators_losses),
            Turn("D", judges, self.discriminators_losses),
        )

    def begin(self, epoch: int) -> None:
        self.leading = self.tying = 1.0
        if self.curriculum:
            self.leading, self.tying = (0.99, 0.01) if epoch < self.curriculum else (0.5, 0.5)

    def forward(self, batch: Batch) -> TwoWayFakes:
        real_A, real_B = batch["A"], batch["B"]
        same_A = same_B = None
        if self.weights.identity:
            # Translation and identity in one call: exact, as InstanceNorm sees each picture alone.
            fake_B, (same_B, *_) = split(self.G_AB(torch.cat([real_A, real_B])))
            fake_A, (same_A, *_) = split(self.G_BA(torch.cat([real_B, real_A])))
        else:
            fake_B, fake_A = self.G_AB(real_A), self.G_BA(real_B)
        return TwoWayFakes(
            fake_A,
            fake_B,
            recovered_A=self.G_BA(fake_B.image),
            recovered_B=self.G_AB(fake_A.image),
            same_A=same_A,
            same_B=same_B,
            pooled_A=self.pool_A(self.remembered(fake_A)),
            pooled_B=self.pool_B(self.remembered(fake_B)),
        )

    def remembered(self, fake: Translation) -> Tensor:
        """What the replay buffer keeps of a translation: the picture, and its mask where a discriminator wants it."""
        return fake.image if self.attn_disc == "none" else torch.cat([fake.image, fake.foreground], dim=1)

    def guide(self, images: Tensor, masks: Tensor) -> Tensor:
        """What a guided discriminator sees of (B, channels, H, W) pictures and (B, 1, H, W) masks in [0, 1]."""
        return torch.cat([masks, images], dim=1) if self.attn_disc == "concat" else masks * images

    def generators_losses(self, batch: Batch, fakes: TwoWayFakes) -> dict[str, Tensor]:
        gan, cyc, identity, pixel, tv = self.weights
        ways = (
            ("A", "B", batch["A"], fakes.fake_B, fakes.recovered_A, fakes.same_A),
            ("B", "A", batch["B"], fakes.fake_A, fakes.recovered_B, fakes.same_B),
        )
        losses = {}
        for source, target, real, fake, recovered, same in ways:
            way = f"{source}{target}"
            judge = self.get_submodule(f"D_{target}")
            losses[f"G_{way}"] = self.leading * gan * least_squares(judge(fake.image), 1.0)
            if self.attn_disc != "none":
                judge = self.get_submodule(f"guided_D_{target}")
                mask = fake.foreground if self.attn_grad == "both" else fake.foreground.detach()
                logits = judge(self.guide(fake.image, mask))
                losses[f"guided_G_{way}"] = self.leading * gan * least_squares(logits, 1.0)
            if tv:
                losses[f"tv_{way}"] = self.leading * tv * total_variation(fake.foreground)
            losses[f"cycle_{source}"] = self.tying * cyc * F.l1_loss(recovered.image, real)
            if same is not None:
                losses[f"identity_{source}"] = self.tying * identity * F.l1_loss(same, real)
            if pixel:
                losses[f"pixel_{way}"] = self.tying * pixel * F.l1_loss(fake.image, real)
        return losses

    def discriminators_losses(self, batch: Batch, fakes: TwoWayFakes) -> dict[str, Tensor]:
        losses = {}
        for side, pooled, translated in (("A", fakes.pooled_A, fakes.fake_B), ("B", fakes.pooled_B, fakes.fake_A)):
            images, masks = pooled[:, : self.channels], pooled[:, self.channels :]
            losses[f"D_{side}"] = real_against_fake(self.get_submodule(f"D_{side}"), batch[side], images)
            if self.attn_disc != "none":
                real_masks = translated.foreground.detach() if self.attn_real == "own" else masks
                real = self.guide(batch[side], real_masks)
                judge = self.get_submodule(f"guided_D_{side}")
                losses[f"guided_D_{side}"] = real_against_fake(judge, real, self.guide(images, masks))
        return losses

    @torch.no_grad()
    def measures(self, batch: Batch, fakes: TwoWayFakes) -> dict[str, Tensor]:
        """``change_*``: mean |output - input| in [0, 2], near 0 when a generator copies; ``mask_*``: every mask."""
        measures = {}
        for way, real, fake in (("AB", batch["A"], fakes.fake_B), ("BA", batch["B"], fakes.fake_A)):
            measures[f"change_{way}"] = F.l1_loss(fake.image, real)
            if fake.attention is not None:
                for name, value in mask_measures(fake.attention).items():
                    measures[f"mask_{way}_{name}"] = value
        return measures

    @torch.no_grad()
    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        G_AB, G_BA = (self.get_submodule(self.generators[direction]) for direction in ("AtoB", "BtoA"))
        return two_way_sheet(batch, G_AB, G_BA)


# ----------------------------------------------------------------------------------------------------------
#  U-GAT-IT
# ----------------------------------------------------------------------------------------------------------


class UGATITWeights(NamedTuple):
    """Weights of the terms of each direction."""

    gan: float = 1.0
    cyc: float = 10.0
    identity: float = 10.0
    cam: float = 1000.0


class UGATITFakes(NamedTuple):
    fake_A: Translation
    fake_B: Translation
    recovered_A: Translation
    recovered_B: Translation
    same_A: Translation
    same_B: Translation


class UGATIT(System):
    """U-GAT-IT (Kim et al., ICLR 2020, Sec. 2.2), with the terms of the official PyTorch code.

    Two generators with a CAM; for each domain a global and a local discriminator, each with a CAM, whose logits are
    judged by least squares like the logit map. Summed over both directions,
    L_D = Σ gan · [ Σ (D(real) - 1)² + D(fake)² ], not halved,
    L_G = Σ [ gan · Σ (D(fake) - 1)² + cyc · |recovered - real|₁ + identity · |same - real|₁ + cam · CAM ],
    the inner sums over both scales, logit map and CAM logits. CAM is the cross-entropy of the generator's own CAM
    logits, which are to say whether its input is of the source (a translation) or of the target (the identity).

    The discriminators move first. No replay buffer. ``settle`` brings every ρ back to [0, 1].
    """

    SCALES = ("global", "local")

    def __init__(
        self,
        generator: Callable[[], nn.Module],
        discriminator: Callable[[int], nn.Module],
        layers: tuple[int, int],
        weights: UGATITWeights,
    ):
        super().__init__()
        self.G_AB, self.G_BA = generator(), generator()
        self.global_D_A, self.global_D_B = discriminator(layers[0]), discriminator(layers[0])
        self.local_D_A, self.local_D_B = discriminator(layers[1]), discriminator(layers[1])
        self.weights = weights
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
    def settle(self) -> None:
        for network in (self.G_AB, self.G_BA):
            for norm in network.modules():
                if isinstance(norm, (AdaLIN, ILN)):
                    norm.rho.clamp_(0, 1)

    def forward(self, batch: Batch) -> UGATITFakes:
        real_A, real_B = batch["A"], batch["B"]
        # Translation and identity in one call: exact, as all norms and the CAM see each picture alone. One forward
        # serves both players: the generators do not change in between.
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
            losses[f"D_{side}"] = self.weights.gan * (on_real + on_fake)
        return losses

    def generators_losses(self, batch: Batch, fakes: UGATITFakes) -> dict[str, Tensor]:
        gan, cyc, identity, cam = self.weights
        ways = (
            ("A", "B", fakes.fake_B, fakes.recovered_A, fakes.same_A, fakes.same_B),
            ("B", "A", fakes.fake_A, fakes.recovered_B, fakes.same_B, fakes.same_A),
        )
        losses = {}
        for source, target, fake, recovered, same, same_target in ways:
            way, real = f"{source}{target}", batch[source]
            losses[f"G_{way}"] = gan * least_squares(self.judge(target, fake.image), 1.0)
            losses[f"cycle_{source}"] = cyc * F.l1_loss(recovered.image, real)
            losses[f"identity_{source}"] = identity * F.l1_loss(same.image, real)
            # Both went through the generator of this way.
            entropy = F.softplus(-fake.cam_logits).mean() + F.softplus(same_target.cam_logits).mean()
            losses[f"cam_{way}"] = cam * entropy
        return losses

    @torch.no_grad()
    def measures(self, batch: Batch, fakes: UGATITFakes) -> dict[str, Tensor]:
        """``change_*``: mean |output - input| in [0, 2]; ``rho_*``: the mean ρ of every AdaLIN and ILN, in order."""
        measures = {}
        for way, real, fake in (("AB", batch["A"], fakes.fake_B), ("BA", batch["B"], fakes.fake_A)):
            measures[f"change_{way}"] = F.l1_loss(fake.image, real)
            norms = [m for m in self.get_submodule(f"G_{way}").modules() if isinstance(m, (AdaLIN, ILN))]
            measures[f"rho_{way}"] = torch.stack([norm.rho.mean() for norm in norms])
        return measures

    @torch.no_grad()
    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        def seen(side: str, images: Tensor) -> dict[str, Tensor]:
            judges = {scale: self.get_submodule(f"{scale}_D_{side}") for scale in self.SCALES}
            return {f"{scale} D_{side}": 2 * judge.heat_map(images) - 1 for scale, judge in judges.items()}

        G_AB, G_BA = (self.get_submodule(self.generators[direction]) for direction in ("AtoB", "BtoA"))
        return two_way_sheet(batch, G_AB, G_BA, seen)


# ----------------------------------------------------------------------------------------------------------
#  pix2pix
# ----------------------------------------------------------------------------------------------------------


class Paired(System):
    """pix2pix (Isola et al., CVPR 2017, eq. 4), with the terms of the official PyTorch code.

    One generator, for one ``direction``, and a discriminator that sees input and output together:
    L_D = ½ [ GAN(D([x, y]), 1) + GAN(D([x, G(x)]), 0) ],
    L_G = lambda_gan · GAN(D([x, G(x)]), 1) + lambda_L1 · |G(x) - y|₁.

    The discriminator moves first. A term of weight 0 is left out: without the adversarial one (the paper's "L1") there
    is no discriminator. InputError where no term is left. No replay buffer.
    """

    data = "paired"

    def __init__(
        self,
        generator: Callable[[], nn.Module],
        discriminator: Callable[[], nn.Module],
        direction: str,
        gan_loss: GanLoss,
        lambda_gan: float,
        lambda_L1: float,
    ):
        super().__init__()
        if not (lambda_gan or lambda_L1):
            raise InputError("--lambda_gan 0 --lambda_L1 0: nothing to train by, expected one of them above 0")
        self.G = generator()
        self.min_size, self.size_multiple = self.G.min_size, self.G.size_multiple
        if lambda_gan:
            self.D = discriminator()
            self.min_size = max(self.min_size, self.D.min_size)
        self.generators = {direction: "G"}
        self.source, self.target = direction[0], direction[-1]
        self.gan_loss, self.lambda_gan, self.lambda_L1 = gan_loss, lambda_gan, lambda_L1

    @property
    def turns(self) -> tuple[Turn, ...]:
        learn = Turn("G", ("G",), self.generator_losses)
        return (Turn("D", ("D",), self.discriminator_losses), learn) if self.lambda_gan else (learn,)

    def forward(self, batch: Batch) -> Tensor:
        return self.G(batch[self.source]).image

    def discriminator_losses(self, batch: Batch, fake: Tensor) -> dict[str, Tensor]:
        given, real = batch[self.source], batch[self.target]
        pairs = torch.cat([given, real], dim=1), torch.cat([given, fake.detach()], dim=1)
        return {"D": real_against_fake(self.D, *pairs, self.gan_loss)}

    def generator_losses(self, batch: Batch, fake: Tensor) -> dict[str, Tensor]:
        losses = {}
        if self.lambda_gan:
            logits = self.D(torch.cat([batch[self.source], fake], dim=1))
            losses["G"] = self.lambda_gan * self.gan_loss(logits, 1.0)
        if self.lambda_L1:
            losses["L1"] = self.lambda_L1 * F.l1_loss(fake, batch[self.target])
        return losses

    @torch.no_grad()
    def measures(self, batch: Batch, fake: Tensor) -> dict[str, Tensor]:
        """``change``: mean |output - input| in [0, 2]."""
        return {"change": F.l1_loss(fake, batch[self.source])}

    @torch.no_grad()
    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        with in_use(self.G) as generator:
            fake = generator(batch[self.source]).image
        return {
            f"real {self.source}": batch[self.source],
            f"fake {self.target}": fake,
            f"real {self.target}": batch[self.target],
        }


# ----------------------------------------------------------------------------------------------------------
#  DCGAN
# ----------------------------------------------------------------------------------------------------------


class DCGAN(System):
    """DCGAN (Radford et al., ICLR 2016): pictures from noise, one generator against one discriminator.

    L_D = CE(D(real), 1) + CE(D(G(noise)), 0), L_G = CE(D(G(noise)), 1), CE the binary cross-entropy; the discriminator
    moves first. A batch is {"image": (B, channels, size, size), "noise": (B, nz)}. Real and generated pictures go
    through the discriminator in calls of their own, because BatchNorm sees the batch.
    """

    data = "plain"

    def __init__(self, generator: Callable[[], nn.Module], discriminator: Callable[[], nn.Module]):
        super().__init__()
        self.G, self.D = generator(), discriminator()
        self.generators = {NOISE: "G"}
        self.min_size = self.size_multiple = self.G.settings["size"]

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
        with in_use(self.G) as generator:
            samples = generator(batch["noise"]).split(len(batch["image"]))
        return {"real": batch["image"]} | {f"sample {i}": column for i, column in enumerate(samples, 1)}


# ----------------------------------------------------------------------------------------------------------
#  The table
# ----------------------------------------------------------------------------------------------------------


def attentiongan(
    *,
    channels: int = 3,
    ngf: int = 64,
    ndf: int = 64,
    n_residual_blocks: int = 9,
    n_layers_D: int = 3,
    n_masks: int = 10,
    attention_kernel: int = 1,
    no_background: bool = False,
    upsample: str = "transposed",
    attn_disc: str = "none",
    attn_real: str = "own",
    attn_grad: str = "both",
    lambda_cyc: float = 10.0,
    lambda_id: float = 0.5,
    pool_size: int = 50,
    seed: Sequence[int] = (0,),
) -> TwoWay:
    """AttentionGAN, scheme II. Raises InputError for guidance by the background mask where there is none."""
    if no_background and attn_disc != "none":
        raise InputError(f"--attn_disc {attn_disc} needs the background mask, which --no_background leaves out")
    return TwoWay(
        lambda: AttentionGenerator(
            channels, ngf, n_residual_blocks, n_masks, attention_kernel, not no_background, upsample
        ),
        lambda inputs: PatchDiscriminator(inputs, ndf, n_layers_D),
        Weights(cyc=lambda_cyc, identity=lambda_id),
        pool_size,
        seed,
        channels,
        attn_disc,
        attn_real,
        attn_grad,
    )


def attentiongan1(
    *,
    channels: int = 3,
    ngf: int = 64,
    ndf: int = 64,
    n_residual_blocks: int = 9,
    n_layers_D: int = 3,
    upsample: str = "transposed",
    attn_disc: str = "concat",
    attn_real: str = "own",
    attn_grad: str = "both",
    lambda_gan: float = 0.5,
    lambda_cyc: float = 10.0,
    lambda_pixel: float = 1.0,
    lambda_tv: float = 1e-6,
    curriculum_epochs: int = 10,
    pool_size: int = 50,
    seed: Sequence[int] = (0,),
) -> TwoWay:
    """AttentionGAN, scheme I, with the attention-guided discriminator that the paper describes."""
    if not lambda_gan:
        raise InputError("--lambda_gan 0: nothing but a copy to train for, expected a weight above 0")
    return TwoWay(
        lambda: SingleMaskGenerator(channels, ngf, n_residual_blocks, upsample),
        lambda inputs: PatchDiscriminator(inputs, ndf, n_layers_D),
        Weights(lambda_gan, lambda_cyc, pixel=lambda_pixel, tv=lambda_tv),
        pool_size,
        seed,
        channels,
        attn_disc,
        attn_real,
        attn_grad,
        curriculum=curriculum_epochs,
    )


def cyclegan(
    *,
    channels: int = 3,
    ngf: int = 64,
    ndf: int = 64,
    n_residual_blocks: int = 9,
    n_layers_D: int = 3,
    upsample: str = "transposed",
    lambda_cyc: float = 10.0,
    lambda_id: float = 5.0,
    pool_size: int = 50,
    seed: Sequence[int] = (0,),
) -> TwoWay:
    """CycleGAN."""
    return TwoWay(
        lambda: ResNetGenerator(channels, ngf, n_residual_blocks, upsample),
        lambda inputs: PatchDiscriminator(inputs, ndf, n_layers_D),
        Weights(cyc=lambda_cyc, identity=lambda_id),
        pool_size,
        seed,
        channels,
    )


def ugatit(
    *,
    channels: int = 3,
    ngf: int = 64,
    ndf: int = 64,
    n_residual_blocks: int = 4,
    light: bool = False,
    init: str = "normal",
    lambda_gan: float = 1.0,
    lambda_cyc: float = 10.0,
    lambda_id: float = 10.0,
    lambda_cam: float = 1000.0,
    img_height: int = 256,
    img_width: int = 256,
) -> UGATIT:
    """U-GAT-IT, full or light."""
    size = None if light else (img_height, img_width)
    return UGATIT(
        lambda: UGATITGenerator(channels, ngf, n_residual_blocks, size, init),
        lambda n_layers: CAMDiscriminator(channels, ndf, n_layers, init),
        depths(min(img_height, img_width)),
        UGATITWeights(lambda_gan, lambda_cyc, lambda_id, lambda_cam),
    )


def pix2pix(
    *,
    channels: int = 3,
    ngf: int = 64,
    ndf: int = 64,
    unet_depth: int = 0,
    n_layers_D: int = 3,
    direction: str = "AtoB",
    gan_loss: str = "bce",
    lambda_gan: float = 1.0,
    lambda_L1: float = 100.0,
    img_height: int = 256,
    img_width: int = 256,
) -> Paired:
    """pix2pix."""
    most = int(math.log2(min(img_height, img_width)))
    if most < 2:
        raise InputError(f"--img_height {img_height}, --img_width {img_width}: expected at least 4")
    depth = unet_depth or most
    if not 2 <= depth <= most:
        raise InputError(f"--unet_depth {depth}: expected 2 to {most} at {img_height} x {img_width}, or 0 for the most")
    return Paired(
        lambda: UNetGenerator(channels, ngf, depth),
        lambda: PatchDiscriminator(2 * channels, ndf, n_layers_D, affine=True),
        direction,
        GAN_LOSSES[gan_loss],
        lambda_gan,
        lambda_L1,
    )


def dcgan(
    *,
    channels: int = 3,
    nz: int = 100,
    ngf: int = 64,
    ndf: int = 64,
    upsample: str = "transposed",
    img_height: int = 64,
    img_width: int = 64,
) -> DCGAN:
    """DCGAN."""
    if img_height != img_width or img_height not in DCGANGenerator.sizes:
        raise InputError(
            f"--img_height {img_height} --img_width {img_width}: dcgan makes square pictures, expected both to be one "
            f"of {', '.join(map(str, DCGANGenerator.sizes))}"
        )
    return DCGAN(
        lambda: DCGANGenerator(nz, ngf, channels, img_height, upsample),
        lambda: DCGANDiscriminator(channels, ndf, img_height),
    )


# Name to builder. A builder's keywords are the system's options and their defaults its presets; ``seed`` is the
# key of the replay buffers' randomness, ``img_height`` and ``img_width`` are the size of the training pictures.
# ``train.py`` makes the flags from here.
SYSTEMS: dict[str, Callable[..., System]] = {
    "attentiongan": attentiongan,
    "attentiongan1": attentiongan1,
    "cyclegan": cyclegan,
    "ugatit": ugatit,
    "pix2pix": pix2pix,
    "dcgan": dcgan,
}

# What a system wants of the options that all systems share, where it is not their usual default.
TRAINING_PRESETS: dict[str, dict[str, Any]] = {
    # 294 epochs of selfie2anime's 3,400 pictures are 999,600 steps, the official 1,000,000 in whole epochs.
    "ugatit": {"n_epochs": 294, "lr": 1e-4, "weight_decay": 1e-4, "decay_by": "step"},
    # The epochs are those of pytorch/examples.
    "dcgan": {
        "img_height": 64,
        "img_width": 64,
        "resize": "short_side",
        "n_epochs": 25,
        "batch_size": 128,
        "decay_by": "never",
    },
}
