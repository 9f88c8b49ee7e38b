"""perturbjax.models.bert and .safetensors: the equation by hand, public weights in both spellings, remat, damaged and foreign files."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.models import Bert, bert_fields, create, load_bert, read_safetensors

SIZES = dict(embedding=8, num_layers=2, inner=6, positions=7)
MODEL = Bert(num_classes=3, vocabulary_size=10, num_heads=2, **SIZES)
TOKENS = jnp.asarray([[3, 4, 5, 1, 9], [2, 6, 0, 0, 0], [7, 8, 3, 0, 0]], jnp.int32)
NAMES = {np.dtype(k): v for k, v in {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "u1": "U8", "?": "BOOL"}.items()}
NAMES[np.dtype(jnp.bfloat16)] = "BF16"


def write_safetensors(path, arrays, metadata=None):
    """The format, written from its description."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, array in arrays.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += np.ascontiguousarray(array).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def weights_of(size=8, layers=2, inner=6, positions=7, words=10, types=2):
    """Random weights under the names and in the shapes of a public BertModel."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(0.0, 0.5, shape).astype(np.float32)
    found = {
        "embeddings.word_embeddings.weight": normal(words, size),
        "embeddings.position_embeddings.weight": normal(positions, size),
        "embeddings.token_type_embeddings.weight": normal(types, size),
    }
    dense = lambda name, out, into: {f"{name}.weight": normal(out, into), f"{name}.bias": normal(out)}
    norm = lambda name: {f"{name}.LayerNorm.weight": 1 + normal(size), f"{name}.LayerNorm.bias": normal(size)}
    found |= norm("embeddings") | dense("pooler.dense", size, size)
    for n in range(layers):
        at = f"encoder.layer.{n}."
        for name in ("query", "key", "value"):
            found |= dense(f"{at}attention.self.{name}", size, size)
        found |= dense(f"{at}attention.output.dense", size, size) | norm(f"{at}attention.output")
        found |= dense(f"{at}intermediate.dense", inner, size) | dense(f"{at}output.dense", size, inner) | norm(f"{at}output")
    return found


WEIGHTS = weights_of()
erf = np.vectorize(math.erf)


def by_hand(weights, tokens, heads=2):
    """The pooled features of BertModel in float64, from the paper and from the weights' own names; each text at its own length."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    dense = lambda name, x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def attention(at, x):
        q, k, v = (dense(f"{at}attention.self.{name}", x) for name in ("query", "key", "value"))
        out, size = [], x.shape[1] // heads
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, own] @ k[:, own].T / np.sqrt(size))
            out.append(scores / scores.sum(-1, keepdims=True) @ v[:, own])
        return np.concatenate(out, axis=1)

    features = []
    for row in np.asarray(tokens):
        row = row[row != 0]
        x = w["embeddings.word_embeddings.weight"][row] + w["embeddings.position_embeddings.weight"][: len(row)]
        x = norm("embeddings", x + w["embeddings.token_type_embeddings.weight"][0])
        for n in range(sum(name.endswith("intermediate.dense.bias") for name in w)):
            at = f"encoder.layer.{n}."
            x = norm(f"{at}attention.output", x + dense(f"{at}attention.output.dense", attention(at, x)))
            inner = dense(f"{at}intermediate.dense", x)
            inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
            x = norm(f"{at}output", x + dense(f"{at}output.dense", inner))
        features.append(np.tanh(dense("pooler.dense", x[0])))
    return np.stack(features)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]


def features(params, **sites):
    return jax.jit(lambda p: MODEL.apply({"params": p}, TOKENS, stop="features", **sites))(params)


def test_loaded_weights_give_the_pass_of_the_paper(tmp_path, params):
    loaded = load_bert(write_safetensors(tmp_path / "model.safetensors", WEIGHTS, {"format": "pt"}), params)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(features(loaded), by_hand(WEIGHTS, TOKENS), rtol=1e-4, atol=1e-5)
    assert np.abs(features(loaded) - features(params)).max() > 0.1
    np.testing.assert_array_equal(loaded["logits"]["kernel"], params["logits"]["kernel"])  # no classifier in there
    np.testing.assert_array_equal(load_bert(tmp_path, params)["stem"]["type"], loaded["stem"]["type"])  # the folder


def test_the_pass_in_float64_is_that_of_the_paper_to_its_precision(tmp_path, params):
    file = write_safetensors(tmp_path / "x.safetensors", {name: array.astype(np.float64) for name, array in WEIGHTS.items()})
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        loaded, model = load_bert(file, wide), MODEL.copy(dtype=jnp.float64)
        got = jax.jit(lambda p: model.apply({"params": p}, TOKENS, stop="features"))(loaded)
        np.testing.assert_allclose(got, by_hand(WEIGHTS, TOKENS), rtol=1e-10)


def test_weights_load_under_their_other_names(tmp_path, params):
    plain = load_bert(write_safetensors(tmp_path / "a.safetensors", WEIGHTS), params)
    # bert-base-uncased: for pre-training, with a head and the norms' old names; a fine-tuned classifier
    old = lambda name: "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    head = {"cls.predictions.bias": np.zeros(10, np.float32), "bert.embeddings.position_ids": np.arange(7)[None]}
    other = load_bert(write_safetensors(tmp_path / "b.safetensors", {old(k): v for k, v in WEIGHTS.items()} | head), params)
    jax.tree.map(np.testing.assert_array_equal, other, plain)
    head = {"classifier.weight": np.arange(24, dtype=np.float32).reshape(3, 8), "classifier.bias": np.ones(3, np.float32)}
    tuned = load_bert(
        write_safetensors(tmp_path / "c.safetensors", {f"bert.{k}": v for k, v in WEIGHTS.items()} | head), params
    )
    np.testing.assert_array_equal(tuned["logits"]["kernel"], head["classifier.weight"].T)
    two = {"classifier.weight": np.zeros([2, 8], np.float32), "classifier.bias": np.zeros(2, np.float32)}
    kept = load_bert(write_safetensors(tmp_path / "d.safetensors", WEIGHTS | two), params)
    np.testing.assert_array_equal(kept["logits"]["kernel"], params["logits"]["kernel"])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_weights_of_other_types_become_float32(tmp_path, params, dtype):
    other = {name: array.astype(dtype) for name, array in WEIGHTS.items()}
    loaded = load_bert(write_safetensors(tmp_path / "x.safetensors", other), params)
    kernel = loaded["stage1"]["query"]["kernel"]
    assert kernel.dtype == jnp.float32
    expected = other["encoder.layer.0.attention.self.query.weight"].astype(np.float32).T
    np.testing.assert_array_equal(kernel, expected)


def test_the_fields_follow_from_the_weights(tmp_path, params):
    file = write_safetensors(tmp_path / "x.safetensors", WEIGHTS)
    assert bert_fields(file, num_heads=2) == dict(vocabulary_size=10, num_heads=2, **SIZES)
    assert bert_fields(file)["num_heads"] == 1
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "hidden_act": "gelu"}')
    assert bert_fields(file)["num_heads"] == 4
    assert create("bert-base", num_classes=3, **bert_fields(file, num_heads=2)) == MODEL
    short = MODEL.copy(positions=5)  # fewer places than in the file: the first ones
    own = jax.jit(short.init)(jax.random.key(0), TOKENS)["params"]
    np.testing.assert_array_equal(
        load_bert(file, own)["stem"]["position"], WEIGHTS["embeddings.position_embeddings.weight"][:5]
    )


def test_the_pass_is_that_of_transformers(tmp_path, params):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6, max_position_embeddings=7
    )
    theirs = transformers.BertModel(config).eval()
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    tokens = torch.tensor(np.asarray(TOKENS), dtype=torch.long)
    with torch.no_grad():
        pooled = theirs(tokens, attention_mask=(tokens != 0).long()).pooler_output.numpy()
    np.testing.assert_allclose(features(load_bert(tmp_path, params)), pooled, rtol=1e-4, atol=1e-5)


def test_remat_changes_neither_variables_nor_gradients(params):
    small = MODEL.copy(num_layers=1)
    own = {site: params[site] for site in params if site != "stage2"}
    key = jax.random.key(1, impl="unsafe_rbg")  # compiles faster than threefry
    loss = lambda model: lambda p: (model.apply({"params": p}, TOKENS, train=True, rngs={"dropout": key}) ** 2).sum()
    grads = [jax.jit(jax.grad(loss(small.copy(remat=remat))))(own) for remat in (False, True)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)
    assert jax.tree.structure(grads[1]) == jax.tree.structure(own)


def test_a_layer_sees_the_whole_text_and_not_the_padding(params):
    slope = jax.jit(
        jax.jacobian(lambda e: MODEL.apply({"params": params}, e, start="embedding", stop="features", mask=TOKENS != 0))
    )
    e = MODEL.apply({"params": params}, TOKENS, stop="embedding")
    seen = np.abs(np.asarray(slope(e))).max((1, 4))  # [sample of the feature, sample of the word, word]
    for n, length in enumerate((5, 2, 3)):
        assert (seen[n, n, :length] > 0).all() and (seen[n, n, length:] == 0).all()
    assert (seen[~np.eye(3, dtype=bool)] == 0).all()


def changed(**changes):
    return {name: array for name, array in (WEIGHTS | changes).items() if array is not None}


QUERY = "encoder.layer.1.attention.self.query.weight"
FOREIGN = {
    "another model's": ({"conv1": np.zeros(2, np.float32)}, "a BERT, embeddings.word_embeddings.weight among them, got conv1"),
    "no pooler": (changed(**{"pooler.dense.weight": None}), "pooler.dense.weight among them"),
    "words": (changed(**{"embeddings.word_embeddings.weight": np.zeros([11, 8], np.float32)}), r"of shape \(10, 8\), got \(11, 8\)"),
    "shape": (changed(**{QUERY: np.zeros([8, 9], np.float32)}), r"query.weight of shape \(8, 8\), got \(9, 8\).*\*\*bert_fields"),
    "layers": (weights_of(layers=3), "needs weights of 2 layers, got 3 in .*num_layers=3"),
    "adapters": (
        changed(**{"encoder.layer.0.output.adapters.up.weight": np.zeros([8, 2], np.float32)}),
        "a plain BERT, got encoder.layer.0.output.adapters.up.weight too .1 arrays without a place.",
    ),
    "positions": (weights_of(positions=6), r"position_embeddings.weight of shape \(7, 8\), got \(6, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize(("weights", "message"), FOREIGN.values(), ids=FOREIGN)
def test_weights_of_another_model_are_refused(tmp_path, params, weights, message):
    with pytest.raises(ValueError, match=message):
        load_bert(write_safetensors(tmp_path / "x.safetensors", weights), params)


ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([True, False]),
    "none": np.zeros([0, 4], np.float64),
    "number": np.array(7, np.int64),
    "c": np.array([1.5, -2], jnp.bfloat16),
}


def test_arrays_come_back(tmp_path):
    found = read_safetensors(write_safetensors(tmp_path / "x.safetensors", ARRAYS, {"made": "by hand"}))
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape


def test_the_reader_agrees_with_the_package(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    arrays = {name: array for name, array in ARRAYS.items() if name != "c"}
    package.save_file(arrays, tmp_path / "x.safetensors")
    found = read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, found, arrays)


def header(text, size=0):
    return len(text).to_bytes(8, "little") + text.encode() + bytes(size)


DAMAGED = {
    "empty": (b"", "its header would be 0 bytes of 0"),
    "a pickle": (b"PK\x03\x04" + bytes(60), "other forms of weights .* are not read: safetensors.torch.save_file"),
    "header cut": (header('{"a": 1}')[:-2], "its header would be 8 bytes of 14"),
    "no JSON": (header("hello"), "header: JSONDecodeError"),
    "no object": (header("[1]"), "header: "),
    "no entry": (header('{"a": 1}'), "header: TypeError"),
    "type": (header('{"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}', 1), "dtype F8, which is none of BF16, F64"),
    "short": (header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 7), "a float32 .2. lies at 0 to 8 of 7 bytes"),
    "size": (header('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', 8), "lies at 0 to 8"),
    "negative": (header('{"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 8]}}', 8), "header: ValueError"),
    "turned": (header('{"a": {"dtype": "U8", "shape": [0], "data_offsets": [8, 0]}}', 8), "lies at 8 to 0"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_files_that_are_no_safetensors(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="read_safetensors needs a whole .safetensors file, got .*" + message):
        read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=re.escape("read_safetensors needs a file")):
        read_safetensors(tmp_path / "y.safetensors")
