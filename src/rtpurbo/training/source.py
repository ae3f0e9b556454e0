"""Distribution of sequences over processes and steps, and positions in streamed texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rtpurbo.data.stream import StreamLane, TextStream
from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.processes import SINGLE_PROCESS, Processes
from rtpurbo.training.sequences import TrainingMix, TrainingSequence

Texts = TextCorpus | TextStream
"""Training texts: in memory or streamed."""


class SequenceSource:
    """Source of sequences in groups of one optimiser step each.

    Group g contains the sequences from g * per_step on. Each of the `per_step` positions in a group is a
    lane with its own part of a stream, and lanes are assigned to processes in turn: the sequences do not
    depend on the number of processes.

    Args:
        mix: mixture of sequences; its corpus is replaced by the lanes of a stream.
        texts: training texts.
        per_step: sequences of a group, over all processes.
        processes: processes that train.

    Raises:
        RTPurboError: a group cannot be divided evenly among the processes.
    """

    def __init__(
        self, mix: TrainingMix, texts: Texts, per_step: int, processes: Processes = SINGLE_PROCESS
    ) -> None:
        check_shares(per_step, processes)
        self.per_step = per_step
        self.processes = processes
        self._lanes = range(processes.index, per_step, processes.count)
        self._streams: dict[int, StreamLane] = {}
        self._mixes = dict.fromkeys(self._lanes, mix)
        if isinstance(texts, TextStream):
            for lane in self._lanes:
                self._streams[lane] = texts.lane(lane, per_step)
                self._mixes[lane] = replace(mix, corpus=self._streams[lane])
        self._next = 0
        self._before = self._places()
        self._group: list[TrainingSequence] = []

    def numbers(self, group: int) -> list[int]:
        """Returns the numbers of this process's sequences of a group."""
        return [group * self.per_step + lane for lane in self._lanes]

    def follows(self, group: int) -> bool:
        """True if a group can be taken next without a `seek`."""
        return not self._streams or group == self._next

    def take(self, group: int) -> list[TrainingSequence]:
        """Returns this process's sequences of a group, in the order of `numbers`.

        Groups of a stream are taken in order; the last one can be taken repeatedly.

        Raises:
            RTPurboError: texts cannot be read or are too short.
        """
        if group == self._next - 1 and self._group:
            return self._group
        assert group == self._next or not self._streams, "a stream is read in order"
        self._before = self._places()
        self._group = [
            self._mixes[lane].sequence(number)
            for lane, number in zip(self._lanes, self.numbers(group), strict=True)
        ]
        self._next = group + 1
        return self._group

    def position(self, group: int) -> dict[str, Any] | None:
        """Returns the position before the next group or the last one: this process's lanes by number.

        Returns None for texts in memory, which have no position.
        """
        if not self._streams:
            return None
        assert group in (self._next - 1, self._next), "a stream keeps the positions of two groups"
        lanes = self._places() if group == self._next else self._before
        return {"group": group, "lanes": lanes}

    def position_of_all(self, group: int) -> dict[str, Any] | None:
        """Returns `position` with the lanes of all processes, which call this together."""
        position = self.position(group)
        if position is None:
            return None
        parts = self.processes.gather_objects(position["lanes"])
        return {"group": group, "lanes": {key: part[key] for part in parts for key in part}}

    def seek(self, position: dict[str, Any] | None) -> None:
        """Moves to a position that was saved with any number of processes.

        Raises:
            RTPurboError: the position lacks a lane of this process.
        """
        if position is None or not self._streams:
            return
        for lane, stream in self._streams.items():
            if str(lane) not in position["lanes"]:
                raise RTPurboError(
                    "the position in the stream does not fit this training: start again with --force."
                )
            stream.seek(position["lanes"][str(lane)])
        self._next, self._group = position["group"], []
        self._before = self._places()

    def _places(self) -> dict[str, Any]:
        return {str(lane): stream.position() for lane, stream in self._streams.items()}


def check_shares(per_step: int, processes: Processes) -> None:
    """Refuses groups that cannot be divided evenly among the processes.

    Raises:
        RTPurboError: `per_step` is not a multiple of the number of processes.
    """
    if per_step % processes.count:
        raise RTPurboError(
            f"{per_step} sequences per step (sequences_per_step) cannot be divided evenly among "
            f"{processes.count} processes: choose a multiple of {processes.count}."
        )


def random_access(texts: Texts) -> TextCorpus:
    """Returns the texts with random access: all texts in memory, or the beginning of a stream."""
    return texts.opening if isinstance(texts, TextStream) else texts
