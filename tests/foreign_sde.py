"""Processes of other code bases: the published methods, for images, and nothing of ours."""

import math

import torch


def wide(a):
    return a[:, None, None, None]


class SDE:
    """The base class: discretisation by Euler-Maruyama, and time reversal."""

    def __init__(self, N):
        super().__init__()
        self.N = N

    @property
    def T(self):
        return 1

    def discretize(self, x, t):
        dt = 1 / self.N
        drift, diffusion = self.sde(x, t)
        return drift * dt, diffusion * math.sqrt(dt)

    def reverse(self, score_fn, probability_flow=False):
        N, T, forward, chain = self.N, self.T, self.sde, self.discretize
        share = 0.5 if probability_flow else 1.0

        class Reverse(self.__class__):
            def __init__(self):
                self.N, self.probability_flow = N, probability_flow

            @property
            def T(self):
                return T

            def sde(self, x, t):
                drift, diffusion = forward(x, t)
                drift = drift - wide(diffusion**2) * score_fn(x, t) * share
                return drift, 0.0 if probability_flow else diffusion

            def discretize(self, x, t):
                f, G = chain(x, t)
                f = f - wide(G**2) * score_fn(x, t) * share
                return f, torch.zeros_like(G) if probability_flow else G

        return Reverse()

    def prior_sampling(self, shape):
        return torch.randn(*shape)

    def prior_logp(self, z):
        return self.gaussian_logp(z, 1.0)

    def gaussian_logp(self, z, variance):
        z = z.flatten(1)
        constant = 0.5 * z.shape[1] * math.log(2 * math.pi * variance)
        return -constant - (z**2).sum(1) / (2 * variance)


class subVPSDE(SDE):
    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        super().__init__(N)
        self.beta_0, self.beta_1 = beta_min, beta_max

    def beta(self, t):
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def integral(self, t):
        return 0.5 * t**2 * (self.beta_1 - self.beta_0) + t * self.beta_0

    def sde(self, x, t):
        return wide(-0.5 * self.beta(t)) * x, self.diffusion(t)

    def diffusion(self, t):
        return torch.sqrt(self.beta(t) * -torch.expm1(-2 * self.integral(t)))

    def marginal_prob(self, x, t):
        return wide(torch.exp(-0.5 * self.integral(t))) * x, self.std(t)

    def std(self, t):
        return -torch.expm1(-self.integral(t))


class VPSDE(subVPSDE):
    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        super().__init__(beta_min, beta_max, N)
        self.discrete_betas = torch.linspace(beta_min / N, beta_max / N, N)
        self.alphas = 1.0 - self.discrete_betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.sqrt_alphas_cumprod = torch.sqrt(self.alphas_cumprod)
        self.sqrt_1m_alphas_cumprod = torch.sqrt(1.0 - self.alphas_cumprod)

    def diffusion(self, t):
        return torch.sqrt(self.beta(t))

    def std(self, t):
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def discretize(self, x, t):
        beta = self.discrete_betas.to(x.device)[(t * (self.N - 1) / self.T).long()]
        return wide(torch.sqrt(1.0 - beta) - 1.0) * x, torch.sqrt(beta)


class VESDE(SDE):
    def __init__(self, sigma_min=0.01, sigma_max=50, N=1000):
        super().__init__(N)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        ends = math.log(sigma_min), math.log(sigma_max)
        self.discrete_sigmas = torch.exp(torch.linspace(*ends, N))

    def sde(self, x, t):
        growth = math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))
        return torch.zeros_like(x), self.marginal_prob(x, t)[1] * growth

    def marginal_prob(self, x, t):
        return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def prior_sampling(self, shape):
        return torch.randn(*shape) * self.sigma_max

    def prior_logp(self, z):
        return self.gaussian_logp(z, self.sigma_max**2)

    def discretize(self, x, t):
        sigmas = self.discrete_sigmas.to(x.device)
        index = (t * (self.N - 1) / self.T).long()
        lower = torch.where(index == 0, torch.zeros_like(t), sigmas[(index - 1).clamp(min=0)])
        return torch.zeros_like(x), torch.sqrt(sigmas[index] ** 2 - lower**2)


# Classes that lost their names keep the attributes.


Exploding = type("Exploding", (SDE,), {k: v for k, v in vars(VESDE).items() if k != "__init__"})
Exploding.__init__ = lambda self, *numbers: vars(self).update(vars(VESDE(*numbers)))


class Plain(SDE):
    """An Ornstein-Uhlenbeck process of its own: the generic convention."""

    def sde(self, x, t):
        return -x, torch.full_like(t, math.sqrt(2))

    def marginal_prob(self, x, t):
        return wide(torch.exp(-t)) * x, torch.sqrt(-torch.expm1(-2 * t))
