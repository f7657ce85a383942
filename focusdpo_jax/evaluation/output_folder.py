"""The output folder of an evaluation: its settings, images and scores.

    settings.json                   all settings that the other files depend on
    scenes.jsonl                    the scenes; another program may generate the images
    references/                     subject reference images that are not the user's files
    pictures/<side>/<scene>.png     side: base or policy
    scores/<side>/<scorer>/         one file per batch: {scene: {metric: value or values}}
    results.json, report.html       computed from the above

Every file gets its name when it is complete, so that an interrupted evaluation can be continued.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import scenes as scene_files
from focusdpo_jax.evaluation.scenes import BenchmarkScene
from focusdpo_jax.files import cannot_write, replace_file
from focusdpo_jax.vision import regions
from focusdpo_jax.visualization import grids


class OutputFolder:
    """The output folder of an evaluation."""

    def __init__(self, path: epath.PathLike):
        """Opens the folder, which need not exist."""
        self.path = epath.Path(path)

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Records the settings that the folder's files depend on.

        Raises:
          UserError: the folder has images or scores of other settings, or cannot be written.
        """
        path = self.path / "settings.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stored = json.loads(path.read_text()) if path.exists() else {}
            for name, source in (("sampling", "a model"), ("images", "another program")):
                if name in stored:  # Folders of earlier versions do not state the source.
                    stored.setdefault("source of images", source)
            if stored.get("benchmark") == "toybox":
                stored.setdefault("probe", "of an earlier version")
            # Through JSON, which turns tuples into lists.
            settings = json.loads(json.dumps(settings))
            other = [key for key, value in settings.items() if stored.get(key, value) != value]
            if other:
                raise UserError(
                    f"--output={self.path} holds an evaluation with another {', '.join(other)}. "
                    "Give another --output, or remove the folder to start again."
                )
            self.write("settings.json", {**stored, **settings})
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}. Remove --output={self.path}.") from error
        except OSError as error:
            raise cannot_write(f"--output={self.path}", error) from error

    def write(self, name: str, values: Any) -> None:
        """Writes a JSON file atomically."""
        text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
        replace_file(self.path / name, text + "\n")

    def read(self, name: epath.PathLike) -> Any:
        """Reads a JSON file.

        Raises:
          UserError: it is missing or damaged.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}). Give the --output "
                "folder of a finished focusdpo_jax.evaluate."
            ) from error
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}. Evaluate again.") from error

    def scenes(self) -> list[BenchmarkScene]:
        """Reads the scenes of the evaluation; see `scenes.read`."""
        return scene_files.read(self.path / "scenes.jsonl")

    def image_path(self, side: str, scene: BenchmarkScene) -> epath.Path:
        """Returns the path of a scene's image."""
        return self.path / "pictures" / side / f"{scene.name}.png"

    def save_image(self, side: str, scene: BenchmarkScene, image: RGBImage) -> None:
        """Writes a scene's image, uint8 [H, W, 3]."""
        grids.save_png(self.image_path(side, scene), image)

    def save_scores(self, side: str, scorer: str, number: int, scores: Mapping[str, Any]) -> None:
        """Writes the scores of a batch, {scene: {metric: value}}."""
        path = self._scores(side, scorer) / f"{number:06d}.json"
        replace_file(path, json.dumps(scores, allow_nan=False) + "\n")

    def load_scores(self, side: str, scorer: str) -> dict[str, dict[str, Any]]:
        """Reads the scores of all finished batches, {scene: {metric: value}}."""
        folder, scores = self._scores(side, scorer), {}
        if folder.exists():
            for path in sorted(folder.iterdir()):
                if path.suffix == ".json":
                    scores |= self.read(path.relative_to(self.path))
        return scores

    def _scores(self, side: str, scorer: str) -> epath.Path:
        return self.path / "scores" / side / scorer


class ExternalImages:
    """Images that another program generated, named after the scenes.

    Beside <scene>.png (or .jpg, .jpeg, .webp) there may be <scene>_mask0.png, <scene>_mask1.png and
    so on: the masks of its subjects, in their order.
    """

    def __init__(self, path: epath.PathLike, wanted: Sequence[BenchmarkScene]):
        """Finds the image of every scene.

        Raises:
          UserError: some are missing.
        """
        self._path = epath.Path(path)
        if not self._path.is_dir():
            raise UserError(f"--images={path} is not a folder.")
        found = {scene.name: self._find(scene.name) for scene in wanted}
        self._files = {name: file for name, file in found.items() if file is not None}
        missing = [name for name, file in found.items() if file is None]
        if missing:
            raise UserError(
                f"--images={path} lacks {len(missing)} of {len(wanted)} images, such as "
                f"{missing[0]}.png; scenes.jsonl in --output lists all scenes."
            )

    def _find(self, name: str) -> epath.Path | None:
        for ending in ("png", "jpg", "jpeg", "webp"):
            if (self._path / f"{name}.{ending}").exists():
                return self._path / f"{name}.{ending}"
        return None

    def digest(self) -> str:
        """Returns a short hash of all images and masks."""
        digest = hashlib.sha256()
        for name, file in self._files.items():
            masks = sorted(self._path.glob(f"{name}_mask*.png"))
            for path in (file, *masks):
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:12]

    def image_path(self, side: str, scene: BenchmarkScene) -> epath.Path:
        """Returns the path of a scene's image, for any side."""
        return self._files[scene.name]

    def regions(self, scene: BenchmarkScene, image: RGBImage) -> list[regions.Region | None]:
        """Returns the `regions.Region` of each subject; None for a missing or empty mask."""
        found = []
        for i in range(len(scene.subjects)):
            path = self._path / f"{scene.name}_mask{i}.png"
            mask = regions.read_mask(path, image.shape[:2]) if path.exists() else None
            found.append(None if mask is None else regions.Region.from_mask(mask))
        return found
