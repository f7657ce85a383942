"""experiments/reproduction.py and photograph_masks.py: parts of launch/reproduce.sh."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from experiments import photograph_masks, reproduction
from focusdpo_jax.data.images import decode_mask
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject, write
from tests.launch import test_reproduce
from tests.shared import shared


def test_split_holds_training_subjects_out(tmp_path, capsys):
    test_reproduce.photographs(tmp_path / "photos")
    test_reproduce.lists(tmp_path / "lists")
    (tmp_path / "photos/boat/01_mask.png").unlink()
    for segmented, count in ((False, 3), (True, 4)):
        reproduction.split(
            str(tmp_path / "photos"),
            str(tmp_path / "lists"),
            str(tmp_path / "out"),
            ["boat", "boat2"],
            segmented,
        )
        said = capsys.readouterr().out.splitlines()
        assert said[:2] == [
            "single: 3 of 4 prompts are evaluated",
            "multi: 2 of 3 prompts are evaluated",
        ]
        folder = tmp_path / "out/train"
        lines = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
        assert len(lines) == count
        assert lines[-1] == {
            "caption": "a photo of a boat",
            "group": "boat2",
            "chosen": "boat2/01.jpg",
            "subjects": [
                {
                    "phrase": "a boat",
                    "mask": "boat2/01_mask.png",
                    "reference": "boat2/00.jpg",
                    "reference_mask": "boat2/00_mask.png",
                }
            ],
        }
        # A single photograph has no other for a reference, and no mask of its own is invented.
        assert lines[0]["subjects"][0].get("reference") == ("boat/01.jpg" if segmented else None)
        assert "reference_mask" not in lines[0]["subjects"][0]
        for name in (lines[0]["chosen"], lines[-1]["subjects"][0]["mask"]):
            assert (folder / name).read_bytes() == (tmp_path / "photos" / name).read_bytes()


@pytest.mark.parametrize(
    "subjects, message",
    [
        (["boat", "teapot"], "has no folder teapot"),
        (["boat", "cup", "cup2"], "every prompt has one of the training subjects"),
    ],
)
def test_splits_that_cannot_be_made(tmp_path, subjects, message):
    test_reproduce.photographs(tmp_path / "photos")
    test_reproduce.lists(tmp_path / "lists")
    with pytest.raises(UserError, match=message):
        reproduction.split(
            str(tmp_path / "photos"),
            str(tmp_path / "lists"),
            str(tmp_path / "out"),
            subjects,
            False,
        )


def evaluated(folder, side, values):
    """Writes a finished evaluation of two subjects with two scenes each; values: {metric: [4]}."""
    scenes = [
        BenchmarkScene(f"{s}/{i}", "a cup", (BenchmarkSubject(s, "a cup", "x.png"),), i, s)
        for s in ("cup", "cat")
        for i in range(2)
    ]
    folder.mkdir(parents=True)
    write(folder / "scenes.jsonl", scenes)
    names = {metric: f"{metric}-0" for metric in values}
    results = {"settings": {"seed": 0, "scores": {side: list(names.values())}}}
    (folder / "results.json").write_text(json.dumps(results))
    for metric, column in values.items():
        scores = {scene.name: {metric: x} for scene, x in zip(scenes, column)}
        path = folder / "scores" / side / names[metric] / "000000.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(scores))


def test_table(tmp_path):
    """Seeds are pooled, and differences are paired with the base."""
    metrics = ("dino", "clip_i", "clip_t", "dinov2_crop", "dinov2_leakage", "missing")
    for kind in ("single", "one", "multi"):
        base = np.array([0.5, 0.5, 0.9, 0.9])
        rows = {"base": base, "dpo-0": base + 0.1, "dpo-1": base + 0.2, "sft-0": base[::-1]}
        for name, row in rows.items():
            folder = tmp_path / "evaluations" / name / kind
            side = "base" if name == "base" else "policy"
            evaluated(folder, side, {metric: row.tolist() for metric in metrics})
    for run, scales in (("dpo-0", [1.0]), ("dpo-1", [2.0, 3.0]), ("sft-0", [])):
        (tmp_path / "runs" / run).mkdir(parents=True)
        lines = [{"loss": 1.0}, *({"logit_scale": scale} for scale in scales)]
        (tmp_path / "runs" / run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = reproduction.table(str(tmp_path), ["dpo-0", "dpo-1", "sft-0"]).splitlines()
    assert text[0].split()[:3] == ["DINO", "CLIP-I", "CLIP-T"]
    assert text[2].split()[:2] == ["base", "0.700"]
    assert text[3].split()[:3] == ["dpo", "0.850", "(+0.150*)"]
    assert text[4].split()[:3] == ["sft", "0.700", "(+0.000)"]
    assert text[6].split() == "PatchDPO, published 0.727 0.838 0.292 0.831 0.880 0.288".split()
    assert text[-1].endswith("of training: dpo 2")
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["single"]["metrics"]["dino"]["dpo"]["difference"]["low"] == pytest.approx(0.15)
    assert found["single"]["metrics"]["dino"]["sft"]["difference"]["low"] == pytest.approx(-0.4)


def plan_of(tmp_path, **changes):
    """The command that prints a plan."""
    programs = {
        "update": {"peak": 2e10, "fits": True},
        "sampling": {
            "peak": 9e10,
            "fits": False,
            "rows_per_chip": 4,
            "estimate": {"matmul_flops": 4e15},
        },
    }
    made = {
        "bytes_per_chip": {"limit": 6e10},
        "programs": programs,
        "seconds_per_batch": 1.8,
        "accumulate": 4,
        "flops_per_pair": 9e13,
        "batch_size": 8,
        "chips": 1,
        "chip": "H100",
        "speed_from": "a guess",
    }
    (tmp_path / "plan.json").write_text(json.dumps(made | changes))
    return shlex.join(["cat", str(tmp_path / "plan.json")])


def test_time(tmp_path, capsys):
    reproduction.time(plan_of(tmp_path), steps=500, runs=2, samples=1)
    said = capsys.readouterr().out
    assert "# update: 20.0 GB of 60.0\n# sampling: 90.0 GB of 60.0, does NOT fit\n" in said
    # 500 steps of 4 batches of 1.8 s; 1e15 operations of an image at 4e14 a second.
    assert "(a guess): 1.0 h for each of 2 trainings; 2.5 s for an image, 1.0 h for" in said
    assert "# together 5 h" in said
    reproduction.time(plan_of(tmp_path, seconds_per_batch=None), steps=500, runs=2, samples=1)
    assert "the speed of H100 is unknown" in capsys.readouterr().out
    reproduction.time("sh -c 'echo error: no compiler >&2; exit 2'", 500, 2, 1)
    said = capsys.readouterr().out
    assert said.startswith("# no plan: error: no compiler\n") and ".[plan-gpu]" in said


def test_masks_of_an_object_on_a_background(tmp_path):
    """Its patches by their features, then its pixels by their colours."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    disc = (rows - 14) ** 2 + (columns - 17) ** 2 < 40
    means = np.eye(16)[:2]
    features = means[disc.astype(int)] + 0.15 * draw.normal(size=(32, 32, 16))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    patches = photograph_masks.subject_patches(features)
    assert (patches == disc).mean() > 0.99
    rows, columns = np.mgrid[:160, :192]
    exact = ((rows - 72) / 5) ** 2 + ((columns - 105) / 6) ** 2 < 40
    image = np.where(exact[..., None], (200, 60, 40), (40, 90, 60)) + draw.integers(
        0, 20, (160, 192, 3)
    )
    mask = photograph_masks.refine(image.astype(np.uint8), patches)
    assert (mask & exact).sum() / (mask | exact).sum() > 0.97


def test_masks_are_written_beside_photographs(tmp_path, capsys):
    """Of a real photograph; the others keep theirs."""
    photos = tmp_path / "photos"
    for name in ("00.jpg", "01.jpg", "01_mask.png"):
        source = shared("dreambench/duck_toy") / name
        (photos / "duck_toy").mkdir(parents=True, exist_ok=True)
        (photos / "duck_toy" / name).write_bytes(source.read_bytes())
    where = [f"--photographs={photos}", f"--dinov2={shared('dinov2-small')}"]
    photograph_masks.main([*where, f"--sheet={tmp_path / 'sheet.png'}"])
    made = decode_mask((photos / "duck_toy/00_mask.png").read_bytes())
    known = decode_mask((shared("dreambench/duck_toy") / "00_mask.png").read_bytes())
    assert (made & known).sum() / (made | known).sum() > 0.8
    assert Image.open(tmp_path / "sheet.png").size == (96 * 20, 96)
    photograph_masks.main([*where, "--measure"])
    assert "intersection over union of 2 masks" in capsys.readouterr().out
