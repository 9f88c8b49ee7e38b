r"""Methods and data views written as text: names, settings in brackets, `+` for a chain, commas between entries.

    list  := chain ("," chain)*                     ce, la+lpl, lpl(bound=varied(0.5, delta_eps=1.0), split=mean)
    chain := call ("+" call)*                       longtail(100)+noise(symmetric, 0.2)
    call  := word ["(" [entry ("," entry)*] ")"]    entry := [word "="] value
    value := 3 | -0.5 | 1e-3 | 8/255 | inf | true | false | none | word | "quoted" | [value, ...] | word(...)

Nothing here knows a method. A *registry* maps names to factories, *helpers* maps names to callables that a setting's value
may call; names, settings and types are checked against the signatures and annotations of both. `split_numbers` separates
what must be static (structure) from what may be traced (numbers), so that one compiled step serves all values of a setting:

    structure, numbers = split_numbers(parse_chain("lpl(bound=0.5)"), registry, helpers)
    step = jax.jit(lambda numbers, batch: ... build(structure, numbers, registry, helpers) ...)
"""

import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from perturbjax import names

Registry = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Call:
    """`name(args, key=value)`, hashable. Values: int, float, bool, None, str, tuples of values, calls of helpers."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Slot:
    """Stands in a structure where the number with this index goes."""

    index: int


# ------------------------------------------------------------------------------------------------------- text -> calls

WORD = r"[^\W\d][\w.-]*"
NUMBER = r"-?(?:inf|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![\w.])"
STRING = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
PATH = r"[~\w./@:-]*\w\.(?:npz|npy|txt|csv)(?![\w./-])"  # of a data file, without quotes; no name of a method ends so
KINDS = dict(path=PATH, number=NUMBER, word=WORD, string=STRING, mark=r"[-(),=+/\[\]]", end=r"\Z")
TOKEN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in KINDS.items()), re.DOTALL)
CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None}


class _Token(NamedTuple):
    kind: str  # a key of KINDS
    text: str
    start: int


class _Parser:
    """Recursive descent over the tokens of one text; one method per line of the grammar at the top."""

    def __init__(self, text: str):
        self.text, self.at, self.tokens = text, 0, list[_Token]()
        while not self.tokens or self.tokens[-1].kind != "end":
            stop = len(self.tokens[-1].text) + self.tokens[-1].start if self.tokens else 0
            start = len(text) - len(text[stop:].lstrip())
            if match := TOKEN.match(text, start):
                self.tokens.append(_Token(str(match.lastgroup), match[0], start))
            elif text[start] in "\"'":
                self.fail("a closing quote", "End it with the quote it starts with", _Token("", text[start], start))
            else:
                wrong = _Token("", text[start:].split()[0], start)
                self.fail("numbers, words and ( ) [ ] , + = /", "Put quotes around anything else", wrong)

    def fail(self, what: str, instead: str, token: _Token | None = None) -> NoReturn:
        """Raise the error, with the line it is in and a caret under the place."""
        token = token or self.tokens[self.at]
        first = self.text.rfind("\n", 0, token.start) + 1
        line, got = self.text[first:].split("\n")[0], repr(token.text) if token.text else "the end"
        raise ValueError(f"a spec needs {what}, got {got}. {instead}.\n  {line}\n  {' ' * (token.start - first)}^")

    def next(self) -> _Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def skip(self, mark: str) -> bool:
        """Step over `mark` if it comes next."""
        found = self.tokens[self.at].text == mark
        self.at += found
        return found

    def chains(self) -> list[tuple[str, tuple[Call, ...]]]:
        found = list[tuple[str, tuple[Call, ...]]]()
        while not found or self.skip(","):
            start = self.tokens[self.at].start
            chain = self.chain()
            found.append((self.text[start : self.tokens[self.at].start].rstrip(), chain))
        if self.tokens[self.at].kind != "end":
            self.fail("',' or '+' after an entry", "Write a comma between entries, + inside a chain, name(...) for settings")
        return found

    def chain(self) -> tuple[Call, ...]:
        calls = [self.call()]
        while self.skip("+"):
            calls.append(self.call())
        return tuple(calls)

    def call(self) -> Call:
        if self.tokens[self.at].kind != "word":
            self.fail("a name", "Write name or name(setting=value)")
        return self.settings(self.next().text)

    def settings(self, name: str) -> Call:
        """What follows a name: brackets with positional values, then settings by name; or nothing."""
        args, kwargs = list[Any](), dict[str, Any]()
        for token in self.entries("(", ")"):
            if token.kind == "word" and self.tokens[self.at + 1].text == "=":
                if token.text in kwargs:
                    self.fail(f"each setting of {name} once", "Remove one of the two")
                self.at += 2
                kwargs[token.text] = self.value()
            elif kwargs:
                self.fail("settings by name after the first one by name", f"Write {name}(value, ..., setting=value)")
            else:
                args.append(self.value())
        return Call(name, tuple(args), tuple(kwargs.items()))

    def entries(self, opening: str, closing: str) -> Iterator[_Token]:
        """Yield the first token of each entry of a bracketed list; the caller reads the entry."""
        bracket = self.tokens[self.at]
        if not self.skip(opening) or self.skip(closing):
            return
        yield self.tokens[self.at]
        while not self.skip(closing):
            if self.tokens[self.at].kind == "end":
                self.fail(f"{closing!r} for every {opening!r}", f"Add {closing!r}", bracket)
            if not self.skip(","):
                self.fail(f"',' or {closing!r}", "Write a comma between values and close every bracket")
            yield self.tokens[self.at]

    def value(self) -> Any:
        token = self.tokens[self.at]
        if token.text == "[":
            return tuple(self.value() for _ in self.entries("[", "]"))
        if token.kind in ("mark", "end"):
            self.fail("a value", "Write a number, a word, true, false, none, [a, b] or helper(...)")
        self.next()
        if token.kind == "number":
            return self.fraction(_number(token.text))
        if token.kind == "string":
            return re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL)
        if token.text in CONSTANTS:
            return CONSTANTS[token.text]
        return self.settings(token.text) if self.tokens[self.at].text == "(" else token.text

    def fraction(self, number: float) -> float:
        if not self.skip("/"):
            return number
        below = self.next()
        if below.kind != "number" or _number(below.text) == 0:
            self.fail("a number other than 0 after '/'", "Write a fraction such as 8/255", below)
        return number / _number(below.text)


def _number(text: str) -> float:
    return int(text) if re.fullmatch("-?[0-9]+", text) else float(text)


def parse_list(text: str) -> list[tuple[str, tuple[Call, ...]]]:
    """Each entry of a comma-separated list, as typed (for tables) and parsed.

    >>> [typed for typed, chain in parse_list("ce, la+lpl( bound = 8/255 )")]
    ['ce', 'la+lpl( bound = 8/255 )']
    """
    return _Parser(text).chains()


def parse_chain(text: str) -> tuple[Call, ...]:
    """One entry: calls joined by `+`.

    >>> parse_chain("la + lpl(bound=varied)")
    (Call(name='la', args=(), kwargs=()), Call(name='lpl', args=(), kwargs=(('bound', 'varied'),)))
    """
    entries = parse_list(text)
    if len(entries) > 1:
        raise ValueError(f"a chain needs one entry, got {len(entries)}: {text!r}. Write + instead of the comma.")
    return entries[0][1]


def canonical(chain: Sequence[Call]) -> str:
    """The normal form of a chain: one spelling of every value, parsed back to the same calls.

    >>> canonical(parse_chain("la + lpl( bound =1e-1,split= by_frequency ( .4 ) , sites=['a b', None])"))
    'la+lpl(bound=0.1, split=by_frequency(0.4), sites=["a b", none])'
    """
    return "+".join(_write(call).removesuffix("()") for call in chain)


def _write(value: Any) -> str:
    match value:
        case Call():
            settings = [_write(v) for v in value.args] + [f"{k}={_write(v)}" for k, v in value.kwargs]
            return f"{value.name}({', '.join(settings)})"
        case tuple():
            return f"[{', '.join(map(_write, value))}]"
        case bool() | None:
            return str(value).lower()
        case str() if value in CONSTANTS or re.fullmatch(NUMBER, value) or not re.fullmatch(WORD, value):
            return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return str(value)


# ------------------------------------------------------------------------------- calls checked against the signatures

UNANNOTATED = inspect.Parameter.empty
ANYTHING = (Any, object, UNANNOTATED)
PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", types.NoneType: "none"}
ARRAYS = (jax.Array, np.ndarray)
SEQUENCES = (tuple, list, Sequence, Iterable, jax.Array)


class Accepts(NamedTuple):
    """What an annotation lets through."""

    plain: frozenset[type]  # of PLAIN's keys; `object` if anything fits
    literals: tuple[Any, ...]  # the values of Literal[...]
    sequences: tuple[Any, ...]  # tuple[...], list[...], ...; jax.Array for (nested) lists of numbers
    classes: tuple[Any, ...]  # callables, protocols and classes, which only a helper can return

    @property
    def structural(self) -> bool:
        """Whether only static values fit: int, bool, str, Literal, None, and sequences of these."""
        inner = [a for s in self.sequences for a in typing.get_args(s) if a is not ...]
        loose = self.plain & {float, object} or self.classes or jax.Array in self.sequences
        return not loose and all(_accepts(a).structural for a in inner)

    def items(self, length: int) -> list[Any] | None:
        """The annotation of each item of a list of this length; None if no such list fits."""
        for sequence in self.sequences:
            inner = typing.get_args(sequence)
            if sequence is jax.Array:
                return [jax.Array] * length
            if typing.get_origin(sequence) is not tuple or ... in inner:
                return [inner[0] if inner else Any] * length
            if length == len(inner):
                return list(inner)
        return [Any] * length if object in self.plain else None

    def lists(self, value: Any) -> bool:
        """Whether the value is one of the literals."""
        return any(type(value) is type(x) and value == x for x in self.literals)

    def fits(self, value: Any) -> bool:
        """Whether a value that is no list and no call fits as it is."""
        kinds = {type(value), object} | ({float} if type(value) is int else set())
        return bool(self.plain & kinds) or self.lists(value)

    def is_number(self, value: Any) -> bool:
        """Whether the value may be traced: a float, or an int where the annotation is not about ints."""
        whole = type(value) is int and (float in self.plain or int not in self.plain)
        return (type(value) is float or whole) and not self.lists(value)

    def takes(self, helper: Callable[..., Any]) -> bool:
        """Whether what the helper returns, by its annotation if it has one, fits."""
        returned = _accepts(helper if isinstance(helper, type) else _hints(helper).get("return", UNANNOTATED))
        if object in self.plain | returned.plain:
            return not self.structural
        plain = (self.plain & returned.plain) - {types.NoneType}
        return bool(plain) or any(_is_a(r, c) for r in returned.classes for c in self.classes)


def _is_a(returned: Any, wanted: Any) -> bool:
    try:
        return issubclass(returned, wanted)
    except TypeError:  # protocols and other forms that only a type checker understands
        return True


@functools.cache
def _accepts(annotation: Any) -> Accepts:
    members = _members(annotation)
    if any(m in ARRAYS for m in members):  # ArrayLike lists bool, complex ... too; it means a number or an array
        foreign = (*ARRAYS, bool, int, float, complex)
        other = [m for m in members if m not in foreign and not (isinstance(m, type) and issubclass(m, np.generic))]
        members = [float, jax.Array, *other]
    plain, literals, sequences, classes = set[type](), list[Any](), list[Any](), list[Any]()
    for member in members:
        origin = typing.get_origin(member) or member
        if member in ANYTHING or isinstance(member, typing.TypeVar):
            plain.add(object)
        elif member in PLAIN:
            plain.add(member)
        elif origin is Literal:
            literals += typing.get_args(member)
        elif origin in SEQUENCES:
            sequences.append(member)
        else:
            classes.append(origin)
    return Accepts(frozenset(plain), tuple(literals), tuple(sequences), tuple(classes))


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation: unions flattened, aliases and Annotated opened."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in _members(a)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    inner = getattr(annotation, "__value__", getattr(annotation, "__supertype__", annotation))  # type X = ..., NewType
    return [types.NoneType if inner is None else inner] if inner is annotation else _members(inner)


@functools.cache
def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """The evaluated annotations; one that cannot be evaluated (imported for the type checker only) counts as absent."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    try:
        constructor = typing.get_type_hints(typing.cast(Any, factory).__init__) if isinstance(factory, type) else {}
        return constructor | typing.get_type_hints(factory)
    except (NameError, TypeError, AttributeError):
        inner = inspect.unwrap(factory)
        scope = dict(getattr(inner, "__globals__", {}))
        return {name: _evaluate(hint, scope) for name, hint in getattr(inner, "__annotations__", {}).items()}


def _evaluate(hint: Any, scope: dict[str, Any]) -> Any:
    try:
        return eval(hint, scope) if isinstance(hint, str) else hint
    except (NameError, TypeError, AttributeError, SyntaxError):
        return UNANNOTATED


@functools.cache
def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The settings of a factory in declaration order, annotations evaluated."""
    hints, found = _hints(factory), inspect.signature(factory).parameters.values()
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.replace(annotation=hints.get(p.name, UNANNOTATED)) for p in named}


def setting_names(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The settings of a factory, in declaration order."""
    return tuple(_parameters(factory))


def resolve(chain: Sequence[Call], registry: Registry, helpers: Registry | None = None) -> tuple[Call, ...]:
    """Check a chain against the factories' signatures; return it with every value under its setting's name.

    Positional values fill the settings in declaration order, keyword-only ones too. A word that names a helper is that
    helper called without settings, unless the setting takes words.

    >>> def noise(*, kind: Literal["symmetric", "pair"], rate: float = 0.2): ...
    >>> canonical(resolve(parse_chain("noise(pair, 0.4)"), dict(noise=noise)))
    'noise(kind=pair, rate=0.4)'
    >>> resolve(parse_chain("noise(pairs)"), dict(noise=noise))
    Traceback (most recent call last):
    ValueError: noise needs kind to be symmetric or pair, got pairs. Write noise(kind=pair).
    """
    return tuple(_resolve_call(call, registry, helpers or {}) for call in chain)


def _resolve_call(call: Call, table: Registry, helpers: Registry) -> Call:
    name = call.name
    if name not in table:
        raise ValueError(names.unknown_name(name, table))
    parameters = _parameters(table[name])
    if surplus := call.args[len(parameters) :]:
        raise ValueError(names.too_many(name, parameters, _write(call), len(surplus)))
    given = dict(zip(parameters, call.args, strict=False))
    for key, value in call.kwargs:
        if key not in parameters:
            raise ValueError(names.unknown_setting(name, key, _write(value), parameters))
        if key in given:
            raise ValueError(f"{name} needs {key} once, got {_write(call)}. Remove {key}={_write(value)}.")
        given[key] = value
    for key, parameter in parameters.items():
        if parameter.default is UNANNOTATED and key not in given:
            what = _describe(_accepts(parameter.annotation), helpers)
            raise ValueError(f"{name} needs {key} to be {what}, got {_write(call)}. Write {name}({key}=...).")
    resolved = ((k, _resolve_setting(given[k], p, name, helpers)) for k, p in parameters.items() if k in given)
    return Call(name, (), tuple(resolved))


def _resolve_setting(value: Any, parameter: inspect.Parameter, owner: str, helpers: Registry) -> Any:
    def fill(part: Any, accepts: Accepts) -> Any:
        if isinstance(part, str) and accepts.fits(part) and object not in accepts.plain:
            return part
        call = Call(part) if isinstance(part, str) else part
        if isinstance(call, Call) and call.name in helpers and accepts.takes(helpers[call.name]):
            return _resolve_call(call, helpers, helpers)
        if isinstance(part, tuple) and accepts.items(len(part)) is not None:
            return _each(fill, part, accepts)
        if isinstance(part, (Call, tuple)) or not accepts.fits(part):
            what, line = _describe(accepts, helpers), f"{owner}({parameter.name}={_suggest(value, parameter, helpers)})"
            raise ValueError(f"{owner} needs {parameter.name} to be {what}, got {_write(part)}. Write {line}.")
        return part

    return fill(value, _accepts(parameter.annotation))


def _each(f: Callable[[Any, Accepts], Any], values: tuple[Any, ...], accepts: Accepts) -> tuple[Any, ...]:
    """Apply f to the items of a list, each with what its own annotation accepts."""
    items = accepts.items(len(values)) or [Any] * len(values)
    return tuple(f(v, _accepts(a)) for v, a in zip(values, items, strict=True))


def _describe(accepts: Accepts, helpers: Registry) -> str:
    lists = {True: "a list of numbers", False: "a list"}
    parts = [_write(x) for x in accepts.literals] + [text for kind, text in PLAIN.items() if kind in accepts.plain]
    parts += [lists[s is jax.Array] for s in accepts.sequences] + ["any value"] * (object in accepts.plain)
    return names.listed(parts + [f"{name}(...)" for name in _fitting(accepts, helpers)], "or")


def _suggest(value: Any, parameter: inspect.Parameter, helpers: Registry) -> str:
    """A value that would be accepted: the nearest word, the value rounded or as a list, the default, or any word."""
    accepts = _accepts(parameter.annotation)
    words = [*map(_write, accepts.literals), *_fitting(accepts, helpers)]
    if isinstance(value, Call) and (near := _nearest(value.name, _fitting(accepts, helpers))):
        return _write(replace(value, name=near))
    if isinstance(value, str) and (near := _nearest(value, words)):
        return near
    if int in accepts.plain and type(value) is float and math.isfinite(value):
        return str(round(value))
    if not isinstance(value, (Call, tuple)) and any(_accepts(a).fits(value) for a in accepts.items(1) or []):
        return _write((value,))
    return _write(parameter.default) if _is_plain(parameter.default) else (words or ["..."])[0]


def _fitting(accepts: Accepts, helpers: Registry) -> list[str]:
    return [name for name, helper in helpers.items() if accepts.takes(helper)]


def _nearest(name: str, known: Iterable[str]) -> str:
    return next(iter(names.near(name, known, 1)), "")


# -------------------------------------------------------------------------------------- calls -> structure and numbers


def split_numbers(
    chain: Sequence[Call], registry: Registry, helpers: Registry | None = None
) -> tuple[tuple[Call, ...], tuple[float, ...]]:
    """Check a chain and split it into a hashable structure and the numbers that may be traced, defaults included.

    A number is structure where its annotation says so (int, Literal, int | None). A factory may have an attribute
    `resolve_structure`, a function from the dictionary of all its settings to some structural ones that follow from the
    numbers, such as a largest number of steps: what it returns goes into the structure. The factories are called once with
    the concrete numbers, so that those that check values raise here.

    >>> def lpl(*, bound: jax.typing.ArrayLike = 1.0, step_size: jax.typing.ArrayLike = 0.1, max_steps: int = 3): ...
    >>> structure, numbers = split_numbers(parse_chain("lpl(2)"), dict(lpl=lpl))
    >>> numbers
    (2.0, 0.1)
    >>> structure == split_numbers(parse_chain("lpl"), dict(lpl=lpl))[0]
    True
    """
    helpers, numbers = helpers or {}, list[float]()
    structure = tuple(_split_call(call, registry, helpers, numbers) for call in resolve(chain, registry, helpers))
    build(structure, numbers, registry, helpers)  # factories check values, and can only do so before they are traced
    return structure, tuple(numbers)


def _split_call(call: Call, table: Registry, helpers: Registry, numbers: list[float]) -> Call:
    def split(value: Any, accepts: Accepts) -> Any:
        if isinstance(value, Call):
            return _split_call(value, helpers, helpers, numbers)
        if isinstance(value, tuple):
            return _each(split, value, accepts)
        if not accepts.is_number(value):
            return value
        numbers.append(float(value))
        return Slot(len(numbers) - 1)

    factory, parameters = table[call.name], _parameters(table[call.name])
    values = {k: p.default for k, p in parameters.items() if _is_plain(p.default)} | dict(call.kwargs)
    static = dict[str, Any]()
    if hasattr(factory, "resolve_structure"):
        defaults = {k: p.default for k, p in parameters.items() if p.default is not UNANNOTATED}
        concrete = _settings(replace(call, kwargs=tuple(values.items())), (), table, helpers)
        static = factory.resolve_structure(defaults | concrete)
        if unknown := set(static) - set(parameters):
            known = names.listed(parameters, "and")
            raise ValueError(
                f"{call.name}.resolve_structure needs to return settings of {call.name}, got {names.listed(sorted(unknown), 'and')}. "
                f"Return only these: {known}."
            )
    settings = (
        (k, static[k] if k in static else split(values[k], _accepts(p.annotation)))
        for k, p in parameters.items()
        if k in values or k in static
    )
    return Call(call.name, (), tuple(settings))


def _is_plain(value: Any) -> bool:
    """Whether a default can be written in a spec; others (arrays, callables) are left to the factory."""
    return type(value) in PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def build(structure: Sequence[Call], numbers: Any, registry: Registry, helpers: Registry | None = None) -> tuple[Any, ...]:
    """What the factories return for a structure and its numbers, a tuple or a vector, which may be traced.

    >>> def sam(*, radius: float = 0.05): return f"sam with radius {radius}"
    >>> build(*split_numbers(parse_chain("sam(0.1)"), dict(sam=sam)), dict(sam=sam))
    ('sam with radius 0.1',)
    """
    return tuple(registry[call.name](**_settings(call, numbers, registry, helpers or {})) for call in structure)


def _settings(call: Call, numbers: Any, table: Registry, helpers: Registry) -> dict[str, Any]:
    """The arguments of one call: numbers in their slots, helpers called, lists of numbers as arrays where these fit."""

    def fill(value: Any, accepts: Accepts) -> Any:
        if isinstance(value, Slot):
            return numbers[value.index]
        if isinstance(value, Call):
            return helpers[value.name](**_settings(value, numbers, helpers, helpers))
        if isinstance(value, tuple):
            filled = _each(fill, value, accepts)
            return jnp.asarray(filled) if jax.Array in accepts.sequences else filled
        return value

    parameters = _parameters(table[call.name])
    return {name: fill(value, _accepts(parameters[name].annotation)) for name, value in call.kwargs}
