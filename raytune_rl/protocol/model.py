"""Which model a worker loads, and how log-probs are taken of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raytune_rl.protocol.media import NO_LIMITS, MediaLimits, Modality

Sharing = Literal["auto", "true", "false"]
"""Whether what rows have in common at their beginning is computed once: where it pays, wherever it can be, or
never."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model a worker loads, and how.

    Attributes:
        path: Local directory.
        dtype: torch dtype name, or None for the model's own (float32 on a CPU).
        attn_impl: Attention kernel, or None for the best there is.
        layout: "padded" or "packed" micro-batches.
        trust_remote_code: Run code from the model's directory.
        adapters: Adapter directories to start from.
        quant_bits: 4 for a base quantised to NF4, or None.
        use_hf: A hub id is one of Hugging Face instead of ModelScope.
        media_limits: Models that take media: how much of one is shown.
        modalities: The modalities in the data.
        media_threads: Threads that make the pixels of coming micro-batches.
        liger: Use liger-kernel's layers on a GPU.
        packing_flag: By which the user asked for the packed layout; empty: it is a default, and padded rows
            do as well.
        own_dropout: Whether training has the dropout of the model's config.
        sharing: Whether rows that begin alike share that part, if the model can.
    """

    path: str
    dtype: str | None
    attn_impl: str | None
    layout: str
    trust_remote_code: bool = False
    adapters: tuple[str, ...] = ()
    quant_bits: int | None = None
    use_hf: bool = False
    media_limits: MediaLimits = NO_LIMITS
    modalities: tuple[Modality, ...] = ()
    media_threads: int = 1
    liger: bool = False
    packing_flag: str = ""
    own_dropout: bool = False
    sharing: Sharing = "false"


@dataclass(frozen=True)
class TowerSize:
    """How large the tower of a model that sees is.

    Attributes:
        layers, hidden, intermediate: Of it.
        patches: That become one token of the language model.
        trained: Whether something in it, or between it and the language model, is trained.
    """

    layers: int
    hidden: int
    intermediate: int
    patches: float
    trained: bool = False


@dataclass(frozen=True)
class ModelSize:
    """How large a model is.

    Attributes:
        parameters: All, without adapters.
        linear: Those in linear layers but the head: what quantisation makes small.
        trained: What a tuner trains, adapters included.
        trained_16_bit: Of those, the ones in the base's dtype; adapters are float32.
        layers, hidden, intermediate, vocabulary: Of the language model; `intermediate` counts the experts
            that a token passes.
        kv_width: Numbers that a token leaves in the key-value cache, a layer.
        tower: Of images; None where the model sees none.
    """

    parameters: int
    linear: int
    trained: int
    trained_16_bit: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int
    tower: TowerSize | None = None


@dataclass(frozen=True)
class Settled:
    """How the rows of a model's micro-batches are laid out (`workers.isolation`).

    Attributes:
        layout: "padded" or "packed".
        notices: What the user is to know of it.
        sharing: As in `ModelSpec`; "false" where the model cannot.
    """

    layout: str
    notices: tuple[str, ...] = ()
    sharing: Sharing = "false"


@dataclass(frozen=True)
class ScoreSettings:
    """How log-probs are taken.

    Attributes:
        temperature: Divides the logits.
        timeout_s: Deadline for reading rows from the object store, seconds.
        disallowed_token_ids: Tokens that sampling never gives; the distribution is over the others.
    """

    temperature: float
    timeout_s: float
    disallowed_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Traits:
    """Traits of a model's architecture that decide how an engine is set up.

    Attributes:
        experts: It is a mixture of experts.
        recurrent: Some layers keep a state or a window of inputs instead of keys and values.
        bfloat16: On a CPU vLLM computes it in bfloat16 only.
        delta_head: Width of the heads of its gated delta nets; 0 without any.
        not_on_cpu: Why vLLM cannot sample from it on a CPU; empty if it can.
        serves_adapters: vLLM takes LoRA adapters beside it, as far as is known.
    """

    experts: bool = False
    recurrent: bool = False
    bfloat16: bool = False
    delta_head: int = 0
    not_on_cpu: str = ""
    serves_adapters: bool = True


@dataclass(frozen=True)
class TunerSettings:
    """Settings of the tuner; names and defaults are ms-swift's.

    Attributes:
        tuner_type: "full" or "lora".
        lora_rank, lora_alpha, lora_dropout: of LoRA (Hu et al. 2021): W + alpha / rank * B A.
        lora_bias: "none", "all" or "lora_only".
        use_rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023).
        use_dora: train magnitude and direction apart (Liu et al. 2024).
        init_weights: PEFT's init_lora_weights ("true", "false", "gaussian", "pissa", ...).
        target_modules: "all-linear" (every nn.Linear but the output head; of a vision model only the parts
            that are not frozen), "all-embedding", or module name suffixes.
        target_regex: full match on module names; replaces target_modules.
        target_parameters: endings of parameters that get an adapter though they lie in no linear layer, such
            as "mlp.experts.down_proj"; beside the modules.
        modules_to_save: modules trained in full and stored with the adapter.
        freeze_llm, freeze_vit, freeze_aligner: parts of a vision model that stay as they are.
    """

    tuner_type: Literal["full", "lora"] = "lora"
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_weights: str = "true"
    target_modules: tuple[str, ...] = ("all-linear",)
    target_regex: str | None = None
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    freeze_llm: bool = False
    freeze_vit: bool = True
    freeze_aligner: bool = True
