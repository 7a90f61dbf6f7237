"""The search for a mirror map: the evolution strategy on arrays, its file, and `lpo meta` on real and fake runs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from lpo_jax import objectives
from lpo_jax.commands.main import main
from lpo_jax.config import parse_config
from lpo_jax.errors import Diverged, UserError
from lpo_jax.objectives import evolution
from lpo_jax.objectives.mirror import SIZE, initial_map
from lpo_jax.reporting import read_metrics
from lpo_jax.runs.signals import Interrupted
from lpo_jax.training import meta as command
from lpo_jax.training.mirror_file import read_map, write_map

# The evolution strategy on arrays


def quadratic(phi, peak):
    return 1 - np.square(phi - peak).mean()


def play(rounds, *, population=8, sigma=0.05, alpha=0.02, seed=0, D=6):
    """Maximise a quadratic, starting from 0; returns the states of the search."""
    peak = np.random.default_rng(1).uniform(0.3, 0.5, D)
    states = [evolution.start_search(np.zeros(D))]
    for _ in range(rounds):
        state = states[-1]
        noise, sigma_t = evolution.new_noise(state, population, seed), evolution.deviation(state, sigma, 0.95)
        fitness = [quadratic(state.phi + sigma_t * eps, peak) for eps in noise]
        states.append(evolution.advance(state, noise, fitness, sigma_t, alpha))
    return states, peak


def test_noise_comes_in_opposite_pairs_and_is_the_rounds_own():
    state = evolution.start_search(np.zeros(5))
    noise = evolution.new_noise(state, 6, seed=3)
    np.testing.assert_array_equal(noise[::2], -noise[1::2])
    assert len(np.unique(np.abs(noise), axis=0)) == 3
    np.testing.assert_array_equal(noise, evolution.new_noise(state, 6, seed=3))
    later = dataclasses.replace(state, history=(0.5,))
    assert (noise != evolution.new_noise(later, 6, seed=3)).all()
    assert evolution.deviation(later, 0.1, 0.9) == pytest.approx(0.09)


def test_a_quadratic_is_climbed():
    states, peak = play(40)
    assert quadratic(states[-1].phi, peak) > 0.5 + 0.5 * quadratic(states[0].phi, peak)


def test_an_accepted_round_moves_along_the_noise():
    """phi + alpha / (N sigma) sum f eps over candidates that did not fail; failed ones count in the mean fitness."""
    state = evolution.start_search([1.0, 2.0])
    noise = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    after = evolution.advance(state, noise, [0.4, 0.2, 0.0, 0.6], sigma=0.1, alpha=0.05)
    np.testing.assert_allclose(after.phi, [1 + 0.05 * 0.2 / 0.3, 2 - 0.05 * 0.6 / 0.3])
    assert after.history == (pytest.approx(0.3),) and after.best == pytest.approx(0.3)
    assert len(after.carried_noise) == 0
    # If all fail, the first round is still the best so far, and the map does not move.
    np.testing.assert_array_equal(evolution.advance(state, noise, [0, 0, 0, 0], 0.1, 0.05).phi, state.phi)


def test_a_rejected_round_stays_and_carries_its_best():
    state = dataclasses.replace(evolution.start_search(np.zeros(3)), history=(0.5,))
    noise = evolution.new_noise(state, 12, 0)
    fitness = np.linspace(0, 0.6, 12)[::-1]
    after = evolution.advance(state, noise, fitness, 0.1, 0.05)
    np.testing.assert_array_equal(after.phi, state.phi)
    np.testing.assert_array_equal(after.carried_fitness, np.sort(fitness)[-2:])  # a quarter of 12, made even
    np.testing.assert_array_equal(after.carried_noise, noise[[1, 0]])
    assert after.best == 0.5
    # They are part of the next round without being run again.
    new = evolution.new_noise(after, 12, 0)
    assert len(new) == 10
    final = evolution.advance(after, new, np.zeros(10), 0.1, 0.05)
    np.testing.assert_allclose(final.history[-1], np.sort(fitness)[-2:].sum() / 12)
    np.testing.assert_array_equal(final.carried_fitness, np.sort(fitness)[-2:])
    # An equal mean is no improvement; at least two candidates are always new.
    assert evolution.advance(state, noise[:2], [0.5, 0.5], 0.1, 0.05).carried_noise.shape == (0, 3)
    assert evolution.advance(state, noise[:4], [0.1, 0.5, 0, 0], 0.1, 0.05).carried_noise.shape == (2, 3)


def test_stalled():
    def is_stalled(*history):
        return evolution.stalled(dataclasses.replace(evolution.start_search([0.0]), history=history), 2, 0.01)

    assert not is_stalled() and not is_stalled(0.5, 0.5)
    assert is_stalled(0.5, 0.5, 0.5) and is_stalled(0.5, 0.505, 0.2)
    assert not is_stalled(0.5, 0.52, 0.2)
    assert is_stalled(0.5, 0.52, 0.2, 0.3)


# The file


def test_a_map_goes_into_a_file_and_back(tmp_path):
    parameters = np.asarray(initial_map(3))
    parameters[5] = -1.0
    write_map(tmp_path / "map.json", parameters)
    held = json.loads((tmp_path / "map.json").read_text())
    assert {k: len(v) for k, v in held.items()} == {"v": 126, "w": 126, "b": 126, "a": 1, "c": 1}
    read = read_map(str(tmp_path / "map.json"))
    np.testing.assert_array_equal(read, np.maximum(parameters, 0))
    assert objectives.get("gbmpo-mirror", mirror=read) == objectives.get("gbmpo-mirror", mirror=list(read))


@pytest.mark.parametrize(
    "text,says",
    [
        (None, "no such file; `lpo meta` writes one"),
        ("{", "not a mirror map"),
        ("[1, 2]", "not a mirror map"),
        ('{"v": [1], "w": [], "b": [], "a": [], "c": []}', "must be 380 numbers"),
        ('{"v": [], "w": [], "b": [], "a": [], "c": []}', "is empty"),
    ],
)
def test_a_broken_map_file(tmp_path, text, says):
    path = tmp_path / "map.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"^objective\.mirror: ") as error:
        read_map(str(path))
    assert says in str(error.value) and "\n" not in str(error.value)


# The command


@pytest.fixture
def config(run_config):
    def make(**keys):
        settings = {"population": 4, "iterations": 4, "sigma": 0.05, "alpha": 0.02, "patience": 9, **keys}
        return parse_config(run_config(objective={"name": "gbmpo-mirror"}) | {"meta": settings})

    return make


def pretend(config):
    """A fake run whose score grows with the parameters of its map; it writes the files of a run."""
    (Path(config.output) / "checkpoints").mkdir(parents=True)
    return sum(read_map(config.objective["mirror"])) / 20


def left_behind(config):
    run = Path(config.output)
    rows = [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(run)]
    return (run / "mirror.json").read_text(), rows, (run / "checkpoints" / "search.json").read_text()


def test_the_search_improves_and_leaves_its_record(config):
    config = config(iterations=8, sigma=0.005)
    command.meta(config, fitness=pretend)
    _, rows, _ = left_behind(config)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["meta/best"] > rows[0]["meta/fitness/mean"] + 0.05
    learnt = np.array(read_map(f"{config.output}/mirror.json"))
    assert (learnt >= 0).all()
    assert learnt.sum() > 1.5 * sum(initial_map(42))
    runs = list(Path(config.output, "runs").iterdir())
    assert runs and not any((run / "checkpoints").exists() for run in runs)


def test_killed_and_resumed_is_the_same_search(config, tmp_path):
    """The search is stopped in every candidate of the second round in turn, before its fitness is known."""
    whole = config()
    command.meta(whole, fitness=pretend)
    broken = dataclasses.replace(whole, output=str(tmp_path / "broken"))
    for stop_after in (6, 1, 0, 2):
        calls = iter(range(99))

        def worth(candidate, calls=calls, stop_after=stop_after):
            if next(calls) == stop_after:
                raise Interrupted
            return pretend(candidate)

        with pytest.raises(Interrupted):
            command.meta(broken, resume=True, fitness=worth)
    command.meta(broken, resume=True, fitness=pretend)
    assert left_behind(broken) == left_behind(whole)
    # Resuming a finished search changes nothing; a longer search continues from it.
    command.meta(broken, resume=True, fitness=None)
    assert left_behind(broken) == left_behind(whole)


def test_a_damaged_search_is_refused(config):
    """A changed digit of a fitness would silently change the search."""
    search = config(iterations=1)
    command.meta(search, fitness=pretend)
    path = Path(search.output) / "checkpoints" / "search.json"
    held = path.read_bytes()
    place = held.index(b".") + 1
    path.write_bytes(held[:place] + bytes([held[place] ^ 1]) + held[place + 1 :])
    with pytest.raises(UserError, match=r"search\.json: is damaged"):
        command.meta(search, resume=True, fitness=pretend)


def test_a_search_stops_without_improvement(config):
    config = config(patience=2, min_delta=0.0)
    command.meta(config, fitness=lambda candidate: 0.25)
    assert len(left_behind(config)[1]) == 3


def test_what_cannot_be_learnt_or_resumed(config, tmp_path):
    settings = config()
    other = dataclasses.replace(settings, objective={"name": "grpo"})
    with pytest.raises(UserError, match=r"has no mirror map to learn; set --objective\.name=gbmpo-mirror"):
        command.meta(other)
    assert not Path(settings.output).exists()
    command.meta(settings, fitness=pretend)
    with pytest.raises(UserError, match="holds a run already"):
        command.meta(settings, fitness=pretend)
    changed = dataclasses.replace(settings, meta=dataclasses.replace(settings.meta, sigma=0.5))
    with pytest.raises(UserError, match=r"cannot resume with meta\.sigma = 0\.5"):
        command.meta(changed, resume=True, fitness=pretend)


def test_a_candidate_that_diverges_is_worth_nothing(config, monkeypatch):
    def diverge(config, resume):
        raise Diverged("step 3")

    monkeypatch.setattr(command, "train", diverge)
    assert command.run_candidate(config()) == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_lpo_meta_with_real_runs(run_config, tmp_path, capsys):
    """Two candidates, one round: every candidate is an ordinary run, and its last evaluation is its fitness."""
    values = run_config(
        objective={"name": "gbmpo-mirror"}, training={"steps": 1}, evaluation={"every": 0}
    ) | {"meta": {"population": 2, "iterations": 1}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["meta", str(path)]) == 0
    assert "1 rounds; mean held-out pass@1 of the best" in " ".join(capsys.readouterr().out.split())
    run = Path(values["output"])
    (row,) = read_metrics(run)
    scores = [
        [v for row in read_metrics(run / "runs" / name) for k, v in row.items() if "/acc/mean@" in k][-1]
        for name in ("01-00", "01-01")
    ]
    assert row["meta/fitness/mean"] == pytest.approx(np.mean(scores))
    assert len(read_map(str(run / "mirror.json"))) == SIZE
    assert main(["meta", str(path), "--objective.name=lpo-forward", "--output=" + str(tmp_path / "x")]) == 2
