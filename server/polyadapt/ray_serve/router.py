"""Ray's half of routing: a request goes to the replica that its first argument names.

Which one that is has been decided by engine/routing.py in the edge's EngineFleet, over what the
replicas state through record_routing_stats(); the one copy of that decision also counts loads and
moves what had not begun when a replica dies. Ray's API for routers is alpha: tests/ray_serve holds
what is used of it.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from polyadapt.ray_serve.board import board_of

STATEMENT = "statement"  # the one key of a replica's routing stats
ANYONE = ""  # as first argument: whichever replica


class EngineRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types for us
    """Sends where it is told, and passes on what replicas state."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the named replica. One that is gone is stood in for by all others: whoever gets
        the request refuses it, and the fleet chooses again.
        """
        if pending_request is None:
            return [candidate_replicas]
        # Otherwise Ray asks again at once, for ever, while the replica is full.
        pending_request.routing_context.should_backoff = True
        target = pending_request.args[0]
        named = [r for r in candidate_replicas if r.replica_id.unique_id == target]
        return [named or candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Also post what they state; Ray calls this whenever that has changed."""
        super().update_replicas(replicas)
        self._post()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Also take it off the board, before Ray's controller knows."""
        super().on_replica_actor_died(replica_id)
        self._post()

    def _post(self) -> None:
        raw: dict[str, Any] = {
            replica_id.unique_id: replica.routing_stats.get(STATEMENT)
            for replica_id, replica in self.curr_replicas.items()
        }
        board_of(self._deployment_id.app_name, self._deployment_id.name).post(raw)
