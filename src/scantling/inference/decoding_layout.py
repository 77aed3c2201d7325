"""A decoder's matrices laid out for single tokens, where reading them takes most of the time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.decoder import Decoder
from scantling.model.embed import Embedding
from scantling.model.ffn import GatedFeedForward
from scantling.model.head import Full
from scantling.model.linear import FEW, Linear, goes_to_onednn, linear, packed


class PackedHead(Full):
    """A full head over a copy of the output matrix, where that is the embedding's table and stays one."""

    def __init__(self, head: Full, packed_output: Tensor) -> None:
        nn.Module.__init__(self)
        self.scale, self.softcap, self.packed_output = head.scale, head.softcap, packed_output

    def logits(self, x_BTD: Float[Tensor, "B T D"], embed: Embedding) -> Float[Tensor, "B T V"]:
        return self.shaped(linear(embed.narrowed(x_BTD), self.packed_output, embed.output_bias))


class JoinedGates(nn.Module):
    """A gated feed-forward that multiplies by both of its first matrices at once."""

    def __init__(self, ffn: GatedFeedForward) -> None:
        super().__init__()
        self.activation, self.out = ffn.activation, ffn.out
        self.gate_up = join_layers(ffn.gate, ffn.up)

    def forward(self, x_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        gate, up = self.gate_up(x_BTD).chunk(2, -1)
        return self.out(self.activation(gate) * up)


def join_layers(first: Linear, second: Linear) -> Linear:
    """Both layers' outputs side by side."""
    with torch.device("meta"):
        both = Linear(first.in_features, 2 * first.out_features, bias=first.bias is not None)
    for name, _ in list(both.named_parameters()):
        values = torch.cat((getattr(first, name), getattr(second, name)))
        setattr(both, name, nn.Parameter(values, requires_grad=False))
    return both


@torch.no_grad()
def lay_out_for_decoding(decoder: Decoder, rows: int) -> Decoder:
    """The same model for decoding so many texts at once, and for that alone: it is neither trained nor saved.

    Gates are joined. On a CPU matrices stand in memory as they are read fastest: MKL's product with one
    vector, or a few, is fastest along the longer side of the matrix, so that one of more rows than columns is
    stored column by column, its values and shape as before. Where oneDNN multiplies, more than a few texts
    take its own layout of linear layers.
    """
    for module in list(decoder.modules()):
        for name, part in module.named_children():
            if type(part) is GatedFeedForward:
                setattr(module, name, JoinedGates(part))
    if goes_to_onednn():
        if rows > FEW // 2:
            pack_weights(decoder)
        return decoder
    for parameter in decoder.parameters():
        if parameter.is_cpu and parameter.ndim == 2 and parameter.shape[0] >= parameter.shape[1]:
            parameter.data = parameter.data.T.contiguous().T
    return decoder


def pack_weights(decoder: Decoder) -> None:
    """Give linear layers, and a full head, copies of their matrices in oneDNN's layout, in place."""
    for module in decoder.modules():
        if type(module) is Linear and module.weight.is_cpu and module.weight.dtype == torch.float32:
            module.weight = nn.Parameter(packed(module.weight), requires_grad=False)
    output = decoder.embed.output
    if (
        type(decoder.head) is Full
        and output.is_cpu
        and output.dtype == torch.float32
        and not output.is_mkldnn
    ):
        decoder.head = PackedHead(decoder.head, packed(output))
