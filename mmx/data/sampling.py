"""Order of the training examples: a pure function of the seed, which any process can evaluate at any step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from torch.utils.data import Sampler


class ExampleSchedule:
    """The example at each position of the endless training stream.

    An epoch holds w * n examples of a data set of n examples and sampling weight w, shuffled together with those of
    the other data sets. Over several epochs all examples of a data set are drawn equally often, to within one. If all
    weights are 1, an epoch is a permutation of all examples.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes = list(sizes)
        self.weights = list(weights)
        self.seed = seed
        self._cached_epoch: tuple[int, list[tuple[int, int]]] = (-1, [])
        self.epoch_length = len(self.epoch(0))

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (data set, example) at a position of the stream."""
        number, offset = divmod(position, self.epoch_length)
        return self.epoch(number)[offset]

    def epoch(self, number: int) -> list[tuple[int, int]]:
        """Return the shuffled (data set, example) pairs of one epoch."""
        if self._cached_epoch[0] != number:
            pairs: list[tuple[int, int]] = []
            for dataset in range(len(self.sizes)):
                pairs.extend((dataset, example) for example in self._examples_of_epoch(dataset, number))
            Random(f"{self.seed}-epoch-{number}").shuffle(pairs)
            self._cached_epoch = (number, pairs)
        return self._cached_epoch[1]

    def _examples_of_epoch(self, dataset: int, number: int) -> Iterator[int]:
        """Yield the examples of an epoch: the next `length` of an endless sequence of permutations."""
        size = self.sizes[dataset]
        length = max(1, round(self.weights[dataset] * size))
        permutations: dict[int, list[int]] = {}
        for index in range(number * length, (number + 1) * length):
            pass_number, offset = divmod(index, size)
            if pass_number not in permutations:
                order = list(range(size))
                Random(f"{self.seed}-{dataset}-{pass_number}").shuffle(order)
                permutations[pass_number] = order
            yield permutations[pass_number][offset]


class PositionSampler(Sampler[list[int]]):
    """The stream positions of the batches of one rank.

    Args:
        batch_size: samples in each batch.
        first: position to start from, in samples, so that a run can be resumed with another batch size or world size.
        num_batches: number of batches of this rank.
        rank, world_size: this process and the number of processes.
    """

    def __init__(self, batch_size: int, first: int, num_batches: int, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size = batch_size
        self.first = first
        self.num_batches = num_batches
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.num_batches):
            start = self.first + (number * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return self.num_batches
