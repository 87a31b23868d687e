"""Does the engine serve the policy's weights, family by family: `python -m tests.families`."""
