"""`python -m bench.live_audio --checkpoint DIR`: what hearing a sound live changes in the audio features.

For several windows: relative distance of the live features to the published whole-file ones, and to whole-file ones on
live's own time grid (what the window and the running loudness cost); medians over the wav2vec2 states.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from liverelay.engine.checkpoint import find_checkpoint
from liverelay.engine.models.audio import AudioEncoder, load_waveform
from liverelay.engine.models.audio_live import LiveAudioConfig, live_distance

WINDOWS = ((1.0, 0.0), (4.0, 0.0), (4.0, 0.2), (4.0, 1.0), (12.0, 0.2), (60.0, 5.0))
SPEECH = Path(__file__).resolve().parents[1] / "samples" / "speech.wav"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.live_audio", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--audio", type=Path, default=SPEECH, metavar="FILE")
    arguments = parser.parse_args()
    encoder = AudioEncoder.load(find_checkpoint(arguments.checkpoint).audio, dtype=torch.float32)
    waveform, rows = load_waveform(arguments.audio), []
    print("window before / after the block    to the published    of which the window")
    for before, after in WINDOWS:
        distance = live_distance(encoder, waveform, LiveAudioConfig(before, after))
        published, window = (float(np.median(part)) for part in (distance.published, distance.window))
        rows.append({"left_context_s": before, "look_ahead_s": after, "published": published, "window": window})
        print(f"{before:6.1f} s / {after:.1f} s {published:27.3f} {window:21.3f}")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
