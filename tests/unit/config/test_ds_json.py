"""The DeepSpeed JSON: names, kinds, offloading, ranks and folders, and what this machine lacks."""

import json
from pathlib import Path

import pytest

import run as entry
from bd3_ds.config import ds_names
from bd3_ds.config.ds_json import DEFAULT, check_place, complete_ds_json, load_ds_json, offloads
from bd3_ds.runtime.errors import UserError, run_command
from bd3_ds.runtime.files import read_json
from bd3_ds.train import hardware
from tests.helpers.tiny import tiny_run

CPU = {"device": "cpu"}
NVME = {"device": "nvme", "nvme_path": "/somewhere"}


def refusal(tmp_path: Path, content: dict) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_ds_json(path)
    assert all(message.startswith(f"--deepspeed_config {path} sets ") for message in error.value.messages)
    return str(error.value)


@pytest.mark.parametrize(
    "content, parts",
    [
        ({"zero_optimisation": {}}, ["zero_optimisation", "did you mean 'zero_optimization'?"]),
        ({"comunication_data_type": "fp32"}, ["did you mean 'communication_data_type'?"]),
        ({"elasticity": {}}, ["sets elasticity, which this trainer does not take"]),
        ({"compile": {}}, ["sets compile, which the recipe owns", "train.compile"]),
        ({"sequence_parallel_size": 2}, ["train.sequence_parallel"]),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, ["did you mean 'overlap_comm'?"]),
        ({"zero_optimization": {"stage": 3, "prefetch_bucket_size": 1}}, ["'stage3_prefetch_bucket_size'?"]),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ["sets zero_optimization.cpu_offload,"]),
        ({"zero_optimization": {"stage": "2"}}, ["zero_optimization.stage", "a whole number, 0 or more, not '2'"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage", "not True"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0.5}}, ["a whole number, 0 or more, not 0.5"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, ["to 'auto'", "leave it out"]),
        ({"zero_optimization": {"stage": 2, "overlap_comm": 1}}, ["overlap_comm, which must be true or false"]),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": True}},
            ["which must be an object such as"],
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": CPU}}, ["offload_param", "stage 3 alone"]),
        ({"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 2}}, ["hpz", "stage 3 alone"]),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": CPU}}, ["at stage 0, which partitions nothing"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvm"}}}, ["did you mean 'nvme'?"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": NVME}}, ["'nvme' at stage 2", "stage 3 alone"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["offload_optimizer.nvme_path"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {**CPU, "ratio": 0.5}}}, ["offload_optimizer.ratio"]),
        ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, ["leaves the optimizer"]),
        ({"aio": {"block_sise": 1}}, ["sets aio.block_sise", "did you mean 'block_size'?"]),
    ],
)
def test_refused(tmp_path, content, parts):
    said = refusal(tmp_path, content)
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    "content, parts",
    [
        ({"zero_optimization": {"round_robin_gradients": True}}, ["though DeepSpeed knows it; leave it out"]),
        (
            {"zero_optimization": {"cpu_offload": True}},
            ['set zero_optimization.offload_optimizer to {"device": "cpu"}'],
        ),
        ({"zero_allow_untested_optimizer": True}, ["leave it out: the trainer sets it"]),
        ({"elasticity": {}}, ["run.py launch"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {**CPU, "ratio": 1}}}, ["all of the optimizer"]),
    ],
)
def test_what_deepspeed_knows_and_we_do_not_take(tmp_path, content, parts):
    """It is named as such, with what to do, and no other key is offered in its place."""
    said = refusal(tmp_path, content)
    for part in parts:
        assert part in said
    assert "did you mean" not in said and "known:" not in said


@pytest.mark.parametrize(
    "text, key",
    [
        ('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}', "zero_optimization"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "stage"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "device": "none"}}}', "device"),
    ],
)
def test_a_key_given_twice(tmp_path, text, key):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(
        UserError, match=f"--deepspeed_config .*is not valid JSON .the key '{key}' stands twice in one object"
    ):
        load_ds_json(path)
    with pytest.raises(UserError, match=f"settings .*is not valid JSON .the key '{key}' stands twice in one object"):
        read_json(path, "settings")


def test_comments_and_marks_are_read(tmp_path):
    """As DeepSpeed reads them."""
    path = tmp_path / "ds.json"
    path.write_text(
        '\ufeff{\n  // two ranks\n  "zero_optimization": {"stage": 2,}, /* more */\n  "steps_per_print": 5e8 # \n}'
    )
    assert load_ds_json(path) == {"zero_optimization": {"stage": 2}, "steps_per_print": 5e8}


def test_all_problems_at_once(tmp_path):
    said = refusal(tmp_path, {"zero_optimization": {"overlap_com": True, "stage": "two"}, "stepsperprint": 1})
    assert len(said.splitlines()) == 3


def test_names_are_deepspeeds():
    """What is taken and what is not are together all that DeepSpeed's own models know."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.swap_tensor.constants import AIO_BLOCK_SIZE, AIO_QUEUE_DEPTH, AIO_USE_GDS
    from deepspeed.runtime.zero import config, offload_config

    def names(model):
        return {field.alias or name for name, field in model.model_fields.items()}

    assert {*ds_names.ZERO, *ds_names.ZERO_NOT_TAKEN} == names(config.DeepSpeedZeroConfig)
    assert not ds_names.TOP_NOT_TAKEN.keys() & ds_names.TOP.keys()
    assert {*ds_names.OFFLOAD_OPTIMIZER, *ds_names.OFFLOAD_OPTIMIZER_NOT_TAKEN} == names(
        offload_config.DeepSpeedZeroOffloadOptimizerConfig
    )
    assert set(ds_names.OFFLOAD_PARAM) == names(offload_config.DeepSpeedZeroOffloadParamConfig)
    assert {AIO_BLOCK_SIZE, AIO_QUEUE_DEPTH, AIO_USE_GDS} < set(ds_names.AIO)
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(ds_names.TOP) - known <= {"zero_optimization", "aio", "comms_logger", "flops_profiler"}


@pytest.mark.parametrize("path", sorted(DEFAULT.parent.glob("*.json")), ids=lambda path: path.stem)
def test_ours_suit_deepspeed(path):
    """Every file of ds_configs is read by DeepSpeed's strict models, with the values that it names."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = load_ds_json(path)["zero_optimization"]
    read = DeepSpeedZeroConfig(**zero)
    fields = {field.alias or name: name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for key, value in zero.items():
        if not isinstance(value, dict):
            assert getattr(read, fields[key]) == value
    assert offloads({"zero_optimization": zero}) == ("offload" in path.stem or "nvme" in path.stem)


@pytest.mark.parametrize(
    "zero, world, local, said",
    [
        (
            {"zero_hpz_partition_size": 3},
            2,
            2,
            "_size to 3, which must divide the 2 ranks of the run",
        ),
        ({"zero_hpz_partition_size": 8}, 16, 4, "must divide the 4 ranks of a machine"),
        ({"zero_hpz_partition_size": 0}, 2, 2, "which must divide"),
        ({"zero_quantized_gradients": True}, 8, 8, "acts between machines"),
    ],
)
def test_ranks_that_do_not_fit(zero, world, local, said):
    with pytest.raises(UserError, match=said):
        check_place({"zero_optimization": {"stage": 3, **zero}}, world, local)


def test_ranks_that_fit():
    check_place(load_ds_json(DEFAULT.parent / "zeropp.json"), 32, 8)
    check_place({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, 4, 2)


def test_nvme_folders(tmp_path):
    def content(path):
        return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(path)}}}

    check_place(content(tmp_path), 2, 2)
    with pytest.raises(UserError, match=r"offload_optimizer.nvme_path to '.*/none', which is not a folder"):
        check_place(content(tmp_path / "none"), 2, 2)
    with pytest.raises(UserError, match="cannot write to /proc"):
        check_place(content("/proc"), 2, 2)
    assert not list(tmp_path.iterdir())


def test_quantization_needs_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware.torch.cuda, "is_available", lambda: False)
    run, ds_json = tiny_run(tmp_path), load_ds_json(DEFAULT.parent / "zeropp.json")
    with pytest.raises(UserError) as error:
        hardware.check_hardware(run, ds_json)
    assert len(error.value.messages) == 2 and all("no CPU version" in said for said in error.value.messages)


@pytest.mark.parametrize(
    "name, said",
    [("zeropp", "must divide the 1 ranks of the run"), ("zero3_nvme", "'/local_nvme', which is not a folder")],
)
def test_start_is_refused(tmp_path, capsys, name, said):
    tiny_run(tmp_path)
    words = ["train", str(tmp_path / "recipe.yaml"), "--deepspeed_config", str(DEFAULT.parent / f"{name}.json")]
    assert run_command(entry.main, words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nvme_needs_libaio(tmp_path, monkeypatch):
    run, ds_json = tiny_run(tmp_path), load_ds_json(DEFAULT.parent / "zero3_nvme.json")
    monkeypatch.setattr(hardware, "async_io_is_there", lambda: False)
    with pytest.raises(UserError, match="needs libaio, which this machine lacks"):
        hardware.check_hardware(run, ds_json)
    monkeypatch.setattr(hardware, "async_io_is_there", lambda: True)
    hardware.check_hardware(run, ds_json)


def test_libaio_is_looked_for(monkeypatch):
    """The answer is the linker's."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    asked = []
    monkeypatch.setattr(AsyncIOBuilder, "has_function", lambda self, name, libraries: asked.append(libraries) or False)
    assert not hardware.async_io_is_there()
    assert asked == [("aio",)]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_training_relies_on_is_said_and_not_left_to_defaults(tmp_path, stage, precision):
    """A release with other defaults must not update on a NaN, round masters, or scale gradients."""
    run = tiny_run(tmp_path, f"train.precision={precision}")
    config = complete_ds_json({"zero_optimization": {"stage": stage}}, run, 1)
    assert config["bf16"] == {
        "enabled": precision == "bf16" and stage > 0,
        "check_grad_overflow": True,
        "bf16_master_weights_and_grads": False,
    }
    assert config["gradient_clipping"] == run.optim.clip
    assert config["prescale_gradients"] is False and config["gradient_predivide_factor"] == 1.0
