"""The README.md of an adapter folder, which the hub shows as its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import LadderConfig

if TYPE_CHECKING:
    from engine.model.adapter import BackboneRecord


def model_card(config: LadderConfig, backbone: BackboneRecord, num_parameters: int) -> str:
    """Base model, configuration, how to load it, and what to know of its license.

    Args:
        config: of the side network.
        backbone: the one it was trained beside. A local folder is named, without the path to it.
        num_parameters: of the side network.
    """
    is_local = Path(backbone.source).is_dir()
    name = Path(backbone.source).name if is_local else backbone.source
    base_model = "" if is_local else f"base_model: {json.dumps(name)}\nbase_model_relation: adapter\n"
    where = ', backbone="where/the/backbone/is"' if is_local else ""
    license_of = "its own license" if is_local else f"[its own license](https://huggingface.co/{name})"
    title = config.preset_name
    settings = "\n".join(f"| `{key}` | `{value}` |" for key, value in config.to_dict().items())
    return f"""---
library_name: ladder-engine
pipeline_tag: text-generation
{base_model}tags:
- ladder-side-tuning
- {title}
---

# {title} side network for {name}

{num_parameters:,} trained parameters that run beside the frozen backbone `{name}` ({backbone.scheme}, computed in
{backbone.dtype}, fingerprint `{backbone.fingerprint[:12]}`). Another backbone is refused on loading. It is not a LoRA:
there is no weight in the backbone to merge it into, so it is used through ladder-engine.

## How to load it

```python
from engine import LadderForCausalLM
from transformers import AutoTokenizer, pipeline

folder = "this/folder"  # from the hub: huggingface_hub.snapshot_download("owner/name")
model = LadderForCausalLM.from_pretrained(folder{where})
generator = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
```

or, from a shell, `ladder generate --adapter this/folder --prompt "..."` and `ladder chat --adapter this/folder`.

## Configuration

| field of `LadderConfig` | value |
|---|---|
{settings}

## License

The backbone is not in this folder and is used under {license_of}. None is stated for the side network: who publishes it
adds `license:` to the head of this file.
"""
