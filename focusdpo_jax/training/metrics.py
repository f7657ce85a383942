"""Where a run's numbers and pictures go: the log, `metrics.jsonl`, TensorBoard, a progress bar."""

import contextlib
import functools
import json
import math
import sys
import time

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from focusdpo_jax.files import replace_file, room_for
from focusdpo_jax.sharding import processes
from focusdpo_jax.training.tensorboard import open_events


class MetricWriter:
    """Writes scalars and pictures of a run.

    `metrics.jsonl` has one object a logged step. After a restart at step N the objects of later
    steps are dropped, since the resumed run writes them again.
    """

    def __init__(self, workdir, *, start_step=0):
        """Opens the files; only the first of several processes has any."""
        self.workdir = epath.Path(workdir)
        self._file = None
        if not processes.is_first():
            return
        self._path = self.workdir / "metrics.jsonl"
        kept = []
        if start_step and self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= start_step:
                        kept.append(line)
                except ValueError:  # The last line of a killed process may be half written.
                    break
        replace_file(self._path, "".join(line + "\n" for line in kept))
        self._file = self._path.open("a")

    @functools.cached_property
    def _tensorboard(self):
        # Its library takes seconds to import, which the first step need not wait for.
        return open_events(self.workdir) if self._file else None

    def scalars(self, step, values):
        """Writes a dict of finite numbers for `step`."""
        if self._file:
            with room_for(self._path):
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                self._file.flush()
        if self._tensorboard:
            self._tensorboard.scalars(step, values)

    def validation(self, step, means):
        """Adds a point to the learning curve: a line of `validation.jsonl`, and TensorBoard.

        Lines of this step and of later ones, of a run that was stopped and went on, are dropped.

        Args:
          means: {measure: mean over the validation scenes}.
        """
        if self._file:
            path = self.workdir / "validation.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            lines = [line for line in lines if json.loads(line)["step"] < step]
            lines.append(json.dumps({"step": step, **means}))
            replace_file(path, "".join(line + "\n" for line in lines))
        if self._tensorboard:
            self._tensorboard.scalars(
                step, {f"validation/{name}": mean for name, mean in means.items()}
            )

    def results(self, step, results):
        """Shows the means of an evaluation in TensorBoard; they are not a logged step."""
        if self._tensorboard:
            self._tensorboard.scalars(
                step,
                {
                    f"evaluation/{name}_{side}": estimate["mean"]
                    for name, sides in results["metrics"].items()
                    for side, estimate in sides.items()
                },
            )

    def picture(self, step, name, image):
        """Shows a uint8 picture [H, W, 3] in TensorBoard."""
        if self._tensorboard:
            self._tensorboard.picture(step, name, np.asarray(image))

    def close(self):
        """Closes the files."""
        # All that was written is there. Of a line that found no room the rest is given up, since the error
        # that it raised is on its way.
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
        if "_tensorboard" in self.__dict__ and self._tensorboard:
            self._tensorboard.close()


class Progress:
    """Progress of a long loop: a bar on a terminal, a line in the log elsewhere."""

    def __init__(self, *, start, total, unit, per_step, devices=1, peak=None):
        """A loop of the steps from start to total.

        Args:
          unit, per_step: what a step is made of (pairs, images), and how many of them.
          devices: over which a step is divided.
          peak: floating-point operations a second of a device at its best (`speed.matmul_peak`).
        """
        self._total, self._unit, self._per_step = total, unit, per_step
        self._devices, self._peak = devices, peak
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
        self._shown, self._time = start, time.monotonic()

    def show(self, step, values, matmul_flops=0.0):
        """Reports that `step` steps are done, with a few numbers.

        Args:
          matmul_flops: floating-point operations of all products since the last report.

        Returns:
          {"pairs_per_second": units a second, "teraflops_per_device": 10^12 operations a second,
          "utilisation": share of the peak}; the last two where there is a peak.
        """
        now = time.monotonic()
        window = max(now - self._time, 1e-9)
        seconds = window / max(step - self._shown, 1)
        rate = self._per_step / seconds
        speed, line = {f"{self._unit}_per_second": rate}, f"{rate:.1f} {self._unit}/s"
        if self._peak:
            flops = matmul_flops / window / self._devices
            speed |= {"teraflops_per_device": flops / 1e12, "utilisation": flops / self._peak}
            line += f"  {flops / 1e12:.3g} TFLOP/s a device, {flops / self._peak:.0%} of its best"
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar:
            self._bar.update(step - self._shown)
            self._bar.set_postfix_str(f"{numbers}  {line}")
        else:
            logging.info(
                "step %d/%d  %s  %s  %s left",
                step,
                self._total,
                numbers,
                line,
                duration((self._total - step) * seconds),
            )
        self._shown, self._time = step, now
        return speed

    def pause(self):
        """Starts the clock again after work that is not part of the loop."""
        self._time = time.monotonic()

    def close(self):
        """Leaves the bar as it is."""
        if self._bar:
            self._bar.close()


def duration(seconds):
    """Seconds as people read them: "41 s", "3 min 20 s", "2 h 05 min"."""
    seconds = int(math.ceil(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
