"""Devices, strategy and precision as Lightning's trainer section states them."""

import pytest
from jsonargparse import Namespace

from nextflow.planning.run import callback_options, read_run


def trainer(**changes):
    values = {
        "devices": 8, "num_nodes": 2, "strategy": "auto", "precision": "bf16-mixed", "accumulate_grad_batches": 3,
        "callbacks": None,
    }  # fmt: skip
    return Namespace(**{**values, **changes})


def model_parallel(data, tensor):
    arguments = Namespace(data_parallel_size=data, tensor_parallel_size=tensor)
    return Namespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy", init_args=arguments)


def sharding(**options):
    return Namespace(class_path="nextflow.callbacks.fsdp_sharding.FSDPSharding", init_args=Namespace(**options))


def read(**changes):
    return read_run(trainer(**changes), None, [])


def test_devices_and_strategies():
    assert (read().strategy, read().devices, read().shards, read().accumulate) == ("ddp", 16, 1, 3)
    assert read(devices=1, num_nodes=1).strategy == "single"
    assert read(devices=[0, 3], num_nodes=1).devices == 2
    assert read(devices="0,1,2", num_nodes=1).devices == 3
    assert read(strategy="ddp_find_unused_parameters_true").strategy == "ddp"
    sharded = read(strategy=model_parallel(16, 1), callbacks=[sharding()])
    assert (sharded.strategy, sharded.shards) == ("fsdp2", 16)


def test_an_open_number_of_devices_is_noted():
    notes = []
    assert read_run(trainer(devices="auto"), None, notes).devices == 2
    assert "trainer.devices" in notes[0]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [(None, (4, 4)), ("bf16", (4, 2)), ("bf16-true", (2, 2)), ("32-true", (4, 4)), ("64", (8, 8))],
)
def test_precision(precision, expected):
    run = read(precision=precision)
    assert (run.weight_bytes, run.compute_bytes) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "transformer-engine"}, "trainer.precision"),
        ({"strategy": "deepspeed_stage_3"}, "trainer.strategy deepspeed_stage_3: plan knows"),
        ({"strategy": model_parallel(16, 1)}, "trainer.callbacks has no FSDPSharding"),
        ({"strategy": model_parallel(8, 1)}, "data_parallel_size 8 x tensor_parallel_size 1 are not the 16 devices"),
        ({"strategy": model_parallel("auto", "auto")}, "set data_parallel_size: 16 and tensor_parallel_size: 1"),
    ],
)
def test_what_cannot_be_planned_is_said(changes, message):
    with pytest.raises(ValueError) as error:
        read(**changes)
    assert message in str(error.value)


def test_types_of_a_sharded_run():
    """FSDPSharding's types count where it gathers; autocast casts further down, and only then."""
    sharded = {"strategy": model_parallel(16, 1)}
    options = sharding(param_dtype="bfloat16", reduce_dtype="float32", reshard_after_forward=False)
    run = read(**sharded, precision="32-true", callbacks=[options])
    assert (run.weight_bytes, run.gathered_bytes, run.residual_bytes, run.compute_bytes) == (4, 2, 2, 2)
    assert run.reduced_bytes == 4 and not run.resharded
    run = read(**sharded, precision="bf16-mixed", callbacks=[sharding()])
    assert (run.weight_bytes, run.gathered_bytes, run.residual_bytes, run.compute_bytes) == (4, 4, 4, 2)
    assert run.reduced_bytes == 4 and run.resharded


def test_callbacks_are_found_by_the_name_of_their_class():
    average = Namespace(class_path="nextflow.callbacks.ema.EMA")
    checkpointing = sharding(activation_checkpointing=True)
    sharded = {"strategy": model_parallel(16, 1)}
    run = read(**sharded, callbacks=[checkpointing, average])
    assert run.ema and run.activation_checkpointing
    assert not read_run(trainer(**sharded, callbacks=[checkpointing]), False, []).activation_checkpointing
    assert callback_options(trainer(), "EMA") is None
