"""What experiments are composed of.  Each part sets one concern of a config completely.

Order: data set (from `configs.data`), process, network, sampling; a later part may refine what an
earlier one has set.
"""

from __future__ import annotations

from ml_collections import ConfigDict

# --- Processes ---------------------------------------------------------------------------------


def ve_sde(
    config: ConfigDict,
    *,
    continuous: bool,
    sigma_max: float | None = None,
    num_scales: int | None = None,
) -> None:
    """Variance-exploding SDE, or its discretisation (SMLD) with `num_scales` noise levels.

    `sigma_max` should be about the largest distance between two images.  None keeps the data
    set's value.
    """
    config.data.centered = False
    noise_scales = _given(sigma_max=sigma_max, num_scales=num_scales)
    config.model.update(noise_scales, scale_by_sigma=True)
    config.training.update(sde="vesde", continuous=continuous, reduce_mean=False)


def vp_sde(config: ConfigDict, *, continuous: bool) -> None:
    """Variance-preserving SDE, or its discretisation (DDPM) in 1000 steps."""
    config.data.centered = True
    config.model.update(num_scales=1000, scale_by_sigma=False)
    config.training.update(sde="vpsde", continuous=continuous, reduce_mean=True)


def subvp_sde(config: ConfigDict) -> None:
    """Sub-VP SDE; it has no discrete form."""
    vp_sde(config, continuous=True)
    config.training.sde = "subvpsde"


# --- Networks ----------------------------------------------------------------------------------


def ncsnpp(
    config: ConfigDict,
    *,
    num_res_blocks: int,
    embedding_type: str = "positional",
    fir: bool = True,
    progressive: str = "none",
    progressive_input: str = "residual",
    ema_rate: float = 0.9999,
    **unet: object,
) -> None:
    """NCSN++.  Further options are those of `_unet`."""
    _unet(config, "ncsnpp", num_res_blocks=num_res_blocks, ema_rate=ema_rate, **unet)
    config.model.update(
        embedding_type=embedding_type,
        fourier_scale=16.0,
        fir=fir,
        fir_kernel=(1, 3, 3, 1),
        skip_rescale=True,
        resblock_type="biggan",
        progressive=progressive,
        progressive_input=progressive_input,
        progressive_combine="sum",
        attention_type="ddpm",
        init_scale=0.0,
    )


def ncsnpp_256(config: ConfigDict) -> None:
    """NCSN++ for images of 256 px."""
    ncsnpp(
        config,
        num_res_blocks=2,
        ch_mult=(1, 1, 2, 2, 2, 2, 2),
        embedding_type="fourier",
        progressive="output_skip",
        progressive_input="input_skip",
        ema_rate=0.999,
    )


def ncsnpp_1024(config: ConfigDict) -> None:
    """NCSN++ for images of 1024 px."""
    ncsnpp(
        config,
        nf=16,
        num_res_blocks=1,
        ch_mult=(1, 2, 4, 8, 16, 32, 32, 32),
        embedding_type="fourier",
        progressive="output_skip",
        progressive_input="input_skip",
    )


def ddpmpp(config: ConfigDict, *, num_res_blocks: int, **options: object) -> None:
    """DDPM++: NCSN++ without FIR resampling and without the input pyramid."""
    ncsnpp(config, num_res_blocks=num_res_blocks, fir=False, progressive_input="none", **options)


def ddpm(config: ConfigDict, *, ema_rate: float = 0.9999, **unet: object) -> None:
    """The network of DDPM.  Further options are those of `_unet`."""
    _unet(config, "ddpm", num_res_blocks=2, ema_rate=ema_rate, **unet)


def ncsn(config: ConfigDict, *, ema_rate: float) -> None:
    """NCSN, whose normalisation is told the noise level; `ema_rate` 0 means no average."""
    _refinenet(config, "ncsn", ema_rate)
    config.model.scale_by_sigma = False


def ncsnv2(config: ConfigDict, *, depth: int, ema_rate: float) -> None:
    """NCSNv2 in the depth for images of 64, 128 or 256 px."""
    _refinenet(config, f"ncsnv2_{depth}", ema_rate)


def wide_resnet(
    config: ConfigDict,
    *,
    num_classes: int,
    nf: int = 16,
    blocks_per_group: int = 4,
    channel_multiplier: int = 10,
    dropout: float = 0.1,
    ema_rate: float = 0.999,
) -> None:
    """A classifier of noisy images, by default WRN-28-10; it draws no samples."""
    config.data.num_classes = num_classes
    config.model.update(
        name="wideresnet_noise_conditional",
        nf=nf,
        blocks_per_group=blocks_per_group,
        channel_multiplier=channel_multiplier,
        nonlinearity="swish",
        fourier_scale=16.0,
        dropout=dropout,
        ema_rate=ema_rate,
    )
    config.training.update(objective="classifier", snapshot_sampling=False)
    config.eval.update(enable_accuracy=True, enable_bpd=False, enable_sampling=False)
    pc_sampling(config, predictor="none")


def _unet(
    config: ConfigDict,
    name: str,
    *,
    num_res_blocks: int,
    ema_rate: float,
    nf: int = 128,
    ch_mult: tuple[int, ...] = (1, 2, 2, 2),
    attn_resolutions: tuple[int, ...] = (16,),
    conditional: bool = True,
) -> None:
    """Residual blocks at len(ch_mult) resolutions, attention at some of them."""
    config.model.update(
        name=name,
        nf=nf,
        ch_mult=ch_mult,
        num_res_blocks=num_res_blocks,
        attn_resolutions=attn_resolutions,
        conditional=conditional,
        ema_rate=ema_rate,
        normalization="GroupNorm",
        nonlinearity="swish",
        resamp_with_conv=True,
        conv_size=3,
    )


def _refinenet(config: ConfigDict, name: str, ema_rate: float) -> None:
    config.model.update(
        name=name,
        nf=128,
        ema_rate=ema_rate,
        normalization="InstanceNorm++",
        nonlinearity="elu",
        interpolation="bilinear",
    )


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
    steps = _given(snr=snr, n_steps_each=n_steps_each)
    config.sampling.update(steps, method="pc", predictor=predictor, corrector=corrector)


def _given(**options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}
