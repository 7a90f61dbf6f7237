"""What a run prints before its first step: what will be computed, in which sizes."""

import jax

from lpo_jax import objectives, reporting
from lpo_jax.config import ModelSection
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.kernels.choice import chosen
from lpo_jax.models.packing import full_layout
from lpo_jax.models.runner import ModelRunner
from lpo_jax.parallel.sharding import batch_shards
from lpo_jax.rollout.encode import encode_prompt
from lpo_jax.sampling.padding import bucket
from lpo_jax.training.behaviour import Behaviour
from lpo_jax.training.check import make_objective
from lpo_jax.training.optimizer import planned_updates
from lpo_jax.training.session import Session


def introduce(
    session: Session, runner: ModelRunner, behaviour: Behaviour, progress: reporting.ProgressDisplay
) -> None:
    """Model, task, method, devices, and the table of derived batch sizes."""
    config, model, environment = session.config, session.model.architecture, session.environment
    name = config.objective["name"]
    progress.log(
        f"model    {config.model.path} ({model.family}, {session.model.num_params / 1e6:.0f}M parameters, "
        f"{config.model.dtype})" + adapters_line(session),
        f"task     {environment.task.name}: {len(environment.train_rows):,} training and "
        f"{len(environment.heldout_rows):,} held-out problems"
        + (f", {environment.dropped} dropped for their length" if environment.dropped else ""),
        f"method   {name}: {objectives.names()[name]['formula']}",
        f"devices  {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()}){mesh_line()}",
        *attention_line(config.model, model),
        *sandbox_line(environment.collect.pool.sandbox),
        f"ratios   to the {'trainer' if behaviour.rescored else 'sampler'}'s log-probs of what was sampled "
        f"(training.behaviour={behaviour.choice}: {behaviour.reason})",
        reporting.batch_table(batch_sizes(session, runner)),
    )


def adapters_line(session: Session) -> str:
    """How much of the model is trained, where not all of it is."""
    if session.model.adapters is None:
        return ""
    trained = sum(leaf.size for leaf in jax.tree.leaves(session.model.trainable))
    return f"; trained are adapters of rank {session.model.adapters.rank}, {trained / 1e6:.2f}M parameters"


def mesh_line() -> str:
    """How the devices share the work; those that do not are the rest."""
    mesh = jax.sharding.get_mesh()
    used = 1 if mesh.empty else mesh.size
    axes = ", mesh " + " x ".join(f"{name} {size}" for name, size in mesh.shape.items()) if used > 1 else ""
    return axes + (f"; {jax.device_count() - used} are not used" if used < jax.device_count() else "")


def attention_line(section: ModelSection, model: ModelConfig) -> list[str]:
    """Which attention an accelerator runs, and why; a CPU has the plain one only."""
    if jax.default_backend() == "cpu":
        return []
    name, reason = chosen(section.attention, section.dtype, model.head_width, model.sliding_window)
    return [f"attention {name}: {reason}"]


def sandbox_line(kind: str) -> list[str]:
    """Where programs run, if any do."""
    weak = " (rewards.allow_weak_sandbox): programs are not kept from reading this user's files"
    return [f"sandbox  {kind}{weak if kind == 'weak' else ''}"] if kind else []


def batch_sizes(session: Session, runner: ModelRunner) -> list[tuple[str, object, str]]:
    """(name, value, meaning) of everything the batch settings come to."""
    training, sampling = session.config.training, session.config.sampling
    objective = make_objective(session.config)
    P, K, T = training.prompts_per_step, sampling.num_responses, sampling.max_tokens
    longest = max(
        len(encode_prompt(session.environment.task, session.environment.tokenizer, row))
        for row in session.environment.train_rows
    )
    S, minibatch = bucket(longest, sampling.max_prompt_tokens), P // training.updates_per_step
    layout = full_layout(minibatch, K, S, T, runner.token_budget, batch_shards())
    M, B, tokens = layout.token.shape
    over = "" if tokens <= runner.token_budget else "; more than the token budget, and the least there is"
    shorter = runner.token_budget < training.token_budget
    row_limit = f", in rows of {runner.token_budget} tokens at most" if shorter else ""
    return [
        ("prompts per step", P, "training.prompts_per_step"),
        ("responses per prompt", K, "sampling.num_responses"),
        ("responses per step", P * K, "sampled, verified, written to rollouts/"),
        ("updates per step", training.updates_per_step, "optimizer steps on one round of samples"),
        ("prompts per update", minibatch, "whole groups"),
        ("microbatches per update", M, "at most; shorter responses need fewer"),
        ("rows per microbatch", B, f"of {layout.prompt.shape[2]} prompts x {layout.num_responses} responses"),
        ("padded prompt tokens", S, f"longest prompt {longest}"),
        ("padded response tokens", T, "at most; shorter rounds use smaller buckets"),
        ("tokens per row", tokens, f"at most{over}"),
        (
            "layers in the backward pass",
            "computed again" if runner.remat else "kept",
            f"training.remat{row_limit}",
        ),
        (
            "updates in all",
            planned_updates(session.config, objective, training.steps),
            f"{training.steps} steps"
            + (", with a replayed batch in each at most" if objective.extra_updates else ""),
        ),
    ]
