"""Settings that every test shares."""

import collections
import logging
import os
import signal
import sys
import types

# Tests run several at a time on few cores; threads of their own would only get in each other's way,
# and forks of a process with OpenMP's threads wait for ever.  OpenMP reads it when torch loads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Shells let programs in the background ignore Ctrl-C, and so would those that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Of the cases of a test, as many are in the quick subset unless its mark gives another number.
QUICK_CASES = 2


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A GPU is seen by tests with the mark, their fixtures and processes; the others know what a
    CPU gives."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("gpu"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


@pytest.fixture(autouse=True)
def own_seed():
    """A test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_log_level():
    """The level that a program sets for its log ends with the test that calls the program."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def tf():
    """TensorFlow; tests that need it are skipped without it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return pytest.importorskip("tensorflow")


@pytest.fixture(scope="session")
def tfgan(tf):
    """TF-GAN's metrics."""
    # TF-GAN imports a part of TensorFlow that no longer exists, but does not use it for metrics.
    tf.estimator = types.SimpleNamespace(SessionRunHook=tf.compat.v1.train.SessionRunHook)
    sys.modules["tensorflow_gan.python.estimator"] = types.ModuleType("estimator")
    pytest.importorskip("tensorflow_gan")
    from tensorflow_gan.python.eval import classifier_metrics

    return classifier_metrics


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marks
def pytest_collection_modifyitems(items):
    """Cases of a test after its first QUICK_CASES, or `quick_cases(n)` by its mark, are slow."""
    seen = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("quick_cases")
        seen[item.function] += 1
        if seen[item.function] > (mark.args[0] if mark else QUICK_CASES):
            item.add_marker(pytest.mark.slow)
