"""Moving in and out: latents of other trainers become a first generation, current generations
become their files."""

from dataclasses import dataclass
from pathlib import Path

from assets import latents
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training import commit
from training.errors import DataError
from training.latents import exchange as formats
from training.latents.encoder import placement_of
from training.latents.files import from_bfloat16
from training.latents.generations import generations, read_generation
from training.latents.importing import Format, LatentImport, find_files
from training.models.base_model import config_folder
from training.names import ShardKey
from training.progress import track

_ROWS_AT_A_TIME = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of the kept images of an encoding."""

    num_images: int
    """Taken over."""
    refused: list[tuple[str, int]]
    """Reasons and counts of the others, the most frequent first."""
    shards: list[str]
    """Partitions that have a first generation now."""
    error: float
    """Mean absolute difference of the checked images and their decoded latents, 0-255."""


def import_latents(
    store: Store, encoding: str, folder: Path, kind: Format, index: Path | None = None
) -> Imported:
    """Make a first generation of the latents in `folder`; a run of `latents` encodes what is
    missing.

    Args:
        store: The workspace; its `bucket_assignments` of the encoding must be there.
        encoding: Has the same buckets, and a VAE of the same latents, as the trainer that made the
            files.
        folder: Searched with all that is below it.
        kind: Format of the files.
        index: CSV `file,source_id` for files whose names do not follow from their images'; else
            kohya's names must, relative to `folder` as the images' are to their source.

    Raises:
        ConfigError: no such encoding, folder or index, or bigASP's files without an index.
        DataError: there are latents already, no file fits any image, or the files are not of these
            images and VAE.
    """
    from training.models.vae import Vae

    config = store.config.encoding(encoding)
    files = find_files(folder, kind, index)
    present = [
        part for part in store.tables.parts("latents") if ShardKey.parse(part).encoding == encoding
    ]
    if present:
        raise DataError(
            f"encoding {encoding!r} has latents already ({present[0]}): import into an encoding of its own, "
            "[encodings.NAME] in foundry.toml"
        )
    if store.manifest("bucket_assignments", encoding) is None:
        raise DataError(
            f"encoding {encoding!r} has no buckets yet: run `foundry run --select bucket_assignments` first"
        )
    names = dict(store.read("selected_images", ["image_id", "source_id"]).iter_rows())
    shards = store.read("bucket_assignments", ["shard"], [encoding])["shard"].unique().sort()
    work = LatentImport(
        files=files, kind=kind, encoding=config,
        vae=Vae.load(store.models.vae_folder(encoding), "cpu"), vae_digest=store.models.vae_digest(encoding),
    )  # fmt: skip
    made = {}
    keys = [str(ShardKey(encoding, shard)) for shard in shards]
    for key in track(keys, "shards", len(keys)):
        frame, entries = work.shard(
            store.tables.folder("latents", key), latents.pictures(store, key), names
        )
        if frame.height:
            report = {"generation": "g0001", "numbers": {"imported": frame.height}}
            made[key] = Made(frame=frame, files=entries, report=report)
    error = work.check(store.config.decode)
    for key, item in made.items():
        # Without inputs it is never current: the next run copies these rows, and encodes what is
        # missing.
        store.writer.commit(
            latents.latents,
            key,
            item,
            {"inputs": {}, "models": {"vae": work.vae_digest}},
            seconds=0.0,
        )
    return Imported(
        num_images=work.num_images,
        refused=work.refused.most_common(),
        shards=list(made),
        error=error,
    )


def export_latents(store: Store, encoding: str, folder: Path) -> int:
    """Write the current generations as sd-scripts caches them, one `.npz` an image, as its source
    has the images.

    A file that is there already is replaced, each in one piece.

    Returns:
        How many were written.

    Raises:
        ConfigError: no such encoding.
        DataError: it has no latents, or an image's name leads out of `folder`.
    """
    store.config.encoding(encoding)
    parts = [part for part in store.tables.parts("latents") if part.startswith(f"{encoding}|")]
    if not parts:
        raise DataError(
            f"encoding {encoding!r} has no latents: run `foundry run --select latents` first"
        )
    named = store.read("selected_images", ["image_id", "source", "source_id"])
    names = {image_id: (source, source_id) for image_id, source, source_id in named.iter_rows()}
    sdxl = (config_folder(store.models.path("base")) / "text_encoder_2").is_dir()
    written = 0
    for part in track(parts, "shards", len(parts)):
        shard = store.tables.folder("latents", part)
        generation = read_generation(shard, max(generations(shard)))
        files = generation.open_files()
        for (name,), rows in generation.table().group_by("file", maintain_order=True):
            file = files[str(name)]
            factor = float(file.metadata["scaling_factor"])
            for piece in rows.iter_slices(_ROWS_AT_A_TIME):
                bits, _ = file.gather(piece["row"].to_list())
                for row, values in zip(
                    piece.iter_rows(named=True), from_bfloat16(bits), strict=True
                ):
                    placement = placement_of(row)
                    source, source_id = names[row["image_id"]]
                    stem = str(Path(source_id).with_suffix(""))
                    target = (
                        folder / source / formats.kohya_name(stem, placement.original, sdxl=sdxl)
                    )
                    if not target.resolve().is_relative_to(folder.resolve()):
                        raise DataError(f"the name {source_id!r} of an image leads out of {folder}")
                    with commit.atomic_file(target) as temporary, temporary.open("wb") as opened:
                        formats.write_kohya(opened, values, placement, factor)
                    written += 1
    return written
