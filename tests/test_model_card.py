"""The card of an adapter folder, and pushing one to the hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import tiny_tokenizer
from huggingface_hub import HfApi, ModelCard
from ladders import SMALL, checkpoint_folder, ladder_model, tiny_backbone, trained

from engine import LadderConfig
from engine.model.adapter import BackboneRecord
from engine.model.model_card import model_card


def test_a_card_says_of_what_with_what_and_how(tmp_path: Path) -> None:
    config = LadderConfig.preset("xladder", **SMALL)
    record = replace(BackboneRecord.of(tiny_backbone()), source="Qwen/Qwen2.5-0.5B", head_dtype="int8")
    text = model_card(config, record, 1234)
    head = ModelCard(text).data.to_dict()
    assert (head["base_model"], head["base_model_relation"]) == ("Qwen/Qwen2.5-0.5B", "adapter")
    assert (head["library_name"], head["pipeline_tag"]) == ("ladder-engine", "text-generation")
    assert head["tags"] == ["ladder-side-tuning", "xladder"] and "license" not in head
    assert (
        f"(NF4 with double quantization, head int8, computed in\nfloat32, fingerprint `{record.fingerprint[:12]}`)"
        in text
    )
    assert "1,234 trained parameters" in text and "[its own license](https://huggingface.co/Qwen/Qwen2.5-0.5B)" in text
    for name, value in config.to_dict().items():
        assert f"| `{name}` | `{value}` |" in text


def test_what_the_card_says_loads_the_adapter(tmp_path: Path) -> None:
    """A local backbone is named without its path, which is nobody's business, and asked for in the call."""
    trained(ladder_model()).save_pretrained(tmp_path, tokenizer=tiny_tokenizer())
    text = (tmp_path / "README.md").read_text()
    assert str(checkpoint_folder().parent) not in text and "base_model" not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("this/folder", str(tmp_path)).replace("where/the/backbone/is", str(checkpoint_folder()))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["generator"]("hello", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("hello")


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that save_pretrained writes, our card included, no pickle, in one commit."""
    model, calls = trained(ladder_model()), []

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> SimpleNamespace:
        calls.append(("repo", repo_id, options["private"], self.token))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> str:
        uploaded = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        calls.append(("upload", repo_id, uploaded, options["revision"]))
        return "https://hub/commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo_id, **options: calls.append(("branch", repo_id)))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    options = {"private": True, "token": "secret", "revision": "try"}
    assert model.push_to_hub("docs", tokenizer=tiny_tokenizer(), **options) == "https://hub/commit"
    assert calls[:2] == [("repo", "docs", True, "secret"), ("branch", "me/docs")]
    _, repo_id, uploaded, revision = calls[2]
    assert (repo_id, revision) == ("me/docs", "try")
    model.save_pretrained(tmp_path, tokenizer=tiny_tokenizer())
    assert uploaded == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {Path(name).suffix for name in uploaded} <= {".json", ".safetensors", ".md", ".jinja"}
    assert b"ladder-side-tuning" in uploaded["README.md"] and "ladder.safetensors" in uploaded
    model.push_to_hub("docs")
    assert [call[0] for call in calls[3:]] == ["repo", "upload"]
