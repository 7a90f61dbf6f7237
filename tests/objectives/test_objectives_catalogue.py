"""The catalogue: names, options, defaults, and errors of one line."""

import json

import numpy as np
import pytest
from objective_cases import batch, run

from lpo_jax import objectives as O
from lpo_jax.objectives.catalogue import with_response_budget

NAMES = ["lpo-forward", "lpo-reverse", "lpo-forward-onpolicy", "lpo-pointwise", "grpo", "dr-grpo", "maxrl"]


def test_names_are_plain_data():
    records = O.names()
    assert set(NAMES) <= records.keys()
    assert json.loads(json.dumps(records)) == records
    for name, record in records.items():
        assert record["name"] == name
        assert record["fidelity"] in ("paper", "code", "note", "reconstructed", "derived")
        for key in ("formula", "paper"):
            assert record[key] and "\n" not in record[key]


def test_the_records_are_copies():
    O.names()["grpo"]["options"]["ddof"] = 7
    assert O.names()["grpo"]["options"]["ddof"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_shown_defaults_are_the_defaults(name):
    options = O.names()[name]["options"]
    assert O.get(name, **options) == O.get(name)
    assert O.get(name).name == name


def test_defaults_follow_the_paper():
    options = O.names()["lpo-forward"]["options"]
    assert options == {
        "temperature": "grpo",
        "score": "mean",
        "clip": "hard",
        "epsilon": 0.2,
        "ddof": 0,
        "temperature_floor": 1e-6,
        "target": "softmax",
        "target_alpha": 1.5,
        "divergence": "forward-kl",
        "alpha": 0.5,
        "degenerate": "keep",
    }
    assert O.names()["dr-grpo"]["options"]["aggregation"] == "seq-mean-token-sum-norm"


# Every option, and a value that must change the gradient (or, for the floor, the temperature).
CHANGES = {
    "temperature": 0.2,
    "score": "sum",
    "clip": "none",
    "epsilon": 0.05,
    "ddof": 1,
    "temperature_floor": 5.0,
    "degenerate": "mask",
    "epsilon_low": 0.05,
    "epsilon_high": 0.05,
    "dual_clip": 1.01,
    "aggregation": "token-mean",
    "max_tokens": 32,
    "centre": "none",
    "target": "sparsemax",
    "divergence": "reverse-kl",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,option",
    # Without the word that brings them to life, these are refused: see `test_objectives_targets`.
    [("lpo-forward", o) for o in O.names()["lpo-forward"]["options"] if o not in ("alpha", "target_alpha")]
    + [("grpo", o) for o in O.names()["grpo"]["options"] if o not in ("max_tokens", "kl_coef", "kl")]
    + [("dr-grpo", "max_tokens"), ("dr-grpo", "aggregation")],
)
def test_no_dead_option(name, option):
    stats, scored = batch(seed=22, off=0.2)
    default = run(O.get(name), stats, scored)[2]
    changed = run(O.get(name, **{option: CHANGES[option]}), stats, scored)[2]
    assert np.abs(default - changed).max() > 1e-4


@pytest.mark.parametrize(
    "name,options,says",
    [
        ("lpo-foward", {}, "unknown method 'lpo-foward'; did you mean 'lpo-forward'?"),
        ("xyzzy", {}, "unknown method 'xyzzy' (known: lpo-forward, "),
        ("grpo", {"epsilon_hi": 0.3}, "grpo: unknown option 'epsilon_hi'; did you mean 'epsilon_high'?"),
        ("lpo-forward", {"aggregation": "token-mean"}, "lpo-forward: unknown option 'aggregation'"),
        (
            "lpo-forward",
            {"clip": "hrad"},
            "lpo-forward: clip must be one of 'hard', 'ppo', 'joint', 'none', got 'hrad'",
        ),
        ("lpo-forward", {"clip": "hrad"}, "did you mean 'hard'?"),
        (
            "lpo-forward",
            {"temperature": 0},
            "'mad', 'beta' or a positive number, got 0",
        ),
        ("lpo-forward", {"temperature": "max-rl"}, "did you mean 'maxrl'?"),
        ("lpo-forward", {"epsilon": 1.0}, "epsilon must be a number greater than 0 and less than 1, got 1.0"),
        (
            "lpo-forward",
            {"epsilon": "0.2"},
            "epsilon must be a number greater than 0 and less than 1, got '0.2'",
        ),
        ("grpo", {"epsilon_high": -0.1}, "epsilon_high must be a number greater than 0, got -0.1"),
        ("grpo", {"ddof": 2}, "ddof must be one of 0, 1, got 2"),
        ("grpo", {"ddof": True}, "ddof must be one of 0, 1, got True"),
        ("grpo", {"temperature_floor": 0.0}, "temperature_floor must be a number greater than 0, got 0.0"),
        ("grpo", {"degenerate": "drop"}, "degenerate must be one of 'keep', 'mask', got 'drop'"),
        ("grpo", {"aggregation": "token-maen"}, "did you mean 'token-mean'?"),
        ("dr-grpo", {"max_tokens": 0}, "max_tokens must be a whole number of tokens, 1 or more, got 0"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(name, options, says):
    with pytest.raises(ValueError) as error:
        O.get(name, **options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_numpy_numbers_are_numbers():
    assert (
        O.get("lpo-forward", temperature=np.float32(0.5), epsilon=np.float64(0.25)).advantage.temperature
        == 0.5
    )


def test_parts_are_recombined_by_word():
    """A method with another's parts is that method."""
    stats, scored = batch(seed=22, off=0.2)
    same = run(O.get("grpo", gate="soft-gate", tau_neg=2.0), stats, scored)[2]
    np.testing.assert_array_equal(same, run(O.get("sapo", tau_neg=2.0), stats, scored)[2])
    assert np.abs(same - run(O.get("grpo"), stats, scored)[2]).max() > 1e-4
    mixed = O.get("lpo-forward", hooks=["dynamic-sampling"], max_rounds=3, shape="overlong", divergence="js")
    assert [h.max_rounds for h in mixed.hooks] == [3] and len(mixed.shape) == 1
    assert O.get("dapo", hooks="none", shape="none").parts == O.get("dapo", hooks=[], shape=[]).parts
    assert O.names()["dapo"]["parts"]["hooks"] == ["dynamic-sampling"]
    for name, record in O.names().items():
        assert O.get(name, **record["parts"]).name == name


@pytest.mark.parametrize(
    "name,parts,says",
    [
        ("grpo", {"gate": "softgate"}, "grpo: gate has no 'softgate'; did you mean 'soft-gate'?"),
        ("grpo", {"hooks": ["replay", "x"]}, "grpo: hooks has no 'x' (known: dynamic-sampling, "),
        (
            "grpo",
            {"select": ["drop-median", "mixed-groups"]},
            "grpo: select holds one part, got ['drop-median'",
        ),
        ("lpo-forward", {"credit": "progress"}, "lpo-forward: credit is for policy gradients"),
        ("grpo", {"gate": "soft-gate", "epsilon_low": 0.1}, "grpo: unknown option 'epsilon_low'"),
    ],
)
def test_wrong_parts_are_errors_of_one_line(name, parts, says):
    with pytest.raises(ValueError) as error:
        O.get(name, **parts)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_response_budget_reaches_what_stands_for_it_alone():
    """NFT divides by a constant of its own, whatever the run's responses may have."""
    maxima = lambda name, **options: {  # noqa: E731
        type(part).__name__: part.max_tokens
        for part in with_response_budget(O.get(name, **options), 64).parts
        if hasattr(part, "max_tokens")
    }
    assert maxima("dr-grpo") == {"Aggregate": 64} and maxima("brpo") == {
        "AnytimeReturns": 64,
        "Aggregate": 64,
    }
    assert maxima("nft") == {"Aggregate": 1000}
    assert maxima("nft", shape=["sign", "overlong"]) == {"Overlong": 64, "Aggregate": 1000}
