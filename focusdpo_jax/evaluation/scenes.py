"""What a benchmark asks for: scenes, prompts with subjects, in a file that others can read."""

import dataclasses
import json

from etils import epath

from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.inference.prompts import Prompt, Reference


@dataclasses.dataclass(frozen=True)
class BenchmarkSubject:
    """A subject of a scene.

    Attributes:
      name: of the individual ("dog6"), or of its kind where there are only kinds.
      phrase: as captions name it ("a dog").
      reference: file of the image that the generator is given.
      photographs: files that images are compared with.
      box: x0, y0, x1, y1 in [0, 1], where in the image it is to stand; None where that is free.
    """

    name: str
    phrase: str
    reference: str
    photographs: tuple[str, ...] = ()
    box: tuple[float, float, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class BenchmarkScene:
    """One image to draw and to score.

    Attributes:
      name: of its file, without ending; unique, may have folders in it.
      prompt: what the generator is told.
      subjects: in the order of the prompt.
      seed: of the noise.
      group: scenes of one group are resampled together for intervals.
    """

    name: str
    prompt: str
    subjects: tuple[BenchmarkSubject, ...]
    seed: int
    group: str

    def as_prompt(self):
        """The scene as `sampling.Sampler` takes it."""
        return Prompt(
            self.prompt,
            tuple(Reference(s.reference, s.phrase, box=s.box) for s in self.subjects),
            self.seed,
        )


def texts(scenes):
    """[(prompt, phrases of its subjects)] of scenes, as `models.truncation.warn` takes them."""
    return [(scene.prompt, [s.phrase for s in scene.subjects]) for scene in scenes]


def write(path, scenes):
    """Writes scenes as JSON lines, with the fields of `BenchmarkScene`."""
    replace_file(path, "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in scenes))


def read(path):
    """Reads what `write` wrote.

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
