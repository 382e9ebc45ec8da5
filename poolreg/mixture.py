"""The algebra of mixtures: expressions, canonical weights, and weights over base units.

A mixture is a set of non-negative rational weights over partitions or single base units. Its
canonical form is sorted, reduced and sums to 1, so `2*a + 2*b` is `a+b`. All arithmetic is
exact (`fractions.Fraction`); nothing here knows about models or files.

    expression = term { "+" term }
    term       = [ weight "*" ] ( name [ "/" unit ] | "all" { "-" name } )
    name       = [ origin "/" ] word           an origin where a pulled name was taken already
    weight     = 2 | 0.3 | 1/3
    unit       = 1, 2, …                       one base unit of a partition

A hyphen inside a word belongs to the name; `all-c` takes away the partition `c`, and further
ones are written with spaces around the minus: `all - c - d`.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from poolreg.errors import MixtureError, NameRefused

MAX_NAME = 100
MAX_EXPRESSION = 100_000  # characters; a mixture of thousands of partitions still fits
# Integer weights are multiplied in float64 and must be exact there.
MAX_DENOMINATOR = 2**48

METHOD = "average-1"  # the definition of merging; a change of it changes every recipe digest

NAME_RULE = (
    f"a name has 1 to {MAX_NAME} letters, digits, '_', '-' and '.', begins with a letter, digit "
    "or '_', is not a number, not 'all', and does not begin with 'all-'"
)

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
# A word is whatever stands between operators; `check_name` says whether it is a name.
_TOKEN = re.compile(r"[+*/-]|[^\s+*/-][^\s+*/]*")
_WEIGHT = re.compile(r"[0-9]{1,18}(\.[0-9]{1,15})?|[0-9]{1,18}\.")


@dataclass(frozen=True, order=True)
class Atom:
    """What a weight stands on: a partition, or one base unit of it (from 1; 0 means all)."""

    partition: str
    unit: int = 0

    def __str__(self) -> str:
        return f"{self.partition}/{self.unit}" if self.unit else self.partition


@dataclass(frozen=True)
class Mixture:
    """A canonical mixture: atoms in sorted order with positive weights that sum to 1."""

    weights: tuple[tuple[Atom, Fraction], ...]

    def __str__(self) -> str:
        """Return the shortest canonical expression: integer weights without common factor."""
        scale = lcm(*(weight.denominator for _, weight in self.weights))
        counts = [(atom, int(weight * scale)) for atom, weight in self.weights]
        return "+".join(f"{atom}" if count == 1 else f"{count}*{atom}" for atom, count in counts)

    @property
    def partitions(self) -> tuple[str, ...]:
        """The partitions touched, sorted, each once."""
        return tuple(sorted({atom.partition for atom, _ in self.weights}))


def check_name(name: str) -> str:
    """Return `name` in Unicode NFC form, or raise `NameRefused` with the rule."""
    plain = unicodedata.normalize("NFC", name)
    letters = all(
        ch.isalnum() or unicodedata.category(ch) in ("Mn", "Mc") for ch in plain if ch not in "_-."
    )
    shaped = (
        bool(plain)
        and len(plain) <= MAX_NAME
        and letters
        and (plain[0].isalnum() or plain[0] == "_")
    )
    reserved = plain == "all" or plain.startswith("all-") or _NUMBER.fullmatch(plain) is not None
    if not shaped or reserved:
        raise NameRefused(f"{_shown(name)} cannot be a name", hint=f"{NAME_RULE}", name=name)
    return plain


def check_stored_name(name: str) -> str:
    """Return a name that may stand in a pool: a plain one, or one with its origin: hub/code."""
    origin, slash, word = name.partition("/")
    return f"{check_name(origin)}/{check_name(word)}" if slash else check_name(name)


def _shown(text: str) -> str:
    # repr escapes control characters, so a hostile name cannot write to the terminal.
    return repr(text if len(text) <= 60 else text[:57] + "…")


def mix(weights: Iterable[tuple[Atom, Fraction]]) -> Mixture:
    """Return the canonical mixture of `weights`; weights of one atom add up, zeros drop out.

    Raises `MixtureError` for a negative weight, for none above zero, and for weights so fine
    that their common denominator passes 2**48.
    """
    totals: dict[Atom, Fraction] = {}
    for atom, weight in weights:
        if weight < 0:
            raise MixtureError(
                f"the weight of {atom} is negative: {weight}", hint="weights are zero or more"
            )
        totals[atom] = totals.get(atom, Fraction(0)) + weight
    total = sum(totals.values(), Fraction(0))
    if total == 0:
        raise MixtureError(
            "the mixture is empty", hint="name at least one partition with a weight above zero"
        )
    mixture = Mixture(tuple(sorted((a, w / total) for a, w in totals.items() if w > 0)))
    common_denominator(weight for _, weight in mixture.weights)
    return mixture


def common_denominator(weights: Iterable[Fraction]) -> int:
    """Return the least common denominator, or raise `MixtureError` above 2**48."""
    denominator = 1
    for weight in weights:
        denominator = lcm(denominator, weight.denominator)
        if denominator > MAX_DENOMINATOR:
            raise MixtureError(
                "the weights are too fine for an exact average",
                hint="use fewer digits, or small whole numbers such as 3*a+7*b",
            )
    return denominator


def uniform(atoms: Iterable[str]) -> Mixture:
    """Return the mixture with equal weights over partitions."""
    return mix((Atom(name), Fraction(1)) for name in atoms)


def parse(text: str, *, everything: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Mixture:
    """Return the mixture that the expression `text` names.

    `everything` is what `all` stands for; `groups` maps a group's name to its partitions. Other
    names are taken as partitions; whether they exist is the caller's question. Raises
    `MixtureError` with the place of the fault.
    """
    return _Parser(text, everything, groups).mixture()


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(
        self, text: str, everything: Sequence[str], groups: Mapping[str, Sequence[str]]
    ) -> None:
        self.text = text
        self.everything = everything
        self.groups = groups
        self.tokens = self._split()
        self.position = 0

    def _fault(self, what: str) -> MixtureError:
        return MixtureError(
            f"{_shown(self.text)} is not a mixture: {what}",
            hint="write for example: a+b   2*a+b   0.3*a+0.7*b   a/2   all   all-c",
        )

    def _split(self) -> list[str]:
        if len(self.text) > MAX_EXPRESSION:
            raise self._fault(f"longer than {MAX_EXPRESSION} characters")
        tokens: list[str] = []
        for token in _TOKEN.findall(unicodedata.normalize("NFC", self.text)):
            if token.startswith("all-"):
                tokens += ["all", "-", *filter(None, [token[4:]])]
            else:
                tokens.append(token)
        if not tokens:
            raise self._fault("it is empty")
        return tokens

    def _peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        self.position += 1
        return token

    def mixture(self) -> Mixture:
        weights = self._term()
        while self._peek() == "+":
            self._next()
            weights += self._term()
        if self._peek() == "-":
            raise self._fault("weights are not negative; a minus only follows 'all'")
        if self._peek():
            raise self._fault(f"unexpected {_shown(self._peek())}")
        return mix(weights)

    def _term(self) -> list[tuple[Atom, Fraction]]:
        weight = self._weight()
        word = self._next()
        if word == "all":
            atoms = [Atom(name) for name in self._all()]
        elif word == "-":
            raise self._fault("weights are not negative; a minus only follows 'all'")
        elif word in ("", "+", "*", "/"):
            at = f"before {word!r}" if word else "at the end"
            raise self._fault(f"a name is missing {at}")
        elif word in self.groups and self._peek() != "/":
            atoms = [Atom(name) for name in self.groups[word]]
        else:
            atoms = [Atom(self._origin_and_name(word), self._unit())]
        return [(atom, weight) for atom in atoms]

    def _weight(self) -> Fraction:
        token = self._peek()
        following = self.tokens[self.position + 1 : self.position + 4]
        if following[:1] == ["*"]:
            self.position += 2
            return self._number(token)
        if following[:1] == ["/"] and following[2:3] == ["*"]:
            self.position += 4
            divisor = self._number(following[1])
            if divisor == 0:
                raise self._fault("a weight divides by zero")
            return self._number(token) / divisor
        return Fraction(1)

    def _number(self, token: str) -> Fraction:
        if not _WEIGHT.fullmatch(token) or not token.isascii():
            raise self._fault(f"{_shown(token)} is not a weight (write 2, 0.3 or 1/3)")
        return Fraction(token)

    def _name(self, word: str) -> str:
        try:
            return check_name(word)
        except NameRefused as error:
            raise self._fault(f"{_shown(word)} is not a name ({error.hint})") from error

    def _origin_and_name(self, word: str) -> str:
        name = self._name(word)
        following = self.tokens[self.position + 1 : self.position + 2]
        if self._peek() != "/" or not following or re.fullmatch(r"[\d.]+|[-+*/]", following[0]):
            return name
        self.position += 2
        return f"{name}/{self._name(following[0])}"

    def _unit(self) -> int:
        if self._peek() != "/":
            return 0
        self._next()
        token = self._next()
        if not re.fullmatch(r"[0-9]{1,9}", token) or int(token) < 1:
            raise self._fault("a base unit is written as a number from 1, as in python/2")
        return int(token)

    def _all(self) -> list[str]:
        names = list(self.everything)
        while self._peek() == "-":
            self._next()
            word = self._next()
            if not word or word in "+-*/":
                raise self._fault("a name is missing after the minus")
            group = self.groups.get(word)
            taken = (self._origin_and_name(word),) if group is None else group
            missing = [name for name in taken if name not in names]
            if missing:
                raise self._fault(
                    f"'all' does not hold {missing[0]!r}, so it cannot be taken away"
                    " (put spaces around each minus: all - a - b)"
                )
            names = [name for name in names if name not in taken]
        return names


def unit_weights(
    mixture: Mixture, units: Mapping[str, int], scheme: str
) -> tuple[tuple[Atom, Fraction], ...]:
    """Return exact weights over base units that sum to 1, sorted.

    With w_k the weight of partition k and b_k its number of base units, a unit of k weighs
    w_k / Σ_j w_j b_j under `micro` (uniform over units when the w_k are equal) and w_k / b_k
    under `macro` (the partition's own models are averaged first). An atom that names one unit
    counts as a partition with b = 1. `units` gives b_k of each partition.
    """
    if scheme not in ("micro", "macro"):
        raise MixtureError(f"unknown scheme {scheme!r}", hint="use micro or macro")
    totals: dict[Atom, Fraction] = {}
    for atom, weight in mixture.weights:
        count = 1 if atom.unit else units[atom.partition]
        indices = [atom.unit] if atom.unit else range(1, count + 1)
        share = weight if scheme == "micro" else weight / count
        for index in indices:
            unit = Atom(atom.partition, index)
            totals[unit] = totals.get(unit, Fraction(0)) + share
    return mix(totals.items()).weights


def thousandths(shares: Sequence[float | Fraction]) -> tuple[int, ...]:
    """Round shares that sum to 1 to thousandths that sum to a thousand, by largest remainder."""
    counts = [int(share * 1000) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * 1000)
    for index in by_remainder[: 1000 - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def subsets(names: Sequence[str], sizes: range) -> Iterable[Mixture]:
    """Yield the uniform mixture of every subset of `names` whose size lies in `sizes`."""
    for size in sizes:
        for chosen in itertools.combinations(sorted(names), size):
            yield uniform(chosen)
