"""A line of the log: for people, or one JSON object, whatever it says."""

from __future__ import annotations

import json
import logging
import sys

from polyadapt.logs import REQUEST_ID, JsonFormatter, TextFormatter, fields


def record(message: str, *arguments: object, **options: object) -> logging.LogRecord:
    made = logging.LogRecord("a.b", logging.WARNING, "f.py", 1, message, arguments, None)
    made.__dict__.update(options)
    return made


def test_a_json_line_is_one_object_with_the_fields_beside_the_message():
    line = JsonFormatter("engine").format(
        record("gave %d\nup", 3, **fields(adapters=["a@1"], queue_ms=1.5, absent=None))
    )
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "warning",
        "process": "engine",
        "logger": "a.b",
        "message": "gave 3\nup",
        "adapters": ["a@1"],
        "queue_ms": 1.5,
    }


def test_a_json_line_carries_the_request_that_it_is_written_for():
    context = REQUEST_ID.set("req-7")
    try:
        found = json.loads(JsonFormatter("edge").format(record("x")))
    finally:
        REQUEST_ID.reset(context)
    assert found["request_id"] == "req-7"
    assert "request_id" not in json.loads(JsonFormatter("edge").format(record("x")))


def test_a_fault_has_its_traceback_in_the_object():
    try:
        raise KeyError("k")
    except KeyError:
        line = JsonFormatter("edge").format(record("x", exc_info=sys.exc_info()))
    assert "KeyError" in json.loads(line)["exception"]


def test_a_text_line_ends_with_its_fields_and_no_value_can_look_like_another():
    line = TextFormatter().format(
        record("done", **fields(model="a b=c\nINFO x", n=3, adapters=("p@1", "q@2"), none=()))
    )
    assert "\n" not in line
    assert line.endswith('WARNING a.b: done model="a b=c\\nINFO x" n=3 adapters=p@1,q@2 none=-')


def test_a_text_line_without_fields_is_as_before():
    assert TextFormatter().format(record("plain")).endswith(" WARNING a.b: plain")
