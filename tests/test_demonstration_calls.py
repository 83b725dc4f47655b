"""The calls of the published demonstration notebook, in its order and with its arguments.

Sizes are small, and the data are digits; everything else is as there.
"""

import pytest
import torch
from small_runs import SMALL

import controllable_generation
import datasets
import likelihood
import run_lib
import sampling
from configs.ve import digits as configs
from losses import get_optimizer
from models import ddpm as ddpm_model  # noqa: F401  (the notebook imports all of them)
from models import layers, layerspp, ncsnpp, ncsnv2, normalization  # noqa: F401
from models import utils as mutils
from models.ema import ExponentialMovingAverage
from sampling import LangevinCorrector, ReverseDiffusionPredictor
from sde_lib import VESDE
from utils import restore_checkpoint


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Cell "Load the score-based model": config, process, scalers, network with its average."""
    folder = tmp_path_factory.mktemp("run")
    config = configs.get_config()
    config.update_from_flattened_dict({**SMALL, "training.n_iters": 1})
    run_lib.train(config, folder)
    sde = VESDE(
        sigma_min=config.model.sigma_min,
        sigma_max=config.model.sigma_max,
        N=config.model.num_scales,
    )
    config.training.batch_size = config.eval.batch_size = 4
    assert len(mutils.get_sigmas(config)) == config.model.num_scales
    scaler = datasets.get_data_scaler(config)
    inverse_scaler = datasets.get_data_inverse_scaler(config)
    score_model = mutils.create_model(config)
    optimizer = get_optimizer(config, score_model.parameters())
    ema = ExponentialMovingAverage(score_model.parameters(), decay=config.model.ema_rate)
    state = dict(step=0, optimizer=optimizer, model=score_model, ema=ema)
    state = restore_checkpoint(folder / "checkpoints/checkpoint_0.pth", state, config.device)
    ema.copy_to(score_model.parameters())
    assert state["step"] == 1
    return config, sde, scaler, inverse_scaler, score_model


def shape_of(config):
    size = config.data.image_size
    return config.eval.batch_size, config.data.num_channels, size, size


def test_samples(loaded):
    config, sde, _, inverse_scaler, score_model = loaded
    sampling_fn = sampling.get_pc_sampler(
        sde, shape_of(config), ReverseDiffusionPredictor, LangevinCorrector, inverse_scaler, 0.16,
        n_steps=1, probability_flow=False, continuous=config.training.continuous, eps=1e-5,
        device=config.device,
    )  # fmt: skip
    x, n = sampling_fn(score_model)
    assert x.shape == shape_of(config) and n == 2 * sde.N and x.isfinite().all()
    sampling_fn = sampling.get_ode_sampler(
        sde, shape_of(config), inverse_scaler, denoise=True, rtol=1e-3, atol=1e-3, method="RK45",
        eps=1e-5, device=config.device,
    )  # fmt: skip
    x, nfe = sampling_fn(score_model)
    assert x.shape == shape_of(config) and nfe > 0 and x.isfinite().all()


def test_likelihood_and_codes(loaded):
    config, sde, scaler, inverse_scaler, score_model = loaded
    _, eval_ds, _ = datasets.get_dataset(config, uniform_dequantization=True, evaluation=True)
    batch = next(iter(eval_ds))
    eval_batch = torch.from_numpy(batch["image"]._numpy()).to(config.device).float()
    eval_batch = scaler(eval_batch.permute(0, 3, 1, 2))
    likelihood_fn = likelihood.get_likelihood_fn(sde, inverse_scaler, eps=1e-5)
    bpd, latent_z, nfe = likelihood_fn(score_model, eval_batch)
    assert bpd.shape == (4,) and bpd.isfinite().all() and nfe > 0
    sampling_fn = sampling.get_ode_sampler(
        sde, eval_batch.shape, inverse_scaler, eps=1e-5, device=config.device
    )
    x, _ = sampling_fn(score_model, latent_z)
    torch.testing.assert_close(x, inverse_scaler(eval_batch), rtol=0, atol=0.02)


def test_inpainting(loaded):
    config, sde, scaler, inverse_scaler, score_model = loaded
    train_ds, _, _ = datasets.get_dataset(config)
    batch = next(iter(train_ds))
    img = torch.from_numpy(batch["image"]._numpy()).permute(0, 3, 1, 2).to(config.device)
    mask = torch.ones_like(img)
    mask[..., 4:] = 0.0
    pc_inpainter = controllable_generation.get_pc_inpainter(
        sde, ReverseDiffusionPredictor, LangevinCorrector, inverse_scaler, snr=0.16, n_steps=1,
        probability_flow=False, continuous=config.training.continuous, denoise=True,
    )  # fmt: skip
    x = pc_inpainter(score_model, scaler(img), mask)
    torch.testing.assert_close(x[..., :4], img[..., :4], rtol=0, atol=0.05)
    assert x.isfinite().all()
