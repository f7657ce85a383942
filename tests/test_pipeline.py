"""Names of the package's generators."""

import pytest

from focusdpo_jax import pipeline
from focusdpo_jax.errors import UserError


@pytest.mark.parametrize("name", [pipeline.BASE, *pipeline.SHIPPED])
def test_generators_of_the_package_are_found_by_name(name):
    opened = pipeline.open_pipeline(name)
    assert opened.shipped and opened.run is None and opened.resolution == 64
    assert opened.sizes().unet.block_out_channels == (48, 96)


def test_other_assets_are_no_generators(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir=references: no run there"):
        pipeline.open_pipeline("references")
    # A folder wins over a name of the package.
    (tmp_path / "toybox").mkdir()
    with pytest.raises(UserError, match="--workdir=toybox: no run there"):
        pipeline.open_pipeline("toybox")
