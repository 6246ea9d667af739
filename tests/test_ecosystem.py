"""The live model object in transformers' pipeline and under what lm-eval's HFLM calls.

lm-eval itself brings thirty packages and is an extra (`eval`): `Harness` below calls a model as its
`lm_eval/models/huggingface.py` (0.4.13) does, and nothing else; the two gave the same scores and texts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from ladders import SMALL, trained
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, pipeline

from engine import LadderConfig, LadderForCausalLM
from engine.backbone import load_backbone
from engine.inference.generate import chat_ids, generate_text, prompt_ids

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [("1 plus 2 is", " 3"), ("a", " longer continuation than the other"), ("ab", "c")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LadderForCausalLM:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("backbone"), "qwen2", max_position_embeddings=64)
    backbone = load_backbone(folder, dtype=torch.float32)
    return trained(LadderForCausalLM.from_backbone(backbone, LadderConfig.preset("xladder", **SMALL))).eval()


@pytest.fixture(scope="module")
def tokenizer(model: LadderForCausalLM) -> PreTrainedTokenizerBase:
    return model.backbone.tokenizer()


def test_pipeline(model: LadderForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Prompts, padded batches and chats; and from the adapter's folder through the Auto classes."""
    texts, chat = ["hello", "a longer prompt"], [{"role": "user", "content": "hello"}]
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    expected = [generate_text(model, tokenizer, prompt_ids(tokenizer, text), 5).text for text in texts]
    tokenizer.padding_side = "left"
    live = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert [one["generated_text"] for (one,) in live(texts, batch_size=2, **options)] == expected
    answer = generate_text(model, tokenizer, chat_ids(tokenizer, chat), 5).text
    assert live(chat, **options)[0]["generated_text"] == answer

    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    loaded = pipeline("text-generation", model=str(tmp_path))
    assert isinstance(loaded.model, LadderForCausalLM)
    assert loaded("hello", **options)[0]["generated_text"] == expected[0]


class Harness:
    """What HFLM asks of a model that it is given as an object."""

    def __init__(self, pretrained: LadderForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = pretrained, tokenizer
        self.device, self.config = self.model.device, self.model.config
        self.model.eval()
        self.model.tie_weights()
        self.vocab_size = self.config.vocab_size
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        self.max_length = next(getattr(self.config, name) for name in names if hasattr(self.config, name))

    def loglikelihood(self, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each continuation, in one batch padded on the right without a mask; and whether it is the greedy one."""
        contexts = [self.tokenizer(context)["input_ids"] for context, _ in pairs]
        wholes = [self.tokenizer(context + text)["input_ids"] for context, text in pairs]
        inputs = [torch.tensor(whole[-(self.max_length + 1) :][:-1], device=self.device) for whole in wholes]
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        with torch.no_grad():
            logits = torch.log_softmax(self.model(padded).logits, dim=-1, dtype=torch.float32)
        scores = []
        for row, context, whole in zip(logits, contexts, wholes, strict=True):
            targets = torch.tensor(whole[len(context) :])
            rows = row[len(context) - 1 : len(whole) - 1]
            greedy = bool((rows.argmax(-1) == targets).all())
            scores.append((float(rows.gather(1, targets[:, None]).sum()), greedy))
        return scores

    def generate_until(self, prompts: list[str], stop: str, max_gen_toks: int) -> list[str]:
        """Left-padded greedy continuations up to a stop string."""
        batch = self.tokenizer(prompts, padding="longest", padding_side="left", return_tensors="pt").to(self.device)
        width = batch["input_ids"].shape[1]
        found = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_length=width + max_gen_toks,
            stopping_criteria=StoppingCriteriaList([_StopString(self.tokenizer, stop, width)]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            do_sample=False,
        )
        return [self.tokenizer.decode(row[width:], skip_special_tokens=True).split(stop)[0] for row in found]


class _StopString(StoppingCriteria):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        texts = [self.tokenizer.decode(row[self.width :]) for row in input_ids]
        return torch.tensor([self.stop in text for text in texts])


def test_lm_eval(model: LadderForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Scores equal the loss of each pair alone, and text that of `ladder generate`."""
    harness = Harness(model, tokenizer)
    assert (harness.vocab_size, harness.max_length, str(harness.device)) == (288, 64, "cpu")
    scores = harness.loglikelihood(PAIRS)
    for (context, text), (score, _) in zip(PAIRS, scores, strict=True):
        start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + text, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, :start] = -100
        total = model(ids, labels=labels, num_items_in_batch=1).loss.item()
        assert score == pytest.approx(-total, rel=1e-4)
    prompts = ["hello", "another prompt"]
    expected = [generate_text(model, tokenizer, prompt_ids(tokenizer, prompt), 6).text for prompt in prompts]
    assert harness.generate_until(prompts, "\x00", 6) == expected
