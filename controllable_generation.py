"""Conditional samples from an unconditional model, and its latent space.  [S21, section 5]

Behind this door: `score_lib.inverse`.  A constraint sets where sampling starts, guides the score or
wraps the steps of the sampling loop; constraints can be combined.
"""

from score_lib.inverse.classes import ClassGuidance
from score_lib.inverse.configured import get_operator, get_restoration
from score_lib.inverse.consistency import DataConsistency
from score_lib.inverse.editing import StartFrom
from score_lib.inverse.latent import (
    Correlation,
    Reconstruction,
    code_correlation,
    get_decoder,
    get_encoder,
    get_reconstructor,
    interpolate,
    temper,
)
from score_lib.inverse.masks import Mask, PartialIsometry, RandomProjection
from score_lib.inverse.measured import Measured, register_restoration
from score_lib.inverse.operators import LinearOperator, measure, register_operator
from score_lib.inverse.posterior import (
    DiffusionPosteriorSampling,
    PosteriorGuidance,
    PseudoInverseGuidance,
    TweedieGuidance,
)
from score_lib.inverse.published import (
    get_pc_colorizer,
    get_pc_conditional_sampler,
    get_pc_editor,
    get_pc_inpainter,
    get_pc_restorer,
    pc_factory,
)
from score_lib.inverse.separable import (
    GaussianBlur,
    GrayScale,
    MatrixOperator,
    Separable,
    SuperResolution,
)
