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


# ----------------------------------------------------------------------------------------------------------
#  Official checkpoints: the official networks, written from their description, with all their biases
# ----------------------------------------------------------------------------------------------------------


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


