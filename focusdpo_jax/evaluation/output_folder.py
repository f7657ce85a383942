"""The folder of an evaluation: what it was asked, its images, their scores.

    settings.json                   what all of the rest depends on
    scenes.jsonl                    what to draw; another program may draw the same
    references/                     subject reference images that are no files of the user's
    pictures/<side>/<scene>.png     side: base or policy
    scores/<side>/<scorer>/         a file a batch: {scene: {measure: value or values}}
    results.json, report.html       made of the above

Every file appears under its name when it is complete, so that a killed evaluation is gone on with.
"""

import hashlib
import json

from etils import epath

from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import scenes
from focusdpo_jax.files import cannot_write, replace_file
from focusdpo_jax.vision import regions
from focusdpo_jax.visualization import grids


class OutputFolder:
    """One such folder."""

    def __init__(self, path):
        """Opens the folder, which need not exist."""
        self.path = epath.Path(path)

    def claim(self, settings):
        """Notes what files of this folder depend on.

        Raises:
          UserError: the folder holds images or scores of something else, or cannot be written.
        """
        path = self.path / "settings.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stored = json.loads(path.read_text()) if path.exists() else {}
            # As JSON has it, where tuples are lists.
            settings = json.loads(json.dumps(settings))
            other = [key for key, value in settings.items() if stored.get(key, value) != value]
            if other:
                raise UserError(
                    f"--output={self.path} holds an evaluation with another {', '.join(other)}. "
                    "Give another --output, or remove the folder to start again."
                )
            self.write("settings.json", stored | settings)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}. Remove --output={self.path}.") from error
        except OSError as error:
            raise cannot_write(f"--output={self.path}", error) from error

    def write(self, name, values):
        """Writes a file of JSON, under a temporary name first."""
        text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
        replace_file(self.path / name, text + "\n")

    def read(self, name):
        """The values in a file of JSON.

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

    def scenes(self):
        """The scenes of the evaluation; see `scenes.read`."""
        return scenes.read(self.path / "scenes.jsonl")

    def image_path(self, side, scene):
        """Where a scene's image lies."""
        return self.path / "pictures" / side / f"{scene.name}.png"

    def save_image(self, side, scene, image):
        """Writes a scene's image, uint8 [H, W, 3]."""
        grids.save_png(self.image_path(side, scene), image)

    def save_scores(self, side, scorer, number, scores):
        """Writes the scores of a batch, {scene: {measure: value}}."""
        path = self._scores(side, scorer) / f"{number:06d}.json"
        replace_file(path, json.dumps(scores, allow_nan=False) + "\n")

    def load_scores(self, side, scorer):
        """{scene: {measure: value}} of all batches that are there."""
        folder, scores = self._scores(side, scorer), {}
        if folder.exists():
            for path in sorted(folder.iterdir()):
                if path.suffix == ".json":
                    scores |= self.read(path.relative_to(self.path))
        return scores

    def _scores(self, side, scorer):
        return self.path / "scores" / side / scorer


class ExternalImages:
    """Images that another program drew, named after the scenes.

    Beside <scene>.png (or .jpg, .jpeg, .webp) may lie <scene>_mask0.png, <scene>_mask1.png and so
    on: where its subjects are, in their order.
    """

    def __init__(self, path, wanted):
        """Finds the image of every scene.

        Raises:
          UserError: some are missing.
        """
        self._path = epath.Path(path)
        if not self._path.is_dir():
            raise UserError(f"--images={path} is no folder.")
        self._files = {scene.name: self._find(scene.name) for scene in wanted}
        missing = [name for name, file in self._files.items() if file is None]
        if missing:
            raise UserError(
                f"--images={path} lacks {len(missing)} of {len(wanted)} images, such as "
                f"{missing[0]}.png; scenes.jsonl in --output names all and what they show."
            )

    def _find(self, name):
        for ending in ("png", "jpg", "jpeg", "webp"):
            if (self._path / f"{name}.{ending}").exists():
                return self._path / f"{name}.{ending}"
        return None

    def digest(self):
        """A short text that changes when an image or a mask does."""
        digest = hashlib.sha256()
        for name, file in self._files.items():
            masks = sorted(self._path.glob(f"{name}_mask*.png"))
            for path in (file, *masks):
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:12]

    def image_path(self, side, scene):
        """Where a scene's image lies, whatever the side."""
        return self._files[scene.name]

    def regions(self, scene, image):
        """The `regions.Region` of each subject; None where there is no mask, or an empty one."""
        found = []
        for i in range(len(scene.subjects)):
            path = self._path / f"{scene.name}_mask{i}.png"
            mask = regions.read_mask(path, image.shape[:2]) if path.exists() else None
            found.append(None if mask is None else regions.Region.from_mask(mask))
        return found
