"""`transformers.Trainer` trains, evaluates and predicts with FILA as with its own models."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.model.test_contract import fresh
from tests.model.test_gradients import train_batch


@pytest.fixture(scope="module")
def batches(nano_processor):
    return [train_batch(nano_processor), train_batch(nano_processor, with_picture=False)]


@pytest.fixture
def trainer(batches, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, per_device_eval_batch_size=1, max_steps=2, use_cpu=True,
        report_to=[], remove_unused_columns=False, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    return Trainer(
        fresh(), arguments, train_dataset=batches, eval_dataset=batches, data_collator=lambda rows: rows[0],
        compute_metrics=lambda out: {"shapes": [np.shape(x) for x in (out.predictions, out.label_ids)]},
    )  # fmt: skip


def test_evaluation_is_the_mean_loss_and_predicts_logits_alone(trainer, batches):
    metrics = trainer.evaluate()
    with torch.no_grad():
        losses = [float(trainer.model(**batch).loss) for batch in batches]
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    rows, length = len(batches), max(batch["labels"].shape[1] for batch in batches)
    vocabulary = trainer.model.config.text_config.vocab_size
    assert metrics["eval_shapes"] == [(rows, length, vocabulary), (rows, length)]


def test_predictions_are_the_model_s_logits(trainer, batches):
    predicted = trainer.predict(batches).predictions
    for row, batch in zip(predicted, batches, strict=True):
        with torch.no_grad():
            logits = trainer.model.eval()(**batch).logits[0]
        np.testing.assert_allclose(row[: len(logits)], logits.numpy(), rtol=1e-4, atol=1e-4)


def test_a_step_of_training(trainer):
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    assert np.isfinite(trainer.train().training_loss)
    assert all(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
