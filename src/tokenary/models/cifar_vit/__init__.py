"""A small plain ViT that knows CIFAR-10, trained by this project (``scripts/train_cifar_vit.py``).

``load()`` gives the network that ships; ``accuracy`` measures it on the test pictures of `tokenary.data.cifar10`. Its
blocks are plain pre-norm attention over a class token and 64 patches, so every reducer of visual tokens fits.
"""

from __future__ import annotations

from tokenary.models.cifar_vit.loading import load, save
from tokenary.models.cifar_vit.model import CifarViT, ViTConfig, accuracy

__all__ = ["CifarViT", "ViTConfig", "accuracy", "load", "save"]
