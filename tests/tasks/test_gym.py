"""reasoning-gym's tasks, tested with a fake package and, if it is installed, with the real one."""

import sys
import time

import pytest

from lpo_jax import rewards, tasks
from lpo_jax.errors import UserError
from lpo_jax.rewards import VerifierPool

STAND_IN = '''
class Echo:
    """A fake dataset that asks for a number and evaluates the answer, as some real ones do."""

    def __init__(self, seed, size, different=1000, wrong=0.01):
        assert different > 0, "different must be positive"
        self.seed, self.size, self.different, self.wrong = seed, size, different, wrong

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        number = (self.seed * 7 + index) % self.different
        return {"question": f"Say {number}.", "answer": str(number), "metadata": {"pair": (number, 1)}, "x": self}

    def score_answer(self, answer, entry):
        if answer == entry["answer"]:
            return 1.0
        assert entry["metadata"]["pair"] == (int(entry["answer"]), 1)  # still a tuple
        return 0.5 if eval(answer) == [int(entry["answer"])] else self.wrong

class Plain(Echo):
    def score_answer(self, answer, entry):
        if answer == "hang":
            while True: pass
        return 1.0 if int(answer) == int(entry["answer"]) else 0.0

class Symbolic(Echo):
    def score_answer(self, answer, entry):
        return float(parse_expr(answer) == int(entry["answer"]))

def parse_expr(text):
    return eval(text, {"sin": abs, "x": 2, "C": 0})

DATASETS = {"echo": (Echo, None), "plain": (Plain, None), "symbolic": (Symbolic, None)}

def create_dataset(name, **options):
    return DATASETS[name][0](**options)
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    package = tmp_path / "site" / "reasoning_gym"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "factory.py").write_text(STAND_IN)
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for name in ("reasoning_gym.factory", "reasoning_gym"):
        sys.modules.pop(name, None)


def get(dataset="echo", **options):
    return tasks.get("reasoning-gym", dataset=dataset, **{"train_size": 20, "heldout_size": 5, **options})


def test_rows(stand_in):
    task = get()
    assert task.heldout[0] == {"question": "Say 0.", "answer": "0", "metadata": {"pair": (0, 1)}}
    assert [row["answer"] for row in task.heldout] == [str(n) for n in range(5)]
    assert [row["answer"] for row in task.train] == [str(n) for n in range(5, 25)]
    assert get(train_size=30).heldout == task.heldout and get(seed=1).heldout != task.heldout
    assert task.prompt(task.train[0]).startswith("Say 5.\n") and "<answer>" in task.prompt(task.train[0])
    assert task.content_hash == get().content_hash != get(seed=1).content_hash


def test_scores_are_the_data_sets_own(stand_in):
    """Test in a worker, which imports the package and opens the dataset itself."""
    task = get(config={"wrong": 0.25})
    row = task.train[0]
    with VerifierPool(task.verifier, workers=1) as pool:
        responses = [
            task.solution(row),
            "<answer>[5]</answer>",
            "<answer>[6]</answer>",
            "5",
            "<answer></answer>",
        ]
        verdicts = pool.verify(responses, [row] * 5)
    assert [(v.outcome, v.reward) for v in verdicts] == [
        ("pass", 1.0),
        ("wrong", 0.5),
        ("wrong", 0.25),
        ("malformed", 0.0),
        ("malformed", 0.0),
    ]


def test_answers_that_would_be_run_are_wrong(stand_in, tmp_path):
    row = {"question": "Say 7.", "answer": "7", "metadata": {"pair": (7, 1)}}
    marker = tmp_path / "was-run"
    attacks = [
        f"open({str(marker)!r}, 'w')",
        f"__import__('pathlib').Path({str(marker)!r}).touch()",
        f"[0 for _ in [open({str(marker)!r}, 'w')]]",
        "().__class__.__base__.__subclasses__()",
        "9**9**9**9",
        "((9**99)**99)**99",
        "9**(9*9*9*9*9*9)",
        "sin(x for x in (1,))",
        "x" * 3000,
        "[" * 900,
        "0/0",
        "lambda: 7",
        "banana",
    ]
    for name in ("echo", "symbolic"):
        verify = rewards.get("reasoning-gym", dataset=name, config={"wrong": 0.0})
        for attack in attacks:
            verdict = verify(f"<answer>{attack}</answer>", row)
            assert (verdict.outcome, verdict.reward) == ("wrong", 0.0), (name, attack)
    assert not marker.exists()
    for right in (
        "3*x + 1",
        "x**2 + 3",
        "2*x**3/4 + sin(-3) + C",
        "(x + 5.0)*1",
        "49**(1/2)",
        "5 + x**(-1)*4",
    ):
        assert verify(f"<answer>{right}</answer>", row).reward == 1.0, right


def test_what_a_scorer_raises_or_cannot_end_is_the_answers_fault(stand_in, monkeypatch):
    monkeypatch.setattr("lpo_jax.rewards.gym.CPU_SECONDS", 0.2)
    verify = rewards.get("reasoning-gym", dataset="plain")
    row = {"question": "Say 7.", "answer": "7", "metadata": {}}
    assert verify("<answer> 07 </answer>", row).outcome == "pass"
    verdict = verify("<answer>seven</answer>", row)
    assert (verdict.outcome, verdict.reward) == ("wrong", 0.0) and "ValueError" in verdict.parts["reason"]
    started = time.process_time()
    assert verify("<answer>hang</answer>", row).outcome == "timeout"
    assert time.process_time() - started < 2
    spec = rewards.VerifierSpec("reasoning-gym", {"dataset": "plain"})
    with pytest.raises(UserError, match="reasoning-gym verifier needs at least 5 seconds"):
        rewards.VerifierPool(spec, workers=1, timeout=1.0)


def test_an_answer_of_any_length_is_scored_and_a_very_long_one_is_wrong(stand_in):
    verify = rewards.get("reasoning-gym", dataset="plain")
    verdict = verify("<answer>" + "7" * 30_000 + "</answer>", {"question": "", "answer": "7", "metadata": {}})
    assert (verdict.outcome, verdict.parts["reason"]) == ("wrong", "longer than 20,000 characters")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "ecko"}, "no dataset 'ecko'; did you mean 'echo'"),
        ({"config": {"different": 0}}, "different must be positive"),
        ({"config": {"diferent": 1}}, "unexpected keyword argument 'diferent'"),
        ({"config": {"seed": 1}}, "a mapping without seed and size"),
        ({"config": "x"}, "a mapping without seed and size"),
        ({"config": {"different": 24}}, "echo has only 24 different questions with these options, not 25"),
        ({"train_size": 0}, "need at least 1 of each"),
        ({"template": "none"}, "unknown template 'none'"),
    ],
)
def test_mistakes(stand_in, options, message):
    with pytest.raises(UserError, match=message) as error:
        get(**options)
    assert "\n" not in str(error.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "reasoning_gym.factory", raising=False)
    with pytest.raises(UserError, match=r"reasoning-gym is not installed .*pip install 'lpo_jax\[envs\]'"):
        get("leg_counting")


@pytest.mark.parametrize("dataset", ["leg_counting", "polynomial_multiplication", "n_queens", "rearc"])
def test_the_real_ones(dataset):
    pytest.importorskip("reasoning_gym")
    task = get(dataset, train_size=3, heldout_size=2)
    verify = task.verifier.load()
    for row in [*task.train, *task.heldout]:
        assert verify(task.solution(row), row).outcome == "pass"
        assert verify("<answer>__import__('os').abort()</answer>", row).outcome == "wrong"
