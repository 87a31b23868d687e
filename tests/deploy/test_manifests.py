"""The KubeRay manifests: known fields, numbers that agree with each other, and a run that fits on them."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.deploy.kuberay import OBJECTS, SUBMISSION_MODES, unknown_fields
from tests.deploy.kustomize import render

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
STANDING = "ray-cluster.yaml"
JOBS = [
    "grpo", "grpo-async", "sft", "overlays/one-gpu", "overlays/one-node", "overlays/several-nodes"
]  # fmt: skip
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def load(place: str) -> dict[str, Any]:
    """The object of a manifest or of a folder with a kustomization."""
    (manifest,) = render(CLUSTER / place)
    return manifest


def cluster_spec(place: str) -> dict[str, Any]:
    spec = load(place)["spec"]
    return spec if place == STANDING else spec["rayClusterSpec"]


def size(quantity: str | int) -> int:
    """Bytes of a Kubernetes quantity."""
    found = re.fullmatch(r"(\d+)([A-Za-z]*)", str(quantity))
    assert found, quantity
    return int(found[1]) * UNITS[found[2]]


def groups(place: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, group and Ray container of the head and of every worker group."""
    spec = cluster_spec(place)
    named = [("head", spec["headGroupSpec"]), *((g["groupName"], g) for g in spec["workerGroupSpecs"])]
    for name, group in named:
        (container,) = group["template"]["spec"]["containers"]
        yield name, group, container


each = pytest.mark.parametrize("place", [STANDING, *JOBS])
each_job = pytest.mark.parametrize("place", JOBS)


@each
def test_only_fields_that_kuberay_knows(place: str) -> None:
    manifest = load(place)
    kind = "RayCluster" if place == STANDING else "RayJob"
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert list(unknown_fields(manifest, OBJECTS[kind])) == []
    assert manifest["spec"].get("submissionMode", "K8sJobMode") in SUBMISSION_MODES


def test_a_misspelt_field_would_be_found() -> None:
    manifest = copy.deepcopy(load(STANDING))
    manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    manifest["spec"]["workerGroupSpecs"][1]["minReplica"] = 1
    manifest["spec"]["autoscalerOptions"]["idleTimeoutSecond"] = 1
    assert [path.rsplit(".", 1)[1] for path in unknown_fields(manifest, OBJECTS["RayCluster"])] == [
        "idleTimeoutSecond",
        "volumeMount",
        "minReplica",
    ]


def test_the_job_runs_on_the_same_cluster_as_the_standing_one() -> None:
    assert cluster_spec("grpo") == cluster_spec(STANDING)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@each_job
def test_kubectl_renders_the_folders_as_these_tests_do(place: str) -> None:
    command = ["kubectl", "kustomize", str(CLUSTER / place)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert list(yaml.safe_load_all(shown.stdout)) == render(CLUSTER / place)


def test_every_folder_with_a_kustomization_is_tested() -> None:
    folders = {path.parent.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("kustomization.yaml")}
    assert folders == set(JOBS)


def test_jobs_share_neither_a_name_nor_an_output_directory() -> None:
    names = {load(place)["metadata"]["name"] for place in JOBS}
    flags = [entrypoint(place) for place in JOBS]
    assert len(names) == len({argv[argv.index("--output_dir") + 1] for argv in flags}) == len(JOBS)


@each_job
def test_a_lost_driver_goes_on_from_the_newest_checkpoint(place: str) -> None:
    """KubeRay makes a new cluster and submits the same entrypoint again."""
    spec, argv = load(place)["spec"], entrypoint(place)
    assert spec["backoffLimit"] >= 1
    assert argv[argv.index("--resume_from_checkpoint") + 1] == "auto"
    assert int(argv[argv.index("--save_steps") + 1]) > 0
    assert spec["shutdownAfterJobFinishes"] is True


@each
def test_required_fields(place: str) -> None:
    for name, group, container in groups(place):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), (
            f"{name}: not strings"
        )
        assert container["name"]
    assert [name for name, _, _ in groups(place)] in (["head", "policy", "rollout"], ["head", "policy"])
    assert cluster_spec(place)["authOptions"] == {"mode": "token"}, "anybody could run code on the cluster"
    assert len(load(place)["metadata"]["name"]) <= 47  # KubeRay derives longer names from it.


@each
def test_rollout_pods_come_and_go_and_policy_pods_stay(place: str) -> None:
    spec = cluster_spec(place)
    by_name = {name: group for name, group, _ in groups(place) if name != "head"}
    policy = by_name["policy"]
    assert policy["minReplicas"] == policy["replicas"] == policy["maxReplicas"] >= 1
    assert "idleTimeoutSeconds" not in policy
    if "rollout" not in by_name:
        assert "enableInTreeAutoscaling" not in spec
        assert "autoscalerOptions" not in spec
        return
    rollout = by_name["rollout"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2", "only v2 reads a group's idleTimeoutSeconds"
    assert rollout["minReplicas"] in (0, 1)
    assert rollout["minReplicas"] <= rollout["replicas"] < rollout["maxReplicas"]
    assert rollout["idleTimeoutSeconds"] > 0
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    (container,) = rollout["template"]["spec"]["containers"]
    drain = {entry["name"]: entry.get("value") for entry in container["env"]}[
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    ]
    # Kubernetes kills what is still there at the end of the grace period: Ray must be done before.
    assert 0 < float(drain) < rollout["template"]["spec"]["terminationGracePeriodSeconds"]


@each
def test_ray_is_told_what_the_container_has(place: str) -> None:
    for name, group, container in groups(place):
        start_params, has = group["rayStartParams"], container["resources"]
        assert has["requests"] == has["limits"], f"{name}: guaranteed quality of service needs them equal"
        gpus = int(has["limits"].get("nvidia.com/gpu", 0))
        if name == "head":
            assert start_params["num-cpus"] == "0", "workers would be placed on the head"
            assert gpus == 0
            continue
        assert "num-cpus" not in start_params, "KubeRay tells Ray the container's own limit"
        assert int(start_params["num-gpus"]) == gpus > 0
        # As KubeRay reads it: outer quotes off, then JSON. The shell leaves the same.
        assert json.loads(start_params["resources"].strip("'\"` ")) == {name: gpus}
        assert json.loads(shlex.split(start_params["resources"])[0]) == {name: gpus}


@each
def test_shared_memory_holds_the_object_store(place: str) -> None:
    for name, group, container in groups(place):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert set(mounts.values()) == set(volumes), (
            f"{name}: a volume without a mount, or the other way round"
        )
        shared = volumes[mounts["/dev/shm"]]["emptyDir"]
        store = int(group["rayStartParams"]["object-store-memory"])
        assert shared["medium"] == "Memory"
        assert size(shared["sizeLimit"]) >= store, name
        # A memory volume is charged to the container, whose processes need room beside it.
        assert size(container["resources"]["limits"]["memory"]) >= 2 * size(shared["sizeLimit"]), name


@each
def test_output_is_on_a_volume_that_several_nodes_can_write(place: str) -> None:
    claim = yaml.safe_load((CLUSTER / "volume.yaml").read_text(encoding="utf-8"))
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, group, container in groups(place):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"], (
            name
        )


@each
def test_tokens_come_from_a_secret_and_pods_are_not_root(place: str) -> None:
    for name, group, container in groups(place):
        env = {entry["name"]: entry for entry in container["env"]}
        for token in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
            assert "value" not in env[token], f"{name}: a token in plain text"
            assert env[token]["valueFrom"]["secretKeyRef"] == {
                "name": "raytune-rl-hub",
                "key": token,
                "optional": True,
            }
        assert all(isinstance(entry.get("value", ""), str) for entry in env.values()), (
            f"{name}: env must be text"
        )
        security = group["template"]["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        user = int(
            re.findall(r"^USER (\d+)$", (CLUSTER / "Dockerfile.gpu").read_text("utf-8"), re.MULTILINE)[-1]
        )
        assert security["runAsUser"] == security["fsGroup"] == user > 0


@each
def test_images_ports_and_versions(place: str) -> None:
    images = {container["image"] for _, _, container in groups(place)}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert images == {f"raytune-rl:{version}-gpu"}, (
        "head and workers must have the same Python, Ray and raytune_rl"
    )
    lock = (ROOT / "requirements" / "gpu.txt").read_text("utf-8")
    assert f"\nray=={cluster_spec(place)['rayVersion']} " in lock
    for name, group, container in groups(place):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        if name == "head":
            assert ports == {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
            assert group["rayStartParams"]["dashboard-host"] == "0.0.0.0", (
                "job submission comes from other pods"
            )
        else:
            assert ports == {"metrics": 8080}


# -- the run -----------------------------------------------------------------------------------------------


def entrypoint(place: str = "grpo") -> list[str]:
    """The job's flags, after its command."""
    return shlex.split(load(place)["spec"]["entrypoint"])[2:]


def nodes(place: str = "grpo") -> dict[str, dict[str, float]]:
    """The resources that Ray will report for the nodes, as KubeRay and `rayStartParams` make it."""
    have: dict[str, dict[str, float]] = {}
    for name, group, container in groups(place):
        start_params, limits = group["rayStartParams"], container["resources"]["limits"]
        custom = json.loads(start_params.get("resources", "{}").strip("'"))
        for index in range(group.get("replicas", 1)):
            have[f"{name}-{index}"] = {
                "CPU": float(start_params.get("num-cpus", limits["cpu"])),
                "GPU": float(start_params.get("num-gpus", 0)),
                **custom,
            }
    return have


def configured(place: str) -> Any:
    """The job's configuration; nothing about it is worth a notice."""
    from raytune_rl.config import RLHFConfig, SFTConfig
    from raytune_rl.config.parser import parse

    program, command, *argv = shlex.split(load(place)["spec"]["entrypoint"])
    kind = {"rlhf": RLHFConfig, "sft": SFTConfig}[command]
    assert program == "raytune-rl"
    flags = [word.removeprefix("--") for word in argv if word.startswith("--")]
    assert set(flags) <= set(kind.model_fields)
    assert len(flags) == len(set(flags)), "a flag is given twice"
    parsed = parse(argv, kind, environ={})
    assert not parsed.notices, parsed.notices
    return parsed.config


@each_job
def test_the_entrypoint_is_a_command_that_raytune_rl_accepts(place: str) -> None:
    config = configured(place)
    assert Path(config.output_dir).is_relative_to("/data")


WORKERS = {
    "grpo": {"policy": 8, "rollout": 7, "reference": 1},
    "grpo-async": {"policy": 8, "rollout": 1},
    "sft": {"policy": 8},
    "overlays/one-gpu": {"policy": 1, "rollout": 1},
    "overlays/one-node": {"policy": 8, "rollout": 8},
    "overlays/several-nodes": {"policy": 16, "rollout": 8},
}

COMPLETIONS_AND_PROMPTS = {
    "grpo": (64, 8), "grpo-async": (64, 8), "overlays/one-gpu": (32, 4), "overlays/one-node": (64, 8),
    "overlays/several-nodes": (128, 16),
}  # fmt: skip
"""Of one optimizer step."""


@each_job
def test_the_run_fits_on_the_cluster_and_uses_every_gpu(place: str) -> None:
    from raytune_rl.config import RLHFConfig
    from raytune_rl.config.batching import grpo_schedule_of
    from raytune_rl.groups.sizes import offline_groups, online_groups
    from raytune_rl.pipelines.online_algorithms import algorithm_of
    from raytune_rl.runtime.cluster import ClusterInfo
    from raytune_rl.runtime.placement import check_fits, make_layout

    config, info = configured(place), ClusterInfo(False, "", nodes(place), 0, has_gpus=True)
    if isinstance(config, RLHFConfig):
        asked = online_groups(config, info, algorithm_of(config).needs)
    else:
        asked = offline_groups(config, info)
    layout = make_layout(asked.specs)
    check_fits(layout, asked.specs, nodes(place))
    workers = {spec.name: spec.workers for spec in asked.specs if spec.name != "reward"}
    assert workers == WORKERS[place]
    used = sum(bundle.get("GPU", 0.0) for bundle in layout.bundles)
    assert used == sum(node["GPU"] for node in nodes(place).values()) > 0
    if isinstance(config, RLHFConfig):
        batch = grpo_schedule_of(config, workers["policy"], n_prompts=10_000).batch
        assert (batch.completions_per_step, batch.prompts_per_step) == COMPLETIONS_AND_PROMPTS[place]


@pytest.mark.parametrize(("place", "most"), [("grpo-async", 8), ("overlays/several-nodes", 32)])
def test_the_rollout_group_may_grow_to_the_most_engines(place: str, most: int) -> None:
    from raytune_rl.config import resolved
    from raytune_rl.groups.growth import check_growth
    from raytune_rl.groups.sizes import online_groups
    from raytune_rl.runtime.cluster import ClusterInfo

    config = configured(place)
    assert config.async_generate
    (group,) = [g for g in cluster_spec(place)["workerGroupSpecs"] if g["groupName"] == "rollout"]
    each = int(group["rayStartParams"]["num-gpus"])
    assert resolved.engines(config) == (each * group["minReplicas"], each * group["maxReplicas"])
    info = ClusterInfo(False, "", nodes(place), 0, has_gpus=True)
    groups = online_groups(config, info, set())
    assert groups.elastic is not None
    assert groups.elastic.most == most
    assert groups["rollout"].resources == {"rollout": 1.0}, "only on pods that come and go"
    assert "others start when its autoscaler" in check_growth(groups, info)[0]


# -- the images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_images_install_the_lock_and_do_not_run_as_root(extra: str) -> None:
    text = (CLUSTER / f"Dockerfile.{extra}").read_text(encoding="utf-8")
    # Instructions in order, with continued lines joined and comments left out.
    code = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    steps = [line for line in code.splitlines() if line.strip()]

    def at(part: str) -> int:
        (found,) = [index for index, step in enumerate(steps) if part in step]
        return found

    sync, own = at("pip sync --no-cache --require-hashes"), at("--python /opt/venv/bin/python .")
    assert f"requirements/{extra}.txt" in steps[sync]
    assert sync < at("COPY . .") < own < at("USER 10001"), (
        "the lock first, for the layer cache; then the project"
    )
    assert not [step for step in steps[at("USER 10001") :] if step.startswith(("RUN", "COPY"))]
    assert "--no-deps" in steps[own]
    # Besides the lock, the installer (pinned) and flash-attn, nothing is installed.
    installs = [step for step in steps if "pip install" in step]
    assert len(installs) == (3 if extra == "gpu" else 2)
    if extra == "gpu":
        flash = at("flash-attn")
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
            "optional-dependencies"
        ]
        assert sync < flash < own
        assert "--no-build-isolation" in steps[flash]
        lock = (ROOT / "requirements" / "gpu.txt").read_text("utf-8")
        for needed in ("setuptools", "wheel", "packaging", "psutil", "ninja"):  # by its build, undeclared
            assert f"\n{needed}==" in lock, needed
        assert str(Requirement(wanted["flash-attn"][0])) in steps[flash]
        assert "ARG FLASH_ATTN=0" in steps, "its build on this torch is not known to work"
        packages = next(step for step in steps if "apt-get install" in step).split()
        assert {"build-essential", "python3-dev"} <= set(packages), "Triton compiles against Python's headers"
        caches = dict(re.findall(r"(\w*(?:CACHE|WORKSPACE)\w*)=(\S+)", code))
        assert caches.keys() >= {"VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
        assert all(place.startswith("/data/cache") for place in caches.values()), "on the volume"
    assert "/etc/profile.d/" in code, "a login shell must find ray, too"
    assert " wget" in code, "KubeRay's probes call it"


def test_the_build_context_has_what_the_images_copy_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert all((ROOT / name).exists() for name in kept)
    assert {"raytune_rl", "requirements", "pyproject.toml", "README.md", "LICENSE", "examples"} == kept
