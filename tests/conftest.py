from collections.abc import Iterator

import pytest

from tests.support.upstream import Upstream, start_upstream


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with start_upstream() as upstream:
        yield upstream
