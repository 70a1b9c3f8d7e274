"""Three simulated nodes on one machine, an engine on each: `make test-ray` alone (minutes).

The controller, the proxy and the ingress replica live on a fourth node, the head, which nobody
kills: a client's connection ends with the node that holds it.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.oracle.adapters import make_lora
from tests.support.ray_client import RayClient, Stream, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),
]

ray = pytest.importorskip("ray", reason="make test-ray installs polyadapt[ray]")

NUM_NODES, NUM_ADAPTERS, NUM_ROWS = 3, 12, 4


@dataclass
class Deployed(RayClient):
    """The application, and the nodes under it."""

    cluster: Any = None
    nodes: tuple[Any, ...] = ()


@pytest.fixture(scope="module")
def deployed(
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    make_cluster: Callable[..., Any],
    free_port: int,
) -> Iterator[Deployed]:
    from ray import serve

    from polyadapt.ray_serve.application import APP_NAME, build, deploy
    from polyadapt.ray_serve.settings import load

    home, model = tmp_path_factory.mktemp("home"), tiny_model("llama")
    adapters = [
        f"a{i}={make_lora(model, home / 'adapters' / f'a{i}', 4, seed=i)}"
        for i in range(NUM_ADAPTERS)
    ]
    settings = {
        "model": str(model), "home": str(home), "device": "cpu", "dtype": "float32",
        "adapters": adapters, "port": free_port, "max_num_seqs": NUM_ROWS, "num_threads": 1,
        "kv_cache_bytes": "2MiB", "max_adapter_bytes": "4MiB", "max_model_len": 512,
        "max_num_batched_tokens": 64, "min_engines": NUM_NODES, "max_engines": NUM_NODES,
        "engine_cpus": 2.0, "engines_per_node": 1, "statement_s": 0.5,
        "ingress_resources": {"edge": 0.1}, "log_level": "warning",
    }  # fmt: skip
    cluster = make_cluster(num_cpus=1)  # too few for an engine
    nodes = [cluster.add_node(num_cpus=2) for _ in range(NUM_NODES)]
    ray.init(address=cluster.address, log_to_driver=False)
    deploy(build(settings), load(settings), proxies="HeadOnly")
    url = f"http://127.0.0.1:{free_port}"
    found = Deployed(url, cluster=cluster, nodes=tuple(nodes))
    wait_until("three engines are ready", lambda: found.num_ready() == NUM_NODES)
    yield found
    found.client.close()
    serve.delete(APP_NAME)
    serve.shutdown()


def zipf_names(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    names = [f"a{i}" for i in range(NUM_ADAPTERS)]
    return chance.choices(names, [1 / rank for rank in range(1, NUM_ADAPTERS + 1)], k=count)


def test_an_adapter_stays_with_its_engine_under_zipf_traffic(deployed: Deployed):
    names = zipf_names(120)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(deployed.complete, names, itertools.count()))
    assert [answer.status_code for answer in answers] == [200] * len(names)
    wait_until(
        "every used adapter is stated somewhere",
        lambda: all(deployed.where(name) for name in set(names)),
    )
    # A request is one that its adapter's engine had to serve unless a second engine has it too.
    asked = Counter(names)
    alone = sum(count for name, count in asked.items() if len(deployed.where(name)) == 1)
    print(f"affinity {alone / len(names):.3f}")
    assert alone / len(names) >= 0.95
    used = {engine for name in asked for engine in deployed.where(name)}
    assert len(used) == NUM_NODES, "every engine is some adapter's home"


def test_a_hot_adapter_spreads(deployed: Deployed):
    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        answers = list(
            pool.map(
                lambda n: deployed.complete("a0", n, max_tokens=64, ignore_eos=True), range(96)
            )
        )
    assert {answer.status_code for answer in answers} == {200}
    wait_until("two engines have it", lambda: len(deployed.where("a0")) >= 2, 20)
    print(f"the hot adapter is on {len(deployed.where('a0'))} engines")


def test_a_killed_node_loses_no_request_that_had_not_begun(deployed: Deployed):
    streams = [Stream() for _ in range(12 * NUM_NODES)]
    with concurrent.futures.ThreadPoolExecutor(len(streams)) as pool:
        running = [
            pool.submit(stream.run, deployed.url, f"a{number % NUM_ADAPTERS}", number, 300)
            for number, stream in enumerate(streams)
        ]
        # All rows of all engines are at work then, and the other streams wait behind them.
        wait_until(
            "as many have begun as there are rows",
            lambda: sum(stream.num_chunks > 0 for stream in streams) >= NUM_ROWS * NUM_NODES,
        )
        deployed.cluster.remove_node(deployed.nodes[-1], allow_graceful=False)
        for each in running:
            each.result()
    lost = [stream for stream in streams if stream.error and not stream.num_chunks]
    ended = [stream for stream in streams if stream.error and stream.num_chunks]
    moved = sum(deployed.samples("polyadapt_fleet_failovers_total").values())
    print(f"{len(streams)} streams: {len(ended)} had begun on the killed node, {moved:g} moved")
    assert not lost, "requests that had not begun have failed"
    assert ended, "none had begun on the killed node: nothing was shown"
    assert {stream.error for stream in ended} == {"engine_unavailable"}
    assert all(stream.is_done for stream in streams if stream not in ended)
    assert moved > 0

    assert all(deployed.complete(f"a{i}").status_code == 200 for i in range(NUM_ADAPTERS))
    wait_until("the dead engine has left", lambda: deployed.num_ready() == NUM_NODES - 1)
    deployed.cluster.add_node(num_cpus=2)
    wait_until("another one has joined", lambda: deployed.num_ready() == NUM_NODES)
