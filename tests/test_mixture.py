import string
import unicodedata
from fractions import Fraction
from math import gcd

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from poolreg.errors import MixtureError, NameRefused
from poolreg.mixture import (
    MAX_DENOMINATOR,
    MAX_NAME,
    Atom,
    Mixture,
    check_name,
    common_denominator,
    mix,
    parse,
    subsets,
    uniform,
    unit_weights,
)

EVERYTHING = ("a", "b", "c", "d-e")
GROUPS = {"g": ("a", "b"), "h-i": ("c",), "none": ()}


def parsed(text: str) -> Mixture:
    return parse(text, everything=EVERYTHING, groups=GROUPS)


def mixture(**weights) -> Mixture:
    return mix((Atom(name), Fraction(weight)) for name, weight in weights.items())


def is_name(text: str) -> bool:
    try:
        check_name(text)
    except NameRefused:
        return False
    return True


# Letters and marks of several scripts, and what stands between names in an expression.
alphabet = "abzAZ09_-.éß漢हिन्ुกี์²٣x\u0302e\u0301ﬁ"
names = st.text(alphabet, min_size=1, max_size=12).filter(is_name).map(check_name)
atoms = st.builds(Atom, names, st.just(0) | st.integers(1, 10**9 - 1))
weights = st.fractions(min_value=0, max_value=1000, max_denominator=50)
mixtures = st.lists(st.tuples(atoms, weights), min_size=1, max_size=5).filter(
    lambda items: any(weight for _, weight in items)
)


# -- the canonical form ---------------------------------------------------------------------


@given(mixtures)
def test_canonical_form(items):
    made = mix(items)
    assert sum(weight for _, weight in made.weights) == 1
    assert all(weight > 0 for _, weight in made.weights)
    assert list(made.weights) == sorted(made.weights)
    assert len({atom for atom, _ in made.weights}) == len(made.weights)
    totals = {}
    for atom, weight in items:
        totals[atom] = totals.get(atom, Fraction(0)) + weight
    total = sum(totals.values())
    assert dict(made.weights) == {atom: w / total for atom, w in totals.items() if w}


@given(mixtures, st.randoms(), st.fractions(min_value=Fraction(1, 100), max_value=100))
def test_order_and_scale_do_not_matter(items, random, scale):
    other = [(atom, weight * scale) for atom, weight in items]
    random.shuffle(other)
    assert mix(other) == mix(items)
    assert str(mix(other)) == str(mix(items))


@given(mixtures)
def test_the_text_of_a_mixture_names_it(items):
    made = mix(items)
    assert parse(str(made), everything=(), groups={}) == made
    assert str(parse(str(made), everything=(), groups={})) == str(made)


@given(mixtures)
@example([(Atom("a", 1), Fraction(1, 3)), (Atom("a"), Fraction(2, 3))])
def test_the_text_is_in_lowest_terms(items):
    text = str(mix(items))
    counts = [int(term.split("*")[0]) if "*" in term else 1 for term in text.split("+")]
    assert gcd(*counts) == 1
    assert " " not in text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("2*a+2*b", "a+b"),
        ("b+a", "a+b"),
        ("a", "a"),
        ("7*a", "a"),
        ("a+a+b", "2*a+b"),
        ("0.3*a+0.7*b", "3*a+7*b"),
        ("1/3*a+2/3*b", "a+2*b"),
        (" 1 / 3 * a\t+\n2/6*b ", "a+b"),
        ("0*a+b", "b"),
        ("0.5*a+1.*b", "a+2*b"),
        ("0.3/0.9*a+b", "a+3*b"),
        ("a/2", "a/2"),
        ("2*a/2+a/1", "a/1+2*a/2"),
        ("a/01", "a/1"),
        ("a+a/1", "a+a/1"),
        ("a/10+a/9", "a/9+a/10"),  # units in the order of their numbers
        ("all", "a+b+c+d-e"),
        ("all-c", "a+b+d-e"),
        ("all - c", "a+b+d-e"),
        ("all-d-e", "a+b+c"),
        ("all - a - d-e", "b+c"),
        ("all-g", "c+d-e"),
        ("2*all+a", "3*a+2*b+2*c+2*d-e"),
        ("all - g - c", "d-e"),
        ("all - h-i", "a+b+d-e"),
        ("all - none", "a+b+c+d-e"),
        ("g", "a+b"),
        ("g+a", "2*a+b"),
        ("g/2", "g/2"),  # a base unit is of a partition, whatever else has its name
        ("3*g+2*h-i", "3*a+3*b+2*c"),
        ("hub/code+a", "a+hub/code"),  # a name with where it comes from
        ("2*hub/code/3+hub/3d", "hub/3d+2*hub/code/3"),
        ("1e5x", "1e5x"),
        ("1.2.3", "1.2.3"),
        ("a.txt+a-b+_x", "_x+a-b+a.txt"),
        ("all.x+allx+al", "al+all.x+allx"),
        ("999999999999999998*a+999999999999999998*b", "a+b"),
        ("e\u0301", "é"),
        ("x\u0302+y", "x\u0302+y"),  # no single letter has this accent
        ("हिन्दी+ไทย", "हिन्दी+ไทย"),
    ],
)
def test_expressions(text, canonical):
    assert str(parsed(text)) == canonical
    assert parsed(canonical) == parsed(text)


def test_the_partitions_of_a_mixture():
    assert parsed("b+a/2+a/1+c").partitions == ("a", "b", "c")


def test_uniform_and_subsets():
    assert uniform(["b", "a", "b"]) == mixture(a=1, b=2)
    made = [str(m) for m in subsets(["c", "a", "b"], range(1, 4))]
    assert made == ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]
    assert [str(m) for m in subsets("abc", range(2, 3))] == ["a+b", "a+c", "b+c"]


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("   \t\n", "it is empty"),
        ("0*a", "the mixture is empty"),
        ("0*a+0.0*b", "the mixture is empty"),
        ("none", "the mixture is empty"),
        ("all - a - b - c - d-e", "the mixture is empty"),
        ("-1*a", "not negative"),
        ("a+-1*b", "not negative"),
        ("-a", "not negative"),
        ("a - b", "not negative"),
        ("a+", "missing at the end"),
        ("+a", "missing before '\\+'"),
        ("a++b", "missing before '\\+'"),
        ("2*", "missing at the end"),
        ("*a", "is missing before '\\*'"),
        ("2*3*a", "'3' is not a name"),
        ("2**a", "missing before '\\*'"),
        ("a*2", "'a' is not a weight"),
        ("a b", "unexpected 'b'"),
        ("2 a", "'2' is not a name"),
        ("2", "'2' is not a name"),
        ("1.5", "is not a name"),
        ("1e3*a", "'1e3' is not a weight"),
        ("nan*a", "'nan' is not a weight"),
        ("inf*a", "is not a weight"),
        (".5*a", "is not a weight"),
        ("1_0*a", "is not a weight"),
        ("٣*a", "is not a weight"),
        ("²*a", "is not a weight"),
        ("1/0*a", "divides by zero"),
        ("1/3/2*a", "is not a name"),
        ("a/0", "number from 1"),
        ("a/-1", "number from 1"),
        ("a/1.5", "number from 1"),
        ("a/", "number from 1"),
        ("a/1/2", "unexpected '/'"),
        ("a/9999999999", "number from 1"),
        ("a/٣", "number from 1"),
        ("all/2", "unexpected '/'"),
        ("all-", "missing after the minus"),
        ("all - + a", "missing after the minus"),
        ("all-x", "'all' does not hold 'x'"),
        ("all-a-b", "'all' does not hold 'a-b'.*spaces around each minus"),
        ("all - a - a", "does not hold 'a'"),
        ("all - g - a", "does not hold 'a'"),
        ("all--a", "is missing after the minus|is not a name"),
        ("(a+b)", "is not a name"),
        ('{"json"}', "is not a name"),
        ("a,b", "is not a name"),
        ("a;drop table names", "is not a name"),
        ("'a'", "is not a name"),
        ("a\0b", "is not a name"),
        ("../x", "is not a name"),
        ("a/../b", "number from 1"),
        ("a\u200bb", "is not a name"),  # a space that nobody sees
        ("a\u202eb", "is not a name"),  # turns the writing direction
        ("x" * 101, "is not a name"),
        ("x" * 300, "is not a name"),
        ("a+" * 60_000 + "a", "longer than 100000 characters"),
    ],
)  # fmt: skip
def test_what_is_no_mixture(text, words):
    with pytest.raises(MixtureError, match=words) as caught:
        parsed(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert len(caught.value.message) < 600  # however long the text is
    assert caught.value.message.isprintable()


def test_negative_weights_are_refused_by_value_too():
    with pytest.raises(MixtureError, match="weight of a is negative: -1/2"):
        mix([(Atom("a"), Fraction(-1, 2)), (Atom("b"), Fraction(2))])
    with pytest.raises(MixtureError, match="empty"):
        mix([])
    with pytest.raises(MixtureError, match="empty"):
        uniform([])


def test_weights_too_fine_for_float64():
    assert MAX_DENOMINATOR == 2**48
    assert parsed(f"a+{2**48 - 1}*b") == mixture(a=1, b=2**48 - 1)
    with pytest.raises(MixtureError, match="too fine"):
        parsed(f"a+{2**48}*b")
    with pytest.raises(MixtureError, match="too fine"):
        parsed("0.000000000000001*a+b+c")
    primes = [p for p in range(2, 60) if all(p % d for d in range(2, p))]
    with pytest.raises(MixtureError, match="too fine"):
        parsed("+".join(f"1/{p}*p{p}" for p in primes))
    assert common_denominator([Fraction(1, 2**48), Fraction(1, 3 * 2**10)][:1]) == 2**48
    with pytest.raises(MixtureError):
        common_denominator([Fraction(1, 2**48), Fraction(1, 3)])


@given(st.text(max_size=40) | st.text("ab019 .*/+-al", max_size=25))
@example("all-all")
@example("1/1*all - a+g/1")
@example("a/1*b")
@example("\u0301a")
def test_any_text_is_a_mixture_or_refused(text):
    try:
        made = parsed(text)
    except MixtureError as error:
        made, message = None, error.message
    if made is None:
        assert message.isprintable()
    else:
        assert sum(weight for _, weight in made.weights) == 1
        assert parse(str(made), everything=(), groups={}) == made


# -- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["a", "_", "_x", "a-b", "a.b", "9lives", "a-", "a.", "x" * 100, "é", "漢字", "हिन्दी", "x\u0302",
     "allx", "all.x", "al", "2a", "1.2.3", "1e", "٣", "a..b", "²"],
)  # fmt: skip
def test_names(name):
    assert check_name(name) == name
    assert parse(name, everything=(), groups={}) == uniform([name])


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", " a", "a\n", "a/b", "../x", "..", ".", ".a", "-a", "a+b", "2*a", "'a'", '"a"',
     "a;b", "a\\b", "a\0", "a\x1b[31m", "all", "all-", "all-a", "1", "1.5", "2.", "1e5", "1e+5",
     "x" * 101, "x" * 300, "é" * 101, "\u0301a", "a\u200b", "a\u202e", "a,b", "a:b", "a(b)", "€",
     "🙂", "\ud800", "a%20b", "~", "$HOME", "a|b", "a\u00a0b"],
)  # fmt: skip
def test_what_is_no_name(name):
    with pytest.raises(NameRefused) as caught:
        check_name(name)
    assert caught.value.exit_code == 2
    assert "a name has 1 to 100 letters" in caught.value.hint
    assert len(caught.value.message) < 300
    assert caught.value.message.isprintable()


def test_names_are_normalised():
    assert check_name("e\u0301") == "é"
    assert check_name("\u1100\u1161") == "\uac00"
    assert check_name("é" * 100) == check_name("e\u0301" * 100)  # counted in the normal form


@given(st.text(max_size=8) | st.text(alphabet, max_size=8))
def test_any_text_is_a_name_or_refused(text):
    assume(is_name(text))
    name = check_name(text)
    assert check_name(name) == name == unicodedata.normalize("NFC", text)
    assert 1 <= len(name) <= MAX_NAME
    assert not set(name) & set(string.whitespace + "/\\+*'\"\0;")
    assert name not in (".", "..", "all")
    assert parse(name, everything=(), groups={}) == uniform([name])
    assert parse(f"2*{name}/3+{name}", everything=(), groups={}) == mix(
        [(Atom(name, 3), Fraction(2)), (Atom(name), Fraction(1))]
    )


# -- weights over base units ----------------------------------------------------------------

counts = st.fixed_dictionaries(dict.fromkeys("abc", st.integers(1, 7)))
explicit = st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1)


@given(explicit, counts)
def test_micro_and_macro_against_plain_fractions(chosen, b):
    total = sum(chosen.values())
    over_units = sum(w * b[k] for k, w in chosen.items())
    micro, macro = {}, {}
    for k, w in chosen.items():
        for unit in range(1, b[k] + 1):
            micro[Atom(k, unit)] = Fraction(w, over_units)
            macro[Atom(k, unit)] = Fraction(w, total) / b[k]
    made = mixture(**chosen)
    assert dict(unit_weights(made, b, "micro")) == micro
    assert dict(unit_weights(made, b, "macro")) == macro
    for scheme in ("micro", "macro"):
        found = unit_weights(made, b, scheme)
        assert sum(weight for _, weight in found) == 1
        assert list(found) == sorted(found)


@given(st.sets(st.sampled_from("abc"), min_size=1), counts)
def test_uniform_unions(chosen, b):
    made = uniform(chosen)
    n = sum(b[k] for k in chosen)
    assert {w for _, w in unit_weights(made, b, "micro")} == {Fraction(1, n)}
    for atom, weight in unit_weights(made, b, "macro"):
        assert weight == Fraction(1, len(chosen) * b[atom.partition])


@given(explicit, st.integers(1, 7))
def test_the_schemes_coincide_when_all_have_as_many_units(chosen, b):
    units = dict.fromkeys("abc", b)
    made = mixture(**chosen)
    assert unit_weights(made, units, "micro") == unit_weights(made, units, "macro")


def test_the_schemes_differ_otherwise():
    units = {"a": 1, "b": 3}
    a, b = Atom("a", 1), Atom("b", 1)
    micro = dict(unit_weights(parsed("2*a+b"), units, "micro"))
    macro = dict(unit_weights(parsed("2*a+b"), units, "macro"))
    assert (micro[a], micro[b]) == (Fraction(2, 5), Fraction(1, 5))
    assert (macro[a], macro[b]) == (Fraction(2, 3), Fraction(1, 9))


def test_single_units():
    units = {"a": 2, "b": 3}
    expected = {Atom("a", 1): Fraction(1, 4), Atom("a", 2): Fraction(3, 4)}
    for scheme in ("micro", "macro"):
        assert dict(unit_weights(parsed("a/1+3*a/2"), units, scheme)) == expected
    # The whole partition and one of its units: 1/4 for each unit of b, and 1/4 more for b/2.
    both = dict(unit_weights(parsed("b+b/2"), units, "micro"))
    assert both == {Atom("b", u): Fraction(n, 4) for u, n in ((1, 1), (2, 2), (3, 1))}
    both = dict(unit_weights(parsed("b+b/2"), units, "macro"))
    assert both == {Atom("b", u): Fraction(n, 6) for u, n in ((1, 1), (2, 4), (3, 1))}


def test_an_unknown_scheme():
    with pytest.raises(MixtureError, match="unknown scheme 'mean'"):
        unit_weights(parsed("a"), {"a": 1}, "mean")


def test_units_too_many_for_float64():
    primes = (701, 709, 719, 727, 733)
    units = {f"p{prime}": prime for prime in primes}
    assert len(unit_weights(uniform(units), units, "micro")) == sum(primes)
    with pytest.raises(MixtureError, match="too fine"):
        unit_weights(uniform(units), units, "macro")
