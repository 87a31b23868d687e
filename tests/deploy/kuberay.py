"""Field names of KubeRay's `ray.io/v1` and of the pod fields we use, as facts for the tests of the manifests.

Noted down from the CRDs of KubeRay 1.7 (`RayCluster`, `RayJob`) and Kubernetes core/v1. An API server prunes
unknown fields in silence or refuses the object, depending on the client: better to find a typing error here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ANY = object()
"""A value that is not looked into: free-form maps, or types without fields."""

POD_SPEC: dict[str, Any] = {
    "containers": [
        {
            "name": ANY,
            "image": ANY,
            "imagePullPolicy": ANY,
            "command": ANY,
            "args": ANY,
            "env": [
                {
                    "name": ANY,
                    "value": ANY,
                    "valueFrom": {"secretKeyRef": {"name": ANY, "key": ANY, "optional": ANY}},
                }
            ],
            "ports": [{"name": ANY, "containerPort": ANY, "protocol": ANY}],
            "resources": {"requests": ANY, "limits": ANY},
            "volumeMounts": [{"name": ANY, "mountPath": ANY, "readOnly": ANY, "subPath": ANY}],
            "securityContext": ANY,
            "livenessProbe": ANY,
            "readinessProbe": ANY,
        }
    ],
    "volumes": [
        {
            "name": ANY,
            "emptyDir": {"medium": ANY, "sizeLimit": ANY},
            "persistentVolumeClaim": {"claimName": ANY, "readOnly": ANY},
        }
    ],
    "securityContext": {"runAsNonRoot": ANY, "runAsUser": ANY, "runAsGroup": ANY, "fsGroup": ANY},
    "tolerations": [{"key": ANY, "operator": ANY, "value": ANY, "effect": ANY}],
    "nodeSelector": ANY,
    "affinity": ANY,
    "serviceAccountName": ANY,
    "terminationGracePeriodSeconds": ANY,
}
POD_TEMPLATE = {"metadata": ANY, "spec": POD_SPEC}

RAY_CLUSTER_SPEC: dict[str, Any] = {
    "authOptions": {"mode": ANY, "secretName": ANY, "enableK8sTokenAuth": ANY},
    "autoscalerOptions": {
        "command": ANY,
        "env": ANY,
        "idleTimeoutSeconds": ANY,
        "image": ANY,
        "imagePullPolicy": ANY,
        "resources": {"requests": ANY, "limits": ANY},
        "upscalingMode": ANY,
        "version": ANY,
    },
    "enableInTreeAutoscaling": ANY,
    "gcsFaultToleranceOptions": ANY,
    "headGroupSpec": {
        "enableIngress": ANY,
        "headService": ANY,
        "ingressOptions": ANY,
        "labels": ANY,
        "rayStartParams": ANY,
        "resources": ANY,
        "serviceType": ANY,
        "template": POD_TEMPLATE,
    },
    "headServiceAnnotations": ANY,
    "historyServerOptions": ANY,
    "managedBy": ANY,
    "networkPolicy": ANY,
    "rayVersion": ANY,
    "suspend": ANY,
    "tlsOptions": ANY,
    "upgradeStrategy": ANY,
    "workerGroupSpecs": [
        {
            "groupName": ANY,
            "idleTimeoutSeconds": ANY,
            "labels": ANY,
            "maxReplicas": ANY,
            "minReplicas": ANY,
            "numOfHosts": ANY,
            "priority": ANY,
            "rayStartParams": ANY,
            "replicas": ANY,
            "resources": ANY,
            "scaleStrategy": ANY,
            "suspend": ANY,
            "template": POD_TEMPLATE,
        }
    ],
}
RAY_JOB_SPEC: dict[str, Any] = {
    "activeDeadlineSeconds": ANY,
    "backoffLimit": ANY,
    "clusterSelector": ANY,
    "deletionStrategy": ANY,
    "entrypoint": ANY,
    "entrypointNumCpus": ANY,
    "entrypointNumGpus": ANY,
    "entrypointResources": ANY,
    "jobId": ANY,
    "managedBy": ANY,
    "metadata": ANY,
    "preRunningDeadlineSeconds": ANY,
    "rayClusterSpec": RAY_CLUSTER_SPEC,
    "runtimeEnvYAML": ANY,
    "shutdownAfterJobFinishes": ANY,
    "submissionMode": ANY,
    "submitterConfig": ANY,
    "submitterPodTemplate": ANY,
    "suspend": ANY,
    "ttlSecondsAfterFinished": ANY,
}
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
OBJECTS = {
    "RayCluster": {"apiVersion": ANY, "kind": ANY, "metadata": ANY, "spec": RAY_CLUSTER_SPEC},
    "RayJob": {"apiVersion": ANY, "kind": ANY, "metadata": ANY, "spec": RAY_JOB_SPEC},
}


def unknown_fields(value: Any, allowed: Any, where: str = "") -> Iterator[str]:
    """Paths in `value` that `allowed` does not know, or that have another shape."""
    if allowed is ANY:
        return
    if isinstance(allowed, list):
        if not isinstance(value, list):
            yield f"{where}: a list is expected"
            return
        for index, item in enumerate(value):
            yield from unknown_fields(item, allowed[0], f"{where}[{index}]")
        return
    if not isinstance(value, dict):
        yield f"{where}: a mapping is expected"
        return
    for name, item in value.items():
        if name in allowed:
            yield from unknown_fields(item, allowed[name], f"{where}.{name}")
        else:
            yield f"{where}.{name}"
