"""Samplers for conditional generation, with the published signatures.  [S21, appendix I]"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from score_lib.base.tensors import check_floats
from score_lib.inverse.conditions import ClassGuidance, StartFrom
from score_lib.inverse.measurements import GrayScale, Mask
from score_lib.inverse.operators import LinearOperator
from score_lib.inverse.restoration import (
    DataConsistency,
    PublishedGray,
    get_restoration,
)
from score_lib.samplers.loop import Constraint
from score_lib.samplers.pc import get_pc_sampler
from score_lib.samplers.steps import Corrector, Predictor
from score_lib.sdes.process import SDE

# A constraint, the shape (B, *D) of the samples, and their device (None: the network's).
Constrained = tuple[Constraint, Sequence[int], torch.device | None]


def pc_factory(constrain: Callable[..., Constrained]) -> Callable:
    """Decorator: from a function of a sampler's input to a factory of samplers.

    Args:
        constrain: takes the input of the samplers after the model.
    Returns:
        A factory with the arguments of `sampling.get_pc_sampler` except the shape.  It returns
        `sampler(model, ..., *, noise=None, progress=False, callback=None)`, which gives images
        (B, *D) in [0, 1].
    """

    def factory(
        sde: SDE,
        predictor: type[Predictor] | None,
        corrector: type[Corrector] | None,
        inverse_scaler: Callable,
        snr: float,
        n_steps: int = 1,
        probability_flow: bool = False,
        continuous: bool = False,
        denoise: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        **options,
    ) -> Callable:
        settings = (predictor, corrector, inverse_scaler, snr, n_steps)
        settings += (probability_flow, continuous, denoise, eps)

        def sampler(model, *given, noise=None, progress=False, callback=None, **named) -> Tensor:
            constraint, shape, place = constrain(*given, **named)
            sample = get_pc_sampler(
                sde, shape, *settings, device or place, constraints=[constraint], **options
            )
            return sample(model, noise=noise, progress=progress, callback=callback)[0]

        return sampler

    factory.__name__, factory.__doc__ = constrain.__name__, constrain.__doc__
    return factory


@pc_factory
def get_pc_inpainter(data: Tensor, mask: Tensor) -> Constrained:
    """Fill in the open part of a mask: `inpainter(model, data, mask)`.  [S21, appendix I.2]

    data (B, *D) is in the network's range, and mask is 1 where it is known; data are ignored
    where the mask is 0.  Further arguments: see `pc_factory`.
    """
    check_floats("the data", data)
    operator = Mask(data.shape[1:], torch.as_tensor(mask, device=data.device))
    return DataConsistency(operator, operator.apply(data)), data.shape, data.device


@pc_factory
def get_pc_colorizer(gray_scale_img: Tensor) -> Constrained:
    """Colour gray images: `colorizer(model, gray_scale_img)`.  [S21, appendix I.3]

    The gray images (B, C, *D) have equal channels, in the network's range.  Further arguments: see
    `pc_factory`.
    """
    check_floats("a gray image", gray_scale_img)
    if gray_scale_img.dim() < 2 or not torch.allclose(
        gray_scale_img, gray_scale_img[:, :1], rtol=0, atol=1e-3
    ):
        raise ValueError(
            "gray images are (B, C, *D) with equal channels, as many as the network's: from images "
            "of one channel, x.expand(-1, C, -1, -1); these have shape "
            f"{tuple(gray_scale_img.shape)}"
        )
    operator = GrayScale(gray_scale_img.shape[1:])
    constraint = PublishedGray(operator, operator.apply(gray_scale_img))
    return constraint, gray_scale_img.shape, gray_scale_img.device


@pc_factory
def get_pc_restorer(
    operator: LinearOperator,
    measurement: Tensor,
    noise_std: float = 0.0,
    *,
    method: str = "tweedie",
    **settings,
) -> Constrained:
    """Solve a linear inverse problem: `restorer(model, operator, measurement, noise_std=0.0, *,
    method="tweedie", **settings)`.

    measurement (B, *M) is of data in the network's range, with noise of standard deviation
    noise_std; method is the name of a restoration method, and settings are its own.  Further
    arguments: see `pc_factory`.
    """
    constraint = get_restoration(method)(operator, measurement, noise_std, **settings)
    return constraint, (len(measurement), *operator.shape), measurement.device


@pc_factory
def get_pc_editor(data: Tensor) -> Constrained:
    """Edit images: `editor(model, data)`, from x_t of data at `start_time`.  [SDEdit]

    data (B, *D) is in the network's range.  The option start_time of the factory says how much of
    it is forgotten: nothing at 0, all at T.  Further arguments: see `pc_factory`.
    """
    return StartFrom(data), data.shape, data.device


def get_pc_conditional_sampler(
    sde: SDE,
    classifier: Callable,
    shape: Sequence[int],
    *settings,
    guidance_scale: float = 1.0,
    classifier_continuous: bool = True,
    **options,
) -> Callable:
    """Samples of given classes: `sampler(model, labels)`.  [S21, section 5 and appendix I.1]

    For the ODE, give `sampling.get_ode_sampler` a `ClassGuidance`.

    Args:
        classifier, guidance_scale: see `ClassGuidance`; classifier_continuous: its `continuous`.
        shape: shape of a batch of samples, (B, *D).
        settings, options: the predictor and all further arguments of a factory, see `pc_factory`.
    """

    def constrain(labels: Tensor) -> Constrained:
        told = {"continuous": classifier_continuous}
        return ClassGuidance(classifier, labels, guidance_scale, **told), shape, None

    return pc_factory(constrain)(sde, *settings, **options)
