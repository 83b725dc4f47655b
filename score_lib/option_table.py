"""Every option of a config: its default, the values it takes, and its meaning.

The defaults are the published ones for CIFAR-10, the least special of the data sets.  An option
beyond the published ones has a default that leaves every published experiment as it is.
"""

import enum
from typing import NamedTuple

from score_lib.option_kinds import (
    Check,
    above,
    any_operator,
    at_least,
    between,
    classes,
    color,
    compiling,
    conditions,
    correctors,
    count,
    data_sets,
    decay,
    decays,
    device,
    ends,
    extractors,
    factors,
    figures,
    flag,
    indices,
    interval,
    methods,
    multiples,
    name,
    networks,
    none_or,
    nonzero,
    normalizations,
    number,
    numbers,
    one_of,
    operators,
    parametrizations,
    path,
    patterns,
    pools,
    precision,
    predictors,
    probes,
    processes,
    profiles,
    respacings,
    samplers,
    shape,
    side,
    split,
    tasks,
    text,
    time_grids,
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


# --- The table: name, default, kind, meaning ----------------------------------------------------

_RUN = {
    "seed": (42, whole, "seed of every random number"),
    "device": ("auto", device, '"auto": a GPU where there is one; reads as its name'),
}

_DATA = {
    "dataset": (NEEDED, data_sets, 'data set; "IMAGES" are your own, at `data.path`'),
    "image_size": (NEEDED, side, "side in pixels, or (height, width)"),
    "image_width": (0, at_least(0), "width, where `image_size` is the height; 0: square"),
    "num_channels": (3, count, "1 for gray images, 3 for colour, 4 with transparency"),
    "shape": ((), shape, "shape of a datum that is no image, such as (D,) or (N, C); (): an image"),
    "kind": (
        "",
        one_of("", "vectors", "series", "points", "images", "volumes"),
        'what a datum is; "": by its data set or shape; points in ARRAYS have to be named',
    ),
    "standardize": (
        "channel",
        one_of("channel", "entry", "all", "none"),
        "continuous values: what has one mean and one deviation, by which data are standardised",
    ),
    "key": ("", text, 'array in an .npz or .h5; "": the only one, or "data" or another usual name'),
    "centered": (NEEDED, flag, "pixels from -1 to 1 inside the network, else from 0 to 1"),
    "random_flip": (True, flag, "mirror half of the training images"),
    "augment": (
        0.0,
        between(0.0, 1.0),
        "probability of each change of a training image, of which the network is told; 0: none",
    ),
    "uniform_dequantization": (False, flag, "spread grey levels by uniform noise"),
    "category": ("", text, 'category of LSUN, such as "bedroom"'),
    "path": ("", path, "your own images or arrays: a folder or file; or files of a public set"),
    "split": ("", split, 'held-out part of `path`; "": a folder such as test/, else every tenth'),
    "range": ((), ends, "stored values of black and white; (): 0 and 255, or 0 and 1 for floats"),
    "background": ("", color, 'colour behind transparent pixels; "": they are refused'),
    "data_dir": ("", path, 'folder of tensorflow-datasets; "": its own choice'),
    "tfrecords_path": ("", path, "TFRecord files of FFHQ and CelebA-HQ"),
    "num_classes": (0, at_least(0), "classes that a classifier tells apart, or a network is told"),
    "levels": (0, at_least(0), "grey levels of a pixel; 0: 256, or continuous values"),
    "num_workers": (4, at_least(0), "processes that prepare batches"),
    "on_error": ("raise", one_of("raise", "skip"), "for a file that cannot be read"),
}

_MODEL = {
    "name": (NEEDED, networks, "network"),
    "weights": ("", path, "weights to start from: a file or folder; used before a run's own"),
    "weights_except": ((), patterns, "patterns of weights that stay as initialised"),
    "ema_rate": (NEEDED, between(0.0, 1.0), "decay of the averaged weights; 0: no average"),
    "ema_halflife": (
        0.0,
        at_least(0.0),
        "half-life of the averaged weights in images, in place of `ema_rate`; 0: `ema_rate`",
    ),
    "ema_rampup": (
        0.05,
        at_least(0.0),
        "bound of `ema_halflife` as a share of the images seen so far; 0: none",
    ),
    "ema_rates": ((), decays, "decays of further averages, for `eval.ema`"),
    "sigma_min": (0.01, above(0.0), "smallest noise level of the VE process"),
    "sigma_max": (50.0, above(0.0), "largest noise level of the VE process"),
    "beta_min": (0.1, above(0.0), "beta(0) of the VP and sub-VP processes"),
    "beta_max": (20.0, above(0.0), "beta(1) of the VP and sub-VP processes"),
    "num_scales": (1000, count, "N: steps of the discrete process"),
    "parametrization": (
        "",
        parametrizations,
        'what the network\'s output is; "": as published with the process',
    ),
    "sigma_data": (0.5, above(0.0), "standard deviation of the data inside the network"),
    "dropout": (0.1, between(0.0, 1.0), "share of features dropped in training"),
    "embedding_type": ("fourier", name("fourier positional"), "embedding of the time"),
    "fourier_log": (True, flag, "Fourier features of the label's logarithm, else of the label"),
    "freq_shift": (
        1.0,
        between(0.0, 1.0),
        "ddpm, ncsnpp: frequency k of n of a time step is 10000^(-k / (n - shift))",
    ),
    "checkpoint_activations": (False, flag, "U-Nets, mlp, set_transformer: less memory, more time"),
    "nf": (NETWORK, count, "features of the first layer"),
    "ch_mult": (NETWORK, multiples, "features at each resolution, in multiples of `nf`"),
    "num_res_blocks": (NETWORK, at_least(0), "residual blocks, in U-Nets at each resolution"),
    "attn_resolutions": (NETWORK, numbers, "heights of feature maps with attention"),
    "attn_every_block": (
        False,
        flag,
        "ddpm, ncsnpp: attention after each block on the way up, else after the last one there",
    ),
    "attention_type": (NETWORK, name("ddpm"), "kind of attention"),
    "conditional": (NETWORK, flag, "whether the network is told the time"),
    "num_features": (9, count, 'length of the vector of `training.condition = "features"`'),
    "scale_by_sigma": (NETWORK, flag, "divide the output by the noise level"),
    "normalization": (NETWORK, normalizations, 'normalization; the U-Nets have "GroupNorm"'),
    "norm_groups": (0, at_least(0), "ddpm, ncsnpp: groups of each normalization; 0: as published"),
    "norm_eps": (1e-6, above(0.0), "ddpm, ncsnpp: added to variances in normalizations"),
    "nonlinearity": (NETWORK, name("swish elu relu lrelu"), "activation"),
    "resamp_with_conv": (NETWORK, flag, "convolve where the resolution changes"),
    "symmetric_padding": (
        False,
        flag,
        "ddpm, ncsnpp: pad all sides of features that a convolution halves, else right and bottom",
    ),
    "conv_size": (NETWORK, count, "side of convolution kernels; 3"),
    "fir": (NETWORK, flag, "smooth where the resolution changes"),
    "fir_kernel": (NETWORK, numbers, "taps of the smoothing filter"),
    "skip_rescale": (NETWORK, flag, "divide the sum of two branches by sqrt(2)"),
    "resblock_type": (NETWORK, name("biggan ddpm"), "kind of residual block"),
    "progressive": (NETWORK, name("none output_skip residual"), "image pyramid at the output"),
    "progressive_input": (NETWORK, name("none input_skip residual"), "image pyramid at the input"),
    "progressive_combine": (NETWORK, name("sum cat"), "joins an input skip to features"),
    "fourier_scale": (NETWORK, number, "standard deviation of the Fourier frequencies"),
    "input_fourier_scale": (0.0, at_least(0.0), "mlp, set_transformer: of the input; 0: none"),
    "inducing_points": (0, at_least(0), "set_transformer: learnt points in attention; 0: none"),
    "init_scale": (NETWORK, at_least(0.0), "scale of the last layer of a block at the start"),
    "interpolation": (NETWORK, name("bilinear bicubic nearest"), "NCSN, NCSNv2: upsampling"),
    "num_heads": (1, count, "U-Nets, set_transformer: attention heads"),
    "num_head_channels": (0, at_least(0), "features of an attention head; 0: see `num_heads`"),
    "use_new_attention_order": (False, flag, "ADM: weights by query, key and value, then by heads"),
    "learn_sigma": (False, flag, "ADM: also predict the variances of reverse steps"),
    "rescale_timesteps": (False, flag, "ADM: steps are told as of 1000 of them"),
    "pool": ("attention", pools, "ADM, classifier: how feature maps become logits"),
    "scale_shift_norm": (True, flag, "ADM: the time scales and shifts features, else it is added"),
    "blocks_per_group": (NETWORK, count, "wide ResNet: residual blocks of a group"),
    "channel_multiplier": (NETWORK, count, "wide ResNet: width"),
}

_TRAINING = {
    "sde": (NEEDED, processes, "process"),
    "continuous": (NEEDED, flag, "train at all times, else at `model.num_scales` of them"),
    "reduce_mean": (NEEDED, flag, "average the loss over pixels, else half of their sum"),
    "likelihood_weighting": (False, flag, "weight the loss by g(t)^2"),
    "noise_levels": (
        "",
        one_of("", "lognormal", "likelihood"),
        'noise levels of training; "": times uniform on [1e-5, T]',
    ),
    "lognormal_mean": (-1.2, number, 'mean of log(s / m) with `noise_levels` "lognormal"'),
    "lognormal_std": (1.2, above(0.0), "its standard deviation"),
    "weighting": (
        "",
        one_of("", "output", "min_snr"),
        'weight of the loss at each time; "": of the score, s(t)^2',
    ),
    "objective": ("score", one_of("score", "classifier"), "what the network learns"),
    "condition": (
        "",
        conditions,
        'what the network is told: "classes", "image", "features", or several, with commas',
    ),
    "condition_dropout": (0.0, between(0.0, 1.0), "how often the condition is dropped in training"),
    "condition_operator": (
        "super_resolution",
        operators,
        'measurement of a picture that is the condition "image"',
    ),
    "condition_factor": (2, count, 'operator "super_resolution": how much smaller a side is'),
    "batch_size": (128, count, "images in a batch, of all processes together"),
    "n_iters": (1300001, count, "optimisation steps"),
    "log_freq": (50, count, "steps between logs of the loss"),
    "eval_freq": (100, count, "steps between losses of held-out images"),
    "snapshot_freq": (50000, count, "steps between numbered checkpoints"),
    "snapshot_freq_for_preemption": (10000, count, "steps between resumable states"),
    "snapshot_sampling": (True, flag, "draw samples at each numbered checkpoint"),
    "metrics_freq": (
        0,
        at_least(0),
        "steps between figures of samples, such as the FID, which choose `best.pth`; 0: none",
    ),
    "metrics_samples": (2000, at_least(4), "samples for such a figure"),
    "metrics_sampler": (
        "",
        one_of("", "configured"),
        'their sampler; "": one of about 20 evaluations, "configured": as `sampling` says',
    ),
    "keep_meta_checkpoints": (2, between(0, 9), "earlier resumable states that are kept"),
    "posthoc_profiles": ((), profiles, "profiles for averages that are chosen after training"),
    "posthoc_freq": (25000, count, "steps between snapshots of `posthoc_profiles`"),
    "n_jitted_steps": (1, count, "steps between two checks of the frequencies"),
    "grad_accumulation": (1, count, "parts that a batch is computed in, one by one"),
    "precision": ("float32", precision, "precision of the network in training"),
    "compile": ("", compiling, 'in training: "", a mode of torch.compile, or only CUDA graphs'),
    "wandb": ("", text, 'project of Weights & Biases to log to, beside TensorBoard; "": none'),
}

_OPTIM = {
    "optimizer": ("Adam", name("Adam"), "optimiser"),
    "lr": (2e-4, above(0.0), "learning rate"),
    "beta1": (0.9, decay, "decay of Adam's average gradient"),
    "eps": (1e-8, above(0.0), "Adam's epsilon"),
    "weight_decay": (0.0, at_least(0.0), "weight of the L2 penalty"),
    "amsgrad": (False, flag, "Adam with the largest second moment so far"),
    "warmup": (5000, at_least(0), "steps until the full learning rate"),
    "cooldown": (0, at_least(0), "last steps of training, in which it falls to 0"),
    "grad_clip": (1.0, nonzero, "largest norm of the gradient; negative: any"),
}

_SAMPLING = {
    "method": ("pc", samplers, 'sampler; "pc": predictor-corrector, "ode": black-box RK45'),
    "predictor": (NEEDED, predictors, 'predictor of method "pc"'),
    "corrector": (NEEDED, correctors, 'corrector of method "pc"'),
    "snr": (0.16, at_least(0.0), "signal-to-noise ratio of the corrector's steps"),
    "n_steps_each": (1, at_least(0), "corrector steps at each time"),
    "probability_flow": (False, flag, "predictors follow the ODE"),
    "noise_removal": (True, flag, "return the last step without its noise"),
    "classes": ((), classes, "classes that samples have in turn, by number or name; (): all"),
    "guidance_scale": (1.0, at_least(0.0), "classifier-free guidance scale; 1: none"),
    "guidance_interval": ((), interval, "first and last time with guidance; (): all"),
    "num_samples": (64, count, "samples that are drawn"),
    "num_steps": (0, at_least(0), "steps, if the network knows all times; 0: `model.num_scales`"),
    "time_grid": ("", time_grids, 'times that are visited; "": as suits the method'),
    "churn": (0.0, at_least(0.0), 'method "heun": noise added on the way'),
    "respacing": ("", respacings, 'method "chain": levels that are visited; "": all'),
    "variance": (
        "small",
        one_of("small", "large", "learned", "ddim"),
        'method "chain": of its steps; "learned": of `model.learn_sigma`; "ddim": see `eta`',
    ),
    "eta": (0.0, between(0.0, 1.0), 'variance "ddim": its noise, as a share of "small"\'s'),
    "clip": (True, flag, 'method "chain": clamp the predicted x_0 to the range of the data'),
    "clip_noise": (True, flag, 'variance "ddim": the predicted noise follows the clamped x_0'),
    "shift_mean": (False, flag, 'method "chain": guidance moves means by the variance, as ADM'),
    "adaptive_rtol": (0.05, above(0.0), 'method "adaptive": relative tolerance'),
    "adaptive_atol": (
        0.0078,
        above(0.0),
        'method "adaptive": absolute tolerance, in the network\'s range',
    ),
    "precision": ("float32", precision, "precision in sampling; bits/dim are in float32"),
    "compile": ("", compiling, 'in sampling: "", a mode of torch.compile, or only CUDA graphs'),
}

_CONTROL = {
    "task": ("inpaint", tasks, "what is done"),
    "name": ("", text, 'folder of the results; "": the task'),
    "path": ("", path, 'images to start from: a file or folder; "": held-out ones'),
    "num_images": (8, count, "images to start from"),
    "num_results": (4, count, "samples for each of them"),
    "operator": ("", any_operator, 'measurement of an image; "": as suits the task'),
    "method": ("pigdm", methods, 'how an image is restored; "none": by the condition alone'),
    "noise_std": (
        0.0,
        at_least(0.0),
        "noise of a measurement: of images in [0, 1] or in the units of other data",
    ),
    "mask": ("", path, "file of a mask, white where pixels are known"),
    "box": ((), indices, 'operator "box": (top, left, height, width); (): the centre'),
    "keep": (0.25, between(0.0, 1.0), 'operator "random_mask": share of known pixels'),
    "factor": (2, count, 'operator "super_resolution": how much smaller a side is'),
    "blur_std": (1.0, above(0.0), 'operator "blur": standard deviation in pixels'),
    "num_measurements": (0, at_least(0), 'operator "projection": known numbers; 0: a quarter'),
    "operator_seed": (0, whole, "seed of operators that are drawn at random"),
    "strength": (1.0, at_least(0.0), 'method "dps": step size'),
    "data_std": (
        0.0,
        at_least(0.0),
        'method "pigdm": standard deviation of data; 0: 0.3 of pixels in [0, 1], 1 of other data',
    ),
    "iterations": (5, count, 'methods "pigdm" and "tweedie": conjugate-gradient iterations'),
    "classifier": ("", path, 'task "class": checkpoint of a noise-conditional classifier'),
    "classifier_config": (
        "",
        path,
        "its config, if its file holds none: the name of an experiment, or a config.json",
    ),
    "labels": ((), classes, "classes to draw, or of images, by number or name; (): all"),
    "guidance_scale": (1.0, at_least(0.0), 'task "class": scale of guidance by the classifier'),
    "guidance_until": (1.0, above(0.0), 'task "class": last time with that guidance'),
    "start_time": (0.5, above(0.0), 'task "edit": time that an image is noised to'),
    "tolerance": (1e-5, above(0.0), "of the ODE solver that encodes and decodes"),
    "num_interpolations": (9, at_least(2), 'task "interpolate": images in a row'),
    "temperatures": ((0.6, 0.8, 1.0, 1.2), factors, 'task "temperature": factors of latent noise'),
    "other": ("", path, 'task "compare_codes": checkpoint of another network'),
}

_EVAL = {
    "begin_ckpt": (9, at_least(0), "number of the first checkpoint"),
    "end_ckpt": (26, at_least(0), "number of the last checkpoint"),
    "checkpoint": (
        "",
        path,
        'file of a checkpoint in place of numbered ones; "best": that of `training.metrics_freq`',
    ),
    "ema": (
        "",
        text,
        'averaged weights: "", a rate, "posthoc_0.12", "none"; in evaluations several, with commas',
    ),
    "wait_minutes": (0.0, at_least(0.0), "how long to wait for a missing checkpoint"),
    "batch_size": (1024, count, "images in a batch"),
    "enable_loss": (True, flag, "measure the loss"),
    "loss_num_repeats": (1, count, "passes over the test set for the loss"),
    "enable_bpd": (False, flag, "measure bits/dim"),
    "bpd_dataset": ("test", one_of("train", "test"), "part of the data for bits/dim"),
    "bpd_num_images": (0, at_least(0), "bits/dim are of so many images, the first; 0: all"),
    "bpd_steps": (0, none_or(6), "solver steps for bits/dim, one evaluation each; 0: adaptive"),
    "dataset": ("", one_of("", "train", "test"), 'other name of `bpd_dataset`; "": unused'),
    "bpd_num_repeats": (5, count, "passes for bits/dim, dequantised anew"),
    "enable_elbo": (False, flag, "bound bits/dim by the ELBO of the reverse SDE"),
    "elbo_num_times": (100, at_least(2), "times at which the bound is estimated for an image"),
    "enable_vlb": (False, flag, "bound bits/dim of a discrete model by its chain"),
    "vlb_num_times": (0, at_least(0), "steps at which that bound is estimated; 0: all"),
    "vlb_variance": (
        "small",
        one_of("small", "large", "learned"),
        'variances of the chain\'s reverse steps; "learned": those of `model.learn_sigma`',
    ),
    "dequantizer": (
        "",
        path,
        'noise for bits/dim: checkpoint of a dequantizer, or "run": the run\'s own; "": uniform',
    ),
    "num_probes": (1, count, "Hutchinson probes of a divergence"),
    "hutchinson_type": ("Rademacher", probes, 'probes; "exact": the whole trace'),
    "per_sample_error": (False, flag, "bits/dim: solver steps for each image alone"),
    "enable_sampling": (False, flag, "draw samples and compare them with the data"),
    "num_samples": (50000, count, "samples to compare"),
    "extractor": ("", extractors, '"": inception, of DIGITS digits; or your own "module:function"'),
    "extractor_weights": ("", path, 'file of its weights; "": where it keeps them'),
    "figures": ("", figures, '`--mode reproduce`: which figures; "": all that are published'),
    "stats": ("", path, 'data statistics; "": in stats/ of the run, or assets/stats'),
    "stats_format": (
        "features",
        one_of("features", "moments"),
        '`--mode fid_stats` writes all features, or "moments": mu and sigma for other tools',
    ),
    "suggest_noise_scales": (False, flag, "`--mode fid_stats`: find noise levels for the data"),
    "enable_accuracy": (False, flag, "measure the accuracy of a classifier"),
    "accuracy_num_levels": (11, at_least(2), "noise levels of the accuracy"),
    "accuracy_num_repeats": (1, count, "draws of noise for each image"),
}

_DEQUANTIZER = {
    "nf": (32, count, "features"),
    "num_layers": (4, count, "coupling layers"),
    "num_bins": (8, count, "bins of each spline"),
    "lr": (1e-3, above(0.0), "learning rate"),
    "n_iters": (5000, count, "optimisation steps"),
}

_EXPORT = {
    "format": ("safetensors", one_of("safetensors", "pth", "diffusers"), "kind of file"),
    "precision": ("float32", one_of("float32", "float16"), "of trained weights in safetensors"),
    "folder": ("", path, 'folder to write; "": `export/` in the folder of the run'),
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
    ("dequantizer", "Learned dequantization: `--mode train_dequantizer`", _DEQUANTIZER),
    ("export", "Sharing a network: `--mode export`", _EXPORT),
)
# Every option by its dotted name, such as "model.nf".
TABLE: dict[str, Option] = {
    f"{section}.{key}".lstrip("."): Option(*entry)
    for section, _, options in SECTIONS
    for key, entry in options.items()
}
