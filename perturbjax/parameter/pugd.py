r"""Perturbed unit gradient descent (PUGD).

    ε̂ = |w| ⊙ g/‖|w| ⊙ g‖,    g* = ∇f(w + ρ ε̂),    U = (g* + g)/‖g* + g‖,    w ← w − ηU

Norms run over all parameters together. The link returns U; the learning rate comes after it, as everywhere in optax. Because U
has length 1, learning rate and weight decay weigh differently than under SGD. Source: Tseng et al., "Perturbed Gradients Updating
within Unit Space for Deep Learning", IJCNN 2022; RTS draft, eqs. 1–3.
"""

import jax
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.method import method
from perturbjax.parameter.ascent import AscentState, move, to_climb, unit_tree, weighted, widen
from perturbjax.parameter.asking import Mask, asking
from perturbjax.parameter.timing import Place, Setting, at, check_setting


def pugd_ascent(params: optax.Params, grads: optax.Updates, *, epsilon: ArrayLike = 0.0) -> optax.Updates:
    """ε̂ = |w| ⊙ g/(‖|w| ⊙ g‖ + epsilon), of length 1 over all parameters; zero where w or g is zero."""
    return optax.tree.conj(unit_tree(weighted(params, grads), epsilon))


@method(
    target="parameter", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="Tseng et al., IJCNN 2022", gradient="replaces", off=None,
)  # fmt: skip
def pugd(
    *, radius: Setting = 1.0, epsilon: ArrayLike = 0.0, sync_perturbation: bool = True, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs one more gradient a step.

    `update` takes `grad_fn=`: parameters -> gradients of the same batch's loss, already averaged over devices.

    Args:
      radius: ρ, a number or a schedule; 0 gives the unit gradient.
      epsilon: added to both norms (official code: 1e-12).
      sync_perturbation: as in `sam`: False climbs along each device's own |w| ⊙ g. The g that is added to g* is the whole batch's.
      mask: as in `sam`.
    """
    check_setting("pugd", radius=radius)
    check_number("pugd", low=0, epsilon=epsilon)

    def init(params):
        return AscentState.start()

    def update(updates, state, params, *, grad_fn, local_grads=None, axis_name=None, **extra_args):
        uphill = widen(to_climb("pugd", updates, local_grads, sync_perturbation, axis_name))
        climb = pugd_ascent(params, uphill, epsilon=epsilon)
        above = grad_fn(move(widen(params), climb, at(radius, Place.of(state.count, extra_args))))
        unit = unit_tree(move(widen(above), updates), epsilon)
        unit = jax.tree.map(lambda u, g: u.astype(g.dtype), unit, updates)
        return unit, state.after_step()

    return asking("pugd", init, update, mask=mask)
