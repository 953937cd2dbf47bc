"""Small modules of torch of many kinds, as users write them; the tests make artifacts of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Does(nn.Module):
    """Some layers, and a function that says what is done with them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


def pointwise(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A function of numbers between two linear layers."""
    return Does(lambda m, x: m.out(function(m.up(x))), up=nn.Linear(4, 6), out=nn.Linear(6, 4))


def attention(m: Any, x: Tensor) -> Tensor:
    batch, time, width = x.shape
    q, k, v = m.qkv(x).reshape(batch, time, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return m.out(y.transpose(1, 2).reshape(batch, time, width))


def softmax_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    weights = (q @ k.transpose(-2, -1) / x.shape[-1] ** 0.5).masked_fill(m.hidden, float("-inf"))
    return weights.softmax(-1) @ v


def squeeze_excite(m: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(m.excite(F.relu(m.squeeze(x.mean((2, 3))))))
    return x * gate[:, :, None, None]


def with_hidden(module: nn.Module) -> nn.Module:
    module.register_buffer("hidden", torch.ones(5, 5, dtype=torch.bool).triu(1))
    return module


def measured_batch_norm() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    for _ in range(3):
        module(torch.randn(8, 3, 6, 6))
    return module


def mixed_precision_norm(m: Any, x: Tensor) -> Tensor:
    wide = x.float()
    return m.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: nn.Linear(4, 3), "4->3"),
    "stack": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), "4->2"),
    "tied": (tied, "4->4"),
    "exact_gelu": (lambda: pointwise(F.gelu), "4->4"),
    "tanh_gelu": (lambda: pointwise(lambda x: F.gelu(x, approximate="tanh")), "4->4"),
    "silu": (lambda: nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)), "4->4"),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 4)), "4->4"),
    "elu_softplus": (lambda: pointwise(lambda x: F.elu(x, 0.7) + F.softplus(x, 2.0)), "4->4"),
    "activations": (
        lambda: pointwise(lambda x: F.leaky_relu(x) * F.mish(x) + F.selu(x) - F.logsigmoid(x)),
        "4->4",
    ),
    "hard": (
        lambda: pointwise(
            lambda x: F.hardswish(x) + F.relu6(3 * x) * F.hardsigmoid(x) + F.hardtanh(x)
        ),
        "4->4",
    ),
    "arithmetic": (
        lambda: pointwise(
            lambda x: (
                torch.where(x > 0, x.exp(), 1 - x) / (2 + x.square())
                + torch.sin(x) * x.clamp(-1, 1) - x.abs().sqrt().log1p() + torch.maximum(x, -x) ** 3
            )
        ),
        "4->4",
    ),
    "gated": (
        lambda: Does(
            lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
            gate=nn.Linear(4, 8), up=nn.Linear(4, 8), down=nn.Linear(8, 4),
        ),
        "4->4",
    ),
    "glu": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 4)), "4->4"),
    "lora": (
        lambda: Does(
            lambda m, x: m.scale.squeeze() * ((x @ m.a.T) @ m.b.T),
            scale=parameter(1), a=parameter(2, 6), b=parameter(5, 2),
        ),
        "6->5",
    ),
    "einsum": (
        lambda: Does(lambda m, x: torch.einsum("btc,dc->btd", x, m.w), w=parameter(3, 4)),
        "5x4->5x3",
    ),
    "layer_norm": (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm([5, 4])),
        "5x4->5x4",
    ),
    "rms_norm": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 6)), "6->6"),
    "mixed_precision_norm": (lambda: Does(mixed_precision_norm, scale=parameter(6)), "6->6"),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 3, padding="same"), nn.GELU(), nn.Conv1d(6, 3, 1)),
        "3x7->3x7",
    ),
    "conv1d_depthwise_dilated": (
        lambda: nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=4), "4x9->4x9",
    ),
    "conv2d_strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), "3x8x8->4x4x4"),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 8, (3, 1), padding=(1, 0), groups=2), "4x5x4->8x5x4"),
    "conv_residual_group_norm": (
        lambda: Does(
            lambda m, x: x + m.conv(F.relu(m.norm(x))),
            norm=nn.GroupNorm(2, 4), conv=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        ),
        "4x5x5->4x5x5",
    ),
    "batch_norm_in_evaluation": (measured_batch_norm, "3x6x6->4x6x6"),
    "padded_convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.PReLU(3),
            nn.Conv2d(3, 2, 3, padding=(2, 1), padding_mode="circular"), nn.PReLU(),
            nn.ReplicationPad2d((1, 0, 0, 2)),
        ),
        "2x5x5->2x9x6",
    ),
    "standardised": (
        lambda: Does(
            lambda m, x: m.w * x / (x.var(-1, keepdim=True, unbiased=False) + x.var(-1)[:, None]),
            w=parameter(4),
        ),
        "4->4",
    ),
    "squeeze_excite": (
        lambda: Does(squeeze_excite, squeeze=nn.Linear(4, 2), excite=nn.Linear(2, 4)),
        "4x5x5->4x5x5",
    ),
    "pools": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1), nn.MaxPool2d(2), nn.AvgPool2d(3, stride=1, padding=1),
            nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(8, 3),
        ),
        "2x8x8->3",
    ),
    "pools_of_signals": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.AvgPool1d(2, count_include_pad=False),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(1), nn.Linear(4, 3),
        ),
        "2x12->3",
    ),
    "pixel_shuffle_and_pad": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, stride=2), nn.PixelShuffle(2), nn.ZeroPad2d(1)),
        "2x5x5->2x6x6",
    ),
    "attention": (
        lambda: Does(attention, qkv=nn.Linear(4, 12), out=nn.Linear(4, 4)), "5x4->5x4",
    ),
    "masked_softmax_attention": (
        lambda: with_hidden(Does(softmax_attention, qkv=nn.Linear(4, 12))), "5x4->5x4",
    ),
    "multi_head_attention": (
        lambda: Does(
            lambda m, x: m.attention(x, x, x, need_weights=False)[0],
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        "5x4->5x4",
    ),
    "encoder_layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True), "5x4->5x4",
    ),
    "mixer_with_positions": (
        lambda: Does(
            lambda m, x: (
                m.mix((x + m.where).transpose(1, 2)).transpose(1, 2) + x.sum(1, keepdim=True)
            ),
            mix=nn.Linear(5, 5), where=parameter(5, 4),
        ),
        "5x4->5x4",
    ),
    "slices": (
        lambda: Does(
            lambda m, x: torch.cat(
                [m.a(x[:, :2]), torch.stack([x[:, 3], x[:, 2]], 1), x[:, -1:]], 1
            ),
            a=nn.Linear(2, 2),
        ),
        "4->5",
    ),
}  # fmt: skip
"""What makes each module, and its signature."""

IN_BFLOAT16 = (
    "exact_gelu", "gated", "layer_norm", "mixed_precision_norm", "conv_residual_group_norm",
    "attention", "batch_norm_in_evaluation", "pools",
)  # fmt: skip


def make(name: str) -> nn.Module:
    """The module of that name, with the same parameters each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODULES[name][0]()
