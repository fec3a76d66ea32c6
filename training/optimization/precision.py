"""The arithmetic of a run: autocast, the gradient scaler, and fp32 weights beside a model that
computes in bf16."""

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from training.config.run import RunConfig
from training.models.unet import PipelineParts, named_modules
from training.optimization.gradients import Gradients
from training.optimization.masters import Masters, joined, round_to_bf16
from training.optimization.optim import step_groups
from training.optimization.ranks import Ranks

# torch's GradScaler. Our loss is divided by the samples of all ranks and the ranks' gradients are
# summed, where DDP divides by those of one rank and takes the mean: times the number of ranks, 16
# bits hold the same gradients.
_INITIAL_SCALE = 65_536.0
# bigASP's train.py: the scale grows after 500,000 // batch steps.
_GROWTH_SAMPLES = 500_000
_AUTOCAST = MappingProxyType({"fp16_amp": torch.float16, "bf16_amp": torch.bfloat16})


class Arithmetic:
    """What stands between the loss and the optimizer's step."""

    weights: Mapping[str, torch.nn.Parameter]
    """This rank's share of the trained weights in fp32, by name, which the optimizer is made for;
    `bf16` has their numbers only while they are stepped, see `values`."""
    frozen: Mapping[str, torch.Tensor]
    """Weights that are not trained and that `bf16` rounded in the model: their fp32 values, on the
    CPU."""
    gradients: Gradients
    """Of the trained weights."""

    def __init__(
        self,
        config: RunConfig,
        parts: PipelineParts,
        parameters: Mapping[str, torch.nn.Parameter],
        owned: Mapping[str, torch.nn.Parameter],
        *,
        ranks: Ranks | None = None,
        keep_frozen: bool = True,
    ) -> None:
        """Bring the model into its precision; `bf16` rounds UNet and text encoders in place.

        Args:
            config: Of the run, resolved: its precision, how gradients are summed, the samples of a
                step, which the scaler's growth counts, and its optimizer, since Prodigy reads all
                weights at once.
            parts: The model, fp32, on the device, its memory format settled.
            parameters: The trained ones, by name.
            owned: Those of them that this rank's optimizer steps.
            ranks: Of the run; None for one.
            keep_frozen: Keep what `bf16` rounds and no one trains, for checkpoints that hold it.
        """
        precision = config.precision
        self._precision, self._device = precision, next(iter(parameters.values())).device
        self._parameters = dict(parameters)
        self._masters: Masters | None = None
        self.frozen = {}
        use_tf32(precision == "tf32")
        if precision == "bf16":
            self.frozen = _rounded(parts, parameters) if keep_frozen else {}
            together = config.optimizer.name == "prodigy"
            self._masters = Masters(owned, [list(owned)] if together else step_groups(owned))
            for name in parameters.keys() - owned.keys():  # as their owners round them
                parameters[name].data = round_to_bf16(parameters[name])
            for module in named_modules(parts).values():
                module.to(torch.bfloat16)
        self.weights = dict(owned) if self._masters is None else self._masters.weights
        self._scale, self._good_steps = 1.0, 0
        if precision == "fp16_amp":
            self._scale = _INITIAL_SCALE * (1 if ranks is None else ranks.size)
        self._growth_steps = max(1, _GROWTH_SAMPLES // config.batch.global_batch_size)
        self.gradients = Gradients(
            list(self._parameters.values()), self._device, ranks, config.reduction
        )
        by_name = dict(zip(self._parameters, self.gradients.views, strict=True))
        for name, weight in self.weights.items():
            weight.grad = by_name[name]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        dtype = _AUTOCAST.get(self._precision)
        return (
            contextlib.nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, scaled where there is a scaler."""
        (loss * self._scale if self._scale != 1 else loss).backward()

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """Norm of all gradients without the scaler's factor, 0-d on the device; not finite where
        one of them is."""
        return torch.linalg.vector_norm(self.gradients.flat) / self._scale

    @torch.no_grad()
    def unscale_and_clip(self, norm: float, max_norm: float) -> None:
        """Undo the scaler's factor and clip, in one pass over the gradients, and in none where both
        are 1.

        Args:
            norm: What `norm` gave, finite.
            max_norm: Of all gradients together; 0 for never.
        """
        factor = (
            min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        )  # torch.nn.utils.clip_grad_norm_'s
        if factor != self._scale:
            self.gradients.flat.mul_(factor / self._scale)

    @torch.no_grad()
    def step(
        self,
        optimizer: torch.optim.Optimizer,
        then: Callable[[Mapping[str, torch.Tensor]], None] = lambda _: None,
    ) -> None:
        """Step the fp32 weights, round them into the model, and let the scaler grow.

        Args:
            optimizer: Made for `weights`.
            then: Is shown all stepped weights, some at a time.
        """
        if self._masters is None:
            optimizer.step()
            then(self.weights)
        else:
            groups = optimizer.param_groups
            try:
                for optimizer.param_groups, weights in self._masters.groups(groups):
                    optimizer.step()
                    then(weights)
            finally:
                optimizer.param_groups = groups
        if self._precision == "fp16_amp":
            self._good_steps += 1
            if self._good_steps == self._growth_steps:
                self._scale, self._good_steps = self._scale * 2, 0

    def values(self) -> dict[str, torch.Tensor]:
        """The trained weights of this rank in fp32, by name: the model's own where that is fp32,
        else a copy."""
        return dict(self.weights) if self._masters is None else self._masters.values()

    def stored(
        self,
    ) -> tuple[
        dict[str, torch.Tensor], Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    ]:
        """What this rank's weights are kept as, and what makes fp32 weights by name of copies of
        it."""
        if self._masters is None:
            return {
                name: weight.detach() for name, weight in self.weights.items()
            }, lambda copies: copies
        return self._masters.halves(), joined

    def skip(self) -> None:
        """Halve the scale after a step that was left out because it was not finite."""
        if self._precision == "fp16_amp":
            self._scale, self._good_steps = self._scale / 2, 0

    @property
    def collapsed(self) -> bool:
        """Whether the scale fell below 1: then it is not the scale that makes gradients
        overflow."""
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


def use_tf32(on: bool) -> None:
    """Let products and convolutions of fp32 round their inputs to TF32 on a GPU, or neither of
    them.

    torch itself begins with convolutions that do and products that do not.
    """
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def _rounded(
    parts: PipelineParts, trained: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """CPU copies of the weights that are not trained and that bf16 cannot hold."""
    return {
        f"{part}.{key}": value.detach().to("cpu", copy=True)
        for part, module in named_modules(parts).items()
        for key, value in module.named_parameters()
        if f"{part}.{key}" not in trained and not torch.equal(value, value.bfloat16().float())
    }
