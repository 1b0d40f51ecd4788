"""The networks of ppo_tuxkart_resnet.py, held against the seeds' tables, and what PPO needs of them."""

import ast
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process, run

import ppo_tuxkart
import ppo_tuxkart_resnet
from ppo_tuxkart_resnet import Agent, pick, ppo_loss, ppo_update, random_shift, refresh_batch_norm

TABLE_2D = [  # channels and parameters of every layer, from the first to the last, as tuxkart-ai's table has them
    ((128, 149, 99), 64_128),
    ((128, 149, 99), 0),
    ((128, 149, 99), 256),
    ((128, 149, 99), 525_056),
    ((128, 74, 49), 262_272),
    ((128, 74, 49), 0),
    ((128, 74, 49), 256),
    ((128, 74, 49), 525_056),
]
HEADS_2D = {13: [((1, 74, 49), 1_153), ((1, 74, 49), 0), ((3626,), 0), ((13,), 47_151)]}
HEADS_2D[1] = [((1, 74, 49), 1_153), ((1, 74, 49), 0), ((3626,), 0), ((1,), 3_627)]

EARLY, LATE = (256, 3, 200, 300), (256, 1, 66, 100)
TABLE_3D = [(EARLY, 20_992), (EARLY, 512)] + [(EARLY, 1_769_472), (EARLY, 512)] * 10
TABLE_3D += [(LATE, 1_769_728), (LATE, 512)] + [(LATE, 1_769_472), (LATE, 512)] * 10
TABLE_3D += [((64, 1, 66, 100), 442_432), ((64, 1, 66, 100), 128), ((1, 1, 66, 100), 1_729), ((1, 1, 66, 100), 2)]
TABLE_3D += [((15,), 99_015), ((1, 1, 66, 100), 6_913), ((1, 1, 66, 100), 2), ((1,), 6_601)]
SMALL = {"impala": 4, "conv2d": 8, "resnet3d": 4, "ec418": 8}


def rows_of(agent, observation_shape, kind):
    """Output shape and number of parameters of every module of a kind, in the order of the forward pass."""
    rows, hooks = [], []
    for module in agent.modules():
        if isinstance(module, kind):
            hooks.append(module.register_forward_hook(lambda module, _, output: rows.append(
                (tuple(output.shape[1:]), sum(parameter.numel() for parameter in module.parameters()))
            )))  # fmt: skip
    agent(torch.zeros(1, *observation_shape, dtype=torch.uint8, device="meta"), torch.zeros(1, 0, device="meta"), None)
    for hook in hooks:
        hook.remove()
    return rows


def count(agent):
    return sum(parameter.numel() for parameter in agent.parameters())


def test_every_row_of_the_2d_table():
    with torch.device("meta"):
        agent = Agent((5, 600, 400), [2, 2, 3, 2, 2, 2], "conv2d", 128, 4, "stack")
    assert count(agent) == 1_430_108
    trunk = [module for module in agent.trunk]
    shapes = rows_of(agent, (5, 600, 400), (torch.nn.Conv2d, torch.nn.Linear, ppo_tuxkart_resnet.Residual2d))
    found, x = [], torch.zeros(1, 5, 600, 400, device="meta")
    for module in trunk:
        x = module(x)
        found.append((tuple(x.shape[1:]), count(module)))
    assert found == TABLE_2D
    for head, outputs in ((agent.policy, 13), (agent.value, 1)):
        y, found = x, []
        for module in head:
            y = module(y)
            found.append((tuple(y.shape[1:]), count(module)))
        assert found == HEADS_2D[outputs]
    assert len(shapes) == 2 + 2 + 4 + 4  # trunk's own, residuals, theirs, heads'


def test_every_row_of_the_3d_table():
    with torch.device("meta"):
        agent = Agent((15, 400, 600), [2, 2, 3, 2, 2, 2, 2], "resnet3d", 256, 5, "stack")
    assert count(agent) == 37_748_246
    kinds = torch.nn.Conv3d, torch.nn.BatchNorm3d, torch.nn.Linear
    assert rows_of(agent, (15, 400, 600), kinds) == TABLE_3D


SEEDS = {
    "conv2d": (["--width", 400, "--height", 600, "--actions", "tuxkart"], "1,430,108", 2),
    "resnet3d": (["--width", 600, "--height", 400, "--actions", "tuxkart_rescue"], "37,748,246", 10),
}


@pytest.mark.parametrize("network", SEEDS)
def test_the_summary_comes_to_the_seeds_total(network, tmp_path):
    options, total, residuals = SEEDS[network]
    finished = run("--summary", "--network", network, *options, cwd=tmp_path, script="ppo_tuxkart_resnet")
    assert finished.returncode == 0, finished.stderr
    assert f"Total params: {total}\n" in finished.stdout and not list(tmp_path.iterdir())
    assert finished.stdout.count("─Res") == residuals


def test_impala_has_fifteen_layers_with_weights():
    agent = Agent((6, 64, 64), [5, 3, 2, 2], "impala", 16, 2, "stack")
    layers = [module for module in agent.trunk.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 16 and len([layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]) == 15
    assert [layer.out_channels for layer in layers if isinstance(layer, torch.nn.Conv2d)] == [16] * 5 + [32] * 10


def test_ec418_is_two_networks_behind_a_norm():
    agent = Agent((1, 64, 64), [16], "ec418", 32, 1, "stack")
    nature = 1 * 32 * 64 + 32 + 32 * 64 * 16 + 64 + 64 * 64 * 9 + 64 + 1024 * 512 + 512
    assert count(agent) == 2 * (2 + nature) + 513 * 16 + 513


def settings(**changes):
    return ppo_tuxkart_resnet.complete(ppo_tuxkart_resnet.Args(**changes))


def rollout(network, memory="stack", steps=8, envs=4):
    """A network and a batch (T, N, ...) that it sampled on random pictures, LSTM and episodes' ends included."""
    torch.manual_seed(0)
    args = settings(network=network, memory=memory, base_channels=SMALL[network], num_minibatches=2, epochs=1)
    channels = args.frame_stack * (3 if args.color == "rgb" else 1) + (network == "conv2d")
    shape = (channels, 64, 64)
    agent = Agent(shape, [5, 3, 2, 2], network, SMALL[network], args.frame_stack, memory)
    obs = torch.randint(0, 255, (steps, envs, *shape), dtype=torch.uint8)
    refresh_batch_norm(agent, obs.flatten(0, 1), 1.0, 256)
    starts = torch.rand(steps, envs) < 0.3
    state = torch.randn(envs, agent.state_size)
    batch = {"obs": obs, "starts": starts, "state": state, "own": torch.rand(steps, envs) < 0.8}
    batch |= {"advantages": torch.randn(steps, envs), "returns": torch.randn(steps, envs)}
    rows = []
    with torch.no_grad():
        for t in range(steps):
            logits, values, state = agent(obs[t], state, starts[t])
            actions = ppo_tuxkart_resnet.choose_actions(logits, agent.nvec)
            rows.append((actions, ppo_tuxkart_resnet.evaluate_actions(logits, actions, agent.nvec)[0], values))
    batch |= dict(zip(("actions", "logprobs", "values"), map(torch.stack, zip(*rows, strict=True)), strict=True))
    return agent, batch, args


CASES = [("impala", "stack"), ("impala", "lstm"), ("conv2d", "stack"), ("resnet3d", "stack"), ("ec418", "stack")]


@pytest.mark.parametrize(("network", "memory"), CASES)
def test_the_first_ratio_is_one_and_stays_so_after_the_norms_moved(network, memory):
    agent, batch, args = rollout(network, memory)
    units = torch.arange(4 if memory == "lstm" else 32)
    for rows in units.split(2):
        piece = pick(batch, rows)
        _, scalars = ppo_loss(agent, piece, args, (len(piece["returns"]), int(piece["own"].sum())))
        assert scalars["losses/ratio_error"] < 2e-6


@pytest.mark.parametrize(("network", "memory"), CASES)
def test_pieces_of_a_minibatch_add_up_to_its_gradient(network, memory):
    agent, batch, args = rollout(network, memory)
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    results = []
    for pieces in (1, 2):
        agent.load_state_dict(before)
        optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
        torch.manual_seed(1)
        args.grad_accum = pieces
        scalars = ppo_update(agent, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch, args)
        results.append(({key: value.clone() for key, value in agent.state_dict().items()}, scalars))
    (ours, scalars), (theirs, others) = results
    assert any(not torch.equal(ours[key], before[key]) for key in ours)
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], rtol=1e-4, atol=1e-5)
    assert scalars == pytest.approx(others, rel=1e-3, abs=1e-5)


def test_the_norms_see_all_games_and_no_more_pictures_than_they_may():
    agent = Agent((3, 64, 64), [5], "ec418", 4, 1, "stack")
    obs = torch.zeros(16, 8, 3, 64, 64, dtype=torch.uint8)
    obs[:, 5] = 255  # one of eight games is bright
    norm = agent.policy[0]
    refresh_batch_norm(agent, obs.flatten(0, 1), 1.0, 128)
    assert norm.running_mean.item() == pytest.approx(1 / 8) and not agent.training
    torch.manual_seed(0)
    refresh_batch_norm(agent, obs.flatten(0, 1), 1.0, 64)  # every other picture would miss game 5
    assert 0.02 < norm.running_mean.item() < 0.3
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    refresh_batch_norm(agent, obs.flatten(0, 1), 0.1, 4)
    refresh_batch_norm(agent, obs.flatten(0, 1), 0.1, 4, 3)
    assert seen == [4, 2, 1, 1]


def test_norms_that_see_pieces_find_what_they_find_in_one():
    obs = torch.randint(0, 255, (12, 3, 64, 64), dtype=torch.uint8) // torch.arange(1, 13).view(12, 1, 1, 1)
    found = []
    for pieces in (1, 4):
        agent = Agent((3, 64, 64), [5], "ec418", 4, 1, "stack")
        refresh_batch_norm(agent, obs, 1.0, 12, pieces)
        norm = agent.policy[0]
        refresh_batch_norm(agent, obs // 2, 0.25, 12, pieces)
        found.append((norm.running_mean.item(), norm.running_var.item()))
    pictures = obs.float().mean(1) / 255
    halves = (obs // 2).float().mean(1) / 255
    expected = [0.75 * pictures.mean() + 0.25 * halves.mean(), 0.75 * pictures.var() + 0.25 * halves.var()]
    assert found[0] == pytest.approx([value.item() for value in expected], rel=1e-3)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_ec418_sees_the_mean_of_the_colours():
    agent = Agent((6, 64, 64), [5], "ec418", 4, 2, "stack")
    pictures = torch.rand(2, 6, 64, 64)
    expected = torch.stack([pictures[:, :3].mean(1), pictures[:, 3:].mean(1)], 1)
    torch.testing.assert_close(agent.trunk(pictures), expected)


@pytest.mark.parametrize(
    ("changes", "units"), [({"memory": "lstm"}, 2), ({"num_envs": 1, "num_steps": 16, "total_timesteps": 16}, 2)]
)
def test_a_minibatch_is_not_split_into_more_pieces_than_it_has(changes, units):
    args = settings(grad_accum=units, **changes)
    ppo_tuxkart_resnet.check_args(args)
    rollout_bytes, minibatch_bytes, _ = ppo_tuxkart_resnet.memory_needs(args, ppo_tuxkart_resnet.describe_setting(args))
    assert rollout_bytes == args.num_envs * args.num_steps * 3 * args.frame_stack * 64 * 64 < minibatch_bytes
    with pytest.raises(ppo_tuxkart_resnet.UsageError, match=f"type {units} or less"):
        ppo_tuxkart_resnet.check_args(settings(grad_accum=units + 1, **changes))


def test_a_minibatch_in_pieces_needs_as_much_less_memory():
    whole, eighth = (
        ppo_tuxkart_resnet.memory_needs(args, ppo_tuxkart_resnet.describe_setting(args))[1]
        for args in (settings(augment="shift"), settings(grad_accum=8))
    )
    assert whole == 2 * 8 * eighth  # shifted pictures are a second pass


def count_starts():
    """How often each of two games' policy is told that an episode starts, in races of five seeds; runs the game."""
    args = settings(memory="lstm", max_seconds=3.0, width=36, height=36)
    games = ppo_tuxkart_resnet.Games([ppo_tuxkart_resnet.make_env(args, "scotland")] * 2)
    told = []

    def policy(obs, starts):
        told.append(starts.copy())
        return np.zeros((2, 4), np.int64)

    try:
        races = ppo_tuxkart_resnet.run_races(games, policy, range(5))
    finally:
        games.close()
    return len(races), int(np.sum(told)), len(told)


def test_a_race_starts_once():
    races, starts, decisions = in_process(count_starts)
    assert races == starts == 5 and decisions > 30


def pass_a_near_finish():
    """Drives straight over a finish line that is next to the start; what centerline paid by itself, and the info."""
    env = ppo_tuxkart_resnet.PictureEnv(track="scotland", reward=("progress", "centerline"))
    env.reset(seed=1)
    env.finish_line = 0.01
    paid, over = 0.0, False
    while not over:
        _, _, over, _, info = env.step([2, 0, 0, 0])
        _, offset, _, width = env.geometry.locate(env.location)
        paid += ppo_tuxkart_resnet.centerline_reward(ppo_tuxkart_resnet.Moment(0.0, 0.15, offset, width))
    env.close()
    assert info["end"] == "finish line"
    return paid, info


def test_a_moving_finish_pays_the_finish_and_nothing_else_again():
    paid, info = in_process(pass_a_near_finish)
    assert info["reward/progress"] > 20
    assert info["reward/centerline"] == pytest.approx(paid, abs=1e-6)


def test_random_bursts_do_not_teach_the_policy():
    agent, batch, args = rollout("impala")
    piece = pick(batch, torch.arange(32))
    args.vf_coef = args.ent_coef = 0.0
    totals = (32, int(piece["own"].sum()))
    loss = ppo_loss(agent, piece, args, totals)[0]
    foreign = ~piece["own"]
    assert foreign.any()
    changed = piece | {"advantages": torch.where(foreign, 100.0, piece["advantages"])}
    changed["logprobs"] = torch.where(foreign, -3.0, piece["logprobs"])
    torch.testing.assert_close(ppo_loss(agent, changed, args, totals)[0], loss)


def what_is_left_of_bursts(agent):
    """Of a burst of four, after an episode's first decision, and of another after its last; runs the game."""
    args = settings(num_envs=1, num_steps=1, width=36, height=36, max_seconds=0.3, random_start=0.0)
    sampler = ppo_tuxkart_resnet.Sampler(args, torch.device("cpu"), 0)
    left = []
    try:
        sampler.reset(1)
        for _ in range(2):  # the second decision ends the episode
            sampler.burst.fill_(4)
            sampler.collect(agent)
            left.append(int(sampler.burst))
    finally:
        sampler.close()
    return left


def test_a_burst_ends_with_its_episode():
    args = settings(base_channels=4, width=36, height=36)
    agent = Agent((6, 36, 36), [5, 3, 2, 2], "impala", 4, args.frame_stack, "stack")
    assert in_process(what_is_left_of_bursts, agent) == [4, 0]


@pytest.mark.parametrize("own", [0, 1])
def test_a_minibatch_that_is_all_bursts_teaches_the_value_alone(own):
    agent, batch, args = rollout("impala")
    batch["own"] = torch.arange(32).view(8, 4) < own
    args.num_minibatches, args.ent_coef = 1, 0.0
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    scalars = ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), torch.amp.GradScaler("cpu", enabled=False),
                         batch, args)  # fmt: skip
    assert all(np.isfinite(value) for value in scalars.values()) and scalars["losses/policy_loss"] == 0
    assert torch.equal(agent.policy.weight, before["policy.weight"])
    assert not torch.equal(agent.value.weight, before["value.weight"])


class Loaded(ppo_tuxkart_resnet.PictureEnv):
    """Its kart holds what a test would have to drive for."""

    position, powerup = 3, types.SimpleNamespace(value=5)
    attachment = types.SimpleNamespace(value=2, name="BOMB")
    _kart = types.SimpleNamespace(
        energy=10.0, powerup=types.SimpleNamespace(type=powerup), attachment=types.SimpleNamespace(type=attachment)
    )


def test_the_information_picture_has_four_bands():
    env = Loaded(color="gray", info_picture=True, num_karts=4, width=36, height=38)
    picture = env._info_picture()
    assert picture.shape == (38, 36) and (picture == picture[:, :1]).all()
    bands = [band[:, 0] for band in np.array_split(picture, 4)]
    assert [set(band.tolist()) for band in bands] == [{128}, {128}, {128}, {76}]  # 0.3 x 255 = 76.5, to even


def test_an_lstm_forgets_at_the_start_of_an_episode():
    agent, batch, _ = rollout("impala", "lstm")
    obs, state = batch["obs"][0], batch["state"]
    fresh = agent(obs, torch.zeros_like(state), torch.zeros(4, dtype=torch.bool))
    reset, kept = (agent(obs, state, torch.full((4,), start)) for start in (True, False))
    for ours, theirs in zip(reset, fresh, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(kept[1], fresh[1])


def test_random_shift_moves_every_picture_by_itself():
    torch.manual_seed(0)
    obs = torch.randint(0, 255, (16, 3, 12, 10), dtype=torch.uint8)
    alike = random_shift(obs[:4].repeat(3, 1, 1, 1), 4, pad=2)  # three decisions of four environments
    assert torch.equal(alike[:4], alike[4:8]) and torch.equal(alike[:4], alike[8:])
    shifted = random_shift(obs, 16, pad=2)
    padded = np.pad(obs.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    places = set()
    for before, after in zip(padded, shifted.numpy(), strict=True):
        found = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if np.array_equal(before[:, down : down + 12, right : right + 10], after)
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 5


@pytest.mark.parametrize("memory", ["stack", "lstm"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_keeps_the_ratio_at_one_and_finite_gradients(amp, memory):
    agent, batch, args = rollout("impala", memory)
    agent.amp = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    with torch.no_grad():
        logits, values, state = agent(batch["obs"].flatten(0, 1), batch["state"], batch["starts"].flatten())
    assert state.dtype == torch.float32
    assert logits.dtype == values.dtype == torch.float32
    logprobs = ppo_tuxkart_resnet.evaluate_actions(logits, batch["actions"].flatten(0, 1), agent.nvec)[0]
    batch["logprobs"] = logprobs.view(8, 4)
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", enabled=amp == "fp16", init_scale=256.0)
    scalars = ppo_update(agent, torch.optim.Adam(agent.parameters(), lr=1e-3), scaler, batch, args)
    assert scalars["losses/ratio_error"] < 1e-2
    after = agent.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), None])
def test_a_full_memory_names_the_flags(error, monkeypatch, capsys):
    def train(*_):
        if error:
            raise error
        torch.empty(1 << 50)

    monkeypatch.setattr(ppo_tuxkart_resnet, "train", train)
    monkeypatch.setattr("sys.argv", ["ppo_tuxkart_resnet.py"])
    with pytest.raises(SystemExit) as ended:
        ppo_tuxkart_resnet.main()
    assert ended.value.code == 1 and "--grad-accum" in capsys.readouterr().err


def source(module):
    """Every top-level function and class of a script, as text."""
    text = (ROOT / f"{module.__name__}.py").read_text()
    tree = ast.parse(text)
    definitions = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.get_source_segment(text, node) for node in tree.body if isinstance(node, definitions)}


def test_what_both_scripts_have_is_the_same_to_the_letter():
    first, second = source(ppo_tuxkart), source(ppo_tuxkart_resnet)
    differ = {name for name in first if first[name] != second.get(name)}
    own = {"Args", "Agent", "ppo_loss", "ppo_update", "Sampler", "make_env", "run_races", "network_policy", "evaluate"}
    own |= {"evaluate_track", "load_weights", "describe_setting", "train", "check_args", "parse", "main"}
    assert differ == own


def test_the_environments_text_is_the_same_to_the_letter():
    """From its rule to the environment's end, with what stands between the definitions."""
    ends = {"ppo_tuxkart": 'if "TuxKart-v0"', "ppo_tuxkart_resnet": "class PictureEnv"}
    texts = [(ROOT / f"{name}.py").read_text() for name in ends]
    first, second = (
        text[text.index("# The game:") : text.index(end)] for text, end in zip(texts, ends.values(), strict=True)
    )
    assert first.rstrip() == second.rstrip() and "class TuxKartEnv" in first
