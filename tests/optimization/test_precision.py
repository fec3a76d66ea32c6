"""Each precision computes and keeps what it says, and a run goes on from its state bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.config.run import BatchConfig, ComputeConfig, OptimizerConfig, RunConfig
from training.loop.conditioning import make_time_ids, predict
from training.models.compute import apply_compute
from training.models.full_model import trained_parameters
from training.models.saving import save_diffusers_folder
from training.models.unet import load_pipeline_parts
from training.optimization.ema import Ema
from training.optimization.optim import (
    make_optimizer,
    optimizer_state,
    restore_optimizer,
    step_groups,
)
from training.optimization.precision import Arithmetic

PRECISIONS = ["fp32", "fp16_amp", "bf16_amp", "bf16"]
ADAMW = OptimizerConfig(learning_rate=1e-3)


def run_config(precision, global_batch_size=1):
    batch = BatchConfig(global_batch_size=global_batch_size, micro_batch_size=1)
    return RunConfig(encoding="tiny", precision=precision, batch=batch)


class Run:
    """The pieces that the training loop holds, and one step of it."""

    def __init__(self, folder, precision, *, train_text=True, compute=None):
        self.parts = load_pipeline_parts(folder, "cpu")
        self.parameters = trained_parameters(
            self.parts, text_encoder=train_text, text_encoder_2=False
        )
        if compute is not None:
            apply_compute(
                self.parts, compute, backend="eager"
            )  # capture; making kernels takes minutes on two cores
        self.arithmetic = Arithmetic(
            run_config(precision), self.parts, self.parameters, self.parameters
        )
        self.optimizer = make_optimizer(ADAMW, self.arithmetic.weights)
        self.ema = Ema(self.arithmetic.values(), 10)

    def loss(self, number, time_ids=None):
        torch.manual_seed(number)
        noised, target = torch.randn(2, 2, 4, 4, 4)
        ids = [torch.randint(0, 200, (2, 1, 77)) for _ in self.parts.text_encoders]
        sizes = torch.tensor([[1023.0, 800, 0, 7, 640, 896]] * 2) if time_ids is None else time_ids
        with self.arithmetic.autocast():
            prediction = predict(self.parts, noised, torch.tensor([3, 900]), ids, sizes)
        return (prediction.float() - target).square().mean()

    def step(self, number):
        self.arithmetic.gradients.begin()
        for micro_batch in range(2):
            self.arithmetic.backward(self.loss(2 * number + micro_batch) / 2)
        norm = self.arithmetic.norm().item()
        self.arithmetic.unscale_and_clip(norm, 1.0)
        self.arithmetic.step(self.optimizer, lambda weights: self.ema.update(weights, 2))
        return norm


def equal(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_three_steps_saved_and_three_more_are_six_straight(tiny_sdxl, tmp_path, precision):
    straight = Run(tiny_sdxl, precision)
    for number in range(6):
        straight.step(number)
    first = Run(tiny_sdxl, precision)
    for number in range(3):
        first.step(number)
    overrides = {**first.arithmetic.frozen, **first.arithmetic.values()}
    save_diffusers_folder(first.parts, tmp_path, torch.float32, overrides)
    second = Run(tmp_path, precision)
    moments = optimizer_state(first.optimizer, first.arithmetic.weights)
    restore_optimizer(second.optimizer, second.arithmetic.weights, moments)
    second.ema.restore(first.ema.shadows)
    second.arithmetic.restore_scaler(first.arithmetic.scaler_state())
    for number in range(3, 6):
        second.step(number)
    assert equal(straight.arithmetic.values(), second.arithmetic.values())
    assert equal(straight.ema.shadows, second.ema.shadows)
    assert equal(straight.parameters, second.parameters)
    assert straight.arithmetic.scaler_state() == second.arithmetic.scaler_state()
    assert not equal(straight.ema.shadows, straight.arithmetic.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_follows_the_fp32_gradients(tiny_sdxl, precision):
    plain, other = Run(tiny_sdxl, "fp32"), Run(tiny_sdxl, precision)
    norms = [run.step(0) for run in (plain, other)]
    # 16 bits leave the direction: bf16 has 8 bits of mantissa.
    cosine = torch.nn.functional.cosine_similarity(
        plain.arithmetic.gradients.flat, other.arithmetic.gradients.flat, dim=0
    ).item()
    assert cosine > 0.995
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert other.arithmetic.gradients.flat.dtype == torch.float32
    assert all(weight.dtype == torch.float32 for weight in other.arithmetic.weights.values())


def test_gradients_are_autograds_own_and_one_buffer(tiny_sdxl):
    run = Run(tiny_sdxl, "fp32")
    gradients = run.arithmetic.gradients
    wanted = torch.autograd.grad(run.loss(5), list(run.parameters.values()))
    run.arithmetic.backward(run.loss(5))
    assert torch.equal(gradients.flat, torch.cat([gradient.reshape(-1) for gradient in wanted]))
    gradients.flat.fill_(2.0)
    assert all((parameter.grad == 2).all() for parameter in run.parameters.values()), (
        "they are views of it"
    )
    norm = run.arithmetic.norm().item()
    assert norm == pytest.approx(2 * gradients.flat.numel() ** 0.5)
    run.arithmetic.unscale_and_clip(norm, 0)
    assert (gradients.flat == 2).all(), "0 never clips"
    run.arithmetic.unscale_and_clip(norm, 1.0)
    assert gradients.flat.norm().item() == pytest.approx(1, rel=1e-4)
    gradients.begin()
    assert not gradients.flat.any()


def test_clipping_is_torchs_own():
    parameters = [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(2, 3))]
    ours = Arithmetic(run_config("fp32"), None, dict(zip("ab", parameters, strict=True)), {})
    theirs = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    for scale, max_norm in ((0.1, 1.0), (10.0, 1.0), (10.0, 2.5)):
        for mine, other in zip(parameters, theirs, strict=True):
            mine.grad.normal_().mul_(scale)
            other.grad = mine.grad.clone()
        wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        norm = ours.norm().item()
        assert norm == pytest.approx(wanted.item(), rel=1e-6)
        ours.unscale_and_clip(norm, max_norm)
        for mine, other in zip(parameters, theirs, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)


def test_pure_bf16_trains_what_bf16_weights_alone_would_round_away(tiny_sdxl):
    run = Run(tiny_sdxl, "bf16")
    assert {parameter.dtype for parameter in run.parts.unet.parameters()} == {torch.bfloat16}
    name = "unet.conv_in.weight"
    start = run.arithmetic.values()[name]
    # One step is a thousandth of what bf16 can hold next to 1; many of them must arrive.
    weights = run.arithmetic.weights
    groups = [{"params": [weights[name] for name in names]} for names in step_groups(weights)]
    small = torch.optim.SGD(groups, lr=2.0**-19)
    for _ in range(16):
        for weight in weights.values():
            weight.grad.fill_(-1.0)
        run.arithmetic.step(small)
    wanted = start.clone()
    for _ in range(16):
        wanted += 2.0**-19
    assert torch.equal(run.arithmetic.values()[name], wanted)
    assert torch.equal(run.parameters[name].data, wanted.bfloat16())


def test_pure_bf16_keeps_what_it_does_not_train_as_it_was(tiny_sdxl, tmp_path):
    before = load_pipeline_parts(tiny_sdxl, "cpu").text_encoders[1].state_dict()
    run = Run(tiny_sdxl, "bf16", train_text=False)
    run.step(0)
    save_diffusers_folder(
        run.parts, tmp_path, torch.float32, {**run.arithmetic.frozen, **run.arithmetic.values()}
    )
    after = load_pipeline_parts(tmp_path, "cpu").text_encoders[1].state_dict()
    assert equal(before, after)
    assert run.arithmetic.frozen.keys().isdisjoint(run.arithmetic.weights)
    assert not Run(tiny_sdxl, "bf16_amp").arithmetic.frozen


def test_averages_are_shown_in_the_models_precision_and_leave_it_as_it_was(tiny_sdxl):
    run = Run(tiny_sdxl, "bf16")
    run.step(0)
    before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    with run.ema.swapped(run.parameters):
        for name, shadow in run.ema.shadows.items():
            assert torch.equal(run.parameters[name], shadow.bfloat16())
        run.loss(3)
    assert equal(before, run.parameters)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sizes_reach_the_embedder_in_fp32(tiny_sdxl, precision):
    # bf16 holds 1,022 and 1,024 but not 1,023; fp16 not 4,097.
    run = Run(tiny_sdxl, precision)
    seen = []
    run.parts.unet.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pairs = [torch.tensor([[value, 4097.0]]) for value in (1023.0, 7.0, 640.0)]
    losses = [run.loss(1, make_time_ids(*(torch.cat([pair] * 2) for pair in pairs)))]
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == [1023, 4097, 7, 4097, 640, 4097] * 2
    pairs[0] = torch.tensor([[1024.0, 4097.0]])
    losses.append(run.loss(1, make_time_ids(*(torch.cat([pair] * 2) for pair in pairs))))
    assert losses[0] != losses[1]


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4))
def test_the_scale_moves_as_torchs_scaler_does(finite, interval):
    from training.optimization import precision

    parameter = torch.nn.Parameter(torch.zeros(2))
    theirs = torch.amp.GradScaler("cpu", growth_interval=interval)
    sgd = torch.optim.SGD([parameter], lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_GROWTH_SAMPLES", interval * 7 + 3)
        ours = scaler(parameter, 7)
        for good in finite:
            theirs.scale(parameter.sum() * (1.0 if good else float("inf"))).backward()
            theirs.step(sgd)
            theirs.update()
            ours.step(sgd) if good else ours.skip()
            parameter.grad.zero_()
            assert ours.scaler_state()["scale"] == theirs.get_scale()
            again = scaler(torch.nn.Parameter(torch.zeros(2)), 7)
            again.restore_scaler(ours.scaler_state())
            assert again.scaler_state() == ours.scaler_state()


def scaler(parameter, global_batch_size=1, **options):
    """An `fp16_amp` arithmetic of one parameter; it reads no model."""
    return Arithmetic(
        run_config("fp16_amp", global_batch_size),
        None,
        {"unet.w": parameter},
        {"unet.w": parameter},
        **options,
    )


def test_a_scale_below_one_is_a_collapse():
    ours = scaler(torch.nn.Parameter(torch.zeros(2)))
    assert ours.scaler_state()["scale"] == 65_536
    for _ in range(16):
        ours.skip()
    assert not ours.collapsed
    ours.skip()
    assert ours.collapsed


def test_gradients_are_unscaled_before_they_are_clipped_and_overflow_shows_in_the_norm():
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    ours = scaler(parameter)
    ours.backward(parameter.square().sum() / 2)
    assert parameter.grad.tolist() == [3 * 65_536, 4 * 65_536]
    assert ours.norm().item() == pytest.approx(5)
    ours.unscale_and_clip(5.0, 2.5)
    torch.testing.assert_close(parameter.grad, torch.tensor([1.5, 2.0]), rtol=1e-5, atol=0)
    ours.gradients.begin()
    ours.backward(parameter.sum() * float("inf"))
    assert not ours.norm().isfinite()


class Peers:
    """Stands for the ranks of a run; of them only this one exists."""

    def __init__(self, size):
        self.size = size


def test_the_first_scale_and_its_growth_are_those_of_bigasp_on_any_number_of_ranks():
    """bigASP's DDP: mean over ranks of gradients of the mean over a rank's samples; steps of 2,048
    grow after 244."""
    per_sample = 1e-7
    for ranks in (1, 8):
        own = 2048 // ranks
        theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=500_000 // 2048)
        reference = torch.nn.Parameter(torch.zeros(()))
        theirs.scale((reference * torch.full((own,), per_sample)).mean()).backward()
        ours = scaler(torch.nn.Parameter(torch.zeros(())), 2048, ranks=Peers(ranks))
        parameter = ours.weights["unet.w"]
        ours.backward((parameter * torch.full((own,), per_sample)).sum() / 2048)
        # In 16 bits as large as theirs, though the sum over ranks, which a step is made of, is
        # divided by all samples.
        assert parameter.grad.item() == pytest.approx(reference.grad.item())
        assert ours.norm().item() * ranks == pytest.approx(per_sample)
        for _ in range(243):
            ours.step(torch.optim.SGD([parameter], lr=0.0))
        assert ours.scaler_state()["scale"] == 65_536 * ranks
        ours.step(torch.optim.SGD([parameter], lr=0.0))
        assert ours.scaler_state()["scale"] == 2 * 65_536 * ranks


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tf32_is_one_switch_for_products_and_convolutions(tiny_sdxl, precision):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        torch.backends.cudnn.allow_tf32 = True  # as torch begins
        Run(tiny_sdxl, precision)
        assert [backend.allow_tf32 for backend in backends] == [False, False]
        Run(tiny_sdxl, "tf32")
        assert [backend.allow_tf32 for backend in backends] == [True, True]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@pytest.mark.filterwarnings(
    "ignore:Dynamo detected", "ignore::DeprecationWarning", "ignore:The .grad attribute"
)
@pytest.mark.parametrize(
    ("precision", "mode"),
    [*((precision, "whole") for precision in PRECISIONS), ("bf16", "blocks"),
     *(pytest.param(precision, "blocks", marks=pytest.mark.slow) for precision in PRECISIONS[:-1])],
)  # fmt: skip
def test_every_precision_is_compiled_without_a_break(tiny_sdxl, precision, mode):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain = Run(tiny_sdxl, precision)
    run = Run(tiny_sdxl, precision, compute=ComputeConfig(channels_last=True, compile=mode))
    norms = [one.step(0) for one in (plain, run)]
    assert norms[1] == pytest.approx(norms[0], rel=0.02 if precision != "fp32" else 1e-4)
    assert not counters["graph_break"]
    kinds = {"whole": 1, "blocks": 2}[mode]  # blocks with two attentions, and with one and none
    assert counters["stats"]["unique_graphs"] <= kinds
    run.step(1)
    assert counters["stats"]["unique_graphs"] <= kinds, (
        "a second step of equal sizes compiles nothing"
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ranks_that_share_the_optimizer_lay_their_gradients_out_alike(tiny_sdxl, precision):
    """What one rank steps another does not, and both send the same buffer: element by element of
    the same weights."""
    layouts = []
    for turn in range(2):
        parts = load_pipeline_parts(tiny_sdxl, "cpu")
        apply_compute(parts, ComputeConfig(channels_last=True, compile=False))
        parameters = trained_parameters(parts, text_encoder=False, text_encoder_2=False)
        owned = {
            name: parameters[name] for number, name in enumerate(parameters) if number % 2 == turn
        }
        arithmetic = Arithmetic(run_config(precision), parts, parameters, owned)
        layouts.append([view.stride() for view in arithmetic.gradients.views])
        kernels = [parameter for parameter in parameters.values() if parameter.dim() == 4]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert layouts[0] == layouts[1]
