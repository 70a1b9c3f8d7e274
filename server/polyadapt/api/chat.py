"""Chat completions on the wire: a whole reply, or the chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from polyadapt.api.access import Principal
from polyadapt.api.collect import Generation, served_objects, usage_of
from polyadapt.api.schemas.base import ChoiceObject
from polyadapt.api.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatReply,
    ChatRequest,
    Delta,
)
from polyadapt.api.stream import FrameTemplate
from polyadapt.api.token_text import chat_logprobs, prompt_logprobs
from polyadapt.tasks.sequence_text import TextDelta
from polyadapt.tasks.text import Accepted, ChatPrompt, Completed, PromptScores, TextRequest
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import ServedAdapter


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one reply begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def text_request(request: ChatRequest, request_id: str, caller: Principal) -> TextRequest:
    """Return what a chat request asks of the text task."""
    return TextRequest(
        id=request_id,
        tenant=caller.tenant,
        user=caller.user,
        model=request.model,
        prompts=(ChatPrompt(tuple(message.for_template() for message in request.messages)),),
        sampling=request.sampling(
            num_logprobs=request.num_logprobs, num_prompt_logprobs=request.prompt_logprobs
        ),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        seed=request.unsigned_seed,
        stop=tuple(request.stop or ()),
        n=request.n or 1,
        adapters=request.adapter_refs(),
        on_cold=request.cold(),
        cache_salt=request.cache_salt,
        priority=request.priority or 0,
        speculative_tokens=request.speculative_tokens,
    )


class ChatFormat:
    """Writes one chat request's answer."""

    def __init__(self, request: ChatRequest, head: Head, tokenizer: Tokenizer) -> None:
        self._request = request
        self._head = head
        self._tokenizer = tokenizer
        self._has_extras = bool(request.logprobs or request.return_token_ids)
        self._templates: dict[int, FrameTemplate] = {}

    def reply(self, accepted: Accepted, generation: Generation) -> ChatReply:
        """Return the whole reply."""
        request = self._request
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=answer.text),
                logprobs=chat_logprobs(self._tokenizer, answer.scored)
                if request.logprobs
                else None,
                finish_reason=answer.finish_reason,
                token_ids=answer.token_ids if request.return_token_ids else None,
            )
            for index, answer in enumerate(generation.answers)
        ]
        scores = generation.prompt_scores.get(0)
        return ChatReply(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=choices,
            usage=usage_of(generation.completed),
            adapters=served_objects(generation.served),
            choice=ChoiceObject.of(accepted.choice),
            prompt_token_ids=list(accepted.prompt_ids[0]) if request.return_token_ids else None,
            prompt_logprobs=None if scores is None else prompt_logprobs(self._tokenizer, scores),
        )

    def opening(self, accepted: Accepted) -> Iterable[ChatChunk]:
        """Yield the chunks that give every answer its role."""
        for index in range(self._request.n or 1):
            choice = ChatChunkChoice(
                index=index,
                delta=Delta(role="assistant", content=""),
                logprobs=None,
                finish_reason=None,
            )
            chunk = self._chunk([choice])
            if self._request.return_token_ids and index == 0:
                chunk.prompt_token_ids = list(accepted.prompt_ids[0])
            yield chunk

    def scored(self, accepted: Accepted, scores: PromptScores) -> Iterable[ChatChunk]:
        """Yield nothing: chat streams carry no prompt logprobs."""
        return ()

    def plain(self, delta: TextDelta) -> bytes | None:
        """Return the event of a delta that is nothing but text, as `piece` would be written; None
        for others.
        """
        if self._has_extras or delta.finish_reason or not delta.text:
            return None
        template = self._templates.get(delta.index)
        if template is None:
            choice = ChatChunkChoice(
                index=delta.index, delta=Delta(content=""), logprobs=None, finish_reason=None
            )
            template = FrameTemplate(self._chunk([choice]).model_dump_json(), "content")
            self._templates[delta.index] = template
        return template.frame(delta.text)

    def piece(self, delta: TextDelta) -> ChatChunk | None:
        """Return the chunk of a delta; None when there is nothing to say yet."""
        request = self._request
        if not (delta.text or delta.finish_reason or delta.scored or request.return_token_ids):
            return None
        choice = ChatChunkChoice(
            index=delta.index,
            delta=Delta(content=delta.text) if delta.text else Delta(),
            logprobs=chat_logprobs(self._tokenizer, delta.scored) if request.logprobs else None,
            finish_reason=delta.finish_reason,
            token_ids=list(delta.token_ids) if request.return_token_ids else None,
        )
        return self._chunk([choice])

    def usage(self, completed: Completed) -> ChatChunk:
        """Return the chunk that carries the counts and no choice."""
        chunk = self._chunk([])
        chunk.usage = usage_of(completed)
        return chunk

    def sign(self, chunk: ChatChunk, accepted: Accepted, served: tuple[ServedAdapter, ...]) -> None:
        """Say in the last chunk what was served, and why if it was chosen."""
        chunk.adapters = served_objects(served)
        chunk.choice = ChoiceObject.of(accepted.choice)

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=choices,
        )
