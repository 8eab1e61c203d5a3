"""LossOnlyModule: training on the losses that a model adds in its forward."""

from __future__ import annotations

import collections
import csv
import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning")

from lightning.pytorch.loggers import CSVLogger

from pyflow.train import LossOnlyModule, add_loss, add_metric
from pyflow.train._lightning import _batch_size


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)

    def forward(self, x, y):
        error = self.linear(x)[:, 0] - y
        add_loss(error.square().mean(), "square")
        add_loss(1e-3 * self.linear.weight.square().sum(), "decay")
        add_metric(error.abs().mean(), "distance")


def loader(shuffle=False):
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1)), 8, shuffle=shuffle)


def fit(tmp_path, epochs, **options):
    module = LossOnlyModule(Model(), partial(torch.optim.Adam, lr=0.05))
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        logger=CSVLogger(tmp_path, name="log"), log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), **options)
    return module, trainer


@pytest.mark.filterwarnings("ignore")
def test_trains_shows_logs_and_resumes(tmp_path):
    module, trainer = fit(tmp_path / "a", 4)
    assert set(trainer.progress_bar_metrics) >= {"square", "decay", "distance", "loss", "val/square", "val/loss"}
    # the bar shows the mean over the epoch so far
    mean = module._sums["square"] / module._counts["square"]
    assert module._counts["square"] == 48 and trainer.progress_bar_metrics["square"] == pytest.approx(mean.item())
    with open(trainer.logger.log_dir + "/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    assert losses[-1] == pytest.approx(trainer.progress_bar_metrics["loss"], rel=1e-5)
    assert any(row.get("val/distance") for row in rows)

    _, half = fit(tmp_path / "b", 2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(tmp_path / "c", 4, ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_of_every_form():
    seen = []
    module = LossOnlyModule(nn.Identity(), torch.optim.SGD)
    module.model.forward = lambda *args, **keywords: seen.append((args, keywords))
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(2), torch.zeros(1)])
    for batch in ((1, 2), [1], {"x": 3}, collections.UserDict(x=5), 4, packed):
        module(batch)
    assert seen[:-1] == [((1, 2), {}), ((1,), {}), ((), {"x": 3}), ((), {"x": 5}), ((4,), {})]
    assert seen[-1][0][0] is packed and len(seen[-1][0]) == 1


def test_an_optimizer_may_go_through_the_parameters_twice():
    def groups(parameters):
        decayed = [p for p in parameters if p.dim() > 1]
        return torch.optim.AdamW(
            [{"params": decayed}, {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
        )

    optimizer = LossOnlyModule(nn.Linear(2, 1), groups).configure_optimizers()
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


class InTraining(nn.Module):
    """Always adds a metric, and a loss only in training."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x):
        error = self.linear(x).square().mean()
        add_metric(error, "error")
        if self.training:
            add_loss(error, "fit")


@pytest.mark.filterwarnings("ignore")
def test_validation_and_test_need_no_loss_and_loaders_are_told_apart():
    data = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = LossOnlyModule(InTraining(), partial(torch.optim.SGD, lr=0.0))
    trainer.fit(module, data, [data, data])
    shown = trainer.callback_metrics
    assert {name for name in shown if name.startswith("val/")} == {f"val/error/dataloader_idx_{i}" for i in (0, 1)}
    assert shown["val/error/dataloader_idx_1"] == shown["train/error"] == shown["train/loss"]
    assert trainer.test(module, data, verbose=False) == [{"test/error": pytest.approx(float(shown["train/error"]))}]


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"^LossOnlyModule: model must be a module, got int$"):
        LossOnlyModule(1, torch.optim.SGD)
    with pytest.raises(TypeError, match=r"^LossOnlyModule: optimizer must be callable, got str$"):
        LossOnlyModule(nn.Identity(), "adam")
    with pytest.raises(RuntimeError, match="the model added no loss"):
        LossOnlyModule(nn.Identity(), torch.optim.SGD).training_step(torch.zeros(1), 0)


class Mean(nn.Module):
    """Adds the mean of its input as the loss."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x, **rest):
        add_loss((x.to(self.weight.dtype) + self.weight).mean(), "fit")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("values", "dtype", "mean"),
    [([10.0, 10.0, 1.0], torch.float32, 7.0), ([40_000.0] * 9, torch.float16, 40_000.0)],
    ids=["uneven", "half precision"],
)
def test_bar_and_logger_show_the_mean_over_samples(values, dtype, mean):
    data = [{"text": "a", "number": 3, "x": torch.tensor(v)} for v in values]
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    trainer.fit(LossOnlyModule(Mean(dtype), partial(torch.optim.SGD, lr=0.0)), loader, loader)
    for shown in (trainer.progress_bar_metrics["fit"], trainer.callback_metrics["train/fit"]):
        assert float(shown) == pytest.approx(mean)
    assert float(trainer.callback_metrics["val/fit"]) == pytest.approx(mean)


@dataclasses.dataclass
class Pair:
    name: str
    x: torch.Tensor


Named = collections.namedtuple("Named", "name x")


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(5, 2),
        ["a", torch.zeros(5)],
        (3, {"text": ["a", "b"], "deep": {"weight": torch.tensor(2.0), "x": [None, torch.zeros(5, 1)]}}),
        Pair("a", torch.zeros(5)),
        [Named("a", torch.zeros(5))],
        collections.UserDict(text="a", x=torch.zeros(5)),
        ([], {}, torch.zeros(5)),
        torch.nn.utils.rnn.pack_sequence([torch.zeros(n) for n in (4, 3, 3, 2, 1)]),
    ],
    ids=["tensor", "string first", "nested", "dataclass", "named tuple", "mapping", "empty first", "packed"],
)
def test_batch_size_is_that_of_the_first_tensor_with_a_dim(batch):
    assert _batch_size(batch) == 5


def test_batch_size_is_1_without_such_a_tensor():
    assert [_batch_size(batch) for batch in (3, "text", torch.tensor(2.0), [], {"a": [1, 2]}, None)] == [1] * 6


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("fit", None, "fit"), "a loss and a metric must have different names, got two of 'fit'"),
        (("fit", None, "loss"), "only the sum of the losses must be called 'loss', got another value"),
        (("fit", "loss", None), "only the sum of the losses must be called 'loss', got another value"),
    ],
)
def test_two_values_of_one_name_are_refused(names, text):
    first, second, metric = names

    class Clash(nn.Module):
        def forward(self, x):
            add_loss(1.0, first)
            if second:
                add_loss(2.0, second)
            if metric:
                add_metric(3.0, metric)

    with pytest.raises(ValueError, match=f"^LossOnlyModule: {text}$"):
        LossOnlyModule(Clash(), torch.optim.SGD).training_step(torch.zeros(1), 0)
