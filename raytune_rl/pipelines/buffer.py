"""Groups that were asked ahead of the training, until they are trained on: how many there may be, and which
come next. Pure.

Let B be the groups of a generation and k the most weight versions that may lie between sampling and
training. Weights of version v have been trained on v generations. Under them at most (v + k + 1) B groups may
have been asked in all, those trained on among them; so whatever is asked now can be trained on in time,
nothing ever gets too old, and nothing is ever dropped for its age.

Generations take the groups in the order in which they were asked. Once k generations are done, a generation
is thus made of exactly the groups that would be too old for the next one, and waits for no other. What is
trained on does not depend on who was fastest: short answers are not preferred at the start, and a resumed run
trains on the same groups as an uninterrupted one. k = 0 is the synchronous loop.

The bound is AReaL's (Fu et al. 2025, "AReaL: a large-scale asynchronous reinforcement learning system for
language reasoning", section 5.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

from raytune_rl.errors import RaytuneError

Group = TypeVar("Group")


@dataclass(frozen=True)
class Asked:
    """A prompt that was asked.

    Attributes:
        number: Of the prompts asked, in order.
        row: Row in the prompt set.
        seeds: One a completion.
        version: The newest weights when it was asked: none of its tokens is of older ones.
    """

    number: int
    row: int
    seeds: tuple[int, ...]
    version: int


@dataclass
class _Place(Generic[Group]):
    asked: Asked
    oldest: int = 0
    group: Group | None = None


class ExperienceBuffer(Generic[Group]):
    """The groups between being asked and being trained on.

    Args:
        groups: Of a generation.
        max_staleness: Most versions between the oldest token of a group and the weights that it is trained
            with.
        generations: Of the whole run: nothing is asked beyond them.
        first: Number of the next generation.
    """

    def __init__(self, groups: int, max_staleness: int, generations: int, first: int = 0) -> None:
        self._size, self._staleness, self._generations = groups, max_staleness, generations
        self._next = first
        self._number = 0
        self._places: dict[int, _Place[Group]] = {}  # in the order of asking

    @property
    def most(self) -> int:
        """Groups that may be asked and not be trained on at any time."""
        return (self._staleness + 1) * self._size

    def __len__(self) -> int:
        """Groups that are asked and not taken."""
        return len(self._places)

    @property
    def ready(self) -> int:
        """Those of them that are there."""
        return sum(place.group is not None for place in self._places.values())

    def admit(self, version: int) -> int:
        """How many groups may be asked now, under the weights of a version."""
        until = min(version + self._staleness + 1, self._generations)
        return max((until - self._next) * self._size - len(self._places), 0)

    def ask(self, row: int, seeds: tuple[int, ...], version: int) -> Asked:
        """Enters a group that is asked now.

        Raises:
            RaytuneError: No more may be asked under this version.
        """
        if self.admit(version) < 1:
            raise RaytuneError(
                f"{len(self)} groups are in flight or wait to be trained on, and no more may be under "
                f"version {version}; this is a defect of raytune_rl"
            )
        asked = Asked(self._number, row, seeds, version)
        self._number += 1
        self._places[asked.number] = _Place(asked)
        return asked

    def put(self, number: int, oldest: int, group: Group) -> None:
        """A group is there.

        Args:
            number: Of `Asked`.
            oldest: Version of its oldest token.
            group: It.
        """
        place = self._places[number]
        if place.group is not None:
            raise RaytuneError(f"group {number} came twice; this is a defect of raytune_rl")
        place.group, place.oldest = group, oldest

    def leave_out(self, number: int) -> Asked:
        """A group will not be trained on: another may be asked in its place."""
        return self._places.pop(number).asked

    @property
    def complete(self) -> bool:
        """Whether the next generation is there."""
        return sum(place.group is not None for place in self._heads()) == self._size

    def waits_for(self) -> list[Asked]:
        """The groups of the next generation that were asked and are not there yet."""
        return [place.asked for place in self._heads() if place.group is None]

    def take(self, version: int) -> list[Group]:
        """The groups of the next generation in the order of asking.

        Args:
            version: Of the weights that it will be trained with first.

        Raises:
            RaytuneError: They are not all there, or one of them is older than the bound.
        """
        heads = self._heads()
        groups = [place.group for place in heads if place.group is not None]
        if len(groups) < self._size:
            raise RaytuneError("a generation was taken before it was there; this is a defect of raytune_rl")
        for place in heads:
            if version - place.oldest > self._staleness:
                raise RaytuneError(
                    f"a group of weight version {place.oldest} came up for training with version {version}, "
                    f"more than --max_staleness {self._staleness} later; this is a defect of raytune_rl"
                )
        for place in heads:
            del self._places[place.asked.number]
        self._next += 1
        return groups

    def in_flight(self) -> list[Asked]:
        """Groups that are asked and not there, in order."""
        return [place.asked for place in self._places.values() if place.group is None]

    def finished(self) -> Iterator[tuple[Asked, Group]]:
        """Groups that are there, in order."""
        for place in self._places.values():
            if place.group is not None:
                yield place.asked, place.group

    def state_dict(self) -> dict[str, Any]:
        """As JSON-able values, without the groups themselves."""
        return {
            "number": self._number,
            "asked": [
                {**asdict(place.asked), "oldest": None if place.group is None else place.oldest}
                for place in self._places.values()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any], groups: Mapping[int, Group], version: int) -> None:
        """Goes on where a checkpoint was made: what was in flight counts as asked now.

        Args:
            state: Of `state_dict`.
            groups: Those that were there, by number. One that is missing, or that would be too old when its
                turn comes (the bound was larger before), is in flight again.
            version: Of the weights, which is the next generation's number.
        """
        self._number = int(state["number"])
        self._places = {}
        for at, saved in enumerate(state["asked"]):
            asked = Asked(saved["number"], saved["row"], tuple(saved["seeds"]), saved["version"])
            oldest, turn = saved["oldest"], self._next + at // self._size
            group = groups.get(asked.number)
            if oldest is None or group is None or turn - oldest > self._staleness:
                self._places[asked.number] = _Place(replace(asked, version=version))
            else:
                self._places[asked.number] = _Place(asked, oldest, group)

    def _heads(self) -> list[_Place[Group]]:
        return [place for _, place in zip(range(self._size), self._places.values(), strict=False)]
