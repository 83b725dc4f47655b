"""From a config to a sampler."""

import logging
from collections.abc import Callable

from score_lib.base.registry import Registry
from score_lib.option_table import TABLE
from score_lib.options import Config, complete, flatten
from score_lib.parametrization import parametrization_of
from score_lib.samplers import solvers
from score_lib.samplers.adaptive import get_adaptive_sampler, get_ode_sampler
from score_lib.samplers.chain import get_chain_sampler
from score_lib.samplers.pc import get_pc_sampler
from score_lib.samplers.steps import get_corrector, get_predictor
from score_lib.sdes.process import SDE

# Entries build samplers from (sde, shape, inverse_scaler, *, eps, continuous, denoise, ...).
_SAMPLERS = Registry("sampling.method")
register_sampler = _SAMPLERS.register

_SOLVER_OPTIONS = {"steps": "sampling.num_steps", "grid": "sampling.time_grid"}


def register_solver(name: str, options: dict[str, str] | None = None) -> Callable:
    """Class decorator: `sampling.method = name` then selects a solver.

    Args:
        options: keywords of the class -> dotted names of the options that feed them.
    """

    def add(solver: type[solvers.Solver]) -> type[solvers.Solver]:
        def build(sde, shape, inverse_scaler, **keywords):
            return solvers.get_solver_sampler(sde, shape, solver, inverse_scaler, **keywords)

        feeds = {**_SOLVER_OPTIONS, **(options or {})}
        return register_sampler(solver, name=name, options=feeds, build=build)

    return add


register_solver("ddim")(solvers.DDIM)
register_solver("heun", {"churn": "sampling.churn"})(solvers.Heun)
register_solver("dpmpp_2m")(solvers.DPMSolver2M)
register_solver("dpmpp_3m")(solvers.DPMSolver3M)
register_solver("dpmpp_sde")(solvers.DPMSolverSDE)
register_sampler(get_ode_sampler, name="ode")
register_sampler(
    get_adaptive_sampler,
    name="adaptive",
    options={"rtol": "sampling.adaptive_rtol", "atol": "sampling.adaptive_atol"},
)
register_sampler(
    get_chain_sampler,
    name="chain",
    options={
        "respacing": "sampling.respacing",
        "variance": "sampling.variance",
        "eta": "sampling.eta",
        "clip": "sampling.clip",
        "clip_noise": "sampling.clip_noise",
        "shift_mean": "sampling.shift_mean",
    },
)


@register_sampler(
    name="pc",
    options={
        "predictor": "sampling.predictor",
        "corrector": "sampling.corrector",
        "snr": "sampling.snr",
        "n_steps": "sampling.n_steps_each",
        "probability_flow": "sampling.probability_flow",
        "steps": "sampling.num_steps",
        "grid": "sampling.time_grid",
    },
)
def _named_pc_sampler(sde, shape, inverse_scaler, *, predictor, corrector, snr, **options):
    """`get_pc_sampler` by the names of a predictor and a corrector."""
    classes = get_predictor(predictor), get_corrector(corrector)
    return get_pc_sampler(sde, shape, *classes, inverse_scaler, snr, **options)


# Options that no experiment sets but for the method that reads them: a value is meant to count.
OF_ONE_METHOD = tuple(
    f"sampling.{name}" for name in ("time_grid", "churn", "eta", "adaptive_rtol", "adaptive_atol")
)
# Numbers of steps, which experiments set and users may forget when they choose another method.
OF_STEPS = ("sampling.num_steps", "sampling.respacing")


def unread(config, names: tuple[str, ...]) -> dict[str, object]:
    """Those of the named options that count for nothing in the configured method, and their values.

    Options at their defaults are left out.

    Args:
        config: complete.
    """
    flat = flatten(config)
    read = {*_SAMPLERS.feeds(flat["sampling.method"]).values()}
    if flat["sampling.method"] == "chain" and flat["sampling.variance"] != "ddim":
        read.discard("sampling.eta")  # a share of DDIM's noise
    return {n: flat[n] for n in names if n not in read and flat[n] != TABLE[n].default}


def without_unread(config: Config) -> Config:
    """The config, in which options of other methods now have their defaults; the log tells them.

    For one that was stored, where they never counted, or that has been given another method.  In
    a config at hand they are a mistake, which `get_sampling_fn` refuses.

    Args:
        config: complete, changed in place; a method that is not known here leaves it as it is.
    """
    if str(config.sampling.method) not in _SAMPLERS:
        return config
    for name, value in unread(config, OF_ONE_METHOD).items():
        section, option = name.split(".")
        with config.unlocked():
            config[section][option] = TABLE[name].default
        logging.warning(
            "%s = %r is left out: sampling.method = %r does not read it",
            name, value, config.sampling.method,
        )  # fmt: skip
    return config


def get_sampling_fn(
    config, sde: SDE, shape: tuple[int, ...], inverse_scaler: Callable, eps: float, **options
) -> Callable:
    """The configured sampler.

    Args:
        config: `sampling.method` is "pc", "ode", "adaptive", "chain" or the name of a solver.
        shape, inverse_scaler: see `sampler_of`.
        eps: time at which sampling stops.
        options: keywords of the sampler, such as `constraints`; they take precedence over the
            config.
    Returns:
        `sample(model, z=None, *, noise=None, progress=False) -> (samples, evaluations)`.
    Raises:
        ValueError: an unknown method, predictor or corrector, or options that do not fit.
    """
    config = complete(config)
    method = config.sampling.method
    for name, value in unread(config, OF_ONE_METHOD).items():
        variance = " but with sampling.variance = 'ddim'" if method == "chain" else ""
        only = variance if name == "sampling.eta" else ""
        raise ValueError(
            f"{name} = {value!r} should be {TABLE[name].default!r} with sampling.method = "
            f"{method!r}, which does not read it{only}"
        )
    shared = {"denoise": config.sampling.noise_removal, "continuous": config.training.continuous}
    # Only where there is one, so that samplers registered without the keyword stay as they are.
    if chosen := parametrization_of(config):
        shared["parametrization"] = chosen
    keywords = {"eps": eps, **shared, **options}
    return _SAMPLERS.build(method, config, sde, shape, inverse_scaler, **keywords)


# Options that change samples, whatever the method.
_OF_ALL_METHODS = tuple(
    f"sampling.{name}"
    for name in ("noise_removal", "classes", "guidance_scale", "guidance_interval", "precision")
)


def sampler_text(config) -> str:
    """The configured sampler in words: its method, and the options that differ from their defaults.

    Such as "dpmpp_2m (num_steps = 20)".
    """
    flat = flatten(complete(config))
    method = flat["sampling.method"]
    names = dict.fromkeys((*_SAMPLERS.feeds(method).values(), *_OF_ALL_METHODS))
    shown = [
        f"{name.removeprefix('sampling.')} = {flat[name]!r}"
        for name in names
        if name not in TABLE or flat[name] != TABLE[name].default
    ]
    return f"{method} ({', '.join(shown)})" if shown else method


def follows_flow(config) -> bool:
    """Whether the configured sampler solves the probability-flow ODE: noise at its start only."""
    sampling = complete(config).sampling
    of_method = {
        **dict.fromkeys(("ode", "ddim", "dpmpp_2m", "dpmpp_3m"), True),
        "heun": sampling.churn == 0,
        "pc": sampling.probability_flow and sampling.corrector == "none",
        "chain": sampling.variance == "ddim" and sampling.eta == 0,
    }
    return of_method.get(sampling.method, False)


def get_short_sampling_fn(config, sde: SDE, shape, inverse_scaler: Callable, eps: float):
    """The last two steps of the configured sampler, or two steps of a solver, for a dry run."""
    method = _SAMPLERS.get(config.sampling.method)
    steps = config.sampling.num_steps or sde.N
    options = {"start_time": min(sde.T, eps + 1.5 * (sde.T - eps) / max(steps - 1, 1))}
    if isinstance(method, type) and issubclass(method, solvers.Solver):
        options = {"steps": 2}
    elif method is get_chain_sampler:
        options = {"most_steps": 2}
    return get_sampling_fn(config, sde, shape, inverse_scaler, eps, **options)
