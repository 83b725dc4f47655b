"""Conditions other than a measurement: a class, or data to start from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul, check_floats
from score_lib.samplers.loop import Constraint, Noise
from score_lib.scores import get_classifier_grad_fn, get_model_fn
from score_lib.sdes.coefficients import marginal
from score_lib.sdes.process import SDE


class ClassGuidance(Constraint):
    """Adds scale grad log p(label | x_t) to the score.  [S21, section 5 and appendix I.1]

    Args:
        classifier: network, or function, of x_t (B, *D) and a label (B,) that gives logits (B, K).
            The label is s(t), or a time step if its class says so: see `classifier_label`.
        labels: (B,) whole numbers in [0, K).
        scale: of the gradient; above 1, samples are more typical of their class, but are not those
            of p(x) p(label | x)^scale, which has another score at t > 0 than the product at t.
        until: the last time at which the classifier is used; None is T.  With more noise it may be
            no better than chance.
        continuous: whether a classifier that is told time steps was trained on all times, or on
            those of the discrete chain.
    Raises:
        ValueError: labels are not whole numbers, (B,), or `until` is no time; when sampling starts:
            labels are not in [0, K), or not as many as samples.
    """

    def __init__(
        self,
        classifier: Callable,
        labels: Tensor | Sequence[int],
        scale: float = 1.0,
        *,
        until: float | None = None,
        continuous: bool = True,
    ):
        labels = torch.as_tensor(labels)
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels are whole numbers, one a sample: (B,), not {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        if until is not None and not until > 0:
            raise ValueError(f"until is a time above 0, or None for T, not {until}")
        self.classifier, self.labels = classifier, labels.to(torch.int64)
        self.scale, self.until, self.continuous = scale, until, continuous

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        self.labels = self.labels.to(x.device)
        if len(x) != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels were given for {len(x)} samples")
        # Before the loop: on a GPU a wrong label would abort the process.
        with torch.no_grad():
            classes = get_model_fn(self.classifier)(x[:1], torch.ones_like(t[:1])).shape[1]
        wrong = self.labels[(self.labels < 0) | (self.labels >= classes)]
        if len(wrong):
            raise ValueError(
                f"label {int(wrong[0])} is not one of the classifier's {classes} classes, 0 to "
                f"{classes - 1}"
            )
        return x

    def guide(self, sde: SDE, score_fn: Callable) -> Callable:
        grad_fn = get_classifier_grad_fn(sde, self.classifier, self.continuous)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            # In float32, to which grids round their times.
            scale = self.scale * (t.float() <= (sde.T if self.until is None else self.until))
            return score_fn(x, t) + batch_mul(scale, grad_fn(x, t, self.labels))

        return guided


class StartFrom(Constraint):
    """Sampling starts from x_t of given data instead of the prior.  [Meng et al. 2022, SDEdit]

    Args:
        data: x_0, (B, *D), in the network's range.
    """

    def __init__(self, data: Tensor):
        check_floats("the data to start from", data)
        self.data = data

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        if self.data.shape != x.shape:
            raise ValueError(
                f"sampling starts from data of shape {tuple(self.data.shape)}, but samples have "
                f"shape {tuple(x.shape)}"
            )
        mean, std = marginal(sde, self.data.to(x), t)
        return mean + batch_mul(std, noise(x))
