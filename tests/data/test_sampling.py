"""The order of training examples: every epoch complete, weights respected, resumable, a pure function of the seed."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.data.sampling import ExampleSchedule, PositionSampler


def examples_of_ranks(
    schedule: ExampleSchedule, batch_size: int, world_size: int, first: int, num_batches: int
) -> list[list[tuple[int, int]]]:
    """Return the (data set, example) pairs that each rank draws."""
    drawn = []
    for rank in range(world_size):
        sampler = PositionSampler(batch_size, first, num_batches, rank, world_size)
        drawn.append([schedule[position] for batch in sampler for position in batch])
    return drawn


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    world_size=st.integers(1, 3),
    batch_size=st.integers(1, 9),
    stop=st.integers(0, 40),
)
@settings(max_examples=50, deadline=None)
def test_every_epoch_has_every_sample_once_with_and_without_resume(sizes, seed, world_size, batch_size, stop):
    everything = {(dataset, example) for dataset, size in enumerate(sizes) for example in range(size)}
    weights = [1.0] * len(sizes)
    schedule = ExampleSchedule(sizes, weights, seed)
    epochs = 3
    num_batches = -(-epochs * len(everything) // (batch_size * world_size))
    stop = min(stop, num_batches)
    before = examples_of_ranks(schedule, batch_size, world_size, 0, stop)
    first = stop * batch_size * world_size
    resumed = ExampleSchedule(sizes, weights, seed)
    after = examples_of_ranks(resumed, batch_size, world_size, first, num_batches - stop)
    ranks = [one + other for one, other in zip(before, after, strict=True)]
    assert ranks == examples_of_ranks(schedule, batch_size, world_size, 0, num_batches)
    stream: list[tuple[int, int]] = []
    for number in range(num_batches):
        for rank in ranks:
            stream += rank[number * batch_size : (number + 1) * batch_size]
    for epoch in range(epochs):
        drawn = stream[epoch * len(everything) : (epoch + 1) * len(everything)]
        assert len(drawn) == len(everything)
        assert set(drawn) == everything


@given(st.integers(1, 5), st.integers(0, 100), st.integers(0, 20), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_ranks_share_the_stream_without_overlap(batch_size, first, num_batches, world_size):
    samplers = [PositionSampler(batch_size, first, num_batches, rank, world_size) for rank in range(world_size)]
    positions = sorted(position for sampler in samplers for batch in sampler for position in batch)
    assert positions == list(range(first, first + batch_size * num_batches * world_size))
    assert [len(sampler) for sampler in samplers] == [num_batches] * world_size


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 2.5)), min_size=1, max_size=3), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_sampling_weights_hold_over_epochs(sets, seed):
    sizes = [size for size, _ in sets]
    weights = [weight for _, weight in sets]
    schedule = ExampleSchedule(sizes, weights, seed)
    epochs = 12
    counts = Counter(pair for number in range(epochs) for pair in schedule.epoch(number))
    for dataset, (size, weight) in enumerate(sets):
        drawn = [counts[dataset, example] for example in range(size)]
        assert sum(drawn) == epochs * max(1, round(weight * size))
        assert max(drawn) - min(drawn) <= 1


@given(st.integers(0, 10**9), st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_schedule_is_a_pure_function_of_the_seed(seed, position):
    one = ExampleSchedule([7, 4], [1.0, 0.5], seed)
    other = ExampleSchedule([7, 4], [1.0, 0.5], seed)
    other[3 * position]  # earlier reads make no difference
    assert one[position] == other[position]


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(ExampleSchedule([50], [1.0], seed).epoch(number)) for seed in range(5) for number in range(4)}
    assert len(orders) == 20
