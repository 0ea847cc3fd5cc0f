"""Schedules, steps, guidance, conditioning and whole small denoising runs against the reference."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.sampling import schedules
from mlx_ltx.sampling.denoise import Denoiser, Grids, States, TextContext, denoise, euler_step
from mlx_ltx.sampling.geometry import AudioGrid, ClipShape, VideoGrid
from mlx_ltx.sampling.guidance import Guidance, GuidanceParams, Pass
from mlx_ltx.sampling.state import Keyframe, LatentState, ReplacedLatent, audio_state, video_state
from parity import Comparison, GoldenSet, NotCovered, runner


def video_latent(golden: GoldenSet, key: str) -> mx.array:
    """B C F H W to ours, B F H W C."""
    return golden.mx(key).transpose(0, 2, 3, 4, 1)


def audio_latent(golden: GoldenSet, key: str) -> mx.array:
    """B C T M to ours, B T M C."""
    return golden.mx(key).transpose(0, 2, 3, 1)


def reference_order(latent: mx.array) -> mx.array:
    """Channels second, as the reference has them."""
    return mx.moveaxis(latent, -1, 1)


@runner("schedules")
def run_schedules(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    for key in golden.names:
        kind, _, rest = key.partition(".")
        if kind == "ltx2":
            form, steps = rest.rsplit(".", 1)
            tokens = int(form.removeprefix("tokens")) if form.startswith("tokens") else schedules.MAX_TOKENS
            terminal = None if form == "nostretch" else 0.1
            yield golden.compare("", key, schedules.ltx2_schedule(int(steps), tokens, terminal))
        elif kind == "linear_quadratic":
            yield golden.compare("", key, schedules.linear_quadratic_schedule(int(rest)))
        elif kind == "beta":
            yield golden.compare("", key, schedules.beta_schedule(int(rest)))
        elif kind == "distilled":
            yield golden.compare("", key, np.array(schedules.DISTILLED, np.float32))
        elif kind == "stage2":
            yield golden.compare("", key, np.array(schedules.REFINEMENT, np.float32))
        else:
            yield NotCovered(key)


def guider_params(text: str) -> GuidanceParams:
    """From the printed form of the reference's parameters in a set's metadata."""
    values = {key: float(value) for key, value in re.findall(r"(\w+)=(-?[\d.]+)", text)}
    return GuidanceParams(
        cfg_scale=values["cfg_scale"],
        stg_scale=values["stg_scale"],
        rescale=values["rescale_scale"],
        modality_scale=values["modality_scale"],
    )


@runner("steps_guiders")
def run_steps_guiders(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    sigmas = golden.tensors["sigmas"]
    passes = {
        Pass.CONDITIONAL: golden.mx("denoised"),
        Pass.NEGATIVE: golden.mx("uncond"),
        Pass.PERTURBED: golden.mx("perturbed"),
        Pass.ISOLATED: golden.mx("isolated"),
    }
    given = {"sigmas", "sample", "noise", "denoised", "uncond", "perturbed", "isolated"}
    for key in golden.names:
        kind = key.split(".")[0]
        if kind == "euler":
            step = int(key.split(".")[1])
            x = euler_step(golden.mx("sample"), golden.mx("denoised"), float(sigmas[step]), float(sigmas[step + 1]))
            yield golden.compare("", key, x)
        elif kind == "multimodal":
            yield golden.compare("", key, guider_params(golden.cases[key]).combine(passes))
        elif key not in given:
            yield NotCovered(key)
    skips = GuidanceParams(skip_step=2)
    recorded = golden.cases["skip_step2"]
    ours = np.array([skips.skips(step) for step in range(len(recorded))], np.float32)
    yield Comparison("skip_step2", "skipped", ours, np.array(recorded, np.float32))


@runner("conditioning")
def run_conditioning(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    frames, height, width = golden.cases["shapes"]["video_latent"][2:]
    channels = golden.cases["shapes"]["video_latent"][1]
    _, audio_channels, audio_frames, bins = golden.cases["shapes"]["audio_latent"]
    for text, count in golden.cases["audio_frames_for_video"].items():
        clip_frames, fps = text.split("@")
        clip = ClipShape(int(clip_frames), 32, 32, float(fps))
        ours = AudioGrid.of_clip(clip, bins, audio_channels, 16_000, 160, 4).frames
        yield Comparison("audio_frames_for_video", text, np.array([ours]), np.array([count]))

    fps = frame_rate(golden)
    grid = VideoGrid(frames, height, width, channels, 8, 32, fps)
    sound = AudioGrid(audio_frames, bins, audio_channels)
    image, full = video_latent(golden, "in.image_latent"), video_latent(golden, "in.full_latent")
    items = {"latent_index": ReplacedLatent, "keyframe": Keyframe}
    cases = sorted({key.rsplit(".", 1)[0] for key in golden.names if not key.startswith("in.")})
    for case in cases:
        if case.startswith("noise_scale"):  # the name shortens the first sigma of refinement
            state = video_state(grid, initial=full).noised(golden.mx(f"{case}.noise"), schedules.REFINEMENT[0])
            yield golden.compare(case, "noised_latent", state.latent)
        elif case == "initial_video":
            yield from compare_state(golden, case, video_state(grid))
        elif case == "initial_audio":
            yield from compare_state(golden, case, audio_state(sound))
        elif item := re.fullmatch(r"(latent_index|keyframe)(\d+)(?:_s([\d.]+))?", case):
            kind, frame, strength = item.groups()
            given = items[kind](image, int(frame), float(strength or 1))
            yield from compare_state(golden, case, video_state(grid, [given]))
        else:
            yield NotCovered(case)


def frame_rate(golden: GoldenSet) -> float:
    """The set's frames per second: the first latent frame ends after one pixel frame."""
    return float(np.round(1 / golden.tensors["initial_video.positions"][0, 0, 0, 1], 3))


def compare_state(golden: GoldenSet, case: str, state: LatentState) -> Iterator[Comparison]:
    column = lambda values: values[None, :, None]  # noqa: E731
    ours = {"clean_latent": state.clean, "denoise_mask": column(state.mask), "positions": state.positions}
    if state.keyframes is not None:
        ours["keyframes_mask"] = column(state.keyframes)
    if f"{case}.latent" in golden.tensors:
        ours["latent"] = state.latent
    if f"{case}.noise" in golden.tensors:
        ours["noised_latent"] = state.noised(golden.mx(f"{case}.noise")).latent
    for name, value in ours.items():
        yield golden.compare(case, name, value)


def noted_guidance(note: str) -> Guidance:
    """From a note such as "CFG 3/7 + STG 1 block [1] + modality 3 + rescale 0.7" (video/audio)."""
    number = r"([\d.]+)"
    video_cfg, audio_cfg, stg, block, modality, rescale = re.match(
        rf"CFG {number}/{number} \+ STG {number} block \[(\d+)\] \+ modality {number} \+ rescale {number}", note
    ).groups()
    shared = {
        "stg_scale": float(stg),
        "stg_blocks": (int(block),),
        "rescale": float(rescale),
        "modality_scale": float(modality),
    }
    return Guidance(GuidanceParams(float(video_cfg), **shared), GuidanceParams(float(audio_cfg), **shared))


@runner("e2e_*")
def run_end_to_end(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    """Whole denoising runs on the tiny transformers, with the noise that the reference drew."""
    model = load_transformer(golden.checkpoint(golden.name.replace("e2e_", "transformer_")), mx.float32)
    size = golden.cases["geometry"]
    clip = ClipShape(size["frames"], size["height"], size["width"], size["fps"])
    audio_shape, video_shape = golden.tensors["in.audio_latent"].shape, golden.tensors["in.video_latent"].shape
    grids = Grids(
        VideoGrid.of_clip(clip, video_shape[1]),
        AudioGrid(audio_shape[2], audio_shape[3], audio_shape[1]),
    )
    positive = TextContext(golden.mx("ctx.video"), golden.mx("ctx.audio"))
    negative = TextContext(golden.mx("ctx.neg_video"), golden.mx("ctx.neg_audio"))
    image = video_latent(golden, "in.image")

    def run(case: str, states: States, scale: float = 1.0, guidance: Guidance = Guidance()) -> Iterator[Comparison]:  # noqa: B008
        draws = iter(range(len(golden.cases[case]["noise_shapes"])))
        noised = [
            state if state is None else state.noised(golden.mx(f"{case}.noise.{next(draws)}"), scale)
            for state in states
        ]
        yield from compare_run(golden, case, model, States(*noised), grids, positive, negative, guidance)

    fresh = States(video_state(grids.video), audio_state(grids.audio))
    for case in sorted({key.split(".")[0] for key in golden.names} - {"ctx", "in"}):
        if case == "t2v_distilled":
            yield from run(case, fresh)
        elif case == "i2v_distilled":
            note = golden.cases[case]["note"]
            frame, strength = re.search(r"keyframe at (\d+) \(strength ([\d.]+)\)", note).groups()
            given = video_state(grids.video, [ReplacedLatent(image), Keyframe(image, int(frame), float(strength))])
            yield from run(case, States(given, fresh.audio))
        elif case == "guided":
            yield from run(case, fresh, guidance=noted_guidance(golden.cases[case]["note"]))
        elif case == "stage2":
            refined = States(
                video_state(grids.video, initial=video_latent(golden, "in.video_latent")),
                audio_state(grids.audio, audio_latent(golden, "in.audio_latent")),
            )
            yield from run(case, refined, scale=sigmas_of(golden, case)[0])
        elif case == "video_only":
            yield from run(case, States(fresh.video, None))
        elif case == "audio_only":
            yield from run(case, States(None, fresh.audio))
        else:
            yield NotCovered(case)


def compare_run(
    golden: GoldenSet,
    case: str,
    model,
    states: States,
    grids: Grids,
    positive: TextContext,
    negative: TextContext,
    guidance: Guidance,
) -> Iterator[Comparison]:
    denoiser = Denoiser(model, states, positive, guidance, negative)
    loop = denoise(denoiser, states, sigmas_of(golden, case), grids, "denoise")
    while True:
        try:
            next(loop)
        except StopIteration as end:
            final: States = end.value
            break
    if final.video is not None:
        yield golden.compare(case, "video", reference_order(grids.video.unpatchify(final.video.latent)))
    if final.audio is not None:
        yield golden.compare(case, "audio", reference_order(grids.audio.unpatchify(final.audio.latent)))


def sigmas_of(golden: GoldenSet, case: str) -> Sequence[float]:
    return golden.tensors[f"{case}.sigmas"].tolist()


def default_parameters(golden: GoldenSet) -> dict:
    """The reference's default parameters per model generation, as recorded in the schedules set."""
    return json.loads(golden.metadata["cases"])["params"]
