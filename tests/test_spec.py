"""perturbjax.spec: text to calls and back, checks against signatures, and one compilation for all numbers."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NewType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.typing import ArrayLike

from perturbjax.spec import Call, Slot, build, canonical, parse_chain, parse_list, resolve, split_numbers

if TYPE_CHECKING:
    from nowhere import Unknown


class Varied(NamedTuple):
    eps: ArrayLike
    delta_eps: ArrayLike


class Split(NamedTuple):
    by: str
    tau: ArrayLike


Bound = ArrayLike | Varied | Callable[[ArrayLike], ArrayLike]
Rate = NewType("Rate", float)


def varied(eps: ArrayLike = 1.0, *, delta_eps: ArrayLike = 0.5) -> Varied:
    return Varied(eps, delta_eps)


def by_accuracy(*, tau: ArrayLike = 0.5) -> Split:
    return Split("accuracy", tau)


def cosine(init_value: float = 1.0, *, decay_steps: int = 10) -> optax.Schedule:
    return optax.cosine_decay_schedule(init_value, decay_steps)


def untyped(scale=2.0):
    return scale


def ce():
    return ("ce",)


def la(*, tau: ArrayLike = 1.0):
    return ("la", tau)


def steps_for_bound(settings):
    bound = settings["bound"].eps if isinstance(settings["bound"], Varied) else settings["bound"]
    return {} if settings["max_steps"] else dict(max_steps=int(np.max(bound) / settings["step_size"] + 1e-4))


def lpl(
    *,
    bound: Bound = 1.0,
    step_size: ArrayLike = 0.1,
    split: Split | Literal["mean", "frequency"] = "mean",
    tau: ArrayLike | None = None,
    num_steps: int = 3,
    project: bool = False,
    inference: Literal["pgd", "prior"] = "pgd",
    site: str = "logits",
    rates: tuple[float, ...] = (0.5, 0.25),
    layers: tuple[str, ...] | None = None,
    pair: tuple[int, float] = (1, 2.0),
    anything: Any = None,
):
    return ("lpl", *locals().values())


def lpg(bound: "ArrayLike | Unknown" = 0.3, steps: "int" = 2):  # an annotation only a type checker can read
    return ("lpg", bound, steps)


def searched(*, bound: Bound = 1.0, step_size: ArrayLike = 0.1, max_steps: int | None = None):
    return ("searched", bound, step_size, max_steps)


searched.resolve_structure = steps_for_bound


def sam(*, radius: optax.ScalarOrSchedule = 0.05, rate: Rate = Rate(0.5), norm: Annotated[int, "p"] = 2):
    return ("sam", radius, rate, norm)


def longtail(ratio: float):
    return ("longtail", ratio)


def noise(*, kind: Literal["symmetric", "pair", "human noise"], rate: ArrayLike = 0.2):
    return ("noise", kind, rate)


METHODS = dict(ce=ce, la=la, lpl=lpl, lpg=lpg, searched=searched, sam=sam)
VIEWS = dict(longtail=longtail, noise=noise)
HELPERS = dict(varied=varied, by_accuracy=by_accuracy, cosine=cosine, untyped=untyped)


def made(text, registry=METHODS):
    return build(*split_numbers(parse_chain(text), registry, HELPERS), registry, HELPERS)


def structure(text):
    return split_numbers(parse_chain(text), METHODS, HELPERS)[0]


def numbers(text):
    return split_numbers(parse_chain(text), METHODS, HELPERS)[1]


# ---------------------------------------------------------------------------------------------------------------- text


def test_a_list_keeps_what_was_typed():
    text = "ce, la,lpl( bound = varied ) ,\n lpl(bound=varied(0.5, delta_eps=1.0), split=by_accuracy(tau=0.4)), la + lpl"
    typed = ["ce", "la", "lpl( bound = varied )", "lpl(bound=varied(0.5, delta_eps=1.0), split=by_accuracy(tau=0.4))"]
    assert [t for t, _ in parse_list(text)] == [*typed, "la + lpl"]
    assert [chain for _, chain in parse_list(text)] == [parse_chain(t) for t in [*typed, "la+lpl"]]


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("-3", -3),
        ("3.", 3.0),
        (".5", 0.5),
        ("-0.5", -0.5),
        ("1e-3", 1e-3),
        ("2E4", 2e4),
        ("8/255", 8 / 255),
        ("-1 / 4", -0.25),
        ("inf", float("inf")),
        ("-inf", float("-inf")),
        ("info", "info"),
        ("true", True),
        ("False", False),
        ("none", None),
        ("truest", "truest"),
        ("pgd", "pgd"),
        ("resnet-32", "resnet-32"),
        ("'a, \"b\" (c)'", 'a, "b" (c)'),
        (r'"a\"b\\"', 'a"b\\'),
        ("'true'", "true"),
        ("[]", ()),
        ("[1, [a, none], f(2)]", (1, ("a", None), Call("f", (2,)))),
        ("f", "f"),
        ("f()", Call("f")),
        ("f(1, g(h=[2]))", Call("f", (1, Call("g", (), (("h", (2,)),))))),
    ],
)
def test_values(text, value):
    (call,) = parse_chain(f"name({text}, key={text})")
    assert call == Call("name", (value,), (("key", value),))
    assert type(call.args[0]) is type(value)


@pytest.mark.parametrize(
    "text, message, place",
    [
        ("", "a spec needs a name, got the end. Write name or name(setting=value).", 0),
        ("ce,", "needs a name, got the end", 3),
        ("ce,,la", "needs a name, got ','", 3),
        (",ce", "needs a name, got ','", 0),
        ("ce+", "needs a name, got the end", 3),
        ("3", "needs a name, got '3'", 0),
        ("ce la", "needs ',' or '+' after an entry, got 'la'", 3),
        ("ce)", "needs ',' or '+' after an entry, got ')'", 2),
        ("lpl(bound=1", "needs ')' for every '(', got '('. Add ')'.", 3),
        ("lpl(bound=[1, 2", "needs ']' for every '[', got '['", 10),
        ("lpl(bound=[1, 2)", "needs ',' or ']', got ')'", 15),
        ("lpl(bound=1 tau=2)", "needs ',' or ')', got 'tau'", 12),
        ("lpl(bound=)", "needs a value, got ')'", 10),
        ("lpl(1,)", "needs a value, got ')'", 6),
        ("lpl(,)", "needs a value, got ','", 4),
        ("lpl(", "needs a value, got the end", 4),
        ("lpl(bound=-)", "needs a value, got '-'", 10),
        ("lpl(bound=1, bound=2)", "needs each setting of lpl once, got 'bound'. Remove one of the two.", 13),
        ("lpl(bound=1, 2)", "needs settings by name after the first one by name, got '2'", 13),
        ("lpl(bound=8/0)", "needs a number other than 0 after '/', got '0'", 12),
        ("lpl(bound=8/x)", "needs a number other than 0 after '/', got 'x'", 12),
        ("lpl(bound=3d)", "needs numbers, words and ( ) [ ] , + = /, got '3d)'. Put quotes around anything else.", 10),
        ("lpl(bound=1.2.3)", "got '1.2.3)'", 10),
        ("lpl  {bound}", "got '{bound}'", 5),
        ("lpl(site='a)", 'needs a closing quote, got "\'"', 9),
        ("true(1)+lpl(x=true(1))", "needs ',' or ')', got '('", 18),
    ],
)
def test_errors_show_the_place(text, message, place):
    with pytest.raises(ValueError) as error:
        parse_list(text)
    sentence, line, caret = str(error.value).split("\n")
    assert message in sentence
    assert line == "  " + text
    assert caret == " " * (place + 2) + "^"


def test_errors_in_a_long_text_show_its_line():
    with pytest.raises(ValueError) as error:
        parse_list("ce,\nla,\n lpl(bound=,\n sam")
    assert str(error.value).endswith("\n   lpl(bound=,\n             ^")


def test_a_chain_is_one_entry():
    with pytest.raises(ValueError, match=r"a chain needs one entry, got 2: 'ce, la'\. Write \+ instead"):
        parse_chain("ce, la")


word = st.from_regex(r"[^\W\d][\w.-]{0,5}", fullmatch=True)
helper_name = word.filter(lambda w: w not in ("true", "True", "false", "False", "none", "None", "inf"))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | word


def calls(names, values):
    settings = st.dictionaries(word, values, max_size=3).map(lambda d: tuple(d.items()))
    return st.builds(Call, names, st.lists(values, max_size=3).map(tuple), settings)


value = st.recursive(plain, lambda v: st.lists(v, max_size=3).map(tuple) | calls(helper_name, v), max_leaves=8)
chain = st.lists(calls(word.filter(lambda w: w != "inf"), value), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60)
@given(chain)
def test_canonical_text_is_parsed_back(chain):
    assert repr(parse_chain(canonical(chain))) == repr(chain)  # repr also tells 1, 1.0 and True apart
    assert parse_list(canonical(chain)) == [(canonical(chain), chain)]


@given(st.text(alphabet="ab1.+-,()[]='\" \n/", max_size=12))
def test_any_text_is_parsed_or_refused_with_a_place(text):
    try:
        entries = parse_list(text)
    except ValueError as error:
        assert str(error).endswith("^")
    else:
        assert [parse_chain(canonical(chain)) for _, chain in entries] == [chain for _, chain in entries]
        assert all(parse_chain(typed) == chain for typed, chain in entries)


# ------------------------------------------------------------------------------------------------------------- resolve


def test_positions_fill_settings_in_declaration_order():
    text = "lpl(varied(0.5, 2), 0.2, split=mean)"
    want = "lpl(bound=varied(eps=0.5, delta_eps=2), step_size=0.2, split=mean)"
    assert canonical(resolve(parse_chain(text), METHODS, HELPERS)) == want
    assert canonical(resolve(parse_chain(want), METHODS, HELPERS)) == want
    assert canonical(resolve(parse_chain("noise(rate=1, kind=pair)"), VIEWS)) == "noise(kind=pair, rate=1)"


def test_a_bare_helper_is_called_where_words_are_not_settings():
    resolved = resolve(parse_chain("lpl(bound=varied, site=varied, split=by_accuracy, rates=[untyped])"), METHODS, HELPERS)
    assert canonical(resolved) == "lpl(bound=varied(), split=by_accuracy(), site=varied, rates=[untyped()])"
    assert made("lpl(bound=varied)") == (lpl(bound=varied()),)
    assert parse_chain("lpl") == parse_chain("lpl()")


@pytest.mark.parametrize(
    "text, message",
    [
        ("lqp", "a spec needs a known name (ce, la, lpl, lpg, searched or sam), got lqp. Write lpl."),
        ("zzz", "got zzz. Write one of these."),
        ("ce(1)", "ce needs at most 0 settings (none), got ce(1). Remove the last 1."),
        ("ce(a=1)", "ce needs a setting that it has (none), got a=1. Remove it."),
        ("la(1, 2)", "la needs at most 1 setting (tau), got la(1, 2). Remove the last 1."),
        ("sam(raduis=1)", "sam needs a setting that it has (radius, rate or norm), got raduis=1. Write sam(radius=1)."),
        ("la(1, tau=2)", "la needs tau once, got la(1, tau=2). Remove tau=2."),
        ("lpl(num_steps=2.6)", "lpl needs num_steps to be a whole number, got 2.6. Write lpl(num_steps=3)."),
        ("lpl(num_steps=many)", "lpl needs num_steps to be a whole number, got many. Write lpl(num_steps=3)."),
        ("lpl(num_steps=true)", "lpl needs num_steps to be a whole number, got true. Write lpl(num_steps=3)."),
        ("lpl(project=1)", "lpl needs project to be true or false, got 1. Write lpl(project=false)."),
        ("lpl(inference=pgb)", "lpl needs inference to be pgd or prior, got pgb. Write lpl(inference=pgd)."),
        ("lpl(site=3)", "lpl needs site to be a word, got 3. Write lpl(site=logits)."),
        (
            "lpl(tau=high)",
            "lpl needs tau to be a number, none, a list of numbers or untyped(...), got high. Write lpl(tau=none).",
        ),
        ("lpl(step_size=true)", "lpl needs step_size to be a number, a list of numbers or untyped(...), got true."),
        ("lpl(step_size=varied)", "got varied. Write lpl(step_size=0.1)."),
        ("lpl(step_size=[0.1, a])", "lpl needs step_size to be a number, a list of numbers or untyped(...), got a."),
        ("lpl(step_size=cosine(1))", "lpl needs step_size to be a number, a list of numbers or untyped(...), got cosine(1)."),
        (
            "lpl(bound=vareid(2))",
            "lpl needs bound to be a number, a list of numbers, varied(...), cosine(...) or untyped(...), got vareid(2). "
            "Write lpl(bound=varied(2)).",
        ),
        ("lpl(split=by_acuracy)", "needs split to be mean, frequency, by_accuracy(...) or untyped(...), got by_acuracy. Write"),
        ("lpl(split=by_acuracy)", "Write lpl(split=by_accuracy)."),
        ("lpl(split=varied)", "got varied. Write lpl(split=mean)."),
        (
            "lpl(split=by_accuracy(taw=1))",
            "by_accuracy needs a setting that it has (tau), got taw=1. Write by_accuracy(tau=1).",
        ),
        (
            "lpl(bound=varied(one))",
            "varied needs eps to be a number, a list of numbers or untyped(...), got one. Write varied(eps=1.0)",
        ),
        ("lpl(layers=features)", "lpl needs layers to be none or a list, got features. Write lpl(layers=[features])."),
        ("lpl(pair=[1, 2, 3])", "lpl needs pair to be a list or untyped(...), got [1, 2, 3]. Write lpl(pair=[1, 2.0])."),
        ("lpl(num_steps=varied)", "lpl needs num_steps to be a whole number, got varied. Write lpl(num_steps=3)."),
        ("lpg(steps=1.5)", "lpg needs steps to be a whole number, got 1.5. Write lpg(steps=2)."),
        ("sam(norm=inf)", "sam needs norm to be a whole number, got inf. Write sam(norm=2)."),
    ],
)
def test_errors_name_the_method_the_setting_and_what_to_write(text, message):
    with pytest.raises(ValueError) as error:
        resolve(parse_chain(text), METHODS, HELPERS)
    assert message in str(error.value)


def test_errors_of_views():
    with pytest.raises(ValueError, match=r"noise needs kind to be symmetric, pair or \"human noise\", got symetric\. Write "):
        made("noise(symetric, 0.2)", VIEWS)
    with pytest.raises(
        ValueError, match=r"longtail needs ratio to be a number, got longtail\(\)\. Write longtail\(ratio=\.\.\.\)"
    ):
        split_numbers(parse_chain("longtail"), VIEWS)
    with pytest.raises(ValueError, match="a spec needs a known name"):
        made("longtail(100)+lpl", VIEWS)


def test_views_are_built_like_methods():
    assert made("longtail(100)+noise(symmetric, 0.2)", VIEWS) == (("longtail", 100.0), ("noise", "symmetric", 0.2))
    assert made("noise('human noise')", VIEWS) == (("noise", "human noise", 0.2),)


# --------------------------------------------------------------------------------------------------- structure, numbers


def test_structure_does_not_depend_on_the_numbers():
    assert structure("lpl(bound=0.5)") == structure("lpl(bound=2)") == structure("lpl") == structure("lpl(num_steps=3)")
    assert hash(structure("lpl(bound=0.5)")) == hash(structure("lpl"))
    assert structure("lpl(bound=varied)") == structure("lpl(bound=varied(2, delta_eps=1e-3))") != structure("lpl")
    assert structure("lpl(num_steps=4)") != structure("lpl") != structure("lpl(tau=0.5)")
    assert numbers("lpl(2, tau=3)") == (2.0, 0.1, 3.0, 0.5, 0.25, 2.0)
    assert all(type(n) is float for n in numbers("lpl(2, tau=3)"))


def test_a_structure_is_a_call_with_slots():
    assert structure("sam(norm=1) + lpl(bound=untyped(3))")[0] == Call(
        "sam", (), (("radius", Slot(0)), ("rate", Slot(1)), ("norm", 1))
    )
    assert numbers("sam + lpl(bound=untyped(3))")[:3] == (0.05, 0.5, 3.0)


@pytest.mark.parametrize(
    "text, direct",
    [
        ("ce", lambda: ce()),
        ("lpl", lambda: lpl()),
        ("lpl(bound=varied(0.5, 1), num_steps=7)", lambda: lpl(bound=varied(0.5, delta_eps=1), num_steps=7)),
        ("lpl(split=by_accuracy(tau=0.4))", lambda: lpl(split=by_accuracy(tau=0.4))),
        ("lpl(split=frequency, tau=0.1)", lambda: lpl(split="frequency", tau=0.1)),
        ("lpl(layers=[a, b], rates=[1, 2, 3])", lambda: lpl(layers=("a", "b"), rates=(1, 2, 3))),
        ("lpl(pair=[3, 4], project=true)", lambda: lpl(pair=(3, 4), project=True)),
        ("lpl(anything=[1, a, varied()])", lambda: lpl(anything=(1, "a", varied()))),
        ("lpl(anything=varied)", lambda: lpl(anything=varied())),
        ("lpg(2)", lambda: lpg(2)),
        ("sam(radius=0.1, norm=1)", lambda: sam(radius=0.1, norm=1)),
        ("lpl(bound=8/255, step_size=2/255)", lambda: lpl(bound=8 / 255, step_size=2 / 255)),
    ],
)
def test_build_is_the_direct_call(text, direct):
    assert made(text) == (direct(),)


def test_lists_of_numbers_become_arrays():
    np.testing.assert_array_equal(made("la(tau=[1, 2.5])")[0][1], jnp.array([1.0, 2.5]))
    np.testing.assert_array_equal(made("la(tau=[[1, 2], [3, 4]])")[0][1], jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    assert structure("la(tau=[1, 2])") == structure("la(tau=[0, 3])") != structure("la(tau=[1, 2, 3])")


def test_a_schedule_is_built_from_a_number():
    ((_, radius, _, _),) = made("sam(radius=cosine(0.2, decay_steps=4))")
    np.testing.assert_allclose(radius(2), 0.1, rtol=1e-6)
    assert structure("sam(radius=cosine(0.2))") == structure("sam(radius=cosine)")


def test_one_compilation_for_all_numbers():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(structure, numbers):
        traces.append(structure)
        (_, tau), (_, bound, step_size, *_) = build(structure, numbers, METHODS, HELPERS)
        return tau + 10 * bound + 100 * step_size

    texts = {"la+lpl": 21.0, "la(2)+lpl": 22.0, "la+lpl(0.5)": 16.0, "la(tau=3)+lpl(2, step_size=1)": 123.0}
    for text, want in texts.items():
        np.testing.assert_allclose(step(*split_numbers(parse_chain(text), METHODS, HELPERS)), want, rtol=1e-6)
    assert len(traces) == 1
    step(*split_numbers(parse_chain("la+lpl(num_steps=1)"), METHODS, HELPERS))
    assert len(traces) == 2


def test_a_sweep_is_a_vmap_over_the_numbers():
    sweep = [split_numbers(parse_chain(f"lpl(bound={b})"), METHODS, HELPERS) for b in (1, 2, 3)]
    (static,) = {s for s, _ in sweep}
    bounds = jax.vmap(lambda n: build(static, n, METHODS, HELPERS)[0][1])(jnp.array([n for _, n in sweep]))
    np.testing.assert_array_equal(bounds, [1.0, 2.0, 3.0])


def test_a_factory_derives_structure_from_its_numbers():
    assert made("searched") == (searched(max_steps=10),)
    assert made("searched(bound=0.9, step_size=0.3)") == (searched(bound=0.9, step_size=0.3, max_steps=3),)
    assert made("searched(bound=varied(0.5))") == (searched(bound=varied(0.5), max_steps=5),)
    assert made("searched(bound=[0.1, 0.4])")[0][3] == 4
    assert made("searched(max_steps=7)") == (searched(max_steps=7),)
    assert structure("searched(bound=0.9)") == structure("searched(bound=0.95)") != structure("searched(bound=1)")


def test_derived_structure_has_to_be_settings():
    wrong = functools.partial(la)
    wrong.resolve_structure = lambda settings: dict(steps=len(settings))
    with pytest.raises(
        ValueError, match=r"wrong\.resolve_structure needs to return settings of wrong, got steps\. Return only"
    ):
        split_numbers(parse_chain("wrong"), dict(wrong=wrong))


def test_factories_check_values_before_they_are_traced():
    def checked(*, bound: ArrayLike = 1.0):
        if not isinstance(bound, jax.core.Tracer) and bound < 0:
            raise ValueError(f"checked needs bound >= 0, got {bound}. Write checked(bound=0).")

    split_numbers(parse_chain("checked(1)"), dict(checked=checked))
    with pytest.raises(ValueError, match=r"checked needs bound >= 0, got -1\.0"):
        split_numbers(parse_chain("checked(-1)"), dict(checked=checked))


def test_classes_and_partials_are_factories_too():
    registry = dict(pair=Varied, half=functools.partial(varied, 0.5))
    assert made("pair(1, 2)+half(delta_eps=3)", registry) == (Varied(1, 2), Varied(0.5, 3))
    helpers = dict(pair=Varied)
    built = build(*split_numbers(parse_chain("lpl(bound=pair(1, 2))"), METHODS, helpers), METHODS, helpers)
    assert built == (lpl(bound=Varied(1, 2)),)
