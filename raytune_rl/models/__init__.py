"""Models: loading, tuners, log-probs, and weights by their checkpoint names.

The only place that knows Transformers and PEFT. Imports neither Ray nor DeepSpeed.
"""
