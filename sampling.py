"""Sampling: predictor-corrector, probability-flow ODE, solvers, discrete chains.  [S21, section 4]

Behind this door: `score_lib.samplers`.  Every factory returns
`sample(model, z=None) -> (samples, function evaluations)`.

Noise is drawn in a fixed order: the prior, then at each time the corrector's noise (once a
corrector step), then the predictor's; a constraint that wraps a step draws after it.  Noise comes
from PyTorch's global generator, or from `noise`, a function like `torch.randn_like`; with
`SampleNoise(seed, indices)`, sample k is a function of the seed and k alone for every method that
treats samples apart.
"""

from score_lib.base.tensors import SampleNoise, batch_mul
from score_lib.samplers.adaptive import get_adaptive_sampler, get_ode_sampler
from score_lib.samplers.chain import get_chain_sampler, get_chain_step_fn
from score_lib.samplers.configured import get_sampling_fn, register_sampler, register_solver
from score_lib.samplers.grids import register_grid, time_grid, visited_times
from score_lib.samplers.loop import Constraint
from score_lib.samplers.pc import (
    get_pc_sampler,
    shared_corrector_update_fn,
    shared_predictor_update_fn,
)
from score_lib.samplers.respacing import kept_levels
from score_lib.samplers.solvers import (
    DDIM,
    DPMSolver2M,
    DPMSolver3M,
    DPMSolverSDE,
    Heun,
    Solver,
    get_solver_sampler,
)
from score_lib.samplers.steps import (
    AncestralSamplingPredictor,
    AnnealedLangevinDynamics,
    Corrector,
    EulerMaruyamaPredictor,
    LangevinCorrector,
    NoneCorrector,
    NonePredictor,
    Predictor,
    ReverseDiffusionPredictor,
    get_corrector,
    get_predictor,
    register_corrector,
    register_predictor,
)
from score_lib.scores import get_score_fn
