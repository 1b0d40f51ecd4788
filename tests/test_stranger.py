"""Stable-Baselines3's PPO on `TuxKart-v0`, as somebody would who only imports the file."""

import gymnasium as gym
import numpy as np
import torch
from conftest import in_process
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import SubprocVecEnv

import ppo_tuxkart  # noqa: F401  registers TuxKart-v0


def make():
    return gym.make("TuxKart-v0", track="lighthouse", random_start=0.5)


def learn():
    torch.set_num_threads(1)
    envs = SubprocVecEnv([make, make], start_method="fork")
    model = PPO("CnnPolicy", envs, n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(384)
    changed = any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    actions, _ = model.predict(envs.reset(), deterministic=True)
    envs.close()
    return model.num_timesteps, changed, np.asarray(actions).shape


def test_sb3_learns_on_it():
    assert in_process(learn) == (384, True, (2, 4))
