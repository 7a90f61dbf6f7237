"""The environment of a run: its task with the rows, the sampler and the verifiers, built once before the first step."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lpo_jax import rewards, tasks
from lpo_jax.config import Config
from lpo_jax.errors import UserError
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import Params
from lpo_jax.rollout.collect import Collector, within_limit
from lpo_jax.sampling import Sampler
from lpo_jax.types import Json, Tokenizer


@dataclasses.dataclass(frozen=True)
class Environment:
    """Everything that turns the policy's weights into verified responses; it does not change while a run goes on.

    Attributes:
      tokenizer: the model's.
      collect: samples responses to rows and verifies them.
      train_rows, heldout_rows: rows whose prompts fit into `sampling.max_prompt_tokens`.
      dropped: number of rows that were dropped because their prompts are longer.
      prompts_hash: SHA-256 of the token ids of all training prompts.
    """

    config: Config
    task: tasks.Task
    tokenizer: Tokenizer
    collect: Collector
    train_rows: list[tasks.Row]
    heldout_rows: list[tasks.Row]
    dropped: int
    prompts_hash: str

    def prompts(self, batch_size: int, state: Json, *, backward: bool = False) -> tasks.PromptIterator:
        """Batches of training rows.

        Args:
          batch_size: rows of a batch.
          state: of an earlier iterator, to continue from; None starts from the beginning.
          backward: take the rows from the end of the shuffled order, as supervised learning does.
        """
        data = tasks.PromptIterator(
            self.train_rows,
            prompts=batch_size,
            seed=self.config.seed,
            data_hash=self.task.content_hash,
            prompts_hash=self.prompts_hash,
            backward=backward,
        )
        if state is not None:
            data.restore(state)
        return data

    def prepare(self, params: Params) -> Params:
        """The weights in decode layout that training samples with; int8 where `sampling.weights` asks for it."""
        return self.collect.sampler.prepare(params, int8=self.config.sampling.weights == "int8")


def check_prompts(
    config: Config, task: tasks.Task, tokenizer: Tokenizer
) -> tuple[list[tasks.Row], list[tasks.Row], int, str]:
    """Encode all prompts once and apply the length limit.

    Returns:
      Training rows, held-out rows, the number of dropped rows, and the SHA-256 of the training prompts.

    Raises:
      UserError: no row is left, too few for a step, or a template argument would have no effect.
    """
    limit, drop = config.sampling.max_prompt_tokens, config.sampling.overlong_prompts == "drop"
    problems = config.evaluation.problems or len(task.heldout)
    fits = functools.partial(within_limit, task, tokenizer, limit=limit, drop=drop)
    train_rows, dropped, prompts_hash = fits(task.train, what="training data")
    if config.model.template_arguments and isinstance(task.prompt(train_rows[0]), str):
        raise UserError(
            f"model.template_arguments: task {task.name} asks raw text, which no chat template sees; set task.chat to "
            "true or remove them"
        )
    heldout_rows, also_dropped, _ = fits(task.heldout[:problems], what="held-out data")
    if len(train_rows) < config.training.prompts_per_step:
        raise UserError(
            f"training.prompts_per_step = {config.training.prompts_per_step} is more than the {len(train_rows)} "
            "training rows"
        )
    return train_rows, heldout_rows, dropped + also_dropped, prompts_hash


@contextlib.contextmanager
def open_environment(
    config: Config,
    task: tasks.Task,
    model: ModelConfig,
    tokenizer: Tokenizer,
    eos_ids: tuple[int, ...],
    decoding: jax.sharding.Mesh | None,
) -> Iterator[Environment]:
    """Check the prompts, start the verifiers and make the sampler.

    Args:
      decoding: the mesh to sample on; None without a mesh.

    Raises:
      UserError: a prompt, the data or the verifier cannot work.
    """
    train_rows, heldout_rows, dropped, prompts_hash = check_prompts(config, task, tokenizer)
    workers = rewards.VerifierPool(
        task.verifier,
        workers=config.rewards.workers,
        timeout=config.rewards.timeout,
        allow_weak_sandbox=config.rewards.allow_weak_sandbox,
    )
    with workers as pool:
        sampler = Sampler(
            model,
            eos_ids,
            jnp.dtype(config.model.dtype),
            tokenizer.decode,
            decoding,
            config.sampling.max_rows,
            config.model.attention,
            config.sampling.kv_tokens,
            config.sampling.kv_dtype,
        )
        collect = Collector(task, tokenizer, sampler, pool, config.sampling.max_prompt_tokens)
        yield Environment(config, task, tokenizer, collect, train_rows, heldout_rows, dropped, prompts_hash)
