"""FLOPs of a traced program, counted from its jaxpr, including iterations of scans and kernels."""

from math import prod

import jax


def flops_of(jaxpr):
    """Count two FLOPs per multiply-add, the most expensive branch, and a kernel's body once per grid cell."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * prod(equation.invars[0].aval.shape[axis] for axis in left)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            total += 2 * equation.outvars[0].aval.size * kernel.size / kernel.shape[params["dimension_numbers"][1][0]]
        elif name == "cond":
            total += max(flops_of(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(map(flops_of, _inner_jaxprs(params)))
            assert not (name == "while" and inner), "a loop whose trips are not known"
            trips = params["length"] if name == "scan" else 1
            if name == "pallas_call":
                trips = prod(params["grid_mapping"].grid)
            total += inner * trips
    return total


def _inner_jaxprs(params):
    for value in jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        value = getattr(value, "jaxpr", value)
        if hasattr(value, "eqns"):
            yield value
