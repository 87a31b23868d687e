"""Data preparation as a task of the cluster: sets, their cache, streams."""
