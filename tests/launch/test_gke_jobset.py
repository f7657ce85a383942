"""launch/gke_jobset.yaml against the requirements of Kubernetes and TPU slices."""

import math
import re

import pytest
import yaml

from tests.launch.stand_ins import ROOT


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
    assert selector.keys() == {
        "cloud.google.com/gke-tpu-accelerator",
        "cloud.google.com/gke-tpu-topology",
    }
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
    assert rule == {
        "name": "mistake",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
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
    return [
        (a, t, m, int(c), int(h))
        for a, t, m, c, h in re.findall(
            r"^# +(tpu-\S+) +(\d+(?:x\d+)+) +(ct\S+) +(\d+) +(\d+)$", text, re.M
        )
    ]


def test_jobset_table_of_slices():
    assert len(slices()) == 6
    for _, topology, machine, chips, hosts in slices():
        assert math.prod(map(int, topology.split("x"))) == chips * hosts
        assert machine.endswith(f"-{chips}t")
