"""Whole small denoising runs on tiny transformers, with the noise that the reference drew."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.sampling.conditioning import (
    AttentionStrength,
    GeneratedKeyframes,
    Keyframe,
    Reference,
    ReplacedLatent,
    TemporalRegion,
    generated_keyframes,
)
from mlx_ltx.sampling.denoise import Denoiser, Grids, TextContext, denoise
from mlx_ltx.sampling.geometry import AudioGrid, ClipShape, VideoGrid
from mlx_ltx.sampling.guidance import Guidance, GuidanceParams
from mlx_ltx.sampling.res2s import Res2s
from mlx_ltx.sampling.samplers import Draw, Euler, EulerAncestral, Sampler
from mlx_ltx.sampling.state import States, audio_state, video_state
from parity import Comparison, GoldenSet, NotCovered, runner
from parity.sampling import audio_latent, finish, recorded_draws, reference_order, video_latent

PLAIN = Guidance()
NUMBER = r"([\d.]+)"
# What the notes leave out: the scales of the run with res_2s, and the frames of the generated keyframes.
RES2S_GUIDANCE = Guidance(
    GuidanceParams(cfg_scale=3.0, rescale=0.7, modality_scale=3.0),
    GuidanceParams(cfg_scale=7.0, rescale=0.7, modality_scale=3.0),
)
SLOTS = (5, 12)


@dataclass(frozen=True)
class Case:
    """How a recorded run was made: its states before noise, and what differs from a plain distilled run."""

    states: States
    scale: float = 1.0
    guidance: Guidance = PLAIN
    sampler: Callable[[Draw], Sampler] = lambda draw: Euler()


class Runs:
    """A set's model and inputs, and the cases that can be made with them."""

    def __init__(self, golden: GoldenSet):
        self.golden = golden
        self.model: Transformer = load_transformer(
            golden.checkpoint(golden.name.replace("e2e_", "transformer_")), mx.float32
        )
        size = golden.cases["geometry"]
        clip = ClipShape(size["frames"], size["height"], size["width"], size["fps"])
        audio_shape, video_shape = golden.tensors["in.audio_latent"].shape, golden.tensors["in.video_latent"].shape
        self.video = VideoGrid.of_clip(clip, video_shape[1])
        self.audio = AudioGrid(audio_shape[2], audio_shape[3], audio_shape[1])
        self.positive = TextContext(golden.mx("ctx.video"), golden.mx("ctx.audio"))
        self.negative = TextContext(golden.mx("ctx.neg_video"), golden.mx("ctx.neg_audio"))

    def case(self, name: str) -> Case | None:
        """How a case was made, from its note; None for one that is not known."""
        golden, video, audio = self.golden, self.video, self.audio
        note = golden.cases[name]["note"]
        image = video_latent(golden, "in.image")
        given_video, given_audio = video_latent(golden, "in.video_latent"), audio_latent(golden, "in.audio_latent")
        fresh_video, fresh_audio = video_state(video), audio_state(audio)
        fresh = States(fresh_video, fresh_audio)
        match name:
            case "t2v_distilled":
                return Case(fresh)
            case "i2v_distilled":
                frame, strength = re.search(rf"keyframe at (\d+) \(strength {NUMBER}\)", note).groups()
                items = [ReplacedLatent(image), Keyframe(image, int(frame), float(strength))]
                return Case(States(video_state(video, items), fresh_audio))
            case "guided":
                return Case(fresh, guidance=noted_guidance(note))
            case "stage2":
                refined = States(video_state(video, initial=given_video), audio_state(audio, initial=given_audio))
                return Case(refined, scale=golden.tensors[f"{name}.sigmas"].tolist()[0])
            case "a2v":
                return Case(States(fresh_video, audio_state(audio, initial=given_audio).freeze()))
            case "retake":
                start, end = re.search(rf"\[{NUMBER},{NUMBER}\)", note).groups()
                region = TemporalRegion(float(start), float(end))
                return Case(
                    States(video_state(video, [region], given_video), audio_state(audio, [region], given_audio))
                )
            case "ic_lora":
                strength = float(re.search(rf"attention strength {NUMBER}", note)[1])
                item = AttentionStrength(Reference(video_latent(golden, "in.ref")), strength)
                return Case(States(video_state(video, [item]), fresh_audio))
            case "video_only":
                return Case(States(fresh_video, None))
            case "audio_only":
                return Case(States(None, fresh_audio))
            case "hq_res2s":
                return Case(fresh, guidance=RES2S_GUIDANCE, sampler=lambda draw: Res2s(draw, draw))
            case "ancestral":
                return Case(fresh, sampler=EulerAncestral)
            case "gen_keyframes":
                items = [ReplacedLatent(image), GeneratedKeyframes(SLOTS)]
                return Case(States(video_state(video, items), fresh_audio))
        return None

    def compare(self, name: str, case: Case) -> Iterator[Comparison]:
        golden = self.golden
        draw = recorded_draws(golden, name)
        states = States(*(s if s is None else s.noised(draw(s.latent.shape), case.scale) for s in case.states))
        denoiser = Denoiser(self.model, states, self.positive, case.guidance, self.negative)
        sigmas = golden.tensors[f"{name}.sigmas"].tolist()
        final = finish(denoise(denoiser, states, sigmas, Grids(self.video, self.audio), name, case.sampler(draw)))
        if final.video is not None:
            yield golden.compare(name, "video", reference_order(self.video.unpatchify(final.video.latent)))
            keyframes = generated_keyframes(final.video, self.video)
            if keyframes is not None:
                yield golden.compare(name, "generated_keyframes", reference_order(keyframes))
        if final.audio is not None:
            yield golden.compare(name, "audio", reference_order(self.audio.unpatchify(final.audio.latent)))


def noted_guidance(note: str) -> Guidance:
    """From a note such as "CFG 3/7 + STG 1 block [1] + modality 3 + rescale 0.7" (video/audio)."""
    video_cfg, audio_cfg, stg, block, modality, rescale = re.match(
        rf"CFG {NUMBER}/{NUMBER} \+ STG {NUMBER} block \[(\d+)\] \+ modality {NUMBER} \+ rescale {NUMBER}", note
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
    """Every recorded run, by name."""
    runs = Runs(golden)
    for name in sorted({key.split(".")[0] for key in golden.names} - {"ctx", "in"}):
        case = runs.case(name)
        yield from runs.compare(name, case) if case else [NotCovered(name)]
