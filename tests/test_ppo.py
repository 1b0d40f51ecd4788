"""The algorithm against independent references, and the figures of races; no game."""

import math
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

import ppo_tuxkart
from ppo_tuxkart import (
    choose_actions,
    compute_gae,
    evaluate_actions,
    next_lesson,
    teacher_kl,
)


def naive_gae(data, gamma, gae_lambda):
    """The double sum of eq. 16, episode by episode."""
    advantages = np.zeros_like(data["rewards"])
    steps, envs = advantages.shape
    for n in range(envs):
        for t in range(steps):
            for later in range(t, steps):
                bootstrap = 0.0 if data["terminations"][later, n] else data["next_values"][later, n]
                delta = data["rewards"][later, n] + gamma * bootstrap - data["values"][later, n]
                advantages[t, n] += (gamma * gae_lambda) ** (later - t) * delta
                if data["dones"][later, n]:
                    break
    return advantages


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_the_naive_sum(gamma, gae_lambda):
    generator = np.random.default_rng(0)
    data = {name: generator.normal(size=(40, 5)) for name in ("rewards", "values", "next_values")}
    data["terminations"], truncations = generator.random((2, 40, 5)) < 0.1
    data["dones"] = data["terminations"] | truncations
    assert truncations.any() and (data["terminations"] & ~truncations).any()
    tensors = {name: torch.from_numpy(values) for name, values in data.items()}
    ours = compute_gae(tensors, gamma, gae_lambda).numpy()
    np.testing.assert_allclose(ours, naive_gae(data, gamma, gae_lambda), atol=1e-12)


def test_actions_against_torch_distributions():
    torch.manual_seed(0)
    nvec = [5, 3, 2, 2]
    logits = 2 * torch.randn(50, sum(nvec))
    actions = choose_actions(logits, nvec, 0.0)
    logprobs, entropy = evaluate_actions(logits, actions, nvec, 0.0)
    parts = [torch.distributions.Categorical(logits=block) for block in logits.split(nvec, -1)]
    expected = sum(part.log_prob(action) for part, action in zip(parts, actions.unbind(-1), strict=True))
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))
    greedy = choose_actions(logits, nvec, 0.0, greedy=True)
    for part, action in zip(parts, greedy.unbind(-1), strict=True):
        assert torch.equal(action, part.probs.argmax(-1))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_the_mixture_with_epsilon_is_what_is_sampled(epsilon):
    torch.manual_seed(0)
    logits, nvec, rows = torch.randn(1, 5), [3, 2], 60_000
    actions = choose_actions(logits.expand(rows, -1), nvec, epsilon)
    categorical = torch.outer(logits[0, :3].softmax(0), logits[0, 3:].softmax(0))
    expected = (1 - epsilon) * categorical + epsilon / 6
    counts = torch.zeros(3, 2).index_put_(tuple(actions.T), torch.ones(rows), accumulate=True)
    torch.testing.assert_close(counts / rows, expected, atol=0.01, rtol=0)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    logprobs, _ = evaluate_actions(logits.expand(6, -1), pairs, nvec, epsilon)
    torch.testing.assert_close(logprobs.exp().view(3, 2), expected)


def test_the_teachers_divergence_against_torch_distributions():
    torch.manual_seed(0)
    nvec = [5, 3, 2]
    teacher, student = 2 * torch.randn(2, 30, sum(nvec))
    pairs = zip(teacher.split(nvec, -1), student.split(nvec, -1), strict=True)
    kinds = [[torch.distributions.Categorical(logits=block) for block in pair] for pair in pairs]
    expected = sum(torch.distributions.kl_divergence(theirs, ours) for theirs, ours in kinds)
    torch.testing.assert_close(teacher_kl(teacher, student, nvec), expected)
    assert teacher_kl(student, student, nvec).abs().max() < 1e-6


def test_a_teacher_alone_is_imitated():
    """Only the divergence has a gradient where there are no advantages and the bonus and the values weigh nothing."""
    torch.manual_seed(0)
    agent = ppo_tuxkart.StateAgent((6,), [3, 2])
    agent.teaching = 1.0
    obs, teacher_logits = torch.randn(64, 6), 2 * torch.randn(1, 5).expand(64, -1)
    args = ppo_tuxkart.Args(ent_coef=0.0, vf_coef=0.0, epochs=100, num_minibatches=2)
    zeros = torch.zeros(64)
    batch = {"obs": obs, "teacher_logits": teacher_logits, "actions": torch.zeros(64, 2, dtype=torch.int64)}
    batch |= dict.fromkeys(("advantages", "returns", "values", "logprobs"), zeros)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    first = teacher_kl(teacher_logits, agent(obs)[0], agent.nvec).mean()
    metrics = ppo_tuxkart.ppo_update(agent, optimizer, batch, args)
    assert teacher_kl(teacher_logits, agent(obs)[0], agent.nvec).mean() < 0.01 * first
    assert 0 < metrics["losses/teacher_kl"] < first


class TinyEnv(gym.Env):
    """Six random numbers; the reward is how well three choices match their signs. Ends at random."""

    observation_space = gym.spaces.Box(-3, 3, (6,), np.float32)
    action_space = gym.spaces.MultiDiscrete([3, 2, 2])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-3, 3, 6).astype(np.float32)
        return self.state, {}

    def step(self, action):
        reward = float((action - 1) @ self.state[:3])
        terminated = bool(self.np_random.random() < 0.1)
        self.state = self.np_random.uniform(-3, 3, 6).astype(np.float32)
        return self.state, reward, terminated, False, {}


class SB3Network(torch.nn.Module):
    """Stable-Baselines3's own network behind the interface of our Agent."""

    def __init__(self, policy, nvec):
        super().__init__()
        self.policy, self.nvec, self.epsilon, self.teaching = policy, nvec, 0.0, 0.0

    def forward(self, obs):
        policy_features, value_features = self.policy.mlp_extractor(self.policy.extract_features(obs))
        return self.policy.action_net(policy_features), self.policy.value_net(value_features)[:, 0]


def test_a_whole_update_is_that_of_stable_baselines3():
    """The same network on the same rollout, in the same minibatches."""
    settings = {"n_steps": 64, "batch_size": 32, "n_epochs": 3, "learning_rate": 1e-2, "seed": 3}
    settings |= {"clip_range": 0.2, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5}
    settings |= {"gamma": 0.97, "gae_lambda": 0.9, "device": "cpu"}
    reference = PPO("MlpPolicy", TinyEnv(), **settings)
    reference.set_logger(mock.Mock())
    _, callback = reference._setup_learn(64)
    reference.collect_rollouts(reference.env, callback, reference.rollout_buffer, 64)
    rollout = reference.rollout_buffer

    starts = np.append(rollout.episode_starts[1:, 0], reference._last_episode_starts)
    dones = torch.from_numpy(starts).bool()[:, None]
    values = torch.from_numpy(rollout.values)
    last = reference.policy.predict_values(torch.from_numpy(reference._last_obs)).detach()
    data = {"rewards": torch.from_numpy(rollout.rewards), "values": values, "terminations": dones}
    data |= {"next_values": torch.cat([values[1:], last]), "dones": dones}
    advantages = compute_gae(data, 0.97, 0.9)
    torch.testing.assert_close(advantages, torch.from_numpy(rollout.advantages), atol=1e-5, rtol=1e-5)

    batch = {"obs": torch.from_numpy(rollout.observations[:, 0]), "values": values[:, 0]}
    batch["actions"] = torch.from_numpy(rollout.actions[:, 0]).long()
    batch["logprobs"] = torch.from_numpy(rollout.log_probs[:, 0])
    batch |= {"advantages": advantages[:, 0], "returns": (advantages + values)[:, 0]}
    network = SB3Network(PPO("MlpPolicy", TinyEnv(), **settings).policy, [3, 2, 2])
    network.policy.load_state_dict(reference.policy.state_dict())
    before = [parameter.detach().clone() for parameter in network.policy.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, eps=1e-5)
    # Stable-Baselines3's value loss has no factor 1/2, so ours gets twice the weight
    args = SimpleNamespace(epochs=3, num_minibatches=2, clip_coef=0.2, ent_coef=0.01, vf_coef=1.0)
    args.max_grad_norm = 0.5
    with mock.patch("torch.randperm", torch.arange), mock.patch("numpy.random.permutation", np.arange):
        ppo_tuxkart.ppo_update(network, optimizer, batch, args)
        reference.train()
    theirs, ours = reference.policy.parameters(), network.policy.parameters()
    for old, their, our in zip(before, theirs, ours, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(old, our, atol=1e-3)


def tiny_batch(size=32, pictures=(3, 36, 36)):
    """A small network and what it sampled on random pictures, a few at a time, as `rollout` does."""
    torch.manual_seed(1)
    agent = ppo_tuxkart.Agent(pictures, [3, 2])
    batch = {"obs": torch.randint(0, 256, (size, *pictures), dtype=torch.uint8)}
    with torch.no_grad():
        logits = torch.cat([agent(part)[0] for part in batch["obs"].split(8)])
        batch["actions"] = choose_actions(logits, agent.nvec, 0.0)
        batch["logprobs"], _ = evaluate_actions(logits, batch["actions"], agent.nvec, 0.0)
    batch |= {name: torch.randn(size) for name in ("values", "advantages", "returns")}
    return agent, torch.optim.Adam(agent.parameters(), lr=1e-3), batch


def test_the_ratio_is_one_whatever_the_batch_that_the_network_sees():
    """Sampling looks at few pictures at a time, learning at many: the same network must say the same."""
    agent, _, batch = tiny_batch(256, (6, 64, 64))
    _, scalars = ppo_tuxkart.ppo_loss(agent, batch, ppo_tuxkart.Args())
    assert scalars["losses/ratio_error"].item() < 1e-6 and scalars["losses/clipfrac"].item() == 0


@pytest.mark.parametrize("name, value", [("advantages", math.inf), ("returns", math.inf), ("logprobs", math.nan)])
def test_a_loss_that_is_no_number_stops_before_it_is_learnt(name, value):
    agent, optimizer, batch = tiny_batch()
    before = {name: weights.clone() for name, weights in agent.state_dict().items()}
    batch[name][3] = value
    with pytest.raises(SystemExit, match="[Ff]inite"):
        ppo_tuxkart.ppo_update(agent, optimizer, batch, ppo_tuxkart.Args(num_minibatches=1))
    assert all(torch.equal(weights, before[name]) for name, weights in agent.state_dict().items())


# --- The rest of the arithmetic


def test_the_speed_curriculum():
    agent = torch.nn.Linear(1, 1)
    first, passed = agent.weight.item(), 7.0
    lesson = {"cap": 8.0, "passed": None, "increment": 2.0}
    assert next_lesson(lesson, False, agent) == lesson
    torch.nn.init.constant_(agent.weight, passed)
    lesson = next_lesson(lesson, True, agent)
    assert (lesson["cap"], lesson["passed"], lesson["increment"]) == (10.0, 8.0, 2.0)
    torch.nn.init.constant_(agent.weight, first)
    lesson = next_lesson(lesson, False, agent)
    assert (lesson["cap"], lesson["passed"], lesson["increment"]) == (9.0, 8.0, 1.0)
    assert agent.weight.item() == passed  # what passed last learns on
    for _ in range(5):
        lesson = next_lesson(lesson, False, agent)
    assert (lesson["cap"], lesson["increment"]) == (8.25, 0.25)


RACE = {"track": "a", "place": 1, "return": 0.0, "progress": 1.0, "off_track_seconds": 0.0, "end": "finished"}
RACE |= {"finished": True, "lap_time": 20.0}


def correlation(pairs):
    races = [RACE | {"return": value, "lap_time": lap, "finished": lap < 99} for value, lap in pairs]
    return ppo_tuxkart.summarize(races)["return_lap_correlation"]


def test_a_reward_that_prefers_slow_laps_is_noticed():
    times = np.linspace(50, 60, 12)
    assert correlation((-lap, lap) for lap in times) == pytest.approx(-1)
    assert correlation([*((lap, lap) for lap in times), (9.0, math.inf)]) == pytest.approx(1)
    assert correlation((lap, lap) for lap in times[:9]) is None
    noise = np.random.default_rng(0).standard_normal((2, 100))
    assert correlation(noise.T.tolist()) is None  # as chance has it
    assert correlation((noise[0] + 0.5 * noise).T.tolist()) > 0.2


def test_a_track_that_is_never_finished_leaves_no_median():
    other = RACE | {"track": "b", "lap_time": 50.0}
    both = ppo_tuxkart.summarize([RACE, other, RACE, other])
    assert both["median"] == both["best"] == 35.0 and both["finished"] == both["races"] == both["wins"] == 4
    lost = other | {"finished": False, "lap_time": math.inf, "end": "stuck"}
    half = ppo_tuxkart.summarize([RACE, lost, RACE, lost])
    assert half["median"] is None and half["lap_times"] == [20.0, 20.0] and half["wins"] == 2
    assert half["ends"] == {"finished": 2, "stuck": 2}
