"""The optimiser, its schedule, and the watch over finite losses."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from score_lib.base.decays import HalfLife
from score_lib.options import complete


def get_optimizer(config, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimiser.

    Raises:
        ValueError: `optim.optimizer` is not "Adam".
    """
    optim = complete(config).optim
    if optim.optimizer != "Adam":
        raise ValueError(f"unknown optim.optimizer {optim.optimizer!r}: known is 'Adam'")
    return torch.optim.Adam(
        params,
        lr=optim.lr,
        betas=(float(optim.beta1), 0.999),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        amsgrad=optim.amsgrad,
        fused=True,  # one pass over the parameters instead of ten
    )


def half_life(config) -> HalfLife | None:
    """The decays of the main average if `model.ema_halflife` sets them, else None."""
    config = complete(config)
    images, rampup = config.model.ema_halflife, config.model.ema_rampup
    return HalfLife(images, rampup, config.training.batch_size) if images else None


def ema_decay(config) -> float:
    """The decay of the main average, after its warm-up."""
    found = half_life(config)
    return found.decay if found else complete(config).model.ema_rate


def apply_settings(config, state: dict) -> dict[str, list]:
    """Put the config's settings into a restored optimiser and average, which came with their own.

    Where amsgrad is switched on, its largest second moments begin at the next step.

    Args:
        state: "optimizer" and "ema", changed in place, and "position", the images seen.
    Returns:
        the options that differed: dotted name -> [old, new].
    """
    config, ema = complete(config), state["ema"]
    if (decays := half_life(config)) and ema.num_updates is not None:
        more = state["position"] - ema.num_updates * decays.batch_size
        ema.schedule = decays._replace(more=more)
    # A half-life has options of its own, which the history of the run compares.
    changed = {}
    if not config.model.ema_halflife and ema.decay != ema_decay(config):
        changed["model.ema_rate"] = [ema.decay, ema_decay(config)]
    ema.decay = ema_decay(config)
    return changed | set_optimizer(config, state["optimizer"])


def set_optimizer(config, optimizer: torch.optim.Optimizer) -> dict[str, list]:
    """The optimiser's half of `apply_settings`."""
    optim, pairs = complete(config).optim, {}
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        pairs["optim.beta1"] = [beta1, optim.beta1]
        group["betas"] = (optim.beta1, beta2)
        for name in ("eps", "weight_decay", "amsgrad"):
            pairs[f"optim.{name}"] = [group[name], optim[name]]
            group[name] = optim[name]
    for kept in optimizer.state.values():
        if not optim.amsgrad:
            kept.pop("max_exp_avg_sq", None)
        elif "exp_avg_sq" in kept:
            kept.setdefault("max_exp_avg_sq", torch.zeros_like(kept["exp_avg_sq"]))
    return {key: [old, new] for key, (old, new) in pairs.items() if old != new}


def optimization_manager(config) -> Callable:
    """The learning rate of a step, clipping of the gradient's norm, and the optimiser's step.

    Returns:
        `optimize_fn(optimizer, params, step)`, which returns the gradient's norm before clipping,
        a scalar on the device.  Its keywords lr, warmup, cooldown (steps; 0 is none), n_iters and
        grad_clip (negative is none) default to the config's.
    """
    config = complete(config)
    optim = config.optim

    def optimize_fn(
        optimizer,
        params,
        step,
        lr=optim.lr,
        warmup=optim.warmup,
        grad_clip=optim.grad_clip,
        cooldown=optim.cooldown,
        n_iters=config.training.n_iters,
    ):
        params = [p for p in params if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in params])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, warmup, n_iters - step, cooldown)
        if grad_clip >= 0:
            nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
        optimizer.step()
        return norm

    return optimize_fn


def learning_rate(
    step: int, lr: float, warmup: int, left: float = math.inf, cooldown: int = 0
) -> float:
    """Learning rate of the update after `step` others.

    Grows from 0 in proportion to the step, is constant, and falls towards 0 in proportion to the
    steps that are left.

    Args:
        lr: the constant rate.
        warmup: steps of growth; 0 is none.
        left: steps that are left, this one included.
        cooldown: last steps, in which it falls; 0 is none.
    """
    grown = min(step / warmup, 1.0) if warmup > 0 else 1.0
    fallen = min(max(left, 0.0) / cooldown, 1.0) if cooldown > 0 else 1.0
    return lr * grown * fallen


class LossGuard:
    """Stops a run whose loss, gradient or weights are not finite.

    On a GPU the verdict stays on the device until `check`, so that nothing waits for it.
    """

    def __init__(self):
        self.bad_step: Tensor | None = None

    def watch(self, value: Tensor, step: int) -> None:
        """Check a step's value, a scalar; raises at once on the CPU."""
        bad = torch.where(value.isfinite(), torch.inf, float(step))
        self.bad_step = bad if self.bad_step is None else torch.minimum(self.bad_step, bad)
        if value.device.type == "cpu":
            self.check()

    def check_weights(self, parameters: Iterable[Tensor], step: int) -> None:
        """`check`, and that the weights which a step has left are finite: no loss has seen them.

        Raises:
            FloatingPointError: names the first step with anything that is not finite.
        """
        self.watch(nn.utils.get_total_norm(list(parameters), math.inf), step)
        self.check()

    def check(self) -> None:
        """Raise if a value was not finite.

        Raises:
            FloatingPointError: names the first such step.
        """
        if self.bad_step is not None and self.bad_step.isfinite():
            raise FloatingPointError(
                f"the loss, its gradient or a weight is not finite at step {int(self.bad_step)}: "
                "no checkpoint was written since. Try a smaller optim.lr, a longer optim.warmup, "
                "or optim.grad_clip = 1"
            )
