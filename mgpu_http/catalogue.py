"""GET /v1/models: what all services have, as OpenAI's and Anthropic's clients read it."""

import asyncio
import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mgpu_effects.errors import BrokerError
from mgpu_effects.units import ANY, model_names
from mgpu_http.exchange import Exchange, Service


async def models(service: Service, _exchange: Exchange, _request: Request) -> Response:
    listed = [_row(service, *each) for each in (await _known(service)).items()]
    ends = {"first_id": listed[0]["id"], "last_id": listed[-1]["id"]} if listed else {}
    return JSONResponse({"object": "list", "data": listed, "has_more": False, **ends})


async def model(service: Service, _exchange: Exchange, request: Request) -> Response:
    wanted = request.path_params["id"]
    owner = (await _known(service)).get(wanted)
    if owner is None:
        message = f"no service has a model {wanted}; GET /v1/models lists those that are known"
        raise BrokerError(code="not_found", message=message)
    return JSONResponse(_row(service, wanted, owner))


async def _known(service: Service) -> dict[str, str]:
    """Give the consumer of each name; whoever takes any model is asked which it has.

    That wakes nobody: who does not run does not answer, and a list needs no model loaded. What
    clients only asked for need not exist.
    """
    consumers = service.broker.settings.consumers.values()
    named = {
        name: one.name
        for one in consumers
        for name in model_names(one)
        if not service.broker.has_met(one.name, name)
    }
    asked = [one.name for one in consumers if ANY in one.models]
    lists = await asyncio.gather(*(service.broker.models_of(name) for name in asked))
    found = {name: owner for owner, names in zip(asked, lists, strict=True) for name in names}
    return dict(sorted({**found, **named}.items()))


def _row(service: Service, name: str, owner: str) -> dict[str, Any]:
    """Give one model; since when there is such a model nobody knows, so it is since our start."""
    since_s = service.broker.started_at // 1_000_000
    since = datetime.datetime.fromtimestamp(since_s, datetime.UTC)
    return {
        "id": name,
        "object": "model",
        "created": since_s,
        "owned_by": owner,
        "type": "model",
        "display_name": name,
        "created_at": since.isoformat().replace("+00:00", "Z"),
    }
