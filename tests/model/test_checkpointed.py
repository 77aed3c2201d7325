"""Activations computed twice: the same losses and gradients, bit for bit, as those that were kept."""

import pytest
import torch


@pytest.mark.parametrize(
    "parts",
    [
        "",
        "norm=layernorm pos=learned ffn=gelu",
        "pos=t5_relative",  # whose bias is trained, and shared by the layers
        "attn=mqa attn/pattern=sliding pos=alibi",
        "ffn=moe",
        "ffn=moe_deepseek_v3 ffn.n_dense=0 ffn.rest.router.speed=9.0",  # chooses others after a step
        "block=stochastic_depth",
        "decoder.layers_per_block=2",
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_gradients_are_the_same_bitwise(nano, parts, half):
    decoder = nano(*parts.split(), "model.dropout=0.2", gain=4).train()
    tokens = torch.randint(512, (3, 33), generator=torch.Generator().manual_seed(0))
    kept = []
    found = []
    for checkpointed in (False, True):
        decoder.checkpoint_activations = checkpointed
        decoder.zero_grad()
        torch.manual_seed(0)
        count = [0]

        def pack(tensor, count=count):
            count[0] += tensor.nbytes
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            loss = decoder(tokens[:, :-1], targets_BT=tokens[:, 1:]) + decoder.auxiliary_loss()
        loss.backward()
        kept.append(count[0])
        found.append([loss.detach(), *(p.grad.clone() for p in decoder.parameters())])
    names = ["loss", *(name for name, _ in decoder.named_parameters())]
    for name, a, b in zip(names, *found, strict=True):
        if name.startswith("pos.") and decoder.pos.bias is not None:
            # The layers' shares of a trained bias are summed in another order.
            torch.testing.assert_close(a, b, rtol=1e-2 if half else 1e-5, atol=1e-6)
        else:
            assert torch.equal(a, b), name
    assert kept[1] < 0.6 * kept[0]  # the rest is embedding, logits and loss
