"""Replicas on two nodes of a Ray cluster."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from chats import COLOURS, QUESTION, ask, running
from small_llava import write_small_llava

from planner.planning.request import Request
from planner.serving.engine import EngineLimits
from planner.serving.http_app import http_app
from planner.serving.opening import ServiceSettings, load_service

pytest.importorskip("ray")
# Ray's own, of libraries that it uses.
pytestmark = pytest.mark.filterwarnings("ignore")

STORE = 96 * 2**20


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = write_small_llava(tmp_path_factory.mktemp("small"))
    request = Request(str(folder), utilities="prior")
    return ServiceSettings(request, (0.75, 1.0), most_tokens=256, limits=EngineLimits(answers=4))


@pytest.fixture(scope="module")
def replicated(settings):
    from ray.cluster_utils import Cluster

    from planner.serving.replicated_service import open_replicas

    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    service = open_replicas(settings, cluster.address, (2, 2))
    yield service
    service.stop()
    cluster.shutdown()


ASKED = [
    (COLOURS[n % 3], (0.75, 1.0)[n % 2], " ".join(["how"] * (n % 5) + [QUESTION]), 16 + n % 7)
    for n in range(24)
]


def answers(service, name, after_first=lambda: None):
    """To all that is asked: text, usage, and why it ends."""
    first = threading.Lock()

    def one(row):
        colour, budget, text, most = row
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            answer = ask(client, colour, model=name, text=text, most=most, budget=budget)
        if first.acquire(blocking=False):
            after_first()
        return answer.choices[0].message.content, answer.usage, answer.choices[0].finish_reason

    with running(http_app(service, [], 2**20)) as address, ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, ASKED))


def replica_pids():
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = process.read_bytes()
        except OSError:
            continue
        if b"ServeReplica:planner:replica" in title:
            found.append(int(process.parent.name))
    return found


class Counting:
    """A handle that counts what is asked of replicas."""

    def __init__(self, handle):
        self.handle, self.asked = handle, 0
        self.answer = self

    def remote(self, *arguments):
        self.asked += 1
        return self.handle.answer.remote(*arguments)


def test_answers_are_a_single_servers_though_a_replica_is_killed(settings, replicated, monkeypatch):
    name = settings.request.model
    expected = answers(load_service(settings), name)
    assert replicated.is_healthy
    pids = replica_pids()
    assert len(pids) == 2
    for number in "01":
        assert f'replica="{number}"'.encode() in replicated.metrics_text()
    counting = Counting(replicated._handle)
    monkeypatch.setattr(replicated, "_handle", counting)
    # The cluster goes on: the fixture ends it.
    monkeypatch.setattr(replicated, "stop", lambda: None)
    assert answers(replicated, name, lambda: os.kill(pids[0], signal.SIGKILL)) == expected
    assert counting.asked > len(ASKED)
