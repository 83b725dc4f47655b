"""Networks of other libraries: folders of Diffusers, read and written."""

from score_lib.exchange.diffusers import load_diffusers, save_diffusers
