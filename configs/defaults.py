"""Values that every experiment starts from, and help with configs that users bring.

`base` is what an experiment changes; `complete` gives an older config the options that it does not
know yet; `check_keys` finds misspelt names.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import pathlib

from ml_collections import ConfigDict

# As published for CIFAR-10, the least special of the data sets.  Whatever has no value that is
# right for most experiments (data set, process, network, predictor) is set by a part.
PUBLISHED = {
    "seed": 42,
    "device": "auto",
    "data": {
        "num_channels": 3,
        "random_flip": True,
        "uniform_dequantization": False,
    },
    "model": {
        "sigma_min": 0.01,
        "sigma_max": 50.0,
        "beta_min": 0.1,
        "beta_max": 20.0,
        "num_scales": 1000,
        "dropout": 0.1,
        "embedding_type": "fourier",
    },
    "training": {
        "batch_size": 128,
        "n_iters": 1300001,
        "log_freq": 50,
        "eval_freq": 100,
        "snapshot_freq": 50000,
        "snapshot_freq_for_preemption": 10000,
        "snapshot_sampling": True,
        "likelihood_weighting": False,
    },
    "optim": {
        "optimizer": "Adam",
        "lr": 2e-4,
        "beta1": 0.9,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "warmup": 5000,
        "grad_clip": 1.0,
    },
    "sampling": {
        "method": "pc",
        "n_steps_each": 1,
        "noise_removal": True,
        "probability_flow": False,
        "snr": 0.16,
    },
    "eval": {
        "begin_ckpt": 9,
        "end_ckpt": 26,
        "batch_size": 1024,
        "num_samples": 50000,
        "enable_loss": True,
        "enable_bpd": False,
        "enable_sampling": False,
        "bpd_dataset": "test",
    },
}

# Options beyond the published ones.  Each default leaves an experiment as it was published; code
# reads them as `config.section.get(name, default)` with the same default.
OPTIONS = {
    "data": {
        "category": "",  # of LSUN, such as "bedroom"
        "image_width": 0,  # where it is not image_size, which then is the height
        "path": "",  # the user's own images: a folder, a zip, an .npy or an .npz
        "data_dir": "",  # where tensorflow-datasets keeps its files; "": its own choice
        "tfrecords_path": "",  # of FFHQ and CelebA-HQ
        "num_classes": 0,  # of the labels that a classifier learns
        "levels": 0,  # grey values of a pixel, for dequantisation and bits/dim; 0: the data set's
        "num_workers": 4,  # processes that prepare batches
        "on_error": "raise",  # an image that cannot be read: "raise", or "skip" it by name
    },
    "model": {
        "checkpoint_activations": False,  # U-Nets: keep less for the backward pass, compute again
    },
    "training": {
        "precision": "float32",  # or "tf32", or "bfloat16": what the network is computed in
        "compile": "",  # a mode of torch.compile, such as "default"; "": none
        "objective": "score",  # or "classifier": what the network learns
        "n_jitted_steps": 1,  # optimisation steps per call
        "grad_accumulation": 1,  # parts that a batch is computed in, one after the other
        "keep_meta_checkpoints": 2,  # earlier ones that stay, in case the latest is damaged
    },
    "optim": {
        "amsgrad": False,
    },
    "sampling": {
        "precision": "float32",  # as of training; likelihoods are always float32
        "compile": "",  # as of training
        "num_samples": 64,
        "num_steps": 0,  # steps of a continuous model's sampler, or of a solver; 0: num_scales
        "time_grid": "",  # of a solver: "uniform", "log_snr", "edm" or "arctan"; "": its own
        "churn": 0.0,  # method "heun": noise added on the way
        "adaptive_rtol": 0.05,  # method "adaptive": tolerances of a step
        "adaptive_atol": 0.0078,  # in the network's range
    },
    "control": {
        "task": "inpaint",  # what --mode control does
        "name": "",  # of the folder for results; "": the task
        "path": "",  # images to start from: a file, a folder, ...; "": of the held-out part
        "num_images": 8,
        "num_results": 4,  # samples for each image
        "operator": "",  # what was measured of an image; "": what suits the task
        "method": "pigdm",  # how an image is restored: dps, pigdm, projection or tweedie
        "noise_std": 0.0,  # of a measurement, where images are in [0, 1]
        "mask": "",  # file of a mask, white where images are known
        "box": (),  # operator "box": (top, left, height, width) of what is open; (): the centre
        "keep": 0.25,  # operator "random_mask": share of pixels that are known
        "factor": 2,  # operator "super_resolution": how much smaller a side becomes
        "blur_std": 1.0,  # operator "blur": standard deviation in pixels
        "num_measurements": 0,  # operator "projection"; 0: a quarter of the dimensions
        "operator_seed": 0,  # of operators that are drawn at random
        "strength": 1.0,  # method "dps": step size
        "data_std": 0.3,  # method "pigdm": standard deviation of pixels in [0, 1]
        "iterations": 5,  # methods "pigdm" and "tweedie": of conjugate gradients
        "classifier": "",  # checkpoint of a noise-conditional classifier
        "labels": (),  # classes to draw; (): all
        "guidance_scale": 1.0,  # of the classifier's gradient
        "guidance_until": 1.0,  # the last time at which the classifier is used
        "start_time": 0.5,  # task "edit": how much of an image is forgotten
        "tolerance": 1e-5,  # of the ODE solver that encodes and decodes
        "num_interpolations": 9,  # task "interpolate": images in a row
        "temperatures": (0.6, 0.8, 1.0, 1.2),  # task "temperature"
        "other": "",  # task "compare_codes": checkpoint of another network
    },
    "eval": {
        "dataset": "",  # another name of bpd_dataset; wins where it is set
        "checkpoint": "",  # one file to evaluate, in place of begin_ckpt ... end_ckpt
        "bpd_num_repeats": 5,  # passes over the test set, each with dequantisation noise of its own
        "enable_accuracy": False,  # of a classifier
        "accuracy_num_levels": 11,  # noise levels at which it is measured
        "accuracy_num_repeats": 1,  # draws of noise for each example
        "loss_num_repeats": 1,  # passes over the test set, each at other noise levels
        "num_probes": 1,  # Hutchinson probes for the divergence in bits/dim
        "hutchinson_type": "Rademacher",  # or "Gaussian" probes, or "exact": no probes at all
        "per_sample_error": False,  # step sizes of the likelihood's solver for each image alone
        "extractor": "",  # of features for FID and the like; "": what suits the data set
        "extractor_weights": "",  # file of its weights; "": where it keeps or downloads them
        "suggest_noise_scales": False,  # with --mode fid_stats, also say which noise levels fit
        "stats": "",  # file of the data set's statistics; "": by its name, in assets/stats
        "wait_minutes": 0.0,  # for checkpoints that are still to be written
    },
}


def base() -> ConfigDict:
    """Every general option at its default."""
    config = ConfigDict(copy.deepcopy(PUBLISHED))
    _add_missing(config, OPTIONS)
    return config


def complete(config: ConfigDict) -> ConfigDict:
    """A copy of a config with the defaults of the general options that it lacks.

    Its own values stay, and a locked config gives a locked copy.

    Raises:
        ValueError: a section such as `model` holds something else than options.
    """
    full = ConfigDict(config.to_dict())
    _add_missing(full, base().to_dict())
    if config.is_locked:
        full.lock()
    return full


def experiments() -> list[str]:
    """Names of all experiments, such as "ve/cifar10_ncsnpp_continuous"."""
    root = pathlib.Path(__file__).parent
    files = [file for process in ("ve", "vp", "subvp") for file in (root / process).rglob("*.py")]
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    return sorted(name for name in names if not name.endswith("/__init__"))


def load(name: str) -> ConfigDict:
    """The config of an experiment, by its name as in `experiments`."""
    return importlib.import_module("configs." + name.replace("/", ".")).get_config()


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted names of all options, such as "model.nf", and their values."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@functools.cache
def known_keys() -> frozenset[str]:
    """Dotted names of the options that any of the experiments has."""
    return frozenset(key for name in experiments() for key in flatten(load(name)))


def check_keys(config: ConfigDict) -> list[str]:
    """Find names in a config that no experiment uses.

    Returns:
        dotted names of unknown options, sorted: nothing reads them.
    Raises:
        ValueError: some resemble a known option so much that they must be slips.
    """
    unknown = sorted(set(flatten(config)) - known_keys())
    meant = {key: close for key in unknown if (close := _closest(key))}
    if meant:
        slips = "; ".join(f"{key!r}: did you mean {close!r}?" for key, close in meant.items())
        raise ValueError(
            f"unknown config option {slips} "
            "(An option of your own needs a name that resembles no other, or a section of its own.)"
        )
    return unknown


def _closest(key: str) -> str | None:
    """The known option that a misspelt name stands for, or None."""
    # 0.82 finds one wrong letter in six and two that are swapped, yet lets names pass that are
    # in use beside ours, such as `model.sigma_begin` (0.8 from `sigma_min`) or `optim.beta2`.
    find = functools.partial(difflib.get_close_matches, n=1, cutoff=0.82)
    section, _, name = key.rpartition(".")
    sections = {known.rpartition(".")[0] for known in known_keys()}
    if section not in sections:
        # A section of the user's own is free; a misspelt one is not.
        section = next(iter(find(section, sections)), None)
    siblings = [
        known.rpartition(".")[2] for known in known_keys() if known.rpartition(".")[0] == section
    ]
    close = find(name, siblings)
    return f"{section}.{close[0]}".lstrip(".") if close else None


def _add_missing(config: ConfigDict, defaults: dict) -> None:
    for key, default in defaults.items():
        if not isinstance(default, dict):
            if key not in config:
                config[key] = default
            continue
        if key not in config:
            config[key] = ConfigDict()
        if not isinstance(config[key], ConfigDict):
            raise ValueError(f"config.{key} must be a section of options, not {config[key]!r}")
        _add_missing(config[key], default)
