"""An outer scheduler in a few lines: two avatars on one engine, stage by stage in turn.

    python examples/two_sessions.py --checkpoint toon --image samples/toon.png \\
        --audio samples/speech.wav --out videos

Whoever has blocks of many requests to run (SGLang, vLLM-Omni) puts its own policy where `turn` is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from liverelay.engine import Engine, SteppedSession
from liverelay.engine.media import VideoWriter


def blocks(session: SteppedSession, video: VideoWriter) -> Iterator[str]:
    """All work of one session; between two steps anybody else may work."""
    while (job := session.prepare_block()) is not None:
        for stage in range(session.stages):
            session.run_stage(job, stage)
            yield f"block {job.number} stage {stage}"
        session.commit(job)
        chunk = session.decode_block(job)
        video.write(chunk.frames, chunk.audio)
        yield f"block {job.number} decoded"


def turn(works: dict[str, Iterator[str]]) -> None:
    """Round-robin until everybody is done."""
    while works:
        for name in list(works):
            step = next(works[name], None)
            if step is None:
                del works[name]
            else:
                print(f"{name}: {step}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--audio", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two videos")
    a = parser.parse_args()
    a.out.mkdir(exist_ok=True)
    engine = Engine.load(a.checkpoint, device="cpu,cpu")
    prompts = {"anna": "A woman smiles.", "ben": "A man is serious."}
    sessions = {name: engine.open_steps(a.image, prompt, audio=a.audio, max_area=192 * 128, seed=seed)
                for seed, (name, prompt) in enumerate(prompts.items())}  # fmt: skip
    videos = {name: VideoWriter(a.out / f"{name}.mp4", fps=25, size=session.size, audio_rate=16000)
              for name, session in sessions.items()}  # fmt: skip
    turn({name: blocks(session, videos[name]) for name, session in sessions.items()})
    for name, session in sessions.items():
        session.close()
        print(videos[name].close())


if __name__ == "__main__":
    main()
