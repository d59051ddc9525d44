"""Files that a training leaves on disk: the JSONL file next to those of any logger, or a sentence saying why not."""

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from tests.callbacks.trainings import PROBE, digest, plain_sgd, run, simple_mlp
from torch_eft.callbacks import EFTMonitor, MeasurementWarning, NTKMonitor
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.tensorboard.run_info import find_jsonl, read_jsonl


def light(**options):
    return EFTMonitor(PROBE, preset="light", every="epoch", budget=None, on_error="raise", **options)


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_measurements_are_next_to_the_loggers_files(tmp_path, make):
    monitor, logger = light(), make(tmp_path)
    run([monitor], logger=logger)
    (path,) = find_jsonl(logger.log_dir)
    records = read_jsonl(path)
    assert records.measurements == monitor.history
    assert records.info["network"] == "Training"
    assert records.info["probe"] == [4, 3]
    assert records.info["level"] == "measurements only"
    assert records.info["optimizer"] == "SGD, lr 0.05, momentum 0.9"


def test_several_loggers_one_file_and_none_if_not_wanted(tmp_path):
    loggers = [CSVLogger(tmp_path / "a"), TensorBoardLogger(tmp_path / "b")]
    run([light()], logger=loggers)
    assert [path.parent for path in find_jsonl(tmp_path)] == [tmp_path / "a" / "lightning_logs" / "version_0"]
    run([light(jsonl=False)], logger=CSVLogger(tmp_path / "c"))
    assert not list((tmp_path / "c").rglob("*.jsonl"))


def test_two_monitors_do_not_share_a_file(tmp_path):
    few, many = NTKMonitor(PROBE, budget=None), light()
    run([few, many], logger=CSVLogger(tmp_path))
    folder = tmp_path / "lightning_logs" / "version_0"
    assert read_jsonl(folder / "eft.jsonl").measurements == many.history
    assert read_jsonl(folder / "eft-2.jsonl").measurements == few.history


def test_an_unwritable_directory_is_one_sentence_and_the_training_is_the_same(tmp_path):
    class Elsewhere(Logger):
        name, version, log_dir = "elsewhere", 0, str(tmp_path / "blocked" / "logs")

        def log_metrics(self, metrics, step=None):
            pass

        def log_hyperparams(self, *unused):
            pass

    (tmp_path / "blocked").write_text("a file, not a directory")
    reference = digest(*run())
    monitor = EFTMonitor(PROBE, preset="light", every="epoch", budget=None)
    sentence = r"eft.jsonl cannot be written \(.*\); training and the other"
    with pytest.warns(MeasurementWarning, match=sentence) as caught:
        assert digest(*run([monitor], logger=Elsewhere())) == reference
    assert sum(isinstance(warning.message, MeasurementWarning) for warning in caught) == 1
    assert not monitor.skipped
    assert len(monitor.history) == 4


def test_a_run_resumed_in_one_file(tmp_path):
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from tests.callbacks.trainings import Training, dataset, normed_net, sgd

    first, logger = light(), CSVLogger(tmp_path)
    trainer, _ = run([first], logger=logger, epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = light()
    again = CSVLogger(tmp_path, version=0)
    options = dict(logger=again, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    Trainer(max_epochs=3, callbacks=[second], **options).fit(
        Training(normed_net(), sgd), DataLoader(dataset(), batch_size=8), ckpt_path=tmp_path / "half.ckpt"
    )
    records = read_jsonl(tmp_path / "lightning_logs" / "version_0" / "eft.jsonl")
    assert records.measurements == second.history  # what was measured before the checkpoint is in the file already
    assert list(second.history) == [0, 3, 6, 9]


def test_pages_and_validity_of_a_compared_run(tmp_path):
    monitor = EFTMonitor(PROBE, instruments=[TheoryInstrument(order=0)], budget=None, on_error="raise")
    run([monitor], net=simple_mlp, optimizer=plain_sgd, batch_size=24, logger=CSVLogger(tmp_path))
    records = read_jsonl(find_jsonl(tmp_path)[0])
    assert records.info["validity"] == {"flag": monitor.validity.flag, "reason": monitor.validity.reason}
    assert records.info["level"] == "ensemble, order 0"
    assert records.info["depth"] == 3
    assert records.info["diagnosis"].startswith("### MLP 5-16-16-3, tanh")
    assert {"diagnosis", "validity", "overhead"} <= set(records.pages)
    assert "title" in records.info["quantities"]["ntk_trace"]


def test_a_short_training_has_a_curve_and_says_what_was_left_out(tmp_path):
    monitor = EFTMonitor(PROBE, every=1)
    run([monitor], epochs=6, logger=CSVLogger(tmp_path))
    assert len(monitor.history) == 13 and {0, 1, 18} <= set(monitor.history)
    assert "; left out: " in monitor.overhead() and "budget=None brings them" in monitor.overhead()
    page = read_jsonl(find_jsonl(tmp_path)[0]).pages["overhead"]
    assert "Due measurements were left out to stay within the budget." in page
