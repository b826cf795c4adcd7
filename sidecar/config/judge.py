"""Settings of the judge: the language model that reads what the inline models can't settle."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sidecar.config.section import RESTART, Score, Section
from sidecar.config.types import Boolean, BundlePath, Duration, Integer, Name


class JudgeModelSettings(Section):
    """One model that judges."""

    name: Name = Field("embedded", description="Its name in logs and metrics.")
    path: BundlePath = Field(
        "default",
        description=(
            "A folder made by outrider judge train, convert or finetune, or default for the small model that ships "
            "with Outrider."
        ),
        examples=["default", "/var/lib/outrider/llama-3.2-1b"],
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description=(
            "Where it runs. auto takes a CUDA device where there is one; what it got is logged and shown as "
            "outrider_judge_model_info."
        ),
    )
    device_indices: tuple[Annotated[int, Field(ge=0, le=63)], ...] = Field(
        (0,),
        min_length=1,
        max_length=16,
        description="Which CUDA devices, each with a copy of the model.",
    )
    compute_type: Literal["auto", "int8", "int8_float16", "int8_bfloat16", "float16", "bfloat16", "float32"] = (
        Field(
            "auto",
                description=(
                "CTranslate2's compute type; auto: the best that the device has. The half-precision ones need a "
                "CUDA device."
            ),
        )
    )
    threads: Integer = Field(
        1, ge=1, le=64, description="Threads for one batch, on a CPU."
    )


class JudgeVerdicts(Section):
    """What a verdict leads to: entries in the blocklist that all pods share. They expire, and lists.allow wins."""

    action: Literal["throttle", "challenge", "block"] = Field(
        "block", description="What is asked for while an entry holds."
    )
    flag: Score | None = Field(
        None,
        description=(
            "Probability of an attack from which a judgement is one; null: the threshold that the model was calibrated "
            "with, at 0.1% false positives."
        ),
    )
    duration_s: Annotated[int, Duration("1s", "7d", "s")] = Field(
        600,
        alias="duration",
        description=(
            "How long the first entry holds; twice as long where the judge is sure, and again with each repetition."
        ),
    )
    duration_max_s: Annotated[int, Duration("1s", "30d", "s")] = Field(
        86400, alias="duration_max", description="The longest that an entry ever holds."
    )
    repeat: Integer = Field(
        3,
        ge=1,
        le=1000,
        description=(
            "Requests of one client that were flagged within repeat_window, each for another payload, from which the "
            "client itself is entered and not its payloads alone: an address may be shared."
        ),
    )
    repeat_window_s: Annotated[int, Duration("1s", "1d", "s")] = Field(
        600, alias="repeat_window", description="See repeat."
    )
    principals: Boolean = Field(
        False,
        description=(
            "Enter principals too. Only where the proxy verifies tokens: else anybody can have anybody's account "
            "refused."
        ),
    )


class Judge(Section):
    """The language model that reads, away from the request's way, what the inline models can't settle."""

    enabled: Boolean = Field(
        True,
        json_schema_extra=RESTART,
        description="false: nothing is queued, and the shared blocklist isn't followed.",
    )
    local: Boolean = Field(
        True,
        json_schema_extra=RESTART,
        description=(
            "Run a judge beside this sidecar, in a process of its own. false where judges run elsewhere (outrider "
            "judge serve) and share judge_store."
        ),
    )
    models: tuple[JudgeModelSettings, ...] = Field(
        (JudgeModelSettings(),),
        min_length=1,
        max_length=8,
        json_schema_extra=RESTART,
        description="The models that are asked, each about every escalation: any of them may flag it.",
    )
    nice: Integer = Field(
        10, ge=0, le=19, json_schema_extra=RESTART, description="How far the local judge gives way to everybody else."
    )
    cpus: tuple[Annotated[int, Field(ge=0, le=4095)], ...] | None = Field(
        None,
        max_length=256,
        json_schema_extra=RESTART,
        description="CPUs that the local judge may use; null: the last of those that the sidecar may use.",
    )
    batch: Integer = Field(
        32, ge=1, le=256, json_schema_extra=RESTART, description="Most escalations that are judged at once."
    )
    deadline_s: Annotated[float, Duration("100ms", "1h", "s", whole=False)] = Field(
        30.0,
        alias="deadline",
        description="An escalation that waited longer isn't judged any more, and counted (late).",
    )
    again_s: Annotated[int, Duration("1s", "1d", "s")] = Field(
        300, alias="again", description="A payload's shape is asked about once in this time."
    )
    again_benign_s: Annotated[int, Duration("1s", "30d", "s")] = Field(
        3600,
        alias="again_benign",
        description="The same for shapes that were judged benign. It clears no decision.",
    )
    verdicts: JudgeVerdicts = Field(JudgeVerdicts(), description="What a verdict leads to.")
