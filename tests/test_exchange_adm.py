"""Files of guided diffusion and improved diffusion: `load_adm`, and as `model.weights`."""

import pytest
import torch
from networks import build, error, fill_weights, layout, tiny_config
from small_runs import small_config
from test_adm import golden, network

import run_lib
from configs.defaults import load
from models.adm_layers import AttentionBlock
from score_lib.disk.fit import CheckpointError
from score_lib.exchange.adm import described_by, load_adm
from score_lib.options import complete

# Recorded cases as configs.
CASES = {
    "class_cond_new_order": {
        "num_head_channels": 16, "use_new_attention_order": True, "learn_sigma": True,
        "attn_resolutions": (8,),
    },
    "uncond_legacy_heads": {
        "num_heads": 4, "scale_shift_norm": False, "resblock_type": "ddpm", "num_res_blocks": 2,
        "attn_resolutions": (16, 8),
    },
    "half_mult_fractional_t": {
        "nf": 64, "num_heads": 4, "ch_mult": (0.5, 1, 1), "learn_sigma": True,
        "attn_resolutions": (8, 4),
    },
}  # fmt: skip


def described(case, **changes):
    """The complete config of a recorded network."""
    options = {"nf": 32, **CASES[case], **changes}
    config = complete(tiny_config("adm", image_size=16, centered=True, **options))
    config.training.update(sde="vpsde", continuous=False)
    if case.startswith("class"):
        config.data.num_classes, config.training.condition = 7, "classes"
    return config


def written(path, model, prefix="", dtype=torch.float32):
    """A file as published: flat, and with convolutions of a dtype."""
    stored = {
        prefix + name: value.to(dtype) if "conv" in name or "_layers.2." in name else value
        for name, value in model.state_dict().items()
    }
    torch.save(stored, path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_recorded_networks_are_loaded(case, tmp_path):
    path = written(tmp_path / "a.pt", network(case), prefix="module.")
    model, sde, facts = load_adm(path, described(case), "cpu")
    arrays = golden(case)
    both = "learn_sigma" in CASES[case]
    told = {"classes": arrays.y} if hasattr(arrays, "y") else {}
    out = model(arrays.x, arrays.timesteps, variances=both, **told)
    assert error(out, arrays.out) < 2e-5 and not model.training
    assert facts["dtype"] == "float32" and sde.N == 10
    order, heads = ("new" in case and "new") or "legacy", "4 heads"
    if case.startswith("class"):
        heads = "heads of 16 channels"
    (note,) = facts["notes"]
    assert f"attention has {heads} in the {order} order" in note and "32 groups" in note


def test_halved_files_are_loaded_in_float32(tmp_path):
    case = "uncond_legacy_heads"
    path = written(tmp_path / "a.pt", network(case), dtype=torch.float16)
    model, _, facts = load_adm(path, described(case), "cpu")
    assert facts["dtype"] == "float16, float32"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    found = error(model(golden(case).x, golden(case).timesteps), golden(case).out)
    assert 2e-5 < found < 2e-2


def test_files_that_are_not_finite_are_refused(tmp_path):
    model = network(case := "uncond_legacy_heads")
    model.state_dict()["time_embed.0.bias"][-1] = float("inf")
    with pytest.raises(CheckpointError, match=r"holds nan or inf in 'time_embed\.0\.bias'"):
        load_adm(written(tmp_path / "a.pt", model), described(case), "cpu")


def test_only_the_flag_tells_the_order_of_attention(tmp_path):
    case = "class_cond_new_order"
    path = written(tmp_path / "a.pt", network(case))
    model, _, facts = load_adm(path, described(case, use_new_attention_order=False), "cpu")
    assert "in the legacy order" in facts["notes"][0]
    arrays = golden(case)
    out = model(arrays.x, arrays.timesteps, classes=arrays.y, variances=True)
    assert error(out, arrays.out) > 1e-2
    reordered = network(case)
    for block in (m for m in reordered.modules() if isinstance(m, AttentionBlock)):
        for tensor in (block.qkv.weight.data, block.qkv.bias.data):
            parts = tensor.unflatten(0, (3, block.heads, -1)).transpose(0, 1).flatten(0, 2)
            tensor.copy_(parts)
    model.load_state_dict(reordered.state_dict())
    out = model(arrays.x, arrays.timesteps, classes=arrays.y, variances=True)
    assert error(out, arrays.out) < 2e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nf": 64}, r"model.nf = 32 there and 64 in the config"),
        ({"num_res_blocks": 2}, r"model.num_res_blocks = 1 there and 2"),
        ({"ch_mult": (1, 3)}, r"model.ch_mult = \(1.0, 2.0\) there and \(1.0, 3.0\)"),
        ({"ch_mult": (1, 2, 2)}, r"model.ch_mult = \(1.0, 2.0\) there"),
        ({"attn_resolutions": (16,)}, r"\(model.attn_resolutions\) = \[1\] there and \[0\]"),
        ({"learn_sigma": False}, r"\(model.learn_sigma\) = 6 there and 3"),
        ({"scale_shift_norm": False}, r"model.scale_shift_norm = True there and False"),
        ({"resblock_type": "ddpm"}, r"model.resblock_type = 'biggan' there and 'ddpm'"),
    ],
)
def test_options_that_differ_are_named(changes, message, tmp_path):
    case = "class_cond_new_order"
    path = written(tmp_path / "a.pt", network(case))
    with pytest.raises(CheckpointError, match=message):
        load_adm(path, described(case, **changes), "cpu")


def test_classes_and_other_files_are_named(tmp_path):
    case = "class_cond_new_order"
    path = written(tmp_path / "a.pt", network(case))
    config = described(case)
    config.data.num_classes = 10
    with pytest.raises(CheckpointError, match=r"classes .*training.condition\) = 7 there and 10"):
        load_adm(path, config, "cpu")
    torch.save({"weight": torch.zeros(1)}, path)
    assert described_by({"weight": (1,)}) == {}
    with pytest.raises(CheckpointError, match="1 not in the network"):
        load_adm(path, config, "cpu")
    with pytest.raises(CheckpointError, match="choose a config of the network adm"):
        load_adm(path, load("vp/digits"), "cpu")


@pytest.mark.parametrize("shape", [(), (5,), (0, 0)])
@pytest.mark.parametrize("name", ["time_embed.0.weight", "label_emb.weight", "out.2.weight"])
def test_weights_of_other_shapes_are_refused_in_a_sentence(name, shape, tmp_path):
    case = "class_cond_new_order"
    weights = {**network(case).state_dict(), name: torch.zeros(shape)}
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"of another"):
        load_adm(tmp_path / "a.pt", described(case), "cpu")


def test_a_run_starts_from_a_file(tmp_path, caplog):
    config = small_config("vp/digits_adm", model__nf=32, model__weights=str(tmp_path / "a.pt"))
    model = fill_weights(build(complete(config)))
    written(tmp_path / "a.pt", model)
    caplog.set_level("INFO")
    run = run_lib.restored(config, tmp_path)
    assert layout(run.state["model"]) == layout(model)
    torch.testing.assert_close(run.state["model"].state_dict(), model.state_dict(), rtol=0, atol=0)
    assert "the weights do not tell" in caplog.text
    config.model.num_res_blocks = 2
    with pytest.raises(CheckpointError, match=r"model.num_res_blocks = 1 there and 2"):
        run_lib.restored(config, tmp_path)
    config.model.weights_except = ("input_blocks.*", "output_blocks.*")
    run_lib.restored(config, tmp_path)


def test_rescaled_steps_are_told_as_of_a_thousand():
    options = {"nf": 32, "num_scales": 4000}
    plain, rescaled = (
        fill_weights(build(tiny_config("adm", **options, rescale_timesteps=flag))).eval()
        for flag in (False, True)
    )
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([8, 3999])
    assert torch.equal(rescaled(x, labels), plain(x, labels / 4))
    assert load("adm/improved_cifar10").model.rescale_timesteps
    assert not load("adm/improved_imagenet64_classes").model.rescale_timesteps


@pytest.mark.parametrize(
    "name, new_order, process",
    [
        ("imagenet64", True, "cosine_vpsde"),
        ("imagenet64_classifier", False, "cosine_vpsde"),
        ("imagenet128", False, "vpsde"),
        ("lsun_cat", False, "vpsde"),
    ],
)
def test_published_options_that_shapes_do_not_tell(name, new_order, process):
    config = load(f"adm/{name}")
    assert config.model.use_new_attention_order is new_order and config.data.centered
    assert config.training.sde == process and not config.training.continuous
