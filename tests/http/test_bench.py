"""The benchmark measures what it says; its figures are nobody's business here."""

import json

import pytest
from aiohttp import ClientSession

from mgpu_http.bench import PARTS, core, log, proxying
from mgpu_http.bench.load import LoadError, post, send
from mgpu_http.bench.run import MEASURES, markdown
from mgpu_http.bench.servers import KINDS, servers
from mgpu_http.bench.upstream import ANSWER, CHUNK, CHUNKS
from mgpu_http.cli import main


def test_steps_are_timed_with_everybody_waiting() -> None:
    measured = core.steps(10, requests=5)
    assert measured.waiting == 10
    assert measured.step_us > 0
    assert measured.per_s == pytest.approx(1e6 / measured.step_us)


def test_the_pass_looks_at_a_thousand_requests_of_as_many_consumers() -> None:
    assert core.walk_ms(passes=1) > 0


async def test_every_server_answers_what_the_service_answers() -> None:
    whole = {"/answer": ANSWER, "/stream": CHUNK * CHUNKS}
    with servers() as targets:
        assert list(targets) == ["direct", "bare Hypercorn", "plain proxy", "mgpu"]
        async with ClientSession() as session:
            for path, expected in whole.items():
                for name, target in targets.items():
                    if (name, path) == ("bare Hypercorn", "/stream"):
                        continue
                    url = f"http://127.0.0.1:{target.port}{target.path(path)}"
                    async with session.post(url, data=b"{}") as answer:
                        assert await answer.read() == expected, (name, path)
                    seen = await send(
                        target.port, post(target.path(path), b"{}"), clients=2, requests=5
                    )
                    assert len(seen.latencies_s) == 5, name
                    assert all(0 < latency <= seen.took_s for latency in seen.latencies_s)
        measured = await proxying.measure(targets, "/answer", requests=70, rounds=1)
        with pytest.raises(LoadError, match="404"):
            await send(targets["mgpu"].port, post("/nothing", b""), clients=1, requests=1)
    assert [(one.target, one.clients) for one in measured] == [
        (name, clients) for clients in proxying.CLIENTS for name in targets
    ]
    for one in measured:
        assert one.p50_ms <= one.p99_ms


def test_a_log_is_written_and_replayed() -> None:
    costs = log.measure(events=50, rounds=2)
    assert 0 < costs.append_p50_us <= costs.append_p99_us <= costs.round_p99_us
    assert 0 < costs.between_p50_us <= costs.between_p99_us
    assert costs.replayed_per_s > 0


def test_each_part_has_a_title_and_each_way_a_kind() -> None:
    assert PARTS.keys() == MEASURES.keys()
    assert len(set(KINDS.values())) == len(KINDS)


def test_the_table_is_markdown() -> None:
    rows = [{"server": "mgpu", "p50 ms": 1.5}, {"server": "direct", "p50 ms": 0.25}]
    assert markdown(rows).splitlines() == [
        "| server | p50 ms |",
        "| ------ | -----: |",
        "| mgpu   |    1.5 |",
        "| direct |   0.25 |",
    ]


def test_the_command_gives_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "walk", "--rounds", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"machine", "walk"}
    assert document["walk"][0]["waiting"] == core.CROWD


@pytest.mark.parametrize("wrong", [["nothing"], ["--rounds", "0"]])
def test_wrong_input_is_explained(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *wrong])
    assert ended.value.code == 2
    assert wrong[-1] in capsys.readouterr().err
