"""Two stages, guided, for models that were not distilled (ltx_pipelines/ti2vid_two_stages.py).

1. Encode the prompt and the negative prompt; encode given images at both sizes.
2. Denoise at half the size with the LTX-2 schedule and guidance, as the one-stage pipeline does.
3. Enlarge the video latent x2, mix noise back in, and refine the picture in 3 steps at full size with the distilled
   LoRA. The sound of the first stage is kept.
4. Decode and write.
"""

from __future__ import annotations

from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.two_stages import TwoStages

RECIPE = TwoStages(keep_first_sound=True)

TAKES = fields.CLIP | fields.GUIDANCE | fields.TWO_STAGES | {"distilled_lora"}

PIPELINE = fields.Pipeline(
    name="two-stage",
    title="guided at half size, enlarged x2, refined; for dev models",
    takes=TAKES,
    guided=True,
    two_stage=True,
    distilled_lora=(0.0, 1.0),
    phases=RECIPE.phases,
    run=RECIPE.run,
)
