"""The weight map by hand, the gate, and that disabled terms are not compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.focus import buckets, correspondence, weighting
from focusdpo_jax.focus.buckets import BucketParams, BucketStructure

NUMBERS = BucketParams(
    index=np.int32(0),
    t_low=np.int32(0),
    t_high=np.int32(1000),
    rho=np.float32(0.5),
    lambda_s=np.float32(2.0),
    lambda_d=np.float32(3.0),
    lambda_c=np.float32(4.0),
    tau=np.float32(0.5),
    gate_width=np.float32(0.0),
    background=np.float32(0.25),
    matched_weight=np.float32(0.5),
)

# Five locations: matched inside, unmatched inside, half inside, matched outside, background.
PRIOR = jnp.array([[[1.0, 1.0, 0.5, 0.0, 0.0]]])
UNION = jnp.array([[[1.0, 0.0, 0.0, 1.0, 0.0]]])
DETAIL = jnp.array([[[0.5, 1.0, 0.2, 0.9, 0.4]]])
MATCH = correspondence.Match(UNION[:, None], UNION, jnp.array([2.0]))  # alignment 1 / 2


def weights_of(spaf, dpce, **params):
    structure = BucketStructure(spaf=spaf, dpce=dpce)
    return weighting.focus_weights(
        structure,
        NUMBERS._replace(**params),
        PRIOR,
        MATCH if spaf else None,
        DETAIL if dpce else None,
    )


def test_with_the_gate_shut_matched_is_low_and_unmatched_is_high():
    weights, diagnostics = weights_of(spaf=True, dpce=True, tau=np.float32(0.6))
    # 0.25 + 1 * 0.5, 0.25 + 1 * (1 + 2), 0.25 + 0.5 * 3, and background
    expected = [0.75, 3.25, 1.75, 0.25, 0.25]
    np.testing.assert_allclose(weights, [[expected]], rtol=1e-6)
    assert diagnostics["gate"] == pytest.approx([0.0])
    assert diagnostics["alignment"] == pytest.approx([0.5])
    assert diagnostics["matched_share"] == pytest.approx([0.75 / 6.25])
    assert diagnostics["unmatched_share"] == pytest.approx([(3.25 + 1.75 / 2) / 6.25])
    assert diagnostics["background_share"] == pytest.approx([(1.75 / 2 + 0.5) / 6.25])


def test_without_detail_in_the_structure_the_gate_is_shut():
    shut, _ = weights_of(spaf=True, dpce=True, tau=np.float32(0.6))
    spaf_only, diagnostics = weights_of(spaf=True, dpce=False)
    np.testing.assert_array_equal(spaf_only, shut)
    assert "gate" not in diagnostics


def test_with_the_gate_open_detail_counts_and_matched_is_no_longer_low():
    weights, diagnostics = weights_of(spaf=True, dpce=True, tau=np.float32(0.5))
    # 0.25 + (1 + 3 * 0.5), 0.25 + (1 + 2 + 3 * 1), 0.25 + 0.5 * (1 + 2 + 3 * 0.2)
    np.testing.assert_allclose(weights, [[[2.75, 6.25, 2.05, 0.25, 0.25]]], rtol=1e-6)
    assert diagnostics["gate"] == pytest.approx([1.0])


@pytest.mark.parametrize("dpce", [False, True])
def test_without_lowered_or_raised_weights_it_is_the_mask(dpce):
    """As in the study's ablation "mask in four buckets"."""
    neutral = {"lambda_s": 0.0, "lambda_d": 0.0, "matched_weight": 1.0}
    weights, _ = weights_of(
        spaf=True, dpce=dpce, **{name: np.float32(value) for name, value in neutral.items()}
    )
    np.testing.assert_array_equal(weights, weighting.prior_weights(PRIOR, 0.25))


def test_a_half_open_soft_gate_is_halfway_between():
    opened, _ = weights_of(spaf=True, dpce=True, tau=np.float32(0.5))
    shut, _ = weights_of(spaf=True, dpce=True, tau=np.float32(0.6))
    soft, diagnostics = weights_of(
        spaf=True, dpce=True, tau=np.float32(0.5), gate_width=np.float32(0.1)
    )
    assert diagnostics["gate"] == pytest.approx([0.5])
    np.testing.assert_allclose(soft, (opened + shut) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "alignment, width, expected",
    [
        (0.49, 0.0, 0.0),
        (0.5, 0.0, 1.0),
        (0.51, 0.0, 1.0),
        (0.7, 0.1, 1 / (1 + np.exp(-2.0))),
        (0.3, 0.1, 1 / (1 + np.exp(2.0))),
    ],
)
def test_gate(alignment, width, expected):
    assert weighting.gate(jnp.array([alignment]), 0.5, width) == pytest.approx([expected], rel=1e-5)


def test_without_spaf_the_gate_is_open():
    weights, diagnostics = weights_of(spaf=False, dpce=True)
    np.testing.assert_allclose(weights, [[[2.75, 4.25, 1.05, 0.25, 0.25]]], rtol=1e-6)
    assert sorted(diagnostics) == ["background_share", "gate"]


def test_with_neither_term_the_weights_are_those_of_the_prior():
    weights, _ = weights_of(spaf=False, dpce=False)
    np.testing.assert_array_equal(weights, weighting.prior_weights(PRIOR, 0.25))
    np.testing.assert_allclose(weights, [[[1.25, 1.25, 0.75, 0.25, 0.25]]])


def test_uniform_weights_are_one():
    np.testing.assert_array_equal(weighting.uniform_weights(PRIOR), np.ones((1, 1, 5)))


def test_each_example_of_a_batch_has_its_own_gate():
    union = jnp.array([[[1.0, 1.0]], [[0.0, 1.0]]])
    prior = jnp.array([[[1.0, 1.0]], [[1.0, 0.0]]])
    match = correspondence.Match(union[:, None], union, jnp.array([2.0, 1.0]))
    _, diagnostics = weighting.focus_weights(
        BucketStructure(True, True), NUMBERS, prior, match, jnp.ones((2, 1, 2))
    )
    assert diagnostics["gate"] == pytest.approx([1.0, 0.0])


def test_no_gradient_flows_through_the_weights():
    def total(prior, detail):
        weights, diagnostics = weighting.focus_weights(
            BucketStructure(True, True), NUMBERS, prior, MATCH, detail
        )
        return weights.sum() + diagnostics["alignment"].sum()

    for gradient in jax.grad(total, (0, 1))(PRIOR, DETAIL):
        np.testing.assert_array_equal(gradient, 0)


def test_a_missing_map_that_the_structure_needs_is_refused():
    with pytest.raises(ValueError, match="spaf needs `match`"):
        weighting.focus_weights(BucketStructure(True, False), NUMBERS, PRIOR)
    with pytest.raises(ValueError, match="dpce needs `detail`"):
        weighting.focus_weights(BucketStructure(False, True), NUMBERS, PRIOR)


def test_what_a_structure_switches_off_is_not_compiled():
    """All buckets of a run through one jitted function: two executables, each with its terms."""

    def weigh(structure, params, prior, similarity, detail):
        matched = None
        if structure.spaf:
            matched = correspondence.match(
                similarity, jnp.ones((1, 2), bool), jnp.ones((1, 2)), params.rho
            )
        return weighting.focus_weights(structure, params, prior, matched, detail)[0]

    jitted = jax.jit(weigh, static_argnums=0)
    arguments = PRIOR, jnp.zeros((1, 2, 1, 5)), DETAIL

    def compiled(spaf, dpce):
        bucket = buckets.make_buckets(1, spaf=spaf, dpce=dpce, detail_fraction=1.0)[0]
        return jitted.lower(*bucket, *arguments).compile().as_text()

    assert " sort(" in compiled(True, False)
    assert " sort(" not in compiled(False, True)
    # An argument nobody reads is dropped: without DPCE not even the detail map is an input, nor
    # are lambda_d, tau and gate_width.
    count = lambda text: text.split("ENTRY")[1].count(" parameter(")
    assert count(compiled(True, True)) == count(compiled(True, False)) + 4
    for bucket in buckets.make_buckets(4):
        jitted(*bucket, *arguments)
    assert jitted._cache_size() == 2


def test_confidence_adds_weight_whatever_the_gate():
    unsure = jnp.array([[[0.25, 0.5, 1.0, 1.0, 1.0]]])
    without, _ = weights_of(spaf=True, dpce=False)
    weights, _ = weighting.focus_weights(
        BucketStructure(True, False, confidence=True), NUMBERS, PRIOR, MATCH, uncertainty=unsure
    )
    # lambda_c = 4, times U, times the prior: nothing outside.
    np.testing.assert_allclose(weights - without, [[[1.0, 2.0, 2.0, 0.0, 0.0]]], rtol=1e-6)
    with pytest.raises(ValueError, match="needs `uncertainty`"):
        weighting.focus_weights(BucketStructure(False, False, confidence=True), NUMBERS, PRIOR)
