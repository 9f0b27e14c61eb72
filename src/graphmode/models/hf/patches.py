"""What this package changes in transformers, or reads of its insides: why, since when it is tried, and until when.

Read this list when transformers has a new version. A test holds it complete: each function of this package that
replaces, registers or reads something inside transformers is named by an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

# The two versions that CI runs: with the oldest the tests that are marked `versions`, with the newest all tests.
OLDEST, NEWEST = "5.17.0", "5.24.0"


@dataclass(frozen=True)
class Patch:
    """One change in transformers, or one use of its insides.

    Attributes:
        module: the file of this package, without its ending.
        where: the functions and classes in it that do this, and the names that they import from inside transformers.
        what: what is changed or read.
        why: what would go wrong without it.
        until: what makes it unnecessary.
        tests: the files below ``tests/`` that show it right.
        tried: the versions of transformers in which these tests run.
    """

    module: str
    where: tuple[str, ...]
    what: str
    why: str
    until: str
    tests: tuple[str, ...]
    tried: tuple[str, ...] = (OLDEST, NEWEST)


PATCHES = (
    Patch(
        "attention",
        ("attention_hook",),
        what="An attention named graphmode is registered, and models are loaded with it.",
        why="A step holds tokens of many sequences, whose keys and values lie in a paged cache.",
        until="transformers has paged attention that a graph can hold on every device.",
        tests=("models/test_attention.py", "models/test_families.py"),
    ),
    Patch(
        "auto",
        ("auto_class",),
        what="The class that belongs to a configuration is read from _model_mapping of the automatic classes.",
        why="A model that cannot run is refused before its weights are read.",
        until="transformers has a public function that returns the class.",
        tests=("models/test_loader.py", "models/test_vision.py"),
    ),
    Patch(
        "auto",
        ("silence_padding_warnings",),
        what="warn_if_padding_and_no_attention_mask of each model does nothing.",
        why="It reads tokens on the host, which no graph can hold, and warns of tokens that are no padding here.",
        until="transformers does not look at tokens to warn.",
        tests=("models/test_families.py",),
    ),
    Patch(
        "compiled",
        ("compile_layers", "_calls", "GradientCheckpointingLayer"),
        what="forward of decoder layers is compiled code; they are found by their base class, and watched by hooks.",
        why="Layers that are not fused spend most of a step between small kernels.",
        until="torch.compile compiles a layer around an attention that it must not see.",
        tests=("models/test_compiled.py",),
    ),
    Patch(
        "dry_run",
        ("dry_run_hook", "dry_run_mask", "cache_shapes", "check_features_apart", "_check_tokens_apart"),
        what="A loaded model runs on three tokens, with an attention and masks that record what they are asked for.",
        why="A model that mixes sequences, or attends in a way of its own, would give wrong tokens and no error.",
        until="models declare what they cache, and that tokens meet in attention alone.",
        tests=("models/test_dry_run.py",),
    ),
    Patch(
        "dry_run",
        ("check_class",),
        what="_is_stateful, _supports_attention_backend and the parameters of forward are read from a model's class.",
        why="A model that cannot run is refused before its weights are read.",
        until="transformers has public names for them.",
        tests=("models/test_dry_run.py",),
    ),
    Patch(
        "experts",
        ("experts_hook", "ExpertsInterface", "RealRows", "share_real_rows", "real_rows"),
        what="Experts named graphmode are registered, and share an object that says which rows are tokens.",
        why="Padding rows must cost nothing, and their experts must not change where real rows are computed.",
        until="the interface of experts passes keyword arguments of the model on, as that of attention does.",
        tests=("models/test_experts.py",),
    ),
    Patch(
        "experts",
        ("_is_swiglu", "compute_experts"),
        what="_apply_gate of a module of experts is called, and tried on a few numbers.",
        why="Whether experts are SwiGLU networks, which have kernels of their own, is not said anywhere.",
        until="modules of experts name their activation and its clamp.",
        tests=("models/test_experts.py",),
    ),
    Patch(
        "routers",
        ("fuse_routers",),
        what="forward of a router is two kernels, where they choose the same experts of random tokens.",
        why="A router is a dozen small kernels, which take longer than its experts in a step of few tokens.",
        until="transformers has an interface for routers.",
        tests=("models/test_experts.py",),
    ),
    Patch(
        "fuse",
        ("fuse", "_merged", "ACT2FN"),
        what="forward of decoder layers, rotary embedding, final norm, embedding and head is a few kernels.",
        why="A layer of transformers is some twenty kernels, of which most wait for the one before in a decode step.",
        until="transformers has an interface for whole layers.",
        tests=("models/test_fuse.py",),
    ),
    Patch(
        "grid_positions",
        ("has_grid_positions", "grid_positions"),
        what="Positions of prompts with images come from get_rope_index, with the arguments that the model knows.",
        why="Each model counts positions of images and frames in a way of its own.",
        until="transformers has one public function for them.",
        tests=("models/test_vision.py",),
    ),
    Patch(
        "latent",
        ("keep_latents",),
        what="expand_kv of an attention module returns what it is given, where it is proven to be one matrix product.",
        why="The cache holds one latent for a token in place of the keys and values of all heads.",
        until="attention modules hand their latents to the attention interface.",
        tests=("models/test_latent.py",),
    ),
    Patch(
        "rotary",
        ("fix_rotary_embeddings",),
        what="LongRoPE and dynamic NTK choose their frequencies once, and their rope_type is then default.",
        why="They choose by the longest sequence of a call, so that one request would change the results of another.",
        until="transformers chooses frequencies when a model is made.",
        tests=("models/test_rotary.py",),
    ),
    Patch(
        "sparse",
        ("use_indexers", "_rotation"),
        what="forward of an indexer chooses among the keys of the paged cache; its module gets the batch as a mask.",
        why="Indexers keep a cache of their own, in which sequences cannot be told apart.",
        until="transformers has an interface for indexers, as for attention.",
        tests=("models/test_latent.py",),
    ),
    Patch(
        "tiny",
        (
            "tiny_config",
            "save_tiny_model",
            "AmbiguousGlobalPerLayerAttributeError",
            "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
            "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
            "TimmWrapperModel",
        ),
        what="The types of models, and the classes of their parts, are read from the tables of the automatic classes.",
        why="The sweep tries every type that there is.",
        until="transformers lists its model types, and makes tiny models, by public names.",
        tests=("observe/test_sweep.py",),
        tried=(NEWEST,),
    ),
    Patch(
        "tokenizer",
        ("decodes_as_its_backend",),
        what="Whether a tokenizer replaces decode or _decode is read from its class.",
        why="The library below decodes many times faster, and must give the same text.",
        until="transformers decodes without looking at each token in Python.",
        tests=("engine/test_text.py",),
        tried=(NEWEST,),
    ),
    Patch(
        "tokenizer",
        ("name_special_tokens",),
        what="The special tokens of a GGUF file's tokenizer are set from the file's configuration.",
        why="Before 5.24 transformers leaves them out, so that no prompt begins as it should.",
        until="5.24 is the oldest version that is supported.",
        tests=("models/test_gguf.py",),
    ),
    Patch(
        "versions",
        ("AutoImageProcessor",),
        what="The class is imported from its file.",
        why="transformers itself gives it in 5.17 only where torchvision is installed.",
        until="5.18 is the oldest version that is supported.",
        tests=("models/test_vision.py",),
    ),
    Patch(
        "versions",
        ("SPARSE_LAYER_TYPES", "post_expert_norm", "layers_that_forget"),
        what="Names and values that differ between versions are put right.",
        why="5.17 has another name for sparse layers, no norm after experts, and no cache for layers that share one.",
        until="5.18 is the oldest version that is supported.",
        tests=("models/test_latent.py", "models/test_experts.py", "models/test_dry_run.py"),
    ),
    Patch(
        "vision",
        ("vision_attention_hook", "VisionTower", "vision_utils"),
        what="A tower gets from vision_utils what it would compute from sizes, and an attention over packed segments.",
        why="It computes bounds of images on the host, which no graph can hold.",
        until="towers take packed patches and their bounds as tensors.",
        tests=("models/test_vision.py",),
    ),
)
