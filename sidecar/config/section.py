"""What all groups of settings share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict

from sidecar.config.types import Fraction

Mode = Literal["observe", "enforce"]
ActionName = Literal["allow", "tag", "throttle", "challenge", "block"]
BodyMode = Literal["none", "buffered", "streamed"]
StageName = Literal["random_forest", "xgboost", "text", "behaviour"]
BUDGET_MAX = "1s"
# bounds of the policy that the data plane reads (native/policy.pxd)
# two lists of 1024 cut one another into at most 4095 separate ranges; it has room for 4096
LISTED_MAX = 1024
ROUTES_MAX = 255  # a decision carries the route as an index; 0 is the service's default

Score = Annotated[float, Fraction()]
RESTART: dict[str, Any] = {"x-restart": True}


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )
