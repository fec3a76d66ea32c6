"""The arithmetic of a run: autocast, the gradient scaler, and fp32 weights beside a model that computes in bf16.

All gradients lie in one fp32 buffer, whatever the model computes in: sums over micro-batches and ranks are never
rounded to 16 bits, and ranks exchange one tensor.
"""

import contextlib
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from training.models.unet import PipelineParts, named_modules
from training.run_config import Precision

_INITIAL_SCALE = 65_536.0
# bigASP's train.py: 500,000 samples in steps of 2,048.
_GROWTH_STEPS = 244
_AUTOCAST = MappingProxyType({"fp16_amp": torch.float16, "bf16_amp": torch.bfloat16})


class Arithmetic:
    """What stands between the loss and the optimizer's step."""

    weights: Mapping[str, torch.Tensor]
    """This rank's share of the trained weights in fp32, by name: what the optimizer steps and checkpoints hold."""
    frozen: Mapping[str, torch.Tensor]
    """Weights that are not trained and that `bf16` rounded in the model: their fp32 values, on the CPU."""

    def __init__(
        self,
        precision: Precision,
        parts: PipelineParts,
        parameters: Mapping[str, torch.nn.Parameter],
        owned: Mapping[str, torch.nn.Parameter],
        device: torch.device,
    ) -> None:
        """Bring the model into its precision; `bf16` rounds UNet and text encoders in place.

        Args:
            precision: The run's.
            parts: The model, fp32, on the device, its memory format settled.
            parameters: The trained ones, by name.
            owned: Those of them that this rank's optimizer steps.
            device: Where the run computes.
        """
        self._precision, self._device = precision, device
        self._parameters = dict(parameters)
        self._masters: dict[str, torch.nn.Parameter] = {}
        self.frozen = {}
        if precision == "bf16":
            self._masters = {name: _copy(parameter) for name, parameter in owned.items()}
            self.frozen = _rounded(parts, parameters)
            for module in named_modules(parts).values():
                module.to(torch.bfloat16)
        self.weights = self._masters if precision == "bf16" else dict(owned)
        self._scale, self._good_steps = _INITIAL_SCALE if precision == "fp16_amp" else 1.0, 0
        self._flat = torch.zeros(sum(p.numel() for p in self._parameters.values()), device=device)
        for parameter, gradient in zip(self._parameters.values(), self._views(), strict=True):
            parameter.grad_dtype = torch.float32
            parameter.grad = gradient
        for name, master in self._masters.items():
            master.grad = self._parameters[name].grad

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        dtype = _AUTOCAST.get(self._precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, scaled where there is a scaler."""
        (loss * self._scale).backward()

    def clear_gradients(self) -> None:
        """Set all gradients to zero."""
        self._flat.zero_()

    def gradients(self) -> torch.Tensor:
        """All gradients as one fp32 tensor, in the order of the parameters; what is done to it is done to them."""
        return self._flat

    def unscale_and_clip(self, max_norm: float) -> float:
        """Undo the scaler's factor, then clip.

        Args:
            max_norm: Of all gradients together; 0 for never.

        Returns:
            The norm before it was clipped; not finite where a gradient overflowed.
        """
        if self._scale != 1:
            self._flat.mul_(1 / self._scale)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), max_norm or math.inf)
        return float(norm)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the fp32 weights, round them into the model, and let the scaler grow."""
        optimizer.step()
        for name, master in self._masters.items():
            self._parameters[name].copy_(master)
        if self._precision == "fp16_amp":
            self._good_steps += 1
            if self._good_steps == _GROWTH_STEPS:
                self._scale, self._good_steps = self._scale * 2, 0

    def skip(self) -> None:
        """Halve the scale after a step that was left out because it was not finite."""
        if self._precision == "fp16_amp":
            self._scale, self._good_steps = self._scale / 2, 0

    @property
    def collapsed(self) -> bool:
        """Whether the scale fell below 1: then it is not the scale that makes gradients overflow."""
        return self._scale < 1

    def scaler_state(self) -> dict[str, float]:
        """What a checkpoint keeps of the scaler; empty where there is none."""
        if self._precision != "fp16_amp":
            return {}
        return {"scale": self._scale, "good_steps": float(self._good_steps)}

    def restore_scaler(self, state: Mapping[str, float]) -> None:
        """Go on from `scaler_state`; an empty one changes nothing."""
        if state and self._precision == "fp16_amp":
            self._scale, self._good_steps = state["scale"], int(state["good_steps"])

    def _views(self) -> list[torch.Tensor]:
        """The buffer cut into one gradient per parameter, laid out in memory as that is: fused kernels ask for it."""
        views, offset = [], 0
        for parameter in self._parameters.values():
            views.append(self._flat.as_strided(parameter.size(), parameter.stride(), offset))
            offset += parameter.numel()
        return views


def _copy(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().clone())


def _rounded(parts: PipelineParts, trained: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """CPU copies of the weights that are not trained and that bf16 cannot hold."""
    return {
        f"{part}.{key}": value.detach().to("cpu", copy=True)
        for part, module in named_modules(parts).items()
        for key, value in module.named_parameters()
        if f"{part}.{key}" not in trained and not torch.equal(value, value.bfloat16().float())
    }
