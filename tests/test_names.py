"""perturbjax.names: the nearest name comes first, papers' symbols are understood, and positions mean in Python what they mean in text."""

import inspect
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax import names, spec, taxonomy

METHODS = {name: make for name, make in taxonomy.methods().items() if make is not pj.ce}
HELPERS = taxonomy.helpers()
settings_of = lambda make: inspect.signature(make).parameters


@pytest.mark.parametrize(
    "typed, instead",
    [
        ("SAM", "Write sam (near it: gsam, esam, asam)"),
        ("Mixup", "Write mixup (near it: "),
        ("labelsmoothing", "Write label_smoothing"),
        ("lpll", "Write lpl (near it: spl, lpg, lpa)"),
        ("qqqq", "got qqqq. All "),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest_ones_first_and_where_all_are(typed, instead):
    with pytest.raises(ValueError) as error:
        spec.resolve(spec.parse_chain(typed), taxonomy.registry(), HELPERS)
    message = str(error.value)
    assert message.startswith(f"a spec needs a known name, got {typed}. ") and instead in message
    assert message.endswith(f"All {len(taxonomy.registry())} names: --list, or python -m perturbjax.taxonomy.")
    assert len(message) < 250


@pytest.mark.parametrize(
    "text, instead",
    [
        ("sam(rho=0.05)", "sam(radius=0.05)"),
        ("gsam(ρ=0.1)", "gsam(radius=0.1)"),
        ("pugd(eps=0.5)", "pugd(radius=0.5)"),
        ("lpl(epsilon=0.5)", "lpl(bound=0.5)"),
        ("at(eps=8/255)", f"at(bound={8 / 255})"),
        ("lpl(alpha=0.1)", "lpl(step_size=0.1)"),
        ("lpa(layer=stage1)", "lpa(site=stage1)"),
        ("manifold_mixup(layers=[input])", "manifold_mixup(sites=[input])"),
        ("logpert(lambda=0.2)", "logpert(weight=0.2)"),
        ("isda(lam=0.2)", "isda(strength=0.2)"),
        ("ls(smoothing=0.2)", "ls(weight=0.2)"),
        ("dropout(p=0.2)", "dropout(rate=0.2)"),
        ("kd(T=2)", "kd(temperature=2)"),
        ("arcface(m=0.2)", "arcface(margin=0.2)"),
        ("dp_sgd(sigma=2)", "dp_sgd(noise_multiplier=2)"),
        ("sam(Radius=0.1)", "sam(radius=0.1)"),
        ("lpl(stepsize=0.1)", "lpl(step_size=0.1)"),
        ("lpl(bound=varied(deltaeps=1))", "varied(delta_eps=1)"),
    ],
)
def test_a_setting_by_its_symbol_in_the_papers_is_answered_with_its_name_here(text, instead):
    with pytest.raises(ValueError, match=" needs a setting that it has ") as error:
        spec.resolve(spec.parse_chain(text), taxonomy.registry(), HELPERS)
    assert str(error.value).endswith(f" Write {instead}.")


def test_symbols_stand_for_settings_that_methods_have():
    known = {name for make in METHODS.values() for name in settings_of(make)}
    for symbols, meant in names.SYMBOLS.items():
        assert set(meant) <= known, symbols
    for name, make in METHODS.items():
        own = list(settings_of(make))
        for symbol in {symbol for symbols in names.SYMBOLS for symbol in symbols} - set(own):
            assert names.setting(symbol, own) in ("", *own), (name, symbol)


def test_what_a_method_calls_so_itself_is_no_mistake():
    assert spec.canonical(spec.resolve(spec.parse_chain("gsam(alpha=0.2)"), taxonomy.registry())) == "gsam(alpha=0.2)"
    assert names.setting("alpha", settings_of(pj.mixup)) == "alpha"


def test_python_says_the_same():
    with pytest.raises(
        TypeError, match=r"^sam needs a setting that it has \(radius, p, .*\), got rho=0\.05\. Write sam\(radius=0\.05\)\.$"
    ):
        pj.sam(rho=0.05)
    with pytest.raises(TypeError, match=r"lpl needs a setting that it has .*, got layer='x'\. Remove it\.$"):
        pj.lpl(layer="x")
    with pytest.raises(TypeError, match=r"got epsilon=\.\.\.\. Write lpl\(bound=\.\.\.\)\.$"):
        pj.lpl(epsilon=jnp.ones([3]))
    with pytest.raises(TypeError, match=r"lpl needs bound once, got it by position and by name\. Remove bound=0\.2\."):
        pj.lpl(0.1, bound=0.2)
    with pytest.raises(
        TypeError, match=r"logit_adjustment needs at most 1 setting \(tau\), got 2 values\. Remove the last 1\."
    ):
        pj.logit_adjustment(1.0, 2.0)
    for name, meant in dict(SAM="sam", Mixup="mixup", lppl="lpl", by_acuracy="by_accuracy", LA="logit_adjustment").items():
        with pytest.raises(AttributeError, match=rf"module 'perturbjax' has no attribute '{name}'\. Write pj\.{meant}\.$"):
            getattr(pj, name)
    with pytest.raises(AttributeError, match="module 'perturbjax' has no attribute '__wrapped__'$"):
        pj.__wrapped__  # noqa: B018


def leading(make):
    """(name, value) of the first settings, other values than the defaults where any number will do."""
    found = {}
    for name, parameter in settings_of(make).items():
        value = parameter.default
        if type(value) not in (int, float, bool, str):
            break
        found[name] = 0.9 * value if type(value) is float and np.isfinite(value) else value
    return found


@pytest.mark.parametrize("name", METHODS)
def test_values_by_position_are_in_python_what_they_are_on_the_command_line(name, monkeypatch):
    """What the factory gets, by name, from either."""
    make, received, method = METHODS[name], [], sys.modules["perturbjax.method"]
    real = method.by_name
    monkeypatch.setattr(method, "by_name", lambda *given: received.append(real(*given)) or received[-1])
    given = leading(make)
    make(*given.values())
    del received[1:]  # what it is made of
    text = spec.canonical((spec.Call(name, tuple(given.values())),))
    spec.build(*spec.split_numbers(spec.parse_chain(text), {name: make}, HELPERS), {name: make}, HELPERS)
    assert received[0] == given
    of_text = next(one for one in received[1:] if set(one) >= set(given))
    assert {key: of_text[key] for key in given} == given
    assert list(given) == list(spec.setting_names(make))[: len(given)]


@pytest.mark.parametrize("name", HELPERS)
def test_helpers_take_values_by_position_in_python_as_on_the_command_line(name):
    assert {p.kind for p in settings_of(HELPERS[name]).values()} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert spec.setting_names(HELPERS[name]) == tuple(settings_of(HELPERS[name]))


def test_a_position_means_the_same_setting():
    built = lambda text: spec.build(*spec.split_numbers(spec.parse_chain(text), HELPERS, HELPERS), HELPERS, HELPERS)[0]
    assert pj.varied(0.5, 1.0) == pj.varied(eps=0.5, delta_eps=1.0) == built("varied(0.5, 1.0)")
    assert pj.varied_by_frequency(0.5, 1.0) == built("varied_by_frequency(0.5, 1.0)")
    assert pj.layer_scaled(0.5, 0.9) == built("layer_scaled(0.5, 0.9)")
    assert pj.linear(0.1, 0) == pj.linear(first=0.1, last=0) == built("linear(0.1, 0)")
    assert pj.cosine(1.0, 0.2) == built("cosine(1, 0.2)")
    assert pj.by_rate(0.1, 0.01) == built("by_rate(0.1, 0.01)")
    assert pj.last(0.3) == built("last(0.3)") and pj.every(5, 0.25) == built("every(5, 0.25)")
    context = pj.Context(5, class_counts=np.array([50, 30, 20, 10, 5]))
    for share in (0.4, 0.6):
        directions = [made.direction((), context) for made in (pj.by_frequency(share), built(f"by_frequency({share})"))]
        np.testing.assert_array_equal(*directions)
        assert int((directions[0] < 0).sum()) == round(5 * share)
