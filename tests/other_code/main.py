"""A purifier and trainer as public projects have them, on modules of ours."""

import pathlib
import sys

import foreign_sde as sde_lib
import torch

import losses
import sampling
import utils
from configs.vp.digits import get_config
from likelihood import get_likelihood_fn
from models import ncsnpp  # noqa: F401  (registers the network)
from models import utils as mutils
from models.ema import ExponentialMovingAverage

folder = pathlib.Path(sys.argv[1])
torch.manual_seed(0)

# A config of ml_collections for the data, turned into namespaces for the rest.
config = get_config()
config.device = torch.device("cpu")
config.update_from_flattened_dict({"model.nf": 8, "model.num_scales": 25, "model.dropout": 0.0})
args = utils.as_namespace(config.to_dict())
x = torch.rand(2, 1, 8, 8).to(args.device) * 2 - 1


def new_state():
    model = torch.nn.DataParallel(mutils.create_model(args))
    ema = ExponentialMovingAverage(model.parameters(), decay=args.model.ema_rate)
    optimizer = losses.get_optimizer(args, model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    return dict(model=model, ema=ema, optimizer=optimizer, scheduler=scheduler, step=0)


# Training with a process of the project's own and a scheduler, then a restart.
sde = sde_lib.VPSDE(args.model.beta_min, args.model.beta_max, args.model.num_scales)
state = new_state()
train_step = losses.get_step_fn(sde, True, losses.optimization_manager(args), reduce_mean=True)
for _ in range(3):
    assert train_step(state, x).isfinite()
    state["scheduler"].step()
utils.save_checkpoint(folder / "checkpoint.pth", state)
again = utils.restore_checkpoint(folder / "checkpoint.pth", new_state(), args.device)
assert again["step"] == 3 and again["scheduler"].last_epoch == 3
assert isinstance(again["scheduler"], torch.optim.lr_scheduler.StepLR)

# The weights alone, read without a wrapper and without looking at what is missing.
weights = torch.load(folder / "checkpoint.pth", map_location=config.device)["model"]
assert all(name.startswith("module.") for name in weights)
model = mutils.get_model(args.model.name)(args).to(config.device).eval()
model.load_state_dict(weights, strict=False)
t = torch.full((2,), 0.5, device=config.device)
score_fn = mutils.get_score_fn(sde, model, train=False, continuous=True)
expected = mutils.get_score_fn(sde, state["model"], train=False, continuous=True)(x, t)
assert torch.equal(score_fn(x, t), expected)

# Gradients through the network: for an attack, and of its own gradient.
image = x.clone().requires_grad_()
loss = score_fn(image, t).square().sum()
(gradient,) = torch.autograd.grad(loss, image, create_graph=True)
(curvature,) = torch.autograd.grad(gradient.square().sum(), image)
assert gradient.abs().sum() > 0 and curvature.isfinite().all()
divergence = torch.func.jvp(lambda x: score_fn(x, t), (x,), (torch.ones_like(x),))[1]
assert divergence.shape == x.shape

# Samples and likelihoods.
settings = sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, lambda x: (x + 1) / 2
sampler = sampling.get_pc_sampler(
    sde, x.shape, *settings, snr=0.16, continuous=True, device=config.device
)
samples, evaluations = sampler(model)
assert samples.isfinite().all() and evaluations == 2 * sde.N
bpd, z, _ = get_likelihood_fn(sde, settings[2], rtol=1e-3, atol=1e-3)(model, x)
assert bpd.isfinite().all() and z.shape == x.shape
print("done")
