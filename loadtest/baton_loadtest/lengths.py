"""Length distributions, written as a user types them:

    128  fixed:128                      always 128
    uniform:16-256                      both ends included
    lognormal:mean=200,sigma=0.8        optional min= (default 1) and max=
    mix:0.8*lognormal:mean=80,sigma=1+0.2*uniform:1000-2000

`mean` and `sigma` of a lognormal are the mean length and the standard deviation of its logarithm before
truncation. A draw outside [min, max] is drawn again, never moved to the edge; the `mean` that a report states
is that of what is left.
"""

import math
import random
from dataclasses import dataclass
from typing import Protocol

from baton.errors import ConfigError

_MIN_ACCEPTED_MASS = 0.01  # less of a lognormal left after truncation is a typing error, and slow


class Lengths(Protocol):
    """A distribution over whole numbers >= 1. `str()` gives its specification back."""

    @property
    def mean(self) -> float: ...

    @property
    def highest(self) -> float:
        """No draw is greater; may be infinite."""
        ...

    def sample(self, rng: random.Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    length: int

    @property
    def mean(self) -> float:
        return self.length

    @property
    def highest(self) -> float:
        return self.length

    def sample(self, rng: random.Random) -> int:
        return self.length

    def __str__(self) -> str:
        return f"fixed:{self.length}"


@dataclass(frozen=True, slots=True)
class Uniform:
    low: int
    high: int

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    @property
    def highest(self) -> float:
        return self.high

    def sample(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"uniform:{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class LogNormal:
    untruncated_mean: float
    sigma: float
    low: int = 1
    high: float = math.inf

    @property
    def mu(self) -> float:
        return math.log(self.untruncated_mean) - self.sigma**2 / 2

    @property
    def accepted_mass(self) -> float:
        """Share of the untruncated distribution that rounds into [low, high]."""
        return self._cdf(self.high + 0.5) - self._cdf(self.low - 0.5)

    @property
    def mean(self) -> float:
        """Of the truncated distribution, up to the rounding to whole numbers."""
        shifted = self._cdf(self.high + 0.5, self.sigma**2) - self._cdf(self.low - 0.5, self.sigma**2)
        return self.untruncated_mean * shifted / self.accepted_mass

    @property
    def highest(self) -> float:
        return self.high

    def sample(self, rng: random.Random) -> int:
        while True:
            length = round(rng.lognormvariate(self.mu, self.sigma))
            if self.low <= length <= self.high:
                return length

    def _cdf(self, length: float, shift: float = 0.0) -> float:
        if math.isinf(length):
            return 1.0
        return 0.5 * (1 + math.erf((math.log(length) - self.mu - shift) / (self.sigma * math.sqrt(2))))

    def __str__(self) -> str:
        ends = f",min={self.low}" + ("" if math.isinf(self.high) else f",max={self.high:.12g}")
        return f"lognormal:mean={self.untruncated_mean:.12g},sigma={self.sigma:.12g}{ends}"


@dataclass(frozen=True, slots=True)
class Mix:
    parts: tuple[tuple[float, Lengths], ...]  # weights need not sum to one

    @property
    def mean(self) -> float:
        return sum(weight * part.mean for weight, part in self.parts) / sum(w for w, _ in self.parts)

    @property
    def highest(self) -> float:
        return max(part.highest for _, part in self.parts)

    def sample(self, rng: random.Random) -> int:
        chosen = rng.choices([part for _, part in self.parts], [weight for weight, _ in self.parts])[0]
        return chosen.sample(rng)

    def __str__(self) -> str:
        return "mix:" + "+".join(f"{weight:.12g}*{part}" for weight, part in self.parts)


def parse_lengths(text: str) -> Lengths:
    """Raises ConfigError with what is wrong and what would be right."""
    kind, colon, rest = text.partition(":")
    try:
        if not colon:
            return _fixed(text)
        match kind:
            case "fixed":
                return _fixed(rest)
            case "uniform":
                return _uniform(rest)
            case "lognormal":
                return _lognormal(rest)
            case "mix":
                return Mix(tuple(_weighted(part) for part in rest.split("+")))
    except ValueError as error:
        raise ConfigError(f"cannot read the length {text!r}: {error}") from None
    raise ConfigError(f"unknown length distribution {kind!r}: fixed, uniform, lognormal or mix")


def _fixed(text: str) -> Fixed:
    length = int(text)
    _require(length >= 1, "a length is at least 1")
    return Fixed(length)


def _uniform(text: str) -> Uniform:
    low, dash, high = text.partition("-")
    _require(bool(dash), "write uniform:16-256")
    _require(1 <= int(low) <= int(high), "the ends must be 1 <= low <= high")
    return Uniform(int(low), int(high))


def _lognormal(text: str) -> LogNormal:
    fields = dict(_field(part) for part in text.split(","))
    unknown = sorted(fields.keys() - {"mean", "sigma", "min", "max"})
    _require(
        not unknown, f"unknown field {', '.join(unknown)}; write lognormal:mean=200,sigma=0.8,min=1,max=4000"
    )
    _require({"mean", "sigma"} <= fields.keys(), "mean= and sigma= are needed")
    mean, sigma, low, high = (
        fields["mean"],
        fields["sigma"],
        fields.get("min", 1.0),
        fields.get("max", math.inf),
    )
    _require(0 < mean < math.inf and 0 < sigma < math.inf, "mean and sigma must be greater than 0")
    _require(1 <= low <= high and low < math.inf, "the ends must be 1 <= min <= max")
    lengths = LogNormal(mean, sigma, math.ceil(low), high if math.isinf(high) else math.floor(high))
    _require(lengths.accepted_mass >= _MIN_ACCEPTED_MASS, "min and max leave nearly nothing of it")
    return lengths


def _field(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name.strip(), float(value)


def _weighted(text: str) -> tuple[float, Lengths]:
    weight, star, spec = text.partition("*")
    _require(bool(star), "write mix:0.8*fixed:64+0.2*uniform:500-1000")
    _require(0 < float(weight) < math.inf, "weights must be greater than 0")
    _require(not spec.startswith("mix:"), "a mix cannot hold a mix")
    return float(weight), parse_lengths(spec)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
