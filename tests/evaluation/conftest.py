"""The scoring networks of this folder's tests."""

from tiny_clip import aesthetic_folder, clip_folder
