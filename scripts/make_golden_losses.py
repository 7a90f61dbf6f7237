"""Remake tests/objectives/golden/losses.npz and losses.json: losses and gradients by verl's and TRL's own code.

Needs torch, TRL and the packages that verl's losses import (`pip install -e .[oracle]`), and verl without its other
dependencies, whose version bounds exclude our transformers. Takes half a minute:

    pip install --no-deps verl==0.9.1
    python scripts/make_golden_losses.py

Only the inputs are replaced. For verl, its registered advantage and then its registered policy loss run on tensors. For
TRL, a real trainer with a tiny model gets generations, rewards and token log-probs from the batch; its own code
computes the advantages and the loss.

losses.npz holds, with P prompts, K responses, T tokens, in float64:
  <batch>/logp, behaviour_logp, mask [P,K,T], rewards [P,K]: what went in; log-probs are 0 on padding
  <case>/<batch>/<dtype>/gradient [P,K,T], loss []: what came out, d loss / d logp
losses.json holds the versions and the settings of each case.
"""

import argparse
import functools
import importlib.metadata
import json
import tempfile
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

GOLDEN = Path(__file__).parents[1] / "tests" / "objectives" / "golden"
PACKAGES = ("torch", "transformers", "trl", "verl")
NEVER = 1e6  # a dual clip that no ratio meets; verl has no way to switch it off
MAX_TOKENS = 16  # the constant of Dr. GRPO's sum


def verl_case(
    advantage: str, loss: str, aggregation: str, *, advantage_options=(), policy_loss=(), **actor
) -> dict:
    return {
        "peer": "verl",
        "advantage": advantage,
        "advantage_options": dict(advantage_options),
        "loss": loss,
        "aggregation": aggregation,
        "actor": actor,
        "policy_loss": dict(policy_loss),
    }


def trl_case(trainer: str, **config) -> dict:
    return {"peer": "trl", "trainer": trainer, "config": config}


SEQUENCES, TOKENS = "seq-mean-token-mean", "token-mean"
NO_STD = {"norm_adv_by_std_in_grpo": False}
# TRL's and verl's own names and meanings of every option.
CASES = {
    "verl-grpo": verl_case("grpo", "vanilla", SEQUENCES, clip_ratio_c=NEVER),
    "verl-grpo-defaults": verl_case("grpo", "vanilla", TOKENS),
    "verl-dapo": verl_case("grpo", "vanilla", TOKENS, clip_ratio_high=0.28, clip_ratio_c=10.0),
    "verl-dr-grpo": verl_case(
        "grpo", "vanilla", "seq-mean-token-sum-norm", advantage_options=NO_STD, clip_ratio_c=NEVER
    ),
    "verl-rloo": verl_case("rloo", "gpg", "seq-mean-token-sum"),
    "verl-rloo-ppo": verl_case("rloo", "vanilla", TOKENS, clip_ratio_c=NEVER),
    "verl-gpg": verl_case("gpg", "gpg", TOKENS),
    "verl-opo": verl_case("opo", "gpg", TOKENS),
    "verl-grpo-passk": verl_case(
        "grpo_passk", "vanilla", SEQUENCES, advantage_options={"config": {}}, clip_ratio_c=NEVER
    ),
    "verl-gspo": verl_case("grpo", "gspo", SEQUENCES, clip_ratio_low=3e-4, clip_ratio_high=4e-4),
    "verl-gspo-wide": verl_case("grpo", "gspo", SEQUENCES, clip_ratio_low=0.2, clip_ratio_high=0.28),
    "verl-gmpo": verl_case("grpo", "geo_mean", SEQUENCES, clip_ratio_low=0.4, clip_ratio_high=0.4),
    "verl-cispo": verl_case("grpo", "cispo", TOKENS, clip_ratio_low=1.0, clip_ratio_high=0.28),
    "verl-cispo-low": verl_case("grpo", "cispo", TOKENS, clip_ratio_low=0.2, clip_ratio_high=0.28),
    "verl-sapo": verl_case("grpo", "sapo", SEQUENCES),
    # A share of 1: all tokens in range, where a smaller share would be drawn at random.
    "verl-clip-cov": verl_case(
        "grpo",
        "clip_cov",
        TOKENS,
        policy_loss={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 1.0},
    ),
    "verl-kl-cov": verl_case(
        "grpo",
        "kl_cov",
        TOKENS,
        advantage_options=NO_STD,
        policy_loss={"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0},
    ),
    "trl-grpo": trl_case("GRPO", loss_type="grpo"),
    "trl-grpo-delta": trl_case("GRPO", loss_type="grpo", delta=3.0),
    "trl-bnpo": trl_case("GRPO", loss_type="bnpo"),
    "trl-dapo": trl_case("GRPO", loss_type="dapo", epsilon_high=0.28),
    "trl-dr-grpo": trl_case("GRPO", loss_type="dr_grpo", scale_rewards="none"),
    "trl-gspo": trl_case(
        "GRPO", loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4
    ),
    "trl-gspo-wide": trl_case(
        "GRPO", loss_type="grpo", importance_sampling_level="sequence", epsilon=0.2, epsilon_high=0.28
    ),
    "trl-cispo": trl_case("GRPO", loss_type="cispo", epsilon_high=1.28),
    "trl-sapo": trl_case("GRPO", loss_type="sapo"),
    "trl-rloo": trl_case("RLOO"),
}


def batch(seed: int, T: int, spread: float, rewards: list[list[float]]) -> dict[str, np.ndarray]:
    """Make a batch of uneven lengths; `spread` is the standard deviation of the log-ratio, in nats."""
    rng = np.random.default_rng(seed)
    rewards = np.array(rewards)
    shape = (*rewards.shape, T)
    behaviour = -4 - rng.exponential(1.0, shape)
    delta = np.clip(spread * rng.standard_normal(shape), -3.5, 3.5)
    lengths = rng.integers(2, T + 1, rewards.shape)
    lengths[0, :2] = T, 1
    mask = np.arange(T) < lengths[..., None]
    return {
        "logp": np.where(mask, behaviour + delta, 0),
        "behaviour_logp": np.where(mask, behaviour, 0),
        "mask": mask,
        "rewards": rewards,
    }


# Each has a group with equal rewards, whose mean is exact in float32. verl gives eight rewards of 0.9 an advantage
# of 0.056: the rounding error of their mean, divided by 1e-6. "far" goes beyond dual clips of 3 and 10. The seeds of
# "near" and "close" put ratios of sequences on either side of PPO's and GSPO's bounds, for both signs.
BATCHES = {
    "near": batch(2820, 9, 0.35, [[1, 0, 0, 1, 0], [0.1, 0.7, 1, 0, 0.35], [1] * 5]),
    "far": batch(1, 7, 1.5, [[0, 1, 0, 0], [0.9, 0.2, 0, 0.6], [0] * 4, [1, 0, 1, 1]]),
    "close": batch(19992, 8, 1.5e-3, [[1, 1, 0, 0], [0.1, 0, 1, 0.1], [0.5] * 4]),
    "on-policy": batch(2, 8, 0.0, [[1, 1, 0, 0], [0.1, 0, 1, 0.1], [0.5] * 4]),
}


def by_verl(case: dict, given: dict[str, torch.Tensor], logp: torch.Tensor) -> torch.Tensor:
    """Compute the loss of log-probs [B,T]; the rows of a group are contiguous."""
    P, K, T = given["mask"].shape
    mask = given["mask"].reshape(-1, T)
    last = mask * (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    advantages, _ = core_algos.get_adv_estimator_fn(case["advantage"])(
        token_level_rewards=given["rewards"].reshape(-1, 1) * last,
        response_mask=mask,
        index=np.repeat(np.arange(P), K),
        **case["advantage_options"],
    )
    norm = case["aggregation"] == "seq-mean-token-sum-norm"
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=K,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(**case["policy_loss"]),
        global_batch_info={"loss_scale_factor": MAX_TOKENS} if norm else {},
        **case["actor"],
    )
    behaviour = given["behaviour_logp"].reshape(-1, T)
    loss, _ = core_algos.get_policy_loss_fn(case["loss"])(
        behaviour, logp, advantages, mask, loss_agg_mode=case["aggregation"], config=config
    )
    return loss


class Given:
    """A TRL trainer that takes generations, rewards and log-probs from `given` and `logp`."""

    def _generate(self, prompts):
        ids = [[0] * int(n) for n in self.given["mask"].sum(-1).flatten()]
        prompt_ids, text = [[0] for _ in ids], [""] * len(ids)
        if isinstance(self, trl.RLOOTrainer):
            return prompt_ids, ids, text
        return prompt_ids, ids, None, text, None, {}, None, None

    def _calculate_rewards(self, *args):
        return self.given["rewards"].reshape(-1, 1)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        # RLOO's loss multiplies by the ratio of sequences; on-policy that is 1, and REINFORCE is left.
        behind = not torch.is_grad_enabled() and not isinstance(self, trl.RLOOTrainer)
        logp = self.given["behaviour_logp"].reshape(self.logp.shape) if behind else self.logp
        return logp, torch.zeros_like(logp), None


class GivenGRPO(Given, trl.GRPOTrainer):
    pass


class GivenRLOO(Given, trl.RLOOTrainer):
    pass


@functools.cache
def tiny() -> tuple:
    """Make a model and a tokenizer; the results do not depend on them."""
    vocabulary = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(vocabulary), pad_token="a", eos_token="b"
    )
    sizes = dict(vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), tokenizer


def by_trl(case: dict, given: dict[str, torch.Tensor], logp: torch.Tensor) -> torch.Tensor:
    """Compute the loss of log-probs [B,T]; the rows of a group are contiguous."""
    model, tokenizer = tiny()
    P, K, _ = given["mask"].shape
    trainer_class, config_class = {
        "GRPO": (GivenGRPO, trl.GRPOConfig),
        "RLOO": (GivenRLOO, trl.RLOOConfig),
    }[case["trainer"]]
    with tempfile.TemporaryDirectory() as out:
        config = config_class(
            out,
            per_device_train_batch_size=P * K,
            num_generations=K,
            num_iterations=2,  # otherwise TRL takes the policy for on-policy and scores the behaviour with it
            steps_per_generation=1,
            max_completion_length=MAX_TOKENS,
            beta=0.0,
            bf16=False,
            use_cpu=True,
            report_to=[],
            **case["config"],
        )
        trainer = trainer_class(
            model,
            reward_funcs=[lambda **_: None],
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["a"]}),
            processing_class=tokenizer,
        )
    trainer.given, trainer.logp = given, logp
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": str(p)} for p in range(P) for _ in range(K)])
    return trainer.compute_loss(trainer.model, inputs)


def answer(case: dict, arrays: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, np.ndarray]:
    given = {key: torch.tensor(x, dtype=torch.long if key == "mask" else dtype) for key, x in arrays.items()}
    logp = given["logp"].reshape(-1, arrays["mask"].shape[-1]).requires_grad_()
    loss = {"verl": by_verl, "trl": by_trl}[case["peer"]](case, given, logp)
    assert loss.dtype == dtype
    loss.backward()
    return {"loss": loss.detach().numpy(), "gradient": logp.grad.reshape(arrays["mask"].shape).numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=GOLDEN)
    out = parser.parse_args().out
    arrays = {f"{name}/{key}": x for name, given in BATCHES.items() for key, x in given.items()}
    for case, settings in CASES.items():
        for name, given in BATCHES.items():
            for dtype in (torch.float32, torch.float64):
                prefix = f"{case}/{name}/{str(dtype).removeprefix('torch.')}"
                answers = answer(settings, given, dtype)
                assert all(np.isfinite(x).all() for x in answers.values()), prefix
                arrays |= {f"{prefix}/{key}": x for key, x in answers.items()}
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "losses.npz", **arrays)
    settings = {"versions": {p: importlib.metadata.version(p) for p in PACKAGES}, "cases": CASES}
    (out / "losses.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    main()
