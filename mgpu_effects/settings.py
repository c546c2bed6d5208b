"""The user's configuration, as typed classes: config/consumers.yaml after reading and checking.

Field names are the keys of the file. The reader, the JSON Schema for editors and the documentation
of the file are made from what is written here; `shapes` explains the vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args

from attrs import field, frozen

from mgpu_effects import presets
from mgpu_effects.shapes import (
    NAMED,
    UNWRITTEN,
    Between,
    ExactlyOneKey,
    NotEmpty,
    OneOf,
    OneOrMany,
    ShellWords,
    Singular,
    Stands,
    Word,
    doc,
)
from mgpu_effects.values import (
    Address,
    Argument,
    AtLeastOne,
    Condition,
    Count,
    Expression,
    GpuIndex,
    GraceSeconds,
    HeaderName,
    HeaderValue,
    Method,
    Mib,
    ModelExpression,
    ModelName,
    Name,
    Origin,
    PortNumber,
    Priority,
    RoutePattern,
    Seconds,
    Sha256,
    Signal,
    Status,
    Text,
    UnitName,
    Url,
    UrlPath,
    VariableName,
)

Gpu = GpuIndex | Annotated[Mapping[GpuIndex, Mib], NotEmpty()] | Literal["none"]
Kind = Literal["tts", "stt", "llm", "image"]
KINDS: tuple[Kind, ...] = get_args(Kind)
KindName = Annotated[str, OneOf(KINDS)]
# Where OpenAI's and Anthropic's clients ask for work, and the kind that it is.
MODEL_PATHS: Mapping[str, Kind] = {
    "/v1/chat/completions": "llm",
    "/v1/completions": "llm",
    "/v1/responses": "llm",
    "/v1/embeddings": "llm",
    "/v1/rerank": "llm",
    "/v1/messages": "llm",
    "/v1/messages/count_tokens": "llm",
    "/v1/audio/speech": "tts",
    "/v1/audio/transcriptions": "stt",
    "/v1/audio/translations": "stt",
    "/v1/images/generations": "image",
    "/v1/images/edits": "image",
}
WorkName = Annotated[str, OneOf((*KINDS, *MODEL_PATHS))]
PresetName = Annotated[str, OneOf(presets.names())]
SamplerName = Literal["auto", "nvml", "nvidia-smi", "none", "simulated"]
KILLED_S = 5.0  # after the grace: how long a killed process may take to give back its memory


@frozen(kw_only=True)
class Endpoint:
    """Where a call without a body goes."""

    path: UrlPath = field(metadata=doc("path under the consumer's URL"))
    method: Method = field(default="GET", metadata=doc("HTTP method"))


@frozen(kw_only=True)
class WorkEndpoint(Endpoint):
    """Where the consumer takes one kind of work."""

    method: Method = field(default="POST", metadata=doc("HTTP method"))


@frozen(kw_only=True)
class Step:
    """One HTTP call, as of a load or unload."""

    path: UrlPath = field(metadata=doc("path under the consumer's URL"))
    method: Method = field(default="POST", metadata=doc("HTTP method"))
    headers: Mapping[HeaderName, HeaderValue] = field(
        factory=dict, metadata=doc("headers of this call, beside the consumer's own")
    )
    body: str | Mapping[str, object] | None = field(
        default=None, metadata=doc("text is sent as it is, a mapping as JSON")
    )
    ok: tuple[Status, ...] = field(
        default=(), metadata=doc("the statuses that count as success; empty: any 2xx")
    )
    timeout_s: Seconds = field(default=60, metadata=doc("how long the call may take"))


@frozen(kw_only=True)
class Question(Step):
    """One HTTP call that asks about a job. Redirects are no answer, nor is what is no JSON."""

    method: Method = field(default="GET", metadata=doc("HTTP method"))
    timeout_s: Seconds = field(default=10, metadata=doc("how long the call may take"))
    when: Condition = field(
        metadata=doc(
            "JMESPath in the JSON that it answers: yes, unless that is null, false or empty. {id}"
            " stands for the job's id"
        )
    )


@frozen(kw_only=True)
class ResultSettings:
    """Where the finished work of a job is, for a client that waits for it."""

    ask: UrlPath = field(
        metadata=doc("path that tells where it is; {id} stands for the job's id, here as in path")
    )
    values: Mapping[Name, Expression] = field(
        factory=dict,
        metadata=doc("JMESPath, in the JSON that this answers, of what path has in braces by name"),
    )
    path: UrlPath = field(metadata=doc("path that gives it"))


@frozen(kw_only=True)
class JobSettings:
    """For a service that takes a job and answers at once: its work ends when the job is over."""

    id: Expression = field(
        metadata=doc("JMESPath of the job's id in the JSON that the service answers to work (2xx)")
    )
    over: Annotated[tuple[Question, ...], OneOrMany(), NotEmpty()] = field(
        metadata=doc("the job is over when all of these, asked in this order, say yes")
    )
    failed: Question | None = field(
        default=None,
        metadata=doc("asked once it is over; yes, or no answer: the work counts as failed"),
    )
    cancel: Annotated[tuple[Step, ...], OneOrMany()] = field(
        default=(),
        metadata=doc(
            "how to end the job, when an operator or the time-out does; {id} in a path or in a text"
            " of a body stands for the job's id, here as in the questions"
        ),
    )
    result: ResultSettings | None = field(
        default=None,
        metadata=doc("where the finished work is: POST /v1/KIND?wait=1 answers with that"),
    )
    poll_s: Seconds = field(default=1, metadata=doc("between two rounds of questions"))
    timeout_s: Seconds = field(
        default=3600, metadata=doc("a job that is not over by then is cancelled and given up")
    )


@frozen(kw_only=True)
class ResidencySettings:
    """Where the service tells whether it is loaded: asked with each probe, by GET, for JSON."""

    path: UrlPath = field(metadata=doc("path under the consumer's URL"))
    resident: ModelExpression = field(
        metadata=doc(
            "JMESPath in its answer: loaded, unless that is false or empty. null says nothing: what"
            " was believed stays believed, and the status tells why"
        )
    )
    mib: ModelExpression | None = field(
        default=None, metadata=doc("JMESPath of the memory that it holds while it is loaded")
    )
    unit: Literal["bytes", "mib"] = field(default="bytes", metadata=doc("what `mib` counts"))
    absent: tuple[Status, ...] = field(
        default=(),
        metadata=doc("the statuses that it answers with in place of JSON while it is not loaded"),
    )


@frozen(kw_only=True)
class BusySettings:
    """Where the service tells whether it works, for somebody past the broker: asked likewise."""

    path: UrlPath = field(metadata=doc("path under the consumer's URL"))
    when: ModelExpression = field(
        metadata=doc(
            "JMESPath in its answer: at work, unless that is false or empty. null says nothing"
        )
    )


@frozen(kw_only=True)
class ProcessSettings:
    """The broker runs the service itself, in a process group of its own."""

    command: Annotated[tuple[Argument, ...], ShellWords(), NotEmpty()] = field(
        metadata=doc("the program and its arguments; no shell is involved")
    )
    env: Mapping[VariableName, Argument] = field(
        factory=dict, metadata=doc("variables beside the broker's own environment")
    )
    cwd: Text | None = field(default=None, metadata=doc("its directory; null: the broker's"))
    stop_signal: Signal = field(default="TERM", metadata=doc("the signal that asks it to end"))
    grace_s: GraceSeconds = field(
        default=10, metadata=doc("between the stop signal and SIGKILL to the whole group")
    )
    ready_s: Seconds = field(
        default=120, metadata=doc("from the start until its health probe must answer")
    )


@frozen(kw_only=True)
class SystemdSettings:
    """A unit that is started and stopped through systemctl."""

    unit: Text = field(metadata=doc("name of the unit"))
    user: bool = field(
        default=False, metadata=doc("a unit of the user's manager instead of the system's")
    )


@frozen(kw_only=True)
class ContainerSettings:
    """A container that exists already, started and stopped by the command of its engine."""

    name: Name = field(metadata=doc("name of the container, or its id"))
    engine: Literal["docker", "podman"] = field(
        default="docker", metadata=doc("the command that starts and stops it")
    )
    grace_s: GraceSeconds | None = field(
        default=None,
        metadata=doc("between its stop signal and SIGKILL; null: as the container itself says"),
    )
    ready_s: Seconds = field(
        default=120, metadata=doc("from the start until its health probe must answer")
    )


@frozen(kw_only=True)
class DriverSettings:
    """Who can start and stop the process behind the consumer: exactly one of these."""

    process: ProcessSettings | None = field(
        default=None, metadata=doc("the broker runs the service itself")
    )
    systemd: SystemdSettings | None = field(
        default=None, metadata=doc("systemd runs it, as a unit")
    )
    container: ContainerSettings | None = field(
        default=None, metadata=doc("docker or podman runs it, as a container")
    )


@frozen(kw_only=True)
class Timeouts:
    """Limits on one request of a consumer, in seconds."""

    connect: Seconds = field(default=5, metadata=doc("until the connection stands"))
    first_byte: Seconds = field(default=600, metadata=doc("until the answer begins"))
    idle: Seconds = field(default=120, metadata=doc("between two pieces of the answer"))
    total: Seconds | None = field(
        default=None, metadata=doc("until the answer is complete; null: no limit")
    )
    client_write: Seconds = field(
        default=60, metadata=doc("a client that takes nothing for so long counts as gone")
    )
    upload: Seconds = field(
        default=60, metadata=doc("a body that brings nothing for so long is given up")
    )


@frozen(kw_only=True)
class ModelSettings:
    """One model of a service that holds several. What is null is as its consumer's."""

    upstream: Text | None = field(
        default=None, metadata=doc("what its service calls it; null: as it is called here")
    )
    aliases: tuple[ModelName, ...] = field(
        default=(), metadata=doc("other names by which clients may ask for it")
    )
    gpu: Gpu | None = field(default=None, metadata=doc("the GPUs that it uses"))
    vram_resident_mib: Mib | Literal["auto"] | None = field(
        default=None, metadata=doc("its footprint")
    )
    vram_load_mib: Mib | None = field(
        default=None, metadata=doc("its footprint while it loads, where that is more")
    )
    vram_residue_mib: Mib | None = field(
        default=None, metadata=doc("what stays after an unload of it")
    )
    can_coexist_with: tuple[UnitName, ...] | None = field(
        default=None, metadata=doc("who may stay resident beside it")
    )
    priority: Priority | None = field(default=None, metadata=doc("0 low ... 4 urgent"))
    max_concurrency: AtLeastOne | None = field(
        default=None, metadata=doc("jobs at once on this model; its consumer's is over all models")
    )
    max_pending: AtLeastOne | None = field(
        default=None, metadata=doc("requests admitted and unfinished")
    )
    pinned: bool | None = field(default=None, metadata=doc("never evicted"))
    preload: bool | None = field(default=None, metadata=doc("loaded at the start"))
    idle_unload_s: Seconds | None = field(
        default=None, metadata=doc("unloaded after so long without work")
    )


@frozen(kw_only=True)
class Unit:
    """Which model of which consumer a unit is."""

    server: str
    model: str
    upstream: str
    # Of the server, over all of its models.
    concurrency: int


@frozen(kw_only=True)
class ConsumerSettings:
    """One service behind the broker."""

    name: str = field(metadata=NAMED)
    url: Url = field(metadata=doc("base URL of the service"))
    preset: Annotated[PresetName | None, Stands(presets.keys_node)] = field(
        default=None,
        metadata=doc(
            "keys for a known service, shipped with the broker (`mgpu presets`); those that are"
            " given beside it win, each as a whole"
        ),
    )
    health: Endpoint = field(
        factory=lambda: Endpoint(path="/health"), metadata=doc("liveness probe; GET /health")
    )
    paths: Mapping[WorkName, WorkEndpoint] = field(
        factory=dict,
        metadata=doc(
            "its endpoint for each kind of work that it does; and, where they are elsewhere than"
            " at the same path, those for OpenAI's and Anthropic's clients"
        ),
    )
    headers: Mapping[HeaderName, HeaderValue] = field(
        factory=dict, metadata=doc("sent with every call to it, as its API key")
    )
    models: tuple[ModelName, ...] | Mapping[ModelName, ModelSettings] = field(
        default=(),
        metadata=doc(
            "names of models: in a list, other names for this consumer; in a mapping, each is"
            " loaded and unloaded by itself, and `*` stands for those that nobody named"
        ),
    )
    gpu: Gpu = field(
        default=0,
        metadata=doc(
            "the GPU that it uses, or the MiB that it takes on each of several, or none: it works"
            " on the CPU and needs neither memory nor a slot"
        ),
    )
    gpu_slot: bool = field(
        default=True, metadata=doc("false: its memory counts, but its work needs no slot")
    )
    vram_resident_mib: Mib | Literal["auto"] = field(
        default=0,
        metadata=doc("its footprint; 0: unknown, nothing is evicted for it; auto: as measured"),
    )
    vram_load_mib: Mib = field(
        default=0, metadata=doc("its footprint while it loads, where that is more")
    )
    vram_residue_mib: Mib = field(
        default=0, metadata=doc("what stays after an unload, as a CUDA context")
    )
    vram_managed: bool = field(
        default=False, metadata=doc("it evicts by itself: never tracked, sized or evicted")
    )
    residency: ResidencySettings | Literal["nvml", "assumed"] = field(
        default="assumed",
        metadata=doc(
            "how to see that it is loaded. nvml: its processes hold more than `vram_residue_mib` on"
            " its cards; assumed: by what the broker told it to do, or by whether its process runs"
            " where a driver is all there is"
        ),
    )
    busy: BusySettings | None = field(
        default=None,
        metadata=doc("how to see that it works for others; who works is not evicted. null: no way"),
    )
    unload: Annotated[tuple[Step, ...], OneOrMany()] = field(
        default=(), metadata=doc("how to clear it out of VRAM; without: its driver stops it")
    )
    unload_again_s: Seconds | None = field(
        default=None,
        metadata=doc(
            "told to unload once more if no reading of its cards shows within so long that memory"
            " came free: for a service that may lose what it is told; null: it does not"
        ),
    )
    load: Annotated[tuple[Step, ...], OneOrMany()] = field(
        default=(),
        metadata=doc(
            "how to bring it back; without: its driver starts it, else its next request does"
        ),
    )
    systemd_unit: Text | None = field(
        default=None, metadata=doc("the same as `driver: {systemd: {unit: ...}}`")
    )
    driver: Annotated[DriverSettings, ExactlyOneKey()] | None = field(
        default=None,
        metadata=doc(
            "who starts and stops it, where it has no such routes or what they gave back was too"
            " little"
        ),
    )
    can_coexist_with: tuple[UnitName, ...] = field(
        default=(),
        metadata=doc("the consumers, or models as CONSUMER/ID, that may stay resident beside it"),
    )
    priority: Priority = field(default=2, metadata=doc("0 low ... 4 urgent"))
    max_concurrency: AtLeastOne = field(default=1, metadata=doc("jobs at once"))
    max_pending: AtLeastOne = field(
        default=64, metadata=doc("requests admitted and unfinished; more are answered 429")
    )
    pinned: bool = field(default=False, metadata=doc("never evicted"))
    preload: bool = field(
        default=False, metadata=doc("loaded at the start and after idle time, if memory is free")
    )
    idle_unload_s: Seconds | None = field(
        default=None, metadata=doc("unloaded after so long without work; null: never")
    )
    on_client_gone: Literal["close", "drain", "job"] = field(
        default="close",
        metadata=doc(
            "close: closing the call ends the work; drain: the service works on, so the answer is"
            " read to its end and thrown away before the next request; job: the same, and then"
            " its job is cancelled"
        ),
    )
    job: JobSettings | None = field(
        default=None,
        metadata=doc(
            "how to follow its work, where it goes on after the answer; null: it does not"
        ),
    )
    passive: tuple[RoutePattern, ...] = field(
        default=("GET *",),
        metadata=doc(
            "what needs no GPU at `front` and /upstream/NAME/: paths, each after its method or"
            " alone, where * stands for anything. ! before one takes it out again, and what is in"
            " `paths` never belongs here"
        ),
    )
    front: PortNumber | None = field(
        default=None,
        metadata=doc("a port on which the broker stands for the service, for its own clients"),
    )
    wait_comments_s: Seconds | None = field(
        default=None,
        metadata=doc(
            "between two comments to OpenAI's and Anthropic's clients that wait for a stream; the"
            " first commits its 200. null: only to those who ask, by X-Mgpu-Progress"
        ),
    )
    timeout_s: Timeouts = field(factory=Timeouts, metadata=doc("limits on one request"))
    unit: Unit | None = field(default=None, metadata=UNWRITTEN)

    @property
    def server(self) -> str:
        """The name of the consumer whose process it lives in."""
        return self.unit.server if self.unit else self.name

    @property
    def resident_mib_by_gpu(self) -> Mapping[int, int]:
        """What it declares to hold on each card that it uses; 0: not known."""
        if self.gpu == "none":
            return {}
        if isinstance(self.gpu, int):
            return {self.gpu: 0 if self.vram_resident_mib == "auto" else self.vram_resident_mib}
        return dict(sorted(self.gpu.items()))


@frozen(kw_only=True)
class GpuSettings:
    """One graphics card."""

    index: GpuIndex | None = field(
        default=None, metadata=doc("its number; null: its place in the list, from 0")
    )
    uuid: Text | None = field(
        default=None, metadata=doc("which card it is, where numbers may change between boots")
    )
    total_mib: AtLeastOne | None = field(
        default=None, metadata=doc("its memory; null: as the driver says")
    )
    reserved_mib: Mib = field(
        default=0,
        metadata=doc(
            "left to others: never counted on, and in use where there is no reading to go by"
        ),
    )
    cushion_mib: Mib = field(default=256, metadata=doc("kept free beside every need"))
    max_parallel: AtLeastOne | None = field(
        default=1, metadata=doc("consumers at work at once; null: no limit")
    )
    poll_interval_s: Seconds = field(default=2, metadata=doc("between two readings"))
    sampler: SamplerName = field(
        default="auto", metadata=doc("who reads it; auto: nvml, else nvidia-smi, else none")
    )


def gpu_numbers(gpus: Sequence[GpuSettings]) -> tuple[int, ...]:
    """Number the cards: by `index`, else by the place in the list."""
    return tuple(place if gpu.index is None else gpu.index for place, gpu in enumerate(gpus))


@frozen(kw_only=True)
class ProbeSettings:
    """How consumers are probed."""

    interval_s: Seconds = field(default=5, metadata=doc("between two probes of a consumer"))
    timeout_s: Seconds = field(default=2, metadata=doc("how long one may take"))
    failures: AtLeastOne = field(
        default=2, metadata=doc("so many failures in a row: unreachable (a refusal: at once)")
    )


@frozen(kw_only=True)
class SchedulerSettings:
    """How requests are ordered and who makes room for whom."""

    eviction: Literal["lru", "gdsf"] = field(
        default="lru", metadata=doc("whom to evict first: used longest ago, or cheapest to lose")
    )
    overtake_bound: Count | None = field(
        default=8, metadata=doc("a request overtaken so often goes first; null: never")
    )
    queue_timeout_s: Seconds = field(default=300, metadata=doc("longest wait of a request"))
    max_evictions: Count = field(default=5, metadata=doc("most unloads for one load"))
    settle_timeout_s: GraceSeconds = field(
        default=10, metadata=doc("how long to wait until a reading shows that memory came free")
    )
    restore_after_s: Seconds | None = field(
        default=None, metadata=doc("without work for so long, the preload set comes back")
    )
    when_unfit: Literal["wait", "reject", "admit"] = field(
        default="wait", metadata=doc("when memory that nobody here can free is in the way")
    )
    overlap_loads: bool = field(default=True, metadata=doc("load beside work under way"))
    load_timeout_s: Seconds = field(default=300, metadata=doc("longest load"))
    unload_timeout_s: Seconds = field(default=60, metadata=doc("longest unload"))
    shutdown_grace_s: GraceSeconds = field(
        default=30, metadata=doc("for those served when the broker is told to end")
    )


@frozen(kw_only=True)
class AuthKey:
    """One client or operator. The key itself is nowhere in the configuration."""

    name: Text = field(metadata=doc("whose key it is"))
    hash: Sha256 = field(metadata=doc("what `mgpu key add` printed"))
    admin: bool = field(default=False, metadata=doc("may steer, not only ask and see"))
    priority: Priority | None = field(
        default=None,
        metadata=doc(
            "the most that its requests may ask for, even above their consumer's; null: the"
            " consumer's own"
        ),
    )


@frozen(kw_only=True)
class AuthSettings:
    """Who may."""

    keys: tuple[AuthKey, ...] = field(
        default=(), metadata=doc("needed on any address that is not loopback")
    )
    open: bool = field(default=False, metadata=doc("anybody may who reaches the address"))


@frozen(kw_only=True)
class EventLogSettings:
    """The log of everything that happened and was decided."""

    dir: Text | None = field(
        default=None, metadata=doc("null: $STATE_DIRECTORY, else the user's state home")
    )
    fsync: Seconds | Literal["each", "never"] = field(
        default=1,
        metadata=doc("seconds between two; each: as soon as it can, and nothing waits for it"),
    )
    rotate_mib: AtLeastOne = field(
        default=64, metadata=doc("size of one file at most, before it is compressed")
    )
    keep_mib: AtLeastOne = field(default=1024, metadata=doc("size of all files"))
    keep_days: Annotated[float, Between(0)] = field(default=30, metadata=doc("age of files"))


@frozen(kw_only=True)
class Settings:
    """The whole file."""

    listen: Annotated[tuple[Address, ...], OneOrMany(), NotEmpty()] = field(
        default=("127.0.0.1:8770",), metadata=doc("where the broker is reached")
    )
    auth: Annotated[AuthSettings, Word("open", AuthSettings(open=True))] = field(
        factory=AuthSettings, metadata=doc("who may use it; open: anybody who reaches it")
    )
    allowed_hosts: tuple[Text, ...] = field(
        default=(), metadata=doc("names by which the broker may be called, beside loopback ones")
    )
    allowed_origins: tuple[Origin, ...] = field(
        default=(), metadata=doc("origins of web pages that may call it")
    )
    max_body_mib: AtLeastOne = field(default=512, metadata=doc("largest body of a request"))
    routing: Mapping[KindName, Name] = field(
        factory=dict, metadata=doc("which consumer answers that kind of work")
    )
    audio_proxy: Name | None = field(
        default=None, metadata=doc("which consumer GET /audio/* goes to")
    )
    gpus: Annotated[tuple[GpuSettings, ...], Singular("gpu"), NotEmpty()] = field(
        factory=lambda: (GpuSettings(),), metadata=doc("the graphics cards")
    )
    probe: ProbeSettings = field(factory=ProbeSettings, metadata=doc("how consumers are probed"))
    scheduler: SchedulerSettings = field(
        factory=SchedulerSettings, metadata=doc("who goes first and who makes room")
    )
    event_log: EventLogSettings = field(
        factory=EventLogSettings, metadata=doc("the record of everything that was decided")
    )
    consumers: Mapping[Name, ConsumerSettings] = field(
        factory=dict, metadata=doc("the services behind the broker, by name")
    )

    @property
    def gpu_by_index(self) -> Mapping[int, GpuSettings]:
        """The cards by their numbers."""
        return dict(zip(gpu_numbers(self.gpus), self.gpus, strict=True))

    @property
    def fronts(self) -> Mapping[str, tuple[str, ...]]:
        """The addresses at which the broker stands for a service, by consumer."""
        hosts = dict.fromkeys(address.rpartition(":")[0] for address in self.listen)
        return {
            name: tuple(f"{host}:{consumer.front}" for host in hosts)
            for name, consumer in self.consumers.items()
            if consumer.front is not None
        }

    @property
    def poll_interval_s(self) -> float:
        """Give the pace of the readings: one serves all cards, as often as any of them wants."""
        return min(gpu.poll_interval_s for gpu in self.gpus)
