"""Gradients of settings are compared on the same pairs, timesteps and noise."""

import numpy as np
import pytest

from experiments import gradients

pytestmark = pytest.mark.filterwarnings("ignore")


def test_cosine():
    assert gradients.cosine(np.array([1.0, 0]), np.array([3.0, 4.0])) == pytest.approx(0.6)


@pytest.mark.slow
def test_equal_settings_have_equal_gradients_and_others_do_not(tiny_config):
    config = tiny_config(focus__buckets=1, focus__background=0.5, trainable="full")
    found = gradients.compare(
        config,
        {
            "dpo": {"objective": "dpo"},
            "prior_dpo": {"objective": "prior_dpo"},
            # Without SPAF and DPCE the focus weights are the prior's.
            "none": {"focus.spaf": False, "focus.dpce": False},
            "focus": {"focus.lambda_s": 10.0, "focus.matched": 0.0},
        },
        pairs=4,
        seed=0,
    )
    (settings,) = found.values()
    assert settings["none"] == pytest.approx(settings["prior_dpo"], abs=1e-5)
    assert settings["prior_dpo"]["prior_dpo"] == settings["dpo"]["norm"] == pytest.approx(1)
    assert settings["focus"]["prior_dpo"] < 0.999
    assert all(-1 <= row["halves"] < 0.9 for row in settings.values())
    text = gradients.format_table(found).splitlines()
    assert len(text) == 2 + 4 and f"{settings['focus']['norm']:.3f}" in text[-1]
