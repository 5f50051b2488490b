"""The average is the formula, nothing else is state, and evaluation uses it."""

import lightning as L
import pytest
import torch

from nextflow.callbacks.ema import EMA


class Module(L.LightningModule):
    averaged, keeps_ema = "net", False

    def __init__(self):
        super().__init__()
        self.net, self.ema, self.seen = torch.nn.Linear(1, 1, bias=False), None, []

    def configure_model(self):
        if self.keeps_ema and self.ema is None:
            self.ema = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
            self.ema.load_state_dict(self.net.state_dict())

    def training_step(self, batch, index):
        return -self.net.weight.sum()

    def validation_step(self, batch, index):
        self.seen.append(float(self.net.weight))

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(steps, callback, **options):
    return L.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=2,
        check_val_every_n_epoch=None, **options,
    )  # fmt: skip


DATA = torch.utils.data.DataLoader(range(100), batch_size=None)
ONE = torch.utils.data.DataLoader(range(1), batch_size=None)


def test_decay_warms_up():
    ema = EMA(decay=0.9, warmup=9.0)
    assert [ema.decay_at(step) for step in (1, 9, 81, 1000)] == pytest.approx([0.1, 0.5, 0.9, 0.9])
    assert EMA(decay=0.9, warmup=0).decay_at(1) == 0.9
    with pytest.raises(ValueError, match=r"EMA\.decay must be at least 0 and below 1"):
        EMA(decay=1.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_is_the_formula_and_evaluation_uses_it(tmp_path, accumulate):
    module, callback = Module(), EMA(decay=0.5, warmup=0)
    torch.nn.init.zeros_(module.net.weight)
    run = trainer(4, callback, accumulate_grad_batches=accumulate)
    run.fit(module, DATA, ONE)
    expected, mean = [], 0.0
    for step in range(1, 5):
        mean = 0.5 * mean + 0.5 * step
        expected.append(mean)
    assert float(module.ema.weight) == pytest.approx(expected[-1]) and float(module.net.weight) == 4.0
    validated = expected[1::2] if accumulate == 1 else expected
    assert module.seen == pytest.approx(validated)

    run.save_checkpoint(tmp_path / "4.ckpt")
    resumed = Module()
    trainer(6, EMA(decay=0.5, warmup=0)).fit(resumed, DATA, ONE, ckpt_path=tmp_path / "4.ckpt")
    straight = Module()
    torch.nn.init.zeros_(straight.net.weight)
    trainer(6, EMA(decay=0.5, warmup=0)).fit(straight, DATA, ONE)
    assert torch.equal(resumed.ema.weight, straight.ema.weight) and torch.equal(resumed.net.weight, straight.net.weight)

    for evaluate, value in ((True, expected[-1]), (False, 4.0)):
        tested = Module()
        tested.strict_loading = evaluate  # a module that does not look at its checkpoint would meet a key too many
        trainer(6, EMA(evaluate=evaluate)).test(tested, ONE, ckpt_path=tmp_path / "4.ckpt", verbose=False)
        assert tested.seen == pytest.approx([value])


def test_a_module_without_a_place_for_it_is_refused():
    with pytest.raises(ValueError, match="LightningModule has no attribute `averaged`"):
        EMA().setup(None, L.LightningModule(), "fit")
