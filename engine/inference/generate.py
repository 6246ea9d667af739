"""Text from a trained model: prompts as training saw them, greedy or sampled, streamed as the tokens come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from engine.backbone import Backbone
from engine.data.dataset import prefix_ids
from engine.model.causal_lm import LadderForCausalLM

Show = Callable[[str], None]
UNFINISHED = "\ufffd"  # what a character decodes to whose bytes have not all come yet


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it before drawing; 0 takes the most likely token.
        top_p: drawn from the fewest tokens that together have this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(
                f"top_p is {self.top_p}, but temperature 0 always takes the most likely token; give a "
                "temperature such as 0.8"
            )

    def options(self) -> dict[str, float | bool]:
        """For transformers' `generate`, with nothing left to settings that came with the backbone.

        Those of instruct models penalize repetition even of the likeliest token, which training knew nothing of.
        """
        if not self.temperature:
            # temperature, top_p and top_k have no effect here, but transformers warns of any other value.
            return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"do_sample": True, **drawn, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Generated:
    """A continuation without special tokens, and whether the model ended it by itself."""

    text: str
    is_finished: bool


class PassedTokens:
    """Keys and values of the tokens that a model has seen, so that a conversation is not computed anew every turn."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache = DynamicCache()

    def take(self, prompt: list[int]) -> DynamicCache:
        """The cache where the prompt goes on from what it holds, else an empty one; it is the caller's until `keep`."""
        length, cache = len(self._ids), self._cache
        continues = length < len(prompt) and prompt[:length] == self._ids
        self._ids, self._cache = [], DynamicCache()
        return cache if continues else DynamicCache()

    def keep(self, ids: list[int], cache: DynamicCache) -> None:
        """Remember a cache that holds the keys and values of `ids`."""
        self._ids, self._cache = ids, cache


def generate_text(
    model: LadderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    show: Show | None = None,
    should_stop: Callable[[], bool] | None = None,
    passed: PassedTokens | None = None,
) -> Generated:
    """Continue int64 prompt_ids [n].

    Args:
        max_new_tokens: at most so many.
        sampling: None: greedy. The draws come from torch's global generator.
        show: called with every new piece of text as it comes.
        should_stop: asked after every token.
        passed: of earlier calls with this model; what the prompt continues of it is not computed again.
    """
    prompt = prompt_ids[None].to(model.backbone.device)
    ends = stop_tokens(model, tokenizer)
    cache = None if passed is None else passed.take(prompt_ids.tolist())
    was_training = model.training
    model.eval()
    try:
        generated = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            past_key_values=cache,
            eos_token_id=ends,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=None if show is None else _TextStreamer(tokenizer, show),
            stopping_criteria=None if should_stop is None else StoppingCriteriaList([_StopWhen(should_stop)]),
            **(sampling or Sampling()).options(),
        )
    finally:
        model.train(was_training)
    if passed is not None:
        passed.keep(generated[0, :-1].tolist(), cache)
    new_ids = generated[0, prompt.shape[1] :]
    return Generated(_decoded(tokenizer, new_ids), int(new_ids[-1]) in ends)


def room_for_answer(model: LadderForCausalLM, prompt_length: int) -> int:
    """How many tokens the backbone's context still holds behind a prompt.

    Raises:
        ValueError: there is room for none.
    """
    context = model.backbone.config.max_position_embeddings
    if prompt_length >= context:
        raise ValueError(
            f"the prompt takes {prompt_length:,} tokens and the backbone's context is {context:,}, so there is no room "
            "for an answer; shorten it"
        )
    return context - prompt_length


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Token ids [n] of a text to continue, behind BOS where training had it there.

    Raises:
        ValueError: an empty prompt.
    """
    prefix, ids = prefix_ids(tokenizer), tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = ids if ids[: len(prefix)] == prefix else prefix + ids
    if not ids:
        raise ValueError("the prompt is empty; give some text with --prompt")
    return torch.tensor(ids)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Tensor:
    """Token ids [n] of a conversation up to where the assistant speaks next.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses the conversation.
    """
    check_chat_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise ValueError(f"the tokenizer's chat template cannot render this conversation: {error}") from error
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not know what a conversation looks like.

    Raises:
        ValueError: it has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so there is no telling how a conversation is written; continue plain "
            "text with `ladder generate`, or set chat_template in the adapter's tokenizer_config.json"
        )


def adapter_tokenizer(folder: str | Path, backbone: Backbone) -> PreTrainedTokenizerBase:
    """The tokenizer saved in an adapter folder, else the backbone's.

    Raises:
        ValueError: it cannot be read.
    """
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return backbone.tokenizer()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no usable tokenizer in {folder}: {error}") from error


def stop_tokens(model: LadderForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """EOS of the tokenizer, which training supervised, and whatever ends the backbone's own turns."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *own} - {None})


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _TextStreamer(BaseStreamer):
    """Shows text token by token, as it is decoded as a whole.

    transformers' own decodes every line by itself, where tokenizers of Llama's kind drop the first space of an
    indented one, and holds a word back until the next begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] | None = None
        self._shown = 0

    def put(self, value: Tensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids.extend(value.flatten().tolist())
        text = _decoded(self._tokenizer, self._ids)
        if not text.endswith(UNFINISHED):
            self._show_rest(text)

    def end(self) -> None:
        self._show_rest(_decoded(self._tokenizer, self._ids or []))

    def _show_rest(self, text: str) -> None:
        if len(text) > self._shown:
            self._show(text[self._shown :])
            self._shown = len(text)


class _StopWhen(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self._should_stop(), dtype=torch.bool, device=input_ids.device)
