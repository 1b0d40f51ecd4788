"""What one PPO update of tuxkart-ai's networks costs at full size: python tests/bench/deep_update.py

Every variant runs in a process of its own: forward, loss, backward and Adam's step on random pictures. On a GPU:
float32, tf32 and bf16, eager and compiled, contiguous and channels-last; on a CPU: float32 and bf16. Beside the time
and the peak memory stands the arithmetic floor: the update's multiply-adds (counted by PyTorch) over the rate that a
large matrix product reaches on the same device in the same precision. What stands in the JSON file is not measured
again.
"""

import dataclasses
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import ppo_tuxkart_resnet as script

SHAPES = {"conv2d": ((5, 600, 400), [2, 2, 3, 2, 2, 2]), "resnet3d": ((15, 400, 600), [2, 2, 3, 2, 2, 2, 2])}


@dataclasses.dataclass
class Bench:
    networks: tuple[Literal["conv2d", "resnet3d"], ...] = ("conv2d", "resnet3d")
    """which networks"""
    batch: int = 1
    """pictures of an update"""
    repeats: int | None = None
    """updates timed after one that is not (default: 10 on a GPU; on a CPU 1, and none before it)"""
    minutes: float = 30.0
    """after which a variant is given up"""
    out: Path | None = None
    """JSON file to write"""


def matrix_rate(device, dtype):
    """Multiply-adds a second of a large matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for a GPU
        best = max(best, size**3 / (time.perf_counter() - started))
    return best


def measure(settings, network, precision, compiled, layout, pipe):
    """One variant, in a process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    shape, nvec = SHAPES[network]
    args = script.complete(script.Args(network=network))
    agent = script.Agent(shape, nvec, network, args.base_channels, args.frame_stack, "stack").to(device)
    agent.amp = torch.bfloat16 if precision == "bf16" else None
    if layout == "channels-last":
        agent.to(memory_format=torch.channels_last if network == "conv2d" else torch.channels_last_3d)
    elif network == "conv2d":
        agent.format = torch.contiguous_format
        agent.to(memory_format=torch.contiguous_format)
    optimizer, rows = torch.optim.Adam(agent.parameters(), lr=1e-4), settings.batch
    ones = torch.ones(rows, device=device)
    batch = {"obs": torch.randint(0, 256, (rows, *shape), dtype=torch.uint8, device=device)}
    batch |= {"state": torch.zeros(rows, 0, device=device), "starts": ones.bool(), "own": ones.bool()}
    batch |= {"actions": torch.zeros(rows, len(nvec), dtype=torch.int64, device=device), "logprobs": -4 * ones}
    batch |= {"values": 0 * ones, "advantages": ones, "returns": ones}

    def update():
        started = time.perf_counter()
        optimizer.zero_grad()
        loss, _ = script.ppo_loss(agent, batch, args, (rows, rows))
        loss.backward()
        optimizer.step()
        if not loss.isfinite():  # also waits for a GPU
            raise RuntimeError("The loss is not finite.")
        return time.perf_counter() - started

    gpu = device.type == "cuda"
    with FlopCounterMode(display=False) as counter:
        first = update()
    if compiled:
        agent.compile()
    if gpu:
        update()
        torch.cuda.reset_peak_memory_stats()
    repeats = settings.repeats or (10 if gpu else 0)
    times = [update() for _ in range(repeats)] or [first]
    peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rate = matrix_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    multiply_adds = counter.get_total_flops() / 2
    result = {"seconds": statistics.median(times), "times": times, "peak_gb": peak / 1e9}
    pipe.send(result | {"multiply_adds": multiply_adds, "matrix_rate": rate, "floor_seconds": multiply_adds / rate})


def main(settings):
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    precisions = ("float32", "tf32", "bf16") if gpu else ("float32", "bf16")
    machine = {"device": name, "torch": torch.__version__, "platform": platform.platform(), "batch": settings.batch}
    context, results = multiprocessing.get_context("spawn"), []
    if settings.out and settings.out.exists():
        before = json.loads(settings.out.read_text())
        if before["machine"] != machine:
            sys.exit(f"{settings.out} was made on another machine or batch: name another file.")
        results = [row for row in before["results"] if "failed" not in row]
    finished = [[row[key] for key in ("network", "precision", "mode", "layout")] for row in results]
    print(f"{name}, PyTorch {torch.__version__}, batch {settings.batch}: one update")
    print(f"{'network':10}{'precision':11}{'mode':10}{'layout':15}{'seconds':>9}{'peak GB':>9}{'floor':>9}{'share':>7}")
    for network in settings.networks:
        for precision in precisions:
            for compiled in (False, True) if gpu else (False,):
                for layout in ("contiguous", "channels-last") if gpu or network == "conv2d" else ("contiguous",):
                    mode = "compiled" if compiled else "eager"
                    if [network, precision, mode, layout] in finished:
                        continue
                    ours, theirs = context.Pipe()
                    process = context.Process(
                        target=measure, args=(settings, network, precision, compiled, layout, theirs)
                    )
                    process.start()
                    theirs.close()
                    row = {"network": network, "precision": precision, "mode": mode, "layout": layout}
                    line = f"{network:10}{precision:11}{mode:10}{layout:15}"
                    try:
                        row |= ours.recv() if ours.poll(60 * settings.minutes) else {"failed": "took too long"}
                    except EOFError:
                        row["failed"] = "died"
                    if "failed" in row:
                        print(f"{line}   {row['failed']}", flush=True)
                    else:
                        share = row["floor_seconds"] / row["seconds"]
                        print(f"{line}{row['seconds']:>9.3f}{row['peak_gb']:>9.2f}{row['floor_seconds']:>9.3f}{share:>7.0%}",
                              flush=True)  # fmt: skip
                    process.kill()
                    process.join()
                    results.append(row)
                    if settings.out:
                        settings.out.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
