"""The output folder of `disrupt`: pairs, their manifest, the contact sheet and the report.

scenes/<line>/          images of a pair, and line.json, its line of the manifest (written last)
manifest.jsonl          the input of `prepare`
contact_sheet.png       some of the pairs
report.json             settings, refused lines, and mean scores
"""

import json
import re
from typing import Any

import numpy as np
from etils import epath

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.data import geometry, scene_manifest
from focusdpo_jax.data.images import decode_image, decode_mask, encode_png
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file

MANIFEST, REPORT, SHEET = "manifest.jsonl", "report.json", "contact_sheet.png"
_COMMAND = "disrupt"
_ENDING = re.compile(r"\.[A-Za-z0-9]{1,5}$")


def claim(output: epath.Path, identity: dict) -> None:
    """Records the settings that the folder's files depend on; raises UserError if they differ."""
    found = read_json(output / REPORT)
    if found.get("command") != _COMMAND:
        for name in (MANIFEST, REPORT, SHEET, "scenes"):
            if (output / name).exists():
                raise UserError(
                    f"--output={output} has a {name} that `disrupt` did not make; give "
                    "another --output"
                )
    elif (output / "scenes").exists():
        before = found["settings"]
        other = sorted(
            name for name in {*before, *identity} if before.get(name) != identity.get(name)
        )
        if other:
            raise UserError(
                f"--output={output} holds pairs with another {', '.join(other)}; give "
                "another --output, or remove the folder"
            )
        return
    write_report(output, "begun", identity)


def write_pair(
    folder: epath.Path,
    line: scene_manifest.SceneLine,
    contents: dict[str, bytes],
    scene: scene_manifest.Scene,
    rejected: RGBImage,
    records: list[dict],
) -> dict:
    """Writes the images of a pair; returns its line of the manifest."""
    named = line.files()

    def put(field, name, made):
        """Writes the user's file unchanged if there is one, otherwise the generated image."""
        if field in contents:
            name, made = name + _ending(named[field]), contents[field]
        else:
            name, made = name + ".png", encode_png(made)
        replace_file(folder / name, made)
        return f"scenes/{folder.name}/{name}"

    union = np.any([subject.mask for subject in scene.subjects], axis=0)
    pair = {
        "caption": scene.caption,
        "chosen": put("chosen", "chosen", None),
        "rejected": put("rejected", "rejected", rejected),
        "prior_mask": put("prior_mask", "prior_mask", union),
        "subjects": [],
    }
    for i, (subject, own) in enumerate(zip(scene.subjects, line.subjects, strict=True)):
        pair["subjects"].append(
            {
                "phrase": subject.phrase,
                **{
                    field: put(f"subjects[{i}].{field}", f"{field}{i}", getattr(subject, field))
                    for field in ("reference", "reference_mask", "mask")
                },
                "info": _info(own.info) | {"disruption": records[i]},
            }
        )
    if line.group is not None:
        pair["group"] = line.group
    if line.info is not None:
        pair["info"] = line.info
    return pair


def _info(given: object) -> dict:
    """Returns the user's data of a subject as an object."""
    if given is None:
        return {}
    return given if isinstance(given, dict) else {"info": given}


def _ending(name: str) -> str:
    match = _ENDING.search(name)
    return match[0].lower() if match else ""


def load_record(output: epath.Path, pair: dict) -> dict:
    """Returns a pair as a record for the contact sheet, with all images padded to squares."""

    def image(name):
        return _square(decode_image((output / name).read_bytes())[0])

    def mask(name):
        return _square(decode_mask((output / name).read_bytes()))

    return {
        "caption": pair["caption"],
        "chosen": image(pair["chosen"]),
        "rejected": image(pair["rejected"]),
        "prior_mask": mask(pair["prior_mask"]),
        "subjects": [
            {
                "reference": image(s["reference"]),
                "mask": mask(s["mask"]),
                "reference_mask": mask(s["reference_mask"]),
            }
            for s in pair["subjects"]
        ],
    }


def _square(pixels: np.ndarray) -> np.ndarray:
    return geometry.pad_to_square(pixels, max(pixels.shape[:2]))


def remove_outdated(output: epath.Path, lines: dict[int, dict]) -> None:
    """Removes scenes that are no longer in the manifest, and temporary files."""
    for folder in (output / "scenes").iterdir():
        if not folder.name.isdigit():
            continue  # Not a scene of this command.
        if int(folder.name) not in lines:
            folder.rmtree()
            continue
        pair = lines[int(folder.name)]
        named = {pair[name] for name in ("chosen", "rejected", "prior_mask")} | {
            s[name] for s in pair["subjects"] for name in ("reference", "reference_mask", "mask")
        }
        keep = {epath.Path(name).name for name in named} | {"line.json"}
        for file in folder.iterdir():
            if file.name not in keep:
                file.unlink()
    for name in (MANIFEST, SHEET, REPORT):
        for file in output.glob(f"{name}.*.tmp"):
            file.unlink()


def read_json(path: epath.Path) -> dict:
    """Returns the object in a file, or an empty one."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_report(output: epath.Path, status: str, identity: dict, **values: Any) -> dict:
    """Writes report.json; returns its content."""
    report = {"command": _COMMAND, "status": status, "settings": identity, **values}
    replace_file(output / REPORT, json.dumps(report, indent=2, sort_keys=True) + "\n")
    return report
