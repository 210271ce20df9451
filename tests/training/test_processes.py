"""Several processes, launched in the ways there are, train as one would; so do sharded models."""

import itertools
import json
import re
import socket

import apart
import pytest
import torch
from safetensors.torch import load_file
from small_llava import write_small_llava

from planner.training import __main__, adallava, recipes
from planner.training.__main__ import check_launch

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    # The option's name is accelerate's; without a GPU its processes talk by gloo.
    "accelerate": [
        "accelerate.commands.launch",
        *("--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_llava(tmp_path_factory.mktemp("base"))


def settings(base, folder, **changes):
    return {
        "model": str(base),
        "output_dir": str(folder),
        "max_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **changes,
    }


def config(base, folder, **changes):
    return adallava.AdaLlavaConfig(**settings(base, folder, **changes))


def logged(folder):
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


# gloo on CPUs.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(folder, launcher, *arguments):
    return apart.run("-m", *launcher, *arguments, folder=folder, environment=ENVIRONMENT)


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    adallava.train(config(base, folder, batch_size=4))
    return logged(folder)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one_with_twice_the_batch(base, tmp_path, one_process, launcher):
    """The order of sums is all that differs."""
    config = tmp_path / "config.yaml"
    ours = settings(base, tmp_path / "two", batch_size=2)
    config.write_text(json.dumps({"recipe": "adallava"} | ours))
    done = launch(tmp_path, LAUNCHERS[launcher], "-m", "planner.training", str(config))
    assert done.returncode == 0, done.stderr
    for two, one in zip(logged(tmp_path / "two"), one_process, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
        assert two["utilisation"] == pytest.approx(one["utilisation"])


def test_one_process_where_several_were_asked_for_is_refused(tmp_path):
    """What accelerate does with --cpu: it would train on half of the batch."""
    config = tmp_path / "config.yaml"
    config.write_text(f"recipe: adallava\noutput_dir: {tmp_path / 'x'}\n")
    alone = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    done = launch(tmp_path, alone, "-m", "planner.training", str(config))
    assert "started one process of several" in done.stderr
    assert not (tmp_path / "x").exists()
    check_launch({"ACCELERATE_USE_CPU": "True"})
    check_launch({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "x", "OMPI_COMM_WORLD_RANK": "0"})


def test_process_group_ends_before_the_process(monkeypatch):
    """What is left of it when Python shuts down may abort a process whose work is done."""
    joined = []

    def train(_):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        joined.append(torch.distributed.is_initialized())

    monkeypatch.setattr(recipes, "load_recipe", lambda *_: (train, None))
    assert __main__.main(["config.yaml"]) == 0
    assert joined == [True]
    assert not torch.distributed.is_initialized()


# accelerate shards over accelerators only, so it is told that these processes have some.
# Every training runs from the start, and once more from its checkpoint at two of three steps.
SHARDED = """
import json, sys
from pathlib import Path
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.tensor import DTensor
from planner.training import adallava, trainer

start = PartialState.__init__

def pretend(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

PartialState.__init__ = pretend
torch.accelerator.is_available = lambda *_: True
real = trainer.TrainingArguments
trainer.TrainingArguments = lambda **settings: real(**settings | {"use_cpu": True})
for turn in ("started", "resumed"):
    for settings in json.loads(sys.argv[1]):
        config = adallava.AdaLlavaConfig(**settings)
        weights = list(adallava.train(config).parameters())
        sharded = sum(isinstance(weight, DTensor) for weight in weights)
        print("RESULT", sharded, len(weights), flush=True)
        distributed.barrier()
        if distributed.get_rank() == 0:
            run = Path(config.output_dir)
            aside = run.with_name(turn)
            aside.mkdir()
            for made in (run / "checkpoint-3", Path(config.export_dir)):
                made.rename(aside / made.name)
        distributed.barrier()
distributed.destroy_process_group()
"""


SHARDED_SWITCHES = ("adallava-l", "layers,heads,mlp")


def test_sharded_processes_train_as_one(base, tmp_path):
    """FSDP on CPUs: logs, resuming and what is exported are those of one process."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    sharded = {"fsdp": "full_shard auto_wrap", "fsdp_layer": "LlamaDecoderLayer"}
    ours = []
    for switches in SHARDED_SWITCHES:
        one, two = tmp_path / switches / "one", tmp_path / switches / "two"
        common = {"switches": switches, "save_steps": 2}
        adallava.train(config(base, one, batch_size=4, export_dir=str(one / "model"), **common))
        common |= {"export_dir": str(two / "model"), **sharded}
        ours.append(settings(base, two, batch_size=2, **common))
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = ENVIRONMENT | meeting | {"WORLD_SIZE": "2"}
    running = [
        apart.start(
            script, json.dumps(ours), folder=tmp_path,
            environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    done = [process.finish() for process in running]
    assert [process.returncode for process in done] == [0, 0], done
    # The main process is given back what it exported, which is whole; the other one's is not.
    whole = [len(re.findall(r"RESULT (\d+) \1\b", process.stdout)) for process in done]
    assert whole == [0, 2 * len(ours)]
    for switches, turn in itertools.product(SHARDED_SWITCHES, ("started", "resumed")):
        one, two = tmp_path / switches / "one", tmp_path / switches / turn
        for found, expected in zip(logged(two), logged(one), strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        for name in ("model.safetensors", "scheduler.safetensors"):
            found, expected = (load_file(folder / "model" / name) for folder in (two, one))
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.allclose(found[key], value, atol=2e-4), key
