"""The flags of ``python -m mlx_ltx.generate``, and what each pipeline takes of them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from mlx_ltx.request import (
    CFG_RULES,
    COLOUR_SPACES,
    DEFAULT_FPS,
    DEFAULT_SEED,
    DTYPES,
    FITS,
    GROUP_SIZES,
    QUANTIZE,
    REGENERATE,
    SAMPLERS,
    TOKEN_TILES,
    UPSCALE,
    VAE_TILINGS,
    WEIGHTS,
    ImageInput,
    LoraInput,
    Request,
    Segment,
    VideoInput,
    flag,
)
from mlx_ltx.version import __version__

EXAMPLES = """\
examples:
  python -m mlx_ltx.generate --prompt "a lighthouse at dusk, waves and gulls" --output lighthouse.mp4
  python -m mlx_ltx.generate --model demo --prompt "A red circle moves to the right." --output demo.mp4
  python -m mlx_ltx.generate --prompt "she turns and smiles" --image portrait.jpg --output smile.mp4
  python -m mlx_ltx.generate --replay lighthouse.mp4 --seed 11 --output lighthouse-11.mp4
"""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


class Tuples(argparse.Action):
    """A flag with some values, repeatable; ``const`` makes one thing of each use's values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        assert callable(self.const)
        try:
            made = self.const(*values)
        except (TypeError, ValueError):
            parser.error(f"{option_string} {' '.join(values)}: give {self.form()}")
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest, None) or ()), made))

    def form(self) -> str:
        return " ".join(self.metavar) if isinstance(self.metavar, tuple) else str(self.metavar)


class Single(Tuples):
    """The same for a flag that is given once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        super().__call__(parser, namespace, values, option_string)
        (made,) = getattr(namespace, self.dest)[-1:]
        setattr(namespace, self.dest, made)


def _image(path: str, frame: str = "0", strength: str = "1", crf: str | None = None) -> ImageInput:
    return ImageInput(Path(path), int(frame), float(strength), None if crf is None else int(crf))


def _video(path: str, strength: str = "1") -> VideoInput:
    return VideoInput(Path(path), float(strength))


def _lora(source: str, strength: str = "1", stage: str | None = None) -> LoraInput:
    return LoraInput(source, float(strength), None if stage is None else int(stage))


def _distilled_lora(source: str, strength: str = "1") -> LoraInput:
    return LoraInput(source, float(strength))


def _segment(text: str, seconds: str) -> Segment:
    return Segment(text, float(seconds))


def build_parser() -> Parser:
    """All flags. What is not given is absent from the namespace, so that --replay can tell."""
    parser = Parser(
        prog="mlx_ltx.generate",
        usage="python -m mlx_ltx.generate --prompt TEXT --output FILE.mp4 [flags]",
        description="Make a video with synchronised stereo sound from text, images, sound or video.",
        epilog=_pipeline_list() + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_what(parser.add_argument_group("what to make"))
    _add_model(parser.add_argument_group("with which model, and how"))
    _add_sources(parser.add_argument_group("from sound or video"))
    _add_guidance(parser.add_argument_group("guidance (models that were not distilled)"))
    _add_outputs(parser.add_argument_group("what to write"))
    _add_reports(parser.add_argument_group("what to say"))
    return parser


def _pipeline_list() -> str:
    from mlx_ltx.pipelines.pipeline import pipelines

    width = max(map(len, pipelines()))
    lines = [f"  {pipeline.name:<{width}}  {pipeline.title}" for pipeline in pipelines().values()]
    return "\n".join(["pipelines (--capabilities tells which flags each of them takes):", *lines, "", ""])


def _add_what(group: argparse._ArgumentGroup) -> None:
    prompt = group.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", "-p", metavar="TEXT", help="what is seen and heard; - reads it from standard input")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file")
    prompt.add_argument("--prompts-file", type=Path, metavar="FILE", help="one clip for each line of a file")
    prompt.add_argument(
        "--segment",
        action=Tuples,
        const=_segment,
        nargs=2,
        dest="segments",
        metavar=("TEXT", "SECONDS"),
        help="a prompt for a part of the clip; repeat it for the parts that follow",
    )
    group.add_argument("--enhance-prompt", action="store_true", help="let the text model rewrite the prompt first")
    group.add_argument(
        "--image",
        action=Tuples,
        const=_image,
        nargs="+",
        dest="images",
        metavar=("PATH", "FRAME STRENGTH CRF"),
        help="show this image at a frame (0, the first) with a strength (1), compressed first (33); may be repeated",
    )
    group.add_argument("--fit", choices=FITS, help="how images and videos fill the picture (crop)")
    group.add_argument("--no-audio", dest="audio", action="store_false", help="make a silent clip")
    group.add_argument("--width", type=int, metavar="PIXELS", help="a multiple of 32, or of 64 in two stages")
    group.add_argument("--height", type=int, metavar="PIXELS", help="likewise")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--num-frames", "-n", type=int, metavar="N", help="frames, 8k+1 (121)")
    length.add_argument("--duration", type=float, metavar="SECONDS", help="instead, rounded to such a number of frames")
    group.add_argument("--fps", "--frame-rate", type=float, metavar="N", help=f"frames per second ({DEFAULT_FPS:g})")
    group.add_argument(
        "--seed",
        type=int,
        nargs="+",
        metavar="N",
        help=f"another seed, another clip ({DEFAULT_SEED}); several make several",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        "-m",
        metavar="NAME|PATH|HUB_ID",
        help="a name (python -m mlx_ltx.checkpoints list), a checkpoint or folder, or owner/name on the hub; "
        "by default the best model on this machine",
    )
    group.add_argument(
        "--pipeline", metavar="NAME", help="one of those below; by default distilled or one-stage, as suits the model"
    )
    group.add_argument(
        "--guided",
        action=argparse.BooleanOptionalAction,
        help="denoise with guidance, or as distilled models do, where a pipeline can do both",
    )
    group.add_argument(
        "--lora",
        action=Tuples,
        const=_lora,
        nargs="+",
        dest="loras",
        metavar=("PATH|HUB_ID[:FILE]", "STRENGTH STAGE"),
        help="a LoRA with a strength (1), in one of two stages only if you like; may be repeated",
    )
    group.add_argument("--camera", metavar="MOVE", help="a camera move by its LoRA, such as dolly-in or static")
    group.add_argument(
        "--distilled-lora",
        action=Single,
        const=_distilled_lora,
        nargs="+",
        metavar=("PATH|HUB_ID[:FILE]", "STRENGTH"),
        help="what lets a full model refine in few steps; by default the model's own",
    )
    group.add_argument("--text-encoder", metavar="PATH|HUB_ID", help="a Gemma 3 folder other than the model's own")
    group.add_argument("--spatial-upsampler", metavar="FILE", help="a latent x2 upsampler other than the model's own")
    group.add_argument("--temporal-upsampler", metavar="FILE", help="a latent upsampler for twice the frames")
    group.add_argument(
        "--no-cache", dest="cache", action="store_false", help="read the prompts anew, and keep nothing of them"
    )
    group.add_argument("--dtype", choices=DTYPES, help="precision (auto: bfloat16, or float32 on the CPU backend)")
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="the transformer's: resident in memory, or streamed from disk in every step (auto: what fits)",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZE,
        metavar="KIND",
        help=f"the transformer's large layers in fewer bits: {', '.join(QUANTIZE)} (auto: what fits, 8 at least)",
    )
    group.add_argument("--quantize-text", choices=QUANTIZE, metavar="KIND", help="likewise the text model's")
    group.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, help="numbers that share a scale, for q8 to q4 (64)"
    )
    group.add_argument(
        "--vae-tiling",
        choices=VAE_TILINGS,
        metavar="HOW",
        help="decode the picture whole (none), in bands with less memory and the same result (bands-2 to bands-4), or "
        "in the reference's blended tiles (reference); auto: whole, or in the bands that fit",
    )
    group.add_argument(
        "--token-tiles",
        choices=("auto", "none", *TOKEN_TILES),
        metavar="N",
        help=f"refine the picture in {', '.join(TOKEN_TILES)} overlapping tiles, with less memory and seams that may "
        "show; none: whole; auto: whole unless nothing else fits",
    )
    group.add_argument(
        "--step-cache",
        type=float,
        metavar="THRESHOLD",
        help="leave out denoising steps while what enters the transformer changes by less than this in sum (0.05 to "
        "0.2, say): faster, another result (off)",
    )


def _add_sources(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--audio-path", type=Path, metavar="FILE", help="a2v: the sound to make a picture for")
    group.add_argument(
        "--audio-start-time", dest="audio_start", type=float, metavar="SECONDS", help="from there on (0)"
    )
    group.add_argument(
        "--audio-max-duration", dest="audio_length", type=float, metavar="SECONDS", help="no more of it than this"
    )
    group.add_argument("--video-path", type=Path, metavar="FILE", help="retake, extend, upscale: the clip to work on")
    group.add_argument("--start-time", type=float, metavar="SECONDS", help="retake: begin of the part to make anew")
    group.add_argument("--end-time", type=float, metavar="SECONDS", help="retake: its end")
    group.add_argument("--regenerate", choices=REGENERATE, help="retake: what of that part (both)")
    group.add_argument(
        "--whole-decode", action="store_true", help="retake, extend: take all frames from the decoder, changed or not"
    )
    group.add_argument("--extend-before", type=float, metavar="SECONDS", help="extend: make so much before the clip")
    group.add_argument("--extend-after", type=float, metavar="SECONDS", help="extend: make so much after it")
    group.add_argument("--upscale", choices=UPSCALE, help="upscale: twice the size, or twice the frames (spatial)")
    group.add_argument(
        "--video-conditioning",
        action=Tuples,
        const=_video,
        nargs="+",
        dest="video_conditionings",
        metavar=("PATH", "STRENGTH"),
        help="ic-lora: a reference video with a strength (1); may be repeated",
    )
    group.add_argument(
        "--conditioning-attention-strength",
        dest="attention_strength",
        type=float,
        metavar="X",
        help="ic-lora: how strongly the clip follows the reference, 0 to 1",
    )
    group.add_argument(
        "--conditioning-attention-mask",
        dest="attention_mask",
        type=Path,
        metavar="FILE",
        help="ic-lora: a video of where, white for fully",
    )
    group.add_argument("--skip-stage-2", action="store_true", help="ic-lora: one stage only, at the full size")
    group.add_argument("--reference-video", type=Path, metavar="FILE", help="dub-it: whom to dub")
    group.add_argument(
        "--reference-strength", type=float, metavar="X", help="dub-it: how closely to keep the picture (1)"
    )
    group.add_argument("--hdr", choices=COLOUR_SPACES, help="linear pictures in and out, in this colour space")


def _add_guidance(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", "--num-inference-steps", type=int, metavar="N", help="denoising steps (15, 30 or 40)")
    group.add_argument("--sampler", choices=SAMPLERS, help="one-stage: how a step is made (euler)")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    group.add_argument("--cfg-rule", choices=CFG_RULES, help="how: straight, CFG*, or adaptive projected (plain)")
    group.add_argument("--apg-eta", type=float, metavar="X", help="apg: how much of the contrast to keep, 0 to 1 (1)")
    group.add_argument("--apg-norm-threshold", type=float, metavar="X", help="apg: longest step (0: any)")
    group.add_argument("--apg-momentum", type=float, metavar="X", help="apg: share of earlier steps, -1 to 1 (0)")
    for stream, other, noun in (("video", "a2v", "picture"), ("audio", "v2a", "sound")):
        cfg = [f"--{stream}-cfg-guidance-scale"] + (["--cfg-scale"] if stream == "video" else [])
        group.add_argument(*cfg, dest=f"{stream}_cfg_scale", type=float, metavar="X", help=f"{noun}: prompt (1: off)")
        numbers = (
            (f"--{stream}-stg-guidance-scale", "stg_scale", "perturbed self-attention (0: off)"),
            (f"--{stream}-rescale-scale", "rescale", "pull the contrast back, 0 to 1"),
            (f"--{other}-guidance-scale", "modality_scale", "follow the other modality (1: off)"),
        )
        for name, field, text in numbers:
            group.add_argument(name, dest=f"{stream}_{field}", type=float, metavar="X", help=f"{noun}: {text}")
        group.add_argument(
            f"--{stream}-stg-blocks", type=int, nargs="+", metavar="N", help=f"{noun}: the perturbed blocks"
        )
        group.add_argument(
            f"--{stream}-skip-step", type=int, metavar="N", help=f"{noun}: after each guided step, skip N"
        )


def _add_outputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output", "--output-path", "-o", type=Path, metavar="FILE.mp4", help="the clip")
    group.add_argument(
        "--output-audio", type=Path, metavar="FILE.wav", help="its sound as a file of its own (or .flac)"
    )
    group.add_argument(
        "--contact-sheet", type=Path, metavar="FILE.png", help="some of its frames, and its sound, at a glance"
    )
    group.add_argument("--output-exr", type=Path, metavar="FOLDER", help="hdr: linear half-float frames")
    group.add_argument("--output-hdr", type=Path, metavar="FILE.mp4", help="hdr: a BT.2020 HLG clip (HEVC, 10 bits)")
    group.add_argument("--force", action="store_true", help="overwrite files that exist")


def _add_reports(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="events as JSON lines on standard output")
    group.add_argument("--quiet", "-q", action="store_true", help="nothing but errors")
    group.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    group.add_argument(
        "--assume-memory", metavar="SIZE", help="with --dry-run: plan for a machine with so much memory, such as 16GB"
    )
    group.add_argument("--enhance-only", action="store_true", help="print the rewritten prompt, and stop")
    group.add_argument("--capabilities", action="store_true", help="print what each pipeline takes as JSON, and stop")
    group.add_argument("--show", type=Path, metavar="FILE.mp4", help="print the settings that made a clip, and stop")
    group.add_argument("--replay", type=Path, metavar="FILE.mp4", help="make a clip again; other flags win over it")
    group.add_argument("--version", action="version", version=f"mlx_ltx {__version__}")


def capabilities(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What each pipeline takes, read off the parser itself."""
    from mlx_ltx.pipelines.pipeline import pipelines

    defaults = {entry.name: entry.default for entry in fields(Request)}
    aliases = {"prompt_file": "prompt", "prompts_file": "prompts"}
    flags: dict[str, Any] = {}
    for action in parser._actions:
        name = aliases.get(action.dest, action.dest)
        if name not in defaults:
            continue
        default = defaults[name]
        flags[action.option_strings[0]] = {
            "names": list(action.option_strings),
            "field": name,
            "type": getattr(action.type, "__name__", "bool" if action.nargs == 0 else "str"),
            "values": action.nargs if action.nargs is not None else 1,
            "form": [action.metavar] if isinstance(action.metavar, str) else list(action.metavar or ()),
            "choices": list(action.choices) if action.choices else None,
            "repeatable": isinstance(action, Tuples) and not isinstance(action, Single),
            "default": default if isinstance(default, str | int | float | bool) else None,
            "help": action.help,
        }
    return {
        "version": __version__,
        "flags": flags,
        "pipelines": {
            pipeline.name: {
                "title": pipeline.title,
                "flags": [f for f, entry in flags.items() if entry["field"] in pipeline.accepts],
                "needs": [flag(name) for name in pipeline.needs],
                "guided": pipeline.guided,
                "two_stage": pipeline.two_stage,
            }
            for pipeline in pipelines().values()
        },
    }
