"""Counts the floating-point operations of a traced program, independent of the compiler.

XLA's own count includes the body of a loop only once, and changes between versions. Here the body
of a loop and the block of a Pallas kernel count as often as they run. Dead code is not counted. A
multiplication with an addition is two operations.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Operations that only move, name or create values.
_FREE = frozenset(
    (
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "iota",
        "name",
        "optimization_barrier",
        "pad",
        "random_bits",
        "random_fold_in",
        "random_seed",
        "random_split",
        "random_unwrap",
        "random_wrap",
        "reshape",
        "rev",
        "sharding_constraint",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
    )
)


class Operations(NamedTuple):
    """Counts of floating-point operations.

    Attributes:
      matmul_flops: operations of matrix products and convolutions.
      others: all other operations: one per element of an equation's largest operand or result, and
        n log2 n for sorting n elements.
      kernels: the part of `matmul_flops` inside fused kernels (Pallas's and cuDNN's attention),
        which are opaque to compilers.
    """

    matmul_flops: float
    others: float
    kernels: float = 0.0

    @property
    def total(self) -> float:
        """The sum of `matmul_flops` and `others`."""
        return self.matmul_flops + self.others


def count(traced: jax.stages.Traced) -> Operations:
    """Counts the operations of a traced program, summed over all devices.

    A conditional counts as its most expensive branch. Convolutions over dilated inputs are counted
    without the products with the inserted zeros.

    Raises:
      NotImplementedError: a loop of unknown length contains matrix products.
    """
    closed = traced.jaxpr
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _of_jaxpr(used)


def _of_jaxpr(jaxpr: core.Jaxpr) -> Operations:
    counts = [_of_equation(equation) for equation in jaxpr.eqns]
    return Operations(*(math.fsum(kind) for kind in zip(*counts))) if counts else Operations(0, 0)


def _of_equation(equation: Any) -> Operations:
    name, inner = equation.primitive.name, list(core.jaxprs_in_params(equation.params))
    if name.startswith("dot_product_attention_"):
        matmul_flops = _of_cudnn(equation, backward="_bwd" in name)
        return Operations(matmul_flops, 0, matmul_flops)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return Operations(
            2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted), 0
        )
    if name == "conv_general_dilated":
        return Operations(_of_convolution(equation), 0)
    if name == "cond":
        return max(map(_of_jaxpr, inner), key=lambda found: found.total)
    # The inner function of a scatter or a reduction combines two elements, and is not counted
    # itself.
    if inner and not name.startswith(("scatter", "reduce")):
        found = [_of_jaxpr(jaxpr) for jaxpr in inner]
        trips = _trips(equation)
        matmul_flops, others, kernels = (trips * math.fsum(kind) for kind in zip(*found))
        if name == "while" and matmul_flops:
            raise NotImplementedError("matrix products in a loop of unknown length")
        return Operations(matmul_flops, others, matmul_flops if name == "pallas_call" else kernels)
    if name in _FREE:
        return Operations(0, 0)
    largest = max(
        (v.aval.size for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape")),
        default=0,
    )
    if name == "sort":
        return Operations(0, largest * max(math.log2(max(largest, 1)), 1))
    return Operations(0, largest)


def _trips(equation: Any) -> int:
    """Returns the number of executions of an equation's body."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    if equation.primitive.name == "shard_map":  # Each device runs it on its shard.
        mesh = equation.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in equation.params["newly_manual_axes"])
    return 1


def _of_convolution(equation: Any) -> float:
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    # Of the kernel's axes: output features, input features (of one group), then its window.
    _, features, *window = (kernel[axis] for axis in numbers.rhs_spec)
    matmul_flops = equation.outvars[0].aval.size * features * math.prod(window)
    return 2 * matmul_flops / math.prod(equation.params["lhs_dilation"])


def _of_cudnn(equation: Any, backward: bool) -> int:
    """Returns the operations of cuDNN's fused attention.

    It has two products in the forward pass, and five in the backward pass, which recomputes the
    logits.
    """
    query, key = (v.aval.shape for v in equation.invars[:2])
    # The axis of lengths: layout 0 is [B, N, H, d], layout 1 is [B, H, N, d].
    lengths = 2 if equation.params["layout"] else 1
    return (5 if backward else 2) * 2 * math.prod(query) * key[lengths]
