"""LoRA files of every form add the product of their matrices, to the layers that they name and to
no others."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from original_names import original_tensors
from safetensors.torch import save_file

from training.errors import ModelError
from training.models.lora import add_loras, original_name
from training.models.unet import load_pipeline_parts, named_modules

RANK, ALPHA = 3, 6.0
# Name of the module, and of what kind its weight is.
UNET = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "mid_block.attentions.0.proj_in",
    "up_blocks.0.resnets.1.conv1",
    "up_blocks.0.resnets.1.conv_shortcut",
    "up_blocks.0.upsamplers.0.conv",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.0.resnets.0.time_emb_proj",
    "time_embedding.linear_1",
    "conv_in",
    "conv_out",
]
TEXT = [
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.1.self_attn.out_proj",
    "encoder.layers.2.mlp.fc1",
]


@pytest.fixture
def parts(sdxl_folder):
    return load_pipeline_parts(sdxl_folder, "cpu")


def weights_of(parts):
    return {
        f"{part}.{name}": value.clone()
        for part, module in named_modules(parts).items()
        for name, value in module.state_dict().items()
    }


def full_names(parts, unet=UNET):
    names = [f"unet.{name}" for name in unet] + [f"text_encoder.{name}" for name in TEXT]
    if parts.family == "sdxl":
        names += [f"text_encoder_2.text_model.{name}" for name in TEXT] + [
            "text_encoder_2.text_projection"
        ]
    return names


def matrices(parts, names, seed=0):
    """Random up and down for each of the named modules."""
    generator, weights = torch.Generator().manual_seed(seed), weights_of(parts)
    out = {}
    for name in names:
        shape = weights[f"{name}.weight"].shape
        down = torch.randn((RANK, *shape[1:]), generator=generator)
        up = torch.randn((shape[0], RANK, *([1] * (len(shape) - 2))), generator=generator)
        out[name] = (up, down)
    return out


def by_hand(parts, pairs, factor):
    """All weights of the model with the products added, entry by entry of their definition."""
    wanted = weights_of(parts)
    for name, (up, down) in pairs.items():
        key = f"{name}.weight"
        wanted[key] = wanted[key] + factor * torch.einsum(
            "or,r...->o...", up.reshape(len(up), RANK), down
        )
    return wanted


def kohya(pairs, rename=lambda name: name, alpha=ALPHA, first="lora_te1"):
    tensors = {}
    for name, (up, down) in pairs.items():
        part, _, own = name.partition(".")
        prefix = {"unet": "lora_unet", "text_encoder": first, "text_encoder_2": "lora_te2"}[part]
        if part == "unet":
            own = rename(own)
        elif not own.startswith("text_"):
            own = f"text_model.{own}"
        flat = f"{prefix}_{own.replace('.', '_')}"
        tensors |= {
            f"{flat}.lora_up.weight": up,
            f"{flat}.lora_down.weight": down,
            f"{flat}.alpha": torch.tensor(alpha),
        }
    return tensors


def peft(pairs, infix=""):
    tensors = {}
    for name, (up, down) in pairs.items():
        part, _, own = name.partition(".")
        if part == "text_encoder":
            own = f"text_model.{own}"
        tensors |= {
            f"{part}.{own}.lora_B{infix}.weight": up,
            f"{part}.{own}.lora_A{infix}.weight": down,
        }
    return tensors


def before_peft(pairs):
    """diffusers' names of 2023: attention's matrices hang on processors, the rest on layers of
    their own."""
    tensors = {}
    for name, (up, down) in pairs.items():
        part, _, own = name.partition(".")
        head, _, last = own.removesuffix(".0").rpartition(".")
        if part == "unet" and "attn" in own:
            stem = f"{part}.{head}.processor.{last}_lora"
        elif part == "unet":
            stem = f"{part}.{own}.lora"
        elif "self_attn" in own:
            old = {"q_proj": "to_q", "out_proj": "to_out"}[last]
            stem = f"{part}.text_model.{head.removeprefix('text_model.')}.{old}_lora"
        else:
            full = own if own.startswith("text_") else f"text_model.{own}"
            stem = f"{part}.{full}.lora_linear_layer"
        tensors |= {f"{stem}.up.weight": up, f"{stem}.down.weight": down}
    return tensors


def contiguous(tensors):
    return {name: value.contiguous() for name, value in tensors.items()}


def original_of(parts):
    """diffusers' name of a UNet's module to the original one, from the table of
    tests/tools/original_names.py."""
    prefix = "model.diffusion_model."
    by_value = {value.data_ptr(): name for name, value in parts.unet.state_dict().items()}
    return {
        by_value[value.data_ptr()].removesuffix(".weight"): key.removeprefix(prefix).removesuffix(
            ".weight"
        )
        for key, value in original_tensors(parts).items()
        if key.startswith(prefix) and key.endswith(".weight")
    }


FORMS = {
    "kohya": (lambda pairs, parts: kohya(pairs), ALPHA / RANK),
    "kohya, original names": (
        lambda pairs, parts: kohya(pairs, original_of(parts).__getitem__),
        ALPHA / RANK,
    ),
    "peft": (lambda pairs, parts: peft(pairs), 1.0),
    "peft, named adapter": (lambda pairs, parts: peft(pairs, ".default"), 1.0),
    "diffusers before peft": (lambda pairs, parts: before_peft(pairs), 1.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [0.0, 1.0, -0.5])
def test_a_file_adds_weight_times_its_product(parts, tmp_path, form, weight):
    write, scale = FORMS[form]
    pairs = matrices(parts, full_names(parts))
    save_file(contiguous(write(pairs, parts)), tmp_path / "lora.safetensors")
    before, wanted = weights_of(parts), by_hand(parts, pairs, weight * scale)
    add_loras(parts, [(tmp_path / "lora.safetensors", weight)])
    after = weights_of(parts)
    for name, value in after.items():
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-5, msg=name)
    if weight == 0:
        assert all(torch.equal(after[name], before[name]) for name in after)
    else:
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {f"{name}.weight" for name in pairs}


@pytest.mark.parametrize("first", ["lora_te", "lora_te1"])
def test_sd1_has_one_text_encoder(sd1_folder, tmp_path, first):
    parts = load_pipeline_parts(sd1_folder, "cpu")
    pairs = matrices(parts, full_names(parts))
    save_file(contiguous(kohya(pairs, first=first)), tmp_path / "lora.safetensors")
    wanted = by_hand(parts, pairs, ALPHA / RANK)
    add_loras(parts, [(tmp_path / "lora.safetensors", 1.0)])
    for name, value in weights_of(parts).items():
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


def test_loras_add_up(parts, tmp_path):
    names = full_names(parts, UNET[:2])
    one, other = matrices(parts, names, 1), matrices(parts, names, 2)
    save_file(contiguous(kohya(one)), tmp_path / "one.safetensors")
    save_file(contiguous(peft(other)), tmp_path / "other.safetensors")
    base = weights_of(parts)
    moved = [by_hand(parts, one, 0.5 * ALPHA / RANK), by_hand(parts, other, 2.0)]
    add_loras(parts, [(tmp_path / "one.safetensors", 0.5), (tmp_path / "other.safetensors", 2.0)])
    for name, value in weights_of(parts).items():
        torch.testing.assert_close(
            value, moved[0][name] + moved[1][name] - base[name], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("where", ["metadata", "config"])
def test_pefts_alpha_is_read_from_where_it_is(parts, tmp_path, where):
    pairs = matrices(parts, [f"unet.{name}" for name in UNET])
    path = tmp_path / "adapter_model.safetensors"
    if where == "metadata":
        stated = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 12, "unet.r": RANK})}
        save_file(contiguous(peft(pairs)), path, metadata=stated)
    else:
        tensors = {
            f"base_model.model.{key.removeprefix('unet.')}": value
            for key, value in peft(pairs).items()
        }
        save_file(contiguous(tensors), path)
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"lora_alpha": 12, "r": RANK, "use_dora": False})
        )
    wanted = by_hand(parts, pairs, 12 / RANK)
    add_loras(parts, [(path, 1.0)])
    for name, value in weights_of(parts).items():
        torch.testing.assert_close(value, wanted[name], atol=1e-4, rtol=1e-5, msg=name)


# --- what is refused
# -------------------------------------------------------------------------------------------------


def refused(parts, path, match):
    before = weights_of(parts)
    with pytest.raises(ModelError, match=match):
        add_loras(parts, [(path, 1.0)])
    assert all(torch.equal(value, before[name]) for name, value in weights_of(parts).items())


def test_unknown_keys_are_counted_and_named(parts, tmp_path):
    path = tmp_path / "x.safetensors"
    good = kohya(matrices(parts, ["unet.conv_in"]))
    bad = {f"lora_unet_{n}.hada_w1_a": torch.zeros(1) for n in "dcba"}
    save_file(contiguous(good | bad), path)
    refused(
        parts,
        path,
        r"4 of 7 keys fit no layer of this model \(lora_unet_a.hada_w1_a, .*_b.*, .*_c.hada_w1_a\)",
    )
    save_file(contiguous({key: value for key, value in good.items() if "lora_up" not in key}), path)
    refused(parts, path, r"2 of 2 keys fit no layer")  # one matrix of a pair is nothing
    save_file({"something": torch.zeros(2)}, path)
    refused(parts, path, r"1 of 1 keys fit no layer of this model \(something\)")


def test_a_lora_of_another_model_is_refused(parts, tmp_path):
    path = tmp_path / "x.safetensors"
    pairs = matrices(parts, ["unet.conv_in"])
    up, down = pairs["unet.conv_in"]
    for wrong in ((up, down[:, :2]), (up[:4], down), (up[:, :2], down)):
        save_file(contiguous(kohya({"unet.conv_in": wrong})), path)
        refused(parts, path, r"LoRA of unet.conv_in is .* it was trained on another model")


def test_files_that_cannot_be_added_are_refused(parts, tmp_path):
    refused(parts, tmp_path / "none.safetensors", r"LoRA .*none.safetensors does not exist")
    (tmp_path / "x.pt").write_bytes(b"x")
    refused(parts, tmp_path / "x.pt", "is a pickle")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    refused(parts, tmp_path / "x.safetensors", "cannot be read as safetensors")
    pairs = peft(matrices(parts, ["unet.conv_in"]))
    for option in ("use_rslora", "use_dora"):
        stated = {"lora_adapter_metadata": json.dumps({f"unet.{option}": True})}
        save_file(contiguous(pairs), tmp_path / "y.safetensors", metadata=stated)
        refused(parts, tmp_path / "y.safetensors", f"unet.{option}=True is not applied here")


# --- names
# -----------------------------------------------------------------------------------------------------------

SDXL = {
    "block_out_channels": (8, 16, 16), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64, "use_linear_projection": True,
}  # fmt: skip
SD1 = {
    "block_out_channels": (8, 8, 16, 16), "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip


@pytest.mark.parametrize("layout", [SDXL, SD1])
def test_original_names_are_those_that_diffusers_translates_back(layout):
    """Blocks as many as in the real models: diffusers' converter of single files is the judge."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8, **layout
        )
    norms = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
    tensors, wanted = {}, {}
    for number, (key, value) in enumerate(unet.state_dict().items()):
        name, _, kind = key.rpartition(".")
        head, _, last = name.rpartition(".")
        if last in norms and "resnets" in head:
            original = (
                original_name(f"{head}.conv1", unet.config).removesuffix("in_layers.2")
                + norms[last]
            )
        else:
            original = {"conv_norm_out": "out.0"}.get(name) or original_name(name, unet.config)
        tensors[f"model.diffusion_model.{original}.{kind}"] = torch.tensor(float(number))
        wanted[key] = float(number)
        assert value.is_meta
    found = convert_ldm_unet_checkpoint(tensors, unet.config)
    assert {key: value.item() for key, value in found.items()} == wanted
