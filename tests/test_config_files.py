import pathlib

import pytest

from focusdpo_jax import config_files
from focusdpo_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = "sdxl_dpo, toybox_base, toybox_dpo"


@pytest.mark.parametrize("name", ["sdxl_dpo", "sdxl_dpo.py", "configs/sdxl_dpo.py"])
def test_a_configuration_of_the_package_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find(name) == str(CONFIGS / "sdxl_dpo.py")
    assert config_files.find(f"{name}:debug") == str(CONFIGS / "sdxl_dpo.py:debug")
    assert config_files.load(f"{name}:debug").steps == config_files.load(name, "debug").steps == 6
    assert config_files.load(name).steps == 2000


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("toybox_dpo.py").write_text("def get_config(word='mine'):\n    return word\n")
    assert config_files.find("toybox_dpo.py:a:b") == "toybox_dpo.py:a:b"
    assert config_files.load("toybox_dpo.py") == "mine"
    assert config_files.load("toybox_dpo.py:a:b") == "a:b"
    assert config_files.find("toybox_dpo") == str(CONFIGS / "toybox_dpo.py")


@pytest.mark.parametrize(
    "name, path, suggestion",
    [
        ("toybox_dop", "toybox_dop", "Did you mean toybox_dpo? "),
        ("configs/sdxl_dop.py:lora", "configs/sdxl_dop.py", "Did you mean sdxl_dpo? "),
        ("other/toybox_dpo.py", "other/toybox_dpo.py", "Did you mean toybox_dpo? "),
        ("flux", "flux", ""),
    ],
)
def test_a_missing_file_is_named_with_similar_names(name, path, suggestion):
    with pytest.raises(UserError) as error:
        config_files.find(name)
    assert str(error.value) == (
        f"--config={path}: there is no such file. {suggestion}Names that need no path: {NAMES}"
    )
