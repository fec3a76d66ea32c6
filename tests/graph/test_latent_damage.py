"""What happens to latents on disk is noticed, named, and mended by encoding just that shard
again."""

import json
import shutil

import numpy as np
import pytest
from graph_tools import digests, foundry

from assets import latents
from resources.operations import maintenance
from resources.workspace.store import Store
from training.latents.generations import read_generation


def shard(home):
    return home / "latents" / "sdxl" / "s000000"


def latent_files(home):
    return sorted(shard(home).glob("*.safetensors"))


def cut(home):
    path = latent_files(home)[0]
    path.write_bytes(path.read_bytes()[:-7])
    return path


def flip_a_bit(home):
    path = latent_files(home)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    return path


def swap(home):
    a, b, *_ = latent_files(home)
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    return a


def replace_by_a_foreign_file(home):
    from safetensors.numpy import save_file

    path = latent_files(home)[0]
    save_file({"latents": np.zeros((3, 16, 8, 8), np.float32)}, path)
    return path


@pytest.mark.parametrize("damage", [cut, flip_a_bit, swap, replace_by_a_foreign_file])
def test_damage_is_noticed_and_moved_out_of_the_way(small_copy, damage):
    store, path = Store(small_copy), damage(small_copy)
    problems = maintenance.verify(store)
    assert [problem.kind for problem in problems] == ["damage"]
    assert path.name in problems[0].detail
    (moved,) = maintenance.repair(store, problems)
    assert (moved.parent / path.name).is_file()
    assert not list(shard(small_copy).glob("g0001*"))
    assert store.currency.stale(latents.latents) == ["sdxl|s000000"]


def test_the_damaged_shard_alone_is_encoded_again(small, small_copy):
    def times():
        found = (small_copy / "tables").glob("*/*.json")
        return {
            path: path.stat().st_mtime_ns for path in found if not path.name.startswith("latents.")
        }

    before = times()
    swap(small_copy)
    foundry("verify", "--home", small_copy, "--repair")
    foundry("run", "--home", small_copy, "--select", "latents")
    assert digests(small_copy) == digests(small)
    assert times() == before, "nothing else was made again"
    assert "0 damaged" in foundry("verify", "--home", small_copy).stdout


def test_a_generation_half_written_when_the_power_went_is_passed_over(small, small_copy):
    folder = shard(small_copy)
    first = read_generation(folder, 1)
    for entry in first.manifest.files[1:]:
        shutil.copy(folder / entry.name, folder / entry.name.replace("g0001", "g0002"))
    (folder / ".tmp-g0002.json").write_bytes((folder / "g0001.json").read_bytes()[:100])
    assert "nothing was done" in foundry("run", "--home", small_copy, "--select", "latents").stdout
    assert (
        f"0 damaged, {len(first.manifest.files)} orphans"
        in foundry("verify", "--home", small_copy).stdout
    )
    foundry("latents", "reencode", "--home", small_copy)
    assert read_generation(folder, 2).manifest.rows == first.manifest.rows
    assert digests(small).keys() == digests(small_copy).keys()


def test_a_plan_into_which_nothing_fits_is_told_and_leaves_what_is_there(small_copy):
    config = small_copy / "foundry.toml"
    config.write_text(config.read_text().replace("scale = 8", "scale = 1"))
    done = foundry("run", "--home", small_copy, "--select", "latents", check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("foundry: ")]
    assert "none of" in line
    assert "the largest has" in line
    assert "its smallest bucket is" in line
    assert read_generation(shard(small_copy), 1).manifest.rows


def test_another_vae_makes_its_latents_anew_and_their_files_tell_its_scale(small_copy):
    first = read_generation(shard(small_copy), 1)
    factor = {file.metadata["scaling_factor"] for file in first.open_files().values()}
    other = small_copy / "models" / "other_vae"
    shutil.copytree(Store(small_copy).models.vae_folder("sdxl"), other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "scaling_factor": 0.5}))
    config = small_copy / "foundry.toml"
    text = config.read_text()
    assert 'crop = "random"' in text
    config.write_text(text.replace('crop = "random"', 'crop = "random"\nvae = "models/other_vae"'))
    foundry("run", "--home", small_copy, "--select", "latents")
    second = read_generation(shard(small_copy), 2)
    assert (
        {file.metadata["scaling_factor"] for file in second.open_files().values()}
        == {"0.5"}
        != factor
    )
    assert second.manifest.report["numbers"]["copied from the generation before"] == 0
