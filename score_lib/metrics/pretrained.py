"""Extractors of features that were not trained on ImageNet's labels: DINOv2 and CLIP.

Images are prepared as by torch-fidelity.  Reports call the Fréchet distance of these features
"fd", since figures of "fid" are Inception's.
"""

import warnings

import torch
from torch import Tensor

from score_lib.disk.files import file_digest
from score_lib.disk.records import load_verified
from score_lib.metrics.extractors import Extractor, as_rgb, register_extractor
from score_lib.metrics.fidelity import exact, fidelity, resized, weights_file, weights_of
from score_lib.metrics.vision_transformer import VisionTransformer

DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
# ImageNet's, in grey levels.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_SIDE = 224


@register_extractor
class DINOv2(Extractor):
    """The class token of DINOv2, for FD-DINOv2.  [Oquab et al. 2023; Stein et al. 2023]

    The weights are a published file `dinov2_vit{s,b,l,g}14_pretrain.pth`, which also tells the
    size of the network; "" downloads that of ViT-L/14, which the published distances use.
    """

    name = "dinov2"
    distance = "fd"
    resize = f"bilinear to {_SIDE} x {_SIDE}, aligned as in TensorFlow 1"

    def __init__(self, weights: str = "", device: torch.device | str = "cpu"):
        path = weights_file(weights, DINOV2_URL, "DINOv2")
        self.device = torch.device(device)
        with weights_of(path, "a DINOv2 network", DINOV2_URL):
            self.network = VisionTransformer.of(load_verified(path)).to(self.device)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).reshape(1, 3, 1, 1) for values in (_MEAN, _STD)
        )
        self.digest = file_digest(path)

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, None]:
        x = as_rgb(images).movedim(-1, 1).to(self.device)
        with exact():
            return self.network((resized(x, _SIDE, self.name) - self.mean) / self.std), None


@register_extractor
class CLIP(Extractor):
    """The image embedding of CLIP, by torch-fidelity.  [Radford et al. 2021]

    The weights are a published TorchScript file, which also tells the network; "" downloads that
    of ViT-B/32, as in Kynkäänniemi et al. 2023.
    """

    name = "clip"
    distance = "fd"

    def __init__(self, weights: str = "", device: torch.device | str = "cpu"):
        library, variant = fidelity("feature_extractor_clip", self.name), "clip-vit-b-32"
        url = library.MODEL_URLS[variant]
        path = weights_file(weights, url, "CLIP")
        self.device = torch.device(device)
        with weights_of(path, "a CLIP network", url), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            # The name matters only for a download.
            network = library.FeatureExtractorCLIP(
                variant, ["clip"], feature_extractor_weights_path=str(path)
            )
        self.network = network.to(self.device)
        side = network.resolution
        self.resize = f"bilinear to {side} x {side}, aligned as in TensorFlow 1"
        self.digest = file_digest(path)

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, None]:
        with exact():
            return self.network(as_rgb(images).movedim(-1, 1).to(self.device))[0], None
