"""The algorithm against independent references; no game."""

from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

import ppo_tuxkart


def naive_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """The double sum of eq. 16, episode by episode."""
    advantages = np.zeros_like(rewards)
    steps, envs = rewards.shape
    for n in range(envs):
        for t in range(steps):
            for later in range(t, steps):
                bootstrap = 0.0 if terminations[later, n] else next_values[later, n]
                delta = rewards[later, n] + gamma * bootstrap - values[later, n]
                advantages[t, n] += (gamma * gae_lambda) ** (later - t) * delta
                if dones[later, n]:
                    break
    return advantages


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_the_naive_sum(gamma, gae_lambda):
    generator = np.random.default_rng(0)
    rewards, values, next_values = generator.normal(size=(3, 40, 5))
    terminations, truncations = generator.random((2, 40, 5)) < 0.1
    dones = terminations | truncations
    assert truncations.any() and (terminations & ~truncations).any()
    arrays = rewards, values, next_values, terminations, dones
    ours = ppo_tuxkart.compute_gae(*map(torch.from_numpy, arrays), gamma, gae_lambda)
    np.testing.assert_allclose(ours.numpy(), naive_gae(*arrays, gamma, gae_lambda), atol=1e-12)


def test_actions_against_torch_distributions():
    torch.manual_seed(0)
    nvec = [5, 3, 2, 2]
    logits = 2 * torch.randn(50, sum(nvec))
    actions = ppo_tuxkart.choose_actions(logits, nvec)
    logprobs, entropy = ppo_tuxkart.evaluate_actions(logits, actions, nvec)
    parts = [torch.distributions.Categorical(logits=block) for block in logits.split(nvec, -1)]
    expected = sum(part.log_prob(action) for part, action in zip(parts, actions.unbind(-1), strict=True))
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))


def test_sampled_actions_have_the_policys_frequencies():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.0]])
    actions = ppo_tuxkart.choose_actions(logits.expand(20_000, -1), [3, 2])
    for block, column in zip(logits[0].split([3, 2]), actions.unbind(-1), strict=True):
        frequencies = column.bincount(minlength=len(block)) / len(actions)
        torch.testing.assert_close(frequencies, block.softmax(-1), atol=0.015, rtol=0)  # 4 standard errors
    greedy = ppo_tuxkart.choose_actions(logits, [3, 2], greedy=True)
    assert greedy.tolist() == [[1, 0]]


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
        self.policy, self.nvec, self.epsilon = policy, nvec, 0.0

    def forward(self, obs):
        policy_features, value_features = self.policy.mlp_extractor(self.policy.extract_features(obs))
        return self.policy.action_net(policy_features), self.policy.value_net(value_features).squeeze(-1)


def updated_parameters(target_kl, clip_vloss):
    """The parameters after one whole update of the same network on the same rollout: before, SB3's, ours."""
    settings = {"n_steps": 64, "batch_size": 32, "n_epochs": 3, "learning_rate": 1e-2, "seed": 3, "device": "cpu"}
    settings |= {"clip_range": 0.2, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5}
    settings |= {"gamma": 0.97, "gae_lambda": 0.9}
    settings |= {"clip_range_vf": 0.2 if clip_vloss else None, "target_kl": target_kl and target_kl / 1.5}
    reference = PPO("MlpPolicy", gym.vector.SyncVectorEnv([TinyEnv]).envs[0], **settings)
    reference.set_logger(mock.Mock())
    _, callback = reference._setup_learn(64)
    reference.collect_rollouts(reference.env, callback, reference.rollout_buffer, 64)
    rollout = reference.rollout_buffer

    starts = torch.from_numpy(np.append(rollout.episode_starts[1:, 0], reference._last_episode_starts)).bool()[:, None]
    values = torch.from_numpy(rollout.values)
    last = reference.policy.predict_values(torch.from_numpy(reference._last_obs)).detach()
    next_values = torch.cat([values[1:], last])
    rewards = torch.from_numpy(rollout.rewards)
    advantages = ppo_tuxkart.compute_gae(rewards, values, next_values, starts, starts, 0.97, 0.9)
    torch.testing.assert_close(advantages, torch.from_numpy(rollout.advantages), atol=1e-5, rtol=1e-5)

    batch = {
        "obs": torch.from_numpy(rollout.observations[:, 0]),
        "actions": torch.from_numpy(rollout.actions[:, 0]).long(),
        "logprobs": torch.from_numpy(rollout.log_probs[:, 0]),
        "values": values[:, 0],
        "advantages": advantages[:, 0],
        "returns": (advantages + values)[:, 0],
    }
    network = SB3Network(PPO("MlpPolicy", reference.env, **settings).policy, [3, 2, 2])
    network.policy.load_state_dict(reference.policy.state_dict())
    before = [parameter.detach().clone() for parameter in network.policy.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, eps=1e-5)
    # SB3's value loss has no factor 1/2, and its target_kl is exceeded at 1.5 times the value given
    args = SimpleNamespace(epochs=3, num_minibatches=2, clip_coef=0.2, clip_vloss=clip_vloss, ent_coef=0.01)
    args.vf_coef, args.max_grad_norm, args.target_kl = 1.0, 0.5, target_kl
    with mock.patch("torch.randperm", torch.arange), mock.patch("numpy.random.permutation", np.arange):
        ppo_tuxkart.ppo_update(network, optimizer, batch, args)
        reference.train()
    return before, list(reference.policy.parameters()), list(network.policy.parameters())


@pytest.mark.parametrize("target_kl", [None, 0.02])
def test_a_whole_update_is_that_of_stable_baselines3(target_kl):
    before, theirs, ours = updated_parameters(target_kl, clip_vloss=False)
    for old, their, our in zip(before, theirs, ours, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(old, our, atol=1e-3)


def test_target_kl_stops_an_update_early():
    _, _, stopped = updated_parameters(0.02, clip_vloss=False)
    _, _, whole = updated_parameters(None, clip_vloss=False)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(stopped, whole, strict=True))


def test_clipped_value_loss_takes_the_worse_of_both():
    agent = lambda obs: (torch.zeros(2, 2), torch.tensor([1.0, 0.1]))  # noqa: E731
    agent.nvec, agent.epsilon = [2], 0.0
    batch = {"obs": None, "actions": torch.zeros(2, 1, dtype=torch.int64), "logprobs": torch.full((2,), 0.5).log()}
    batch |= {"values": torch.zeros(2), "advantages": torch.tensor([1.0, -1.0]), "returns": torch.tensor([2.0, 0.0])}
    _, scalars = ppo_tuxkart.ppo_loss(agent, batch, ppo_tuxkart.Args(clip_vloss=True))
    # unclipped errors: 1 and 0.01; clipped to 0.2 and 0.1: 3.24 and 0.01
    assert scalars["losses/value_loss"].item() == pytest.approx(0.5 * (3.24 + 0.01) / 2)


def test_ratio_is_one_whatever_the_batch_that_the_network_sees():
    """Sampling looks at few pictures at a time, learning at many: the same network must say the same."""
    torch.manual_seed(0)
    agent = ppo_tuxkart.Agent((6, 64, 64), [5, 3, 2, 2])
    obs = torch.randint(0, 256, (256, 6, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        logits = torch.cat([agent(part)[0] for part in obs.split(8)])
        actions = ppo_tuxkart.choose_actions(logits, agent.nvec)
        logprobs, _ = ppo_tuxkart.evaluate_actions(logits, actions, agent.nvec)
        batch = {"obs": obs, "actions": actions, "logprobs": logprobs}
        batch |= {"values": torch.zeros(256), "advantages": torch.randn(256), "returns": torch.zeros(256)}
        _, scalars = ppo_tuxkart.ppo_loss(agent, batch, ppo_tuxkart.Args())
    assert scalars["losses/ratio_error"].item() < 1e-6
    assert scalars["losses/clipfrac"].item() == 0
