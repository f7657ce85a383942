r"""One preference step, here and in PyTorch with diffusers: time, memory, and the same losses.

    python benchmarks/step.py                                    # Toybox and a quarter of SDXL
    python benchmarks/step.py --cases toybox --peers eager compiled
    python benchmarks/step.py --cases sdxl-512 sdxl-1024 --dtype=bfloat16 --peers compiled \
        --apart --remat                                          # SDXL, on one accelerator

The step is `dpo`'s with an adapter in training: reference model forward on the noisy chosen and
rejected latents, policy forward and backward on the same, the clipped gradient of the subject
adapter and of the image keys and values, AdamW. Both sides have the same weights, noise and
conditioning, and text and pictures are encoded before. The reference shares what is frozen with the
policy on both sides; the subject adapter runs once a pair.

Every side is a process of its own, and they step in turn, so that a noisy machine slows all of
them; with `--apart` one after the other, so that an accelerator need not hold all of them. With
`--remat` both sides compute blocks again in the backward pass. Printed are medians of the seconds,
the peer's over ours with the spread of that ratio over the rounds (quartiles), the memory that
stepping takes at most (of the process on a CPU, weights included; of the device on an accelerator),
and the largest relative difference of the losses of all rounds, the proof that the work is the
same. Ours is started twice, and steps the second time: like any later start of a run it then finds
its programs compiled, and holds nothing that a compiler has left behind.

`step_inputs.py` makes weights and inputs; `step_ours.py` and `step_diffusers.py` are the sides.
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
# "regional" is torch.compile of each repeated block, which compiles in a tenth of the time.
PEERS = ("eager", "regional", "compiled")
HERE = pathlib.Path(__file__).parent


class Side:
    """A process that steps when it is told to."""

    def __init__(self, script, *arguments) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._script, self._stdin, self._stdout = script, self._process.stdin, self._process.stdout

    def ask(self, request):
        """The JSON answer to "ready", "step" or "memory"."""
        self.send(request)
        return self.receive()

    def send(self, request) -> None:
        """Asks without waiting; `receive` gives answers in the order of requests."""
        self._stdin.write(request + "\n")
        self._stdin.flush()

    def receive(self):
        """The answer to the first request that has had none."""
        answer = self._stdout.readline()
        if not answer:
            raise SystemExit(f"{HERE / self._script} stopped; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self._stdin.close()
        self._process.wait()


def serve(make_step, memory, reset_memory) -> None:
    """A side's loop: answers on stdout what `Side.ask` asks on stdin.

    Args:
      make_step: () -> function that does the next step and returns (seconds, loss).
      memory: () -> bytes, at most since `reset_memory`.
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


def reset_resident() -> None:
    """Forgets how much memory this process had at most."""
    # What making the step took and gave back is not the step's.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def most_resident():
    """Bytes that this process had at most since `reset_resident`."""
    (line,) = [
        line
        for line in pathlib.Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return 1024 * int(line.split()[1])


def step_in_turn(sides, rounds: int, warmup: int):
    """[[(seconds, loss) of every step]] and [bytes] of sides, which are closed then."""
    found = [[side.ask("step") for _ in range(warmup)] for side in sides]
    for side in sides:
        side.ask("reset")
    for _ in range(rounds):
        for side, answers in zip(sides, found):
            answers.append(side.ask("step"))
    memory = [side.ask("memory") for side in sides]
    for side in sides:
        side.close()
    return found, memory


def measure(case, peers: Any, rounds: int, warmup: int, dtype: str, *, apart, remat: bool) -> None:
    """Prints a line for each side."""
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
            side.ask("made")
            return side

        our_side().close()
        ours = our_side()
        if apart:
            found, memory = step_in_turn([ours], rounds, warmup)
            for peer in peers:
                more = step_in_turn(peer_sides([peer]), rounds, warmup)
                found, memory = found + more[0], memory + more[1]
        else:
            found, memory = step_in_turn([ours, *peer_sides(peers)], rounds, warmup)
    seconds, losses = np.moveaxis(np.array(found), -1, 0)
    seconds = seconds[:, warmup:]
    if np.any(np.isnan(losses)):
        raise SystemExit(f"{case}: losses are not finite: {losses}")
    print(
        f"{case:10s} focusdpo_jax       {np.median(seconds[0]):8.3f} s  "
        f"{memory[0] / 2**20:7.0f} MiB"
    )
    for i, peer in enumerate(peers, 1):
        ratio = np.percentile(seconds[i] / seconds[0], [50, 25, 75])
        apart = np.max(np.abs(losses[i] - losses[0]) / np.abs(losses[0]))
        print(
            f"{case:10s} diffusers {peer:8s} {np.median(seconds[i]):8.3f} s  "
            f"{memory[i] / 2**20:7.0f} MiB  {ratio[0]:.2f} times ours ({ratio[1]:.2f} to "
            f"{ratio[2]:.2f})  losses apart by {apart:.1e}",
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
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--remat", action="store_true")
    arguments = parser.parse_args()
    for case in arguments.cases:
        measure(
            case,
            arguments.peers,
            arguments.rounds,
            arguments.warmup,
            arguments.dtype,
            apart=arguments.apart,
            remat=arguments.remat,
        )


if __name__ == "__main__":
    main()
