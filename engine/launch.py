"""How a command becomes a line: devices and a plan in one process, or a rank of those that torchrun started."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from liverelay.engine.config import RankEnvironment, StreamConfig
from liverelay.engine.devices import check_device
from liverelay.engine.engine import Engine
from liverelay.engine.errors import InputError
from liverelay.engine.loading import Loader, LoadOptions, Say, devices_of
from liverelay.engine.models.attention_choice import choose_attention
from liverelay.engine.progress import killable
from liverelay.engine.relay.group import TIMEOUT_S, Group
from liverelay.engine.relay.plan import Plan, balanced_plan, parse_plan
from liverelay.engine.relay.ranks import Leader, RankServer
from liverelay.engine.relay.stage import LineSpec, Stage
from liverelay.engine.relay.times import vae_share

TRANSPORTS = ("auto", "local", "gloo", "nccl")


@dataclass(frozen=True)
class LineOptions:
    """What the command line says of the line. devices: as in `Engine.load`; plan: as in `parse_plan`, or None.

    transport: between processes; auto is nccl on GPUs and gloo on CPUs. timeout_s: a silent stage is given up then.
    """

    devices: str | None = None
    plan: str | None = None
    transport: str = "auto"
    timeout_s: float = TIMEOUT_S


def load_options(a: argparse.Namespace, say: Say | None) -> LoadOptions:
    """What `arguments.add_model` has read, for `Engine.load`."""
    dtype = None if a.dtype is None else getattr(torch, a.dtype)
    return {
        "lora": a.lora, "dtype": dtype, "backend": a.backend, "fp8": a.fp8, "text_encoder": a.text_encoder, "say": say,
    }  # fmt: skip


def make_plan(options: LineOptions, ranks: RankEnvironment | None, steps: int) -> Plan:
    """The line's stages. Of several processes each has one; a rank sees its own device as everybody's."""
    if ranks is None:
        if options.transport not in ("auto", "local"):
            raise InputError(f"the transport {options.transport} is between processes; start them with torchrun")
        devices = devices_of(options.devices)
    else:
        if options.transport == "local":
            raise InputError("the transport local is for one process, and torchrun started several")
        own = own_device(options, ranks)
        devices = (own,) * ranks.world
    plan = parse_plan(options.plan, devices) if options.plan else balanced_plan(devices, steps, vae_share())
    if plan.steps != steps:
        raise InputError(f"the plan {plan} has {plan.steps} steps, the schedule {steps}")
    if ranks is not None and len(plan.stages) != ranks.world:
        raise InputError(f"{ranks.world} processes were started for {len(plan.stages)} stages; start as many as stages")
    return plan


def own_device(options: LineOptions, ranks: RankEnvironment) -> str:
    """A rank's device: one of the list, or its own GPU, or the CPU."""
    if options.devices:
        names = options.devices.split(",")
        return check_device(names[min(ranks.local_rank, len(names) - 1)].strip())
    if torch.cuda.is_available() and ranks.local_rank < torch.cuda.device_count():
        return f"cuda:{ranks.local_rank}"
    return "cpu"


def join(options: LineOptions, ranks: RankEnvironment, plan: Plan) -> Group:
    """Meet the other ranks."""
    nccl = options.transport == "nccl" or (options.transport == "auto" and plan.devices[0].startswith("cuda"))
    if nccl and not plan.devices[0].startswith("cuda"):
        raise InputError("the transport nccl needs a GPU for each process; take gloo")
    with killable():  # nothing is there to be kept yet
        return Group(ranks, "nccl" if nccl else "gloo", options.timeout_s)


def serve(loader: Loader, group: Group, plan: Plan) -> None:
    """Run this rank's stage until the leader ends."""
    mine = plan.stages[group.rank]
    dit = loader.dit(mine.device) if mine.steps else None
    vae = loader.vae(mine.device) if mine.decode else None

    def make_stage(spec: LineSpec) -> Stage:
        if dit is not None and loader.backend is None:
            choose_attention(dit, spec.geometry, loader.say)
        return Stage(mine, spec, dit, vae, loader.dtype, say=loader.say)

    RankServer(group, plan, make_stage).run()


def lead(loader: Loader, group: Group, plan: Plan, stream: StreamConfig) -> Engine:
    """The engine of rank 0, whose line goes over all ranks."""
    engine = Engine.assemble(loader, plan, stream, own=0)
    engine.leader = Leader(group, plan)
    return engine
