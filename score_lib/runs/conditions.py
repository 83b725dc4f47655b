"""The conditions that a run gives its network: those of data, and those of samples by number."""

import functools
import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from models.conditioning import conditions_of
from score_lib.data.kinds import is_continuous
from score_lib.data.loading import get_streams
from score_lib.data.sources import Source, named
from score_lib.inverse.measurements import build_operator
from score_lib.inverse.operators import OPERATORS, LinearOperator
from score_lib.options import Config, complete, flatten


class Conditions:
    """The conditions that `training.condition` names.

    - classes: the labels of data; sample k has `sampling.classes`[k], counted in turns.
    - image: a measurement of a picture, `training.condition_operator`; that of sample k is of
      held-out picture k, counted in turns.
    - features: what the data give, or zeros, as all samples have.

    Args:
        config: complete and checked.
        shape: of one example, such as (C, H, W).
        scaler: from the data to the network's range.
    """

    def __init__(
        self,
        config: ConfigDict,
        shape: tuple[int, ...],
        scaler: Callable[[Tensor], Tensor],
        device: torch.device,
    ):
        self.config, self.shape, self.scaler, self.device = config, shape, scaler, device
        self.kinds, self.continuous = conditions_of(config), is_continuous(config)
        # Built at once, so that options that do not fit are refused early.
        self.operator = condition_operator(config, shape) if "image" in self.kinds else None

    def of_data(
        self,
        images: Tensor,
        labels: Tensor | None,
        features: Tensor | None = None,
        *,
        dequantized: bool | None = None,
    ) -> dict[str, Tensor]:
        """The condition of a batch.

        Args:
            images: (B, *D), in [0, 1], stored or dequantised, or continuous values.
            labels: (B,) int64.
            features: (B, K).
            dequantized: whether the images are; default: `data.uniform_dequantization`.
        Raises:
            ValueError: labels are needed, and there are none.
        """
        found = {}
        if "classes" in self.kinds:
            if labels is None:
                raise ValueError(
                    "the network is conditional on classes, and these images have no labels: set "
                    "control.labels to a class for each, or to one for all"
                )
            found["classes"] = labels.to(images.device)
        if "image" in self.kinds:
            default = self.config.data.uniform_dequantization
            found["image"] = self._measured(images, default if dequantized is None else dequantized)
        if "features" in self.kinds:
            zeros = images.new_zeros(len(images), self.config.model.num_features)
            found["features"] = zeros if features is None else features
        return found

    def of_samples(self, indices: range, class_to_idx: Mapping[str, int]) -> dict[str, Tensor]:
        """The condition of samples by their numbers.

        Args:
            class_to_idx: names of classes that `sampling.classes` may use.
        Raises:
            ValueError: an unknown class.
        """
        if not self.kinds:
            return {}
        labels = self.classes_of_samples(indices, class_to_idx)
        images = torch.zeros(len(indices), *self.shape)
        if "image" in self.kinds:
            numbers = np.array(indices) % len(self._held_out)
            images = self._held_out.images(numbers)
            images = images if self.continuous else images / (self._held_out.levels - 1)
        return self.of_data(images.to(self.device), labels, dequantized=False)

    def classes_of_samples(self, indices: range, class_to_idx: Mapping[str, int]) -> Tensor | None:
        """The classes of samples by their numbers, (B,); None if there are none."""
        if "classes" not in self.kinds:
            return None
        option, count = "sampling.classes", self.config.data.num_classes
        wanted = class_numbers(self.config, option, class_to_idx)
        classes = torch.tensor(wanted or range(count))
        check_classes(option, classes, count)
        return classes[torch.tensor(indices) % len(classes)]

    @functools.cached_property
    def _held_out(self) -> Source:
        return get_streams(self.config, evaluation=True)[2].sources["test"]

    def _measured(self, images: Tensor, dequantized: bool) -> Tensor:
        """The condition's image of pictures in [0, 1], in the network's range, (B, C, h, w).

        It is a function of the grey levels alone.  If it knew the noise of dequantisation, part of
        the picture would follow from it, with an infinite density.
        """
        levels = self.config.data.levels or 256
        if dequantized:
            images = (images * levels).floor().clamp(0, levels - 1) / (levels - 1)
        return self.of_measurement(
            self.operator.apply(self.scaler(as_known(self.config, images, levels)))
        )

    def of_measurement(self, y: Tensor) -> Tensor:
        """The condition's image of a measurement in the network's range, (B, C, h, w).

        Args:
            y: by `operator`, (B, *M); perhaps with noise.
        """
        if y.dim() == 1 + len(self.shape) and y.shape[1] == self.shape[0]:
            return y
        fill = 0.0 if self.continuous else self.scaler(torch.tensor(0.5)).item()
        return self.operator.picture(y, fill=fill)


def condition_operator(config: ConfigDict, shape: tuple[int, ...]) -> LinearOperator:
    """The measurement that makes the condition "image"; its options are their defaults.

    Raises:
        ValueError: an unknown operator, or one that does not suit the shape.
    """
    return build_operator(config.training.condition_operator, _operator_options(config), shape)


def check_told_operator(config: ConfigDict) -> None:
    """Refuse options of another measurement than that of the condition "image".

    The network would know two, of which an image that is to be restored gives one.  Options that
    have their defaults are taken, as nobody may have set them.

    Raises:
        ValueError: `control.mask`, `control.operator` or an option of the operator.
    """
    name, given = config.training.condition_operator, flatten(config)
    trained, defaults = flatten(_operator_options(config)), flatten(complete({}))
    allowed = {"control.mask": "", "control.operator": name}
    allowed |= {option: trained[option] for option in OPERATORS.feeds(name).values()}
    if given["control.operator"].lower() == name.lower():  # registries take any case
        given["control.operator"] = name
    for option, value in allowed.items():
        if given[option] not in (value, defaults.get(option, value)):
            raise ValueError(
                f"{option} = {given[option]!r} should be {value!r}, as the network is told the "
                f"measurement of training.condition_operator = {name!r}"
            )


def _operator_options(config: ConfigDict) -> Config:
    training = config.training
    return complete({"control": {"factor": training.condition_factor}, "data": config.data})


def as_known(config: Config, images: Tensor, levels: int) -> Tensor:
    """Stored images in [0, 1] as the network knows them.

    Of dequantised data, a grey level is the middle of its cell.
    """
    if config.data.uniform_dequantization:
        return (images * (levels - 1) + 0.5) / levels
    return images


def class_numbers(config, option: str, class_to_idx: Mapping[str, int]) -> list[int]:
    """The classes of an option as numbers.

    Args:
        option: "sampling.classes" or "control.labels".
        class_to_idx: names that are known; if there are none, those of the data.
    Raises:
        ValueError: an unknown name, or a number that is the label of one class and another's name.
    """
    section, key = option.split(".")
    wanted, texts = config[section][key], []
    for label in wanted:  # a flag passes several names as one text
        texts += [part.strip() for part in label.split(",")] if isinstance(label, str) else [label]
    for label in texts:
        if not isinstance(label, str) and class_to_idx.get(str(label), label) != label:
            raise ValueError(
                f"{option} = {tuple(wanted)} may mean the class called '{label}', which has the "
                f"label {class_to_idx[str(label)]}, or the label {label}: name all classes in "
                f"quotes, as in --config.{option}=\"'{label}'\""
            )
    if not any(isinstance(label, str) for label in texts):
        return texts
    known = class_to_idx or get_streams(config, evaluation=True)[2].class_to_idx
    if unknown := [label for label in texts if isinstance(label, str) and label not in known]:
        raise ValueError(
            f"{option} = {tuple(wanted)} names {', '.join(map(repr, unknown))}, but the "
            f"classes are {named(known) or 'numbers without names'}"
        )
    labels = [known.get(label, label) for label in texts]
    logging.info(
        "classes to draw: %s", ", ".join(f"{t} = {k}" for t, k in zip(texts, labels, strict=True))
    )
    return labels


def check_classes(option: str, labels: Tensor, classes: int) -> None:
    """Refuse classes that the network has not learned.

    Raises:
        ValueError: a number out of range.
    """
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"{option} = {tuple(labels.tolist())} should be classes of the network, whole "
            f"numbers from 0 to {classes - 1}"
        )
