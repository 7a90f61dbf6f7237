"""What a run is made of: checked settings, task, model, sampler and update, built once before the first step.

Everything a user can get wrong is checked here, in order of cost: config, method, task, files, verifier, and
last the model.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lpo_jax import objectives, rewards, tasks
from lpo_jax.config import Config
from lpo_jax.errors import UserError
from lpo_jax.evaluation.heldout import Evaluation, evaluate
from lpo_jax.models import lora
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import Params, abstract_params, init_params
from lpo_jax.models.load import load_config_and_tokenizer, load_weights
from lpo_jax.models.quantize import require_qwix
from lpo_jax.objectives.catalogue import with_response_budget
from lpo_jax.objectives.fields import Field, Source, fields_from
from lpo_jax.objectives.hook_specs import problem as hook_problem
from lpo_jax.parallel.mesh import STATE_BYTES, open_mesh
from lpo_jax.parallel.sharding import constrain_params, current_shardings, decode_mesh, placed, using
from lpo_jax.rollout.collect import Collector, within_limit
from lpo_jax.sampling import Sampler, Sampling
from lpo_jax.training.behaviour import choose
from lpo_jax.training.memory import Microbatch, fit_microbatch
from lpo_jax.training.mirror_file import read_map
from lpo_jax.training.optimizer import Optimizer
from lpo_jax.training.step import Program, TrainState


def check_config(config: Config) -> objectives.Objective:
    """Refuses settings that cannot train, before anything is loaded. Returns the objective.

    Raises:
      UserError: one line naming the key and the way out.
    """
    training, sampling = config.training, config.sampling
    if training.prompts_per_step % training.updates_per_step:
        raise UserError(
            f"training.prompts_per_step = {training.prompts_per_step} does not divide into "
            f"training.updates_per_step = {training.updates_per_step} equal minibatches of whole groups"
        )
    if sampling.temperature == 0 or sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        raise UserError(
            "sampling: training needs temperature > 0 and top_k, top_p and min_p off: tokens outside the kept set "
            "have no log-prob under the policy that is trained (evaluation may truncate)"
        )
    if config.model.lora.rank and config.model.init == "random":
        raise UserError(
            "model.lora.rank: adapters need a trained base to stay near; with model.init=random train all weights"
        )
    objective = make_objective(config)
    rescored = choose(config, objective).rescored
    if sampling.weights == "int8":
        require_qwix()
        if not rescored:
            raise UserError(
                "sampling.weights = int8 samples from another model than the one that is trained: set "
                "training.behaviour=rescored (objective.token_weight=truncated-importance corrects the rest)"
            )
    if Field.SAMPLER_LOGP in objective.needs and not rescored:
        raise UserError(
            f"objective {objective.name}: truncated-importance compares the trainer's log-probs with the sampler's; "
            "set training.behaviour=rescored"
        )
    if sampling.num_responses < objective.min_group_size:
        raise UserError(
            f"sampling.num_responses = {sampling.num_responses}: {config.objective['name']} compares the responses "
            f"to one prompt and needs at least {objective.min_group_size}"
        )
    given = {field for hook in objective.hooks for field in hook.gives}
    if lacking := sorted(objective.needs & fields_from(Source.HOOK, Source.CALLER) - given):
        raise UserError(
            f"objective {objective.name}: with these options it needs {', '.join(lacking)} of every response, which "
            "nothing in it provides; use a method that has the hook for it (lpo methods)"
        )
    if problem := hook_problem(objective.parts):
        raise UserError(f"objective {objective.name}: {problem}")
    most = config.evaluation.num_responses or sampling.num_responses
    if config.evaluation.ks and max(config.evaluation.ks) > most:
        raise UserError(
            f"evaluation.ks = {config.evaluation.ks}: pass@k needs k <= {most} samples per problem"
        )
    return objective


def make_objective(config: Config) -> objectives.Objective:
    """The configured method; a normaliser it needs is the run's response budget unless set."""
    options = dict(config.objective)
    name = options.pop("name")
    if isinstance(options.get("mirror"), str):
        options["mirror"] = read_map(options["mirror"])
    try:
        objective = objectives.get(name, **options)
    except ValueError as error:
        raise UserError(f"objective: {error}") from None
    given = "max_tokens" in options
    return objective if given else with_response_budget(objective, config.sampling.max_tokens)


@dataclasses.dataclass(frozen=True)
class Session:
    """The parts of a run that do not change while it runs; the weights are read by `load_params`, when needed."""

    config: Config
    task: tasks.Task
    model_config: ModelConfig
    tokenizer: Any
    collect: Collector
    train_rows: list[tasks.Row]
    heldout_rows: list[tasks.Row]
    dropped: int
    prompts_hash: str = ""  # of the training rows; empty where nothing is asked

    @property
    def dtype(self) -> Any:
        """Of activations and products."""
        return jnp.dtype(self.config.model.dtype)

    @property
    def adapters(self) -> lora.Lora | None:
        """The run's adapters; None where all weights are trained."""
        return lora.configured(self.config.model.lora)

    @property
    def trainable(self) -> Params:
        """Shapes and types of what the optimizer moves: the adapters, or all parameters."""
        if self.adapters is None:
            return abstract_params(self.model_config)
        return lora.abstract_params(self.model_config, self.adapters)

    @property
    def num_params(self) -> int:
        """Parameters of the model."""
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(self.model_config)))

    def load_params(self, dtype: str = "float32") -> Params:
        """The weights: read from the model's files, or new ones, float32, drawn from the run's seed."""
        where = current_shardings(self.model_config)
        if self.config.model.init == "random":
            return init_params(self.model_config, jax.random.key(self.config.seed), shardings=where)
        return load_weights(self.config.model.path, dtype, where)

    def load_frozen(self) -> lora.Frozen | None:
        """The base of the run's adapters; None in a run that trains all weights."""
        if self.adapters is None:
            return None
        return lora.Frozen(self.load_params(self.config.model.frozen_dtype), self.adapters.scale)

    def load_state(self) -> TrainState:
        """The model as it comes, without an optimizer: float32 weights, or a frozen base and fresh adapters."""
        if self.adapters is None:
            return TrainState(self.load_params(), None)
        fresh = lora.init(self.model_config, self.adapters, jax.random.key(self.config.seed))
        return TrainState(fresh, None, frozen=self.load_frozen())

    @functools.cached_property
    def microbatch(self) -> Microbatch:
        """How much of an update runs at once; decided once, so that a run has one program."""
        state = STATE_BYTES * sum(leaf.size for leaf in jax.tree.leaves(self.trainable))
        if self.adapters is not None:
            state += self.num_params * jnp.dtype(self.config.model.frozen_dtype).itemsize
        return fit_microbatch(self.config, self.model_config, state)

    def program(self, temperature: float, objective: objectives.Objective | None = None) -> Program:
        """How the model is run in training, under this run's memory settings, for what an objective needs."""
        needs = objective.needs if objective else ()
        return Program(
            self.model_config,
            temperature,
            self.microbatch.token_budget,
            self.dtype,
            self.microbatch.remat,
            tuple(sorted(fields_from(Source.POLICY_EXTRA).intersection(needs))),
            self.config.model.attention,
        )

    def start(
        self,
        state: TrainState,
        optimizer: Optimizer,
        objective: objectives.Objective | None = None,
    ) -> TrainState:
        """A state's parameters with a fresh optimizer, and what the objective keeps beside them."""
        params = state.params
        control, referred = (
            (objective.init_control(), Field.REF_LOGP in objective.needs) if objective else (None, False)
        )
        # A copy: the parameters themselves are donated to the update.
        reference = jax.tree.map(jnp.copy, params) if referred else None
        # Each moment lies as its parameter.
        opt_state = jax.jit(lambda p: constrain_params(self.model_config, optimizer.init(p)))(params)
        return TrainState(params, opt_state, control, reference, state.frozen)

    def abstract_state(
        self, optimizer: Optimizer, objective: objectives.Objective | None = None
    ) -> TrainState:
        """Shapes, types and places of a train state, for restoring or planning one."""
        state, adapters = TrainState(self.trainable, None), self.adapters
        if adapters is not None:
            base = abstract_params(self.model_config, self.config.model.frozen_dtype)
            state = state.replace(frozen=lora.Frozen(base, adapters.scale))
        start = lambda s: self.start(s, optimizer, objective)  # noqa: E731
        return placed(self.model_config, jax.eval_shape(start, state))

    def prompts(self, batch_size: int, state: Any, *, backward: bool = False) -> tasks.PromptIterator:
        """Batches of training rows, from the start or from where `state` was taken; `backward` to be taught."""
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
        """The weights that a round is sampled with; evaluation takes those of the model itself."""
        return self.collect.sampler.prepare(params, int8=self.config.sampling.weights == "int8")

    def evaluate(self, params: Params) -> Evaluation:
        """pass@k on the held-out problems."""
        config = self.config
        return evaluate(
            self.collect,
            self.collect.sampler.prepare(params),
            self.heldout_rows,
            num_responses=config.evaluation.num_responses or config.sampling.num_responses,
            prompts_per_batch=min(config.training.prompts_per_step, len(self.heldout_rows)),
            max_tokens=config.sampling.max_tokens,
            sampling=Sampling(config.evaluation.temperature, top_p=config.evaluation.top_p),
            stop=config.sampling.stop,
            ks=config.evaluation.ks,
            seed=config.seed,
        )


@contextlib.contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Builds the task, starts the verifiers, opens the model. Raises `UserError` before long work begins."""
    options = dict(config.task)
    task = tasks.get(options.pop("name"), **options)
    model_config, tokenizer, eos_ids = load_config_and_tokenizer(
        config.model.path, config.model.init == "weights", config.model.template_arguments
    )
    if tokenizer is None:
        raise UserError(f"{config.model.path}: has no tokenizer")
    if (adapters := lora.configured(config.model.lora)) is not None:
        adapters.check(model_config)
    sizes, mesh = open_mesh(config, model_config)
    if config.model.attention == "pallas" and jax.default_backend() != "tpu":
        raise UserError(
            "model.attention=pallas: there is no TPU here; auto takes the kernels where there is one"
        )
    limit, drop = config.sampling.max_prompt_tokens, config.sampling.overlong_prompts == "drop"
    longest = limit + config.sampling.max_tokens
    if longest > model_config.max_positions:
        raise UserError(
            f"sampling.max_prompt_tokens + max_tokens = {longest} is more than the {model_config.max_positions} "
            f"positions of {config.model.path}"
        )
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
    workers = rewards.VerifierPool(
        task.verifier,
        workers=config.rewards.workers,
        timeout=config.rewards.timeout,
        allow_weak_sandbox=config.rewards.allow_weak_sandbox,
    )
    with workers as pool, using(mesh):
        decoding = mesh and decode_mesh(mesh, sizes.decode_tensor)
        dtype, attention = jnp.dtype(config.model.dtype), config.model.attention
        rows = config.sampling.max_rows
        sampler = Sampler(model_config, eos_ids, dtype, tokenizer.decode, decoding, rows, attention)
        collect = Collector(task, tokenizer, sampler, pool, limit)
        yield Session(
            config,
            task,
            model_config,
            tokenizer,
            collect,
            train_rows,
            heldout_rows,
            dropped + also_dropped,
            prompts_hash,
        )
