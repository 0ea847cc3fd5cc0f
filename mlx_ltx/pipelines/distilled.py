"""Two stages without guidance, for distilled models (ltx_pipelines/distilled.py).

1. Encode the prompt; encode given images at both sizes.
2. Denoise at half the size in 8 steps.
3. Enlarge the video latent x2, mix noise back in, and refine picture and sound in 3 steps at full size.
4. Decode and write.
"""

from __future__ import annotations

from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.two_stages import TwoStages

RECIPE = TwoStages()

PIPELINE = fields.Pipeline(
    name="distilled",
    title="8 steps at half size, enlarged x2, refined in 3 steps; for distilled models",
    takes=(
        fields.PROMPT
        | fields.SEGMENTS
        | fields.SIZE
        | fields.LENGTH
        | fields.IMAGES
        | fields.LORAS
        | fields.TWO_STAGES
        | fields.HDR
    )
    | {"audio"},
    guided=False,
    two_stage=True,
    phases=RECIPE.phases,
    run=RECIPE.run,
)
