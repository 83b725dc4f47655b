"""A start for your own images: DDPM++ with the VP SDE at 32 px in colour.

The images may be a folder, a zip, an .npy or an .npz:

    python main.py --config configs/vp/images.py --config.data.path=PATH --mode train --workdir RUN

Change any other option in the same way, or copy this file:
- `--config.data.num_channels=1` for gray images, `--config.data.range=0,4095` for 12 bits,
  `--config.data.background=white` where pixels are transparent;
- `--config.data.image_size=64` for another size, with `--config.data.image_width=48` for images
  that are not square;
- from 64 px on, a coarser level for every doubling, such as `ch_mult=(1, 1, 2, 2, 2)`, and half
  the batch size or less.  Sides must be divisible by 2 for every level but the first;
- `--config.data.random_flip=False` where left and right matter, as in writing;
- `--config.data.uniform_dequantization=True` where bits/dim matter.
"""

from configs import data, parts


def get_config():
    config = data.images_defaults(image_size=32)
    parts.vp_sde(config, continuous=True)
    parts.ddpmpp(config, num_res_blocks=4, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,))
    parts.pc_sampling(config, predictor="euler_maruyama")
    return config
