"""The demo's text model: a small Gemma 3 with a byte-level tokeniser trained on the sentences below."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo_weights.tensors import Tensors

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # Gemma's names, at Gemma's places
VOCABULARY = 1024

# What prompts for clips with sound talk about. They decide only which pieces of words become tokens.
SENTENCES = """
A red kite climbs over pale dunes while the wind rattles its tail and gulls cry in the distance.
A close-up of a barista pouring steamed milk into a cup, soft morning light, the hiss of the machine behind her.
The camera slowly moves forward through a quiet forest at dawn, mist between the trees, birds singing.
Wide shot of a stormy sea, waves crashing against black rocks, spray in the air, deep rumbling sound.
An old man with a grey beard sits on a wooden bench and says: "We have waited long enough."
A woman in a yellow raincoat walks along a wet street at night, neon signs reflected in the puddles, rain falling.
A small robot looks up at the sky, turns its head to the left and beeps twice.
Two children run across a field of tall grass, laughing, handheld camera, golden hour.
A black cat jumps onto the window sill, stretches and begins to purr, warm light from a lamp.
The train leaves the station, the camera pans to the right, the whistle echoes between the buildings.
An astronaut floats above the blue planet, slow motion, soft electronic music, no voice.
A bowl of steaming soup on a table, the spoon stirs slowly, quiet kitchen sounds, shallow depth of field.
Fireworks burst over a river, red, green, blue and purple, the crowd cheers, loud bangs follow each flash.
A drummer plays a fast rhythm on stage, the lights flicker, the audience claps along.
A time-lapse of clouds moving over snowy mountains, from sunrise to sunset, with a calm piano melody.
An aerial view of a city at night, cars moving like rivers of light, a low hum of traffic.
The dog barks twice, shakes the water from its fur and runs towards the camera on the beach.
A paper boat drifts down a small stream, water bubbling over stones, sunlight through the leaves.
A singer stands at the microphone, closes her eyes and sings a slow song, the background is dark and out of focus.
The clock on the wall ticks, dust dances in the light, nobody is in the room.
A blacksmith strikes glowing iron with a hammer, sparks fly, the ring of metal fills the workshop.
An animated fox in the style of a watercolour painting trots through falling autumn leaves.
A cinematic portrait of a young woman, she turns to the camera and smiles, natural skin, gentle wind in her hair.
The bus stops, the doors open with a sigh of air, people with umbrellas step out and hurry away.
A glass falls from the table in slow motion and shatters on the stone floor, pieces scatter in every direction.
A bee lands on a purple flower, macro shot, buzzing, the petals tremble.
Horses gallop over a green hill, thundering hooves, dramatic orchestra music, wide angle.
A chef slices vegetables quickly on a board, the knife taps in rhythm, steam rises from a pan.
Snow falls on an empty street, footsteps crunch, somewhere a bell rings.
Candles on a birthday cake are blown out, everybody shouts and claps, confetti in the air.
A sailing ship passes under a bridge, ropes creak, the water is calm and grey.
An orange balloon rises between tall buildings until it is only a dot in the white sky.
The waterfall roars behind a hiker who shouts something that cannot be heard.
A violin player in a long black dress performs in an empty hall, the sound is warm and rich.
A campfire crackles under the stars, three friends talk quietly, an owl calls.
Static camera, a lighthouse turns its beam through the fog, a horn sounds every few seconds.
A red sports car drives fast along the coast, the engine growls, the camera follows from above.
Raindrops run down a window, behind it the lights of the city are blurred, slow jazz plays.
A scientist in a white coat lifts a glass of glowing green liquid and whispers: "It works."
Black and white film of a crowded market, traders call out, chickens cluck, an accordion plays.
"""


def gemma_config(sizes: dict[str, int]) -> dict[str, Any]:
    """``config.json``: ``sizes`` gives hidden_size, num_hidden_layers, intermediate_size, heads and head_dim."""
    layers = sizes["num_hidden_layers"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **sizes,
        "vocab_size": VOCABULARY,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": sizes["head_dim"],
        "sliding_window": 512,
        "layer_types": ["full_attention" if i == layers - 1 else "sliding_attention" for i in range(layers)],
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "pad_token_id": SPECIAL.index("<pad>"),
        "eos_token_id": SPECIAL.index("<eos>"),
        "bos_token_id": SPECIAL.index("<bos>"),
        "torch_dtype": "bfloat16",
    }


def put_gemma(t: Tensors, config: dict[str, Any]) -> None:
    """The decoder; Gemma's norms store their weights minus one."""
    dim, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    # Embeddings are multiplied by the square root of their width.
    t.random("model.embed_tokens.weight", config["vocab_size"], dim, std=1 / np.sqrt(dim))
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, inputs, outputs in (
            ("self_attn.q_proj", dim, config["num_attention_heads"] * head),
            ("self_attn.k_proj", dim, config["num_key_value_heads"] * head),
            ("self_attn.v_proj", dim, config["num_key_value_heads"] * head),
            ("self_attn.o_proj", config["num_attention_heads"] * head, dim),
            ("mlp.gate_proj", dim, inner),
            ("mlp.up_proj", dim, inner),
            ("mlp.down_proj", inner, dim),
        ):
            t.linear(f"{layer}.{name}", inputs, outputs, bias=False)
        for name in ("q_norm", "k_norm"):
            t.put(f"{layer}.self_attn.{name}.weight", np.zeros(head))
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            t.put(f"{layer}.{name}_layernorm.weight", np.zeros(dim))
    t.put("model.norm.weight", np.zeros(dim))


def make_tokenizer(sentences: Sequence[str] | None = None) -> Tokenizer:
    """Byte-level BPE: any text has tokens, and a prompt starts with ``<bos>``.

    Args:
        sentences: what decides which pieces of words become tokens; those above by default.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences or SENTENCES.strip().splitlines(), trainer)
    bos = ("<bos>", SPECIAL.index("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [bos])
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, length: int = 1024) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        tokenizer: by default that of the sentences above.
        length: tokens and padding of a prompt together.

    Raises:
        ValueError: the sentences give another number of tokens than the model has embeddings for.
    """
    tokenizer = tokenizer or make_tokenizer()
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
