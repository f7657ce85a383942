"""Every attention of SDXL at full size, traced for absent devices: every kernel accepts its shapes."""

import jax
import jax.numpy as jnp
import pytest

from focusdpo_jax.models import attention, platforms

FUSED = {"TPU": "splash", "Ampere": "cudnn", "Hopper": "cudnn", "CPU": "by_head", "Turing": "xla"}


@pytest.fixture(scope="module")
def kernels(import_benchmark):
    return import_benchmark("attention_kernels")


@pytest.mark.parametrize("device", ["TPU", "Ampere", "Hopper", "Turing"])
def test_kernels_of_the_unet_at_1024_px(kernels, device):
    found = {
        (call.queries, call.keys): call.kernel
        for call in kernels.calls("UNet", 1024, kernels.TARGETS[device])
    }
    fused = FUSED[device]
    assert found == {
        (4096, 4096): fused,
        (4096, 77): "xla",
        (4096, 48): "xla",
        (1024, 1024): fused,
        (1024, 77): "xla",
        (1024, 48): "xla",
    }


@pytest.mark.parametrize(
    "name, queries, keys, tpu, gpu",
    [
        ("resampler (IP-Adapter-Plus)", 16, 273, "xla", "cudnn-forward"),
        ("grounding resampler (MS-Diffusion)", 16, 273, "xla", "cudnn-forward"),
        ("text encoder", 77, 77, "xla", "xla"),
        ("CLIP ViT-H", 257, 257, "xla", "cudnn-forward"),
        ("CLIP ViT-bigG", 257, 257, "xla", "cudnn-forward"),
        ("DINO ViT-S/16", 197, 197, "xla", "xla"),
        ("DINOv2 ViT-S/14, 448 px", 1025, 1025, "xla", "cudnn-forward"),
        ("VAE, encoding", 16384, 16384, "xla", "xla"),
        ("VAE, decoding", 16384, 16384, "xla", "xla"),
    ],
)
def test_kernels_of_the_other_networks(kernels, name, queries, keys, tpu, gpu):
    for device, kernel in (("TPU", tpu), ("Ampere", gpu), ("Hopper", gpu)):
        (call,) = kernels.calls(name, 1024, kernels.TARGETS[device])
        assert (call.queries, call.keys, call.kernel) == (queries, keys, kernel)


def test_maps_of_768_px_have_no_whole_tiles_at_the_coarsest_level(kernels):
    found = {
        (call.queries, call.keys): call.kernel
        for call in kernels.calls("UNet", 768, kernels.TARGETS["TPU"])
    }
    assert found[2304, 2304] == "splash" and found[576, 576] == "xla"


@pytest.mark.parametrize("name", ["resampler (IP-Adapter-Plus)", "UNet"])
def test_training_can_be_lowered_for_gpus(kernels, name):
    """The gradient of SDXL's UNet and of the resampler, at full size, without a GPU or its compiler."""
    module, inputs, _ = kernels.networks(512)[name]

    def gradient(parameters, *inputs):
        with platforms.target_platform(platforms.Target("gpu", 9.0)):
            return jax.grad(
                lambda x: jnp.square(
                    jax.tree.leaves(module.apply(parameters, x, *inputs[1:]))[0].astype(jnp.float32)
                ).mean()
            )(inputs[0])

    with kernels.cudnn_to_trace():
        text = (
            jax.jit(gradient)
            .trace(kernels._parameters(name, 512), *inputs)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    assert ("__cudnn$fmhaSoftmaxBackward" in text) == (name == "UNet")


def test_calls_are_recorded_inside_the_context_alone():
    x = jax.ShapeDtypeStruct((1, 300, 64), jnp.bfloat16)
    with attention.recorded_calls() as found:
        jax.eval_shape(lambda x: attention.attend(x, x, x, 2), x)
    jax.eval_shape(lambda x: attention.attend(x, x, x, 4), x)
    assert [call.heads for call in found] == [2]
