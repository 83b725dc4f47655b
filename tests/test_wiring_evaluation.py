"""Options of an evaluation arrive where they should; see `test_wiring`."""

import math

import numpy as np
import pytest
import torch
from recorder import Recorder
from test_wiring import edm, recording

import run_lib
from likelihood import bits_per_dim, get_elbo_fn
from sampling import SampleNoise
from score_lib.base.tensors import derive_seed
from score_lib.disk.checkpoints import read_checkpoint
from score_lib.runs import measures
from score_lib.runs.heldout import HeldOut


def likelihood_terms(**changes):
    run = run_lib.setup(recording(**changes))
    images = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    return measures.likelihood_terms(run, images, 17, SampleNoise(0, range(2)))


def test_parametrization_arrives_in_the_likelihood():
    """The network is told log(sigma) / 4, up to sigma(1) = 152 of the VP process."""
    published, ours = likelihood_terms(), likelihood_terms(**edm())
    labels = torch.cat([call.labels for call in Recorder.calls])
    assert abs(labels.max() - math.log(152.17) / 4) < 1e-3 and labels.min() < 0
    assert not np.allclose(published["total"], ours["total"], rtol=1e-3)
    other = likelihood_terms(**edm(model__sigma_data=0.3))
    assert not np.allclose(other["total"], ours["total"], rtol=1e-3)


def test_options_of_the_likelihood_arrive():
    one, several = likelihood_terms(), likelihood_terms(eval__num_probes=3)
    assert np.isnan(one["standard_error"]).all()
    assert np.isfinite(several["standard_error"]).all()
    exact = likelihood_terms(eval__hutchinson_type="exact")
    assert (exact["standard_error"] == 0).all()
    gaussian = likelihood_terms(eval__hutchinson_type="Gaussian")
    # A multiple of x has the same divergence along every Rademacher probe, but not Gaussian ones.
    np.testing.assert_allclose(one["divergence"], exact["divergence"], rtol=1e-5)
    assert not np.allclose(gaussian["divergence"], exact["divergence"], rtol=1e-3)


def test_options_of_the_bound_arrive(tmp_path):
    """The averaged weights, the times, the examples and the seed: by hand, the same figure."""
    options = {"eval__end_ckpt": 1, "eval__begin_ckpt": 1, "eval__enable_loss": False}
    options |= {"eval__enable_elbo": True, "eval__elbo_num_times": 3, "eval__batch_size": 200}
    config = recording(training__snapshot_sampling=False, **options)
    run_lib.train(config, tmp_path)
    (record,) = run_lib.evaluate(config, tmp_path)
    config.eval.checkpoint = str(tmp_path / "checkpoints" / "checkpoint_1.pth")
    run, seed, bpd = run_lib.restored(config, tmp_path), derive_seed(42, "elbo", 0), []
    data = HeldOut(run, "test", True, seed)
    with run.state["ema"].applied(run.state["model"].parameters()):
        for number in range(2):
            noise = SampleNoise(seed, data.indices(number))
            bound = get_elbo_fn(run.sde, num_times=3)
            total = bound(run.state["model"], data.read(number)[0], noise=noise).total
            bpd.append(bits_per_dim(total, 64, run.inverse_scaler, 17))
    values = torch.cat(bpd)
    assert len(values) == 296 and record["elbo_bpd"] == pytest.approx(float(values.mean()))
    expected = float(values.std() / len(values) ** 0.5)
    assert record["elbo_bpd_standard_error"] == pytest.approx(expected)


@pytest.mark.slow
def test_options_of_an_evaluation_arrive(tmp_path):
    """Passes, batches and parts of the data, seen from the files and from the network."""
    changes = {"eval__loss_num_repeats": 2, "eval__bpd_num_repeats": 3, "eval__batch_size": 150}
    changes |= {"eval__dataset": "train", "eval__enable_sampling": False, "eval__begin_ckpt": 2}
    config = recording(eval__end_ckpt=2, training__snapshot_sampling=False, **changes)
    config.data.path = ""
    run_lib.train(config, tmp_path)
    Recorder.calls.clear()
    run_lib.evaluate(config, tmp_path)
    sizes = [len(call.x) for call in Recorder.calls if len(call.x) > 1]
    assert sizes[:5] == [16, 150, 146, 150, 146][1:] + [150]  # two passes over 296, then 1,501
    files = list((tmp_path / "eval").glob("train_ckpt_2_bpd_*.npz"))
    assert len(files) == 3 * 11
    average = read_checkpoint(tmp_path / "checkpoints" / "checkpoint_2.pth")["ema"]
    weights = {call.weight for call in Recorder.calls if len(call.x) > 1}
    assert weights == {float(average["shadow_params"][0])}
