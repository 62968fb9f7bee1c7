"""Laws of `nas.export.constructors`: the text builds the layer it was made from, and says no more than it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.export.constructors import constructor
from nas.export.errors import ExportError
from nas.export.plain import torch_class

TEXTS = [
    "nn.Conv1d(4, 6, 3)",
    'nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=2, groups=4, bias=False, padding_mode="reflect")',
    'nn.Conv2d(4, 8, 3, padding="same")',
    "nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)",
    "nn.Linear(3, 4, bias=False)",
    "nn.Bilinear(2, 3, 4, bias=False)",
    "nn.BatchNorm2d(4, eps=0.001, momentum=None, affine=False)",
    "nn.BatchNorm1d(4, track_running_stats=False)",
    "nn.GroupNorm(2, 4, affine=False)",
    "nn.LayerNorm((3, 4), elementwise_affine=False)",
    "nn.LayerNorm(4, bias=False)",
    "nn.InstanceNorm2d(3, affine=True)",
    "nn.RMSNorm(4)",
    "nn.ReLU(inplace=True)",
    "nn.PReLU(num_parameters=3)",
    'nn.GELU(approximate="tanh")',
    "nn.Softmax(dim=1)",
    "nn.Hardtanh(min_val=-2, max_val=3)",
    "nn.ReLU6()",
    "nn.Threshold(0.1, 20)",
    "nn.MaxPool2d(2)",
    "nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)",
    "nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)",
    "nn.AdaptiveAvgPool2d((None, 3))",
    "nn.FractionalMaxPool2d(2, output_size=3)",
    "nn.Dropout(p=0.3)",
    "nn.Flatten(start_dim=2)",
    "nn.Unflatten(1, (2, 2))",
    'nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True)',
    "nn.PixelShuffle(2)",
    "nn.ZeroPad2d((1, 2, 3, 4))",
    'nn.ConstantPad1d(2, float("-inf"))',
    "nn.Identity()",
    "nn.Embedding(10, 4, padding_idx=0)",
    'nn.EmbeddingBag(10, 3, mode="sum")',
    "nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True, proj_size=2)",
    "nn.GRU(3, 4, bias=False)",
    'nn.RNN(3, 4, nonlinearity="relu")',
    "nn.MultiheadAttention(8, 2, bias=False, batch_first=True)",
    "nn.MultiheadAttention(8, 2, dropout=0.1, add_bias_kv=True, add_zero_attn=True, kdim=4)",
    "nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)",
    "nn.TransformerEncoderLayer(8, 2, activation=nn.SiLU())",
    "nn.TransformerDecoderLayer(8, 2, bias=False)",
    "nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3, norm=nn.LayerNorm(8))",
    "nn.AdaptiveLogSoftmaxWithLoss(20, 30, (10,))",
]


def build(text: str) -> nn.Module:
    built: nn.Module = eval(text, {"nn": nn, "F": F})
    return built.eval()


@pytest.mark.parametrize("text", TEXTS)
def test_the_shortest_constructor_call_comes_back_from_the_layer(text: str) -> None:
    assert constructor(build(text), "layer") == text


@pytest.mark.parametrize(
    ("long", "short"),
    [
        (
            "nn.Conv2d(4, 8, (3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)",
            "nn.Conv2d(4, 8, 3, padding=1)",
        ),
        ("nn.MaxPool2d((2, 2), stride=(2, 2))", "nn.MaxPool2d((2, 2))"),
        ("nn.BatchNorm2d(4, eps=1e-5, momentum=0.1)", "nn.BatchNorm2d(4)"),
        ("nn.LayerNorm([64])", "nn.LayerNorm(64)"),
    ],
)
def test_what_is_default_is_not_written(long: str, short: str) -> None:
    assert constructor(build(long), "layer") == short


def test_a_layer_that_no_constructor_call_builds_is_named_with_the_difference_and_the_cure() -> None:
    layer = nn.Conv2d(3, 4, 3)
    layer.register_buffer("weight_mask", torch.ones(4))
    with pytest.raises(
        ExportError, match=r"stage2\.conv: expected that nn\.Conv2d\(.*buffers of the layer are .*weight_mask.*remove"
    ):
        constructor(layer, "stage2.conv")


def test_the_torch_class_of_a_subclass_is_its_base_only_if_it_computes_the_same() -> None:
    class OnlyAnotherConstructor(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, padding=1)

    class Standardised(nn.Conv2d):
        def _conv_forward(self, input: Any, weight: Any, bias: Any) -> Any:
            return super()._conv_forward(input, weight - weight.mean(), bias)

    patched = nn.ReLU()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert torch_class(OnlyAnotherConstructor(4)) is nn.Conv2d
    assert torch_class(Standardised(4, 4, 3)) is None
    assert torch_class(patched) is None
    assert torch_class(nn.Sequential()) is None
