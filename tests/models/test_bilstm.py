"""perturbjax.models.bilstm and what all models of texts share: equation, slices, mask, gradients, types, word vectors, errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax import models
from perturbjax.models import NAMES, TEXT_NAMES, Bert, BiLSTM, create, with_vectors
from perturbjax.models.bilstm import lstm

TOKENS = jnp.asarray([[3, 4, 5, 1, 9], [2, 0, 0, 0, 0], [7, 8, 3, 0, 0]], jnp.int32)
MODEL = BiLSTM(num_classes=3, vocabulary_size=10, embedding=4, width=3)
SMALL_BERT = Bert(num_classes=3, vocabulary_size=10, embedding=8, num_layers=2, num_heads=2, inner=6, positions=7)
MODELS = {
    "bilstm": MODEL,
    "bilstm bfloat16 cosine": BiLSTM(
        num_classes=3, vocabulary_size=10, embedding=4, width=3, dtype=jnp.bfloat16, head="cosine"
    ),
    "bert": SMALL_BERT,
}
RNGS = {"dropout": jax.random.key(1, impl="unsafe_rbg")}  # compiles faster than threefry


def variables_of(model, seed=1, dtype=None):
    """Normal numbers in every leaf: no leaf is as initialised."""
    random = np.random.default_rng(seed)
    tree = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.1, 0.5, leaf.shape), dtype or leaf.dtype), tree)


def run(model, variables, value, *, mask=None, rngs=RNGS, **sites):
    """The pass, compiled as one: word by word it would compile every operation."""
    return jax.jit(partial(model.apply, **sites))(variables, value, mask=mask, rngs=rngs)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def by_hand(params, tokens):
    """(embedding, states, features, logits) of MODEL in float64, a word at a time and without a mask: each text at its own length."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    stages = []
    for row in np.asarray(tokens):
        x = p["embedding"]["embedding"][row[row != 0]]
        ways = []
        for way, text in enumerate((x, x[::-1])):
            c, h, states = np.zeros(3), np.zeros(3), []
            for word in text:
                z = word @ p["stage1"]["kernel"][:, way] + h @ p["stage1"]["recurrent"][way] + p["stage1"]["bias"][way]
                i, f, g, o = sigmoid(z[:3]), sigmoid(z[3:6]), np.tanh(z[6:9]), sigmoid(z[9:])
                c = f * c + i * g
                h = o * np.tanh(c)
                states.append(h)
            ways.append(states if way == 0 else states[::-1])
        states = np.concatenate(ways, axis=1)
        scores = np.tanh(states @ p["features"]["kernel"]) @ p["features"]["vector"][:, 0]
        weights = np.exp(scores) / np.exp(scores).sum()
        features = weights @ states
        stages.append((x, states, features, features @ p["logits"]["kernel"] + p["logits"]["bias"]))
    return list(zip(*stages))


def test_the_pass_is_the_equation():
    variables = variables_of(MODEL)
    embedding, states, features, logits = by_hand(variables["params"], TOKENS)
    at = lambda stop: np.asarray(run(MODEL, variables, TOKENS, stop=stop))
    for n, length in enumerate((5, 1, 3)):
        np.testing.assert_allclose(at("embedding")[n, :length], embedding[n], rtol=1e-6)
        np.testing.assert_array_equal(at("embedding")[n, length:], 0)
        np.testing.assert_allclose(at("stage1")[n, :length], states[n], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(at("features"), features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(at("logits"), logits, rtol=1e-5, atol=1e-6)


def test_the_pass_in_float64_is_the_equation_to_its_precision():
    with jax.enable_x64(True):
        variables = variables_of(MODEL, dtype=jnp.float64)
        got = run(MODEL.copy(dtype=jnp.float64), variables, TOKENS)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, by_hand(variables["params"], TOKENS)[-1], rtol=1e-12)


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        model, variables = MODEL.copy(dtype=jnp.float64), variables_of(MODEL, dtype=jnp.float64)
        weights = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)))
        loss = jax.jit(lambda params: (model.apply({"params": params}, TOKENS) * weights).sum())
        grads = jax.jit(jax.grad(loss))(variables["params"])
        random = np.random.default_rng(3)
        for site, name in (
            ("embedding", "embedding"),
            ("stage1", "kernel"),
            ("stage1", "recurrent"),
            ("stage1", "bias"),
            ("features", "vector"),
        ):
            leaf = variables["params"][site][name]
            along = jnp.asarray(random.normal(size=leaf.shape))
            moved = lambda e: loss(variables["params"] | {site: variables["params"][site] | {name: leaf + e * along}})
            np.testing.assert_allclose((grads[site][name] * along).sum(), (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-7)
        assert not grads["embedding"]["embedding"][0].any()  # the padding's row


def test_the_recurrence_is_that_of_torch():
    torch = pytest.importorskip("torch")
    z_size, width, random = 5, 4, np.random.default_rng(0)
    model = BiLSTM(num_classes=2, vocabulary_size=10, embedding=z_size, width=width)
    params = variables_of(model)["params"]
    net = torch.nn.LSTM(z_size, width, batch_first=True, bidirectional=True)
    tensor = lambda a: torch.tensor(np.array(a))
    with torch.no_grad():
        for way, end in enumerate(("", "_reverse")):
            getattr(net, "weight_ih_l0" + end).copy_(tensor(params["stage1"]["kernel"][:, way].T))
            getattr(net, "weight_hh_l0" + end).copy_(tensor(params["stage1"]["recurrent"][way].T))
            getattr(net, "bias_ih_l0" + end).copy_(tensor(params["stage1"]["bias"][way]))
            getattr(net, "bias_hh_l0" + end).zero_()
        x = random.normal(size=(3, 5, z_size)).astype(np.float32)
        packed = torch.nn.utils.rnn.pack_padded_sequence(tensor(x), [5, 1, 3], batch_first=True, enforce_sorted=False)
        theirs = torch.nn.utils.rnn.pad_packed_sequence(net(packed)[0], batch_first=True)[0].numpy()
    mask = TOKENS != 0
    ours = model.apply({"params": params}, jnp.asarray(x), start="embedding", stop="stage1", mask=mask)
    np.testing.assert_allclose(jnp.where(mask[..., None], ours, 0), theirs, rtol=1e-5, atol=1e-6)


def test_unrolling_changes_nothing_but_the_program():
    variables = variables_of(MODEL)
    plain = run(MODEL, variables, TOKENS)
    np.testing.assert_allclose(run(MODEL.copy(unroll=4), variables, TOKENS), plain, rtol=1e-6, atol=1e-7)


def test_a_state_is_passed_on_where_the_recurrence_is_off():
    random = np.random.default_rng(0)
    z, recurrent = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((4, 1, 1, 8), (1, 2, 8)))
    on = jnp.asarray([True, False, True, True])[:, None, None, None]
    with_gap = lstm(z, on, recurrent)
    np.testing.assert_array_equal(with_gap[1], with_gap[0])
    without = lstm(z[jnp.array([0, 2, 3])], on[jnp.array([0, 2, 3])], recurrent)
    np.testing.assert_allclose(with_gap[jnp.array([0, 2, 3])], without, rtol=1e-6)


# What all models of texts share.


def test_padding_changes_nothing(model):
    variables = variables_of(model)
    longer = jnp.concatenate([TOKENS, jnp.zeros([3, 2], jnp.int32)], axis=1)
    tolerance = dict(rtol=1e-5, atol=1e-6) if model.dtype == jnp.float32 else dict(rtol=0.05, atol=0.05)
    np.testing.assert_allclose(run(model, variables, longer), run(model, variables, TOKENS), **tolerance)


def test_what_stands_at_the_padding_does_not_matter(model):
    variables, side = variables_of(model), model.side_of(TOKENS)
    e = run(model, variables, TOKENS, stop="embedding")
    f = jax.jit(lambda e: model.apply(variables, e, start="embedding", **side))
    there = ~side["mask"][..., None]
    np.testing.assert_array_equal(f(jnp.where(there, 7.0, e)), f(e))
    slope = jax.jit(jax.grad(lambda e: f(e).sum()))(e)
    assert not jnp.where(there, slope, 0).any() and (slope[1, 0] != 0).any()


@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_slice_after_slice_is_the_whole_pass(model, train):
    variables, side = variables_of(model), model.side_of(TOKENS)
    whole, value = run(model, variables, TOKENS, train=train), TOKENS
    for start, stop in zip(model.sites, model.sites[1:]):
        value = run(model, variables, value, train=train, start=start, stop=stop, mask=side["mask"])
    # XLA fuses a layer's norm with the layer after it, and rounds otherwise than where the pass is cut between them.
    np.testing.assert_allclose(value, whole, rtol=2e-6 if isinstance(model, Bert) else 0)


def test_dropout_follows_its_key_and_rests_at_evaluation(model):
    variables = variables_of(model)
    out = lambda seed, train=True: run(model, variables, TOKENS, train=train, rngs={"dropout": jax.random.key(seed)})
    np.testing.assert_array_equal(out(0), out(0))
    assert (out(0) != out(1)).any()
    np.testing.assert_array_equal(out(0, train=False), run(model, variables, TOKENS, rngs=None))


def test_the_bilstm_drops_half_of_the_embedding_and_nothing_else():
    params, words, states = variables_of(MODEL)["params"], jnp.ones([4, 6, 4]), jnp.ones([4, 6, 6])
    drop = lambda x, seed, **sites: run(
        MODEL, {"params": params}, x, train=True, rngs={"dropout": jax.random.key(seed)}, **sites
    )
    assert MODEL.dropout == 0.5
    first, second = (drop(words, seed, start="embedding", stop="stage1") for seed in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(drop(states, 0, start="stage1"), drop(states, 1, start="stage1"))


@pytest.mark.parametrize("name", ["bilstm bfloat16 cosine", "bert"])
def test_bfloat16_computes_in_it_and_keeps_parameters_features_and_logits(name):
    model = MODELS[name].copy(dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    at = lambda stop: jax.eval_shape(lambda v: model.apply(v, TOKENS, stop=stop), variables).dtype
    assert at("embedding") == jnp.float32  # where perturbations act
    assert {at(site) for site in model.sites[2:-2]} == {jnp.dtype("bfloat16")}
    assert at("features") == at("logits") == jnp.float32
    wide = variables_of(model)
    np.testing.assert_allclose(run(model, wide, TOKENS), run(model.copy(dtype=jnp.float32), wide, TOKENS), rtol=0.1, atol=0.1)


def test_a_model_is_a_static_argument():
    make = lambda **options: create("bilstm", num_classes=2, vocabulary_size=9, **options)
    assert hash(make()) == hash(make()) and make() == make() != make(width=4)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_sizes_are_those_of_the_docs(name):
    model = create(name, num_classes=2, vocabulary_size=25_000 if name == "bilstm" else 30_522)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    row = re.search(rf"^\| {name} \|.*\| ([\d ]+) \|$", models.__doc__, re.MULTILINE)
    assert int(row[1].replace(" ", "")) == count


def test_create_hands_the_settings_on():
    shared = dict(num_classes=2, vocabulary_size=9)
    assert create("bilstm", **shared) == BiLSTM(**shared) and create("bert-base", **shared) == Bert(**shared)
    assert create("bilstm", width=7, dropout=0.1, unroll=2, **shared) == BiLSTM(width=7, dropout=0.1, unroll=2, **shared)
    assert create("bilstm", remat=True, conv="lax", **shared) == BiLSTM(**shared)
    bert = create("bert-base", width=8, num_heads=2, num_layers=1, remat=True, dropout=0.0, **shared)
    assert bert == Bert(embedding=8, num_heads=2, num_layers=1, remat=True, dropout=0.0, **shared)
    images = dict(num_classes=2, mean=(0.5,), std=(0.2,))
    assert create("mlp", **images) == create("mlp", dropout=None, **images) == create("mlp", dropout=0.0, **images)
    assert set(NAMES).isdisjoint(TEXT_NAMES)


def test_word_vectors_take_their_places():
    params = MODEL.init(jax.random.key(0), TOKENS)["params"]
    vectors, found = np.zeros([10, 4], np.float32), np.zeros(10, bool)
    vectors[[2, 5]], found[[2, 5]] = [[3, 0, 0, 4], [0, -3, 4, 0]], True
    out = with_vectors(params, vectors, found)
    table, before = out["embedding"]["embedding"], params["embedding"]["embedding"]
    np.testing.assert_array_equal(table[found], vectors[found])
    np.testing.assert_allclose(
        table[~found], before[~found] * (2.5 / before.std()), rtol=1e-5
    )  # root mean square of the found: 2.5
    assert {k: v for k, v in out.items() if k != "embedding"}.keys() == {"stage1", "features", "logits"}
    with pytest.raises(
        ValueError, match=re.escape("needs vectors of shape (10, 4), the model's words and their size, got (10, 5). Create")
    ):
        with_vectors(params, np.zeros([10, 5]), found)


IMAGES = dict(num_classes=2, mean=(0.5,), std=(0.2,))
ERRORS = {
    "no vocabulary": (lambda: create("bilstm", num_classes=2), "needs vocabulary_size for 'bilstm', a model of texts, got none. For images"),
    "images": (lambda: create("bert-base", vocabulary_size=9, **IMAGES), "got mean and std beside it"),
    "texts": (lambda: create("mlp", num_classes=2, vocabulary_size=9), r"needs mean and std for 'mlp', .* got vocabulary_size. For texts"),
    "neither": (lambda: create("cnn", num_classes=2), "needs mean and std for 'cnn', a model of images, got none"),
    "name": (lambda: create("bilstn", num_classes=2, vocabulary_size=9), r"'mlp', 'cnn'.*'bilstm', 'bert-base'.*Write create\('bilstm'"),
    "small vocabulary": (lambda: BiLSTM(num_classes=2, vocabulary_size=1), "vocabulary_size >= 2 and embedding >= 1, got 1 and 300"),
    "floats": (lambda: MODEL.apply({}, jnp.ones([2, 3])), r"BiLSTM needs tokens \[B, L\] as integers, got float32 \(2, 3\)"),
    "rank": (lambda: MODEL.apply({}, TOKENS[0]), r"got int32 \(5,\)"),
    "order": (lambda: MODEL.apply({}, TOKENS, start="logits", stop="input"), "needs start before stop"),
    "site": (lambda: MODEL.apply({}, TOKENS, stop="stage2"), "got 'stage2'. Write 'stage1'"),
    "heads": (lambda: SMALL_BERT.copy(num_heads=3), "num_heads that divides embedding=8, got 2 and 3. Write num_heads=1"),
    "long": (lambda: SMALL_BERT.apply({}, jnp.ones([1, 8], jnp.int32)), "Bert needs texts of at most 7 tokens, got 8. Load them with text_length=7"),
}  # fmt: skip


@pytest.mark.parametrize("make, message", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_given_and_what_to_write(make, message):
    with pytest.raises(ValueError, match=message):
        make()
