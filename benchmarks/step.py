r"""Compares a preference step with PyTorch and diffusers: time, memory and losses.

    python benchmarks/step.py                                    # Toybox and a quarter of SDXL
    python benchmarks/step.py --cases toybox --peers eager compiled
    python benchmarks/step.py --cases sdxl-512 sdxl-1024 --dtype=bfloat16 --peers compiled \
        --apart --remat                                          # SDXL, on one accelerator

The step is that of `dpo` with a trained adapter: the reference model runs forward on the noisy
chosen and rejected latents, the policy forward and backward. The gradient of the subject adapter
and of the image keys and values is clipped and passed to AdamW. Both sides have the same weights,
noise and conditioning. Text and images are encoded in advance. On both sides, reference and policy
share the frozen parameters, and the subject adapter runs once per pair.

Each side is a separate process. The sides step alternately, so that a noisy machine slows all of
them. With `--apart` they run one after the other, so that an accelerator holds one at a time. With
`--remat` both sides recompute blocks in the backward pass.

Printed are median seconds, the ratio of the peer's to ours with quartiles over the rounds, the peak
memory of the steps (of the process on a CPU, including weights; of the device on an accelerator),
and the largest relative difference of the losses of all rounds, which verifies that both sides
compute the same. Our side is started twice and measured the second time. Like any later start of a
run, it then loads compiled programs, and its memory does not include the compiler's.

`step_inputs.py` writes weights and inputs; `step_ours.py` and `step_diffusers.py` are the sides.
"""

import argparse
import ctypes
import gc
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

CASES = ("toybox", "quarter", "sdxl-512", "sdxl-1024")
# "regional" is torch.compile of each repeated block, which takes a tenth of the time to compile.
PEERS = ("eager", "regional", "compiled")
HERE = pathlib.Path(__file__).parent


class Side:
    """A process that runs a step on request; see `serve`."""

    def __init__(self, script, *arguments) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._script, self._stdin, self._stdout = script, self._process.stdin, self._process.stdout

    def request(self, name):
        """Sends a request and returns its answer; see `serve`."""
        self.send(name)
        return self.receive()

    def send(self, name) -> None:
        """Sends a request without waiting; `receive` returns answers in the order of requests."""
        self._stdin.write(name + "\n")
        self._stdin.flush()

    def receive(self):
        """Returns the answer to the oldest open request.

        Raises:
          SystemExit: the process has ended.
        """
        answer = self._stdout.readline()
        if not answer:
            raise SystemExit(f"{HERE / self._script} ended; its error is printed above")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self._stdin.close()
        self._process.wait()


def serve(make_step, memory, reset_memory) -> None:
    """Main loop of a side: reads requests from stdin and answers in JSON on stdout.

    "step" returns (seconds, loss), and "memory" bytes. Any other request resets the peak memory and
    returns its own name.

    Args:
      make_step: () -> function that runs the next step and returns (seconds, loss).
      memory: () -> peak bytes since `reset_memory`.
      reset_memory: resets the peak.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    step = make_step()
    for request in sys.stdin:
        request = request.strip()
        if request == "step":
            answer = step()
        elif request == "memory":
            answer = memory()
        else:
            reset_memory()
            answer = request
        print(json.dumps(answer), file=answers, flush=True)


def reset_peak_memory() -> None:
    """Resets the peak resident memory of this process."""
    # Return memory that was freed before the steps to the system.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """Peak resident bytes of this process since `reset_peak_memory`."""
    (line,) = [
        line
        for line in pathlib.Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return 1024 * int(line.split()[1])


def step_alternately(sides, rounds: int, warmup: int):
    """Runs the steps of all sides alternately and closes the sides.

    Returns:
      [[(seconds, loss) of each step] of each side], and [peak bytes of each side].
    """
    steps = [[side.request("step") for _ in range(warmup)] for side in sides]
    for side in sides:
        side.request("reset")
    for _ in range(rounds):
        for side, steps_of_side in zip(sides, steps):
            steps_of_side.append(side.request("step"))
    memory = [side.request("memory") for side in sides]
    for side in sides:
        side.close()
    return steps, memory


def measure(
    case, peers: Any, rounds: int, warmup: int, dtype: str, *, sequential, remat: bool
) -> None:
    """Prints one line per side."""
    with tempfile.TemporaryDirectory() as folder:

        def peer_sides(names):
            return [
                Side("step_diffusers.py", case, folder, name, dtype, int(remat)) for name in names
            ]

        subprocess.run(
            [
                sys.executable,
                str(HERE / "step_inputs.py"),
                case,
                folder,
                str(rounds + warmup),
                dtype,
                str(int(remat)),
            ],
            check=True,
        )

        def our_side():
            side = Side("step_ours.py", case, folder, dtype, int(remat))
            side.request("ready")
            return side

        our_side().close()
        ours = our_side()
        if sequential:
            steps, memory = step_alternately([ours], rounds, warmup)
            for peer in peers:
                more = step_alternately(peer_sides([peer]), rounds, warmup)
                steps, memory = steps + more[0], memory + more[1]
        else:
            steps, memory = step_alternately([ours, *peer_sides(peers)], rounds, warmup)
    seconds, losses = np.moveaxis(np.array(steps), -1, 0)
    seconds = seconds[:, warmup:]
    if np.any(np.isnan(losses)):
        raise SystemExit(f"{case}: losses are not finite: {losses}")
    print(
        f"{case:10s} focusdpo_jax       {np.median(seconds[0]):8.3f} s  "
        f"{memory[0] / 2**20:7.0f} MiB"
    )
    for i, peer in enumerate(peers, 1):
        ratio = np.percentile(seconds[i] / seconds[0], [50, 25, 75])
        difference = np.max(np.abs(losses[i] - losses[0]) / np.abs(losses[0]))
        print(
            f"{case:10s} diffusers {peer:8s} {np.median(seconds[i]):8.3f} s  "
            f"{memory[i] / 2**20:7.0f} MiB  {ratio[0]:.2f} times ours ({ratio[1]:.2f} to "
            f"{ratio[2]:.2f})  largest loss difference {difference:.1e}",
            flush=True,
        )


def main() -> None:
    """Measures each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["toybox", "quarter"], choices=CASES)
    parser.add_argument("--peers", nargs="*", default=["eager"], choices=PEERS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--apart", action="store_true", help="run the sides one after the other")
    parser.add_argument("--remat", action="store_true", help="recompute blocks on both sides")
    arguments = parser.parse_args()
    for case in arguments.cases:
        measure(
            case,
            arguments.peers,
            arguments.rounds,
            arguments.warmup,
            arguments.dtype,
            sequential=arguments.apart,
            remat=arguments.remat,
        )


if __name__ == "__main__":
    main()
