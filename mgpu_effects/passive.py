"""Which requests to a service need no GPU: they take no lease, wake nothing and keep nothing."""

import re
from functools import lru_cache

from mgpu_effects.settings import ConsumerSettings

# They ask what a GET asks.
LIKE_GET = {"HEAD", "OPTIONS"}


def is_passive(consumer: ConsumerSettings, method: str, path: str) -> bool:
    """Say whether the service does this without the GPU; `path` is without its query.

    The last of its patterns that matches decides, as in a .gitignore. What is not known is work.
    """
    method = "GET" if method in LIKE_GET else method
    work = {(one.method, one.path.partition("?")[0]) for one in consumer.paths.values()}
    if (method, path) in work:
        return False
    passive = False
    for pattern in consumer.passive:
        if _pattern(pattern.removeprefix("!")).fullmatch(f"{method} {path}"):
            passive = not pattern.startswith("!")
    return passive


@lru_cache(maxsize=1024)
def _pattern(text: str) -> re.Pattern[str]:
    method, _, path = text.rpartition(" ")
    wanted = re.escape(path).replace(r"\*", ".*")
    return re.compile(f"{method or '[A-Z]+'} {wanted}", re.DOTALL)
