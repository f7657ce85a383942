"""Ctrl-C: one line and status 130 at any time of a command."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny

LINE = "interrupted (Ctrl-C)"

SCRIPT = """
import gc, hashlib, sys, time
from focusdpo_jax import command
from focusdpo_jax.errors import UserError

class Slow:
    def __del__(self):
        print("busy", flush=True)
        time.sleep(60)

def busy(seconds=60):
    print("busy", flush=True)
    time.sleep(seconds)

def python():
    busy()

def cplusplus():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # Comes back to Python after minutes.

def swallowed():
    try:
        busy()
    except BaseException as error:
        raise RuntimeError("a library's own error") from error

def mistaken():
    try:
        busy()
    except BaseException as error:
        raise UserError("a file is damaged") from error

def collector():
    value = Slow()
    del value
    time.sleep(60)

def cleanup():
    try:
        busy()
    finally:
        print("cleaning", flush=True)
        time.sleep(2)

def workers():
    import concurrent.futures, multiprocessing
    from focusdpo_jax import interrupts
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with interrupts.children_without_sigint():
            job = pool.submit(time.sleep, 60)
        while not job.running():
            time.sleep(0.01)
        busy()

def training():
    from focusdpo_jax.training import preemption
    with preemption.watch() as asked:
        print("busy", flush=True)
        while not asked(1):
            time.sleep(0.01)
        print(asked(1), flush=True)
        time.sleep(60)  # Saves.

sys.argv[1:], name = [], sys.argv[1]
command.run(globals()[name], resumable=name == "python")
"""


def started(name):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "busy\n"
    return process


def ended(process, seconds):
    """Lines of what a process wrote to stderr, which has to end within some seconds with status 130."""
    began = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert time.monotonic() - began < seconds
    return errors.splitlines()


@pytest.mark.parametrize(
    "name", ["python", "cplusplus", "swallowed", "mistaken", "collector", "workers"]
)
def test_an_interrupted_command_ends_with_one_line(name):
    process = started(name)
    process.send_signal(signal.SIGINT)
    line = LINE + "; run the same command again to resume" if name == "python" else LINE
    assert ended(process, 8) == [line]


def test_a_second_interrupt_ends_at_once():
    process = started("cleanup")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGINT)
    assert ended(process, 1.5) == [LINE]


def test_training_saves_at_the_first_and_ends_at_the_second():
    process = started("training")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"{int(signal.SIGINT)}\n"
    time.sleep(4)  # Longer than it takes where nobody notes it.
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert [line for line in ended(process, 1.5) if line[:1] != "I"] == [LINE]


def commands(folder, tmp_path):
    """{name: (arguments, text on stderr after which it is interrupted, or seconds)}."""
    root = tiny.ROOT
    config = folder / "tiny_interrupted.py"
    config.write_text(
        f"import pathlib, sys\nsys.path.insert(0, {str(pathlib.Path(tiny.__file__).parent)!r})\nimport tiny\n"
        f"def get_config():\n    return tiny.tiny_file_config(pathlib.Path({str(folder)!r}))\n"
    )
    reference = root / "focusdpo_jax/assets/references/star.png"
    return {
        "main": (
            [
                "main",
                f"--config={config}",
                f"--workdir={tmp_path}/run",
                f"--config.data.path={tmp_path}/data",
                "--config.data.train_size=5000",
            ],
            "Building",
        ),
        "main, compiling": (
            ["main", f"--config={config}", f"--workdir={tmp_path}/run"],
            "parameters: ",
        ),
        "evaluate": (
            [
                "evaluate",
                f"--config={root}/configs/toybox_dpo.py",
                "--workdir=base",
                f"--output={tmp_path}/out",
                f"--config.data.path={tmp_path}/data",
            ],
            8,
        ),
        "sample": (
            [
                "sample",
                "--prompt=a star",
                f"--reference={reference}:a star",
                f"--output={tmp_path}/a.png",
            ],
            4,
        ),
        "prepare": (
            [
                "prepare",
                f"--manifest={root}/docs/examples/pairs/manifest.jsonl",
                "--workers=2",
                f"--output={tmp_path}/out",
                "--resolution=64",
            ],
            "line 1 of",
        ),
        "plan": (["plan", f"--config={config}"], 5),
    }


@pytest.mark.parametrize(
    "name", ["main", "main, compiling", "evaluate", "sample", "prepare", "plan"]
)
def test_commands(name, tiny_folder, tmp_path):
    """SIGINT is sent to all processes of the command, as by a terminal."""
    arguments, when = commands(tiny_folder, tmp_path)[name]
    process = subprocess.Popen(
        [sys.executable, "-m", f"focusdpo_jax.{arguments[0]}", *arguments[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    lines = []
    if isinstance(when, str):
        for line in process.stderr:
            lines.append(line)
            if when in line:
                break
    else:
        time.sleep(when)
    assert process.poll() is None, lines
    os.killpg(process.pid, signal.SIGINT)
    lines += ended(process, 10)
    told = [line for line in lines if line[:1] not in "IW"]  # Not of the log.
    assert len(told) == 1 and told[0].startswith(LINE), lines
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run" / "run.lock").exists()
