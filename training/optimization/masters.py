"""fp32 weights beside a model that computes in bf16, at four bytes a weight for both.

A bf16 number is the upper half of an fp32 one, rounded. So the model's own weights are half of the
fp32 ones, and what is kept beside them is the difference, which 16 bits hold exactly. The fp32
weights themselves are there for one group of the optimizer at a time, in a buffer that all groups
share.

Source: the same split as `store_param_remainders` of NVIDIA Apex' distributed Adam.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

# Elements that a weight's place in a buffer is a multiple of: 128 bytes in bf16, which every kernel
# is content with.
_ALIGNMENT = 64


class Masters:
    """The fp32 weights of the parameters that this rank's optimizer steps."""

    weights: dict[str, torch.nn.Parameter]
    """By name: what the optimizer is made for. All have the right shape and layout; numbers are
    theirs only inside of `groups`."""

    def __init__(
        self, owned: Mapping[str, torch.nn.Parameter], groups: Sequence[Sequence[str]]
    ) -> None:
        """Round the model's weights to bf16, in place, and keep the rest.

        Args:
            owned: Parameters by name, fp32; they become views of one buffer in bf16.
            groups: Their names, as the optimizer steps them one group after the other.
        """
        self.weights = {}
        self._chunks = [_Chunk({name: owned[name] for name in names}) for names in groups]
        size = max((chunk.size for chunk in self._chunks), default=0)
        device = next(iter(owned.values())).device if owned else torch.device("cpu")
        self._buffer = torch.zeros(size, device=device)
        for chunk in self._chunks:
            self.weights |= chunk.hang_into(self._buffer)

    @torch.no_grad()
    def groups(
        self, all_groups: list[dict[str, Any]]
    ) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """Groups of an optimizer with their fp32 weights, by turns; what they become is rounded
        into the model.

        Args:
            all_groups: The optimizer's.

        Yields:
            Groups that are stepped together, and their weights by name.
        """
        chunk_of = {
            id(weight): chunk for chunk in self._chunks for weight in chunk.weights.values()
        }
        for chunk in self._chunks:
            chunk.join(self._buffer)
            yield (
                [group for group in all_groups if chunk_of[id(group["params"][0])] is chunk],
                dict(chunk.weights),
            )
            chunk.split(self._buffer)

    @torch.no_grad()
    def values(self) -> dict[str, torch.Tensor]:
        """A copy of all weights in fp32, by name."""
        found: dict[str, torch.Tensor] = {}
        for chunk in self._chunks:
            chunk.join(self._buffer)
            found |= {name: weight.detach().clone() for name, weight in chunk.weights.items()}
        return found

    def halves(self) -> dict[str, torch.Tensor]:
        """What the weights are kept as, two tensors each, to be copied and joined elsewhere by
        `joined`."""
        return {name: half for chunk in self._chunks for name, half in chunk.halves()}


def round_to_bf16(weight: torch.Tensor) -> torch.Tensor:
    """An fp32 weight in bf16, laid out as it is, as `Masters` rounds it: halfway cases up, in torch
    to even."""
    return _upper_half(weight.detach().view(torch.int32)).to(torch.int16).view(torch.bfloat16)


def joined(halves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The fp32 weights that copies of `Masters.halves` stand for, by name."""
    found = {}
    for name, upper in halves.items():
        if name.startswith(_UPPER):
            bits = (upper.view(torch.int16).to(torch.int32) << 16) + halves[
                _LOWER + name.removeprefix(_UPPER)
            ]
            found[name.removeprefix(_UPPER)] = bits.view(torch.float32)
    return found


def _upper_half(bits: torch.Tensor) -> torch.Tensor:
    """The upper 16 bits of fp32 numbers, rounded, as int32. Ties go up: else the rest would need a
    17th bit."""
    return bits.add(1 << 15).bitwise_right_shift_(16)


_UPPER, _LOWER = "upper.", "lower."


class _Chunk:
    """The weights of one group, in two buffers of 16 bits."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters, self._places, place = dict(parameters), dict[str, int](), 0
        for name, parameter in parameters.items():
            self._places[name] = place
            place += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        self.size = place
        self.weights: dict[str, torch.nn.Parameter] = {}
        device = next(iter(parameters.values())).device
        self._upper = torch.zeros(place, dtype=torch.int16, device=device)
        self._lower = torch.zeros_like(self._upper)
        full = torch.zeros(place, device=device)
        for name, parameter in parameters.items():
            self._view(full, name).copy_(parameter.detach())
        self.split(full)
        for name, parameter in parameters.items():
            parameter.data = self._view(self._upper.view(torch.bfloat16), name)

    def hang_into(self, buffer: torch.Tensor) -> dict[str, torch.nn.Parameter]:
        """Make the fp32 weights views of a buffer `(N,)`."""
        self.weights = {
            name: torch.nn.Parameter(self._view(buffer, name)) for name in self._parameters
        }
        return self.weights

    def join(self, buffer: torch.Tensor) -> None:
        """Fill the buffer's beginning with the fp32 weights."""
        bits = buffer[: self.size].view(torch.int32)
        bits.copy_(self._upper)
        bits.bitwise_left_shift_(16).add_(self._lower)

    def split(self, buffer: torch.Tensor) -> None:
        """Keep the fp32 weights at the buffer's beginning, whose content is lost."""
        bits = buffer[: self.size].view(torch.int32)
        upper = _upper_half(bits)
        self._upper.copy_(upper)
        self._lower.copy_(bits.sub_(upper.bitwise_left_shift_(16)))

    def halves(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Both halves of each weight, in its shape."""
        for name in self._parameters:
            yield _UPPER + name, self._view(self._upper, name)
            yield _LOWER + name, self._view(self._lower, name)

    def _view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        """A weight's place in a buffer, laid out as the parameter is."""
        parameter = self._parameters[name]
        return buffer.as_strided(parameter.size(), parameter.stride(), self._places[name])
