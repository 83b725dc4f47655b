"""The U-Net behind DDPM and NCSN++: the forward pass."""

import torch
from torch import Tensor

from score_lib.base.tensors import image_shape

from .conditioning import Condition, ConditionLayers, taken_by
from .layers import (
    are_channels_last,
    autocast_dtype,
    check_input,
    divided_by_sigma,
    get_act,
    in_full_precision,
)
from .layerspp import Upsample, level_features
from .network import Network
from .normalization import activated
from .unet_plan import Builder, Options, Projection, total_stride
from .utils import get_sigmas, labels_index_sigmas


class UNet(Network):
    """Noise-conditional U-Net: x_t and its noise level -> a field of the shape of x_t.

    Attention goes where `model.attn_resolutions` contains the height of the images at a level:
    after each residual block on the way down, once on the way up, or with `attn_every_block` after
    each there, too; and always in the middle.  It has `num_heads` heads, or heads of
    `num_head_channels` features.

    `norm_groups` and `norm_eps` are of all group normalisations; `freq_shift` is of the sines and
    cosines of a time step; `symmetric_padding` is of unfiltered convolutions that halve features,
    not those of a residual pyramid of inputs.

    With `model.checkpoint_activations`, training keeps only the input of each block and recomputes
    the block in the backward pass: less memory for a third more time.

    Args:
        config: complete; `data` and `model` are read.
        options: differences from DDPM.
    Raises:
        ValueError: an option is unknown, or the image size cannot be halved often enough.
    """

    # Features are in the order of memory of the input, see `precision.ChannelsLast`.
    follows_its_input = True

    def __init__(self, config, options: Options):
        super().__init__()
        self.channels, height, width = image_shape(config)
        self.stride = total_stride((height, width), config.model.ch_mult)
        self.centered = config.data.centered
        self.scale_by_sigma = config.model.scale_by_sigma
        self.fourier_log = config.model.fourier_log
        self.nf, self.freq_shift = config.model.nf, config.model.freq_shift
        self.register_buffer("sigmas", torch.tensor(get_sigmas(config)))
        self.checkpoint_activations = config.model.checkpoint_activations
        # Published blocks have layers for the noise level even in networks that are not told it,
        # and a pyramid of outputs has its first layers even if there is a single level.
        lonely = options.progressive == "residual" and len(config.model.ch_mult) == 1
        self.has_idle_parameters = not config.model.conditional or lonely
        self.act = get_act(config)
        self.enlarge = Upsample(fir=options.fir, fir_kernel=options.fir_kernel)
        builder = Builder(config, options, self.act)
        self.plan = builder.build()
        divides = self.scale_by_sigma and self.plan.embedding.fourier is None
        self.uses_sigmas = divides or labels_index_sigmas(config)
        self.all_modules = builder.slots
        self.takes = taken_by(config)
        if self.takes.kinds:  # after the layers of published checkpoints, which lack these
            _check_conditional(config.model)
            self.condition_layers = ConditionLayers(self.takes, builder.temb_dim, self.nf)

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        classes: Tensor | None = None,
        image: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The network's output; the process turns it into a score.

        Args:
            x: images in the network's range, (B, C, H, W); both sides multiples of `stride`.
            labels: (B,), whole numbers or not: noise levels sigma for Fourier features (any number
                without `model.fourier_log`), otherwise time steps (which index `sigmas` where the
                output is scaled by sigma).
            classes: (B,), int64.
            image: in the network's range, (B, C, h, w), of any sides.
            features: (B, K).
        Returns:
            (B, C, H, W), in the dtype of x.
        Raises:
            ValueError: other shapes, or other conditions than `takes`.
        """
        images = self._prepare(x, labels)
        given = {"classes": classes, "image": image, "features": features}
        condition = self.takes.checked(given, x)
        temb = self._embed(labels, x.dtype, condition)
        order = torch.channels_last if are_channels_last(x) else torch.preserve_format
        skips = self._encode(images, temb, image, order)
        h = self._middle(skips[-1], temb)
        h = self._decode(h, skips, temb)
        return self._rescale(h.to(x.dtype), labels)

    def _prepare(self, x: Tensor, labels: Tensor) -> Tensor:
        check_input(x, labels, self.channels)
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(
                f"the network takes images whose sides are multiples of {self.stride}, "
                f"but was given shape {tuple(x.shape)}"
            )
        return self._centred(x)

    def _centred(self, x: Tensor) -> Tensor:
        """From the network's range to [-1, 1]."""
        return x if self.centered else 2 * x - 1

    def _embed(self, labels: Tensor, dtype: torch.dtype, condition: Condition) -> Tensor | None:
        """labels (B,) and condition -> temb (B, 4 nf)."""
        layer, (fourier, dense_layers) = self.all_modules, self.plan.embedding
        if dense_layers is None:
            return None
        by_fourier = None if fourier is None else layer[fourier]
        temb = level_features(labels, by_fourier, self.nf, self.fourier_log, self.freq_shift)
        first, second = dense_layers
        temb = in_full_precision(
            lambda temb: layer[second](self.act(layer[first](temb))), temb.to(dtype)
        )
        return self.condition_layers.embed(temb, condition) if condition else temb

    def _encode(
        self,
        x: Tensor,
        temb: Tensor | None,
        image: Tensor | None,
        order: torch.memory_format,
    ) -> list[Tensor]:
        """Images (B, C, H, W), and one to join -> one skip per decoder block, finest first.

        Layers keep the order in memory of their input, so that all follow the first.
        """
        layer, pyramid = self.all_modules, x
        h = in_full_precision(layer[self.plan.stem], x)
        if image is not None:
            h = self.condition_layers.join(h, self._centred(image))
        skips = [h.to(autocast_dtype(h), memory_format=order)]
        for level in self.plan.encoder:
            for block, attention in level.blocks:
                h = self._run(layer[block], temb, skips[-1])
                skips.append(h if attention is None else self._run(layer[attention], temb, h))
            if level.down is not None:
                h = self._run(layer[level.down], temb, skips[-1])
                if level.merge is not None:
                    h, pyramid = layer[level.merge](h, pyramid)
                skips.append(h)
        return skips

    def _middle(self, h: Tensor, temb: Tensor | None) -> Tensor:
        for slot in self.plan.middle:
            h = self._run(self.all_modules[slot], temb, h)
        return h

    def _decode(self, h: Tensor, skips: list[Tensor], temb: Tensor | None) -> Tensor:
        """Coarsest features, and skips, which it empties -> images (B, C, H, W)."""
        layer, pyramid = self.all_modules, None
        for level in self.plan.decoder:
            for block, attention in level.blocks:
                h = self._run(layer[block], temb, h, skips.pop())
                h = h if attention is None else self._run(layer[attention], temb, h)
            if level.merge is not None:
                h, pyramid = layer[level.merge](h, pyramid)
            if level.project is not None:
                image = self._project(level.project, h)
                if pyramid is not None:
                    image = in_full_precision(self.enlarge, pyramid) + image
                pyramid = image
            if level.up is not None:
                h = self._run(layer[level.up], temb, h)
        return pyramid if self.plan.head is None else self._project(self.plan.head, h)

    def _project(self, slots: Projection, h: Tensor) -> Tensor:
        conv, norm = self.all_modules[slots.conv], self.all_modules[slots.norm]
        return in_full_precision(lambda h: conv(activated(self.act, norm, h)), h)

    def _rescale(self, h: Tensor, labels: Tensor) -> Tensor:
        if not self.scale_by_sigma:
            return h
        # With Fourier features, labels are sigma itself.
        by_sigma = self.plan.embedding.fourier is not None
        return divided_by_sigma(h, labels, None if by_sigma else self.sigmas)


def _check_conditional(model) -> None:
    if not model.conditional:
        raise ValueError(
            "a network that takes conditions needs model.conditional = True: they enter where the "
            "time does"
        )
