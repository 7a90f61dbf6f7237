"""Plans as plain values, for `lpo plan --json`."""

import dataclasses

from lpo_jax.planner import roofline
from lpo_jax.planner.at_lengths import AtLengths, Occurring
from lpo_jax.planner.plan import Plan, Proposal
from lpo_jax.planner.sizes import Sizes
from lpo_jax.types import Json

_NUMBERS = ("times", "flops", "bytes", "sent", "held", "temporary", "launches", "busy", "host")


def lengths_json(found: AtLengths | None) -> dict[str, Json] | None:
    """Convert a step at given response lengths to plain values."""

    def of(one: Occurring | None) -> dict[str, Json] | None:
        if one is None:
            return None
        return {
            "seconds_per_step": one.step_seconds,
            "seconds": dict(one.seconds),
            "overrides": one.setting.overrides(),
            "rows_at_once": one.sampled.rows_at_once,
            "decode_steps": one.sampled.steps,
            "tokens_prefilled_again": one.sampled.repeated,
        }

    return None if found is None else {"reserved": of(found.reserved), "pages": of(found.pages)}


def to_json(made: Plan) -> dict[str, Json]:
    """Convert a plan to plain values; sizes are bytes on one device, and times are seconds."""
    chip = made.topology.chip

    def of(proposal: Proposal | None) -> dict[str, Json] | None:
        if proposal is None:
            return None
        return {
            "overrides": proposal.setting.overrides(),
            "mesh": dataclasses.asdict(proposal.setting.mesh),
            "call_tokens": proposal.setting.call_tokens(made.work),
            "memory": proposal.memory,
            "spare": made.spare(proposal),
            "fits": made.spare(proposal) >= 0,
            "standing": roofline.standing(made.work, proposal.setting),
            "phases": [
                {
                    "name": phase.name,
                    "compiled": phase.name in proposal.compiled,
                    **{name: getattr(phase, name) for name in _NUMBERS},
                    "seconds": phase.seconds(chip),
                    "too_large": phase.too_large,
                    "exchanges": [dataclasses.asdict(e) | {"sent": e.sent} for e in phase.exchanges],
                }
                for phase in proposal.phases
            ],
            "seconds_per_step": made.step_seconds(proposal),
            "at_lengths": lengths_json(proposal.at_lengths),
            "tokens_per_second": made.work.trained_tokens / made.step_seconds(proposal),
            "mfu": made.utilisation(proposal),
            "gradient_flops_ratio": made.gradient_ratio(proposal),
        }

    return {
        "topology": made.topology.name,
        "devices": made.topology.num_devices,
        "chip": dataclasses.asdict(chip),
        "parameters": Sizes.of(made.work.model).total,
        "work": dataclasses.asdict(made.work),
        "lengths": None
        if made.lengths is None
        else {"mean": float(made.lengths.mean()), "longest": int(made.lengths.max())},
        "asked": of(made.asked),
        "suggested": of(made.suggested),
        "with_int8": of(made.with_int8),
        "seconds_planning": made.seconds,
    }
