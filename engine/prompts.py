"""Prompts: each is encoded once and kept, in memory and in the user's cache folder.

The published text encoder has 11 GB, many times what a prompt's states take. Where it lives between two new prompts is
the user's choice: on the device, in the host's memory, from where it is copied for each new prompt, or on the disk.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from liverelay.engine.cache_folder import Cache
from liverelay.engine.checkpoint import CheckpointFiles
from liverelay.engine.config import DiTConfig
from liverelay.engine.errors import CheckpointError, InputError
from liverelay.engine.models.text import TextEncoder
from liverelay.engine.models.weights import open_tensors
from liverelay.engine.relay.room import available_host_bytes

KEPT = 64
KEPT_BYTES = 1 << 29  # twice 64 prompts of 512 tokens at the published width in bfloat16
HOMES = ("device", "host", "disk")


def check_home(home: str | None) -> None:
    """Raises InputError for a place where no text encoder can live."""
    if home is not None and home not in HOMES:
        raise InputError(f"a text encoder cannot live in '{home}'; there is: {', '.join(HOMES)}")


class Prompts:
    """Encodes prompts for one transformer; the 64 used last are kept. For any thread; one prompt is encoded at a time.

    device, dtype: where and in what the encoder computes. home: where its weights are between new prompts, one of
    HOMES; None: in the host's memory if that has room for them twice, else on the disk. say: is told what is loaded.
    """

    def __init__(
        self, files: CheckpointFiles, config: DiTConfig, device: torch.device, dtype: torch.dtype, *,
        home: str | None = None, say: Callable[[str], None] = lambda line: None,
    ) -> None:
        check_home(home)
        self._files, self._config, self._device, self._dtype = files, config, device, dtype
        self._home, self._say = home, say
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._cache = Cache("prompts", entries=KEPT, nbytes=KEPT_BYTES)
        self._encoder: TextEncoder | None = None
        self._lock = threading.Lock()

    def states(self, prompt: str) -> Tensor:
        """The prompt's states [n, text_dim] on the host, n <= text_len.

        Raises CheckpointError where the encoder's file or its tokenizer cannot be used.
        """
        with self._lock:
            if prompt not in self._kept:
                self._kept[prompt] = self._found(prompt)
            self._kept.move_to_end(prompt)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[prompt]

    def _found(self, prompt: str) -> Tensor:
        """From the cache folder, or encoded and put there."""
        key = self._key(prompt)
        states = self._restored(self._cache.get(key))
        if states is None:
            states = self._encode(prompt)
            self._cache.put(key, safetensors.torch.save({"states": states}))
        return states

    def _key(self, prompt: str) -> str:
        """The prompt's key in the cache; the prompt cannot be read from it."""
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        return json.dumps([self._computed_by, digest])

    @functools.cached_property
    def _computed_by(self) -> list[str]:
        """All that decides the states beside the prompt: files, precision, and what computes."""
        cuda = self._device.type == "cuda"
        name = torch.cuda.get_device_name(self._device) if cuda else "cpu"
        files = [self._files.text, *sorted(self._files.tokenizer.glob("*"))]
        computed = [name, str(self._dtype), torch.__version__, str(self._config.text_len)]
        return [*map(_identity, files), *computed]

    def _restored(self, payload: bytes | None) -> Tensor | None:
        """States from the cache; None where they are not there, or not such as this encoder makes."""
        if payload is None:
            return None
        try:
            states = safetensors.torch.load(payload).get("states")
        except SafetensorError:
            return None
        if states is None or states.dim() != 2 or states.dtype != self._dtype:
            return None
        fits = 0 < states.shape[0] <= self._config.text_len and states.shape[1] == self._config.text_dim
        return states if fits else None

    def _encode(self, prompt: str) -> Tensor:
        encoder = self._encoder or self._load()
        states = encoder.encode(prompt)
        if states.shape[1] != self._config.text_dim:
            raise CheckpointError(
                f"{self._files.text} has width {states.shape[1]}, the transformer expects {self._config.text_dim}"
            )
        if encoder.home is not None:
            self._encoder = encoder
        return states.cpu().clone()  # a plain tensor of its own, though it was computed in inference mode

    def _load(self) -> TextEncoder:
        """The encoder, whose weights are where they will stay."""
        weights, config = open_tensors(self._files.text), self._config
        size = sum(tensor.numel() for tensor in weights.values()) * self._dtype.itemsize
        home = self._home
        if home is None:
            free = available_host_bytes()
            home = "host" if free is not None and free >= 2 * size else "disk"
        self._say(f"loading the text encoder, {size / 2**30:.1f} GiB (kept: {home})")
        return TextEncoder.load(
            weights, self._files.tokenizer, device=self._device, dtype=self._dtype, text_len=config.text_len,
            home={"device": self._device, "host": torch.device("cpu"), "disk": None}[home],
        )  # fmt: skip


def _identity(path: Path) -> str:
    """A file's path, size and time of writing, as they are now."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
