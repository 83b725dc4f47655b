"""Every option of a config: its default, the values it takes, and its meaning.

The defaults are the published ones for CIFAR-10, the least special of the data sets.  An option
beyond the published ones has a default that leaves every published experiment as it is.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from score_lib.option_kinds import (
    Check,
    above,
    at_least,
    between,
    counts,
    device,
    flag,
    from_to_below,
    name,
    number,
    numbers,
    one_of,
    side,
    text,
    whole,
)


class NoDefault(enum.Enum):
    """Why an option has no default."""

    NEEDED = "set by every experiment"
    NETWORK = "set by experiments whose network has it"


NEEDED, NETWORK = NoDefault


class Option(NamedTuple):
    """One option; its name is its key in the table."""

    default: object
    check: Check
    meaning: str


_PRECISION = one_of("float32", "tf32", "bfloat16")
_COMPILE = one_of("", "default", "reduce-overhead", "max-autotune")

_RUN = {
    "seed": Option(42, whole, "seed of every random number"),
    "device": Option("auto", device, '"auto": a GPU where there is one'),
}

_DATA = {
    "dataset": Option(
        NEEDED,
        name("CIFAR10 SVHN CELEBA LSUN FFHQ CelebAHQ IMAGES DIGITS COLOR_DIGITS"),
        'data set; "IMAGES" are your own, at `data.path`',
    ),
    "image_size": Option(NEEDED, side, "side in pixels, or (height, width)"),
    "image_width": Option(0, at_least(0), "width, where `image_size` is the height; 0: square"),
    "num_channels": Option(3, at_least(1), "1 for gray images, 3 for colour, 4 with transparency"),
    "centered": Option(NEEDED, flag, "pixels from -1 to 1 inside the network, else from 0 to 1"),
    "random_flip": Option(True, flag, "mirror half of the training images"),
    "uniform_dequantization": Option(False, flag, "spread grey levels by uniform noise"),
    "category": Option("", text, 'category of LSUN, such as "bedroom"'),
    "path": Option("", text, "your own images: a folder, .zip, .npy or .npz"),
    "data_dir": Option("", text, 'folder of tensorflow-datasets; "": its own choice'),
    "tfrecords_path": Option("", text, "TFRecord files of FFHQ and CelebA-HQ"),
    "num_classes": Option(0, at_least(0), "classes that a classifier tells apart"),
    "levels": Option(0, at_least(0), "grey levels of a pixel; 0: those of the data set"),
    "num_workers": Option(4, at_least(0), "processes that prepare batches"),
    "on_error": Option("raise", one_of("raise", "skip"), "for an image that cannot be read"),
}

_MODEL = {
    "name": Option(
        NEEDED,
        name("ncsnpp ddpm ncsn ncsnv2_64 ncsnv2_128 ncsnv2_256 wideresnet_noise_conditional"),
        "network",
    ),
    "ema_rate": Option(NEEDED, between(0.0, 1.0), "decay of the averaged weights; 0: no average"),
    "sigma_min": Option(0.01, above(0.0), "smallest noise level of the VE process"),
    "sigma_max": Option(50.0, above(0.0), "largest noise level of the VE process"),
    "beta_min": Option(0.1, above(0.0), "beta(0) of the VP and sub-VP processes"),
    "beta_max": Option(20.0, above(0.0), "beta(1) of the VP and sub-VP processes"),
    "num_scales": Option(1000, at_least(1), "N: steps of the discrete process"),
    "dropout": Option(0.1, between(0.0, 1.0), "share of features dropped in training"),
    "embedding_type": Option("fourier", name("fourier positional"), "embedding of the time"),
    "checkpoint_activations": Option(False, flag, "U-Nets: less memory in training, more time"),
    "nf": Option(NETWORK, at_least(1), "features of the first layer"),
    "ch_mult": Option(NETWORK, counts(), "features at each resolution, in multiples of `nf`"),
    "num_res_blocks": Option(NETWORK, at_least(0), "residual blocks at each resolution"),
    "attn_resolutions": Option(NETWORK, numbers, "sides of feature maps with attention"),
    "attention_type": Option(NETWORK, name("ddpm"), "kind of attention"),
    "conditional": Option(NETWORK, flag, "whether the network is told the time"),
    "scale_by_sigma": Option(NETWORK, flag, "divide the output by the noise level"),
    "normalization": Option(
        NETWORK,
        name("GroupNorm InstanceNorm InstanceNorm++ VarianceNorm"),
        'normalization; the U-Nets have "GroupNorm"',
    ),
    "nonlinearity": Option(NETWORK, name("swish elu relu lrelu"), "activation"),
    "resamp_with_conv": Option(NETWORK, flag, "convolve where the resolution changes"),
    "conv_size": Option(NETWORK, at_least(1), "side of convolution kernels; 3"),
    "fir": Option(NETWORK, flag, "smooth where the resolution changes"),
    "fir_kernel": Option(NETWORK, numbers, "taps of the smoothing filter"),
    "skip_rescale": Option(NETWORK, flag, "divide the sum of two branches by sqrt(2)"),
    "resblock_type": Option(NETWORK, name("biggan ddpm"), "kind of residual block"),
    "progressive": Option(
        NETWORK, name("none output_skip residual"), "pyramid of images at the output"
    ),
    "progressive_input": Option(
        NETWORK, name("none input_skip residual"), "pyramid of images at the input"
    ),
    "progressive_combine": Option(NETWORK, name("sum cat"), "joins an input skip to features"),
    "fourier_scale": Option(NETWORK, number, "standard deviation of the Fourier frequencies"),
    "init_scale": Option(NETWORK, number, "scale of the last layer of a block at the start"),
    "interpolation": Option(
        NETWORK, name("bilinear bicubic nearest"), "NCSN and NCSNv2: how features are enlarged"
    ),
    "blocks_per_group": Option(NETWORK, at_least(1), "wide ResNet: residual blocks of a group"),
    "channel_multiplier": Option(NETWORK, at_least(1), "wide ResNet: width"),
}

_TRAINING = {
    "sde": Option(NEEDED, name("vesde vpsde subvpsde"), "process"),
    "continuous": Option(NEEDED, flag, "train at all times, else at `model.num_scales` of them"),
    "reduce_mean": Option(NEEDED, flag, "average the loss over pixels, else half of their sum"),
    "likelihood_weighting": Option(False, flag, "weight the loss by g(t)^2"),
    "objective": Option("score", one_of("score", "classifier"), "what the network learns"),
    "batch_size": Option(128, at_least(1), "images in a batch, of all processes together"),
    "n_iters": Option(1300001, at_least(1), "optimisation steps"),
    "log_freq": Option(50, at_least(1), "steps between logs of the loss"),
    "eval_freq": Option(100, at_least(1), "steps between losses of held-out images"),
    "snapshot_freq": Option(50000, at_least(1), "steps between numbered checkpoints"),
    "snapshot_freq_for_preemption": Option(10000, at_least(1), "steps between resumable states"),
    "snapshot_sampling": Option(True, flag, "draw samples at each numbered checkpoint"),
    "keep_meta_checkpoints": Option(2, between(0, 9), "earlier resumable states that are kept"),
    "n_jitted_steps": Option(1, at_least(1), "steps between two checks of the frequencies"),
    "grad_accumulation": Option(1, at_least(1), "parts that a batch is computed in, one by one"),
    "precision": Option("float32", _PRECISION, "precision of the network in training"),
    "compile": Option("", _COMPILE, 'mode of torch.compile in training; "": not compiled'),
}

_OPTIM = {
    "optimizer": Option("Adam", name("Adam"), "optimiser"),
    "lr": Option(2e-4, above(0.0), "learning rate"),
    "beta1": Option(0.9, from_to_below(0.0, 1.0), "decay of Adam's average gradient"),
    "eps": Option(1e-8, at_least(0.0), "Adam's epsilon"),
    "weight_decay": Option(0.0, at_least(0.0), "weight of the L2 penalty"),
    "amsgrad": Option(False, flag, "Adam with the largest second moment so far"),
    "warmup": Option(5000, at_least(0), "steps until the full learning rate"),
    "grad_clip": Option(1.0, number, "largest norm of the gradient; negative: any"),
}

_SAMPLING = {
    "method": Option(
        "pc",
        name("pc ode adaptive ddim heun dpmpp_2m dpmpp_3m dpmpp_sde"),
        'sampler; "pc": predictor-corrector, "ode": black-box RK45',
    ),
    "predictor": Option(
        NEEDED,
        name("euler_maruyama reverse_diffusion ancestral_sampling none"),
        'predictor of method "pc"',
    ),
    "corrector": Option(
        NEEDED, name("langevin langevin_per_sample ald none"), 'corrector of method "pc"'
    ),
    "snr": Option(0.16, at_least(0.0), "signal-to-noise ratio of the corrector's steps"),
    "n_steps_each": Option(1, at_least(0), "corrector steps at each time"),
    "probability_flow": Option(False, flag, "predictors follow the ODE"),
    "noise_removal": Option(True, flag, "return the last step without its noise"),
    "num_samples": Option(64, at_least(1), "samples that are drawn"),
    "num_steps": Option(
        0, at_least(0), "steps, where the network knows all times; 0: `model.num_scales`"
    ),
    "time_grid": Option(
        "",
        name("uniform log_snr edm arctan", empty=True),
        'times that are visited; "": as suits the method',
    ),
    "churn": Option(0.0, at_least(0.0), 'method "heun": noise added on the way'),
    "adaptive_rtol": Option(0.05, above(0.0), 'method "adaptive": relative tolerance'),
    "adaptive_atol": Option(
        0.0078, above(0.0), 'method "adaptive": absolute tolerance, in the network\'s range'
    ),
    "precision": Option(
        "float32", _PRECISION, "precision of the network in sampling; bits/dim are in float32"
    ),
    "compile": Option("", _COMPILE, 'mode of torch.compile in sampling; "": not compiled'),
}

_CONTROL = {
    "task": Option(
        "inpaint",
        name(
            "inpaint colorize restore class edit reconstruct interpolate temperature compare_codes"
        ),
        "what is done",
    ),
    "name": Option("", text, 'folder of the results; "": the task'),
    "path": Option("", text, 'images to start from: a file or folder; "": held-out ones'),
    "num_images": Option(8, at_least(1), "images to start from"),
    "num_results": Option(4, at_least(1), "samples for each of them"),
    "operator": Option(
        "",
        name("box half random_mask super_resolution blur gray projection", empty=True),
        'measurement of an image; "": as suits the task',
    ),
    "method": Option("pigdm", name("pigdm dps projection tweedie"), "how an image is restored"),
    "noise_std": Option(0.0, at_least(0.0), "noise of a measurement, for images in [0, 1]"),
    "mask": Option("", text, "file of a mask, white where pixels are known"),
    "box": Option((), numbers, 'operator "box": (top, left, height, width); (): the centre'),
    "keep": Option(0.25, between(0.0, 1.0), 'operator "random_mask": share of known pixels'),
    "factor": Option(2, at_least(1), 'operator "super_resolution": how much smaller a side is'),
    "blur_std": Option(1.0, above(0.0), 'operator "blur": standard deviation in pixels'),
    "num_measurements": Option(
        0, at_least(0), 'operator "projection": numbers known of an image; 0: a quarter'
    ),
    "operator_seed": Option(0, whole, "seed of operators that are drawn at random"),
    "strength": Option(1.0, at_least(0.0), 'method "dps": step size'),
    "data_std": Option(
        0.3, above(0.0), 'method "pigdm": standard deviation of pixels, for images in [0, 1]'
    ),
    "iterations": Option(
        5, at_least(1), 'methods "pigdm" and "tweedie": iterations of conjugate gradients'
    ),
    "classifier": Option("", text, 'task "class": checkpoint of a noise-conditional classifier'),
    "labels": Option((), numbers, 'task "class": classes to draw; (): all'),
    "guidance_scale": Option(1.0, at_least(0.0), 'task "class": guidance scale'),
    "guidance_until": Option(1.0, above(0.0), 'task "class": last time with guidance'),
    "start_time": Option(0.5, above(0.0), 'task "edit": time that an image is noised to'),
    "tolerance": Option(1e-5, above(0.0), "of the ODE solver that encodes and decodes"),
    "num_interpolations": Option(9, at_least(2), 'task "interpolate": images in a row'),
    "temperatures": Option(
        (0.6, 0.8, 1.0, 1.2), numbers, 'task "temperature": factors of the latent noise'
    ),
    "other": Option("", text, 'task "compare_codes": checkpoint of another network'),
}

_EVAL = {
    "begin_ckpt": Option(9, at_least(0), "number of the first checkpoint"),
    "end_ckpt": Option(26, at_least(0), "number of the last checkpoint"),
    "checkpoint": Option("", text, "file of a single checkpoint in place of numbered ones"),
    "wait_minutes": Option(0.0, at_least(0.0), "how long to wait for a missing checkpoint"),
    "batch_size": Option(1024, at_least(1), "images in a batch"),
    "enable_loss": Option(True, flag, "measure the loss"),
    "loss_num_repeats": Option(1, at_least(1), "passes over the test set for the loss"),
    "enable_bpd": Option(False, flag, "measure bits/dim"),
    "bpd_dataset": Option("test", one_of("train", "test"), "part of the data for bits/dim"),
    "dataset": Option("", one_of("", "train", "test"), 'other name of `bpd_dataset`; "": unused'),
    "bpd_num_repeats": Option(5, at_least(1), "passes for bits/dim, dequantised anew"),
    "num_probes": Option(1, at_least(1), "Hutchinson probes of a divergence"),
    "hutchinson_type": Option(
        "Rademacher", name("Rademacher Gaussian exact"), 'probes; "exact": the whole trace'
    ),
    "per_sample_error": Option(False, flag, "bits/dim: solver steps for each image alone"),
    "enable_sampling": Option(False, flag, "draw samples and compare them with the data"),
    "num_samples": Option(50000, at_least(1), "samples to compare"),
    "extractor": Option(
        "",
        name("inception inception_tfgan digits", empty=True),
        'features of images; "": as suits the data set',
    ),
    "extractor_weights": Option("", text, 'file of its weights; "": where it keeps them'),
    "stats": Option("", text, 'file of the data set\'s statistics; "": in assets/stats'),
    "suggest_noise_scales": Option(
        False, flag, "with `--mode fid_stats`: find noise levels that suit the data"
    ),
    "enable_accuracy": Option(False, flag, "measure the accuracy of a classifier"),
    "accuracy_num_levels": Option(11, at_least(2), "noise levels of the accuracy"),
    "accuracy_num_repeats": Option(1, at_least(1), "draws of noise for each image"),
}

# Sections in the order of the docs: name, title, options.
SECTIONS = (
    ("", "A run", _RUN),
    ("data", "Data", _DATA),
    ("model", "Process and network", _MODEL),
    ("training", "Training", _TRAINING),
    ("optim", "Optimiser", _OPTIM),
    ("sampling", "Sampling", _SAMPLING),
    ("control", "Control: `--mode control`", _CONTROL),
    ("eval", "Evaluation", _EVAL),
)
# Every option by its dotted name, such as "model.nf".
TABLE: dict[str, Option] = {
    f"{section}.{key}".lstrip("."): option
    for section, _, options in SECTIONS
    for key, option in options.items()
}
