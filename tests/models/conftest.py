"""The models of this folder's tests."""

from tiny_models import noise_image, sd1_folder, sdxl_folder
