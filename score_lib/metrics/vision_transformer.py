"""The vision transformer of DINOv2, whose sizes are those of a file of weights."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEAD = 64  # channels of an attention head, in all published sizes


class VisionTransformer(nn.Module):
    """DINOv2 without register tokens.  [Oquab et al. 2023]

    Names of parameters are those of the published files.

    Args:
        width: channels of a token.
        depth: number of blocks.
        patch: side of a patch in pixels.
        grid: side, in patches, of the images that the embedding of positions was trained on.
        hidden: channels inside the feed-forward layers.
        gated: whether these are SwiGLU layers, as in the largest network.
    """

    def __init__(self, width: int, depth: int, patch: int, grid: int, hidden: int, gated: bool):
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(_Block(width, hidden, gated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "VisionTransformer":
        """The network of published weights, which becomes their owner.

        Raises:
            KeyError, RuntimeError: they are not of such a network.
        """
        state = {name: value for name, value in state.items() if name != "mask_token"}
        gated = "blocks.0.mlp.w3.weight" in state
        hidden = state["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"].shape[1]
        width, _, _, patch = state["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        grid = math.isqrt(state["pos_embed"].shape[1] - 1)
        with torch.device("meta"):
            network = cls(width, depth, patch, grid, hidden, gated)
        network.load_state_dict(state, assign=True)
        return network.float().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """The class token (B, width) of normalised images (B, 3, H, W), whole patches in size."""
        patches = self.patch_embed["proj"](x)
        tokens = patches.flatten(2).mT + self._positions(*patches.shape[2:])
        first = self.cls_token + self.pos_embed[:, :1]
        tokens = torch.cat([first.expand(len(x), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def _positions(self, height: int, width: int) -> Tensor:
        """Embedding of the positions of patches, (1, height * width, channels)."""
        trained = self.pos_embed[:, 1:]
        if (height, width) == (self.grid, self.grid):
            return trained
        image = trained.mT.unflatten(2, (self.grid, self.grid))
        # The published code adds 0.1 to the sizes, so that rounding never loses a row.
        scales = ((height + 0.1) / self.grid, (width + 0.1) / self.grid)
        return F.interpolate(image, scale_factor=scales, mode="bicubic").flatten(2).mT


class _Block(nn.Module):
    """Attention and a feed-forward layer, each with a scale for every channel."""

    def __init__(self, width: int, hidden: int, gated: bool):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = _Attention(width)
        self.ls1, self.ls2 = (
            nn.ParameterDict({"gamma": nn.Parameter(torch.ones(width))}) for _ in range(2)
        )
        self.mlp = (_Gated if gated else _FeedForward)(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x))
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, -1, _HEAD)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Gated(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=2)
        return self.w3(F.silu(gate) * value)
