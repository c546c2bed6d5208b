from collections.abc import Iterator

import pytest

from tests.support.upstream import Upstream, start_upstream


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-transcripts",
        action="store_true",
        help="write tests/core/transcripts/*.txt anew with what the core decides now",
    )
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write tests/golden/*.jsonl anew with what the core decides now on the same events",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=5,
        help="how often a broker under load is killed [5]",
    )


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with start_upstream() as upstream:
        yield upstream
