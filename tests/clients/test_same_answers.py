"""What a library's call returns or raises is the same through the broker as without it."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.clients.behind import WAYS, Behind, behind
from tests.clients.calls import CALLS, outcome

EACH = [(library, name) for library, calls in CALLS.items() for name in calls]
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),  # translations, in OpenAI's
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def here(tmp_path_factory: Any) -> AsyncIterator[Behind]:
    async with behind(tmp_path_factory.mktemp("broker"), max_concurrency=2) as it:
        yield it


@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("library", "name"), EACH)
async def test_the_same(here: Behind, library: str, name: str, awaited: bool) -> None:
    told, seen = {}, {}
    for way in WAYS[library]:
        here.service.forget()
        client = here.client(library, way, awaited=awaited)
        told[way] = await outcome(CALLS[library][name], client)
        seen[way] = here.service.seen
    raised = isinstance(told["direct"], dict) and "raised" in told["direct"]
    assert raised is name.startswith("of the service")
    for way in WAYS[library]:
        assert told[way] == told["direct"], way
        assert seen[way] == seen["direct"], way
