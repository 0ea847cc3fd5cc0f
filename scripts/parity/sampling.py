"""Schedules, steps, samplers, guidance and conditioning against the reference."""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_ltx.sampling import schedules
from mlx_ltx.sampling.conditioning import (
    AttentionStrength,
    AudioReference,
    GeneratedKeyframes,
    Keyframe,
    MaskedLatent,
    Reference,
    ReplacedLatent,
    TemporalRegion,
    evenly_spaced_frames,
)
from mlx_ltx.sampling.denoise import Grids, denoise
from mlx_ltx.sampling.geometry import AudioGrid, ClipShape, VideoGrid
from mlx_ltx.sampling.guidance import Apg, CfgStar, Guidance, GuidanceBySigma, GuidanceParams, Momentum, Pass
from mlx_ltx.sampling.res2s import Res2s, res2s_coefficients, sde_step
from mlx_ltx.sampling.samplers import (
    Draw,
    Euler,
    EulerAncestral,
    EulerCfgPlusPlus,
    GradientEstimating,
    Prediction,
    Sampler,
    euler_step,
)
from mlx_ltx.sampling.state import (
    AudioConditioning,
    Conditioning,
    Latents,
    LatentState,
    States,
    audio_state,
    video_state,
)
from parity import Comparison, GoldenSet, NotCovered, runner

T = TypeVar("T")


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
        elif kind == "tdp":
            yield golden.compare("", key, np.array(schedules.TILED_REFINEMENT, np.float32))
        elif kind == "res2s_coefficients":
            lengths = golden.tensors[key][:, 0]
            yield golden.compare("", key, np.array([(h, *res2s_coefficients(h)) for h in lengths]))
        else:
            yield NotCovered(key)
    for text, frames in golden.cases["keyframe_positions"].items():
        count, clip_frames = text.split("@")
        ours = evenly_spaced_frames(int(count), int(clip_frames))
        yield Comparison("keyframe_positions", text, np.array(ours), np.array(frames))


def guider_params(text: str) -> GuidanceParams:
    """From the printed form of the reference's parameters in a set's metadata."""
    values = {key: float(value) for key, value in re.findall(r"(\w+)=(-?[\d.]+)", text)}
    return GuidanceParams(
        cfg_scale=values["cfg_scale"],
        stg_scale=values["stg_scale"],
        rescale=values["rescale_scale"],
        modality_scale=values["modality_scale"],
    )


# What the recorded guiders were made with, which the file does not say.
GUIDERS = {
    "cfg": GuidanceParams(cfg_scale=3.0),
    "cfg_star": GuidanceParams(cfg_scale=3.0, cfg_rule=CfgStar()),
    "stg": GuidanceParams(stg_scale=1.5),
    "apg": GuidanceParams(cfg_scale=3.0, cfg_rule=Apg(eta=0.5, norm_threshold=2.0)),
    # Its scale of 3 counts from 0. It was called twice, the second time with the perturbed prediction.
    "apg_stateful": GuidanceParams(cfg_scale=4.0, cfg_rule=Apg(eta=0.5, norm_threshold=2.0, momentum=-0.5)),
}


@runner("steps_guiders")
def run_steps_guiders(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    sigmas = golden.tensors["sigmas"].tolist()
    sample, x0, noise = golden.mx("sample"), golden.mx("denoised"), golden.mx("noise")
    passes = {
        Pass.CONDITIONAL: x0,
        Pass.NEGATIVE: golden.mx("uncond"),
        Pass.PERTURBED: golden.mx("perturbed"),
        Pass.ISOLATED: golden.mx("isolated"),
    }
    given = {"sigmas", "sample", "noise", "denoised", "uncond", "perturbed", "isolated"}
    momentum = Momentum()
    for key in golden.names:
        kind, _, rest = key.partition(".")
        if kind in ("euler", "ancestral", "cfgpp", "res2s"):
            form, _, index = rest.rpartition(".")
            sigma, next_sigma = sigmas[int(index)], sigmas[int(index) + 1]
            eta = float(form.removeprefix("eta") or 0)
            if kind == "euler":
                ours = euler_step(sample, x0, sigma, next_sigma)
            elif kind == "ancestral":
                ours = EulerAncestral(lambda _: noise, eta).move(sample, x0, noise, sigma, next_sigma)
            elif kind == "cfgpp":
                sampler = EulerCfgPlusPlus(lambda _: noise, eta)
                ours = sampler.move(sample, x0, passes[Pass.NEGATIVE], noise, sigma, next_sigma)
            else:
                ours = sde_step(sample, x0, np.array(sigma), np.array(next_sigma), noise, 0.5)
            yield golden.compare("", key, ours)
        elif kind == "multimodal":
            yield golden.compare("", key, guider_params(golden.cases[key]).combine(passes))
        elif kind == "guider" and rest.split(".")[0] in GUIDERS:
            name, _, call = rest.partition(".")
            known = passes if call != "1" else passes | {Pass.NEGATIVE: passes[Pass.PERTURBED]}
            yield golden.compare("", key, GUIDERS[name].combine(known, momentum if call else None) - x0)
        elif key not in given:
            yield NotCovered(key)
    skips = GuidanceParams(skip_step=2)
    recorded = golden.cases["skip_step2"]
    ours = np.array([skips.skips(step) for step in range(len(recorded))], np.float32)
    yield Comparison("skip_step2", "skipped", ours, np.array(recorded, np.float32))
    yield compare_bins({float(sigma): scale for sigma, scale in golden.cases["factory_cfg_by_sigma"].items()})


def compare_bins(recorded: dict[float, float]) -> Comparison:
    """Guidance that depends on sigma: bins that end where the recorded scale changes, the highest at 1."""
    bounds = {scale: max(s for s in recorded if recorded[s] == scale and s <= 1) for scale in recorded.values()}
    bins = GuidanceBySigma(tuple((s, Guidance(GuidanceParams(cfg_scale=scale))) for scale, s in bounds.items()))
    ours = np.array([bins.at(sigma).video.cfg_scale for sigma in recorded])
    return Comparison("factory_cfg_by_sigma", "cfg_scale", ours, np.array(list(recorded.values())))


class Toy:
    """The stand-in for a model that the recorded sampler runs were made with."""

    def predict(self, states: States, sigma: float, step: int) -> Generator[float, None, Prediction]:
        yield 1.0
        given = [state.latent for state in states]
        x0 = Latents(*(0.7 * x + 0.2 * mx.sin(3 * x) - 0.1 * sigma for x in given))
        return Prediction(x0, Latents(*(0.6 * x - 0.05 * sigma for x in given)))


def recorded_draws(golden: GoldenSet, case: str, first: int = 0) -> Draw:
    """The noise of a case in its recorded order, from draw number ``first`` on."""
    numbers = itertools.count(first)

    def draw(shape: Sequence[int]) -> mx.array:
        noise = golden.mx(f"{case}.noise.{next(numbers)}")
        assert noise.shape == tuple(shape)
        return noise

    return draw


def finish(generator: Generator[Any, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


@runner("samplers")
def run_samplers(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    """Whole runs of a toy model with partly given tokens."""
    initial = States(*(toy_state(golden, stream) for stream in States._fields))
    short, distilled = (golden.tensors[f"sigmas_{name}"].tolist() for name in ("6", "distilled"))
    for case in sorted(
        {key.split(".")[0] for key in golden.names if not key.startswith("sigmas")} - {"video", "audio"}
    ):
        draw = recorded_draws(golden, case)
        runs: dict[str, tuple[list[float], Sampler]] = {
            "euler": (distilled, Euler()),
            "ge": (distilled, GradientEstimating()),
            "ancestral": (distilled, EulerAncestral(draw)),
            "cfgpp": (distilled, EulerCfgPlusPlus(draw)),
            "res2s": (short, Res2s(draw, draw)),
            "res2s_distilled": (distilled, Res2s(draw, draw)),
            "res2s_nobong": (short, Res2s(draw, draw, refinements=0)),
            "res2s_nonlegacy": (short, Res2s(draw, draw, per_token=True)),
        }
        if case not in runs:
            yield NotCovered(case)
            continue
        sigmas, sampler = runs[case]
        final = finish(denoise(Toy(), initial, sigmas, Grids(None, None), case, sampler))
        yield golden.compare(case, "video", final.video.latent)
        yield golden.compare(case, "audio", final.audio.latent)


def toy_state(golden: GoldenSet, stream: str) -> LatentState:
    return LatentState(
        latent=golden.mx(f"{stream}.latent"),
        clean=golden.mx(f"{stream}.clean_latent"),
        mask=golden.tensors[f"{stream}.denoise_mask"][0, :, 0],
        positions=golden.tensors[f"{stream}.positions"],
    )


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

    # The first latent frame ends after one pixel frame.
    fps = float(np.round(1 / golden.tensors["initial_video.positions"][0, 0, 0, 1], 3))
    grid = VideoGrid(frames, height, width, channels, 8, 32, fps)
    sound = AudioGrid(audio_frames, bins, audio_channels)
    for case in sorted({key.rsplit(".", 1)[0] for key in golden.names if not key.startswith("in.")}):
        if case.startswith("noise_scale"):  # the name shortens the first sigma of refinement
            state = video_state(grid, initial=video_latent(golden, "in.full_latent"))
            state = state.noised(golden.mx(f"{case}.noise"), schedules.REFINEMENT[0])
            yield golden.compare(case, "noised_latent", state.latent)
        elif case == "initial_video":
            yield from compare_state(golden, case, video_state(grid))
        elif case == "initial_audio":
            yield from compare_state(golden, case, audio_state(sound))
        elif case.startswith("audio_"):
            item = recorded_audio_item(golden, case, sound)
            yield from compare_state(golden, case, audio_state(sound, [item])) if item else [NotCovered(case)]
        else:
            items = recorded_items(golden, case, grid)
            initial = video_latent(golden, "in.full_latent") if case == "temporal_region" else None
            yield from compare_state(golden, case, video_state(grid, items, initial)) if items else [NotCovered(case)]


REGION = (0.2, 0.6)  # seconds, of both recorded regions; the file does not say


def recorded_items(golden: GoldenSet, case: str, grid: VideoGrid) -> list[Conditioning]:
    """What a case was made with: from its name and, where that does not say, from its first tokens."""
    image, video = video_latent(golden, "in.image_latent"), video_latent(golden, "in.ref_latent")

    def pixel_frame(token: int) -> int:
        return round(float(golden.tensors[f"{case}.positions"][0, 0, token, 0]) * grid.fps)

    if found := re.fullmatch(r"latent_index(\d+)(?:_s([\d.]+))?", case):
        return [ReplacedLatent(image, int(found[1]), float(found[2] or 1))]
    if found := re.fullmatch(r"keyframe(\d+)(?:_s([\d.]+))?", case):
        return [Keyframe(image, int(found[1]), float(found[2] or 1))]
    if re.fullmatch(r"keyframe\d+_multi", case):
        return [Keyframe(video, pixel_frame(grid.tokens), pixel_frames=(video.shape[1] - 1) * grid.time_scale + 1)]
    if found := re.fullmatch(r"reference(?:_down(\d+))?(?:_temporal(\d+))?(?:_s([\d.]+))?(?:_att([\d.]+))?", case):
        downscale, temporal, strength, attention = found.groups()
        latent = video_latent(golden, "in.ref_half") if downscale else video
        reference = Reference(latent, float(strength or 1), int(downscale or 1), int(temporal or 1))
        return [AttentionStrength(reference, float(attention)) if attention else reference]
    if case == "two_refs_att":
        second = grid.tokens + grid.tokens_per_frame
        third = second + grid.tokens_per_frame * video.shape[1]
        strength = golden.tensors[f"{case}.attention_mask"][0, 0, second]
        return [
            Keyframe(image, pixel_frame(grid.tokens)),
            AttentionStrength(Reference(video), float(strength)),
            Keyframe(image, pixel_frame(third)),
        ]
    if case == "gen_keyframes":
        tokens = range(grid.tokens, golden.tensors[f"{case}.positions"].shape[2], grid.tokens_per_frame)
        return [ReplacedLatent(image), GeneratedKeyframes(tuple(pixel_frame(token) for token in tokens))]
    if case == "mask":
        given = (golden.tensors[f"{case}.clean_latent"][0] != 0).any(axis=-1)
        return [MaskedLatent(video_latent(golden, "in.full_latent"), given.reshape(grid.frames, grid.height, -1))]
    if case == "temporal_region":
        return [TemporalRegion(*REGION)]
    return []


def recorded_audio_item(golden: GoldenSet, case: str, grid: AudioGrid) -> AudioConditioning | None:
    if case == "audio_temporal_region":
        return TemporalRegion(*REGION)
    if case == "audio_reference_negpos":
        tokens = golden.mx("in.audio_ref")
        own = replace(grid, frames=tokens.shape[1])
        return AudioReference(own.unpatchify(tokens), -own.positions()[..., ::-1])
    return None


def compare_state(golden: GoldenSet, case: str, state: LatentState) -> Iterator[Comparison]:
    column = lambda values: values[None, :, None]  # noqa: E731
    ours = {"clean_latent": state.clean, "denoise_mask": column(state.mask), "positions": state.positions}
    if state.keyframes is not None:
        ours["keyframes_mask"] = column(state.keyframes)
    if state.groups is not None:
        ours["attention_mask"] = mx.exp(state.groups.bias(mx.float32).rows(0, state.tokens))[0]
    if f"{case}.latent" in golden.tensors:
        ours["latent"] = state.latent
    if f"{case}.noise" in golden.tensors:
        ours["noised_latent"] = state.noised(golden.mx(f"{case}.noise")).latent
    for name, value in ours.items():
        yield golden.compare(case, name, value)
