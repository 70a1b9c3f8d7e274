"""The closed list of kinds. A new one is a file beside this and two lines here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from polyadapt.tasks.workflows.lorid import LoridDefinition
from polyadapt.tasks.workflows.self_consistency import SelfConsistencyDefinition

AnyDefinition = Annotated[LoridDefinition | SelfConsistencyDefinition, Field(discriminator="kind")]
KINDS = ("lorid", "self_consistency")

# Reads the stored form, which is a definition's model_dump_json.
stored_definition: TypeAdapter[AnyDefinition] = TypeAdapter(AnyDefinition)
