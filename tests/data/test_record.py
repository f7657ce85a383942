import jax
import numpy as np
import pytest

from focusdpo_jax import toybox
from focusdpo_jax.data import record as record_lib
from focusdpo_jax.errors import UserError


def tokenize(caption):
    return np.array([[len(caption), 7]] * 2)


def make_record(index=0):
    return toybox.World(count_probabilities=(0.0, 1.0)).record("train", index)


def encode(record, num_subjects=3):
    return record_lib.encode(record, tokenize=tokenize, num_subjects=num_subjects)


def test_encode_pads_absent_slots():
    record = make_record()
    example = encode(record)
    assert example["present"].tolist() == [True, True, False]
    assert (example["references"][2] == 255).all()
    assert not example["reference_masks"][2].any() and not example["masks"][2].any()
    for slot, subject in enumerate(record["subjects"]):
        np.testing.assert_array_equal(example["references"][slot], subject["reference"])
        np.testing.assert_array_equal(example["reference_masks"][slot], subject["reference_mask"])
        np.testing.assert_array_equal(example["masks"][slot], subject["mask"])
        assert example["truth"]["hue"][slot] == np.float32(subject["hue"])
        assert example["truth"]["rejected_part"][slot] == subject["rejected_part"]
    assert example["truth"]["class_id"][2] == -1
    assert example["truth"]["background"] == record["background"]


def test_encode_time_ids_and_tokens():
    example = encode(make_record())
    assert example["time_ids"].tolist() == [64, 64, 0, 0, 64, 64]
    caption = make_record()["caption"]
    assert example["token_ids"].tolist() == [[len(caption), 7]] * 2
    assert example["token_ids"].dtype == np.int32


def test_photographs_have_no_truth():
    record = make_record()
    del record["background"]
    assert encode(record)["truth"] == {}


def test_batch_is_a_pytree_with_all_fields():
    examples = [encode(make_record(i)) for i in range(2)]
    batch = record_lib.PreferenceBatch(**jax.tree.map(lambda *rows: np.stack(rows), *examples))
    assert len(jax.tree.leaves(batch)) == 10 + 12
    assert batch.chosen.shape == (2, 64, 64, 3) and batch.chosen.dtype == np.uint8
    assert batch.references.shape == (2, 3, 64, 64, 3)
    halves = jax.tree.map(lambda x: x[:1], batch)
    assert halves.index.tolist() == [0] and batch.index.tolist() == [0, 1]


def test_good_record_passes_unchanged():
    record = make_record()
    assert record_lib.check_record(record, max_subjects=2) is record


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: r.update(rejected=r["chosen"].copy()), "rejected equals chosen"),
        (lambda r: r.update(rejected=r["chosen"][:32]), "rejected is 32 x 64 .* 64 x 64"),
        (lambda r: r.update(chosen=None), "chosen is None"),
        (lambda r: r.update(chosen=r["chosen"][..., :1]), "chosen has 1 channels"),
        (lambda r: r.update(chosen=r["chosen"] / 255.0), "chosen is float64"),
        (lambda r: r.update(caption=" "), "caption is empty"),
        (lambda r: r.pop("rejected"), "rejected is missing"),
        (lambda r: r["prior_mask"].fill(False), "prior_mask is empty"),
        (lambda r: r.update(prior_mask=np.ones((8, 64), bool)), "prior_mask is 8 x 64"),
        (lambda r: r["subjects"].clear(), "subjects has 0 entries; 1 to 2 fit"),
        (lambda r: r["subjects"].append(r["subjects"][0]), "subjects has 3 entries"),
        (lambda r: r["subjects"][1].pop("phrase"), r"subjects\[1\].phrase is missing"),
        (lambda r: r["subjects"][1]["mask"].fill(False), r"subjects\[1\].mask is empty"),
        (
            lambda r: r["subjects"][0].update(reference_mask=np.ones((64, 8), bool)),
            r"subjects\[0\].reference_mask is 64 x 8",
        ),
        (
            lambda r: r["subjects"][0].update(reference=np.zeros((8, 8, 3), np.uint8)),
            r"subjects\[0\].reference_mask is 64 x 64 pixels and subjects\[0\].reference is 8 x 8",
        ),
    ],
)
def test_bad_record_is_named(spoil, message):
    record = make_record(4)
    spoil(record)
    with pytest.raises(UserError, match="record 4: " + message):
        record_lib.check_record(record, max_subjects=2)
