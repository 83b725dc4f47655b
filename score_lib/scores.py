"""From a network's output to a score.

Networks and processes are peers that do not know each other; here the two meet.  As published, the
process maps time to the network's label (`noise_label`) and its output to a score (`to_score`);
otherwise a `Parametrization` does.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from score_lib.base.distributed import unwrapped
from score_lib.base.gradients import recording
from score_lib.base.inheritance import place
from score_lib.base.tensors import batch_mul, check_real, per_sample
from score_lib.parametrization import Parametrization, get_parametrization
from score_lib.sdes.coefficients import check_shape
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE

_DTYPES = (torch.float32, torch.float64)


def get_model_fn(model: Callable, train: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """`model_fn(x, labels)`: the network in training or evaluation mode.

    A network of float32 or float64 is called in its own dtype; the result has that of x.

    Args:
        model: a network, or any function of (x, labels).
        train: whether dropout is on.
    """

    def model_fn(x: Tensor, labels: Tensor) -> Tensor:
        # Setting the mode takes ten times as long as looking.
        if isinstance(model, nn.Module) and not _is_in_mode(model, train):
            model.train(train)
        dtype = dtype_of(model)
        known = dtype is not None and x.dtype in _DTYPES
        if known and isinstance(labels, Tensor) and labels.is_floating_point():
            labels = labels.to(dtype)
        output = model(x.to(dtype) if known else x, labels)
        check_real("the network's output", output)
        return output.to(x.dtype) if known else output

    return model_fn


def _is_in_mode(model: nn.Module, train: bool) -> bool:
    """Whether all layers are in training mode, or in evaluation mode: that of one of them may have
    been set alone, and a wrapper made after the mode of its network has another one.  Not known of
    a layer with its own `train`, which may keep some of them frozen."""
    layers = [model]
    for layer in layers:
        if layer.training != train or not layer.train.__module__.startswith("torch."):
            return False
        layers += [inner for inner in layer._modules.values() if inner is not None]
    return True


def dtype_of(model: Callable) -> torch.dtype | None:
    """float32 or float64 as a network's parameters; None without them, or if they are others."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    first = next((p.dtype for p in parameters if p.is_floating_point()), None)
    return first if first in _DTYPES else None


def _checked(output: Tensor, x: Tensor, whole: bool = True) -> Tensor:
    """A network's output itself.

    Args:
        whole: it has all channels of x.
    Raises:
        ValueError: its shape is not that of x: broadcast, it would mix the samples of a batch.
    """
    part = x if whole or x.dim() == 1 else x[:, : output.shape[1:2].numel()]
    if output.shape != part.shape:
        raise ValueError(
            f"the network gives {tuple(output.shape)} for data of {tuple(x.shape)}: its output "
            "should have the shape of its input; reshape it, or give the network that shape's "
            "number of channels"
        )
    return output


def get_score_fn(
    sde,
    model: Callable,
    train: bool = False,
    continuous: bool = False,
    *,
    parametrization: Parametrization | str | None = None,
) -> Callable:
    """`score_fn(x, t)`: the score of p_t that a network estimates for a process.

    Args:
        sde: the process; it maps time to labels and outputs to scores.
        model: a network, or any function of (x, labels).
        train: whether dropout is on.
        continuous: whether the network was trained on all times of [0, T] or on a grid.
        parametrization: what the output is, as an object or a registered name; None and "" are the
            convention of the process.
    Returns:
        Function of x (B, *D) in the network's range and t (B,) in [0, T], giving (B, *D).  By the
        convention of the process, x may have more channels than the network gives: those of a
        condition that the caller has joined to the data.
    Raises:
        ValueError: an unknown parametrisation; when called: the output has not the shape of x, or
            the process's noise depends on it.
    """
    sde = as_process(sde)
    model_fn = get_model_fn(model, train)
    chosen = get_parametrization(parametrization)

    def published(x: Tensor, t: Tensor) -> Tensor:
        check_shape(sde, x)
        output = _checked(model_fn(x, sde.noise_label(t, continuous)), x, whole=False)
        return sde.to_score(output, t, continuous)

    def parametrized(x: Tensor, t: Tensor) -> Tensor:
        check_shape(sde, x)
        (skip, out, scale), label = chosen.at(sde, t, x.dim() - 1, continuous)
        output = _checked(model_fn(batch_mul(scale, x), label), x)
        return batch_mul(skip, x) + batch_mul(out, output)

    return published if chosen is None else parametrized


def get_data_score_fn(sde, model: Callable, *settings, **options) -> Callable:
    """`get_score_fn` for x that is data alone, with the same arguments.

    When called, it also refuses an output with fewer channels than x, by a ValueError.
    """
    score_fn = get_score_fn(sde, model, *settings, **options)
    return lambda x, t: _checked(score_fn(x, t), x)


class Reading(NamedTuple):
    """How a network is read for noisy x (B, *D)."""

    given: Tensor
    """The network's input, (B, *D)."""
    label: Tensor
    """Its label, (B,)."""
    score: Callable[[Tensor], Tensor]
    """From its output (B, *D) to the score (B, *D)."""


def reading_of_level(
    sde: SDE,
    x: Tensor,
    index: Tensor,
    coeffs: tuple[Tensor, Tensor],
    parametrization: Parametrization | None,
) -> Reading:
    """How a network of discrete noise levels is read at one of them.

    Args:
        x: noisy data m x_0 + s z, (B, *D).
        index: of the noise level, (B,), int64.
        coeffs: its m and s, (B,).
        parametrization: None is the convention of the process.
    Raises:
        ValueError: the process has another convention for times alone, by its own `to_score`.
    """
    if parametrization is None:
        if place(type(sde), "to_score") < place(type(sde), "score_from_output"):
            raise ValueError(
                f"to_score of {sde!r} tells times, and discrete noise levels are read by "
                "score_from_output(output, std): override that in its place, or train with "
                "training.continuous = True"
            )
        return Reading(
            x, index, lambda output: sde.score_from_output(_checked(output, x), coeffs[1])
        )
    m, s = (value.to(torch.promote_types(value.dtype, x.dtype)) for value in coeffs)
    (skip, out, scale), label = parametrization.at_level(sde, index, m, s)
    label = label.to(x.dtype) if label.is_floating_point() else label
    given = batch_mul(scale, x).to(x.dtype)
    return Reading(
        given, label, lambda output: batch_mul(skip, x) + batch_mul(out, _checked(output, x))
    )


class LevelDenoiser:
    """Reads networks of discrete noise levels for E[x_0 | x] and, if learned, variances.

    Args:
        sde: the process.
        model: a network, or any function of (x, labels).
        learned: whether its output has twice the channels of x: its usual output, then v.
        parametrization: None is the convention of the process.
    """

    def __init__(
        self, sde: SDE, model: Callable, learned: bool, parametrization: Parametrization | None
    ):
        self.sde, self.learned, self.parametrization = sde, learned, parametrization
        self.model_fn = get_model_fn(model)

    def __call__(
        self, x: Tensor, index: Tensor, coeffs: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The denoised x and v, each (B, *D), in float64; v is None if it is not learned.

        Args:
            x, index, coeffs: see `reading_of_level`; coeffs in float64.
        Raises:
            ValueError: the network has another number of channels.
        """
        m, s = coeffs
        reading = reading_of_level(self.sde, x, index, coeffs, self.parametrization)
        output, v = self._parts(self.model_fn(reading.given, reading.label), x)
        return batch_mul(1 / m, x + batch_mul(s**2, reading.score(output))), v

    def _parts(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        expected = (len(x), 2 * x.shape[1], *x.shape[2:]) if self.learned else x.shape
        if output.shape != expected:
            raise ValueError(
                f"the network gives {tuple(output.shape)} for data of {tuple(x.shape)}, where "
                f"{tuple(expected)} is needed: learned variances are for networks with twice the "
                "channels of the data, fixed ones for all others"
            )
        return output.double().chunk(2, dim=1) if self.learned else (output.double(), None)


def label_at(
    sde,
    t: Tensor,
    continuous: bool,
    parametrization: Parametrization | str | None = None,
    dimensions: int = 3,
) -> Tensor:
    """The label (B,) that a network gets for time t (B,).

    Args:
        continuous, parametrization: see `get_score_fn`.
        dimensions: of one sample, D.
    """
    chosen = get_parametrization(parametrization)
    if chosen is None:
        return as_process(sde).noise_label(t, continuous)
    return chosen.at(as_process(sde), t, dimensions, continuous)[1]


def classifier_label(classifier: Callable, step: Tensor, noise_std: Tensor) -> Tensor:
    """The label (B,) by which a classifier is told the noise: the one that its kind takes.

    Args:
        classifier: a network with the attribute `told_time_step = True` takes the time step; any
            other one, and functions, take s(t).
        step: what a score network of the process would be told, (B,).
        noise_std: s(t), (B,).
    """
    return step if getattr(unwrapped(classifier), "told_time_step", False) else noise_std


def get_classifier_grad_fn(sde, classifier: Callable, continuous: bool = True) -> Callable:
    """`grad_fn(x, t, labels)`: gradient of log p(label | x_t) with respect to x_t.

    Args:
        sde: the process.
        classifier: a network, or any function, of x (B, *D) in the network's range and a label
            (B,), see `classifier_label`, that gives logits (B, K).
        continuous: whether the classifier was trained on all times of [0, T] or on a grid.
    Returns:
        Function of x (B, *D), t (B,) and labels (B,), int64 in [0, K), that gives (B, *D).
        Differentiable where gradients are enabled.
    """
    sde, logit_fn = as_process(sde), get_model_fn(classifier)

    def grad_fn(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        keep = torch.is_grad_enabled()
        with recording(x, t, labels) as (x, t, labels):
            noise_std = per_sample(sde.marginal_prob(torch.zeros_like(x), t)[1], t)
            told = classifier_label(classifier, sde.noise_label(t, continuous), noise_std)
            at = x if x.requires_grad else x.detach().requires_grad_(True)
            log_p = torch.log_softmax(logit_fn(at, told), dim=1)
            chosen = log_p.gather(1, labels[:, None]).sum()
            return torch.autograd.grad(chosen, at, create_graph=keep)[0]

    return grad_fn
