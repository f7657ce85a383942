"""The lock of a run folder: when a process takes it, and when a lock is no longer valid."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from focusdpo_jax.errors import UserError
from focusdpo_jax.sharding import processes
from focusdpo_jax.training import loop, run_lock

HOLD = """
import sys, time
from focusdpo_jax.training import run_lock
with run_lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    """Waits of a tenth."""
    for name in ("_BEAT", "_STALE", "_PATIENCE", "_SETTLE", "_POLL"):
        monkeypatch.setattr(run_lock, name, getattr(run_lock, name) / 10)


def hold(folder):
    """A process that has the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def lock_of(folder, **changes):
    """Writes a lock as a process of another machine would have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "host": "elsewhere",
        "machine": "another boot",
        "pid": 1,
        "started": "1",
        "token": "a",
        "since": "2026-11-28 09:00:00",
        "count": "0000000000",
    } | changes
    (folder / run_lock.NAME).write_text(json.dumps(values))


def test_a_lock_file_exists_while_the_lock_is_held(quick, tmp_path):
    folder = tmp_path / "new" / "run"
    with run_lock.held(folder) as require:
        found = json.loads((folder / "run.lock").read_text())
        assert found["pid"] == os.getpid()
        time.sleep(0.5)  # Two beats.
        assert json.loads((folder / "run.lock").read_text())["count"] > found["count"]
        require()
        with pytest.raises(
            UserError,
            match=rf"new/run is in use: process {os.getpid()} on .* trains there "
            "since 20.*Stop it, wait for its end, or give another --work",
        ):
            run_lock.require_free(folder)
    assert not list(folder.iterdir())
    run_lock.require_free(folder)


def test_an_error_of_the_body_releases_it(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock.held(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_ignored(tmp_path):
    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"in use: process {process.pid} on"):
        run_lock.require_free(tmp_path)
    process.kill()  # Not waited for: what is left of it is a zombie of that number.
    while open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    began = time.monotonic()
    with run_lock.held(tmp_path) as require:
        assert time.monotonic() - began < 3
        require()
    process.wait()


@pytest.mark.parametrize(
    "changes",
    [
        {"started": "0"},  # Another process has the number now.
        {"pid": 2**22 + 1},
    ],
)  # Larger than any.
def test_the_lock_of_an_ended_process_of_this_machine_is_ignored(changes, quick, tmp_path):
    lock_of(tmp_path, **{"machine": run_lock._machine(), "pid": os.getpid()} | changes)
    began = time.monotonic()
    with run_lock.held(tmp_path) as require:
        assert time.monotonic() - began < 1
        require()


@pytest.mark.parametrize("content", ["", '{"pid": ', "[]"])
def test_a_damaged_lock_is_waited_for_and_then_replaced(content, quick, tmp_path):
    (tmp_path / "run.lock").write_text(content)
    began = time.monotonic()
    with run_lock.held(tmp_path):
        assert 2 <= time.monotonic() - began < 6


def test_the_lock_of_another_machine_is_valid_while_its_counter_changes(quick, tmp_path):
    """The age of the lock does not matter: clocks differ."""
    lock_of(tmp_path)
    left = threading.Event()

    def beat():
        count = 0
        while not left.wait(0.2):
            count += 1
            lock_of(tmp_path, count=f"{count:010d}")

    thread = threading.Thread(target=beat)
    thread.start()
    began = time.monotonic()
    with pytest.raises(
        UserError, match="in use: process 1 on elsewhere trains there since 2026-11-28 09:00:00"
    ):
        run_lock.require_free(tmp_path)
    assert time.monotonic() - began < 1
    left.set()
    thread.join()
    began = time.monotonic()
    run_lock.require_free(tmp_path)  # It has died.
    assert 2 <= time.monotonic() - began < 4
    with run_lock.held(tmp_path):  # Which is known by now.
        assert time.monotonic() - began < 5


def test_a_process_that_exits_within_seconds_is_waited_for(tmp_path):
    lock_of(
        tmp_path,
        machine=run_lock._machine(),
        pid=os.getpid(),
        started=run_lock._started(os.getpid()),
    )
    threading.Timer(1, (tmp_path / "run.lock").unlink).start()
    began = time.monotonic()
    run_lock.require_free(tmp_path)
    assert 0.9 <= time.monotonic() - began < 3 and not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize(
    "cloud, dead", [(False, False), (False, True), (True, False), (True, True)]
)
def test_one_of_several_simultaneous_starts_takes_the_lock(
    cloud, dead, quick, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_lock, "_in_cloud", lambda path: cloud)
    if dead:
        lock_of(tmp_path, machine=run_lock._machine(), pid=2**22 + 1)
    gate, left, had, refused = threading.Barrier(4), threading.Event(), [], []

    def start(number):
        gate.wait()
        try:
            with run_lock.held(tmp_path) as require:
                had.append(number)
                left.wait(30)
                require()
        except UserError as error:
            refused.append(str(error))
            if len(refused) == 3:
                left.set()

    threads = [threading.Thread(target=start, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(had) == 1 and len(refused) == 3
    assert not list(tmp_path.iterdir())


def test_a_process_that_lost_the_lock_while_stopped_writes_no_more(quick, tmp_path):
    with run_lock.held(tmp_path) as require:
        lock_of(tmp_path, token="b")
        with pytest.raises(
            UserError, match="was taken by process 1 on elsewhere while this process had stopped"
        ):
            require()
        time.sleep(0.5)
    # It is the other one's, and left to it.
    assert json.loads((tmp_path / "run.lock").read_text())["token"] == "b"


def test_other_processes_of_a_run_take_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    lock_of(
        tmp_path,
        machine=run_lock._machine(),
        pid=os.getpid(),
        started=run_lock._started(os.getpid()),
    )
    before = (tmp_path / "run.lock").read_text()
    with run_lock.held(tmp_path) as require:
        require()
    assert (tmp_path / "run.lock").read_text() == before


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    def open_full(path, mode="r"):
        open(path, mode).close()
        return Full()

    monkeypatch.setattr(run_lock, "open", open_full, raising=False)
    monkeypatch.setattr(run_lock, "_machine", str)
    monkeypatch.setattr(run_lock, "_started", str)
    with pytest.raises(
        UserError, match=r"cannot write there \(No space left on device\). Make room"
    ):
        with run_lock.held(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def command(folder, workdir, *overrides):
    path = folder / "tiny_lock.py"
    tests = str(pathlib.Path(tiny.__file__).parent)
    path.write_text(
        f"import pathlib, sys\nsys.path.insert(0, {tests!r})\nimport tiny\n"
        f"def get_config():\n    return tiny.tiny_file_config(pathlib.Path({str(folder)!r}), "
        "evaluation__pictures=0, checkpoint_every=50)\n"
    )
    return [
        sys.executable,
        "-m",
        "focusdpo_jax.main",
        f"--config={path}",
        f"--workdir={workdir}",
        *overrides,
    ]


def saved(folder):
    """Steps of a run's checkpoints."""
    return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]


def test_a_second_start_is_refused_and_touches_nothing(tiny_folder, tmp_path):
    first = subprocess.Popen(
        command(tiny_folder, tmp_path, "--config.steps=100000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 200
        while not saved(tmp_path) and time.monotonic() < deadline:
            assert first.poll() is None
            time.sleep(0.05)
        before = sorted(path.name for path in tmp_path.iterdir())
        config, began = (tmp_path / "config.json").read_text(), time.monotonic()
        second = subprocess.run(
            command(tiny_folder, tmp_path, "--config.steps=200000"), capture_output=True, text=True
        )
        seconds = time.monotonic() - began
        assert second.returncode == 2, second.stderr
        lines = [line for line in second.stderr.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and lines[0].startswith(
            f"error: --workdir={tmp_path} is in use: process {first.pid} on "
        ), second.stderr
        assert "Traceback" not in second.stderr
        assert seconds < 10
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert (tmp_path / "config.json").read_text() == config
        steps = tiny.losses(tmp_path)
        time.sleep(1)
        assert first.poll() is None and len(tiny.losses(tmp_path)) > len(steps)  # It trains on.
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    reached = max(saved(tmp_path))
    loop.run(
        tiny.tiny_config(
            tiny_folder, evaluation__pictures=0, checkpoint_every=50, steps=reached + 2
        ),
        tmp_path,
    )
    assert max(tiny.losses(tmp_path)) == reached + 2 and not (tmp_path / "run.lock").exists()
