# SPDX-License-Identifier: Apache-2.0
"""The groups of fields that a configuration (`config.py`) is made of.

Annotations are real types here (no `from __future__ import annotations`), because the command
line reads them to parse overrides.
"""

import dataclasses
from typing import Any

REFERENCE_TARGETS = "qkv_proj,o_proj,gate_up_proj,down_proj,k_proj,q_proj,out_proj,v_proj"
"""The reference's default list of adapted linears: suffixes of the checkpoint's own names, so on
Phi-3.5-Vision every decoder projection and the CLIP tower's attention."""


class _Group:
    """A group of fields in which a real list of names becomes a comma list when it is set."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
            value = ",".join(value)
        super().__setattr__(name, value)


@dataclasses.dataclass
class ModelConfig(_Group):
    """Where training starts.

    Attributes:
      path: a model folder (Hugging Face layout), or a hub id where a network is there.
      adapter: a PEFT adapter folder to start from; empty for a fresh one.
      dtype: "bfloat16" or "float32": what frozen weights and activations are kept in. Trained
        parameters, the loss and the optimizer are float32 either way.
      image_positions: where image tokens stand, for backbones that have a choice: "mrope",
        "by_vision_start" or "sequential"; empty for what the model was trained with.
      image_markers: what `<|image_k|>` becomes, for backbones that have a choice: "bare" or
        "wrapped"; empty for what the model was trained with.
      template: "none" or "embedding", for backbones that have one; empty for what the model was
        trained with.
      instruction: the instruction in that template; likewise.
    """

    path: str = ""
    adapter: str = ""
    dtype: str = "bfloat16"
    image_positions: str = ""
    image_markers: str = ""
    template: str = ""
    instruction: str = ""


@dataclasses.dataclass
class AdapterConfig(_Group):
    """What is trained.

    Attributes:
      type: "lora", "dora", or "none" for every parameter.
      rank: width of the low-rank product.
      alpha: the product is scaled by alpha / rank.
      dropout: share of the low-rank path's input that is dropped in training.
      dora_dropout: "fused": DoRA needs one product with the frozen weight; "exact": a second one,
        of the dropped input, as PEFT has it. Equal in the mean over draws, and without dropout.
      targets: names of the adapted linears, matched as suffixes; a comma list ("A,B"); "auto"
        for the text model's projections, by the backbone's own names.
    """

    type: str = "dora"
    rank: int = 8
    alpha: float = 64.0
    dropout: float = 0.1
    dora_dropout: str = "fused"
    targets: str = REFERENCE_TARGETS


@dataclasses.dataclass
class DataConfig(_Group):
    """What is learned from.

    Attributes:
      path: folder in MMEB-train's layout, `<path>/<Subset>/<split>-*.parquet`, or own pairs: a
        jsonl, csv or parquet file, or a folder of such files (docs/your-own-data.md); or a TFDS
        data set or a hub id that `python -m vlm2vec_jax.data.prepare` has made ready.
      subsets: which ones, a comma list ("A,B"); empty for every folder found.
      split: "original", "diverse_instruction", or "train" in older releases of MMEB-train.
      image_root: what image paths are relative to; empty for `path`, or the folder in it where
        the images are.
      follow_symlinks: open images to which a symbolic link leads out of the image root.
      splits: splits of single subsets where they differ, a comma list of NAME=SPLIT.
      max_examples_per_subset: the first so many rows of each subset; 0 for all.
      limits: the same for single subsets, a comma list of NAME=ROWS.
      weights: how much of the batches each subset makes up: empty in proportion to its rows, so
        that every row comes once per epoch; "equal"; or a comma list of NAME=WEIGHT for all.
      stop: "first_exhausted" ends the run when the first subset has been gone through once,
        "all_exhausted" when the last has; empty to end after `steps`. `steps` is the most either
        way, and where the schedule ends.
      sub_batch: rows of one subset that stand together in a batch, so that a query meets negatives
        of its own kind; 0 mixes row by row as the reference does.
      num_crops: most local crops per image, for backbones that cut crops; 0 for what the model
        folder says.
      resolution: "native", "high", "mid" or "low", see `options.OPTIONS`; empty for what the model
        was trained with.
      pixel_limits: "folder", "vlm2vec_train" or "vlm2vec_v2", see `options.OPTIONS`; empty for
        what the model was trained with.
      min_pixels: fewest pixels of an image, for backbones of dynamic resolution; 0 for what
        `pixel_limits` says.
      max_pixels: the most; likewise.
      transparency: "white" or "drop"; empty for what the model was trained with.
      target_instruction: what stands in front of targets that are text alone: "task" for words by
        the subset's task (`data/target_instruction.py`), or the words themselves; empty for none.
        It is recorded, and the evaluator does the same.
      max_len: most tokens of a sequence, cutting text and never an image; 0 for what the model
        folder says.
      on_bad_example: "error" stops before the first step and lists them, "skip" leaves them out
        and counts them.
      workers: threads that read and decode ahead of the device; 0 for a choice by CPU count.
    """

    path: str = ""
    subsets: str = ""
    split: str = "original"
    splits: str = ""
    image_root: str = ""
    follow_symlinks: bool = False
    max_examples_per_subset: int = 0
    limits: str = ""
    weights: str = ""
    stop: str = ""
    sub_batch: int = 0
    num_crops: int = 4
    resolution: str = ""
    pixel_limits: str = ""
    min_pixels: int = 0
    max_pixels: int = 0
    transparency: str = ""
    target_instruction: str = ""
    max_len: int = 256
    on_bad_example: str = "error"
    workers: int = 0


@dataclasses.dataclass
class OptimConfig(_Group):
    """AdamW and its schedule, as the reference trains.

    Attributes:
      lr: the peak learning rate.
      warmup_steps: updates in which the rate climbs from 0 to `lr`.
      schedule: what follows until `steps`: "linear" or "cosine" down to 0, or "constant".
      weight_decay: decoupled decay; 0 in the reference.
      clip_norm: gradients above this global norm are scaled down to it; 0 for no clipping.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: added to the root of the second moment.
    """

    lr: float = 2e-5
    warmup_steps: int = 200
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclasses.dataclass
class MeshConfig(_Group):
    """How the devices are laid out; the product is the number of devices used.

    Attributes:
      data: replicas of the weights, each with its own rows; -1 or 0 for all devices that the
        other two leave.
      fsdp: devices that share the weights, each with its own rows.
      tensor: devices that split each layer's width and share rows.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class PackingConfig(_Group):
    """The fixed shapes that sequences are packed into. They bound memory and change no result.

    Attributes:
      row_tokens: length of a packed row; 0 for a choice from the data.
      chunk_tokens: tokens that one device embeds at a time; 0 for the most that fit
        (docs/scaling.md).
    """

    row_tokens: int = 0
    chunk_tokens: int = 0


@dataclasses.dataclass
class CheckpointConfig(_Group):
    """When the state is saved.

    Attributes:
      every: steps between two checkpoints; 0 for one at the end only.
      keep: how many of the newest are kept.
      resume: go on from the newest good checkpoint in `output`; False refuses a used folder.
    """

    every: int = 100
    keep: int = 2
    resume: bool = True


@dataclasses.dataclass
class LossConfig(_Group):
    """Variations of the contrastive loss.

    The defaults are the reference's loss; docs/losses.md says what each variation is good for.

    Attributes:
      mask_duplicate_targets: leave out of a query's negatives the targets that are the very same
        input (text and pixels) as its positive. The reference does not.
      same_query: what the targets of other rows with the very same query are to a query:
        "negative" as in the reference, "mask" to leave them out, "positive" for positives too.
        The last two need mask_duplicate_targets.
      margin: leave out negatives whose cosine exceeds the positive's by more than this; below 0
        for never.
      same_source: a query's negatives come from its own subset only.
      symmetric: targets are held against queries as well; the loss is the mean of both.
      negatives: most hard negatives per row that are read from `neg_text`/`neg_image_path` and
        embedded; 0 leaves them alone.
      private_negatives: a hard negative stands against the query of its row only, not all.
      hardness: a negative's logit grows by this times its cosine, so that near ones weigh more;
        0 for none (LLaVE uses 9).
      matryoshka: widths of prefixes that shall be embeddings of their own, a comma list
        ("256,512"); the full width is always among them.
      learn_temperature: train the temperature; `temperature` is where it starts.
      temperature_lr: its learning rate (of its logarithm), with the shape of `optim.schedule`.
      temperature_min: it stays above this
      temperature_max: and below this.
      form: how the matrix of similarities is gone through: "dense" whole, "tiled" block by block,
        "ring" with embeddings spread over the devices, "auto" by batch size and memory. It
        changes no result.
      tile: rows and columns of a block.
    """

    mask_duplicate_targets: bool = False
    same_query: str = "negative"
    margin: float = -1.0
    same_source: bool = False
    symmetric: bool = False
    negatives: int = 0
    private_negatives: bool = False
    hardness: float = 0.0
    matryoshka: str = ""
    learn_temperature: bool = False
    temperature_lr: float = 1e-2
    temperature_min: float = 0.005
    temperature_max: float = 0.5
    form: str = "auto"
    tile: int = 2048


@dataclasses.dataclass
class TrackingConfig(_Group):
    """Where the numbers of a run go besides `metrics.jsonl`.

    Attributes:
      tensorboard: write TensorBoard events, if it is installed.
      wandb: Weights & Biases: "off", "offline" (into the output, to be sent later) or "online".
      project: Weights & Biases' project.
    """

    tensorboard: bool = True
    wandb: str = "off"
    project: str = "vlm2vec_jax"


@dataclasses.dataclass
class EvalConfig(_Group):
    """A small evaluation during training.

    Attributes:
      every: steps between two; 0 for none. The last step is evaluated, too.
      path: folder in MMEB-eval's layout, of held-out rows.
      subsets: which ones, a comma list; empty for every folder found.
      image_root: what image paths are relative to; empty for `path`.
      max_queries: the first so many queries of each subset; 0 for all.
    """

    every: int = 0
    path: str = ""
    subsets: str = ""
    image_root: str = ""
    max_queries: int = 100
