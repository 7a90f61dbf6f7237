"""Checks of a config that need nothing but the config, before anything is loaded."""

from lpo_jax import objectives
from lpo_jax.config import Config
from lpo_jax.errors import UserError
from lpo_jax.models.quantize import require_qwix
from lpo_jax.objectives.batch import Field, Source, fields_from
from lpo_jax.objectives.catalogue import with_response_budget
from lpo_jax.objectives.hook_specs import HookPhase
from lpo_jax.objectives.hook_specs import problem as hook_problem
from lpo_jax.objectives.part import word
from lpo_jax.parallel import hosts
from lpo_jax.training.behaviour import choose_behaviour, rounded_sampling
from lpo_jax.training.mirror_file import read_map


def check_config(config: Config) -> objectives.Objective:
    """Refuse settings that cannot train, before anything is loaded, and return the objective.

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
    rescored = choose_behaviour(config, objective).rescored
    if sampling.weights == "int8":
        require_qwix()
    if (rounded := rounded_sampling(config)) and not rescored:
        raise UserError(
            f"{rounded} samples from another model than the one that is trained: set "
            "training.behaviour=rescored (objective.token_weight=truncated-importance corrects the rest)"
        )
    if Field.SAMPLER_LOGP in objective.needs and not rescored:
        raise UserError(
            f"objective {objective.name}: truncated-importance compares the trainer's log-probs with the sampler's; "
            "set training.behaviour=rescored"
        )
    if sampling.ahead:
        check_ahead(objective, rescored)
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


def check_ahead(objective: objectives.Objective, rescored: bool) -> None:
    """Refuse methods that cannot learn from tokens of earlier weights, and runs of several processes.

    Raises:
      UserError: a hook needs the finished round before the next one is drawn, the log-probs of the behaviour policy are
        not used, or there are several processes.
    """
    if hosts.many():
        raise UserError("sampling.ahead is not available to a run of several processes; set sampling.ahead=0")
    for hook in objective.hooks:
        if hook.phase in (HookPhase.DRAW, HookPhase.MEND, HookPhase.SELECT):
            raise UserError(
                f"sampling.ahead: {word(hook)} of objective {objective.name} acts on a finished round before the next "
                "one is drawn; set sampling.ahead=0 or leave the hook out"
            )
    if rescored and Field.SAMPLER_LOGP not in objective.needs:
        raise UserError(
            "sampling.ahead draws a part of the tokens from the policy of an earlier step, whose log-probs "
            "training.behaviour = rescored replaces: set training.behaviour=sampled, or "
            "objective.token_weight=truncated-importance"
        )


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
