"""How many tokens of a request are still to be computed, as its events tell. Torch-free."""

from __future__ import annotations

from polyadapt.types import Event, Request, Started, Tokens


class Remaining:
    """Counts one request down: the prompt is done with the first event that tells of it."""

    def __init__(self, request: Request, num_tokens: int) -> None:
        """num_tokens: what the request is expected to take, its prompt included."""
        self._prompt = len(request.prompt_ids)
        self._left = num_tokens

    def take(self, event: Event) -> int:
        """Return how many tokens are done with this event, of those that were left."""
        if isinstance(event, Started):
            return 0
        done, self._prompt = self._prompt, 0
        return self._give(done + len(event.token_ids) if isinstance(event, Tokens) else done)

    def take_all(self) -> int:
        """Return all that were left; nothing is afterwards."""
        return self._give(self._left)

    def _give(self, num_tokens: int) -> int:
        given = min(num_tokens, self._left)
        self._left -= given
        return given
