"""launch/tpu_pod.sh: what it prints, and what its watch does, with folders in place of hosts."""

import re
import shutil
import subprocess

import pytest

from tests.launch.stand_ins import (
    FLAG,
    ROOT,
    TPU,
    assert_fails,
    calls,
    environment,
    launch,
    printed_calls,
    wait_for,
)


def test_tpu_create(fake):
    result = launch(
        fake,
        "tpu_pod.sh",
        "--dry-run",
        "create",
        TPU_NAME="pod",
        ZONE="us-east5-b",
        PROJECT="mine",
        ACCELERATOR="v6e-16",
        CREATE_FLAGS="--service-account=me@x --network=n",
    )
    assert printed_calls(fake, result) == [
        [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "create",
            "pod",
            "--node-id=pod",
            "--zone=us-east5-b",
            "--project=mine",
            "--accelerator-type=v6e-16",
            "--runtime-version=v2-alpha-tpuv6e",
            "--spot",
            "--service-account=me@x",
            "--network=n",
        ]
    ]


@pytest.mark.parametrize(
    "provisioning, flags", [("spot", ["--spot"]), ("on-demand", []), ("reserved", ["--reserved"])]
)
def test_tpu_provisioning(fake, provisioning, flags):
    result = launch(fake, "tpu_pod.sh", "create", "--dry-run", **TPU, PROVISIONING=provisioning)
    [call] = printed_calls(fake, result)
    assert call[call.index("--runtime-version=v2-alpha-tpuv5-lite") + 1 :] == flags


def test_tpu_delete(fake):
    result = launch(fake, "tpu_pod.sh", "delete", "--dry-run", **TPU)
    assert printed_calls(fake, result) == [
        [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "delete",
            "focusdpo",
            "--zone=us-west4-a",
            "--force",
            "--quiet",
        ]
    ]


def test_tpu_install(fake):
    tar = str(fake / "cache dir/focusdpo_jax/focusdpo/focusdpo_jax.tar.gz")
    result = launch(fake, "tpu_pod.sh", "install", "--dry-run", **TPU)
    archive, scp, ssh = printed_calls(fake, result)
    assert archive == [
        "git",
        "-C",
        str(ROOT),
        "archive",
        "--format=tar.gz",
        f"--output={tar}",
        "HEAD",
    ]
    assert scp == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "scp",
        tar,
        "focusdpo:",
        "--zone=us-west4-a",
        "--quiet",
        "--worker=all",
    ]
    assert ssh[:-1] == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "focusdpo",
        "--zone=us-west4-a",
        "--quiet",
        "--worker=all",
    ]
    assert '-e . "jax[tpu]"' in ssh[-1]


def test_tpu_logs(fake):
    result = launch(fake, "tpu_pod.sh", "logs", "--dry-run", **TPU, WORKER="3")
    [call] = printed_calls(fake, result)
    assert call[-2:] == ["--worker=3", "--command=tail -n 100 -F ~/focusdpo_jax.log"]


def test_tpu_dry_watch_shows_every_step(fake):
    result = launch(fake, "tpu_pod.sh", "watch", "--dry-run", FLAG, **TPU)
    assert (result.returncode, result.stderr, calls(fake)) == (0, "", [])
    for words in (
        "queued-resources describe",
        "queued-resources create",
        "queued-resources delete",
        "tpu-vm scp",
        "jax[tpu]",
        "python -m focusdpo_jax.main",
    ):
        assert words in result.stdout
    subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)


@pytest.mark.parametrize(
    "subcommand, changes, parts",
    [
        ("create", {"ZONE": ""}, ["ZONE is not set", "ZONE=us-west4-a"]),
        ("run", {"WORKDIR": ""}, ["WORKDIR = (not set)", "WORKDIR=gs://"]),
        ("watch", {"WORKDIR": "runs/dpo"}, ["WORKDIR = runs/dpo", "WORKDIR=gs://"]),
        ("create", {"ACCELERATOR": "v9-8"}, ["RUNTIME is not set", "ACCELERATOR = v9-8"]),
        (
            "create",
            {"PROVISIONING": "cheap"},
            ["PROVISIONING = cheap", "spot, on-demand or reserved"],
        ),
        ("create", {"TPU_NAME": "My pod"}, ["TPU_NAME = My pod", "lower-case"]),
        ("watch", {"POLL_SECONDS": "often"}, ["POLL_SECONDS = often"]),
        ("watch", {"MAX_FAILURES": ""}, []),  # Empty is the default.
        ("fly", {}, ["fly is no subcommand", "create, install, run"]),
        ("delete --now", {}, ["delete takes no flags: --now"]),
        ("", {}, ["no subcommand"]),
    ],
)
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
    for tool in ("bash", "dirname", "readlink"):
        (tools / tool).symlink_to(shutil.which(tool))
    result = launch(fake, "tpu_pod.sh", "create", **TPU, PATH=str(tools))
    assert_fails(result, "gcloud is not installed", "https://cloud.google.com/sdk")


def plan(fake, *host0):
    """How the runs of both hosts end, one after another: a status, "on" or "preempted"."""
    (fake / "plan.host0").write_text("".join(f"{line}\n" for line in host0))
    (fake / "plan.host1").write_text(
        "".join(f"{'on' if line == 'preempted' else line}\n" for line in host0)
    )


def requests(fake):
    return [
        call[4]
        for call in calls(fake, "gcloud")
        if call[3] == "queued-resources" and call[4] != "describe"
    ]


TRAINING = [
    "python",
    "-m",
    "focusdpo_jax.main",
    "--config=configs/toybox_dpo.py",
    "--workdir=gs://bucket/my run",
    FLAG,
]


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
    process = subprocess.Popen(
        [ROOT / "launch/tpu_pod.sh", "watch"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(fake, TPU),
    )
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
