"""Numbers of another kind or shape, such as complex ones, are refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from oracles import GaussianOracle
from ranks import METHODS

import controllable_generation as control
import evaluation
import likelihood
import losses
import sampling
from models.conditioning import Given, Guided
from models.utils import get_score_fn
from sampling import EulerMaruyamaPredictor, LangevinCorrector
from score_lib.base.ode import integrate
from score_lib.dequantization import UniformDequantization
from score_lib.disk.drawings import save_samples_picture
from score_lib.disk.pictures import make_grid, to_uint8
from score_lib.elbo import get_elbo_fn
from score_lib.inverse.restoration import RESTORATIONS
from score_lib.metrics import distances, point_sets, series
from score_lib.metrics.samples import energy_distance, sample_metrics
from score_lib.options import complete
from score_lib.samplers.configured import get_sampling_fn
from score_lib.vlb import get_vlb_fn
from sde_lib import VESDE, VPSDE, registered_sdes

SHAPE = (4, 3, 2, 2)
SDE_ = VPSDE(N=21)
ORACLE = GaussianOracle(SDE_)
# The reason, and the way out, of each message.
COMPLEX = (
    r"should hold real numbers, not torch.complex64: .* as two channels, as torch.view_as_real"
)
INTEGERS = r"should hold floating-point numbers .*, not torch.(int64|uint8): divide bytes by 255"


def real(shape):
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0))


def complex_numbers(shape):
    return torch.complex(real(shape), real(shape))


def sampler(method, sde=SDE_, shape=SHAPE):
    pc = {"predictor": "euler_maruyama", "corrector": "ald", "snr": 0.1, "n_steps_each": 1}
    options = {"method": method, "num_steps": 4 * (method != "pc"), "probability_flow": False}
    config = {"sampling": pc | options | {"noise_removal": True}, "training": {"continuous": True}}
    return get_sampling_fn(complete(ConfigDict(config)), sde, shape, lambda x: x, 1e-3)


def restorer(operator, y, method):
    restore = control.get_pc_restorer(
        SDE_, sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.1, continuous=True
    )
    return restore(ORACLE, operator, y, method=method)


def published(factory, *given):
    made = factory(SDE_, sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.1, continuous=True)
    return made(ORACLE, *given)


OPERATORS = {
    "mask": control.Mask.half(SHAPE[1:]),
    "super_resolution": control.SuperResolution(SHAPE[1:]),
    "projection": control.RandomProjection(SHAPE[1:], 3),
    "matrix": control.MatrixOperator(SHAPE[1:], real((3, 12))),
}
LOSSES = {
    "sde": losses.get_sde_loss_fn(SDE_, train=False),
    "smld": losses.get_smld_loss_fn(VESDE(N=10), train=False),
    "ddpm": losses.get_ddpm_loss_fn(SDE_, train=False),
    "classifier": losses.get_classifier_loss_fn(SDE_, train=False),
}
SETS, POINTS, ROWS = (20, 2, 8), (20, 5, 2), (20, 4)


def doors_of_data(bad):
    """Calls that take data x, as values that `bad(shape)` makes."""
    x = bad(SHAPE)
    calls = {f"z-{m}": lambda m=m: sampler(m)(ORACLE, x) for m in METHODS}
    calls |= {f"loss-{k}": lambda f=f: f(ORACLE, x, torch.arange(4)) for k, f in LOSSES.items()}
    for name, a in OPERATORS.items():
        y = bad((4, *a.measured_shape))
        calls |= {
            f"{name}-apply": lambda a=a: a.apply(x),
            f"{name}-adjoint": lambda a=a, y=y: a.adjoint(y),
            f"{name}-pinv": lambda a=a, y=y: a.pinv(y),
            f"{name}-spectral": lambda a=a: a.spectral(x, torch.ones_like),
            f"{name}-picture": lambda a=a, y=y: a.picture(y),
            f"{name}-measure": lambda a=a: control.measure(a, x, 0.1),
        }
        calls |= {f"{name}-{m}": lambda a=a, y=y, m=m: restorer(a, y, m) for m in RESTORATIONS}
    square, mask = bad((20, 20)), torch.ones(SHAPE[1:])
    return calls | {
        "likelihood": lambda: likelihood.get_likelihood_fn(SDE_, lambda x: x)(ORACLE, x),
        "elbo": lambda: get_elbo_fn(SDE_, num_times=2)(ORACLE, x),
        "vlb": lambda: get_vlb_fn(SDE_, lambda x: x)(ORACLE, x),
        "encoder": lambda: control.get_encoder(SDE_, lambda x: 2 * x - 1)(ORACLE, x),
        "decoder": lambda: control.get_decoder(SDE_, lambda x: x)(ORACLE, x),
        "reconstructor": lambda: control.get_reconstructor(SDE_, lambda x: x, lambda x: x)(
            ORACLE, x
        ),
        "interpolate": lambda: control.interpolate(real(SHAPE), x, [0.5]),
        "temper": lambda: control.temper(x, 0.5),
        "code_correlation": lambda: control.code_correlation(x, real(SHAPE)),
        "inpainter": lambda: published(control.get_pc_inpainter, x, mask),
        "colorizer": lambda: published(control.get_pc_colorizer, x),
        "editor": lambda: published(control.get_pc_editor, x),
        "dequantization": lambda: UniformDequantization(256)(x),
        "ode": lambda: integrate(lambda t, y: -y, x, 0.0, 1.0),
        "ode-host": lambda: integrate(lambda t, y: -y, x, 0.0, 1.0, method="RK23"),
        "samples": lambda: sample_metrics(bad(SETS), real(SETS)),
        "samples-array": lambda: energy_distance(real(SETS), bad(SETS).numpy()),
        "series": lambda: series.series_metrics(real(SETS), bad(SETS)),
        "spectrum": lambda: series.power_spectrum(bad(SETS)),
        "points": lambda: point_sets.point_set_metrics(bad(POINTS), real(POINTS)),
        "nearest": lambda: point_sets.nearest_neighbour_accuracy(square, square, square),
        "coverage": lambda: point_sets.coverage(square),
        "matching": lambda: point_sets.matching_distance(square),
        "grid": lambda: make_grid(x),
        "bytes": lambda: to_uint8(x),
        "picture": lambda: save_samples_picture("unwritten.png", x),
    }


def doors_of_numbers():
    """Calls that take other numbers, of which integers are as good as any."""
    bad = complex_numbers
    x, rows, mean = bad(SHAPE), bad(ROWS), bad((3,))

    def noise(like):
        return bad(like.shape)

    class Own(VPSDE):
        def prior_sampling(self, shape):
            return bad(shape)

    def classifier(x, label):
        return bad((4, 3))

    calls = {f"noise-{m}": lambda m=m: sampler(m)(ORACLE, noise=noise) for m in METHODS}
    calls |= {
        f"later-noise-{m}": lambda m=m: sampler(m)(ORACLE, real(SHAPE), noise=noise)
        for m in ("pc", "adaptive", "dpmpp_sde")
    }
    calls |= {f"prior-{m}": lambda m=m: sampler(m, Own(N=21))(ORACLE) for m in METHODS}
    calls |= {f"output-{m}": lambda m=m: sampler(m)(lambda x, t: bad(SHAPE)) for m in METHODS}
    calls |= {f"noise-{k}": lambda f=f: f.draw(real(SHAPE), noise) for k, f in LOSSES.items()}
    given = {"features": bad((4, 2))}
    moments = (torch.zeros(3), torch.eye(3))
    return calls | {
        "guidance": lambda: control.ClassGuidance(classifier, torch.arange(3)).guide(
            SDE_, lambda x, t: x
        )(real((3, *SHAPE[1:])), torch.ones(3)),
        "likelihood": lambda: likelihood.get_likelihood_fn(SDE_, lambda x: x)(
            ORACLE, real(SHAPE), noise=noise
        ),
        "elbo": lambda: get_elbo_fn(SDE_, num_times=2)(ORACLE, real(SHAPE), noise=noise),
        "vlb": lambda: get_vlb_fn(SDE_, lambda x: x)(ORACLE, real(SHAPE).round(), noise=noise),
        "measure": lambda: control.measure(OPERATORS["mask"], real(SHAPE), 0.1, noise),
        "matrix": lambda: control.MatrixOperator((12,), bad((3, 12))),
        "separable": lambda: control.Separable((4,), [bad((2, 4))]),
        "given": lambda: Given(ORACLE, **given),
        "guided": lambda: Guided(ORACLE, given, {"features": 0.0}, 2.0),
        "fid": lambda: evaluation.fid(real(ROWS), rows),
        "kid": lambda: evaluation.kid(rows.numpy(), real(ROWS)),
        "inception_score": lambda: distances.inception_score(rows),
        "precision": lambda: evaluation.precision_recall(rows, real(ROWS)),
        "mean": lambda: evaluation.frechet_distance((mean, moments[1]), moments),
        "covariance": lambda: evaluation.frechet_distance(
            moments, (moments[0], moments[1].to(x.dtype))
        ),
    }


def integers(shape):
    return torch.arange(np.prod(shape, dtype=int)).reshape(tuple(shape)) % 3


def doors_of_networks(model):
    """Calls that read a network, for data of one entry."""
    x, labels = real((4, 1)), torch.zeros(4, dtype=torch.int64)
    calls = {f"sampler-{m}": lambda m=m: sampler(m, shape=x.shape)(model) for m in METHODS}
    calls |= {f"loss-{name}": lambda f=f: f(model, x, labels) for name, f in LOSSES.items()}
    return calls | {
        "likelihood": lambda: likelihood.get_likelihood_fn(SDE_, lambda x: x)(model, x),
        "elbo": lambda: get_elbo_fn(SDE_, num_times=2)(model, x),
        "vlb": lambda: get_vlb_fn(SDE_, lambda x: x)(model, x.round()),
    }


@pytest.mark.parametrize("name", sorted(set(doors_of_networks(None)) - {"loss-classifier"}))
def test_an_output_of_another_shape_is_not_broadcast(name):
    """(4,) less (4, 1) would be (4, 4): samples of another shape, and a wrong loss."""
    with pytest.raises(ValueError, match=r"the network gives \(4,\) for data of \(4, 1\)"):
        doors_of_networks(lambda x, labels: ORACLE(x, labels).squeeze(-1))[name]()


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
def test_a_condition_may_be_joined_to_the_data(sde):
    """A user's own loop gives data and condition, and gets a score of the data."""
    t = torch.tensor([0.3, 0.6])
    for shape in ((2, 1, 4, 4), (2, 1)):
        data, condition = real(shape), real(shape)

        def network(x, labels):
            assert x.shape[1] == 2
            return x[:, :1]

        score = get_score_fn(sde, network, continuous=True)(torch.cat([data, condition], 1), t)
        expected = get_score_fn(sde, lambda x, labels: x, continuous=True)(data, t)
        torch.testing.assert_close(score, expected)
        x = torch.cat([data, condition], dim=1)
        for step, settings in (
            (sampling.shared_predictor_update_fn, (EulerMaruyamaPredictor, False, True)),
            (sampling.shared_corrector_update_fn, (LangevinCorrector, True, 0.1, 1)),
        ):
            with pytest.raises(ValueError, match="its output should have the shape of its input"):
                step(x, t, sde, network, *settings)


def test_a_score_is_computed_on_the_meta_device():
    """Where there are shapes alone, so that values cannot be compared."""
    with torch.device("meta"):
        x, t = torch.zeros(3, 2), torch.zeros(3)
        assert get_score_fn(VPSDE(), lambda x, labels: x, continuous=True)(x, t).is_meta


@pytest.mark.parametrize("channels", (1, 2))
def test_a_step_takes_scores_of_its_data_alone(channels):
    """Of one channel, it was added to all; also in a user's own loop."""
    score_fn = get_score_fn(SDE_, lambda x, labels: x[:, :channels], continuous=True)
    predictors = map(sampling.get_predictor, ("euler_maruyama", "reverse_diffusion"))
    made = [kind(SDE_, score_fn) for kind in (*predictors, sampling.AncestralSamplingPredictor)]
    made += [sampling.get_corrector(name)(SDE_, score_fn, 0.1, 1) for name in ("langevin", "ald")]
    for step in (*(one.update_fn for one in made), SDE_.reverse(score_fn, True).sde):
        with pytest.raises(ValueError, match=rf"score has the shape \(2, {channels}\) .* \(2, 3\)"):
            step(real((2, 3)), torch.tensor([0.3, 0.6]))


def test_a_predictor_of_ones_own_may_join_a_condition_to_the_data():
    class Joined(sampling.Predictor):
        def update_fn(self, x, t):
            x = x + 0.1 * self.score_fn(torch.cat([x, torch.ones_like(x)], dim=1), t)
            return x, x

    score_fn = get_score_fn(SDE_, lambda x, labels: x[:, :1] + x[:, 1:], continuous=True)
    x, t = real((2, 1)), torch.tensor([0.3, 0.6])
    expected = x + 0.1 * SDE_.to_score(x + 1, t, True)
    torch.testing.assert_close(Joined(SDE_, score_fn).update_fn(x, t)[0], expected)


@pytest.mark.parametrize("shape", ((2, 4), (3, 2), (2, 2, 1), (2,)), ids=str)
def test_an_output_has_no_more_than_the_channels_of_the_data(shape):
    score_fn = get_score_fn(SDE_, lambda x, labels: real(shape), continuous=True)
    with pytest.raises(ValueError, match="its output should have the shape of its input"):
        score_fn(real((2, 3)), torch.tensor([0.3, 0.6]))


@pytest.mark.parametrize("name", doors_of_networks(None))
def test_an_output_is_a_tensor(name):
    with pytest.raises(ValueError, match="the network's output should be a tensor, not tuple"):
        doors_of_networks(lambda x, labels: (ORACLE(x, labels), None))[name]()


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_not_shared_by_samples(method):
    with pytest.raises(ValueError, match=r"noise like x of \(4, 3, 2, 2\) .*, not \(3, 2, 2\)"):
        sampler(method)(ORACLE, noise=lambda like: real(like.shape[1:]))
    for loss_fn in LOSSES.values():
        with pytest.raises(ValueError, match=r"noise like x of \(4,\) .*, not \(1,\)"):
            loss_fn.draw(real(SHAPE), lambda like: real((1, *like.shape[1:])))


def test_data_are_tensors():
    with pytest.raises(ValueError, match="the data should be a tensor, not ndarray"):
        likelihood.get_likelihood_fn(SDE_, lambda x: x)(ORACLE, np.zeros((4, 1)))


@pytest.mark.parametrize("name", doors_of_data(complex_numbers))
def test_data_are_real_numbers(name):
    with pytest.raises(ValueError, match=COMPLEX):
        doors_of_data(complex_numbers)[name]()
    for bad in (integers, lambda shape: integers(shape).byte()):
        with pytest.raises(ValueError, match=INTEGERS):
            doors_of_data(bad)[name]()


@pytest.mark.parametrize("name", doors_of_numbers())
def test_noise_outputs_and_features_are_real_numbers(name):
    with pytest.raises(ValueError, match=COMPLEX):
        doors_of_numbers()[name]()
