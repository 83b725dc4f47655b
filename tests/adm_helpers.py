"""Small networks of ADM."""

from networks import fill_weights

from models.adm import EncoderUNetModel, UNetModel

SMALL = dict(image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1)
SMALL |= dict(attention_resolutions=(2,), channel_mult=(1, 2))
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


def small(kind=UNetModel, **options):
    """A network in evaluation mode, with weights that are not 0."""
    if kind is EncoderUNetModel:
        options.setdefault("num_head_channels", 16)
    return fill_weights(kind(**{**SMALL, **options})).eval()
