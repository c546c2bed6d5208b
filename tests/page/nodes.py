"""What /object_info says of the nodes in the workflow that a page of ComfyUI opens with."""

from typing import Any

Inputs = dict[str, list[Any]]

SEED_MAX = 2**64 - 1
TEXT = ["STRING", {"multiline": True, "dynamicPrompts": True}]


def choice(*values: str) -> list[Any]:
    return [list(values)]


def whole(default: int, most: int, least: int = 1, **more: Any) -> list[Any]:
    return ["INT", {"default": default, "min": least, "max": most, **more}]


def real(default: float, most: float, step: float) -> list[Any]:
    return ["FLOAT", {"default": default, "min": 0.0, "max": most, "step": step}]


def node(
    name: str, output: str | None, required: Inputs, optional: Inputs | None = None
) -> dict[str, Any]:
    groups = {"required": required, **({"optional": optional} if optional else {})}
    return {
        "input": groups,
        "input_order": {group: list(inputs) for group, inputs in groups.items()},
        "is_input_list": False,
        "output": [output] if output else [],
        "output_is_list": [False] if output else [],
        "output_name": [output] if output else [],
        "name": name,
        "display_name": name,
        "description": "",
        "python_module": "nodes",
        "category": "stand-in",
        "output_node": output is None,
        "has_intermediate_output": False,
        "search_aliases": [],
    }


_ALL = (
    node(
        "CLIPLoader",
        "CLIP",
        {"clip_name": choice("qwen_3_4b.safetensors"), "type": choice("lumina2")},
        {"device": choice("default", "cpu")},
    ),
    node("VAELoader", "VAE", {"vae_name": choice("ae.safetensors")}),
    node(
        "UNETLoader",
        "MODEL",
        {"unet_name": choice("z_image_turbo_bf16.safetensors"), "weight_dtype": choice("default")},
    ),
    node("CLIPTextEncode", "CONDITIONING", {"text": TEXT, "clip": ["CLIP"]}),
    node(
        "EmptySD3LatentImage",
        "LATENT",
        {"width": whole(1024, 16384), "height": whole(1024, 16384), "batch_size": whole(1, 4096)},
    ),
    node("ModelSamplingAuraFlow", "MODEL", {"model": ["MODEL"], "shift": real(1.73, 100.0, 0.01)}),
    node(
        "KSampler",
        "LATENT",
        {
            "model": ["MODEL"],
            "seed": whole(0, SEED_MAX, 0, control_after_generate=True),
            "steps": whole(20, 10000),
            "cfg": real(8.0, 100.0, 0.1),
            "sampler_name": choice("euler", "res_multistep"),
            "scheduler": choice("simple", "normal"),
            "positive": ["CONDITIONING"],
            "negative": ["CONDITIONING"],
            "latent_image": ["LATENT"],
            "denoise": real(1.0, 1.0, 0.01),
        },
    ),
    node("VAEDecode", "IMAGE", {"samples": ["LATENT"], "vae": ["VAE"]}),
    node(
        "SaveImage",
        None,
        {"images": ["IMAGE"], "filename_prefix": ["STRING", {"default": "ComfyUI"}]},
    ),
)
NODES = {each["name"]: each for each in _ALL}
MODEL_FOLDERS = ("text_encoders", "vae", "diffusion_models")
