"""Conditional samples from an unconditional model, and its latent space.  [S21, section 5]

Behind this door: `score_lib.inverse`.  A constraint sets where sampling starts, guides the score or
wraps the steps of the sampling loop; constraints can be combined.
"""

from score_lib.inverse.conditions import ClassGuidance, StartFrom
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
from score_lib.inverse.measurements import (
    GaussianBlur,
    GrayScale,
    Mask,
    MatrixOperator,
    PartialIsometry,
    RandomProjection,
    Separable,
    SuperResolution,
    get_operator,
)
from score_lib.inverse.operators import (
    LinearOperator,
    measure,
    register_operator,
)
from score_lib.inverse.published import (
    get_pc_colorizer,
    get_pc_conditional_sampler,
    get_pc_editor,
    get_pc_inpainter,
    get_pc_restorer,
    pc_factory,
)
from score_lib.inverse.restoration import (
    DataConsistency,
    DiffusionPosteriorSampling,
    Measured,
    PosteriorGuidance,
    PseudoInverseGuidance,
    TweedieGuidance,
    get_restoration,
    register_restoration,
)
from score_lib.samplers.pc import shared_corrector_update_fn, shared_predictor_update_fn
