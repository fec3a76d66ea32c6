"""A small UNet, and what autograd keeps of its forward pass: the oracle of estimates of memory."""

import torch

TINY = {
    "sample_size": 16, "block_out_channels": [32, 64], "layers_per_block": 2, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 24, "transformer_layers_per_block": [1, 2], "attention_head_dim": 8,
    "use_linear_projection": True,
}  # fmt: skip


def saved_bytes(unet, height, width):
    """What autograd keeps of one forward pass, each storage once, weights aside."""
    dtype = unet.dtype
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # held, so that no address is used twice
        return tensor

    latents = torch.randn(1, 4, height // 8, width // 8, dtype=dtype)
    text = torch.randn(1, 77, 24, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(latents, torch.tensor([5]), encoder_hidden_states=text)
    return sum(size for size, _ in kept.values())
