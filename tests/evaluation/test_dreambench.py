"""DreamBench's scenes from folders in its layout."""

import json

import pytest
from PIL import Image

from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import dreambench, scenes

LISTING = """subject_name,class
can,can
rex,dog

Object Prompts
prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]
Live Subject Prompts
prompt_list = [
'a {0} {1} wearing a hat'.format(unique_token, class_token)
]
"""
HOW = {"protocol": "all", "samples": 2, "seed": 10}


@pytest.fixture
def folder(tmp_path):
    for subject, count in (("can", 3), ("rex", 2)):
        (tmp_path / "dataset" / subject).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / "dataset" / subject / f"{i:02d}.jpg")
    Image.new("L", (4, 4)).save(tmp_path / "dataset" / "can" / "00_mask.png")
    (tmp_path / "prompts_and_classes.txt").write_text(LISTING)
    return tmp_path / "dataset"


def test_every_subject_with_its_prompts(folder):
    found = dreambench.single(folder, **HOW)
    assert [(s.name, s.prompt) for s in found] == [
        ("can/00_0", "a can in the jungle"), ("can/00_1", "a can in the jungle"),
        ("can/01_0", "a red can"), ("can/01_1", "a red can"),
        ("rex/00_0", "a dog wearing a hat"), ("rex/00_1", "a dog wearing a hat")]
    assert [s.seed for s in found] == list(range(10, 16))
    assert found[-1].group == "rex" and found[-1].subjects[0].phrase == "a dog"
    can = found[0].subjects[0]
    assert can.reference == str(folder / "can" / "00.jpg")
    assert can.photographs == tuple(str(folder / "can" / f"0{i}.jpg") for i in range(3))
    one = dreambench.single(folder, **HOW | {"protocol": "one"})
    assert one[0].subjects[0].photographs == (can.reference,)


def test_scenes_of_several(folder, tmp_path):
    path = tmp_path / "lists" / "scenes.json"
    path.parent.mkdir()
    entry = {"prompt": "a can and a dog", "image_paths": ["elsewhere/can/01.jpg",
                                                          "../dataset/rex/00.jpg"]}
    path.write_text(json.dumps([entry, entry | {"boxes": [None, [0.5, 0, 1, 1]]}]))
    found = dreambench.listed(path, folder, **HOW)
    assert [s.name for s in found] == ["0000_0", "0000_1", "0001_0", "0001_1"]
    assert {s.group for s in found} == {"can+rex"}
    assert found[0].subjects[0].reference == str(folder / "can" / "01.jpg")
    assert len(found[0].subjects[0].photographs) == 3
    assert found[2].as_prompt().references[1].box == (0.5, 0, 1, 1)
    scenes.write(tmp_path / "scenes.jsonl", found)
    assert scenes.read(tmp_path / "scenes.jsonl") == found


@pytest.mark.parametrize(("content", "reason"), [
    ("{", "is no JSON"),
    ("[]", "give a list of scenes"),
    ('[{"image_paths": ["can/00.jpg"]}]', "entry 0: it has no prompt"),
    ('[{"prompt": "a", "image_paths": []}]', "list of one or more"),
    ('[{"prompt": "a", "image_paths": ["cat/00.jpg"]}]', "cat/00.jpg is not there"),
    ('[{"prompt": "a", "image_paths": ["can/00.jpg"], "boxes": [[0, 0, 2, 1]]}]', "0 <= x0"),
    ('[{"prompt": "a", "image_paths": ["can/00.jpg"], "boxes": []}]', "list of 1"),
    ('[{"prompt": "a", "image_paths": ["can/00.jpg"], "seed": 1}]', "unknown field 'seed'"),
])
def test_bad_lists_are_named(folder, tmp_path, content, reason):
    path = tmp_path / "scenes.json"
    path.write_text(content)
    with pytest.raises(UserError, match="--scenes=") as error:
        dreambench.listed(path, folder, **HOW)
    assert reason in str(error.value)


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        dreambench.single(tmp_path / "none", **HOW)
    (tmp_path / "prompts_and_classes.txt").write_text("can,can")
    with pytest.raises(UserError, match="no prompts_and_classes.txt"):
        dreambench.single(folder, **HOW)
