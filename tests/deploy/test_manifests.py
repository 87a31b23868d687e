"""The manifests speak KubeRay v1, agree with themselves, and call the command line that exists."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_rl.config import RLHFConfig
from raytune_rl.config.parser import parse

CLUSTER = Path(__file__).parents[2] / "cluster"
# Field names of ray.io/v1, as far as a manifest of ours may use them.
RAY_JOB = {
    "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "activeDeadlineSeconds", "runtimeEnvYAML", "metadata", "rayClusterSpec", "submitterPodTemplate",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "suspend",
}  # fmt: skip
RAY_CLUSTER = {
    "rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions",
    "suspend", "gcsFaultToleranceOptions", "headServiceAnnotations",
}  # fmt: skip
HEAD_GROUP = {"rayStartParams", "template", "serviceType", "headService", "enableIngress"}
WORKER_GROUP = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts",
    "scaleStrategy", "idleTimeoutSeconds",
}  # fmt: skip
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def cluster_specs() -> dict[str, dict[str, Any]]:
    return {
        "cluster": load("ray-cluster.yaml")["spec"],
        "job": load("ray-job-grpo.yaml")["spec"]["rayClusterSpec"],
    }


def groups() -> Iterator[Any]:
    for name, spec in cluster_specs().items():
        yield pytest.param(spec["headGroupSpec"], id=f"{name}-head")
        for group in spec["workerGroupSpecs"]:
            yield pytest.param(group, id=f"{name}-{group['groupName']}")


def gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi"), quantity
    return float(quantity[:-2])


def test_kinds_and_fields_are_kuberay_v1() -> None:
    job, cluster = load("ray-job-grpo.yaml"), load("ray-cluster.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert job["spec"].keys() <= RAY_JOB
    assert job["spec"]["submissionMode"] in SUBMISSION_MODES
    for spec in cluster_specs().values():
        assert spec.keys() <= RAY_CLUSTER
        assert spec["headGroupSpec"].keys() <= HEAD_GROUP
        for group in spec["workerGroupSpecs"]:
            assert group.keys() <= WORKER_GROUP
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_both_manifests_describe_the_same_cluster() -> None:
    specs = cluster_specs()
    assert specs["cluster"] == specs["job"]
    assert [g["groupName"] for g in specs["job"]["workerGroupSpecs"]] == ["policy", "rollout"]
    assert specs["job"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_entrypoint_is_a_command_that_parses_and_fits() -> None:
    spec = load("ray-job-grpo.yaml")["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["raytune-rl", "rlhf"]
    parsed = parse(words[2:], RLHFConfig, environ={})
    flags = [word.removeprefix("--") for word in words if word.startswith("--")]
    assert set(flags) <= RLHFConfig.model_fields.keys()
    config = parsed.config
    gpus = sum(
        group["replicas"] * int(container(group)["resources"]["limits"]["nvidia.com/gpu"])
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]
    )
    asked = (config.policy_workers or 0) + (config.rollout_workers or 0) + (config.reference_workers or 0)
    assert asked == gpus
    assert config.output_dir.startswith("/data/")


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("group", list(groups()))
def test_resources_agree_with_what_ray_is_told(group: dict[str, Any]) -> None:
    pod = group["template"]["spec"]
    box = container(group)
    params = group["rayStartParams"]
    assert all(isinstance(value, str) for value in params.values()), "rayStartParams are strings"
    assert box["resources"]["requests"] == box["resources"]["limits"]
    if "groupName" in group:
        declared = json.loads(json.loads(params["resources"].strip("'")))
        assert declared == {group["groupName"]: box["resources"]["limits"]["nvidia.com/gpu"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounts = {m["name"]: m["mountPath"] for m in box["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    shared = volumes["shared-memory"]["emptyDir"]
    assert (shared["medium"], mounts["shared-memory"]) == ("Memory", "/dev/shm")
    store = int(params["object-store-memory"]) / 2**30
    assert store < gibibytes(shared["sizeLimit"]) < gibibytes(box["resources"]["limits"]["memory"])
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == load("volume.yaml")["metadata"]["name"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for variable in box["env"]:
        if "TOKEN" in variable["name"]:
            assert variable["valueFrom"]["secretKeyRef"]["optional"] is True, "tokens come from a secret"


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_images_install_the_locked_requirements_as_another_user(name: str) -> None:
    text = (CLUSTER / name).read_text(encoding="utf-8")
    extra = name.rpartition(".")[2]
    assert f"--require-hashes --python /opt/venv/bin/python requirements/{extra}.txt" in text
    assert text.index("USER 10001") < text.index("CMD")
    if extra == "gpu":
        assert (
            text.index("requirements/gpu.txt") < text.index("--no-build-isolation") < text.index("COPY . .")
        )


def test_rays_version_is_the_locked_one() -> None:
    locked = (CLUSTER.parent / "requirements" / "gpu.txt").read_text(encoding="utf-8")
    for spec in cluster_specs().values():
        assert f"\nray=={spec['rayVersion']} " in locked
