"""SPAF on cases computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.focus import correspondence as spaf

match_fn = jax.jit(spaf.match)


def correspond(reference_features, reference_masks, target_features, present, area, rho):
    """SPAF from features to the match."""
    present = present & jnp.any(reference_masks > 0, axis=-1)
    described = spaf.subject_and_background_prototypes(
        reference_features, reference_masks, present, 3
    )
    similarity, background = spaf.prototype_similarity(described, target_features)
    return spaf.match(similarity, present, area, rho, background)


correspondence_fn = jax.jit(correspond)


def similarity_of(*maps):
    """Similarity [1, S, h, w] from nested lists, one a subject."""
    return jnp.array([maps], jnp.float32)


ALL = lambda n: jnp.ones((1, n), bool)


def test_prototype_is_the_masked_mean_direction():
    features = jnp.array([[[[3.0, 0.0], [0.0, 4.0], [100.0, 100.0]]]])
    masks = jnp.array([[[1.0, 0.5, 0.0]]])
    # 1 * (3, 0) + 0.5 * (0, 4) = (3, 2)
    np.testing.assert_allclose(
        spaf.prototypes(features, masks, ALL(1)), [[[[3 / 13**0.5, 2 / 13**0.5]]]], rtol=1e-6
    )


def test_several_prototypes_are_the_means_of_clusters():
    # Two groups by direction, one patch between them but nearer to the first, one background.
    features = jnp.array(
        [[[[4.0, 0.0], [2.0, 0.2], [0.0, 1.0], [-0.2, 3.0], [2.0, 1.0], [-9.0, -9.0]]]]
    )
    masks = jnp.array([[[1.0, 1.0, 1.0, 0.6, 1.0, 0.0]]])
    found = np.asarray(spaf.prototypes(features, masks, ALL(1), count=2))[0, 0]
    expected = np.array([[8.0, 1.2], [-0.12, 2.8]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(sorted(found.tolist()), sorted(expected.tolist()), rtol=1e-5)
    # With as many as there are directions, each stands for itself, and none for the background.
    many = np.asarray(spaf.prototypes(features, masks, ALL(1), count=7))[0, 0]
    directions = np.asarray(features[0, 0, :5]) / np.linalg.norm(
        features[0, 0, :5], axis=1, keepdims=True
    )
    np.testing.assert_allclose((directions @ many.T).max(1), 1, atol=1e-6)
    assert (many @ [-1, -1]).max() < 0.1


def test_more_prototypes_than_patches_do_not_depend_on_rounding():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(4, 2, 6, 5)).astype(np.float32)
    masks = np.ones((4, 2, 6), np.float32)
    present = jnp.ones((4, 2), bool)
    found = np.asarray(spaf.prototypes(features, masks, present, count=16))
    # Every patch and, for the rest, the mean of all.
    mean = np.asarray(spaf.prototypes(features, masks, present))
    np.testing.assert_array_equal(found[:, :, 7:], np.repeat(mean, 9, axis=2))
    units = features / np.linalg.norm(features, axis=-1, keepdims=True)
    cosine = np.einsum("bsnd,bspd->bsnp", units, found[:, :, 1:7])
    np.testing.assert_allclose(np.sort(cosine, axis=-1)[..., -1], 1, atol=1e-6)
    for _ in range(4):
        noise = 1 + 2e-7 * draw.normal(size=features.shape).astype(np.float32)
        np.testing.assert_allclose(
            spaf.prototypes(features * noise, masks, present, count=16), found, atol=1e-5
        )


def test_inside_and_outside_of_a_reference():
    features = jnp.array([[[[1.0, 0.0], [0.0, 1.0], [0.0, 5.0]]]])
    described = spaf.subject_and_background_prototypes(
        features, jnp.array([[[1.0, 0.0, 0.0]]]), ALL(1), 1
    )
    np.testing.assert_allclose(described, [[[[[1.0, 0.0]], [[0.0, 1.0]]]]], atol=1e-6)
    similarity, background = spaf.prototype_similarity(
        described, jnp.array([[[[3.0, 0.0], [0.6, 0.8]]]])
    )
    np.testing.assert_allclose(similarity, [[[[1.0, 0.6]]]], atol=1e-6)
    np.testing.assert_allclose(background, [[[0.0, 0.8]]], atol=1e-6)


def test_prototype_of_an_absent_subject_or_an_empty_mask_is_zero():
    features = jnp.full((1, 2, 3, 4), jnp.nan).at[0, 1].set(1.0)
    masks = jnp.ones((1, 2, 3)).at[0, 1].set(0.0)
    prototypes = spaf.prototypes(features, masks, jnp.array([[False, True]]))
    np.testing.assert_array_equal(prototypes, np.zeros((1, 2, 1, 4)))
    assert not np.any(spaf.prototypes(features, masks, jnp.array([[False, True]]), count=3))


def test_a_present_subject_with_an_empty_mask_matches_nothing():
    case = random_case()
    case["reference_masks"][:, 1] = 0
    match = correspondence_fn(**case)
    assert float(match.subjects[:, 1].sum()) == 0
    assert float(match.subjects[:, 0].sum()) > 0


def test_cosine_similarity_ignores_the_length_of_target_features():
    prototype = jnp.array([[[[0.6, 0.8]]]])
    target = jnp.array([[[[5.0, 0.0], [0.0, -2.0], [0.03, 0.04], [0.0, 0.0]]]])
    np.testing.assert_allclose(
        spaf.cosine_similarity(prototype, target), [[[[0.6, -0.8, 1.0, 0.0]]]], atol=1e-6
    )
    # The nearest of several counts; one that is not there is no match.
    several = jnp.array([[[[0.6, 0.8], [1.0, 0.0], [0.0, 0.0]]]])
    np.testing.assert_allclose(
        spaf.cosine_similarity(several, target), [[[[1.0, 0.0, 1.0, 0.0]]]], atol=1e-6
    )
    np.testing.assert_array_equal(spaf.cosine_similarity(0 * several, target), -1)


def test_each_subject_keeps_its_k_best_patches():
    similarity = similarity_of([[0.9, 0.1, 0.5], [0.8, 0.2, 0.3]])
    match = match_fn(similarity, ALL(1), jnp.array([[6.0]]), 0.5)
    np.testing.assert_array_equal(match.union, [[[1, 0, 1], [1, 0, 0]]])
    assert match.budget == pytest.approx([3.0])


def test_subjects_compete_for_patches():
    similarity = similarity_of([[0.9, 0.8, 0.7, 0.1]], [[0.2, 0.85, 0.3, 0.2]])
    match = match_fn(similarity, ALL(2), jnp.array([[2.0, 2.0]]), 1.0)
    # The second best of subject 0 goes to subject 1, so subject 0 takes its third.
    np.testing.assert_array_equal(match.subjects, [[[[1, 0, 1, 0]], [[0, 1, 0, 1]]]])
    np.testing.assert_array_equal(match.union, [[[1, 1, 1, 1]]])


def test_the_clearest_patches_are_kept_not_the_most_similar():
    similarity = similarity_of([[0.9, 0.7, 0.6, 0.2]], [[0.85, 0.2, 0.3, 0.1]])
    area = jnp.array([[2.0, 0.0]])
    # Margins over the other subject: 0.05, 0.5, 0.3, 0.1.
    match = match_fn(similarity, ALL(2), area, 1.0)
    np.testing.assert_array_equal(match.subjects[:, 0], [[[0, 1, 1, 0]]])
    # The background of the references is a rival too: 0.05, -0.2, 0.3, 0.1.
    background = jnp.array([[[0.0, 0.9, 0.0, 0.0]]])
    match = match_fn(similarity, ALL(2), area, 1.0, background)
    np.testing.assert_array_equal(match.subjects[:, 0], [[[0, 0, 1, 1]]])
    # Without any rival, and with absent ones, similarity itself counts.
    match = match_fn(similarity, jnp.array([[True, False]]), area, 1.0)
    np.testing.assert_array_equal(match.subjects[:, 0], [[[1, 1, 0, 0]]])


def test_a_subject_may_match_fewer_patches_than_its_budget():
    similarity = similarity_of([[0.9, 0.9, 0.9]], [[0.1, 0.1, 0.95]])
    match = match_fn(similarity, ALL(2), jnp.array([[3.0, 3.0]]), 1.0)
    np.testing.assert_array_equal(match.subjects, [[[[1, 1, 0]], [[0, 0, 1]]]])


@pytest.mark.parametrize(
    "area, rho, k",
    [
        (10.0, 0.3, 3),
        (10.0, 0.34, 3),
        (10.0, 0.35, 4),  # rounded, halves upwards
        (1.0, 0.1, 1),  # at least one
        (10.0, 100.0, 16),  # at most every patch
        (0.0, 1.0, 0),
    ],
)
def test_budget(area, rho, k):
    assert int(spaf.budget(jnp.array([[area]]), ALL(1), rho, 16)[0, 0]) == k


def test_k_follows_the_data_and_a_traced_rho_within_one_executable():
    similarity = jax.random.uniform(jax.random.key(0), (3, 1, 4, 4))
    area = jnp.array([[4.0], [8.0], [12.0]])
    traces = []

    @jax.jit
    def count(rho):
        traces.append(rho)
        match = spaf.match(similarity, jnp.ones((3, 1), bool), area, rho)
        return match.union.sum(axis=(1, 2))

    np.testing.assert_array_equal(count(0.5), [2, 4, 6])
    np.testing.assert_array_equal(count(1.0), [4, 8, 12])
    assert len(traces) == 1


def test_ties_between_patches_fall_in_raster_order():
    match = match_fn(jnp.zeros((1, 1, 2, 3)), ALL(1), jnp.array([[4.0]]), 1.0)
    np.testing.assert_array_equal(match.union, [[[1, 1, 1], [1, 0, 0]]])


def test_a_patch_that_is_equally_like_two_subjects_belongs_to_both():
    similarity = similarity_of([[0.5, 0.9]], [[0.5, 0.1]])
    match = match_fn(similarity, ALL(2), jnp.array([[1.0, 1.0]]), 1.0)
    np.testing.assert_array_equal(match.subjects, [[[[0, 1]], [[1, 0]]]])


def random_case(batch=2, subjects=3, patches=5, features=4, grid=(4, 6)):
    rng = np.random.default_rng(0)
    # Whole numbers make ties likely.
    return dict(
        reference_features=rng.integers(-2, 3, (batch, subjects, patches, features)).astype("f4"),
        reference_masks=rng.uniform(0.1, 1, (batch, subjects, patches)).astype("f4"),
        target_features=rng.integers(-1, 2, (batch, *grid, features)).astype("f4"),
        present=np.ones((batch, subjects), bool),
        area=rng.uniform(2, 8, (batch, subjects)).astype("f4"),
        rho=0.8,
    )


def test_permuting_subjects_permutes_the_match_and_leaves_the_union():
    case = random_case()
    case["reference_features"][:, 1] = case["reference_features"][:, 0]  # twins: every patch ties
    case["reference_masks"][:, 1] = case["reference_masks"][:, 0]
    base = correspondence_fn(**case)
    order = [2, 0, 1]
    for name in ("reference_features", "reference_masks", "present", "area"):
        case[name] = case[name][:, order]
    permuted = correspondence_fn(**case)
    np.testing.assert_array_equal(permuted.subjects, base.subjects[:, np.array(order)])
    np.testing.assert_array_equal(permuted.union, base.union)
    np.testing.assert_allclose(permuted.budget, base.budget)


def test_the_content_of_absent_slots_has_no_effect():
    case = random_case()
    base = correspondence_fn(**case)
    assert 0 < float(base.union.mean()) < 1
    for name, junk in (
        ("reference_features", np.nan),
        ("reference_masks", 1.0),
        ("present", False),
        ("area", 9.0),
    ):
        extra = np.full_like(case[name][:, :1], junk)
        case[name] = np.concatenate([case[name], extra], axis=1)
    padded = correspondence_fn(**case)
    np.testing.assert_array_equal(padded.subjects[:, :3], base.subjects)
    np.testing.assert_array_equal(padded.subjects[:, 3], 0)
    np.testing.assert_array_equal(padded.union, base.union)
    np.testing.assert_array_equal(padded.budget, base.budget)


def test_without_any_subject_nothing_matches():
    match = match_fn(jnp.ones((1, 2, 2, 2)), jnp.zeros((1, 2), bool), jnp.ones((1, 2)), 1.0)
    assert float(match.union.sum()) == 0
    assert spaf.alignment(match, jnp.ones((1, 2, 2))) == pytest.approx([0.0])


def test_unmatched_is_prior_and_not_matched():
    prior = jnp.array([[[1.0, 1.0, 0.5, 0.0]]])
    matched = jnp.array([[[1.0, 0.0, 0.0, 1.0]]])
    np.testing.assert_array_equal(spaf.unmatched(prior, matched), [[[0, 1, 0.5, 0]]])


@pytest.mark.parametrize(
    "union, k, prior, score",
    [
        ([1, 1, 1, 0], 3, [1, 1, 0, 0], 1.0),  # covers both prior patches: min is |prior|
        ([1, 0, 1, 0], 2, [1, 1, 1, 0], 1.0),  # every match inside: min is k
        ([1, 0, 0, 1], 2, [1, 1, 1, 0], 0.5),
        ([1, 1, 0, 0], 2, [0.5, 0.5, 1, 1], 0.5),  # soft prior: half of each hit
        ([1, 0, 0, 0], 1, [0, 0, 0, 0], 0.0),  # nothing to align with
    ],
)
def test_alignment(union, k, prior, score):
    match = spaf.Match(None, jnp.array([[union]], jnp.float32), jnp.array([float(k)]))
    assert spaf.alignment(match, jnp.array([[prior]], jnp.float32)) == pytest.approx([score])


def test_match_moves_to_the_latent_grid_with_its_budget():
    match = match_fn(similarity_of([[0.9, 0.1], [0.2, 0.8]]), ALL(1), jnp.array([[2.0]]), 1.0)
    finer = spaf.to_grid(match, (4, 4))
    np.testing.assert_array_equal(finer.union, np.kron(match.union, np.ones((1, 2, 2))))
    assert finer.budget == pytest.approx([8.0])
    assert spaf.alignment(finer, finer.union) == pytest.approx([1.0])


def test_matching_is_not_differentiated():
    case = random_case()
    target = jnp.asarray(case.pop("target_features"))
    union = lambda x: correspond(**case, target_features=x).union.sum()  # noqa: E731
    gradient = jax.jit(jax.grad(union))(target)
    np.testing.assert_array_equal(gradient, 0)


def test_patch_quality_is_the_best_match_among_the_patches_of_all_subjects():
    references = jnp.array([[[[1.0, 0.0], [0.0, 3.0]], [[0.6, 0.8], [-5.0, 0.0]]]])
    masks = jnp.array([[[1.0, 0.4], [0.9, 0.0]]])  # The second patches are background.
    targets = jnp.array([[[[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]])
    present = jnp.array([[True, True]])
    np.testing.assert_allclose(
        spaf.patch_quality(references, masks, targets, present), [[[1.0, 0.8, 0.0]]], atol=1e-6
    )
    absent = references.at[:, 1].set(jnp.nan)
    np.testing.assert_allclose(
        spaf.patch_quality(absent, masks, targets, jnp.array([[True, False]])),
        [[[1.0, 0, 0]]],
        atol=1e-6,
    )


def test_matches_on_another_subject_are_dropped():
    """Subject 0's reference explains a cell of subject 1: it counts for neither."""
    subjects = jnp.array([[[[1.0, 0, 1.0, 0]], [[0, 0, 0, 1.0]]]])
    matched = spaf.Match(subjects, jnp.max(subjects, axis=1), jnp.array([3.0]))
    masks = jnp.array([[[[1.0, 0.2, 0, 0]], [[0, 0, 0.3, 1.0]]]])
    own = spaf.inside_own(matched, masks)
    np.testing.assert_array_equal(own.subjects, [[[[1, 0, 0, 0]], [[0, 0, 0, 1]]]])
    np.testing.assert_array_equal(own.union, [[[1, 0, 0, 1]]])
    assert own.budget == 3


def test_with_coverage_the_budget_is_the_covered_area_of_the_own_subject():
    # One subject covers 1 + 0.5 + 0.25 patches. The best patch of all is outside it.
    similarity = similarity_of([[0.9, 0.8, 0.3], [0.7, 0.6, 0.95]])
    coverage = jnp.array([[[[1.0, 0.25, 0.5], [0.0, 0.0, 0.0]]]])
    area = jnp.array([[1.75]])

    def kept(rho):
        found = match_fn(similarity, ALL(1), area, rho, None, coverage)
        return found.subjects[0, 0].tolist(), float(found.budget[0])

    # In order of similarity: 1 (0.9), 0.25 (0.8), 0.5 (0.3). Half of the area is 0.875 patches.
    assert kept(0.5) == ([[1, 0, 0], [0, 0, 0]], pytest.approx(0.875))
    # 1.05: the first patch covers 1 of it.
    assert kept(0.6) == ([[1, 1, 0], [0, 0, 0]], pytest.approx(1.05))
    # The whole subject, with its outline.
    assert kept(1.0) == ([[1, 1, 1], [0, 0, 0]], pytest.approx(1.75))
    assert kept(0.0)[0] == [[0, 0, 0], [0, 0, 0]]
    # By rank the same budget leaves the outline without a match, and selects a patch outside.
    plain = match_fn(similarity, ALL(1), area, 1.0)
    assert plain.subjects[0, 0].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_with_coverage_a_patch_that_matches_another_subject_is_not_matched():
    """The left subject's second patch has the look of the right subject."""
    similarity = similarity_of([[0.9, 0.2, 0.1, 0.1]], [[0.1, 0.8, 0.9, 0.9]])
    coverage = jnp.array([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])
    area = jnp.array([[2.0, 2.0]])
    found = match_fn(similarity, ALL(2), area, 1.0, None, coverage)
    assert found.union[0].tolist() == [[1, 0, 1, 1]]
    prior = jnp.ones((1, 1, 4))
    assert float(spaf.alignment(found, prior)[0]) == pytest.approx(3 / 4)
