"""Random parameters without a compilation: module.init would compile every initialiser."""

import jax
import numpy as np


def random_params(module, *inputs, **named):
    """float32 weights of standard deviation 0.3 for a module, zero-initialised ones included."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)["params"]
    return random_tree(shapes)


def random_tree(shapes, seed=0):
    """float32 leaves of standard deviation 0.3 for a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def kept(function, *arguments):
    """Shapes of the residuals of a function's backward pass, without its arguments."""
    _, back = jax.vjp(function, *arguments)
    given = [x.shape for x in jax.tree.leaves(arguments)]
    return [x.shape for x in jax.tree.leaves(back) if x.shape not in given]
