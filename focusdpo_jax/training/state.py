"""What training carries from step to step, and the optimiser that changes it."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from focusdpo_jax.models import stacking

_DECAY_SHARE = 0.2  # Of the steps, in which "wsd" decays.


@flax.struct.dataclass
class TrainState:
    """The state of a run. The frozen parameters are not part of it.

    Attributes:
      step: int32 scalar, microsteps made: batches seen (with gradient accumulation several make an
        optimiser step).
      trainable: parameters under training, float32.
      optimizer: optax's state.
      average: exponential moving average of `trainable`, or None where the run keeps none.
    """

    step: jax.Array
    trainable: dict
    optimizer: optax.OptState
    average: dict | None

    @property
    def evaluated(self):
        """The parameters to evaluate and to save: the average if the run keeps one."""
        return self.trainable if self.average is None else self.average


def learning_rate_schedule(config):
    """Linear warm-up to `config.learning_rate`, then as `config.decay`.

    "constant"; "cosine", to zero; or "wsd" (warmup-stable-decay, arXiv 2404.06395): constant, and linear to
    zero over the last fifth of the steps. A run that is shorter than its warm-up ends in it.
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
    """`config.optimizer` after clipping by global norm; one update every `config.accumulate` batches."""
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
        # MultiSteps keeps a sum as large as the gradient, so it is used only where it is needed.
        optimizer = optax.MultiSteps(optimizer, config.accumulate)
    return optimizer


def ends_optimizer_step(optimizer_state, accumulate):
    """Returns whether the microstep that starts from this state makes an update: a bool scalar.

    Args:
      optimizer_state: of `make_optimizer`, before the microstep.
      accumulate: microsteps of an optimiser step, > 1.
    """
    return optimizer_state.mini_step == accumulate - 1


def accumulated_gradient(optimizer_state, gradient):
    """Returns the mean of the gradients of an optimiser step so far, as `optax.MultiSteps` takes it.

    Args:
      optimizer_state: of `make_optimizer` with `config.accumulate` > 1, before the microstep.
      gradient: of the microstep.
    """
    count = optimizer_state.mini_step + 1
    return jax.tree.map(
        lambda new, mean: mean + (new - mean) / count, gradient, optimizer_state.acc_grads
    )


def _matrices(parameters):
    """Axes of the matrices that Muon (Jordan et al. 2024) updates; None for parameters that AdamW updates.

    A kernel is a matrix from all its axes but the last to the last; the first axis of stacked blocks counts
    matrices. AdamW updates biases, norms, embeddings and kernels with at most four outputs, such as pixels.
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
    """A fresh state; a positive `ema_decay` starts an average at the parameters themselves."""
    average = jax.tree.map(jnp.copy, trainable) if ema_decay else None
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), average)
    # Counters and Muon's coefficients are created on the first device; what a checkpoint restores is placed
    # as its example is.
    sharding = getattr(jax.tree.leaves(trainable)[0], "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere),
        state,
    )
