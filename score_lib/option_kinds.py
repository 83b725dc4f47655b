"""Kinds of values that options take, in words and as checks."""

import re
import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import NamedTuple


class Check(NamedTuple):
    """Which values an option takes.

    Attributes:
        allowed: the values in words, such as "a whole number, at least 1".
        accepts: whether a value is one of them.
        names: the names that this project knows, of an option that users may add names to.
    """

    allowed: str
    accepts: Callable[[object], bool]
    names: tuple[str, ...] = ()


def at_least(bound: float) -> Check:
    """Values from a bound up; as of all bounds, a whole one asks for whole numbers."""
    return _within(bound, f", at least {bound:g}", lambda value: value >= bound)


def none_or(bound: float) -> Check:
    """Whole numbers from a bound up, or 0."""
    return _within(0, f", 0 or at least {bound:g}", lambda value: value == 0 or value >= bound)


def above(bound: float) -> Check:
    """Values larger than a bound."""
    return _within(bound, f" above {bound:g}", lambda value: value > bound)


def between(low: float, high: float) -> Check:
    """Values from one bound to another, both of them included."""
    return _within(low, f" from {low:g} to {high:g}", lambda value: low <= value <= high)


def _within(bound: float, words: str, holds: Callable[[float], bool]) -> Check:
    kind = whole if isinstance(bound, int) else number
    return Check(f"{kind.allowed}{words}", lambda value: kind.accepts(value) and holds(value))


def one_of(*choices: str) -> Check:
    """These texts and no others."""
    return Check(_listed(choices), lambda value: isinstance(value, str) and value in choices)


def name(known: str, empty: bool = False) -> Check:
    """A name that is looked up where it is used, for users may add to the known ones.

    Args:
        known: names, with spaces between them.
        empty: whether "" has a meaning, too.
    """
    names = tuple(known.split())
    return Check(f"a name: {_listed(('',) * empty + names)}", text.accepts, names)


def _listed(choices: tuple[str, ...]) -> str:
    *others, last = map(repr, choices)
    return f"{', '.join(others)} or {last}" if others else last


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def plain(value: object) -> object:
    """A number of Python's own types for one of another library's, which JSON does not know.

    Also inside lists and tuples; all else stays as it is.
    """
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if not _is_real(value):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _all(check: Check, values: object) -> bool:
    return isinstance(values, list | tuple) and all(map(check.accepts, values))


def _several(words: str, one: Check, least: int = 0) -> Check:
    """Lists of values that a check accepts, of so many or more."""
    return Check(words, lambda values: _all(one, values) and len(values) >= least)


def _two_names(value: str) -> bool:
    names = value.split(":")
    return len(names) == 2 and all(names) and names[0] != names[1]


def _known_conditions(value: str) -> bool:
    names = value.split(",") if value else []
    return set(names) <= {"classes", "image", "features"} and len(set(names)) == len(names)


def _interval(values: object) -> bool:
    return _all(number, values) and (not values or (len(values) == 2 and values[0] < values[1]))


flag = Check("True or False", lambda value: isinstance(value, bool))
# Seeds and counters have 64 bits.
whole = Check(
    "a whole number",
    lambda v: isinstance(v, Integral) and not isinstance(v, bool) and -(2**63) <= v < 2**64,
)
number = Check("a number", lambda v: _is_real(v) and abs(v) <= sys.float_info.max)
nonzero = Check("a number other than 0", lambda v: number.accepts(v) and v != 0)
text = Check("a text", lambda value: isinstance(value, str))
path = Check("a text", text.accepts)  # files and folders of a machine: others need not see them
numbers = _several("several numbers, such as (1, 2)", number)
indices = _several("several whole numbers, such as (2, 2, 4, 4), or ()", whole)
factors = _several("one or more numbers, at least 0, such as (0.8, 1)", at_least(0.0), 1)
count = at_least(1)
multiples = _several("one or more numbers above 0, such as (1, 2)", above(0.0), 1)
side = Check(
    "a whole number, at least 1, or two of them",
    lambda value: count.accepts(value) or (_all(count, value) and len(value) == 2),
)
shape = _several("whole numbers, at least 1, such as (3, 32), or ()", count)
ends = Check(
    "two different numbers, such as (0, 4095), or ()",
    lambda v: _all(number, v) and (not v or (len(v) == 2 and v[0] != v[1])),
)
classes = Check(
    "several whole numbers or names, such as ('cat', 'dog')",
    lambda v: isinstance(v, list | tuple) and all(whole.accepts(x) or text.accepts(x) for x in v),
)
pattern = Check("a pattern of names", lambda value: text.accepts(value) and value != "")
patterns = _several("several patterns of names, such as ('label_emb.*', '*.W')", pattern)
split = Check(
    "'', 'tenths', 'last' or 'TRAIN:HELDOUT', two names of folders",
    lambda value: text.accepts(value) and (value in ("", "tenths", "last") or _two_names(value)),
)
color = Check(
    "'', the name of a colour or '#rrggbb'",
    lambda v: text.accepts(v) and bool(re.fullmatch("|[A-Za-z]+|#[0-9A-Fa-f]{6}", v)),
)
conditions = Check(
    "'', 'classes', 'image', 'features', or several of them, such as 'classes,image'",
    lambda value: text.accepts(value) and _known_conditions(value),
)
figures = Check(
    "'', 'fid', 'inception_score', 'fid_ode', 'bpd', or several of them, such as 'fid,bpd'",
    lambda v: (
        text.accepts(v)
        and (not v or set(v.split(",")) <= {"fid", "inception_score", "fid_ode", "bpd"})
    ),
)
interval = Check("two numbers, such as (0.1, 0.6), or ()", _interval)
decay = _within(0.0, " from 0 to below 1", lambda value: 0 <= value < 1)
decays = Check(
    "different numbers from 0 to 1, such as (0.999, 0.9999)",
    lambda v: numbers.accepts(v) and all(0 <= x <= 1 for x in v) and len(set(v)) == len(v),
)
# A mean over the whole training has the relative standard deviation 1 / sqrt(12).
profiles = Check(
    "different numbers above 0 and up to 0.2886, such as (0.05, 0.1)",
    lambda v: numbers.accepts(v) and all(0 < x <= 0.2886 for x in v) and len(set(v)) == len(v),
)
# A torch.device has a text, and this module needs no torch.
device = Check("'auto', 'cpu', 'cuda' or 'cuda:1'", lambda value: bool(str(value)))

respacings = Check(
    "'', '250', '10,10,5', 'ddim50', 'leading50', 'leading50+1' or 'trailing50'",
    lambda v: (
        bool(re.fullmatch(r"|\d+(,\d+)*|(ddim|trailing)\d+|leading\d+(\+\d+)?", str(v)))
        and (text.accepts(v) or whole.accepts(v))
    ),
)

precision = one_of("float32", "tf32", "bfloat16")
compiling = one_of("", "default", "reduce-overhead", "max-autotune", "cudagraphs")
data_sets = name(
    "CIFAR10 CIFAR100 SVHN MNIST FASHION_MNIST CELEBA LSUN FFHQ CelebAHQ IMAGENET HUGGINGFACE "
    "WEBDATASET IMAGES ARRAYS POINTS QUICKDRAW QUICKDRAW_STROKES DIGITS COLOR_DIGITS"
)
networks = name(
    "ncsnpp ddpm ncsn ncsnv2_64 ncsnv2_128 ncsnv2_256 adm adm_classifier "
    "wideresnet_noise_conditional mlp set_transformer"
)
processes = name("vesde vpsde subvpsde cosine_vpsde")
normalizations = name("GroupNorm InstanceNorm InstanceNorm++ VarianceNorm")
samplers = name("pc ode adaptive chain ddim heun dpmpp_2m dpmpp_3m dpmpp_sde")
predictors = name("euler_maruyama reverse_diffusion ancestral_sampling none")
correctors = name("langevin langevin_per_sample ald none")
time_grids = name("uniform log_snr edm arctan", empty=True)
tasks = name(
    "inpaint colorize restore class edit reconstruct interpolate temperature compare_codes"
)
_OPERATORS = "box half random_mask super_resolution blur gray projection"
operators, any_operator = name(_OPERATORS), name(_OPERATORS, empty=True)
methods = name("pigdm dps projection tweedie none")
pools = one_of("adaptive", "attention", "spatial", "spatial_v2")
_PROBES = ("Rademacher", "Gaussian", "exact")
probes = one_of(*_PROBES)._replace(names=_PROBES)  # in any case, and no others
parametrizations = name("score noise x0 v edm", empty=True)
extractors = name("inception inception_tfgan digits fashion_mnist dinov2 clip", empty=True)
