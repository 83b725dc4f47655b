"""Checks of processes, samplers and likelihoods against exact answers, for your own tests.

Behind this door: `score_lib.checks`.  Each check returns findings, "ok", "note" or "wrong":

    assert checks.worst(checks.process(MySDE())) == "ok"
"""

from score_lib.checks.exact import binary, gaussian, told_by_time
from score_lib.checks.finding import Finding, worst
from score_lib.checks.likelihood import log_likelihood
from score_lib.checks.process import process
from score_lib.checks.sampling import corrector, order, order_of_steps, restoration, sampler
