"""perturbjax.models.conv: bit for bit JAX's convolution and gradients, of every order, also where it hands over to lax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from perturbjax.models.conv import conv_general_dilated

NHWC = ("NHWC", "HWIO", "NHWC")
CASES = {  # image, kernel, strides, padding and the rest
    "1x1": ((2, 5, 5, 3), (1, 1, 3, 4), (1, 1), "SAME", {}),
    "1x1 stride 2": ((2, 5, 6, 3), (1, 1, 3, 4), (2, 2), "VALID", {}),
    "3x3": ((3, 6, 6, 2), (3, 3, 2, 5), (1, 1), "SAME", {}),
    "3x3 valid": ((3, 6, 5, 2), (3, 3, 2, 5), (1, 1), "VALID", {}),
    "3x3 stride 2 even": ((2, 8, 8, 3), (3, 3, 3, 4), (2, 2), "SAME", {}),
    "3x3 stride 2 odd": ((2, 7, 7, 3), (3, 3, 3, 4), (2, 2), "SAME", {}),
    "3x3 stride 2 cuts the edge": ((2, 8, 8, 3), (3, 3, 3, 4), (2, 2), "VALID", {}),
    "3x3 stride 2 padding 1": ((2, 8, 8, 3), (3, 3, 3, 4), (2, 2), [(1, 1), (1, 1)], {}),
    "1x3 dilated": ((1, 7, 9, 2), (1, 3, 2, 2), (1, 2), "SAME", {"rhs_dilation": (1, 2)}),
    "transposed": ((2, 4, 4, 2), (3, 3, 2, 3), (1, 1), [(2, 1), (1, 2)], {"lhs_dilation": (2, 2)}),
    "highest precision": ((2, 5, 5, 3), (3, 3, 3, 4), (1, 1), "SAME", {"precision": "highest"}),
}


def draw(*shapes, dtype=jnp.float32):
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def both(case, dtype=jnp.float32, order=1):
    """Value and gradients (order 1), or the gradients of a function of the gradients (order 2), by our convolution and by lax's."""
    image, kernel, strides, padding, options = CASES[case]

    def by(convolution):
        conv = lambda x, k: convolution(x, k, strides, padding, dimension_numbers=NHWC, **options)
        f = lambda *args: (conv(*args) ** 2).sum()
        for _ in range(order - 1):
            f = lambda *args, f=f: sum((g**2).sum() for g in jax.grad(f, (0, 1))(*args))
        return jax.jit(lambda *args: (conv(*args), jax.grad(f, (0, 1))(*args)))(*draw(image, kernel, dtype=dtype))

    return by(conv_general_dilated), by(lax.conv_general_dilated)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_lax_bit_for_bit(case):
    jax.tree.map(np.testing.assert_array_equal, *both(case))


@pytest.mark.parametrize("case", ["1x1 stride 2", "3x3", "3x3 stride 2 even"])
def test_second_order_gradients_too(case):
    jax.tree.map(np.testing.assert_array_equal, *both(case, order=2))


@pytest.mark.parametrize("case", ["1x1 stride 2", "3x3", "3x3 stride 2 even"])
def test_in_bfloat16_too(case):
    ours, theirs = both(case, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}


def test_every_gradient_convolution_has_the_layout_of_the_forward_one():
    conv = lambda x, k: conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=NHWC)
    first = jax.grad(lambda *args: (conv(*args) ** 2).sum(), (0, 1))
    second = jax.grad(lambda *args: sum((g**2).sum() for g in first(*args)), (0, 1))
    lines = jax.jit(second).lower(*draw((2, 6, 6, 3), (3, 3, 3, 4))).as_text().splitlines()
    layouts = [line.split("dim_numbers = ")[1].split(", window")[0] for line in lines if "stablehlo.convolution" in line]
    assert len(layouts) > 3 and set(layouts) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


@pytest.mark.parametrize("axis", [None, 0], ids=["one kernel", "three kernels"])
def test_vmap_is_one_by_one(axis):
    x, k = draw((3, 2, 5, 5, 2), (3, 3, 3, 2, 4))
    conv = lambda x, k: conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=NHWC)
    grads = jax.jit(jax.grad(lambda x, k: (conv(x, k) ** 2).sum(), (0, 1)))
    mapped = jax.jit(jax.vmap(grads, (0, axis)))(x, k[0] if axis is None else k)
    for i in range(3):
        single = grads(x[i], k[0] if axis is None else k[i])
        for ours, expected in zip(mapped, single):
            np.testing.assert_allclose(ours[i], expected, rtol=1e-5, atol=1e-5)  # other sums in another order


SUM_IN_FLOAT32 = {"preferred_element_type": jnp.float32}
OTHERS = {
    "groups": ((2, 5, 5, 4), (3, 3, 2, 6), (1, 1), "SAME", {"dimension_numbers": NHWC, "feature_group_count": 2}),
    "NCHW": ((2, 3, 5, 5), (4, 3, 3, 3), (1, 1), "SAME", {}),
    "1-D": ((2, 7, 3), (3, 3, 4), (2,), "SAME", {"dimension_numbers": ("NWC", "WIO", "NWC")}),
    "accumulation": ((2, 5, 5, 3), (3, 3, 3, 4), (1, 1), "SAME", {"dimension_numbers": NHWC} | SUM_IN_FLOAT32),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_covered_is_done_by_lax(case):
    image, kernel, strides, padding, options = OTHERS[case]
    x, k = draw(image, kernel)
    ours, theirs = (
        lambda x, conv=conv: conv(x, k, strides, padding, **options)
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(ours(x), theirs(x))
    jax.jvp(ours, (x,), (x,))  # forward mode works: this is not the custom_vjp


@pytest.mark.parametrize("options", [{}, {"strides": 2, "padding": 1}, {"feature_group_count": 2}], ids=str)
def test_flax_layers_take_it(options):
    x, kernel = draw((2, 8, 8, 4), (3, 3, 4 // options.get("feature_group_count", 1), 6))

    def by(conv):
        layer = nn.Conv(6, (3, 3), use_bias=False, conv_general_dilated=conv, **options)
        return jax.jit(jax.value_and_grad(lambda k: (layer.apply({"params": {"kernel": k}}, x) ** 2).sum()))(kernel)

    jax.tree.map(np.testing.assert_array_equal, by(conv_general_dilated), by(None))
