"""A job of the stand-in, in the shapes in which ComfyUI tells of it."""

from dataclasses import dataclass, field
from typing import Any

from tests.page.nodes import NODES

# The states in which one ends, and the message that says so.
ENDS = {
    "completed": "execution_success",
    "failed": "execution_error",
    "cancelled": "execution_interrupted",
}


@dataclass(eq=False)
class Job:
    number: int
    id: str
    prompt: dict[str, Any]
    extra: dict[str, Any]
    state: str = "pending"
    times: dict[str, int] = field(default_factory=dict)  # ms
    outputs: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, Any] = field(default_factory=dict)  # of progress_state

    @property
    def row(self) -> list[Any]:
        """As it stands in /queue."""
        ends = [
            key for key, node in self.prompt.items() if NODES[node["class_type"]]["output_node"]
        ]
        return [self.number, self.id, self.prompt, self.extra, ends]

    @property
    def listed(self) -> dict[str, Any]:
        """As it stands in /api/jobs."""
        shown = [(key, image) for key, out in self.outputs.items() for image in out["images"]]
        listed = {"id": self.id, "status": self.state, "priority": self.number, **self.times}
        if shown:
            key, image = shown[0]
            listed["preview_output"] = {**image, "nodeId": key, "mediaType": "images"}
        return {**listed, "outputs_count": len(shown)}

    @property
    def status(self) -> dict[str, Any]:
        """As it stands in /history."""
        completed = self.state == "completed"
        messages = [
            ["execution_start", {"prompt_id": self.id}],
            [ENDS[self.state], {"prompt_id": self.id}],
        ]
        text = "success" if completed else "error"
        return {"status_str": text, "completed": completed, "messages": messages}
