"""The records of a run: its directory, log, checkpoints, completions, plots, plan, summary."""
