"""Operations that FocusDPO adds to a step, counted before compilation at SDXL's debug sizes."""

import pytest

from focusdpo_jax.profiling import flops


@pytest.fixture(scope="module")
def focus_cost(import_benchmark):
    return import_benchmark("focus_cost")


def test_focus_adds_at_most_three_percent_to_a_step_of_dpo(focus_cost):
    def guides(objective):
        config, sizes = focus_cost.case("debug", objective=objective)
        programs = focus_cost.Programs(config, sizes)
        return programs, [
            flops.count(traced).total for traced, _ in programs.reference_passes().values()
        ]

    programs, (plain,) = guides("dpo")
    update = flops.count(programs.update()[0]).total
    # The policy's pass and its gradient take at least twice what the reference model's pass does.
    assert update > 2 * plain
    _, structures = guides("focus_dpo")
    assert len(structures) == 2
    for focus in structures:
        assert 1 < (focus + update) / (plain + update) < 1.03
