"""Published figures, by the experiments that they are of.

Those of Song et al. 2021 are from its Tables 1 to 3 (arXiv 2011.13456), which the authors' list of
checkpoints repeats.  Table 3 has the checkpoint of the least FID in training, Table 2 the last one.
NCSN, NCSNv2 and the Inception Score of DDPM are quoted in Table 3 from Song and Ermon 2019 and
2020 and from Ho et al. 2020.  Those of digits are ours, see `benchmarks/digits_figures.py`.
"""

import dataclasses
import math
from typing import NamedTuple


class Kind(NamedTuple):
    """How a kind of figure is measured.

    Attributes:
        measured: its name in reports of evaluations.
        option: of `eval`, which asks for it.
        folder: name of the evaluation.
        ode: whether the probability flow ODE draws the samples, and not the config's sampler.
    """

    measured: str
    option: str
    folder: str
    ode: bool = False


KINDS = {
    "fid": Kind("fid", "enable_sampling", "samples"),
    "inception_score": Kind("inception_score", "enable_sampling", "samples"),
    "fid_ode": Kind("fid", "enable_sampling", "ode", ode=True),
    "bpd": Kind("bpd", "enable_bpd", "bpd"),
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published figure.

    Attributes:
        kind: one of `KINDS`.
        text: as printed, such as "2.20": its last digit says how it was rounded.
        place: where it stands, such as "Table 3".
        runs: how many runs it is the mean of.
        spread: the standard deviation of a single one of these runs; 0 if it was not published.
    """

    kind: str
    text: str
    place: str
    runs: int = 1
    spread: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no kind of figure: there are {', '.join(KINDS)}")
        try:
            known = math.isfinite(float(self.text)) and self.spread >= 0 and self.runs >= 1
        except ValueError:
            known = False
        if not known or (self.spread > 0 and self.runs < 2):
            raise ValueError(
                f"{self} is no published figure: it needs a number, and two runs for a spread"
            )

    @property
    def value(self) -> float:
        """The figure as a number."""
        return float(self.text)

    @property
    def rounding(self) -> float:
        """The most that rounding to the printed digits has changed it."""
        return 0.5 * 10.0 ** -len(self.text.partition(".")[2])


@dataclasses.dataclass(frozen=True)
class Row:
    """The figures of an experiment.

    Attributes:
        name: the row's name in the tables.
        figures: the published ones.
        num_samples: of which distances are.
        num_images: test images, of which bits/dim are.
        extractor: of their features.
    """

    name: str
    figures: tuple[Figure, ...]
    num_samples: int = 50000
    num_images: int = 10000
    extractor: str = "inception_tfgan"


def _samples(fid: str, inception_score: str) -> tuple[Figure, ...]:
    """A row of Table 3."""
    return Figure("fid", fid, "Table 3"), Figure("inception_score", inception_score, "Table 3")


def _likelihood(bpd: str, fid: str) -> tuple[Figure, ...]:
    """A row of Table 2."""
    return Figure("fid_ode", fid, "Table 2"), Figure("bpd", bpd, "Table 2")


def _mean_of_five(fid: str, spread: float) -> tuple[Figure, ...]:
    """An entry of Table 1."""
    return (Figure("fid", fid, "Table 1", runs=5, spread=spread),)


ROWS = {
    "ve/ncsn/cifar10": Row("NCSN", _samples("25.32", "8.87")),
    "ve/ncsnv2/cifar10": Row("NCSNv2", _samples("10.87", "8.40")),
    "ve/cifar10_ddpm": Row("SMLD, reverse diffusion, PC1000", _mean_of_five("3.60", 0.02)),
    "ve/cifar10_ncsnpp": Row("NCSN++", _samples("2.45", "9.73")),
    "ve/cifar10_ncsnpp_continuous": Row("NCSN++ cont. (VE)", _samples("2.38", "9.83")),
    "ve/cifar10_ncsnpp_deep_continuous": Row("NCSN++ cont. (deep, VE)", _samples("2.20", "9.89")),
    "vp/ddpm/cifar10": Row(
        "DDPM",
        (
            *_mean_of_five("3.24", 0.02),
            Figure("inception_score", "9.46", "Table 3"),
            *_likelihood("3.28", "3.37"),
        ),
    ),
    "vp/ddpm/cifar10_continuous": Row("DDPM cont. (VP)", _likelihood("3.21", "3.69")),
    "vp/cifar10_ddpmpp": Row("DDPM++", _samples("2.78", "9.64")),
    "vp/cifar10_ddpmpp_continuous": Row(
        "DDPM++ cont. (VP)", _samples("2.55", "9.58") + _likelihood("3.16", "3.93")
    ),
    "vp/cifar10_ddpmpp_deep_continuous": Row(
        "DDPM++ cont. (deep, VP)", _samples("2.41", "9.68") + _likelihood("3.13", "3.08")
    ),
    "subvp/cifar10_ddpm_continuous": Row("DDPM cont. (sub-VP)", _likelihood("3.05", "3.56")),
    "subvp/cifar10_ddpmpp_continuous": Row(
        "DDPM++ cont. (sub-VP)", _samples("2.61", "9.56") + _likelihood("3.02", "3.16")
    ),
    "subvp/cifar10_ddpmpp_deep_continuous": Row(
        "DDPM++ cont. (deep, sub-VP)", _samples("2.41", "9.57") + _likelihood("2.99", "2.92")
    ),
    "vp/digits": Row(
        "digits",
        (
            Figure("fid", "3.73", "ours", runs=5, spread=0.602),
            Figure("inception_score", "7.85", "ours", runs=5, spread=0.101),
            Figure("bpd", "1.942", "ours", runs=5, spread=0.0129),
        ),
        num_samples=512,
        num_images=296,
        extractor="digits",
    ),
}
