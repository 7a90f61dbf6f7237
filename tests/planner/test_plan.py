"""Plans of tiny models: arithmetic by hand, output and exit status; compiled if libtpu is installed."""

import dataclasses
import importlib.util
import json

import jax
import pytest
import yaml
from tiny import CONFIG

from lpo_jax.commands.main import main
from lpo_jax.config import override_config, parse_config
from lpo_jax.errors import UserError
from lpo_jax.models.decoder import abstract_params
from lpo_jax.parallel.mesh import MeshSizes
from lpo_jax.planner import plan as plans
from lpo_jax.planner import roofline, topology
from lpo_jax.planner.phases import Exchange, StepPhase
from lpo_jax.planner.plan_text import show
from lpo_jax.planner.programs import _needed, extrapolate, measure
from lpo_jax.planner.setting import Setting, Workload, mean_cache_tokens
from lpo_jax.planner.sizes import Sizes
from lpo_jax.training.check import check_config

WORK = Workload(CONFIG, P=8, K=4, S=16, T=32, updates=2, itemsize=2, reference=False, scorings=1)
ALONE = Setting(MeshSizes(1, 1, 1), token_budget=16 + 4 * 32, remat=False, rows=32)
GPU = topology.parse_topology("h100:8")


def phases(work=WORK, setting=ALONE):
    return {phase.name: phase for phase in roofline.estimate_phases(work, setting)}


@pytest.fixture
def config_file(tmp_path, run_config, tiny_model):
    def write(**sections):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(run_config(**sections)))
        return str(path)

    return write


def test_parameters_are_those_of_the_model():
    for config in (CONFIG, dataclasses.replace(CONFIG, tie_embeddings=False, qkv_bias=True, qk_norm=False)):
        leaves = jax.tree.leaves(abstract_params(config))
        assert Sizes.of(config).total == sum(leaf.size for leaf in leaves)


def test_arithmetic_of_a_step_by_hand():
    c, S, K, T = CONFIG, WORK.S, WORK.K, WORK.T
    matrices = c.num_layers * (32 * (4 + 2 * 2) * 8 + 4 * 8 * 32 + 3 * 32 * 48)
    head = c.vocab_size * 32
    pairs = S * S + K * T * (S + T)
    attention = 4 * c.num_layers * 4 * 8 * pairs
    tokens = 4 * (S + K * T)  # of a minibatch of 4 prompts
    update = phases()["update"]
    assert update.times == 2
    assert update.flops == 3 * 2 * matrices * tokens + 3 * 2 * head * 4 * K * T + 4 * 4 * attention
    score = phases()["score"]
    assert score.flops == 2 * matrices * tokens + 2 * head * 4 * K * T + 4 * attention
    decode = phases()["decode"]
    assert decode.times == T // 16  # tokens are drawn in calls of 16
    of_a_token = 2 * (matrices + head) + 4 * c.num_layers * 4 * 8 * (S + mean_cache_tokens(T))
    assert decode.flops == pytest.approx(16 * 32 * of_a_token)
    remat = phases(setting=dataclasses.replace(ALONE, remat=True))["update"]
    assert remat.flops - update.flops == score.flops - 2 * head * 4 * K * T
    assert remat.temporary < update.temporary
    # With room for two responses at once, a prompt runs twice.
    halves = phases(setting=dataclasses.replace(ALONE, token_budget=16 + 2 * 32))["score"]
    assert halves.flops > score.flops


def test_memory_by_hand():
    total, c = Sizes.of(CONFIG).total, CONFIG
    own = roofline.standing(WORK, ALONE)
    kv = 2 * c.num_layers * c.num_kv_heads * c.head_width * 2
    assert own == {
        "frozen weights": 0,
        "parameters": 4 * total,
        "optimizer": 8 * total,
        "reference": 0,
        "sampler's weights": 2 * total,
        "keys and values": 8 * (16 + 4 * 32) * kv,
    }
    spread = Setting(MeshSizes(2, 2, 2, decode_tensor=2), 144, False, rows=16)
    assert roofline.standing(WORK, spread) == {
        "frozen weights": 0,
        "parameters": total,
        "optimizer": 2 * total,
        "reference": 0,
        "sampler's weights": total,
        # Each of 4 shards has both of its prompts in the cache, one more prefilled, and 4 slots; 2 devices share it.
        "keys and values": (2 * 16 + 16 + 4 * (32 + 16)) * kv / 2,
    }
    assert spread.waves(WORK) == 2


def test_memory_of_moments_and_8_bits():
    """Moments in bfloat16 take half; on the host, none while sampling, and time for the way there and back."""
    total, plain = Sizes.of(CONFIG).total, phases()
    for state, sampling, updating in (("bfloat16", 4, 4), ("host", 0, 8)):
        work = dataclasses.replace(WORK, optimizer=state)
        assert roofline.standing(work, ALONE)["optimizer"] == sampling * total
        found = phases(work)
        assert plain["decode"].held - found["decode"].held == (8 - sampling) * total
        assert plain["update"].held - found["update"].held == (8 - updating) * total
        assert found["update"].host * 2 == pytest.approx(
            (state == "host") * 2 * 8 * total / roofline.HOST_LINK
        )
    eight = dataclasses.replace(WORK, kv_dtype="int8")
    bytes_of = lambda work: roofline.standing(work, ALONE)["keys and values"]  # noqa: E731
    assert bytes_of(eight) / bytes_of(WORK) == (CONFIG.head_width + 4) / (2 * CONFIG.head_width)


@pytest.mark.parametrize("T", [1, 64, 65, 100, 300])
def test_mean_cache_tokens_is_that_of_a_loop(T):
    size, total = min(64, T), 0
    for t in range(T):
        if t == size:
            size = min(2 * size, T)
        total += size
    assert mean_cache_tokens(T) == pytest.approx(total / T)


def test_what_a_ring_sends():
    assert Exchange("all-gather", 8.0, 4, 2).sent == 12
    assert Exchange("reduce-scatter", 8.0, 4, 1).sent == 24
    assert Exchange("all-reduce", 8.0, 4, 1).sent == 12
    assert Exchange("all-reduce", 8.0, 1, 1).sent == 0


def test_a_phase_takes_as_long_as_its_worst_resource():
    chip = topology.CHIPS["v5e"]
    phase = StepPhase(
        "update", 3, chip.peak, 2 * chip.bandwidth, 0, 0, (Exchange("all-to-all", chip.ring, 1, 1),)
    )
    assert phase.seconds(chip) == 3 * 2
    assert dataclasses.replace(phase, flops=5 * chip.peak).seconds(chip) == 3 * 5


def test_an_estimate_is_arithmetic(config_file, capsys):
    assert main(["plan", config_file(), "--topology", "h100:4", "--estimate", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["topology"], made["devices"], made["chip"]["name"]) == ("h100:4", 4, "h100")
    asked = made["asked"]
    assert asked["fits"] and asked["spare"] == made["chip"]["memory"] - asked["memory"]
    names = ["layout", "prefill", "decode", "score", "update"]
    assert [phase["name"] for phase in asked["phases"]] == names
    assert not any(phase["compiled"] for phase in asked["phases"])
    assert asked["seconds_per_step"] == pytest.approx(sum(phase["seconds"] for phase in asked["phases"]))
    assert 0 < asked["mfu"] < 1 and asked["tokens_per_second"] > 0


@pytest.mark.parametrize("peak", ["decode", "update"])
def test_moments_elsewhere_are_offered_where_sampling_needs_the_memory(capsys, peak):
    found = [dataclasses.replace(phase, temporary=1e9 * (name == peak)) for name, phase in phases().items()]
    proposal = plans.Proposal(ALONE, tuple(found), frozenset())
    show(plans.Plan(GPU, WORK, proposal, None, None, False, 0.0), "model")
    assert ("--optimizer.state=host would free" in capsys.readouterr().out) == (peak == "decode")


def test_text_names_memory_times_and_what_is_left_out(config_file, capsys):
    assert main(["plan", config_file(), "--topology", "h100:4", "--estimate"]) == 0
    text = capsys.readouterr().out
    for part in (
        "as configured",
        "parameters",
        "sampler's weights",
        "GB to spare",
        "tokens/s",
        "Not included",
    ):
        assert part in text
    assert "estimated" in text


def test_what_does_not_fit_is_said_with_exit_status_3(config_file, capsys, monkeypatch):
    small = dataclasses.replace(topology.CHIPS["h100"], memory=1e4)
    monkeypatch.setitem(topology.CHIPS, "h100", small)
    assert main(["plan", config_file(), "--topology", "h100:1", "--estimate"]) == 3
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in text and "GB too much" in text and "use a larger slice" in text


def test_a_setting_that_fits_is_suggested(run_config, tiny_model):
    sampling = {"num_responses": 4, "max_tokens": 100, "max_prompt_tokens": 16}
    training = {"prompts_per_step": 64, "updates_per_step": 2, "token_budget": 10**6, "remat": False}
    config = parse_config(run_config(sampling=sampling, training=training, mesh={"devices": 0}))
    made = plans.plan(config, GPU, CONFIG, (1,), check_config(config), estimate=True, suggest=False)
    tight = dataclasses.replace(GPU.chip, memory=0.6 * made.asked.memory)
    less = plans.plan(
        config, dataclasses.replace(GPU, chip=tight), CONFIG, (1,), check_config(config), estimate=True
    )
    assert less.spare(less.asked) < 0 <= less.spare(less.suggested)
    chosen = less.suggested.setting
    # Its command-line overrides give the same setting.
    again = plans.setting_of(override_config(config, chosen.overrides()), less.work, less.topology)
    assert again == chosen


def test_int8_weights_are_suggested_where_weights_are_most_of_the_traffic(run_config, capsys):
    pytest.importorskip("qwix")
    big = dataclasses.replace(
        CONFIG, width=4096, num_layers=36, num_heads=32, num_kv_heads=8, head_width=128, ffn_width=12288
    )
    sampling = {"num_responses": 4, "max_tokens": 1024, "max_prompt_tokens": 16}

    def plan(**training):
        training = {"prompts_per_step": 16, "updates_per_step": 2, **training}
        values = run_config(sampling=sampling, training=training, mesh={"devices": 0})
        config = parse_config(values | {"model": {**values["model"], "dtype": "bfloat16"}})
        return plans.plan(config, GPU, big, (1,), check_config(config))

    made = plan()
    found, without = made.with_int8, made.suggested or made.asked
    assert "--sampling.weights=int8" in found.setting.overrides()
    assert found.seconds(GPU.chip) < 0.95 * without.seconds(GPU.chip)
    weights = [
        roofline.standing(made.work, proposal.setting)["sampler's weights"] for proposal in (found, without)
    ]
    parts = [proposal.setting.mesh.decode_tensor for proposal in (found, without)]
    assert weights[0] * parts[0] == pytest.approx(weights[1] * parts[1] / 2, rel=0.01)
    show(made, "model")
    text = " ".join(capsys.readouterr().out.split())
    assert "with int8 weights" in text and "Assumed: the run learns as well" in text
    sampled = plan(behaviour="sampled")  # which int8 weights do not allow
    assert sampled.with_int8 is None
    # The trainer computes the log-probs of all samples then.
    assert found.setting.scorings(made.work) == made.work.rescorings == sampled.work.scorings + 2


def test_suggestions_are_measured_by_what_was_compiled(run_config):
    sampling = {"num_responses": 4, "max_tokens": 100, "max_prompt_tokens": 16}
    training = {"prompts_per_step": 64, "updates_per_step": 2, "token_budget": 10**6, "remat": False}
    config = parse_config(run_config(sampling=sampling, training=training, mesh={"devices": 0}))
    work = roofline.workload(config, CONFIG, frozenset(), False)

    def compiler(setting, name):  # whose updates take three times what arithmetic says
        phase = phases(work, setting)[name]
        return dataclasses.replace(phase, temporary=phase.temporary * (3 if name == "update" else 1))

    setting = plans.setting_of(config, work, GPU)
    search = plans._Search(work, GPU.chip, compiler, None)
    own = search.propose(setting, None)
    target = dataclasses.replace(GPU, chip=dataclasses.replace(GPU.chip, memory=0.4 * own.memory))
    search = dataclasses.replace(search, chip=target.chip)
    better = search.better(own, list(plans.settings(config, work, target)), search.scales(own))
    assert better.compiled == set(plans.DECISIVE)
    assert better.memory <= target.chip.memory < own.memory


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v7:4x4"], "known: v5e"),
        (["--topology", "h100:8", "--estimate", "--mesh.tensor=3"], "mesh"),
        (["--topology", "h100:4", "--estimate", "--mesh.devices=8"], "h100:4 has 4"),
        (["--topology", "h100:1", "--estimate", "--sampling.max_tokens=4096"], "positions"),
    ],
)
def test_mistakes_end_in_one_line(config_file, capsys, arguments, says):
    assert main(["plan", config_file(), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_time_of_compiling_is_not_that_of_a_step():
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), "float32"))
    made = measure("decode", 1, lowered, (), target=topology.parse_topology("v6e:2x2"))
    assert made.host == 0 < made.seconds_compiling and made.flops == 2 * 64**3


def test_a_mesh_that_does_not_fit_two_hosts(config_file, capsys):
    path = config_file(mesh={"devices": 0}, training={"prompts_per_step": 8})
    where = ["--topology", "2x h100:2", "--estimate"]
    assert main(["plan", path, *where, "--mesh.data=1", "--mesh.fsdp=4"]) == 2
    error = capsys.readouterr().err
    assert "mesh.data = 1: 2x h100:2 has 2 hosts" in error and error.count("\n") == 1
    assert main(["plan", path, *where, "--mesh.data=2", "--mesh.fsdp=2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2x h100:2: 4 x h100" in text and "all-reduce among 2 over the network" in text


def test_extrapolation_is_a_straight_line():
    few = StepPhase("decode", 5, 10.0, 100.0, 7.0, 3.0, (Exchange("all-reduce", 8.0, 2, 4),))
    more = StepPhase("decode", 5, 14.0, 120.0, 9.0, 3.0, (Exchange("all-reduce", 8.0, 2, 8),))
    far = extrapolate(few, more, 3)
    assert (far.flops, far.bytes, far.held, far.temporary) == (22.0, 160.0, 13.0, 3.0)
    assert far.exchanges == (Exchange("all-reduce", 8.0, 2, 16),)


def test_between_hosts_the_network_is_the_limit():
    chip = topology.CHIPS["h100"]
    inside, between = (
        StepPhase("update", 1, 0, 0, 0, 0, (Exchange("all-reduce", 1e9, 2, 1, n),)) for n in (1, 2)
    )
    assert inside.seconds(chip) == pytest.approx(1e9 / chip.link)
    assert between.seconds(chip) == pytest.approx(1e9 / chip.network)


def test_kernels_of_a_gpu_run_one_after_another():
    chip = topology.CHIPS["h100"]
    phase = StepPhase("decode", 2, 0, 0, 0, 0, launches=1000)
    assert phase.seconds(chip) == pytest.approx(2 * 1000 * chip.launch)
    assert dataclasses.replace(phase, busy=1.5).seconds(chip) == 3
    estimate = StepPhase("decode", 2, chip.peak, 0, 0, 0, launches=10)
    made = dataclasses.replace(estimate, flops=2 * estimate.flops, busy=6 / chip.peak_share)
    scale = plans._Scale.between(made, estimate, chip)
    assert scale.apart == pytest.approx(3)  # 6 seconds for what would take 2
    assert scale(estimate, chip).seconds(chip) == pytest.approx(made.seconds(chip))


def test_a_compiled_program_is_measured_without_the_time_to_compile_it():
    product = jax.jit(lambda x, y: x @ y).lower(*[jax.ShapeDtypeStruct((64, 64), "float32")] * 2)
    made = {
        name: measure("score", 1, product, (), target=topology.parse_topology(name))
        for name in ("h100:1", "v5e:1x1")
    }
    for name, phase in made.items():
        assert (phase.flops, phase.bytes, phase.launches) == (2 * 64**3, 3 * 4 * 64 * 64, 1)
        assert phase.seconds_compiling > 0 == phase.host
        assert (phase.busy > 0) == (name == "h100:1")  # kernels overlap on a TPU
        assert phase.seconds(topology.parse_topology(name).chip) < 1e-5


def test_adapters_need_neither_gradients_nor_moments_of_the_weights():
    trained = dataclasses.replace(WORK, adapters=1000, frozen=2)
    total = roofline.Sizes.of(CONFIG).total
    own = roofline.standing(trained, ALONE)
    assert (own["frozen weights"], own["parameters"], own["optimizer"]) == (2 * total, 4000, 8000)
    whole, adapted = phases()["update"], phases(trained)["update"]
    assert adapted.flops < whole.flops and adapted.temporary < whole.temporary
    assert roofline.model_flops(WORK) / roofline.model_flops(trained) < 6 / 4


def test_complaints_of_the_compiler_are_read():
    first = "required for HLO temporaries (137.44G) exceeds available HBM (95.73G). HLO module"
    second = (
        "Ran out of memory in memory space hbm. Used 34.29G of 31.25G hbm. Exceeded hbm capacity by 3.04G."
    )
    assert _needed(first, 1e9) == pytest.approx(137.44 * 2**30)
    assert _needed(second, 1e9) == pytest.approx(34.29 * 2**30 - 1e9)


def test_a_topology_that_libtpu_refuses():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'lpo_jax[plan]'")
    with pytest.raises(UserError, match="no such slice"):
        topology.tpu_devices(topology.parse_topology("v5e:3x4"))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a100", "h100", "h200", "b200"])
def test_a_tiny_model_compiled_for_gpus(config_file, capsys, chip):
    pytest.importorskip("jax_cuda12_plugin", reason="needs the CUDA plugin: pip install 'lpo_jax[plan-gpu]'")
    path = config_file(mesh={"devices": 0, "data": 2, "fsdp": 2}, training={"prompts_per_step": 8})
    assert main(["plan", path, "--topology", f"2x {chip}:2", "--no-suggest", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)["asked"]
    assert asked["fits"] and all(phase["compiled"] for phase in asked["phases"])
    assert all(phase["held"] > 0 and phase["bytes"] > 0 and phase["busy"] > 0 for phase in asked["phases"])
    update = asked["phases"][-1]
    # Weights are gathered inside a host, and only gradients and the loss cross the network.
    assert all(e["hosts"] == 1 for e in update["exchanges"] if e["kind"] == "all-gather")
    assert any(e["hosts"] == 2 for e in update["exchanges"] if e["kind"] == "all-reduce")


@pytest.mark.slow
def test_a_tiny_model_compiled_for_a_slice(config_file, capsys):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'lpo_jax[plan]'")
    path = config_file(mesh={"devices": 0})
    assert main(["plan", path, "--topology", "v5e:2x2", "--no-suggest", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)["asked"]
    assert asked["fits"] and all(phase["compiled"] for phase in asked["phases"])
    assert all(phase["held"] > 0 and phase["bytes"] > 0 for phase in asked["phases"])
