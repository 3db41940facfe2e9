"""A stage: one timestep pinned to one device, and the line of all stages that sessions of one resolution share."""

from __future__ import annotations

from torch import Tensor

from liverelay.engine.cache import Arena
from liverelay.engine.config import StreamConfig
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.layers import AudioCondition, TextCondition
from liverelay.engine.models.sampler import Schedule, make_schedule
from liverelay.engine.models.workspace import Workspace


class Stage:
    """One denoising step: its modulation tables, computed once, and its Euler step. The arena belongs to a session."""

    def __init__(self, dit: DiT, workspace: Workspace, schedule: Schedule, step: int) -> None:
        self.dit, self.workspace, self.step = dit, workspace, step
        self.tables = dit.timestep_tables(schedule.timesteps[step])
        self.step_size = schedule.step_size(step)

    def run(
        self,
        arena: Arena,
        latent: Tensor,
        start_frame: int,
        reference_position: int,
        conditions: tuple[TextCondition, AudioCondition, Tensor],
    ) -> Tensor:
        """Denoise one block in place: latent [16, F, h, w] at this stage's noise level -> the next one's."""
        flow = self.dit.block_step(
            self.workspace, arena, self.tables, latent, start_frame, reference_position, conditions
        )
        result: Tensor = self.dit.ops.euler_step(latent, flow, self.step_size, latent)
        return result


class StageLine:
    """All stages of one resolution on one device, with the buffers they share because they run in turn."""

    def __init__(
        self, dit: DiT, geometry: Geometry, stream: StreamConfig, schedule: Schedule | None = None
    ) -> None:
        self.dit, self.geometry, self.stream = dit, geometry, stream
        self.workspace = dit.make_workspace(geometry)
        schedule = schedule or make_schedule(stream.steps, stream.shift)
        self.stages = [Stage(dit, self.workspace, schedule, step) for step in range(len(schedule.timesteps))]
        self.sink_tables = dit.timestep_tables(0.0)
