"""How networks train one another: one class per kind of game, the loss terms, and the table ``SYSTEMS``.

A system owns its networks and prices each player's turn; the training loop pays (see ``train.py``). It knows no
optimizer, no device, no file and no rank.

Notation: pictures of domains A and B, ``fake_B = G_AB(real_A)``, ``recovered_A = G_BA(fake_B)``,
``same_A = G_BA(real_A)``; ``D_A`` judges pictures of domain A. Everything is (B, channels, H, W) in [-1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import AttentionGenerator, PatchDiscriminator, ReplayBuffer, ResNetGenerator, Translation

Batch = Mapping[str, Tensor]


class Turn(NamedTuple):
    """One player's move.

    player: "G" or "D", also the key of its optimizer.
    networks: the names of what the move may change (names, so that a wrapped network leaves no stale reference).
    losses: (batch, fakes) to named, already weighted scalars; calling it twice changes nothing.
    """

    player: str
    networks: tuple[str, ...]
    losses: Callable[[Batch, Any], dict[str, Tensor]]


class System(nn.Module, ABC):
    """The interface between a game and the loop.

    Children that stand in no turn (replay buffers) are each rank's own.
    """

    generators: ClassVar[dict[str, str]]  # direction ("AtoB") to the name of the network that translates so
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
        """Called before each epoch, counted from 0, for systems whose weights change as they train."""

    def settle(self) -> None:
        """Called after all turns of a step, for systems that keep parameters within bounds."""


# ----------------------------------------------------------------------------------------------------------
#  Loss terms
# ----------------------------------------------------------------------------------------------------------


def least_squares(logits: Sequence[Tensor], target: float) -> Tensor:
    """LSGAN (Mao et al., 2017): mean of (logit - target)², summed over the maps of a discriminator."""
    return torch.stack([(x - target).square().mean() for x in logits]).sum()


def real_against_fake(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The least-squares loss of a discriminator, halved to slow it down (CycleGAN, Appendix 7.1).

    Both go through in one call, which is exact as long as the norm is per picture.
    """
    maps = [logits.chunk(2) for logits in discriminator(torch.cat([real, fake]))]
    return 0.5 * (least_squares([r for r, _ in maps], 1.0) + least_squares([f for _, f in maps], 0.0))


def mask_measures(attention: Tensor) -> dict[str, Tensor]:
    """Each mask's mean and its mean binary entropy in bits (0: every pixel decided, 1: every pixel at 1/2).

    attention: (B, n, H, W), values in [0, 1]. Both results have n entries.
    """
    bits = (torch.special.entr(attention) + torch.special.entr(1 - attention)) / torch.log(attention.new_tensor(2.0))
    return {"mean": attention.mean(dim=(0, 2, 3)), "entropy": bits.mean(dim=(0, 2, 3))}


# ----------------------------------------------------------------------------------------------------------
#  The two-way game: CycleGAN, AttentionGAN
# ----------------------------------------------------------------------------------------------------------


class TwoWayFakes(NamedTuple):
    """same_* are None where the identity terms have no weight; pooled_* are what the replay buffers handed back."""

    fake_A: Translation
    fake_B: Translation
    recovered_A: Translation
    recovered_B: Translation
    same_A: Tensor | None
    same_B: Tensor | None
    pooled_A: Tensor
    pooled_B: Tensor


def split(both: Translation) -> tuple[Translation, Translation]:
    """Undo the concatenation of two equal batches."""
    halves = [(None, None) if part is None else part.chunk(2) for part in both]
    first, second = zip(*halves, strict=True)
    return Translation(*first), Translation(*second)


class TwoWay(System):
    """Two generators, two discriminators, least-squares + cycle + identity (CycleGAN, eq. 3; AttentionGAN II).

    The terms are those of the official code, summed over both directions:
    L_G = Σ [ LSGAN + lambda_cyc · |recovered - real|₁ + lambda_id · |same - real|₁ ],
    L_D = Σ ½ [ (D(real) - 1)² + D(pooled)² ].
    """

    generators: ClassVar = {"AtoB": "G_AB", "BtoA": "G_BA"}

    def __init__(
        self,
        generator: Callable[[], nn.Module],
        discriminator: Callable[[], nn.Module],
        lambda_cyc: float,
        lambda_id: float,
        pool_size: int,
        seed: Sequence[int],
    ):
        super().__init__()
        self.G_AB, self.G_BA = generator(), generator()
        self.D_A, self.D_B = discriminator(), discriminator()
        self.pool_A = ReplayBuffer(pool_size, (*seed, 0))
        self.pool_B = ReplayBuffer(pool_size, (*seed, 1))
        self.lambda_cyc = lambda_cyc
        self.lambda_id = lambda_id
        self.min_size = max(self.G_AB.min_size, self.D_A.min_size)
        self.size_multiple = self.G_AB.size_multiple

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn("G", ("G_AB", "G_BA"), self.generators_losses),
            Turn("D", ("D_A", "D_B"), self.discriminators_losses),
        )

    def forward(self, batch: Batch) -> TwoWayFakes:
        real_A, real_B = batch["A"], batch["B"]
        same_A = same_B = None
        if self.lambda_id:
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
            pooled_A=self.pool_A(fake_A.image),
            pooled_B=self.pool_B(fake_B.image),
        )

    def generators_losses(self, batch: Batch, fakes: TwoWayFakes) -> dict[str, Tensor]:
        losses = {
            "G_AB": least_squares(self.D_B(fakes.fake_B.image), 1.0),
            "G_BA": least_squares(self.D_A(fakes.fake_A.image), 1.0),
            "cycle_A": self.lambda_cyc * F.l1_loss(fakes.recovered_A.image, batch["A"]),
            "cycle_B": self.lambda_cyc * F.l1_loss(fakes.recovered_B.image, batch["B"]),
        }
        if fakes.same_A is not None and fakes.same_B is not None:
            losses["identity_A"] = self.lambda_id * F.l1_loss(fakes.same_A, batch["A"])
            losses["identity_B"] = self.lambda_id * F.l1_loss(fakes.same_B, batch["B"])
        return losses

    def discriminators_losses(self, batch: Batch, fakes: TwoWayFakes) -> dict[str, Tensor]:
        return {
            "D_A": real_against_fake(self.D_A, batch["A"], fakes.pooled_A),
            "D_B": real_against_fake(self.D_B, batch["B"], fakes.pooled_B),
        }

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
        columns = {}
        ways = (("A", "B", self.G_AB, self.G_BA), ("B", "A", self.G_BA, self.G_AB))
        for source, target, there, back in ways:
            fake = there(batch[source])
            columns[f"real {source}"] = batch[source]
            columns[f"fake {target}"] = fake.image
            if fake.foreground is not None:
                columns[f"attention {source}"] = 2 * fake.foreground - 1
            columns[f"recovered {source}"] = back(fake.image).image
        return columns


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
    lambda_cyc: float = 10.0,
    lambda_id: float = 0.5,
    pool_size: int = 50,
    seed: Sequence[int] = (0,),
) -> TwoWay:
    """AttentionGAN, scheme II."""
    return TwoWay(
        lambda: AttentionGenerator(channels, ngf, n_residual_blocks, n_masks, attention_kernel),
        lambda: PatchDiscriminator(channels, ndf, n_layers_D),
        lambda_cyc,
        lambda_id,
        pool_size,
        seed,
    )


def cyclegan(
    *,
    channels: int = 3,
    ngf: int = 64,
    ndf: int = 64,
    n_residual_blocks: int = 9,
    n_layers_D: int = 3,
    lambda_cyc: float = 10.0,
    lambda_id: float = 5.0,
    pool_size: int = 50,
    seed: Sequence[int] = (0,),
) -> TwoWay:
    """CycleGAN."""
    return TwoWay(
        lambda: ResNetGenerator(channels, ngf, n_residual_blocks),
        lambda: PatchDiscriminator(channels, ndf, n_layers_D),
        lambda_cyc,
        lambda_id,
        pool_size,
        seed,
    )


# Name to builder. A builder's keywords are the system's options and their defaults its presets; ``seed`` is the
# key of the replay buffers' randomness. ``train.py`` makes the flags from here.
SYSTEMS: dict[str, Callable[..., System]] = {"attentiongan": attentiongan, "cyclegan": cyclegan}
