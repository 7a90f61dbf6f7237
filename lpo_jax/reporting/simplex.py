"""Pictures of a method's updates on the simplex of three responses.

A point of the triangle is a policy P on the response simplex. The arrows show the direction of a small step of the
method, the star shows its target (hollow if the target is only implied, as for a policy gradient), and the line shows
the trajectory from the behaviour policy, which is at the centre. All values are computed by the objective itself on
responses of one token.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lpo_jax.errors import UserError
from lpo_jax.objectives import Objective, Scored, TokenStats, listwise_log_probs
from lpo_jax.objectives.batch import Field
from lpo_jax.objectives.projection import ScoreLoss, Simplex

_INK, _PATH, _EDGE = "#333333", "#D55E00", "#AAAAAA"
_CORNERS = np.array([[0.5, math.sqrt(3) / 2], [0, 0], [1, 0]])  # top, left, right
_SIDE = 11  # number of arrows along a side

# Inputs other than rewards that a drawable method may need. The behaviour policy is taken as the reference.
DRAWABLE = frozenset({Field.REF_LOGP})

_STEPS, _STEP = 400, 0.1  # number and size of the steps of the trajectory
_TOKEN_LOGP = math.log(0.5)  # of the behaviour policy and of the reference; only ratios to it matter


def draw(rewards: Sequence[float], methods: Mapping[str, Objective], path: str | os.PathLike) -> Path:
    """Draw one triangle for each method into a PNG file and return its path.

    Args:
        rewards: of the three responses, at the top, left and right corner.
        methods: label of the triangle to objective.
        path: the PNG file to write.

    Raises:
        UserError: `rewards` are not three finite numbers, or a method needs more than rewards.
    """
    from matplotlib.figure import Figure

    fields = [update_field(rewards, objective, label) for label, objective in methods.items()]
    columns = min(len(fields), 4 if len(fields) in (4, 7, 8) else 3)
    lines = math.ceil(len(fields) / columns)
    figure = Figure(figsize=(2.8 * columns, 2.8 * lines + 0.6), layout="constrained", facecolor="white")
    # All triangles share one colour scale: every divergence is scaled to the same initial speed.
    fastest = max(np.quantile(_speed(field), 0.95) for _, _, field, _ in fields) or 1.0
    panels = [figure.add_subplot(lines, columns, index + 1) for index in range(len(fields))]
    shown: dict = {}
    for axes, (label, objective), field in zip(panels, methods.items(), fields):
        arrows = _triangle(axes, label, rewards, field, fastest)
        _star(axes, objective, field[1])
        shown |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels())}
    bar = figure.colorbar(arrows, ax=panels, shrink=0.6, aspect=30, pad=0.02)
    bar.set_label("speed |dP|", fontsize=8, color=_INK)
    bar.ax.tick_params(labelsize=7, colors=_INK)
    bar.outline.set_visible(False)
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=4, fontsize=8, frameon=False, labelcolor=_INK
    )
    figure.savefig(path, format="png", dpi=100, pil_kwargs={"optimize": True})
    return Path(path)


def update_field(rewards: Sequence[float], objective: Objective, label: str = ""):
    """Compute the update field of a method for three responses and a uniform behaviour policy.

    Args:
        rewards: of the three responses.
        objective: the method.
        label: name of the method for error messages.

    Returns:
        points: `[N, 3]` policies; the first is uniform.
        target: `[3]`, the target w*.
        field: `[N, 3]`, the time derivative of P under ds/dt = -c for the scores s = log P + log 3.
        trajectory: `[M, 3]`, the policies on the trajectory from the uniform policy.

    Raises:
        UserError: see `draw`.
    """
    if len(rewards) != 3 or not all(math.isfinite(reward) for reward in rewards):
        raise UserError(f"a simplex picture needs three finite rewards, such as 1,0,0; got {list(rewards)}")
    missing = sorted(objective.needs - DRAWABLE)
    if missing:
        raise UserError(
            f"{label or objective.name}: cannot be drawn from rewards alone; it also needs {', '.join(missing)}"
        )
    corners = [(i, j, _SIDE - 1 - i - j) for i in range(_SIDE) for j in range(_SIDE - i)]
    points = np.concatenate([[[1 / 3] * 3], (np.array(corners) + 1 / 3) / _SIDE])  # the first is the centre
    scores = jnp.log(3 * points)

    @jax.jit
    def evaluate(scores: jax.Array):
        sampled = jnp.full((*scores.shape, 1), _TOKEN_LOGP)
        stats = TokenStats(sampled + scores[..., None], ref_logp=sampled)
        scored = Scored(
            sampled, jnp.broadcast_to(jnp.asarray(rewards, float), scores.shape), jnp.ones_like(sampled)
        )
        view = objective.listwise(stats, scored)
        P, c = jnp.exp(listwise_log_probs(scores)), view.coefficients
        return P, view.target[0], -P * (c - (P * c).sum(-1, keepdims=True)), c

    _, target, field, c = jax.device_get(evaluate(scores))
    trajectory = []
    for _ in range(_STEPS):
        P, _, _, c = evaluate(scores)
        trajectory.append(P[0])
        scores = scores - _STEP * c
    return points, target, field, np.array(trajectory)


def _speed(field: np.ndarray) -> np.ndarray:
    return np.linalg.norm(field, axis=-1)


def _triangle(axes, label: str, rewards: Sequence[float], drawn, fastest: float):
    points, _, field, trajectory = drawn
    xy, direction, speed = points @ _CORNERS, field @ _CORNERS, _speed(field)
    # All arrows except the slowest have the same length; their colour shows the speed.
    unit = direction / np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 0.02 * fastest)
    axes.fill(*_CORNERS.T, facecolor="none", edgecolor=_EDGE, linewidth=1)
    arrows = axes.quiver(
        *xy[1:].T,
        *unit[1:].T,
        speed[1:],
        cmap="viridis_r",
        clim=(0, fastest),
        angles="xy",
        scale_units="xy",
        scale=18,
        width=0.008,
        pivot="mid",
    )
    axes.plot(*(trajectory @ _CORNERS).T, color=_PATH, linewidth=1.8, label="trajectory of the policy")
    axes.plot(*xy[0], "o", color=_INK, markersize=5, label="behaviour policy (uniform)")
    for (x, y), reward, (dx, dy), place in zip(
        _CORNERS, rewards, ((0, 0.04), (-0.02, -0.03), (0.02, -0.03)), ("bottom", "top", "top")
    ):
        axes.text(x + dx, y + dy, f"R = {reward:g}", ha="center", va=place, fontsize=8, color=_INK)
    axes.set_title(label, fontsize=9.5, fontweight="bold", color=_INK, pad=10)
    axes.set_xlim(-0.12, 1.12)
    axes.set_ylim(-0.14, 1.0)
    axes.set_aspect("equal")
    axes.axis("off")
    return arrows


def _star(axes, objective: Objective, target: np.ndarray) -> None:
    if isinstance(objective.projection, ScoreLoss):  # has no target
        return
    explicit = isinstance(objective.projection, Simplex)
    axes.plot(
        *(target @ _CORNERS),
        "*",
        markersize=13,
        markerfacecolor=_PATH if explicit else "white",
        markeredgecolor="white" if explicit else _PATH,
        label="target w*" if explicit else "implied target",
    )
