"""Which sequences each process meets at each step, and where in the texts the next ones stand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rtpurbo.data.stream import StreamLane, TextStream
from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.processes import ALONE, Processes
from rtpurbo.training.sequences import TrainingMix, TrainingSequence

Texts = TextCorpus | TextStream
"""What is trained on: texts in memory, or read as training goes on."""


class SequenceSource:
    """Deals out sequences in groups of one optimiser step each.

    Group g holds the sequences from g * per_step on. Each of the `per_step` places in a group is a
    lane, with its own part of a stream, and the lanes are dealt out to the processes: which
    sequences there are does not depend on how many processes there are.

    Args:
        mix: what sequences are like; its corpus is replaced by the lanes of a stream.
        texts: what is trained on.
        per_step: sequences of a group, over all processes.
        processes: who trains.

    Raises:
        RTPurboError: the processes cannot share a group evenly.
    """

    def __init__(
        self, mix: TrainingMix, texts: Texts, per_step: int, processes: Processes = ALONE
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
        """The sequences of a group that this process meets."""
        return [group * self.per_step + lane for lane in self._lanes]

    def follows(self, group: int) -> bool:
        """Whether a group can be taken now without a `seek`."""
        return not self._streams or group == self._next

    def take(self, group: int) -> list[TrainingSequence]:
        """This process's sequences of a group, in the order of `numbers`.

        A stream gives its groups one after the other, the last one as often as asked.

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
        """Where to go on with a group, the next one or the last: this process's lanes by number.

        None for texts in memory, which need none.
        """
        if not self._streams:
            return None
        assert group in (self._next - 1, self._next), "a stream forgets what is long past"
        places = self._places() if group == self._next else self._before
        return {"group": group, "lanes": places}

    def position_of_all(self, group: int) -> dict[str, Any] | None:
        """As `position`, with the lanes of all processes; all call it together."""
        position = self.position(group)
        if position is None:
            return None
        parts = self.processes.gather_objects(position["lanes"])
        return {"group": group, "lanes": {key: part[key] for part in parts for key in part}}

    def seek(self, position: dict[str, Any] | None) -> None:
        """Goes to a position that any number of processes had.

        Raises:
            RTPurboError: it lacks a lane of this process.
        """
        if position is None or not self._streams:
            return
        for lane, stream in self._streams.items():
            if str(lane) not in position["lanes"]:
                raise RTPurboError(
                    "the position in the stream does not fit this training: begin anew with --force."
                )
            stream.seek(position["lanes"][str(lane)])
        self._next, self._group = position["group"], []
        self._before = self._places()

    def _places(self) -> dict[str, Any]:
        return {str(lane): stream.position() for lane, stream in self._streams.items()}


def check_shares(per_step: int, processes: Processes) -> None:
    """Refuses groups that the processes cannot share evenly.

    Raises:
        RTPurboError: they cannot.
    """
    if per_step % processes.count:
        raise RTPurboError(
            f"{per_step} sequences a step (sequences_per_step) cannot be shared evenly by "
            f"{processes.count} processes: choose a multiple of {processes.count}."
        )


def random_access(texts: Texts) -> TextCorpus:
    """Texts of which any part can be had at any time: all in memory, or the beginning of a stream."""
    return texts.opening if isinstance(texts, TextStream) else texts
