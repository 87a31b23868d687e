"""What a run leaves behind and shows: its directory, log, checkpoints, completions, plots, plan, summary."""
