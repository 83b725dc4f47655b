"""The networks of ADM by config.  [Dhariwal & Nichol 2021]"""

from torch import Tensor, nn

from score_lib.base.tensors import data_shape
from score_lib.options import complete

from .adm import EncoderUNetModel, UNetModel, joined
from .conditioning import taken_by
from .layers import check_classes, check_fixed, check_input, choose
from .unet_plan import tell_unmatched, total_stride
from .utils import register_model
from .wrapper import Wrapper


class _Configured:
    """Before a network in the order of inheritance: calls as a config describes them."""

    dims: int
    image_channels: int
    checkpoints_evaluation = False

    def _read(self, config) -> None:
        """Take over options of a config that is complete."""
        self.centered = config.data.centered
        rescales = config.model.rescale_timesteps
        self.step_scale = 1000 / config.model.num_scales if rescales else 1.0

    def _steps(self, labels: Tensor) -> Tensor:
        """Labels as the published networks are told them, (B,)."""
        return labels if self.step_scale == 1 else self.step_scale * labels

    def _prepared(self, x: Tensor, labels: Tensor) -> Tensor:
        """Images (B, C, H, W), in [-1, 1] where they have no noise, given those of the config.

        Other signals stay as they are.
        """
        if self.dims == 2:  # else the network's own check names the sides
            check_input(x, labels, self.image_channels)
        return self._centred(x)

    def _centred(self, x: Tensor) -> Tensor:
        return x if self.centered or self.dims != 2 else 2 * x - 1


@register_model(name="adm", yields=True)
class ADM(_Configured, UNetModel):
    """The U-Net of ADM as a config describes it.

    Read are, of `model`, the options of `described`; `rescale_timesteps`, by which label i of N
    steps is told as 1000 i / N; and `learn_sigma`: then the network also predicts variances, which
    a call leaves out unless it asks for them.  With an image as a condition, its layout is that of
    `SuperResModel`.  It is a network of series (C, L) or videos (C, T, H, W) if `data.shape` says
    so.

    Raises:
        ValueError: see `UNetModel` and `described`.
    """

    def __init__(self, config):
        config = complete(config)
        keywords = described(config)
        takes, channels = taken_by(config), keywords.pop("in_channels")
        if takes.image and keywords["dims"] != 2:
            raise ValueError(
                f"training.condition = {config.training.condition!r} has an image, which only "
                f"networks of images can be told, but data.shape is {tuple(config.data.shape)}: "
                "choose classes or features"
            )
        super().__init__(
            in_channels=channels + takes.image,
            out_channels=(2 if config.model.learn_sigma else 1) * channels,
            num_classes=takes.classes + takes.droppable if takes.classes else None,
            **keywords,
        )
        if takes.features:  # without a bias, zeros change nothing
            temb_dim = self.time_embed[-1].out_features
            self.feature_emb = nn.Linear(takes.features, temb_dim, bias=False)
        self.takes, self.image_channels = takes, channels
        self._read(config)

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        classes: Tensor | None = None,
        image: Tensor | None = None,
        features: Tensor | None = None,
        variances: bool = False,
    ) -> Tensor:
        """The network's output; the process turns it into a score.

        Args:
            x: in the network's range, (B, C, *S): images, or signals of one or three sides, the
                first of which, frames, keeps its length; other sides are multiples of `stride`.
            labels: (B,), time steps, whole or not.
            classes, image, features: see `UNet.forward`.
            variances: return the channels of learned variances, too.
        Returns:
            (B, C, *S), or (B, 2C, *S) with variances, in the dtype of x.
        Raises:
            ValueError: other shapes or conditions, or the network has no learned variances.
        """
        images = self._given(x, labels, classes=classes, image=image, features=features)
        if variances and self.out_channels == self.image_channels:
            raise ValueError(
                "the network has no learned variances: build it with model.learn_sigma = True"
            )
        output = super().forward(images, self._steps(labels), classes, features=features)
        return output if variances else output[:, : self.image_channels]

    def get_feature_vectors(
        self,
        x: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        *,
        image: Tensor | None = None,
        features: Tensor | None = None,
    ) -> dict[str, list[Tensor] | Tensor]:
        """See `UNetModel.get_feature_vectors`; its arguments are those of `forward`."""
        images = self._given(x, labels, classes=classes, image=image, features=features)
        return super().get_feature_vectors(images, self._steps(labels), classes, features=features)

    def _given(self, x: Tensor, labels: Tensor, **condition: Tensor | None) -> Tensor:
        """The input of the published network, given arguments that are checked here."""
        images, image = self._prepared(x, labels), condition["image"]
        self.takes.checked(condition, x)
        return images if image is None else joined(images, self._centred(image))


class WithVariances(Wrapper):
    """Calls a network for its output and, behind it, v of the learned variances: (B, 2C, *S).

    The log variance is (1 + v) / 2 log beta + (1 - v) / 2 log beta~, between that of a step and
    that of the posterior.  [Nichol & Dhariwal 2021, equation 15]
    """

    def forward(self, x: Tensor, labels: Tensor, **condition: Tensor) -> Tensor:
        """x (B, C, *S), labels (B,) -> (B, 2C, *S)."""
        return self.module(x, labels, variances=True, **condition)


@register_model(name="adm_classifier", yields=True)
class ADMClassifier(_Configured, EncoderUNetModel):
    """The classifier of ADM as a config describes it.

    Read are `data.num_classes` and, of `model`, the options of `described`, `rescale_timesteps` and
    `pool`.

    Raises:
        ValueError: see `EncoderUNetModel` and `described`, or fewer than two classes.
    """

    def __init__(self, config):
        config = complete(config)
        classes, pool = check_classes(config.data.num_classes), config.model.pool
        super().__init__(out_channels=classes, pool=pool, **described(config))
        self.image_channels = self.in_channels
        self._read(config)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Logits of the classes.

        Args:
            x: images x_t in the network's range, (B, C, H, W), of the configured size.
            labels: (B,), time steps, whole or not.
        Returns:
            (B, data.num_classes), in the dtype of x.
        Raises:
            ValueError: other shapes.
        """
        return super().forward(self._prepared(x, labels), self._steps(labels))


def described(config) -> dict[str, object]:
    """The keywords that a config gives to a network.

    Read are, of `model`: `nf`, `ch_mult`, `num_res_blocks`, `attn_resolutions` (heights of images
    and frames in pixels, lengths of series),
    `dropout`, `resblock_type` ("biggan": residual blocks change the resolution; "ddpm": layers in
    between do, with a convolution if `resamp_with_conv`), `scale_shift_norm`, `num_heads`,
    `num_head_channels`, `use_new_attention_order` and `checkpoint_activations` (which acts in
    training).

    Args:
        config: complete, see `score_lib.options.complete`.
    Raises:
        ValueError: the size cannot be halved often enough, the data are no signals, or the config
            asks for features that these networks lack.
    """
    model = config.model
    check_fixed(model, {"normalization": "GroupNorm", "nonlinearity": "swish", "conditional": True})
    check_fixed(model, {"scale_by_sigma": False}, ": choose a VP or sub-VP process")
    channels, *sides = _signal_shape(config)
    # The first of three sides is no side of a picture.
    height, width = sides[-2:] if len(sides) > 1 else sides * 2
    total_stride(sides[-2:], model.ch_mult)
    heights = [height >> i for i in range(len(model.ch_mult))]
    tell_unmatched(model.attn_resolutions, heights)
    kinds = {"biggan": True, "ddpm": False}
    return {
        "image_size": height if height == width else (height, width),
        "in_channels": channels,
        "model_channels": model.nf,
        "num_res_blocks": model.num_res_blocks,
        "attention_resolutions": [height // s for s in heights if s in model.attn_resolutions],
        "dropout": model.dropout,
        "channel_mult": tuple(model.ch_mult),
        "conv_resample": model.resamp_with_conv,
        "dims": len(sides),
        "use_checkpoint": model.checkpoint_activations,
        "num_heads": model.num_heads,
        "num_head_channels": model.num_head_channels or -1,
        "use_scale_shift_norm": model.scale_shift_norm,
        "resblock_updown": choose("model.resblock_type", model.resblock_type, kinds),
        "use_new_attention_order": model.use_new_attention_order,
    }


def _signal_shape(config) -> tuple[int, ...]:
    """(C, *S) of the data, with one to three sides.

    Raises:
        ValueError: other data.
    """
    shape = data_shape(config)
    if not 2 <= len(shape) <= 4:
        raise ValueError(
            f"data.shape = {shape} should be (C, L), (C, H, W) or (C, T, H, W) for the network "
            f"{config.model.name!r}: choose mlp for vectors"
        )
    return shape
