"""Replicas on two nodes of a Ray cluster."""

import contextlib
import itertools
import os
import signal
import threading
import time
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
def cluster():
    # Replicas and handles tell what they do twice a second.
    patch = pytest.MonkeyPatch()
    for who in ("REPLICA", "HANDLE"):
        patch.setenv(f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    yield cluster
    cluster.shutdown()
    patch.undo()


@pytest.fixture
def replicated(settings, cluster):
    from planner.serving.replicated_service import open_replicas

    service = open_replicas(settings, cluster.address, (2, 2))
    yield service
    service.stop()


@pytest.fixture
def scaled(settings, cluster, monkeypatch):
    from planner.serving import replicated_service

    pace = {"upscale_delay_s": 1, "downscale_delay_s": 2, "look_back_period_s": 4}
    monkeypatch.setattr(replicated_service, "PACE", pace)
    service = replicated_service.open_replicas(settings, cluster.address, (1, 2))
    yield service
    service.stop()


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
    """Processes of replicas, without those in which they contain chat templates."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if b"ServeReplica:planner:replica" in title:
            parents[int(process.name)] = int(parent)
    return [process for process, parent in parents.items() if parent not in parents]


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
    with monkeypatch.context() as patch:
        # The service goes on: the fixture ends it.
        patch.setattr(replicated, "stop", lambda: None)
        assert answers(replicated, name, lambda: os.kill(pids[0], signal.SIGKILL)) == expected
    assert counting.asked > len(ASKED)


@contextlib.contextmanager
def clients(address, name, count, deadlines=(None,)):
    """So many ask one question after the other meanwhile, under these deadlines in turn."""
    ends = threading.Event()

    def one(number):
        turns = itertools.cycle({} if ms is None else {"deadline_ms": ms} for ms in deadlines)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            while True:
                with contextlib.suppress(openai.APIStatusError):
                    ask(client, COLOURS[number % 3], model=name, most=32, **next(turns))
                if ends.wait(0.01):
                    return

    with ThreadPoolExecutor(count) as pool:
        asking = [pool.submit(one, number) for number in range(count)]
        try:
            yield
        finally:
            ends.set()
        for each in asking:
            each.result()


def metric(service, name):
    """Its sum over replicas."""
    lines = service.metrics_text().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def wait_for(service, replicas, seconds=60):
    ends = time.monotonic() + seconds
    while metric(service, "planner:replicas") != replicas:
        assert time.monotonic() < ends, f"not {replicas} replicas within {seconds} s"
        time.sleep(0.2)


def seconds_of(address, name):
    """What an answer takes, on the idle server."""
    for _ in range(2):
        begun = time.monotonic()
        with clients(address, name, 1):
            pass
    return time.monotonic() - begun


def test_replicas_follow_missed_deadlines_and_queues(settings, scaled, monkeypatch):
    name = settings.request.model
    with monkeypatch.context() as patch, running(http_app(scaled, [], 2**20)) as address:
        # The fixture ends the service.
        patch.setattr(scaled, "stop", lambda: None)
        wait_for(scaled, 1)
        # Three requests do not fill a replica, which takes four, but are too many for deadlines
        # that it keeps one alone.
        alone = 1000 * seconds_of(address, name)
        short = [share * alone for share in (0.6, 0.8, 1.0, 1.2)]
        with clients(address, name, 2), clients(address, name, 1, short):
            wait_for(scaled, 2)
            missed = metric(scaled, 'planner:deadlines_total{kept="false"')
            assert missed + metric(scaled, "planner:requests_refused_total") > 1
        wait_for(scaled, 1)
        with clients(address, name, 10):
            wait_for(scaled, 2)
        wait_for(scaled, 1)
