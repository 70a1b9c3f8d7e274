"""Plain completions on the wire: a whole reply, or the events of a stream."""

from __future__ import annotations

from collections.abc import Iterable

from polyadapt.api.access import Principal
from polyadapt.api.chat import Head
from polyadapt.api.collect import Generation, served_objects, usage_of
from polyadapt.api.schemas.base import ChoiceObject
from polyadapt.api.schemas.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
)
from polyadapt.api.stream import FrameTemplate
from polyadapt.api.token_text import (
    completion_logprobs,
    joined,
    prompt_completion_logprobs,
    prompt_logprobs,
)
from polyadapt.tasks.sequence_text import TextDelta
from polyadapt.tasks.text import Accepted, Completed, PromptScores, TextRequest
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import ServedAdapter, TokenLogprob


def text_request(request: CompletionRequest, request_id: str, caller: Principal) -> TextRequest:
    """Return what a completion request asks of the text task."""
    num_prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        num_prompt_logprobs = max(num_prompt_logprobs or 0, request.logprobs)
    return TextRequest(
        id=request_id,
        tenant=caller.tenant,
        user=caller.user,
        model=request.model,
        prompts=request.prompts,
        sampling=request.sampling(
            num_logprobs=request.logprobs, num_prompt_logprobs=num_prompt_logprobs
        ),
        max_tokens=request.max_tokens,
        seed=request.unsigned_seed,
        stop=tuple(request.stop or ()),
        n=request.n or 1,
        adapters=request.adapter_refs(),
        on_cold=request.cold(),
        cache_salt=request.cache_salt,
        priority=request.priority or 0,
        speculative_tokens=request.speculative_tokens,
    )


class CompletionFormat:
    """Writes one completion request's answer."""

    def __init__(self, request: CompletionRequest, head: Head, tokenizer: Tokenizer) -> None:
        self._request = request
        self._head = head
        self._tokenizer = tokenizer
        self._n = request.n or 1
        self._echoes: list[str] = []
        self._has_extras = request.logprobs is not None or bool(request.return_token_ids)
        self._templates: dict[int, FrameTemplate] = {}

    def reply(self, accepted: Accepted, generation: Generation) -> CompletionReply:
        """Return the whole reply."""
        request = self._request
        choices: list[CompletionChoice] = []
        for index, answer in enumerate(generation.answers):
            prompt_index = index // self._n
            echo = self._echo(accepted, prompt_index) if request.echo else ""
            scores = generation.prompt_scores.get(prompt_index)
            logprobs: CompletionLogprobs | None = None
            if request.logprobs is not None:
                logprobs = completion_logprobs(
                    self._tokenizer, answer.scored, has_top=request.logprobs > 0, offset=len(echo)
                )
                if request.echo:
                    logprobs = joined(
                        self._prompt_logprobs(accepted, prompt_index, scores or ()), logprobs
                    )
            wants_scores = request.prompt_logprobs is not None and scores is not None
            choices.append(
                CompletionChoice(
                    index=index,
                    text=echo + answer.text,
                    logprobs=logprobs,
                    finish_reason=answer.finish_reason,
                    token_ids=answer.token_ids if request.return_token_ids else None,
                    prompt_token_ids=list(accepted.prompt_ids[prompt_index])
                    if request.return_token_ids
                    else None,
                    prompt_logprobs=prompt_logprobs(self._tokenizer, scores or ())
                    if wants_scores
                    else None,
                )
            )
        reply = self._chunk(choices)
        reply.usage = usage_of(generation.completed)
        self.sign(reply, accepted, generation.served)
        return reply

    def opening(self, accepted: Accepted) -> Iterable[CompletionReply]:
        """Yield the echoed prompts, unless their logprobs have to come first."""
        self._echoes = [""] * len(accepted.prompt_ids)
        if self._request.echo:
            self._echoes = [self._echo(accepted, i) for i in range(len(accepted.prompt_ids))]
            if self._request.logprobs is None:
                for prompt_index in range(len(accepted.prompt_ids)):
                    yield from self._echo_chunks(prompt_index, None)

    def scored(self, accepted: Accepted, scores: PromptScores) -> Iterable[CompletionReply]:
        """Yield the echoed prompt with its logprobs."""
        if self._request.echo and self._request.logprobs is not None:
            logprobs = self._prompt_logprobs(accepted, scores.prompt_index, scores.scores)
            yield from self._echo_chunks(scores.prompt_index, logprobs)

    def plain(self, delta: TextDelta) -> bytes | None:
        """Return the event of a delta that is nothing but text, as `piece` would be written; None
        for others.
        """
        if self._has_extras or delta.finish_reason or not delta.text:
            return None
        template = self._templates.get(delta.index)
        if template is None:
            choice = CompletionChoice(index=delta.index, text="", logprobs=None, finish_reason=None)
            template = FrameTemplate(self._chunk([choice]).model_dump_json(), "text")
            self._templates[delta.index] = template
        return template.frame(delta.text)

    def piece(self, delta: TextDelta) -> CompletionReply | None:
        """Return the event of a delta; None when there is nothing to say yet."""
        request = self._request
        if not (delta.text or delta.finish_reason or delta.scored or request.return_token_ids):
            return None
        logprobs: CompletionLogprobs | None = None
        if request.logprobs is not None:
            logprobs = completion_logprobs(
                self._tokenizer,
                delta.scored,
                has_top=request.logprobs > 0,
                offset=len(self._echoes[delta.index // self._n]),
            )
        return self._chunk(
            [
                CompletionChoice(
                    index=delta.index,
                    text=delta.text,
                    logprobs=logprobs,
                    finish_reason=delta.finish_reason,
                    token_ids=list(delta.token_ids) if request.return_token_ids else None,
                )
            ]
        )

    def usage(self, completed: Completed) -> CompletionReply:
        """Return the event that carries the counts and no choice."""
        chunk = self._chunk([])
        chunk.usage = usage_of(completed)
        return chunk

    def sign(
        self, chunk: CompletionReply, accepted: Accepted, served: tuple[ServedAdapter, ...]
    ) -> None:
        """Say in a reply or its last event what was served, and why if it was chosen."""
        chunk.adapters = served_objects(served)
        chunk.choice = ChoiceObject.of(accepted.choice)

    def _echo(self, accepted: Accepted, prompt_index: int) -> str:
        text = accepted.prompt_texts[prompt_index]
        if text is None:
            ids = accepted.prompt_ids[prompt_index]
            return self._tokenizer.decode(ids, skip_special=False)
        return text

    def _echo_chunks(
        self, prompt_index: int, logprobs: CompletionLogprobs | None
    ) -> Iterable[CompletionReply]:
        for index in range(prompt_index * self._n, (prompt_index + 1) * self._n):
            choice = CompletionChoice(
                index=index, text=self._echoes[prompt_index], logprobs=logprobs, finish_reason=None
            )
            yield self._chunk([choice])

    def _prompt_logprobs(
        self, accepted: Accepted, prompt_index: int, scores: Iterable[TokenLogprob]
    ) -> CompletionLogprobs:
        return prompt_completion_logprobs(
            self._tokenizer,
            accepted.prompt_ids[prompt_index],
            tuple(scores),
            has_top=(self._request.logprobs or 0) > 0,
        )

    def _chunk(self, choices: list[CompletionChoice]) -> CompletionReply:
        return CompletionReply(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=choices,
        )
