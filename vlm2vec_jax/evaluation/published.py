# SPDX-License-Identifier: Apache-2.0
"""Published scores on MMEB's 36 image datasets, for tables that show ours beside them.

Percent of queries answered right (hit@1). Sources are named per model; nothing here was measured
by this project. Averages are what the source prints and stand beside the scores per dataset, from
which they follow up to the rounding of both (`tests/test_evaluation_published.py` lists where the
sources contradict themselves).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

GROUPS = ("classification", "vqa", "retrieval", "grounding", "ind", "ood", "all")
"""Keys of averages: the four meta-tasks, in and out of distribution, all 36."""

PAPER = "VLM2Vec paper, arXiv 2410.05160"
CARD = "model card on the hub"
MOCA = "appendix of the MoCa paper, arXiv 2506.23115"
RERUN = "score files v2.0.1 of the VLM2Vec authors, run with their V2 code"


@dataclasses.dataclass(frozen=True)
class Published:
    """What a source says about one model.

    Attributes:
      model: the name that tables show.
      source: where the numbers stand.
      reference: whether it is one of VLM2Vec's own models.
      scores: percent by dataset (MMEB-eval's spelling); empty if only averages are published.
      averages: percent by group (`GROUPS`), those that are printed.
    """

    model: str
    source: str
    reference: bool
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    averages: Mapping[str, float] = dataclasses.field(default_factory=dict)


# Per dataset: table 6 of the VLM2Vec paper up to LLaVA (1.6 at 1344 pixels; UniIR is CLIP_SF),
# MoCa's appendix from MMRet on.
_PAPERS = """
dataset           CLIP OpenCLIP SigLIP BLIP2 MagicL E5-V UniIR LLaVA MMRet mmE5 MoCa-3B MoCa-7B
ImageNet-1K       55.8     63.5   45.4  10.3   48.0  9.6  58.3  74.5  58.8 77.6    75.4    78.0
N24News           34.7     38.6   13.9  36.0   33.7 23.4  42.5  80.3  71.3 82.1    80.9    81.5
HatefulMemes      51.1     51.7   47.2  49.6   49.0 49.7  56.4  67.9  53.7 64.3    70.6    77.6
VOC2007           50.7     52.4   64.3  52.1   51.6 49.9  66.2  91.5  85.0 91.0    87.0    90.0
SUN397            43.4     68.8   39.6  34.5   57.0 33.1  63.2  75.8  70.0 77.9    74.8    76.8
Place365          28.5     37.8   20.0  21.5   31.5  8.6  36.5  44.0  43.0 42.6    38.8    43.0
ImageNet-A        25.5     14.2   42.6   3.2    8.0  2.0   9.8  43.6  36.1 56.7    39.7    52.7
ImageNet-R        75.6     83.0   75.0  39.7   70.9 30.8  66.2  79.8  71.6 86.3    75.4    83.0
ObjectNet         43.4     51.4   40.3  20.6   31.6  7.5  32.2  39.6  55.8 62.2    31.3    45.2
Country211        19.2     16.8   14.2   2.5    6.2  3.1  11.3  14.7  14.7 34.8    24.0    30.4
OK-VQA             7.5     11.5    2.4   8.7   12.7  8.9  25.4  69.0  73.3 67.9    40.0    36.9
A-OKVQA            3.8      3.3    1.5   3.2    2.9  5.9   8.8  54.4  56.7 56.4    54.6    57.1
DocVQA             4.0      5.3    4.2   2.6    3.0  1.7   6.2  52.0  78.5 90.3    93.0    94.3
InfographicsVQA    4.6      4.6    2.7   2.0    5.9  2.3   4.6  30.7  39.3 56.2    67.7    77.2
ChartQA            1.4      1.5    3.0   0.5    0.9  2.4   1.6  34.8  41.7 50.3    64.1    69.8
Visual7W           4.0      2.6    1.2   1.3    2.5  5.8  14.5  49.8  49.5 51.9    61.6    58.5
ScienceQA          9.4     10.2    7.9   6.8    5.2  3.6  12.8  42.1  45.2 55.7    45.4    59.2
VizWiz             8.2      6.6    2.3   4.0    1.7  2.6  24.3  43.0  51.7 52.8    52.3    46.2
GQA               41.3     52.5   57.5   9.7   43.5  7.8  48.8  61.2  59.0 62.1    66.9    71.6
TextVQA            7.0     10.9    1.0   3.3    4.6  8.2  15.1  62.0  79.0 83.5    83.1    75.8
VisDial           30.7     25.4   21.5  18.0   24.8  9.2  42.2  80.9  83.0 73.7    80.5    84.5
CIRR              12.6     15.4   15.1   9.8   39.1  6.1  51.3  49.9  61.4 54.9    55.7    53.4
VisualNews_t2i    78.9     74.0   51.0  48.1   50.7 13.5  74.3  75.4  74.2 77.7    74.4    78.2
VisualNews_i2t    79.6     78.0   52.4  13.5   21.1  8.1  76.8  80.0  78.1 83.4    77.8    83.1
MSCOCO_t2i        59.5     63.6   58.3  53.7   54.1 20.7  68.5  75.7  78.6 76.2    76.4    79.8
MSCOCO_i2t        57.7     62.1   55.0  20.3   40.0 14.0  72.1  73.1  72.4 73.6    72.6    73.9
NIGHTS            60.4     66.1   62.9  56.5   58.1  4.2  66.2  65.5  68.3 68.8    67.4    66.7
WebQA             67.5     62.1   58.1  55.4   43.0 17.7  89.6  87.6  90.2 88.1    90.6    91.4
OVEN              41.1     45.0   56.0  39.5    1.6  5.9  69.4  56.5  87.5 77.3    75.9    80.4
FashionIQ         11.4     13.8   20.1   9.3   11.2  2.8  40.2  16.2  54.9 28.6    22.2    28.9
EDIS              81.0     77.5   23.6  54.4   62.6 26.8  79.2  87.8  65.6 83.6    80.8    96.9
Wiki-SS-NQ        55.0     44.6   55.1  28.7   18.7  8.6  12.2  60.2  24.9 65.2    73.3    82.7
MSCOCO            33.8     34.5   46.4  28.9   22.1 10.8  46.6  80.6  76.8 85.0    80.2    84.6
Visual7W-Pointing 55.1     56.3   70.1  52.0   23.4 14.3  71.3  90.9  77.0 92.3    89.5    95.3
RefCOCO           56.9     54.2   70.8  47.4   22.8 11.9  67.8  88.7  89.8 92.7    92.1    94.0
RefCOCO-Matching  61.3     68.3   50.8  59.5   35.6 38.9  62.9  84.0  90.6 88.9    92.8    95.5
"""

# The authors' own evaluation of their models and of others with one program.
_RERUN = """
dataset           V1-2B V1-7B V2.0-2B GME-2B GME-7B LamRA-2 LamRA-2.5 ColPali
ImageNet-1K        77.5  80.2    80.8   58.1   64.7    72.6      59.2    42.3
N24News            73.8  79.5    73.0   50.3   50.3    51.6      30.4    25.6
HatefulMemes       57.9  70.3    55.8   53.7   53.9    49.1      50.2    50.9
VOC2007            74.3  80.6    84.9   75.8   80.1    80.0      78.2    69.8
SUN397             73.7  77.3    70.9   67.0   69.4    68.7      64.9    56.2
Place365           35.0  37.2    36.1   36.1   39.1    40.5      35.9    27.7
ImageNet-A         50.6  57.6    47.6   28.4   40.6    47.2      36.3    15.2
ImageNet-R         84.7  74.2    89.3   78.5   83.9    88.4      77.0    65.2
ObjectNet          36.9  40.5    65.1   71.2   69.0    66.3      59.2    45.6
Country211         21.7  30.2    25.8   26.4   24.6    28.3      20.6     6.0
OK-VQA             48.2  56.8    51.7   30.1   33.1    37.9      37.7     9.4
A-OKVQA            39.7  47.5    44.0   18.6   20.8    26.9      31.2     6.4
DocVQA             82.7  88.8    90.1   30.0   41.1    22.4      37.9    11.3
InfographicsVQA    47.3  59.0    59.1   11.8   20.5    16.5      23.2     5.0
ChartQA            42.2  56.6    48.1   13.3   17.7    11.6      14.5     5.7
Visual7W           50.9  52.7    52.8   15.6   22.2    19.8      24.4     6.1
ScienceQA          30.5  38.2    38.1   27.1   28.2    26.5      31.7    16.5
VizWiz             38.8  39.6    43.3   37.1   38.9    31.9      32.0    27.4
GQA                48.1  54.4    65.4   75.3   76.8    38.3      55.0     8.1
TextVQA            63.2  71.6    71.6   39.5   46.4    33.1      45.5    18.9
VisDial            75.1  81.6    82.7   47.7   60.9    61.0      63.0    41.1
CIRR               46.8  51.4    57.3   43.1   54.9    52.1      46.6     8.2
VisualNews_t2i     73.4  80.3    74.7   74.8   79.5    70.9      69.9    50.5
VisualNews_i2t     73.8  81.2    78.3   77.7   83.6    84.1      75.5    47.7
MSCOCO_t2i         73.1  77.5    75.9   68.3   71.5    72.0      68.0    58.6
MSCOCO_i2t         68.3  73.6    71.1   63.2   57.4    73.6      71.4    50.4
NIGHTS             65.8  67.5    68.4   67.6   67.6    65.7      65.8    65.4
WebQA              85.8  88.3    90.6   88.8   91.3    81.2      85.7    54.2
OVEN               68.4  66.6    64.8   72.1   75.6    82.2      85.0    50.1
FashionIQ          13.8  16.8    19.6   32.2   37.6    41.7      34.7     5.9
EDIS               81.4  85.9    84.2   91.7   96.1    86.1      80.5    65.2
Wiki-SS-NQ         54.6  62.1    67.6   73.8   78.4    70.1      66.5    80.5
MSCOCO             65.7  75.4    66.2   28.4   31.4    44.7      38.7    36.5
Visual7W-Pointing  69.1  80.7    69.0   64.6   66.5    67.1      51.5    56.3
RefCOCO            80.8  87.1    87.0   55.8   61.2    62.5      59.1    65.0
RefCOCO-Matching   76.6  84.4    86.3   73.7   78.7    76.2      84.5     1.2
"""


def _columns(table: str) -> dict[str, dict[str, float]]:
    """Scores by column and dataset of one of the tables above."""
    head, *lines = table.strip().splitlines()
    columns: dict[str, dict[str, float]] = {name: {} for name in head.split()[1:]}
    for line in lines:
        dataset, *values = line.split()
        for name, value in zip(columns, values, strict=True):
            columns[name][dataset] = float(value)
    return columns


def _all() -> tuple[Published, ...]:
    papers, rerun = _columns(_PAPERS), _columns(_RERUN)

    def one(model: str, source: str, column: dict[str, float] | None, *averages: float | None):
        printed = {g: a for g, a in zip(GROUPS, averages, strict=False) if a is not None}
        return Published(model, source, model.startswith("VLM2Vec"), column or {}, printed)

    def again(model: str, column: str, mean: float) -> Published:
        return one(model, RERUN, rerun[column], *[None] * 6, mean)

    return (
        # fmt: off
        one(
            "VLM2Vec Phi-3.5-V, LoRA rank 8", PAPER, None, 54.8, 54.9, 62.3, 79.5, 66.5, 52.0, 60.1
        ),
        one(
            "VLM2Vec Phi-3.5-V, full, 4 crops",
            PAPER,
            None,
            52.8,
            50.3,
            57.8,
            72.3,
            62.8,
            47.4,
            55.9,
        ),
        one("VLM2Vec LLaVA-1.6, 336 px", PAPER, None, 54.7, 50.3, 56.2, 64.0, 61.0, 47.5, 55.0),
        one(
            "VLM2Vec LLaVA-1.6, 1344 px",
            PAPER,
            papers["LLaVA"],
            61.2,
            49.9,
            67.4,
            86.1,
            67.5,
            57.1,
            62.9,
        ),
        one("VLM2Vec Qwen2-VL-7B", PAPER, None, 62.6, 57.8, 69.9, 81.7, 72.2, 57.8, 65.8),
        one("VLM2Vec Qwen2-VL-2B", CARD, None, 59.0, 49.4, 65.4, 73.4, 66.0, 52.6, 60.1),
        again("VLM2Vec Qwen2-VL-2B (rerun)", "V1-2B", 59.73),
        again("VLM2Vec Qwen2-VL-7B (rerun)", "V1-7B", 65.37),
        again("VLM2Vec-V2.0 2B", "V2.0-2B", 64.92),
        one("CLIP", PAPER, papers["CLIP"], 42.8, 9.1, 53.0, 51.8, 37.1, 38.7, 37.8),
        one("OpenCLIP", PAPER, papers["OpenCLIP"], 47.8, 10.9, 52.3, 53.3, 39.3, 40.2, 39.7),
        one("SigLIP", PAPER, papers["SigLIP"], 40.3, 8.4, 31.6, 59.5, 32.3, 38.0, 34.8),
        one("BLIP2", PAPER, papers["BLIP2"], 27.0, 4.2, 33.9, 47.0, 25.3, 25.1, 25.2),
        one("MagicLens", PAPER, papers["MagicL"], 38.8, 8.3, 35.4, 26.0, 31.0, 23.7, 27.8),
        one("E5-V", PAPER, papers["E5-V"], 21.8, 4.9, 11.5, 19.0, 14.9, 11.5, 13.3),
        one("UniIR CLIP_SF", PAPER, papers["UniIR"], 44.3, 16.2, 61.8, 65.3, 47.1, 41.7, 44.7),
        one("UniIR BLIP_FF", PAPER, None, 42.1, 15.0, 60.1, 62.2, 44.7, 40.4, 42.8),
        one("CLIP, fine-tuned", PAPER, None, 55.2, 19.7, 53.2, 62.2, 47.6, 42.8, 45.4),
        one("OpenCLIP, fine-tuned", PAPER, None, 56.0, 21.9, 55.4, 64.1, 50.5, 43.1, 47.2),
        one("MMRet-MLLM 7B", MOCA, papers["MMRet"], 56.0, 57.4, 69.9, 83.6, 59.1, 68.0, 64.1),
        one("mmE5 11B", MOCA, papers["mmE5"], 67.6, 62.7, 71.0, 89.7, 72.4, 66.6, 69.8),
        one("MoCa 3B", MOCA, papers["MoCa-3B"], 59.8, 62.9, 70.6, 88.7, 72.3, 61.5, 67.5),
        one("MoCa 7B", MOCA, papers["MoCa-7B"], 65.8, 64.7, 75.0, 92.4, 74.7, 67.6, 71.5),
        again("GME 2B", "GME-2B", 51.87),
        again("GME 7B", "GME-7B", 55.93),
        again("LamRA Qwen2-VL-7B", "LamRA-2", 54.13),
        again("LamRA Qwen2.5-VL-7B", "LamRA-2.5", 52.54),
        again("ColPali v1.3", "ColPali", 34.89),
        # fmt: on
    )


PUBLISHED: tuple[Published, ...] = _all()
"""VLM2Vec's models first, then others, in the order in which tables show them."""


def find(model: str) -> Published | None:
    """The entry of a model by the name that tables show, None if there is none."""
    return next((entry for entry in PUBLISHED if entry.model == model), None)


def of_dataset(name: str) -> dict[str, float]:
    """Percent of every model that has a published score on this dataset, by model."""
    return {p.model: p.scores[name] for p in PUBLISHED if name in p.scores}
