"""Networks of other libraries: folders of Diffusers, read and written; files of ADM, read."""

from score_lib.exchange.adm import load_adm
from score_lib.exchange.diffusers import load_diffusers, save_diffusers
