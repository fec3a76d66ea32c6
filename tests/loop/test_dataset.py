import threading

import numpy as np
import polars as pl
import pytest
import torch

from training import commit
from training.buckets.geometry import Box, Placement, Size
from training.curation.vocabulary import Vocabulary
from training.errors import DamageError, DataError
from training.latents.files import from_bfloat16
from training.latents.generations import read_generation
from training.latents.source import LatentSource
from training.loop import epochs
from training.loop.dataset import Dataset, loss_mask
from training.models.text_encoders import load_tokenizer
from training.runs import run_folder


@pytest.fixture
def open_run(make_run, tiny_sdxl):
    tokenizers = [load_tokenizer(tiny_sdxl / name) for name in ("tokenizer", "tokenizer_2")]

    def open_it(**changes):
        run = make_run(**changes)
        dataset = Dataset(
            run.rows,
            Vocabulary(),
            LatentSource(run.inputs.latents),
            run.config,
            tokenizers,
            0.13025,
        )
        dataset.use_latents(dataset.pin_latents()[0])
        return run, dataset

    return open_it


def one_bucket(dataset, epoch):
    """Rows of one bucket and one number of chunks."""
    chunks = dataset.count_chunks(np.arange(len(dataset.image_ids)), epoch)
    wide = (dataset.buckets == (32, 48)).all(axis=1)
    return np.flatnonzero(wide & (chunks == chunks[np.flatnonzero(wide)[0]]))


def test_a_batch_is_what_the_tables_say(open_run):
    run, dataset = open_run()
    rows = one_bucket(dataset, None)
    assert len(rows) >= 2
    batch = dataset.batch(rows, None)
    assert batch.latents.shape == (len(rows), 4, 4, 6)
    # training_rows: source 64 x 112 for the bucket 32 x 48, resized to 32 x 56, generation 1 crops
    # one column.
    assert batch.original_size.tolist() == [[64, 112]] * len(rows)
    assert batch.crop_top_left.tolist() == [[0, 1]] * len(rows)
    assert batch.target_size.tolist() == [[32, 48]] * len(rows)
    for position, row in enumerate(rows):
        shard = run.rows["shard"][int(row)]
        generation = read_generation(run.inputs.latents / shard, 1)
        place = generation.table().row(
            by_predicate=pl.col("image_id") == batch.image_ids[position], named=True
        )
        mean, _ = generation.open_files()[place["file"]].gather([place["row"]])
        assert np.array_equal(batch.latents[position].numpy(), from_bfloat16(mean[0]))
    assert (batch.zeroed.tolist(), batch.num_truncated) == ([False] * len(rows), 0)
    for ids, tokenizer in zip(batch.ids, dataset.prompt_maker.tokenizers, strict=True):
        assert ids.shape[0] == len(rows)
        words = tokenizer(batch.prompts[0], add_special_tokens=False)["input_ids"][:75]
        assert ids[0, 0, 1 : 1 + len(words)].tolist() == words
    assert batch.ids[0].shape == batch.ids[1].shape


@pytest.mark.parametrize(("rules_version", "left"), [(1, 1), (2, 7)])
def test_a_mirrored_sample_is_told_its_crop_as_it_is_seen(open_run, rules_version, left):
    _, dataset = open_run(rules_version=rules_version)
    rows = one_bucket(dataset, 3)
    before = dataset.batch(rows, 3)
    dataset._geometry = dataset._geometry.copy()
    dataset._geometry[rows[0], -1] = 1
    # Resized to 32 x 56 for 32 x 48, of which one column is cut off on the left: seven on the
    # right.
    after = dataset.batch(rows, 3)
    assert after.crop_top_left.tolist() == [[0, left], *[[0, 1]] * (len(rows) - 1)]
    assert dataset.batch(rows[:1], None).crop_top_left.tolist() == [[0, left]]
    assert torch.equal(after.original_size, before.original_size)
    # Masks are made of the placement itself.
    assert torch.equal(after.mask[0], before.mask[0].flip(-1))


def test_a_sample_does_not_depend_on_its_neighbours_but_on_the_epoch(open_run):
    _, dataset = open_run()
    rows = one_bucket(dataset, 3)
    together = dataset.batch(rows, 3)
    alone = dataset.batch(rows[1:2], 3)
    assert torch.equal(together.latents[1], alone.latents[0])
    assert together.prompts[1] == alone.prompts[0]
    assert torch.equal(together.mask[1], alone.mask[0])
    other = dataset.batch(rows[1:2], 4)
    assert not torch.equal(other.latents, alone.latents)


def test_a_batch_says_what_is_zeroed_and_cut(open_run):
    changes = {"empty_prob": 0.5, "empty_as": "zeros", "max_chunks": 1, "mean_tags": 0}
    _, dataset = open_run(**{f"prompts.{name}": value for name, value in changes.items()})
    rows = one_bucket(dataset, 2)
    batch = dataset.batch(rows, 2)
    assert batch.zeroed.tolist() == [prompt == "" for prompt in batch.prompts]
    assert 0 < batch.zeroed.sum() < len(rows)
    whole = sum(len(dataset.prompt_maker.tokenizers[0](prompt.text, add_special_tokens=False)["input_ids"])
                for prompt in dataset.prompt_maker.prompts(rows.tolist(), 2))  # fmt: skip
    kept = sum(len(made.tokens) for made in dataset.prompt_maker.make(rows.tolist(), 2))
    assert batch.num_truncated == whole - kept > 0


def test_the_posterior_is_drawn_around_the_mean_with_its_variance(open_run):
    _, dataset = open_run(**{"prompts.max_chunks": 1})
    rows = one_bucket(dataset, 0)
    mean = dataset.batch(rows, None).latents
    draws = torch.stack([dataset.batch(rows, epoch).latents - mean for epoch in range(40)])
    # write_generation stores a log-variance of -4: a standard deviation of exp(-2).
    assert draws.std().item() == pytest.approx(np.exp(-2), rel=0.05)
    assert draws.mean().abs().item() < 0.01


def test_latents_without_log_variance_are_the_mean(open_run, write_generation):
    run, dataset = open_run(**{"prompts.max_chunks": 1})
    for shard in ("s000000", "s000001"):
        rows = run.rows.filter(pl.col("shard") == shard)
        write_generation(run.inputs.latents / shard, 2, rows, log_variance=False)
    dataset.use_latents(dataset.pin_latents()[0])
    rows = one_bucket(dataset, 0)
    batch = dataset.batch(rows, 0)
    assert torch.equal(batch.latents, dataset.batch(rows, None).latents)
    assert batch.crop_top_left.tolist() == [[0, 2]] * len(rows)


def test_missing_latents_are_counted_over_all_shards(open_run, write_generation):
    run, dataset = open_run()
    for shard, gone in (("s000000", 3), ("s000001", 2)):
        folder = run.inputs.latents / shard
        (folder / "g0001.json").unlink()
        write_generation(folder, 2, run.rows.filter(pl.col("shard") == shard)[gone:])
    with pytest.raises(DataError, match=r"^5 of 27 images .* have no latents"):
        dataset.pin_latents()


def test_latents_of_another_bucket_plan_are_refused(open_run):
    run, dataset = open_run()
    table = run.rows.with_columns(bucket_height=pl.lit(40, pl.Int32))
    other = Dataset(table, Vocabulary(), dataset.latents, run.config, (), 0.13025)
    with pytest.raises(DataError, match="27 images lie in another bucket"):
        other.use_latents(other.pin_latents()[0])


def test_a_set_without_training_images_is_refused(open_run):
    run, dataset = open_run()
    with pytest.raises(DataError, match="none with split 'train'"):
        Dataset(
            run.rows.with_columns(split=pl.lit("validation")),
            Vocabulary(),
            dataset.latents,
            run.config,
            (),
            0.13025,
        )


def test_an_epoch_keeps_the_generation_it_began_with(open_run, write_generation):
    run, dataset = open_run()

    def open_at(epoch):
        pins, _ = epochs.prepare_epoch(run.folder, epoch, dataset, run.config, "f")
        order = epochs.open_epoch(run.folder, epoch, 0, dataset)
        assert sorted(order.samples.tolist()) == dataset.train_rows.tolist()
        return {shard: pin["generation"] for shard, pin in pins.items()}

    assert open_at(0) == {"s000000": 1, "s000001": 1}
    write_generation(
        run.inputs.latents / "s000001", 2, run.rows.filter(pl.col("shard") == "s000001")
    )
    assert open_at(0) == {"s000000": 1, "s000001": 1}
    assert open_at(1) == {"s000000": 1, "s000001": 2}
    # A lost order is made again, with the same pins and the same bytes.
    path = run.folder / run_folder.EPOCHS / "0.npz"
    before = path.read_bytes()
    path.unlink()
    assert open_at(0) == {"s000000": 1, "s000001": 1}
    assert path.read_bytes() == before


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """Names of this test's latent files, each as often as all its bytes were read, and the thread
    that did.

    Threads of earlier tests may still be at theirs.
    """
    found, whole = [], commit.sha256_file

    def spy(path):
        if (
            path.suffix == ".safetensors"
            and not path.name.startswith(".")
            and path.is_relative_to(tmp_path)
        ):
            found.append((path.name, threading.current_thread().name))
        return whole(path)

    monkeypatch.setattr(commit, "sha256_file", spy)
    return found


def open_epoch(run, dataset, epoch):
    epochs.prepare_epoch(run.folder, epoch, dataset, run.config, "f")
    return epochs.open_epoch(run.folder, epoch, 0, dataset)


def all_files(run, pattern="*/g0001-*.safetensors"):
    return sorted(path.name for path in run.inputs.latents.glob(pattern))


def test_a_latent_file_is_checked_once_in_all_epochs_of_a_process(
    open_run, write_generation, hashed
):
    run, dataset = open_run(**{"prompts.max_chunks": 1})
    for epoch in range(3):
        order = open_epoch(run, dataset, epoch)
        for row in [*dataset.validation_rows, *order.samples]:
            dataset.batch(np.array([row]), epoch)
    assert sorted(name for name, _ in hashed) == all_files(run)
    maps = {number: dataset._open(number)._map for number in range(len(dataset._files))}
    hashed.clear()
    write_generation(
        run.inputs.latents / "s000001", 2, run.rows.filter(pl.col("shard") == "s000001")
    )
    order = open_epoch(run, dataset, 3)
    for row in order.samples:
        dataset.batch(np.array([row]), 3)
    assert sorted(name for name, _ in hashed) == all_files(run, "s000001/g0002-*.safetensors")
    kept = [number for number, (shard, _) in enumerate(dataset._files) if shard == "s000000"]
    assert kept
    assert all(dataset._open(number)._map is maps[number] for number in kept)
    assert {entry.name for _, entry in dataset.latents._files} == {
        entry.name for _, entry in dataset._files
    }


def test_latent_files_are_checked_ahead_of_their_use_in_its_order(open_run, hashed):
    run, dataset = open_run(**{"prompts.max_chunks": 1})
    order = open_epoch(run, dataset, 0)
    dataset.latents._thread.join(30)
    rows = np.concatenate([dataset.validation_rows, dataset.stable_rows, order.samples])
    numbers = dict.fromkeys(dataset._places[rows, 0].tolist())
    assert [name for name, _ in hashed] == [dataset._files[number][1].name for number in numbers]
    assert {thread for _, thread in hashed} == {"latent-files"}
    hashed.clear()
    for row in order.samples:
        dataset.batch(np.array([row]), 0)
    assert not hashed


def test_a_damaged_latent_file_ends_the_run_before_a_sample_of_it_is_used(open_run):
    run, dataset = open_run(**{"prompts.max_chunks": 1})
    (victim, *_) = all_files(run, "s000001/g0001-*.safetensors")
    path = run.inputs.latents / "s000001" / victim
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    order = open_epoch(run, dataset, 0)
    dataset.latents._thread.join(30)
    for row in order.samples:
        if dataset._files[dataset._places[row, 0]][1].name == victim:
            with pytest.raises(
                DamageError, match=rf"{victim} has SHA-256 .*, its manifest says .*; run `foundry"
            ):
                dataset.batch(np.array([row]), 0)
        else:
            dataset.batch(np.array([row]), 0)
    path.write_bytes(data[:-1])
    with pytest.raises(
        DamageError, match=rf"{victim} has {len(data) - 1} bytes, its manifest says {len(data)}"
    ):
        dataset.use_latents(dataset.pins)


def test_an_epoch_of_another_set_is_refused(open_run):
    run, dataset = open_run()
    epochs.prepare_epoch(run.folder, 0, dataset, run.config, "one set")
    with pytest.raises(DamageError, match="another set or config"):
        epochs.prepare_epoch(run.folder, 0, dataset, run.config, "another set")


PLACEMENT = Placement(
    original=Size(200, 400),
    resized=Size(100, 200),
    crop_top=4,
    crop_left=40,
    bucket=Size(96, 128),
    flip=False,
)


def test_a_mask_of_a_hand_worked_box():
    # Source rows 40..88 and columns 100..132 halve to rows 20..44 and columns 50..66, less the crop
    # rows 16..40 and columns 10..26: latent rows 2..4, and of the columns 1 to 3 six, eight and two
    # eighths.
    mask = loss_mask([Box(40, 100, 88, 132)], PLACEMENT, 8, 0.2)
    assert mask.shape == (12, 16)
    expected = np.ones((12, 16))
    expected[2:5, 1:4] = 1 - 0.8 * np.array([6, 8, 2]) / 8
    np.testing.assert_allclose(mask, expected, atol=1e-6)


def test_a_mask_is_mirrored_with_its_image_and_clipped_to_the_crop():
    boxes = [Box(40, 100, 88, 132), Box(0, 0, 10, 10), Box(190, 330, 200, 400)]
    mask = loss_mask(boxes, PLACEMENT, 8, 0.0)
    flipped = loss_mask(boxes, PLACEMENT._replace(flip=True), 8, 0.0)
    np.testing.assert_array_equal(flipped, mask[:, ::-1])
    assert mask[0, 0] == 1  # the second box is cut off
    assert mask[11, 15] == pytest.approx(1 - 5 / 8 * 3 / 8, abs=1e-6)


def test_overlapping_boxes_count_once():
    box = Box(40, 100, 88, 132)
    np.testing.assert_array_equal(
        loss_mask([box, box], PLACEMENT, 8, 0.5), loss_mask([box], PLACEMENT, 8, 0.5)
    )


def test_latents_of_a_vae_that_scales_otherwise_are_refused(open_run):
    run, dataset = open_run()
    other = Dataset(run.rows, Vocabulary(), dataset.latents, run.config, (), 0.18215)
    with pytest.raises(DataError, match=r"scaled by 0\.13025, the run's VAE scales by 0\.18215"):
        other.use_latents(other.pin_latents()[0])


def test_padding_counts_nothing_also_in_validation(open_run):
    # 96 x 64 fits into 96 x 128 with 32 columns on either side: four latent columns of sixteen.
    placement = Placement(
        Size(192, 128), Size(96, 64), 0, 0, Size(96, 128), False, pad_top=0, pad_left=32
    )
    mask = loss_mask([], placement, 8, 1.0)
    assert mask[:, 4:12].min() == 1
    assert mask[:, :4].max() == mask[:, 12:].max() == 0
    odd = placement._replace(resized=Size(96, 60), pad_left=34, flip=True)
    assert (
        loss_mask([], odd, 8, 1.0)[0].tolist()
        == [0] * 4 + [2 / 8 + 0.5] + [1] * 6 + [6 / 8] + [0] * 4
    )
    # A watermark of the whole image weighs as asked; the padding still weighs nothing.
    assert loss_mask([Box(0, 0, 192, 128)], placement, 8, 0.25).max() == 0.25
    _, dataset = open_run()
    rows = one_bucket(dataset, None)
    assert dataset.batch(rows, None).mask is None
    dataset._geometry = dataset._geometry.copy()
    dataset._geometry[rows[0], 2:4] = (32, 40)
    masked = dataset.batch(rows, None).mask
    assert masked[0].min() == 0
    assert masked[1:].min() == 1
