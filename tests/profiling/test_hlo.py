"""Programs in XLA's text form are read, with loops as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from focusdpo_jax.profiling import collectives, hlo

LOOPS = """HloModule jit_f, is_scheduled=true

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[10,8], i: s32[]) -> f32[8] {
  %p = f32[10,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%row)
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%n, %bound), direction=LT
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0:T(8,128)(2,1)S(1)} all-gather(%x), dimensions={0}, replica_groups={{0,1,2,3},{4,5,6,7}}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w2 = (s32[]{:T(128)}, f32[8]{0:T(8,128)(2,1)S(1)}) while(%t), condition=%inner_condition, body=%inner
  %r = f32[4]{0} all-reduce(%y), to_apply=%region, replica_groups=mesh['a'=4,'b'=2] {'a'}
  %taken = f32[8]{0} fusion(%stack, %n), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/a/slice"}
}

%odd_condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %less2 = pred[] compare(%n, %m), direction=LT
}

%odd (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %never = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

ENTRY %main (stack: f32[10,8]) -> f32[8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %w = (s32[], /*index=1*/f32[8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %w3 = (s32[], f32[8]) while(%t), condition=%odd_condition, body=%odd
  %kernel = f32[8]{0} custom-call(%w), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"described": "over several lines"
}}, metadata={op_name="jit(f)/attention"}
  ROOT %last = f32[2]{0} all-gather(%z), dimensions={0}, replica_groups=[1,2]<=[2]
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.Program(LOOPS)


def test_loops_count_as_often_as_they_run(program):
    times = {each.name: count for each, count in program.runs}
    assert (times["g"], times["r"], times["last"], times["never"]) == (30, 10, 1, 1)
    assert program.unknown_loops == ["w3"]
    # What is fused or reduced with is no instruction of its own.
    assert not {"row", "sum"} & set(times)


def test_an_instruction_may_go_on_over_several_lines(program):
    kernel = next(each for each, _ in program.runs if each.name == "kernel")
    assert kernel.operation == "jit(f)/attention" and kernel.operands == ("w",)
    assert [each.name for each, _ in program.runs][-1] == "last"


def test_a_slice_reads_what_it_takes():
    text = (
        LOOPS.split("ENTRY")[0].split("%inner_condition")[0]
        + """
ENTRY %main (stack: f32[10,8], n: s32[]) -> f32[8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %taken = f32[8]{0} fusion(%stack, %n), kind=kLoop, calls=%fused
}
"""
    )
    program = hlo.Program(text)
    # A row of eight, an index, and the row again as the result.
    assert program.bytes_accessed == 32 + 4 + 32
    assert program.parameter_bytes == 320 + 4


def test_bytes_are_near_those_of_xla():
    x = jnp.ones((256, 128))
    compiled = jax.jit(lambda x: jnp.tanh(x @ x.T) + 1).lower(x).compile()
    ours = hlo.Program(compiled.as_text()).bytes_accessed
    assert ours == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.35)


def test_groups_of_devices_in_each_way_of_writing(program):
    found = {each.name: each for each in collectives.read(program)}
    assert {name: each.group for name, each in found.items()} == {
        "g": 4,
        "r": 4,
        "never": 0,
        "last": 2,
    }
    assert found["g"].received(8) == 32 * 3 / 4
    assert found["r"].received(8) == 16 * 2 * 3 / 4
    assert found["never"].received(8) == 8
    assert collectives.received(found.values(), 8) == 30 * 24 + 10 * 24 + 8 + 4


def test_an_unpartitioned_reduction_sends_nothing():
    assert collectives.Collective("r", "all-reduce", 16, (), "", 0, group=1).received(1) == 0


def test_collectives_are_read_from_a_program():
    text = """HloModule jit_f, is_scheduled=true
  %p = f32[1,8]{1,0} parameter(0)
  %all-gather.1 = f32[8,8]{1,0} all-gather(%p), dimensions={0}, metadata={op_name="jit(f)/a/dot"}
  %ar = (bf16[4]{0}, f32[2]{0}) all-reduce(%x, %y), to_apply=%add
  %s = (f32[1,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), dimensions={0}
  %d = f32[8,8]{1,0} all-gather-done(%s)
"""
    first, second, third = collectives.read(text)
    assert (first.name, first.kind, first.size, first.operands, first.operation) == (
        "all-gather.1",
        "all-gather",
        256,
        ("p",),
        "jit(f)/a/dot",
    )
    assert (second.kind, second.size, second.operands) == ("all-reduce", 16, ("x", "y"))
    assert third.size == 256
    assert collectives.summary([first, second, third]) == {
        "all-gather": {"count": 2, "bytes": 512},
        "all-reduce": {"count": 1, "bytes": 16},
    }


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    text = """HloModule jit_f, is_scheduled=true
%inner.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} all-gather(%x), dimensions={0}
}
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w2 = (s32[], f32[8]) while(%t), condition=%c, body=%inner.2, backend_config={"known_trip_count":{"n":"3"}}
  %r = f32[4]{0} all-reduce(%y), to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"10"}}
  %last = f32[2]{0} all-gather(%z), dimensions={0}
}
"""
    found = collectives.read(text)
    assert {c.name: c.times for c in found} == {"g": 30, "r": 10, "last": 1}
    assert collectives.summary(found) == {
        "all-gather": {"count": 31, "bytes": 30 * 32 + 8},
        "all-reduce": {"count": 10, "bytes": 160},
    }


def test_collectives_inside_fusions():
    """An asynchronous one in three fusions counts once; a fused reduce-scatter by its result."""
    text = """HloModule jit_f, is_scheduled=true
%start (p: f32[2]) -> (f32[2], f32[8]) {
  %a = f32[8]{0} all-gather(%p), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}
}
%proceed (p: f32[2]) -> (f32[2], f32[8]) {
  %m = f32[8,8]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
  %b = f32[8]{0} all-gather(%p), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}
}
%done (p: f32[2]) -> f32[8] {
  %c = f32[8]{0} all-gather(%p), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}
}
%all-reduce-scatter.2 (input: f32[8]) -> f32[2] {
  %sum = f32[8]{0} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={2}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %s = (f32[2]{0}, f32[8]{0}) fusion(%p), kind=kCustom, calls=%start, metadata={op_name="jit(f)/dot"}
  %f = (f32[2]{0}, f32[8]{0}) fusion(%s), kind=kOutput, calls=%proceed
  %d = f32[8]{0} fusion(%f), kind=kCustom, calls=%done
  %last = f32[2]{0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.2
}
"""
    gathered, scattered = found = collectives.read(text)
    assert (gathered.kind, gathered.size, gathered.group) == ("all-gather", 32, 4)
    assert gathered.operation == "jit(f)/dot"
    assert (scattered.kind, scattered.size, scattered.group) == ("reduce-scatter", 8, 4)
    # Three quarters of the gathered array, and three parts of two numbers.
    assert collectives.received(found, 4) == 24 + 24
