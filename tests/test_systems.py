"""The textbook step stands here as the oracle: six generator calls, plain discriminator calls, plain loops."""

import random

import pytest
import torch
from torch import nn

from models import AttentionGenerator
from systems import SYSTEMS, Turn, least_squares, mask_measures
from train import play, trained_parameters, update

SMALL = dict(ngf=4, ndf=4, n_residual_blocks=2, n_layers_D=2)
SYSTEM_SETTINGS = {"attentiongan": {**SMALL, "n_masks": 4}, "cyclegan": SMALL}


def build(name, seed=0, **settings):
    torch.manual_seed(seed)
    system = SYSTEMS[name](**{**SYSTEM_SETTINGS[name], **settings}).double()
    for parameter in system.parameters():  # larger than at the start, so that every term matters
        if parameter.ndim == 4:
            nn.init.normal_(parameter, std=0.15)
    return system


def make_batch(seed, n=2, size=16):
    generator = torch.Generator().manual_seed(seed)
    return {s: torch.rand(n, 3, size, size, dtype=torch.float64, generator=generator) * 2 - 1 for s in "AB"}


def textbook_losses(system, batch, lambda_cyc, lambda_id):
    """CycleGAN's objective as the papers and the official code have it: every call made singly.

    Returns the generators' and the discriminators' terms (no replay buffer).
    """
    mse, l1 = nn.MSELoss(), nn.L1Loss()
    real_A, real_B = batch["A"], batch["B"]
    G_AB, G_BA = (lambda x: system.G_AB(x).image), (lambda x: system.G_BA(x).image)
    D_A, D_B = (lambda x: system.D_A(x)[0]), (lambda x: system.D_B(x)[0])

    fake_B = G_AB(real_A)
    recovered_A = G_BA(fake_B)
    fake_A = G_BA(real_B)
    recovered_B = G_AB(fake_A)
    same_B = G_AB(real_B)
    same_A = G_BA(real_A)

    valid, false = torch.ones_like(D_A(real_A)), torch.zeros_like(D_A(real_A))
    generators = {
        "G_AB": mse(D_B(fake_B), valid),
        "G_BA": mse(D_A(fake_A), valid),
        "cycle_A": l1(recovered_A, real_A) * lambda_cyc,
        "cycle_B": l1(recovered_B, real_B) * lambda_cyc,
        "identity_A": l1(same_A, real_A) * lambda_id,
        "identity_B": l1(same_B, real_B) * lambda_id,
    }
    discriminators = {
        "D_A": (mse(D_A(real_A), valid) + mse(D_A(fake_A.detach()), false)) * 0.5,
        "D_B": (mse(D_B(real_B), valid) + mse(D_B(fake_B.detach()), false)) * 0.5,
    }
    return generators, discriminators


def gradients(losses, parameters):
    return torch.autograd.grad(sum(losses.values()), parameters, retain_graph=True)


@pytest.mark.parametrize("name, lambda_id", [("attentiongan", 0.5), ("cyclegan", 5.0), ("attentiongan", 0.0)])
def test_losses_and_gradients_are_the_textbook_steps(name, lambda_id):
    system = build(name, pool_size=0, lambda_id=lambda_id)
    batch = make_batch(1)
    expected = textbook_losses(system, batch, 10.0, lambda_id)
    fakes = system(batch)
    for turn, theirs in zip(system.turns, expected, strict=True):
        ours = turn.losses(batch, fakes)
        if lambda_id == 0:
            theirs = {k: v for k, v in theirs.items() if "identity" not in k}
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert abs(ours[key] - theirs[key]) < 1e-12, key
        parameters = trained_parameters(system, turn.networks)
        for mine, textbook in zip(gradients(ours, parameters), gradients(theirs, parameters), strict=True):
            assert mine.abs().max() > 0
            assert (mine - textbook).abs().max() < 1e-9 * textbook.abs().max()


class TextbookPool:
    """CycleGAN's image pool on a Python list, with the draws of ``source`` (a ReplayBuffer) replayed."""

    def __init__(self, size):
        self.size, self.images = size, []

    def query(self, image, coin, slot):
        if len(self.images) < self.size:
            self.images.append(image)
            return image
        if coin:
            old, self.images[slot] = self.images[slot], image
            return old
        return image


@pytest.mark.parametrize("name", SYSTEMS)
def test_several_whole_steps_are_the_textbook_ones(name):
    """Adam, the order of turns, the replay buffers: three steps leave the same weights as three by the book."""
    import numpy as np

    ours, book = build(name, pool_size=2), build(name, pool_size=2)
    lambda_id = ours.lambda_id
    optimizers = {
        t.player: torch.optim.Adam(trained_parameters(ours, t.networks), 2e-4, (0.5, 0.999), fused=True)
        for t in ours.turns
    }
    G = [*book.G_AB.parameters(), *book.G_BA.parameters()]
    D = [*book.D_A.parameters(), *book.D_B.parameters()]
    optimizer_G = torch.optim.Adam(G, 2e-4, (0.5, 0.999), foreach=False, fused=False)
    optimizer_D = torch.optim.Adam(D, 2e-4, (0.5, 0.999), foreach=False, fused=False)
    pools = [TextbookPool(2), TextbookPool(2)]
    seen = 0
    for step in range(3):
        batch = make_batch(step)
        play(ours, optimizers, lambda: torch.autocast("cpu", enabled=False), batch)

        fake_A, fake_B = book.G_BA(batch["B"]).image.detach(), book.G_AB(batch["A"]).image.detach()
        generators, _ = textbook_losses(book, batch, 10.0, lambda_id)
        optimizer_G.zero_grad()
        sum(generators.values()).backward()
        optimizer_G.step()

        pooled = []
        for domain, (pool, fake) in enumerate(zip(pools, (fake_A, fake_B), strict=True)):
            handed = []
            for i, image in enumerate(fake):
                draws = np.random.default_rng((3, 0, domain, seen + i))
                coin = draws.random() < 0.5
                handed.append(pool.query(image, coin, int(draws.integers(2)) if coin else 0))
            pooled.append(torch.stack(handed))
        seen += 2
        optimizer_D.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for discriminator, real, fake in ((book.D_A, batch["A"], pooled[0]), (book.D_B, batch["B"], pooled[1])):
            (on_real,), (on_fake,) = discriminator(real), discriminator(fake)
            loss = loss + 0.5 * (((on_real - 1) ** 2).mean() + (on_fake**2).mean())
        loss.backward()
        optimizer_D.step()
    for (key, mine), theirs in zip(ours.named_parameters(), book.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-9, key


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_turn_is_pure_and_changes_only_its_own_networks(name):
    system = build(name)
    batch = make_batch(0)
    fakes = system(batch)
    for i, turn in enumerate(system.turns):
        assert isinstance(turn, Turn)
        first, second = turn.losses(batch, fakes), turn.losses(batch, fakes)
        assert all(torch.equal(first[k], second[k]) for k in first)
        before = {k: v.clone() for k, v in system.state_dict().items() if isinstance(v, torch.Tensor)}
        optimizer = torch.optim.Adam(trained_parameters(system, turn.networks), fused=True)
        update(optimizer, first)
        changed = {k.split(".")[0] for k, v in before.items() if not torch.equal(v, system.state_dict()[k])}
        assert changed == set(turn.networks)
        if i == 0:  # nor is any work spent on the gradients of networks that do not move
            idle = [p for k, p in system.named_parameters() if k.split(".")[0] not in turn.networks]
            assert idle and all(p.grad is None for p in idle)


def test_every_player_trains_and_every_network_is_trained():
    for name in SYSTEMS:
        system = build(name)
        trained = [n for t in system.turns for n in t.networks]
        assert sorted(trained) == sorted(n for n, m in system.named_children() if any(True for _ in m.parameters()))
        assert set(system.generators.values()) <= set(trained)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_sheet_has_both_directions(name):
    system, batch = build(name), make_batch(0)
    columns = system.sheet(batch)
    expected = ["real A", "fake B", "recovered A", "real B", "fake A", "recovered B"]
    assert [c for c in columns if "attention" not in c] == expected
    assert torch.equal(columns["fake B"], system.G_AB(batch["A"]).image)
    assert torch.equal(columns["recovered B"], system.G_AB(system.G_BA(batch["B"]).image).image)
    if name == "attentiongan":
        assert torch.equal(columns["attention A"], 2 * system.G_AB(batch["A"]).foreground - 1)
    assert all(not c.requires_grad for c in columns.values())


def test_measures_tell_copying_from_changing():
    system, batch = build("attentiongan"), make_batch(0)
    fakes = system(batch)
    measures = system.measures(batch, fakes)
    torch.testing.assert_close(measures["change_AB"], (fakes.fake_B.image - batch["A"]).abs().mean())
    torch.testing.assert_close(measures["mask_AB_mean"].sum(), torch.tensor(1.0, dtype=torch.float64))
    assert measures["mask_BA_entropy"].shape == (4,)
    assert all(not v.requires_grad for v in measures.values())
    decided, undecided = torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 0.5)
    decided[:, 1] = 1
    assert mask_measures(decided)["entropy"].tolist() == [0, 0]
    torch.testing.assert_close(mask_measures(undecided)["entropy"], torch.ones(2))


def test_least_squares_sums_over_maps():
    maps = (torch.tensor([0.0, 2.0]), torch.tensor([3.0]))
    assert least_squares(maps, 1.0) == 1.0 + 4.0


def test_bf16_keeps_softmax_fusion_and_losses_in_float32():
    torch.manual_seed(0)
    system = SYSTEMS["attentiongan"](**SYSTEM_SETTINGS["attentiongan"])
    batch = {k: v.float() for k, v in make_batch(0).items()}
    with torch.autocast("cpu", torch.bfloat16):
        fakes = system(batch)
        losses = [loss for turn in system.turns for loss in turn.losses(batch, fakes).values()]
    assert all(t.dtype == torch.float32 for t in (*fakes.fake_B, fakes.same_A, fakes.pooled_B, *losses))
    # Masks rounded to bf16 sum to 1 only to about 1e-2.
    assert (fakes.fake_B.attention.sum(dim=1) - 1).abs().max() < 1e-5


def test_systems_differ_by_seed_and_not_by_the_python_random_state():
    random.seed(1)
    first = build("attentiongan").state_dict()
    random.seed(2)
    second, third = build("attentiongan").state_dict(), build("attentiongan", seed=1).state_dict()
    key = "G_AB.encoder.0.weight"
    assert torch.equal(first[key], second[key]) and not torch.equal(first[key], third[key])


def test_settings_reach_the_networks():
    system = SYSTEMS["attentiongan"](**SMALL, n_masks=3, attention_kernel=7, channels=1)
    assert isinstance(system.G_BA, AttentionGenerator)
    expected = dict(channels=1, ngf=4, n_residual_blocks=2, n_masks=3, attention_kernel=7)
    assert system.G_BA.settings == expected
    assert system.min_size == 12 and system.size_multiple == 4
