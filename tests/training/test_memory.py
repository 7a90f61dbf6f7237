"""What `training.remat: auto` decides."""

import pytest

from lpo_jax.config import override_config, parse_config
from lpo_jax.training import memory


@pytest.mark.parametrize("setting", [True, False])
def test_what_is_asked_for_is_done(tiny_config, monkeypatch, setting):
    monkeypatch.setattr(memory, "free_memory", lambda: 1 if not setting else 1 << 60)
    assert memory.recomputes(setting, tiny_config, 4096, "float32", 10**6) is setting


def test_auto_keeps_what_fits_into_half_of_what_the_state_leaves(tiny_config, monkeypatch):
    kept, state = memory.kept_bytes(tiny_config, 4096, "float32"), 16 * 1000
    assert kept == 2 * memory.kept_bytes(tiny_config, 4096, "bfloat16")
    for free, again in ((2 * kept + state, False), (2 * kept + state - 1, True), (0, True)):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        assert memory.recomputes("auto", tiny_config, 4096, "float32", 1000) is again


def test_the_largest_update_counts_prompts_once_and_the_warm_start(run_config):
    sizes = ["--training.prompts_per_step=8", "--training.updates_per_step=2", "--sampling.num_responses=4"]
    lengths = ["--sampling.max_prompt_tokens=20", "--sampling.max_tokens=10"]
    config = override_config(parse_config(run_config()), [*sizes, *lengths, "--warm_start.batch_size=16"])
    assert memory.most_update_tokens(override_config(config, ["--warm_start.steps=0"])) == 4 * (20 + 40)
    assert memory.most_update_tokens(override_config(config, ["--warm_start.steps=1"])) == 16 * 30
