"""A random SDXL in one configuration of training, ready to be driven, timed and looked at.

Passes, gradients, transfers, layout and optimizer are the product's own functions; the order is
that of its trainer.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from levers_seen import Evidence
from random_sdxl import SCHEDULER, Shape, make_parts
from step_counter import Phases, StepCounter

from training import seeds
from training.config.run import RunConfig
from training.estimates.flops import ModelConfigs
from training.loop import noise
from training.loop.conditioning import make_time_ids, predict
from training.loop.loss import mse_per_sample, prediction_target, timestep_weights
from training.loop.prefetch import Prefetch, Sender
from training.models.compute import Graphs, apply_compute
from training.models.full_model import trained_parameters
from training.models.tokens import CHUNK_LENGTH
from training.models.unet import named_modules
from training.optimization.offload import Offload
from training.optimization.optim import make_optimizer, optimizer_state
from training.optimization.precision import Arithmetic
from training.seeds import Purpose

PREFETCH_THREAD = "batches"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One configuration to measure."""

    run: RunConfig
    """Precision, layout, micro-batch; nothing of it `auto`."""
    fused: bool = False
    """The product's optimizer; else torch's AdamW as it comes."""
    sync: bool = True
    """Ask after every micro-step whether the loss is a number, as bigASP's code does."""
    sent_ahead: bool = False
    """Batches are pinned and sent by the thread that makes them; else the loop moves one tensor
    after the other."""
    one_shape: bool = False
    """All micro-batches have the first one's bucket and length of text."""


Batch = dict[str, torch.Tensor]
Sent = tuple[Batch, torch.cuda.Event | None]


class Bench:
    """A model in one variant, ready to train."""

    def __init__(
        self, variant: Variant, device: torch.device, *, tiny: bool, backend: str = "inductor"
    ) -> None:
        """Build it as `training/loop/startup.py` does.

        Args:
            variant: What to build.
            device: Where it trains.
            tiny: A small model of the same classes.
            backend: What compiles graphs, by torch's name.
        """
        self.variant, self.device, self.phases = variant, device, Phases(device)
        # A pass without gradients has graphs of its own; those of a tiny model take longer than all
        # the rest of it.
        self.validates_eagerly = backend == "eager"
        self.parts = make_parts(device, tiny=tiny)
        run = variant.run
        for module in named_modules(self.parts).values():
            module.train(False)
        self.parameters = trained_parameters(self.parts, text_encoder=True, text_encoder_2=False)
        self.configs = ModelConfigs(
            family="sdxl", unet=dict(self.parts.unet.config),
            text_encoders=tuple(encoder.config.to_dict() for encoder in self.parts.text_encoders),
        )  # fmt: skip
        torch._dynamo.utils.counters.clear()
        self.graphs, self.num_graphs = Graphs() if run.compute.compile else None, 0
        apply_compute(self.parts, run.compute, backend=backend)
        self.arithmetic = Arithmetic(run, self.parts, self.parameters, self.parameters)
        self.optimizer = (
            make_optimizer(run.optimizer, self.arithmetic.weights)
            if variant.fused
            # As it comes on a GPU; on a CPU it would step one weight after the other.
            else torch.optim.AdamW(
                self.arithmetic.weights.values(), lr=1e-4, weight_decay=0.1, foreach=True
            )
        )
        self.signal = noise.alphas_cumprod(SCHEDULER).to(device)
        self.weights = timestep_weights(run.loss, self.signal, "epsilon")
        self.sender, self.worker = (
            Sender(device),
            ThreadPoolExecutor(1, thread_name_prefix=PREFETCH_THREAD),
        )
        self.offloader = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.counter: StepCounter | None = None
        """Is told what arrives, while it counts."""
        self.made_by: set[str] = set()
        """Names of threads that made what the loop was given, as sent as it was."""

    def close(self) -> None:
        """End the threads."""
        self.worker.shutdown()
        self.offloader.shutdown()
        if self.graphs is not None:
            self.graphs.close()

    def warm_up(self, shapes: Sequence[Shape]) -> None:
        """A step over all sizes that will come; what is compiled later is late."""
        distinct = list(dict.fromkeys(shapes))
        self.steps(distinct, len(distinct))
        self.num_graphs = 0 if self.graphs is None else self.graphs.new()[0]
        self.phases.take()

    def draws(self, shapes: Sequence[Shape]) -> "Prefetch[Sent]":
        """Micro-batches of these shapes, made ahead; a context manager."""
        return Prefetch(
            self._make, enumerate(shapes), self.worker, self.variant.run.compute.prefetch
        )

    def steps(self, shapes: Sequence[Shape], accumulate: int) -> None:
        """Optimizer steps of `accumulate` micro-batches each."""
        with self.draws(shapes) as draws:
            for _ in range(0, len(shapes), accumulate):
                self.step(draws, accumulate)

    def step(
        self, draws: "Prefetch[Sent]", accumulate: int, copied: "Future[object] | None" = None
    ) -> None:
        """One optimizer step, which changes nothing before a checkpoint has been copied."""
        phase, gradients = self.phases.phase, self.arithmetic.gradients
        losses = torch.zeros(accumulate, device=self.device)
        with phase("reduction"):
            gradients.begin()
        for number in range(accumulate):
            if number == accumulate - 1:
                gradients.expect_last()
            with phase("data"):
                sent = next(draws)
            with phase("host-to-device"):
                batch = self._receive(sent)
            with phase("forward"):
                loss = self._loss(batch)
                losses[number] = loss.detach()
                if self.variant.sync and bool(loss.isnan()):
                    raise FloatingPointError(f"loss {loss.item()} of a random model")
            with phase("backward"):
                self.arithmetic.backward(loss / accumulate)
            with phase("reduction"):
                gradients.end_round(1)
        with phase("reduction"):
            gradients.finish()
        with phase("optimizer"):
            *_, norm = torch.cat([losses, self.arithmetic.norm().reshape(1)]).tolist()  # the log's
            if copied is not None:
                copied.result()
            self.arithmetic.unscale_and_clip(norm, self.variant.run.optimizer.max_grad_norm)
            self.arithmetic.step(self.optimizer)

    def checkpoint_stall_s(self, shapes: Sequence[Shape]) -> float:
        """Seconds by which a step is longer beside which a checkpoint is copied, after one
        without."""
        times = []
        for copies in (False, True):
            with self.draws(shapes) as draws:
                self.phases.take()
                copied = self.offloader.submit(self._copy, Offload(self.device)) if copies else None
                self.step(draws, len(shapes), copied)
                times.append(sum(self.phases.take().values()))
        return max(0.0, times[1] - times[0])

    @torch.no_grad()
    def validation_s(self, shape: Shape) -> float:
        """Seconds of the forward pass of one micro-batch as validation does it."""
        with self.draws([shape]) as draws:
            batch = self._receive(next(draws))
        with torch.compiler.set_stance("force_eager" if self.validates_eagerly else "default"):
            for _ in range(2):  # the first one compiles
                self.phases.take()
                with self.phases.phase("forward"):
                    self._loss(batch)
        return self.phases.take()["forward"]

    def inspect(self, shapes: Sequence[Shape]) -> Evidence:
        """One step of these micro-batches, looked at from all sides; compiled graphs are not used
        in it."""
        late = 0 if self.graphs is None else self.graphs.new()[0]
        present = [*self._held(), self.signal, self.weights, self.arithmetic.gradients.flat]
        counter = self.counter = StepCounter(self.device, present, self.phases)
        unet, counted, outputs, kept, pinned = (
            self.parts.unet,
            [0],
            list[torch.Tensor](),
            list[bool](),
            list[bool](),
        )
        pin = self.sender.pin

        def pinned_by(tensor: torch.Tensor) -> torch.Tensor:
            pinned.append((result := pin(tensor)).is_pinned())
            return result

        def passed(*_: object) -> None:
            counted[0] += 1

        self.sender.pin = pinned_by  # type: ignore[method-assign]
        self.made_by.clear()
        convolution = unet.down_blocks[0].resnets[0].conv1
        block = unet.mid_block.attentions[0].transformer_blocks[0]
        with self.draws(shapes) as draws:
            hooks = [
                convolution.register_forward_hook(
                    lambda _module, _inputs, output: outputs.append(output.detach())
                ),
                # Before the call: what is computed again may end early, once it has made all that
                # is asked for.
                block.register_forward_pre_hook(passed),
                # Before the sum of all of them is used up; a tensor's own hook comes after ours.
                unet.conv_out.register_forward_pre_hook(
                    lambda *_: kept.append(self._keeps_own_gradients())
                ),
            ]
            try:
                with counter:
                    self.step(draws, len(shapes))
            finally:
                self.counter, self.sender.pin = None, pin  # type: ignore[method-assign]
                for hook in hooks:
                    hook.remove()
        activation = outputs[0]
        return Evidence(
            num_micro_steps=len(shapes),
            operations=counter.operations,
            host_syncs=tuple(counter.host_syncs),
            blocking_copies=tuple(counter.blocking_copies),
            optimizer_bytes=counter.bytes_moved["optimizer"],
            num_attentions=sum(hasattr(module, "to_q") for module in unet.modules()),
            activation=activation.dtype,
            channels_last=activation.is_contiguous(memory_format=torch.channels_last)
            and not activation.is_contiguous(),
            batch_size=len(activation),
            forwards_per_pass=counted[0] / len(shapes),
            weights=unet.conv_in.weight.dtype,
            stepped=next(iter(self.arithmetic.weights.values())).dtype,
            gradients=self.arithmetic.gradients.flat.dtype,
            keeps_own_gradients=any(kept) or self._keeps_own_gradients(),
            made_ahead=bool(self.made_by)
            and all(name.startswith(PREFETCH_THREAD) for name in self.made_by),
            pinned=all(pinned) if pinned and self.device.type == "cuda" else None,
            num_graphs=self.num_graphs,
            num_late_graphs=late,
            num_graph_breaks=sum(torch._dynamo.utils.counters["graph_break"].values()),
        )

    def _keeps_own_gradients(self) -> bool:
        return any(
            parameter.grad is not None and parameter.dtype != torch.float32
            for parameter in self.parameters.values()
        )

    def _held(self) -> Iterator[torch.Tensor]:
        """What is on the device between two steps, of the model and the optimizer."""
        for module in named_modules(self.parts).values():
            yield from (*module.parameters(), *module.buffers())
        yield from self.arithmetic.weights.values()
        for state in self.optimizer.state.values():
            # Steps are counted on the device by fused kernels only.
            yield from (value for value in state.values() if value.dim() or self.variant.fused)

    def _copy(self, offload: Offload) -> object:
        """What a checkpoint copies, as `training/loop/checkpoint.py` does."""
        named = self.arithmetic.weights
        moments = optimizer_state(self.optimizer, named) if self.variant.fused else {}
        return offload.copy(named), offload.copy(moments)

    def _make(self, item: tuple[int, Shape]) -> Sent:
        """A micro-batch drawn on the CPU, and on its way to the device where the variant says
        so."""
        number, (bucket, num_chunks) = item
        size = self.variant.run.batch.micro_batch_size
        random = torch.Generator().manual_seed(
            seeds.integer(0, Purpose.NOISE, "throughput", number)
        )
        shape = (size, 4, bucket.height // 8, bucket.width // 8)
        sides = torch.tensor([bucket], dtype=torch.float32).expand(size, 2).contiguous()
        batch = {name: torch.randn(shape, generator=random) for name in ("latents", "noise")}
        batch["timesteps"] = torch.randint(0, len(self.signal), (size,), generator=random)
        for name in ("ids_1", "ids_2"):
            batch[name] = torch.randint(
                0, 49_000, (size, num_chunks, CHUNK_LENGTH), generator=random
            )
        batch |= {
            "original_size": sides,
            "crop_top_left": torch.zeros_like(sides),
            "target_size": sides.clone(),
        }
        if self.variant.sent_ahead:
            batch = {name: self.sender.send(tensor) for name, tensor in batch.items()}
        self.made_by.add(threading.current_thread().name)
        return batch, self.sender.sent() if self.variant.sent_ahead else None

    def _receive(self, sent: Sent) -> Batch:
        batch, mark = sent
        if self.variant.sent_ahead:
            self.sender.receive(mark, batch.values())
        else:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if self.counter is not None:
            self.counter.place(batch.values())
        return batch

    def _loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss of a micro-batch, 0-d."""
        latents, draw, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        time_ids = make_time_ids(
            batch["original_size"], batch["crop_top_left"], batch["target_size"]
        )
        with self.arithmetic.autocast():
            noised = noise.add_noise(latents, draw, timesteps, self.signal)
            prediction = predict(
                self.parts, noised, timesteps, (batch["ids_1"], batch["ids_2"]), time_ids
            )
        target = prediction_target("epsilon", latents, draw, timesteps, self.signal)
        return (mse_per_sample(prediction, target, None) * self.weights[timesteps]).mean()
