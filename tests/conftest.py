from collections.abc import Iterator

import pytest

from tests.support.upstream import Upstream, start_upstream


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-transcripts",
        action="store_true",
        help="write tests/core/transcripts/*.txt anew with what the core decides now",
    )


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with start_upstream() as upstream:
        yield upstream
