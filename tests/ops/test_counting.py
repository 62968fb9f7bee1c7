"""Counts by hand, on the meta device as on the CPU, before as after the masks are drawn."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from ops.counting import count, kept_weights, total_kept_weights
from ops.layers import SparseConv2d, SparseLinear, draw_masks_, sparse_layers, sparsify
from ops.masks import topk_mask


def network(device="cpu"):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, device=device),  # 224 weights and biases, 8 x 5 x 5 out of 9 x 9
        nn.BatchNorm2d(8, device=device),  # 16
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False, device=device),  # 72, 8 x 3 x 3 out
        nn.Conv2d(8, 16, 1, device=device),  # 144, 16 x 3 x 3 out
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5, device=device),  # 85
    )


DENSE_MACS = 216 * 25 + 72 * 9 + 128 * 9 + 80


def test_a_dense_network_by_hand():
    counts = count(network(), (3, 9, 9))
    assert counts.params == counts.nnz == 224 + 16 + 72 + 144 + 85
    assert counts.weight_bytes == 4 * 541
    assert counts.macs == counts.dense_macs == DENSE_MACS
    assert counts.conv_macs == DENSE_MACS - 80
    assert counts.density == 1.0
    assert [(c.name, c.kind, c.shape, c.pattern, c.dense_macs) for c in counts.layers] == [
        ("0", "conv", (8, 3, 3, 3), "dense", 5400),
        ("3", "conv", (8, 1, 3, 3), "dense", 648),
        ("4", "conv", (16, 8, 1, 1), "dense", 1152),
        ("7", "linear", (5, 16), "dense", 80),
    ]


def sparse_network(device="cpu"):
    model = sparsify(network(device), 0.25, where=lambda name, _: name in ("4", "7"))
    model[7].set_target(0.5, "2:4")
    return model


def test_a_sparse_network_by_hand():
    counts = count(sparse_network(), (3, 9, 9))
    assert counts.params == 541
    assert counts.nnz == 541 - 96 - 40
    assert counts.weight_bytes == 4 * 405 + 16 + 10  # bitmaps of 128 and 80 weights
    assert counts.dense_macs == DENSE_MACS
    assert counts.macs == 5400 + 648 + 32 * 9 + 40
    assert counts.density == (216 + 72 + 32 + 40) / (216 + 72 + 128 + 80)
    assert [(c.nnz, c.density, c.pattern) for c in counts.layers[2:]] == [(32, 0.25, "unstructured"), (40, 0.5, "2:4")]


def test_counts_are_the_same_before_and_after_drawing_and_on_the_meta_device():
    model = sparse_network()
    planned = count(model, (3, 9, 9))
    draw_masks_(model, torch.Generator().manual_seed(0))
    assert count(model, (3, 9, 9)) == planned == count(sparse_network("meta"), (3, 9, 9))


def test_a_drawn_mask_decides_and_zeros_of_the_weights_do_not():
    layer = SparseLinear(10, 10, density=0.5)
    with torch.no_grad():
        layer.weight.zero_()
    assert kept_weights(layer) == 50  # as planned
    layer.set_mask(topk_mask(torch.rand(10, 10), 0.8))
    assert kept_weights(layer) == 80  # as drawn
    assert count(layer, (10,)).macs == 80


def test_nothing_is_allocated_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(
            SparseConv2d(3, 65536, 3, density=0.01), nn.Flatten(), nn.Linear(65536 * 30 * 30, 1_000_000)
        )
    counts = count(model, (3, 32, 32))  # 236 terabytes if it were real
    assert counts.params == 3 * 9 * 65536 + 65536 + 65536 * 900 * 1_000_000 + 1_000_000
    assert counts.macs == 17695 * 900 + 65536 * 900 * 1_000_000


CONVS = list(itertools.product((1, 2, 4), (1, 2), (0, 1, 2), (1, 2), ((3, 3), (1, 5))))


@pytest.mark.parametrize(("groups", "stride", "padding", "dilation", "kernel"), CONVS)
def test_conv_macs_equal_the_loop_over_output_positions(groups, stride, padding, dilation, kernel):
    height, width = 11, 14
    layer = SparseConv2d(
        4, 8, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, density=0.3, device="meta"
    )
    starts = [
        range(-padding, size + padding - dilation * (k - 1), stride)
        for size, k in zip((height, width), kernel, strict=True)
    ]
    places = sum(1 for _ in itertools.product(*starts))
    counts = count(layer, (4, height, width))
    assert counts.dense_macs == places * 8 * (4 // groups) * kernel[0] * kernel[1]
    assert counts.macs == places * layer.planned_nnz


def test_other_convolutions_by_hand():
    assert count(nn.Conv1d(2, 4, 3), (2, 10)).macs == 4 * 2 * 3 * 8
    assert count(nn.Conv3d(1, 2, 2), (1, 4, 4, 4)).macs == 2 * 8 * 27
    transposed = count(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5))
    assert transposed.macs == transposed.conv_macs == 4 * 3 * 9 * 25  # every weight meets every input position
    assert transposed.layers[0].kind == "transposed conv"


def test_a_linear_layer_counts_every_token():
    assert count(nn.Linear(6, 7), (3, 5, 6)).macs == 42 * 15
    assert count(SparseLinear(8, 8, density=0.25), (10, 8)).macs == 16 * 10


def test_macs_are_proportional_to_the_batch_and_nothing_else_is():
    one, four = count(sparse_network(), (3, 9, 9)), count(sparse_network(), (3, 9, 9), batch=4)
    assert (four.macs, four.dense_macs) == (4 * one.macs, 4 * one.dense_macs)
    assert (four.nnz, four.params, four.weight_bytes) == (one.nnz, one.params, one.weight_bytes)


def test_an_example_counts_as_its_shape_does():
    model = sparse_network()
    assert count(model, torch.full((7, 3, 9, 9), float("nan"))) == count(model, (3, 9, 9))


def test_a_layer_that_is_not_run_costs_memory_but_no_macs_and_one_run_twice_costs_twice():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.aux = nn.Linear(4, 4), nn.Linear(4, 100)

        def forward(self, x):
            x = self.twice(self.twice(x))
            return (x, self.aux(x)) if self.training else x

    counts = count(Odd().train(), (4,))
    assert counts.macs == 32
    assert counts.params == 20 + 500
    assert [c.macs for c in counts.layers] == [32, 0]


def test_shared_weights_are_stored_once():
    a = SparseLinear(4, 4, density=0.5)
    b = SparseLinear(4, 4, density=0.5)
    b.weight = a.weight
    counts = count(nn.Sequential(a, b), (4,))
    assert (counts.params, counts.nnz, counts.macs) == (16 + 8, 8 + 8, 16)
    same = count(nn.Sequential(a, nn.ReLU(), a), (4,))
    assert (same.params, same.nnz, same.macs) == (20, 12, 16)


def test_a_layer_whose_plan_keeps_everything_needs_no_bitmap():
    layer = SparseLinear(3, 3, bias=False, density=0.99)  # floor(0.01 * 9) = 0 zeros
    assert count(layer, (3,)).weight_bytes == 36
    assert count(SparseLinear(3, 3, bias=False, density=0.9), (3,)).weight_bytes == 36
    assert count(SparseLinear(3, 3, bias=False, density=0.8), (3,)).weight_bytes == 32 + 2  # one zero; 9 bits


def test_the_module_is_left_as_it_was():
    model = sparse_network().train()
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    count(model, (3, 9, 9))
    assert [part.training for part in model.children()] == [i != 1 for i in range(8)]
    assert not any(part._forward_hooks for part in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"Sequential cannot take an input of shape \[1, 4, 9, 9\]"):
        count(model, (4, 9, 9))
    assert [part.training for part in model.children()] == [i != 1 for i in range(8)]
    assert not any(part._forward_hooks for part in model.modules())


def test_matrices_outside_convolutions_and_linear_layers_are_named():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.embed(x))

    counts = count(Tokens(), torch.zeros(1, 6, dtype=torch.int64))
    assert counts.uncounted == ("embed",)
    assert counts.macs == 8 * 6
    assert count(network(), (3, 9, 9)).uncounted == ()


def test_a_network_without_parameters_counts_zero():
    counts = count(nn.ReLU(), (3,))
    assert (counts.params, counts.nnz, counts.macs, counts.weight_bytes, counts.density) == (0, 0, 0, 0, 1.0)


@pytest.mark.parametrize(("shape", "batch"), [((3, 0, 9), 1), ((3, 9, 9), 0), ((3, 9.0, 9), 1)])
def test_an_empty_input_is_refused(shape, batch):
    with pytest.raises(ValueError, match="whole numbers >= 1"):
        count(network(), shape, batch)


def test_double_precision_networks_are_counted_too():
    assert count(network().double(), (3, 9, 9)).macs == DENSE_MACS


def test_sparse_layers_of_the_total_add_up():
    model = sparsify(network(), 0.1)
    draw_masks_(model, torch.Generator().manual_seed(0))
    counts = count(model, (3, 9, 9))
    assert sum(c.nnz for c in counts.layers) == sum(layer.nnz for _, layer in sparse_layers(model))
    assert sum(c.macs for c in counts.layers) == counts.macs


def test_all_kept_weights_are_counted_alike_with_and_without_running() -> None:
    shared = nn.Linear(6, 6)
    network = nn.Sequential(shared, nn.BatchNorm1d(6), shared, nn.Linear(6, 3, bias=False), nn.PReLU())
    sparsify(network, 0.25, where=lambda name, _: name == "3")
    assert total_kept_weights(network) == 36 + 5 == count(network, (6,)).kept_weights
    draw_masks_(network, torch.Generator().manual_seed(0))
    assert total_kept_weights(network) == 36 + 5 == count(network, (6,)).kept_weights
