"""Every other perturbation of the logits with LPL behind it: LPL's steps start from the logits that the other one made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, B, COUNTS = 4, 12, np.array([10, 40, 5, 20])
MODEL = pj.line(
    {"features": lambda w, x: x, "logits": lambda w, a: a @ w["w"].T + w["b"][None]}, head=lambda w: (w["w"], w["b"])
)
OTHERS = {
    "la": pj.logit_adjustment(tau=1.5),
    "balanced_softmax": pj.balanced_softmax(),
    "zla": pj.zla(ratio=5.0),
    "isda": pj.isda(),
    "ldam": pj.ldam(scale=3.0),
    "ldam_drw": pj.ldam(scale=3.0, drw=True),
    "arcface": pj.arcface(scale=20.0),
    "arcface_norm": pj.arcface(scale="norm"),
    "cosface": pj.cosface(scale=3.0),
    "afl": pj.adaptive_margin(scale=3.0),
}


@pytest.mark.parametrize("search", ["rest", "alone"])
@pytest.mark.parametrize("name", OTHERS)
def test_lpl_behind_it_perturbs_its_logits(name, search):
    rng = np.random.default_rng(0)
    w = dict(w=jnp.asarray(rng.normal(size=(C, 3)), jnp.float32), b=jnp.asarray(rng.normal(size=C), jnp.float32))
    x, y = jnp.asarray(rng.normal(size=(B, 3)), jnp.float32), jnp.asarray(rng.integers(0, C, B), jnp.int32)
    kw = dict(bound=0.6, step_size=0.2, direction=jnp.array([1.0, -1.0, 1.0, -1.0]))

    def run(links):
        made = pj.objective(MODEL, links, num_classes=C, class_counts=COUNTS)
        return made(w, made.init(w, x), pj.batch(x, y), progress=0.9)[1]

    alone, both = run(OTHERS[name]), run(pj.chain(OTHERS[name], pj.lpl(**kw, search=search)))
    delta = pj.lpl_delta(alone.logits, y, **kw)
    np.testing.assert_allclose(both.logits, alone.logits + delta, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(alone.logits - run(()).logits).max()) > 1e-2 and float(jnp.abs(delta).max()) > 1e-2
    for ours, theirs in zip(jax.tree.leaves(both.states[0]), jax.tree.leaves(alone.states[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
