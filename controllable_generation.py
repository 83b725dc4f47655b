"""Conditional samples from an unconditional model.  [S21, section 5 and appendix I]

Behind this door: `score_lib.inverse`.
"""

from score_lib.inverse.methods import (
    ClassGuidance,
    DataConsistency,
    DiffusionPosteriorSampling,
    Measured,
    PosteriorGuidance,
    PseudoInverseGuidance,
    StartFrom,
    TweedieGuidance,
    get_pc_colorizer,
    get_pc_conditional_sampler,
    get_pc_editor,
    get_pc_inpainter,
    get_pc_restorer,
    get_restoration,
    pc_factory,
    register_restoration,
)

__all__ = [
    "ClassGuidance",
    "DataConsistency",
    "DiffusionPosteriorSampling",
    "Measured",
    "PosteriorGuidance",
    "PseudoInverseGuidance",
    "StartFrom",
    "TweedieGuidance",
    "get_pc_colorizer",
    "get_pc_conditional_sampler",
    "get_pc_editor",
    "get_pc_inpainter",
    "get_pc_restorer",
    "get_restoration",
    "pc_factory",
    "register_restoration",
]
