"""The models of this folder's tests."""

from tiny_models import clip_folder, noise_image, owlv2_folder, sd1_folder, sdxl_folder
