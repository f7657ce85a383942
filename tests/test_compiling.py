import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from focusdpo_jax import compiling
from focusdpo_jax.models.convolution import conv2d
from focusdpo_jax.planning import targets
from focusdpo_jax.profiling import estimates, hlo
from focusdpo_jax.sharding import mesh as meshes


def test_cpus_use_eigen_for_convolutions_and_matrix_products():
    """This XLA has the option, and it has its effect."""

    def network(x, kernel):
        y = conv2d(x, kernel)
        return y.reshape(-1, 64) @ kernel[0, 0]

    traced = jax.jit(network).trace(jnp.ones((2, 16, 16, 64)), jnp.ones((3, 3, 64, 64)))
    by_itself, ours = (
        traced.lower().compile(options).as_text()
        for options in ({}, compiling.network_options("cpu"))
    )
    assert "ynn_fusion" in by_itself
    assert "ynn_fusion" not in ours


def test_other_platforms_have_no_options():
    assert compiling.network_options("METAL") == {}


def test_this_xla_has_the_options_of_gpus():
    """All platforms share one list of options, except TPUs."""
    options = compiling.network_options("gpu")
    assert options
    lowered = jax.jit(abs).lower(jax.ShapeDtypeStruct((), "float32"))
    lowered.compile(options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_longer_there"):
        lowered.compile(options | {"xla_gpu_no_longer_there": 0})


@pytest.mark.slow
def test_gpus_do_not_copy_the_kernels_of_matmuls_that_share_an_operand():
    """The option has its effect."""
    pytest.importorskip("jax_cuda12_plugin", reason="pip install -e '.[plan-gpu]'")
    devices, _ = targets.devices("h100")
    one = jax.sharding.SingleDeviceSharding(devices[0])
    text = jax.ShapeDtypeStruct((154, 2048), jnp.bfloat16, sharding=one)
    kernels = [jax.ShapeDtypeStruct((2048, 1280), jnp.bfloat16, sharding=one)] * 2
    lowered = jax.jit(lambda x, kernels: [x @ kernel for kernel in kernels]).lower(text, kernels)
    merged = "bf16[2048,2560]"
    default, ours = (
        lowered.compile(options).as_text() for options in ({}, compiling.network_options("gpu"))
    )
    assert merged in default
    assert merged not in ours


@pytest.mark.slow
def test_tpus_gather_kernels_that_are_sharded_over_the_whole_mesh():
    """This libtpu has the option, and it has its effect on time."""
    pytest.importorskip("libtpu", reason="pip install -e '.[plan]'")
    devices, _ = targets.devices("v5e:2x2")
    mesh = meshes.make_mesh({"data": 1, "fsdp": 4, "tensor": 1}, 8, devices)
    batch = meshes.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((8, 4096, 640), jnp.bfloat16, sharding=batch)
    kernel = jax.ShapeDtypeStruct(
        (640, 5120), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    lowered = jax.jit(jnp.matmul, out_shardings=batch).lower(x, kernel)
    default, ours = (
        lowered.compile(options).as_text() for options in ({}, compiling.network_options("tpu"))
    )
    assert "collective-permute" in default
    assert "collective-permute" not in ours and "all-gather" in ours
    cycles = [estimates.read(hlo.Program(text)).cycles for text in (ours, default)]
    assert cycles[0] < 0.9 * cycles[1]


@pytest.mark.parametrize(
    "platform, variable, option",
    [
        ("cpu", "XLA_FLAGS", "xla_backend_optimization_level"),
        ("gpu", "XLA_FLAGS", "xla_gpu_dot_merger_threshold_mb"),
        ("tpu", "LIBTPU_INIT_ARGS", "xla_jf_spmd_threshold_for_windowed_einsum_mib"),
    ],
)
def test_options_in_the_environment_are_left_out(monkeypatch, platform, variable, option):
    ours = {}
    for flags in "", f"--{option}=0":
        monkeypatch.setenv(variable, flags)
        ours[flags] = compiling.network_options(platform)
    without, named = ours.values()
    assert set(without) - set(named) == {option}
    assert named.items() <= without.items()


def test_options_that_xla_does_not_have_are_left_out(monkeypatch):
    monkeypatch.setattr(compiling, "_ON_CPU", {"xla_cpu_no_longer_there": "1"})
    compiling._known_on_cpu.cache_clear()
    try:
        assert compiling.network_options("cpu") == {}
    finally:
        compiling._known_on_cpu.cache_clear()
