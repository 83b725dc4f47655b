"""The parts of experiments.  Each part sets one concern of a config completely.

Order: data set (from `configs.data`), process, network, sampling; a later part may refine what an
earlier one has set.
"""

from ml_collections import ConfigDict

# The networks for digits of 8 px.
SMALL_UNET = dict(nf=16, num_res_blocks=1, ch_mult=(1, 2), attn_resolutions=(4,), ema_rate=0.998)
# Networks for clothing of 28 px: one sized for two cores, one for a GPU, and a classifier.
FASHION_UNET = dict(
    nf=32, num_res_blocks=1, ch_mult=(1, 2, 3), attn_resolutions=(7,), ema_rate=0.998
)
FASHION_LARGE = dict(nf=128, num_res_blocks=2, ch_mult=(1, 2, 2), attn_resolutions=(14,))
FASHION_RESNET = dict(nf=16, blocks_per_group=1, channel_multiplier=2, ema_rate=0.998)
SMALL_ADM = {**SMALL_UNET, "nf": 32, "num_head_channels": 32}
SMALL_RESNET = dict(nf=8, blocks_per_group=1, channel_multiplier=2, ema_rate=0.998)

# --- Processes ---------------------------------------------------------------------------------


def ve_sde(config: ConfigDict, *, continuous: bool, **noise_levels: float) -> None:
    """Variance-exploding SDE, or its discretisation (SMLD).

    Args:
        noise_levels: `sigma_max`, about the largest distance between two images, and `num_scales`,
            the number of levels, where they differ from those of the data set.
    """
    config.data.centered = False
    config.model.update(noise_levels, scale_by_sigma=True)
    config.training.update(sde="vesde", continuous=continuous, reduce_mean=False)


def vp_sde(config: ConfigDict, *, continuous: bool) -> None:
    """Variance-preserving SDE, or its discretisation (DDPM) in 1000 steps."""
    config.data.centered = True
    config.model.update(num_scales=1000, scale_by_sigma=False)
    config.training.update(sde="vpsde", continuous=continuous, reduce_mean=True)


def cosine_vp_sde(config: ConfigDict, *, continuous: bool) -> None:
    """VP SDE with the cosine schedule, or its discretisation in 1000 steps."""
    vp_sde(config, continuous=continuous)
    config.training.sde = "cosine_vpsde"


def subvp_sde(config: ConfigDict) -> None:
    """Sub-VP SDE; it has no discrete form."""
    vp_sde(config, continuous=True)
    config.training.sde = "subvpsde"


def v_prediction(config: ConfigDict) -> None:
    """Networks that predict v, with a loss of their output: even at little noise and at much.

    A network of the noise, as published, knows little of the mean at much noise.  That shows where
    data are no images: in a series a wrong mean is a wrong level.
    """
    config.model.parametrization, config.training.weighting = "v", "output"


def edm(config: ConfigDict, *, sigma_data: float = 0.5) -> None:
    """The VE SDE, and training on it, as in Karras et al. 2022, for data in [-1, 1].

    Labels are log(sigma) / 4, so that Fourier features need `fourier_log=False` in the network.

    Args:
        sigma_data: standard deviation of the data.
    """
    ve_sde(config, continuous=True, sigma_min=0.002, sigma_max=80.0)
    config.data.centered = True
    edm_objective(config, sigma_data=sigma_data)


def edm_objective(config: ConfigDict, *, sigma_data: float, lognormal_mean: float = -1.2) -> None:
    """Prediction, noise levels and weights of the loss as in Karras et al. 2022.

    For any process in continuous time.

    Args:
        sigma_data: standard deviation of the data inside the network.
        lognormal_mean: of log(s / m), where the noise has deviation s and the data are scaled by m.
    """
    config.model.update(parametrization="edm", sigma_data=sigma_data, scale_by_sigma=False)
    config.training.update(noise_levels="lognormal", weighting="output", reduce_mean=True)
    config.training.lognormal_mean = lognormal_mean


def edm_training(config: ConfigDict, *, dropout: float, augment: float) -> None:
    """The training of Karras et al. 2022 at 32 px (their appendix F), after the network.

    200 million images in batches of 512, with a warm-up of 10 million.
    """
    batch_size = 512
    # The network is told of the augmentation.
    config.data.augment, config.training.condition = augment, "features"
    config.model.update(dropout=dropout, ema_halflife=500_000, ema_rampup=0.05)
    # The paper's loss is a sum over pixels, and its gradient is not clipped.
    config.training.update(batch_size=batch_size, n_iters=200_000_000 // batch_size)
    config.training.update(reduce_mean=False, snapshot_freq=8_000_000 // batch_size)
    config.optim.update(lr=1e-3, warmup=10_000_000 // batch_size, grad_clip=-1.0)
    config.eval.update(begin_ckpt=25, end_ckpt=25, enable_sampling=True)


# --- Networks ----------------------------------------------------------------------------------


def ncsnpp(config: ConfigDict, *, num_res_blocks: int, **options: object) -> None:
    """NCSN++.

    Args:
        options: options of the network that differ from those below and in `ddpm`.
    """
    ddpm(config, num_res_blocks=num_res_blocks)
    config.model.update(
        name="ncsnpp",
        embedding_type="positional",
        fourier_scale=16.0,
        fir=True,
        fir_kernel=(1, 3, 3, 1),
        skip_rescale=True,
        resblock_type="biggan",
        progressive="none",
        progressive_input="residual",
        progressive_combine="sum",
        attention_type="ddpm",
        init_scale=0.0,
    )
    config.model.update(options)


def ncsnpp_256(config: ConfigDict) -> None:
    """NCSN++ for images of 256 px."""
    ncsnpp(config, num_res_blocks=2, ch_mult=(1, 1, 2, 2, 2, 2, 2), ema_rate=0.999)
    _pyramids(config)


def ncsnpp_1024(config: ConfigDict) -> None:
    """NCSN++ for images of 1024 px."""
    ncsnpp(config, num_res_blocks=1, nf=16, ch_mult=(1, 2, 4, 8, 16, 32, 32, 32))
    _pyramids(config)


def _pyramids(config: ConfigDict) -> None:
    config.model.update(
        embedding_type="fourier", progressive="output_skip", progressive_input="input_skip"
    )


def ddpmpp(config: ConfigDict, *, num_res_blocks: int, **options: object) -> None:
    """DDPM++: NCSN++ without FIR resampling and without the input pyramid."""
    ncsnpp(config, num_res_blocks=num_res_blocks, fir=False, progressive_input="none", **options)


def ddpm(config: ConfigDict, **options: object) -> None:
    """The network of DDPM: residual blocks at `len(ch_mult)` resolutions, attention at some.

    Args:
        options: options of the network that differ from those below.
    """
    config.model.update(
        name="ddpm",
        nf=128,
        ch_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attn_resolutions=(16,),
        conditional=True,
        ema_rate=0.9999,
        normalization="GroupNorm",
        nonlinearity="swish",
        resamp_with_conv=True,
        conv_size=3,
    )
    config.model.update(options)


def adm(config: ConfigDict, **options: object) -> None:
    """The U-Net of ADM; `nf` times each of `ch_mult` must be a multiple of 32.

    Args:
        options: options of the network that differ from those below.
    """
    config.model.update(
        name="adm",
        nf=128,
        ch_mult=(1, 2, 2, 2),
        num_res_blocks=3,
        attn_resolutions=(16, 8),
        num_head_channels=64,
        scale_shift_norm=True,
        resblock_type="biggan",
        resamp_with_conv=True,
        ema_rate=0.9999,
    )
    config.model.update(options)


# The published networks of ADM at the sides of their images.
_ADM_LEVELS = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def guided_diffusion(config: ConfigDict, **options: object) -> None:
    """A published network of guided diffusion for the side of the images, sampled by 250 steps.

    Args:
        options: options of the network that differ from those of most.
    """
    common = {"nf": 256, "num_res_blocks": 2, "attn_resolutions": (32, 16, 8), "dropout": 0.0}
    common |= {"ch_mult": _ADM_LEVELS[config.data.image_size], "learn_sigma": True}
    adm(config, **{**common, **options})
    chain_sampling(config, respacing="250", variance="learned")


def improved_diffusion(config: ConfigDict, **options: object) -> None:
    """A published network of improved diffusion, sampled by 250 steps of its chain of 4000.

    Args:
        options: options of the network that differ from those of most.
    """
    common = {"attn_resolutions": (16, 8), "resblock_type": "ddpm", "learn_sigma": True}
    common |= {"num_heads": 4, "num_head_channels": 0, "dropout": 0.0}
    adm(config, **{**common, **options})
    config.model.num_scales = 4000
    chain_sampling(config, respacing="250", variance="learned")


def guided_diffusion_classifier(config: ConfigDict, **options: object) -> None:
    """A published classifier of guided diffusion, of ImageNet's 1000 classes.

    Args:
        options: options of the network that differ from those of most.
    """
    common = {"ch_mult": _ADM_LEVELS[config.data.image_size], "num_res_blocks": 2, "dropout": 0.0}
    adm_classifier(config, num_classes=1000, **{**common, **options})


def told_classes(config: ConfigDict, num_classes: int) -> None:
    """The network is told the class."""
    config.data.num_classes = num_classes
    config.training.condition = "classes"


def told_small_image(config: ConfigDict, factor: int) -> None:
    """The network is told the class and an image whose sides are smaller by a factor."""
    config.training.update(condition="classes,image", condition_operator="super_resolution")
    config.training.condition_factor = factor


def mlp(config: ConfigDict, **options: object) -> None:
    """The residual MLP, for vectors: `data.shape` is (D,).

    Args:
        options: options of the network that differ from those below.
    """
    config.model.update(
        name="mlp",
        nf=128,
        num_res_blocks=3,
        dropout=0.0,
        embedding_type="positional",
        fourier_scale=1.0,
        ema_rate=0.999,
    )
    config.model.update(options)


def set_transformer(config: ConfigDict, **options: object) -> None:
    """The transformer for sets of points: `data.shape` is (N, C).

    Args:
        options: options of the network that differ from those below and in `mlp`.
    """
    mlp(config, name="set_transformer", num_res_blocks=4, num_heads=4)
    config.model.update(options)


def ncsn(config: ConfigDict, *, ema_rate: float) -> None:
    """NCSN, whose normalisation is told the noise level; `ema_rate` 0 means no average."""
    _refinenet(config, "ncsn", ema_rate, lr=1e-3)
    config.model.scale_by_sigma = False


def ncsnv2(config: ConfigDict, *, depth: int, ema_rate: float) -> None:
    """NCSNv2 in the depth for images of 64, 128 or 256 px."""
    _refinenet(config, f"ncsnv2_{depth}", ema_rate, lr=1e-4)


def _refinenet(config: ConfigDict, name: str, ema_rate: float, lr: float) -> None:
    """The network, and the learning rate that it is trained with."""
    config.model.update(
        name=name,
        nf=128,
        ema_rate=ema_rate,
        normalization="InstanceNorm++",
        nonlinearity="elu",
        interpolation="bilinear",
    )
    config.optim.update(lr=lr, warmup=0, grad_clip=-1.0)


def wide_resnet(config: ConfigDict, *, num_classes: int, **options: object) -> None:
    """A classifier of noisy images; it draws no samples.

    Args:
        options: options of the network that differ from those of WRN-28-10.
    """
    _classifier(config, num_classes)
    config.model.update(
        name="wideresnet_noise_conditional",
        nf=16,
        blocks_per_group=4,
        channel_multiplier=10,
        nonlinearity="swish",
        fourier_scale=16.0,
        dropout=0.1,
        ema_rate=0.999,
    )
    config.model.update(options)


def adm_classifier(config: ConfigDict, *, num_classes: int, **options: object) -> None:
    """The classifier of ADM, for noisy images and their time steps; it draws no samples.

    Args:
        options: options of the network that differ from those of `adm` and those below, which are
            published for images of 64 px.
    """
    adm(config, ch_mult=(1, 2, 3, 4), num_res_blocks=4, attn_resolutions=(32, 16, 8))
    config.model.update(name="adm_classifier", pool="attention", ema_rate=0.999)
    config.model.update(options)
    _classifier(config, num_classes)


def _classifier(config: ConfigDict, num_classes: int) -> None:
    """Training and evaluation of a classifier; it draws no samples."""
    config.data.num_classes = num_classes
    config.training.update(objective="classifier", snapshot_sampling=False)
    config.eval.update(enable_accuracy=True, enable_bpd=False, enable_sampling=False)
    pc_sampling(config, predictor="none")


# --- Sampling -----------------------------------------------------------------------------------


def pc_sampling(
    config: ConfigDict,
    *,
    predictor: str,
    corrector: str = "none",
    snr: float | None = None,
    n_steps_each: int = 1,
) -> None:
    """Predictor-corrector sampling with `n_steps_each` corrector steps at each noise level.

    `snr` is the corrector's signal-to-noise ratio.  None keeps the data set's value.
    """
    config.sampling.update(
        method="pc", predictor=predictor, corrector=corrector, n_steps_each=n_steps_each
    )
    if snr is not None:
        config.sampling.snr = snr


def chain_sampling(config: ConfigDict, *, respacing: str, variance: str) -> None:
    """The chain of a network of discrete noise levels, or some of its steps, as other libraries."""
    pc_sampling(config, predictor="none")
    config.sampling.update(method="chain", respacing=respacing, variance=variance)
    config.sampling.update(num_steps=0, shift_mean=True)
    config.eval.vlb_variance = variance


def solver_sampling(config: ConfigDict, *, method: str, num_steps: int) -> None:
    """A solver of few steps along the probability flow."""
    pc_sampling(config, predictor="none")
    config.sampling.update(method=method, num_steps=num_steps)
