import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from training.curation.vocabulary import Vocabulary
from training.errors import TrainingError
from training.latents.source import LatentSource
from training.loop import noise
from training.loop.dataset import Dataset
from training.loop.prefetch import Sender
from training.loop.validate import FixedList, ListLosses
from training.models.text_encoders import load_tokenizer
from training.optimization.ranks import Ranks


def never():
    return False


@pytest.fixture
def worker():
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def losses_of(dataset, worker):
    """`losses_of(rows, losses)`: of a fixed list, once."""

    def measure(rows, losses, stop=never):
        images = FixedList(rows, dataset, Ranks(), 1000)
        return images.losses(losses, worker, Sender(torch.device("cpu")), stop)

    return measure


@pytest.fixture
def dataset(make_run, tiny_sdxl):
    run = make_run(**{"compute.compile": False})
    tokenizers = [load_tokenizer(tiny_sdxl / name) for name in ("tokenizer", "tokenizer_2")]
    dataset = Dataset(
        run.rows, Vocabulary(), LatentSource(run.inputs.latents), run.config, tokenizers, 0.13025
    )
    dataset.use_latents(dataset.pin_latents()[0])
    return dataset


def test_every_image_counts_once_with_its_own_timestep_and_fixed_noise(dataset, losses_of):
    rows = dataset.train_rows
    seen = {}

    def losses(draw):
        assert draw.batch.mask is None
        assert len({prompt.shape for prompt in draw.batch.ids}) == 1
        for image_id, step, own in zip(
            draw.batch.image_ids, draw.timesteps.tolist(), draw.noise, strict=True
        ):
            assert image_id not in seen
            seen[image_id] = (step, own)
        return draw.timesteps.float()

    loss = losses_of(rows, losses).mean
    expected = noise.stratified_timesteps(11, [dataset.image_ids[row] for row in rows], 1000)
    assert {image_id: step for image_id, (step, _) in seen.items()} == {
        dataset.image_ids[row]: step for row, step in zip(rows, expected.tolist(), strict=True)
    }
    # The mean over samples, though micro-batches have 1 to 3 of them.
    assert loss == pytest.approx(expected.double().mean().item())
    first, seen = seen, {}
    losses_of(rows, losses)
    assert all(torch.equal(first[image_id][1], seen[image_id][1]) for image_id in first)


def test_prompts_of_validation_never_change(dataset):
    prompts = [
        [dataset.prompt(row, None) for row in dataset.validation_rows.tolist()] for _ in range(2)
    ]
    assert prompts[0] == prompts[1]


def test_batches_are_made_once_until_latents_change(dataset, worker, monkeypatch):
    images = FixedList(dataset.train_rows, dataset, Ranks(), 1000)
    made, make, seen = [], dataset.batch, []
    monkeypatch.setattr(
        dataset, "batch", lambda rows, epoch: made.append(len(rows)) or make(rows, epoch)
    )

    def measure():
        seen.append([])
        images.losses(lambda draw: seen[-1].append(draw) or draw.timesteps.float(), worker,
                      Sender(torch.device("cpu")), never)  # fmt: skip

    measure()
    assert sum(made) == len(dataset.train_rows)
    made.clear()
    measure()
    assert not made
    assert all(
        torch.equal(one.batch.latents, other.batch.latents) and torch.equal(one.noise, other.noise)
        for one, other in zip(*seen, strict=True)
    )
    dataset.use_latents(dataset.pins)
    measure()
    assert not made, "the same latents, read again at an epoch's border"
    dataset.pins = {shard: pin | {"generation": 2} for shard, pin in dataset.pins.items()}
    measure()
    assert sum(made) == len(dataset.train_rows)


def test_an_empty_list_has_no_loss(losses_of):
    found = losses_of(np.array([], dtype=int), None)
    assert found.mean is None
    assert found.weighted(torch.ones(1000)) is None
    assert found.by_bin(10) == found.by_bucket() == {}


def test_no_gradient_is_recorded(dataset, losses_of):
    def losses(draw):
        assert not torch.is_grad_enabled()
        return torch.zeros(len(draw.timesteps))

    assert losses_of(dataset.validation_rows, losses).mean == 0


def test_losses_by_bin_and_bucket_of_a_hand_worked_list():
    found = ListLosses(
        losses=torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64),
        timesteps=torch.tensor([0, 333, 334, 999]),
        buckets=np.array([[64, 96], [64, 96], [96, 64], [64, 96]]),
        num_timesteps=1000,
    )
    assert found.mean == 3
    # A third of 1,000 steps ends at 333: 334 is the first of the second range.
    assert found.by_bin(3) == {"000-333": 1.5, "334-666": 3.0, "667-999": 6.0}
    assert found.by_bin(1) == {"000-999": 3.0}
    assert found.by_bucket() == {"64x96": 3.0, "96x64": 3.0}
    weights = torch.zeros(1000)
    weights[334], weights[999] = 2.0, 0.5
    assert found.weighted(weights) == (6 + 3) / 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_means_with_a_loss_that_is_not_finite_are_none_and_the_others_stand(bad):
    found = ListLosses(
        losses=torch.tensor([1.0, bad, 3.0, 5.0], dtype=torch.float64),
        timesteps=torch.tensor([0, 10, 500, 510]),
        buckets=np.array([[64, 96], [64, 96], [64, 96], [96, 64]]),
        num_timesteps=1000,
    )
    assert found.not_finite == [1]
    assert found.mean is None
    assert found.weighted(torch.ones(1000)) is None
    assert found.by_bin(2) == {"000-499": None, "500-999": 4.0}
    assert found.by_bucket() == {"64x96": None, "96x64": 5.0}


def test_a_stop_request_is_answered_between_micro_batches(dataset, losses_of):
    passes, answers = [], iter([False, False, True])

    def losses(draw):
        passes.append(len(draw.timesteps))
        return torch.zeros(len(draw.timesteps))

    assert losses_of(dataset.train_rows, losses, lambda: next(answers)) is None
    assert len(passes) == 2


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def sums(draw):
    """Sums that more threads than one round otherwise."""
    generator = torch.Generator().manual_seed(int(draw.timesteps[0]))
    return torch.stack([torch.randn(1 << 20, generator=generator).sum() for _ in draw.timesteps])


def test_threads_of_a_cpu_compute_a_micro_batch_each_with_the_bits_of_one(
    dataset, losses_of, three_threads
):
    torch.set_num_threads(1)
    expected = losses_of(dataset.train_rows, sums).losses
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=20)
    seen = []

    def losses(draw):
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        if len(seen) <= 3:
            together.wait()  # broken unless three are computed at the same time
        return sums(draw)

    found = losses_of(dataset.train_rows, losses).losses
    assert torch.equal(found, expected)
    assert len({thread for thread, *_ in seen} - {threading.get_ident()}) == 3
    assert {rest for _, *rest in seen for rest in [tuple(rest)]} == {(1, False)}
    assert torch.get_num_threads() == 3
    assert ThreadPoolExecutor(1).submit(torch.get_num_threads).result() == 3


def test_a_stop_request_and_an_error_end_threads_that_compute_apart(
    dataset, losses_of, three_threads
):
    passes, answers = [], iter([False, False, True])
    assert (
        losses_of(
            dataset.train_rows, lambda draw: passes.append(1) or sums(draw), lambda: next(answers)
        )
        is None
    )
    assert len(passes) == 2

    def broken(draw):
        raise TrainingError("no such weight")

    with pytest.raises(TrainingError, match="no such weight"):
        losses_of(dataset.train_rows, broken)
    assert torch.get_num_threads() == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("validation")]
