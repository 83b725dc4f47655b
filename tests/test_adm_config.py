"""ADM by config, and in runs."""

import copy

import pytest
import torch
from networks import build, error, fill_weights, layout, out_and_gradient, tiny_config
from small_runs import small_config
from torch import nn
from torch.utils.checkpoint import checkpoint

import run_lib
from configs import data, parts
from models.adm import UNetModel
from models.adm_configured import WithVariances
from models.adm_layers import AttentionBlock
from models.precision import Compiled, InBfloat16
from models.utils import get_score_fn
from score_lib.options import checked
from sde_lib import VPSDE, batch_mul
from utils import restore_checkpoint


def adm_config(**options):
    return tiny_config("adm", **{"nf": 32, **options})


def test_config_and_keywords_agree():
    options = {"nf": 64, "num_head_channels": 16, "checkpoint_activations": True, "dropout": 0.2}
    by_config = build(adm_config(**options, centered=True))
    by_keywords = UNetModel(
        8, 3, 64, 3, 1, (2,), 0.2, (1, 2), use_checkpoint=True, num_head_channels=16,
        use_scale_shift_norm=True, resblock_updown=True,
    )  # fmt: skip
    assert repr(by_config).replace("ADM(", "UNetModel(", 1) == repr(by_keywords)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    by_keywords.load_state_dict(fill_weights(by_config).state_dict())
    assert torch.equal(by_config.eval()(x, t), by_keywords.eval()(x, t))
    assert by_config.checkpoint_activations and by_config.middle_block[1].heads == 8


def test_options_of_the_config_arrive():
    names = [key for key, _ in layout(build(adm_config(resblock_type="ddpm")))]
    assert "input_blocks.2.0.op.weight" in names and "output_blocks.1.2.conv.weight" in names
    naive = build(adm_config(resblock_type="ddpm", resamp_with_conv=False)).state_dict()
    assert not any(".op." in key or "conv" in key for key in naive)
    added = build(adm_config(scale_shift_norm=False))
    assert added.middle_block[0].emb_layers[1].out_features == 64
    assert build(adm_config(num_heads=4)).middle_block[1].heads == 4
    assert build(adm_config(num_head_channels=8)).middle_block[1].heads == 8
    for new_order in (False, True):
        model = build(adm_config(num_heads=4, use_new_attention_order=new_order))
        blocks = [layer for layer in model.modules() if isinstance(layer, AttentionBlock)]
        assert blocks and {block.new_order for block in blocks} == {new_order}
    attending = build(adm_config(image_size=(16, 8), attn_resolutions=(16,), ch_mult=(1, 1, 1)))
    assert len(attending.input_blocks[1]) == 2 and len(attending.input_blocks[3]) == 1


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_learned_variances_are_given_if_asked_for(wrap):
    """The first half of the channels is the output, whatever they are."""
    model = fill_weights(build(adm_config(learn_sigma=True, centered=True))).eval()
    published = UNetModel(
        8, 3, 32, 6, 1, (2,), 0.1, (1, 2), use_scale_shift_norm=True, resblock_updown=True
    ).eval()
    published.load_state_dict(model.state_dict())
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    both = published(x, labels)
    assert torch.equal(wrap(model)(x, labels), both[:, :3])
    assert torch.equal(wrap(model)(x, labels, variances=True), both)
    assert torch.equal(WithVariances(model)(x, labels), both) and both.shape == (2, 6, 8, 8)
    score = get_score_fn(VPSDE(), model, continuous=True)(x, labels / 999)
    std = VPSDE().marginal_coeffs(labels / 999)[1]
    torch.testing.assert_close(score, batch_mul(-1 / std, both[:, :3]))
    with pytest.raises(ValueError, match=r"no learned variances.*model.learn_sigma"):
        WithVariances(build(adm_config()))(x, labels)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"nf": 8}, r"model.nf\) = 8 .*\(8, 16\).*multiple of 32"),
        ({"num_heads": 3}, "num_heads = 3"),
        ({"image_size": 9}, "9x9, which cannot be halved 1 times.*multiples of 2"),
        ({"resblock_type": "resnet"}, "resblock_type is 'resnet'.*'biggan', 'ddpm'"),
        ({"scale_by_sigma": True}, "scale_by_sigma = True should be False.*VP or sub-VP"),
        ({"conditional": False}, "conditional = False should be True"),
        ({"nonlinearity": "elu"}, "nonlinearity = 'elu' should be 'swish'"),
        ({"normalization": "InstanceNorm"}, "should be 'GroupNorm'"),
    ],
)
def test_wrong_options_of_a_config_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(adm_config(**options))


def test_shapes_that_a_config_does_not_describe_are_refused(caplog):
    model = build(adm_config(attn_resolutions=(4, 7)))
    assert "no attention at 7:" in caplog.text
    with pytest.raises(ValueError, match=r"num_channels = 3.*\(2, 1, 8, 8\)"):
        model(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="multiples of 2"):
        model(torch.zeros(2, 3, 8, 7), torch.zeros(2))


def test_the_part_of_configs_is_complete():
    config = data.cifar10_defaults()
    parts.vp_sde(config, continuous=True)
    parts.adm(config, nf=64)
    parts.pc_sampling(config, predictor="euler_maruyama")
    config, unknown = checked(config)
    with torch.device("meta"):
        model = build(config)
    assert unknown == [] and model.middle_block[1].heads == 2


def test_a_run_trains_and_samples_digits(tmp_path):
    config = small_config(
        model__name="adm", model__nf=32, model__num_heads=2, training__n_iters=2,
        training__snapshot_freq=2, training__log_freq=1, training__eval_freq=2,
    )  # fmt: skip
    run = run_lib.setup(config)
    before = copy.deepcopy(run.state["model"].state_dict())
    run_lib.train(config, tmp_path)
    restore_checkpoint(tmp_path / "checkpoints" / "checkpoint_1.pth", run.state, "cpu")
    after = run.state["model"].state_dict()
    assert before.keys() == after.keys() and run.state["step"] == 2
    assert not torch.equal(after["out.2.weight"], before["out.2.weight"])
    assert (tmp_path / "samples" / "iter_2" / "sample.png").exists()
    images = run.draw(range(2))
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


@pytest.mark.slow
def test_attention_that_is_recomputed_compiles():
    """With a copy of each of query, key and value, the compiled output was another one."""
    block, x = fill_weights(AttentionBlock(32, 1, False)), torch.randn(2, 32, 8, 8)
    torch._dynamo.reset()
    fast = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False))
    found = [out_and_gradient(function, x) for function in (block, fast)]
    assert all(error(*pair) < 1e-5 for pair in zip(*found, strict=True))


@pytest.mark.slow
def test_the_network_is_one_graph_forward_and_backward():
    model = InBfloat16(fill_weights(build(adm_config(dropout=0.0))))
    torch._dynamo.reset()
    fast = Compiled(model, backend="aot_eager", fullgraph=True)
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    found = [out_and_gradient(network, x, labels) for network in (model, fast)]
    assert fast.works and all(error(*pair) < 1e-5 for pair in zip(*found, strict=True))


def test_the_length_of_a_chain_that_is_the_unit_of_times_may_not_change(tmp_path):
    options = {"model__nf": 32, "model__learn_sigma": False, "training__continuous": True}
    options |= {"training__n_iters": 1, "training__snapshot_sampling": False}
    for rescales in (True, False):
        given = {**options, "model__rescale_timesteps": rescales}
        folder = tmp_path / str(rescales)
        run_lib.train(small_config("vp/digits_adm", **given), folder)
        changed = small_config("vp/digits_adm", **given, model__num_scales=100)
        if rescales:
            with pytest.raises(ValueError, match=r"model.num_scales = 100 instead of 5"):
                run_lib.restored(changed, folder)
        else:
            run_lib.restored(changed, folder)
