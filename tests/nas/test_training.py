"""Laws of the trainer: reproducible, leaves no trace, learns, fails clearly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from nas.data import Data, Split, from_datasets, load_data
from nas.errors import ConfigError, EvaluationFailed
from nas.training import TrainConfig, evaluate, train
from nas.training.augment import augment, blank, shift_and_flip
from nas.training.optim import learning_rate, make_optimizer
from ops.layers import SparseLinear


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def mlp(seed: int = 0, dropout: float = 0.0, density: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        SparseLinear(64, 64, density=density),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(64, 10),
    )


CPU = {"device": "cpu", "batch_size": 64}


def test_it_learns_the_digits_dense_and_at_a_tenth_of_the_weights(digits):
    dense = train(mlp(), digits, TrainConfig(epochs=10, **CPU), seed=0)
    assert dense.val_accuracy > 0.95
    for method in ("static", "gradual", "rigl"):
        sparse = train(mlp(density=0.1), digits, TrainConfig(epochs=10, method=method, **CPU), seed=0)
        assert sparse.val_accuracy > 0.9, method
        assert sparse.history[-1]["density"] == pytest.approx((410 + 640) / (4096 + 640))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(digits):
    config = TrainConfig(epochs=2, augment=("crop", "flip", "cutout"), cutout=2, crop_padding=1, **CPU)
    results = []
    for seed in (5, 5, 6):
        model = mlp(dropout=0.3)
        torch.manual_seed(seed * 17 + len(results))  # what happened before must not matter
        history = train(model, digits, config, seed=seed).history
        results.append((model.state_dict(), [row["train_loss"] for row in history]))
    assert results[0][1] == results[1][1] != results[2][1]
    assert all(torch.equal(results[0][0][key], results[1][0][key]) for key in results[0][0])


def test_training_leaves_the_global_generator_and_the_data_as_they_were(digits):
    x, model = digits.train.x.clone(), mlp(dropout=0.5)
    state = torch.get_rng_state()
    train(model, digits, TrainConfig(epochs=1, augment=("crop", "cutout"), **CPU), seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, digits.train.x)


def test_the_history_has_a_row_per_epoch_and_the_callback_sees_each(digits):
    seen = []
    model = mlp()
    result = train(model, digits, TrainConfig(epochs=3, **CPU), seed=0, on_epoch=seen.append)
    assert seen == result.history
    assert [row["epoch"] for row in seen] == [1, 2, 3]
    assert set(seen[0]) == {
        "epoch",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "lr",
        "density",
        "seconds",
    }
    last = evaluate(model, digits.val)
    assert (
        (result.val_accuracy, result.val_loss)
        == (last.accuracy, last.loss)
        == (seen[-1]["val_accuracy"], seen[-1]["val_loss"])
    )
    assert not model.training


def test_a_network_handed_over_in_eval_mode_is_trained_in_training_mode(digits):
    models = [mlp(dropout=0.3), mlp(dropout=0.3).eval()]
    losses = [train(model, digits, TrainConfig(epochs=2, **CPU), seed=0).val_loss for model in models]
    assert losses[0] == losses[1]
    assert not torch.equal(models[1][2].running_mean, torch.zeros(64))


def test_the_test_part_is_not_looked_at(digits):
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"test.{name} was used")

    fields = {key: getattr(digits, key) for key in digits.__dataclass_fields__}
    train(mlp(), Data(**{**fields, "test": Untouchable()}), TrainConfig(epochs=1, **CPU), seed=0)


def test_every_row_is_seen_at_most_once_per_epoch_in_another_order_each_time():
    x = torch.arange(70, dtype=torch.float32)[:, None]
    data = from_datasets((x, torch.arange(70) % 2), val=(x[:4], torch.arange(4) % 2), test=(x[:4], torch.arange(4) % 2))
    seen: list[torch.Tensor] = []

    class Spy(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(x.detach().clone())
            return super().forward(x)

    train(Spy(1, 2), data, TrainConfig(epochs=2, batch_size=16, device="cpu"), seed=0)
    assert [len(x) for x in seen] == [16] * 8  # four whole batches of 70 rows, twice
    first, second = torch.cat(seen[:4]).flatten(), torch.cat(seen[4:]).flatten()
    assert len(first.unique()) == len(second.unique()) == 64
    assert not torch.equal(first, second)


def test_a_training_part_smaller_than_a_batch_is_one_batch():
    x = torch.randn(30, 4)
    data = from_datasets((x, torch.arange(30) % 2))
    result = train(nn.Linear(4, 2), data, TrainConfig(epochs=2, batch_size=1000, device="cpu"), seed=0)
    assert len(result.history) == 2


def test_evaluate_is_the_plain_mean_whatever_the_batch_size(digits):
    model = mlp().eval()
    with torch.no_grad():
        logits = model(digits.val.x)
        loss = float(nn.functional.cross_entropy(logits.double(), digits.val.y))
        accuracy = float((logits.argmax(1) == digits.val.y).double().mean())
    for size in (1, 50, 1024):
        found = evaluate(model, digits.val, batch_size=size)
        assert found.accuracy == pytest.approx(accuracy, abs=1e-12)
        assert found.loss == pytest.approx(loss, rel=1e-5)
    model.train()
    evaluate(model, digits.val)
    assert model.training


def test_a_diverging_training_names_epoch_and_step_and_cure(digits):
    with pytest.raises(
        EvaluationFailed, match=r"diverged: the loss is (nan|inf) in epoch 1, step \d+ of 20.*Lower train\.lr"
    ):
        train(mlp(), digits, TrainConfig(epochs=2, lr=1e30, warmup_epochs=0, **CPU), seed=0)


@pytest.mark.parametrize("method", ["gradual", "rigl"])
def test_a_diverging_training_is_told_before_masks_are_ranked(digits, method):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(density=0.5)

        def forward(self, x):
            return self.body(x) * math.nan

    with pytest.raises(EvaluationFailed, match="diverged: the loss is nan in epoch 1, step 1 of 20"):
        train(Broken(), digits, TrainConfig(epochs=2, method=method, **CPU), seed=0)


def test_a_network_with_the_wrong_number_of_outputs_is_refused(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    with pytest.raises(EvaluationFailed, match=r"gives \[64, 9\] for a batch of 64, expected \[64, 10\]"):
        train(model, digits, TrainConfig(epochs=1, **CPU), seed=0)


def test_an_auxiliary_head_adds_its_share_of_the_loss(digits):
    class WithAuxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = mlp(), mlp(seed=1)

        def forward(self, x):
            return (self.main(x), self.side(x)) if self.training else self.main(x)

    moved = {}
    for weight in (0.0, 0.4):
        model = WithAuxiliary()
        before = model.side[1].weight.detach().clone()
        train(model, digits, TrainConfig(epochs=1, aux_weight=weight, weight_decay=0.0, **CPU), seed=0)
        moved[weight] = not torch.equal(before, model.side[1].weight)
    assert moved == {0.0: False, 0.4: True}


def test_set_progress_is_called_each_step_from_zero_to_just_below_one(digits):
    class Listener(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heard = mlp(), []

        def set_progress(self, fraction):
            self.heard.append(fraction)

        def forward(self, x):
            return self.body(x)

    model = Listener()
    train(model, digits, TrainConfig(epochs=2, **CPU), seed=0)
    assert model.heard == [i / 40 for i in range(40)]


def test_augmenting_a_table_is_refused():
    data = from_datasets((torch.randn(20, 3), torch.arange(20) % 2))
    with pytest.raises(ConfigError, match=r"augment: flip are for images, but rows of custom are \(3,\)"):
        train(nn.Linear(3, 2), data, TrainConfig(augment=("flip",), device="cpu"), seed=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a CUDA device")
def test_cuda_where_there_is_none_is_refused(digits):
    with pytest.raises(ConfigError, match='"cuda" was asked for'):
        train(mlp(), digits, TrainConfig(device="cuda"), seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["static", "gradual", "rigl"])
def test_training_on_cuda_learns_and_comes_back_to_the_cpu(digits, method):
    model = mlp(density=0.2)
    result = train(
        model,
        digits,
        TrainConfig(epochs=10, batch_size=64, method=method, augment=("crop",), crop_padding=1, device="cuda"),
        seed=0,
    )
    assert result.val_accuracy > 0.85
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert model[1].nnz == 820
    assert (model[1].weight[~model[1].mask] == 0).all()


# ---- optimizer and learning rate


def test_weight_decay_is_not_on_biases_and_norms():
    model = mlp()
    for name in ("sgd", "adamw"):
        optimizer = make_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.25))
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for parameter in model.parameters():
            assert decays[id(parameter)] == (0.25 if parameter.ndim > 1 else 0.0)


def test_the_learning_rate_rises_linearly_then_follows_a_cosine_towards_zero():
    rates = [learning_rate(step, total=110, warmup=10, peak=2.0) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.01
    assert learning_rate(0, total=1, warmup=0, peak=2.0) == 2.0


def test_gradients_are_clipped_to_the_norm_asked_for(digits):
    losses = {}
    for clip in (0.0, 1e-9):
        result = train(mlp(), digits, TrainConfig(epochs=1, grad_clip=clip, weight_decay=0.0, **CPU), seed=0)
        losses[clip] = result.history[-1]["train_loss"]
    assert losses[0.0] < 1.5 < losses[1e-9]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number >= 1, got 0"),
        ({"epochs": 2.5}, "epochs: expected a whole number"),
        ({"batch_size": True}, "batch_size: expected a whole number"),
        ({"optimizer": "adma"}, "optimizer: expected one of sgd, adamw; got 'adma'"),
        ({"lr": 0.0}, "lr: expected a number > 0, got 0"),
        ({"lr": math.nan}, "lr: expected a number > 0, got nan"),
        ({"momentum": 1.0}, "momentum: expected a number >= 0 and < 1"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"augment": ("crop", "mixup")}, "augment: expected one of crop, flip, cutout; got 'mixup'"),
        ({"augment": "crop"}, "augment: expected a list of names"),
        ({"device": "tpu"}, "device: expected one of auto, cpu, cuda"),
        ({"method_options": {"end": 0.5}}, '"static" has no option "end"'),
        ({"cutout": 0}, "cutout"),
    ],
)
def test_senseless_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


def test_defaults_of_lr_and_weight_decay_belong_to_the_optimizer():
    assert (TrainConfig().peak_lr, TrainConfig().decay) == (0.05, 5e-4)
    assert (TrainConfig(optimizer="adamw").peak_lr, TrainConfig(optimizer="adamw").decay) == (0.003, 0.01)
    assert TrainConfig(lr=0.1, weight_decay=0.0).decay == 0.0


# ---- augmentation


def test_shifting_equals_padding_and_cropping():
    x = torch.randn(6, 3, 5, 7)
    down, right = torch.tensor([0, 2, -2, 1, -1, 2]), torch.tensor([0, -2, 2, 1, 0, 2])
    flip = torch.tensor([False, True, False, True, True, False])
    moved = shift_and_flip(x, down, right, flip)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    for i in range(6):
        top, left = 2 + int(down[i]), 2 + int(right[i])
        expected = padded[i, :, top : top + 5, left : left + 7]
        assert torch.equal(moved[i], expected.flip(2) if flip[i] else expected)


def test_cutout_blanks_a_clipped_square():
    x = torch.ones(3, 2, 6, 6)
    out = blank(x, torch.tensor([3, 0, 5]), torch.tensor([3, 0, 5]), 4)
    assert [int((image[0] == 0).sum()) for image in out] == [16, 4, 9]
    assert (out[0, :, 1:5, 1:5] == 0).all()
    assert (out[1, :, :2, :2] == 0).all()
    assert torch.equal(x, torch.ones(3, 2, 6, 6))


def test_augmentation_draws_for_each_image_and_repeats_with_its_seed():
    x = torch.arange(64.0).reshape(1, 1, 8, 8).expand(200, 1, 8, 8).contiguous()

    def once(seed):
        return augment(
            x, ("crop", "flip", "cutout"), padding=2, cutout=3, generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))
    assert len({tuple(image.flatten().tolist()) for image in once(1)}) > 150
    nothing = augment(x, (), padding=2, cutout=3, generator=torch.Generator())
    assert torch.equal(nothing, x)


def test_half_of_the_images_are_flipped_and_crops_reach_the_whole_range():
    x = torch.zeros(4000, 1, 9, 9)
    x[:, 0, 4, 4] = 1.0
    shifted = augment(x, ("crop",), padding=2, cutout=1, generator=torch.Generator().manual_seed(0))
    where = shifted.flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=81).reshape(9, 9)
    assert (counts[2:7, 2:7] > 100).all()  # 160 expected in each of 25 cells
    assert counts.sum() == counts[2:7, 2:7].sum()
    x = torch.arange(9.0).expand(4000, 1, 1, 9)
    flipped = augment(x.contiguous(), ("flip",), padding=1, cutout=1, generator=torch.Generator().manual_seed(0))
    assert abs(int((flipped[:, 0, 0, 0] == 8).sum()) - 2000) < 150


def test_a_split_knows_its_length():
    assert len(Split(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))) == 3
