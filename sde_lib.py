"""Forward processes (VE, VP, sub-VP, cosine, your own) and their time reversal.  [S21, section 3.4]

Behind this door: `score_lib.sdes`.  Your own process subclasses `LinearSDE` (three functions of
time) or `SDE`; `register_sde` makes it available to configs.
"""

from score_lib.base.tensors import batch_mul
from score_lib.sdes.process import SDE, LinearSDE, ReverseSDE, register_sde
from score_lib.sdes.published import (
    VESDE,
    VPSDE,
    CosineVPSDE,
    create_sde,
    get_sde,
    registered_sdes,
    subVPSDE,
)
