"""What a tenant's policy adds to each of its requests: adapters, and the bits that tell who asks.

tasks/directory.py applies it, so that nobody who asks for adapters passes it by; what operators
change of it is in tasks/policy_admin.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from polyadapt.engine.client import EngineClient
from polyadapt.errors import Forbidden, PolicyConflict, PolicyUnavailable, SecretsUnavailable
from polyadapt.tasks.policies import Policies
from polyadapt.tasks.signatures import Signatures
from polyadapt.types import MAX_ADAPTERS, AppliedAdapter, Options
from polyadapt_store.manifest import AdapterRecord, OfferedOption
from polyadapt_store.policies import PolicyEntry

_TENANT_USER = "tenant:"


class Mandatory:
    """The policies and signatures that hold now, as requests need them."""

    def __init__(self, policies: Policies, signatures: Signatures, engine: EngineClient) -> None:
        self.policies = policies
        self.signatures = signatures
        # Requests that nobody could be told by, by why; each is a refusal.
        self.refusals = dict.fromkeys(("no_user", "no_signature", "not_opened"), 0)
        self._engine = engine

    def is_at_hand(self, tenant: str, user: str | None) -> bool:
        """Whether `of` the same reads no database."""
        return self.policies.is_at_hand and all(
            self.signatures.knows(*told) for told in self._told(tenant, user)
        )

    def read(self, tenant: str, user: str | None) -> None:
        """Bring into memory what `of` needs; what is wrong `of` says."""
        for told in self._told(tenant, user):
            with contextlib.suppress(SecretsUnavailable):
                self.signatures.of(*told)

    def of(self, tenant: str, user: str | None) -> tuple[AppliedAdapter, ...]:
        """Return the adapters of the tenant's policy; raises PolicyUnavailable if one is not to be
        had, and Forbidden for a user whom one of them could not tell.
        """
        policy = self.policies.of(tenant)
        if policy is None:
            return ()
        info = self._engine.info
        for entry in policy.entries:
            record = entry.record
            if info is not None and record.base_digest != info.base.digest:
                raise PolicyUnavailable(
                    f"{record.name}@{record.version}, mandatory for the tenant {tenant!r}, was "
                    f"made for {record.base_model!r} and this server's base is "
                    f"{info.base.name!r}; its operator has to change the policy",
                    retry_after_s=60,
                )
        return tuple(
            AppliedAdapter(
                entry.record.adapter_id,
                entry.scale,
                entry.rank,
                self._options(entry, tenant, user),
                is_mandatory=True,
            )
            for entry in policy.entries
        )

    def _options(self, entry: PolicyEntry, tenant: str, user: str | None) -> Options:
        """The policy's, and with them the user's signature, or the tenant's where the policy has
        one for all.
        """
        secret = bits_of(entry.record)
        if secret is None:
            return entry.options
        given = dict(entry.options)
        user = _told_by(entry, secret, tenant, user)
        try:
            bits = None if user is None else self.signatures.of(entry.record.digest, user)
        except SecretsUnavailable:
            self.refusals["not_opened"] += 1
            raise
        if bits is None:
            self.refusals["no_user" if user is None else "no_signature"] += 1
            who = "a caller without a key of its own" if user is None else f"the key {user!r}"
            raise Forbidden(
                f"by policy every answer is marked by {entry.record.name!r}, and {who} has no "
                "signature; ask the operator for one"
            )
        return tuple(sorted((given | {secret.name: bits}).items()))

    def _told(self, tenant: str, user: str | None) -> list[tuple[str, str]]:
        """Return the signatures that a request needs: of which mark and whose."""
        policy = self.policies.of(tenant)
        needed: list[tuple[str, str]] = []
        for entry in () if policy is None else policy.entries:
            secret = bits_of(entry.record)
            who = None if secret is None else _told_by(entry, secret, tenant, user)
            if who is not None:
                needed.append((entry.record.digest, who))
        return needed


def tenant_user(tenant: str) -> str:
    """Return whom bits are issued to that all answers of a tenant have; no key has such an id."""
    return f"{_TENANT_USER}{tenant}"


def is_tenant_user(user: str) -> bool:
    """Whether `tenant_user` gave this id."""
    return user.startswith(_TENANT_USER)


def bits_of(record: AdapterRecord) -> OfferedOption | None:
    """Return the option that tells who asks, of an adapter that is a mark."""
    traits = record.report.traits
    offered = () if traits is None else traits.options
    return next((option for option in offered if option.kind == "bits"), None)


def with_mandatory(
    own: tuple[AppliedAdapter, ...], mandatory: tuple[AppliedAdapter, ...], param: str
) -> tuple[AppliedAdapter, ...]:
    """Return a request's own adapters and behind them the mandatory ones; one that is both stands
    in its own place, as the policy says. Raises PolicyConflict.
    """
    left = {rule.adapter.digest: rule for rule in mandatory}
    together: list[AppliedAdapter] = []
    for applied in own:
        rule = left.pop(applied.adapter.digest, None)
        if rule is None:
            together.append(applied)
            continue
        named = replace(applied, adapter=rule.adapter, is_mandatory=True)
        if named not in (rule, AppliedAdapter(rule.adapter, is_mandatory=True)):
            raise PolicyConflict(
                f"{rule.adapter.name!r} is mandatory by policy and applied as that says, at scale "
                f"{rule.scale:g}; leave it out, it is served all the same",
                param=param,
            )
        together.append(rule)
    together += left.values()
    if len(together) > MAX_ADAPTERS:
        names = ", ".join(repr(rule.adapter.name) for rule in mandatory)
        raise PolicyConflict(
            f"{len(own)} adapters and those that are mandatory by policy ({names}) make "
            f"{len(together)}, expected at most {MAX_ADAPTERS}; name fewer",
            param=param,
        )
    return tuple(together)


def _told_by(
    entry: PolicyEntry, secret: OfferedOption, tenant: str, user: str | None
) -> str | None:
    """Return whose bits a mandatory mark gets: the user's, or the tenant's where those are for all
    its answers.
    """
    return tenant_user(tenant) if secret.name in dict(entry.options) else user
