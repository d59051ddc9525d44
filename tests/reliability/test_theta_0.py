"""Where the parameters of theta_0 are kept for a resumed training: in the checkpoint, beside the logs, or nowhere."""

import warnings

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from tests.callbacks.trainings import PROBE, plain_sgd, simple_mlp
from tests.reliability.runs import train
from torch_eft.callbacks import EFTMonitor, MeasurementWarning
from torch_eft.tensorboard import tag

DRIFT = tag("ntk_drift")


def monitored(**options):
    return EFTMonitor(PROBE, **{"preset": "light", "extra": ["taylor"], "every": 3, "budget": None} | options)


def fit(monitor, **options):
    """Full batches, so that a resumed training passes through the weights of one that nothing stopped, to rounding."""
    return train([monitor], net=simple_mlp, optimizer=plain_sgd, batch_size=24, **{"epochs": 12} | options)


@pytest.mark.parametrize("keep", ["file", "none"])
def test_theta_0_beside_the_checkpoint_or_not_at_all(tmp_path, keep):
    size = {}
    for kept in ("checkpoint", keep):
        monitor = monitored(keep_theta_0=kept)
        trainer, _ = fit(monitor, epochs=6, logger=TensorBoardLogger(tmp_path, version=kept))
        trainer.save_checkpoint(tmp_path / f"{kept}.ckpt")
        size[kept] = (tmp_path / f"{kept}.ckpt").stat().st_size
    assert size[keep] < size["checkpoint"] - 4 * sum(p.numel() for p in simple_mlp().parameters())
    aside = list(tmp_path.rglob("eft-theta_0.pt"))
    assert len(aside) == (keep == "file")
    whole, resumed = (monitored(keep_theta_0=keep) for _ in range(2))
    fit(whole)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(resumed, ckpt_path=tmp_path / f"{keep}.ckpt")
    said = [str(each.message) for each in told if each.category is MeasurementWarning]
    assert resumed.history[12][DRIFT] == pytest.approx(whole.history[12][DRIFT], rel=1e-4)
    remainder = tag("taylor_remainder")
    if keep == "file":
        assert said == []
        # In units of the outputs' change, in float32, after batches in another order: off by some units of 1.2e-7.
        assert resumed.history[12][remainder] == pytest.approx(whole.history[12][remainder], abs=8 * 1.2e-7)
        assert resumed.history[12][remainder] > 1e-4
    else:
        assert len(said) == 1 and "parameters of theta_0 were not kept" in said[0] and "taylor" in said[0]
        assert remainder not in resumed.history[12]


@pytest.mark.parametrize("damage", ["gone", "another"])
def test_a_file_of_theta_0_that_is_not_the_one(tmp_path, damage):
    monitor = monitored(keep_theta_0="file")
    trainer, _ = fit(monitor, epochs=6, logger=TensorBoardLogger(tmp_path))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    (aside,) = tmp_path.rglob("eft-theta_0.pt")
    if damage == "gone":
        aside.unlink()
    else:
        torch.save({}, aside)
    resumed = monitored()
    with pytest.warns(MeasurementWarning, match="the file of theta_0, .* is not"):
        fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert sorted(resumed.history) == [0, 3, 6, 9, 12]
    assert tag("taylor_remainder") not in resumed.history[12]


def test_where_theta_0_is_kept_is_one_of_three():
    with pytest.raises(ValueError, match=r"keep_theta_0: 'disk' given; give one of 'checkpoint', 'file', 'none'"):
        monitored(keep_theta_0="disk")
