"""ADM against the same network in plain operations: how many times as fast, in pairs of calls.

    python -m benchmarks.adm --sides 32 64 --batch_size 4

The plain network has the operations of the published code, one by one: normalisation casts to
float32 and back, attention multiplies two einsums by scaled factors with a softmax in float32
between them, and activation, scale and shift, and the concatenation of skips stand alone.  Weights
are the same, and outputs are compared.  In bfloat16 the convolutions of both have such weights
(`convert_to_bf16`).
"""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure import ratio_in_pairs, show
from models.adm import UNetModel
from models.adm_layers import AttentionBlock, GroupNorm32, ResBlock, timestep_embedding
from score_lib.base.devices import resolve_device
from score_lib.base.mistakes import brief_mistakes

PRECISIONS = {"float32": UNetModel.convert_to_fp32, "bfloat16": UNetModel.convert_to_bf16}
STEPS = ("forward", "training")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64], help="of images, in px")
    parser.add_argument("--width", type=int, default=64, help="model_channels")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15, help="number of pairs")
    given = parser.parse_args(argv)
    device, rows = resolve_device("auto"), []
    for side in given.sides:
        for precision in PRECISIONS:
            ours, plain = networks(side, given.width, precision, device)
            x, t = inputs(given.batch_size, side, device)
            with torch.no_grad():
                difference = ((ours(x, t) - plain(x, t)).norm() / plain(x, t).norm()).item()
            for kind in STEPS:
                calls = [_call(kind, network, x, t) for network in (plain, ours)]
                found = ratio_in_pairs(*calls, device, given.rounds)
                row = {"side": side, "precision": precision, "step": kind}
                row |= {"times as fast": found.value, "error": found.standard_error}
                rows.append(row | {"difference": difference})
    show("ADM against plain operations", device, rows, **vars(given))


def networks(
    side: int, width: int, precision: str, device: torch.device
) -> tuple[UNetModel, UNetModel]:
    """A small network without classes, and the same in plain operations, both in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = UNetModel(
            image_size=side,
            in_channels=3,
            model_channels=width,
            out_channels=6,
            num_res_blocks=1,
            attention_resolutions=[side // 16, side // 8],
            channel_mult=(1, 2, 2) if side <= 32 else (1, 2, 2, 2),
            num_head_channels=32,
            use_scale_shift_norm=True,
            resblock_updown=True,
        )
        for weight in ours.parameters():  # the last layer of a branch is 0 in new networks
            if not weight.any():
                nn.init.normal_(weight, std=0.02)
    ours = ours.to(device)
    PRECISIONS[precision](ours)
    return ours, plainly(ours)


def inputs(batch_size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and time steps (B,), the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 3, side, side, generator=generator)
    return x.to(device), torch.linspace(0, 999, batch_size, device=device)


def _call(kind: str, network: UNetModel, x: Tensor, t: Tensor) -> Callable[[], object]:
    def forward():
        with torch.no_grad():
            return network(x, t)

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-6)

    def training():
        optimizer.zero_grad()
        network(x, t).square().mean().backward()
        optimizer.step()

    return {"forward": forward, "training": training}[kind]


# --- The same network in plain operations -------------------------------------------------------


def plainly(network: UNetModel) -> UNetModel:
    """A copy whose layers, with the same weights, have the methods of those below."""
    plain = copy.deepcopy(network)
    for layer in plain.modules():
        layer.__class__ = _PLAIN.get(type(layer), type(layer))
    return plain


class _PlainNorm(GroupNorm32):
    def forward(self, x: Tensor) -> Tensor:
        return nn.GroupNorm.forward(self, x.float()).type(x.dtype)


class _PlainAttention(AttentionBlock):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(x.shape[0], x.shape[1], -1)
        qkv = self.qkv(self.norm(tokens))
        size, width, length = qkv.shape
        of_head = width // (3 * self.heads)
        q, k, v = qkv.reshape(size * self.heads, 3 * of_head, length).split(of_head, dim=1)
        scale = of_head**-0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(size, -1, length)
        return (tokens + self.proj_out(h)).reshape(x.shape)


class _PlainBlock(ResBlock):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        norm, act, convolve = self.in_layers
        h = act(norm(x))
        h, x = self.resample(h), self.resample(x)
        h = convolve(h)
        of_time = self.emb_layers(temb).type(h.dtype)[..., None, None]
        norm, *rest = self.out_layers
        scale, shift = torch.chunk(of_time, 2, dim=1)
        h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class _PlainUNet(UNetModel):
    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        temb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h, skips = x.type(self.input_blocks[0][0].weight.dtype), []
        for stage in self.input_blocks:
            h = stage(h, temb)
            skips.append(h)
        h = self.middle_block(h, temb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), temb)
        return self.out(h.type(x.dtype))


_PLAIN = {
    UNetModel: _PlainUNet,
    ResBlock: _PlainBlock,
    AttentionBlock: _PlainAttention,
    GroupNorm32: _PlainNorm,
}


if __name__ == "__main__":
    with brief_mistakes():
        main()
