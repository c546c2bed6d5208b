"""What single values of the configuration may be."""

from typing import Annotated

from mgpu_effects.expressions import JmesPath
from mgpu_effects.shapes import Between, Matching, OneOf

PORT = "(?:[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)"

Mib = Annotated[int, Between(0)]
Count = Annotated[int, Between(0)]
AtLeastOne = Annotated[int, Between(1)]
Priority = Annotated[int, Between(0, 4)]
Status = Annotated[int, Between(100, 599)]
GpuIndex = Annotated[int, Between(0)]
# A thousandth at least: the core counts in whole microseconds and may not count zero.
Seconds = Annotated[float, Between(0.001)]
GraceSeconds = Annotated[float, Between(0)]
Text = Annotated[str, Matching(r"[^\0]*\S[^\0]*", "text that is not empty")]
Argument = Annotated[str, Matching(r"[^\0]*", "text")]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
Method = Annotated[str, OneOf(METHODS)]
Signal = Annotated[
    str, OneOf(("TERM", "INT", "QUIT", "HUP", "KILL", "ABRT", "USR1", "USR2", "WINCH"))
]
# A name stands in paths, as in /v1/consumers/NAME/load, and in the log.
Name = Annotated[
    str,
    Matching("[0-9A-Za-z][0-9A-Za-z._-]*", "a name of letters, digits and . _ -"),
]
# As its service calls it: it may hold slashes and colons.
MODEL = r"[^\s\0?#]+"
ModelName = Annotated[str, Matching(MODEL, "the name of a model, without spaces")]
UnitName = Annotated[
    str,
    Matching(
        f"[0-9A-Za-z][0-9A-Za-z._-]*(?:/{MODEL})?",
        "the name of a consumer, or of a model as CONSUMER/ID",
    ),
]
Url = Annotated[
    str,
    Matching(
        rf"https?://{HOST}(?::{PORT})?(?:/[^\s?#]*)?", "an http or https URL without query or login"
    ),
]
UrlPath = Annotated[str, Matching(r"/[^\s#]*", "a path that begins with /")]
RoutePattern = Annotated[
    str,
    Matching(
        rf"!?(?:(?:{'|'.join(METHODS)}) )?[/*][^\s?#]*",
        "a path such as /ws, GET /view/* or, to take it out again, !POST /prompt",
    ),
]
PortNumber = Annotated[int, Between(1, 65535)]
Origin = Annotated[
    str, Matching(r"[a-z][a-z0-9+.-]*://[^/\s]+", "an origin such as http://localhost:3000")
]
Address = Annotated[
    str, Matching(f"{HOST}:{PORT}", "an address such as 127.0.0.1:8770 or [::1]:8770")
]
# What to find in an answer; and what must be so in it, where {id} is the id of a job.
Expression = Annotated[str, JmesPath()]
Condition = Annotated[str, JmesPath(("id",))]
# The same in what a service says of itself, where {model} is the name of a unit's model.
ModelExpression = Annotated[str, JmesPath(("model",))]
HeaderName = Annotated[str, Matching(r"[0-9A-Za-z!#$%&'*+.^_`|~-]+", "the name of a header")]
HeaderValue = Annotated[str, Matching(r"[^\r\n\0]*", "text in one line")]
VariableName = Annotated[str, Matching(r"[^=\0]+", "the name of a variable")]
Sha256 = Annotated[
    str, Matching("[0-9A-Fa-f]{64}", "a SHA-256 of 64 hexadecimal digits, never the key itself")
]
