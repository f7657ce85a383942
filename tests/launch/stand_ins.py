"""Runs the scripts of launch/ with folders in place of machines.

gcloud, git, sbatch, srun and others are replaced by small scripts on the PATH, which record their arguments.
"""

import os
import pathlib
import re
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# common.sh is sourced by the others.
SCRIPTS = sorted(p for p in (ROOT / "launch").glob("*.sh") if p.name != "common.sh")


def variables_of(script):
    """Names of the variables that a script takes from the environment."""
    return re.findall(r"^([A-Z_]+)=\$\{", script.read_text(), re.M)


TPU = {"ZONE": "us-west4-a", "WORKDIR": "gs://bucket/my run", "POLL_SECONDS": "1"}
# A blank, a quote, and what a shell would expand.
FLAG = "--config.model.pretrained=it's $HOME/a *"

# Notes its words: parted by \0, a call ended by \1.
NOTE = '{ printf "%s\\0" "${0##*/}" "$@"; printf "\\1"; } >> "$FAKE/calls"\n'
# In the replay of a dry run that is all they do.
ACT = NOTE + '[ -z "${REPLAY:-}" ] || exit 0\n'

GCLOUD = (
    ACT
    + r"""
case "$*" in
  *"queued-resources describe"*)
    cat "$FAKE/request" 2>/dev/null || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; } ;;
  *"queued-resources create"*)
    echo ACTIVE > "$FAKE/request"; mkdir -p "$FAKE/host0" "$FAKE/host1" ;;
  *"queued-resources delete"*)
    for pid in $(cat "$FAKE"/host*/focusdpo_jax.pid 2>/dev/null); do kill -KILL -- "-$pid"; done
    rm -rf "$FAKE/request" "$FAKE"/host* ;;
  *"tpu-vm describe"*) echo READY ;;
  *"tpu-vm scp"*) for home in "$FAKE"/host*; do cp "$5" "$home"; done ;;
  *"tpu-vm ssh"*)
    for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; esac; done
    for home in "$FAKE"/host*; do
      HOME=$home bash -c "$command" || exit
    done ;;
esac
"""
)
GIT = (
    ACT
    + """
for word in "$@"; do
  case $word in --output=*) tar -czf "${word#--output=}" -T /dev/null ;; esac
done
"""
)
# python3 of a host: `-m uv venv` makes a python that ends as the next line of "plan" says.
PYTHON3 = r"""
if [ "$2 $3" = "uv venv" ]; then
  mkdir -p .venv/bin
  cp "$FAKE/bin/host_python" .venv/bin/python
fi
"""
HOST_PYTHON = (
    NOTE
    + r"""
host=$(basename "$HOME")
plan=$(head -n 1 "$FAKE/plan.$host")
sed -i 1d "$FAKE/plan.$host"
echo "output of $host"
case $plan in
  preempted) echo SUSPENDED > "$FAKE/request"; exec sleep 60 ;;
  on) exec sleep 60 ;;
  *) exit "$plan" ;;
esac
"""
)
SRUN = (
    NOTE
    + r"""
/bin/sleep 60 > /dev/null 2>&1 &
trap 'kill "$!"; exit 75' TERM
echo "$$" > "$FAKE/srun.pid"
wait "$!"
"""
)
STAND_INS = {
    "gcloud": GCLOUD,
    "git": GIT,
    "python3": PYTHON3,
    "host_python": HOST_PYTHON,
    "sbatch": NOTE + 'cat > "$FAKE/script"\n',
    "srun": SRUN,
    "scancel": NOTE + 'kill -TERM "$(cat "$FAKE/srun.pid")"\n',
    "scontrol": NOTE,
}


def environment(fake, variables):
    """The environment of a script: these variables, and the stand-ins before other programs."""
    known = {name for script in SCRIPTS for name in variables_of(script)}
    inherited = {k: v for k, v in os.environ.items() if k not in known}
    return {
        **inherited,
        "FAKE": str(fake),
        "PATH": f"{fake / 'bin'}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(fake / "cache dir"),
        **variables,
    }


def launch(fake, script, *arguments, cwd=None, timeout=600, **variables):
    """Runs launch/`script` to its end, within a number of seconds."""
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        capture_output=True,
        text=True,
        env=environment(fake, variables),
        cwd=cwd or fake,
        timeout=timeout,
    )


def calls(fake, name=None):
    """Calls so far, as lists of words; those of one stand-in."""
    file = fake / "calls"
    words = file.read_text().split("\1")[:-1] if file.exists() else []
    return [call for call in (text.split("\0")[:-1] for text in words) if name in (None, call[0])]


def printed_calls(fake, result):
    """A dry run has called nothing; what the commands are that it printed."""
    assert (result.returncode, result.stderr) == (0, "")
    assert calls(fake) == []
    subprocess.run(
        ["bash", "-euc", result.stdout],
        check=True,
        cwd=fake,
        timeout=600,
        env=environment(fake, {"REPLAY": "1"}),
        capture_output=True,
    )
    return calls(fake)


def assert_fails(result, *parts):
    """The script ended with a mistake's status and one line, in which these words are."""
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def wait_for(condition):
    """Waits until `condition()` holds."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def venv(fake):
    """Makes a virtual environment whose python notes its words and surroundings."""
    python = fake / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\n" + NOTE + 'env > "$FAKE/env"; pwd >> "$FAKE/env"\n')
    python.chmod(0o755)
    return str(python.parent.parent)
