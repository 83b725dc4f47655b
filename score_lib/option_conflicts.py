"""Options that exclude each other."""

from collections.abc import Iterator, Mapping

from score_lib.option_kinds import processes

Options = Mapping[str, object]  # by their dotted names, such as "model.nf"

# Networks that read `model.embedding_type`.
_WITH_FOURIER = ("ncsnpp", "mlp", "set_transformer")
# Networks that are told the noise level by an embedding, and may divide by it.
_EMBEDDED = (*_WITH_FOURIER, "ddpm")
# Processes of ours whose networks are told no sigma.
_OTHER_PROCESSES = {*processes.names} - {"vesde"}


def conflicts(flat: Options) -> Iterator[str]:
    """Messages about options that are right alone, but not together."""
    for kind in (
        _of_classifiers,
        _of_parametrization,
        _of_conditions,
        _of_conditioned_samples,
        _of_labels,
        _of_bounds,
        _of_samples,
        _of_batches,
        _of_frequencies,
        _of_steps,
        _of_chain,
        _of_cosine,
        _of_widths,
        _of_betas,
    ):
        yield from kind(flat)


def _of_classifiers(flat: Options) -> Iterator[str]:
    if (objective := flat["training.objective"]) != "classifier":
        if flat["eval.enable_accuracy"]:
            yield (
                f"eval.enable_accuracy = True needs training.objective = 'classifier', not "
                f"{objective!r}"
            )
        return
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
    if flat["training.likelihood_weighting"]:
        yield (
            "training.likelihood_weighting = True should be False for a classifier: it weights "
            "the loss of a score network"
        )


def _of_bounds(flat: Options) -> Iterator[str]:
    if flat["eval.enable_vlb"] and flat["training.continuous"]:
        yield (
            "eval.enable_vlb = True needs training.continuous = False, as it bounds the bits/dim "
            "of a discrete chain: set eval.enable_elbo = True for a network of continuous times"
        )
    if flat["eval.vlb_variance"] == "learned" and not flat["model.learn_sigma"]:
        yield "eval.vlb_variance = 'learned' needs a network with model.learn_sigma = True"
    if flat["eval.vlb_num_times"] == 1:
        yield "eval.vlb_num_times = 1 should be at least 2 for a standard error, or 0 for all steps"


def _of_samples(flat: Options) -> Iterator[str]:
    if flat["eval.enable_sampling"] and (count := flat["eval.num_samples"]) < 2:
        yield f"eval.num_samples = {count} should be at least 2 for distances to the data"


def _of_batches(flat: Options) -> Iterator[str]:
    parts, batch_size = flat["training.grad_accumulation"], flat["training.batch_size"]
    if parts > batch_size:
        yield (
            f"training.grad_accumulation = {parts} should be at most training.batch_size = "
            f"{batch_size}: it is the number of parts of a batch"
        )


def _of_frequencies(flat: Options) -> Iterator[str]:
    at_once = flat["training.n_jitted_steps"]
    frequencies = ["log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption"]
    frequencies += ["metrics_freq", *["posthoc_freq"] * bool(flat["training.posthoc_profiles"])]
    for name in frequencies:
        if (frequency := flat[f"training.{name}"]) % at_once:
            yield (
                f"training.{name} = {frequency} should be a multiple of "
                f"training.n_jitted_steps = {at_once}"
            )


def _of_steps(flat: Options) -> Iterator[str]:
    """Samples that no step leads to are noise.  Configs with a solver name no predictor."""
    steps = [flat[f"sampling.{name}"] for name in ("method", "predictor", "corrector")]
    if steps == ["pc", "none", "none"] and flat["training.objective"] == "score":
        yield (
            "sampling.method = 'pc' with sampling.predictor = 'none' and sampling.corrector = "
            "'none' would leave the noise as it is: set a predictor, such as 'euler_maruyama'"
        )


def _of_chain(flat: Options) -> Iterator[str]:
    if flat["sampling.method"] != "chain":
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


def _of_cosine(flat: Options) -> Iterator[str]:
    at_levels = flat["training.sde"] == "cosine_vpsde" and not flat["training.continuous"]
    steps = flat["sampling.method"], flat["sampling.predictor"]
    if at_levels and steps == ("pc", "euler_maruyama"):
        yield (
            "sampling.predictor = 'euler_maruyama' is unstable at the last levels of "
            "training.sde = 'cosine_vpsde', where beta is 63 times as large as N: choose "
            "'ancestral_sampling' or 'reverse_diffusion', a solver, or training.continuous = True"
        )


def _of_parametrization(flat: Options) -> Iterator[str]:
    chosen, levels = flat["model.parametrization"], flat["training.noise_levels"]
    if flat["training.objective"] == "classifier":
        for key in ("model.parametrization", "training.noise_levels", "training.weighting"):
            if flat[key]:
                yield f"{key} = {flat[key]!r} should be '' for a classifier, which gives no score"
    elif levels and not flat["training.continuous"]:
        yield (
            f"training.noise_levels = {levels!r} needs training.continuous = True, else set it to "
            "''"
        )
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
    if chosen not in ("", "score") and flat.get("model.scale_by_sigma"):
        yield (
            f"model.scale_by_sigma = True divides a score by the noise level: set it to False "
            f"with model.parametrization = {chosen!r}"
        )
    if chosen == "edm" and flat["model.name"] == "ncsn":
        yield (
            "model.name = 'ncsn' looks its noise level up by an index, and is told log(s / m) / 4 "
            "with model.parametrization = 'edm': choose another one"
        )
    fourier = flat["model.embedding_type"] == "fourier" and flat["model.fourier_log"]
    reads_it = fourier and flat["model.name"] in _WITH_FOURIER
    if reads_it and (problem := _label_without_logarithm(flat)):
        yield (
            f"model.fourier_log = True takes the logarithm of the label, {problem}: set "
            "model.fourier_log = False, or model.embedding_type = 'positional'"
        )


def _of_labels(flat: Options) -> Iterator[str]:
    """A VE network is told sigma in continuous time, and otherwise the index of its level."""
    network, continuous = flat["model.name"], flat["training.continuous"]
    told_by_process = flat["model.parametrization"] in ("", "score")
    process = flat["training.sde"]
    divides = flat.get("model.scale_by_sigma") and flat["training.objective"] == "score"
    if divides and told_by_process and process in _OTHER_PROCESSES:
        yield (
            f"model.scale_by_sigma = True divides by a noise level of the VE process: set it to "
            f"False with training.sde = {process!r}"
        )
    if process != "vesde" or not told_by_process:
        return
    if continuous and network.startswith("ncsn") and network != "ncsnpp":
        yield (
            f"model.name = {network!r} looks its noise level up by an index, and is told sigma "
            "with training.continuous = True: set it to False, or choose the network 'ncsnpp'"
        )
    by_sigma = flat["model.embedding_type"] == "fourier" and network in _WITH_FOURIER
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
    if flat["model.parametrization"] == "edm":
        return "which is one already, and negative, with model.parametrization = 'edm'"
    return ""


def _of_conditions(flat: Options) -> Iterator[str]:
    condition, dropout = flat["training.condition"], flat["training.condition_dropout"]
    classes = flat["data.num_classes"]
    if condition and flat["training.objective"] == "classifier":
        yield f"training.condition = {condition!r} should be '' for a classifier"
    if "classes" in condition and classes < 2:
        yield (
            f"data.num_classes = {classes} should be the number of classes, at least 2, with "
            f"training.condition = {condition!r}"
        )
    augment = flat["data.augment"]
    if augment and dropout and condition == "features":
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


def _of_conditioned_samples(flat: Options) -> Iterator[str]:
    classes = flat["data.num_classes"]
    if (wanted := flat["sampling.classes"]) and "classes" not in flat["training.condition"]:
        yield (
            f"sampling.classes = {wanted!r} needs a network that is told classes: train with "
            "training.condition = 'classes', or guide samples by a classifier, control.task = "
            "'class', with control.labels"
        )
    elif any(not isinstance(one, str) and not 0 <= one < classes for one in wanted):
        yield (
            f"sampling.classes = {wanted!r} should be classes of the network, whole numbers from 0 "
            f"to {classes - 1}"
        )
    if (scale := flat["sampling.guidance_scale"]) != 1 and not flat["training.condition_dropout"]:
        yield (
            f"sampling.guidance_scale = {scale} needs a network that also knows the unconditional "
            "score: train with training.condition and with training.condition_dropout above 0, or "
            "set the scale to 1"
        )


def _of_widths(flat: Options) -> Iterator[str]:
    multiples, network = flat.get("model.ch_mult", ()), flat["model.name"]
    if not network.startswith("adm") and any(value != int(value) for value in multiples):
        yield f"model.ch_mult = {multiples} should be whole numbers, but for the network 'adm'"


def _of_betas(flat: Options) -> Iterator[str]:
    """In a chain of N steps beta_max / N is a variance, below 1, and N must be larger."""
    steps, beta_max = flat["model.num_scales"], flat["model.beta_max"]
    has_betas = flat["training.sde"] in ("vpsde", "subvpsde")
    if has_betas and steps <= beta_max and _uses_chain(flat):
        yield (
            f"model.num_scales = {steps} steps are too few: the discrete process needs more than "
            f"model.beta_max = {beta_max} of them. Raise model.num_scales, or sample with the "
            "euler_maruyama predictor and no corrector"
        )


def _uses_chain(flat: Options) -> bool:
    """Whether the variances of the chain's N = `model.num_scales` steps are used."""
    if not flat["training.continuous"]:
        return True
    if flat["sampling.method"] != "pc":
        return False
    # Correctors read them at any time, predictors only where they make the steps of the chain.
    if flat["sampling.corrector"] in ("ald", "langevin", "langevin_per_sample"):
        return True
    published = flat["sampling.num_steps"] in (0, flat["model.num_scales"])
    chain = published and flat["sampling.time_grid"] in ("", "uniform")
    return chain and flat["sampling.predictor"] in ("ancestral_sampling", "reverse_diffusion")
