"""Conditions of a network: classes, an image, a vector of features.

A conditional network is a function `network(x, labels, *, classes, image, features)` of those that
it takes.  `Given` and `Guided` fix them, so that samplers, likelihoods and constraints see a model
of (x, labels) and know of no condition.  A condition that is dropped in training is replaced by a
null, by which the network also learns the unconditional score.  [Ho and Salimans 2022]
"""

import math
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score_lib.base.tensors import batch_mul, check_real, data_shape

from .layers import ddpm_conv3x3, in_full_precision

# classes: (B,) int64; image: (B, C, h, w) in the network's range, of data of another rank (B, C) or
# (B, C, *sides); features: (B, K).
Condition = Mapping[str, Tensor]
UNCONDITIONAL: Condition = types.MappingProxyType({})
KINDS = ("classes", "image", "features")


class Takes(NamedTuple):
    """The conditions that a network takes.

    Attributes:
        classes: number of classes, without the null; 0: none are taken.
        image: channels of the image; 0: none is taken.
        features: length of the vector; 0: none is taken.
        middle: grey of the network's range, which fills the null image.
        droppable: whether the network knows the null.
    """

    classes: int = 0
    image: int = 0
    features: int = 0
    middle: float = 0.0
    droppable: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The conditions by name."""
        return tuple(kind for kind in KINDS if getattr(self, kind))

    @property
    def null(self) -> dict[str, float]:
        """The null of each condition: one number for all entries."""
        nulls = {"classes": self.classes, "image": self.middle, "features": 0.0}
        return {kind: nulls[kind] for kind in self.kinds}

    def checked(self, condition: Mapping[str, Tensor | None], x: Tensor | None = None) -> Condition:
        """The condition itself, without those that are None.

        Args:
            x: a batch that it is meant for, (B, *D).
        Raises:
            ValueError: the network does not take it, or lacks one; or another shape.
        """
        given = {kind: value for kind, value in condition.items() if value is not None}
        if set(given) != set(self.kinds):
            raise ValueError(
                f"the network takes {_listed(self.kinds)}, but was given {_listed(tuple(given))}: "
                "see models.conditioning.Given"
            )
        for kind, value in given.items():
            self._check_shape(kind, value, x)
        return given

    def check_range(self, classes: Tensor) -> None:
        """Refuse classes that there are not; those on a GPU would have to be waited for.

        Raises:
            ValueError: a class is out of range.
        """
        if classes.device.type != "cpu" or not classes.numel():
            return
        low, high = int(classes.min()), int(classes.max())
        if not 0 <= low <= high < self.classes + self.droppable:
            null = f", or {self.classes} for the null" if self.droppable else ""
            raise ValueError(
                f"classes go from 0 to {self.classes - 1}{null}, but were given from {low} to "
                f"{high}"
            )

    def _check_shape(self, kind: str, value: Tensor, x: Tensor | None) -> None:
        batch = "B" if x is None else len(x)
        wanted = {
            "classes": f"({batch},) of int64",
            "image": f"({batch}, {self.image}, h, w), or of other data as many sides as these have",
            "features": f"({batch}, {self.features})",
        }[kind]
        fits = {
            "classes": value.dim() == 1 and value.dtype == torch.int64,
            "image": value.dim() == (max(2, value.dim()) if x is None else x.dim())
            and value.shape[1] == self.image,
            "features": value.dim() == 2 and value.shape[1] == self.features,
        }[kind]
        if not fits or (x is not None and len(value) != len(x)):
            raise ValueError(
                f"the condition {kind} should be {wanted}, but was given {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )


def _listed(kinds: tuple[str, ...]) -> str:
    return f"the condition {' and '.join(kinds)}" if kinds else "no condition"


def conditions_of(config) -> tuple[str, ...]:
    """The conditions that `training.condition` names."""
    return tuple(kind for kind in KINDS if kind in config.training.condition.split(","))


def taken_by(config) -> Takes:
    """The conditions that a configured network takes.

    Args:
        config: complete, see `score_lib.options.complete`.
    """
    sizes = {
        "classes": config.data.num_classes,
        "image": data_shape(config)[0],
        "features": config.model.num_features,
    }
    chosen = {kind: sizes[kind] for kind in conditions_of(config)}
    droppable = bool(chosen) and config.training.condition_dropout > 0
    return Takes(**chosen, middle=0.0 if config.data.centered else 0.5, droppable=droppable)


def takes_of(model: Callable) -> Takes | None:
    """The conditions that a network, in any wrappers, declares; None where it declares nothing."""
    while model is not None:
        if isinstance(takes := getattr(model, "takes", None), Takes):
            return takes
        model = getattr(model, "module", getattr(model, "_orig_mod", None))
    return None


class ConditionLayers(nn.Module):
    """The layers that bring conditions into a network.

    Classes and features are added to the embedded time, and an image to the first feature map,
    which is a convolution of the noisy image and the condition together.

    Args:
        takes: the conditions.
        temb_dim: length of the embedded time, E.
        nf: channels of the first feature map.
    """

    def __init__(self, takes: Takes, temb_dim: int, nf: int):
        super().__init__()
        if takes.classes:
            self.classes = nn.Embedding(takes.classes + takes.droppable, temb_dim)
        if takes.features:
            # Without a bias, zeros change nothing.
            self.features = nn.Linear(takes.features, temb_dim, bias=False)
        if takes.image:
            self.image = ddpm_conv3x3(takes.image, nf)

    def embed(self, temb: Tensor, condition: Condition) -> Tensor:
        """The embedded time (B, E), with classes and features."""
        if "classes" in condition:
            temb = temb + self.classes(condition["classes"])
        if "features" in condition:
            features = condition["features"].to(temb.dtype)
            temb = temb + in_full_precision(self.features, features)
        return temb

    def join(self, h: Tensor, image: Tensor) -> Tensor:
        """The first feature map (B, nf, H, W), with an image (B, C, h, w) in [-1, 1]."""
        return h + in_full_precision(self.image, enlarged(image, h).to(h.dtype))


def enlarged(image: Tensor, like: Tensor) -> Tensor:
    """An image (B, C, h, w) with the sides of another tensor, by bilinear interpolation."""
    if image.shape[2:] == like.shape[2:]:
        return image
    return F.interpolate(image, like.shape[2:], mode="bilinear")


class Given(nn.Module):
    """A conditional network with its condition: a model of (x, labels).

    Args:
        module: a network, or any function of (x, labels, **condition).
        condition: classes, image or features, for each sample, (B, ...), or once for all,
            (1, ...); one class may be a number.
    Raises:
        ValueError: the network takes other conditions, or they are complex.
    """

    def __init__(self, module: Callable, **condition: Tensor | int):
        super().__init__()
        self.module = module
        self._kinds = tuple(condition)
        parameters = module.parameters() if isinstance(module, nn.Module) else ()
        device = next((parameter.device for parameter in parameters), None)
        for kind, value in condition.items():
            value = torch.as_tensor(value, device=device)
            check_real(f"the condition {kind}", value)
            value = value[None] if value.dim() == 0 else value
            self.register_buffer(f"given_{kind}", value, persistent=False)
        if (takes := takes_of(module)) is not None:
            takes.checked(self.condition)
            if "classes" in condition:
                takes.check_range(torch.as_tensor(condition["classes"]))

    @property
    def training(self) -> bool:
        """Whether the network is in the mode of training."""
        return getattr(self.module, "training", False)

    @training.setter
    def training(self, mode: bool) -> None:
        """No-op: `train` and `eval` also set the network, which is a child."""

    @property
    def condition(self) -> dict[str, Tensor]:
        """The condition by name."""
        return {kind: getattr(self, f"given_{kind}") for kind in self._kinds}

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The network's output for x (B, *D) and labels (B,).

        Raises:
            ValueError: the condition is for another number of samples.
        """
        return self.module(x, labels, **for_batch(self.condition, x))


def given(network: nn.Module, condition: Condition) -> nn.Module:
    """The network with its condition; itself if there is none."""
    return Given(network, **condition) if condition else network


class Guided(Given):
    """Classifier-free guidance: null + scale (given - null), of the network's outputs.

    So it is of the scores, which are affine in the output.  A scale of 1 is the conditional
    network, of 0 the unconditional one; both are evaluated in one batch of twice the size.
    [Ho and Salimans 2022, where the scale is 1 + w]

    Args:
        module: see `Given`.
        condition: by name, see `Given`.
        null: by name, in place of the condition; one number for all entries, or as the condition.
        scale: guidance scale.
        interval: the least and the largest label with guidance; elsewhere the scale is 1.
            [Kynkäänniemi et al. 2024]
    Raises:
        ValueError: the network takes other conditions, or knows no null; or the null has another
            shape, the scale is no number, or the interval is not rising.
    """

    def __init__(
        self,
        module: Callable,
        condition: Mapping[str, Tensor | int],
        null: Mapping[str, Tensor | float],
        scale: float,
        *,
        interval: tuple[float, float] | None = None,
    ):
        super().__init__(module, **condition)
        if set(null) != set(condition):
            raise ValueError(
                f"guidance needs a null for each condition, {', '.join(condition)}, but was given "
                f"{', '.join(null) or 'none'}"
            )
        takes = takes_of(module)
        if takes is not None and not takes.droppable:
            raise ValueError(
                "guidance needs a network that was trained with training.condition_dropout above 0"
            )
        self.scale, self.interval = _checked_scale(scale), _checked_interval(interval)
        for kind, value in self.condition.items():
            self.register_buffer(
                f"null_{kind}", _null_of(kind, value, null[kind]), persistent=False
            )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """See `Given`."""
        if self.scale == 1:
            return super().forward(x, labels)
        given = for_batch(self.condition, x)
        null = for_batch({kind: getattr(self, f"null_{kind}") for kind in self._kinds}, x)
        both = {kind: torch.cat([given[kind], null[kind]]) for kind in given}
        output = self.module(torch.cat([x, x]), torch.cat([labels, labels]), **both)
        with_it, without = output.chunk(2)
        guided = without + batch_mul(self._scale(labels, x), with_it - without)
        if output.shape[1:2] == x.shape[1:2]:
            return guided
        # Learned variances are those of the conditional network.
        return torch.cat([guided[:, : x.shape[1]], with_it[:, x.shape[1] :]], dim=1)

    def _scale(self, labels: Tensor, x: Tensor) -> Tensor:
        """The scale of each sample, (B,)."""
        scale = x.new_full((len(x),), self.scale)
        if self.interval is None:
            return scale
        low, high = self.interval
        return torch.where((low <= labels) & (labels <= high), scale, torch.ones_like(scale))


def _checked_scale(scale: float) -> float:
    if torch.as_tensor(scale).numel() != 1 or not math.isfinite(scale):
        raise ValueError(f"the guidance scale is one finite number for all samples, not {scale}")
    return float(scale)


def _checked_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    if interval is None:
        return None
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise ValueError(
            f"the interval of guidance is the least and the largest label, not {tuple(interval)}"
        )
    return tuple(interval)


def _null_of(kind: str, value: Tensor, null: Tensor | float) -> Tensor:
    """The null of a condition (B, ...) or (1, ...), for each sample or once for all."""
    null = torch.as_tensor(null, dtype=value.dtype, device=value.device)
    entries = value.shape[1:]
    if null.dim() == value.dim() and null.shape[1:] == entries:
        return null.clone()
    try:
        return null.expand_as(value).clone()
    except RuntimeError as error:
        raise ValueError(
            f"the null of {kind} is one number for all entries, or of shape "
            f"{('B', *entries)}, not {tuple(null.shape)}"
        ) from error


def for_batch(condition: Condition, x: Tensor) -> dict[str, Tensor]:
    """A condition for each sample of a batch (B, *D), on its device; floats in its dtype.

    Raises:
        ValueError: it is for another number of samples.
    """
    found = {}
    for kind, value in condition.items():
        if len(value) not in (1, len(x)):
            raise ValueError(
                f"the condition {kind} is for {len(value)} samples, but the batch has {len(x)}: "
                "give it for each sample, or once for all"
            )
        value = value.expand(len(x), *value.shape[1:])
        dtype = x.dtype if value.is_floating_point() else value.dtype
        found[kind] = value.to(x.device, dtype)
    return found


class Dropping(NamedTuple):
    """How often a condition is dropped in training, and the null of each, by name, instead.

    Conditions that are `kept` are never dropped.
    """

    rate: float = 0.0
    null: Mapping[str, float] = UNCONDITIONAL
    kept: tuple[str, ...] = ()

    def apply(self, condition: Condition, where: Tensor | None) -> Condition:
        """The condition, with nulls for the samples where (B,) holds; None drops nothing."""
        if where is None:
            return condition
        return {
            kind: value if kind in self.kept else replaced(value, self.null[kind], where)
            for kind, value in condition.items()
        }


NEVER = Dropping()


def replaced(value: Tensor, null: Tensor | float, where: Tensor) -> Tensor:
    """A condition, (B, ...), with the null in place of samples, where (B,) holds."""
    # A number is filled in on the device: to copy it there would wait for the device in each step.
    null = null.to(value) if isinstance(null, Tensor) else value.new_full((), null)
    where = where.reshape(-1, *[1] * (value.dim() - 1))
    return torch.where(where, null, value)
