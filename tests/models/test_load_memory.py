"""Loading a model takes its fp32 bytes of private memory and hardly more at any moment, however it
is stored."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from original_names import original_tensors
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training.models.saving import save_diffusers_folder
from training.models.unet import load_pipeline_parts

# Each model is loaded by a process of its own, which has the libraries and has loaded a small one
# before. Its resident memory counts pages of mapped files too, as what is private to a process that
# is the only one to map them does.
RANK = """
import os, sys
from pathlib import Path
from training.models.unet import load_pipeline_parts

def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

small, *models = (Path(name) for name in sys.argv[1:])
for model in models:
    if (child := os.fork()):
        assert os.waitpid(child, 0)[1] == 0
        continue
    load_pipeline_parts(small, "cpu")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    parts = load_pipeline_parts(model, "cpu")
    modules = [parts.unet, parts.vae, *parts.text_encoders]
    num_bytes = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    peak, held = ((resident(kind) - before) / num_bytes for kind in ("VmHWM", "VmRSS"))
    print(model.name, num_bytes, round(peak, 3), round(held, 3), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory, sdxl_folder):
    """An SDXL of 200 MB in fp32 by how it is stored: as folder and as file, in fp32 and fp16."""
    torch.manual_seed(0)
    small = load_pipeline_parts(sdxl_folder, "cpu")
    encoders = [
        CLIPTextConfig(
            vocab_size=520, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=4, projection_dim=width, bos_token_id=518, eos_token_id=519,
        )
        for width, layers in ((256, 4), (512, 4))
    ]  # fmt: skip
    parts = replace(
        small,
        unet=UNet2DConditionModel(
            sample_size=4, block_out_channels=(128, 256), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=64, cross_attention_dim=768,
            transformer_layers_per_block=(1, 4), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 512,
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 64), scaling_factor=0.13025,
        ),
        text_encoders=(CLIPTextModel(encoders[0]), CLIPTextModelWithProjection(encoders[1])),
    )  # fmt: skip
    root, tensors = tmp_path_factory.mktemp("large"), original_tensors(parts)
    for dtype in (torch.float32, torch.float16):
        folder = root / f"folder-{dtype}"
        save_diffusers_folder(parts, folder, dtype)
        (root / f"file-{dtype}").symlink_to(
            folder, target_is_directory=True
        )  # configurations beside the file
        cast = {
            name: value.to(dtype).contiguous() if value.is_floating_point() else value
            for name, value in tensors.items()
        }
        save_file(cast, root / f"file-{dtype}.safetensors")
    return [path for path in sorted(root.iterdir()) if not path.is_symlink()]


@pytest.mark.slow
def test_a_model_is_in_memory_once_while_it_is_loaded(models, sdxl_folder):
    command = [sys.executable, "-c", RANK, sdxl_folder, *models]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(models) == 4
    for line in lines:
        _, num_bytes, peak, held = line.split()
        assert int(num_bytes) > 150e6, line
        assert 0.95 < float(held) <= float(peak) <= 1.1, lines
