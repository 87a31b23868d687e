"""Models: loading, tuners, log-probs, and weights by their checkpoint names.

The only place that knows Transformers and PEFT. Imports neither Ray nor DeepSpeed.
"""

import logging

# PEFT imports bitsandbytes, which then warns of an optional kernel that is not installed: in every command.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
