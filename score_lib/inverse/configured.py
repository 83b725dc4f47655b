"""From a name, or a config, to an operator or a restoration method."""

from score_lib.inverse import (  # noqa: F401  (they register what they define)
    consistency,
    masks,
    posterior,
    separable,
)
from score_lib.inverse.measured import RESTORATIONS
from score_lib.inverse.operators import OPERATORS

get_operator, build_operator = OPERATORS.get, OPERATORS.build
get_restoration, build_restoration = RESTORATIONS.get, RESTORATIONS.build
