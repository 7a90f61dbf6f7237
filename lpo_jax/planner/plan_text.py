"""Prints a plan to the terminal."""

import numpy as np
from rich.table import Table

from lpo_jax.parallel import gpus
from lpo_jax.planner import roofline
from lpo_jax.planner.at_lengths import AtLengths
from lpo_jax.planner.phases import StepPhase
from lpo_jax.planner.plan import Plan, Proposal
from lpo_jax.planner.sizes import Sizes
from lpo_jax.planner.topology import Chip
from lpo_jax.reporting.text import console, duration

GB = 1e9

INT8 = (
    "Assumed: the run learns as well from samples of the rounded model, of which lpo/logp_gap_mean and _max report how "
    "far it is off. The trainer computes the log-probs of all samples, which is counted in `score`."
)

NOTES = (
    "Unless --lengths is given, all responses have their full length; prompts always do.",
    "Not included: verifying rewards, compiling, evaluation, checkpoints, and the host except between decode calls. "
    "Uneven lengths pad attention, which can need more memory than full ones.",
)


_NUMBERS = ("runs", "held GB", "temp. GB", "TFLOP", "moved GB", "sent GB", "seconds")


def show(made: Plan, model: str) -> None:
    """Print a plan for a model of this name."""
    out, work, chip = console(), made.work, made.topology.chip
    out.print(
        f"{model} ({Sizes.of(work.model).total / 1e9:.2f} B parameters) on {made.topology.name}: "
        f"{made.topology.num_devices} x {chip.name}, {chip.memory / GB:.1f} GB, {chip.peak / 1e12:.0f} TFLOP/s bf16, "
        f"{chip.bandwidth / GB:.0f} GB/s memory, {chip.ring / GB:.0f} GB/s ring",
        highlight=False,
    )
    seen = f", of which an image takes up to {work.image_tokens}" if work.image_tokens else ""
    out.print(
        f"a step: {work.P} prompts x {work.K} responses, {work.S} + {work.T} tokens, {work.updates} updates{seen}",
        highlight=False,
    )
    if made.lengths is not None:
        out.print(
            f"response lengths to plan for: mean {made.lengths.mean():.0f}, median {np.median(made.lengths):.0f}, "
            f"longest {made.lengths.max()} tokens",
            highlight=False,
        )
    _show(made, made.asked, "as configured")
    if made.suggested:
        _show(made, made.suggested, "suggested")
        out.print(f"  {' '.join(made.suggested.setting.overrides())}", highlight=False, soft_wrap=True)
    if made.with_int8:
        _show(made, made.with_int8, "suggested, with int8 weights")
        out.print(f"  {' '.join(made.with_int8.setting.overrides())}", highlight=False, soft_wrap=True)
        out.print(f"  {INT8}", highlight=False, soft_wrap=True)
    if made.searched and made.spare(made.asked) < 0 and not (made.suggested or made.with_int8):
        out.print("\nNo mesh, microbatch, remat or number of rows was found that fits: use a larger slice.")
    out.print(f"\nplanned in {duration(made.seconds)}. {assumed(chip)} {' '.join(NOTES)}", highlight=False)


def _show(made: Plan, proposal: Proposal, title: str) -> None:
    out, chip, spare = console(), made.topology.chip, made.spare(proposal)
    out.print(f"\n[bold]{title}[/bold]: {proposal.setting.describe()}", highlight=False)
    _show_memory(made, proposal)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", *_NUMBERS, "limited by", ""):
        table.add_column(name, justify="left" if name in ("", "limited by") else "right")
    for phase in proposal.phases:
        numbers = [
            phase.held / GB,
            phase.temporary / GB,
            phase.flops / 1e12,
            phase.bytes / GB,
            phase.sent / GB,
        ]
        table.add_row(
            phase.name,
            f"{phase.times}",
            *(f"{n:.4g}" if n < 1000 else f"{n:.0f}" for n in numbers),
            f"{phase.seconds(chip):.1f}",
            max(phase.shares(chip), key=phase.shares(chip).get),
            _origin(phase, proposal),
        )
    out.print(table)
    _show_waiting(made, proposal)
    verdict = (
        f"fits, with {spare / GB:.1f} of {chip.memory / GB:.1f} GB to spare"
        if spare >= 0
        else f"does not fit: {-spare / GB:.1f} GB too much for the {chip.memory / GB:.1f} GB of a device"
    )
    seconds = made.step_seconds(proposal)
    rate = made.work.trained_tokens / seconds
    out.print(
        f"  {verdict}; {seconds:.0f} s a step, {rate:.0f} tokens/s ({rate / made.topology.num_devices:.0f} a device), "
        f"MFU {100 * made.utilisation(proposal):.0f}%; an update does {made.gradient_ratio(proposal):.2f} x its model "
        "FLOPs",
        highlight=False,
        soft_wrap=True,
    )
    if proposal.at_lengths:
        _show_lengths(made, proposal, proposal.at_lengths)


def _show_memory(made: Plan, proposal: Proposal) -> None:
    """Print how the memory of a device is used, and what `optimizer.state` would free where sampling needs the most."""
    out = console()
    parts = roofline.standing(made.work, proposal.setting)
    out.print(
        "  on each device, GB: "
        + ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
        + f", temporaries up to {max(p.temporary for p in proposal.phases) / GB:.2f}",
        highlight=False,
        soft_wrap=True,
    )
    peak = max(proposal.phases, key=lambda phase: phase.memory).name
    if made.work.optimizer == "float32" and peak in ("prefill", "decode"):
        moments = parts["optimizer"] / GB
        out.print(
            f"  {peak} needs the most memory: there --optimizer.state=host would free {moments:.1f} GB, and bfloat16 "
            f"{moments / 2:.1f} GB",
            highlight=False,
            soft_wrap=True,
        )


def _show_waiting(made: Plan, proposal: Proposal) -> None:
    """Print the collectives of each phase, and how often sampling waits for the host."""
    out, kind = console(), made.topology.chip.kind
    for phase in proposal.phases:
        if phase.exchanges:
            out.print(f"  {phase.name} exchanges {exchanged(phase, kind)}", highlight=False, soft_wrap=True)
    decode = next(phase for phase in proposal.phases if phase.name == "decode")
    out.print(
        f"  decode: {proposal.setting.call_tokens(made.work)} tokens between two looks of the host, which take "
        f"{1e3 * decode.host:.1f} ms each",
        highlight=False,
        soft_wrap=True,
    )


def _show_lengths(made: Plan, proposal: Proposal, found: AtLengths) -> None:
    """Print the seconds of a step at full length and at the given lengths, with both kinds of KV cache."""
    out, chip = console(), made.topology.chip
    table = Table(box=None, pad_edge=False, header_style="bold")
    kinds = {"longest reserved": found.reserved} | ({"pages": found.pages} if found.pages else {})
    for name in ("seconds", "full length", *kinds):
        table.add_column(name, justify="left" if name == "seconds" else "right")
    for phase in proposal.phases:
        of_kinds = (f"{kind.seconds[phase.name]:.1f}" for kind in kinds.values())
        table.add_row(phase.name, f"{phase.seconds(chip):.1f}", *of_kinds)
    step = made.step_seconds(proposal)
    table.add_row("step", f"{step:.1f}", *(f"{kind.step_seconds:.1f}" for kind in kinds.values()))
    table.add_row(
        "rows at once",
        f"{min(proposal.setting.rows, made.work.P * made.work.K)}",
        *(f"{kind.sampled.rows_at_once:.0f}" for kind in kinds.values()),
    )
    out.print(
        "  at these lengths, with both kinds of KV cache; pages have all memory that is free while sampling:"
    )
    out.print(table)
    if found.pages:
        setting, repeated = found.pages.setting, found.pages.sampled.repeated
        out.print(
            f"  pages: --sampling.max_rows={setting.rows} --sampling.kv_tokens={setting.kv_tokens}; a shard prefills "
            f"{repeated} tokens again, of rows that were set aside",
            highlight=False,
            soft_wrap=True,
        )


def _origin(phase: StepPhase, proposal: Proposal) -> str:
    if phase.too_large:
        return "too large to compile; times estimated"
    return "" if phase.name in proposal.compiled else "estimated"


def exchanged(phase: StepPhase, kind: str = "tpu") -> str:
    """Describe a phase's collectives by kind, number of devices and link, the largest first, in one line."""
    totals: dict[tuple[str, int, int], list[float]] = {}
    for e in phase.exchanges:
        total = totals.setdefault((e.kind, e.devices, e.hosts), [0, 0.0, 0.0])
        total[0] += e.times
        total[1] += e.bytes * e.times
        total[2] = max(total[2], e.bytes)
    ordered = sorted(totals.items(), key=lambda item: -item[1][1])
    link = lambda hosts: " over the network" if hosts > 1 else " over NVLink" if kind == "gpu" else ""  # noqa: E731
    return "; ".join(
        f"{name} among {devices}{link(hosts)}: {times} x, {size / GB:.3g} GB in all, {largest / GB:.3g} GB at most"
        for (name, devices, hosts), (times, size, largest) in ordered[:4]
    )


def assumed(chip: Chip) -> str:
    """State the constants behind the times of a chip."""
    if chip.kind == "tpu":
        return (
            "A phase takes max(FLOPs / peak, bytes / bandwidth) plus bytes sent / ring: no kernel reaches its "
            "roofline, and communication is partly hidden. The network between slices is not included."
        )
    return (
        f"A kernel takes max(FLOPs / {chip.peak_share * chip.peak / 1e12:.0f} TFLOP/s, bytes / "
        f"{chip.bandwidth_share * chip.bandwidth / GB:.0f} GB/s, {1e6 * chip.launch:.0f} us), the shares of the "
        f"specification that one H200 reached, and bytes sent / {chip.link / GB:.0f} GB/s inside a host or "
        f"{chip.network / GB:.0f} GB/s per device between hosts are added, though part of communication is hidden. "
        f"Memory is {gpus.MEMORY_SHARE:.0%} of the card's."
    )
