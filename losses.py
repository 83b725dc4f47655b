"""Losses of score networks and noisy classifiers, and the optimisation step.  [S21, appendix C]

Behind this door: `score_lib.losses`.
"""

from score_lib.losses.levels import (
    ContinuousLevels,
    DiscreteLevels,
    LikelihoodLevels,
    LogNormalLevels,
    NoiseLevels,
)
from score_lib.losses.objectives import (
    ClassifierLoss,
    DenoisingLoss,
    Draws,
    NoisyLoss,
    get_classifier_loss_fn,
    get_ddpm_loss_fn,
    get_loss_fn,
    get_sde_loss_fn,
    get_smld_loss_fn,
)
from score_lib.losses.optimization import (
    LossGuard,
    get_optimizer,
    learning_rate,
    optimization_manager,
)
from score_lib.losses.steps import get_step_fn
