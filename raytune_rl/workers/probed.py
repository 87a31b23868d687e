"""What workers without progress of their own answer to a probe."""

from __future__ import annotations


class Probed:
    """A worker that is asked beside its work whether it still answers (`runtime.probe`)."""

    PROBED = True

    def progress(self) -> int:
        """Proves that the process is not stopped; nothing is counted."""
        return 0
