"""Shares the optimizer's state among ranks: each steps its own parameters and sends them to the
others.

Gradients are summed over all ranks as ever, so a share needs no message of its own before the step.
Source: the first stage of ZeRO, arXiv:1910.02054, section 5.1.
"""

from collections.abc import Mapping

import torch

from training.config.run import RunConfig, shares_optimizer
from training.optimization.offload import Offload
from training.optimization.ranks import Ranks


def assign_owners(parameters: Mapping[str, torch.nn.Parameter], num_ranks: int) -> dict[str, int]:
    """The rank that steps each parameter: the largest first, each to the rank that has least, ties
    to the lowest."""
    loads = [0] * num_ranks
    owners = {}
    for name in sorted(parameters, key=lambda name: (-parameters[name].numel(), name)):
        owners[name] = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[name]] += parameters[name].numel()
    return {name: owners[name] for name in parameters}


class Sharding:
    """Who owns which trained parameter. Without sharding every rank owns all of them."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], ranks: Ranks, config: RunConfig
    ) -> None:
        """Divide the parameters.

        Args:
            parameters: The trained ones, by name.
            ranks: Of this run.
            config: `compute.shard_optimizer` decides.

        Raises:
            ConfigError: the optimizer needs all parameters at once.
        """
        self.ranks = ranks
        self.active = shares_optimizer(config, ranks.size)
        self._owners = assign_owners(parameters, ranks.size) if self.active else {}
        self._parameters = parameters
        self.owned = {
            name: parameter
            for name, parameter in parameters.items()
            if not self.active or self._owners[name] == ranks.rank
        }
        """This rank's share, by name."""

    def publish(self) -> None:
        """Send the weights of every share to all ranks, after their owners have changed them."""
        if self.active:
            self.ranks.meet()
        for rank in range(self.ranks.size) if self.active else ():
            self.ranks.broadcast_(
                [self._parameters[name] for name, owner in self._owners.items() if owner == rank],
                rank,
            )

    def collect(
        self, tensors: Mapping[str, torch.Tensor], offload: Offload
    ) -> dict[str, torch.Tensor]:
        """A copy of all shares' tensors on rank 0's CPU; other ranks get nothing, and without
        sharding send nothing."""
        if not self.active and self.ranks.rank != 0:
            return {}
        own = offload.copy(tensors)
        return self.ranks.collect(own) if self.active else own
