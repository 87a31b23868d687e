"""The export of a trained model: merged into its base, uploaded to a hub.

Needs neither Ray nor a GPU. `run` is what the command line calls.
"""

from raytune_rl.export.command import ExportResult, run

__all__ = ["ExportResult", "run"]
