"""The deep networks against the seeds' tables, what PPO needs of them, the LSTM's memory, and tuxkart-ai's game."""

import types
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import in_own_process, metrics, run, slow
from torch import nn

import ppo_tuxkart_lstm as recurrent
import ppo_tuxkart_resnet as deep
from ppo_tuxkart_resnet import ACTIONS, Agent, Args, Moment, PictureEnv, ppo_loss, ppo_update, refresh_batch_norm

# output shape and parameters of every layer, as tuxkart-ai's tables have them
WIDE, NARROW, PLANE = (128, 149, 99), (128, 74, 49), (1, 74, 49)
TABLE_2D = [(WIDE, 64_128), (WIDE, 0), (WIDE, 256), (WIDE, 525_056)]
TABLE_2D += [(NARROW, 262_272), (NARROW, 0), (NARROW, 256), (NARROW, 525_056)]
TABLE_2D += [(PLANE, 1_153), (PLANE, 0), ((3626,), 0), ((13,), 47_151)]
TABLE_2D += [(PLANE, 1_153), (PLANE, 0), ((3626,), 0), ((1,), 3_627)]
EARLY, LATE = (256, 3, 200, 300), (256, 1, 66, 100)
TABLE_3D = [(EARLY, 20_992), (EARLY, 512)] + [(EARLY, 1_769_472), (EARLY, 512)] * 10
TABLE_3D += [(LATE, 1_769_728), (LATE, 512)] + [(LATE, 1_769_472), (LATE, 512)] * 10
TABLE_3D += [((64, 1, 66, 100), 442_432), ((64, 1, 66, 100), 128), ((1, 1, 66, 100), 1_729), ((1, 1, 66, 100), 2)]
TABLE_3D += [((15,), 99_015), ((1, 1, 66, 100), 6_913), ((1, 1, 66, 100), 2), ((1,), 6_601)]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def rows_of(agent, modules, obs_shape):
    """Output shape and parameters of some modules, in the order in which they compute."""
    rows = []
    for module in modules:
        module.register_forward_hook(
            lambda module, inputs, output: rows.append((tuple(output.shape[1:]), count(module)))
        )
    agent(torch.zeros(1, *obs_shape, dtype=torch.uint8, device="meta"))
    return rows


def test_every_row_of_the_seeds_tables():
    with torch.device("meta"):
        flat = Agent((5, 600, 400), [2, 2, 3, 2, 2, 2], Args(network="conv2d"))
        deeper = Agent((15, 400, 600), [2, 2, 3, 2, 2, 2, 2], Args(network="resnet3d"))
    assert rows_of(flat, [*flat.trunk, *flat.policy, *flat.value], (5, 600, 400)) == TABLE_2D
    kinds = nn.Conv3d | nn.BatchNorm3d | nn.Linear
    modules = [module for module in deeper.modules() if isinstance(module, kinds)]
    assert rows_of(deeper, modules, (15, 400, 600)) == TABLE_3D
    assert count(flat) == 1_430_108 and count(deeper) == 37_748_246


def test_impala_has_fifteen_layers_and_ec418_two_networks_behind_a_norm():
    agent = Agent((6, 64, 64), [5, 3, 2, 2], Args())
    convolutions = [module for module in agent.trunk.modules() if isinstance(module, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [16] * 5 + [32] * 10
    agent = Agent((3, 64, 64), [16], Args(network="ec418", frame_stack=1))
    nature = 1 * 32 * 64 + 32 + 32 * 64 * 16 + 64 + 64 * 64 * 9 + 64 + 1024 * 512 + 512
    assert count(agent) == 2 * (2 + nature) + 513 * 16 + 513
    pictures = torch.rand(2, 6, 64, 64)
    expected = torch.stack([pictures[:, :3].mean(1), pictures[:, 3:].mean(1)], 1)
    torch.testing.assert_close(Agent((6, 64, 64), [5], Args(network="ec418")).trunk(pictures), expected)


CHANNELS = {"impala": 4, "conv2d": 8, "resnet3d": 4, "ec418": 8}


def rollout(network, **settings):
    """A network and a batch (B, ...) that it sampled on random pictures, a few at a time."""
    torch.manual_seed(0)
    settings = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "epochs": 1} | settings
    args = Args(network=network, base_channels=CHANNELS[network], total_timesteps=32, **settings)
    channels = args.frame_stack * (3 if args.color == "rgb" else 1) + args.info_picture
    agent = Agent((channels, 64, 64), [5, 3, 2, 2], args)
    batch = {"obs": torch.randint(0, 255, (32, channels, 64, 64), dtype=torch.uint8)}
    refresh_batch_norm(agent, batch["obs"], 1.0, args)
    with torch.no_grad():
        logits, batch["values"] = map(torch.cat, zip(*map(agent, batch["obs"].split(4)), strict=True))
    batch["actions"] = deep.choose_actions(logits, agent.nvec, 0.0)
    batch["logprobs"], _ = deep.evaluate_actions(logits, batch["actions"], agent.nvec, 0.0)
    return agent, batch | {name: torch.randn(32) for name in ("advantages", "returns")}, args


def update(agent, batch, args, optimizer=None, scaler=None):
    """Scalars of a whole update, with plain gradient steps unless told otherwise."""
    torch.manual_seed(1)
    optimizer = optimizer or torch.optim.SGD(agent.parameters(), lr=1.0)
    return ppo_update(agent, optimizer, scaler or torch.amp.GradScaler("cpu", enabled=False), batch, args)


def weights_of(agent):
    return {name: value.detach().clone() for name, value in agent.named_parameters()}


@pytest.mark.parametrize("network", CHANNELS)
def test_the_first_ratio_is_one_though_the_norms_have_moved(network):
    agent, batch, args = rollout(network)
    for rows in torch.arange(32).split(2):
        _, scalars = ppo_loss(agent, {name: batch[name][rows] for name in batch}, args)
        assert scalars["losses/ratio_error"] < 2e-6


@pytest.mark.parametrize("network", CHANNELS)
def test_pieces_of_a_minibatch_add_up_to_its_gradient(network):
    results = []
    for pieces in (1, 2):
        agent, batch, args = rollout(network, num_minibatches=1)
        args.grad_accum = pieces
        before = weights_of(agent)
        results.append((update(agent, batch, args), weights_of(agent)))
    (scalars, ours), (others, theirs) = results
    assert any(not torch.equal(ours[name], before[name]) for name in ours)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-5)
    assert scalars == pytest.approx(others, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_keeps_the_ratio_near_one_and_the_gradient_finite(amp):
    agent, batch, args = rollout("impala", amp=amp)
    before = weights_of(agent)
    scaler = torch.amp.GradScaler("cpu", enabled=amp == "fp16", init_scale=256.0)
    scalars = update(agent, batch, args, torch.optim.Adam(agent.parameters(), lr=1e-3), scaler)
    assert scalars["losses/ratio_error"] < 2e-2 and batch["values"].dtype == torch.float32
    after = agent.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_an_lstm_remembers_its_episode_and_no_other():
    """Each game again by itself, on random pictures: what it knows outlasts a rollout, but no episode."""
    torch.manual_seed(0)
    obs, last_obs = np.random.default_rng(0).integers(0, 256, (2, 13, 4, 3, 64, 64)).astype(np.uint8)
    chance, rewards = np.random.default_rng(0).random((2, 12, 4))
    infos = [{"final_info": {"end": chance[t]}, "final_obs": last_obs[t]} for t in range(12)]
    steps = zip(obs[1:], rewards, chance < 0.2, chance > 0.7, infos, strict=True)
    games = mock.Mock(reset_wait=lambda _: (obs[0], {}), step_wait=lambda _: next(steps))
    agent = recurrent.Agent((3, 64, 64), [5, 3])
    assert count(agent.lstm) == 4 * 256 * (512 + 256 + 2) and count(agent) == 1_391_529
    shown = recurrent.reset_games(games, range(4))
    first, shown, _ = recurrent.rollout(games, agent, shown, 6)
    second, _, _ = recurrent.rollout(games, agent, shown, 6)
    data = {name: torch.cat([first[name], second[name]]) for name in first}
    cut_off, going_on = data["dones"] & ~data["terminations"], ~data["dones"][:-1]
    assert cut_off.sum() > 3 and data["terminations"].sum() > 3
    torch.testing.assert_close(data["next_values"][:-1][going_on], data["values"][1:][going_on])
    for i in range(4):
        memory, starts = torch.zeros(1, 512), torch.tensor([False])
        for t in range(12):
            with torch.no_grad():
                _, value, memory = agent(data["obs"][t, i : i + 1], memory, starts)
                _, last_value, _ = agent(torch.from_numpy(last_obs[t, i : i + 1]), memory, starts)
            torch.testing.assert_close(data["values"][t, i], value[0])
            if cut_off[t, i]:
                torch.testing.assert_close(data["next_values"][t, i], last_value[0])
            memory = memory * ~data["dones"][t, i]
    args = recurrent.Args(num_envs=4, num_steps=6, num_minibatches=2)
    batch = second | {name: torch.randn(6, 4) for name in ("advantages", "returns")}
    metrics = recurrent.ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, args)
    assert metrics["losses/ratio_error"] < 2e-6 < metrics["losses/approx_kl"]  # in the first minibatch, in all


def test_norms_that_see_pieces_find_what_they_find_in_one():
    obs = torch.randint(0, 255, (12, 3, 64, 64), dtype=torch.uint8) // torch.arange(1, 13).view(12, 1, 1, 1)
    found = []
    for pieces in (1, 4):
        args = Args(network="ec418", base_channels=4, frame_stack=1, num_envs=12, num_steps=1, num_minibatches=1)
        args.grad_accum = pieces
        agent = Agent((3, 64, 64), [5], args)
        refresh_batch_norm(agent, obs, 1.0, args)
        refresh_batch_norm(agent, obs // 2, 0.25, args)
        norm = agent.policy[0]
        found.append((norm.running_mean.item(), norm.running_var.item()))
    pictures, halves = obs.float().mean(1) / 255, (obs // 2).float().mean(1) / 255
    expected = [0.75 * pictures.mean() + 0.25 * halves.mean(), 0.75 * pictures.var() + 0.25 * halves.var()]
    assert found[0] == pytest.approx([value.item() for value in expected], rel=1e-3)
    assert found[1] == pytest.approx(found[0], rel=1e-3) and not agent.training


def test_random_shift_moves_every_picture_by_itself():
    torch.manual_seed(0)
    obs = torch.randint(0, 255, (16, 3, 12, 10), dtype=torch.uint8)
    shifted = deep.random_shift(obs, pad=2)
    padded = np.pad(obs.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    places = set()
    for before, after in zip(padded, shifted.numpy(), strict=True):
        windows = {(y, x): before[:, y : y + 12, x : x + 10] for y in range(5) for x in range(5)}
        found = [place for place, window in windows.items() if np.array_equal(window, after)]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 5


# --- tuxkart-ai's game


def test_tuxkart_pays_for_what_begins():
    def reward(**values):
        return deep.REWARDS["tuxkart"](Moment(values.pop("gain", 0.0), 0.15, **values))

    assert reward(gain=2.0) == 2.0 and reward(finished=True) == 10.0 and reward(places=-2) == -10.0
    prices = {"powerup": 3, "use": 1, "nitro": 3, "drift": 3, "jump": -3, "rescue": -5}
    for event, price in prices.items():
        assert reward(events=(event,)) == price
    assert reward(gain=1.0, events=tuple(prices)) == 1.0 + sum(prices.values())


def test_action_sets_have_the_sizes_of_their_sources():
    sizes = {name: sum(choices(3)) for name, (choices, _) in ACTIONS.items()}
    assert sizes == {"skid": 12, "drive": 12, "ec418": 16, "deepracer": 21, "tuxkart": 13, "tuxkart_rescue": 15}
    controls = ACTIONS["tuxkart_rescue"][1]([1, 0, 2, 1, 0, 1, 1], 5.0, ())
    assert controls == {
        "acceleration": 1.0, "brake": False, "steer": 1.0, "fire": True, "drift": False, "nitro": True,
        "rescue": True, "pace": 1.0,
    }  # fmt: skip


def test_the_information_picture_has_four_bands():
    env = PictureEnv(color="gray", info_picture=True, num_karts=4, width=36, height=38)
    powerup = types.SimpleNamespace(type=types.SimpleNamespace(value=5))
    attachment = types.SimpleNamespace(type=types.SimpleNamespace(value=2, name="BOMB"))
    env.kart, env.place = types.SimpleNamespace(energy=10.0, powerup=powerup, attachment=attachment), 3
    env.frames = np.zeros((2, 3, 38, 36), np.uint8)
    env.frames[1, 0] = 100  # red
    info, old, new = env.observation()
    assert (info == info[:, :1]).all() and not old.any() and (new == 30).all()  # 0.299 of the red
    bands = [set(band[:, 0].tolist()) for band in np.array_split(info, 4)]
    assert bands == [{128}, {128}, {128}, {76}]  # 0.3 x 255 = 76.5, to even


@slow
@in_own_process
def test_a_drift_pays_when_it_earns_a_boost(engine):
    """Held; tapped; held for long with a short pause, where the game gives no second boost; with a long one."""
    env = PictureEnv(engine=engine, random_start=0.0, actions="drive")
    deep.REWARDS["tuxkart"] = lambda moment: float("drift" in moment.events)
    env.weights = {"tuxkart": 1.0}
    patterns = ([1] * 20, [1, 0] * 10, [*[1] * 7, 0, *[1] * 7], [*[1] * 8, *[0] * 6, *[1] * 8])
    for pattern, boosts in zip(patterns, (1, 0, 1, 2), strict=True):
        env.reset(seed=0)
        while env.speed <= 1.2 * deep.BOOST_SPEED:
            env.step([2, 0, 0, 0])
        assert sum(env.step([2, 0, drift, 0])[1] for drift in pattern) == boosts


@slow
@in_own_process
def test_a_finish_that_is_near_pays_like_the_finish_and_a_burst_is_random(engine):
    env = PictureEnv(engine=engine, random_start=0.0, actions="tuxkart", color="gray")
    env.finish_line = 0.01
    assert env.reset(seed=1)[0].shape == (2, 64, 64)
    over, reward, info = False, 0.0, {}
    while not over:
        _, reward, over, _, info = env.step([1, 0, 1, 0, 0, 0])
    assert info["end"] == "finish line" and reward > 20 and not info["finished"]
    env.finish_line, env.game.random_action_prob = 1.0, 1.0
    pictures = []
    for seed in (2, 3):  # the same decisions, other bursts
        env.reset(seed=seed)
        pictures.append([env.step([1, 0, 1, 0, 0, 0])[0].copy() for _ in range(10)])
    assert not np.array_equal(*pictures)


SIZE = "--num-envs 2 --num-steps 16 --num-minibatches 2 --epochs 1 --total-timesteps 64 --eval-interval 0".split()
DEEP = {
    "impala": "--base-channels 4 --random-action-prob 0.1 --moving-finish --augment shift",
    "conv2d": "--network conv2d --base-channels 8 --amp bf16 --grad-accum 2 --actions tuxkart --reward tuxkart",
    "resnet3d": "--network resnet3d --base-channels 4 --actions tuxkart_rescue --num-karts 3 --width 48 --height 48",
    "ec418": "--network ec418 --base-channels 8 --actions ec418 --reward ec418 --color gray",
}


@slow
@pytest.mark.parametrize("case", DEEP)
def test_deep_networks_are_learnt_and_raced(case, tmp_path):
    where = {"cwd": tmp_path, "script": "ppo_tuxkart_resnet"}
    learnt = run(*DEEP[case].split(), *SIZE, "--name", "deep", **where)
    assert learnt.returncode == 0, learnt.stderr
    rows = metrics(tmp_path / "runs" / "deep")
    assert list(rows) == [32, 64]
    assert max(row["losses/ratio_error"] for row in rows.values()) < (0.05 if "amp" in DEEP[case] else 1e-4)
    patch = "script.LAP_SECONDS = 5.0"
    raced = run("--evaluate", "runs/deep/last.pt", "--eval-episodes", 3, patch=patch, **where)
    assert raced.returncode == 0, raced.stderr
    (file,) = (tmp_path / "runs").glob("last-scotland-*/evaluation.json")
    assert file.with_name("best_race.mp4").exists()
