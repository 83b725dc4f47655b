"""Break the wiring on purpose, one line at a time, and see that the tests notice.

    python tests/mutations.py            # all, some minutes
    python tests/mutations.py ema seed   # those whose name holds a word

Each mutation is applied to a copy of the project, in which the named tests then have to fail.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
WIRING = ("tests/test_wiring.py", "tests/test_wiring_evaluation.py")
STEPS = ("tests/test_steps.py",)
FIELD = ("tests/test_field_sampling.py",)
HISTORY = ("tests/test_history.py",)
ADM = ("tests/test_adm.py",)
AVERAGES = ("tests/test_averages.py",)
PROFILES = ("tests/test_profiles.py",)
CHAINS = ("tests/test_parametrized_chains.py",)
CONDITIONS = ("tests/test_wiring_conditions.py",)
CONDITIONING = ("tests/test_conditioning.py",)
DEQUANTIZER = ("tests/test_dequantizer_runs.py",)
RANKS = ("tests/test_every_rank.py", "tests/test_every_rank_inverse.py")
NUMBERS = ("tests/test_number_kinds.py",)
SAMPLED_CHAINS = ("tests/test_chain_sampling.py",)
DRAWINGS = ("tests/test_quickdraw.py",)
REPRODUCE = ("tests/test_reproduce.py",)
POINTS = ("tests/test_point_files.py",)
ARRAYS = ("tests/test_any_data.py",)
GROUP_NORM = ("tests/test_group_normalization.py",)
HOST = ("tests/test_op_host.py",)
QUALITY = ("tests/test_quality.py",)
ESTIMATES = ("tests/test_estimates.py",)
THREADS = ("tests/test_threads.py",)
EXCHANGE = ("tests/test_exchange.py", "tests/test_exchange_hostile.py")


class Mutation(NamedTuple):
    """Replace `old` by `new` in a file; `tests` have to fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = WIRING


SETUP, TRAIN = "score_lib/runs/setup.py", "score_lib/runs/train.py"
OPTIMIZATION = "score_lib/losses/optimization.py"
CONFIGURED, PC = "score_lib/samplers/configured.py", "score_lib/samplers/pc.py"
SAMPLED = "score_lib/samplers/chain.py"
MUTATIONS = [
    Mutation(
        "files: a half-life counts images by the present batch",
        OPTIMIZATION,
        'more = state["position"] - ema.num_updates * decays.batch_size',
        "more = 0",
        ("tests/test_averages.py::test_a_half_life_counts_the_images_of_batches_of_any_size",),
    ),
    Mutation(
        "files: a network is told no noise of a measurement",
        "score_lib/runs/image_tasks.py",
        "if run.conditions.operator is None or run.config.control.noise_std == 0:",
        "if run.conditions.operator is None or True:",
        (
            "tests/test_wiring_conditions.py::test_the_network_is_told_the_measurement_with_its_noise",
        ),
    ),
    Mutation(
        "files: guidance by a network that never saw its null",
        "score_lib/runs/history.py",
        "scale != 1 and not old.training.condition_dropout",
        "False",
        ("tests/test_wiring_conditions.py",),
    ),
    Mutation(
        "files: a predictor's own step is not made on the chain",
        "score_lib/samplers/steps.py",
        'by_step = place(type(self), "step") < place(type(self), *_OF_CHAIN)',
        "by_step = False",
        STEPS,
    ),
    Mutation(
        "files: own marginals give no functions of time",
        "score_lib/sdes/process.py",
        '    "marginal_coeffs": (coefficients.marginal_coeffs, "marginal_prob"),\n',
        "",
        ("tests/test_sde.py",),
    ),
    Mutation(
        "files: every dimension has the scale of the first",
        "score_lib/base/affine.py",
        "self.a.abs().unique(return_counts=True)",
        "self.a.flatten()[:1].abs().unique(return_counts=True)",
        ("tests/test_likelihood.py",),
    ),
    Mutation(
        "files: a network without a gradient has a likelihood",
        "score_lib/likelihood.py",
        "        if not checked:\n",
        "        if False:\n",
        ("tests/test_likelihood.py",),
    ),
    Mutation(
        "files: weights of other noise levels",
        "score_lib/disk/fit.py",
        'if getattr(unwrapped(model), "uses_sigmas", False) and "sigmas" in expected:',
        "if False:",
        ("tests/test_start.py", "tests/test_checkpoints.py"),
    ),
    Mutation(
        "files: checkpoints of an abandoned course stay",
        "score_lib/runs/courses.py",
        "if later and not _comes_again(workdir, path, contents, config, state, present):",
        "if False:",
        HISTORY,
    ),
    Mutation(
        "files: weights of the last update are not looked at",
        OPTIMIZATION,
        "self.watch(nn.utils.get_total_norm(list(parameters), math.inf), step)",
        "pass",
        ("tests/test_losses.py",),
    ),
    Mutation(
        "files: a measurement is logged twice",
        TRAIN,
        'due = quality.name if quality is not None and run.state["metrics_due"] else None',
        "due = None",
        QUALITY,
    ),
    Mutation(
        "files: a card takes any figures",
        "score_lib/runs/cards.py",
        'return record["weights"]["digest"] == digest',
        "return True",
        ("tests/test_export.py",),
    ),
    Mutation(
        "files: an export states the present options of training",
        "score_lib/runs/export.py",
        "if run.trained is None:",
        "if True:",
        ("tests/test_export.py",),
    ),
    Mutation(
        "files: a failed write displaces a predecessor",
        "score_lib/disk/files.py",
        "        _keep_earlier(path, keep)\n        os.replace(temporary, path)",
        "        os.replace(temporary, path)",
        ("tests/test_safety.py", "tests/test_checkpoints.py"),
    ),
    Mutation(
        "files: held-out examples may be those of training",
        "score_lib/runs/examples.py",
        "        if not _differing(earlier, present):\n",
        "        if True:\n",
        ("tests/test_evaluate.py",),
    ),
    Mutation(
        "doors: several steps a call go on unaligned",
        "score_lib/runs/train.py",
        'options.n_jitted_steps - state["step"] % options.n_jitted_steps',
        "options.n_jitted_steps",
        ("tests/test_run.py::test_a_resume_between_two_calls_of_several_steps_misses_no_event",),
    ),
    Mutation(
        "doors: features of augmentation are dropped",
        "score_lib/runs/setup.py",
        'kept = ("features",) if self.config.data.augment > 0 else ()',
        "kept = ()",
        ("tests/test_augment.py::test_the_unconditional_score_is_of_unchanged_images_too",),
    ),
    Mutation(
        "doors: the last step of a cooldown does not count",
        "score_lib/runs/history.py",
        'counts = {"training.n_iters"} if config.optim.cooldown else set()',
        "counts = set()",
        ("tests/test_history.py::test_the_last_step_counts_where_the_learning_rate_falls_to_it",),
    ),
    Mutation(
        "doors: a chain's length is free for rescaled times",
        "score_lib/runs/history.py",
        "new.training.continuous and not new.model.rescale_timesteps",
        "new.training.continuous",
        (
            "tests/test_adm_config.py::test_the_length_of_a_chain_that_is_the_unit_of_times_may_not_change",
        ),
    ),
    Mutation(
        "doors: a file of one average answers to any name",
        "score_lib/runs/averages.py",
        "        if not same:\n",
        "        if False:\n",
        ("tests/test_averages.py::test_a_file_of_one_average_answers_to_its_own_name_alone",),
    ),
    Mutation(
        "doors: an export does not record its average",
        "score_lib/runs/publish.py",
        'contents_of({**run.state, "config": config, "average": recorded(average)})',
        'contents_of({**run.state, "config": config, "average": ""})',
        ("tests/test_averages.py::test_a_file_of_one_average_answers_to_its_own_name_alone",),
    ),
    Mutation(
        "doors: a resumed dequantizer keeps its optimiser",
        "score_lib/runs/dequantizer.py",
        'in set_optimizer(run.config, state["optimizer"]).items()',
        "in {}.items()",
        (
            "tests/test_dequantizer_runs.py::test_changed_options_of_the_optimiser_hold_from_the_resume_on",
        ),
    ),
    Mutation(
        "doors: a lonely pyramid has no idle layers",
        "models/unet.py",
        "not config.model.conditional or lonely",
        "not config.model.conditional",
        ("tests/test_models.py::test_a_pyramid_of_one_level_says_that_its_first_layers_are_idle",),
    ),
    Mutation(
        "doors: units of continuous values are dropped",
        "score_lib/runs/start.py",
        "        if units:\n",
        "        if False:\n",
        (
            "tests/test_any_data.py::test_a_checkpoint_of_continuous_values_is_refused_for_grey_levels",
        ),
    ),
    Mutation(
        "doors: none is the average of the weights to start from",
        "score_lib/runs/trained.py",
        'averaged=average != "none"',
        "averaged=True",
        ("tests/test_start.py::test_none_is_the_weights_themselves_and_no_average",),
    ),
    Mutation(
        "doors: a part without labels is of class 0",
        "score_lib/data/loading.py",
        "source.num_classes < 2 and source.read(first)[1] is None",
        "False",
        (
            "tests/test_any_data.py::test_labels_of_one_part_alone_are_refused_for_networks_that_learn_them",
        ),
    ),
    Mutation(
        "doors: a check tells no changed options",
        "score_lib/runs/check.py",
        "changed = {} if resumed.config is None else changes(resumed.config, config)",
        "changed = {}",
        ("tests/test_checks.py::test_what_training_begins_with_is_told_and_stays",),
    ),
    Mutation(
        "doors: a check takes any classes",
        "score_lib/runs/check.py",
        "run.check_classes(data.class_to_idx)",
        "pass",
        ("tests/test_checks.py::test_classes_that_a_resumed_network_has_not_learned_are_found",),
    ),
    Mutation(
        "doors: cached features are of any extractor",
        "score_lib/runs/measures.py",
        "lambda: _features(extractor, samples(number)), basis)",
        "lambda: _features(extractor, samples(number)))",
        (
            "tests/test_reference_statistics.py::test_cached_features_of_another_extractor_are_not_used",
        ),
    ),
    Mutation(
        "doors: rounds go on with other data",
        "score_lib/runs/rounds.py",
        "    if earlier != found:\n",
        "    if False:\n",
        ("tests/test_evaluate.py::test_rounds_of_other_data_are_not_reused",),
    ),
    Mutation(
        "doors: an evaluation takes any labels",
        "score_lib/runs/rounds.py",
        "            self.run.check_labels(info)\n",
        "            pass\n",
        (
            "tests/test_wiring_conditions.py::test_labels_that_the_network_has_not_learned_are_refused",
        ),
    ),
    Mutation(
        "doors: samples are compared with the first examples",
        "score_lib/runs/comparisons.py",
        'some_of(len(source), most, "held-out examples")',
        "range(most)",
        ("tests/test_quality.py::test_samples_are_compared_with_held_out_data_of_all_parts",),
    ),
    Mutation(
        "doors: KID compares rows in their order",
        "score_lib/metrics/stats.py",
        "distances.kid(real[orders[0]], fake[orders[1]])",
        "distances.kid(real, fake)",
        (
            "tests/test_evaluation.py::test_the_kernel_distance_of_sorted_rows_is_as_of_random_order",
        ),
    ),
    Mutation(
        "doors: constraints see the steps of the chain",
        "score_lib/samplers/pc.py",
        "shown = sde if chain else along(sde, times)",
        "shown = sde",
        ("tests/test_inverse_problems.py::test_a_step_of_dps_is_as_long_as_its_strength",),
    ),
    Mutation(
        "kernels of a CPU: the shift is left out",
        "op/host_kernels.cpp",
        "centre[c] = mean[group] - moved[c]",
        "centre[c] = mean[group]",
        HOST,
    ),
    Mutation(
        "kernels of a CPU: a group's mean keeps its slope",
        "op/host_kernels.cpp",
        "weights[c] * d - flat[c] - n * slope[c]",
        "weights[c] * d - n * slope[c]",
        HOST,
    ),
    Mutation(
        "kernels of a CPU: the slope of a shift without that of the deviation",
        "op/host_kernels.cpp",
        " - slope[c] * n[c];",
        ";",
        HOST,
    ),
    Mutation(
        "kernels of a CPU: bfloat16 is cut off",
        "op/host_kernels.cpp",
        "(bits + 0x7fff + (bits >> 16 & 1)) >> 16",
        "bits >> 16",
        HOST,
    ),
    Mutation(
        "kernels of a CPU: in any order of memory",
        "op/group_norm_silu.py",
        "and x.is_contiguous(memory_format=torch.channels_last)",
        "and True",
        HOST,
    ),
    Mutation(
        "kernels of a CPU: for every activation",
        "models/normalization.py",
        "type(act) is nn.SiLU and",
        "True and",
        HOST,
    ),
    Mutation(
        "kernels of a CPU: the level of noise is left out",
        "models/normalization.py",
        "norm.bias, norm.eps, shift)",
        "norm.bias, norm.eps)",
        HOST,
    ),
    Mutation(
        "kernels of a CPU: one library for all machines",
        "op/host.py",
        '[os.environ.get("CXX") or "c++", *_FLAGS, *processor]',
        '[os.environ.get("CXX") or "c++", *_FLAGS]',
        HOST,
    ),
    Mutation(
        "kernels of a CPU: also in forward mode",
        "op/host.py",
        "and not dispatch.is_transformed()",
        "and True",
        HOST,
    ),
    Mutation(
        "group norm of channels last: squares of values far from 0",
        "models/group_normalization.py",
        "(x - means).square_()",
        "x.square().sub_(means.square())",
        GROUP_NORM,
    ),
    Mutation(
        "group norm of channels last: in forward mode as well",
        "models/group_normalization.py",
        "if is_transformed():",
        "if False:",
        GROUP_NORM,
    ),
    Mutation(
        "quality: the latest is the best",
        "score_lib/runs/quality.py",
        "if better := not best or ",
        "if better := True or ",
        QUALITY,
    ),
    Mutation(
        "quality: a failure of one process is not told to the others",
        "score_lib/runs/quality.py",
        "_FAILURES = (ArithmeticError, RuntimeError, ValueError)",
        "_FAILURES = ()",
        QUALITY,
    ),
    Mutation(
        "quality: a classifier is measured without its average",
        "score_lib/runs/quality.py",
        'with matmul_precision("float32"), ema.applied(model.parameters()):',
        'with matmul_precision("float32"):',
        QUALITY,
    ),
    Mutation(
        "quality: a measurement that was stopped is left out",
        TRAIN,
        'if state["snapshot_due"] or state["metrics_due"]:',
        'if state["snapshot_due"]:',
        QUALITY,
    ),
    Mutation(
        "quality: a best checkpoint that was not written is left out",
        TRAIN,
        "elif self._is_best() and not",
        "elif False and not",
        QUALITY,
    ),
    Mutation(
        "estimates: the checkpoint at the end does not count",
        "score_lib/runs/estimates.py",
        "    snapshots += steps != snapshots * options.snapshot_freq",
        "    snapshots += 0",
        ESTIMATES,
    ),
    Mutation(
        "estimates: the update grows with the batch",
        "score_lib/runs/trial.py",
        "taken = fixed + (taken - fixed) *",
        "taken = taken *",
        ESTIMATES,
    ),
    Mutation(
        "threads: the user's choice is replaced",
        "score_lib/base/threads.py",
        'if "torch" in sys.modules or any(name in os.environ for name in WAITING):',
        'if "torch" in sys.modules:',
        THREADS,
    ),
    Mutation(
        "threads: outer control groups do not count",
        "score_lib/base/cgroups.py",
        "(inside, *(p for p in inside.parents if p.is_relative_to(top)))",
        "(inside,)",
        THREADS,
    ),
    Mutation(
        "exchange: weights of attention are not transposed",
        "score_lib/exchange/unet_names.py",
        "form = POINTWISE if theirs.endswith(_SHORTCUT) else TRANSPOSED",
        "form = POINTWISE if theirs.endswith(_SHORTCUT) else SAME",
        EXCHANGE,
    ),
    Mutation(
        "exchange: the order of sines and cosines is lost",
        "score_lib/exchange/diffusers.py",
        "if flipped and model.plan",
        "if False and model.plan",
        EXCHANGE,
    ),
    Mutation(
        "exchange: groups are not compared",
        "score_lib/exchange/unet_configs.py",
        "            if theirs != ours:\n",
        "            if False:\n",
        EXCHANGE,
    ),
    Mutation(
        "exchange: attentions that are missing add something",
        "score_lib/exchange/diffusers.py",
        "torch.zeros_like(tensor) if ends else tensor",
        "tensor",
        EXCHANGE,
    ),
    Mutation(
        "exchange: the correctors of a scheduler do not arrive",
        "score_lib/exchange/schedulers.py",
        '"n_steps_each": options["correct_steps"],',
        '"n_steps_each": 1,',
        EXCHANGE,
    ),
    Mutation(
        "exchange: the noise of DDIM follows the clamped image",
        "score_lib/exchange/schedulers.py",
        '"clip_noise": False,',
        '"clip_noise": True,',
        EXCHANGE,
    ),
    Mutation(
        "exchange: a small file makes a large network",
        "score_lib/exchange/diffusers.py",
        "if unet_configs.fewest_weights(options) > found.weights.stat().st_size:",
        "if False:",
        EXCHANGE,
    ),
    Mutation(
        "exchange: weights that are not finite are read",
        "score_lib/exchange/diffusers.py",
        "or not is_finite(stored[name])",
        "or False",
        EXCHANGE,
    ),
    Mutation(
        "exchange: heads do not arrive",
        "models/unet_plan.py",
        '"num_head_channels": model.num_head_channels or -1,',
        '"num_head_channels": -1,',
        EXCHANGE,
    ),
    Mutation(
        "exchange: frequencies of the time do not arrive",
        "models/unet.py",
        "self.fourier_log, self.freq_shift)",
        "self.fourier_log)",
        EXCHANGE,
    ),
    Mutation(
        "arrays: the held-out part is standardised by",
        TRAIN,
        "standardize(run, streams[0].source)",
        "standardize(run, streams[1].source)",
        ARRAYS,
    ),
    Mutation(
        "arrays: training does not permute points",
        "score_lib/data/loading.py",
        '"permute": kind == "points",',
        '"permute": False,',
        ARRAYS,
    ),
    Mutation(
        "arrays: nats lack the Jacobian",
        "score_lib/runs/units.py",
        "return self.scaler.log_volume - log_p",
        "return -log_p",
        ARRAYS,
    ),
    Mutation(
        "arrays: the Jacobian has the wrong sign",
        "score_lib/runs/units.py",
        "return self.scaler.log_volume - log_p",
        "return -self.scaler.log_volume - log_p",
        ARRAYS,
    ),
    Mutation(
        "arrays: a deviation shared by a channel counts once",
        "score_lib/data/standardization.py",
        "self.std.log().expand(self.shape).sum()",
        "self.std.log().sum()",
        ARRAYS,
    ),
    Mutation(
        "arrays: points have their channels first",
        "score_lib/data/kinds.py",
        'return -1 if kind == "points" else 0',
        "return 0",
        ARRAYS,
    ),
    Mutation(
        "arrays: samples stay in the network's range",
        SETUP,
        "self.inverse_scaler, eps, **options)",
        "lambda x: x, eps, **options)",
        ARRAYS,
    ),
    Mutation(
        "arrays: a measurement is one of the network's range",
        "score_lib/runs/image_tasks.py",
        "return View(rescaled(operator, run.scaler.std), 1.0, bounds, 0.0)",
        "return View(operator, 1.0, bounds, 0.0)",
        ARRAYS,
    ),
    Mutation(
        "arrays: what is read alone is not moved to the mean",
        "score_lib/data/standardization.py",
        "return (y.double() * self.std + self.mean).to(self.dtype)",
        "return (y.double() * self.std).to(self.dtype)",
        ARRAYS,
    ),
    Mutation(
        "arrays: evaluation compares with the training part",
        "score_lib/runs/comparisons.py",
        "_, self._stream, info = streams",
        "self._stream, _, info = streams",
        ARRAYS,
    ),
    Mutation(
        "training scales images by the inverse scaler",
        TRAIN,
        "self.train_step(state, *self.run.arguments(batch))",
        'self.train_step(state, self.run.inverse_scaler(batch["image"]), batch["label"])',
    ),
    Mutation(
        "evaluation during training scales by the inverse scaler",
        TRAIN,
        "self.eval_step(self.state, *self.run.arguments(batch))",
        'self.eval_step(self.state, self.run.inverse_scaler(batch["image"]), batch["label"])',
    ),
    Mutation(
        "every training step draws with the same seed",
        TRAIN,
        'derive_seed(self.run.config.seed, "train", state["step"])',
        'derive_seed(self.run.config.seed, "train", 0)',
    ),
    Mutation(
        "training ignores the seed",
        TRAIN,
        'derive_seed(self.run.config.seed, "train", state["step"])',
        'derive_seed(42, "train", state["step"])',
    ),
    Mutation(
        "draws use the raw weights instead of the ema",
        SETUP,
        'self.state["ema"].applied(model.parameters()),',
        "contextlib.nullcontext(),",
    ),
    Mutation(
        "evaluation during training uses the raw weights instead of the ema",
        "score_lib/losses/steps.py",
        'with averaged(state["ema"], state["model"].parameters()):',
        "with contextlib.nullcontext():",
    ),
    Mutation(
        "likelihood weighting is dropped",
        SETUP,
        '"likelihood_weighting": options.likelihood_weighting,',
        '"likelihood_weighting": False,',
    ),
    Mutation(
        "reduce_mean is dropped",
        SETUP,
        '"reduce_mean": options.reduce_mean,',
        '"reduce_mean": True,',
    ),
    Mutation(
        "parametrization is dropped in sampling",
        CONFIGURED,
        'shared["parametrization"] = chosen',
        "pass",
    ),
    Mutation(
        "parametrization is dropped in training, likelihoods and codes",
        SETUP,
        '"parametrization": parametrization_of(self.config),',
        '"parametrization": None,',
    ),
    Mutation(
        "noise levels are dropped",
        SETUP,
        '"noise_levels": levels_of(self.config),',
        '"noise_levels": "",',
    ),
    Mutation(
        "weighting is dropped",
        SETUP,
        '"weighting": options.weighting,',
        '"weighting": "",',
    ),
    Mutation(
        "parametrization is dropped in the bound of a chain",
        "score_lib/runs/measures.py",
        'parametrization=run.reading["parametrization"],',
        "parametrization=None,",
        CHAINS,
    ),
    Mutation(
        "weighting and parametrization are dropped in the loss of a chain",
        "score_lib/losses/objectives.py",
        "return get_ddpm_loss_fn(sde, train, reduce_mean, **shared)",
        "return get_ddpm_loss_fn(sde, train, reduce_mean, dropping=dropping)",
        CHAINS,
    ),
    Mutation(
        "weights of a chain are those of times",
        "score_lib/losses/objectives.py",
        "self.sde, False, chosen, continuous=False)",
        "self.sde, False, chosen)",
        CHAINS,
    ),
    Mutation("noise removal is ignored", CONFIGURED, "config.sampling.noise_removal", "True"),
    Mutation("snr is ignored", CONFIGURED, '"snr": "sampling.snr",', '"snr": "optim.lr",'),
    Mutation(
        "number of corrector steps is ignored",
        CONFIGURED,
        '        "n_steps": "sampling.n_steps_each",\n',
        "",
    ),
    Mutation(
        "probability flow is ignored",
        CONFIGURED,
        '        "probability_flow": "sampling.probability_flow",\n',
        "",
    ),
    Mutation(
        "number of steps is ignored",
        CONFIGURED,
        '        "steps": "sampling.num_steps",\n',
        "",
    ),
    Mutation(
        "time grid of pc is ignored", CONFIGURED, '        "grid": "sampling.time_grid",\n', ""
    ),
    Mutation("churn is ignored", CONFIGURED, '{"churn": "sampling.churn"}', "{}"),
    Mutation(
        "sampling draws in the precision of training",
        SETUP,
        "options = self.config.sampling\n        return accelerated",
        "options = self.config.training\n        return accelerated",
    ),
    Mutation(
        "the seed of a draw is ignored",
        SETUP,
        "SampleNoise(seed, indices",
        "SampleNoise(0, indices",
    ),
    Mutation(
        "a sample depends on its place in the batch",
        SETUP,
        "SampleNoise(seed, indices",
        "SampleNoise(seed, range(len(indices))",
    ),
    Mutation(
        "a named checkpoint is ignored",
        "score_lib/runs/start.py",
        "    chosen = config.eval.checkpoint\n",
        '    chosen = ""\n',
    ),
    Mutation("warm-up is ignored", OPTIMIZATION, "warmup=optim.warmup", "warmup=0"),
    Mutation("cooldown is ignored", OPTIMIZATION, "cooldown=optim.cooldown", "cooldown=0"),
    Mutation(
        "clipping is ignored",
        OPTIMIZATION,
        "grad_clip=optim.grad_clip",
        "grad_clip=-1.0",
    ),
    Mutation("beta1 is ignored", OPTIMIZATION, "betas=(float(optim.beta1),", "betas=(0.9,"),
    Mutation("weight decay is ignored", OPTIMIZATION, "optim.weight_decay", "0.0"),
    Mutation(
        "accumulation is ignored", SETUP, "accumulation=options.grad_accumulation", "accumulation=1"
    ),
    Mutation(
        "sigma_max is ignored",
        "score_lib/sdes/published.py",
        '"sigma_max": "model.sigma_max", ',
        "",
    ),
    Mutation(
        "passes of the loss are ignored",
        "score_lib/runs/measures.py",
        "repeats = run.config.eval.loss_num_repeats",
        "repeats = 1",
    ),
    Mutation(
        "probes are ignored",
        "score_lib/runs/measures.py",
        "num_probes=options.num_probes",
        "num_probes=1",
    ),
    Mutation(
        "steps of the likelihood are ignored",
        "score_lib/runs/measures.py",
        "steps = run.config.eval.bpd_steps",
        "steps = 0",
    ),
    Mutation(
        "the likelihood's steps forget the fourth slope",
        "score_lib/base/ode.py",
        "slopes = slopes[:4]",
        "slopes = slopes[:3]",
    ),
    Mutation(
        "evaluation uses the raw weights instead of the ema",
        "score_lib/runs/evaluate.py",
        'weights = run.state["ema"].applied(run.state["model"].parameters())',
        "weights = contextlib.nullcontext()",
    ),
    Mutation(
        "the last step does not end at the data",
        "score_lib/samplers/grids.py",
        "torch.cat([times, times.new_zeros(1)])",
        "torch.cat([times, times[-1:] / 2])",
        STEPS,
    ),
    Mutation(
        "fewer steps are as long as those of the chain",
        PC,
        "if built.takes_any_step() and not chain:",
        "if False:",
        STEPS,
    ),
    Mutation(
        "tables do not follow N",
        "score_lib/sdes/published.py",
        "for name in made_values(self):",
        "for name in ():",
        ("tests/test_steps.py", "tests/test_sde.py"),
    ),
    Mutation(
        "the callback is not called",
        "score_lib/samplers/loop.py",
        "progress=progress, callback=callback, **own)",
        "progress=progress, callback=None, **own)",
        STEPS,
    ),
    Mutation(
        "too few steps are not refused",
        PC,
        "check_steps(sde, predictor, visited,",
        "(lambda *given: None)(sde, predictor, visited,",
        FIELD,
    ),
    Mutation(
        "adaptive steps grow without limit",
        "score_lib/samplers/adaptive.py",
        "_GROW_MOST = 1.3",
        "_GROW_MOST = 1e9",
        FIELD,
    ),
    Mutation(
        "the ODE ends without Tweedie's formula",
        "score_lib/samplers/adaptive.py",
        "x = _denoised(sde, score_fn, x, t)\n        return x",
        "x = x + 0\n        return x",
        FIELD,
    ),
    Mutation(
        "networks are called in the dtype of the data",
        "score_lib/scores.py",
        "if dtype in (None, x.dtype)",
        "if True",
        FIELD,
    ),
    Mutation(
        "samples that are not finite become pictures",
        "score_lib/disk/pictures.py",
        "if not finite.all():",
        "if False:",
        FIELD,
    ),
    Mutation(
        "a resumed average keeps its rate",
        OPTIMIZATION,
        "    ema.decay = ema_decay(config)\n",
        "",
        HISTORY,
    ),
    Mutation(
        "a resumed optimiser keeps its settings",
        OPTIMIZATION,
        "            group[name] = optim[name]\n",
        "",
        HISTORY,
    ),
    Mutation(
        "checkpoints are written without the prefix",
        "score_lib/disk/checkpoints.py",
        'as_published(contents["model"])',
        'contents["model"]',
        ("tests/test_checkpoints.py",),
    ),
    Mutation(
        "classes are in the order of letters",
        "score_lib/data/splits.py",
        "sorted(titles, key=natural)",
        "sorted(titles)",
        ("tests/test_datasets_files.py",),
    ),
    Mutation(
        "a folder Train is a class",
        "score_lib/data/splits.py",
        "name.lower() in TRAINING",
        "name in TRAINING",
        ("tests/test_datasets_files.py",),
    ),
    Mutation(
        "statistics are not compared with the data",
        "score_lib/runs/statistics.py",
        "if stats.means is not None:",
        "if False:",
        ("tests/test_checks.py",),
    ),
    Mutation(
        "every array of a file of statistics is read",
        "score_lib/metrics/stats.py",
        "[name for name in known if name in stored]",
        "list(stored)",
        ("tests/test_reference_statistics.py",),
    ),
    Mutation(
        "spatial features are in PyTorch's order",
        "score_lib/metrics/inception.py",
        "[:, :_SPATIAL_CHANNELS].movedim(1, -1)",
        "[:, :_SPATIAL_CHANNELS]",
        ("tests/test_pretrained.py",),
    ),
    Mutation(
        "a checkpoint is read by any options",
        "score_lib/runs/trained.py",
        "        check_same_output(path, run.trained, run.config)\n",
        "        pass\n",
        ("tests/test_errors.py",),
    ),
    Mutation(
        "a drift that does not fit is not found",
        "score_lib/checks/process.py",
        "((slope - expected).abs() / (expected.abs() + g**2)).max().item()",
        "0.0",
        ("tests/test_checks.py",),
    ),
    Mutation(
        "a chain has small variances only",
        "score_lib/runs/measures.py",
        "variance=options.vlb_variance",
        'variance="small"',
    ),
    Mutation(
        "the bound of a chain is of dequantised data",
        "score_lib/runs/measures.py",
        "vlb_terms, dequantize=False",
        "vlb_terms",
    ),
    Mutation(
        "the density of learned noise does not count",
        "score_lib/runs/measures.py",
        'found["bpd"] + log_q',
        'found["bpd"] + 0 * log_q',
        DEQUANTIZER,
    ),
    Mutation(
        "a dequantizer is trained for weights that are not averaged",
        "score_lib/runs/dequantizer.py",
        '    run.state["ema"].copy_to(network.parameters())\n',
        "",
        DEQUANTIZER,
    ),
    Mutation(
        "evaluations use a dequantizer that is not averaged",
        "score_lib/runs/dequantizer.py",
        "    average.copy_to(flow.parameters())\n",
        "",
        DEQUANTIZER,
    ),
    Mutation(
        "ADM centres no images",
        "models/adm_configured.py",
        "x if self.centered or self.dims != 2 else 2 * x - 1",
        "x",
        ("tests/test_adm_config.py",),
    ),
    Mutation(
        "tokens are not told the condition",
        "models/adaptive.py",
        "self.conditions.embed(in_full_precision(self.layers, temb), condition)",
        "in_full_precision(self.layers, temb)",
        ("tests/test_vector_networks.py",),
    ),
    Mutation(
        "learnt points are not attended to",
        "models/set_transformer.py",
        "self.spread(h, normalised(found + self.mix(found)))",
        "self.spread(h, h)",
        ("tests/test_vector_networks.py",),
    ),
    Mutation(
        "ADM converts the last layer",
        "models/adm.py",
        'name != "out" and isinstance(',
        "isinstance(",
        ADM,
    ),
    Mutation(
        "ADM recomputes nothing",
        "models/adm.py",
        "if self._recomputes():",
        "if False:",
        ADM,
    ),
    Mutation(
        "ADM has the same number of heads on the way up",
        "models/adm_layers.py",
        "a.num_heads if a.num_heads_upsample == -1 else a.num_heads_upsample",
        "a.num_heads",
        ADM,
    ),
    Mutation(
        "ADM normalises as NCSN++",
        "models/adm_layers.py",
        "eps=1e-5",
        "eps=1e-6",
        ADM,
    ),
    Mutation(
        "further averages stay at the start",
        "score_lib/losses/steps.py",
        'state["averages"].update(model.parameters())',
        "pass",
        AVERAGES,
    ),
    Mutation(
        "averages that begin at a resume begin at the first weights",
        "score_lib/runs/averages.py",
        'averages.restart(state["model"].parameters())',
        "pass",
        AVERAGES,
    ),
    Mutation(
        "an evaluation ignores its average",
        "score_lib/runs/evaluate.py",
        "load_trained(run, path, average=average)",
        "load_trained(run, path)",
        AVERAGES,
    ),
    Mutation(
        "samples ignore their average",
        "score_lib/runs/trained.py",
        "latest=not chosen, average=average)",
        "latest=not chosen)",
        AVERAGES,
    ),
    Mutation(
        "snapshots of an abandoned run stay",
        "score_lib/runs/courses.py",
        "for path, other in _later(workdir, step):",
        "for path, other in ():",
        AVERAGES,
    ),
    Mutation(
        "the checkpoint's own averages take no part",
        "score_lib/runs/averages.py",
        "if part.step != step or not own] + own",
        "]",
        AVERAGES,
    ),
    Mutation(
        "an average of an earlier step takes later snapshots",
        "score_lib/runs/averages.py",
        "sorted(part for part in parts if part.step <= wanted.step)",
        "sorted(part for part in parts if part.step <= step)",
        AVERAGES,
    ),
    Mutation(
        "a half-life counts the images of the present step",
        "score_lib/base/decays.py",
        "seen = (update - 1) * self.batch_size",
        "seen = update * self.batch_size",
        PROFILES,
    ),
    Mutation(
        "a profile is one power too flat",
        "score_lib/base/decays.py",
        "** (self.gamma + 1)",
        "** self.gamma",
        PROFILES,
    ),
    Mutation(
        "sums of profiles need not have weight 1",
        "score_lib/base/profiles.py",
        "return np.linalg.lstsq(system, np.append(b, 1.0), rcond=None)[0][:-1]",
        "return np.linalg.solve(a, b)",
        PROFILES,
    ),
    Mutation(
        "guidance takes the null for the condition",
        "models/conditioning.py",
        "torch.cat([given[kind], null[kind]])",
        "torch.cat([null[kind], given[kind]])",
        CONDITIONING,
    ),
    Mutation(
        "guidance ignores its interval",
        "models/conditioning.py",
        "if self.interval is None:",
        "if True:",
        CONDITIONING,
    ),
    Mutation(
        "a condition is dropped after the wrong draws",
        "score_lib/losses/objectives.py",
        "return uniform() < rate if rate else None",
        "return uniform() > rate if rate else None",
        CONDITIONING,
    ),
    Mutation(
        "a condition is dropped in evaluation, too",
        "score_lib/losses/objectives.py",
        "self.dropping.rate if self.train else 0.0",
        "self.dropping.rate",
        CONDITIONING,
    ),
    Mutation(
        "parts of a batch get the condition of the first part",
        "score_lib/losses/steps.py",
        "None if tensor is None else tensor.tensor_split(parts)[number]\n",
        "None if tensor is None else tensor.tensor_split(parts)[\n"
        "                    number if tensor.is_floating_point() else 0]\n",
        CONDITIONS,
    ),
    Mutation(
        "samples of all numbers have the first classes",
        "score_lib/runs/conditions.py",
        "classes[torch.tensor(indices) % len(classes)]",
        "classes[torch.arange(len(indices)) % len(classes)]",
        CONDITIONS,
    ),
    Mutation(
        "the condition's image knows the noise of dequantization",
        "score_lib/runs/conditions.py",
        "        if dequantized:\n",
        "        if False:\n",
        CONDITIONS,
    ),
    Mutation(
        "the condition is dropped in the likelihood",
        "score_lib/runs/measures.py",
        "log_likelihood_fn(run.network(condition), images",
        "log_likelihood_fn(run.network({}), images",
        CONDITIONS,
    ),
    Mutation(
        "codes are made with guidance",
        "score_lib/runs/latent_tasks.py",
        "follow(given(network, part), x[rows])",
        "follow(run.conditioned(network, part), x[rows])",
        CONDITIONS,
    ),
    Mutation(
        "the guidance scale is dropped",
        SETUP,
        "null, scale = taken_by(self.config).null, options.guidance_scale",
        "null, scale = taken_by(self.config).null, 1.5",
        CONDITIONS,
    ),
    Mutation(
        "features of the augmentation are dropped",
        SETUP,
        'batch.get("features")',
        "None",
        CONDITIONS,
    ),
    Mutation(
        "rank: coefficients act along the last side where it is as long as the batch",
        "score_lib/base/tensors.py",
        "return a.reshape(-1, *(1,) * (x.dim() - 1)) * x",
        "return a * x if x.shape[-1:] == a.shape else a.reshape(-1, *(1,) * (x.dim() - 1)) * x",
        RANKS,
    ),
    Mutation(
        "rank: solvers know processes of scalars only",
        "score_lib/sdes/coefficients.py",
        "range(_HIGHEST_RANK + 1)",
        "range(1)",
        RANKS,
    ),
    Mutation(
        "rank: a vector is no condition",
        "models/conditioning.py",
        "max(2, value.dim())",
        "max(3, value.dim())",
        RANKS,
    ),
    Mutation(
        "rank: data of other ranks than images lose the order of their entries",
        "score_lib/inverse/measurements.py",
        "return x.reshape(len(x), math.prod(x.shape[1:]))",
        "return x.transpose(1, -1).reshape(len(x), math.prod(x.shape[1:]))",
        RANKS,
    ),
    Mutation(
        "numbers: complex noise is taken",
        "score_lib/base/tensors.py",
        'check_real("noise", z)',
        "pass",
        NUMBERS,
    ),
    Mutation(
        "numbers: complex outputs are taken",
        "score_lib/scores.py",
        'check_real("the network\'s output", output)',
        "pass",
        NUMBERS,
    ),
    Mutation(
        "numbers: operators round their matrices to integers",
        "score_lib/inverse/operators.py",
        'check_floats(f"{name} of {type(self).__name__}", tensor)',
        "pass",
        NUMBERS,
    ),
    Mutation(
        "numbers: features lose their imaginary parts",
        "score_lib/metrics/distances.py",
        'check_real("features", x)',
        "pass",
        NUMBERS,
    ),
    Mutation(
        "sampled chain starts from the last level of all",
        SAMPLED,
        "times = levels.times[levels.times <= start + tolerance]",
        "times = levels.times",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "sampled chain keeps other variances than it visits",
        SAMPLED,
        "return ChainScore(levels, Chain(sde, where, kept), denoiser, clamp)",
        "return ChainScore(levels, Chain(sde, where), denoiser, clamp)",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "sampled chain takes its noise from the free x_0",
        SAMPLED,
        "if self.settings.clip_noise\n",
        "if not self.settings.clip_noise\n",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "sampled chain shifts means by the step's variance",
        SAMPLED,
        "shift, noise = (chain.large(i), high) if",
        "shift, noise = (high, high) if",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "sampled chain has no variance of its own at level 0",
        SAMPLED,
        "shift, noise = (chain.large(i), high) if",
        "shift, noise = (chain.large(i), chain.large(i)) if",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "sampled chain has eta unsquared",
        SAMPLED,
        "variance = eta**2 * chain.posterior[i]",
        "variance = eta * chain.posterior[i]",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "sampled chain scales guidance by s",
        SAMPLED,
        "return self.network.denoised + batch_mul(s**2 / m, change)",
        "return self.network.denoised + batch_mul(s / m, change)",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "sampled chain tells constraints the level above",
        "score_lib/sdes/chain.py",
        "return self.lookup(table, self.step_index(t)).to(t.dtype)",
        "return self.lookup(table, (self.step_index(t) + 1).clamp(max=self.N - 1)).to(t.dtype)",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "guidance extrapolates learned variances",
        "models/conditioning.py",
        "torch.cat([guided[:, : x.shape[1]], with_it[:, x.shape[1] :]], dim=1)",
        "guided",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "sampled chain never asks for learned variances",
        SETUP,
        "network = WithVariances(network)",
        "pass",
        SAMPLED_CHAINS,
    ),
    Mutation(
        "drawing: the pen is down between strokes",
        "score_lib/data/strokes.py",
        "number[end][1:] == number[end][:-1]",
        "number[end][1:] >= number[end][:-1]",
        DRAWINGS,
    ),
    Mutation(
        "drawing: the way between strokes has a length",
        "score_lib/data/strokes.py",
        "[np.append(0.0, sizes[k]) for k in drawn]",
        "[np.append(0.1, sizes[k]) for k in drawn]",
        DRAWINGS,
    ),
    Mutation(
        "drawing: stretched to a square",
        "score_lib/data/strokes.py",
        "(high - low).max()",
        "(high - low).mean()",
        DRAWINGS,
    ),
    Mutation(
        "drawing: lines of half the width",
        "score_lib/data/strokes.py",
        "width=round(line)",
        "width=round(line / 2)",
        DRAWINGS,
    ),
    Mutation(
        "drawing: a line of a file is another drawing",
        "score_lib/data/quickdraw.py",
        'side="right") - 1',
        'side="left") - 1',
        DRAWINGS,
    ),
    Mutation(
        "points: the folder takes part in the choice",
        "score_lib/data/points.py",
        'name[name.rfind("/") + 1 :].encode',
        "name.encode",
        POINTS,
    ),
    Mutation(
        "points: the first ones are chosen",
        "score_lib/data/points.py",
        "keys = np.random.PCG64(seed).random_raw(total)",
        "keys = np.arange(total)",
        POINTS,
    ),
    Mutation(
        "points: the order of bytes is not followed",
        "score_lib/data/point_files.py",
        "np.dtype(kind).newbyteorder(self._order)",
        'np.dtype(kind).newbyteorder("<")',
        POINTS,
    ),
    Mutation(
        "points: a header is believed",
        "score_lib/data/point_files.py",
        "0 <= (count := int(digits)) <= len(content)",
        "0 <= (count := int(digits))",
        POINTS,
    ),
    Mutation(
        "points: nan is read",
        "score_lib/data/point_files.py",
        "np.isfinite(points).all(axis=1)",
        "(points == points).any(axis=1)",
        POINTS,
    ),
    Mutation(
        "reproduce: the published figure is taken for exact",
        "score_lib/runs/reproduce.py",
        "math.sqrt(1 + 1 / figure.runs)",
        "math.sqrt(1 / figure.runs)",
        REPRODUCE,
    ),
    Mutation(
        "reproduce: the ODE's samples are those of the config's sampler",
        "score_lib/runs/reproduce.py",
        "if kind.ode:",
        "if not kind.ode:",
        REPRODUCE,
    ),
    Mutation(
        "reproduce: few samples are compared as if they were all",
        "score_lib/runs/reproduce.py",
        "if (used := record[count]) != (published := getattr(row, count)):",
        "if (used := record[count]) > (published := getattr(row, count)):",
        REPRODUCE,
    ),
    Mutation(
        "reproduce: the jackknife forgets how its values hang together",
        "score_lib/metrics/jackknife.py",
        "np.mean(deviations**2 / (shares - 1))",
        "np.mean(deviations**2 / (shares - 1) ** 2)",
        REPRODUCE,
    ),
]


def copied(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the project's files."""
    copy = folder / "project"
    shutil.rmtree(copy, ignore_errors=True)
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    for file in filter(lambda name: (ROOT / name).is_file(), files):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, copy / file)
    return copy


def passes(copy: pathlib.Path, tests: tuple[str, ...]) -> bool:
    """Whether tests pass in a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, *tests], cwd=copy, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{tests}: pytest ended with {result.returncode}\n{result.stdout}")
    return result.returncode == 0


def is_caught(mutation: Mutation, folder: pathlib.Path) -> bool:
    """Whether the tests fail in a copy of the project with the mutation."""
    copy = copied(folder)
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.old!r} occurs {text.count(mutation.old)} times"
        )
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return not passes(copy, mutation.tests)


def main() -> None:
    """Apply the chosen mutations one by one; exit code 1 if one goes unnoticed."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    missed = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for tests in dict.fromkeys(mutation.tests for mutation in chosen):
            if not passes(copied(folder), tests):
                sys.exit(f"{' '.join(tests)} fail without any mutation")
        for mutation in chosen:
            caught = is_caught(mutation, folder)
            print(f"{'caught' if caught else 'MISSED'}: {mutation.name}", flush=True)
            if not caught:
                missed.append(mutation.name)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
