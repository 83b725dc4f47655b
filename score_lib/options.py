"""Configs made complete and checked, by the table of all options.

`python -m score_lib.options > docs/options.md` writes the table as a page.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from score_lib.option_table import NEEDED, SECTIONS, TABLE, NoDefault

Options = Mapping[str, object]  # by their dotted names, such as "model.nf"


class Device(str):
    """The name of a device, which PyTorch takes; like `torch.device` with a type and an index."""

    @property
    def type(self) -> str:
        """Such as "cuda"."""
        return self.partition(":")[0]

    @property
    def index(self) -> int | None:
        """Such as 1, of "cuda:1"; None if none was set."""
        number = self.partition(":")[2]
        return int(number) if number else None


class Config(ConfigDict):
    """A config whose option `device` reads as a device that PyTorch takes.

    It is set by a name or as a `torch.device`, and it is kept, also in JSON, as a name: "auto"
    means what a machine has when it is read.  Setting it needs no PyTorch.
    """

    def __setitem__(self, key, value):
        super().__setitem__(key, str(value) if key == "device" else value)

    def __getitem__(self, key):
        value = super().__getitem__(key)
        return _device(value) if key == "device" else value

    @property
    def device_name(self) -> str:
        """The device as it was set, perhaps "auto"."""
        return self._fields.get("device", "auto")

    def get_type(self, key) -> type:
        """The type that flags of the command line are parsed to."""
        return str if key == "device" else super().get_type(key)

    # Copies as other types, which know no "auto".

    def iteritems(self, *args, **keywords) -> Iterator[tuple[str, object]]:
        """See `ConfigDict`."""
        for key, value in super().iteritems(*args, **keywords):
            yield key, str(self[key]) if key == "device" else value

    def to_dict(self, *args, **keywords) -> dict:
        """See `ConfigDict`."""
        options = super().to_dict(*args, **keywords)
        return options | {"device": str(self["device"])} if "device" in options else options


def _device(name: str) -> Device:
    if name != "auto":
        return Device(name)
    import torch

    return Device("cuda" if torch.cuda.is_available() else "cpu")


def complete(config: object) -> Config:
    """A copy of a config in which every option that it lacks has its default.

    Its own values stay, and a locked config gives a locked copy.

    Args:
        config: a ConfigDict, a dict, an argparse.Namespace or any object with attributes; whole
            sections may be missing.
    Raises:
        ValueError: a section such as `model` holds something else than options.
    """
    full = _as_dict(config, "config")
    for section, _, _ in SECTIONS[1:]:
        full[section] = _as_dict(full.get(section, {}), f"config.{section}")
    for key, option in TABLE.items():
        if not isinstance(option.default, NoDefault):
            section, _, name = key.rpartition(".")
            (full[section] if section else full).setdefault(name, option.default)
    locked = isinstance(config, ConfigDict) and config.is_locked
    return Config(full).lock() if locked else Config(full)


def _as_dict(config: object, name: str) -> dict[str, object]:
    """The options of a config or of a section of one; a new dict, whose sections are as they were.

    Raises:
        ValueError: it holds no options.
    """
    if isinstance(config, ConfigDict):
        options = config.to_dict()
        return {**options, "device": config.device_name} if isinstance(config, Config) else options
    if isinstance(config, Mapping):
        return dict(config)
    if config is None or isinstance(config, str | int | float | list | tuple):
        raise ValueError(f"{name} should be a section of options, not {config!r}")
    values = {key: getattr(config, key) for key in dir(config) if not key.startswith("_")}
    # Methods are no options; a class may be a section.
    return {key: v for key, v in values.items() if isinstance(v, type) or not callable(v)}


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted names of all options, such as "model.nf", and their values."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return {**flat, "device": config.device_name} if isinstance(config, Config) else flat


def checked(config: object) -> tuple[ConfigDict, list[str]]:
    """A config, completed, whose values are right.

    Returns:
        the config, and the dotted names of its unknown options, sorted: nothing of ours reads them.
    Raises:
        ValueError: an option is misspelt, missing, of a wrong kind or out of range, or options
            exclude each other.
    """
    config = complete(config)
    _read_published_slips(config)
    flat = flatten(config)
    unknown = sorted(flat.keys() - TABLE.keys())
    if slips := [f"{key!r}: did you mean {meant!r}?" for key in unknown if (meant := _meant(key))]:
        raise ValueError(
            f"unknown config option {'; '.join(slips)} "
            "(An option of your own needs a name that resembles no other, or a section of its own.)"
        )
    # Options are compared with each other once each of them is right.
    for problems in (_wrong_values(flat), _conflicts(flat)):
        if found := list(problems):
            raise ValueError("; ".join(found))
    return config, unknown


def _read_published_slips(config: Config) -> None:
    """Read two misspelt options of published files, with a warning.

    `ve/ncsnv2/bedroom` has a network of discrete noise levels and `training.continuouse = False`;
    `ve/ncsn/celeba` names its process `training.loss`.
    """
    training = config.training
    for name, meant, applies in (
        ("continuouse", "continuous", training.get("continuouse") is False),
        ("loss", "sde", "sde" not in training and isinstance(training.get("loss"), str)),
    ):
        if applies:
            with config.unlocked():
                training[meant] = value = training[name]
                del training[name]
            logging.warning(
                "training.%s is read as training.%s = %r, as the published file means: rename it",
                name, meant, value,
            )  # fmt: skip


def _meant(key: str) -> str | None:
    """The known option that a misspelt name stands for, or None."""
    section, _, name = key.rpartition(".")
    options = {section: options for section, _, options in SECTIONS}
    if section not in options:
        # A section of the user's own is free; a misspelt one is not.
        section = _similar(section, options)
    close = _similar(name, options.get(section, ()))
    return f"{section}.{close}".lstrip(".") if close else None


def _similar(name: str, known: Options) -> str | None:
    # 0.82 finds one wrong letter in six and two that are swapped, yet lets names pass that are
    # in use beside ours, such as `model.sigma_begin` (0.8 from `sigma_min`) or `optim.beta2`.
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.82)), None)


def _wrong_values(flat: Options) -> Iterator[str]:
    for key, (default, check, _) in TABLE.items():
        if key in flat and not check.accepts(flat[key]):
            yield f"{key} = {flat[key]!r} should be {check.allowed}"
        elif key not in flat and default is NEEDED:
            yield f"the config has no {key}, which every experiment needs: {check.allowed}"


# --- Options that exclude each other -------------------------------------------------------------


def _conflicts(flat: Options) -> Iterator[str]:
    """Messages about options that are right alone, but not together."""
    if flat["training.objective"] == "classifier":
        if (classes := flat["data.num_classes"]) < 2:
            yield f"data.num_classes = {classes} should be at least 2 for a classifier"
        for key in (
            "training.snapshot_sampling",
            "eval.enable_bpd",
            "eval.enable_elbo",
            "eval.enable_vlb",
            "eval.enable_sampling",
        ):
            if flat[key]:
                yield f"{key} = True needs a score network, and training.objective = 'classifier'"
    yield from _conflicts_of_parametrization(flat)
    yield from _conflicts_of_conditions(flat)
    yield from _conflicts_of_levels(flat)
    if flat["eval.enable_vlb"] and flat["training.continuous"]:
        yield (
            "eval.enable_vlb = True needs training.continuous = False, as it bounds the bits/dim "
            "of a discrete chain: set eval.enable_elbo = True for a network of continuous times"
        )
    if flat["eval.vlb_variance"] == "learned" and not flat["model.learn_sigma"]:
        yield "eval.vlb_variance = 'learned' needs a network with model.learn_sigma = True"
    if flat["eval.vlb_num_times"] == 1:
        yield "eval.vlb_num_times = 1 should be at least 2 for a standard error, or 0 for all steps"
    parts, batch_size = flat["training.grad_accumulation"], flat["training.batch_size"]
    if parts > batch_size:
        yield (
            f"training.grad_accumulation = {parts} should be at most training.batch_size = "
            f"{batch_size}: it is the number of parts of a batch"
        )
    at_once = flat["training.n_jitted_steps"]
    frequencies = ["log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption"]
    frequencies += ["metrics_freq", *["posthoc_freq"] * bool(flat["training.posthoc_profiles"])]
    for name in frequencies:
        if (frequency := flat[f"training.{name}"]) % at_once:
            yield (
                f"training.{name} = {frequency} should be a multiple of "
                f"training.n_jitted_steps = {at_once}"
            )
    method, grid = flat["sampling.method"].lower(), flat["sampling.time_grid"]
    if grid and method in ("ode", "adaptive"):
        yield (
            f"sampling.time_grid = {grid!r} should be '' with sampling.method = {method!r}, "
            "which chooses its steps as it goes"
        )
    yield from _conflicts_of_chain(flat)
    yield from _conflicts_of_cosine(flat)
    multiples, network = flat.get("model.ch_mult", ()), flat["model.name"].lower()
    if not network.startswith("adm") and any(value != int(value) for value in multiples):
        yield f"model.ch_mult = {multiples} should be whole numbers, but for the network 'adm'"
    # In a chain of N steps beta_max / N is a variance, below 1, and N must be larger.
    steps, beta_max = flat["model.num_scales"], flat["model.beta_max"]
    has_betas = flat["training.sde"].lower() in ("vpsde", "subvpsde")
    if has_betas and steps <= beta_max and _uses_chain(flat):
        yield (
            f"model.num_scales = {steps} steps are too few: the discrete process needs more than "
            f"model.beta_max = {beta_max} of them. Raise model.num_scales, or sample with the "
            "euler_maruyama predictor and no corrector"
        )


def _conflicts_of_chain(flat: Options) -> Iterator[str]:
    if flat["sampling.method"].lower() != "chain":
        return
    if flat["training.continuous"]:
        yield (
            "sampling.method = 'chain' needs training.continuous = False, as it visits discrete "
            "noise levels: sample a network of all times by 'pc' or by a solver such as 'ddim'"
        )
    for key, unset in (("sampling.num_steps", 0), ("sampling.time_grid", "")):
        if (value := flat[key]) != unset:
            yield (
                f"{key} = {value!r} should be {unset!r} with sampling.method = 'chain': set "
                "sampling.respacing, such as '50'"
            )
    if flat["sampling.variance"] == "learned" and not flat["model.learn_sigma"]:
        yield "sampling.variance = 'learned' needs a network with model.learn_sigma = True"


def _conflicts_of_cosine(flat: Options) -> Iterator[str]:
    predictor = flat["sampling.predictor"].lower()
    at_levels = flat["training.sde"].lower() == "cosine_vpsde" and not flat["training.continuous"]
    uses_predictor = flat["sampling.method"].lower() == "pc"
    if at_levels and uses_predictor and predictor == "euler_maruyama":
        yield (
            "sampling.predictor = 'euler_maruyama' is unstable at the last levels of "
            "training.sde = 'cosine_vpsde', where beta is 63 times as large as N: choose "
            "'ancestral_sampling' or 'reverse_diffusion', a solver, or training.continuous = True"
        )


# Networks that read `model.embedding_type`.
_WITH_FOURIER = ("ncsnpp", "mlp", "set_transformer")
# Networks that are told the noise level by an embedding, and may divide by it.
_EMBEDDED = (*_WITH_FOURIER, "ddpm")


def _conflicts_of_parametrization(flat: Options) -> Iterator[str]:
    chosen = flat["model.parametrization"]
    ours = ("model.parametrization", "training.noise_levels", "training.weighting")
    for key in ours:
        if flat[key] and flat["training.objective"] == "classifier":
            yield f"{key} = {flat[key]!r} should be '' for a classifier, which gives no score"
        elif flat[key] and key == "training.noise_levels" and not flat["training.continuous"]:
            yield f"{key} = {flat[key]!r} needs training.continuous = True, else set it to ''"
    if flat["training.weighting"] and flat["training.likelihood_weighting"]:
        yield (
            f"training.weighting = {flat['training.weighting']!r} excludes "
            "training.likelihood_weighting = True: set one of them"
        )
    if flat["training.weighting"] == "output" and not chosen:
        yield (
            "training.weighting = 'output' needs a model.parametrization, such as 'edm', which "
            "says what the output's share of the score is"
        )
    if chosen.lower() not in ("", "score") and flat.get("model.scale_by_sigma"):
        yield (
            f"model.scale_by_sigma = True divides a score by the noise level: set it to False "
            f"with model.parametrization = {chosen!r}"
        )
    if chosen.lower() == "edm" and flat["model.name"].lower() == "ncsn":
        yield (
            "model.name = 'ncsn' looks its noise level up by an index, and is told log(s / m) / 4 "
            "with model.parametrization = 'edm': choose another one"
        )
    fourier = flat["model.embedding_type"].lower() == "fourier" and flat["model.fourier_log"]
    reads_it = fourier and flat["model.name"].lower() in _WITH_FOURIER
    if reads_it and (problem := _label_without_logarithm(flat)):
        yield (
            f"model.fourier_log = True takes the logarithm of the label, {problem}: set "
            "model.fourier_log = False, or model.embedding_type = 'positional'"
        )


def _conflicts_of_levels(flat: Options) -> Iterator[str]:
    """A VE network is told sigma in continuous time, and otherwise the index of its level."""
    network, continuous = flat["model.name"].lower(), flat["training.continuous"]
    told_by_process = flat["model.parametrization"].lower() in ("", "score")
    if flat["training.sde"].lower() != "vesde" or not told_by_process:
        return
    if continuous and network.startswith("ncsn") and network != "ncsnpp":
        yield (
            f"model.name = {network!r} looks its noise level up by an index, and is told sigma "
            "with training.continuous = True: set it to False, or choose the network 'ncsnpp'"
        )
    by_sigma = flat["model.embedding_type"].lower() == "fourier" and network in _WITH_FOURIER
    if by_sigma != continuous and flat.get("model.scale_by_sigma") and network in _EMBEDDED:
        read, given = ("sigma", "an index") if by_sigma else ("an index", "sigma")
        yield (
            f"model.scale_by_sigma = True divides by the noise level, for which the network reads "
            f"its label as {read}, and with training.continuous = {continuous} it is {given}: set "
            f"training.continuous = {by_sigma}, or another model.embedding_type"
        )


def _label_without_logarithm(flat: Options) -> str:
    """Why labels have no logarithm, or ""."""
    if not flat["training.continuous"]:
        return "which is 0 at the first level with training.continuous = False"
    if flat["model.parametrization"].lower() == "edm":
        return "which is one already, and negative, with model.parametrization = 'edm'"
    return ""


def _conflicts_of_conditions(flat: Options) -> Iterator[str]:
    condition, dropout = flat["training.condition"], flat["training.condition_dropout"]
    if condition and flat["training.objective"] == "classifier":
        yield f"training.condition = {condition!r} should be '' for a classifier"
    if "classes" in condition and (classes := flat["data.num_classes"]) < 2:
        yield (
            f"data.num_classes = {classes} should be the number of classes, at least 2, with "
            f"training.condition = {condition!r}"
        )
    augment = flat["data.augment"]
    if augment and dropout and condition.lower() == "features":
        yield (
            f"training.condition_dropout = {dropout} has nothing to drop, as the network is always "
            "told of data.augment: set it to 0, or add a condition, as in 'classes,features'"
        )
    if augment and "features" not in condition and flat["training.objective"] == "score":
        yield (
            f"data.augment = {augment} would leak into samples of a network that is not told of "
            "it: set training.condition = 'features'"
        )
    if dropout and not condition:
        yield (
            f"training.condition_dropout = {dropout} drops a condition, and there is none: set "
            "training.condition, such as 'classes', or training.condition_dropout to 0"
        )
    if (scale := flat["sampling.guidance_scale"]) != 1 and not dropout:
        yield (
            f"sampling.guidance_scale = {scale} needs a network that also knows the unconditional "
            "score: train with training.condition and with training.condition_dropout above 0, or "
            "set the scale to 1"
        )


def _uses_chain(flat: Options) -> bool:
    """Whether the variances of the chain's N = `model.num_scales` steps are used."""
    if not flat["training.continuous"]:
        return True
    if flat["sampling.method"].lower() != "pc":
        return False
    # Correctors read them at any time, predictors only where they make the steps of the chain.
    if flat["sampling.corrector"].lower() in ("ald", "langevin", "langevin_per_sample"):
        return True
    published = flat["sampling.num_steps"] in (0, flat["model.num_scales"])
    chain = published and flat["sampling.time_grid"] in ("", "uniform")
    predictor = flat["sampling.predictor"].lower()
    return chain and predictor in ("ancestral_sampling", "reverse_diffusion")


# --- The page of all options ---------------------------------------------------------------------

_INTRODUCTION = """# Options

Every option of a config. Set one in an experiment's file as `config.training.batch_size = 64`, or
on the command line as `--config.training.batch_size=64`.

Options with the default *needed* are set by every experiment. Those with the default *network* are
set by experiments whose network has them. Names in *allowed* may be joined by
[names of your own](extending.md).

This page is written by `python -m score_lib.options > docs/options.md`.
"""


def page() -> str:
    """The table of options in Markdown."""
    lines = [_INTRODUCTION]
    for section, title, options in SECTIONS:
        lines += [f"## {title}: `{section}`" if section else f"## {title}", ""]
        lines += ["| option | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        for key in (f"{section}.{name}".lstrip(".") for name in options):
            default, check, meaning = TABLE[key]
            if isinstance(default, NoDefault):
                shown = default.name.lower()
            else:
                shown = f'`"{default}"`' if isinstance(default, str) else f"`{default!r}`"
            lines.append(f"| `{key}` | {shown} | {check.allowed} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
