"""The objective against numpy in float64, and the properties that make it Diffusion-DPO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.focus import losses, weighting

BETA = 50.0


def predictions(seed=0, shape=(3, 4, 5, 2)):
    """float64 targets and predictions of a pair; the policy is close to the reference model."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.normal(size=shape)
    out = {}
    for image in ("chosen", "rejected"):
        target = draw()
        reference = target + 0.3 * draw()
        out[image] = target, reference, reference + 0.1 * draw()
    return out


def numpy_diffusion_dpo(pair, beta):
    """Diffusion-DPO by hand: per-pair loss, margin, and d(mean loss) / d(policy prediction)."""
    (tw, rw, pw), (tl, rl, pl) = pair["chosen"], pair["rejected"]
    mse = lambda a, b: ((a - b) ** 2).mean(axis=(1, 2, 3))
    margin = (mse(tw, pw) - mse(tw, rw)) - (mse(tl, pl) - mse(tl, rl))
    loss = np.log1p(np.exp(beta / 2 * margin))
    slope = beta / 2 / (1 + np.exp(-beta / 2 * margin)) / len(margin)  # d(mean loss) / d(margin)
    slope = slope[:, None, None, None] * 2 / pw[0].size
    return loss, margin, slope * (pw - tw), -slope * (pl - tl)


def ours(pair, policy_chosen, policy_rejected, weights_chosen, weights_rejected, beta):
    (tw, rw, _), (tl, rl, _) = pair["chosen"], pair["rejected"]
    return losses.diffusion_dpo(
        losses.error_map(tw, policy_chosen),
        losses.error_map(tw, rw),
        losses.error_map(tl, policy_rejected),
        losses.error_map(tl, rl),
        weights_chosen,
        weights_rejected,
        beta,
    )


def as_jax(pair, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), pair)


def loss_and_gradients(pair, weights, beta):
    def mean_loss(policy_chosen, policy_rejected):
        loss, diagnostics = ours(pair, policy_chosen, policy_rejected, weights, weights, beta)
        return loss.mean(), (loss, diagnostics)

    (_, aux), gradients = jax.jit(jax.value_and_grad(mean_loss, (0, 1), has_aux=True))(
        pair["chosen"][2], pair["rejected"][2]
    )
    return *aux, *gradients


@pytest.mark.parametrize("constant", [1.0, 7.5])
def test_with_constant_weight_loss_and_gradient_are_diffusion_dpo(constant):
    pair = predictions()
    loss, margin, gradient_chosen, gradient_rejected = numpy_diffusion_dpo(pair, BETA)
    assert loss.min() < 0.6 and loss.max() > 0.8  # both sides of log 2
    weights = jnp.full((3, 4, 5), constant)
    got = loss_and_gradients(as_jax(pair, jnp.float32), weights, BETA)
    np.testing.assert_allclose(got[0], loss, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[1]["margin"], margin, rtol=0, atol=1e-7)
    np.testing.assert_allclose(got[2], gradient_chosen, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[3], gradient_rejected, rtol=0, atol=1e-6)


def test_in_float64_the_formula_is_exact_at_the_published_beta():
    pair = predictions(seed=1)
    expected = numpy_diffusion_dpo(pair, 5000.0)
    with jax.enable_x64(True):
        got = loss_and_gradients(as_jax(pair, jnp.float64), jnp.ones((3, 4, 5)), 5000.0)
        assert got[0].dtype == jnp.float64
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-10)
        np.testing.assert_allclose(got[2], expected[2], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(got[3], expected[3], rtol=1e-10, atol=1e-14)


def test_margin_and_diagnostics_by_hand():
    row = lambda *values: jnp.array([[values]], jnp.float32)
    loss, diagnostics = losses.diffusion_dpo(
        policy_chosen=row(1.0, 2.0),
        reference_chosen=row(2.0, 2.5),
        policy_rejected=row(3.0, 5.0),
        reference_rejected=row(1.0, 4.0),
        weights_chosen=row(3.0, 1.0),
        weights_rejected=row(1.0, 4.0),
        beta=2.0,
    )
    # winner: (3 * -1 + 1 * -0.5) / 4, loser: (1 * 2 + 4 * 1) / 5
    assert diagnostics["winner_error_difference"] == pytest.approx([-0.875])
    assert diagnostics["loser_error_difference"] == pytest.approx([1.2])
    assert diagnostics["margin"] == pytest.approx([-2.075])
    assert diagnostics["logit_scale"] == pytest.approx([2.075])
    assert diagnostics["implicit_accuracy"] == pytest.approx([1.0])
    # references: (3 * 2 + 2.5) / 4 = 2.125 and (1 + 16) / 5 = 3.4
    assert diagnostics["reference_error"] == pytest.approx([2.7625])
    assert loss == pytest.approx([np.log1p(np.exp(-2.075))], rel=1e-6)


def test_anchor_by_hand():
    policy, reference = jnp.array([[[1.0, 2.0]]]), jnp.array([[[2.0, 2.5]]])
    term, diagnostics = losses.anchor(policy, reference, 8.0)
    assert term == pytest.approx([8 / 4 * -0.75])
    assert diagnostics["chosen_error_difference"] == pytest.approx([-0.75])


def test_anchor_weighs_an_error_as_the_preference_does_at_the_start():
    errors = losses.error_map(*as_jax(predictions(), jnp.float32)["chosen"][:2])
    ones = jnp.ones_like(errors)
    preference = jax.grad(
        lambda x: losses.diffusion_dpo(x, errors, errors, errors, ones, ones, 50.0)[0].sum()
    )(errors)
    held, fixed = jax.grad(lambda x, y: losses.anchor(x, y, 50.0)[0].sum(), (0, 1))(errors, errors)
    np.testing.assert_allclose(held, preference, rtol=1e-6)
    assert jnp.abs(held).min() > 0 and not jnp.any(fixed)


def test_no_gradient_through_weights_or_reference():
    pair = as_jax(predictions(), jnp.float32)
    maps = [losses.error_map(pair["chosen"][0], x) for x in pair["chosen"][1:]]
    arguments = [maps[1], maps[0], maps[1] * 0.5, maps[0], maps[0] + 1, maps[1] + 1]
    gradients = jax.grad(
        lambda *a: losses.diffusion_dpo(*a, 10.0)[0].sum(), argnums=tuple(range(6))
    )(*arguments)
    moved = [bool(jnp.any(g != 0)) for g in gradients]
    assert moved == [True, False, True, False, False, False]


def test_only_weighted_locations_count():
    pair = as_jax(predictions(), jnp.float32)
    weights = jnp.zeros((3, 4, 5)).at[:, :2].set(1.0)
    base = loss_and_gradients(pair, weights, BETA)
    np.testing.assert_array_equal(base[2][:, 2:], 0)
    assert jnp.abs(base[2][:, :2]).min() > 0


def test_equal_models_give_a_loss_of_log_two_and_a_zero_margin():
    target, prediction, _ = as_jax(predictions(), jnp.float32)["chosen"]
    errors, ones = losses.error_map(target, prediction), jnp.ones((3, 4, 5))
    loss, diagnostics = losses.diffusion_dpo(
        errors, errors, errors * 2, errors * 2, ones, ones, 5000.0
    )
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(diagnostics["implicit_accuracy"], 0.5)
    np.testing.assert_array_equal(diagnostics["logit_scale"], 0)


def test_extreme_margins_stay_finite():
    far = jnp.full((1, 2, 2), 1e4)
    near = jnp.zeros((1, 2, 2))
    ones = jnp.ones((1, 2, 2))
    lost, _ = losses.diffusion_dpo(far, near, near, near, ones, ones, 5000.0)
    won, _ = losses.diffusion_dpo(near, far, near, near, ones, ones, 5000.0)
    assert lost == pytest.approx([2.5e7])
    assert won == pytest.approx([0.0])


def test_all_weights_zero_give_a_zero_margin_without_nan():
    zeros = jnp.zeros((1, 2, 2))
    gradient = jax.grad(lambda x: losses.weighted_mean(zeros, x).sum())(zeros + 3)
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_predictions_are_compared_in_float32():
    target = jnp.array([[[[1.0, 0.0]]]], jnp.bfloat16)
    prediction = jnp.array([[[[0.0, 1 / 256]]]], jnp.bfloat16)
    error = losses.error_map(target, prediction)
    assert error.dtype == jnp.float32
    assert float(error[0, 0, 0]) == (1 + 2.0**-16) / 2  # bfloat16 would round this to 1 / 2


def test_sft_is_the_weighted_denoising_error():
    errors = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    loss, diagnostics = losses.sft(errors, jnp.array([[[1.0, 0.0], [0.0, 3.0]]]))
    assert loss == pytest.approx([13 / 4])
    assert diagnostics["policy_error"] == pytest.approx([13 / 4])


def test_patch_dpo_by_hand():
    row = lambda *values: jnp.array([[values]], jnp.float32)  # noqa: E731
    loss, diagnostics = losses.patch_dpo(
        row(1.0, 2.0), row(4.0, 8.0), *weighting.quality_weights(row(0.25, 1.0))
    )
    # Chosen weighs 0.75 and 0, rejected 0.25 and 1: (0.75 * 1 + 0.25 * 4 + 1 * 8) / 2
    assert loss == pytest.approx([4.875])
    assert diagnostics["winner_error"] == pytest.approx([1.0])
    assert diagnostics["loser_error"] == pytest.approx([7.2])
    # Both images are learnt from: no error may grow to lower the loss.
    gradient = jax.grad(
        lambda chosen, rejected: losses.patch_dpo(chosen, rejected, row(0.5), row(0.25))[0].sum(),
        (0, 1),
    )(row(1.0), row(2.0))
    np.testing.assert_allclose(gradient, [[[[2 / 3]]], [[[1 / 3]]]], rtol=1e-6)


def test_the_slope_of_the_preference_is_that_of_its_gradient():
    margins = jnp.array([-0.03, 0.0, 0.01])

    def loss(margin):
        def row(value):
            return jnp.reshape(value, (1, 1, 1))

        ones = jnp.ones((1, 1, 1))
        return losses.diffusion_dpo(row(margin), row(0.0), row(0.0), row(0.0), ones, ones, 100.0)[
            0
        ][0]

    slopes = jax.vmap(jax.grad(loss))(margins)
    factor = losses.preference_slope(margins, 100.0)
    np.testing.assert_allclose(factor, slopes / slopes[1], rtol=1e-5)
    assert factor[1] == 1
    assert not jax.grad(lambda m: losses.preference_slope(m, 100.0).sum())(margins).any()


def test_a_winner_preserving_scale_keeps_the_winners_error():
    draw = np.random.default_rng(0)
    chosen, rejected = draw.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
    rejected[0] = (
        chosen[0] * 2
    )  # One direction: the loser's step would undo the winner's twice over.
    rejected[1] = -chosen[1]  # Opposite: the loser's step helps the winner.
    rejected[2] = chosen[2] * 0.5 + 0.1 * rejected[2]
    weights = draw.uniform(0.5, 2, size=(3, 2, 2)).astype(np.float32)
    scale = np.asarray(losses.winner_preserving_scale(chosen, rejected, weights, weights))
    np.testing.assert_allclose(scale[:2], [0.5, 1], rtol=1e-6)
    share = weights / weights.sum((1, 2), keepdims=True)
    g_w, g_l = share[..., None] * chosen, share[..., None] * rejected
    product, squared = (g_w * g_l).sum((1, 2, 3)), (g_w**2).sum((1, 2, 3))
    assert scale[2] == pytest.approx(min(1, squared[2] / product[2]), rel=1e-5)
    # The first-order change of the winner's error under a step of -(g_w - scale g_l) is not positive.
    assert np.all(-(squared - scale * product) <= 1e-7)
    halved = losses.winner_preserving_scale(chosen, rejected, weights, weights, mu=0.5)
    assert halved[0] == pytest.approx(0.25)


def test_scaled_gradients_leave_the_value():
    value, slope = jax.value_and_grad(lambda x: losses.scale_gradient(x**2, jnp.float32(0.25)))(3.0)
    assert value == 9 and slope == pytest.approx(0.25 * 6)


def test_relative_scale_by_hand():
    prior = jnp.array([[[1.0, 1.0, 0.0, 0.0]]])
    weights = jnp.array([[[2.0, 1.0, 0.5, 0.5]]])
    # |P W| / sum W = sqrt(5) / 4; |P| / N = sqrt(2) / 4.
    np.testing.assert_allclose(losses.relative_scale(weights, prior), [np.sqrt(5 / 2)], rtol=1e-6)
    np.testing.assert_allclose(losses.relative_scale(7 * weights, prior), [np.sqrt(5 / 2)])
    np.testing.assert_allclose(losses.relative_scale(jnp.ones((1, 1, 4)), prior), [1])
    np.testing.assert_allclose(losses.relative_scale(weights, jnp.zeros((1, 1, 4))), [1])


def test_relative_scale_is_the_ratio_of_the_margins_deviations():
    """For independent differences of errors inside the prior, and equal images outside."""
    rng = np.random.default_rng(0)
    prior = np.zeros((1, 8, 8), np.float32)
    prior[:, 2:7, 1:5] = 1
    weights = np.float32(0.5 + prior * (1 + 3 * rng.uniform(size=prior.shape)))
    differences = rng.normal(size=(20000, 8, 8)) * prior
    mean = lambda w: (differences * w).sum((1, 2)) / w.sum()
    ratio = mean(weights).std() / mean(np.ones_like(prior)).std()
    assert ratio > 1.5
    np.testing.assert_allclose(losses.relative_scale(weights, prior), [ratio], rtol=0.03)


def test_the_loser_counts_up_to_its_limit():
    """The limit is a share of the reference model's error; beyond it the loser has no gradient."""
    ones = jnp.ones((2, 2, 2))
    reference = 0.5 * ones
    rejected = jnp.stack([0.52 * ones[0], 0.7 * ones[1]])  # Rises of 0.02 and 0.2.

    def loss(rejected, limit):
        values, diagnostics = losses.diffusion_dpo(
            reference, reference, rejected, reference, ones, ones, 10.0, limit
        )
        return values.sum(), diagnostics

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(rejected, 0.1)
    np.testing.assert_allclose(found["margin"], [-0.02, -0.05], rtol=1e-5)
    np.testing.assert_allclose(found["loser_error_difference"], [0.02, 0.2], rtol=1e-5)
    assert float(jnp.abs(gradient[0]).min()) > 0 and not gradient[1].any()
    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(rejected, 0.0)
    np.testing.assert_allclose(found["margin"], [-0.02, -0.2], rtol=1e-5)
    assert float(jnp.abs(gradient).min()) > 0
