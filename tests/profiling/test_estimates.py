"""The compiler's estimates are summed as often as their instructions run, and named by layer."""

import dataclasses

import jax.numpy as jnp
import pytest

from focusdpo_jax.planning import targets
from focusdpo_jax.profiling import chips, estimates, hlo

CONFIG = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
TEXT = """HloModule jit_update, is_scheduled=true

%%fused.1 (p: bf16[8,8], q: bf16[8,8]) -> bf16[8,8] {
  %%p = bf16[8,8]{1,0} parameter(0)
  %%q = bf16[8,8]{1,0} parameter(1)
  ROOT %%product = bf16[8,8]{1,0} convolution(%%p, %%q), dim_labels=bf_io->bf
}

%%fused.2 (p: bf16[8,8]) -> bf16[8,8] {
  %%p2 = bf16[8,8]{1,0} parameter(0)
  ROOT %%twice = bf16[8,8]{1,0} add(%%p2, %%p2), metadata={op_name="jit(update)/jvp(UNet)/mid_block/resnets_1/add"}
}

%%condition (p: (s32[])) -> pred[] {
  %%bound = s32[] constant(5)
  ROOT %%less = pred[] compare(%%n, %%bound), direction=LT
}

%%body (p: (s32[])) -> (s32[]) {
  %%copied = bf16[8,8]{0,1:T(8,128)(2,1)} copy(%%x), %s
}

ENTRY %%main (x: bf16[8,8]) -> bf16[8,8] {
  %%one = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} fusion(%%x, %%x), kind=kOutput, calls=%%fused.1, metadata={op_name="jit(update)/transpose(jvp(UNet))/up_blocks_0/attentions_2/attn1/to_q/dot_general"}, %s
  %%two = bf16[8,8]{1,0} fusion(%%x, %%x), kind=kOutput, calls=%%fused.1, metadata={op_name="jit(update)/transpose(jvp(UNet))/up_blocks_1/attentions_0/attn1/to_q/dot_general"}, %s
  %%three = bf16[8,8]{1,0} fusion(%%x), kind=kLoop, calls=%%fused.2, metadata={op_name="broadcast.7"}, %s
  %%loop = (s32[]) while(%%t), condition=%%condition, body=%%body
  %%sent = (bf16[8,8], u32[]) copy-start(%%x)
  %%kernel = bf16[8,8]{1,0} custom-call(%%x), custom_call_target="tpu_custom_call"
  %%turned = bf16[8,8]{0,1:S(1)} copy(%%one), backend_config={"window_config":{"estimated_cycles":"600","iteration_bounds":["2","3"]}}
  %%moved = bf16[8,8]{0,1} copy(%%one), backend_config={"window_config":{"estimated_cycles":"700","iteration_bounds":["2","3"]}}
  %%room = bf16[8,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
}
""" % tuple(CONFIG % n for n in (10, 1000, 2000, 300))


@pytest.fixture(scope="module")
def estimate():
    return estimates.read(hlo.Program(TEXT))


def test_cycles_add_up_with_loops_as_often_as_they_run(estimate):
    assert estimate.cycles == 1000 + 2000 + 300 + 5 * 10 + 600 + 700
    assert estimate.kinds == {"products": 3000, "copy": 1350, "fusions": 300}
    assert estimate.unknown_loops == 0


def test_equal_layers_are_one_source(estimate):
    assert estimate.sources == [
        ("backward: up_blocks_N/attentions_N/attn1/to_q/dot_general", 3000, 2),
        ("(copy of the compiler's)", 1350, 7),
        ("forward: mid_block/resnets_N/add", 300, 1),
    ]


def test_kernels_are_counted_and_bookkeeping_is_not(estimate):
    assert estimate.kernels == {"tpu_custom_call": 1}


def test_copies_with_a_nominal_estimate_are_counted(estimate):
    assert estimate.nominal_copies == 1
    assert estimate.nominal_bytes == 8 * 8 * 2


def test_seconds_are_cycles_and_the_kernels_products(estimate):
    chip = dataclasses.replace(chips.TPUS["v5e"], clock=1e3, flops=1e6)
    assert estimates.seconds(estimate, chip, 2e6) == pytest.approx(4.65 + 2)


@pytest.mark.parametrize(
    "name, short",
    [
        (
            "jit(gradient)/transpose(jvp(UNet))/up_blocks_0/attentions_2/attentions_2._blocks/"
            "transformer_blocks_9/norm3/jvp(UNet)/up_blocks_0/attentions_2/attentions_2._blocks/"
            "transformer_blocks_9/norm3/checkpoint/norm3._normed/mul",
            "backward: up_blocks_N/attentions_N/transformer_blocks_N/norm3/mul",
        ),
        (
            "jit(f)/transpose(jvp(UNet))/down_blocks_2/ff/jvp(UNet)/down_blocks_2/ff/checkpoint/"
            "rematted_computation/net_2.<lambda>/erf",
            "recomputed: down_blocks_N/ff/erf",
        ),
        (
            "jit(f)/transpose(jvp(UNet))/down_blocks_0/resnets_0/conv2/transpose(jvp())/conv_general_dilated",
            "backward: down_blocks_N/resnets_N/conv2/conv_general_dilated",
        ),
        ("jit(update)/add", "update: add"),
        ("broadcast.7", ""),
    ],
)
def test_names_give_the_layer_without_numbers(name, short):
    assert estimates.short_name(name) == short


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(chips.TPUS))
def test_a_large_product_takes_nearly_the_time_of_the_data_sheet(kind):
    jax = pytest.importorskip("jax")
    pytest.importorskip("libtpu", reason="pip install -e '.[plan]'")
    topology = {"v4": "v4:2x2x1", "v5p": "v5p:2x2x1"}.get(kind, f"{kind}:2x2")
    devices, chip = targets.devices(topology)
    assert len(devices) == 4
    x = jax.ShapeDtypeStruct(
        (4096, 4096), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(devices[0])
    )
    compiled = jax.jit(lambda a, b: (a @ b) @ b).lower(x, x).compile()
    estimate = estimates.read(hlo.Program(compiled.as_text()))
    on_paper = 2 * 2 * 4096**3 / chip.flops
    assert on_paper <= estimates.seconds(estimate, chip, 0) < 1.15 * on_paper
