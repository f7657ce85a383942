"""The state of training, and its optimiser."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from focusdpo_jax.models import stacking

_DECAY_SHARE = 0.2  # Share of the steps in which "wsd" decays.


@flax.struct.dataclass
class TrainState:
    """The state of a run, without its frozen parameters.

    Attributes:
      step: int32 scalar, number of microsteps, that is, of batches. With gradient accumulation an
        optimiser step has several microsteps.
      trainable: the trainable parameters, float32.
      optimizer: optax's state.
      average: exponential moving average of `trainable`, or None if the run keeps none.
    """

    step: jax.Array
    trainable: dict
    optimizer: optax.OptState
    average: dict | None

    @property
    def evaluated(self):
        """The parameters to evaluate and to save: the average, if the run keeps one."""
        return self.trainable if self.average is None else self.average


def learning_rate_schedule(config):
    """Returns a schedule with linear warm-up to `config.learning_rate`, then `config.decay`.

    `config.decay` is "constant", "cosine" (to zero), or "wsd" (warmup-stable-decay, arXiv
    2404.06395): constant, then linear to zero over the last fifth of the steps. A run that is
    shorter than its warm-up ends during the warm-up.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.decay == "wsd":
        start = max(round(config.steps * (1 - _DECAY_SHARE)), warmup)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, max(warmup, 1)),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, max(config.steps - start, 1)),
            ],
            [warmup, start],
        )
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(config.steps, warmup + 1))
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, max(warmup, 1)), optax.constant_schedule(peak)], [warmup]
    )


def make_optimizer(config):
    """Returns `config.optimizer` after clipping by global norm, with gradient accumulation."""
    rate, decay = learning_rate_schedule(config), config.weight_decay
    if config.optimizer == "muon":
        update = contrib.muon(
            rate,
            weight_decay=decay,
            adam_b2=config.adam_b2,
            adam_weight_decay=decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        update = optax.adamw(rate, b1=0.9, b2=config.adam_b2, weight_decay=decay)
    optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clip), update)
    if config.accumulate > 1:
        # Only if needed, since MultiSteps keeps a sum as large as the gradient.
        optimizer = optax.MultiSteps(optimizer, config.accumulate)
    return optimizer


def ends_optimizer_step(optimizer_state, accumulate):
    """Returns whether the next microstep updates the parameters, as a bool scalar.

    Args:
      optimizer_state: state of `make_optimizer`'s optimiser before the microstep.
      accumulate: microsteps per optimiser step, > 1.
    """
    return optimizer_state.mini_step == accumulate - 1


def accumulated_gradient(optimizer_state, gradient):
    """Returns the mean gradient of an optimiser step so far, as computed by `optax.MultiSteps`.

    Args:
      optimizer_state: state of `make_optimizer`'s optimiser before the microstep, with
        `config.accumulate` > 1.
      gradient: gradient of the microstep.
    """
    count = optimizer_state.mini_step + 1
    return jax.tree.map(
        lambda new, mean: mean + (new - mean) / count, gradient, optimizer_state.acc_grads
    )


def _matrices(parameters):
    """Returns the axes of the matrices that Muon (Jordan et al. 2024) updates; None for AdamW.

    A kernel is a matrix that maps all its axes but the last to the last axis. The first axis of
    stacked blocks is a batch axis. AdamW updates biases, norms, embeddings, and kernels with at
    most four outputs, such as pixels.
    """

    def dimensions(path, leaf):
        path = tuple(entry.key for entry in path)
        if path[-1] != "kernel" or stacking.is_vector(path, leaf.shape) or leaf.shape[-1] <= 4:
            return None
        first = int(stacking.STACKED in path)
        return contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), (leaf.ndim - 1,))

    # `flatten_dict` of flax fails here: optax replaces masked parameters by nodes without leaves.
    return jax.tree_util.tree_map_with_path(dimensions, parameters)


def create_state(trainable, optimizer, ema_decay):
    """Returns an initial state; with `ema_decay` > 0 the average starts at the parameters."""
    average = jax.tree.map(jnp.copy, trainable) if ema_decay else None
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), average)
    # Counters and Muon's coefficients are created on the first device. They are replicated, since a
    # checkpoint is restored with the placement of this state.
    sharding = getattr(jax.tree.leaves(trainable)[0], "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere),
        state,
    )
