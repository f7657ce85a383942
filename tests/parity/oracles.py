"""Small PyTorch models with random weights, and what is needed to compare ours with them."""

import numpy as np
import torch

from focusdpo_jax.checkpoints import pytorch_names

# Of the norm of an output. Ours are at about 1e-6; a normalisation's epsilon of 1e-6 in the
# place of 1e-5 shows at 4e-6.
TOLERANCE = 3e-6


def randomised(kind, *arguments, **named):
    """The model `kind(*arguments, **named)` in float32, evaluation mode, the same at every call.

    Every parameter is moved off its initial value: norms start as ones and biases as zeros, where
    a confusion of two of them would not show.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = kind(*arguments, **named)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.float().eval().requires_grad_(False)


def tensors_of(model):
    """The model's state as numpy arrays under the names that its files use."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def load(template, tensors):
    """Our parameters from PyTorch's tensors; asserts that the way back is lossless."""
    params = pytorch_names.to_flax(tensors, template)
    back = pytorch_names.from_flax(params)
    assert set(back) == set(tensors)
    for name, value in back.items():
        np.testing.assert_array_equal(value, tensors[name])
    return params


def nchw(x):
    """NHWC numpy -> NCHW torch."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x):
    """NCHW torch -> NHWC numpy."""
    return np.moveaxis(x.numpy(), 1, -1)


def relative_error(ours, theirs):
    """Norm of the difference over the norm of theirs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
