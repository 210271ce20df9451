"""Work on two nodes of a Ray cluster, some of whose workers are lost."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from planner.audit import Terms, read_labels
from planner.cli import execute as run
from planner.ir.errors import InputError, PlannerError
from planner.models.scheduling import load_deciding
from planner.planning.request import Request
from planner.spread import in_order
from planner.training.labelling import label_samples
from planner.training.question_samples import scene_samples

pytest.importorskip("ray")
# Ray's own, of libraries that it uses.
pytestmark = pytest.mark.filterwarnings("ignore")

NODE = {"num_cpus": 1, "object_store_memory": 96 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    # Workers find what tests define, and measure what one thread does.
    patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    found.add_node(**NODE)
    yield found
    found.shutdown()
    torch.set_num_threads(threads)
    patch.undo()
    assert not pids(b"raylet")


def pids(title):
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if title in process.read_bytes():
                found.append(int(process.parent.name))
        except OSError:
            continue
    return found


def workers(cluster, load, most=2):
    from planner.ray_workers import RayWorkers

    return RayWorkers(cluster.address, load, most=most)


def adding(more, loaded):
    def add(item):
        if item == "fail":
            raise ValueError("no number")
        if item == "refuse":
            raise InputError("this is refused")
        if item == "die":
            os._exit(1)
        time.sleep(0.02)
        return loaded + more + item, os.getpid()

    return add


def test_results_are_in_order_and_what_is_lost_is_done_again(cluster):
    killed = []

    def kill(done, total):
        if done in (5, 30):
            killed.extend(pids(b"ray::_Worker")[:1])
            os.kill(killed[-1], signal.SIGKILL)

    with workers(cluster, lambda: 1000) as spread:
        found = in_order(spread, partial(adding, 100), list(range(60)), kill)
        assert [number for number, _ in found] == [1100 + n for n in range(60)]
        assert len(set(killed)) == 2
        assert len({pid for _, pid in found}) > 2
        again = in_order(spread, partial(adding, 200), [1, 2], lambda *_: None)
        assert [number for number, _ in again] == [1201, 1202]
    assert not pids(b"ray::_Worker")


def test_what_fails_is_one_sentence(cluster):
    def absent():
        raise InputError("there is no such model")

    with workers(cluster, int, most=1) as spread:
        for item, kind, words in [
            ("fail", PlannerError, "a worker failed: ValueError: no number"),
            ("refuse", InputError, "^this is refused$"),
            ("die", PlannerError, "3 workers were lost at the same work"),
        ]:
            with pytest.raises(kind, match=words):
                list(spread(partial(adding, 1), [1, item, 2]))
    with pytest.raises(InputError, match=r"^there is no such model$"), workers(cluster, absent, 1):
        pass
    with (
        pytest.raises(PlannerError, match="3 workers were lost while they loaded"),
        workers(cluster, partial(os._exit, 1), 1),
    ):
        pass


def test_a_node_may_go(cluster):
    node = cluster.add_node(**NODE)

    def remove(done, total):
        if done == 10:
            cluster.remove_node(node)

    with workers(cluster, int, most=3) as spread:
        found = in_order(spread, partial(adding, 0), list(range(40)), remove)
    assert [number for number, _ in found] == list(range(40))


def test_labels_are_those_of_one_process_though_a_worker_is_killed(cluster):
    load = partial(load_deciding, Request("tiny-llava"), None, 0.75, "auto", "cpu")
    loaded = load()
    model, graph = loaded.model, loaded.graph
    samples = scene_samples(model, loaded.processor, "train", 8, 0)
    terms = Terms("t", graph.properties["fingerprint"], "adallava-l", "heuristic", 49, 16)
    label = partial(label_samples, model, graph, samples, terms, (0.75, 1.0), tried=4)

    def kill(done, total):
        if done == 2:
            os.kill(pids(b"ray::_Worker")[0], signal.SIGKILL)

    with workers(cluster, load) as spread:
        there = label(spread=spread, progress=kill)
    here = label()
    np.testing.assert_array_equal(there.utilities, here.utilities)
    np.testing.assert_array_equal(there.plans, here.plans)
    assert all((there.losses[n] == losses).all() for n, losses in here.losses.items())


def test_the_commands(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def both(*command):
        found = []
        for more in ([], ["--ray", cluster.address]):
            assert run([*command, "--json", *more]) == 0
            found.append(json.loads(capsys.readouterr().out))
        return found

    asked = ("labels", "-m", "tiny-llava", "--samples", "2", "--budgets", "0.75", "-o")
    assert run([*asked, "one.parquet"]) == 0
    assert run([*asked, "two.parquet", "--ray", cluster.address]) == 0
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert len(read_labels(tmp_path / "two.parquet")) == 2
    capsys.readouterr()
    here, there = both("audit", "two.parquet", "--exact")
    took = {"seconds": 0, "seconds_per_label": 0}
    assert {**here, **took} == {**there, **took}
    evaluated = ("eval", "-m", "tiny-llava", "--utilities", "prior", "--samples", "6")
    here, there = both(*evaluated, "--batch", "2", "--budgets", "0.6,1")
    assert here == there


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "auto", "x y", ""])
def test_where_there_is_no_cluster_it_is_said_at_once(address, monkeypatch):
    from planner.ray_workers import connect

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match=f"no Ray cluster at '{address}'"):
        connect(address)
