"""The two shapes of a reward class, the same as ms-swift's, so that its plugin files load unchanged."""

from __future__ import annotations

from typing import Any


class ORM:
    """A reward: called with completions and, by keyword, one list per column, all of the same length.

    It returns one entry a completion: a number, `None` where it has no opinion (the sample gets no reward
    from this function), or `raytune_rl.protocol.rewards.Unscored` where it should have had one but could not
    (counted as a failure, with its reason).

    A constructor may take `args`: all settings of the run, as attributes.
    """

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        self.args = args

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} has to define __call__(self, completions, **kwargs)"
        )


class AsyncORM:
    """The same as `ORM` with `async def __call__`, for rewards that wait on a network."""

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        self.args = args

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} has to define async def __call__(self, completions, **kwargs)"
        )
