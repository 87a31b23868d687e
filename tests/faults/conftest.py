"""Faults are made in runs of the real stack, on the models and the cluster of tests/cluster."""

from tests.cluster.conftest import cluster, tiny

__all__ = ["cluster", "tiny"]
