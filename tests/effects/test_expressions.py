"""JMESPath expressions, on answers as ComfyUI gave them (shortened), and wrong ones."""

import json
from typing import Any

import pytest

from mgpu_effects.expressions import ExpressionError, JmesPath, holds, value_of
from tests.support.presets import consumer

NODES = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64}}}
A, B, C = "bf043a0e-40d1", "7e4143b8-6bcd", "cca73219-b29d"
QUEUE = {
    "queue_running": [[0, A, NODES, {"client_id": "q-1"}, ["3"]]],
    "queue_pending": [
        [-3, B, NODES, {"client_id": "q-1", "create_time": 1795255955791}, ["3"]],
        [1.5, C, NODES, {}, ["3"]],
    ],
}
EMPTY: dict[str, Any] = {"queue_running": [], "queue_pending": []}


def history(status: str, last: str) -> dict[str, Any]:
    messages = [["execution_start", {"prompt_id": A}], [last, {"prompt_id": A}]]
    ended = {"status_str": status, "completed": status == "success", "messages": messages}
    return {A: {"prompt": [0, A, NODES, {}, ["3"]], "outputs": {}, "status": ended, "meta": {}}}


@pytest.fixture(scope="module")
def job():
    job = consumer("comfyui").job
    assert job is not None
    return job


@pytest.mark.parametrize(
    ("queue", "prompt_id", "over"),
    [
        (QUEUE, A, False),
        (QUEUE, B, False),
        (QUEUE, C, False),
        (QUEUE, "q-1", True),
        (QUEUE, A[:5], True),
        (EMPTY, A, True),
        ({**EMPTY, "queue_running": [[44, "dup", {}, {}, []]]}, "dup", False),
    ],
)
def test_a_prompt_is_over_when_it_neither_runs_nor_waits(job, queue, prompt_id, over):
    (question,) = job.over
    assert holds(question.when, queue, {"id": prompt_id}) is over


@pytest.mark.parametrize("answer", [{}, [], None, {"queue_running": []}, {"error": "no"}])
def test_what_is_no_queue_says_nothing_about_a_prompt(job, answer):
    with pytest.raises(ExpressionError):
        holds(job.over[0].when, answer, {"id": A})


@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        ({}, True),
        (history("success", "execution_success"), False),
        (history("error", "execution_error"), False),
        (history("error", "execution_interrupted"), False),
    ],
)
def test_a_prompt_that_is_not_in_the_history_either_was_lost(job, answer, lost):
    assert holds(job.failed.when, answer, {"id": A}) is lost


def test_the_answer_to_a_prompt_names_it(job):
    assert value_of(job.id, {"prompt_id": A, "number": 3, "node_errors": {}}) == A
    assert value_of(job.id, {"error": {"type": "no_prompt"}, "node_errors": {}}) is None


@pytest.mark.parametrize(
    "value", ["a", "it's", "a`b", "a\\", "\\`", 'a"b', "{id}", "", "ä", "\ud800", "\n", 17, 1.5]
)
def test_whatever_stands_in_a_value_stays_a_value(value):
    assert value_of("@ == {id}", value, {"id": value}) is True
    assert value_of("contains(@, {id})", ["x", value], {"id": value}) is True
    assert value_of("contains(@, {id})", ["x", json.dumps([value])], {"id": value}) is False


@pytest.mark.parametrize(
    ("found", "true"),
    [(None, 0), (False, 0), ("", 0), ([], 0), ({}, 0), (0, 1), ("no", 1), ([0], 1), (True, 1)],
)
def test_what_counts_as_true(found, true):
    assert holds("x", {"x": found}) is bool(true)


def test_a_name_of_a_multiselect_is_no_value():
    assert value_of("{id: x, ids: {id}}", {"x": 1}, {"id": "a"}) == {"id": 1, "ids": "a"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("length(", "it breaks off at character 8"),
        ("a b", "it breaks off at character 3"),
        ("x == {id} y", "it breaks off at character 11"),
        ("x == {name}", "it breaks off at character 11"),
        ("#", "it breaks off at character 1"),
        ("", "it is empty"),
        ("(" * 5000, "it is nested too deeply"),
        ("lenght(a)", "there is no function lenght"),
        ("a[?b && lenght(c)]", "there is no function lenght"),
        ("sort_by(a, &lenght(b))", "there is no function lenght"),
        ("contains(a)", "contains takes 2 values, not 1"),
        ("not_null()", "not_null takes 1 values, not 0"),
        ("contains(a, '{id}')", "leave out the quotes around it"),
    ],
)
def test_a_wrong_expression_is_refused_and_why(text, problem):
    expression = JmesPath(("id",))
    assert not expression.accepts(text)
    assert problem in expression.problem(text)


@pytest.mark.parametrize(
    "text", ["a.b[0]", "not_null(a, b, c)", "x == {id}", "sort_by(a, &b)", "@"]
)
def test_a_right_expression_is_accepted(text):
    assert JmesPath(("id",)).accepts(text)
