"""A stage: its denoising steps, and the VAE or a piece of it, on one device, with the memory of every session there."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from liverelay.engine.cache import Arena
from liverelay.engine.config import StreamConfig
from liverelay.engine.devices import numbered
from liverelay.engine.errors import InputError
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry, reference_position
from liverelay.engine.models.layers import TextCondition
from liverelay.engine.models.sampler import Schedule, make_schedule
from liverelay.engine.models.sizes import arena_bytes, text_bytes, vae_cache_bytes
from liverelay.engine.models.vae import CHUNK, STRIDE, VAE
from liverelay.engine.models.vae_config import FIRST, SECOND, WHOLE, VAEConfig
from liverelay.engine.models.vae_layers import FeatureCache
from liverelay.engine.relay.graph import Graphs
from liverelay.engine.relay.handoff import Parcel
from liverelay.engine.relay.messages import Block, Tensors
from liverelay.engine.relay.plan import StagePlan
from liverelay.engine.relay.room import Room, allocating, free_bytes

OnStep = Callable[[int, Tensor], None]
Say = Callable[[str], None]
NOBODY = -1


@dataclass(frozen=True)
class LineSpec:
    """What all stages of a line agree on: sizes, the stream's rules, the noise levels, the parts of a parcel.

    parcel: shapes of what comes with a block; `latent`, and for stages that denoise `audio` (and `pose`). features: of
    what comes instead to the second piece of the VAE; empty on lines without a VAE.
    """

    geometry: Geometry
    stream: StreamConfig
    schedule: Schedule
    parcel: Mapping[str, tuple[int, ...]]
    features: tuple[int, ...] = ()

    @classmethod
    def make(
        cls, geometry: Geometry, stream: StreamConfig, audio: tuple[int, ...], *, schedule: Schedule | None = None,
        pose: bool = False, channels: int = 16, vae: VAEConfig | None = None,
    ) -> LineSpec:
        """audio: shape of a block's features [S, states, A, 4 F]."""
        latent = (channels, geometry.frames_per_block, geometry.latent_h, geometry.latent_w)
        parts = {"latent": latent, "audio": audio} | ({"pose": latent} if pose else {})
        features = vae.handoff(*latent[1:]) if vae else ()
        return cls(geometry, stream, schedule or make_schedule(stream.steps, stream.shift), parts, features)

    def parcel_of(self, plan: StagePlan) -> Mapping[str, tuple[int, ...]]:
        """Parts of the parcels that a stage is given."""
        if plan.decode == SECOND and self.features:
            return {"features": self.features}
        return self.parcel if plan.steps else {"latent": self.parcel["latent"]}


class Place:
    """One session's memory at one stage, allocated once and used by one session after the other."""

    def __init__(self, stage: Stage) -> None:
        dit, vae, geometry = stage.dit, stage.vae, stage.spec.geometry
        self.arenas: dict[int, Arena] = {}
        self.text: TextCondition | None = None
        self.motion: Tensor | None = None
        self.decoder: FeatureCache | None = None
        if dit is not None:
            self.arenas = {step: dit.make_arena(geometry) for step in stage.plan.steps}
            self.text = dit.make_text()
        if vae is not None:
            self.decoder = vae.new_decoder(geometry.latent_h, geometry.latent_w, stage.plan.decode)

    def tensors(self) -> Tensors:
        """All of it by name; a step's arena has the same name whatever stage the step is in."""
        named = {f"arena.{step}.{name}": tensor for step, arena in self.arenas.items()
                 for name, tensor in arena.tensors().items()}  # fmt: skip
        if self.decoder is not None:
            named |= {f"decoder.{name}": tensor for name, tensor in self.decoder.buffers.items()}
        return named


class Stage:
    """The work of one stage. `parcel` holds the block that it works on, in place; `outgoing` goes on when it is done.

    dit: where it has steps, vae: where it decodes, both on its device; without one, latents stay latents. The buffers
    that a block-step works in, and the shadow in which the sink of a new reference is made, belong to the stage:
    sessions use them in turn. say: is told what a first session waits for.
    """

    def __init__(
        self, plan: StagePlan, spec: LineSpec, dit: DiT | None, vae: VAE | None, dtype: torch.dtype, *,
        say: Say = lambda line: None,
    ) -> None:
        self.plan, self.spec, self.device, self.dtype = plan, spec, numbered(plan.device), dtype
        self.dit, self.vae = (dit if plan.steps else None), (vae if plan.decode else None)
        self.say = say
        self.parcel = self.outgoing = Parcel(spec.parcel_of(plan), self.device, self.dtype)
        self.graphs = Graphs(self.device)
        self.places: dict[int, Place] = {}
        self.shadow_of = NOBODY  # the place whose next sink the shadow holds
        if self.dit is not None:
            self.workspace = self.dit.make_workspace(spec.geometry)
            self.tables = {step: self.dit.timestep_tables(spec.schedule.timesteps[step]) for step in plan.steps}
            self.sink_tables = self.dit.timestep_tables(0.0)
            self.shadow = self.dit.make_arena(spec.geometry, sink_only=True)
            self.audio = self.dit.audio_condition(self.parcel.parts["audio"], spec.geometry.frames_per_block)
        if self.vae is not None:
            self._make_decoding(self.vae)

    def _make_decoding(self, vae: VAE) -> None:
        """What decoding works in beside a session's cache: the video of the block that was decoded last; between two
        pieces the features, in the decoder's own dtype; for the second one a first one's cache (see `_prime`)."""
        _, frames, h, w = self.spec.parcel["latent"]
        if self.plan.makes_video:
            video = (CHUNK * frames, STRIDE * h, STRIDE * w, 3)
            self.video = torch.empty(video, device=self.device, dtype=torch.uint8)
        if self.plan.decode != WHOLE:
            self.outgoing = Parcel({"features": self.spec.features}, self.device, vae.features_dtype)
            self.features = vae.as_features(self.outgoing.parts["features"])
        if self.plan.decode == SECOND:
            self.parcel = self.outgoing
        self.before = vae.new_decoder(h, w, FIRST) if self.plan.decode == SECOND else FeatureCache()

    @property
    def place_bytes(self) -> int:
        """Memory of one session here."""
        geometry, size = self.spec.geometry, 0
        if self.dit is not None:
            config, element = self.dit.config, self.dtype.itemsize
            size += len(self.plan.steps) * arena_bytes(config, geometry, element, fp8=self.dit.fp8_attention)
            size += text_bytes(config, element)
        if self.vae is not None:
            size += vae_cache_bytes(self.vae.config, geometry, self.vae.dtype.itemsize, self.plan.decode)
        return size

    def room(self) -> Room:
        """What is asked before a session is opened (`check_room`); may be called from any thread."""
        return Room(str(self.device), self.place_bytes, free_bytes(self.device), frozenset(self.places.copy()))

    @property
    def last_step(self) -> bool:
        """Whether a block is clean when it leaves this stage's steps."""
        return len(self.spec.schedule.timesteps) - 1 in self.plan.steps

    # -- sessions --------------------------------------------------------------------------------------------------

    def open(self, number: int, tensors: Tensors) -> Place:
        """Begin a session in a place: its prompt, its sink in all arenas, its decoder warmed up (spec dit.md 9)."""
        place, stream = self.places.get(number), self.spec.stream
        if place is None:
            with allocating:
                place = self.places[number] = Place(self)
            if self.graphs.enabled and len(self.places) == 1:
                self.warm_up(number)
        motion = tensors["motion"].to(self.device)
        if self.shadow_of == number:
            self.shadow_of = NOBODY
        if self.dit is not None:
            self.dit.text_condition(tensors["text"], place.text)
            place.motion = motion
            first, *others = place.arenas.values()
            for arena in place.arenas.values():
                arena.reset()
            self._prefill(place, first, tensors["reference"])
            for arena in others:
                arena.copy_sink(first)
        if self.vae is not None and place.decoder is not None:
            self._prime(self.vae, place.decoder, motion[:, : stream.prime_latents])
        return place

    def _prime(self, vae: VAE, decoder: FeatureCache, motion: Tensor) -> None:
        """Warm a new stream's decoder up. A second piece computes what the first one would give it itself, while that
        does so for its own, so that nothing but blocks goes over links."""
        for cache in (decoder, self.before):
            cache.reset()
        if self.plan.decode == FIRST:
            return vae.prime(decoder, motion, FIRST)
        vae.prime(FeatureCache(self.before.buffers | decoder.buffers), motion)
        decoder.first = False

    def warm_up(self, number: int) -> None:
        """Capture what a place will need, on whatever its memory holds: the session that is opened then clears it.

        For a stage's first place, whose first blocks would otherwise load every kernel. The graphs of a later one are
        captured as its blocks come, each behind the block that is computed meanwhile, because others are being served.
        """
        place, spec = self.places[number], self.spec
        slots, began = spec.geometry.ring_frames // spec.geometry.frames_per_block, time.monotonic()
        blocks = 2 * slots - 1  # until all slots have met a full ring
        for index in range(blocks):
            block = Block(number, NOBODY, index, (0,) * len(spec.schedule.timesteps))
            if not all(self.graphs.has(key) for key in self.step_keys(block)):
                self.say(f"stage {self.plan.name}: capturing the CUDA graphs of block {index + 1} of at most {blocks}")
                self.denoise(number, block)
        if self.vae is not None and place.decoder is not None:
            self.say(f"stage {self.plan.name}: capturing the decoder's CUDA graph")
            place.decoder.first = not spec.stream.prime_latents
            self.decode(number, 0)
        took, count = time.monotonic() - began, len(self.graphs.captured)
        self.say(f"stage {self.plan.name}: {count} CUDA graphs after {took:.1f} s")

    def _prefill(self, place: Place, arena: Arena, reference: Tensor) -> None:
        assert self.dit is not None and place.text is not None and place.motion is not None
        tokens = self.dit.sink_tokens(reference.to(self.device, non_blocking=True), place.motion)
        self.dit.prefill(self.workspace, arena, self.sink_tables, place.text, tokens)

    def prepare_sink(self, number: int, reference: Tensor) -> None:
        """Adaptive attention sink: the keys and values of the model's own first latent frame, into the shadow."""
        if self.dit is not None:
            self._prefill(self.places[number], self.shadow, reference)
            self.shadow_of = number

    # -- blocks ----------------------------------------------------------------------------------------------------

    def denoise(self, number: int, block: Block, on_step: OnStep | None = None) -> None:
        """All steps of this stage on the parcel's latent, in place (spec dit.md 7.3)."""
        dit, place, spec = self.dit, self.places[number], self.spec
        if dit is None:
            return
        assert place.text is not None
        if block.block == spec.stream.blocks_per_clip and self.shadow_of == number:
            for arena in place.arenas.values():
                arena.copy_sink(self.shadow)
            self.shadow_of = NOBODY
        start, parts, keys = self.start_of(block), self.parcel.parts, self.step_keys(block)
        self.graphs.run("audio", self._hear)
        for key, (step, arena) in zip(keys, place.arenas.items(), strict=True):
            dit.fill_block(self.workspace, arena, start, reference_position(start, block.distances[step]))
            self.graphs.run(key, functools.partial(self._step, step, place))
            if on_step:
                on_step(step, parts["latent"])

    def start_of(self, block: Block) -> int:
        """The block's first latent frame in its stream."""
        return block.block * self.spec.geometry.frames_per_block

    def step_keys(self, block: Block) -> list[Hashable]:
        """The keys of the graphs of the block's steps at this stage, known before any of them runs."""
        if self.dit is None:
            return []
        start, keys = self.start_of(block), list[Hashable]()
        for step, arena in self.places[block.place].arenas.items():
            moved = reference_position(start, block.distances[step]) != arena.reference_position
            keys.append((block.place, step, *self.dit.variant(self.workspace.place_at(start, moved))))
        return keys

    def _hear(self) -> None:
        """The sound of the parcel, as the layers take it, for all steps of this stage."""
        assert self.dit is not None
        heard = self.dit.audio_condition(self.parcel.parts["audio"], self.spec.geometry.frames_per_block)
        for name in ("k", "v", "scale", "shift"):
            getattr(self.audio, name).copy_(getattr(heard, name))

    def _step(self, step: int, place: Place) -> None:
        """One denoising step: what a graph holds."""
        dit, parts = self.dit, self.parcel.parts
        assert dit is not None and place.text is not None
        conditions = (place.text, self.audio, dit.pose_condition(parts.get("pose")))
        arena, latent = place.arenas[step], parts["latent"]
        flow = dit.compute_block(self.workspace, arena, self.tables[step], latent, conditions)
        dit.ops.euler_step(latent, flow, self.spec.schedule.step_size(step), latent)

    def decode(self, number: int, block: int) -> Tensor | None:
        """The video of the parcel's latent, bytes [n, H, W, 3], until the next block is decoded; the stream's first
        frames are left out (spec 2.5). Nothing where the next stage makes it."""
        decoder = self.places[number].decoder
        if self.vae is None or decoder is None:
            return None
        first = decoder.first
        self.graphs.run((number, "decode", first), functools.partial(self._decode, decoder, first))
        decoder.first = False  # a replayed graph sets nothing on the host
        if not self.plan.makes_video:
            return None
        count = len(self.video) - (CHUNK - 1) * first
        return self.video[self.spec.stream.dropped_frames if block == 0 else 0 : count]

    def _decode(self, decoder: FeatureCache, first: bool) -> None:
        """What a graph holds. first: as it was when the block came, whoever has run meanwhile."""
        assert self.vae is not None
        decoder.first = first
        if self.plan.decode == FIRST:
            return self.vae.decode_first(self.parcel.parts["latent"], decoder, self.features)
        if self.plan.decode == SECOND:
            frames = self.vae.decode_second(self.features, self.spec.parcel["latent"][1], decoder)
        else:
            frames = self.vae.decode(self.parcel.parts["latent"], decoder)
        self.vae.to_uint8(frames, self.video[: frames.shape[1]])

    # -- snapshots -------------------------------------------------------------------------------------------------

    def save(self, number: int) -> tuple[Tensors, dict[str, int]]:
        """Copies of a session's memory between two blocks, on the CPU, and the numbers beside them."""
        place = self.places[number]
        numbers = {f"arena.{step}.position": arena.reference_position for step, arena in place.arenas.items()}
        if place.decoder is not None:
            numbers["decoder.first"] = int(place.decoder.first)
        return {name: tensor.detach().cpu().clone() for name, tensor in place.tensors().items()}, numbers

    def load(self, number: int, tensors: Tensors, numbers: Mapping[str, int]) -> None:
        """Take a saved state into the place, which `open` has prepared. InputError where it is of another model."""
        place = self.places[number]
        for name, tensor in place.tensors().items():
            saved = tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                found = "nothing" if saved is None else f"{list(saved.shape)} {saved.dtype}"
                raise InputError(f"the snapshot has {found} for {name}, expected {list(tensor.shape)} {tensor.dtype}")
            tensor.copy_(saved)
        try:
            for step, arena in place.arenas.items():
                arena.reference_position = numbers[f"arena.{step}.position"]
            if place.decoder is not None:
                place.decoder.first = bool(numbers["decoder.first"])
        except KeyError as name:
            raise InputError(f"the snapshot has no number {name}") from None


def nbytes(stage: Stage) -> int:
    """Memory of all sessions' places."""
    return sum(tensor.untyped_storage().nbytes() for place in stage.places.values()
               for tensor in place.tensors().values())  # fmt: skip


def check_latents(tensors: Tensors, geometry: Geometry) -> None:
    """InputError unless reference and motion are latents [16, frames, h, w] of this geometry."""
    shape = (geometry.latent_h, geometry.latent_w)
    for name in ("reference", "motion"):
        if tensors[name].dim() != 4 or tuple(tensors[name].shape[2:]) != shape:
            raise InputError(
                f"the {name} latents have shape {list(tensors[name].shape)}, expected [16, frames, *{shape}]"
            )


def set_device(device: torch.device) -> None:
    """Make it the thread's own, where it is a GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
