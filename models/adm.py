"""ADM: the U-Net of guided diffusion, and its classifier.  [Dhariwal & Nichol 2021]

Keywords, the names of weights and their order are those of the published code and checkpoints, also
those of improved diffusion [Nichol & Dhariwal 2021], whose networks are a part of these.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from .adm_layers import (
    Architecture,
    AttentionPool,
    Builder,
    GroupNorm32,
    conv,
    heads_of,
    timestep_embedding,
    zeroed,
)
from .conditioning import Takes, enlarged
from .layers import autocast_dtype, choose, in_full_precision
from .network import Network


class _Trunk(Network):
    """The way down and the middle, which the U-Net and the classifier share."""

    checkpoints_evaluation = True

    def __init__(
        self, builder: Builder, in_channels: int, num_classes: int | None, use_checkpoint: bool
    ):
        super().__init__()
        architecture = builder.a
        self.dims, self.model_channels = architecture.dims, architecture.model_channels
        self.in_channels, self.num_classes = in_channels, num_classes
        self.stride = 2 ** (len(architecture.channel_mult) - 1)
        self.checkpoint_activations = use_checkpoint
        self.time_embed = builder.embedding()
        self.takes = Takes(classes=num_classes or 0)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, builder.temb_dim)
        self.input_blocks, self.skip_channels = builder.encoder(in_channels)
        self.middle_block = builder.middle(self.skip_channels[-1])

    def _encode(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The embedded time, class and features, (B, E), and the skips, finest first."""
        self._check(x, timesteps, y)
        first = self.time_embed[0].weight
        temb = timestep_embedding(timesteps, self.model_channels).to(first.dtype)
        temb = in_full_precision(self.time_embed, temb)
        if y is not None:
            temb = temb + self.label_emb(y)
        if features is not None:
            temb = temb + in_full_precision(self.feature_emb, features.to(temb.dtype))
        stem, *stages = self.input_blocks
        weight = stem[0].weight
        h = in_full_precision(lambda x: stem(x.to(weight.dtype), temb), x)
        skips = [h.to(autocast_dtype(h))]
        for stage in stages:
            skips.append(self._run(stage, temb, skips[-1]))
        return temb, skips

    def _check(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> None:
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            sides = ", ".join("DHW"[-self.dims :])
            raise ValueError(
                f"the network takes signals (B, {self.in_channels}, {sides}), but was given shape "
                f"{tuple(x.shape)}"
            )
        if timesteps.shape != x.shape[:1]:
            raise ValueError(
                f"the network takes one time per signal, ({x.shape[0]},), but was given timesteps "
                f"of shape {tuple(timesteps.shape)}"
            )
        if self.num_classes is None and y is not None:
            raise ValueError(
                "the network knows no classes, but was given y: leave y out, or build the network "
                "with num_classes"
            )
        if self.num_classes is not None and (y is None or y.shape != x.shape[:1]):
            given = "none" if y is None else f"shape {tuple(y.shape)}"
            raise ValueError(
                f"the network needs the class of each signal, y of shape ({x.shape[0]},) with "
                f"numbers below {self.num_classes}, but was given {given}"
            )

    def convert_to_fp16(self) -> None:
        """Halve the convolutions of all blocks; embeddings, normalisation and the head stay."""
        self._convert(torch.float16)

    def convert_to_bf16(self) -> None:
        """As `convert_to_fp16`, in bfloat16."""
        self._convert(torch.bfloat16)

    def convert_to_fp32(self) -> None:
        """Undo `convert_to_fp16`, as far as rounded weights can be."""
        self._convert(torch.float32)

    def _convert(self, dtype: torch.dtype) -> None:
        for name, part in self.named_children():
            for layer in part.modules():
                if name != "out" and isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    layer.to(dtype)


class UNetModel(_Trunk):
    """The U-Net of ADM: x_t and its time step -> predicted noise, perhaps with variances.

    Args:
        image_size: side of the images in pixels, or (height, width); the network runs at other
            sizes, too.
        in_channels, out_channels: of the signals; twice as many out for learned variances.
        model_channels: width that `channel_mult` multiplies at each resolution, finest first;
            each width is a multiple of 32.
        num_res_blocks: at each resolution on the way down; one more on the way up.
        attention_resolutions: downsampling rates with attention, such as (4, 8): of 64 px, at 16
            and 8 px.  There always is attention in the middle.
        dropout: probability.
        conv_resample: convolve where the resolution changes, unless `resblock_updown`.
        dims: sides of a signal: 1, 2, or 3, the first of which (time) keeps its length.
        num_classes: of a class-conditional network, which is then called with `y`.
        use_checkpoint: keep only the input of each block for gradients, and recompute the rest.
        use_fp16: taken for published calls; it is `convert_to_fp16` that converts.
        num_heads: of attention; num_heads_upsample: on the way up (-1: the same).
        num_head_channels: width of a head, in place of their number (-1: see `num_heads`).
        use_scale_shift_norm: the time scales and shifts features, rather than being added.
        resblock_updown: residual blocks change the resolution.
        use_new_attention_order: order of the weights of attention, see `qkv_attention`.
    Raises:
        ValueError: a width is no multiple of 32 or cannot be split into heads, or other `dims`.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        builder = Builder(Architecture.of(locals()))
        super().__init__(builder, in_channels, num_classes, use_checkpoint)
        self.image_size, self.out_channels = image_size, out_channels
        self.output_blocks = builder.decoder(self.skip_channels)
        ch = self.skip_channels[0]
        self.out = nn.Sequential(GroupNorm32(ch), nn.SiLU(), zeroed(conv(dims, ch, out_channels)))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        *,
        classes: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The network's output.

        Args:
            x: (B, in_channels, *S), in [-1, 1] plus noise; sides are multiples of `stride`.
            timesteps: (B,), whole or fractional steps, from 0 to 999 in published networks.
            y, classes: two names of the classes, (B,), int64, if the network is class-conditional.
            features: (B, K), of a network that has layers for them.
        Returns:
            (B, out_channels, *S), in the dtype of x.
        Raises:
            ValueError: other shapes; y is missing, or given to a network without classes.
        """
        temb, skips = self._encode(x, timesteps, y if classes is None else classes, features)
        h = self._run(self.middle_block, temb, skips[-1])
        for stage in self.output_blocks:
            h = self._run(stage, temb, h, skips.pop())
        return in_full_precision(self.out, h.to(self.out[0].weight.dtype)).to(x.dtype)

    def get_feature_vectors(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        *,
        features: Tensor | None = None,
    ) -> dict[str, list[Tensor] | Tensor]:
        """Features of every block in the dtype of x, by "down", "middle" and "up"."""
        temb, skips = self._encode(x, timesteps, y, features)
        down = [h.to(x.dtype) for h in skips]
        h = middle = self._run(self.middle_block, temb, skips[-1])
        up = []
        for stage in self.output_blocks:
            h = self._run(stage, temb, h, skips.pop())
            up.append(h.to(x.dtype))
        return {"down": down, "middle": middle.to(x.dtype), "up": up}

    def _check(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> None:
        super()._check(x, timesteps, y)
        if any(side % self.stride for side in x.shape[-min(self.dims, 2) :]):
            raise ValueError(
                f"the network takes signals whose sides are multiples of {self.stride}, "
                f"but was given shape {tuple(x.shape)}"
            )


class SuperResModel(UNetModel):
    """The U-Net that enlarges images: it also sees the small image, enlarged bilinearly.

    Args:
        image_size, in_channels: of the large images.
        others: see `UNetModel`; images have two sides.
    """

    def __init__(self, image_size: int, in_channels: int, *args, **kwargs):
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)
        if self.dims != 2:
            raise ValueError(f"SuperResModel enlarges images: dims is {self.dims}, but must be 2")
        self.takes = self.takes._replace(image=in_channels)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        low_res: Tensor | None = None,
        *,
        image: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """See `UNetModel.forward`.

        Args:
            low_res, image: two names of the small images (B, in_channels, h, w), in [-1, 1].
        Raises:
            ValueError: they are missing or have another shape.
        """
        joint = self._joined(x, low_res if image is None else image)
        return super().forward(joint, timesteps, **kwargs)

    def get_feature_vectors(
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs
    ) -> dict[str, list[Tensor] | Tensor]:
        """See `UNetModel.get_feature_vectors`."""
        return super().get_feature_vectors(self._joined(x, low_res), timesteps, **kwargs)

    def _joined(self, x: Tensor, low_res: Tensor | None) -> Tensor:
        wanted = (x.shape[0], self.in_channels // 2)
        if low_res is None or low_res.dim() != 4 or low_res.shape[:2] != wanted:
            given = "none" if low_res is None else f"shape {tuple(low_res.shape)}"
            raise ValueError(
                f"the network enlarges low_res, small images ({wanted[0]}, {wanted[1]}, h, w), but "
                f"was given {given}"
            )
        return joined(x, low_res)


def joined(x: Tensor, image: Tensor) -> Tensor:
    """x (B, C, H, W) and an image (B, c, h, w), enlarged bilinearly: (B, C + c, H, W)."""
    return torch.cat([x, enlarged(image, x).to(x.dtype)], dim=1)


class EncoderUNetModel(_Trunk):
    """The classifier of noisy images: the way down of a U-Net, and a pool.

    Class guidance tells it time steps, as `told_time_step` says.

    Args:
        out_channels: classes.
        pool: how feature maps become logits: "adaptive" (their mean), "attention" (for images of
            `image_size`, and with `num_head_channels`), "spatial" or "spatial_v2" (the means of all
            resolutions).
        num_heads_upsample: taken for published calls; there is no way up.
        others: see `UNetModel`.
    Raises:
        ValueError: see `UNetModel`; an unknown pool.
    """

    told_time_step = True

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        builder = Builder(Architecture.of(locals()))
        super().__init__(builder, in_channels, None, use_checkpoint)
        self.image_size, self.out_channels, self.pool = image_size, out_channels, pool
        self.num_head_channels = num_head_channels
        pools = {
            "adaptive": (False, self._adaptive_pool),
            "attention": (False, self._attention_pool),
            "spatial": (True, lambda: self._spatial_pool(nn.ReLU())),
            "spatial_v2": (True, lambda: self._spatial_pool(GroupNorm32(2048), nn.SiLU())),
        }
        self.of_all_levels, make = choose("pool", pool, pools)
        self.out = make()

    def _adaptive_pool(self) -> nn.Sequential:
        ch, dims = self.skip_channels[-1], self.dims
        kinds = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
        last = zeroed(conv(dims, ch, self.out_channels, kernel=1))
        return nn.Sequential(GroupNorm32(ch), nn.SiLU(), kinds[dims](1), last, nn.Flatten())

    def _attention_pool(self) -> nn.Sequential:
        if self.dims != 2 or self.num_head_channels == -1:
            raise ValueError(
                f"pool 'attention' needs dims = 2 and num_head_channels, such as 64, but dims is "
                f"{self.dims} and num_head_channels is {self.num_head_channels}"
            )
        ch = self.skip_channels[-1]
        heads = heads_of(ch, 1, self.num_head_channels)
        sizes = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        sides = tuple(size // self.stride for size in sizes)
        pool = AttentionPool(sides, ch, heads, self.out_channels)
        return nn.Sequential(GroupNorm32(ch), nn.SiLU(), pool)

    def _spatial_pool(self, *between: nn.Module) -> nn.Sequential:
        features = sum(self.skip_channels) + self.skip_channels[-1]
        first, last = nn.Linear(features, 2048), nn.Linear(2048, self.out_channels)
        return nn.Sequential(first, *between, last)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits of the classes.

        Args:
            x: (B, in_channels, *S), in [-1, 1] plus noise.
            timesteps: (B,), whole or fractional steps.
        Returns:
            (B, out_channels), in the dtype of x.
        Raises:
            ValueError: other shapes.
        """
        temb, maps = self._encode(x, timesteps)
        maps.append(self._run(self.middle_block, temb, maps[-1]))
        dtype = next(self.out.parameters()).dtype
        if self.of_all_levels:
            h = torch.cat([h.to(dtype).flatten(2).mean(dim=2) for h in maps], dim=1)
        else:
            h = maps[-1].to(dtype)
        return in_full_precision(self.out, h).to(x.dtype)
