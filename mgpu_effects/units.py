"""What is loaded and unloaded as a whole: a consumer, or each of its models by itself.

A unit is a consumer like any other to all that comes after: it has the settings of its consumer
but for what its model says, and the name CONSUMER/ID. The units of one consumer live in one server.
"""

import re
from collections.abc import Iterator, Mapping

from attrs import evolve, fields

from mgpu_effects.errors import BrokerError
from mgpu_effects.settings import ConsumerSettings, Kind, ModelSettings, Settings, Unit
from mgpu_effects.steps import with_value
from mgpu_effects.values import MODEL

# Stands for the models that nobody has named.
ANY = "*"
LONGEST_NAME = 200
# So many names at most stand in the answer to one who asks for a wrong one.
MOST_TOLD = 20
OWN = {"upstream", "aliases"}


def units(settings: Settings) -> dict[str, ConsumerSettings]:
    """Give all units by name."""
    return {one.name: one for each in settings.consumers.values() for one in units_of(each)}


def units_of(consumer: ConsumerSettings) -> Iterator[ConsumerSettings]:
    if not isinstance(consumer.models, Mapping):
        yield consumer
        return
    for model, settings in consumer.models.items():
        if model != ANY:
            yield _unit(consumer, model, settings)


def _unit(consumer: ConsumerSettings, model: str, settings: ModelSettings) -> ConsumerSettings:
    own = {each.name for each in fields(ModelSettings)} - OWN
    given = {name: value for name in own if (value := getattr(settings, name)) is not None}
    upstream = settings.upstream or model
    return evolve(
        consumer,
        name=unit_of(consumer.name, model),
        models=(),
        load=tuple(with_value(step, "model", upstream) for step in consumer.load),
        unload=tuple(with_value(step, "model", upstream) for step in consumer.unload),
        unit=Unit(
            server=consumer.name,
            model=model,
            upstream=upstream,
            concurrency=consumer.max_concurrency,
        ),
        **given,
    )


# ------------------------------------------------------------------------ from a request's model


def server_of(settings: Settings, kind: Kind, model: str | None) -> ConsumerSettings:
    """Give the consumer that a model leads to, or the kind alone where no model is named.

    A name that nobody has belongs to a consumer that takes any, the one routed for the kind before
    others. Raises `no_consumer`.
    """
    consumers = settings.consumers
    routed = consumers.get(settings.routing.get(kind, ""))
    if model is None:
        if routed is None:
            raise BrokerError(code="no_consumer", message=f"nothing is routed for {kind}")
        return routed
    for consumer in consumers.values():
        if model in model_names(consumer):
            return consumer
    any_model = [one for one in consumers.values() if ANY in one.models]
    if routed in any_model:
        any_model = [routed]
    if len(any_model) == 1:
        return any_model[0]
    raise BrokerError(code="no_consumer", message=_nobodys(settings, model))


def _nobodys(settings: Settings, model: str) -> str:
    known = [one for each in settings.consumers.values() for one in model_names(each)]
    names = ", ".join(sorted(known)[:MOST_TOLD]) or "none, `models` of a consumer names them"
    return f"no model {model} is known; known are: {names}"


def model_names(consumer: ConsumerSettings) -> Iterator[str]:
    """Give all names that lead to this consumer."""
    if not isinstance(consumer.models, Mapping):
        yield from consumer.models
        return
    for model, settings in consumer.models.items():
        if model != ANY:
            yield from names_of(model, settings)


def unit_name(consumer: ConsumerSettings, model: str | None) -> str | None:
    """Give the unit that a request to this consumer goes to, None for one that must be met first.

    `model` is what the request says, None where it says nothing. Raises `no_consumer`.
    """
    if not isinstance(consumer.models, Mapping):
        return consumer.name
    named = {one: settings for one, settings in consumer.models.items() if one != ANY}
    if model is None and len(consumer.models) == len(named) == 1:
        return unit_of(consumer.name, *named)
    if model is None:
        raise _no_model(consumer, "the request names no model")
    for one, settings in named.items():
        if model in names_of(one, settings):
            return unit_of(consumer.name, one)
    if ANY not in consumer.models:
        raise _no_model(consumer, f"{consumer.name} has no model {model}")
    return None


def unit_of(server: str, model: str) -> str:
    """Give the name of the unit that a model of a server is."""
    return f"{server}/{model}"


def names_of(model: str, settings: ModelSettings) -> tuple[str, ...]:
    """Give all names by which clients may ask for a model."""
    return tuple(dict.fromkeys((model, *settings.aliases, settings.upstream or model)))


def is_model_name(text: str) -> bool:
    """Say whether a client's word may become part of a unit's name."""
    return len(text) <= LONGEST_NAME and re.fullmatch(MODEL, text) is not None and text != ANY


def with_model(settings: Settings, server: str, model: str) -> Settings:
    """Give the settings with a unit for a model that only `*` covers."""
    models = models_of(settings, server)
    return _with_models(settings, server, {**models, model: models[ANY]})


def without_model(settings: Settings, server: str, model: str) -> Settings:
    models = models_of(settings, server)
    return _with_models(settings, server, {k: v for k, v in models.items() if k != model})


def models_of(settings: Settings, server: str) -> Mapping[str, ModelSettings]:
    models = settings.consumers[server].models
    return models if isinstance(models, Mapping) else {}


def _with_models(settings: Settings, server: str, models: Mapping[str, ModelSettings]) -> Settings:
    consumer = evolve(settings.consumers[server], models=models)
    return evolve(settings, consumers={**settings.consumers, server: consumer})


def _no_model(consumer: ConsumerSettings, what: str) -> BrokerError:
    known = ", ".join(one for one in consumer.models if one != ANY) or "none"
    return BrokerError(
        code="no_consumer", message=f"{what}; it has: {known}", consumer=consumer.name
    )
