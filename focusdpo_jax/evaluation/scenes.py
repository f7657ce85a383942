"""Scenes of a benchmark: prompts with subjects, stored in a file that other programs can read."""

import dataclasses
import json
from collections.abc import Iterable

from etils import epath

from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.inference.prompts import Prompt, Reference


@dataclasses.dataclass(frozen=True)
class BenchmarkSubject:
    """A subject of a scene.

    Attributes:
      name: name of the individual ("dog6"), or of its class if individuals have no names.
      phrase: noun phrase in captions ("a dog").
      reference: file of the reference image.
      photographs: files that generated images are compared with.
      box: x0, y0, x1, y1 in [0, 1], the requested region in the generated image; None for any.
    """

    name: str
    phrase: str
    reference: str
    photographs: tuple[str, ...] = ()
    box: tuple[float, float, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class BenchmarkScene:
    """One image to generate and to score.

    Attributes:
      name: file name without extension; unique, may contain folders.
      prompt: prompt for the generator.
      subjects: subjects in the order of the prompt.
      seed: seed of the noise.
      group: scenes of one group are resampled together for confidence intervals.
    """

    name: str
    prompt: str
    subjects: tuple[BenchmarkSubject, ...]
    seed: int
    group: str

    def as_prompt(self) -> Prompt:
        """Returns the scene as a prompt for `inference.sampler.Sampler`."""
        return Prompt(
            self.prompt,
            tuple(Reference(s.reference, s.phrase, box=s.box) for s in self.subjects),
            self.seed,
        )


def texts(scenes: Iterable[BenchmarkScene]) -> list[tuple[str, list[str]]]:
    """Returns [(prompt, phrases of its subjects)] of scenes, for `models.truncation.warn`."""
    return [(scene.prompt, [s.phrase for s in scene.subjects]) for scene in scenes]


def write(path: epath.PathLike, scenes: Iterable[BenchmarkScene]) -> None:
    """Writes scenes as JSON lines, with the fields of `BenchmarkScene`."""
    replace_file(path, "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in scenes))


def read(path: epath.PathLike) -> list[BenchmarkScene]:
    """Reads a file that `write` wrote.

    Raises:
      UserError: the file is missing or damaged.
    """
    scenes = []
    try:
        for line in epath.Path(path).read_text().splitlines():
            values = json.loads(line)
            subjects = tuple(
                BenchmarkSubject(
                    **{
                        **s,
                        "photographs": tuple(s["photographs"]),
                        "box": s["box"] and tuple(s["box"]),
                    }
                )
                for s in values.pop("subjects")
            )
            scenes.append(BenchmarkScene(subjects=subjects, **values))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}). Give the --output "
            "folder of focusdpo_jax.evaluate."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}. Evaluate again.") from error
    return scenes
