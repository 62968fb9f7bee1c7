"""Sparse layers: torch's layers when dense, masked twins otherwise; targets, masks, gradients, state and replacement."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ops.layers import SparseConv2d, SparseLinear, draw_masks_, is_depthwise, sparse_layers, sparsify
from ops.masks import kept_count, random_mask, satisfies, topk_mask
from ops.patterns import NM, PatternError, Unstructured

# in, out, kernel, keywords: groups, strides, dilations, paddings of every mode, biases, rectangular kernels
CONVS = [
    (4, 8, 3, {}),
    (4, 8, 3, {"bias": False, "stride": 2, "padding": 1}),
    (4, 8, (1, 5), {"padding": "same", "dilation": 2}),
    (8, 8, 3, {"groups": 8, "padding": 1}),
    (8, 12, 3, {"groups": 4, "stride": (2, 1), "dilation": (1, 2), "padding": (2, 1)}),
    (4, 4, 3, {"padding": 1, "padding_mode": "reflect"}),
    (4, 4, 3, {"padding": (1, 2), "padding_mode": "circular", "bias": False}),
    (4, 4, 3, {"padding": "same", "padding_mode": "replicate"}),
    (4, 4, 2, {"padding": "valid", "dtype": torch.float64}),
]


def pair(in_channels, out_channels, kernel, keywords, **sparse):
    """The plain convolution and the sparse one, with equal parameters."""
    torch.manual_seed(0)
    plain = nn.Conv2d(in_channels, out_channels, kernel, **keywords)
    torch.manual_seed(0)
    twin = SparseConv2d(in_channels, out_channels, kernel, **keywords, **sparse)
    return plain, twin


def bits(output, x, layer):
    """Everything a forward and backward pass produces."""
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).sum()
    grads = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [output.detach(), *grads]


@pytest.mark.parametrize(("i", "o", "k", "keywords"), CONVS)
def test_a_convolution_of_density_one_is_torchs_bit_for_bit(i, o, k, keywords):
    plain, twin = pair(i, o, k, keywords)
    x = torch.randn(2, i, 9, 8, dtype=plain.weight.dtype, requires_grad=True)
    for a, b in zip(bits(plain(x), x, plain), bits(twin(x), x, twin), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain(x[0]), twin(x[0]))  # without a batch axis


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_density_one_is_torchs_bit_for_bit(bias):
    torch.manual_seed(0)
    plain = nn.Linear(7, 5, bias=bias)
    torch.manual_seed(0)
    twin = SparseLinear(7, 5, bias=bias)
    x = torch.randn(3, 4, 7, requires_grad=True)
    for a, b in zip(bits(plain(x), x, plain), bits(twin(x), x, twin), strict=True):
        assert torch.equal(a, b)


def test_training_at_density_one_is_torchs_bit_for_bit():
    def network():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))

    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    ends = []
    for model in (network(), sparsify(network())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            for _, layer in sparse_layers(model):
                layer.apply_mask_()
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("i", "o", "k", "keywords"), CONVS)
def test_a_masked_convolution_is_torchs_with_the_masked_weight(i, o, k, keywords):
    plain, twin = pair(i, o, k, keywords, density=0.3)
    mask = random_mask(twin.weight.shape, 0.3, "unstructured", torch.Generator().manual_seed(2))
    twin.set_mask(mask)
    with torch.no_grad():
        plain.weight.mul_(mask)
        twin.weight.add_(~mask)  # whatever is outside the mask must not matter
    x = torch.randn(2, i, 9, 8, dtype=plain.weight.dtype, requires_grad=True)
    reference, result = bits(plain(x), x, plain), bits(twin(x), x, twin)
    assert torch.equal(reference[0], result[0])
    assert torch.equal(reference[1], result[1])
    assert torch.equal(reference[2] * mask, result[2])  # the gradient arrives masked


def test_the_dense_gradient_is_taken_at_the_product():
    layer = SparseLinear(4, 3, density=0.5)
    layer.set_mask(topk_mask(layer.weight.abs(), 0.5))
    x = torch.randn(6, 4)
    layer.capture_dense_grad = True
    layer(x).pow(2).sum().backward()
    free = layer.effective_weight().detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(x, free, layer.bias).pow(2).sum(), free)
    assert torch.equal(layer.dense_grad, expected)
    assert bool((layer.dense_grad[~layer.mask] != 0).all())
    assert torch.equal(layer.weight.grad, expected * layer.mask)


def test_the_dense_gradient_sums_over_backward_passes_and_starts_anew_when_switched_on():
    layer = SparseConv2d(2, 4, 3, density=0.5)
    draw_masks_(layer, torch.Generator().manual_seed(0))
    x = torch.randn(1, 2, 5, 5)
    assert layer.dense_grad is None
    layer(x).sum().backward()
    assert layer.dense_grad is None  # not asked for
    layer.capture_dense_grad = True
    layer(x).sum().backward()
    once = layer.dense_grad.clone()
    layer(x).sum().backward()
    assert torch.allclose(layer.dense_grad, 2 * once)
    layer.capture_dense_grad = False
    layer(x).sum().backward()
    assert torch.allclose(layer.dense_grad, 2 * once)
    layer.capture_dense_grad = True
    assert layer.dense_grad is None
    (layer(x) + layer(x)).sum().backward()  # used twice in one pass
    assert torch.allclose(layer.dense_grad, 2 * once)


def test_the_dense_gradient_of_a_dense_layer_is_its_gradient():
    layer = SparseLinear(4, 3)
    layer.capture_dense_grad = True
    layer(torch.randn(5, 4)).pow(2).sum().backward()
    assert torch.equal(layer.dense_grad, layer.weight.grad)


def test_capturing_does_no_harm_where_no_gradient_flows():
    layer = SparseLinear(4, 3, density=0.5)
    layer.capture_dense_grad = True
    with torch.no_grad():
        layer(torch.randn(2, 4))
    layer.weight.requires_grad_(False)
    layer(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert layer.dense_grad is None


def test_setting_a_mask_zeroes_the_rest_exactly():
    layer = SparseConv2d(8, 8, 3, density=0.5, pattern="2:4")
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")  # 0 * NaN would stay NaN
    before = layer.weight.detach().clone()
    mask = random_mask(layer.weight.shape, 0.5, "2:4", torch.Generator().manual_seed(0))
    mask[0, 0] = False
    layer.set_mask(mask)
    assert bool((layer.weight[~mask] == 0).all())
    assert torch.equal(layer.weight[mask], before[mask])
    assert layer.nnz == int(mask.sum())
    mask.fill_(False)
    assert layer.nnz > 0  # the layer has its own copy


def test_apply_mask_zeroes_what_a_step_revived():
    layer = SparseLinear(8, 8, density=0.25)
    draw_masks_(layer, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.add_(1)
    layer.apply_mask_()
    assert int((layer.weight != 0).sum()) == layer.nnz == 16


def test_a_fresh_layer_keeps_everything_whatever_its_target():
    layer = SparseConv2d(8, 8, 3, density=0.25, pattern="1:4")
    assert bool(layer.mask.all())
    assert layer.mask.dtype == torch.bool
    assert layer.nnz == 576
    assert layer.planned_nnz == 144
    assert layer.pattern == NM(1, 4)


def test_a_grown_weight_of_value_zero_stays_in_the_mask():
    layer = SparseLinear(4, 4, density=0.5)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    layer.set_mask(mask)
    with torch.no_grad():
        layer.weight.zero_()
    assert layer.nnz == 8
    layer(torch.ones(1, 4)).sum().backward()
    assert torch.equal(layer.weight.grad != 0, mask)


def test_a_mask_of_another_dtype_or_shape_is_refused():
    layer = SparseLinear(4, 3, density=0.5)
    with pytest.raises(TypeError, match=r"bool mask, got torch\.float32"):
        layer.set_mask(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"\[3, 4\], got \[4, 3\]"):
        layer.set_mask(torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="1 zeros of 12, but the layer has density 1"):
        SparseLinear(4, 3).set_mask(torch.arange(12).reshape(3, 4) > 0)
    SparseLinear(4, 3).set_mask(torch.ones(3, 4, dtype=torch.bool))


def test_targets_are_checked_at_once_and_named():
    with pytest.raises(PatternError, match=r"SparseConv2d: 2:4 sparsity .* \[8, 3, 3, 3\] .* Use 4 input"):
        SparseConv2d(3, 8, 3, density=0.5, pattern="2:4")
    with pytest.raises(PatternError, match="depthwise"):
        SparseConv2d(8, 8, 3, groups=8, density=0.5, pattern="4x1")
    with pytest.raises(PatternError, match="3 per group"):
        SparseConv2d(8, 6, 3, groups=2, density=0.5, pattern="2x1")
    with pytest.raises(ValueError, match=r"density of SparseLinear in \(0, 1\] .* got 0"):
        SparseLinear(4, 4, density=0)
    with pytest.raises(ValueError, match=r"SparseLinear: pattern 2:4 has density 0\.5"):
        SparseLinear(4, 4, density=0.3, pattern="2:4")
    with pytest.raises(PatternError, match="did you mean"):
        SparseLinear(4, 4, pattern="unstructurd")
    layer = SparseLinear(4, 4)
    with pytest.raises(PatternError, match=r"^head: 1x3 blocks"):
        layer.set_target(0.5, "1x3", "head")
    assert (layer.density, layer.pattern) == (1.0, Unstructured())
    SparseConv2d(3, 8, 3, density=1.0, pattern="2:4")  # a dense layer has no structure that could be illegal


def test_the_target_can_only_be_changed_by_set_target():
    layer = SparseLinear(8, 8)
    for name, value in (("density", 0.5), ("pattern", "2:4"), ("nnz", 3)):
        with pytest.raises(AttributeError):
            setattr(layer, name, value)
    layer.set_target(0.5, "2:4")
    assert (layer.density, str(layer.pattern)) == (0.5, "2:4")
    draw_masks_(layer, torch.Generator().manual_seed(0))
    layer.set_target(0.25, "unstructured")
    assert layer.nnz == 32  # the mask is the method's business
    layer.set_target(1.0)
    assert layer.nnz == 64
    assert layer.effective_weight() is layer.weight


def network(device="cpu"):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, device=device),
        nn.BatchNorm2d(8, device=device),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False, device=device),
        nn.Sequential(nn.Conv2d(8, 16, 1, device=device), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4, device=device),
    )


def test_draw_masks_draws_every_sparse_layer_at_its_target():
    model = sparsify(network(), 0.25)
    model[7].set_target(0.5, "2:4")
    model[0].set_target(1.0)
    draw_masks_(model, torch.Generator().manual_seed(7))
    for _, layer in sparse_layers(model):
        assert layer.nnz == layer.planned_nnz == kept_count(layer.weight.shape, layer.density, layer.pattern)
        assert layer.density == 1 or satisfies(layer.mask, layer.pattern)
        assert bool((layer.weight[~layer.mask] == 0).all())
    again = sparsify(network(), 0.25)
    again[7].set_target(0.5, "2:4")
    again[0].set_target(1.0)
    draw_masks_(again, torch.Generator().manual_seed(7))
    for (_, a), (_, b) in zip(sparse_layers(model), sparse_layers(again), strict=True):
        assert torch.equal(a.mask, b.mask)


def test_state_dict_carries_the_masks_and_comes_back_equal():
    model = sparsify(network(), 0.25)
    draw_masks_(model, torch.Generator().manual_seed(0))
    model[0].capture_dense_grad = True
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    state = model.state_dict()
    assert [k for k in state if k.endswith("mask")] == ["0.mask", "3.mask", "4.0.mask", "7.mask"]
    assert not any("dense_grad" in k for k in state)
    assert all(state[k].dtype == torch.bool for k in state if k.endswith("mask"))
    other = sparsify(network(), 0.25)
    other.load_state_dict(state)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert [layer.nnz for _, layer in sparse_layers(other)] == [54, 18, 32, 16]


def test_loading_masks_is_strict():
    masked = sparsify(network(), 0.25)
    draw_masks_(masked, torch.Generator().manual_seed(0))
    dense = sparsify(network())
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(RuntimeError, match=r"7\.mask: the mask has 48 zeros of 64, but the layer has density 1"):
        dense.load_state_dict(masked.state_dict())
    assert torch.equal(dense.state_dict()["7.weight"], before["7.weight"])
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.mask"):
        masked.load_state_dict(network().state_dict())
    state = masked.state_dict()
    state["7.mask"] = state["7.mask"].float()
    with pytest.raises(RuntimeError, match=r"7\.mask: expected bool, got torch\.float32"):
        masked.load_state_dict(state)
    dense.load_state_dict(sparsify(network(), 0.5).state_dict())  # masks without zeros are welcome everywhere


def test_masks_load_onto_meta_layers_by_assignment():
    masked = sparsify(network(), 0.25)
    draw_masks_(masked, torch.Generator().manual_seed(0))
    empty = sparsify(network("meta"), 0.25)
    empty.load_state_dict(masked.state_dict(), assign=True)
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(masked.eval()(x), empty.eval()(x))


def test_deepcopy_is_independent():
    layer = SparseLinear(8, 8, density=0.5, pattern="2:4")
    draw_masks_(layer, torch.Generator().manual_seed(0))
    layer.capture_dense_grad = True
    layer(torch.randn(2, 8)).sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.mask, layer.mask)
    assert (twin.density, twin.pattern, twin.capture_dense_grad) == (0.5, NM(2, 4), True)
    twin.set_mask(torch.zeros(8, 8, dtype=torch.bool))
    assert layer.nnz == 32
    assert torch.equal(twin.dense_grad, layer.dense_grad)


def test_to_moves_the_mask_and_changes_its_dtype_never():
    layer = SparseLinear(8, 8, density=0.5)
    draw_masks_(layer, torch.Generator().manual_seed(0))
    layer.capture_dense_grad = True
    layer(torch.randn(2, 8)).sum().backward()
    layer.to(torch.float64)
    assert (layer.weight.dtype, layer.mask.dtype, layer.dense_grad.dtype) == (torch.float64, torch.bool, torch.float64)
    assert layer(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64
    layer.to("meta")
    assert layer.mask.is_meta
    assert layer.dense_grad.is_meta


def test_meta_layers_know_shapes_and_plans_but_no_counts():
    layer = SparseConv2d(8, 16, 3, density=0.25, pattern="4x1", device="meta")
    assert layer.mask.is_meta
    assert layer.planned_nnz == 288
    assert layer(torch.empty(2, 8, 9, 9, device="meta")).shape == (2, 16, 7, 7)
    with pytest.raises(RuntimeError, match="planned_nnz"):
        _ = layer.nnz
    layer.set_mask(torch.ones(16, 8, 3, 3, dtype=torch.bool, device="meta"))


def test_a_meta_layer_given_memory_and_reset_keeps_everything():
    layer = SparseLinear(8, 8, density=0.5, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.nnz == 64
    assert bool(layer.weight.isfinite().all())


def test_sparsify_replaces_in_place_and_shares_the_parameters():
    model = network().eval()
    parameters = list(model.parameters())
    x = torch.randn(2, 3, 6, 6)
    before = model(x)
    assert sparsify(model, 0.5) is model
    assert [name for name, _ in sparse_layers(model)] == ["0", "3", "4.0", "7"]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(x), before)  # nothing drawn yet
    assert not any(layer.training for layer in model.modules())
    assert model[3].bias is None
    assert (model[0].padding, model[3].groups) == ((1, 1), 8)


def test_sparsify_of_a_single_layer_returns_its_twin():
    plain = nn.Linear(4, 4)
    twin = sparsify(plain, 0.5, "2:4")
    assert isinstance(twin, SparseLinear)
    assert twin.weight is plain.weight
    assert sparsify(twin, 0.25) is twin  # sparse layers are left as they are
    assert twin.density == 0.5


def test_sparsify_takes_what_where_selects():
    seen = []
    model = sparsify(network(), 0.5, where=lambda name, layer: seen.append(name) or not is_depthwise(layer))
    assert seen == ["0", "3", "4.0", "7"]
    assert [name for name, _ in sparse_layers(model)] == ["0", "4.0", "7"]
    assert type(model[3]) is nn.Conv2d


def test_sparsify_leaves_subclasses_alone():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"special": Special(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    sparsify(model, 0.5)
    assert sparse_layers(model) == []


def test_sparsify_replaces_nothing_if_one_layer_is_illegal():
    model = network()
    with pytest.raises(PatternError, match=r"^0: 2:4 .* \[8, 3, 3, 3\]"):
        sparsify(model, 0.5, "2:4")
    assert sparse_layers(model) == []
    with pytest.raises(ValueError, match=r"4\.0: pattern 2:4 has density 0\.5 .* got density 0\.25"):
        sparsify(model, 0.25, "2:4", where=lambda name, _: name == "4.0")


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = sparsify(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())}), 0.5)
    assert model["a"] is model["b"][0]
    assert len(sparse_layers(model)) == 1


@pytest.mark.parametrize(("i", "o", "k", "keywords"), CONVS)
def test_sparsify_keeps_every_setting_of_a_convolution(i, o, k, keywords):
    plain, _ = pair(i, o, k, keywords)
    twin = sparsify(plain, 0.5)
    x = torch.randn(2, i, 9, 8, dtype=plain.weight.dtype)
    assert torch.equal(plain(x), twin(x))
    for name in (
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "kernel_size",
        "in_channels",
        "out_channels",
    ):
        assert getattr(plain, name) == getattr(twin, name)


def test_is_depthwise():
    assert is_depthwise(nn.Conv2d(8, 8, 3, groups=8))
    assert is_depthwise(SparseConv2d(8, 16, 3, groups=8))
    for layer in (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(1, 8, 3), nn.Linear(8, 8), nn.ReLU()):
        assert not is_depthwise(layer)


def test_masks_hold_under_momentum_and_adam_when_applied():
    for make in (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.01),
    ):
        model = sparsify(network(), 0.25)
        draw_masks_(model, torch.Generator().manual_seed(0))
        optimizer = make(model.parameters())
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 6, 6)).pow(2).sum().backward()
            optimizer.step()
            for _, layer in sparse_layers(model):
                layer.apply_mask_()
        for _, layer in sparse_layers(model):
            assert bool((layer.weight[~layer.mask] == 0).all())
            assert layer.nnz == layer.planned_nnz


def test_the_text_of_a_layer_shows_its_target():
    assert repr(SparseLinear(8, 4, density=0.5, pattern="2:4")).endswith("bias=True, density=0.5, pattern=2:4)")
    assert repr(SparseConv2d(8, 4, 3)).endswith("density=1)")


def test_layers_survive_symbolic_tracing_and_export():
    model = sparsify(network(), 0.25).eval()
    draw_masks_(model, torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (x,)).module()
        traced = torch.fx.symbolic_trace(model)
    for copied in (exported, traced):
        assert torch.allclose(copied(x), model(x), atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_autocast_gives_the_masked_result(density):
    layer = SparseLinear(16, 16, density=density)
    draw_masks_(layer, torch.Generator().manual_seed(0))
    plain = nn.Linear(16, 16)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
        assert layer(x).dtype == torch.bfloat16


def test_importing_ops_imports_no_kernel_compiler():
    code = "import sys, ops; print(sorted(m for m in ('numba', 'optuna', 'ray', 'nni') if m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_all_public_names_are_exported_and_sorted():
    import ops

    assert all(hasattr(ops, name) for name in ops.__all__)
    assert len(set(ops.__all__)) == len(ops.__all__)
    assert list(itertools.filterfalse(ops.__all__.__contains__, ["SparseConv2d", "topk_mask", "parse_pattern"])) == []
