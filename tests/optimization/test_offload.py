"""Copies to main memory: complete, in slices, and none read before the device has made it."""

import pytest
import torch

from training.optimization.offload import Offload, copy_in_slices


class Device:
    """Copies that arrive only when their mark is waited for: until then a buffer holds what was in
    it."""

    def __init__(self):
        self.waited = 0

    def mark(self):
        return self

    def synchronize(self):
        self.waited += 1


@pytest.mark.parametrize("size", [1, 5, 64, 10_000])
def test_slices_make_whole_contiguous_copies_of_every_type_and_layout(size):
    tensors = {
        "weight": torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last), "half": torch.randn(7).bfloat16(),
        "step": torch.tensor(12.0), "count": torch.tensor(5), "empty": torch.empty(0), "cut": torch.randn(6, 6)[:, 2:4],
    }  # fmt: skip
    device = Device()
    copies = copy_in_slices(
        tensors, [torch.zeros(size, dtype=torch.uint8) for _ in range(2)], device.mark
    )
    assert copies.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor)
        assert copies[name].dtype == tensor.dtype
        assert copies[name].is_contiguous()
        assert copies[name].data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert (
        device.waited
        >= sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) // size
    )


def test_a_buffer_is_read_after_its_mark_and_written_again_only_then():
    buffers = [torch.zeros(4, dtype=torch.uint8) for _ in range(2)]
    source, log = torch.arange(16, dtype=torch.uint8), []

    class Mark:
        def __init__(self):
            self.content = [buffer.clone() for buffer in buffers]
            log.append("begun")

        def synchronize(self):
            # Nothing was written over a slice that was still under way.
            kept = sum(
                torch.equal(now, then) for now, then in zip(buffers, self.content, strict=True)
            )
            assert kept >= 1
            log.append("reached")

    assert torch.equal(copy_in_slices({"a": source}, buffers, Mark)["a"], source)
    assert log == ["begun", "begun", "reached", "begun", "reached", "begun", "reached", "reached"]


def test_on_a_cpu_a_copy_is_a_copy():
    weight = torch.randn(3, 2)
    copied = Offload(torch.device("cpu")).copy({"w": weight})["w"]
    weight.zero_()
    assert copied.any()


@pytest.mark.gpu
def test_on_a_gpu_the_copy_is_of_the_moment_when_it_was_asked_for():
    device = torch.device("cuda", 0)
    weight = torch.zeros(50_000_000, device=device)
    weight += 1
    offload = Offload(device)
    assert torch.equal(offload.copy({"w": weight})["w"], torch.ones(50_000_000))
