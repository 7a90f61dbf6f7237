"""The parts of a run: its environment and its model, opened once before the first step.

Everything that a user can get wrong is checked here, in order of cost: task, files, model, mesh, prompts, and the
verifiers last. `check.py` has checked the config before.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from lpo_jax import tasks
from lpo_jax.config import Config
from lpo_jax.errors import UserError
from lpo_jax.evaluation.heldout import Evaluation, evaluate_rows
from lpo_jax.models import lora
from lpo_jax.models.config import ModelConfig
from lpo_jax.models.decoder import Params
from lpo_jax.models.eight_bits import check_device
from lpo_jax.models.kernels import cudnn
from lpo_jax.models.kernels.choice import lacks_gpu, uses_kernels
from lpo_jax.models.load import load_config_and_tokenizer
from lpo_jax.models.placement import model_sizes
from lpo_jax.parallel.mesh import open_mesh
from lpo_jax.parallel.sharding import decode_mesh, using
from lpo_jax.reporting.trackers import require_trackers
from lpo_jax.rollout.environment import Environment, open_environment
from lpo_jax.sampling import SampleRequest, Sampling
from lpo_jax.sampling.pages import Pool
from lpo_jax.training.model import TrainedModel
from lpo_jax.training.moments import check_host_memory


@dataclasses.dataclass(frozen=True)
class Session:
    """The parts of a run that do not change while it goes on."""

    config: Config
    environment: Environment
    model: TrainedModel

    @property
    def score_name(self) -> str:
        """What the run maximises: `evaluation.score`, or what the task names."""
        named = self.config.evaluation.score
        return self.environment.task.score if named == "auto" else named

    def evaluate(self, params: Params) -> Evaluation:
        """pass@k on the held-out problems, sampled with the weights of `params` in `model.dtype`."""
        config, environment = self.config, self.environment
        return evaluate_rows(
            environment.collect,
            environment.collect.sampler.prepare(params),
            environment.heldout_rows,
            SampleRequest(
                config.evaluation.num_responses or config.sampling.num_responses,
                config.sampling.max_tokens,
                Sampling(config.evaluation.temperature, top_p=config.evaluation.top_p),
                config.sampling.stop,
                config.seed,
            ),
            prompts_per_batch=min(config.training.prompts_per_step, len(environment.heldout_rows)),
            ks=config.evaluation.ks,
            score=self.score_name,
        )


@contextlib.contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Build the task, open the model and the mesh, and start the verifiers.

    Raises:
      UserError: something in the task, the data or the model cannot work; before long work begins.
    """
    require_trackers(dataclasses.asdict(config.tracking))
    options = dict(config.task)
    task = tasks.get(options.pop("name"), **options)
    model, tokenizer, eos_ids = load_config_and_tokenizer(
        config.model.path, config.model.init == "weights", config.model.template_arguments
    )
    if tokenizer is None:
        raise UserError(f"{config.model.path}: has no tokenizer")
    if (adapters := lora.configured(config.model.lora)) is not None:
        adapters.check(model)
    check_vision(config, model)
    sizes, mesh = open_mesh(config, model_sizes(model))
    _check_attention(config, model)
    longest = config.sampling.max_prompt_tokens + config.sampling.max_tokens
    if longest > model.max_positions:
        raise UserError(
            f"sampling.max_prompt_tokens + max_tokens = {longest} is more than the {model.max_positions} "
            f"positions of {config.model.path}"
        )
    if config.optimizer.state == "host":
        check_host_memory()
    device = jax.local_devices()[0]
    check_device(
        config.sampling.kv_dtype, device.device_kind, float(getattr(device, "compute_capability", "inf"))
    )
    decoding = mesh and decode_mesh(mesh, sizes.decode_tensor)
    _check_pages(config, sizes.devices // sizes.decode_tensor)
    with using(mesh), open_environment(config, task, model, tokenizer, eos_ids, decoding) as environment:
        yield Session(config, environment, TrainedModel(config, model))


def _check_attention(config: Config, model: ModelConfig) -> None:
    """Raise a UserError if the device or the model does not allow the kernels that the config demands."""
    choice = config.model.attention
    if choice == "pallas" and jax.default_backend() != "tpu":
        raise UserError(
            "model.attention=pallas: there is no TPU here; auto takes the kernels where there is one"
        )
    if choice not in ("cudnn", "triton"):
        return
    if lacking := lacks_gpu():
        raise UserError(f"model.attention={choice}: {lacking}; auto takes kernels where there are some")
    refused = cudnn.refuses(config.model.dtype, model.head_width, model.sliding_window)
    if choice == "cudnn" and refused:
        raise UserError(f"model.attention=cudnn: {refused}; set triton, or auto")


def _check_pages(config: Config, shards: int) -> None:
    """Raise a UserError if the KV cache cannot be in pages as the config says."""
    sampling = config.sampling
    if uses_kernels(config.model.attention):
        P, S, T = config.training.prompts_per_step, sampling.max_prompt_tokens, sampling.max_tokens
        limits = sampling.max_rows, sampling.kv_tokens, shards
        Pool.of(P + -P % shards, sampling.num_responses, S, T, *limits).check(S, T)
    elif sampling.kv_tokens:
        raise UserError(
            "sampling.kv_tokens: the KV cache is in pages with kernels only, and attention is plain here; set it to 0"
        )


def check_vision(config: Config, model: ModelConfig) -> None:
    """Refuse settings of a vision tower that cannot be followed.

    Raises:
      UserError: the model has no tower to train, a tower is to be trained beside adapters, or it is random and frozen.
    """
    freeze = config.model.vision.freeze
    if model.vision is None:
        if not freeze:
            raise UserError(
                f"model.vision.freeze=false: {config.model.path} reads text only; remove it or take a vision model"
            )
        return
    if not freeze and config.model.lora.rank:
        raise UserError(
            "model.vision.freeze=false: with model.lora all weights are frozen; set model.lora.rank=0, or name "
            "matrices of the tower, such as v_qkv, in model.lora.targets"
        )
    if freeze and config.model.init == "random":
        raise UserError(
            "model.init=random draws the vision tower too, which must then be trained: set model.vision.freeze=false"
        )
