"""Template arguments reach every prompt, and a resume with other prompts or another verifier is refused."""

import json
from pathlib import Path

import pytest
from tiny import CONFIG, character_tokenizer

from lpo_jax.commands.main import main
from lpo_jax.config import parse_config
from lpo_jax.errors import UserError
from lpo_jax.models.hf import save_hf
from lpo_jax.runs.checkpoint import load_run
from lpo_jax.sampling import model as sampling_model
from lpo_jax.training.loop import train

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{% if enable_thinking is defined and not enable_thinking %}<>{% endif %}={% endif %}"
)
JSONL = {"name": "jsonl", "prompt": "{q}", "verifier": "gsm8k", "heldout_fraction": 0.3}


@pytest.fixture
def chat_model(tmp_path, tiny_params):
    """A model whose chat template takes an argument."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save_hf(tmp_path / "chat", CONFIG, tiny_params, tokenizer)
    return tmp_path / "chat"


@pytest.fixture
def short_run(run_config, one_layout, no_plots):
    def make(**sections):
        return run_config(**{"training": {"steps": 1}, "evaluation": {"every": 0, "problems": 4}} | sections)

    return make


def asked(folder):
    return [
        json.loads(line)["input"] for path in sorted(Path(folder).glob("*.jsonl")) for line in path.open()
    ]


@pytest.mark.slow
def test_template_arguments_reach_every_prompt(
    chat_model, short_run, tiny_task, tmp_path, capsys, monkeypatch
):
    model = {"path": str(chat_model), "template_arguments": {"enable_thinking": False}}
    values = short_run(model=model, task={"name": "python", "file": str(tiny_task), "chat": True})
    train(parse_config(values))
    run = Path(values["output"])
    for folder in ("rollouts", "validation"):
        prompts = asked(run / folder)
        assert prompts and all(prompt.endswith("<>=") for prompt in prompts)

    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values))
    for override, end in (([], "<>="), (["--model.template_arguments={}"], "=")):
        capsys.readouterr()
        assert main(["data", str(config), "--json", *override]) == 0
        prompt = json.loads(capsys.readouterr().out)["prompt"]
        assert prompt.endswith(end) and prompt.endswith("<>=") == (end == "<>=")

    (tmp_path / "mine.jsonl").write_text('{"q": "say 7", "answer": "7"}\n')
    suite = ["--suite", str(tmp_path / "mine.jsonl"), "--task", "jsonl", "--chat", "--max-tokens", "2"]
    suite += [f"--task.{key}='{JSONL[key]}'" for key in ("prompt", "verifier")]
    for target, more, end in (
        (run, [], "say 7<>="),
        (run, ["--template-arguments", "{}"], "say 7="),
        (chat_model, ["--template-arguments", "{enable_thinking: false}"], "say 7<>="),
    ):
        out = tmp_path / f"eval-{target.name}-{len(more)}"
        assert main(["eval", str(target), *suite, *more, "--out", str(out)]) == 0
        assert asked(out / "responses") == [end]

    seen = []
    encode = sampling_model.encode
    monkeypatch.setattr(sampling_model, "encode", lambda *given: seen.append(encode(*given)) or seen[-1])
    tokenizer = load_run(run)[0].tokenizer
    for more, end in (([], "say 7<>="), (["--template-arguments", "{}"], "say 7=")):
        assert main(["sample", str(run), "say 7", "--chat", "--max-tokens", "2", *more]) == 0
        assert tokenizer.decode(seen.pop()) == end
    assert main(["sample", str(run), "say 7", "--template-arguments", "{}"]) == 2
    assert "requires --chat" in capsys.readouterr().err


def test_template_arguments_without_a_template_in_use_are_refused(chat_model, short_run, tiny_task):
    model = {"path": str(chat_model), "template_arguments": {"enable_thinking": False}}
    with pytest.raises(
        UserError, match=r"task python asks raw text, which no chat template sees; set task.chat"
    ):
        train(parse_config(short_run(model=model)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"say "', '"say a "'),  # prompt
        ('row["answer"]', 'row["answer"] + "7"'),  # solution
        (">= 0.5", ">= 0.25"),  # verify
    ],
)
def test_a_task_file_that_has_changed_is_refused(old, new, short_run, tmp_path, tiny_task):
    task, text = tmp_path / "task.py", tiny_task.read_text()
    task.write_text(text)
    values = short_run(task={"name": "python", "file": str(task)}, training={"steps": 0})
    train(parse_config(values))
    task.write_text(text.replace(old, new, 1))
    assert task.read_text() != text
    with pytest.raises(
        UserError, match=r"cannot resume: .*task.py has changed since the run was started; restore it"
    ):
        train(parse_config(values), resume=True)
    task.write_text(text)
    train(parse_config(values), resume=True)


def test_a_judge_that_has_changed_is_refused(short_run, tmp_path, tiny_task):
    judge = tmp_path / "judge.py"
    judge.write_text(tiny_task.read_text())
    objective = {"name": "fapo", "judge": f"{judge}:flawed"}
    values = short_run(objective=objective, training={"steps": 0})
    train(parse_config(values))
    judge.write_text(judge.read_text() + "# other\n")
    with pytest.raises(UserError, match=r"judge.py:flawed has changed since the run was started"):
        train(parse_config(values), resume=True)


def test_rows_and_prompts_that_have_changed_are_refused(chat_model, short_run, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"q": f"say {n}", "answer": str(n)} for n in range(12)]
    write = lambda rows: data.write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write(rows)
    task = {**JSONL, "path": str(data), "chat": True}
    values = short_run(model={"path": str(chat_model)}, task=task)
    train(parse_config(values))
    write([*rows[:-1], {"q": "say 11", "answer": "12"}])
    with pytest.raises(UserError, match=r"data_hash was .* \(the task's rows\)"):
        train(parse_config(values), resume=True)
    write(rows)
    template = chat_model / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("<>", "<<>>").replace("}={%", "}-={%"))
    with pytest.raises(UserError, match=r"prompts_hash was .* \(the prompts, ") as error:
        train(parse_config(values), resume=True)
    assert "data_hash" not in str(error.value)
    template.write_text(text)
    train(parse_config(values), resume=True)
