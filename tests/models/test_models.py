"""The models themselves: sizes against the literature, shortcuts, heads, statistics, types, and errors that say what to write."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax import models
from perturbjax.models import CNN, MLP, NAMES, ResNet, WideResNet, create
from perturbjax.models.blocks import Ops
from perturbjax.models.conv import conv_general_dilated
from perturbjax.models.net import unit
from perturbjax.models.resnet import subsampled

IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 3)), jnp.float32)
SHARED = dict(num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
RGB = dict(num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
LITERATURE = {  # million parameters: He et al. table 6, Zagoruyko and Komodakis table 4
    **{"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7},
    **{"wrn16-8": 11.0, "wrn28-10": 36.5, "la_net": 0.30},
}


def shapes(model, images=IMAGES):
    return jax.eval_shape(model.init, jax.random.key(0), images)


def filled(model, images=IMAGES):
    """The model's variables with any positive numbers: initialising would spend seconds on compiling random bits."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.5, 0.5, leaf.shape) ** 2, leaf.dtype), shapes(model, images))


def paths(tree):
    return ["/".join(key.key for key in path) for path, _ in jax.tree.flatten_with_path(tree)[0]]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_docs_and_of_the_literature(name):
    model = create(name, num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(model, jnp.ones([1, 32, 32, 3]))["params"]))
    row = re.search(rf"^\| {name} \|.*\| ([\d ]+) \|$", models.__doc__, re.MULTILINE)
    assert int(row[1].replace(" ", "")) == count
    if name in LITERATURE:
        known = LITERATURE[name]
        assert round(count / 1e6, 1 if known in (1.7, 11.0, 36.5) else 2) == known


def test_sites_can_be_read_from_an_unbound_model():
    assert MLP(hidden=(3, 3, 3), **SHARED).sites == ("input", "stage1", "stage2", "stage3", "features", "logits")
    assert CNN(num_stages=1, **SHARED).sites == ("input", "stem", "stage1", "features", "logits")
    for model in (ResNet(**SHARED), WideResNet(**SHARED)):
        assert model.sites == ("input", "stem", "stage1", "stage2", "stage3", "features", "logits")


def test_sites_have_the_shapes_of_the_papers():
    at = lambda model, stop: jax.eval_shape(lambda v: model.apply(v, jnp.ones([2, 32, 32, 3]), stop=stop), variables).shape
    for model, widths in ((ResNet(depth=8, **SHARED), (16, 32, 64)), (WideResNet(depth=10, widen=4, **SHARED), (64, 128, 256))):
        variables = shapes(model, jnp.ones([2, 32, 32, 3]))
        assert at(model, "stem") == (2, 32, 32, 16)
        assert [at(model, f"stage{i}") for i in (1, 2, 3)] == [(2, s, s, w) for s, w in zip((32, 16, 8), widths)]
        assert at(model, "features") == (2, widths[-1])


def test_option_a_takes_every_second_pixel_and_zero_channels():
    x = IMAGES[..., :2]
    np.testing.assert_array_equal(subsampled(x, 5, 2), np.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(1, 2)]))
    np.testing.assert_array_equal(subsampled(x, 2, 1), x)
    kinds = {path.split("/")[-2] for path in paths(shapes(ResNet(depth=8, **SHARED))["params"])}
    assert kinds == {"conv", "norm", "conv1", "norm1", "conv2", "norm2", "logits"}  # nothing belongs to a shortcut


def test_option_b_has_a_convolution_and_a_norm_where_the_shape_changes():
    made = {s: shapes(create("resnet32", shortcut=s, **RGB), jnp.ones([1, 32, 32, 3]))["params"] for s in "AB"}
    more = {path for path in paths(made["B"]) if path not in paths(made["A"])}
    assert {path.rsplit("/", 2)[0] for path in more} == {"stage2/block0", "stage3/block0"}
    count = lambda params: sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count(made["B"]) - count(made["A"]) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert f"{count(made['B']):,}".replace(",", " ") in models.__doc__


def test_option_b_is_option_a_with_that_convolution_s_kernel():
    """Its kernel puts every channel between the zero channels of option A; running statistics that change nothing."""
    plain, other = (ResNet(depth=8, width=2, shortcut=s, **SHARED) for s in "AB")
    of_a = filled(plain)
    params, stats = (jax.tree.map(jnp.copy, of_a[name]) for name in ("params", "batch_stats"))
    for stage, width in (("stage2", 2), ("stage3", 4)):
        kernel = jnp.pad(jnp.eye(width), [(0, 0), (width // 2, width // 2)])[None, None]
        params[stage]["block0"] |= {
            "shortcut": {"kernel": kernel}, "shortcut_norm": {"scale": jnp.ones(2 * width), "bias": jnp.zeros(2 * width)}
        }  # fmt: skip
        stats[stage]["block0"]["shortcut_norm"] = {"mean": jnp.zeros(2 * width), "var": jnp.ones(2 * width) - 1e-5}
    ours, theirs = other.apply({"params": params, "batch_stats": stats}, IMAGES), plain.apply(of_a, IMAGES)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_strided_convolutions_look_at_the_pixels_of_the_shortcut():
    centre = lambda key, shape, dtype: (
        jnp.zeros(shape, dtype).at[shape[0] // 2, shape[1] // 2].set(jnp.eye(*shape[2:], dtype=dtype))
    )
    ops = Ops(conv_general_dilated, centre, dropout=0.0, dtype=jnp.float32, train=False)

    class One(nn.Module):
        size: int

        @nn.compact
        def __call__(self, x):
            return ops.conv("conv", x, 3, stride=2, size=self.size)

    for x in (IMAGES, IMAGES[:, :7, :7]):
        for size in (1, 3):
            np.testing.assert_array_equal(One(size).init_with_output(jax.random.key(0), x)[0], x[:, ::2, ::2])


def test_wide_blocks_have_a_convolution_in_the_shortcut_where_the_shape_changes():
    where = {p.rsplit("/", 2)[0] for p in paths(shapes(WideResNet(depth=16, **SHARED))["params"]) if "shortcut" in p}
    assert where == {"stage1/block0", "stage2/block0", "stage3/block0"}
    narrow = paths(shapes(WideResNet(depth=10, widen=1, **SHARED))["params"])
    assert not [p for p in narrow if p.startswith("stage1") and "shortcut" in p]


@pytest.mark.parametrize("model, fan", [(ResNet(**SHARED), 9 * 32), (WideResNet(**SHARED), 9 * 64)])  # fan-in, fan-out
def test_kernels_have_the_variance_of_he(model, fan):
    kernel = model.ops(train=False).initializer(jax.random.key(0), (3, 3, 32, 64), jnp.float32)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / fan), rtol=0.05)


def test_the_input_site_is_pixels_and_the_model_normalises():
    ours, plain = (
        MLP(hidden=(4,), num_classes=5, mean=m, std=s)
        for m, s in (((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)), ((0.0,) * 3, (1.0,) * 3))
    )
    variables = filled(ours)
    normalised = (IMAGES - np.float32([[[[0.5, 0.4, 0.3]]]])) / np.float32([[[[0.2, 0.2, 0.3]]]])
    np.testing.assert_allclose(ours.apply(variables, IMAGES), plain.apply(variables, normalised), rtol=1e-6)


def test_training_averages_the_statistics_and_evaluation_leaves_them():
    model = WideResNet(depth=10, width=2, widen=1, **SHARED)
    variables = filled(model)
    apply = jax.jit(
        lambda v, x, train: model.apply(v, x, train=train, stop="stage1", mutable=["batch_stats"]), static_argnums=2
    )
    old, new = (v["batch_stats"]["stage1"]["block0"]["norm1"] for v in (variables, apply(variables, IMAGES, True)[1]))
    stem = model.apply(variables, IMAGES, stop="stem")  # what norm1 sees
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * stem.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * stem.var((0, 1, 2)), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, apply(variables, IMAGES, False)[1]["batch_stats"], variables["batch_stats"])
    start = model.init(jax.random.key(0), jnp.ones([1, 4, 4, 2]), start="stage3", stop="features")["batch_stats"]["features"][
        "norm"
    ]
    assert start["mean"].tolist() == [0.0] * 2 and start["var"].tolist() == [1.0] * 2


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8", "wrn16-8"])
def test_bfloat16_computes_in_it_and_keeps_parameters_features_and_logits(name):
    model, wide = (create(name, width=2, dtype=dtype, **SHARED) for dtype in (jnp.bfloat16, jnp.float32))
    variables = shapes(model)
    assert variables == shapes(wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    at = lambda stop, start="input", x=IMAGES: (
        jax.eval_shape(lambda v: model.apply(v, x, start=start, stop=stop), variables).dtype
    )
    assert [at(stop) for stop in model.sites] == ["float32"] + ["bfloat16"] * (len(model.sites) - 3) + ["float32"] * 2
    value = jax.eval_shape(lambda v: model.apply(v, IMAGES, stop="stage1"), variables)
    assert at("stage2", "stage1", jnp.zeros(value.shape, jnp.float32)) == "bfloat16"  # a perturbed value may be float32


def test_head_of_gives_the_class_rows():
    model = MLP(hidden=(6,), **SHARED)
    variables = filled(model)
    weight, bias = model.head_of(variables["params"])
    features = model.apply(variables, IMAGES, stop="features")
    assert weight.shape == (5, 6) and bias.shape == (5,)
    np.testing.assert_allclose(features @ weight.T + bias[None], model.apply(variables, IMAGES), rtol=1e-6)


def test_the_cosine_head_sees_directions_only():
    model = MLP(hidden=(6,), head="cosine", scale=7.0, **SHARED)
    variables = filled(model)
    assert paths(variables["params"]["logits"]) == ["kernel"]
    head = lambda features: model.apply(variables, features, start="features")
    features = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    kernel = np.asarray(variables["params"]["logits"]["kernel"])
    cosine = features @ kernel / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(kernel, axis=0)[None]
    np.testing.assert_allclose(head(features), 7 * cosine, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head(9 * features), head(features), rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(jax.grad(lambda f: unit(f, 1).sum())(jnp.zeros([2, 6]))).all()
    with pytest.raises(ValueError, match="got head='cosine'.*head=\"linear\""):
        model.head_of(variables["params"])


def test_both_convolutions_give_the_same_gradients():
    models = [create("resnet8", width=2, conv=conv, **SHARED) for conv in ("canonical", "lax")]
    variables = filled(models[0])
    grads = [jax.jit(jax.grad(lambda v, model=model: (model.apply(v, IMAGES) ** 2).sum()))(variables) for model in models]
    jax.tree.map(np.testing.assert_array_equal, *grads)


def test_a_model_is_a_static_argument():
    make = lambda **options: create("cnn", **SHARED | dict(mean=[0.5, 0.4, 0.3]), **options)
    assert hash(make()) == hash(make()) and make() == make() != make(width=4)


def test_width_and_options_reach_the_model():
    assert create("mlp", width=32, **SHARED).hidden == (32, 16)
    assert create("mlp", width=32, hidden=(3,), **SHARED).hidden == (3,)
    assert create("wrn16-8", width=2, dropout=0.3, **SHARED) == WideResNet(depth=16, widen=8, width=2, dropout=0.3, **SHARED)
    assert create("cnn", num_stages=3, head="cosine", scale=16.0, **SHARED).scale == 16.0


GREY = dict(num_classes=5, mean=(0.5,), std=(0.2,))
ERRORS = {
    "name": (lambda: create("resnet33", **SHARED), r"'mlp', 'cnn'.*got 'resnet33'. Write create\('resnet32'"),
    "head": (lambda: create("cnn", head="cosin", **SHARED), "got 'cosin'"),
    "conv": (lambda: create("cnn", conv="fast", **SHARED), "'canonical', 'lax'.*got 'fast'"),
    "shortcut": (lambda: ResNet(shortcut="C", **SHARED), 'shortcut="A" or shortcut="B", got \'C\'. Write shortcut="A"'),
    "depth": (lambda: ResNet(depth=18, **SHARED), "depth = 6n [+] 2, got 18. Write depth=20"),
    "wide depth": (lambda: WideResNet(depth=3, **SHARED), "depth = 6n [+] 4, got 3. Write depth=10"),
    "mean and std": (lambda: create("cnn", num_classes=5, mean=(0.5, 0.4), std=(0.2,)), r"mean=\(0.5, 0.4\) and std=\(0.2,\)"),
    "hidden": (lambda: MLP(hidden=(), **SHARED), r"got hidden=\(\)"),
    "rank": (lambda: shapes(CNN(**GREY), jnp.ones([4, 8, 8])), r"\[B, H, W, 1\].*got \(4, 8, 8\).*pixels\[..., None\]"),
    "channels": (lambda: shapes(MLP(**GREY)), r"\[B, H, W, 1\].*got \(4, 8, 8, 3\).*3 numbers in mean"),
    "small": (lambda: shapes(ResNet(depth=8, **SHARED), IMAGES[:, :3]), r"at least 4, got \(4, 3, 8, 3\)"),
    "integers": (lambda: shapes(MLP(**GREY), jnp.ones([4, 8, 8, 1], jnp.uint8)), "got uint8. Write pixels / 255"),
}


@pytest.mark.parametrize("make, message", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_given_and_what_to_write(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8", "wrn16-8"])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_one_more_output_is_for_abstention_and_changes_nothing_else(name, head):
    plain, more = (create(name, head=head, width=2, abstain=abstain, **SHARED) for abstain in (False, True))
    assert more.sites == (*plain.sites[:-1], "outputs", "logits")
    variables, both = (jax.jit(lambda key, m=m: m.init(key, IMAGES))(jax.random.key(0)) for m in (plain, more))
    jax.tree.map(
        np.testing.assert_array_equal, variables["params"], {k: v for k, v in both["params"].items() if k != "abstention"}
    )
    outputs, logits = more.apply(both, IMAGES, stop="outputs"), plain.apply(variables, IMAGES)
    assert outputs.shape == (4, 6)
    np.testing.assert_array_equal(outputs[:, :5], logits)
    np.testing.assert_array_equal(more.apply(both, IMAGES), logits)
    np.testing.assert_array_equal(more.apply(both, outputs, start="outputs"), logits)


def test_an_abstaining_classifier_trains_on_a_model_of_ours():
    model = create("mlp", width=4, abstain=True, **SHARED)
    params = model.init(jax.random.key(0), IMAGES)["params"]
    made = pj.objective(model, pj.dac(start=0.0), num_classes=5)
    states, data = made.init(params, IMAGES), pj.batch(IMAGES, jnp.arange(4))
    grads, _ = jax.grad(made, has_aux=True)(params, states, data, progress=0.0)
    assert float(jnp.abs(grads["abstention"]["kernel"]).max()) > 0
    with pytest.raises(ValueError, match="dac needs 'outputs', got none. Give the model one more output: create.*--abstain"):
        pj.objective(create("mlp", **SHARED), pj.dac(), num_classes=5)
