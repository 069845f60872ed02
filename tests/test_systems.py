"""The textbook step stands here as the oracle: six generator calls, plain discriminator calls, plain loops."""

from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    BOTH_DIRECTIONS,
    ONE,
    SMALL,
    SYSTEM_SETTINGS,
    TEXTBOOK,
    build,
    gradients,
    guided_input,
    make_batch,
    textbook_losses,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import train
from models import ILN, AdaLIN, AttentionGenerator, NoiseDropout, ReplayBuffer
from options import all_options, parse_options
from systems import SYSTEMS, Turn, mask_measures
from train import CapturedStep, trained_parameters, training_step, update


def assert_same_turn(turn, found, expected, ours, book):
    """The losses of a turn, and their gradients to the networks that it changes."""
    assert found.keys() == expected.keys()
    for key in found:
        assert abs(found[key] - expected[key]) < 1e-12 * max(1, expected[key]), key
    mine, by_book = (
        gradients(losses, trained_parameters(system, turn.networks))
        for losses, system in ((found, ours), (expected, book))
    )
    for one, other in zip(mine, by_book, strict=True):
        assert one.abs().max() > 0
        assert (one - other).abs().max() < 1e-9 * other.abs().max()


def assert_same_weights(ours, book):
    for (key, mine), theirs in zip(ours.named_parameters(), book.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-9, key


def adams(system, lr=1e-3, **settings):
    """Each player's optimizer, as in training."""
    make = partial(torch.optim.Adam, lr=lr, betas=(0.5, 0.999), fused=True, **settings)
    return {turn.player: make(trained_parameters(system, turn.networks)) for turn in system.turns}


def plain_adam(parameters, lr=1e-3, **settings):
    return torch.optim.Adam(parameters, lr, (0.5, 0.999), foreach=False, fused=False, **settings)


@pytest.mark.parametrize("name, settings, terms", TEXTBOOK)
def test_losses_and_gradients_are_the_textbook_steps(name, settings, terms):
    system = build(name, pool_size=0, **settings)
    batch = make_batch(1)
    expected = textbook_losses(system, batch, **terms)
    fakes = system(batch)
    for turn, theirs in zip(system.turns, expected, strict=True):
        assert_same_turn(turn, turn.losses(batch, fakes), theirs, system, system)


def test_the_terms_that_tie_the_output_to_the_input_may_come_later():
    batch = make_batch(1)
    tying = ("cycle", "pixel")

    def ratios(epoch, curriculum):
        """Each loss over its plain one: the common factor of the tying terms, and that of the others."""
        plain, system = (build("attentiongan1", pool_size=0, curriculum_epochs=n) for n in (0, curriculum))
        system.set_epoch(epoch)
        expected = plain.generators_losses(batch, plain(batch))
        found = {
            key: (loss / expected[key]).item() for key, loss in system.generators_losses(batch, system(batch)).items()
        }
        tied = {round(v, 9) for k, v in found.items() if k.startswith(tying)}
        others = {round(v, 9) for k, v in found.items() if not k.startswith(tying)}
        return tied, others

    assert ratios(9, 10) == ({0.01}, {0.99})
    assert ratios(10, 10) == ({0.5}, {0.5})
    assert ratios(9, 0) == ({1.0}, {1.0})


def ugatit_discriminators(system, batch):
    """The terms of U-GAT-IT's first turn as the official code has them: every call made singly, real before fake."""
    losses = {}
    for side, other in ("AB", "BA"):
        fake = getattr(system, f"G_{other}{side}")(batch[other]).image.detach()
        loss = 0
        for scale in ("global", "local"):
            D = getattr(system, f"{scale}_D_{side}")
            for on_real, on_fake in zip(D(batch[side]), D(fake), strict=True):  # logit map, CAM logits
                loss = loss + ((on_real - 1) ** 2).mean() + (on_fake**2).mean()
        losses[f"D_{side}"] = loss
    return losses


def ugatit_generators(system, batch):
    """Those of its second turn, for which the official code runs the generators again."""
    l1, bce = nn.L1Loss(), nn.BCEWithLogitsLoss()
    losses = {}
    for source, target in ("AB", "BA"):
        G, F = getattr(system, f"G_{source}{target}"), getattr(system, f"G_{target}{source}")
        fake, same_target = G(batch[source]), G(batch[target])
        judged = [x for s in ("global", "local") for x in getattr(system, f"{s}_D_{target}")(fake.image)]
        losses[f"G_{source}{target}"] = sum(((x - 1) ** 2).mean() for x in judged)
        losses[f"cycle_{source}"] = 10 * l1(F(fake.image).image, batch[source])
        losses[f"identity_{source}"] = 10 * l1(F(batch[source]).image, batch[source])
        is_source, is_target = fake.cam_logits, same_target.cam_logits
        cam = bce(is_source, torch.ones_like(is_source)) + bce(is_target, torch.zeros_like(is_target))
        losses[f"cam_{source}{target}"] = 1000 * cam
    return losses


def ugatit_by_book(system, batch, player):
    return {"D": ugatit_discriminators, "G": ugatit_generators}[player](system, batch)


def test_weights_of_u_gat_its_terms_may_change():
    batch = make_batch(1)
    plain = build("ugatit")
    weighed = build("ugatit", lambda_gan=3.0, lambda_cyc=20.0, lambda_id=5.0, lambda_cam=100.0)
    factors = {"D": 3, "G": 3, "cycle": 2, "identity": 0.5, "cam": 0.1}
    for mine, theirs in zip(plain.turns, weighed.turns, strict=True):
        a, b = mine.losses(batch, plain(batch)), theirs.losses(batch, weighed(batch))
        for key in a:
            torch.testing.assert_close(b[key], factors[key.split("_")[0]] * a[key])


def pix2pix_by_book(system, batch, player, direction="AtoB", loss=None, gan=1.0, L1=100.0):
    """The terms of pix2pix as the official code has them: every call made singly."""
    loss = loss or nn.BCEWithLogitsLoss()
    given, real = batch[direction[0]], batch[direction[-1]]
    fake = system.G(given).image

    def judge(picture, verdict):
        (logits,) = system.D(torch.cat([given, picture], dim=1))
        return loss(logits, torch.full_like(logits, verdict))

    if player == "D":
        return {"D": (judge(fake.detach(), 0.0) + judge(real, 1.0)) * 0.5}
    terms = {"G": gan * judge(fake, 1.0)} if gan else {}
    return terms | ({"L1": L1 * nn.L1Loss()(fake, real)} if L1 else {})


def test_pix2pix_has_one_direction_and_only_the_networks_it_needs():
    system, batch = build("pix2pix", direction="BtoA"), make_batch(0)
    assert system.generators == {"BtoA": "G"} and system.data == "paired"
    columns = system.sheet(batch)
    assert list(columns) == ["real B", "fake A", "real A"]
    assert torch.equal(columns["fake A"], system.G(batch["B"]).image) and not columns["fake A"].requires_grad
    assert torch.equal(columns["real A"], batch["A"]) and torch.equal(columns["real B"], batch["B"])
    torch.testing.assert_close(
        system.measures(batch, system(batch))["change"], (columns["fake A"] - batch["B"]).abs().mean()
    )
    alone = build("pix2pix", lambda_gan=0.0)
    assert [name for name, _ in alone.named_children()] == ["G"] and list(alone.sheet(batch))[1] == "fake B"


def test_settings_reach_the_networks_of_pix2pix():
    def make(size=(256, 256), **settings):
        with torch.device("meta"):
            return SYSTEMS["pix2pix"](**settings).build(size)

    assert make().G.settings == dict(channels=3, ngf=64, depth=8)
    assert make((300, 128)).G.settings["depth"] == make(unet_depth=7).G.settings["depth"] == 7
    small = make((64, 64), channels=1, ngf=8, ndf=4, n_layers_D=2)
    assert small.G.settings == dict(channels=1, ngf=8, depth=6) and small.D.layers[0].weight.shape == (4, 2, 4, 4)
    assert (small.size_multiple, small.min_size) == (64, 64)
    assert (make(unet_depth=2).size_multiple, make(unet_depth=2).min_size) == (4, 24)


def test_pix2pix_draws_its_noise_while_training_and_none_for_a_sheet():
    system = build("pix2pix", size=(64, 64), ngf=2)
    assert any(isinstance(m, NoiseDropout) for m in system.G.modules())
    batch = make_batch(0, size=64)
    assert not torch.equal(system(batch), system(batch))
    before = torch.get_rng_state()
    first, second = system.sheet(batch), system.sheet(batch)
    assert torch.equal(first["fake B"], second["fake B"]) and torch.equal(torch.get_rng_state(), before)
    assert system.G.training


def dcgan_by_book(system, batch, player):
    """Log-likelihoods of sigmoids, real before fake; log D(G(z)) grows, instead of log(1 - D(G(z))) falling."""
    bce, fake = nn.BCELoss(), system.G(batch["noise"])
    if player == "G":
        return {"G": -torch.sigmoid(system.D(fake)[0]).log().mean()}
    on_real, on_fake = (torch.sigmoid(system.D(x)[0]) for x in (batch["image"], fake.detach()))
    return {"D_real": bce(on_real, torch.ones_like(on_real)), "D_fake": bce(on_fake, torch.zeros_like(on_fake))}


OFFICIAL = {
    "U-GAT-IT light": ("ugatit", {}, ugatit_by_book),
    "U-GAT-IT full": ("ugatit", dict(light=False), ugatit_by_book),
    "pix2pix": ("pix2pix", {}, pix2pix_by_book),
    "lsgan": ("pix2pix", dict(gan_loss="lsgan", lambda_L1=10.0), partial(pix2pix_by_book, loss=nn.MSELoss(), L1=10.0)),
    "BtoA": ("pix2pix", dict(direction="BtoA", lambda_gan=0.5), partial(pix2pix_by_book, direction="BtoA", gan=0.5)),
    "only cGAN": ("pix2pix", dict(lambda_L1=0.0), partial(pix2pix_by_book, L1=0.0)),
    "only L1": ("pix2pix", dict(lambda_gan=0.0), partial(pix2pix_by_book, gan=0.0)),
    "DCGAN": ("dcgan", dict(upsample="transposed"), dcgan_by_book),
    "DCGAN nearest": ("dcgan", dict(upsample="nearest"), dcgan_by_book),
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_losses_gradients_and_whole_steps_are_the_official_ones(case):
    """The order of turns, weight decay on every parameter, ρ brought back to [0, 1] after each step."""
    name, settings, by_book = OFFICIAL[case]
    # Two of a kind, because a call may take power iterations and running statistics further.
    ours, book, batch = build(name, **settings), build(name, **settings), make_batch(1)
    judges = [n for n, _ in book.named_children() if "D" in n]
    players = {"D": judges} if judges else {}  # the discriminators first
    players["G"] = [n for n, _ in book.named_children() if n not in judges]
    assert [turn.player for turn in ours.turns] == list(players)
    fakes = ours(batch)
    for turn in ours.turns:
        assert_same_turn(turn, turn.losses(batch, fakes), by_book(book, batch, turn.player), ours, book)
    for (key, mine), theirs in zip(ours.named_buffers(), book.buffers(), strict=True):
        assert name == "dcgan" or (mine - theirs).abs().max() < 1e-12, key

    ours, book, clipped = build(name, **settings), build(name, **settings), set()
    with torch.no_grad():  # near both of its bounds
        for rho in (p for s in (ours, book) for key, p in s.named_parameters() if key.endswith("rho")):
            rho.copy_((rho > 0.5).double())
    optimizers = adams(ours, weight_decay=1e-4)
    by_player = {p: plain_adam(trained_parameters(book, names), weight_decay=1e-4) for p, names in players.items()}
    for step in range(3):
        batch = make_batch(step)
        training_step(ours, optimizers, nullcontext, batch)
        for player, optimizer in by_player.items():
            optimizer.zero_grad()
            sum(by_book(book, batch, player).values()).backward()
            optimizer.step()
        for rho in (p for key, p in book.named_parameters() if key.endswith("rho")):
            clipped |= {bound for bound, beyond in ((0, rho < 0), (1, rho > 1)) if beyond.any()}
            rho.data = rho.data.clamp(0, 1)
    assert clipped == ({0, 1} if name == "ugatit" else set())
    assert_same_weights(ours, book)


def test_running_statistics_of_dcgan_follow_its_batches():
    """Each network sees what it judges or makes once in a call; those of the generator serve only its sheets."""
    system, batch = build("dcgan"), make_batch(0, n=4)
    norm = next(m for m in system.G.modules() if isinstance(m, nn.BatchNorm2d))
    seen = system.G.layers[0](batch["noise"][:, :, None, None])
    mean, var = (0.1 * x.detach() for x in (seen.mean(dim=(0, 2, 3)), seen.var(dim=(0, 2, 3))))
    fakes = system(batch)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, 0.9 + var)
    for turn in system.turns:
        turn.losses(batch, fakes)
    judged = [m.num_batches_tracked.item() for m in system.D.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(judged) == {3} and norm.num_batches_tracked == 1

    state = {key: value.clone() for key, value in system.state_dict().items()}
    noise = torch.cat([batch["noise"], -batch["noise"]])
    columns = system.sheet({**batch, "noise": noise})
    assert system.G.training and all(torch.equal(state[key], value) for key, value in system.state_dict().items())
    assert list(columns) == ["real", "sample 1", "sample 2"] and torch.equal(columns["real"], batch["image"])
    alone = system.G.eval()(noise[5:6])
    torch.testing.assert_close(columns["sample 2"][1:2], alone)
    assert not columns["sample 2"].requires_grad and (alone - fakes[1:2]).abs().max() > 1e-3


def test_the_spread_of_dcgan_tells_a_collapse():
    system, batch = build("dcgan"), make_batch(0, n=4)
    measures = system.measures(batch, batch["image"][:1].expand(4, -1, -1, -1))
    assert measures["spread_fake"] < 1e-12
    torch.testing.assert_close(measures["spread_real"], batch["image"].var(dim=0, correction=0).sqrt().mean())


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


WHOLE_STEPS = [
    ("attentiongan", {}, dict(identity=0.5)),
    ("cyclegan", {}, dict(identity=5.0)),
    ("attentiongan1", dict(curriculum_epochs=0), dict(**ONE, attn_disc="concat")),
    ("attentiongan", dict(attn_disc="mask"), dict(identity=0.5, attn_disc="mask")),
    ("attentiongan", dict(attn_disc="concat", attn_real="partner"), dict(identity=0.5, attn_disc="concat", own=False)),
]


@pytest.mark.parametrize("name, settings, terms", WHOLE_STEPS)
def test_several_whole_steps_are_the_textbook_ones(name, settings, terms):
    """Adam, the order of turns, the replay buffers: three steps leave the same weights as three by the book.

    The buffers keep a picture and its mask together.
    """
    ours, book = build(name, pool_size=2, **settings), build(name, pool_size=2, **settings)
    optimizers = adams(ours, 2e-4)
    judges = [n for n, m in book.named_children() if "D_" in n]
    G = [*book.G_AB.parameters(), *book.G_BA.parameters()]
    D = [p for n in judges for p in getattr(book, n).parameters()]
    optimizer_G, optimizer_D = plain_adam(G, 2e-4), plain_adam(D, 2e-4)
    pools = {"A": TextbookPool(2), "B": TextbookPool(2)}
    seen = 0
    for step in range(3):
        batch = make_batch(step)
        training_step(ours, optimizers, nullcontext, batch)

        with torch.no_grad():
            translated = {"A": book.G_BA(batch["B"]), "B": book.G_AB(batch["A"])}
        masks = {s: None if t.attention is None else 1 - t.attention[:, -1:] for s, t in translated.items()}
        generators, _ = textbook_losses(book, batch, **terms)
        optimizer_G.zero_grad()
        sum(generators.values()).backward()
        optimizer_G.step()

        optimizer_D.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for domain, (side, other) in enumerate(("AB", "BA")):
            handed = []
            for i, picture in enumerate(translated[side].image):
                mask = torch.zeros(1) if masks[side] is None else masks[side][i]
                draws = np.random.default_rng((3, 0, domain, seen + i))
                coin = draws.random() < 0.5
                handed.append(pools[side].query((picture, mask), coin, int(draws.integers(2)) if coin else 0))
            pictures, with_them = (torch.stack(parts) for parts in zip(*handed, strict=True))
            shown = {f"D_{side}": (batch[side], pictures)}
            if "attn_disc" in terms:
                how = terms["attn_disc"]  # a real picture's own mask: that of its translation to the other side
                real_masks = masks[other] if terms.get("own", True) else with_them
                real, fake = guided_input(batch[side], real_masks, how), guided_input(pictures, with_them, how)
                shown[f"guided_D_{side}"] = real, fake
            for judge, (real, fake) in shown.items():
                (on_real,), (on_fake,) = getattr(book, judge)(real), getattr(book, judge)(fake)
                loss = loss + 0.5 * (((on_real - 1) ** 2).mean() + (on_fake**2).mean())
        seen += 2
        loss.backward()
        optimizer_D.step()
    assert_same_weights(ours, book)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_turn_is_pure_and_changes_only_its_own_networks(name):
    system = build(name)
    batch = make_batch(0)
    fakes = system(batch)
    for i, turn in enumerate(system.turns):
        assert isinstance(turn, Turn)
        # With a graph, the power iterations of spectral norms go on; running statistics always do.
        with torch.no_grad():
            first, second = turn.losses(batch, fakes), turn.losses(batch, fakes)
        assert all(torch.equal(first[k], second[k]) for k in first)
        losses = turn.losses(batch, fakes)
        assert losses.keys() == first.keys()
        before = {k: v.clone() for k, v in system.state_dict().items() if isinstance(v, torch.Tensor)}
        optimizer = torch.optim.Adam(trained_parameters(system, turn.networks), fused=True)
        update(optimizer, losses)
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


@pytest.mark.parametrize("name", BOTH_DIRECTIONS)
def test_a_sheet_has_both_directions(name):
    system, batch = build(name), make_batch(0)
    columns = system.sheet(batch)
    expected = ["real A", "fake B", "recovered A", "real B", "fake A", "recovered B"]
    assert [c for c in columns if c.split()[0] not in ("attention", "global", "local")] == expected
    assert torch.equal(columns["fake B"], system.G_AB(batch["A"]).image)
    assert torch.equal(columns["recovered B"], system.G_AB(system.G_BA(batch["B"]).image).image)
    if name != "cyclegan":
        assert torch.equal(columns["attention A"], 2 * system.G_AB(batch["A"]).foreground - 1)
    if name == "ugatit":
        for scale in ("global", "local"):
            judge = getattr(system, f"{scale}_D_B")
            assert torch.equal(columns[f"{scale} D_B"], 2 * judge.heat_map(columns["fake B"]) - 1)
        again = system.sheet(batch)  # drawing it is no step of the power iterations
        assert all(torch.equal(column, again[key]) for key, column in columns.items())
    assert all(not c.requires_grad for c in columns.values())


def test_signs_of_a_collapse_are_told():
    copies = "the background mask of BA is above 0.99: the output is nearly the input"
    sound = {"D_A": 0.2, "D_B": 0.01, "G_AB": 0.0, "change_AB": 0.0}
    sound |= {"mask_AB_mean": [0.01, 0.99], "mask_BA_mean": [0.995, 0.005]}
    for name in ("attentiongan", "attentiongan1"):
        system = build(name)
        assert system.symptoms(sound) == []
        weak = system.symptoms({**sound, "D_B": 0.009, "D_A": 0.0})
        assert weak == ["the discriminators' losses D_A, D_B are below 0.01"]
        assert system.symptoms({**sound, "mask_BA_mean": [0.009, 0.991]}) == [copies]
    assert build("attentiongan", no_background=True).symptoms({"mask_BA_mean": [0.009, 0.991]}) == []
    values = (
        ("cyclegan", "D_A"),
        ("attentiongan1", "guided_D_B"),
        ("ugatit", "D_A"),
        ("pix2pix", "D"),
        ("dcgan", "D_fake"),
    )
    for name, value in values:
        assert build(name).symptoms({value: 0.02, "G": 0.0}) == []
        assert build(name).symptoms({value: 0.001}) == [f"the discriminators' losses {value} are below 0.01"]


def tensors(nested):
    if isinstance(nested, torch.Tensor):
        yield nested
    for part in nested if isinstance(nested, tuple) else ():
        yield from tensors(part)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "cyclegan"])
def test_bf16_keeps_pictures_masks_norms_logits_and_losses_in_float32(name):
    system = build(name).float()
    batch = {k: v.float() for k, v in make_batch(0).items()}
    norms, seen = [m for m in system.modules() if isinstance(m, (AdaLIN, ILN))], set()
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        fakes = system(batch)
        losses = [loss for turn in system.turns for loss in turn.losses(batch, fakes).values()]
        kept = [*tensors(fakes), *losses, *(b for b in system.buffers() if b.is_floating_point())]
        if name == "ugatit":
            kept.append(system.global_D_A.layers[0].weight)
        if name == "dcgan":
            kept.append(system.D(fakes)[0])
            assert system.G.layers[:3](batch["noise"][:, :, None, None]).dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in kept)
    assert len(losses) == {"attentiongan": 8, "attentiongan1": 14, "ugatit": 10}.get(name, 3)
    assert seen == ({(torch.bfloat16, torch.float32)} if norms else set()) and bool(norms) == (name == "ugatit")
    if name.startswith("attentiongan"):  # masks rounded to bf16 sum to 1 only to about 1e-2
        assert (fakes.fake_B.attention.sum(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name, generator", [("attentiongan", 11_817_509), ("attentiongan1", 11_376_068), ("cyclegan", 11_372_931)]
)
def test_unless_told_otherwise_networks_and_buffers_have_the_papers_size(name, generator):
    with torch.device("meta"):
        system = SYSTEMS[name]().build()
    for network, expected in dict(G_AB=generator, G_BA=generator, D_A=2_763_841, D_B=2_763_841).items():
        assert sum(p.numel() for p in system.get_submodule(network).parameters()) == expected
    assert system.pool_A.size == system.pool_B.size == 50


@pytest.mark.parametrize("name", ["attentiongan", "attentiongan1"])
def test_what_is_logged_is_the_change_and_the_masks_in_their_order(name):
    system, batch = build(name), make_batch(1)
    fakes = system(batch)
    found = system.measures(batch, fakes)
    for way, real, fake in (("AB", batch["A"], fakes.fake_B), ("BA", batch["B"], fakes.fake_A)):
        torch.testing.assert_close(found[f"change_{way}"], (fake.image - real).abs().mean())
        attention = fake.attention.detach()
        assert attention.shape[1] == (4 if name == "attentiongan" else 2)
        for k, mask in enumerate(attention.unbind(1)):  # the background's is the last
            assert abs(found[f"mask_{way}_mean"][k] - mask.mean()) < 1e-12
            bits = -(mask * mask.log2() + (1 - mask) * (1 - mask).log2())
            assert abs(found[f"mask_{way}_entropy"][k] - bits.mean()) < 1e-12
        assert len(set(found[f"mask_{way}_mean"].tolist())) == attention.shape[1]
    assert all(not v.requires_grad for v in found.values())


def test_masks_that_are_decided_have_no_entropy():
    decided, undecided = torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 0.5)
    decided[:, 1] = 1
    assert mask_measures(decided)["entropy"].tolist() == [0, 0]
    torch.testing.assert_close(mask_measures(undecided)["entropy"], torch.ones(2))


def test_what_is_logged_of_rho_is_the_norms_in_their_order():
    system, batch = build("ugatit"), make_batch(1)
    assert {type(m) for m in system.G_AB.modules() if hasattr(m, "rho")} == {AdaLIN, ILN}
    with torch.no_grad():
        for way in ("AB", "BA"):
            rhos = [p for key, p in system.get_submodule(f"G_{way}").named_parameters() if key.endswith("rho")]
            for k, rho in enumerate(rhos):
                rho.fill_(k / 10)
    found = system.measures(batch, system(batch))
    for way in ("AB", "BA"):
        assert found[f"rho_{way}"].tolist() == pytest.approx([k / 10 for k in range(len(rhos))])


def test_settings_reach_the_networks():
    system = SYSTEMS["attentiongan"](**SMALL, n_masks=3, attention_kernel=7, channels=1).build()
    assert isinstance(system.G_BA, AttentionGenerator)
    expected = dict(channels=1, ngf=4, n_residual_blocks=2, n_masks=3, attention_kernel=7)
    expected |= dict(background=True, upsample="transposed")
    assert system.G_BA.settings == expected
    assert system.min_size == 12 and system.size_multiple == 4


def test_settings_reach_u_gat_its_networks():
    def layers(system):
        return len(system.global_D_B.layers) + 1, len(system.local_D_A.layers) + 1

    with torch.device("meta"):
        full = SYSTEMS["ugatit"](ngf=8, ndf=4, channels=1).build((128, 256))
        light = SYSTEMS["ugatit"](light=True).build()
    assert full.G_BA.settings == dict(channels=1, ngf=8, n_residual_blocks=4, size=(128, 256))
    assert layers(full) == (6, 4) and full.global_D_A.layers[0].bias.shape == (4,) and full.min_size == 48
    assert light.G_AB.settings == dict(channels=3, ngf=64, n_residual_blocks=4, size=None)
    assert layers(light) == (7, 5)
    torch.manual_seed(0)
    default = SYSTEMS["ugatit"](light=True, init="default", ngf=8, ndf=8).build()
    for network, key in (
        (default.G_AB, "encoder.0.weight"),
        (default.local_D_B, "layers.0.parametrizations.weight.original"),
    ):
        weight = network.get_parameter(key)
        assert weight.abs().max() > 0.9 * weight[0].numel() ** -0.5


def build_in_single_precision(name):
    """The system, whose buffers fill at once, and a batch."""
    pool = {"pool_size": 1} if "pool_size" in all_options(name) else {}
    system = SYSTEMS[name](**SYSTEM_SETTINGS[name], **pool).build((16, 16))
    return system, {key: torch.zeros(value.shape) for key, value in make_batch(0).items()}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_asks_for_no_value(name, monkeypatch):
    """It runs on tensors that have none; on a GPU each one asked for is a wait."""

    def refuse(*_):
        raise RuntimeError("a tensor was fetched")

    for fetch in ("cpu", "numpy"):  # which tensors on the CPU could answer
        monkeypatch.setattr(torch.Tensor, fetch, refuse)
    with FakeTensorMode():
        system, batch = build_in_single_precision(name)
        optimizers = adams(system)
        shown = training_step(system, optimizers, partial(torch.autocast, "cpu", torch.bfloat16), batch)
        assert not any(value.requires_grad for value in shown.values())  # else CUDA graphs would meet an old graph
        for fetch in (torch.Tensor.item, torch.Tensor.tolist, bool, torch.Tensor.cpu, torch.Tensor.numpy):
            with pytest.raises(RuntimeError):
                fetch(next(iter(shown.values())))


class NoMoves(TorchDispatchMode):
    """Refuses what makes a tensor of one device from that of another: from memory that is not pinned it waits."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            given = arguments[1 if function == torch.ops.aten.copy_.default else 0]
            assert given.device == made.device, f"a tensor moves from {given.device} to {made.device}"
        return made


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_moves_nothing_to_the_device(name, monkeypatch):
    """Shown on CUDA tensors without values, for which no GPU is needed but in the backward pass."""
    monkeypatch.setattr(train, "update", lambda *_: None)
    with FakeTensorMode():
        with torch.device("cuda"):
            system, batch = build_in_single_precision(name)
        assert {t.device.type for t in (*batch.values(), *system.parameters(), *system.buffers())} == {"cuda"}
        with NoMoves():
            for _ in range(2):
                training_step(system, dict.fromkeys(turn.player for turn in system.turns), nullcontext, batch)


class Recorder(TorchDispatchMode):
    """A CUDA graph on the CPU: it records the operations within, with their tensors, and repeats them on these."""

    def __init__(self):
        super().__init__()
        self.recorded = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        # Aliases without a history, so that autograd does not watch the replay.
        self.recorded.append((function, *tree_map_only(torch.Tensor, torch.Tensor.detach, (arguments, keywords, made))))
        return made

    @torch.no_grad()
    def replay(self):
        for function, arguments, keywords, made in self.recorded:
            again = function(*arguments, **(keywords or {}))
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_captured_step_replays_the_plain_one(name, monkeypatch):
    """To the bit, with buffers that swap, rates that fall and factors that change: the host decides nothing in it."""
    settings = SYSTEM_SETTINGS[name] | ({"pool_size": 3} if "pool_size" in all_options(name) else {})
    if name == "attentiongan1":
        settings |= {"curriculum_epochs": 6}
    device = SimpleNamespace(wait_stream=lambda other: None)
    for call in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, call, lambda: device)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    games = []
    for _ in range(2):
        torch.manual_seed(0)
        system = SYSTEMS[name](**settings).build((16, 16))
        games.append((system, adams(system)))

    @contextmanager
    def capture(recorder, capture_error_mode):
        """Unlike on the device the step is run, so that all is put back afterwards."""
        tensors = [*system.parameters(), *system.buffers()]
        tensors += [t for o in optimizers.values() for state in o.state.values() for t in state.values()]
        tensors += [p.stored for p in system.children() if isinstance(p, ReplayBuffer)]
        before = [(t, t.detach().clone()) for t in tensors]
        random_state = torch.get_rng_state()
        with recorder:
            yield
        torch.set_rng_state(random_state)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)

    monkeypatch.setattr(torch.cuda, "graph", capture)
    plain, (system, optimizers) = games[0], games[1]
    captured = CapturedStep(system, optimizers, nullcontext)
    for step in range(9):
        batch = {key: value.float() for key, value in make_batch(step).items()}
        for game, optimizer in games:
            game.set_epoch(step)
            for group in (group for each in optimizer.values() for group in each.param_groups):
                group["lr"] = 2.0 ** -(8 + step)  # exact in float32, too
        torch.manual_seed(step)
        expected = training_step(*plain, nullcontext, batch)
        torch.manual_seed(step)
        found = captured(batch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), step
    for mine, theirs in zip(system.parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for player, optimizer in optimizers.items():
        mine, theirs = optimizer.state_dict(), plain[1][player].state_dict()
        assert mine["param_groups"] == theirs["param_groups"]
        assert all(
            torch.equal(mine["state"][i][k], v) for i, state in theirs["state"].items() for k, v in state.items()
        )
    for mine, theirs in zip(system.children(), plain[0].children(), strict=True):
        if isinstance(mine, ReplayBuffer):
            mine, theirs = mine.get_extra_state(), theirs.get_extra_state()
            assert mine["seen"] == theirs["seen"] == 18 and torch.equal(mine["stored"], theirs["stored"])


@pytest.mark.parametrize(
    "device, flags, distributed",
    [("cpu", "", False), ("mps", "", False), ("cuda", "--compile", False), ("cuda", "", True)],
)
def test_a_step_that_cannot_be_captured_is_refused(device, flags, distributed, monkeypatch):
    options = parse_options(f"--cuda_graph {flags}".split())
    monkeypatch.setattr(train.dist, "is_initialized", lambda: distributed)
    found = f"{device}.*{flags}.*{'train_dist.py' * distributed}"
    with pytest.raises(train.InputError, match=f"--cuda_graph: expected train.py on CUDA .* found --device {found}"):
        train.set_up(options, torch.device(device))
