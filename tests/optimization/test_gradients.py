"""Sums of gradients: over micro-batches, over ranks in slices, and while the backward pass still
runs."""

import copy

import pytest
import torch

from training.optimization.gradients import Gradients

CPU = torch.device("cpu")
SIZES = ((3, 2), (5,), (4, 4), (1,), (2, 3))


class Pending:
    """A sum that is under way: nothing may be read before `wait`."""

    def __init__(self, finish):
        self.finish = finish

    def wait(self):
        self.finish()


class World:
    """Ranks that are trained one after the other in this process; each sends and reads in its
    turn."""

    def __init__(self, others, size):
        self.others, self.size, self.rank = others, size, 0
        self.begun, self.gathered = [], []

    def gather(self, values):
        """This rank's slice and those of the others, which have the same place."""
        place = values.storage_offset()
        self.gathered.append(values.numel())
        return [values, *(other[place : place + values.numel()] for other in self.others.pop(0))]

    def begin_sum(self, values):
        place = values.storage_offset()
        self.begun.append((place, place + values.numel()))
        return Pending(
            lambda: [values.add_(other[place : place + values.numel()]) for other in self.others]
        )

    def wait(self, sums):
        for pending in sums:
            pending.wait()


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in SIZES]


def backward(parameters, number):
    """A loss whose gradients differ by micro-batch; each parameter is used twice."""
    torch.manual_seed(number)
    loss = torch.zeros(())
    for parameter in parameters:
        loss = (
            loss
            + (parameter * torch.randn(parameter.shape)).sum()
            + (parameter.float() ** 2).sum() * number / 7
        )
    loss.backward()


def autograds_own(number, dtype=torch.float32):
    parameters = make(dtype)
    backward(parameters, number)
    return torch.cat([parameter.grad.float().reshape(-1) for parameter in parameters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_in_fp32(dtype):
    parameters = make(dtype)
    gradients = Gradients(parameters, CPU)
    for _ in range(2):
        gradients.begin()
        for number in (1, 2, 3):
            backward(parameters, number)
            gradients.end_round(1)
        gradients.finish()
        wanted = autograds_own(1, dtype)
        for number in (2, 3):
            wanted = wanted + autograds_own(number, dtype)
        assert torch.equal(gradients.flat, wanted)
    if dtype == torch.bfloat16:
        assert all(parameter.grad is None for parameter in parameters), (
            "nothing of another type hangs on them"
        )


@pytest.mark.parametrize("slice_numbers", [1, 7, 1000])
def test_canonical_sums_in_slices_have_the_bits_of_one_rank(slice_numbers):
    alone = make()
    whole = Gradients(alone, CPU)
    whole.begin()
    for number in range(1, 6):
        backward(alone, number)
    whole.finish()

    parameters = make()
    # Rounds of two ranks: (1, 2), (3, 4), and 5 alone, whose neighbour has nothing.
    empty = torch.full((sum(p.numel() for p in parameters),), 99.0)
    num_slices = -(-empty.numel() // slice_numbers)
    others = [autograds_own(2), autograds_own(4), empty]
    world = World([[other] for other in others for _ in range(num_slices)], 2)
    gradients = Gradients(parameters, CPU, world, "canonical", slice_numbers)
    gradients.begin()
    for number, left in ((1, 5), (3, 3), (5, 1)):
        backward(parameters, number)
        gradients.end_round(left)
    gradients.finish()
    assert torch.equal(gradients.flat, whole.flat)
    assert max(world.gathered) <= slice_numbers, "one slice of every rank is there at a time"
    assert len(world.gathered) == 3 * num_slices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slice_numbers", [1, 8, 1000])
def test_fast_sums_begin_before_the_last_backward_pass_ends_and_never_earlier(slice_numbers, dtype):
    parameters = make(dtype)
    world = World([autograds_own(7, dtype)], 2)
    gradients = Gradients(parameters, CPU, world, "fast", slice_numbers)
    seen = []
    # Called after the gradient of the first parameter's use, the last that a backward pass comes
    # to.
    parameters[0].register_hook(lambda _: seen.append(len(world.begun)))
    gradients.begin()
    backward(parameters, 1)
    gradients.end_round(4)
    assert not world.begun, "another micro-batch is to come"
    gradients.expect_last()
    backward(parameters, 3)
    gradients.end_round(2)
    assert len(world.begun) == len(gradients._buckets)
    gradients.finish()
    wanted = autograds_own(1, dtype) + autograds_own(3, dtype) + autograds_own(7, dtype)
    assert torch.equal(gradients.flat, wanted)
    # Each gradient is in one message, from the buffer's end to its start: the same on every rank.
    assert [end for _, end in world.begun] == [
        gradients.flat.numel(),
        *(start for start, _ in world.begun[:-1]),
    ]
    assert world.begun[-1][0] == 0
    if slice_numbers == 1:
        assert seen[-1] > 0, "the others were under way"


def test_a_rank_without_a_last_micro_batch_sends_the_same_messages():
    busy, idle = (World([torch.zeros(36)], 2) for _ in range(2))
    for world, takes_part in ((busy, True), (idle, False)):
        parameters = make()
        gradients = Gradients(parameters, CPU, world, "fast", 8)
        gradients.begin()
        if takes_part:
            gradients.expect_last()
            backward(parameters, 1)
        gradients.end_round(1)
        gradients.finish()
    assert busy.begun == idle.begun


def test_views_keep_the_layout_of_their_parameters():
    parameter = torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    gradients = Gradients([parameter], CPU)
    assert gradients.views[0].stride() == parameter.stride()
    weight = copy.deepcopy(parameter)
    (parameter.square().sum()).backward()
    (weight.square().sum()).backward()
    assert torch.equal(parameter.grad, weight.grad)
    assert parameter.grad.data_ptr() == gradients.flat.data_ptr()
