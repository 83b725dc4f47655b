"""Losses of score networks and noisy classifiers, and the optimisation step.  [S21, appendix C]

Behind this door: `score_lib.losses`.
"""

from score_lib.losses.classifier import ClassifierLoss, get_classifier_loss_fn
from score_lib.losses.denoising import (
    DenoisingLoss,
    get_ddpm_loss_fn,
    get_sde_loss_fn,
    get_smld_loss_fn,
)
from score_lib.losses.noise_levels import ContinuousLevels, DiscreteLevels, NoiseLevels
from score_lib.losses.noisy import Draws, NoisyLoss
from score_lib.losses.optimization import (
    LossGuard,
    get_optimizer,
    learning_rate,
    optimization_manager,
)
from score_lib.losses.steps import get_loss_fn, get_step_fn
