"""One file a loss: what it is, its settings with their flags, what it needs, how its token losses add up.

A file that is put here is found by itself (`registry.loss_names`); no other file lists losses.
"""
