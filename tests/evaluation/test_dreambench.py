"""DreamBench's scenes from folders in its layout."""

import json

import numpy as np
import pytest
from PIL import Image

from focusdpo_jax.data.images import read_image
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import dreambench, scenes, scoring

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
        ("can/00_0", "a can in the jungle"),
        ("can/00_1", "a can in the jungle"),
        ("can/01_0", "a red can"),
        ("can/01_1", "a red can"),
        ("rex/00_0", "a dog wearing a hat"),
        ("rex/00_1", "a dog wearing a hat"),
    ]
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
    entry = {
        "prompt": "a can and a dog",
        "image_paths": ["elsewhere/can/01.jpg", "../dataset/rex/00.jpg"],
    }
    path.write_text(json.dumps([entry, entry | {"boxes": [None, [0.5, 0, 1, 1]]}]))
    found = dreambench.listed(path, folder, **HOW)
    assert [s.name for s in found] == ["0000_0", "0000_1", "0001_0", "0001_1"]
    assert {s.group for s in found} == {"can+rex"}
    assert found[0].subjects[0].reference == str(folder / "can" / "01.jpg")
    assert len(found[0].subjects[0].photographs) == 3
    assert found[2].as_prompt().references[1].box == (0.5, 0, 1, 1)
    scenes.write(tmp_path / "scenes.jsonl", found)
    assert scenes.read(tmp_path / "scenes.jsonl") == found


def flat(tmp_path, *names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)


def listed(tmp_path, entries, folder=None, **how):
    path = tmp_path / "lists" / "scenes.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps([{"prompt": prompt, "image_paths": list(names)} for prompt, *names in entries])
    )
    return dreambench.listed(path, folder, **HOW | {"samples": 1} | how)


FLAT = [
    [("a dog and a cat", "../refs/dog.png", "../refs/cat.png")],
    [("a dog", "../refs/dog.png"), ("a cat", "../refs/cat.png")],
    [("a dog in the snow", "../refs/dog.png")],
    [("two dogs", "../refs/dog_1.png", "../refs/dog_2.png")],
    [("a thing", "../refs/01.png"), ("two things", "../refs/01.png", "../refs/02.png")],
    [("a thing", "beside.png")],
    [("a dog on grass", "../set_a/dog.png"), ("a cat on sand", "../set_a/cat.png")],
]


@pytest.mark.parametrize("entries", FLAT, ids=range(len(FLAT)))
def test_every_image_of_a_flat_folder_is_a_subject(tmp_path, entries):
    flat(
        tmp_path,
        *(f"refs/{name}.png" for name in ("dog", "cat", "dog_1", "dog_2", "01", "02")),
        "lists/beside.png",
        "lists/other.png",
        "set_a/dog.png",
        "set_a/cat.png",
    )
    for scene, (_, *names) in zip(listed(tmp_path, entries), entries):
        for subject, name in zip(scene.subjects, names):
            assert subject.photographs == (str(tmp_path / "lists" / name),)
            assert subject.name == name.split("/")[-1].removesuffix(".png")
        assert scene.group == "+".join(subject.name for subject in scene.subjects)


@pytest.mark.parametrize(
    "entries",
    [
        [("a dog", "../dog/00.png"), ("a dog at night", "../dog/01.png")],
        [("a dog", "../dog/front.png")],
        [("a pet", "../dog/00.png")],
        [("a pet", "../dog/IMG_31.png"), ("a pet", "../dog/IMG_32.png")],
        [("a dog", "../dog/front.png"), ("a dog", "../dog/00.png")],
    ],
)
def test_folders_of_one_subject(tmp_path, entries, caplog):
    names = ["00", "01", "IMG_31", "IMG_32", "front"]
    flat(tmp_path, *(f"dog/{name}.png" for name in names))
    for scene in listed(tmp_path, entries):
        assert [p.split("/")[-1] for p in scene.subjects[0].photographs] == [
            f"{name}.png" for name in names
        ]
        assert scene.subjects[0].name == scene.group == "dog"
    assert ("are treated as photographs of one" in caplog.text) == (len(entries) > 1)


class Pixels:
    """The pixels of an image as a unit vector."""

    name, digest = "dinov2", "pixels"

    def __call__(self, pictures):
        flat = np.stack([picture.reshape(-1).astype(np.float64) for picture in pictures])
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def test_identical_images_score_one_in_a_flat_folder(tmp_path):
    draw = np.random.default_rng(0)
    flat(tmp_path, "refs/dog.png", "refs/cat.png", "refs/cup.png")
    for path in (tmp_path / "refs").iterdir():
        Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8)).save(path)
    scenes = listed(
        tmp_path,
        [("a dog", "../refs/dog.png"), ("a cat", "../refs/cat.png"), ("a cup", "../refs/cup.png")],
    )
    copies = [read_image(scene.subjects[0].reference) for scene in scenes]
    scores = scoring.SimilarityScorer(Pixels()).score(scenes, copies, [[None]] * 3)
    assert scores == [{"dinov2": pytest.approx(1.0, abs=1e-12)}] * 3
    assert [scene.group for scene in scenes] == ["dog", "cat", "cup"]


def test_mixed_layouts_and_equal_names(tmp_path, folder):
    """A listed subject stays one even where an entry names two of its photographs."""
    flat(tmp_path, "refs/dog.png", "refs/cat.png", "more/dog.png", "other/can/00.png")
    scenes = listed(
        tmp_path,
        [
            ("a dog and a can", "../refs/dog.png", "can/01.jpg"),
            ("a dog and a cat", "../more/../refs/dog.png", "../refs/cat.png"),
            ("a dog", "../more/dog.png"),
            ("two cans", "can/00.jpg", "can/02.jpg"),
            ("a can", "../other/can/00.png"),
        ],
        folder,
    )
    assert [scene.group for scene in scenes] == [
        "refs/dog+dataset/can",
        "refs/dog+cat",
        "more/dog",
        "dataset/can+dataset/can",
        "other/can",
    ]
    assert [len(s.photographs) for scene in scenes for s in scene.subjects] == [
        1,
        3,
        1,
        1,
        1,
        3,
        3,
        1,
    ]
    assert scenes[0].subjects[0].phrase == "a dog" and scenes[0].subjects[1].phrase == "a can"


def test_a_reference_without_a_photograph_of_its_name_is_compared(tmp_path):
    flat(tmp_path, "dog/00.png", "dog/01.tiff")
    found = listed(tmp_path, [("a dog", "../dog/01.tiff")])[0].subjects[0]
    assert [p.split("/")[-1] for p in found.photographs] == ["01.tiff", "00.png"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "give a list of scenes"),
        ('[{"image_paths": ["can/00.jpg"]}]', "entry 0: it has no prompt"),
        ('[{"prompt": "a", "image_paths": []}]', "list of one or more"),
        ('[{"prompt": "a", "image_paths": ["cat/00.jpg"]}]', "cat/00.jpg does not exist"),
        ('[{"prompt": "a", "image_paths": ["can/00.jpg"], "boxes": [[0, 0, 2, 1]]}]', "0 <= x0"),
        ('[{"prompt": "a", "image_paths": ["can/00.jpg"], "boxes": []}]', "list of 1"),
        ('[{"prompt": "a", "image_paths": ["can/00.jpg"], "seed": 1}]', "unknown field 'seed'"),
    ],
)
def test_bad_lists_are_named(folder, tmp_path, content, reason):
    path = tmp_path / "scenes.json"
    path.write_text(content)
    with pytest.raises(UserError, match="--scenes=") as error:
        dreambench.listed(path, folder, **HOW)
    assert reason in str(error.value)


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        dreambench.single(tmp_path / "none", **HOW)
    (tmp_path / "prompts_and_classes.txt").write_text("can,can")
    with pytest.raises(UserError, match="no prompts_and_classes.txt"):
        dreambench.single(folder, **HOW)
