"""Asking an endpoint: what is sent, what a failing one costs, and the signed reading of it."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time

import httpx
import numpy as np
import pytest
from tests.support.marked_suspect import KEK, lm_mark, reply_as, suspect_server
from tests.test_mark_cli import run

from polyadapt.errors import InvalidRequest, RequestCancelled, Unavailable
from polyadapt.watermark import evidence
from polyadapt.watermark.endpoint import Endpoint, EndpointLimits, EndpointUrl
from polyadapt.watermark.prompts import Prose
from polyadapt.watermark.queries import queries_for
from polyadapt.watermark.records import read_model, read_record, read_samples, trace_record
from polyadapt.watermark.secrets import write_kek
from polyadapt.watermark.statistics import BitRule, SequentialRule

PROSE = Prose(tuple(f"word{i}" for i in range(500)))
NUM_BITS = 24
USERS = [f"user-{i}" for i in range(40)]


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    return lm_mark(tmp_path_factory.mktemp("lm") / "mark", NUM_BITS)


@pytest.fixture
def suspect(mark):
    with suspect_server(reply_as(mark, mark.codebook.row("user-7"))) as server:
        yield server


@contextlib.contextmanager
def asking(suspect, *, key=None, **limits):
    endpoint = Endpoint(EndpointUrl.parse(suspect.url), "m", key, EndpointLimits(**limits))
    with contextlib.closing(endpoint):
        yield endpoint


def test_a_copy_behind_an_endpoint_is_read_and_its_user_named(mark, suspect):
    with asking(suspect, key="sk-suspect") as endpoint:
        signed = read_model(mark, endpoint.ask, PROSE, SequentialRule(), "m at there")
    record = read_record(mark, signed.encode())
    assert [bit["value"] for bit in record["bits"]] == mark.codebook.row("user-7").tolist()
    assert record["asked"]["queries"] == len(suspect.bodies) == endpoint.num_asked
    assert set(suspect.keys) == {"Bearer sk-suspect"}
    for body in suspect.bodies:
        assert (body["model"], body["temperature"]) == ("m", 0)
        assert [turn["role"] for turn in body["messages"]] == ["user"]
    for secret in ("sk-suspect", "phrase", "Zero", "One"):
        assert secret not in signed
        assert secret not in repr(endpoint)
    found, traced = trace_record(mark, record, USERS, 1e-3)
    assert [one.user for one in found.accused] == ["user-7"]
    evidence.verify(traced.encode(), mark.config.evidence_public_key)
    nobody, _ = trace_record(mark, record, [u for u in USERS if u != "user-7"], 1e-3)
    assert nobody.is_nobody


def test_replies_that_others_asked_for_are_read_as_well(mark):
    queries = queries_for(mark.prompts, PROSE, 16, np.random.default_rng(1))
    reply = reply_as(mark, "01" * (NUM_BITS // 2))
    replies = [reply(query.message) for query in queries]
    record = read_record(mark, read_samples(mark, queries, replies, BitRule(), "x").encode())
    assert [bit["value"] for bit in record["bits"]] == [0, 1] * (NUM_BITS // 2)


def test_an_unmarked_model_has_no_bits(mark, suspect):
    suspect.reply = lambda message: "Hello."
    with asking(suspect) as endpoint:
        record = read_record(
            mark, read_model(mark, endpoint.ask, PROSE, SequentialRule(), "x").encode()
        )
    assert {bit["value"] for bit in record["bits"]} == {None}


def test_what_fails_for_a_while_is_asked_again(mark, suspect):
    suspect.statuses = [503, None, 429]
    with asking(suspect, num_at_once=1) as endpoint:
        assert endpoint.ask(["a secret3 phrase3"]) == [suspect.reply("a secret3 phrase3")]
    assert len(suspect.bodies) == 4


def test_what_goes_on_failing_is_no_reading(mark, suspect):
    suspect.statuses = [500] * 100
    with asking(suspect, num_tries=1) as endpoint:
        assert endpoint.ask(["a"] * 3) == [None] * 3
        with pytest.raises(Unavailable, match="no reply to 6 of 6 questions"):
            endpoint.ask(["a"] * 3)


@pytest.mark.parametrize("status", [302, 401, 404])
def test_a_refusal_and_a_redirect_end_it(suspect, status):
    suspect.statuses = [status]
    suspect.headers = {"location": "http://127.0.0.1:9/"}
    with asking(suspect) as endpoint, pytest.raises(InvalidRequest, match=f"answers {status}"):
        endpoint.ask(["a"])
    assert len(suspect.bodies) == 1


def test_the_budget_the_time_and_a_cancellation_hold(suspect):
    with asking(suspect, max_queries=3) as endpoint:
        endpoint.ask(["a", "b"])
        with pytest.raises(InvalidRequest, match="more than 3 questions"):
            endpoint.ask(["c", "d"])
    with asking(suspect, timeout_s=-1) as endpoint, pytest.raises(Unavailable, match="more than"):
        endpoint.ask(["a"])
    with asking(suspect) as endpoint:
        endpoint.cancel()
        with pytest.raises(RequestCancelled):
            endpoint.ask(["a"])
    assert len(suspect.bodies) == 2


class Dribble(httpx.SyncByteStream):
    """A reply that never ends, a blank every 10 ms."""

    def __iter__(self):
        for _ in range(1000):
            time.sleep(0.01)
            yield b" "


@pytest.mark.parametrize(
    ("timeout_s", "cancelled_after_s", "error"),
    [(0.1, 60.0, Unavailable), (60.0, 0.1, RequestCancelled)],
)
def test_a_reply_that_never_ends_is_left_in_time(timeout_s, cancelled_after_s, error):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Dribble()))
    endpoint = Endpoint(
        EndpointUrl.parse("http://h"), "m", None, EndpointLimits(timeout_s=timeout_s),
        transport=transport,
    )  # fmt: skip
    timer = threading.Timer(cancelled_after_s, endpoint.cancel)
    timer.start()
    began = time.monotonic()
    with contextlib.closing(endpoint), pytest.raises(error):
        endpoint.ask(["a"])
    timer.cancel()
    timer.join()
    assert time.monotonic() - began < 5.0


def test_nothing_is_waited_for_after_the_last_try(suspect):
    suspect.statuses = [503]
    with asking(suspect, num_tries=1) as endpoint:
        endpoint._is_cancelled.wait = lambda seconds: pytest.fail("it waits")
        assert endpoint.ask(["a"]) == [None]


@pytest.mark.parametrize(
    ("text", "root", "origin"),
    [
        (
            "https://Api.example.com",
            "https://api.example.com:443/v1",
            "https://api.example.com:443",
        ),
        ("http://[::1]:8000/v1/", "http://[::1]:8000/v1", "http://[::1]:8000"),
        ("http://h/x/chat/completions", "http://h:80/x", "http://h:80"),
    ],
)
def test_an_endpoints_url_is_read(text, root, origin):
    assert EndpointUrl.parse(text) == EndpointUrl(root, origin)


@pytest.mark.parametrize(
    "text", ["", "example.com", "ftp://h", "http://u:p@h/v1", "http://h/v1?a=1", "http://h:x/v1"]
)
def test_what_is_no_url_of_an_endpoint_is_refused(text):
    with pytest.raises(InvalidRequest, match="no URL of the form"):
        EndpointUrl.parse(text)


def test_the_command_asks_an_endpoint(mark, suspect, tmp_path):
    write_kek(KEK, tmp_path / "kek")
    asked = ("verify", mark.path, "--endpoint", suspect.url, "--kek-file", tmp_path / "kek")
    status, output = run(*asked)
    assert (status, "--model NAME" in output) == (1, True)
    reading = tmp_path / "reading.json"
    status, output = run(
        *asked, "--model", "m", "--out", reading, env={"OPENAI_API_KEY": "sk-suspect"}
    )
    assert status == 0, output
    assert f"{NUM_BITS} of {NUM_BITS} bits decided" in output
    assert suspect.keys[0] == "Bearer sk-suspect"
    record = json.loads(reading.read_text())["record"]
    assert record["suspect"].startswith("m at http://127.0.0.1:")


def test_the_one_command_asks_an_endpoint_and_says_whose_copy_it_is(mark, suspect, tmp_path):
    write_kek(KEK, tmp_path / "kek")
    (tmp_path / "users").write_text("\n".join(USERS))
    record, plot = tmp_path / "evidence.json", tmp_path / "plot.svg"
    asked = (
        "who", mark.path, "--endpoint", suspect.url, "--model", "m", "--users", tmp_path / "users",
        "--kek-file", tmp_path / "kek",
    )  # fmt: skip
    status, output = run(*asked, "--out", record, "--plot", plot)
    assert (status, "It comes from a copy of user-7.\n" in output) == (0, True), output
    assert f"{NUM_BITS} of {NUM_BITS} bits could be read" in output
    assert "user-7" in plot.read_text()
    public_key = json.loads((mark.path / "config.json").read_text())["evidence_public_key"]
    status, output = run("check-evidence", record, "--public-key", public_key)
    assert status == 0, output
    assert json.loads(record.read_text())["record"]["words"]["who"] == ["user-7"]
    suspect.reply = lambda message: "Hello."
    status, output = run(*asked)
    assert (status, "No sign of this mark" in output) == (3, True), output


def test_the_command_ends_in_one_line_when_the_endpoint_is_down(mark, suspect, tmp_path, limits):
    write_kek(KEK, tmp_path / "kek")
    suspect.statuses = [500] * 1000
    status, output = run(
        "verify", mark.path, "--endpoint", suspect.url, "--model", "m", "--kek-file",
        tmp_path / "kek",
    )  # fmt: skip
    assert status == 1
    assert "polyadapt: the endpoint gave no reply to" in output


@pytest.fixture
def limits(monkeypatch):
    """Limits of one try, so that nothing is waited for."""
    few = functools.partial(EndpointLimits, num_tries=1)
    monkeypatch.setattr("polyadapt.watermark.endpoint.EndpointLimits", few)


@pytest.mark.parametrize("command", ["verify", "who"])
def test_nothing_is_asked_for_a_record_that_has_no_place(command, mark, suspect, tmp_path):
    write_kek(KEK, tmp_path / "kek")
    (tmp_path / "users").write_text("u")
    users = ("--users", tmp_path / "users") if command == "who" else ()
    for place in (tmp_path / "no" / "record.json", tmp_path):
        status, output = run(
            command, mark.path, "--endpoint", suspect.url, "--model", "m", "--out", place,
            "--kek-file", tmp_path / "kek", *users,
        )  # fmt: skip
        assert (status, "cannot be written" in output) == (1, True), output
    assert not suspect.bodies
